"""The sweep against scikit-learn fitted strength by strength."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, brier_score_loss

from furnace.evaluation.probe_sweep import STRENGTHS, sweep_linear_probe
from furnace.runtime.files import UserError


def blobs(n: int, classes: int, seed: int, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """(n, 12) features around class centres that are the same for every seed, (n,) labels."""
    centres = np.random.default_rng(99).standard_normal((classes, 12))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return (centres[labels] + spread * rng.standard_normal((n, 12))).astype(np.float32), labels


def test_grid() -> None:
    assert len(STRENGTHS) == 20 and STRENGTHS[0] == pytest.approx(1e-6) and STRENGTHS[-1] == pytest.approx(1e5)
    np.testing.assert_allclose(np.diff(np.log10(STRENGTHS)), 11 / 19)


@pytest.mark.parametrize("classes", [2, 4])
def test_chosen_on_val_and_refitted_on_both(classes: int) -> None:
    (x, y), (v, w), (t, _) = blobs(90, classes, 0), blobs(60, classes, 1), blobs(50, classes, 2)
    sweep = sweep_linear_probe(x, y, v, w, nb_classes=classes, monitor="bacc")
    oracle = [balanced_accuracy_score(w, LogisticRegression(C=c, max_iter=5000, tol=1e-6).fit(x, y).predict(v))
              for c in STRENGTHS]
    np.testing.assert_allclose([entry["val_bacc"] for entry in sweep.table], oracle, atol=0.04)
    best = max(entry["val_bacc"] for entry in sweep.table)
    first = next(entry["C"] for entry in sweep.table if entry["val_bacc"] == best)
    assert sweep.strength == sweep.probe.cost == first, "the strongest regularisation among equals"
    for probe, xs, ys in ((sweep.on_train, x, y), (sweep.probe, np.concatenate([x, v]), np.concatenate([y, w]))):
        expected = LogisticRegression(C=first, max_iter=5000, tol=1e-8).fit(xs.astype(float), ys).predict_proba(t)
        np.testing.assert_allclose(probe.predict_proba(t), expected, atol=2e-3)


def test_a_lower_brier_score_is_better() -> None:
    (x, y), (v, w) = blobs(60, 2, 0, spread=4.0), blobs(200, 2, 1, spread=4.0)
    sweep = sweep_linear_probe(x, y, v, w, nb_classes=2, monitor="brier")
    values = [entry["val_brier"] for entry in sweep.table]
    assert sweep.strength == sweep.table[int(np.argmin(values))]["C"]
    assert brier_score_loss(w, sweep.on_train.predict_proba(v)[:, 1]) == pytest.approx(min(values), abs=1e-6)
    assert min(values) < values[0] and min(values) < values[-1], "both ends of the grid are worse"


def test_a_class_that_train_lacks_has_probability_0() -> None:
    (x, y), (v, w) = blobs(60, 2, 0), blobs(40, 2, 1)
    sweep = sweep_linear_probe(x, np.where(y == 1, 2, 0), v, np.where(w == 1, 2, 0), nb_classes=3, monitor="acc")
    probabilities = sweep.probe.predict_proba(v)
    assert (probabilities[:, 1] == 0).all() and np.allclose(probabilities.sum(axis=1), 1)


def test_refusals() -> None:
    (x, y), (v, w) = blobs(60, 3, 0), blobs(40, 3, 1)
    with pytest.raises(UserError, match="no image has the split val"):
        sweep_linear_probe(x, y, v[:0], w[:0], nb_classes=3)
    with pytest.raises(UserError, match=r"--monitor auroc is not defined on val \(class 2 is absent"):
        sweep_linear_probe(x, y, v[w < 2], w[w < 2], nb_classes=3, monitor="auroc")
    with pytest.raises(UserError, match="1 class"):
        sweep_linear_probe(x[y == 0], y[y == 0], v, w, nb_classes=3)
