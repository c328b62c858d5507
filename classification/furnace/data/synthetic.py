"""Draw a demo data set: synthetic skin lesions on six skin tones, with labels, masks, metadata and captions.

The pictures are computed and carry no medical meaning. Colour is modelled as optical density: skin and lesion are
layers of a melanin-like and a blood-like pigment, so one lesion looks different, and less contrasted, on darker skin.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter

from furnace.runtime.progress import progress

CSV_NAME, README_NAME, DRAWING_VERSION = "synthetic_lesions.csv", "README.txt", 1
SITES = ("face", "scalp", "neck", "chest", "back", "abdomen", "upper arm", "forearm", "thigh", "lower leg")
# sRGB of the skin types 1..6, and the optical density per unit of pigment in the three channels.
SKIN = np.array([(243, 210, 194), (232, 190, 166), (213, 164, 134), (178, 126, 94), (128, 83, 58), (82, 51, 36)]) / 255
MELANIN, BLOOD = np.array([0.58, 0.82, 1.00], np.float32), np.array([0.20, 1.00, 0.85], np.float32)
# Structures of small dots: cell frequencies (per lesion radius), share of cells with a dot, its radius in cells.
DOTS = {"globules": (5.0, 8.0, 0.55, 0.45), "openings": (4.0, 6.0, 0.30, 0.32), "cysts": (3.5, 5.5, 0.30, 0.30)}
# Structures of ragged discs: the most discs, their radius, their largest distance from the centre (lesion radius = 1).
BLOBS = {"blotch": (2, 0.42, 0.5), "blue": (4, 0.33, 0.55), "scar": (2, 0.32, 0.6), "patch": (1, 0.45, 0.15)}
WORDS = {"network": "a pigment network", "globules": "brown globules", "openings": "dark pits",
         "cysts": "white cysts", "blotch": "a dark blotch", "blue": "blue-grey areas", "scar": "white scar-like areas",
         "patch": "a central white patch", "vessels": "branching vessels", "lacunae": "red-purple lacunae"}  # fmt: skip
MALIGNANT, CLASS_NAMES = (1, 2), (
    "synthetic nevus", "synthetic melanoma", "synthetic basal cell carcinoma",
    "synthetic seborrheic keratosis", "synthetic dermatofibroma", "synthetic vascular lesion")  # fmt: skip
# Per class: ranges of slow (asymmetry) and fast (border) outline waves, edge half width (lesion radius = 1), pigments
# (1 = mid brown, red on fair skin), colour variation; then the chance of each structure. Classes overlap on purpose.
TRAITS = ("asymmetry", "border", "edge", "melanin", "blood", "mottle")
STYLES = (
    (((0.00, 0.28), (0.00, 0.05), (0.03, 0.14), (0.45, 1.25), (0.00, 0.25), (0.05, 0.38)),
     {"network": 0.70, "globules": 0.45, "blotch": 0.08, "blue": 0.04, "cysts": 0.04}),
    (((0.10, 0.60), (0.03, 0.13), (0.02, 0.12), (0.80, 1.90), (0.00, 0.40), (0.35, 0.95)),
     {"network": 0.55, "globules": 0.50, "blotch": 0.70, "blue": 0.60, "scar": 0.40, "vessels": 0.06}),
    (((0.05, 0.45), (0.01, 0.08), (0.07, 0.24), (0.00, 0.40), (0.25, 0.65), (0.10, 0.45)),
     {"vessels": 0.88, "blue": 0.45, "scar": 0.20, "globules": 0.06, "cysts": 0.05}),
    (((0.00, 0.42), (0.00, 0.08), (0.015, 0.08), (0.25, 1.15), (0.00, 0.15), (0.10, 0.50)),
     {"cysts": 0.82, "openings": 0.72, "network": 0.06, "blue": 0.04}),
    (((0.00, 0.28), (0.00, 0.06), (0.09, 0.26), (0.30, 0.85), (0.05, 0.35), (0.05, 0.35)),
     {"patch": 0.88, "network": 0.55, "vessels": 0.06, "globules": 0.06}),
    (((0.00, 0.42), (0.00, 0.09), (0.02, 0.14), (0.00, 0.35), (0.55, 1.50), (0.10, 0.50)),
     {"lacunae": 0.85, "blotch": 0.15, "blue": 0.12, "scar": 0.06, "vessels": 0.10}))  # fmt: skip


@dataclass(frozen=True)
class Lesion:
    """What all views of one lesion share."""

    label: int
    skin_type: int  # 1..6
    tone: np.ndarray  # (3,) skin colour, 0..1
    radius: float  # half image widths
    outline: np.ndarray  # (720,) radius over the angle, mean 1
    traits: dict[str, float]  # by TRAITS
    amounts: dict[str, float]  # strength 0..1 of the structures that are drawn
    seed: list[int]  # of the noise fields


def _lesion(seed: int, number: int, patient: int, label: int, skin_type: int) -> Lesion:
    """Parameters of lesion ``number`` from its own generator; the skin tone comes from the patient's."""
    rng, (ranges, structures) = np.random.default_rng([seed, 1, number]), STYLES[label]
    traits = {key: float(rng.uniform(*limits)) for key, limits in zip(TRAITS, ranges, strict=True)}
    traits["melanin"] += 0.05 * (skin_type - 1)
    angle, outline = np.arange(720) / 720 * 2 * np.pi, np.ones(720)
    for k in range(1, 15):
        amplitude = 0.55 * traits["asymmetry"] / k if k <= 3 else 0.6 * traits["border"] * (4 / k) ** 0.9
        outline += amplitude * rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    outline *= 1 + rng.uniform(0, 0.18) * np.cos(2 * angle)
    outline = np.clip(outline / outline.mean(), 0.45, 1.6).astype(np.float32)
    amounts = {key: float(rng.uniform(0.5, 1.0)) for key, share in structures.items() if rng.random() < share}
    pigment = np.random.default_rng([seed, 3, patient]).normal(0, [0.07, 0.04])
    tone = np.minimum(SKIN[skin_type - 1] * np.exp(-pigment[0] * MELANIN - pigment[1] * BLOOD), 0.98)
    return Lesion(label, skin_type, tone, float(rng.uniform(0.38, 0.6)), outline, traits, amounts, [seed, 4, number])


