"""Weighted metrics against ``classification_metrics`` of the written-out resample."""

import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furnace.evaluation.metrics import NAMES, classification_metrics
from furnace.evaluation.weighted_metrics import WeightedMetrics, weighted_metrics


def agrees(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> None:
    """Every resample to 1e-9, NaN where NaN."""
    found = weighted_metrics(y, p, weights)
    assert tuple(found) == NAMES and all(values.shape == (len(weights),) for values in found.values())
    for r, counts in enumerate(weights):
        image = np.repeat(np.arange(len(y)), counts)
        expected = classification_metrics(y[image], p[image])
        for name in NAMES:
            np.testing.assert_allclose(found[name][r], expected[name], rtol=0, atol=1e-9, equal_nan=True, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(k=st.integers(2, 5), n=st.integers(1, 25), levels=st.sampled_from([2, 4, 1000]), single=st.booleans(),
       seed=st.integers(0, 2**32 - 1))
def test_any_resample(k: int, n: int, levels: int, single: bool, seed: int) -> None:
    """Ties (few levels), absent classes (few images), float32 rows that do not sum to 1 exactly, binary included."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    p = rng.integers(1, levels + 1, (n, k)).astype(float)
    p = p / p.sum(axis=1, keepdims=True)
    agrees(y, p.astype(np.float32) if single else p, rng.multinomial(n, np.full(n, 1 / n), size=2))


@pytest.mark.parametrize("k", [2, 3, 7])
def test_many_images(k: int) -> None:
    rng = np.random.default_rng(k)
    n = 700
    y = rng.choice(k, n, p=np.arange(1, k + 1) / (k * (k + 1) / 2))
    p = rng.dirichlet(np.ones(k), n)
    p[np.arange(n), y] += 0.3
    p = np.round(p * 20) + 1  # many ties
    p /= p.sum(axis=1, keepdims=True)
    agrees(y, p, rng.multinomial(n, np.full(n, 1 / n), size=4))


def test_rows_that_do_not_sum_to_one() -> None:
    """The AUROC of several classes is of rows divided by their sum, average precision of rows as they are."""
    rng = np.random.default_rng(3)
    y = rng.integers(0, 3, 300)
    p = rng.dirichlet(np.ones(3), 300) * rng.uniform(0.9991, 1.0009, (300, 1))
    agrees(y, p, rng.multinomial(300, np.full(300, 1 / 300), size=3))


def test_by_hand() -> None:
    """Two images of class 1 (scores 0.9, 0.4) and two of class 0 (0.6, 0.4), one of each drawn twice."""
    y, p1 = np.array([1, 1, 0, 0]), np.array([0.9, 0.4, 0.6, 0.4])
    found = weighted_metrics(y, p1, np.array([[1, 2, 1, 2], [4, 0, 0, 4]]))
    # pairs: 0.9 beats 3; each of two 0.4 loses to 0.6 and ties twice -> (3 + 2 * 1) / 9
    np.testing.assert_allclose(found["auroc"], [5 / 9, 1], atol=1e-12)
    # thresholds 0.9 (1 of 1), 0.6 (1 of 2), 0.4 (3 of 6): 1/3 * 1 + 2/3 * 1/2
    np.testing.assert_allclose(found["aupr"], [2 / 3, 1], atol=1e-12)
    np.testing.assert_allclose(found["acc"], [3 / 6, 1], atol=1e-12)
    np.testing.assert_allclose(found["bacc"], [(1 / 3 + 2 / 3) / 2, 1], atol=1e-12)
    np.testing.assert_allclose(found["brier"], [(0.01 + 2 * 0.36 + 0.36 + 2 * 0.16) / 6, (0.01 + 0.16) / 2], atol=1e-12)


def test_nothing_drawn_and_no_warning() -> None:
    y, p = np.array([0, 1, 2]), np.eye(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = weighted_metrics(y, p, np.array([[0, 0, 0], [1, 1, 1], [3, 0, 0]]))
    assert all(np.isnan(values[0]) for values in found.values())
    assert found["acc"][1] == found["auroc"][1] == found["acc"][2] == 1 and np.isnan(found["auroc"][2])
    assert np.isnan(found["kappa"][2]) and np.isnan(found["specificity"][2])


def test_inputs_stay_and_order_is_free() -> None:
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 3, 50), rng.dirichlet(np.ones(3), 50)
    weights = rng.multinomial(50, np.full(50, 0.02), size=6)
    before = y.copy(), p.copy(), weights.copy()
    found = weighted_metrics(y, p, weights)
    assert all((a == b).all() for a, b in zip(before, (y, p, weights), strict=True))
    mixed = rng.permutation(50)
    again = WeightedMetrics(y[mixed], p[mixed])(weights[:, mixed])
    for name in NAMES:
        np.testing.assert_allclose(again[name], found[name], atol=1e-12, err_msg=name)


def test_memory_grows_with_the_images_only_by_a_few_arrays() -> None:
    rng = np.random.default_rng(0)
    n, r = 40_000, 8
    y, p = rng.integers(0, 7, n), rng.dirichlet(np.ones(7), n)
    weights = rng.integers(0, 3, (r, n)).astype(np.int32)
    tracemalloc.start()
    weighted_metrics(y, p, weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 8 * n + 5 * 8 * n * r  # 7 classes prepared, and a handful of (N, R) arrays
