"""Neighbours against scikit-learn, votes and prototypes by hand, few-shot draws against closed forms and a loop."""

import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid, NearestNeighbors

from furnace.evaluation import knn
from furnace.evaluation.knn import k_shot, knn_probabilities, nearest_neighbours, simpleshot_probabilities, top
from furnace.evaluation.metrics import classification_metrics


def gaussians(n: int, d: int = 12, *, classes: int = 3, seed: int = 0,
              apart: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Features around class centres, of varying length, and their labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d)) * apart
    labels = np.arange(n) % classes
    features = (centres[labels] + rng.normal(size=(n, d))) * rng.uniform(0.2, 5, (n, 1)) + 0.3
    return features.astype(np.float32), labels


# -------------------------------------------------------------------------------------------------------- neighbours

@pytest.mark.parametrize("train_block,query_block", [(16_384, 1024), (37, 11), (5, 400)])
def test_neighbours_are_scikit_learns(monkeypatch, train_block: int, query_block: int) -> None:
    """Whatever the blocks, also ones smaller than k."""
    monkeypatch.setattr(knn, "TRAIN_BLOCK", train_block)
    monkeypatch.setattr(knn, "QUERY_BLOCK", query_block)
    train, queries = gaussians(211)[0], gaussians(50, seed=1)[0]
    oracle = NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute").fit(train)
    distances, want = oracle.kneighbors(queries)
    indices, similarities = nearest_neighbours(train, queries, 20)
    np.testing.assert_array_equal(indices, want)
    np.testing.assert_allclose(similarities, 1 - distances, atol=1e-6)
    assert indices.dtype == np.int64 and similarities.dtype == np.float32


@pytest.mark.parametrize("block", [16_384, 4])
def test_excluded_groups_are_no_neighbours(monkeypatch, block: int) -> None:
    """A brute-force loop in float64; a code below 0 is no group, although it occurs on both sides."""
    monkeypatch.setattr(knn, "TRAIN_BLOCK", block)
    train, queries = gaussians(60)[0], gaussians(25, seed=1)[0]
    rng = np.random.default_rng(3)
    codes = rng.integers(-1, 5, 60), rng.integers(-1, 5, 25)
    indices, similarities = nearest_neighbours(train, queries, 7, exclude=codes)
    unit, others = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.astype(float), queries.astype(float)))
    for i, row in enumerate(others @ unit.T):
        allowed = [j for j in np.argsort(-row) if codes[1][i] < 0 or codes[0][j] != codes[1][i]]
        assert indices[i].tolist() == allowed[:7]
        np.testing.assert_allclose(similarities[i], row[allowed[:7]], atol=1e-6)
    assert (codes[0][indices[codes[1] < 0]] < 0).any(), "the -1 of train were allowed to the -1 of queries"


def test_leave_one_out(monkeypatch) -> None:
    """With its own number as a code no image finds itself; without, each finds itself first."""
    monkeypatch.setattr(knn, "QUERY_BLOCK", 7)
    features = gaussians(40)[0]
    own = np.arange(40)
    assert (nearest_neighbours(features, features, 1)[0][:, 0] == own).all()
    indices, _ = nearest_neighbours(features, features, 39, exclude=(own, own))
    assert (np.sort(indices, axis=1) == [np.delete(own, i) for i in own]).all()


def test_too_few_neighbours_are_minus_one() -> None:
    """More asked for than there are, and none left at all."""
    train, queries = np.eye(3, dtype=np.float32), np.array([[1, 0.5, 0.1]], dtype=np.float32)
    indices, similarities = nearest_neighbours(train, queries, 5)
    assert indices.tolist() == [[0, 1, 2, -1, -1]] and similarities[0, 3:].tolist() == [-np.inf] * 2
    indices, similarities = nearest_neighbours(train, queries, 2, exclude=(np.array([4, 4, 6]), np.array([4])))
    assert indices.tolist() == [[2, -1]] and similarities[0, 0] > 0
    indices, similarities = nearest_neighbours(train, queries, 2, exclude=(np.full(3, 4), np.array([4])))
    assert indices.tolist() == [[-1, -1]] and (similarities == -np.inf).all()


