"""How well a lesion is outlined: metrics of one image at its native size, their means over images, pooled ones.

Sources: Codella et al., Skin lesion analysis toward melanoma detection 2018 (threshold Jaccard of ISIC 2018, task 1);
Csurka et al., What is a good evaluation measure for semantic segmentation?, BMVC 2013 (boundary F1).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from furnace.data.class_names import some
from furnace.evaluation.masks import boundary_distances, checked_pair
from furnace.evaluation.statistics import LEVEL, MOST_UNDEFINED, Resampling, resampling_weights, too_few_draws

OF_AN_IMAGE = ("dice", "jaccard", "threshold_jaccard", "pixel_acc", "sensitivity", "specificity", "hd95", "boundary_f1")
POOLED = ("pooled_dice", "pooled_jaccard")
NAMES = (*OF_AN_IMAGE, *POOLED)
COUNTS = ("tp", "fp", "fn", "tn")
LEAST_JACCARD = 0.65  # below it an outline needs to be redrawn and counts 0 (ISIC 2018)
UNDEFINED = {"sensitivity": "the true mask is empty", "specificity": "the true mask covers the picture",
             "hd95": "the predicted or the true mask is empty", "boundary_f1": "both masks are empty"}


def confusion_counts(predicted: np.ndarray, truth: np.ndarray) -> dict[str, int]:
    """Pixels by the names of COUNTS; the lesion is positive.

    Args:
        predicted: (H, W) bool.
        truth: (H, W) bool.

    Raises:
        ValueError: a shape mismatch, or masks that are not bool.
    """
    predicted, truth = checked_pair(predicted, truth)
    tp, of_prediction, of_truth = (int(np.count_nonzero(one)) for one in (predicted & truth, predicted, truth))
    fp, fn = of_prediction - tp, of_truth - tp
    return {"tp": tp, "fp": fp, "fn": fn, "tn": truth.size - tp - fp - fn}


def image_metrics(predicted: np.ndarray, truth: np.ndarray, *, tolerance: float = 2.0) -> dict[str, float]:
    """All metrics of one image, at the size of its masks.

    - dice: 2 |P & T| / (|P| + |T|); jaccard: |P & T| / |P or T|; both are 1 when both masks are empty, 0 when one is;
    - threshold_jaccard: the Jaccard index, 0 where it is below 0.65 (ISIC 2018);
    - pixel_acc: share of the pixels called right;
    - sensitivity: share of the lesion that is found, NaN without a lesion; specificity: share of the rest that is left
      out, NaN without a rest (isic-challenge-scoring says 1 in both cases);
    - hd95: the 95th percentile (linear between two) of the distances in pixels from every pixel of either boundary to
      the nearest pixel of the other one, both directions in one list, as MedPy; NaN when a mask is empty;
    - boundary_f1: 2 p r / (p + r), with p the share of the predicted boundary's pixels that lie within ``tolerance``
      pixels of the true one, and r the share of the true one's within that of the predicted; 0 when one mask is empty,
      NaN when both are.

    A boundary is the mask's pixels with a neighbour, by an edge, outside of it or of the picture.

    Args:
        predicted: (H, W) bool, the lesion is True.
        truth: (H, W) bool.
        tolerance: of boundary_f1, in pixels of these masks.

    Returns:
        Values by the names of OF_AN_IMAGE.

    Raises:
        ValueError: a shape mismatch, or masks that are not bool.
    """
    return _metrics(predicted, truth, confusion_counts(predicted, truth), tolerance)


def segmentation_row(filename: str, predicted: np.ndarray, truth: np.ndarray, *,
                     tolerance: float = 2.0) -> dict[str, str | float | int]:
    """The image's row of the table that ``score_segmentation`` reads: filename, its metrics, tp, fp, fn, tn.

    Args:
        filename: of the image.
        predicted: (H, W) bool.
        truth: (H, W) bool.
        tolerance: of boundary_f1, in pixels.
    """
    counts = confusion_counts(predicted, truth)
    return {"filename": filename, **_metrics(predicted, truth, counts, tolerance), **counts}


def _metrics(predicted: np.ndarray, truth: np.ndarray, counts: dict[str, int], tolerance: float) -> dict[str, float]:
    """As ``image_metrics`` says."""
    tp, fp, fn, tn = (counts[name] for name in COUNTS)
    dice, jaccard = (float(value) for value in _overlaps(tp, fp, fn))
    values = {"dice": dice, "jaccard": jaccard, "threshold_jaccard": jaccard if jaccard >= LEAST_JACCARD else 0.0,
              "pixel_acc": (tp + tn) / truth.size,
              "sensitivity": tp / (tp + fn) if tp + fn else float("nan"),
              "specificity": tn / (tn + fp) if tn + fp else float("nan")}
    if tp + fp and tp + fn:
        ours, theirs = boundary_distances(predicted, truth)
        values["hd95"] = float(np.percentile(np.concatenate([ours, theirs]), 95))
        precision, recall = float((ours <= tolerance).mean()), float((theirs <= tolerance).mean())
        values["boundary_f1"] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    else:
        values |= {"hd95": float("nan"), "boundary_f1": 0.0 if tp + fp or tp + fn else float("nan")}
    return values


def _overlaps(tp: Any, fp: Any, fn: Any) -> tuple[np.ndarray, np.ndarray]:
    """Dice and Jaccard of counts of any shape; 1 where there is neither a lesion nor a prediction."""
    tp, wrong = np.asarray(tp, dtype=np.float64), np.asarray(fp, dtype=np.float64) + fn
    nothing = tp + wrong == 0
    return tuple(np.where(nothing, 1.0, times * tp / np.where(nothing, 1.0, times * tp + wrong)) for times in (2, 1))


def pooled_metrics(counts: pd.DataFrame | Mapping[str, Any]) -> dict[str, float]:
    """Dice and Jaccard of all pixels of all images together: large lesions weigh more than in a mean over images.

    Args:
        counts: tp, fp and fn of each image, columns or (N,) arrays; or their sums.

    Returns:
        Values by the names of POOLED; 1 when no image has a lesion and none is predicted.
    """
    sums = (np.asarray(counts[name], dtype=np.float64).sum() for name in COUNTS[:3])
    return {name: float(value) for name, value in zip(POOLED, _overlaps(*sums), strict=True)}


def overlap_means(counts: np.ndarray) -> dict[str, float]:
    """The metrics that need no distances, as means over the images, and the pooled ones: quick, for every epoch.

    Args:
        counts: (N, 4) pixels of each image by the names of COUNTS.

    Returns:
        dice, jaccard, threshold_jaccard, pixel_acc, pooled_dice, pooled_jaccard.
    """
    tp, fp, fn, tn = np.asarray(counts, dtype=np.float64).T
    dice, jaccard = _overlaps(tp, fp, fn)
    means = {"dice": dice, "jaccard": jaccard, "threshold_jaccard": np.where(jaccard >= LEAST_JACCARD, jaccard, 0.0),
             "pixel_acc": (tp + tn) / (tp + fp + fn + tn)}
    return {**{name: float(values.mean()) for name, values in means.items()},
            **pooled_metrics({"tp": tp, "fp": fp, "fn": fn})}


def score_segmentation(table: pd.DataFrame, *, resampling: Resampling) -> dict[str, Any]:
    """Everything that results.json says of a split: plain means over the images, and pooled metrics.

    The 95 % intervals are percentiles of the resamples. An image in which a metric is not defined is left out of its
    mean, and the reason says how many; in a resample likewise.

    Args:
        table: a row per image (``segmentation_row``), in the order that the resampling's clusters have.
        resampling: how the resamples are drawn; not stratified, since masks have no classes.

    Returns:
        ``{"n", "empty_truth", "empty_predicted", "resampling", "metrics": {name: {"value", "low", "high",
        "reason"}}}``, the metrics by the names of NAMES.

    Raises:
        ValueError: no rows, a missing column, an image that comes twice, or a stratified resampling.
    """
    _check_table(table, resampling)
    counts = table[list(COUNTS)].to_numpy(dtype=np.float64)  # (N, 4)
    values = table[list(OF_AN_IMAGE)].to_numpy(dtype=np.float64)  # (N, M)
    draws = _resampled(values, counts[:, :3], resampling)
    pooled = pooled_metrics(table)
    entries = {}
    for k, name in enumerate(OF_AN_IMAGE):
        defined = values[~np.isnan(values[:, k]), k]
        mean = float(defined.mean()) if len(defined) else None
        entries[name] = _with_interval(mean, draws[name], _left_out(name, len(defined), len(table)), len(table),
                                       resampling)
    for name in POOLED:
        entries[name] = _with_interval(pooled[name], draws[name], None, len(table), resampling)
    tp, fp, fn, _ = counts.T
    return {"n": len(table), "empty_truth": int((tp + fn == 0).sum()), "empty_predicted": int((tp + fp == 0).sum()),
            "resampling": resampling.describe(), "metrics": entries}


def _check_table(table: pd.DataFrame, resampling: Resampling) -> None:
    """Mistakes of the caller, which would make wrong numbers."""
    missing = [name for name in ("filename", *OF_AN_IMAGE, *COUNTS) if name not in table]
    if missing:
        raise ValueError(f"the table lacks {some(missing)}")
    if not len(table):
        raise ValueError("the table has no images")
    twice = table["filename"][table["filename"].duplicated()].unique()
    if len(twice):
        raise ValueError(f"scored twice: {some(list(map(str, twice)))}")
    if resampling.stratify:
        raise ValueError("masks have no classes to stratify by")


def _resampled(values: np.ndarray, counts: np.ndarray, resampling: Resampling) -> dict[str, np.ndarray]:
    """(R,) draws of each of NAMES from (N, M) values, NaN where not defined, and (N, 3) counts."""
    defined = ~np.isnan(values)
    columns = np.hstack([np.where(defined, values, 0.0), defined, counts])  # (N, 2 M + 3)
    sums = np.concatenate([weights @ columns for weights in resampling_weights(np.zeros(len(values)), resampling)])
    m = values.shape[1]
    totals, numbers, pixels = np.split(sums, [m, 2 * m], axis=1)  # (R, M), (R, M), (R, 3)
    means = np.where(numbers > 0, totals / np.maximum(numbers, 1), np.nan)
    return dict(zip(NAMES, [*means.T, *_overlaps(*pixels.T)], strict=True))


def _left_out(name: str, defined: int, n: int) -> str | None:
    """Why a mean is not over all images."""
    if defined == n:
        return None
    start = f"mean of {defined:,} of {n:,} images" if defined else "not defined"
    return f"{start}: {UNDEFINED[name]} in {n - defined:,}"


def _with_interval(value: float | None, draws: np.ndarray, reason: str | None, n: int,
                   resampling: Resampling) -> dict[str, float | str | None]:
    """The entry of results.json."""
    if value is None:
        return {"value": None, "low": None, "high": None, "reason": reason}
    undefined = float(np.isnan(draws).mean())
    lacking = (f"no interval: not defined in {undefined:.0%} of the resamples" if undefined > MOST_UNDEFINED
               else too_few_draws(draws, np.zeros(n), resampling))
    if lacking:
        return {"value": value, "low": None, "high": None, "reason": "; ".join(filter(None, (reason, lacking)))}
    low, high = map(float, np.nanpercentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]))
    return {"value": value, "low": low, "high": high, "reason": reason}
