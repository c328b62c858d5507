"""A linear probe whose strength of regularisation is chosen on val: multinomial logistic regression, squared L2.

scikit-learn's ``LogisticRegression`` (L-BFGS) on the features as they are, at 20 inverse strengths C from 1e-6 to 1e5
on a logarithmic grid, each fit starting from the one before. The C with the best monitored metric on val is refitted on
train and val together; test is no part of it. The grid is that of DINOv2's linear evaluation, thinned.
"""

import logging
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from furnace.evaluation.linear_probe import LinearProbe
from furnace.evaluation.metrics import NAMES, classification_metrics
from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

STRENGTHS = np.logspace(-6, 5, 20)  # inverse strengths, scikit-learn's C
LOWER_IS_BETTER = ("ece", "brier")
MONITORS = NAMES
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Sweep:
    """The outcome of a sweep.

    Attributes:
        probe: fitted on train and val with the chosen strength.
        on_train: fitted on train alone with the chosen strength; what val was judged with.
        strength: the chosen C.
        table: one dictionary per strength: C, the monitored value on val, iterations.
    """

    probe: LinearProbe
    on_train: LinearProbe
    strength: float
    table: list[dict[str, float | int | None]]


def sweep_linear_probe(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray, *,
                       nb_classes: int, monitor: str = "bacc") -> Sweep:
    """Choose the strength on val and fit the final probe.

    Args:
        train: (N, D) features; train_labels (N,).
        val: (V, D) features; val_labels (V,).
        nb_classes: K of the data set.
        monitor: a metric's name; the larger strength of regularisation wins a tie.

    Raises:
        UserError: no val images, fewer than two train classes, or a metric that val does not define.
    """
    if not len(val):
        raise UserError("--probe sweep chooses the strength on val, and no image has the split val: mark some, or use "
                        "the published probe")
    if len(np.unique(train_labels)) < 2:
        raise UserError("the train images have 1 class: a probe needs two or more "
                        "(take a larger --percent_data, or --percent_mode stratified)")
    model = LogisticRegression(C=1.0, max_iter=MAX_ITERATIONS, warm_start=True)
    best, table = None, []
    for strength in STRENGTHS:
        iterations = _fit(model, strength, train, train_labels)
        candidate = _as_probe(model, nb_classes, strength, iterations)
        metrics = classification_metrics(val_labels, candidate.predict_proba(val))
        value = metrics[monitor]
        if np.isnan(value):
            raise UserError(f"--monitor {monitor} is not defined on val ({metrics.reasons[monitor]}): choose another, "
                            "such as bacc or acc")
        table.append({"C": float(strength), f"val_{monitor}": float(value), "iterations": iterations})
        score = -value if monitor in LOWER_IS_BETTER else value
        if best is None or score > best[0]:
            best = (score, candidate)
    slow = sum(entry["iterations"] >= MAX_ITERATIONS for entry in table)
    if slow:
        logger.info("%d of %d fits of the sweep stopped at %d iterations", slow, len(table), MAX_ITERATIONS)
    strength = best[1].cost
    final = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
    iterations = _fit(final, strength, np.concatenate([train, val]), np.concatenate([train_labels, val_labels]))
    return Sweep(probe=_as_probe(final, nb_classes, strength, iterations), on_train=best[1], strength=strength,
                 table=table)


def _fit(model: LogisticRegression, strength: float, features: np.ndarray, labels: np.ndarray) -> int:
    """Fit in place; returns the iterations. A fit that stops at the limit is counted by the caller, not warned of."""
    model.set_params(C=strength)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features.astype(np.float64), labels)
    return int(np.max(model.n_iter_))


def _as_probe(model: LogisticRegression, nb_classes: int, strength: float, iterations: int) -> LinearProbe:
    """Two classes have one row in scikit-learn; as a softmax that is a row of zeros and the row."""
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return LinearProbe(weight=weight.astype(np.float32), bias=bias.astype(np.float32),
                       classes=model.classes_.astype(np.int64), nb_classes=nb_classes, cost=float(strength),
                       objective=float("nan"), iterations=iterations)