@pytest.mark.parametrize("block", [16_384, 4, 3])
def test_ties_go_to_the_lower_index(monkeypatch, block: int) -> None:
    """Also at the border of k and between blocks; a zero vector has similarity 0, a copy of any length is a copy."""
    monkeypatch.setattr(knn, "TRAIN_BLOCK", block)
    train = np.array([[0, 1], [2, 0], [0, 0], [1, 0], [0, 4], [8, 0], [4, 0], [-1, 0], [0, 2]], dtype=np.float32)
    for k in range(1, 10):
        indices, similarities = nearest_neighbours(train, np.array([[2, 0], [0, 0]], dtype=np.float32), k)
        assert indices[0].tolist() == [1, 3, 5, 6, 0, 2, 4, 8, 7][:k]
        assert similarities[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, -1][:k]
        assert indices[1].tolist() == list(range(k)) and (similarities[1] == 0).all()


def test_top_of_many_ties() -> None:
    """Against numpy's stable sort, few different values."""
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (50, 300)).astype(np.float32))
    found, columns = top(values, 120)
    want = np.argsort(-values.numpy(), axis=1, kind="stable")[:, :120]
    np.testing.assert_array_equal(columns, want)
    np.testing.assert_array_equal(found, np.take_along_axis(values.numpy(), want, axis=1))


def test_a_read_only_map_and_other_floats(tmp_path, recwarn) -> None:
    """Features as a cache maps them, and float64 or float16 ones."""
    train, queries = gaussians(30)[0], gaussians(5, seed=1)[0]
    np.save(tmp_path / "f.npy", train)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    want = nearest_neighbours(train, queries, 3)
    for other in (mapped, train.astype(np.float64), np.asfortranarray(train)):
        got = nearest_neighbours(other, queries, 3)
        np.testing.assert_array_equal(got[0], want[0])
    assert nearest_neighbours(train.astype(np.float16), queries, 3)[0].shape == (5, 3)
    assert not [w for w in recwarn if "writ" in str(w.message)]


@pytest.mark.parametrize("change,words", [({"k": 0}, "at least one neighbour"), ({"train": np.ones((0, 12))}, "N > 0"),
                                          ({"train": np.ones((4, 3))}, "need"), ({"train": np.ones(12)}, "need"),
                                          ({"exclude": (np.zeros(29), np.zeros(5))}, "group codes")])
def test_shapes_that_do_not_fit(change: dict, words: str) -> None:
    """Refused before anything is computed."""
    given = {"train": gaussians(30)[0], "queries": gaussians(5)[0], "k": 3, **change}
    with pytest.raises(ValueError, match=words):
        nearest_neighbours(given.pop("train"), given.pop("queries"), given.pop("k"), **given)


