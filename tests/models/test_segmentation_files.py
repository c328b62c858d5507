"""Files of segmenters: ours and the published layout come back whole; everything else is named."""

import argparse
import copy
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from furnace.models import create_backbone, panderm
from furnace.models.classifier import classifier_meta, create_classifier
from furnace.models.segmentation_files import load_segmenter, segmenter_meta, segmenter_of
from furnace.models.segmenter import create_segmenter
from furnace.runtime.files import CheckpointError, sha256_file
from helpers import GOLDEN
from segmentation_golden import fill, fill_published

PUBLISHED = json.loads((GOLDEN / "keys_seg_large.json").read_text())
PREFIX = PUBLISHED["prefix"]


@pytest.fixture(autouse=True)
def small_panderm(monkeypatch) -> None:
    """PanDerm_Large_* of width 32 at its depth of 24; PanDerm_Base_* of width 32 and depth 4."""
    monkeypatch.setitem(panderm.SIZES, "Large", {"embed_dim": 32, "depth": 24, "num_heads": 2})
    monkeypatch.setitem(panderm.SIZES, "Base", {"embed_dim": 32, "depth": 4, "num_heads": 2})


def shrunk(shape: list[int]) -> tuple[int, ...]:
    """The published shape at width 32 instead of 1024."""
    return tuple(side // 32 if side % 1024 == 0 else side for side in shape)


def lightning_file(prefix: str = PREFIX) -> dict:
    """What the published training saves, at width 32, with the goldens' rule of values."""
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    state = OrderedDict()
    for entry in PUBLISHED["keys"]:
        bare = entry["key"].removeprefix(PREFIX)
        state[prefix + bare] = fill(bare, torch.empty(shrunk(entry["shape"]), dtype=dtypes[entry["dtype"]]))
    return {"epoch": 57, "global_step": 11600, "pytorch-lightning_version": "2.2.1", "state_dict": state,
            "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"ModelCheckpoint{'monitor': 'Val/Jac'}": {
                "monitor": "Val/Jac", "best_model_score": torch.tensor(0.8), "best_k_models": {}}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}],
            "lr_schedulers": [{"T_max": 100, "eta_min": 0}]}


def ours(name: str = "PanDerm_Base_LP", **arguments) -> dict:
    """A file of this toolkit."""
    model = create_segmenter(name, "random", **{"input_size": 64, "channels": 8, **arguments})
    model.load_state_dict(fill_published(model.state_dict()))
    return {"model": model.state_dict(), "meta": segmenter_meta(model, amp_dtype="bf16", transform="dermino"),
            "epoch": 4}


def images(side: int = 64) -> torch.Tensor:
    """Noise."""
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(7))


# ------------------------------------------------------------------------------------------------------ the published

def test_published_names_and_shapes_are_ours() -> None:
    """All 451 tensors of the published list, and none besides; the fpn under neck., the rest as it stands."""
    state = create_segmenter("PanDerm_Large_LP", "random").state_dict()
    listed = {entry["key"].removeprefix(PREFIX).replace("backbone.fpn", "neck.fpn"): (shrunk(entry["shape"]),
                                                                                    f"torch.{entry['dtype']}")
              for entry in PUBLISHED["keys"]}
    assert len(listed) == 451
    assert {key: (tuple(value.shape), str(value.dtype)) for key, value in state.items()} == listed
    head = [key for key in state if key.startswith("decode_head.")]
    assert head == [key for key in listed if key.startswith("decode_head.")]  # in the published order