def _caption(lesion: Lesion, site: str) -> str:
    """One English sentence made from the parameters that were drawn."""
    melanin, blood, dark = lesion.traits["melanin"], lesion.traits["blood"], lesion.skin_type >= 5
    browns = ("brown", "dark brown", "brown-black") if dark else ("light brown", "brown", "dark brown")
    colours = [browns[(melanin > 0.6) + (melanin > 1.15)]] if melanin > 0.2 else []
    if blood > 0.3 or not colours:
        colours.append("reddish brown" if dark else "red" if blood > 0.7 else "pink")
    ragged = lesion.traits["border"] > 0.06 or lesion.traits["asymmetry"] > 0.3
    border = f"{'an irregular' if ragged else 'a regular'}, {'sharp' if lesion.traits['edge'] < 0.08 else 'blurred'}"
    seen = [WORDS[key] for key in lesion.amounts]
    showing = f", showing {' and '.join([', '.join(seen[:-1])] * (len(seen) > 1) + seen[-1:])}" if seen else ""
    return (f"Drawing of a {CLASS_NAMES[lesion.label]}, {' and '.join(colours)}, with {border} border{showing}, "
            f"on the {site}, Fitzpatrick skin type {lesion.skin_type}.")  # fmt: skip


def _noise(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, frequency: float, octaves: int = 3) -> np.ndarray:
    """Smooth noise of about unit variance at the points (u, v) (any shape), ``frequency`` bumps per unit length."""
    total = np.zeros_like(u)
    for octave in range(octaves):
        lattice = rng.normal(size=(64, 64)).astype(np.float32)
        p, q = u * (frequency * 2**octave) + 0.37, v * (frequency * 2**octave) + 0.61
        i, j = np.floor(p), np.floor(q)
        a, b = _step(p - i), _step(q - j)
        i, j = i.astype(np.int32) & 63, j.astype(np.int32) & 63
        k, m = (i + 1) & 63, (j + 1) & 63
        near, far = lattice[i, j] * (1 - a) + lattice[k, j] * a, lattice[i, m] * (1 - a) + lattice[k, m] * a
        total += (near * (1 - b) + far * b) * (1.3 * 0.55**octave)
    return total


