"""Metrics against the published numbers, scikit-learn, torchmetrics and closed forms."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import (
    binary_specificity,
    multiclass_calibration_error,
    multiclass_specificity,
)

from furnace.evaluation.metrics import NAMES, classification_metrics
from helpers import GOLDEN

GOLD = json.loads((GOLDEN / "metrics.json").read_text())
INPUTS = np.load(GOLDEN / "metrics_inputs.npz")
UNIT = {"acc", "bacc", "weighted_f1", "macro_f1", "auroc", "auroc_ovr", "aupr", "sensitivity", "specificity", "ece"}


def random_case(k: int, n: int = 90, seed: int = 0, sharp: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities that know something of them; every class occurs."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % k)
    logits = rng.normal(size=(n, k)) * sharp
    logits[np.arange(n), y] += 1
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return y, p


# --------------------------------------------------------------- published numbers

@pytest.mark.parametrize(("case", "names"), [
    ("lp_six", {"acc": "lin_acc", "bacc": "lin_bacc", "kappa": "lin_kappa", "weighted_f1": "lin_weighted_f1",
                "auroc": "lin_auroc", "aupr": "lin_aupr"}),
    ("lp_binary", {"acc": "lin_acc", "bacc": "lin_bacc", "kappa": "lin_kappa", "weighted_f1": "lin_weighted_f1",
                   "auroc": "lin_auroc", "aupr": "lin_aupr"}),
    ("ft_six_val", {"acc": "accuracy", "bacc": "balanced_accuracy", "sensitivity": "sensitivity",
                    "specificity": "specificity", "auroc_ovr": "auc_roc", "weighted_f1": "weighted_f1"}),
])
def test_published_values(case: str, names: dict[str, str]) -> None:
    y, p = (INPUTS["yb"], INPUTS["pb"]) if case == "lp_binary" else (INPUTS["y6"], INPUTS["p6"])
    found = classification_metrics(y, p)
    expected = GOLD[case].get("metrics", GOLD[case])
    for ours, published in names.items():
        assert found[ours] == pytest.approx(expected[published], abs=1e-9), ours
    assert tuple(found) == NAMES and not found.reasons
    if case != "ft_six_val":
        assert found["macro_f1"] == pytest.approx(expected["lin_report"]["macro avg"]["f1-score"], abs=1e-9)


# ----------------------------------------------------------------- other libraries

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [2, 3, 7])
def test_against_scikit_learn_and_torchmetrics(k: int, seed: int) -> None:
    y, p = random_case(k, seed=seed, sharp=1 + seed)
    pred, hot = p.argmax(axis=1), np.eye(k)[y]
    found = classification_metrics(y, p)
    score = p[:, 1] if k == 2 else p
    both = torch.from_numpy(pred), torch.from_numpy(y)
    expected = {
        "acc": sk.accuracy_score(y, pred),
        "bacc": sk.balanced_accuracy_score(y, pred),
        "weighted_f1": sk.f1_score(y, pred, average="weighted"),
        "macro_f1": sk.f1_score(y, pred, average="macro"),
        "auroc": sk.roc_auc_score(y, score, multi_class="ovo"),
        "auroc_ovr": sk.roc_auc_score(y, score, multi_class="ovr"),
        "aupr": np.mean([sk.average_precision_score(hot[:, i], p[:, i]) for i in ([1] if k == 2 else range(k))]),
        "kappa": sk.cohen_kappa_score(y, pred, weights="quadratic"),
        "sensitivity": sk.recall_score(y, pred, average="binary" if k == 2 else "macro"),
        "specificity": float(binary_specificity(*both) if k == 2 else
                             multiclass_specificity(*both, num_classes=k, average="macro")),
        "ece": float(multiclass_calibration_error(torch.from_numpy(p), both[1], num_classes=k, n_bins=15, norm="l1")),
        "brier": sk.brier_score_loss(y, p[:, 1]) if k == 2 else sk.brier_score_loss(y, p, scale_by_half=False),
    }
    assert set(expected) == set(NAMES)
    for name, value in expected.items():
        loose = 1e-6 if name in ("specificity", "ece") else 1e-12  # torchmetrics counts in float32
        assert found[name] == pytest.approx(value, abs=loose), name
    assert not found.reasons and all(0 <= found[name] <= 1 for name in UNIT)


def test_one_versus_rest_and_one_versus_one_differ() -> None:
    y, p = random_case(3, n=91, sharp=2)
    y[:30] = 0  # unequal classes
    found = classification_metrics(y, p)
    assert abs(found["auroc"] - found["auroc_ovr"]) > 1e-4


def test_closed_forms() -> None:
    y = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    p1 = np.array([0.1, 0.4, 0.9, 0.8, 0.8, 0.3, 0.6, 0.95])  # one false positive, one false negative
    found = classification_metrics(y, p1)
    assert found["acc"] == 6 / 8 and found["sensitivity"] == 4 / 5
    assert found["specificity"] == pytest.approx(2 / 3, abs=1e-12)
    assert found["bacc"] == pytest.approx((4 / 5 + 2 / 3) / 2, abs=1e-12)
    assert found["auroc"] == pytest.approx((5 + 4 + 1) / 15, abs=1e-12)  # pairs in the right order
    assert found["brier"] == pytest.approx(((p1 - y) ** 2).mean(), abs=1e-12)
    assert found["kappa"] == pytest.approx((6 / 8 - 34 / 64) / (1 - 34 / 64), abs=1e-12)


def test_calibration_closed_form() -> None:
    # confidences 0.9 (4 of 10 right) and 0.6 (all of 10 right): 0.5 * |0.4 - 0.9| + 0.5 * |1 - 0.6|
    p1 = np.array([0.9] * 10 + [0.6] * 10)
    y = np.array([1] * 4 + [0] * 6 + [1] * 10)
    assert classification_metrics(y, p1)["ece"] == pytest.approx(0.45, abs=1e-12)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_perfect_and_worst(k: int) -> None:
    y = np.arange(4 * k) % k
    best = classification_metrics(y, np.eye(k)[y])
    assert all(best[name] == pytest.approx(0 if name in ("ece", "brier") else 1, abs=1e-12) for name in NAMES)
    worst = classification_metrics(y, np.eye(k)[(y + 1) % k])
    assert worst["acc"] == worst["bacc"] == worst["weighted_f1"] == worst["sensitivity"] == 0
    assert worst["ece"] == 1 and worst["brier"] == (1 if k == 2 else 2) and not worst.reasons


def test_no_warnings() -> None:
    y, p = random_case(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for absent in (set(), {2}, {1, 2, 3}):
            keep = ~np.isin(y, list(absent))
            classification_metrics(y[keep], p[keep])


# ----------------------------------------------------------- the form of the input

def test_one_column_is_class_one() -> None:
    y, p = random_case(2)
    assert dict(classification_metrics(y, p[:, 1])) == pytest.approx(dict(classification_metrics(y, p)), abs=1e-12)


def test_float32_lists_and_other_integers() -> None:
    y, p = random_case(5)
    reference = classification_metrics(y, p.astype(np.float32))
    for labels in (y.astype(np.int8), y.astype(float), y.tolist()):
        assert dict(classification_metrics(labels, p.astype(np.float32).tolist())) == dict(reference)
    assert reference["brier"] == pytest.approx(classification_metrics(y, p)["brier"], abs=1e-6)


def test_the_inputs_stay_as_they_were() -> None:
    y, p = random_case(3)
    before = y.copy(), p.copy()
    classification_metrics(y, p)
    assert (y == before[0]).all() and (p == before[1]).all()


@pytest.mark.parametrize(("y", "p"), [
    ([], np.zeros((0, 3))),
    ([0, 1], [[0.5, 0.5]]),
    ([0, 1], [[1.0], [1.0]]),
    ([0, 3], [[0.2, 0.3, 0.5]] * 2),
    ([0, -1], [[0.2, 0.3, 0.5]] * 2),
    ([0, 0.5], [[0.2, 0.3, 0.5]] * 2),
    ([0, 1], [[0.2, 0.3, 0.6]] * 2),
    ([0, 1], [[0.2, 0.3, np.nan]] * 2),
    ([0, 1], [[-0.5, 1.0, 0.5]] * 2),
    ([0, 1], [0.5, 1.5]),
    ([0, 1], [0.5, np.nan]),
    ([0, 1], [[3.0, -2.0]] * 2),
    ([0, 1], np.full((2, 2, 2), 0.5)),
], ids=["empty", "lengths", "one column", "label too high", "negative label", "half label", "sum", "nan", "negative",
        "above one", "nan in a column", "logits", "three axes"])
def test_bad_input_is_refused(y, p) -> None:
    with pytest.raises(ValueError, match="need N labels|probabilities must|labels must"):
        classification_metrics(y, p)


# --------------------------------------------------------- what cannot be computed

@pytest.mark.parametrize("absent", [0, 3, 5])
def test_an_absent_class_is_nan_with_a_reason(absent: int) -> None:
    keep = INPUTS["y6"] != absent
    y, p = INPUTS["y6"][keep], INPUTS["p6"][keep]
    found = classification_metrics(y, p)
    nan = {name for name in NAMES if math.isnan(found[name])}
    assert nan == {"macro_f1", "auroc", "auroc_ovr", "aupr", "sensitivity"} == set(found.reasons)
    assert set(found.reasons.values()) == {f"class {absent} is absent from these images"}
    pred = p.argmax(axis=1)
    assert found["acc"] == pytest.approx((pred == y).mean(), abs=1e-12)
    recalls = [(pred[y == k] == k).mean() for k in range(6) if k != absent]
    assert found["bacc"] == pytest.approx(np.mean(recalls), abs=1e-12)
    assert found["weighted_f1"] == pytest.approx(
        sk.f1_score(y, pred, labels=range(6), average="weighted", zero_division=0), abs=1e-12)


def test_published_values_without_a_class() -> None:
    expected = GOLD["lp_six_missing_class"]
    keep = INPUTS["y6"] != 5
    found = classification_metrics(INPUTS["y6"][keep], INPUTS["p6"][keep])
    for name in ("acc", "bacc", "kappa", "weighted_f1"):
        assert found[name] == pytest.approx(expected[f"lin_{name}"], abs=1e-9), name
    assert math.isnan(found["auroc"]) and math.isnan(found["aupr"])  # the published table says 0.0000


@pytest.mark.parametrize(("label", "nan", "values"), [
    (0, {"macro_f1", "auroc", "auroc_ovr", "aupr", "sensitivity"}, {"specificity": 0.75, "acc": 0.75, "kappa": 0.0}),
    (1, {"macro_f1", "auroc", "auroc_ovr", "specificity"}, {"sensitivity": 0.25, "aupr": 1.0, "kappa": 0.0})])
def test_binary_of_one_class(label: int, nan: set[str], values: dict[str, float]) -> None:
    found = classification_metrics(np.full(4, label), np.array([0.1, 0.2, 0.3, 0.9]))
    assert {name for name in NAMES if math.isnan(found[name])} == nan == set(found.reasons)
    for name, value in values.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert found["brier"] == pytest.approx(np.mean((np.array([0.1, 0.2, 0.3, 0.9]) - label) ** 2), abs=1e-12)


def test_one_image() -> None:
    found = classification_metrics([2], [[0.1, 0.2, 0.7]])
    assert (found["acc"], found["bacc"], found["weighted_f1"]) == (1, 1, 1)
    assert found["ece"] == pytest.approx(0.3, abs=1e-12)
    assert found["brier"] == pytest.approx(0.01 + 0.04 + 0.09, abs=1e-12)
    assert math.isnan(found["kappa"]) and "one class" in found.reasons["kappa"]
    assert math.isnan(found["specificity"]) and "no negative" in found.reasons["specificity"]
    assert "class 0, 1 is absent" in found.reasons["auroc"]


def test_every_nan_has_a_reason_and_every_reason_a_nan() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        k, n = rng.integers(2, 5), rng.integers(1, 6)
        y, p = rng.integers(0, k, n), rng.dirichlet(np.ones(k), n)
        found = classification_metrics(y, p)
        assert {name for name in NAMES if math.isnan(found[name])} == set(found.reasons), (y, p)
        assert all(0 <= found[name] <= 1 for name in UNIT - set(found.reasons))


def test_constant_predictions() -> None:
    found = classification_metrics([0, 1, 2, 2], np.full((4, 3), 1 / 3))
    assert found["auroc"] == found["auroc_ovr"] == 0.5 and found["kappa"] == 0
    assert found["acc"] == 0.25 and found["bacc"] == pytest.approx(1 / 3) and not found.reasons


def test_results_form() -> None:
    y, p = random_case(3)
    keep = y != 1
    found = classification_metrics(y[keep], p[keep])
    results = found.to_results()
    assert tuple(results) == NAMES
    assert results["acc"] == {"value": found["acc"], "low": None, "high": None, "reason": None}
    assert results["auroc"] == {"value": None, "low": None, "high": None,
                                "reason": "class 1 is absent from these images"}
    assert json.loads(json.dumps(results, allow_nan=False)) == results
