"""Outlines of masks on photographs, and a sheet of the images that a model outlines worst."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from PIL import Image, ImageColor

from furnace.data.images import load_rgb
from furnace.evaluation.masks import boundary, checked_mask, checked_pair
from furnace.evaluation.segmentation_metrics import confusion_counts, pooled_metrics
from furnace.evaluation.sheets import Tile, image_sheet

# of Okabe and Ito's palette: they differ in lightness as well as in hue, and neither is a colour of skin or pigment
TRUTH, PREDICTION = "#0072B2", "#F0E442"
LEGEND = "blue: true outline, yellow: predicted"
COLUMNS = 4
SIDE_PER_PIXEL = 300  # of the shorter side, for every pixel of a line's width


def outlined(image: Image.Image, masks: Sequence[np.ndarray], *, colours: Sequence[str] = (TRUTH, PREDICTION),
             width: int | None = None) -> Image.Image:
    """Draw the outlines of masks on a picture, from each mask's boundary inwards.

    Earlier masks have broader lines, so that all are seen where outlines coincide. An empty mask draws nothing.

    Args:
        image: RGB.
        masks: (H, W) bool each, of the image's size.
        colours: of each mask's line: of the truth and the prediction; more than masks is fine.
        width: of the last mask's line in pixels, the one before has twice that, and so on; by default 1 for a shorter
            side up to 450 pixels, growing with it, so that overlays of all sizes look alike.

    Returns:
        RGB of the image's size, a new picture.

    Raises:
        ValueError: a mask of another size or type, or a mask without a colour.
    """
    if len(colours) < len(masks):
        raise ValueError(f"{len(colours)} colours for {len(masks)} masks")
    pixels = np.array(image.convert("RGB"))
    width = width or max(1, round(min(image.size) / SIDE_PER_PIXEL))
    for number, (mask, colour) in enumerate(zip(masks, colours, strict=False)):
        if checked_mask(mask).shape != pixels.shape[:2]:
            raise ValueError(f"the picture has {image.width} x {image.height} pixels and mask {number} "
                             f"{mask.shape[1]} x {mask.shape[0]}")
        pixels[_line(mask, width * (len(masks) - number))] = ImageColor.getrgb(colour)
    return Image.fromarray(pixels)


def _line(mask: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: the mask's pixels less than ``width`` from its boundary.

    A disc round every pixel of the boundary, drawn as rows of which only the two ends are written: the work hardly
    grows with the picture or the width, unlike that of a distance transform or an erosion.
    """
    y, x = np.nonzero(boundary(mask))
    height, right = mask.shape
    ends = np.zeros((height, right + 1), dtype=np.int32)
    for dy in range(1 - width, width):
        half = math.isqrt(width * width - 1 - dy * dy)
        seen = (y + dy >= 0) & (y + dy < height)
        np.add.at(ends, (y[seen] + dy, (x[seen] - half).clip(min=0)), 1)
        np.add.at(ends, (y[seen] + dy, (x[seen] + half + 1).clip(max=right)), -1)
    return (np.cumsum(ends, axis=1, out=ends)[:, :right] > 0) & mask


@dataclass(frozen=True)
class Case:
    """An image to show.

    Attributes:
        path: the image file.
        name: for the caption.
        truth: (H, W) bool, of the image's upright size.
        predicted: (H, W) bool.
    """

    path: Path
    name: str
    truth: np.ndarray
    predicted: np.ndarray


def worst_rows(table: pd.DataFrame, count: int = 12) -> pd.DataFrame:
    """The rows of the images with the lowest Dice, lowest first; of equal ones in the order of the table."""
    return table.sort_values("dice", kind="stable").head(count)


def worst_cases_sheet(path: str | Path, cases: Sequence[Case], *, title: str = "Lowest Dice first",
                      tile: int = 240) -> None:
    """Write a PNG of images with both outlines, the Dice of the full-size masks in the caption, lowest first.

    Args:
        path: the PNG.
        cases: of ``worst_rows``; all their masks are in memory, so keep them few.
        title: over the sheet; the colours are explained after it.
        tile: side of the square that each picture is fitted into, in pixels.

    Raises:
        ValueError: no case, or masks of another size than their image.
        One of data.images.DECODE_ERRORS: an image cannot be decoded.
        OutputError: ``path`` cannot be written.
    """
    scored = sorted(((_dice(case), case) for case in cases), key=lambda pair: pair[0])
    with TemporaryDirectory() as folder:
        tiles = []
        for number, (dice, case) in enumerate(scored):
            picture = Path(folder) / f"{number}.png"
            _small(case, tile).save(picture)
            tiles.append(Tile(picture, f"{case.name}\nDice {dice:.3f}{_remark(case)}"))
        rows = [tiles[start:start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
        image_sheet(path, rows, title=f"{title}; {LEGEND}", tile=tile)


def _dice(case: Case) -> float:
    return pooled_metrics(confusion_counts(case.predicted, case.truth))["pooled_dice"]


def _remark(case: Case) -> str:
    """What cannot be seen in the picture."""
    empty = [what for what, mask in (("truth", case.truth), ("prediction", case.predicted)) if not mask.any()]
    return f" ({' and '.join(empty)} empty)" if empty else ""


def _small(case: Case, tile: int) -> Image.Image:
    """The case in the size of its tile: outlines drawn at full size would fade when reduced."""
    image, masks = load_rgb(case.path), checked_pair(case.predicted, case.truth)[::-1]
    if masks[0].shape != image.size[::-1]:
        raise ValueError(f"{case.path} has {image.width} x {image.height} pixels and its masks "
                         f"{masks[0].shape[1]} x {masks[0].shape[0]}")
    scale = tile / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    small = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    return outlined(image.resize(size, Image.Resampling.LANCZOS), small, width=1)
