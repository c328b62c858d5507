"""pretraining/run.py: what is wrong is said with a remedy, exit code 2, no traceback; the mended command runs."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from furnace import engine_for_pretraining, pretraining_results
from furnace.models import create_backbone
from furnace.pretraining_arguments import pretraining_parser
from furnace.runtime import trainer
from furnace.runtime.train_state import read_stored
from helpers import draw_images, write_csv
from tiny_pretraining import ONTOLOGY, drawn_set, end_of, log_of, pretrain

QUICK = {"epochs": "1"}
FLAGS = {flag for action in pretraining_parser()._actions for flag in action.option_strings}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_plots(monkeypatch) -> None:
    """Most of the time of such runs."""
    for name in ("plot_pretraining", "draw_crops", "draw_patch_pca"):
        monkeypatch.setattr(pretraining_results, name, lambda *given, **named: None)


@pytest.fixture
def csv(tmp_path) -> Path:
    """Five images, three of them labelled, and eval.csv."""
    return drawn_set(tmp_path / "data", images=5)


@pytest.fixture
def refused(capsys):
    """Calls ``pretrain``; returns what it said as it ended with exit code 2, in this script's own words.

    ``begun`` allows what a run writes before the fault is met.
    """
    def call(out: Path, *words: str, begun: bool = False, **options) -> str:
        capsys.readouterr()
        assert pretrain(out, *words, **options) == 2
        told = capsys.readouterr().err
        told = "\n".join(line for line in told.splitlines() if not re.search(r"\d+%\|", line))  # progress bars
        assert told.count("error: ") == 1 and "Traceback" not in told and not (out / "results.json").exists()
        assert set(re.findall(r"(?<![\w-])--[a-z]\w*", told)) <= FLAGS, told
        if begun:
            assert not list(out.glob("**/*.tmp")) and not (out / "teacher").exists()
        else:
            assert not out.exists()
        return told

    return call


def changed(csv: Path, change: Callable[[pd.DataFrame], pd.DataFrame], name: str = "changed.csv") -> Path:
    """The CSV, changed, beside it."""
    change(pd.read_csv(csv)).to_csv(csv.with_name(name), index=False)
    return csv.with_name(name)


# ----------------------------------------------------------------------------------------------------- the images' list

def test_no_images(tmp_path, refused) -> None:
    """Nothing named, nothing there, nothing inside."""
    out = tmp_path / "run"
    assert "--data_csv is missing: a CSV with a column image, or a folder of images" in refused(out)
    assert "no.csv" in refused(out, data_csv=str(tmp_path / "no.csv"))
    assert "nowhere" in refused(out, data_csv=str(tmp_path / "nowhere"), ontology=None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    told = refused(out, data_csv=str(tmp_path / "empty"), ontology=None)
    assert "holds no image (1 other files); images are told by their extension" in told and ".png" in told
    header = write_csv(tmp_path / "header.csv", image=[], labels=[], source=[])
    assert "header.csv" in refused(out, csv=header)


def test_no_column_of_images(tmp_path, csv, refused) -> None:
    told = refused(tmp_path / "run", csv=changed(csv, lambda table: table.rename(columns={"image": "picture"})))
    assert "add a column named image (or filename, image_path)" in told
    for name in ("filename", "image_path"):
        mended = changed(csv, lambda table, name=name: table.rename(columns={"image": name}))
        assert pretrain(tmp_path / name, csv=mended, **QUICK) == 0


def test_no_train_row(tmp_path, csv, refused) -> None:
    """Rows of val and test are not trained on, and an unknown split is no split."""
    told = refused(tmp_path / "run", csv=changed(csv, lambda table: table.assign(split="test")))
    assert "no image has the split train" in told and "mark the images to train on as train" in told
    told = refused(tmp_path / "run", csv=changed(csv, lambda table: table.assign(split="training")))
    assert "training" in told and "Remedy" in told


def test_all_faults_of_a_list_at_once(tmp_path, csv, refused) -> None:
    """A missing file, a label that is not known, a split that is none; each with its row and remedy."""
    table = pd.read_csv(csv)
    (csv.parent / table["image"][1]).unlink()
    bad = changed(csv, lambda table: table.assign(labels=["melanomma", *table["labels"][1:]],
                                                  split=["train"] * 4 + ["tset"]))
    told = refused(tmp_path / "run", csv=bad)
    assert told.startswith("error: 3 problems in ") and told.count("Remedy: ") == 3
    assert "row 3" in told and "row 2" in told and "row 6" in told and "melanoma" in told


# ---------------------------------------------------------------------------------------------------------- the labels

def test_labels_without_an_ontology(tmp_path, csv, refused) -> None:
    told = refused(tmp_path / "run", csv=csv, ontology=None)
    assert "3 rows have labels, and nothing says what they mean" in told
    assert "pass --ontology FILE.csv, or take the column out" in told
    without = changed(csv, lambda table: table.drop(columns="labels"))
    assert pretrain(tmp_path / "run", csv=without, ontology=None, **QUICK) == 0


def test_labels_written_otherwise(tmp_path, csv, refused) -> None:
    """Commas between labels, and another column's name."""
    commas = changed(csv, lambda table: table.assign(labels=table["labels"].where(table.index != 2, "nv, mel")))
    assert "write 'nv;mel' for several labels" in refused(tmp_path / "run", csv=commas)
    one = changed(csv, lambda table: table.rename(columns={"labels": "label"}))
    assert "label holds one class number, and is not read" in refused(tmp_path / "run", csv=one)


