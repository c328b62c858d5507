"""pretraining/run.py from the command line to the teacher's folder, which every other script takes."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file

import extract_features
import knn_eval
import linear_eval
from furnace.data import pretraining_data
from furnace.data.images import load_rgb
from furnace.data.pretraining_data import read_pretraining
from furnace.data.transforms import build_transform
from furnace.models import create_backbone
from helpers import ROOT
from tiny_finetuning import one_thread, results_of
from tiny_pretraining import (
    MODEL,
    ONTOLOGY,
    backbone_in,
    best_of,
    bits,
    command,
    drawn_set,
    end_of,
    even_masks,
    log_of,
    no_plots,
    pretrain,
    stored_of,
)

__all__ = ["no_plots", "one_thread"]  # act on every test here
PARTS = ("dino", "ibot", "koleo", "label")
STILL = {"max_updates": "1", "warmup_epochs": "1"}  # one update at rate 0: the state is the start
UPDATES = 6  # two epochs of 13 images by fours


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """13 images, 7 with a label; eval.csv beside the CSV. No test changes them."""
    return drawn_set(tmp_path_factory.mktemp("pretraining") / "data")


@pytest.fixture(scope="module")
def hybrid(data, tmp_path_factory, one_thread) -> Path:
    """The folder of a finished hybrid run."""
    out = tmp_path_factory.mktemp("hybrid") / "run"
    assert pretrain(out, csv=data, eval_csv=str(data.parent / "eval.csv")) == 0
    return out


# ----------------------------------------------------------------------------------------------------- a hybrid run

def test_files(hybrid) -> None:
    """Everything that the page promises, and nothing else."""
    assert {path.relative_to(hybrid).as_posix() for path in hybrid.rglob("*") if path.is_file()} == {
        "args.yaml", "env.json", "log.txt", "results.json", "checkpoint-last.pth", "checkpoint-previous.pth",
        "checkpoint-best.pth", "prototypes.safetensors", "teacher/config.json", "teacher/model.safetensors",
        "teacher/heads.safetensors", "plots/learning_curve.png", "plots/crops.png", "plots/patch_features.png"}
    results, last = results_of(hybrid), log_of(hybrid)[-1]
    assert (results["task"], results["train_images"], results["labelled_images"], results["updates"]) == (
        "pretraining", 13, 7, UPDATES)
    assert results["splits"]["val"]["n"] == 6
    assert results["splits"]["val"]["metrics"]["knn_bacc"]["value"] == last["val_knn_bacc"]
    about = json.loads((hybrid / "teacher" / "config.json").read_text())["furnace"]
    assert about["finished"] and (about["updates"], about["images"]) == (UPDATES, 13)
    assert about["fingerprint"] == results["fingerprint"]


def test_loss_is_the_sum_of_its_logged_parts(hybrid) -> None:
    """I12, for a mean over the updates of an epoch as for one."""
    log = log_of(hybrid)
    assert [entry["update"] for entry in log] == [3, 6]
    for entry in log:
        assert entry["train_loss"] == pytest.approx(sum(entry[f"train_{part}"] for part in PARTS), rel=1e-6)
        assert all(entry[f"train_{part}"] > 0 for part in ("dino", "ibot", "label"))


def test_weights_of_the_losses(data, hybrid, tmp_path) -> None:
    """Other weights scale the parts of the first update, which starts from the same weights, crops and masks."""
    runs = {}
    for name, weights in (("published", ("1", "1", "0.1", "1")), ("other", ("2", "0.5", "0.3", "0"))):
        chosen = {f"{part}_loss_weight": weight for part, weight in zip(PARTS, weights, strict=True)}
        assert pretrain(tmp_path / name, csv=data, epoch_length="1", epochs="1", **chosen) == 0
        (runs[name],) = log_of(tmp_path / name)
    for part, factor in zip(PARTS, (2, 0.5, 3, 0), strict=True):
        assert runs["other"][f"train_{part}"] == pytest.approx(factor * runs["published"][f"train_{part}"], rel=1e-6)


def test_pause_export_and_go_on(data, hybrid, tmp_path, capsys, caplog) -> None:
    """--max_updates stops anywhere, exports what is there, and the rest ends as the uninterrupted run, bit for bit.

    The teacher of update 5 is the moving average: that of update 4 and the student of update 5, with the momentum of
    the cosine from 0.9 to 1 (I15).
    """
    out, csv = tmp_path / "run", {"csv": data, "eval_csv": str(data.parent / "eval.csv")}
    caplog.set_level(logging.INFO)
    states = {}
    for updates in (4, 5):
        assert pretrain(out, max_updates=str(updates), **csv) == 0
        assert f"paused after {updates} updates (the same command without --max_updates goes on)" in caplog.text
        states[updates] = stored_of(out)
        assert states[updates]["update"] == updates and not (out / "results.json").exists()
        assert len(log_of(out)) == 1
        exported = load_file(out / "teacher" / "model.safetensors")
        assert bits(exported) == bits(backbone_in(states[updates]["model_ema"]))
        about = json.loads((out / "teacher" / "config.json").read_text())["furnace"]
        assert (about["updates"], about["finished"]) == (updates, False)
    momentum = 1 - (1 - 0.9) * (math.cos(math.pi * 4 / UPDATES) + 1) / 2
    for key, value in states[5]["model_ema"].items():
        expected = momentum * states[4]["model_ema"][key].double() + (1 - momentum) * states[5]["model"][key].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    moved = [key for key, value in states[5]["model"].items() if not torch.equal(value, states[5]["model_ema"][key])]
    assert set(moved) == set(states[5]["model"]) - {"label_head.weight", "label_head.bias"}
    before = (out / "checkpoint-last.pth").read_bytes()
    assert pretrain(out, max_updates="5", **csv) == 0
    assert (out / "checkpoint-last.pth").read_bytes() == before, "a pause of a paused run changes nothing"
    assert pretrain(out, **csv) == 0
    assert end_of(out) == end_of(hybrid)
    assert (out / "teacher" / "config.json").read_text() == (hybrid / "teacher" / "config.json").read_text()
    assert {**results_of(out), "teacher": ""} == {**results_of(hybrid), "teacher": ""}


@pytest.mark.parametrize("updates", ["3", "6", "7"])
def test_pause_at_the_end_of_an_epoch(data, hybrid, tmp_path, updates) -> None:
    """After its evaluation; a pause that the training does not reach is none."""
    out, csv = tmp_path / "run", {"csv": data, "eval_csv": str(data.parent / "eval.csv")}
    assert pretrain(out, max_updates=updates, **csv) == 0
    assert len(log_of(out)) == (1 if updates == "3" else 2)
    assert (out / "results.json").exists() == (updates != "3")
    assert log_of(out) == log_of(hybrid)[:len(log_of(out))]


# ------------------------------------------------------------------------------------------------------- prototypes

@pytest.fixture(scope="module")
def prior(data) -> torch.Tensor:
    """The classes' log odds in the data."""
    return torch.from_numpy(read_pretraining(data, ontology=ONTOLOGY).labels.log_odds())


