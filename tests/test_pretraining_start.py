"""What a pretraining starts from: the recipes of pretraining/configs, and the checkpoints that --model and
--pretrained_checkpoint take over."""

import json
import logging
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import linear_eval
from furnace.models import create_backbone
from furnace.models.dino import create_dino
from tiny_finetuning import one_thread
from tiny_pretraining import (
    CONFIGS,
    MODEL,
    ONTOLOGY,
    RUN,
    backbone_in,
    best_of,
    bits,
    drawn_set,
    no_plots,
    pretrain,
    stored_of,
)

__all__ = ["no_plots", "one_thread"]  # act on every test here
SIZES = {"prototypes": 32, "hidden": 16, "bottleneck": 8}  # of the heads of these runs
STILL = {"max_updates": "1", "warmup_epochs": "1"}  # one update at rate 0: the state is the start


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """13 images, 7 with a label; eval.csv beside the CSV. No test changes them."""
    return drawn_set(tmp_path_factory.mktemp("pretraining") / "data")


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


@pytest.fixture(scope="module")
def earlier(data, tmp_path_factory, one_thread) -> Path:
    """The folder of a short finished run."""
    out = tmp_path_factory.mktemp("earlier") / "run"
    assert pretrain(out, csv=data, epochs="1", epoch_length="2") == 0
    return out


@pytest.mark.parametrize("start", ["folder", "weights beside the heads", "checkpoint-best.pth"])
def test_start_from_a_run_of_this_toolkit(earlier, data, tmp_path, start) -> None:
    """A further training begins where the teacher was; its classes are those of the ontology, with fresh prototypes."""
    options = {"folder": {"model": str(earlier / "teacher"), "pretrained_checkpoint": None},
               "weights beside the heads": {"pretrained_checkpoint": str(earlier / "teacher" / "model.safetensors")},
               "checkpoint-best.pth": {"pretrained_checkpoint": str(earlier / "checkpoint-best.pth")}}[start]
    assert pretrain(tmp_path / "run", csv=data, seed="3", **options, **STILL) == 0
    expected, model = best_of(earlier), stored_of(tmp_path / "run")["model"]
    heads = [key for key in expected if key.startswith("label_head.")]
    assert bits({key: model[key] for key in expected if key not in heads}) == bits(
        {key: value for key, value in expected.items() if key not in heads})
    assert not torch.equal(model["label_head.weight"], expected["label_head.weight"])