def _cells(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, frequency: float) -> tuple[np.ndarray, ...]:
    """Cellular noise: distances to the nearest and second nearest centre (in cells), and a value 0..1 per cell."""
    shift, values = rng.uniform(0.1, 0.9, (2, 64, 64)).astype(np.float32), rng.random((64, 64), dtype=np.float32)
    p, q = u * np.float32(frequency), v * np.float32(frequency)
    i, j = np.floor(p).astype(np.int32), np.floor(q).astype(np.int32)
    first, second, value = np.full_like(u, 9), np.full_like(u, 9), np.zeros_like(u)
    for a, b in np.ndindex(3, 3):
        row, column = i + (a - 1), j + (b - 1)
        k, m = row & 63, column & 63
        distance = np.hypot(row + shift[0, k, m] - p, column + shift[1, k, m] - q).astype(np.float32)
        second = np.minimum(second, np.maximum(first, distance))
        value = np.where(distance < first, values[k, m], value)
        first = np.minimum(first, distance)
    return first, second, value


def _step(x: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Smooth step from 0 at ``low`` to 1 at ``high``."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _strokes(size: int, lines: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """Antialiased coverage (size, size), 0..1, of lines: points (n, 2) as x, y and width, in half image widths."""
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    for points, width in lines:
        pen.line([tuple(point) for point in ((points + 1) * size).tolist()], 255, max(1, round(width * size)), "curve")
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _paint_lesion(skin: np.ndarray, lesion: Lesion, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the lesion in a pose from ``rng`` into ``skin`` (size, size, 3), 0..1; returns it and the mask."""
    size, turn, centre = len(skin), rng.uniform(0, 2 * np.pi), rng.uniform(-0.15, 0.15, 2)
    scale = min(lesion.radius * rng.uniform(0.85, 1.18), 0.64) * np.array([1.0, rng.uniform(0.9, 1.1)])
    pose = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])  # picture -> lesion
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    dx, dy = (axis[None] - centre[0]) / scale[0], (axis[:, None] - centre[1]) / scale[1]
    u, v = ((row[0] * dx + row[1] * dy).astype(np.float32) for row in pose)
    # From here on, everything but the vessels' canvas depends on the lesion's own coordinates and seed.
    rng, traits, amounts = np.random.default_rng(lesion.seed), lesion.traits, lesion.amounts
    angle, mottle, warp = np.arctan2(v, u), traits["mottle"], 0.05 + 0.10 * traits["mottle"]
    outline = lesion.outline[(angle * (360 / np.pi)).astype(np.int32) % 720]
    distance = np.hypot(u, v) - outline + (0.02 + 0.5 * traits["border"]) * _noise(rng, u, v, 3.0)
    edge = traits["edge"] * (1 + 0.7 * min(traits["asymmetry"] * 2, 1) * np.cos(angle + rng.uniform(0, 6.28))) / 2
    near = distance < 4 * traits["edge"] + 0.1
    u, v, depth, edge = u[near], v[near], -distance[near], np.maximum(edge[near], 1.2 / (size * scale[0]))
    alpha = 1 / (1 + np.exp(np.clip(-depth / edge, -30, 30)))
    slow, fine = _noise(rng, u, v, 1.4, 4), _noise(rng, u, v, 5.0, 2)
    fade = 1 + rng.uniform(-0.35, 0.35) * (1 - 2 * np.hypot(u, v))
    melanin = traits["melanin"] * np.clip(1 + 0.6 * mottle * slow + 0.12 * fine, 0.1, 2.2) * fade
    blood = traits["blood"] * np.clip(1 + 0.4 * mottle * _noise(rng, u, v, 1.8) + 0.1 * fine, 0.2, 2.0)
    marks = {key: np.zeros_like(u) for key in (*WORDS, "purple")}
    for key, amount in amounts.items():
        if key in DOTS:
            low, high, share, reach = DOTS[key]
            first, _, value = _cells(rng, u + 0.05 * fine, v, rng.uniform(low, high))
            marks[key] = amount * (value < share) * (1 - _step(first, 0.1, reach))
        elif key in BLOBS:
            (most, radius, far), ragged = BLOBS[key], 0.3 * _noise(rng, u, v, 2.5)
            for turn in rng.uniform(0, 2 * np.pi, rng.integers(1, most + 1)):
                away, reach = far * rng.uniform(0.2, 1), radius * rng.uniform(0.7, 1.3)
                offset = np.hypot(u - away * np.cos(turn), v - away * np.sin(turn)) / reach
                marks[key] = np.maximum(marks[key], amount * _step(1 - offset + ragged, -0.3, 0.8))
        elif key == "network":
            first, second, _ = _cells(rng, u + warp * slow, v + warp * fine, rng.uniform(6.5, 9.5))
            patchy = np.clip(1 + mottle * _noise(rng, u, v, 1.8), 0, 1.7) * (0.35 + 0.45 * traits["melanin"])
            marks[key] = amount * (0.65 - _step(second - first, 0.05, 0.42)) * patchy
        elif key == "lacunae":
            first, second, value = _cells(rng, u, v, rng.uniform(1.8, 3.4))
            marks[key] = amount * _step(second - first, 0.02, 0.4) * np.clip(1.2 - first, 0, 1)
            marks["purple"] = 0.6 * marks[key] * value
            blood = blood * 0.6 + marks[key] * (0.5 + 0.6 * value)
        elif key == "vessels":
            lines, stack = [], []  # a vessel: start (2,), heading, length, width, branching depth
            for at in rng.uniform(0, 2 * np.pi, rng.integers(2, 5)):
                start = rng.uniform(0.55, 0.95) * np.array([np.cos(at), np.sin(at)])
                stack.append((start, at + rng.normal(np.pi, 0.5), rng.uniform(0.8, 1.4), rng.uniform(0.035, 0.06), 0))
            for start, heading, length, width, depth in stack:  # grows while it is walked
                turns = np.cumsum(rng.normal(0, 0.28, 9)) + heading
                points = start + np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1) * length / 9, axis=0)
                lines.append((np.vstack([start, points]) @ pose * scale + centre, width * scale[0]))
                for k in rng.choice(8, size=3, replace=False) if depth < 2 else ():
                    side = turns[k] + rng.choice([-1, 1]) * rng.uniform(0.5, 1.1)
                    stack.append((points[k], side, length * rng.uniform(0.4, 0.65), width * 0.62, depth + 1))
            marks[key] = amount * _strokes(size, lines)[near]
    melanin = melanin + marks["network"] + 1.1 * marks["globules"] + 1.5 * marks["openings"]
    melanin = np.clip(melanin + 1.3 * marks["blotch"], 0, 3.2)
    blood = np.clip(blood + 1.2 * marks["vessels"], 0, 2.4)
    gain = alpha * (1.06 - 0.06 * lesion.skin_type)  # darker skin: less contrast
    rgb = skin[near] * np.exp(-gain[:, None] * (melanin[:, None] * MELANIN + blood[:, None] * BLOOD))
    dim, pale = 0.30 + 0.87 * float(lesion.tone.mean()), np.sqrt(lesion.tone) * np.array([1, 0.97, 0.97])
    rgb = rgb + (np.array([0.36, 0.10, 0.27]) * dim - rgb) * (alpha * marks["purple"])[..., None]
    rgb = rgb + (np.array([0.38, 0.43, 0.52]) * dim - rgb) * (alpha * 0.75 * marks["blue"])[..., None]
    white = np.max([0.75 * marks["scar"], 0.75 * marks["patch"], 0.9 * marks["cysts"]], axis=0)
    skin[near] = rgb + (pale - rgb) * (alpha * white)[..., None]
    return skin, distance < 0


