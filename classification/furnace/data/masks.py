"""From a mask file to a boolean array, and the check of a data set's masks before anything is trained."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageChops, ImageOps

from furnace.data.class_names import some
from furnace.data.images import DECODE_ERRORS, check_files
from furnace.data.problems import ROW, Problem

LOSSY = ("JPEG", "MPO", "WEBP")
NOISE = 16  # grey levels that lossy compression may move black or white by
RINGING = 0.05  # share of a lossy mask's pixels that may lie between: those along the outline
UPRIGHT_SWAPS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
NO_IMAGE_KINDS = {"missing file": "missing mask", "no file name": "missing mask", "empty file": "unreadable mask",
                  "not an image": "unreadable mask", "wrong folder": "no mask found"}


class MaskError(ValueError):
    """A picture whose values do not say which pixels are lesion."""


def load_mask(path: str | Path) -> np.ndarray:
    """Decode a mask file to (H, W) bool, True = lesion, at its own size.

    The values must be 0 and 1 (then 1 is lesion) or 0 and 255 (then 255 is), in 1-bit, grey, palette or RGB files with
    or without transparency, which is ignored. A coloured palette counts by its indices, where these are 0 and 1. Of 16
    bits the upper eight count, unless all values are below 256. In JPEG and lossy WebP files, whose values are never
    exact, 128 and more is lesion; of their pixels at most 5 % (those along the outline) may be further than 16 levels
    from 0 and 255. A lossless file with other values is refused rather than thresholded: 0, 1, 255 or 0, 1, 2 are
    classes, and what they mean cannot be seen.

    Raises:
        MaskError: other values, colours, or a shape that is drawn in the transparency alone.
        One of DECODE_ERRORS (MaskError is one): the file is damaged.
    """
    with Image.open(path) as image:
        image.load()
        lossy = image.format in LOSSY
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "1":
            return np.array(image, dtype=bool)
        return _two_levels(_grey(image), lossy)


def _grey(image: Image.Image) -> Image.Image:
    """As 8-bit grey, without transparency."""
    if image.mode == "L":
        return image
    if image.mode == "F":
        raise MaskError("it holds floating-point values")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise MaskError(f"it holds values {values.min()} to {values.max()}")
        return Image.fromarray((values if values.max() < 256 else values >> 8).astype(np.uint8))
    colours = image.convert("RGB")
    if _is_coloured(colours):
        if image.mode == "P" and image.getextrema()[1] <= 1:
            return Image.fromarray(np.array(image))  # the indices, without their palette
        raise MaskError("it is a colour picture, not a mask")
    grey = colours.getchannel(0)
    if image.mode in ("LA", "RGBA", "PA") and len(set(grey.getextrema())) == 1:
        if len(set(image.getchannel("A").getextrema())) > 1:
            raise MaskError("its shape is drawn in the transparency alone")
    return grey


def _is_coloured(image: Image.Image) -> bool:
    pairs = combinations(image.split(), 2)
    return any(ImageChops.difference(one, other).getextrema()[1] > NOISE for one, other in pairs)


def _two_levels(grey: Image.Image, lossy: bool) -> np.ndarray:
    counts = np.array(grey.histogram())
    levels = np.flatnonzero(counts)
    if lossy:
        between = counts[NOISE + 1:255 - NOISE].sum() / counts.sum()
        if between > RINGING:
            raise MaskError(f"{between:.0%} of its pixels are neither black nor white")
    elif levels[-1] <= 1:
        return np.asarray(grey) > 0
    elif not set(levels.tolist()) <= {0, 255}:
        raise MaskError(f"it has the grey values {some(levels)}")
    return np.asarray(grey) >= 128


def check_masks(frame: pd.DataFrame, root: Path, problems: list[Problem]) -> tuple[str, np.ndarray]:
    """Decode every mask, with threads; what is wrong with them becomes problems, in the order of the rows.

    Missing and unreadable masks, a size other than the image's and other values are errors. A mask without a lesion
    pixel is a warning.

    Args:
        frame: with the columns image, mask and ROW.
        root: the folder that both are relative to.
        problems: extended.

    Returns:
        Hex SHA-256 over the names and contents of the masks, and (N,) int64 lesion pixels, -1 where a mask is not read.
    """
    absent: list[Problem] = []
    digest, ids = check_files(frame.assign(image=frame["mask"]), root, absent)
    for problem in absent:
        remedy = "name the mask, or delete the row" if problem.kind == "no file name" else problem.remedy
        problems.append(replace(problem, kind=NO_IMAGE_KINDS[problem.kind], column="mask",
                                text=problem.text.replace(" images lie", " masks lie"),
                                remedy=remedy.replace(" image", " mask")))
    jobs = [(root, image, mask if content else None)
            for image, mask, content in zip(frame["image"], frame["mask"], ids, strict=True)]
    with ThreadPoolExecutor(max_workers=16) as pool:
        looked = list(pool.map(lambda job: _look(*job), jobs))
    for (_, fault), mask, row in zip(looked, frame["mask"], frame[ROW], strict=True):
        if fault:
            problems.append(Problem(row=int(row), column="mask", file=mask, **fault))
    return digest, np.array([pixels for pixels, _ in looked], dtype=np.int64)


def _look(root: Path, image: str | None, mask: str | None) -> tuple[int, dict]:
    """Lesion pixels (-1 when not read) and what is wrong with the mask."""
    if mask is None:
        return -1, {}
    try:
        lesion = load_mask(root / mask)
    except MaskError as error:
        return -1, {"kind": "mask values", "text": str(error),
                    "remedy": "save it with 0 for skin and 255 for lesion, or name the right file"}
    except DECODE_ERRORS as error:
        return -1, {"kind": "unreadable mask", "text": f"cannot be decoded ({error})",
                    "remedy": "copy or download it again"}
    size = upright_size(root / image) if image else None
    if size is not None and size != lesion.shape:
        return -1, {"kind": "mask of another size",
                    "text": f"has {_sides(lesion.shape)} pixels and its image {image} {_sides(size)}",
                    "remedy": "take the mask of the same size; resizing one of them would move the outline"}
    pixels = int(lesion.sum())
    return pixels, {} if pixels else {"kind": "empty mask", "text": "has no lesion pixel", "warning": True,
                                      "remedy": "see whether that is right; it counts as an image without lesion"}


def upright_size(path: Path) -> tuple[int, int] | None:
    """(H, W) of an image as ``load_rgb`` gives it, from its header; None where that cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            swapped = image.getexif().get(0x0112) in UPRIGHT_SWAPS
    except DECODE_ERRORS:
        return None
    return (width, height) if swapped else (height, width)


def _sides(shape: tuple[int, ...]) -> str:
    """As dermatology sets state it: width x height."""
    return f"{shape[1]} x {shape[0]}"
