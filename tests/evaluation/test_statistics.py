"""Intervals and paired tests: against scikit-learn on written-out resamples, DeLong's formula, published intervals and
simulation."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

from furnace.evaluation.metrics import NAMES, classification_metrics
from furnace.evaluation.statistics import (
    Difference,
    Interval,
    Resampling,
    _bootstrap_p,
    bootstrap_intervals,
    delong,
    paired_differences,
    resampling_for,
)
from helpers import ROOT

PUBLISHED = ROOT.parent / "shared" / "data" / "published_predictions"


def draw(rng: np.random.Generator, n: int, *, prior=(0.5, 0.3, 0.2), signal: float = 1.0, sharp: float = 3.0,
         y: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and their true posterior under normal scores, its logits multiplied by ``sharp`` (1: calibrated)."""
    prior = np.array(prior)
    y = rng.choice(len(prior), n, p=prior) if y is None else y
    z = rng.normal(size=(n, len(prior)))
    z[np.arange(n), y] += signal
    logits = sharp * (signal * z + np.log(prior))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return y, p / p.sum(axis=1, keepdims=True)


def width(interval: Interval | Difference) -> float:
    return interval.high - interval.low


# ------------------------------------------------------------------------ intervals

def ece_draws(y: np.ndarray, p: np.ndarray, images: list[np.ndarray], resampled: np.ndarray) -> np.ndarray:
    """By bins of a loop: gaps of the resamples with the signs of the sample, less the bias that the resamples show."""
    def gaps(image: np.ndarray) -> np.ndarray:
        right, sure = p[image].argmax(axis=1) == y[image], p[image].max(axis=1)
        inside = [(sure > b / 15) & (sure <= (b + 1) / 15) for b in range(15)]
        return np.array([(right[one] - sure[one]).sum() for one in inside]) / len(image)
    own = gaps(np.arange(len(y)))
    return np.array([np.sign(own) @ gaps(image) for image in images]) - (np.mean(resampled) - np.abs(own).sum())


def test_percentiles_of_written_out_resamples() -> None:
    """Every interval from scikit-learn on resampled images."""
    y, p = draw(np.random.default_rng(0), 150)
    found = bootstrap_intervals(y, p, Resampling(resamples=40, seed=5))
    images = [np.random.default_rng((5, r)).integers(0, 150, 150) for r in range(40)]
    resampled = [classification_metrics(y[image], p[image]) for image in images]
    value = classification_metrics(y, p)
    assert tuple(found) == NAMES
    for name, interval in found.items():
        draws = np.array([one[name] for one in resampled])
        low, high = np.percentile(ece_draws(y, p, images, draws) if name == "ece" else draws, [2.5, 97.5])
        assert (interval.value, interval.low, interval.high) == pytest.approx((value[name], low, high), abs=1e-9), name
        assert interval.reason is None


def test_accuracy_agrees_with_the_binomial() -> None:
    y = np.arange(400) % 2
    p1 = np.where(np.arange(400) < 300, y, 1 - y) * 0.8 + 0.1  # 300 right
    interval = bootstrap_intervals(y, p1, Resampling(resamples=4000))["acc"]
    se = math.sqrt(0.75 * 0.25 / 400)
    assert (interval.low, interval.high) == pytest.approx((0.75 - 1.96 * se, 0.75 + 1.96 * se), abs=0.004)


def test_calibration_error_stays_in_its_range_and_holds_its_value() -> None:
    rng = np.random.default_rng(1)
    for sharp in (1.0, 1.0, 30.0):
        interval = bootstrap_intervals(*draw(rng, 60, sharp=sharp), Resampling(resamples=200))["ece"]
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
    found = [bootstrap_intervals(*draw(rng, 400, sharp=1.0), Resampling(resamples=100))["ece"] for _ in range(20)]
    assert all(one.value > 0.01 for one in found) and sum(one.low == 0 for one in found) >= 17  # calibrated: all noise
    y = np.arange(40) % 2
    assert bootstrap_intervals(y, (1.0 - y), Resampling(resamples=50))["ece"] == Interval(1.0, 1.0, 1.0)


