"""Retrieval scores of rankings written out by hand, against scikit-learn and a plain loop; groups; the picture."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageColor
from sklearn.metrics import ndcg_score

from furnace.data.manifest import read_manifest
from furnace.evaluation import retrieval
from furnace.evaluation.retrieval import (
    NAMES,
    evaluate_retrieval,
    group_codes,
    mean_scores,
    neighbour_sheet,
    queries_to_show,
    ranking_scores,
    retrieval_scores,
)
from furnace.evaluation.sheets import RIGHT, WRONG
from helpers import draw_images, write_csv

LOG = np.log2


def on_a_circle(degrees: list[float], lengths: float = 1.0) -> np.ndarray:
    """Features whose cosine similarity to (1, 0) falls with the angle."""
    angles = np.deg2rad(degrees)
    return (np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ hand rankings

# relevant places of the ranking -> recall@1, @5, @10, MAP@R, nDCG@10
HAND = {
    # a perfect ranking
    "110000000000": (1, 1, 1, 1, 1),
    # R = 3, ranks 1 and 3 and 12 are relevant: (1/1 + 2/3) / 3; the third lies beyond R
    "101000000001": (1, 1, 1, 5 / 9, (1 + 1 / 2) / (1 + 1 / LOG(3) + 1 / 2)),
    # R = 2, ranks 2 and 3: precision at 2 is 1/2, rank 3 lies beyond R
    "011000000000": (0, 1, 1, 1 / 4, (1 / LOG(3) + 1 / 2) / (1 + 1 / LOG(3))),
    # R = 1 at rank 7, at rank 11, and R = 12: everything is relevant
    "000000100000": (0, 0, 1, 0, 1 / LOG(8)),
    "000000000010": (0, 0, 0, 0, 0),
    "111111111111": (1, 1, 1, 1, 1),
    # R = 4, ranks 2, 4, 5, 6: (1/2 + 2/4) / 4
    "010111000000": (0, 1, 1, 1 / 4, (1 / LOG(3) + 1 / LOG(5) + 1 / LOG(6) + 1 / LOG(7))
                     / (1 + 1 / LOG(3) + 1 / 2 + 1 / LOG(5))),
    # none
    "000000000000": (np.nan,) * 5,
}


def test_rankings_by_hand() -> None:
    """All at once, and one by one without the places behind rank R or 10."""
    ranked = torch.tensor([[place == "1" for place in places] for places in HAND])
    got = ranking_scores(ranked, ranked.sum(dim=1))
    np.testing.assert_allclose(np.stack([got[name] for name in NAMES], axis=1), list(HAND.values()), rtol=1e-6)
    for row, want in zip(ranked, HAND.values(), strict=True):
        got = ranking_scores(row[None, :max(10, int(row.sum()))], row.sum()[None])
        np.testing.assert_allclose([got[name].item() for name in NAMES], want, rtol=1e-6)


def test_a_gallery_of_fewer_than_ten() -> None:
    """Rank 2 of 3, R = 1."""
    got = ranking_scores(torch.tensor([[False, True, False]]), torch.tensor([1]))
    assert [got[name].item() for name in NAMES] == pytest.approx([0, 1, 1, 0, 1 / LOG(3)])


@pytest.mark.parametrize("cells", [1 << 24, 1, 30])
def test_scores_of_a_gallery_on_a_circle(monkeypatch, cells: int) -> None:
    """Query at 0 degrees of class 1: gallery by angle 1 0 1 | 0 0 ...; another query, of a class the gallery lacks."""
    monkeypatch.setattr(retrieval, "CELLS", cells)
    monkeypatch.setattr(retrieval, "GALLERY_BLOCK", 4)
    gallery = on_a_circle([50, -10, 30, 170, -20, 80, 90, 100, 110, 120, 130])
    gallery *= np.linspace(0.1, 9, 11, dtype=np.float32)[:, None]
    labels = np.array([0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    got = retrieval_scores(gallery, labels, on_a_circle([0, 0], 3.0), np.array([1, 2]))
    # ranks: -10 (1), -20 (0), 30 (1), 50 (0), 80..130 (0), 170 (1) at rank 11
    want = (1, 1, 1, (1 + 2 / 3) / 3, (1 + 1 / 2) / (1 + 1 / LOG(3) + 1 / 2))
    assert [got[name][0] for name in NAMES] == pytest.approx(want)
    assert all(np.isnan(got[name][1]) for name in NAMES)


# ------------------------------------------------------------------------------------------------------------ oracles

def loop(gallery, labels, queries, wanted, codes) -> np.ndarray:
    """The definitions, one query at a time, in float64; nDCG by scikit-learn."""
    unit, others = (x / np.linalg.norm(x.astype(float), axis=1, keepdims=True) for x in (gallery, queries))
    rows = []
    for i, similarities in enumerate(others @ unit.T):
        allowed = np.ones(len(labels), bool) if codes is None else codes[0] != codes[1][i]
        order = [j for j in np.argsort(-similarities, kind="stable") if allowed[j]]
        relevant = (labels[order] == wanted[i]).tolist()
        r = sum(relevant)
        if not r:
            rows.append([np.nan] * 5)
            continue
        precisions = [sum(relevant[:n]) / n for n in range(1, r + 1) if relevant[n - 1]]
        rows.append([any(relevant[:1]), any(relevant[:5]), any(relevant[:10]), sum(precisions) / r,
                     ndcg_score([relevant], [similarities[order]], k=10)])
    return np.array(rows, dtype=float)


@pytest.mark.parametrize("groups", [None, 40, 6])
def test_scores_are_the_loops(monkeypatch, groups: int | None) -> None:
    """Random features, several blocks, groups that are left out."""
    monkeypatch.setattr(retrieval, "CELLS", 1500)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6))
    labels, wanted = rng.choice(4, 150, p=[0.7, 0.2, 0.08, 0.02]), rng.integers(0, 5, 60)
    gallery = (centres[labels] + rng.normal(size=(150, 6))).astype(np.float32)
    queries = (centres[wanted % 4] + rng.normal(size=(60, 6))).astype(np.float32)
    codes = None if groups is None else (rng.integers(0, groups, 150), rng.integers(0, groups, 60))
    got = retrieval_scores(gallery, labels, queries, wanted, exclude=codes)
    want = loop(gallery, labels, queries, wanted, codes)
    np.testing.assert_allclose(np.stack([got[name] for name in NAMES], axis=1), want, rtol=1e-6)
    assert np.isnan(want[:, 0]).sum() == (wanted == 4).sum() and 0 < np.nanmean(want[:, 3]) < 1


def test_order_of_relevance() -> None:
    """Against numpy's stable sort: negative values, both zeros, infinities, tiny and equal ones."""
    rng = np.random.default_rng(0)
    pool = np.array([-1, -0.5, -1e-40, -0.0, 0.0, 1e-40, 1e-7, 0.5, 1, -np.inf], dtype=np.float32)
    values = np.concatenate([rng.choice(pool, (20, 60)), rng.normal(size=(20, 60)).astype(np.float32)], axis=1)
    relevant = rng.random(values.shape) < 0.5
    order = np.argsort(-values, axis=1, kind="stable")
    got = retrieval.rank_relevance(torch.from_numpy(values), torch.from_numpy(relevant))
    np.testing.assert_array_equal(got, np.take_along_axis(relevant, order, axis=1))


