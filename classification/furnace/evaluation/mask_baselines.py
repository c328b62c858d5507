"""Two trivial ways to outline a lesion, which every trained model must beat: a disc in the middle, and Otsu."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from PIL import Image

from furnace.evaluation.masks import checked_mask

FRACTIONS = np.arange(1, 31) / 20  # 1 touches the nearer sides, 1.5 covers a square


@lru_cache(maxsize=4)
def _radii(shape: tuple[int, int]) -> np.ndarray:
    """(H, W) distances from the middle, in halves of the shorter side; read-only, since it is shared."""
    height, width = shape
    y, x = np.arange(height)[:, None] - (height - 1) / 2, np.arange(width) - (width - 1) / 2
    radii = np.hypot(y, x) / (min(shape) / 2)
    radii.flags.writeable = False
    return radii


@lru_cache(maxsize=4)
def _rings(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) index of the smallest of FRACTIONS whose disc holds the pixel, and the pixels of each disc."""
    rings = np.searchsorted(FRACTIONS, _radii(shape))
    rings.flags.writeable = False
    return rings, _inside(rings)


def _inside(rings: np.ndarray) -> np.ndarray:
    """How many of these pixels lie in each disc; those in none have the last index."""
    return np.bincount(rings.ravel(), minlength=len(FRACTIONS) + 1)[:-1].cumsum()


def centred_disc(shape: tuple[int, int], fraction: float) -> np.ndarray:
    """A disc in the middle of the picture.

    Args:
        shape: (H, W) in pixels.
        fraction: its diameter as a fraction of the shorter side; above 1 it is cut off by the sides.

    Returns:
        (H, W) bool: the pixels whose centre lies in the disc.
    """
    return _radii(tuple(shape)) <= fraction


def best_disc(truths: Iterable[np.ndarray]) -> float:
    """The fraction for ``centred_disc``, of FRACTIONS, with the highest mean Dice; the smaller one when two tie.

    Args:
        truths: (H, W) bool masks of the training images, of any sizes, one in memory at a time.

    Raises:
        ValueError: no mask at all.
    """
    total = None
    for truth in truths:
        rings, disc = _rings(checked_mask(truth).shape)
        dice = 2 * _inside(rings[truth]) / np.maximum(disc + np.count_nonzero(truth), 1)
        total = dice if total is None else total + dice
    if total is None:
        raise ValueError("no masks to choose the disc by")
    return float(FRACTIONS[total.argmax()])


def otsu_mask(rgb: np.ndarray | Image.Image) -> np.ndarray:
    """The darker side of Otsu's threshold of the grey picture (ITU-R 601 luma).

    Source: Otsu, A threshold selection method from gray-level histograms, 1979.

    Args:
        rgb: (H, W, 3) uint8, or a picture.

    Returns:
        (H, W) bool, empty when all is of one grey.
    """
    grey = np.asarray((rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)).convert("L"))
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    dark, mass = counts.cumsum(), (counts * np.arange(256)).cumsum()
    light = dark[-1] - dark
    split = (dark > 0) & (light > 0)  # both sides have pixels
    if not split.any():
        return np.zeros(grey.shape, dtype=bool)
    between = np.zeros(256)
    between[split] = (mass[split] * dark[-1] - mass[-1] * dark[split]) ** 2 / (dark[split] * light[split])
    return grey <= between.argmax()