@pytest.mark.parametrize("prefix", [PREFIX, "module." + PREFIX, "segmentor.", ""])
def test_published_file_loads(tmp_path, prefix: str) -> None:
    """Lightning's, DDP's and the notebook's prefixes; its own transform; every tensor in its place."""
    content = lightning_file(prefix)
    torch.save(content, tmp_path / "model_best_0.ckpt")
    found = load_segmenter(tmp_path / "model_best_0.ckpt")
    assert (found.name, found.epoch, found.transform) == ("PanDerm_Large_LP", 57, "panderm")
    assert found.class_names == ("background", "lesion") and found.sha256 == sha256_file(tmp_path / "model_best_0.ckpt")
    assert (found.data_config["mean"], found.data_config["std"]) == ([0.5] * 3, [0.5] * 3)
    assert found.input_size == (224, 224) and found.data_config["interpolation"] == "bicubic"
    assert found.model.taps == (7, 11, 15, 23) and found.model.recipe["channels"] == 32
    state = found.model.state_dict()
    assert torch.equal(state["neck.fpn1.3.bias"], content["state_dict"][prefix + "backbone.fpn1.3.bias"])
    assert torch.equal(state["decode_head.psp_modules.3.1.bn.running_var"],
                       content["state_dict"][prefix + "decode_head.psp_modules.3.1.bn.running_var"])
    assert len(found.model.provenance.report.matched) == 451 and not found.model.training


@torch.no_grad()
def test_published_file_at_another_size() -> None:
    """Built at once for a rectangle: positions resampled, the configuration says so."""
    found = segmenter_of(lightning_file(), source="x.ckpt", input_size=(64, 96))
    assert found.input_size == (64, 96) and found.data_config["input_size"] == [3, 64, 96]
    assert found.model(torch.zeros(1, 3, 64, 96)).shape == (1, 2, 64, 96)


@pytest.mark.slow
@torch.no_grad()
def test_large_goldens(monkeypatch) -> None:
    """The published size, read from the published layout: 436,527,106 parameters, 436,325,378 of them trained."""
    monkeypatch.setitem(panderm.SIZES, "Large", {"embed_dim": 1024, "depth": 24, "num_heads": 16})
    state = {entry["key"]: fill(entry["key"].removeprefix(PREFIX), torch.empty(
        entry["shape"], dtype=getattr(torch, entry["dtype"]))) for entry in PUBLISHED["keys"]}
    model = segmenter_of({"state_dict": state}, source="large.ckpt").model
    del state
    counts = [p.numel() for p in model.parameters()], [p.numel() for p in model.parameters() if p.requires_grad]
    assert tuple(map(sum, counts)) == (PUBLISHED["n_parameters"], PUBLISHED["n_trainable"])
    x = torch.from_numpy(np.load(GOLDEN / "input_randn_2x3x224x224.npy"))
    maps = model.features(x)
    low = model.decode_head(maps)
    full = torch.nn.functional.interpolate(low, size=(224, 224), mode="bilinear", align_corners=False)
    assert [float(m.double().abs().sum()) for m in maps] == pytest.approx(
        [1753174.8, 948054.96, 319218.36, 95541.586], rel=1e-5)
    assert float(low.double().sum()) == pytest.approx(-53643.07, rel=1e-4)
    assert float(low.double().std(correction=0)) == pytest.approx(2.810804, rel=1e-5)
    np.testing.assert_allclose(low.flatten()[:3], [-3.210499, -5.142020, -4.706251], rtol=1e-4)
    assert float(full.double().sum()) == pytest.approx(-858289.1, rel=1e-4)
    np.testing.assert_allclose(full.argmax(1).flatten(1).sum(1), [23434, 20222], atol=5)


# --------------------------------------------------------------------------------------------------------------- ours

@torch.no_grad()
@pytest.mark.parametrize("name,arguments", [("PanDerm_Base_LP", {}), ("timm:resnet18", {"head": "linear"}),
                                            ("timm:vit_tiny_patch16_224", {"input_size": (32, 64), "nb_classes": 2})])
def test_our_file_comes_back(tmp_path, name: str, arguments: dict) -> None:
    """The same logits, transform, precision and numbers."""
    content = ours(name, **arguments)
    torch.save(content, tmp_path / "checkpoint-best.pth")
    found = load_segmenter(tmp_path / "checkpoint-best.pth")
    assert (found.name, found.epoch, found.amp_dtype, found.transform) == (name, 4, "bf16", "dermino")
    model = create_segmenter(name, "random", **{"input_size": 64, "channels": 8, **arguments})
    model.load_state_dict(content["model"])
    x = torch.randn(2, 3, *model.input_size)
    assert torch.equal(found.model(x), model(x)) and found.data_config == model.provenance.data_config
    assert found.model.provenance.sha256 == found.sha256 == sha256_file(tmp_path / "checkpoint-best.pth")
    assert found.path == Path(tmp_path / "checkpoint-best.pth")


