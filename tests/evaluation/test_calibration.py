"""Temperature scaling, bins and operating points: torchmetrics, scikit-learn, closed forms, known miscalibration."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss, roc_curve
from torchmetrics.functional.classification import multiclass_calibration_error

from furnace.evaluation.calibration import apply_temperature, fit_temperature, operating_points, reliability_bins
from furnace.evaluation.metrics import classification_metrics


def calibrated(n: int, k: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N,) labels drawn from softmax of the (N, K) logits, so that these are calibrated."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, k)) * 1.5
    drawn = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return np.minimum(drawn, k - 1), logits


def ece_of_torchmetrics(y: np.ndarray, p: np.ndarray) -> float:
    return float(multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(y), num_classes=p.shape[1],
                                              n_bins=15, norm="l1"))


# ----------------------------------------------------------------------- temperature

@pytest.mark.parametrize("factor", [3.0, 1.0, 0.4])
def test_known_miscalibration_is_found(factor: float) -> None:
    y, logits = calibrated(8000)
    p = softmax(logits * factor, axis=1)
    t = fit_temperature(p, y)
    assert t == pytest.approx(factor, rel=0.05)
    after = apply_temperature(p, t)
    np.testing.assert_allclose(after, softmax(logits * factor / t, axis=1), atol=1e-12)
    before_ece, after_ece = ece_of_torchmetrics(y, p), ece_of_torchmetrics(y, after)
    assert after_ece < 0.025 and (factor == 1 or before_ece > 0.1)
    assert (after.argmax(axis=1) == p.argmax(axis=1)).all()


def test_it_is_the_minimum_of_the_log_loss() -> None:
    y, logits = calibrated(300, seed=1)
    p = softmax(logits * 2, axis=1)
    t = fit_temperature(p, y)
    grid = t * np.geomspace(0.5, 2, 201)
    losses = [log_loss(y, apply_temperature(p, one), labels=range(4)) for one in grid]
    assert grid[np.argmin(losses)] == pytest.approx(t, rel=1e-6)
    assert fit_temperature(p[:, ::-1], 3 - y) == pytest.approx(t, rel=1e-5)


def test_binary_column() -> None:
    y, logits = calibrated(4000, k=2)
    p = softmax(logits * 3, axis=1)
    assert fit_temperature(p[:, 1], y) == pytest.approx(fit_temperature(p, y), rel=1e-6)
    np.testing.assert_allclose(apply_temperature(p[:, 1], 3.0), softmax(logits, axis=1), atol=1e-9)


def test_zero_probabilities() -> None:
    y, logits = calibrated(2000)
    p = softmax(logits * 3, axis=1)
    p[p < 0.01] = 0
    p /= p.sum(axis=1, keepdims=True)
    assert (p[np.arange(len(y)), y] == 0).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = fit_temperature(p, y)
        after = apply_temperature(p, t)
    assert 3 < t < 100  # true classes at 0 ask for more caution than the rest of the logits
    assert ((after == 0) == (p == 0)).all() and np.isfinite(after).all()
    np.testing.assert_allclose(after.sum(axis=1), 1, atol=1e-12)
    one_hot = np.eye(4)[y[:100]]
    one_hot[:30] = np.eye(4)[(y[:30] + 1) % 4]
    assert 1 < fit_temperature(one_hot, y[:100]) < 100
    np.testing.assert_array_equal(apply_temperature(one_hot, 5.0), one_hot)


def test_extreme_temperatures() -> None:
    p = np.array([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]])
    np.testing.assert_allclose(apply_temperature(p, 1.0), p, atol=1e-12)
    np.testing.assert_allclose(apply_temperature(p, 1e-3), [[1, 0, 0], [0, 0.5, 0.5]], atol=1e-12)
    np.testing.assert_allclose(apply_temperature(p, 1e6), 1 / 3, atol=1e-5)
    np.testing.assert_allclose(apply_temperature(p[:1], 0.5), p[:1] ** 2 / (p[:1] ** 2).sum(), atol=1e-12)
    for t in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature is positive"):
            apply_temperature(p, t)


@pytest.mark.parametrize(("y", "p", "why"), [
    ([1, 1, 1], [[0.2, 0.8], [0.6, 0.4], [0.1, 0.9]], "all of class 1"),
    ([0, 1, 2], np.eye(3) * 0.4 + 0.2, "highest probability in every image"),
    ([0, 1, 0, 1], [[0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]], "no better than chance"),
    ([0, 1, 2], np.full((3, 3), 1 / 3), "highest probability in every image"),
], ids=["one class", "all right", "all wrong", "constant"])
def test_no_temperature_can_be_told(y, p, why: str, caplog) -> None:
    assert fit_temperature(np.array(p), np.array(y)) is None
    assert "no temperature fitted" in caplog.text
    assert why in caplog.text


# ------------------------------------------------------------------------------- bins

def test_bins_make_the_calibration_error() -> None:
    y, logits = calibrated(500)
    p = softmax(logits * 2, axis=1)
    bins = reliability_bins(y, p)
    assert list(bins.columns) == ["low", "high", "n", "confidence", "accuracy"] and len(bins) == 15
    assert bins["n"].sum() == 500
    ece = (bins["n"] / 500 * (bins["accuracy"] - bins["confidence"]).abs()).sum()
    assert ece == pytest.approx(classification_metrics(y, p)["ece"], abs=1e-12)
    assert ece == pytest.approx(ece_of_torchmetrics(y, p), abs=1e-6)
    used = bins[bins["n"] > 0]
    assert (used["low"] < used["confidence"]).all() and (used["confidence"] <= used["high"]).all()
    assert bins.loc[bins["n"] == 0, ["confidence", "accuracy"]].isna().all(axis=None)


def test_bins_by_hand() -> None:
    p1 = np.array([0.75, 0.7, 0.5, 1.0, 0.0])  # confidences 0.75, 0.7, 0.5, 1, 1
    bins = reliability_bins(np.array([1, 0, 0, 1, 1]), p1, bins=4)
    assert bins["n"].tolist() == [0, 1, 2, 2]  # a bin ends with its upper limit
    assert bins["accuracy"].tolist()[1:] == [1, 0.5, 0.5]  # a tie of both classes is class 0
    assert bins["confidence"].tolist()[1:] == pytest.approx([0.5, 0.725, 1])
    assert bins["low"].tolist() == [0, 0.25, 0.5, 0.75] and bins["high"].tolist() == [0.25, 0.5, 0.75, 1]


# -------------------------------------------------------------------- operating points

@pytest.mark.parametrize("decimals", [1, 6])
@pytest.mark.parametrize("k", [2, 3])
def test_operating_points_against_every_threshold(k: int, decimals: int) -> None:
    """No threshold does better; and the point lies on scikit-learn's curve."""
    y, logits = calibrated(200, k=k, seed=k)
    p = np.round(softmax(logits, axis=1), decimals)
    p = p / p.sum(axis=1, keepdims=True)
    points = operating_points(y, p)
    assert [(one["class"], one["condition"]) for one in points] == [
        (c, f"{given} >= {level}") for c in ([1] if k == 2 else range(k))
        for given in ("specificity", "sensitivity") for level in ("0.90", "0.95")]
    for point in points:
        positive, score = y == point["class"], p[:, point["class"]]
        called = score[:, None] >= np.r_[np.unique(score), np.inf]  # (N, thresholds)
        rates = {"sensitivity": called[positive].mean(axis=0), "specificity": (~called[~positive]).mean(axis=0)}
        given, level = point["condition"].split(" >= ")
        other = {"sensitivity": "specificity", "specificity": "sensitivity"}[given]
        allowed = rates[given] >= float(level) - 1e-9
        assert point[given] >= float(level) - 1e-9
        assert point[other] == pytest.approx(rates[other][allowed].max(), abs=1e-12)
        assert point[given] == pytest.approx(rates[given][allowed & (rates[other] > point[other] - 1e-9)].max())
        if point["threshold"] is None:
            assert point["sensitivity"] == 0 and point["specificity"] == 1 and "no image positive" in point["reason"]
            continue
        assert point["reason"] is None
        assert (score[positive] >= point["threshold"]).mean() == pytest.approx(point["sensitivity"], abs=1e-12)
        assert (score[~positive] < point["threshold"]).mean() == pytest.approx(point["specificity"], abs=1e-12)
        fpr, tpr, thresholds = roc_curve(positive, score, drop_intermediate=False)
        at = np.flatnonzero(thresholds == point["threshold"])[0]
        assert (tpr[at], 1 - fpr[at]) == pytest.approx((point["sensitivity"], point["specificity"]))


