"""segmentation/run.py: what is wrong is said with a remedy, exit code 2, no traceback; the mended command runs."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from furnace import engine_for_segmentation, segmentation_results
from furnace.evaluation import lesion_masks
from furnace.models import create_backbone
from furnace.models.classifier import classifier_meta, create_classifier
from furnace.runtime import trainer
from furnace.runtime.train_state import read_stored
from helpers import ROOT
from tiny_finetuning import log_of, one_thread
from tiny_segmentation import MODEL, RUN, disc_picture, disc_set, end_of, results_of, segment, table_of

__all__ = ["one_thread"]  # acts on every test here
QUICK = {"epoch": "1"}
BARE = dict.fromkeys(("model", "pretrained", "size", "channels"))  # what a checkpoint says itself
STEPS = ("--save_every_steps", "1")


@pytest.fixture(autouse=True)
def no_plots(monkeypatch) -> None:
    """A third of the time of such runs."""
    monkeypatch.setattr(RUN, "plot_learning_curve", lambda *words, **options: None)
    monkeypatch.setattr(segmentation_results, "draw_worst", lambda *words, **options: None)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A CSV that is right."""
    return disc_set(tmp_path_factory.mktemp("small") / "data", train=4, val=2, test=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread) -> tuple[Path, Path]:
    """(CSV, the folder of a run of two epochs of two updates)."""
    folder = tmp_path_factory.mktemp("whole")
    csv = disc_set(folder / "data")
    assert segment(folder / "run", *STEPS, csv=csv) == 0
    return csv, folder / "run"


@pytest.fixture
def refused(capsys):
    """Calls ``segment``; returns what it said as it ended with exit code 2, on one stream and without a traceback."""
    def call(out: Path, *words: str, **options: str | Path | None) -> str:
        capsys.readouterr()
        assert segment(out, *words, **options) == 2
        told = capsys.readouterr().err
        assert told.count("error: ") == 1 and "Traceback" not in told and not (out / "results.json").exists()
        return told

    return call


# ------------------------------------------------------------------------------------------------------ the masks

def test_wrong_masks_in_one_list(tmp_path, refused) -> None:
    """A missing one, one of another size, one with a third value, one that is no image: rows, files and remedies."""
    csv = disc_set(tmp_path / "data", train=5, val=2, test=2)
    masks = tmp_path / "data" / "masks"
    shutil.copytree(masks, tmp_path / "kept")
    (masks / "train_1.png").unlink()
    Image.open(masks / "train_2.png").resize((30, 30), Image.Resampling.NEAREST).save(masks / "train_2.png")
    values = np.array(Image.open(masks / "val_1.png"))
    values[0, :3] = 128
    Image.fromarray(values).save(masks / "val_1.png")
    (masks / "test_0.png").write_bytes(b"no picture")
    told = refused(tmp_path / "run", csv=csv, **QUICK)
    assert told.startswith("error: 4 problems in ")
    for line in ("missing mask (row 3, column mask, masks/train_1.png)",
                 "mask of another size (row 4, column mask, masks/train_2.png): has 30 x 30 pixels and its image "
                 "images/train_2.png 52 x 42",
                 "mask values (row 8, column mask, masks/val_1.png): it has the grey values 0 and 128 and 255",
                 "unreadable mask (row 9, column mask, masks/test_0.png)"):
        assert told.count(line) == 1, told
    assert told.count("Remedy: ") == 4 and not (tmp_path / "run").exists()
    shutil.copytree(tmp_path / "kept", masks, dirs_exist_ok=True)
    assert segment(tmp_path / "run", csv=csv, **QUICK) == 0


