"""Metrics of several labels per image against scikit-learn, torchmetrics and resamples made by hand."""

import time

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional import classification as tm

from furnace.evaluation.metrics import classification_metrics
from furnace.evaluation.multilabel import (
    NAMES,
    OF_A_CLASS,
    multilabel_metrics,
    multilabel_table,
    score_multilabel,
)
from furnace.evaluation.report import metric_lines
from furnace.evaluation.statistics import Resampling, bootstrap_intervals, resampling_weights

CLASSES = ("acne", "eczema", "nevus", "wart")


def drawn(n: int = 80, k: int = 4, *, seed: int = 0, rate: float = 0.35) -> tuple[np.ndarray, np.ndarray]:
    """Targets and probabilities that know something of them, with ties."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, k)) < rate).astype(np.float32)
    p = np.clip(rng.normal(0.3 + 0.35 * y, 0.22), 0, 1)
    return y, np.round(p, 2)


# ---------------------------------------------------------------------------------------------------------- metrics

@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_learn(seed: int) -> None:
    y, p = drawn(seed=seed)
    called = p > 0.5
    found = multilabel_metrics(y, p)
    columns = list(zip(y.T, called.T, p.T, strict=True))
    expected = {
        "acc": 1 - sk.hamming_loss(y, called),
        "exact_match": sk.accuracy_score(y, called),
        "bacc": np.mean([sk.balanced_accuracy_score(a, b) for a, b, _ in columns]),
        "macro_f1": sk.f1_score(y, called, average="macro"),
        "micro_f1": sk.f1_score(y, called, average="micro"),
        "auroc": sk.roc_auc_score(y, p, average="macro"),
        "aupr": sk.average_precision_score(y, p, average="macro"),
        "sensitivity": sk.recall_score(y, called, average="macro"),
        "specificity": np.mean([sk.recall_score(a, b, pos_label=0) for a, b, _ in columns]),
        "brier": np.mean([sk.brier_score_loss(a, c) for a, _, c in columns]),
        "ece": np.mean([classification_metrics(a.astype(int), c)["ece"] for a, _, c in columns])}
    assert tuple(found) == NAMES and set(expected) == set(NAMES) and not found.reasons
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_against_torchmetrics() -> None:
    y, p = drawn(seed=5)
    found = multilabel_metrics(y, p)
    wanted, given = torch.from_numpy(y).long(), torch.from_numpy(p)
    k = y.shape[1]
    expected = {"acc": tm.multilabel_accuracy(given, wanted, k), "macro_f1": tm.multilabel_f1_score(given, wanted, k),
                "exact_match": tm.multilabel_exact_match(given, wanted, k),
                "micro_f1": tm.multilabel_f1_score(given, wanted, k, average="micro"),
                "auroc": tm.multilabel_auroc(given, wanted, k),
                "aupr": tm.multilabel_average_precision(given, wanted, k),
                "sensitivity": tm.multilabel_recall(given, wanted, k),
                "specificity": tm.multilabel_specificity(given, wanted, k)}
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-6), name


def test_closed_form_and_the_threshold() -> None:
    y = [[1, 0], [1, 1], [0, 0], [0, 1]]
    p = [[0.9, 0.5], [0.5, 0.8], [0.1, 0.6], [0.2, 0.9]]  # 0.5 is no
    found = multilabel_metrics(np.array(y), np.array(p))
    assert found["acc"] == 6 / 8 and found["exact_match"] == 2 / 4
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2) and found["micro_f1"] == pytest.approx(6 / 8)
    assert found["sensitivity"] == (1 / 2 + 1) / 2 and found["specificity"] == (1 + 1 / 2) / 2
    assert found["brier"] == pytest.approx((0.01 + 0.25 + 0.01 + 0.04 + 0.25 + 0.04 + 0.36 + 0.01) / 8)


def test_a_single_class() -> None:
    y, p = drawn(k=1)
    binary = classification_metrics(y[:, 0].astype(int), p[:, 0])
    found = multilabel_metrics(y, p)
    for name in ("acc", "bacc", "auroc", "aupr", "sensitivity", "specificity", "ece", "brier"):
        assert found[name] == binary[name]
    assert found["exact_match"] == found["acc"] and found["micro_f1"] == found["macro_f1"]


def test_a_class_without_positives_is_left_out() -> None:
    y, p = drawn()
    y[:, 2], y[:, 3] = 0, 1
    found = multilabel_metrics(y, p, CLASSES)
    alone = [multilabel_metrics(y[:, [k]], p[:, [k]]) for k in range(4)]
    for name, classes in {"auroc": (0, 1), "macro_f1": (0, 1, 3), "aupr": (0, 1, 3), "sensitivity": (0, 1, 3),
                          "specificity": (0, 1, 2), "acc": (0, 1, 2, 3), "bacc": (0, 1, 2, 3)}.items():
        assert found[name] == pytest.approx(np.mean([alone[k][name] for k in classes])), name
    assert found.reasons == {
        "auroc": "mean of 2 of 4 classes: nevus has no positive image; wart has no negative image",
        **dict.fromkeys(("macro_f1", "aupr", "sensitivity"), "mean of 3 of 4 classes: nevus has no positive image"),
        "specificity": "mean of 3 of 4 classes: wart has no negative image"}


def test_no_label_at_all() -> None:
    y, p = drawn()
    found = multilabel_metrics(np.zeros_like(y), p, CLASSES)
    undefined = {"macro_f1", "micro_f1", "auroc", "aupr", "sensitivity"}
    assert {name for name in NAMES if np.isnan(found[name])} == undefined == set(found.reasons)
    assert found.reasons["auroc"] == "not defined: acne and eczema and nevus and wart have no positive image"
    assert found.reasons["micro_f1"] == "no image has any label"
    assert found["specificity"] == pytest.approx((p <= 0.5).mean())


@pytest.mark.parametrize(("y", "p", "phrase"), [
    ([[0, 2]], [[0.1, 0.2]], "0 or 1"), ([[0, 1]], [[0.1, 1.2]], "in \\[0, 1\\]"),
    ([[0, 1]], [[0.1, float("nan")]], "in \\[0, 1\\]"), ([[0, 1]], [[0.1]], "need"), ([0, 1], [0.1, 0.2], "need"),
    (np.zeros((0, 2)), np.zeros((0, 2)), "need")])
def test_wrong_inputs(y, p, phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        multilabel_metrics(np.array(y), np.array(p))


# -------------------------------------------------------------------------------------------------------- intervals

def by_hand(y: np.ndarray, p: np.ndarray, resampling: Resampling) -> list:
    """The metrics of every resample, its images written out."""
    found = []
    for weights in resampling_weights(np.zeros(len(y)), resampling):
        for counts in weights:
            rows = np.repeat(np.arange(len(y)), counts)
            found.append(multilabel_metrics(y[rows], p[rows]))
    return found


@pytest.mark.parametrize("clusters", [None, np.arange(80) // 3])
def test_intervals_are_those_of_resamples_by_hand(clusters) -> None:
    y, p = drawn()
    resampling = Resampling(resamples=30, seed=3, clusters=clusters, unit="image" if clusters is None else "patient")
    scored = score_multilabel(y, p, class_names=CLASSES, resampling=resampling)
    whole, draws = multilabel_metrics(y, p), by_hand(y, p, resampling)
    assert list(scored["metrics"]) == list(NAMES)
    for name in NAMES:
        entry = scored["metrics"][name]
        assert entry["value"] == whole[name] and entry["reason"] is None
        if name != "ece":
            limits = np.percentile([draw[name] for draw in draws], [2.5, 97.5])
            assert (entry["low"], entry["high"]) == pytest.approx(tuple(limits), abs=1e-12), name


def test_the_classes_have_the_intervals_of_binary_metrics() -> None:
    y, p = drawn(200)
    resampling = Resampling(resamples=50, seed=1)
    scored = score_multilabel(y, p, class_names=CLASSES, resampling=resampling)
    assert list(scored["per_class"]) == list(CLASSES)
    for k, entries in enumerate(scored["per_class"].values()):
        assert tuple(entries) == OF_A_CLASS
        expected = bootstrap_intervals(y[:, k].astype(int), p[:, k], resampling)
        for name, entry in entries.items():
            if name != "f1":
                one = expected[name]
                assert (entry["value"], entry["low"], entry["high"]) == pytest.approx((one.value, one.low, one.high))


def test_ece_of_one_class_and_of_copies_of_it() -> None:
    y, p = drawn(200, 1)
    resampling = Resampling(resamples=80, seed=2)
    expected = bootstrap_intervals(y[:, 0].astype(int), p[:, 0], resampling)["ece"]
    assert expected.low > 0
    for copies in (1, 3):
        entry = score_multilabel(y.repeat(copies, axis=1), p.repeat(copies, axis=1), class_names=CLASSES[:copies],
                                 resampling=resampling)["metrics"]["ece"]
        assert (entry["value"], entry["low"], entry["high"]) == pytest.approx(
            (expected.value, expected.low, expected.high))


def test_a_class_without_positives_has_no_intervals() -> None:
    y, p = drawn()
    y[:, 2] = 0
    scored = score_multilabel(y, p, class_names=CLASSES, resampling=Resampling(resamples=40))
    auroc, nevus = scored["metrics"]["auroc"], scored["per_class"]["nevus"]
    assert auroc["low"] < auroc["value"] < auroc["high"]
    assert auroc["reason"] == "mean of 3 of 4 classes: nevus has no positive image"
    for name in ("auroc", "f1", "aupr", "sensitivity"):
        assert nevus[name] == {"value": None, "low": None, "high": None, "reason": "no positive image"}
    assert nevus["specificity"]["low"] is not None


def test_a_class_that_resamples_lack() -> None:
    y, p = drawn()
    y[:, 2] = np.arange(len(y)) == 0
    scored = score_multilabel(y, p, class_names=CLASSES, resampling=Resampling(resamples=60))
    for entry in (scored["metrics"]["auroc"], scored["per_class"]["nevus"]["f1"]):
        assert entry["value"] is not None and entry["low"] is entry["high"] is None
        assert "no interval: undefined in" in entry["reason"]
    assert scored["metrics"]["micro_f1"]["low"] is not None and scored["per_class"]["acne"]["f1"]["low"] is not None


def test_stratified_resamples_keep_the_sets_of_labels() -> None:
    y, p = drawn()
    y[:, 2] = np.arange(len(y)) == 0
    scored = score_multilabel(y, p, class_names=CLASSES, resampling=Resampling(resamples=20, stratify=True))
    assert scored["metrics"]["auroc"]["low"] is not None
    certain = score_multilabel(y, np.full_like(p, 0.9), class_names=CLASSES,
                               resampling=Resampling(resamples=20, stratify=True))["metrics"]
    assert certain["micro_f1"]["low"] == pytest.approx(certain["micro_f1"]["value"])
    assert certain["micro_f1"]["high"] == pytest.approx(certain["micro_f1"]["value"])


def test_the_shape_of_the_results() -> None:
    y, p = drawn()
    scored = score_multilabel(y, p, class_names=CLASSES, resampling=Resampling(resamples=10))
    assert set(scored) == {"n", "resampling", "metrics", "per_class", "operating_points", "calibration"}
    assert scored["n"] == 80 and scored["resampling"] == "10 resamples of images"
    assert scored["operating_points"] == [] and scored["calibration"] is None
    assert f"exact_match   {scored['metrics']['exact_match']['value']:.4f}" in metric_lines(scored["metrics"], "x")
    with pytest.raises(ValueError, match="3 class names for 4 classes"):
        score_multilabel(y, p, class_names=CLASSES[:3], resampling=Resampling(resamples=10))


def test_one_image() -> None:
    scored = score_multilabel([[1, 0]], [[0.9, 0.2]], class_names=("a", "b"), resampling=Resampling(resamples=5))
    assert scored["metrics"]["acc"] == {"value": 1.0, "low": None, "high": None,
                                        "reason": "one image cannot be resampled"}


def test_many_resamples_are_quick() -> None:
    y, p = drawn(1000, 14, rate=0.1)
    start = time.process_time()
    score_multilabel(y, p, class_names=list(map(str, range(14))), resampling=Resampling(resamples=1000))
    assert time.process_time() - start < 20  # measured: 0.4


# ------------------------------------------------------------------------------------------------------------ table

def test_table() -> None:
    table = multilabel_table(["a.png", "b,c.png"], np.array([[1, 0, 1], [0, 0, 0]], dtype=np.float32),
                             np.array([[0.9, 0.5, 0.2], [0.1, 0.6, 0.51]]), ("acne", "wart, common", "nevus"))
    assert list(table.columns) == ["filename", "true_labels", "predicted_labels", "probability_acne",
                                   "probability_wart, common", "probability_nevus"]
    assert table["true_labels"].tolist() == ["acne;nevus", ""]
    assert table["predicted_labels"].tolist() == ["acne", "wart, common;nevus"]
    assert table["probability_nevus"].tolist() == [0.2, 0.51]


def test_table_of_no_image() -> None:
    table = multilabel_table([], np.zeros((0, 2)), np.zeros((0, 2)), ("a", "b"))
    assert len(table) == 0 and len(table.columns) == 5
