"""pretraining/run.py from the command line to the teacher's folder, which every other script takes."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import extract_features
import knn_eval
import linear_eval
from furnace.data.images import load_rgb
from furnace.data.transforms import build_transform
from furnace.models import create_backbone
from furnace.models.dino import create_dino
from furnace.runtime.train_state import read_stored
from helpers import ROOT
from tiny_finetuning import one_thread, results_of
from tiny_pretraining import (
    CONFIGS,
    MODEL,
    ONTOLOGY,
    RUN,
    bits,
    command,
    drawn_set,
    end_of,
    log_of,
    no_plots,
    pretrain,
)

__all__ = ["no_plots", "one_thread"]  # act on every test here
PARTS = ("dino", "ibot", "koleo", "label")
SIZES = {"prototypes": 32, "hidden": 16, "bottleneck": 8}  # of the heads of these runs
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


def stored_of(run: Path) -> dict:
    """checkpoint-last.pth."""
    return read_stored(run / "checkpoint-last.pth")


def best_of(run: Path) -> dict[str, torch.Tensor]:
    """The teacher of checkpoint-best.pth."""
    return torch.load(run / "checkpoint-best.pth", weights_only=True)["model"]


def backbone_in(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}


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

def test_frozen_prototypes_stay(hybrid) -> None:
    """I11: to the bit, in student and teacher, and the bias too."""
    made = load_file(hybrid / "prototypes.safetensors")["prototypes"]
    assert made.shape == (127, 64)
    last = stored_of(hybrid)
    for state in (last["model"], last["model_ema"], best_of(hybrid), load_file(hybrid / "teacher/heads.safetensors")):
        assert state["label_head.weight"].numpy().tobytes() == made.numpy().tobytes()
        assert not state["label_head.bias"].any()


def test_trained_prototypes_move(data, tmp_path) -> None:
    assert pretrain(tmp_path / "run", csv=data, epochs="1", prototype_mode="trainable") == 0
    made, model = load_file(tmp_path / "run/prototypes.safetensors")["prototypes"], stored_of(tmp_path / "run")["model"]
    assert (model["label_head.weight"] != made).any() and model["label_head.bias"].any()


def test_prototypes_move_after_their_warmup(data, tmp_path) -> None:
    """To the bit as they were for one epoch, then trained."""
    out, words = tmp_path / "run", {"prototype_mode": "warmup", "prototype_warmup_epochs": "1"}
    assert pretrain(out, csv=data, max_updates="3", **words) == 0
    made, before = load_file(out / "prototypes.safetensors")["prototypes"], stored_of(out)["model"]
    assert torch.equal(before["label_head.weight"], made) and not before["label_head.bias"].any()
    assert pretrain(out, csv=data, **words) == 0
    after = stored_of(out)["model"]
    assert (after["label_head.weight"] != made).any() and after["label_head.bias"].any()


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


# --------------------------------------------------------------------------------------------------- the recipes

@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A text encoder of random weights in a folder."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123)),
             *(f"##{chr(c)}" for c in range(97, 123)), "-"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer",
                                                              "do_lower_case": True}))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=24, max_position_embeddings=40)).save_pretrained(folder)
    return folder


def recipe(name: str, out: Path, csv: Path, **options: str) -> list[str]:
    """The words of a command line with a recipe and what every machine needs of its own."""
    chosen = {"config": str(CONFIGS / f"{name}.yaml"), "data_csv": str(csv), "output_dir": str(out),
              "batch_size": "2", "num_workers": "0", "device": "cpu", **options}
    return [word for key, value in chosen.items() for word in (f"--{key}", value)]


@pytest.mark.parametrize("name, width", [("demo_cpu", 192), ("ham_cpu", 192)])
def test_small_recipes(name, width, data, bert, tmp_path) -> None:
    """One update of each; with labels and with the images alone."""
    sources = {"ham_cpu": {"ontology": str(ONTOLOGY), "text_encoder": str(bert), "amp_dtype": "fp32"}, "demo_cpu": {}}
    csv = data.parent / "images" if name == "demo_cpu" else data
    assert RUN.main(recipe(name, tmp_path / "run", csv, max_updates="1", **sources[name])) == 0
    stored = stored_of(tmp_path / "run")
    assert stored["update"] == 1 and math.isfinite(stored["sums"]["loss"][0])
    assert ("label" in stored["sums"]) == (name == "ham_cpu")
    assert create_backbone(str(tmp_path / "run/teacher"), input_size=56).num_features == width


@pytest.mark.slow
def test_base_recipe(data, bert, tmp_path) -> None:
    """Two updates of DermINO's recipe as it stands, ViT-B/14 with heads of 65,536 prototypes, but for the batch.

    The first update has rate 0. After the second, biases that began at 0 are 0.008 times the student's in the teacher.
    """
    out = tmp_path / "run"
    options = {"ontology": str(ONTOLOGY), "pretrained_checkpoint": "random", "text_encoder": str(bert),
               "max_updates": "2", "eval_csv": str(data.parent / "eval.csv")}
    assert RUN.main(recipe("dermino_base", out, data, **options)) == 0
    stored = stored_of(out)
    assert stored["update"] == 2 and all(math.isfinite(total) for total, _ in stored["sums"].values())
    assert {"dino", "ibot", "koleo", "label"} <= stored["sums"].keys()
    student, teacher = stored["model"], stored["model_ema"]
    assert student["dino_head.last_layer.weight_v"].shape == (65536, 256)
    assert student["label_head.weight"].shape == (127, 768)
    for key in ("dino_head.mlp.0.bias", "ibot_head.mlp.2.bias", "mask_token"):
        assert student[key].abs().max() > 0, key
        torch.testing.assert_close(teacher[key], 0.008 * student[key], rtol=1e-3, atol=0)
    moved = [key for key, value in student.items() if not torch.equal(value, teacher[key])]
    assert len(moved) > 100 and not any("last_layer" in key or key.startswith("label_head") for key in moved)
    assert not (out / "results.json").exists()
    frame = pd.read_csv(data.parent / "eval.csv")
    frame.loc[frame.index[-3:], "split"] = "test"
    frame.to_csv(data.parent / "three.csv", index=False)
    assert linear_eval.main(["--model", str(out / "teacher"), "--csv_path", str(data.parent / "three.csv"),
                             "--nb_classes", "3", "--output_dir", str(tmp_path / "linear"), "--amp_dtype", "fp32",
                             "--num_workers", "0", "--resamples", "100", "--device", "cpu", "--no_cache"]) == 0
    assert create_backbone(str(out / "teacher")).num_features == 768
    shutil.rmtree(out)  # gigabytes


# --------------------------------------------------------------------------------------- starting from a checkpoint

def made_start() -> nn.Module:
    """A model of these runs' sizes of which every number is another than a fresh one's."""
    backbone = create_backbone(MODEL, "random", input_size=48, seed=7)
    model = create_dino(backbone, name=MODEL, seed=7, **SIZES)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


def published_layout(module: bool) -> dict:
    """As DermINO's teacher_checkpoint.pth: the mask token inside the backbone, everything under "teacher"."""
    names = {key: "backbone.mask_token" if key == "mask_token" else key for key in made_start().state_dict()}
    prefix = "module." if module else ""
    return {"teacher": {prefix + names[key]: value for key, value in made_start().state_dict().items()}}