def test_class_free_images_of_val(tmp_path, caplog) -> None:
    """A warning with their rows, before training; Dice 1 where nothing is predicted, else 0; both counts are stated."""
    csv = disc_set(tmp_path / "data", val=4, test=2)
    for number in (0, 1, 2):
        path = tmp_path / "data" / "masks" / f"val_{number}.png"
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    skin = np.array(Image.open(tmp_path / "data" / "images" / "val_0.png"))
    skin[:] = (220, 180, 160)  # and no disc in the picture, either
    Image.fromarray(skin).save(tmp_path / "data" / "images" / "val_0.png")
    assert segment(tmp_path / "run", csv=csv, epoch="30", lr="3e-3", layer_decay="1") == 0
    assert "3 warnings in" in caplog.text and caplog.text.count("has no lesion pixel") == 3
    assert "empty mask (row 10, column mask, masks/val_0.png)" in caplog.text
    results, table = results_of(tmp_path / "run"), table_of(tmp_path / "run", "val")
    empty = table["tp"] + table["fp"] == 0
    assert empty[:3].tolist() == [True, False, False], "both cases are there"
    assert table["dice"][:3].tolist() == table["jaccard"][:3].tolist() == [1, 0, 0]
    assert table["threshold_jaccard"][:3].tolist() == [1, 0, 0] and table["sensitivity"][:3].isna().all()
    scored = results["splits"]["val"]
    assert (scored["n"], scored["empty_truth"], scored["empty_predicted"]) == (4, 3, int(empty.sum()))
    assert scored["metrics"]["sensitivity"]["reason"].startswith("mean of 1 of 4 images: the true mask is empty in 3")
    epoch = log_of(tmp_path / "run")[results["best_epoch"]]
    assert epoch["val_jaccard"] == pytest.approx(table["jaccard"].mean(), abs=1e-9)
    assert scored["metrics"]["jaccard"]["value"] == pytest.approx(table["jaccard"].mean(), abs=1e-9)


def test_layout_of_another_data_set(tmp_path, refused) -> None:
    """--dataset ISIC2018 given PH2's folder: what was looked for and what it is; then its own name."""
    rng, base = np.random.default_rng(0), tmp_path / "data" / "PH2 Dataset images"
    for number in range(6):
        name = f"IMD{number:03d}"
        pixels, mask = disc_picture(rng, (40, 52))
        for part, content in ((f"{name}_Dermoscopic_Image/{name}.bmp", pixels),
                              (f"{name}_lesion/{name}_lesion.bmp", mask.astype(np.uint8) * 255)):
            path = base / name / part
            path.parent.mkdir(parents=True)
            Image.fromarray(content).save(path)
    words = ("--parent_path", str(tmp_path / "data"))
    told = refused(tmp_path / "run", *words, dataset="ISIC2018", **QUICK)
    assert "does not look like ISIC2018: there is no folder ISIC2018_Task1-2_Training_Input" in told
    assert "It looks like PH2: pass --dataset PH2" in told and not (tmp_path / "run").exists()
    assert "no/where is not a folder" in refused(tmp_path / "run", "--parent_path", "no/where", dataset="PH2")
    assert "--dataset ISBI is none of ISIC2016, " in refused(tmp_path / "run", *words, dataset="ISBI")
    assert segment(tmp_path / "run", *words, dataset="PH2", batch_size="2", **QUICK) == 0
    assert results_of(tmp_path / "run")["splits"]["test"]["n"] == 2
    assert "no official test" in results_of(tmp_path / "run")["split_note"]


# ----------------------------------------------------------------------------------------------- the command line

@pytest.mark.parametrize(("words", "wrong", "message", "mended"), [
    ([], {"batch_size": "1"}, "--batch_size 1: the batch normalisation of --head upernet needs 2 images together in a "
                              "training step (of one image its 1 x 1 map has no variance): take --batch_size 2 or more",
     {"batch_size": "2"}),
    ([], {"batch_size": "1", "update_freq": "2"}, "--batch_size 1: the batch normalisation", {
        "batch_size": "1", "head": "linear", "channels": None}),
    ([], {"pretrained": "no/such.pth"}, "no/such.pth", {}),
    ([], {"size": "40"}, "--size 40 does not suit test_vit: it must be a multiple of the patch size", {"size": "48"}),
    ([], {"size": "32 40"}, "40 is no multiple of its patch size 16; take 32 or 48", {"size": "32 48"}),
    ([], {"taps": "0 1 2 9"}, "it has 6 levels, counted from 0 to 5", {"taps": "0 1 2 5"}),
    ([], {"taps": "3 1 2 4"}, "give them in rising order", {"taps": "1 2 3 4"}),
    ([], {"taps": "1 5"}, "has four levels, but 2 taps were given: give four, or leave the pyramid out", {}),
    ([], {"model": "timm:none_such"}, "none_such", {}),
    (["--percent", "10"], {}, "--percent 10 of 4 train images is no image: take more", {}),
    (["--kfold", "9"], {}, "take fewer folds", {})])
