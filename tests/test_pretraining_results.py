"""What a pretraining shows after every epoch, and results.json."""

import json
import logging
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from furnace import pretraining_results
from furnace.data.images import load_rgb
from furnace.data.multicrop import Crops
from furnace.data.pretraining_data import PretrainingData, read_pretraining
from furnace.models import create_backbone
from furnace.models.dino import DinoModel, create_dino
from furnace.pretraining import HeldOut
from furnace.pretraining_results import Progress, results_of
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.run_directory import RunDirectory
from furnace.training import Trained
from helpers import draw_images, write_csv

ENTRY = {"epoch": 0, "update": 3, "train_loss": 9.5, "train_dino": 5.0, "train_ibot": 4.5, "val_knn_acc": 0.75,
         "val_feature_rank": None, "lr": 1e-3, "ema": 0.9, "teacher_temperature": 0.05, "seconds": 1.0,
         "train_teacher_marginal_entropy": 0.9, "train_teacher_assignment_entropy": 0.5}
FLAT = {"train_teacher_marginal_entropy": 0.99, "train_teacher_assignment_entropy": 0.985}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path: Path) -> PretrainingData:
    """Eight images, three with labels."""
    draw_images(tmp_path / "images", [f"{i}.png" for i in range(8)])
    (tmp_path / "o.csv").write_text("id,name,synonyms,parent,sources\nmel,melanoma,,,ham\nnv,nevus,,,ham\n")
    csv = write_csv(tmp_path / "list.csv", image=[f"images/{i}.png" for i in range(8)],
                    labels=["mel", "", "nv", "", "nv", "", "", ""], source=["ham"] * 8)
    return read_pretraining(csv, ontology=tmp_path / "o.csv")


def model_of(seed: int = 0) -> DinoModel:
    backbone = create_backbone("timm:test_vit", "random", input_size=64, seed=seed)
    return create_dino(backbone, name="timm:test_vit", prototypes=8, hidden=8, bottleneck=4)


def options(**changes) -> SimpleNamespace:
    given = {"local": 2, "share": 0.5, "ratio": [0.1, 0.5], "seed": 0, **changes}
    return SimpleNamespace(crops=Crops(global_size=64, local_size=32, local_crops=given["local"]), device="cpu",
                           global_crops_size=64, local_crops_number=given["local"], seed=given["seed"],
                           mask_sample_probability=given["share"], mask_ratio_min_max=given["ratio"])


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list]:
    """What the drawing functions are given; they leave empty files."""
    seen: dict[str, list] = {}
    for name in ("draw_crops", "draw_patch_pca", "plot_pretraining"):
        def record(path, *given, name=name, **named):
            seen.setdefault(name, []).append(SimpleNamespace(given=(path, *given), **named))
            path.parent.mkdir(exist_ok=True)
            path.touch()

        monkeypatch.setattr(pretraining_results, name, record)
    return seen


# ------------------------------------------------------------------------------------------------------------- pictures

def test_pictures(tmp_path, data) -> None:
    """Three files after an epoch; random numbers of the training are left alone."""
    model = model_of().eval()
    before = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy())
    Progress(tmp_path / "plots", data, model, options())(model, [dict(ENTRY)])
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "crops.png", "learning_curve.png", "patch_features.png"]
    for path in (tmp_path / "plots").iterdir():
        assert min(Image.open(path).size) > 100


def test_what_is_drawn_when(tmp_path, data, drawn) -> None:
    """The crops once, the rest after every epoch; the log goes to the other places, too."""
    model, told = model_of(), []
    progress = Progress(tmp_path / "plots", data, model, options(), told.append)
    assert not (tmp_path / "plots").exists()
    first, second = dict(ENTRY), {**ENTRY, "epoch": 1, "update": 6}
    progress(model.eval(), [first])
    progress(model_of(1).eval(), [first, second])
    assert told == [first, second]
    assert [len(drawn[name]) for name in ("draw_crops", "draw_patch_pca", "plot_pretraining")] == [1, 2, 2]
    assert drawn["plot_pretraining"][1].given[1] == [first, second]