def test_meta_needs_a_name_for_each_output() -> None:
    """And takes the numbers of another transform."""
    model = create_segmenter("PanDerm_Base_LP", "random", input_size=64, channels=8)
    with pytest.raises(ValueError, match="3 class names for 2 outputs"):
        segmenter_meta(model, class_names=("a", "b", "c"), amp_dtype="fp32")
    assert segmenter_meta(model, amp_dtype="fp32", data_config={"mean": [0.5]})["data_config"] == {"mean": [0.5]}


# ----------------------------------------------------------------------------------------------------------- refusals

def edited(change) -> dict:
    """Our file with something changed."""
    content = copy.deepcopy(ours())
    change(content)
    return content


def classifier_file() -> dict:
    model = create_classifier("PanDerm_Base_FT", "random", nb_classes=3, input_size=64)
    return {"model": model.state_dict(), "epoch": 1,
            "meta": classifier_meta(model, class_names="abc", task="multiclass", amp_dtype="fp32")}


def of_width_48() -> dict:
    content = lightning_file()
    content["state_dict"][PREFIX + "backbone.cls_token"] = torch.zeros(1, 1, 48)
    return content


def without_fpn() -> dict:
    content = lightning_file()
    content["state_dict"] = {key: value for key, value in content["state_dict"].items() if "fpn1" not in key}
    return content


@pytest.mark.parametrize("make,message", [
    (classifier_file, r"is a classifier \(PanDerm_Base_FT, 3 classes\), not a segmenter: pass it as --pretrained"),
    (lambda: {"model": create_classifier("PanDerm_Base_FT", "random", nb_classes=3, input_size=64).state_dict(),
              "args": argparse.Namespace(model="PanDerm_Base_FT")}, "classifier of the published code"),
    (lambda: create_backbone("PanDerm_Base_LP", "random").state_dict(), "seems to be a BEiT of width 32 and depth 4, "
                                                                       "without a head"),
    (lambda: {"model": create_classifier("timm:vit_tiny_patch16_224", "random", nb_classes=3).state_dict()},
     "ViT-Ti/16 with a classification head"),
    (of_width_48, "on a backbone of width 48 and depth 24, which is none of PanDerm's"),
    (without_fpn, "neither in this toolkit's nor in PanDerm's published layout"),
    (lambda: {"nothing": 1}, "a file without a model's tensors"),
    (lambda: edited(lambda c: c["meta"].update(format=9)), "of format 9 and this version reads 1"),
    (lambda: edited(lambda c: c["meta"].pop("transform")), "its description lacks transform"),
    (lambda: edited(lambda c: c["meta"]["recipe"].pop("taps")), "its description lacks a whole recipe"),
    (lambda: edited(lambda c: c["meta"]["recipe"].update(backbone={"architecture": "PanDerm_Base_LP", "arguments": {
        "pretrained": True}})), "none of timm"),
    (lambda: edited(lambda c: c["meta"]["recipe"]["backbone"].update(architecture="no_such_net")), "none of timm"),
    (lambda: edited(lambda c: c["meta"].update(class_names=["a"])), "names 1 classes for 2 outputs"),
    (lambda: edited(lambda c: c["meta"]["recipe"]["backbone"]["arguments"].update(wings=2)), "cannot build its model"),
    (lambda: edited(lambda c: c["model"].pop("neck.fpn2.0.bias")), "lacks neck.fpn2.0.bias"),
    (lambda: edited(lambda c: c["model"]["neck.fpn2.0.bias"].fill_(float("nan"))), "NaN or infinity in neck.fpn2.0"),
    (lambda: edited(lambda c: c["model"].update({"backbone.blocks.0.attn.qkv.lora_A.default.weight": torch.ones(1)})),
     "LoRA that is under way")])
def test_other_files_are_named(make, message: str) -> None:
    """A refusal says what the file seems to be, and what to do."""
    with pytest.raises(CheckpointError, match=message):
        segmenter_of(make(), source="file.pth")