def test_operating_points_by_hand() -> None:
    """20 of each class; scores i/20 of class 0 and (i + 10)/20, cut at 1, of class 1."""
    p1 = np.r_[np.arange(20) / 40, (np.arange(20) + 10) / 40]
    y = np.arange(40) // 20
    points = {one["condition"]: one for one in operating_points(y, p1)}
    assert len(points) == 4 and {one["class"] for one in operating_points(y, p1)} == {1}
    at = points["specificity >= 0.90"]  # two of class 0 may be called: threshold 18/40, from which 12 of class 1 lie
    assert (at["threshold"], at["specificity"], at["sensitivity"]) == pytest.approx((18 / 40, 0.9, 12 / 20))
    at = points["specificity >= 0.95"]
    assert (at["threshold"], at["specificity"], at["sensitivity"]) == pytest.approx((19 / 40, 0.95, 11 / 20))
    at = points["sensitivity >= 0.90"]
    assert (at["threshold"], at["sensitivity"], at["specificity"]) == pytest.approx((12 / 40, 0.9, 12 / 20))
    at = points["sensitivity >= 0.95"]
    assert (at["threshold"], at["sensitivity"], at["specificity"]) == pytest.approx((11 / 40, 0.95, 11 / 20))


def test_operating_points_without_a_class() -> None:
    p = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.3, 0.5, 0.2]])
    points = operating_points(np.array([0, 1, 1]), p)
    assert len(points) == 12
    for one in points:
        absent = one["class"] == 2
        assert one["reason"] == ("no image is of class 2" if absent else None)
        assert all((one[name] is None) == absent for name in ("sensitivity", "specificity", "threshold"))
    only = operating_points(np.array([1, 1]), np.array([0.4, 0.6]))
    assert len(only) == 4 and {one["reason"] for one in only} == {"all images are of class 1"}
    json.dumps(points + only, allow_nan=False)


def test_only_calling_none_meets_the_condition() -> None:
    points = operating_points(np.array([0, 1, 0, 1]), np.array([0.9, 0.8, 0.7, 0.6]))
    strict = points[1]
    assert (strict["sensitivity"], strict["specificity"], strict["threshold"]) == (0, 1, None)
    assert strict["reason"] == "met only by calling no image positive"
    json.dumps(points, allow_nan=False)
