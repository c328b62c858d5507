"""What images are compared by: hashes against the definition, thumbnails, alignment, damaged files."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import affine_transform, gaussian_filter

from furnace.data import image_prints as module
from furnace.data.image_prints import (
    ORIENTATIONS,
    aligned_correlation,
    confirm,
    correlation,
    fine_structure,
    image_prints,
    oriented,
    perceptual_hashes,
)
from furnace.data.unlabelled import read_images
from furnace.runtime.files import UserError
from helpers import draw_images


def texture(seed: int, side: int = 32, sigma: float = 1.5) -> np.ndarray:
    """(side, side) float32 in 0..255, of coarse and fine structure."""
    noise = np.random.default_rng(seed).normal(size=(side, side))
    picture = sum(gaussian_filter(noise, s * side / 32, mode="wrap") * s for s in (sigma, 2 * sigma, 4 * sigma))
    return (127 + 120 * picture / np.abs(picture).max()).astype(np.float32)


def hash_by_hand(picture: np.ndarray) -> int:
    """The definition, term by term: DCT-II, frequencies 0..7 without (0, 0), above their median."""
    n = len(picture)
    values = []
    for u in range(8):
        for v in range(8):
            total = sum(float(picture[y, x]) * math.cos(math.pi * (2 * y + 1) * u / (2 * n))
                        * math.cos(math.pi * (2 * x + 1) * v / (2 * n)) for y in range(n) for x in range(n))
            scale = (1 if u else math.sqrt(0.5)) * (1 if v else math.sqrt(0.5)) * 2 / n
            values.append(total * scale)
    middle = sorted(values[1:])[31]
    return sum(1 << k for k, value in enumerate(values) if k and value > middle)


def bits(number: int) -> int:
    """A hash with its bits in the order of ``hash_by_hand``: the first is the highest of the lowest byte."""
    return sum(1 << (8 * byte + k) for byte in range(8) for k in range(8) if number >> (8 * byte + 7 - k) & 1)


def test_hash_is_the_definition() -> None:
    """31 of 63 bits are set, and they are the right ones."""
    picture = np.rint(texture(0)).astype(np.uint8)
    (row,) = perceptual_hashes(picture[None])
    assert bits(int(row[0])) == hash_by_hand(picture)
    assert int(row[0]).bit_count() == 31


def test_hashes_of_the_orientations(monkeypatch) -> None:
    """Column o is the hash of the picture that was mirrored and turned with Pillow; in several pieces, too."""
    monkeypatch.setattr(module, "PIECE", 2)
    pictures = np.stack([np.rint(texture(seed)).astype(np.uint8) for seed in range(5)])
    hashes = perceptual_hashes(pictures)
    assert hashes.shape == (5, 8) and len(np.unique(hashes)) == 40
    for k, name in enumerate(ORIENTATIONS):
        for picture, row in zip(pictures, hashes, strict=True):
            image = Image.fromarray(picture)
            if "mirrored" in name:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            turns = next((t for t in (90, 180, 270) if str(t) in name), 0)
            turned = np.asarray(image.rotate(turns))  # counterclockwise
            assert perceptual_hashes(turned[None])[0, 0] == row[k], name
            np.testing.assert_array_equal(oriented(picture[None], k)[0], turned)


def test_prints_of_files(tmp_path: Path) -> None:
    """The digest is of pixels and size, not of bytes or names; the thumbnail is grey and small."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.bmp")
    Image.fromarray(pixels.reshape(60, 40, 3)).save(tmp_path / "c.png")  # the same bytes in another shape
    pixels[39, 59, 2] ^= 1
    Image.fromarray(pixels).save(tmp_path / "d.png")
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "e.png")
    prints = image_prints(read_images(tmp_path))
    assert prints.names.tolist() == ["a.png", "b.bmp", "c.png", "d.png", "e.png"] and len(prints) == 5
    digests = prints.digests.tolist()
    assert digests[0] == digests[1] and len(set(digests)) == 4 and len(digests[0]) == 32
    assert prints.thumbnails.shape == (5, 32, 32) and (prints.thumbnails[4] == 76).all()  # 0.299 of 255
    np.testing.assert_array_equal(prints.hashes, perceptual_hashes(prints.thumbnails))
    chosen = prints.take([3, 0], number=7)
    assert chosen.names.tolist() == ["d.png", "a.png"] and chosen.number == 7 and prints.number == 0
    np.testing.assert_array_equal(chosen.hashes, prints.hashes[[3, 0]])
    np.testing.assert_array_equal(chosen.thumbnails, prints.thumbnails[[3, 0]])
    assert chosen.digests.tolist() == [digests[3], digests[0]]


def test_damaged_files_are_listed(tmp_path: Path) -> None:
    """All of those that break while decoded."""
    draw_images(tmp_path, ["a.png", "b.png", "c.png"])
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    with pytest.raises(UserError, match=r"(?s)2 images cannot be decoded.*row 1, .*a\.png.*row 3, .*c\.png"):
        image_prints(read_images(tmp_path), workers=1)


# ------------------------------------------------------------------------------------------------- comparing thumbnails