def _draw(job: tuple[Path, Path, Lesion, int, list[int]]) -> None:
    """Draw one view (image path, mask path, lesion, size in pixels, seed); no nuisance depends on the class."""
    (image_path, mask_path, lesion, size, _), rng = job, np.random.default_rng(job[4])
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    bent = x[::2, ::2] + 0.03 * _noise(rng, x[::2, ::2], y[::2, ::2], 5, 1)
    first, second, value = _cells(rng, bent, y[::2, ::2], rng.uniform(9, 15))
    furrows = Image.fromarray(1 - _step(second - first, 0.0, 0.35) + 0.4 * value).resize((size, size))
    melanin = 0.07 * _noise(rng, x, y, 1.2, 2) + 0.05 * np.asarray(furrows) + 0.03 * _noise(rng, x, y, 18, 2)
    blood = 0.035 * _noise(rng, x, y, 1.6, 2) + 0.02 * _noise(rng, x, y, 9, 2)
    skin = lesion.tone * np.exp(-(melanin[..., None] * MELANIN + blood[..., None] * BLOOD))
    picture, mask = _paint_lesion(skin, lesion, rng)
    toward, vignette = rng.uniform(0, 2 * np.pi), (rng.random() < 0.4) * rng.uniform(0.1, 0.35)
    light = 1 + rng.uniform(0, 0.16) * (x * np.cos(toward) + y * np.sin(toward))
    light = (light - vignette * _step(np.hypot(x, y), 0.6, 1.4)) * rng.uniform(0.88, 1.1)
    picture = picture * light[..., None] * (1 + rng.normal(0, 0.02, 3))
    if rng.random() < 0.35:  # hairs
        t, hairs, comb = np.linspace(0, 1, 20)[:, None], [], rng.uniform(0, np.pi)
        for turn in rng.normal(comb, 0.5, rng.integers(3, 22)):
            middle, half = rng.uniform(-0.9, 0.9, 2), np.array([np.cos(turn), np.sin(turn)]) * rng.uniform(0.3, 1.1)
            bow = 2 * t * (1 - t) * rng.normal(0, 0.2, 2)
            hairs.append((middle + (2 * t - 1) * half + bow, rng.uniform(0.008, 0.018)))
        colour = np.array([0.80, 0.74, 0.62] if rng.random() < 0.3 else [0.13, 0.09, 0.07]) * rng.uniform(0.8, 1.2)
        picture = picture + (colour - picture) * (0.85 * _strokes(size, hairs))[..., None]
    if rng.random() < 0.18:  # ruler
        ends = [np.array([(0.9 - 0.08 * (k % 5 == 0), k / 8 - 1), (0.97, k / 8 - 1)]) for k in range(1, 16)]
        ruler = np.rot90(_strokes(size, [(end, 0.012) for end in ends]), int(rng.integers(4)))
        picture = picture + (np.array([0.08, 0.08, 0.1]) - picture) * (0.8 * ruler)[..., None]
    picture = picture + rng.uniform(0.004, 0.02) * rng.standard_normal((size, size, 3), dtype=np.float32)
    image = Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6) * size / 256))
    if rng.random() < 0.3:  # a coarse first compression
        image.save(buffer := io.BytesIO(), "JPEG", quality=int(rng.integers(35, 80)))
        image = Image.open(buffer).convert("RGB")
    Image.fromarray(mask).save(png := io.BytesIO(), "PNG")
    image.save(jpeg := io.BytesIO(), "JPEG", quality=92)
    _write(mask_path, png.getvalue())
    _write(image_path, jpeg.getvalue())


