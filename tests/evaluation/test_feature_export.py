"""Feature files as other programs read them, the list of images, and two dimensions."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors

from furnace.data.unlabelled import read_images
from furnace.evaluation.feature_export import image_table, project, write_features
from furnace.evaluation.features import Features
from furnace.runtime.files import UserError
from helpers import draw_images, write_csv

NAMES = ["a.png", "sub/b.png", "naïve ü.png"]


def features(labels: list[int]) -> Features:
    """Three images, five features."""
    return Features(embeddings=np.arange(15, dtype=np.float32).reshape(3, 5) / 7, filenames=NAMES,
                    labels=np.array(labels, dtype=np.int64))


@pytest.mark.parametrize("labels", [[2, 0, -1], [-1, -1, -1]])
def test_npz(tmp_path: Path, labels: list[int]) -> None:
    """Without pickle."""
    write_features(tmp_path / "f.npz", features(labels), {"model": "demo", "note": "ü"})
    with np.load(tmp_path / "f.npz", allow_pickle=False) as read:
        assert sorted(read) == sorted(["embeddings", "filenames", "metadata"] + ["labels"] * (max(labels) >= 0))
        np.testing.assert_array_equal(read["embeddings"], features(labels).embeddings)
        assert read["embeddings"].dtype == np.float32 and read["filenames"].tolist() == NAMES
        assert json.loads(str(read["metadata"])) == {"model": "demo", "note": "ü"}
        assert max(labels) < 0 or (read["labels"].tolist() == labels and read["labels"].dtype == np.int64)


@pytest.mark.parametrize("labels", [[2, 0, -1], [-1, -1, -1]])
def test_safetensors(tmp_path: Path, labels: list[int]) -> None:
    """Names and metadata in the header."""
    write_features(tmp_path / "f.safetensors", features(labels), {"model": "demo"})
    with safetensors.safe_open(tmp_path / "f.safetensors", framework="numpy") as read:
        assert sorted(read.keys()) == ["embeddings"] + ["labels"] * (max(labels) >= 0)
        np.testing.assert_array_equal(read.get_tensor("embeddings"), features(labels).embeddings)
        assert json.loads(read.metadata()["filenames"]) == NAMES
        assert json.loads(read.metadata()["metadata"]) == {"model": "demo"}
        assert max(labels) < 0 or read.get_tensor("labels").tolist() == labels


# ------------------------------------------------------------------------------------------------------------ table

@pytest.mark.parametrize(("columns", "want"), [
    ({}, {}), ({"label": [1, 0], "split": ["test", "train"]}, {"label": [1, 0], "split": ["test", "train"]}),
    ({"label": ["mel", "nv"]}, {"label": ["mel", "nv"]}),
    ({"binary_label": [1, 0], "age": [5, 6]}, {"binary_label": ["1", "0"], "age": ["5", "6"]}),
    ({"label": ["mel", "nv"], "binary_label": [1, 0]}, {"label": ["mel", "nv"], "binary_label": ["1", "0"]}),
    ({"row": [7, 8], "filename": ["p", "q"]}, {"input_row": ["7", "8"], "input_filename": ["p", "q"]})])
def test_image_table(tmp_path: Path, columns: dict, want: dict) -> None:
    """Row and name first, then all that the CSV has, and nothing that it has not."""
    draw_images(tmp_path, ["a.png", "b.png"])
    table = image_table(read_images(write_csv(tmp_path / "in.csv", image=["b.png", "a.png"], **columns)))
    assert table.to_dict("list") == {"row": [0, 1], "filename": ["b.png", "a.png"], **want}


def test_image_table_of_a_folder(tmp_path: Path) -> None:
    draw_images(tmp_path, ["a.png", "b.png"])
    assert image_table(read_images(tmp_path)).to_dict("list") == {"row": [0, 1], "filename": ["a.png", "b.png"]}


def test_label_that_some_rows_lack(tmp_path: Path) -> None:
    """Empty stays empty, not -1."""
    draw_images(tmp_path, ["a.png", "b.png"])
    table = image_table(read_images(write_csv(tmp_path / "in.csv", image=["b.png", "a.png"], label=["3", ""])))
    assert table.to_csv(index=False) == "row,filename,label\n0,b.png,3\n1,a.png,\n"


# ------------------------------------------------------------------------------------------------------- projection

@pytest.mark.parametrize("images", [5, 600])
def test_pca(images: int) -> None:
    """The singular value decomposition of the centred features, up to the signs of the axes."""
    x = np.random.default_rng(0).normal(size=(images, 8)).astype(np.float32) * np.arange(8, 0, -1) + 100
    xy, title = project(x.astype(np.float32), "pca")
    u, s, _ = np.linalg.svd((x - x.mean(axis=0)).astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(np.abs(xy), np.abs(u[:, :2] * s[:2]), atol=1e-3)
    assert title == f"PCA, {100 * (s[:2]**2).sum() / (s**2).sum():.0f} % of the variance"


def test_pca_of_equal_features() -> None:
    """One picture three times."""
    xy, title = project(np.full((3, 4), 0.5, np.float32), "pca")
    assert (xy == 0).all() and title == "PCA, 100 % of the variance"


class RecordedUmap:
    """Stands for the module umap, whose first call compiles for a minute."""

    def UMAP(self, **options):  # noqa: N802
        """Note the options; the map is the first two features."""
        self.options = options
        return self

    def fit_transform(self, x: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, 2)."""
        return x[:, :2]


@pytest.mark.parametrize(("images", "neighbours", "init"), [(3, 2, "random"), (15, 14, "random"), (50, 15, "spectral")])
def test_umap_options(monkeypatch, images: int, neighbours: int, init: str) -> None:
    """Fewer neighbours than images, and seeded."""
    recorded = RecordedUmap()
    monkeypatch.setitem(sys.modules, "umap", recorded)
    x = np.random.default_rng(0).normal(size=(images, 6)).astype(np.float32)
    xy, title = project(x, "umap", seed=3)
    np.testing.assert_array_equal(xy, x[:, :2])
    assert title == f"UMAP, {neighbours} neighbours, seed 3"
    assert recorded.options == {"n_neighbors": neighbours, "random_state": 3, "n_jobs": 1, "init": init}


@pytest.mark.slow
@pytest.mark.parametrize("images", [4, 40])
def test_umap(images: int) -> None:
    """Two far groups stay apart; one seed, one map."""
    rng = np.random.default_rng(0)
    group = np.arange(images) % 2
    x = (rng.normal(size=(images, 6)) + 30 * group[:, None]).astype(np.float32)
    xy, title = project(x, "umap", seed=3)
    assert xy.shape == (images, 2) and np.isfinite(xy).all()
    assert title == f"UMAP, {min(15, images - 1)} neighbours, seed 3"
    if images == 40:
        np.testing.assert_array_equal(project(x, "umap", seed=3)[0], xy)
        assert not np.array_equal(project(x, "umap", seed=4)[0], xy)
        distances = np.linalg.norm(xy[:, None] - xy[None], axis=2)
        np.fill_diagonal(distances, np.inf)
        assert (group[distances.argmin(axis=1)] == group).mean() > 0.9


@pytest.mark.parametrize("method", ["pca", "umap"])
def test_too_few_images(method: str) -> None:
    with pytest.raises(UserError, match="at least 3 images, and there are 2"):
        project(np.zeros((2, 4), np.float32), method)


def test_umap_that_is_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        project(np.zeros((5, 4), np.float32), "umap")