@pytest.mark.parametrize("module", [False, True])
def test_start_from_the_published_layout(data, tmp_path, caplog, module) -> None:
    """Backbone, mask token and both heads are there before the first step, in student and teacher."""
    caplog.set_level(logging.INFO)
    torch.save(published_layout(module), tmp_path / "teacher_checkpoint.pth")
    assert pretrain(tmp_path / "run", csv=data, pretrained_checkpoint=str(tmp_path / "teacher_checkpoint.pth"),
                    **STILL) == 0
    expected, stored = made_start().state_dict(), stored_of(tmp_path / "run")
    assert stored["update"] == 1
    for state in (stored["model"], stored["model_ema"]):
        assert bits({key: state[key] for key in expected}) == bits(expected)
        assert set(state) == {*expected, "label_head.weight", "label_head.bias"}
    assert "mask_token, dino_head, ibot_head" in caplog.text


def test_start_from_a_file_with_a_mask_token_alone(data, tmp_path) -> None:
    """As DINOv2's own files are: no heads, and the mask token among the backbone's tensors."""
    start = made_start()
    torch.save({**start.backbone.state_dict(), "mask_token": start.mask_token.detach()}, tmp_path / "dinov2.pth")
    assert pretrain(tmp_path / "run", csv=data, pretrained_checkpoint=str(tmp_path / "dinov2.pth"), **STILL) == 0
    model = stored_of(tmp_path / "run")["model"]
    assert bits(backbone_in(model)) == bits(start.backbone.state_dict())
    assert torch.equal(model["mask_token"], start.mask_token)
    assert not torch.equal(model["dino_head.mlp.0.weight"], start.dino_head.mlp[0].weight)