def test_equal_similarities_rank_by_index() -> None:
    """Twelve copies, the relevant one at index 5: rank 6."""
    labels = np.zeros(12, dtype=int)
    labels[5] = 1
    got = retrieval_scores(np.ones((12, 3), np.float32), labels, np.ones((1, 3), np.float32), np.array([1]))
    assert (got["recall_at_5"][0], got["recall_at_10"][0]) == (0, 1)
    assert got["ndcg_at_10"][0] == pytest.approx(1 / LOG(7))


# ------------------------------------------------------------------------------------------------------------- groups

def test_itself_and_its_lesion_are_no_finds() -> None:
    """Leave one out: the nearest is another view of the same lesion, which must not count."""
    frame = pd.DataFrame({"image": ["a", "b", "c", "d"], "lesion_id": ["L1", "L1", None, None]})
    features, labels = on_a_circle([0, 5, 90, 60]), np.array([0, 0, 1, 0])

    def at_1(column: str | None) -> list[float]:
        codes = group_codes(frame, frame, column)
        return retrieval_scores(features, labels, features, labels, exclude=codes)["recall_at_1"].tolist()

    np.testing.assert_equal(at_1(None), [1, 1, np.nan, 0])  # a finds b; c is alone in its class; d finds c
    np.testing.assert_equal(at_1("lesion_id"), [1, 1, np.nan, 0])  # a and b find d now
    frame["lesion_id"] = ["L1", "L1", None, "L1"]
    np.testing.assert_equal(at_1("lesion_id"), [np.nan, np.nan, np.nan, np.nan])
    assert (retrieval_scores(features, labels, features, labels)["recall_at_1"] == 1).all(), "itself, if allowed"