def test_refused_then_mended(small, tmp_path, refused, words: list[str], wrong: dict, message: str,
                             mended: dict) -> None:
    """Nothing of the refused command is in the way of the one that it asks for, in the same folder."""
    told = refused(tmp_path / "run", *words, csv=small, **QUICK, **wrong)
    assert message in told, told
    assert not list(tmp_path.rglob("checkpoint*")) and not (tmp_path / "run").exists()
    assert segment(tmp_path / "run", csv=small, **QUICK, **mended) == 0


def test_too_few_images_for_a_batch(tmp_path, refused) -> None:
    """One train image: its batch is one whatever is asked for, and the number is said."""
    csv = disc_set(tmp_path / "data", train=1, val=1, test=1)
    told = refused(tmp_path / "run", csv=csv, **QUICK)
    assert "--batch_size 1: the batch normalisation" in told and "(1 train images)" in told
    assert segment(tmp_path / "run", "--head", "linear", csv=csv, channels=None, **QUICK) == 0


def test_not_installed(tmp_path) -> None:
    """In a process that has no furnace: what to type, where, and no traceback; exit code 2 as for any such mistake."""
    done = subprocess.run([sys.executable, "-I", "-S", str(ROOT / "segmentation" / "run.py"), "--help"], cwd=tmp_path,
                          env={"PYTHONPATH": "", "PATH": ""}, capture_output=True, text=True, timeout=60)
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert "error: this script needs the package furnace" in done.stderr
    assert "pip install -r requirements.txt && pip install -e ." in done.stderr and "repository's root" in done.stderr
    assert done.returncode == 2


# --------------------------------------------------------------------------------------------- files of other kinds

def save_classifier(path: Path) -> None:
    """A checkpoint-best.pth of the fine-tuning."""
    model = create_classifier(MODEL, "random", nb_classes=3, input_size=32)
    torch.save({"model": model.state_dict(), "epoch": 1, "meta": classifier_meta(
        model, class_names="abc", task="multiclass", amp_dtype="fp32")}, path)


@pytest.mark.parametrize(("make", "message"), [
    (save_classifier, "is a classifier (timm:test_vit, 3 classes), not a segmenter: pass it as --pretrained"),
    (lambda path: torch.save(create_backbone(MODEL, "random", input_size=32).state_dict(), path),
     "is no segmenter: it seems to be "),
    (lambda path: path.write_bytes(b"PK" + bytes(500)), "other.pth"),
    (lambda path: None, "other.pth")], ids=["classifier", "backbone", "damaged", "absent"])
@pytest.mark.parametrize("use", ["evaluate", "predict"])
def test_other_checkpoints(whole, tmp_path, refused, make, message: str, use: str) -> None:
    """Named, with what to do; the folder is free for the right one."""
    make(tmp_path / "other.pth")
    words = ("--evaluate",) if use == "evaluate" else ("--predict", str(whole[0].parent / "images"))
    data = {"csv": whole[0]} if use == "evaluate" else {}
    told = refused(tmp_path / "out", *words, "--checkpoint", str(tmp_path / "other.pth"), **data, **BARE)
    assert message in told and not (tmp_path / "out").exists()
    best = str(whole[1] / "checkpoint-best.pth")
    assert segment(tmp_path / "out", *words, "--checkpoint", best, **data, **BARE) == 0


def test_no_checkpoint_yet(whole, tmp_path, refused) -> None:
    """--evaluate and --predict of a folder without a run: train first; then its best is taken."""
    for words, data in ((["--evaluate"], {"csv": whole[0]}), (["--predict", str(whole[0].parent / "images")], {})):
        told = refused(tmp_path / "run", *words, **data, **BARE)
        assert "checkpoint-best.pth does not exist: train first, or pass --checkpoint FILE" in told
        assert not (tmp_path / "run").exists()
    assert segment(tmp_path / "run", *STEPS, csv=whole[0]) == 0
    assert end_of(tmp_path / "run") == end_of(whole[1])