def test_seed_and_chunks(monkeypatch) -> None:
    y, p = draw(np.random.default_rng(0), 100)
    first = bootstrap_intervals(y, p, Resampling(resamples=150, seed=3))
    assert bootstrap_intervals(y, p, Resampling(resamples=150, seed=3)) == first
    assert bootstrap_intervals(y, p, Resampling(resamples=150, seed=4)) != first
    monkeypatch.setattr("furnace.evaluation.statistics.CHUNK_BYTES", 100 * 8 * 7)
    again = bootstrap_intervals(y, p, Resampling(resamples=150, seed=3))
    for name in NAMES:
        assert (again[name].low, again[name].high) == pytest.approx((first[name].low, first[name].high), abs=1e-12)


def test_labels_of_clusters_do_not_matter() -> None:
    y, p = draw(np.random.default_rng(0), 90)
    codes = np.arange(90) // 3
    by_number = bootstrap_intervals(y, p, Resampling("patient", codes, resamples=50))
    named = np.array([f"P{c:03d}" for c in codes], dtype=object)
    assert bootstrap_intervals(y, p, Resampling("patient", named, resamples=50)) == by_number


@pytest.mark.parametrize("copies", [4, 10])
def test_copies_of_a_patient_widen_by_the_root_of_their_number(copies: int) -> None:
    y, p = draw(np.random.default_rng(0), 300)
    y, p, patient = np.repeat(y, copies), np.repeat(p, copies, axis=0), np.repeat(np.arange(300), copies)
    naive = bootstrap_intervals(y, p, Resampling(resamples=400))
    whole = bootstrap_intervals(y, p, Resampling("patient", patient, resamples=400))
    for name in ("acc", "bacc", "auroc", "auroc_ovr", "aupr", "brier", "kappa"):
        assert width(whole[name]) / width(naive[name]) == pytest.approx(math.sqrt(copies), rel=0.15), name
    assert whole["acc"].value == naive["acc"].value


