"""Calibration and operating points: temperature scaling, bins of a reliability diagram, thresholds of a ROC curve.

Source: Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017.
"""

import logging
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.metrics import roc_curve

from furnace.evaluation.metrics import ECE_BINS, checked_inputs

TEMPERATURES = (0.01, 100.0)  # the range searched
SMALLEST = 1e-12  # stands for 0 while a temperature is fitted: the loss of a true class at 0 is infinite at any
OPERATING_LEVELS = (0.90, 0.95)

logger = logging.getLogger(__name__)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """The temperature of ``apply_temperature`` with the least negative log-likelihood on these images.

    Where no temperature can be told, it is None, with a warning in the log:
    labels of one class only; the true class the most probable in every image, so that the loss falls down to
    temperature 0; or a model no better than chance, so that it falls up to infinity.

    Args:
        probabilities: (N, K), or (N,) probabilities of class 1, of images that the model was not fitted on.
        labels: (N,) integers in 0..K-1.
    """
    labels, p = checked_inputs(labels, probabilities)
    if len(np.unique(labels)) < 2:
        return _unfitted(f"the images are all of class {labels[0]}")
    logits = np.log(np.maximum(p, SMALLEST))
    true = logits[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        return float((logsumexp(logits * scale, axis=1) - true * scale).mean())

    if (true == logits.max(axis=1)).all():
        return _unfitted("the true class has the highest probability in every image")
    if true.mean() <= logits.mean():  # the slope of the loss at 1 / T = 0
        return _unfitted("the model is no better than chance on these images")
    # in 1 / T the loss is convex, so that in log T it has one valley; the two cases above have it at the ends
    found = minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def _unfitted(why: str) -> None:
    logger.warning("no temperature fitted: %s; the probabilities stay uncalibrated", why)


def apply_temperature(probabilities: np.ndarray, t: float) -> np.ndarray:
    """softmax(log p / t); above 1 it makes the model less sure, below 1 surer. Zeros stay zero.

    Args:
        probabilities: (N, K), or (N,) probabilities of class 1.
        t: temperature, positive.

    Returns:
        (N, K) float64.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if not (np.isfinite(t) and t > 0):
        raise ValueError(f"a temperature is positive, not {t}")
    if p.ndim == 1:
        p = np.stack([1 - p, p], axis=1)  # (N,) -> (N, 2)
    with np.errstate(divide="ignore"):
        logits = np.log(p / p.max(axis=1, keepdims=True)) / t
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True)


def reliability_bins(y_true: np.ndarray, probabilities: np.ndarray, bins: int = ECE_BINS) -> pd.DataFrame:
    """The bins of the top-label expected calibration error.

    Args:
        y_true: (N,) integers in 0..K-1.
        probabilities: (N, K), or (N,) probabilities of class 1.
        bins: of equal width; a confidence c is in the bin with low < c <= high.

    Returns:
        A row per bin: low, high, n, mean confidence, accuracy; the latter two NaN in an empty bin.
    """
    y_true, p = checked_inputs(y_true, probabilities)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y_true
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    n = np.bincount(which, minlength=bins)
    count = np.where(n > 0, n, np.nan)
    edges = np.linspace(0, 1, bins + 1)
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "n": n,
                         "confidence": np.bincount(which, weights=confidence, minlength=bins) / count,
                         "accuracy": np.bincount(which, weights=right, minlength=bins) / count})


def operating_points(y_true: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
    """Sensitivity at a specificity of at least 0.90 and 0.95, and the reverse, for each class against the rest.

    An image is called positive when its probability of the class is at least the threshold. Thresholds chosen on the
    images they are told of flatter a model; for use, choose them on other images.

    Args:
        y_true: (N,) integers in 0..K-1.
        probabilities: (N, K), or (N,) probabilities of class 1.

    Returns:
        Per class (class 1 only when binary) and condition ``{"class", "condition", "sensitivity", "specificity",
        "threshold", "reason"}``; numbers are None, with a reason, when the images are all or never of the class. The
        threshold is None when only calling no image positive meets the condition.
    """
    y_true, p = checked_inputs(y_true, probabilities)
    points = []
    for k in (1,) if p.shape[1] == 2 else range(p.shape[1]):
        positive = y_true == k
        reason = None
        if positive.all() or not positive.any():
            reason = f"{'all images are' if positive.all() else 'no image is'} of class {k}"
            curve = None
        else:
            curve = roc_curve(positive, p[:, k], drop_intermediate=False)
        for given in ("specificity", "sensitivity"):
            for level in OPERATING_LEVELS:
                point = {"class": k, "condition": f"{given} >= {level:.2f}", "sensitivity": None, "specificity": None,
                         "threshold": None, "reason": reason}
                points.append(point if curve is None else point | _best(curve, given, level))
    return points


def _best(curve: tuple[np.ndarray, np.ndarray, np.ndarray], given: str, level: float) -> dict[str, Any]:
    """The point of a ROC curve that meets the condition and is best in the other rate, then in the given one."""
    rates = {"specificity": 1 - curve[0], "sensitivity": curve[1]}
    other = "sensitivity" if given == "specificity" else "specificity"
    meets = np.flatnonzero(rates[given] >= level - 1e-12)  # 1 - 1/10 may round below 0.9
    i = meets[np.lexsort((rates[given][meets], rates[other][meets]))[-1]]
    threshold = float(curve[2][i])
    finite = bool(np.isfinite(threshold))
    return {"sensitivity": float(rates["sensitivity"][i]), "specificity": float(rates["specificity"][i]),
            "threshold": threshold if finite else None,
            "reason": None if finite else "met only by calling no image positive"}
