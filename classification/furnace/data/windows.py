"""A picture too large for a model, in overlapping windows whose predictions are blended into one map."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Box(NamedTuple):
    """A window's place in pixels; bottom and right are the first ones outside."""

    top: int
    left: int
    bottom: int
    right: int


def sliding_windows(size: tuple[int, int], window: tuple[int, int], overlap: float = 0.5) -> list[Box]:
    """Windows in rows that cover a picture, spread evenly, the first and last at the edges.

    Args:
        size: (H, W) of the picture.
        window: (h, w); cut to the picture where that is smaller.
        overlap: the least share of a window's side that neighbours have in common, in [0, 1).

    Returns:
        The boxes, from the top left, row by row; one where the window covers the picture.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap {overlap} is not in [0, 1)")
    rows, columns = (_starts(whole, part, overlap) for whole, part in zip(size, window, strict=True))
    height, width = min(size[0], window[0]), min(size[1], window[1])
    return [Box(top, left, top + height, left + width) for top in rows for left in columns]


def _starts(whole: int, part: int, overlap: float) -> list[int]:
    if whole < 1 or part < 1:
        raise ValueError(f"a window of {part} pixels in a picture of {whole}")
    if part >= whole:
        return [0]
    step = max(1, math.floor(part * (1 - overlap)))
    gaps = math.ceil((whole - part) / step)
    return [i * (whole - part) // gaps for i in range(gaps + 1)]


def blend(boxes: Sequence[Box], values: Iterable[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """One map from the predictions of the windows, each weighted by a Hann curve over its height and width.

    The curve is highest in the middle of a window and never 0, so that a map has no seams where windows end and no
    pixel is without a prediction. Weights are divided by their sum beforehand (it is a product of one over the rows and
    one over the columns), so that the only large thing in memory is the map itself.

    Args:
        boxes: from ``sliding_windows``.
        values: a prediction per box, in order: (h, w), or (C, h, w); consumed one by one.
        size: (H, W) of the map.

    Returns:
        (H, W) or (C, H, W) float32, on the device of the values.
    """
    rows = _weights([(box.top, box.bottom) for box in boxes], size[0])
    columns = _weights([(box.left, box.right) for box in boxes], size[1])
    if len(boxes) != len(rows) * len(columns) or len(set(boxes)) != len(boxes):
        raise ValueError("the boxes are no grid of rows and columns, as sliding_windows makes them")
    total = None
    for box, value in zip(boxes, values, strict=True):
        if total is None:
            total = torch.zeros(*value.shape[:-2], *size, dtype=torch.float32, device=value.device)
        down = rows[box.top, box.bottom].to(value.device)[:, None]  # (h, 1)
        across = columns[box.left, box.right].to(value.device)  # (w,)
        total[..., box.top:box.bottom, box.left:box.right] += value.float() * down * across
    return total


def _weights(spans: Sequence[tuple[int, int]], length: int) -> dict[tuple[int, int], torch.Tensor]:
    """For each different span its weights, which add up to 1 at every pixel."""
    curves = {span: _hann(span[1] - span[0]) for span in spans}
    total = torch.zeros(length, dtype=torch.float64)
    for (start, end), curve in curves.items():
        total[start:end] += curve
    if not (total > 0).all():
        raise ValueError("the boxes do not cover the picture")
    return {(start, end): (curve / total[start:end]).float() for (start, end), curve in curves.items()}


def _hann(length: int) -> torch.Tensor:
    """(length,) float64, between the zeros of the curve."""
    return torch.sin(torch.pi * (torch.arange(length, dtype=torch.float64) + 0.5) / length) ** 2


def predict_in_windows(crop: Callable[[Box], T], forward: Callable[[list[T]], torch.Tensor],
                       size: tuple[int, int], *, window: tuple[int, int], overlap: float = 0.5,
                       batch_size: int = 4) -> torch.Tensor:
    """Cut, predict and blend a picture with no more than a batch of windows in memory.

    Args:
        crop: makes the input of a box.
        forward: the inputs of B windows to (B, h, w) or (B, C, h, w) predictions of their size.
        size: (H, W) of the picture.
        window: (h, w).
        overlap: as for ``sliding_windows``.
        batch_size: windows per forward pass.

    Returns:
        (H, W) or (C, H, W) float32.
    """
    boxes = sliding_windows(size, window, overlap)

    def predictions() -> Iterator[torch.Tensor]:
        left = iter(boxes)
        while batch := list(islice(left, batch_size)):
            yield from forward([crop(box) for box in batch])

    return blend(boxes, predictions(), size)