def test_options_that_the_checkpoint_contradicts(whole, tmp_path, refused) -> None:
    """Another model, head or recipe than the file's: its own is named."""
    words = ("--evaluate", "--checkpoint", str(whole[1] / "checkpoint-best.pth"))
    for option, value, own in (("model", "timm:resnet18", MODEL), ("head", "linear", "upernet"),
                               ("recipe", "dermino", "default")):
        told = refused(tmp_path / "out", *words, csv=whole[0], **BARE | {option: value})
        assert f"was trained with --{option} {own}; you asked for {value}" in told or option == "recipe", told
        assert "was trained with --" in told


def test_unfolded_lora(small, tmp_path, refused) -> None:
    """checkpoint-last.pth of --tune lora is refused, its checkpoint-best.pth is tested."""
    assert segment(tmp_path / "run", "--tune", "lora", "--lora_rank", "2", csv=small, **QUICK) == 0
    files = [str(tmp_path / "run" / f"checkpoint-{name}.pth") for name in ("last", "best")]
    told = refused(tmp_path / "out", "--evaluate", "--checkpoint", files[0], csv=small, **BARE)
    assert "is a training with LoRA that is under way" in told and "take checkpoint-best.pth of that run" in told
    assert segment(tmp_path / "out", "--evaluate", "--checkpoint", files[1], csv=small, **BARE) == 0
    (folder,) = (tmp_path / "out").glob("eval_*")
    assert (folder / "test.csv").read_bytes() == (tmp_path / "run" / "test.csv").read_bytes()


# ---------------------------------------------------------------------------------------------- in the midst of work

def test_broken_images_before_training(tmp_path, monkeypatch, refused) -> None:
    """All that cannot be decoded, of every split, with their rows; no weight is trained; mended, it runs."""
    csv = disc_set(tmp_path / "data", train=4, val=2, test=2)
    images = tmp_path / "data" / "images"
    shutil.copytree(images, tmp_path / "kept")
    for name in ("train_2.png", "test_1.png"):
        (images / name).write_bytes((images / name).read_bytes()[:600])
    with monkeypatch.context() as patch:
        patch.setattr("furnace.training.fit", lambda *words, **options: pytest.fail("something was trained"))
        told = refused(tmp_path / "run", csv=csv, **QUICK)
    assert "2 images cannot be decoded" in told and "row 4, " in told and "row 9, " in told
    assert told.count("train_2.png") == told.count("test_1.png") == 1
    shutil.copytree(tmp_path / "kept", images, dirs_exist_ok=True)
    assert segment(tmp_path / "run", csv=csv, **QUICK) == 0


def half(path: Path) -> bytes:
    """Cut a file; returns what it held."""
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    return content


@pytest.mark.parametrize("file", ["images/train_5.png", "masks/train_5.png", "images/val_1.png", "masks/val_1.png",
                                  "images/test_2.png", "masks/test_2.png"])
def test_file_that_breaks_later(tmp_path, monkeypatch, refused, whole, file: str) -> None:
    """After the first epoch: named with its row; when it is whole again, the same command goes on to the same end."""
    csv = shutil.copytree(whole[0].parent, tmp_path / "data") / "masks.csv"
    update, kept = trainer._Fit._update, []

    def damaging(self, batches):
        if self.state.update == 2:
            kept.append(half(csv.parent / file))
        return update(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Fit, "_update", damaging)
        told = refused(tmp_path / "run", *STEPS, csv=csv)
    row = 2 + pd.read_csv(csv)[file.split("/")[0].removesuffix("s")].tolist().index(file)
    assert "1 image cannot be decoded" in told and f"row {row}, " in told and file in told
    (csv.parent / file).write_bytes(kept[0])
    assert segment(tmp_path / "run", *STEPS, csv=csv) == 0
    assert end_of(tmp_path / "run") == end_of(whole[1])


