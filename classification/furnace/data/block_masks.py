"""Which patches of a crop are hidden from the student: unions of rectangles (BEiT, arXiv 2106.08254; iBOT, DINOv2)."""

import math

import numpy as np

SMALLEST = 4  # patches of a rectangle, unless fewer are left to hide
LARGEST = 0.5  # share of the grid that one rectangle covers at most
ASPECT = 0.3  # of a rectangle's height to its width, at least; at most 1 / ASPECT
TRIES = 10  # rectangles that are drawn before a crop stays as it is


def block_masks(crops: int, grid: tuple[int, int], *, share: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5),
                rng: np.random.Generator) -> np.ndarray:
    """Masks of the crops of one batch, as published with iBOT and DINOv2.

    int(crops x share) crops, at random, are masked. The interval ``ratio`` is cut into that many equal parts, and each
    of these crops hides a share from one part: so a batch has shares of all sizes. Rectangles are added until the
    wanted number of patches is hidden, never more; in one of ten crops up to a few patches are missing, where no
    rectangle that was drawn fitted in.

    Args:
        crops: of the batch, over both views.
        grid: (h, w) patches of a crop.
        share: of the crops that are masked.
        ratio: smallest and largest share of the patches that a masked crop hides.
        rng: the random numbers.

    Returns:
        (crops, h x w) bool, row by row; True is hidden.

    Raises:
        ValueError: shares that are not in 0 to 1, or ratios in the wrong order.
    """
    if not 0 <= share <= 1 or not 0 <= ratio[0] <= ratio[1] <= 1:
        raise ValueError(f"share {share} and ratio {ratio} must be in 0 to 1, the smaller ratio first")
    masks = np.zeros((crops, *grid), dtype=bool)
    masked = rng.permutation(crops)[:int(crops * share)]
    parts = np.linspace(*ratio, len(masked) + 1)
    for crop, low, high in zip(masked, parts[:-1], parts[1:], strict=True):
        hide(masks[crop], int(grid[0] * grid[1] * rng.uniform(low, high)), rng)
    return masks.reshape(crops, grid[0] * grid[1])


def hide(mask: np.ndarray, wanted: int, rng: np.random.Generator) -> None:
    """Set rectangles of (h, w) bool until ``wanted`` patches are set, or nearly."""
    while wanted > 0:
        added = _hide_rectangle(mask, wanted, rng)
        if not added:
            return
        wanted -= added


def _hide_rectangle(mask: np.ndarray, most: int, rng: np.random.Generator) -> int:
    """Set one rectangle that adds 1 to ``most`` patches; returns how many it added, 0 if none of TRIES fitted."""
    height, width = mask.shape
    most = min(most, int(LARGEST * mask.size))
    drawn = rng.random((TRIES, 4))
    area = SMALLEST + (most - SMALLEST) * drawn[:, 0]  # where fewer than SMALLEST are left, between the two
    side = np.exp(math.log(ASPECT) * (2 * drawn[:, 1] - 1) / 2)  # square root of the aspect ratio
    for h, w, down, right in zip(np.rint(np.sqrt(area) * side).astype(int).tolist(),
                                 np.rint(np.sqrt(area) / side).astype(int).tolist(),
                                 drawn[:, 2].tolist(), drawn[:, 3].tolist(), strict=True):
        if not 0 < h < height or not 0 < w < width:
            continue
        top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
        part = mask[top:top + h, left:left + w]
        added = h * w - int(np.count_nonzero(part))
        if 0 < added <= most:
            part[:] = True
            return added
    return 0