def test_label_outside_the_ontology(tmp_path, csv, refused, caplog) -> None:
    """Refused with what it may have meant; --lenient_labels trains on the image without it."""
    odd = changed(csv, lambda table: table.assign(labels=table["labels"].where(table.index != 2, "melanome")))
    told = refused(tmp_path / "run", csv=odd)
    assert "melanome" in told and "melanoma" in told and "row 4" in told and "Remedy" in told
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert pretrain(tmp_path / "run", "--lenient_labels", csv=odd, **QUICK) == 0
    assert "melanome" in caplog.text
    assert json.loads((tmp_path / "run" / "results.json").read_text())["labelled_images"] == 2


def test_source_that_annotates_nothing(tmp_path, csv, refused) -> None:
    """A data set that the ontology does not know: its labels could never count."""
    told = refused(tmp_path / "run", csv=changed(csv, lambda table: table.assign(source="ham_10k")))
    assert "ham_10k" in told and "Remedy" in told
    told = refused(tmp_path / "run", csv=changed(csv, lambda table: table.drop(columns="source")))
    assert "add a column with the data set of each labelled image" in told


def test_image_of_two_sources(tmp_path, csv, caplog) -> None:
    """With different labels: a warning that names it, and both rows are trained on."""
    def twice(table: pd.DataFrame) -> pd.DataFrame:
        more = table[table["labels"].notna()][:1].assign(source="pad_ufes_20", labels="nevus")
        return pd.concat([table, more])

    with caplog.at_level(logging.WARNING):
        assert pretrain(tmp_path / "run", csv=changed(csv, twice), **QUICK) == 0
    assert "images/00.png" in caplog.text and "under another source with other labels" in caplog.text
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["train_images"] == 6 and results["labelled_images"] == 4


def test_nothing_is_labelled(tmp_path, csv, refused, caplog) -> None:
    """With an ontology: no column is an error, an empty one a warning, and its label loss is 0."""
    told = refused(tmp_path / "run", csv=changed(csv, lambda table: table.drop(columns="labels")))
    assert "add a column with each image's classes between semicolons, or leave --ontology out" in told
    with caplog.at_level(logging.WARNING):
        assert pretrain(tmp_path / "run", csv=changed(csv, lambda table: table.assign(labels="")), **QUICK) == 0
    assert "no label counts for the loss" in caplog.text and log_of(tmp_path / "run")[0]["train_label"] == 0


def test_folder(tmp_path, csv, refused) -> None:
    """Has no labels: refused with an ontology, trained on without."""
    images = str(csv.parent / "images")
    told = refused(tmp_path / "run", data_csv=images)
    assert "--ontology is for labels, and " in told and "leave it out, or give a CSV" in told
    assert pretrain(tmp_path / "run", data_csv=images, ontology=None, **QUICK) == 0
    (entry,) = log_of(tmp_path / "run")
    assert "train_label" not in entry and entry["train_dino"] > 0
    assert not (tmp_path / "run" / "prototypes.safetensors").exists()