def test_no_copy_of_the_train_features() -> None:
    """NumPy's side of the memory: a small part of 41 MB of features (torch's blocks are bounded by the constants)."""
    train, queries = np.ones((80_000, 128), dtype=np.float32), gaussians(20, 128)[0]
    tracemalloc.start()
    nearest_neighbours(train, queries, 20)
    simpleshot_probabilities(train, np.arange(80_000) % 3, queries, nb_classes=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6
    assert knn.TRAIN_BLOCK * knn.QUERY_BLOCK * 4 <= 64 * 2**20


# ------------------------------------------------------------------------------------------------------------- votes

def test_votes_by_hand() -> None:
    """exp(.9/.07) + nothing for class 0 against exp(.8/.07) + exp(.1/.07): .80667 and .19333."""
    indices, similarities = np.array([[0, 1, 2]]), np.array([[0.9, 0.8, 0.1]], dtype=np.float32)
    got = knn_probabilities(indices, similarities, np.array([0, 1, 1]), nb_classes=3, temperature=0.07)
    np.testing.assert_allclose(got, [[0.80667, 0.19333, 0]], atol=5e-6)
    got = knn_probabilities(indices, similarities, np.array([0, 1, 1]), nb_classes=2, k=1)
    np.testing.assert_array_equal(got, [[1, 0]])
    got = knn_probabilities(indices, similarities, np.array([0, 1, 1]), nb_classes=2, temperature=1e6)
    np.testing.assert_allclose(got, [[1 / 3, 2 / 3]], atol=1e-6)


def test_votes_are_the_formula_for_every_k() -> None:
    """The direct formula in float64, rows summing to 1 for each k, small temperatures without overflow."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 100)
    indices = np.array([rng.permutation(100)[:30] for _ in range(20)])
    similarities = -np.sort(-rng.uniform(-1, 1, (20, 30)).astype(np.float32), axis=1)
    for k in (1, 10, 30):
        want = np.zeros((20, 4))
        for i in range(20):
            for j, s in zip(indices[i, :k], similarities[i, :k], strict=True):
                want[i, labels[j]] += np.exp(float(s) / 0.07)
        got = knn_probabilities(indices, similarities, labels, nb_classes=4, k=k)
        np.testing.assert_allclose(got, want / want.sum(axis=1, keepdims=True), rtol=1e-9)
    got = knn_probabilities(indices, similarities, labels, nb_classes=4, temperature=1e-4)
    assert np.isfinite(got).all() and (got.argmax(axis=1) == labels[indices[:, 0]]).all()


def test_absent_neighbours_do_not_vote() -> None:
    """-1 would be the last train image."""
    got = knn_probabilities(np.array([[1, -1]]), np.array([[0.2, -np.inf]]), np.array([0, 1, 2]), nb_classes=3)
    np.testing.assert_array_equal(got, [[0, 1, 0]])
    with pytest.raises(ValueError, match="query 1 has no neighbour"):
        knn_probabilities(np.array([[1], [-1]]), np.array([[0.2], [-np.inf]]), np.array([0, 1, 2]), nb_classes=3)


@pytest.mark.parametrize("change", [{"k": 0}, {"k": 3}, {"temperature": 0.0}, {"temperature": -1.0}])
def test_votes_refuse(change: dict) -> None:
    """More neighbours than there are, no temperature."""
    with pytest.raises(ValueError, match="temperature"):
        knn_probabilities(np.array([[1, 0]]), np.array([[0.2, 0.1]]), np.array([0, 1]), nb_classes=2, **change)


# -------------------------------------------------------------------------------------------------------- prototypes

def test_simpleshot_by_hand() -> None:
    """Mean (1, 1); centred and normalised: class 0 at (1, 0), (0, 1), class 1 at (-1, 0), (0, -1)."""
    train = np.array([[3, 1], [1, 3], [-1, 1], [1, -1]], dtype=np.float32)
    got = simpleshot_probabilities(train, np.array([0, 0, 1, 1]), np.array([[4, 1], [1, 0.5]]), nb_classes=3)
    # prototypes (.5, .5) and (-.5, -.5); the queries become (1, 0) and (0, -1): squared distances .5 and 2.5
    near = np.exp(-0.5) / (np.exp(-0.5) + np.exp(-2.5))
    np.testing.assert_allclose(got, [[near, 1 - near, 0], [1 - near, near, 0]], rtol=1e-6)


@pytest.mark.parametrize("block", [16_384, 13])
def test_simpleshot_predicts_scikit_learns_nearest_centroid(monkeypatch, block: int) -> None:
    """On transformed features; whatever the blocks; class 3 of 5 has no train image."""
    monkeypatch.setattr(knn, "TRAIN_BLOCK", block)
    (train, labels), queries = gaussians(90, classes=4, apart=0.4), gaussians(200, classes=4, apart=0.4, seed=1)[0]
    labels = np.where(labels == 3, 4, labels)
    mean = train.mean(axis=0, dtype=np.float64)

    def cl2(x: np.ndarray) -> np.ndarray:
        return (x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True)

    want = NearestCentroid().fit(cl2(train), labels).predict(cl2(queries))
    got = simpleshot_probabilities(train, labels, queries, nb_classes=5)
    np.testing.assert_array_equal(got.argmax(axis=1), want)
    assert (got[:, 3] == 0).all() and len(set(want)) == 4
    np.testing.assert_allclose(got.sum(axis=1), 1)
    raw = NearestCentroid().fit(train, labels).predict(queries)
    assert (raw != want).any(), "the transform matters on these data"


# ----------------------------------------------------------------------------------------------------------- few shots

def test_few_shots_are_the_loop() -> None:
    """Each draw scored by simpleshot on the drawn images with the whole train set's centre, and by the metrics."""
    (train, labels), (queries, truth) = gaussians(60, apart=0.3), gaussians(80, apart=0.3, seed=1)
    truth, queries = truth[:70], queries[:70]
    drawn = []
    original = knn._nearest_prototype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "_nearest_prototype", lambda train, chosen, *rest: (drawn.append(chosen),
                                                                              original(train, chosen, *rest))[1])
        (got,) = k_shot(train, labels, queries, truth, nb_classes=3, shots=[4], episodes=5, seed=7)
    scores = []
    mean = train.astype(np.float64).mean(axis=0)
    for chosen in drawn:
        assert [len(set(c.tolist())) for c in chosen] == [4, 4, 4], "without replacement"
        assert [set(labels[c]) for c in chosen] == [{0}, {1}, {2}]
        unit = [(train[c] - mean) / np.linalg.norm(train[c] - mean, axis=1, keepdims=True) for c in chosen]
        moved = (queries - mean) / np.linalg.norm(queries - mean, axis=1, keepdims=True)
        distances = np.stack([((moved - u.mean(axis=0)) ** 2).sum(axis=1) for u in unit], axis=1)
        found = classification_metrics(truth, np.eye(3)[distances.argmin(axis=1)])
        scores.append((found["bacc"], found["acc"]))
    assert len({tuple(np.concatenate(c)) for c in drawn}) == 5, "five different draws"
    for i, name in enumerate(("bacc", "acc")):
        values = np.array(scores)[:, i]
        half = 1.959964 * values.std(ddof=1) / np.sqrt(5)
        entry = got["metrics"][name]
        np.testing.assert_allclose([entry["value"], entry["low"], entry["high"], entry["sd"]],
                                   [values.mean(), values.mean() - half, values.mean() + half, values.std(ddof=1)])
    assert got["shots"] == 4 and got["episodes"] == 5 and got["short_classes"] == []