def test_frozen_prototypes_stay(hybrid, prior) -> None:
    """I11: to the bit, in student and teacher, and the bias too, at the labels' log odds."""
    made, bias = load_file(hybrid / "prototypes.safetensors")["prototypes"], prior
    assert made.shape == (127, 64)
    last = stored_of(hybrid)
    for state in (last["model"], last["model_ema"], best_of(hybrid), load_file(hybrid / "teacher/heads.safetensors")):
        assert state["label_head.weight"].numpy().tobytes() == made.numpy().tobytes()
        assert torch.equal(state["label_head.bias"], bias) and bias.any()


def test_trained_prototypes_move(data, prior, tmp_path) -> None:
    assert pretrain(tmp_path / "run", csv=data, epochs="1", prototype_mode="trainable") == 0
    made, model = load_file(tmp_path / "run/prototypes.safetensors")["prototypes"], stored_of(tmp_path / "run")["model"]
    assert (model["label_head.weight"] != made).any() and (model["label_head.bias"] != prior).any()


def test_prototypes_move_after_their_warmup(data, prior, tmp_path) -> None:
    """To the bit as they were for one epoch, then trained."""
    out, words = tmp_path / "run", {"prototype_mode": "warmup", "prototype_warmup_epochs": "1"}
    assert pretrain(out, csv=data, max_updates="3", **words) == 0
    made, before = load_file(out / "prototypes.safetensors")["prototypes"], stored_of(out)["model"]
    assert torch.equal(before["label_head.weight"], made) and torch.equal(before["label_head.bias"], prior)
    assert pretrain(out, csv=data, **words) == 0
    after = stored_of(out)["model"]
    assert (after["label_head.weight"] != made).any() and (after["label_head.bias"] != prior).any()