def test_group_codes() -> None:
    """An empty id is a group of its own; the same image is the same, whatever its split; ids are no image names."""
    gallery = pd.DataFrame({"image": ["a", "b", "c", "x"], "patient_id": ["1", None, None, "b"]})
    queries = pd.DataFrame({"image": ["a", "b", "d", "e"], "patient_id": ["1", None, None, "1"]})

    def pairs(column: str | None) -> list[tuple[int, int]]:
        theirs, ours = group_codes(gallery, queries, column)
        return np.argwhere(ours[:, None] == theirs[None]).tolist()

    assert pairs("patient_id") == [[0, 0], [1, 1], [3, 0]]
    assert pairs(None) == [[0, 0], [1, 1]]


# -------------------------------------------------------------------------------------------------------------- means

def test_means_and_intervals() -> None:
    """NaN queries are left out and counted; the interval is the percentile interval of resampled means."""
    rng = np.random.default_rng(0)
    values = rng.uniform(size=400)
    values[::8] = np.nan
    scores = {name: values for name in NAMES}
    got = mean_scores(scores, pd.DataFrame({"label": np.zeros(400, int)}), resamples=2000)
    kept = values[~np.isnan(values)]
    assert (got["queries"], got["without_relevant"]) == (350, 50) and "images" in got["resampling"]
    entry = got["metrics"]["map_at_r"]
    half = 1.959964 * kept.std() / np.sqrt(350)
    assert entry["value"] == pytest.approx(kept.mean()) and entry["reason"] is None
    assert [entry["low"], entry["high"]] == pytest.approx([kept.mean() - half, kept.mean() + half], abs=0.003)


def test_intervals_resample_whole_patients() -> None:
    """Ten queries of each of 30 patients with one value: as wide as 30 queries would give, not 300."""
    rng = np.random.default_rng(0)
    values = rng.uniform(size=30)
    frame = pd.DataFrame({"label": 0, "patient_id": np.repeat([f"P{i}" for i in range(30)], 10)})
    got = mean_scores({"map_at_r": np.repeat(values, 10)}, frame, resamples=2000)
    entry = got["metrics"]["map_at_r"]
    half = 1.959964 * values.std() / np.sqrt(30)
    assert [entry["low"], entry["high"]] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.02)
    assert "patient_id" in got["resampling"]


def test_one_patient_has_no_interval() -> None:
    """The value stays, the reason is told."""
    frame = pd.DataFrame({"label": 0, "patient_id": ["P", "P", None]})
    entry = mean_scores({"map_at_r": np.array([0.5, 1, np.nan])}, frame)["metrics"]["map_at_r"]
    assert entry == {"value": 0.75, "low": None, "high": None, "reason": "one patient cannot be resampled"}


def test_stratified_intervals_are_narrower_where_classes_differ() -> None:
    """Class 0 always right, class 1 always wrong: resampling within classes leaves no spread."""
    scores, frame = {"map_at_r": np.repeat([1.0, 0.0], 50)}, pd.DataFrame({"label": np.repeat([0, 1], 50)})
    entry = mean_scores(scores, frame, stratify=True)["metrics"]["map_at_r"]
    assert entry["low"] == entry["high"] == 0.5
    assert mean_scores(scores, frame)["metrics"]["map_at_r"]["low"] == pytest.approx(0.4, abs=0.02)