def test_heads_of_other_sizes_start_fresh(data, tmp_path, caplog) -> None:
    """With a warning; the backbone and the mask token are taken over all the same."""
    torch.save(published_layout(False), tmp_path / "teacher_checkpoint.pth")
    assert pretrain(tmp_path / "run", csv=data, pretrained_checkpoint=str(tmp_path / "teacher_checkpoint.pth"),
                    head_n_prototypes="16", **STILL) == 0
    (said,) = [record.getMessage() for record in caplog.records if "of other sizes" in record.getMessage()]
    assert said.startswith("dino_head and ibot_head in ") and "--head_n_prototypes" in said
    model = stored_of(tmp_path / "run")["model"]
    start = made_start()
    assert bits(backbone_in(model)) == bits(start.backbone.state_dict())
    assert torch.equal(model["mask_token"], start.mask_token)
    fresh = create_dino(create_backbone(MODEL, "random", input_size=48), name=MODEL, seed=0,
                        **{**SIZES, "prototypes": 16}).state_dict()
    for key in fresh:
        if key.startswith(("dino_head.", "ibot_head.")):
            assert torch.equal(model[key], fresh[key]), key


@pytest.mark.parametrize("start", ["folder", "weights beside the heads", "checkpoint-best.pth"])
def test_start_from_a_run_of_this_toolkit(hybrid, data, tmp_path, start) -> None:
    """A further training begins where the teacher was; its classes are those of the ontology, with fresh prototypes."""
    options = {"folder": {"model": str(hybrid / "teacher"), "pretrained_checkpoint": None},
               "weights beside the heads": {"pretrained_checkpoint": str(hybrid / "teacher" / "model.safetensors")},
               "checkpoint-best.pth": {"pretrained_checkpoint": str(hybrid / "checkpoint-best.pth")}}[start]
    assert pretrain(tmp_path / "run", csv=data, seed="3", **options, **STILL) == 0
    expected, model = best_of(hybrid), stored_of(tmp_path / "run")["model"]
    heads = [key for key in expected if key.startswith("label_head.")]
    assert bits({key: model[key] for key in expected if key not in heads}) == bits(
        {key: value for key, value in expected.items() if key not in heads})
    assert not torch.equal(model["label_head.weight"], expected["label_head.weight"])


# ----------------------------------------------------------------------------------------------- several processes

DRIVER = """
import os, runpy, sys
import numpy as np
import torch
from furnace.data import pretraining_data

torch.set_num_threads(1)
rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def masks(crops, grid, **options):
    "Two patches of both views of the images at even positions: none in the second of two processes."
    even = (rank + processes * np.arange(crops // 2)) % 2 == 0
    hidden = np.zeros((2, crops // 2, grid[0] * grid[1]), dtype=bool)
    hidden[:, even, 1] = hidden[:, even, 5] = True
    return hidden.reshape(crops, -1)

pretraining_data.block_masks = masks
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_are_one_with_their_joint_batch(tmp_path) -> None:
    """torchrun with two gloo ranks of two images each, and one process of four: the losses and gradients agree.

    Masks and KoLeo are of a process's own images, so the masks are fixed and KoLeo is off. One process has no masked
    patch and, in at least one update, no labelled image; with trained prototypes.
    """
    csv = drawn_set(tmp_path / "data", images=4, labelled=1)
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    words = {"csv": csv, "epoch_length": "1", "koleo_loss_weight": "0", "drop_path": "0", "clip_grad": "0",
             "prototype_mode": "trainable", "base_lr": "2e-3"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
              "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "classification"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for out, before, images in (("one", [sys.executable], "4"), ("two", launch, "2")):
        done = subprocess.run([*before, str(driver), str(ROOT / "pretraining" / "run.py"),
                               *command(tmp_path / out, batch_size=images, **words)],
                              capture_output=True, text=True, env=env, timeout=240)
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