# ---------------------------------------------------------------------------------------------- files that are damaged

def half(path: Path) -> bytes:
    """Cut a file; returns what it held."""
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    return content


def test_broken_images_before_the_start(tmp_path, csv, refused, monkeypatch) -> None:
    """All that cannot be decoded, with their rows, before a weight moves; mended, the same command runs."""
    names = ("images/01.png", "images/03.png")
    kept = {name: half(csv.parent / name) for name in names}
    with monkeypatch.context() as patch:
        patch.setattr("furnace.pretraining.fit", lambda *given, **named: pytest.fail("something was trained"))
        told = refused(tmp_path / "run", csv=csv, begun=True, **QUICK)
    assert "2 images cannot be decoded" in told and "row 3, " in told and "row 5, " in told
    assert "Copy or download them again, or delete their rows" in told
    for name, content in kept.items():
        (csv.parent / name).write_bytes(content)
    assert pretrain(tmp_path / "run", csv=csv, **QUICK) == 0


def test_broken_evaluation_image_before_the_start(tmp_path, refused) -> None:
    """Not after the first epoch, and mended the same command runs."""
    csv = drawn_set(tmp_path / "data", images=8)
    image, eval_csv = csv.parent / "eval" / "val_1.png", str(csv.parent / "eval.csv")
    kept = half(image)
    told = refused(tmp_path / "run", csv=csv, begun=True, eval_csv=eval_csv, **QUICK)
    assert "1 image cannot be decoded" in told and "val_1.png" in told
    assert not (tmp_path / "run" / "checkpoint-last.pth").exists()
    image.write_bytes(kept)
    assert pretrain(tmp_path / "run", csv=csv, eval_csv=eval_csv, **QUICK) == 0


def test_image_that_breaks_later(tmp_path, refused, monkeypatch) -> None:
    """Named with its row; when it is whole again, the same command goes on to the same end."""
    csv = drawn_set(tmp_path / "data", images=8)
    words = ("--save_every_steps", "1")
    assert pretrain(tmp_path / "whole", *words, csv=csv) == 0
    update, kept = trainer._Fit._update, []

    def damaging(self, batches):
        if self.state.update == 2:
            kept.append(half(csv.parent / "images" / "05.png"))
        return update(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Fit, "_update", damaging)
        told = refused(tmp_path / "run", *words, csv=csv, begun=True)
    assert "1 image cannot be decoded" in told and "row 7, " in told and "05.png" in told
    (csv.parent / "images" / "05.png").write_bytes(kept[0])
    assert pretrain(tmp_path / "run", *words, csv=csv) == 0
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")


