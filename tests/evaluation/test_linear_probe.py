"""The published probe: its numbers on digits, that it is the optimum, and its edges."""

import json
import logging

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

from furnace.evaluation.linear_probe import LinearProbe, fit_linear_probe
from furnace.evaluation.metrics import classification_metrics
from furnace.runtime.files import UserError
from helpers import GOLDEN

GOLD = json.loads((GOLDEN / "linear_probe.json").read_text())
ARRAYS = np.load(GOLDEN / "linear_probe.npz")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices: on a busy machine a second thread costs forty times what it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 64) standardised float32 and (1797,)."""
    data = load_digits()
    return StandardScaler().fit_transform(data.data).astype(np.float32), data.target


def labels_of(case: str, digits: tuple) -> np.ndarray:
    """All labels of a golden case: the digits, or whether they are high (the golden's targets are the test part)."""
    y = digits[1] if case == "digits10" else (digits[1] >= 5).astype(int)
    np.testing.assert_array_equal(y[1200:], ARRAYS[f"{case}_targets"])
    return y


@pytest.fixture(scope="module", params=["digits10", "digits_binary"])
def fitted(request, digits) -> tuple[str, LinearProbe, np.ndarray]:
    """Case, probe, all labels."""
    y = labels_of(request.param, digits)
    return request.param, fit_linear_probe(digits[0][:1200], y[:1200]), y


def blobs(k: int = 3, n: int = 60, d: int = 48, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds of points."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % k)
    return (rng.normal(size=(n, d)) + 1.5 * rng.normal(size=(k, d))[y]).astype(np.float32), y


def objective(flat: np.ndarray, x: np.ndarray, targets: np.ndarray, k: int) -> tuple[float, np.ndarray]:
    """The published objective in float64, and its gradient: mean CE + ||W|| / (2 C), C = D K / 100."""
    n, d = x.shape
    w, b = flat[:k * d].reshape(k, d), flat[k * d:]
    logits = x @ w.T + b
    norm = np.linalg.norm(w)
    value = -log_softmax(logits, axis=1)[np.arange(n), targets].mean() + 50 / (d * k) * norm
    residual = (softmax(logits, axis=1) - np.eye(k)[targets]) / n
    return value, np.concatenate([(residual.T @ x + 50 / (d * k) * w / norm).ravel(), residual.sum(axis=0)])


# --------------------------------------------------------------- published numbers

def test_published_objective(fitted) -> None:
    case, probe, _ = fitted
    assert probe.cost == pytest.approx(GOLD[case]["cost"], rel=1e-12)
    assert probe.objective == pytest.approx(GOLD[case]["final_objective"], abs=1e-4)
    assert np.linalg.norm(probe.weight) == pytest.approx(GOLD[case]["weight_l2"], rel=5e-3)
    assert 0 < probe.iterations < 1000


def test_published_probabilities(fitted, digits) -> None:
    case, probe, _ = fitted
    p = probe.predict_proba(digits[0][1200:])
    expected = ARRAYS[f"{case}_probs"]
    np.testing.assert_allclose(p if case == "digits10" else p[:, 1], expected, rtol=0, atol=5e-3)
    assert (p.argmax(axis=1) != ARRAYS[f"{case}_preds"]).mean() <= 0.005


def test_published_metrics(fitted, digits) -> None:
    case, probe, y = fitted
    found = classification_metrics(y[1200:], probe.predict_proba(digits[0][1200:]))
    for name in ("acc", "bacc", "kappa", "weighted_f1", "auroc", "aupr"):
        assert found[name] == pytest.approx(GOLD[case]["metrics"][f"lin_{name}"], abs=5e-3), name


# --------------------------------------------------------------------- the optimum

def test_the_reported_objective_is_that_of_the_weights(fitted, digits) -> None:
    _, probe, y = fitted
    flat = np.concatenate([probe.weight.ravel(), probe.bias]).astype(np.float64)
    value, gradient = objective(flat, digits[0][:1200].astype(np.float64), y[:1200], len(probe.classes))
    assert probe.objective == pytest.approx(value, abs=1e-5)
    assert np.abs(gradient).max() < 1e-4


@pytest.mark.parametrize("k", [2, 4])
def test_scipy_finds_no_better(k: int) -> None:
    x, y = blobs(k=k, d=64, n=100)
    probe = fit_linear_probe(x, y)
    start = np.random.default_rng(1).normal(size=k * 64 + k) * 0.1
    best = minimize(objective, start, args=(x.astype(np.float64), y, k), jac=True, method="L-BFGS-B",
                    options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9})
    assert probe.objective == pytest.approx(best.fun, abs=1e-5)
    p = softmax(x @ best.x[:k * 64].reshape(k, 64).T + best.x[k * 64:], axis=1)
    np.testing.assert_allclose(probe.predict_proba(x), p, atol=5e-3)


# ------------------------------------------------------------------------- classes

def test_an_absent_class_has_probability_zero() -> None:
    x, y = blobs(k=3)
    gaps = np.array([0, 2, 5])[y]
    probe = fit_linear_probe(x, gaps, nb_classes=7)
    p = probe.predict_proba(x)
    assert p.shape == (60, 7) and p.dtype == np.float32 and probe.classes.tolist() == [0, 2, 5]
    assert (p[:, [1, 3, 4, 6]] == 0).all() and (p[:, [0, 2, 5]] > 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
    dense = fit_linear_probe(x, y)
    assert probe.cost == dense.cost == 48 * 3 / 100  # K counts the classes that occur
    np.testing.assert_array_equal(p[:, [0, 2, 5]], dense.predict_proba(x))
    assert fit_linear_probe(x, gaps).predict_proba(x).shape == (60, 6)  # highest label + 1


def test_probabilities_are_softmax_of_the_linear_map() -> None:
    probe = LinearProbe(weight=np.array([[1, 0], [0, 2]], dtype=np.float32), bias=np.array([0, 1], dtype=np.float32),
                        classes=np.array([0, 2]), nb_classes=3, cost=1.0, objective=0.0, iterations=1)
    p = probe.predict_proba(np.array([[0.0, 0.0], [3.0, -1.0]]))
    e = np.exp
    np.testing.assert_allclose(p, [[1 / (1 + e(1)), 0, e(1) / (1 + e(1))], [1 / (1 + e(-4)), 0, e(-4) / (1 + e(-4))]],
                               atol=1e-6)


@pytest.mark.parametrize("labels", [[1] * 5, []])
def test_one_class_is_refused(labels: list[int]) -> None:
    with pytest.raises(UserError, match=rf"have {len(set(labels))} class.*--percent_mode stratified"):
        fit_linear_probe(np.zeros((len(labels), 3), dtype=np.float32), np.array(labels, dtype=int))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    x, y = blobs()
    x[3, 2] = value
    with pytest.raises(UserError, match="not finite"):
        fit_linear_probe(x, y)


# -------------------------------------------------------------------- reproducible

def test_seed() -> None:
    x, y = blobs()
    first, same, other = (fit_linear_probe(x, y, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.weight, same.weight)
    np.testing.assert_array_equal(first.bias, same.bias)
    assert not np.array_equal(first.weight, other.weight)
    assert other.objective == pytest.approx(first.objective, abs=1e-4)  # convex: one optimum


def test_the_start_is_the_published_one() -> None:
    x, y = blobs()
    torch.manual_seed(0)
    head = torch.nn.Linear(48, 3)
    probe = fit_linear_probe(x, y, max_iterations=0)
    np.testing.assert_array_equal(probe.weight, head.weight.detach().numpy())


def test_the_random_state_is_not_disturbed() -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    state = np.random.get_state()[1].copy()
    fit_linear_probe(*blobs())
    assert torch.equal(torch.rand(3), expected) and (np.random.get_state()[1] == state).all()


def test_float64_features_and_the_inputs_stay() -> None:
    x, y = blobs()
    before = x.copy(), y.copy()
    probe = fit_linear_probe(x, y)
    np.testing.assert_array_equal(fit_linear_probe(x.astype(np.float64), y.tolist()).weight, probe.weight)
    np.testing.assert_array_equal(fit_linear_probe(np.asfortranarray(x), y).weight, probe.weight)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


@pytest.mark.parametrize("iterations", [
    2, 5])
def test_too_few_iterations_warn(caplog, iterations: int) -> None:
    with caplog.at_level(logging.WARNING):
        best = fit_linear_probe(*blobs())
        assert not caplog.records
        cut = fit_linear_probe(*blobs(), max_iterations=iterations)
    assert cut.objective > best.objective + 1e-2
    assert f"stopped after {cut.iterations} iterations without converging" in caplog.text


def test_fitting_works_inside_no_grad() -> None:
    with torch.no_grad():
        found = fit_linear_probe(*blobs())
    np.testing.assert_array_equal(found.weight, fit_linear_probe(*blobs()).weight)
