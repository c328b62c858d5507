"""Metrics of several labels per image: each class is a binary question, and the metrics are means over the classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from furnace.data.class_names import numbered, some
from furnace.data.multilabel import SEPARATOR, label_sets
from furnace.evaluation.metrics import Metrics, classification_metrics
from furnace.evaluation.statistics import LEVEL, Resampling, resampling_weights, too_few_draws
from furnace.evaluation.weighted_metrics import WeightedMetrics

NAMES = ("acc", "exact_match", "bacc", "macro_f1", "micro_f1", "auroc", "aupr", "sensitivity", "specificity", "ece",
         "brier")
OF_A_CLASS = ("acc", "bacc", "f1", "auroc", "aupr", "sensitivity", "specificity", "ece", "brier")
OF_ALL = ("exact_match", "micro_f1")
THRESHOLD = 0.5
NO_LABEL = "no image has any label"


def multilabel_metrics(targets: np.ndarray, probabilities: np.ndarray,
                       class_names: Sequence[str] | None = None) -> Metrics:
    """All metrics of a test set whose images may have several labels; a class is predicted above 0.5.

    - acc, bacc, auroc, aupr, sensitivity, specificity, ece, brier: means over the classes of the binary metric of
      ``classification_metrics``; macro_f1: mean of the positive label's F1;
    - exact_match: share of the images whose labels are all right;
    - micro_f1: F1 of all labels of all images together.

    A class without positive (for specificity and auroc: negative) images has no such metric and is left out of its
    mean; the reason says so. Without any such class the mean is NaN.

    Args:
        targets: (N, K) zeros and ones.
        probabilities: (N, K) in [0, 1], each of its own.
        class_names: K names for the reasons.

    Returns:
        Metrics with the keys of NAMES, as fractions.

    Raises:
        ValueError: no images, targets other than 0 and 1, or probabilities outside [0, 1].
    """
    y, p = _checked(targets, probabilities)
    return _together(y, p, _of_classes(y, p), class_names or numbered(y.shape[1]))


def score_multilabel(targets: np.ndarray, probabilities: np.ndarray, *, class_names: Sequence[str],
                     resampling: Resampling) -> dict[str, Any]:
    """Everything that results.json says of a split, with 95 % intervals as ``bootstrap_intervals`` makes them.

    Every resample is used for all classes. A mean is of the same classes in all resamples: those in which one of them
    has no such metric are left out. Stratified resamples keep the number of images of every set of labels.

    Args:
        targets: (N, K) zeros and ones.
        probabilities: (N, K) in [0, 1].
        class_names: K names.
        resampling: how the resamples are drawn.

    Returns:
        ``{"n", "resampling", "metrics": {name: {"value", "low", "high", "reason"}}, "per_class": {class name: {name:
        {"value", "low", "high", "reason"}}}, "operating_points": [], "calibration": None}``.
    """
    y, p = _checked(targets, probabilities)
    if len(class_names) != y.shape[1]:
        raise ValueError(f"{len(class_names)} class names for {y.shape[1]} classes")
    classes = _of_classes(y, p)
    metrics = _together(y, p, classes, class_names)
    of_classes, of_all = _resampled(y, p, classes, resampling)

    def entries(one: Metrics, draws: "Draws") -> dict[str, dict[str, float | str | None]]:
        return {name: _with_interval(entry, name, draws, y, resampling) for name, entry in one.to_results().items()}

    per_class = {name: entries(one, draws) for name, one, draws in zip(class_names, classes, of_classes, strict=True)}
    for name in NAMES:
        if name not in OF_ALL and not np.isnan(metrics[name]):
            source = _source(name)
            used = [k for k, one in enumerate(classes) if not np.isnan(one[source])]
            of_all.values[name] = np.mean([of_classes[k].values[source] for k in used], axis=0)
    of_all.noise = np.mean([draws.noise for draws in of_classes], axis=0)
    return {"n": len(y), "resampling": resampling.describe(), "metrics": entries(metrics, of_all),
            "per_class": per_class, "operating_points": [], "calibration": None}


def multilabel_table(filenames: Sequence[str], targets: np.ndarray, probabilities: np.ndarray,
                     class_names: Sequence[str]) -> pd.DataFrame:
    """A row per image: filename, true_labels, predicted_labels (separated by semicolons), probability_<class name>.

    Args:
        filenames: N names.
        targets: (N, K) zeros and ones.
        probabilities: (N, K).
        class_names: K names.
    """
    def named(which: np.ndarray) -> list[str]:
        return [SEPARATOR.join(class_names[k] for k in np.flatnonzero(row)) for row in which]

    table = {"filename": list(filenames), "true_labels": named(targets),
             "predicted_labels": named(probabilities > THRESHOLD)}
    return pd.DataFrame(table | {f"probability_{name}": probabilities[:, k] for k, name in enumerate(class_names)})


def _checked(targets: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) int64 and float64."""
    y, p = np.asarray(targets), np.asarray(probabilities, dtype=np.float64)
    if y.ndim != 2 or y.shape != p.shape or not y.size:
        raise ValueError(f"need (N, K) targets and probabilities, got {y.shape} and {p.shape}")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("targets must be 0 or 1")
    if not (np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1):
        raise ValueError("probabilities must be in [0, 1]")
    return y.astype(np.int64), p