# ---------------------------------------------------------------------------------------------- what the teacher is for

def test_teacher_loads_everywhere(hybrid, data) -> None:
    """create_backbone and timm give the features of checkpoint-best.pth's teacher, by a network that is built here."""
    by_hand = timm.create_model("test_vit", num_classes=0, img_size=48)
    by_hand.load_state_dict(backbone_in(best_of(hybrid)))
    ours = create_backbone(str(hybrid / "teacher"), input_size=48)
    theirs = timm.create_model(f"local-dir:{hybrid / 'teacher'}", pretrained=True, num_classes=0)
    assert ours.provenance.weights == "file" and theirs.pretrained_cfg["input_size"] == (3, 48, 48)
    transform = build_transform(ours)
    images = torch.stack([transform(load_rgb(data.parent / "images" / f"{i:02}.png")) for i in range(4)])
    with torch.no_grad():
        expected, *others = (model.eval()(images) for model in (by_hand, ours, theirs))
    assert expected.std() > 0.01
    for features in others:
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


def test_teacher_in_the_other_scripts(hybrid, data, tmp_path) -> None:
    """linear_eval.py, knn_eval.py, extract_features.py: the numbers of the same weights as a file of a timm model."""
    plain = tmp_path / "plain.pth"
    torch.save(backbone_in(best_of(hybrid)), plain)
    frame = pd.read_csv(data.parent / "eval.csv")
    frame.loc[frame.index[-3:], "split"] = "test"
    csv = data.parent / "evaluate.csv"
    frame.to_csv(csv, index=False)
    more = ["--csv_path", str(csv), "--nb_classes", "3", "--resamples", "100", "--batch_size", "4"]
    machine = ["--input_size", "48", "--num_workers", "0", "--amp_dtype", "fp32", "--device", "cpu", "--no_cache"]
    for script in (linear_eval, knn_eval):
        tables = []
        for name, model in (("teacher", [str(hybrid / "teacher")]),
                            ("file", [MODEL, "--pretrained_checkpoint", str(plain)]),
                            ("best", [MODEL, "--pretrained_checkpoint", str(hybrid / "checkpoint-best.pth")])):
            out = tmp_path / script.__name__ / name
            assert script.main(["--model", *model, "--output_dir", str(out), *more, *machine]) == 0
            (path,) = out.glob("*/*/test.csv")
            tables.append(pd.read_csv(path))
        for table in tables[1:]:
            pd.testing.assert_frame_equal(table, tables[0], atol=1e-6)
    features = tmp_path / "features.npz"
    assert extract_features.main([str(csv), "--output", str(features), "--model", str(hybrid / "teacher"),
                                  *machine[:-1]]) == 0
    model = timm.create_model("test_vit", num_classes=0, img_size=48).eval()
    model.load_state_dict(torch.load(plain, weights_only=True))
    transform = build_transform(create_backbone(str(hybrid / "teacher"), input_size=48))
    with torch.no_grad():
        expected = torch.cat([model(transform(load_rgb(csv.parent / name))[None]) for name in frame["image"]])
    np.testing.assert_allclose(np.load(features)["embeddings"], expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- once more

def test_same_command_again(hybrid, data, caplog) -> None:
    """Finished: it says so; nothing changes."""
    caplog.set_level(logging.INFO)
    before = {path: path.stat().st_mtime_ns for path in hybrid.rglob("*") if path.is_file()}
    assert pretrain(hybrid, csv=data, eval_csv=str(data.parent / "eval.csv")) == 0
    assert "this run is finished:" in caplog.text and f"the teacher is {hybrid / 'teacher'}" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in hybrid.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("words, named", [
    ({"base_lr": "1e-3"}, "base_lr: 0.02 there, 0.001 now"), ({"batch_size": "3"}, "batch_size: 4 there, 3 now"),
    ({"seed": "1"}, "seed: 0 there, 1 now"), ({"prototypes": "class_mean"}, "prototypes: 'random' there"),
    ({"ontology": "fewer.csv"}, "ontology_sha256"), ({"eval_csv": None}, "eval_sha256"),
    ({"data_csv": "fewer_images.csv"}, "csv_sha256")])
def test_other_options_are_refused(hybrid, data, capsys, words, named) -> None:
    """Exit code 2, and what differs."""
    if "ontology" in words:
        other = data.parent / "fewer.csv"
        other.write_text(ONTOLOGY.read_text().replace("dermatofibroma,df,", "dermatofibroma,dfb,", 1))
        words = {"ontology": str(other)}
    if "data_csv" in words:
        other = data.parent / "fewer_images.csv"
        pd.read_csv(data)[:-1].to_csv(other, index=False)
        words = {"data_csv": str(other)}
    before = end_of(hybrid)
    options = {"csv": data, "eval_csv": str(data.parent / "eval.csv"), **words}
    assert pretrain(hybrid, **options) == 2
    said = capsys.readouterr().err
    assert "holds another run" in said and named in said and "--overwrite" in said and "Traceback" not in said
    assert end_of(hybrid) == before


def test_options_that_change_no_number_are_not_refused(hybrid, data, caplog) -> None:
    caplog.set_level(logging.INFO)
    assert pretrain(hybrid, "--grad_checkpointing", "--no_pin_mem", csv=data, num_workers="1", save_ckpt_freq="1",
                    save_every_steps="1", eval_csv=str(data.parent / "eval.csv")) == 0
    assert "this run is finished" in caplog.text


def test_overwrite(data, tmp_path, capsys) -> None:
    """The earlier run is kept in ``previous``; its prototypes are not taken over."""
    out = tmp_path / "run"
    assert pretrain(out, csv=data, **STILL) == 0
    first = (out / "prototypes.safetensors").read_bytes()
    assert pretrain(out, csv=data, seed="1", **STILL) == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err
    assert pretrain(out, "--overwrite", csv=data, seed="1", **STILL) == 0
    assert (out / "previous" / "prototypes.safetensors").read_bytes() == first
    assert (out / "prototypes.safetensors").read_bytes() != first
    assert (out / "previous" / "teacher" / "model.safetensors").exists() and (out / "teacher/config.json").exists()


# ----------------------------------------------------------------------------------------------- several processes

DRIVER = """
import runpy, sys
import torch
from furnace.data import pretraining_data
from tiny_pretraining import even_masks

torch.set_num_threads(1)
pretraining_data.block_masks = even_masks
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_are_one_with_their_joint_batch(tmp_path, monkeypatch) -> None:
    """torchrun with two gloo ranks of two images each, and one process of four: the losses and gradients agree.

    Masks and KoLeo are of a process's own images, so the masks are fixed and KoLeo is off. One process has no masked
    patch and, in at least one update, no labelled image; with trained prototypes.
    """
    csv = drawn_set(tmp_path / "data", images=4, labelled=1)
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    words = {"csv": csv, "epoch_length": "1", "koleo_loss_weight": "0", "drop_path": "0", "clip_grad": "0",
             "prototype_mode": "trainable", "base_lr": "2e-3"}
    with monkeypatch.context() as patch:
        patch.setattr(pretraining_data, "block_masks", even_masks)
        assert pretrain(tmp_path / "one", batch_size="4", **words) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
              "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(driver),
              str(ROOT / "pretraining" / "run.py"), *command(tmp_path / "two", batch_size="2", **words)]
    paths = os.pathsep.join([str(ROOT / "classification"), str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [entry["update"] for entry in two] == [1, 2]
    for name in ("loss", "dino", "ibot", "label"):
        assert two[0][f"train_{name}"] == pytest.approx(one[0][f"train_{name}"], rel=1e-5), name
    assert one[0]["train_ibot"] > 0 and one[0]["train_label"] > 0
    assert two[1]["train_loss"] == pytest.approx(one[1]["train_loss"], rel=1e-3), "after the same first update"
    a, b = stored_of(tmp_path / "one"), stored_of(tmp_path / "two")
    means = [[entry["exp_avg"] for entry in stored["optimizer"]["state"].values()] for stored in (a, b)]
    whole = math.hypot(*(float(mean.norm()) for mean in means[0]))
    for one_mean, two_mean in zip(*means, strict=True):  # of the gradients: their size, too, which AdamW would forgive
        assert (one_mean - two_mean).norm() <= 1e-3 * one_mean.norm() + 1e-5 * whole
    for key, value in a["model_ema"].items():
        moved = (value - a["model"][key]).norm()
        if "qkv.bias" not in key:  # whose keys have no gradient but rounding errors, which AdamW blows up
            assert (b["model_ema"][key] - value).norm() <= 0.1 * moved + 1e-6, key