def test_images_that_break_while_tested(whole, tmp_path, refused) -> None:
    """--evaluate lists all of them, and the same command runs when they are whole again."""
    csv = shutil.copytree(whole[0].parent, tmp_path / "data") / "masks.csv"
    kept = {path: half(path) for path in (csv.parent / "images" / f"test_{number}.png" for number in (0, 3))}
    words = ("--evaluate", "--checkpoint", str(whole[1] / "checkpoint-best.pth"))
    told = refused(tmp_path / "out", *words, csv=csv, **BARE)
    assert "2 images cannot be decoded" in told and all(told.count(path.name) == 1 for path in kept)
    assert not list(tmp_path.rglob("results.json"))
    for path, content in kept.items():
        path.write_bytes(content)
    assert segment(tmp_path / "out", *words, csv=csv, **BARE) == 0
    (finished,) = (tmp_path / "out").glob("eval_*/results.json")
    assert finished.with_name("test.csv").read_bytes() == (whole[1] / "test.csv").read_bytes()


@pytest.mark.parametrize("name", ["test_1.png", "val_2.png"], ids=["first batch", "last batch"])
def test_photograph_that_breaks(whole, tmp_path, refused, name: str) -> None:
    """--predict names it and writes no predictions.csv; what it left does not stop the same command."""
    photos = shutil.copytree(whole[0].parent / "images", tmp_path / "photos")
    content, words = half(photos / name), ("--checkpoint", str(whole[1] / "checkpoint-best.pth"))
    told = refused(tmp_path / "out", "--predict", str(photos), *words, test_batch_size="4", **BARE)
    assert "1 image cannot be decoded" in told and name in told
    assert not (tmp_path / "out" / "predict_photos" / "predictions.csv").exists()
    (photos / name).write_bytes(content)
    assert segment(tmp_path / "out", "--predict", str(photos), *words, test_batch_size="4", **BARE) == 0
    table = pd.read_csv(tmp_path / "out" / "predict_photos" / "predictions.csv")
    assert len(table) == 15 == len(list((tmp_path / "out" / "predict_photos" / "masks").iterdir()))


def test_loss_that_is_not_finite(whole, tmp_path, monkeypatch, refused) -> None:
    """The checkpoint is of the last good update, with finite weights; the same command goes on to the same end."""
    csv, uncut = whole
    loss, calls = engine_for_segmentation.segmentation_loss, []

    def broken_once(logits, masks, **how):
        calls.append(1)
        return loss(logits, masks, **how) * (float("nan") if len(calls) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(engine_for_segmentation, "segmentation_loss", broken_once)
        told = refused(tmp_path / "run", *STEPS, csv=csv)
    assert "the loss is nan at update 4; the last checkpoint, " in told and "lower --lr" in told
    stored = read_stored(tmp_path / "run" / "checkpoint-last.pth")
    assert stored["update"] == 3 and all(value.isfinite().all() for value in stored["model"].values())
    assert segment(tmp_path / "run", *STEPS, csv=csv) == 0
    assert end_of(tmp_path / "run") == end_of(uncut)


def test_logits_that_are_not_finite(whole, tmp_path, monkeypatch, refused) -> None:
    """In val the training has diverged; in a test the image is named, with the precision that has room."""
    csv, out = whole
    monkeypatch.setattr(lesion_masks, "to_size", lambda maps, size: torch.full(tuple(size), float("nan")))
    told = refused(tmp_path / "run", csv=csv)
    assert "the training has diverged: the logits of images/val_0.png" in told
    assert "are not finite in fp32. Take a lower --lr" in told
    told = refused(tmp_path / "out", "--evaluate", "--checkpoint", str(out / "checkpoint-best.pth"), csv=csv, **BARE)
    assert "the logits of images/val_0.png" in told and "are not finite in fp32 (run with --amp_dtype fp32)" in told


def test_not_read_as_a_table_of_labels(small, tmp_path, refused) -> None:
    """A classification CSV, without masks: the column is named, with what it is for."""
    pd.read_csv(small).drop(columns="mask").to_csv(small.with_name("labels.csv"), index=False)
    told = refused(tmp_path / "run", csv=small.with_name("labels.csv"), **QUICK)
    assert "add a column with the mask file of each image" in told and not (tmp_path / "run").exists()
