"""Classification metrics with the published definitions, and a reason wherever a value cannot be computed."""

import warnings

import numpy as np
from sklearn import metrics as sk

NAMES = ("acc", "bacc", "weighted_f1", "macro_f1", "auroc", "auroc_ovr", "aupr", "kappa", "sensitivity", "specificity",
         "ece", "brier")
ECE_BINS = 15


class Metrics(dict[str, float]):
    """Values by name; ``reasons`` says of every NaN why."""

    def __init__(self, values: dict[str, float], reasons: dict[str, str]) -> None:
        super().__init__(values)
        self.reasons = reasons

    def to_results(self) -> dict[str, dict[str, float | str | None]]:
        """The form of results.json: ``{"acc": {"value", "low", "high", "reason"}}``, None for NaN."""
        return {name: {"value": None if np.isnan(value) else value, "low": None, "high": None,
                       "reason": self.reasons.get(name)} for name, value in self.items()}


def classification_metrics(y_true: np.ndarray, probabilities: np.ndarray) -> Metrics:
    """All metrics of a test set.

    - acc, bacc (mean recall over the classes that occur), weighted_f1, macro_f1;
    - auroc: binary of class 1, else one-vs-one macro (published for linear evaluation); auroc_ovr: binary, else
      one-vs-rest macro (published for fine-tuning);
    - aupr: average precision of class 1, else one-vs-rest macro;
    - kappa: Cohen's with quadratic weights, as published (the weights suit ordinal labels only);
    - sensitivity, specificity: of class 1 when binary, else one-vs-rest macro;
    - ece: top-label expected calibration error, 15 bins of equal width, L1;
    - brier: mean (p1 - y)^2 when binary, else mean over images of the sum over classes of (p - y)^2.

    When a class is absent from ``y_true``, the metrics that need images of every class (macro_f1, auroc, auroc_ovr,
    aupr, sensitivity) are NaN, with a reason.

    Args:
        y_true: (N,) integers in 0..K-1.
        probabilities: (N, K), rows summing to 1, or (N,) probabilities of class 1. The prediction is the argmax.

    Returns:
        Metrics with the keys of NAMES, as fractions (not percent).

    Raises:
        ValueError: no images, a label outside 0..K-1, or probabilities that are not finite or do not sum to 1.
    """
    y_true, p = checked_inputs(y_true, probabilities)
    k = p.shape[1]
    y_pred = p.argmax(axis=1)
    one_hot = np.eye(k)[y_true]  # (N,) -> (N, K)
    present = one_hot.any(axis=0)
    absent = ", ".join(map(str, np.flatnonzero(~present)))
    reasons = dict.fromkeys(("macro_f1", "auroc", "auroc_ovr", "aupr", "sensitivity"),
                            f"class {absent} is absent from these images") if absent else {}
    if k == 2 and present[1]:
        reasons.pop("aupr", None)
        reasons.pop("sensitivity", None)
    if present.sum() == 1 and (k > 2 or present[1]):
        reasons["specificity"] = "all images are of one class: there is no negative"
    if len(set(y_true) | set(y_pred)) == 1:
        reasons["kappa"] = "all images are of one class and predicted so"

    computations = {
        "acc": lambda: sk.accuracy_score(y_true, y_pred),
        "bacc": lambda: _recalls(y_true, y_pred, k)[present].mean(),
        "weighted_f1": lambda: sk.f1_score(y_true, y_pred, labels=range(k), average="weighted", zero_division=0),
        "macro_f1": lambda: sk.f1_score(y_true, y_pred, labels=range(k), average="macro", zero_division=0),
        "auroc": lambda: _auroc(y_true, p, "ovo"),
        "auroc_ovr": lambda: _auroc(y_true, p, "ovr"),
        "aupr": lambda: sk.average_precision_score(*((y_true, p[:, 1]) if k == 2 else (one_hot, p)), average="macro"),
        "kappa": lambda: sk.cohen_kappa_score(y_true, y_pred, labels=range(k), weights="quadratic"),
        "sensitivity": lambda: _recalls(y_true, y_pred, k)[1 if k == 2 else slice(None)].mean(),
        "specificity": lambda: _specificities(y_true, y_pred, k)[1 if k == 2 else slice(None)].mean(),
        "ece": lambda: _expected_calibration_error(y_true, y_pred, p.max(axis=1)),
        "brier": lambda: ((p[:, 1] - y_true) ** 2).mean() if k == 2 else ((p - one_hot) ** 2).sum(axis=1).mean(),
    }
    values = {name: float("nan") if name in reasons else float(computations[name]()) for name in NAMES}
    return Metrics(values, reasons)


def checked_inputs(y_true: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) labels as int64 and (N, K) probabilities as float64."""
    y_true, p = np.asarray(y_true), np.asarray(probabilities, dtype=np.float64)
    if p.ndim == 1:
        p = np.stack([1 - p, p], axis=1)  # (N,) -> (N, 2)
    if y_true.ndim != 1 or not len(y_true) or len(y_true) != len(p) or p.ndim != 2 or p.shape[1] < 2:
        raise ValueError(f"need N labels and (N, K) probabilities, got {y_true.shape} and {p.shape}")
    if not np.isfinite(p).all() or p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("probabilities must be finite, not negative, and sum to 1 in every row")
    if (y_true != y_true.astype(np.int64)).any() or y_true.min() < 0 or y_true.max() >= p.shape[1]:
        raise ValueError(f"labels must be integers in 0..{p.shape[1] - 1}")
    return y_true.astype(np.int64), p


def _auroc(y_true: np.ndarray, p: np.ndarray, how: str) -> float:
    k = p.shape[1]
    if k == 2:
        return sk.roc_auc_score(y_true, p[:, 1])
    rows = p / p.sum(axis=1, keepdims=True)  # float32 softmax rows sum to 1 within 1e-7 only
    return sk.roc_auc_score(y_true, rows, multi_class=how, average="macro", labels=range(k))


def _recalls(y_true: np.ndarray, y_pred: np.ndarray, k: int) -> np.ndarray:
    """(K,) recall of each class; NaN for a class without images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sk.recall_score(y_true, y_pred, labels=range(k), average=None, zero_division=np.nan)


def _specificities(y_true: np.ndarray, y_pred: np.ndarray, k: int) -> np.ndarray:
    """(K,) true negatives / negatives of each class against the rest."""
    confusion = sk.confusion_matrix(y_true, y_pred, labels=range(k))
    false_positive = confusion.sum(axis=0) - np.diag(confusion)
    negative = confusion.sum() - confusion.sum(axis=1)
    return 1 - false_positive / np.where(negative == 0, np.nan, negative)


def _expected_calibration_error(y_true: np.ndarray, y_pred: np.ndarray, confidence: np.ndarray) -> float:
    """Sum over bins of |accuracy - mean confidence|, weighted by the share of images in the bin."""
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)  # (low, high] intervals
    gap = np.bincount(bins, weights=(y_true == y_pred) - confidence, minlength=ECE_BINS)
    return np.abs(gap).sum() / len(y_true)