def test_clusters_of_different_sizes() -> None:
    """Patients with 1 to 9 images, all right or all wrong: the variance of a ratio, by its linearisation."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 10, 400)
    patient = np.repeat(np.arange(400), sizes)
    right = np.repeat(rng.random(400) < 0.7, sizes)
    y = rng.integers(0, 2, len(patient))
    interval = bootstrap_intervals(y, np.where(right, y, 1 - y) * 0.8 + 0.1,
                                   Resampling("patient", patient, resamples=2000))["acc"]
    residuals = np.bincount(patient, weights=right - right.mean())
    se = math.sqrt((residuals ** 2).sum()) / len(patient)
    assert width(interval) == pytest.approx(2 * 1.96 * se, rel=0.07)
    assert width(interval) > 2 * 2 * 1.96 * math.sqrt(0.21 / len(patient))  # far from the naive one


def test_stratified_keeps_the_class_counts() -> None:
    """With the counts fixed, specificity and bacc of a class-wise constant answer do not vary; acc is their sum."""
    y, p = draw(np.random.default_rng(0), 200)
    found = bootstrap_intervals(y, np.eye(3)[np.zeros(200, dtype=int)], Resampling(resamples=100, stratify=True))
    share = (y == 0).mean()
    assert (found["acc"].low, found["acc"].high) == pytest.approx((share, share), abs=1e-12)
    plain = bootstrap_intervals(y, np.eye(3)[np.zeros(200, dtype=int)], Resampling(resamples=100))
    assert width(plain["acc"]) > 0.05
    rare = np.r_[y, [3]]  # one image of class 3 is in every stratified resample
    p = np.c_[p * 0.9, np.full(200, 0.1)]
    p = np.r_[p, [[0.1, 0.1, 0.1, 0.7]]]
    assert bootstrap_intervals(rare, p, Resampling(resamples=100, stratify=True))["auroc"].reason is None
    assert bootstrap_intervals(rare, p, Resampling(resamples=100))["auroc"].low is None


# ---------------------------------------------------------------- what cannot be computed

def test_undefined_resamples() -> None:
    """Of 4 images of a class among 100 a resample has none with probability 0.96^100 = 1.7 %, of 2 with 13 %."""
    rng = np.random.default_rng(0)
    for few, given in ((4, True), (2, False)):
        y = np.r_[np.full(few, 2), np.arange(100 - few) % 2]
        found = bootstrap_intervals(y, rng.dirichlet(np.ones(3), 100), Resampling(resamples=1000))
        assert (found["auroc"].low is not None) == (found["auroc"].high is not None) == given
        assert found["auroc"].value is not None and found["acc"].low is not None and found["bacc"].low is not None
        assert not given or 0 < found["auroc"].low < found["auroc"].value < found["auroc"].high < 1
        assert given or re.search(r"undefined in 1\d% of the resamples", found["auroc"].reason)


def test_p_of_defined_resamples() -> None:
    draws = np.r_[np.full(6, np.nan), np.full(90, 0.2), np.full(9, -0.1)]
    assert _bootstrap_p(draws) == pytest.approx(2 * 10 / 100) and _bootstrap_p(-draws) == _bootstrap_p(draws)


def test_an_absent_class() -> None:
    y, p = draw(np.random.default_rng(0), 60)
    y[y == 1] = 0
    found = bootstrap_intervals(y, p, Resampling(resamples=50))
    assert found["auroc"] == Interval(None, None, None, "class 1 is absent from these images")
    assert found["bacc"].low < found["bacc"].value < found["bacc"].high
    both = paired_differences(y, p, p[:, ::-1], Resampling(resamples=50))
    assert both["auroc"].difference is both["auroc"].p_value is both["auroc"].low is None
    assert "class 1 is absent" in both["auroc"].reason and both["acc"].p_value is not None


def test_one_unit_makes_no_interval() -> None:
    y, p = draw(np.random.default_rng(0), 30)
    found = bootstrap_intervals(y, p, Resampling("patient", np.zeros(30), resamples=50))
    assert found["acc"] == Interval(found["acc"].value, None, None, "one patient cannot be resampled")
    assert bootstrap_intervals(y[:1], p[:1], Resampling(resamples=50))["acc"].reason == "one image cannot be resampled"


@pytest.mark.parametrize("how", [{"clusters": np.arange(3), "stratify": True}, {"resamples": 0}])
def test_refused_resamplings(how: dict) -> None:
    with pytest.raises(ValueError, match="never stratified|at least 1"):
        Resampling(**how)


def test_refused_inputs() -> None:
    y, p = draw(np.random.default_rng(0), 30)
    with pytest.raises(ValueError, match="29 clusters for 30 images"):
        bootstrap_intervals(y, p, Resampling("patient", np.arange(29)))
    with pytest.raises(ValueError, match="same classes"):
        paired_differences(y % 2, p[:, :2] / p[:, :2].sum(axis=1, keepdims=True), p, Resampling())
    with pytest.raises(ValueError, match="ovo"):
        delong(y, p, how="ova")
    with pytest.raises(ValueError, match="class 2 is absent"):
        delong(y % 2, p)


# ------------------------------------------------------------------- what is resampled

@pytest.mark.parametrize(("columns", "words", "groups"), [
    ({"image": list("abcd")}, "1,000 resamples of images", None),
    ({"patient_id": ["P", "P", "Q", None]}, "1,000 resamples of patients (patient_id)", [0, 0, 1, 2]),
    ({"lesion_id": ["L", None, "L", None]}, "1,000 resamples of lesions (lesion_id)", [0, 1, 0, 2]),
    ({"patient_id": ["P", "Q", "P", "Q"], "lesion_id": list("wwxx")}, "1,000 resamples of patients (patient_id)",
     [0, 1, 0, 1]),
    ({"patient_id": [None] * 4, "lesion_id": list("wwxx")}, "1,000 resamples of lesions (lesion_id)", [0, 0, 1, 1]),
    ({"patient_id": ["P", "Q", "R", None]}, "1,000 resamples of images", None),
    ({"patient_id": [None] * 4}, "1,000 resamples of images", None),
])
def test_the_unit_of_a_table(columns: dict, words: str, groups: list[int] | None) -> None:
    found = resampling_for(pd.DataFrame(columns))
    assert found.describe() == words
    assert (None if found.clusters is None else found.clusters.tolist()) == groups


def test_stratify_of_a_table(caplog) -> None:
    found = resampling_for(pd.DataFrame({"image": ["a", "b"]}), stratify=True, resamples=200, seed=9)
    assert found == Resampling(stratify=True, resamples=200, seed=9)
    assert found.describe() == "200 resamples of images, stratified by class" and not caplog.records
    found = resampling_for(pd.DataFrame({"patient_id": ["P", "P", "Q"]}), stratify=True, seed=9)
    assert not found.stratify and found.seed == 9 and "not stratified" in caplog.text


# ----------------------------------------------------------------- paired differences

def test_same_resamples_for_both() -> None:
    """A model against itself differs by nothing; sharpened it keeps its decisions and ranks within a pair of classes"""
    y, p = draw(np.random.default_rng(0), 200)
    for name, found in paired_differences(y, p, p, Resampling(resamples=100)).items():
        assert (found.first, found.difference, found.low, found.high) == (found.second, 0, 0, 0), name
        assert found.p_value == 1 and found.reason is None, name
    sharper = p ** 2 / (p ** 2).sum(axis=1, keepdims=True)
    found = paired_differences(y, sharper, p, Resampling(resamples=100))
    assert found["acc"].low == found["acc"].high == 0 and found["acc"].p_value == 1
    assert found["brier"].low > 0 and found["brier"].p_value == pytest.approx(2 / 101)  # the least that 100 can tell


def test_differences_by_written_out_resamples() -> None:
    rng = np.random.default_rng(0)
    y, first = draw(rng, 120)
    second = draw(rng, 120, signal=0.8, y=y)[1]
    found = paired_differences(y, first, second, Resampling(resamples=19, seed=2))
    images = [np.random.default_rng((2, r)).integers(0, 120, 120) for r in range(19)]
    resampled = [[classification_metrics(y[i], p[i]) for i in images] for p in (first, second)]
    values = [classification_metrics(y, p) for p in (first, second)]
    assert tuple(found) == NAMES
    for name, one in found.items():
        draws = [np.array([metrics[name] for metrics in model]) for model in resampled]
        if name == "ece":
            draws = [ece_draws(y, p, images, own) for p, own in zip((first, second), draws, strict=True)]
        draws = draws[0] - draws[1]
        assert (one.first, one.second) == pytest.approx((values[0][name], values[1][name]), abs=1e-12)
        assert one.difference == pytest.approx(one.first - one.second, abs=1e-12)
        assert (one.low, one.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=1e-9), name
        assert one.test == ("DeLong" if name.startswith("auroc") else "paired bootstrap")
        if one.test == "paired bootstrap":
            tail = min((draws < 1e-12).sum(), (draws > -1e-12).sum())
            assert one.p_value == pytest.approx(min(1, 2 * (tail + 1) / 20), abs=1e-12), name
    for name, how in (("auroc", "ovo"), ("auroc_ovr", "ovr")):
        assert found[name].p_value == delong(y, first, second, how=how).p_value
    assert found["auroc"].p_value != found["auroc_ovr"].p_value


def test_signs_turn_with_the_order() -> None:
    rng = np.random.default_rng(1)
    y, first = draw(rng, 100)
    second = draw(rng, 100, y=y)[1]
    one, other = (paired_differences(y, *pair, Resampling(resamples=99)) for pair in ((first, second), (second, first)))
    for name in NAMES:
        a, b = one[name], other[name]
        assert (a.difference, a.low, a.high) == pytest.approx((-b.difference, -b.high, -b.low), abs=1e-12), name
        assert a.p_value == pytest.approx(b.p_value, abs=1e-9), name


def test_a_clear_difference_is_found_and_clusters_count() -> None:
    rng = np.random.default_rng(1)
    y, first = draw(rng, 300, signal=1.5)
    second = draw(rng, 300, signal=0.7, y=y)[1]
    found = paired_differences(y, first, second, Resampling(resamples=200))
    assert all(found[name].p_value < 0.02 and found[name].low > 0 for name in ("acc", "auroc", "auroc_ovr"))
    five = [np.repeat(x, 5, axis=0) for x in (y, first, second)]
    whole = paired_differences(*five, Resampling("patient", np.repeat(np.arange(300), 5), resamples=200))
    naive = paired_differences(*five, Resampling(resamples=200))
    assert whole["auroc"].p_value == pytest.approx(found["auroc"].p_value, rel=0.3)
    assert naive["auroc"].p_value < found["auroc"].p_value / 100


# ---------------------------------------------------------------------------- DeLong

def classic_delong(y: np.ndarray, scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Areas and their covariance, as DeLong et al. write them: all pairs, then covariances of the components."""
    psi = [(s[y == 1][:, None] > s[y == 0]) + 0.5 * (s[y == 1][:, None] == s[y == 0]) for s in scores]
    v10 = np.array([one.mean(axis=1) for one in psi])
    v01 = np.array([one.mean(axis=0) for one in psi])
    covariance = np.atleast_2d(np.cov(v10)) / (y == 1).sum() + np.atleast_2d(np.cov(v01)) / (y == 0).sum()
    return np.array([one.mean() for one in psi]), covariance