def test_loss_that_is_not_finite(tmp_path, csv, refused, monkeypatch) -> None:
    """The checkpoint is of the last good update; the same command goes on to the same end."""
    words = ("--save_every_steps", "1")
    assert pretrain(tmp_path / "whole", *words, csv=csv, epochs="3") == 0
    loss, calls = engine_for_pretraining.dino_loss, []

    def broken_once(*given):
        calls.append(1)
        return loss(*given) * (float("nan") if len(calls) == 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(engine_for_pretraining, "dino_loss", broken_once)
        told = refused(tmp_path / "run", *words, csv=csv, epochs="3", begun=True)
    assert "the loss is nan at update 3; the last checkpoint, " in told and "Take a lower --base_lr" in told
    stored = read_stored(tmp_path / "run" / "checkpoint-last.pth")
    assert stored["update"] == 2 and all(value.isfinite().all() for value in stored["model"].values())
    assert pretrain(tmp_path / "run", *words, csv=csv, epochs="3") == 0
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------- model and prototypes

@pytest.mark.parametrize("options, message, mended", [
    ({"global_crops_size": "40"}, "--global_crops_size 40 ", {"global_crops_size": "32"}),
    ({"local_crops_size": "24"}, "--local_crops_size 24 is no multiple of the patch size 16: take 32", {}),
    ({"model": "demo"}, "hybrid pretraining is for plain vision transformers with a class token, e.g. timm:vit_small",
     {}),
    ({"model": "timm:none_such"}, "none_such", {}),
    ({"model": None}, "--model is missing, e.g. timm:vit_small_patch16_224", {}),
    ({"pretrained_checkpoint": "no/such.pth"}, "no/such.pth", {}),
    ({"warmup_epochs": "1"}, "--warmup_epochs 1 leaves nothing of --epochs 1: take fewer, or more --epochs",
     {"warmup_epochs": "1", "epochs": "2"}),
    ({"label_warmup_epochs": "3"}, "--label_warmup_epochs 3 leaves nothing of --epochs 1", {
        "label_warmup_epochs": "0.5"}),
    ({"prototypes": "coder"}, "none of text, class_mean, orthogonal, random, and no .npy or .safetensors file", {}),
    ({"prototypes": "orthogonal"}, "classes cannot be at right angles in 64 dimensions: take random prototypes",
     {"prototypes": "random"})],
    ids=["large crops", "small crops", "no transformer", "unknown", "no model", "no checkpoint", "warm-up",
         "warm-up of labels", "no such prototypes", "too many classes"])
def test_refused_then_mended(tmp_path, csv, refused, options: dict, message: str, mended: dict) -> None:
    """Before anything is written (the number of dimensions aside), and the folder is free for the mended command."""
    begun = options == {"prototypes": "orthogonal"}
    told = refused(tmp_path / "run", csv=csv, begun=begun, **{**QUICK, **options})
    assert message in told, told
    assert not list(tmp_path.rglob("checkpoint*"))
    assert pretrain(tmp_path / "run", csv=csv, **{**QUICK, **mended}) == 0


def test_checkpoint_of_another_network(tmp_path, csv, refused) -> None:
    """What the file seems to be, and no half-loaded weights."""
    torch.save(create_backbone("timm:test_vit3", "random", input_size=48).state_dict(), tmp_path / "other.pth")
    told = refused(tmp_path / "run", csv=csv, pretrained_checkpoint=str(tmp_path / "other.pth"))
    assert "other.pth" in told
    (tmp_path / "damaged.pth").write_bytes(b"PK" + bytes(300))
    assert "damaged.pth" in refused(tmp_path / "run", csv=csv, pretrained_checkpoint=str(tmp_path / "damaged.pth"))


def test_prototypes_from_a_wrong_file(tmp_path, csv, refused) -> None:
    """Another number of rows, no file; then the right one in the same folder."""
    classes = len(pd.read_csv(ONTOLOGY))
    rows = np.random.default_rng(0).normal(size=(classes, 64)).astype(np.float32)
    np.save(tmp_path / "few.npy", rows[:5])
    np.save(tmp_path / "right.npy", rows)
    told = refused(tmp_path / "run", csv=csv, begun=True, prototypes=str(tmp_path / "few.npy"), **QUICK)
    assert "few.npy" in told and str(classes) in told and "5" in told
    told = refused(tmp_path / "run", csv=csv, begun=True, prototypes=str(tmp_path / "none.npy"), **QUICK)
    assert "none.npy" in told
    assert pretrain(tmp_path / "run", csv=csv, prototypes=str(tmp_path / "right.npy"), **QUICK) == 0


def test_text_encoder_that_is_not_to_be_had(tmp_path, csv, refused) -> None:
    """Without a network: named, with what to do; a folder without a model likewise; another source then runs there."""
    told = refused(tmp_path / "run", csv=csv, begun=True, prototypes=None, **QUICK)
    assert "cannot load the text encoder 'GanjinZero/coder_all'" in told
    assert "check the name and the network, or download it and pass its folder" in told
    (tmp_path / "empty").mkdir()
    told = refused(tmp_path / "run", csv=csv, begun=True, prototypes="text", text_encoder=str(tmp_path / "empty"),
                   **QUICK)
    assert str(tmp_path / "empty") in told
    assert pretrain(tmp_path / "run", csv=csv, **QUICK) == 0


# ------------------------------------------------------------------------------------------- evaluation, tests, batches

def test_nothing_to_judge_by(tmp_path, csv, refused) -> None:
    evaluation = csv.with_name("eval.csv")
    for change, message in (
            (lambda table: table.drop(columns="label"), "every image of train and val needs a class number from 0"),
            (lambda table: table.assign(split="train"), "needs rows of the split train and rows of val (or test)")):
        bad = changed(evaluation, change, "bad.csv")
        assert message in refused(tmp_path / "run", csv=csv, eval_csv=str(bad))
    assert "no.csv" in refused(tmp_path / "run", csv=csv, eval_csv=str(tmp_path / "no.csv"))
    assert pretrain(tmp_path / "run", csv=csv, eval_csv=str(evaluation), **QUICK) == 0
    assert 0 <= log_of(tmp_path / "run")[0]["val_knn_acc"] <= 1


def test_judging_images_that_are_trained_on(tmp_path, csv, caplog) -> None:
    """A warning with their number."""
    seen = write_csv(csv.with_name("seen.csv"), image=["images/00.png", "images/01.png", "eval/val_1.png"],
                     label=[0, 1, 1], split=["train", "val", "val"])
    with caplog.at_level(logging.WARNING):
        assert pretrain(tmp_path / "run", csv=csv, eval_csv=str(seen), **QUICK) == 0
    assert "1 of the 2 images that judge the teacher (--eval_csv) are training images, too" in caplog.text


def test_test_images_among_the_training_images(tmp_path, csv, refused) -> None:
    """The pairs are named, mirrored copies, too; without them it runs."""
    from PIL import Image, ImageOps

    smooth = np.random.default_rng(5).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(smooth).resize((64, 64), Image.Resampling.BICUBIC).save(csv.parent / "images" / "04.png")
    ImageOps.mirror(Image.open(csv.parent / "images" / "04.png")).save(csv.parent / "turned.png")
    draw_images(csv.parent, ["own.png"], seed=8)
    tests = write_csv(csv.with_name("tests.csv"), image=["turned.png", "own.png", "images/02.png"])
    told = refused(tmp_path / "run", "--forbid_overlap", str(tests), csv=csv)
    assert "2 training images are also in a test list" in told
    assert "images/04.png and turned.png" in told and "images/02.png and images/02.png" in told
    assert "Take them out of the training list (audit_dataset.py lists all of them)" in told
    clean = changed(csv, lambda table: table.drop(index=[2, 4]))
    assert pretrain(tmp_path / "run", "--forbid_overlap", str(tests), csv=clean, **QUICK) == 0


def test_fewer_images_than_a_batch(tmp_path, csv, caplog) -> None:
    """One update of them all, and a line that says so."""
    with caplog.at_level(logging.WARNING):
        assert pretrain(tmp_path / "run", csv=csv, batch_size="64", **QUICK) == 0
    assert "train has 5 images, fewer than one update of 64: an update is of 5" in caplog.text
    assert json.loads((tmp_path / "run" / "results.json").read_text())["updates"] == 1


def test_one_image(tmp_path, csv) -> None:
    """Nothing is spread out, and nothing is divided by zero."""
    assert pretrain(tmp_path / "run", csv=changed(csv, lambda table: table[:1]), **QUICK) == 0
    (entry,) = log_of(tmp_path / "run")
    assert entry["train_koleo"] == 0 and np.isfinite(entry["train_loss"])


def test_contradictions_are_told_together(tmp_path, refused) -> None:
    told = refused(tmp_path / "run", "--no_save_ckpt", eval_root=str(tmp_path), global_crops_scale="1 0.2")
    for text in ("--data_csv is missing", "--no_save_ckpt is not for pretraining", "--eval_root is of --eval_csv",
                 "--global_crops_scale 1 0.2: the first is the smaller one"):
        assert told.count(text) == 1


def test_another_run_in_the_folder(tmp_path, csv, capsys) -> None:
    """Another list, ontology or start: refused by name, and nothing of the run is touched."""
    assert pretrain(tmp_path / "run", csv=csv, **QUICK) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    shutil.copy(ONTOLOGY, tmp_path / "o.csv")
    with (tmp_path / "o.csv").open("a") as file:
        file.write("new_class,new class,,,ham10000\n")
    for options, name in (({"csv": changed(csv, lambda table: table[:4])}, "csv_sha256"),
                          ({"csv": csv, "ontology": str(tmp_path / "o.csv")}, "ontology_sha256"),
                          ({"csv": csv, "seed": "5"}, "seed")):
        capsys.readouterr()
        assert pretrain(tmp_path / "run", **QUICK, **options) == 2
        told = capsys.readouterr().err
        assert "holds another run" in told and name in told and "--overwrite" in told
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