def test_no_query_with_a_relevant_image() -> None:
    """None with a reason, no 0."""
    got = mean_scores({"map_at_r": np.full(4, np.nan)}, pd.DataFrame({"label": np.zeros(4, int)}))
    assert got["queries"] == 0 and got["without_relevant"] == 4
    assert got["metrics"]["map_at_r"] == {"value": None, "low": None, "high": None,
                                          "reason": "no query has a relevant image in the gallery"}


# ------------------------------------------------------------------------------------------------------------ pictures

def test_queries_to_show() -> None:
    """Every class in turn, no image twice, all when there are fewer, the same for the same seed."""
    labels = np.array([0] * 50 + [1] * 3 + [4])
    shown = queries_to_show(labels, 6)
    assert sorted(labels[shown]) == [0, 0, 0, 1, 1, 4] or sorted(labels[shown]) == [0, 0, 1, 1, 4, 0]
    assert labels[shown][:3].tolist() == [0, 1, 4] and len(set(shown)) == 6
    assert (queries_to_show(labels, 6) == shown).all() and (queries_to_show(labels, 6, seed=1) != shown).any()
    assert sorted(queries_to_show(labels, 100)) == list(range(54)) and len(queries_to_show(labels, 0)) == 0


def small_manifest(folder):
    """Two train images of class 0, one of class 1, a test image of each."""
    names = ["a.png", "b.png", "c.png", "q.png", "r.png"]
    draw_images(folder, names)
    return read_manifest(write_csv(folder / "s.csv", image=names, label=[0, 0, 1, 0, 1], split=["train"] * 3 +
                                   ["test"] * 2, class_name=["nv", "nv", "mel", "nv", "mel"]), nb_classes=2)


def test_sheet_frames_tell_right_from_wrong(tmp_path, monkeypatch) -> None:
    """Tiles in their order, with class, similarity and colour; absent neighbours leave the row shorter."""
    manifest, drawn = small_manifest(tmp_path), {}
    monkeypatch.setattr(retrieval, "image_sheet", lambda path, rows, title: drawn.update(rows=rows, title=title))
    neighbour_sheet(tmp_path / "s.png", manifest.split("train"), manifest.split("test"),
                    np.array([[2, 1, 0], [2, 0, -1]]), np.array([[0.91234, 0.5, -0.1], [1, 0.25, -np.inf]]), title="t")
    tiles = [[(tile.path.name, tile.caption, tile.colour) for tile in row] for row in drawn["rows"]]
    assert tiles[0] == [("q.png", "query: nv\nq.png", None), ("c.png", "mel\n0.912", WRONG),
                        ("b.png", "nv\n0.500", RIGHT), ("a.png", "nv\n-0.100", RIGHT)]
    assert tiles[1] == [("r.png", "query: mel\nr.png", None), ("c.png", "mel\n1.000", RIGHT),
                        ("a.png", "nv\n0.250", WRONG)]


def test_evaluate_retrieval_writes_numbers_and_picture(tmp_path) -> None:
    """From manifests and features: the train gallery has finds, leave-one-out none; the PNG has both frames."""
    manifest = small_manifest(tmp_path)
    train, test = manifest.split("train"), manifest.split("test")
    gallery, queries = on_a_circle([0, 40, 90]), on_a_circle([10, 20])
    got = evaluate_retrieval(train, gallery, test, queries, exclude=None, sheet=tmp_path / "plots" / "r.png", shown=8)
    assert got["metrics"]["recall_at_1"]["value"] == 0.5 and got["metrics"]["recall_at_5"]["value"] == 1
    assert got["gallery_images"] == 3 and got["queries"] == 2 and got["excluded"] == "the query itself"
    pixels = np.asarray(Image.open(tmp_path / "plots" / "r.png")).reshape(-1, 3)
    assert {tuple(p) for p in np.unique(pixels, axis=0)} >= {ImageColor.getrgb(RIGHT), ImageColor.getrgb(WRONG)}
    got = evaluate_retrieval(test, queries, test, queries, exclude=None, sheet=tmp_path / "none.png", shown=0)
    assert got["queries"] == 0 and got["without_relevant"] == 2 and not (tmp_path / "none.png").exists()