def test_crops_as_they_are_trained_on(tmp_path, data, drawn) -> None:
    """View-major, of the run's sizes and masks, drawn by its seed alone."""
    model = model_of()
    for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"local": 0, "share": 1.0,
                                                                        "ratio": [0.5, 0.5]})):
        torch.manual_seed(len(drawn))
        Progress(tmp_path / name, data, model, options(**changes))(model.eval(), [dict(ENTRY)])
    a, b, c, d = drawn["draw_crops"]
    (_, large, small, masks) = a.given
    assert large.shape == (2, 6, 3, 64, 64) and small.shape == (2, 6, 3, 32, 32) and masks.shape == (2, 6, 16)
    assert masks.dtype == torch.bool and 0 < masks.any(dim=2).sum() <= 6
    assert all(torch.equal(x, y) for x, y in zip(a.given[1:], b.given[1:], strict=True))
    assert not torch.equal(large, c.given[1])
    assert d.given[2] is None and (d.given[3].sum(dim=2) >= 4).all()
    assert a.mean == (0.5, 0.5, 0.5) == tuple(model.backbone.provenance.data_config["mean"]) and a.patch_size == 16


def test_features_are_the_teachers(tmp_path, data, drawn) -> None:
    """Patch tokens of the model that it is called with, without the class token, for the whole pictures."""
    student, teacher = model_of(), model_of(1).eval()
    Progress(tmp_path / "plots", data, student, options())(teacher, [dict(ENTRY)])
    (_, images, tokens) = drawn["draw_patch_pca"][0].given
    assert images.shape == (6, 3, 64, 64) and drawn["draw_patch_pca"][0].grid == (4, 4)
    with torch.no_grad():
        wanted = teacher.backbone.forward_features(images)[:, 1:]
    torch.testing.assert_close(tokens, wanted)
    mean = np.asarray(load_rgb(data.manifest.path_of(2))).mean() / 255
    assert float(images[2].mean() * 0.5 + 0.5) == pytest.approx(mean, abs=0.02)


def test_fewer_images_than_are_shown(tmp_path, data, drawn) -> None:
    model = model_of().eval()
    few = PretrainingData(data.manifest.take([0, 3]), None, None)
    Progress(tmp_path / "plots", few, model, options())(model, [dict(ENTRY)])
    assert drawn["draw_crops"][0].given[1].shape[1] == 2 == len(drawn["draw_patch_pca"][0].given[1])


def test_collapse_is_told(tmp_path, data, drawn, caplog) -> None:
    """In the log, from the second epoch on."""
    model = model_of().eval()
    progress = Progress(tmp_path / "plots", data, model, options())
    with caplog.at_level(logging.WARNING):
        progress(model, [{**ENTRY, **FLAT}])
        progress(model, [{**ENTRY, **FLAT}, dict(ENTRY)])
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        progress(model, [dict(ENTRY), {**ENTRY, **FLAT}])
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "all prototypes evenly" in told


# --------------------------------------------------------------------------------------------------------- results.json

def results(folder: Path, data: PretrainingData, **last) -> dict:
    """As results.json holds them."""
    model, run = model_of(), RunDirectory(folder, {"a": 1}, {})
    trained = Trained({}, [{**ENTRY, "val_knn_acc": 0.1}, {**ENTRY, **last}], BatchPlan(4, 2, 1, 3), 12345, 6)
    run.write_results(results_of(data, HeldOut(None, data.manifest.take([0, 1]), 0, "test"), model, trained, run))
    return json.loads((folder / "results.json").read_text())


def test_results(tmp_path, data) -> None:
    """The last epoch's numbers under their names; a metric without a value says so."""
    found = results(tmp_path, data)
    assert (found["task"], found["data_set"], found["model"]) == ("pretraining", "list", "timm:test_vit")
    assert (found["train_images"], found["labelled_images"], found["updates"]) == (8, 3, 6)
    assert found["trained_parameters"] == 12345 and found["teacher"] == str(tmp_path / "teacher")
    assert found["plan"]["micro"] == 4 and found["plan"]["accumulation"] == 2 and found["plan"]["steps_per_epoch"] == 3
    assert found["weights_sha256"] == model_of().backbone.provenance.sha256
    (split, val), = found["splits"].items()
    assert split == "test"  # what the queries are
    assert val["n"] == 2 and set(val["metrics"]) == {"knn_acc", "feature_rank"}
    assert val["metrics"]["knn_acc"]["value"] == 0.75 and val["metrics"]["knn_acc"]["reason"] is None
    assert val["metrics"]["feature_rank"] == {"value": None, "low": None, "high": None, "reason": "not defined"}
    assert found["losses"] == {name.removeprefix("train_"): value for name, value in ENTRY.items()
                               if name.startswith("train_")}
    assert found["losses"]["dino"] + found["losses"]["ibot"] == found["losses"]["loss"]


def test_results_without_labels(tmp_path, data) -> None:
    plain = PretrainingData(data.manifest, None, None)
    assert results(tmp_path, plain)["labelled_images"] == 0
    assert not any(isinstance(value, float) and math.isnan(value) for value in results(tmp_path, plain).values())