def _source(name: str) -> str:
    """Of which binary metric a mean is."""
    return "f1" if name == "macro_f1" else name


def _of_classes(y: np.ndarray, p: np.ndarray) -> list[Metrics]:
    """The binary metrics of each class, with the keys of OF_A_CLASS."""
    found = []
    for of_class, p_class in zip(y.T, p.T, strict=True):
        binary = classification_metrics(of_class, p_class)
        positive, called = of_class == 1, p_class > THRESHOLD
        f1 = 2 * (positive & called).sum() / (positive.sum() + called.sum()) if positive.any() else np.nan
        values = {name: float(f1) if name == "f1" else binary[name] for name in OF_A_CLASS}
        reason = "no negative image" if positive.any() else "no positive image"
        found.append(Metrics(values, {name: reason for name, value in values.items() if np.isnan(value)}))
    return found


def _together(y: np.ndarray, p: np.ndarray, classes: list[Metrics], names: Sequence[str]) -> Metrics:
    """The metrics of the data set from those of its classes."""
    called = p > THRESHOLD
    values: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in NAMES:
        if name == "exact_match":
            values[name] = float((y == called).all(axis=1).mean())
        elif name == "micro_f1":
            values[name] = float(2 * (y & called).sum() / (y.sum() + called.sum())) if y.any() else float("nan")
            if not y.any():
                reasons[name] = NO_LABEL
        else:
            column = np.array([one[_source(name)] for one in classes])
            defined = ~np.isnan(column)
            values[name] = float(column[defined].mean()) if defined.any() else float("nan")
            if not defined.all():
                start = f"mean of {defined.sum()} of {len(names)} classes" if defined.any() else "not defined"
                reasons[name] = f"{start}: {_left_out(classes, _source(name), names)}"
    return Metrics(values, reasons)


def _left_out(classes: list[Metrics], name: str, class_names: Sequence[str]) -> str:
    """E.g. "acne and eczema have no positive image"."""
    by_reason: dict[str, list[str]] = {}
    for one, class_name in zip(classes, class_names, strict=True):
        if name in one.reasons:
            by_reason.setdefault(one.reasons[name], []).append(class_name)
    return "; ".join(f"{some(found)} {'has' if len(found) == 1 else 'have'} {reason}"
                     for reason, found in by_reason.items())


@dataclass
class Draws:
    """What intervals are taken from: (R,) values by metric, ece being signed and without bias; and its noise."""

    values: dict[str, np.ndarray]
    noise: np.ndarray | None = None


def _resampled(y: np.ndarray, p: np.ndarray, classes: list[Metrics], resampling: Resampling
               ) -> tuple[list[Draws], Draws]:
    """The draws of each class, and those of OF_ALL."""
    k = y.shape[1]
    called = p > THRESHOLD
    right = (y == called).all(axis=1)
    counted = np.column_stack([y, called, y & called, right]).astype(np.float64)  # (N, 3 K + 1)
    prepared = [WeightedMetrics(of_class, p_class) for of_class, p_class in zip(y.T, p.T, strict=True)]
    counts, parts = [], [[] for _ in prepared]
    for weights in resampling_weights(label_sets(y), resampling):
        counts.append(np.column_stack([weights @ counted, weights.sum(axis=1)]))
        for part, of_class in zip(parts, prepared, strict=True):
            values = of_class(weights)
            part.append({name: values[name] for name in (*OF_A_CLASS, "signed_ece", "noise_ece") if name in values})
    sums = np.concatenate(counts)  # (R, 3 K + 2)
    positive, predicted, both = np.split(sums[:, :3 * k], 3, axis=1)  # (R, K) each
    found = []
    for j, (part, one) in enumerate(zip(parts, classes, strict=True)):
        values = {name: np.concatenate([some_values[name] for some_values in part]) for name in part[0]}
        values["f1"] = _f1(both[:, j], positive[:, j], predicted[:, j])
        values["ece"] = values.pop("signed_ece") - (values["ece"].mean() - one["ece"])
        found.append(Draws(values, values.pop("noise_ece")))
    return found, Draws({"exact_match": sums[:, -2] / sums[:, -1],
                         "micro_f1": _f1(*(one.sum(axis=1) for one in (both, positive, predicted)))})


def _f1(both: np.ndarray, positive: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(R,) from counts, NaN without a positive."""
    return np.where(positive > 0, 2 * both / np.maximum(positive + predicted, 1), np.nan)


def _with_interval(entry: dict[str, Any], name: str, draws: Draws, y: np.ndarray, resampling: Resampling
                   ) -> dict[str, Any]:
    """The entry of results.json with its interval, or why it has none."""
    value = entry["value"]
    if value is None:
        return entry
    lacking = too_few_draws(draws.values[name], y, resampling)
    if lacking:
        return {**entry, "reason": "; ".join(filter(None, (entry["reason"], lacking)))}
    low, high = map(float, np.nanpercentile(draws.values[name], [50 * (1 - LEVEL), 50 * (1 + LEVEL)]))
    if name == "ece":
        noise = np.percentile(draws.noise, 50 * (1 + LEVEL))
        low, high = max(0.0, min(low, value)) if value > noise else 0.0, min(1.0, max(high, value))
    return {**entry, "low": low, "high": high}