@pytest.mark.parametrize("decimals", [1, 8])
def test_delong_of_two_classes(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    y = (rng.random(80) < 0.4).astype(int)
    scores = [np.round(1 / (1 + np.exp(-(y * gain + rng.normal(size=80)))), decimals) for gain in (1.5, 1.0)]
    areas, covariance = classic_delong(y, scores)
    found = delong(y, *scores)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert found.values == pytest.approx(tuple(areas), abs=1e-12)
    assert found.values == pytest.approx([sk.roc_auc_score(y, s) for s in scores], abs=1e-12)
    assert found.variance == pytest.approx(variance, rel=1e-9)
    assert found.p_value == pytest.approx(math.erfc(abs(areas[0] - areas[1]) / math.sqrt(2 * variance)), rel=1e-9)
    alone = delong(y, scores[0])
    assert alone.values == found.values[:1] and alone.variance == pytest.approx(covariance[0, 0], rel=1e-9)
    assert alone.p_value is None and alone.reason
    assert delong(y, *scores, how="ovr") == found


@pytest.mark.parametrize("how", ["ovo", "ovr"])
def test_delong_of_several_classes(how: str) -> None:
    """The values are those of the metrics; the variance that of resamples which keep the class sizes."""
    rng = np.random.default_rng(0)
    y, first = draw(rng, 900, prior=(0.4, 0.3, 0.2, 0.1))
    second = draw(rng, 900, prior=(0.4, 0.3, 0.2, 0.1), signal=0.9, y=y)[1]
    found = delong(y, first, second, how=how)
    name = "auroc" if how == "ovo" else "auroc_ovr"
    assert found.values == pytest.approx([classification_metrics(y, p)[name] for p in (first, second)], abs=1e-12)
    resampled = paired_differences(y, first, second, Resampling(resamples=1500, stratify=True))[name]
    assert 2 * 1.96 * math.sqrt(found.variance) == pytest.approx(width(resampled), rel=0.1)
    single = bootstrap_intervals(y, first, Resampling(resamples=1500, stratify=True))[name]
    assert 2 * 1.96 * math.sqrt(delong(y, first, how=how).variance) == pytest.approx(width(single), rel=0.1)


@pytest.mark.parametrize("how", ["ovo", "ovr"])
def test_delong_influences_by_leaving_out(how: str) -> None:
    """The jackknife of three classes: leaving image i out of its class moves the area by -influence n_a / (n_a - 1)."""
    y, p = draw(np.random.default_rng(2), 60)
    sizes = np.bincount(y)
    share = sizes / len(y)

    def area(keep: np.ndarray) -> float:
        total = 0.0
        for a in range(3):
            for b in set(range(3)) - {a}:
                pair = keep & np.isin(y, [a, b])
                weight = 1 / 6 if how == "ovo" else share[b] / (1 - share[a]) / 3  # of the whole set, class sizes fixed
                total += weight * sk.roc_auc_score(y[pair] == a, p[pair, a])
        return total

    everything = np.ones(60, dtype=bool)
    left_out = np.array([area(everything & (np.arange(60) != i)) for i in range(60)])
    variance = 0.0
    for a in range(3):
        influence = -(left_out[y == a] - area(everything)) * (sizes[a] - 1) / sizes[a]
        variance += (influence ** 2).sum() * sizes[a] / (sizes[a] - 1)
    assert delong(y, p, how=how).variance == pytest.approx(variance, rel=1e-9)


def test_delong_of_clusters() -> None:
    rng = np.random.default_rng(0)
    y, first = draw(rng, 200)
    second = draw(rng, 200, y=y)[1]
    patient = np.arange(200)
    each, plain = delong(y, first, second, clusters=patient), delong(y, first, second)
    assert each.variance == pytest.approx(plain.variance, rel=0.02)
    copied = delong(*(np.repeat(x, 10, axis=0) for x in (y, first, second)), clusters=np.repeat(patient, 10))
    assert copied.variance == pytest.approx(each.variance, rel=1e-9)  # copies of a patient tell nothing new
    # two pairs of images, by hand: placements 1, 0 of class 1 and 1, 0 of class 0, in clusters {1, 1}, {0, 0}
    y, p1 = np.array([1, 1, 0, 0]), np.array([0.9, 0.1, 0.2, 0.5])
    assert delong(y, p1, clusters=["a", "b", "a", "b"]).variance == pytest.approx(2 * (0.25**2 + 0.25**2), abs=1e-12)
    assert delong(y, p1, clusters=["a", "a", "b", "b"]).variance == pytest.approx(0, abs=1e-12)


def test_delong_degenerate() -> None:
    y, p = draw(np.random.default_rng(0), 50)
    same = delong(y, p, p)
    assert (same.variance, same.p_value, same.reason) == (0, 1, None)
    y = np.array([0, 0, 1, 1])
    apart = delong(y, np.array([0.1, 0.2, 0.8, 0.9]), np.array([0.9, 0.8, 0.2, 0.1]))
    assert apart.values == (1, 0) and apart.p_value is None and "no variance" in apart.reason
    single = delong(y[:3], np.array([0.1, 0.6, 0.5]), np.array([0.1, 0.2, 0.5]))
    assert math.isnan(single.variance) and single.p_value is None and "single image" in single.reason
    assert delong(y, np.array([0.1, 0.6, 0.5, 0.7]), np.array([0.1, 0.2, 0.5, 0.7]), clusters=[0] * 4).p_value is None
    found = paired_differences(y, np.array([0.1, 0.2, 0.8, 0.9]), np.array([0.9, 0.8, 0.2, 0.1]),
                               Resampling(resamples=50, stratify=True))["auroc"]
    assert found.difference == 1 and found.low == 1 and found.p_value is None and "no variance" in found.reason


# -------------------------------------------------------------------------- published

@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs ../shared/data/published_predictions")
@pytest.mark.parametrize("model", ["PanDerm", "DINOv3-L16", "CLIP-Large"])
def test_published_intervals(model: str) -> None:
    """Percentile intervals of 1,000 plain resamples, as published for 1,503 images of HAM10000."""
    table = pd.read_csv(next((PUBLISHED / "HAM_100pct" / f"{model}_HAM").glob("HAM-official*.csv")))
    p = table.filter(like="probability_class_").to_numpy()
    found = bootstrap_intervals(table["true_label"].to_numpy(), p, Resampling())
    row = pd.read_csv(PUBLISHED / "reference_bootstrap_HAM.csv").set_index("Model").loc[model]
    for name, column in {"acc": "ACCURACY", "bacc": "BALANCED_ACCURACY", "macro_f1": "MACRO_F1",
                         "weighted_f1": "WEIGHTED_F1", "sensitivity": "SENSITIVITY", "specificity": "SPECIFICITY",
                         "auroc_ovr": "AUROC"}.items():
        low, high = map(float, re.search(r"\(([\d.]+)-([\d.]+)\)", row[column]).groups())
        assert (found[name].low, found[name].high) == pytest.approx((low, high), abs=0.006), name


# ------------------------------------------------------------------------- simulation

TRUTH_IMAGES = 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize(("n", "how", "boundary"), [
    (400, {}, False), (500, {"sharp": 1.5}, False), (300, {"prior": (0.34, 0.33, 0.33), "signal": 1.5, "sharp": 2.0},
                                                     False), (500, {"sharp": 1.0}, True)])
def test_coverage(n: int, how: dict, boundary: bool) -> None:
    """95 % intervals hold the true value in 93 to 97 % of 1,000 simulated data sets; the truth is of 2 million images.

    A calibrated model has its true ece, 0, at the boundary: there the interval begins at 0 by design, and covers more.
    """
    y, p = draw(np.random.default_rng(10**6), TRUTH_IMAGES, **how)
    truth = classification_metrics(y, p)
    covered = dict.fromkeys(("bacc", "auroc", "ece"), 0)
    for seed in range(1000):
        found = bootstrap_intervals(*draw(np.random.default_rng((23, seed)), n, **how),
                                    Resampling(resamples=500, seed=seed))
        for name in covered:
            covered[name] += found[name].low <= truth[name] <= found[name].high
    if boundary:
        assert truth["ece"] < 0.001 and covered.pop("ece") >= 930
    assert all(930 <= count <= 970 for count in covered.values()), covered


@pytest.mark.slow
@pytest.mark.parametrize("clustered", [False, True])
def test_equal_models_are_told_apart_in_5_percent(clustered: bool) -> None:
    """Two models of the same quality with noise of their own; with clusters, 200 patients of 1 to 3 images."""
    names, rejected, sets = ("acc", "bacc", "weighted_f1", "auroc", "auroc_ovr", "aupr", "brier", "ece"), {}, 600
    for seed in range(sets):
        rng = np.random.default_rng((11, seed))
        y, first = draw(rng, 300)
        second = draw(rng, 300, y=y)[1]
        patient = None
        if clustered:
            patient = np.repeat(np.arange(300), rng.integers(1, 4, 300))
            y, first, second = y[patient], first[patient], second[patient]
        found = paired_differences(y, first, second, Resampling("patient" if clustered else "image", patient,
                                                                resamples=400, seed=seed))
        for name in names:
            rejected[name] = rejected.get(name, 0) + (found[name].p_value < 0.05)
    for count in rejected.values():  # compatible with 5 %, at a level that holds for all eight together
        assert binomtest(count, sets, 0.05).pvalue > 0.001, rejected


def test_patients_of_one_image_do_not_hide_lesions() -> None:
    """A patient per image says nothing of clusters; the lesions below do."""
    frame = pd.DataFrame({"patient_id": ["P1", None, None, None], "lesion_id": ["L1", "L1", "L2", "L2"]})
    found = resampling_for(frame)
    assert found.unit == "lesion" and found.clusters.tolist() == [0, 0, 1, 1]