def _plan(images: int, seed: int) -> tuple[pd.DataFrame, list[Lesion]]:
    """The rows of the CSV, and the lesion of each row: patients are dealt to splits, then lesions and views to them."""
    rng, sizes = np.random.default_rng([seed]), np.diff([0, round(0.6 * images), round(0.75 * images), images]).tolist()
    skins, patients, rows, lesions = rng.permuted(np.tile(range(6), (images, 1)), axis=1).ravel().tolist(), [], [], []
    for split, left in zip(("train", "val", "test"), sizes, strict=True):
        labels, unseen = iter(rng.permuted(np.tile(range(6), (images, 1)), axis=1).ravel().tolist()), 6
        while left:
            patient: list[tuple[int, int]] = []  # label, number of views
            for _ in range(rng.integers(1, 4 if images >= 120 else 3)):
                unseen -= 1
                patient.append((next(labels), min(int(rng.integers(1, 4)), max(left - max(unseen, 0), min(left, 1)))))
                left -= patient[-1][1]
            patients.append((split, skins.pop() + 1, [lesion for lesion in patient if lesion[1]]))
    numbers = iter(range(images))
    for number, (split, skin_type, members) in enumerate(patients[k] for k in rng.permutation(len(patients))):
        sex, age = ("female", "male")[rng.integers(2)], int(np.clip(rng.normal(54, 17), 18, 90))
        for label, views in members:
            lesion_number, site = next(numbers), SITES[rng.integers(len(SITES))]
            lesion = _lesion(seed, lesion_number, number, label, skin_type)
            for _ in range(views):
                name = f"synthetic_{len(rows):05d}"
                rows.append({
                    "image": f"images/{name}.jpg", "label": label, "binary_label": int(label in MALIGNANT),
                    "split": split, "patient_id": f"patient_{number:04d}", "lesion_id": f"lesion_{lesion_number:05d}",
                    "sex": sex, "age": age, "skin_type": skin_type, "site": site, "mask": f"masks/{name}.png",
                    "caption": _caption(lesion, site), "class_name": CLASS_NAMES[label]})  # fmt: skip
                lesions.append(lesion)
    return pd.DataFrame(rows), lesions


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def draw_demo_data_set(output: str | Path, *, images: int = 600, size: int = 256, seed: int = 0,
                       workers: int | None = None) -> Path:  # fmt: skip
    """Draw the demo data set: CSV, pictures, masks, README; reuse a complete one, continue an interrupted one.

    Args:
        output: Folder to create; it must be new, empty, or hold this very data set.
        images: Number of pictures. From about 48 on, training and test split hold every class.
        size: Edge length in pixels, at least 32.
        seed: Seed >= 0; the same seed gives the same pixels whatever ``workers`` is.
        workers: Number of processes; all available CPUs when None.

    Returns:
        Path of the CSV file; its image and mask paths are relative to ``output``.

    Raises:
        FileExistsError: If ``output`` holds other files.
        ValueError: If an argument is out of range.
    """
    if images < 1 or size < 32 or seed < 0 or (workers is not None and workers < 1):
        raise ValueError("images and workers must be at least 1, size at least 32 and seed at least 0")
    output, (table, lesions) = Path(output), _plan(images, seed)
    readme = (
        "Synthetic lesions drawn by a program (furnace.data.synthetic): no real skin, patient or medical meaning.\n"
        "Outlines, pigments and structures are random numbers and noise fields; labels and captions describe these.\n"
        f"Parameters: version={DRAWING_VERSION} images={images} size={size} seed={seed}\n").encode()
    csv, csv_path = table.to_csv(index=False, lineterminator="\n").encode(), output / CSV_NAME
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        ours = (output / README_NAME).is_file() and (output / README_NAME).read_bytes() == readme
        if not ours or (csv_path.exists() and csv_path.read_bytes() != csv):
            raise FileExistsError(f"{output} is not empty and not the synthetic data set images={images}, size={size}, "
                                  f"seed={seed}; nothing was written. Choose a new or an empty folder.")
    jobs = [(output / image, output / mask, lesion, size, [seed, 2, index])
            for index, (image, mask, lesion) in enumerate(zip(table["image"], table["mask"], lesions, strict=True))]
    jobs = [job for job in jobs if not (job[0].is_file() and job[1].is_file())]
    if not jobs and csv_path.exists():
        return csv_path
    for folder in (output, output / "images", output / "masks"):
        folder.mkdir(parents=True, exist_ok=True)
    _write(output / README_NAME, readme)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cpus, len(jobs) // 4 + 1)
    with ProcessPoolExecutor(workers) as pool:  # starts no process before it is used
        done = pool.map(_draw, jobs, chunksize=4) if workers > 1 else map(_draw, jobs)
        list(progress(done, total=len(jobs), desc="Drawing synthetic lesions", unit="image", disable=None))
    _write(csv_path, csv)
    return csv_path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a demo data set of synthetic skin lesions.")
    parser.add_argument("output", type=Path, help="new or empty folder")
    for option, default in (("images", 600), ("size", 256), ("seed", 0), ("workers", None)):
        parser.add_argument(f"--{option}", type=int, default=default, help="default: %(default)s")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logging.info("%s", draw_demo_data_set(**vars(parser.parse_args())))
    except (FileExistsError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