def test_classes_with_too_few_images_use_all_and_are_named() -> None:
    """Class 1 has two images, class 3 none; with all of every class each draw is the full prototype classifier."""
    train, labels = gaussians(9, apart=0.3)
    keep = np.flatnonzero((labels != 1) | (np.arange(9) < 5))
    train, labels = train[keep], labels[keep]
    queries, truth = gaussians(50, apart=0.3, seed=1)
    one, two, three = k_shot(train, labels, queries, truth, nb_classes=4, shots=[1, 2, 3], episodes=4)
    assert [r["short_classes"] for r in (one, two, three)] == [[3], [3], [1, 3]]
    entry = three["metrics"]["acc"]
    full = simpleshot_probabilities(train, labels, queries, nb_classes=4).argmax(axis=1)
    assert entry["sd"] == 0 and entry["value"] == entry["low"] == entry["high"] == pytest.approx((full == truth).mean())


def test_bacc_is_over_the_classes_that_occur() -> None:
    """One feature per class, all right: 1 although class 2 has no query; and all wrong is 0."""
    labels, truth = np.arange(60) % 3, np.arange(40) % 3
    train, queries, some = np.eye(3)[labels], np.eye(3)[truth], truth < 2
    (got,) = k_shot(train, labels, queries[some], truth[some], nb_classes=3, shots=[2], episodes=3)
    assert got["metrics"]["bacc"]["value"] == got["metrics"]["acc"]["value"] == pytest.approx(1)
    (got,) = k_shot(train, labels, queries[some], 1 - truth[some], nb_classes=3, shots=[2], episodes=3)
    assert got["metrics"]["bacc"]["value"] == 0


def test_draws_depend_on_the_seed_alone() -> None:
    """Not on the other values of k; another seed, another result."""
    (train, labels), (queries, truth) = gaussians(60, apart=0.3), gaussians(80, apart=0.3, seed=1)

    def run(**more) -> dict:
        return {r["shots"]: r["metrics"]["bacc"]["value"]
                for r in k_shot(train, labels, queries, truth, nb_classes=3, episodes=10, **more)}

    both = run(shots=[1, 4])
    assert both == {**run(shots=[4]), **run(shots=[1])} and run(shots=[4], seed=1)[4] != both[4]
    assert set(run()) == {1, 2, 4, 8, 16}


@pytest.mark.parametrize("change", [{"shots": [0]}, {"episodes": 1}])
def test_few_shots_refuse(change: dict) -> None:
    """No shot, and one draw, of which no interval can be made."""
    train, labels = gaussians(9)
    with pytest.raises(ValueError, match="or more"):
        k_shot(train, labels, train, labels, nb_classes=3, **change)