def test_correlation_is_numpys() -> None:
    x, y = (np.stack([texture(seed) for seed in seeds]) for seeds in ((0, 1), (2, 1)))
    want = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(correlation(x, y), want, atol=1e-5)


def test_alignment_is_a_least_squares_fit() -> None:
    """Equal to numpy's multiple correlation, a pair at a time."""
    x, y = (np.stack([texture(seed, sigma=1) for seed in seeds]) for seeds in ((0, 1, 2), (3, 4, 5)))
    place = np.linspace(-1, 1, 32)
    want = []
    for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        down, right = np.gradient(a)
        columns = [np.ones_like(a), a]
        for gradient in (down, right):
            columns += [gradient, gradient * place, gradient * place[:, None]]
        design = np.stack([c[1:-1, 1:-1].ravel() for c in columns], 1)
        goal = b[1:-1, 1:-1].ravel()
        fitted = design @ np.linalg.lstsq(design, goal, rcond=None)[0]
        want.append(np.corrcoef(fitted, goal)[0, 1])
    np.testing.assert_allclose(aligned_correlation(x, y), want, atol=1e-3)


@pytest.mark.parametrize(("matrix", "offset"), [(np.eye(2), (0.6, -0.5)), (np.eye(2) * 0.94, (0.9, 0.9)),
                                                (np.array([[1, 0.06], [-0.06, 1]]), (-0.9, 0.9))],
                         ids=["moved", "scaled", "turned by 3 degrees"])
def test_alignment_finds_small_movements(matrix: np.ndarray, offset: tuple[float, float]) -> None:
    """And brightness and contrast do not matter; another picture stays another."""
    x = texture(0)
    moved = affine_transform(x, matrix, offset, mode="nearest") * 0.5 + 30
    plain, aligned = correlation(x[None], moved[None])[0], aligned_correlation(x[None], moved[None])[0]
    assert plain < 0.985 and aligned > 0.995
    assert aligned_correlation(x[None], texture(1)[None])[0] < 0.6


def test_fine_structure_takes_the_coarse_away() -> None:
    """A slope and a level leave nothing in the middle; a checkerboard stays."""
    slope = np.add.outer(np.arange(32), 3 * np.arange(32)).astype(np.float32)[None]
    assert np.abs(fine_structure(slope)[0, 8:-8, 8:-8]).max() < 1e-3
    board = (np.indices((32, 32)).sum(axis=0) % 2 * 2 - 1).astype(np.float32)[None]
    np.testing.assert_allclose(fine_structure(board)[0, 8:-8, 8:-8], board[0, 8:-8, 8:-8], atol=0.02)


def two_of_one_layout() -> tuple[np.ndarray, np.ndarray]:
    """Two spots of one shape and other grain."""
    blob = 200 - 150 * np.exp(-((np.indices((32, 32)) - 15.5) ** 2).sum(axis=0) / 60)
    grain = [gaussian_filter(np.random.default_rng(seed).normal(size=(32, 32)), 0.7) for seed in range(2)]
    first, second = (blob + 5 * g / g.std() for g in grain)
    return first.clip(0, 255).astype(np.uint8), second.clip(0, 255).astype(np.uint8)


def test_confirmation(monkeypatch) -> None:
    """One picture, its mirror image, and others; in pieces, of which some hold nothing that is alike."""
    monkeypatch.setattr(module, "PIECE", 1)
    first, second = two_of_one_layout()
    pictures = np.stack([first, second, texture(5).astype(np.uint8), (first[:, ::-1] * 0.9 + 5).astype(np.uint8)])
    i, j, orientation = np.array([[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 3, 4], [1, 3, 4], [2, 2, 1]]).T
    found = confirm(pictures, pictures, i, j, orientation)
    assert np.isnan(found).tolist() == [False, True, True, False, True, True]
    assert found[0] == pytest.approx(1, abs=1e-4) and found[3] > 0.995
    assert len(confirm(pictures, pictures, i[:0], j[:0], i[:0])) == 0


@pytest.mark.parametrize("bound", ["ROUGH", "ALIKE", "DETAIL"])
def test_every_bound_counts(monkeypatch, bound: str) -> None:
    """Of the thumbnails as they are, aligned, and of their fine structure; the last alone tells the two spots apart."""
    first, second = (picture[None].astype(np.float32) for picture in two_of_one_layout())
    values = {"ROUGH": correlation(first, second)[0], "ALIKE": aligned_correlation(first, second)[0],
              "DETAIL": aligned_correlation(fine_structure(first), fine_structure(second))[0]}
    assert values["ROUGH"] > module.ROUGH and values["ALIKE"] > module.ALIKE and values["DETAIL"] < module.DETAIL
    pictures, place = np.stack(two_of_one_layout()), np.array([0])
    for name in values:
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(module, bound, values[bound] - 1e-4)
    assert confirm(pictures, pictures, place, place + 1, place)[0] == pytest.approx(values["ALIKE"])
    monkeypatch.setattr(module, bound, values[bound] + 1e-4)
    assert np.isnan(confirm(pictures, pictures, place, place + 1, place)).all()
