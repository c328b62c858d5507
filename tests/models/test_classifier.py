"""Heads on backbones, and the files of fine-tuned classifiers, ours and the published ones."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from furnace.models import create_backbone, panderm
from furnace.models.classifier import classifier_meta, classifier_of, create_classifier, load_classifier
from furnace.runtime.files import CheckpointError, UserError, sha256_file
from helpers import GOLDEN, golden_state, make_ckpt


@pytest.fixture
def small(monkeypatch) -> dict:
    """PanDerm_Base_* of width 32 and depth 2; arguments for 64 px and 4 classes."""
    monkeypatch.setitem(panderm.SIZES, "Base", {"embed_dim": 32, "depth": 2, "num_heads": 2})
    return {"nb_classes": 4, "input_size": 64}


@pytest.fixture
def pretrained(small, tmp_path) -> Path:
    """A pretrained file of the small PanDerm: no head, no relative tables, all tensors noise."""
    torch.manual_seed(1)
    state = create_backbone("PanDerm_Base_LP", "random", input_size=64).state_dict()
    torch.save({key: torch.randn_like(value) * 0.3 for key, value in state.items()}, tmp_path / "pretrained.pth")
    return tmp_path / "pretrained.pth"


def images(side: int = 64, n: int = 2) -> torch.Tensor:
    """Noise."""
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In eval mode."""
    assert not model.training
    return model(x)


# ------------------------------------------------------------------------------------------------------------ making

def test_ft_logits_equal_the_published(base_checkpoint) -> None:
    """PanDerm_Base_FT from the pretrained file, the head filled as for the golden: within 1e-4."""
    model = create_classifier("PanDerm_Base_FT", base_checkpoint, nb_classes=6)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(make_ckpt.fill("head.weight", (6, 768))))
        model.head.bias.copy_(torch.from_numpy(make_ckpt.fill("head.bias", (6,))))
    picture = np.load(GOLDEN / "transformed_png.npy").reshape(1, 3, 224, 224)
    x = torch.from_numpy(np.concatenate([np.load(GOLDEN / "input_randn_2x3x224x224.npy"), picture]))
    np.testing.assert_allclose(run(model, x), np.load(GOLDEN / "logits_ft_base_rng_filledhead.npy"), atol=1e-4, rtol=0)


def test_head_starts_small_from_its_seed(small) -> None:
    """std 0.02 times init_scale, bias zero; the same seed the same head; the global generator is left alone."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    make = {**small, "nb_classes": 500}
    one, again, other, unscaled = (create_classifier("PanDerm_Base_FT", "random", **make, seed=seed, init_scale=scale)
                                   for seed, scale in ((0, 0.001), (0, 0.001), (1, 0.001), (0, 1.0)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.head.weight, again.head.weight) and not torch.equal(one.head.weight, other.head.weight)
    torch.testing.assert_close(one.head.weight, unscaled.head.weight * 0.001)
    assert abs(float(unscaled.head.weight.detach().std()) - 0.02) < 0.0005  # 16,000 draws: the standard error is 0.0001
    assert not one.head.bias.any() and one.classifier_names == ("head.weight", "head.bias")


@pytest.mark.parametrize("name,pool,norm", [("PanDerm_Base_FT", None, "fc_norm"), ("PanDerm_Base_FT", "token", "norm"),
                                            ("PanDerm_Base_LP", "avg", "fc_norm"), ("PanDerm_Base_LP", None, "norm")])
def test_pooling_uses_the_loaded_norm(small, pretrained, name: str, pool: str | None, norm: str) -> None:
    """Token: the LP features, linearly; avg: layer norm, by its formula, of the mean of the patch tokens."""
    model = create_classifier(name, pretrained, **small, pool=pool, init_scale=1.0)
    state = torch.load(pretrained)
    assert torch.equal(model.state_dict()[f"{norm}.weight"], state["norm.weight"])
    x = images()
    features = run(create_backbone("PanDerm_Base_LP", pretrained, input_size=64), x)
    if norm == "fc_norm":
        trunk = create_backbone("PanDerm_Base_LP", pretrained, input_size=64)
        trunk.norm = nn.Identity()
        with torch.no_grad():
            mean = trunk.forward_features(x)[:, 1:].mean(dim=1)
        variance = mean.var(dim=1, keepdim=True, unbiased=False)
        features = (mean - mean.mean(dim=1, keepdim=True)) / (variance + 1e-6).sqrt() * state["norm.weight"]
        features = features + state["norm.bias"]
    torch.testing.assert_close(run(model, x), features @ model.head.weight.T + model.head.bias, atol=1e-4, rtol=1e-4)


def test_dropouts_are_where_they_were_published(small) -> None:
    """drop: positions, projection, MLP; not before the head. Stochastic depth rises linearly from block to block."""
    model = create_classifier("PanDerm_Base_FT", "random", **small, drop=0.1, attn_drop=0.2, drop_path=0.4)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert rates.pop("head_drop") == 0.0
    assert {name.rpartition(".")[2]: rate for name, rate in rates.items()} == {
        "pos_drop": 0.1, "attn_drop": 0.2, "proj_drop": 0.1, "drop1": 0.1, "drop2": 0.1}
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.4)
    assert isinstance(model.blocks[0].drop_path1, nn.Identity)


@pytest.mark.parametrize("name,options,found", [
    ("resnet18", {"drop": 0.3}, {"drop_rate": 0.3}),
    ("vit_tiny_patch16_224", {"drop": 0.3}, {"img_size": 64, "pos_drop_rate": 0.3, "proj_drop_rate": 0.3}),
    ("convnext_atto", {"layer_scale": 0.5, "drop_path": 0.1}, {"ls_init_value": 0.5, "drop_path_rate": 0.1}),
    ("resnet18", {}, {})])
def test_options_find_their_name_in_any_architecture(name: str, options: dict, found: dict) -> None:
    """And what is not asked for is not passed."""
    model = create_classifier(f"timm:{name}", "random", nb_classes=3, input_size=64, **options)
    assert model.recipe == {"architecture": name, "arguments": found, "nb_classes": 3}
    assert run(model, images()).shape == (2, 3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto"])
def test_logits_are_linear_in_the_backbones_features(name: str) -> None:
    """The head sees what create_backbone gives, whatever its width (MobileNet's is not timm's num_features)."""
    model = create_classifier(f"timm:{name}", "random", nb_classes=3, input_size=64, init_scale=10.0)
    backbone = create_backbone(f"timm:{name}", "random", input_size=64)
    weight, bias = (model.get_parameter(key) for key in model.classifier_names)
    features = run(backbone, images())
    assert features.shape[1] == model.num_features
    torch.testing.assert_close(run(model, images()), features @ weight.T + bias, atol=1e-5, rtol=1e-4)


def test_layer_scales_of_the_file_win(small, pretrained, tmp_path) -> None:
    """PanDerm's gammas come from the file; a ViT whose file has none starts at the asked value."""
    model = create_classifier("PanDerm_Base_FT", pretrained, **small, layer_scale=0.5)
    assert torch.equal(model.blocks[1].gamma_2, torch.load(pretrained)["blocks.1.gamma_2"])
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=64).state_dict(), tmp_path / "vit.pth")
    vit = create_classifier("timm:vit_tiny_patch16_224", tmp_path / "vit.pth", **small, layer_scale=0.5)
    assert (vit.blocks[3].ls2.gamma == 0.5).all() and "head.weight" in vit.provenance.report.unexpected
    assert not vit.head.weight.abs().max() > 1e-3  # not the file's 1000 classes


def test_relative_positions_may_be_added_and_left_out(small, pretrained) -> None:
    """Added ones start at zero, so the logits are those without; a biased table changes them."""
    plain, added, without = (create_classifier(name, pretrained, **small, init_scale=1.0, relative_positions=asked)
                             for name, asked in (("PanDerm_Base_LP", None), ("PanDerm_Base_LP", True),
                                                 ("PanDerm_Base_FT", False)))
    tables = [p for key, p in added.named_parameters() if key.endswith("relative_position_bias_table")]
    assert len(tables) == 2 and not any(t.any() for t in tables) and all(t.requires_grad for t in tables)
    torch.testing.assert_close(run(added, images()), run(plain, images()), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        tables[0].normal_(std=3.0)
    assert (run(added, images()) - run(plain, images())).abs().max() > 2e-4
    assert not any("relative" in key for key in without.state_dict())


def test_positions_are_frozen_unless_asked_for(small) -> None:
    """PanDerm's sin-cos table."""
    frozen, trained = (create_classifier("PanDerm_Base_FT", "random", **small, trainable_positions=asked)
                       for asked in (False, True))
    assert not frozen.pos_embed.requires_grad and trained.pos_embed.requires_grad
    assert all(p.requires_grad for key, p in frozen.named_parameters() if key != "pos_embed")


REFUSALS = {
    "drop_path": ("vgg11", {"drop_path": 0.1}, "vgg11 does not take drop_path_rate .--drop_path, 0.1"),
    "attn_drop": ("resnet18", {"attn_drop": 0.1}, "resnet18 does not take attn_drop_rate"),
    "layer_scale": ("resnet18", {"layer_scale": 0.1}, "does not take ls_init_value .--layer_scale_init_value"),
    "relative": ("vit_tiny_patch16_224", {"relative_positions": True}, "does not take use_rel_pos_bias"),
    "no relative": ("resnet18", {"relative_positions": False}, "does not take use_rel_pos_bias"),
    "token": ("resnet18", {"pool": "token"}, "global_pool='token' does not suit resnet18"),
    "positions": ("resnet18", {"trainable_positions": True}, "no table of positions"),
    "classes": ("resnet18", {"nb_classes": 0}, "at least one class"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_options_that_an_architecture_lacks(case: str) -> None:
    """The model and the option are named; none is silently without effect."""
    name, options, words = REFUSALS[case]
    with pytest.raises(UserError, match=words):
        create_classifier(f"timm:{name}", "random", **{"nb_classes": 3, "input_size": 64, **options})


# ----------------------------------------------------------------------------------------------------------- reading

def save(model: nn.Module, path: Path, **more) -> Path:
    """As training does."""
    meta = classifier_meta(model, class_names=["nv", "mel", "bcc", "akiec"], task="multiclass", amp_dtype="bf16",
                           crop_pct=0.9)
    torch.save({"model": model.state_dict(), "meta": meta, "epoch": 7, **more}, path)
    return path


def noisy(model: nn.Module) -> nn.Module:
    """As if trained: every parameter, tables and head too, moved."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name,options", [("PanDerm_Base_FT", {"drop_path": 0.2}),
                                          ("PanDerm_Base_LP", {"relative_positions": True, "pool": "avg"}),
                                          ("timm:mobilenetv3_small_050", {"drop": 0.1})])
def test_our_file_comes_back(small, tmp_path, name: str, options: dict) -> None:
    """The same logits, bit for bit, and all that the file says."""
    model = noisy(create_classifier(name, "random", **small, **options))
    found = load_classifier(save(model, tmp_path / "best.pth"))
    assert torch.equal(run(found.model, images()), run(model, images()))
    assert found.class_names == ("nv", "mel", "bcc", "akiec") and (found.name, found.crop_pct) == (name, 0.9)
    assert (found.task, found.amp_dtype) == ("multiclass", "bf16")
    assert (found.epoch, found.path) == (7, tmp_path / "best.pth")
    assert found.sha256 == sha256_file(tmp_path / "best.pth") == found.model.provenance.sha256
    assert found.model.provenance.data_config == found.data_config == model.provenance.data_config
    assert found.model.recipe == model.recipe


def test_published_file_gives_the_published_logits(tmp_path) -> None:
    """checkpoint-best.pth of 212 tensors with index buffers and a Namespace: the published logits of a golden view."""
    state = golden_state("keys_ft_base.json")
    assert len(state) == 212
    args = argparse.Namespace(model="PanDerm_Base_FT", nb_classes=6, input_size=224, use_cls=False, lr=5e-4)
    torch.save({"model": state, "args": args, "epoch": "best", "optimizer": {"state": {}}, "scaler": {}},
               tmp_path / "best.pth")
    found = load_classifier(tmp_path / "best.pth")
    view = torch.from_numpy(np.load(GOLDEN / "tta_identity_view.npy")).reshape(-1, 3, 224, 224)[:1]
    want = json.loads((GOLDEN / "tta.json").read_text())["identity_view_resize246_crop224_logits"]
    np.testing.assert_allclose(run(found.model, view), want, atol=1e-4, rtol=0)
    assert found.class_names == ("0", "1", "2", "3", "4", "5") and found.epoch == "best"
    assert found.model.provenance.data_config["std"] == [0.228, 0.224, 0.225]


def test_a_state_in_memory(small) -> None:
    """What training hands over, without a file: the digest is that of the tensors."""
    model = noisy(create_classifier("PanDerm_Base_FT", "random", **small))
    meta = classifier_meta(model, class_names=list("abcd"), task="multilabel", amp_dtype="fp32")
    one = classifier_of({"model": model.state_dict(), "meta": meta, "epoch": 3}, source="run")
    again = classifier_of({"model": noisy(model).state_dict(), "meta": meta, "epoch": 3}, source="run")
    assert torch.equal(run(again.model, images()), run(model, images())) and one.task == "multilabel"
    assert len(one.sha256) == 64 and one.sha256 != again.sha256


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_published_form_is_read_from_the_tensors(monkeypatch, tmp_path, pool: str) -> None:
    """--use_cls and --disable_rel_pos_bias, behind DDP's prefix, at the published 224 px."""
    monkeypatch.setitem(panderm.SIZES, "Base", {"embed_dim": 32, "depth": 2, "num_heads": 2})
    model = noisy(create_classifier("PanDerm_Base_FT", "random", nb_classes=3, pool=pool, relative_positions=False))
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()},
                "args": argparse.Namespace(model="PanDerm_Base_FT")}, tmp_path / "best.pth")
    assert torch.equal(run(load_classifier(tmp_path / "best.pth").model, images(224)), run(model, images(224)))


def test_backbone_of_a_fine_tuned_file(small, tmp_path) -> None:
    """create_backbone reads our file; the head is left out and said so."""
    model = noisy(create_classifier("PanDerm_Base_FT", "random", **small))
    backbone = create_backbone("PanDerm_Base_FT", save(model, tmp_path / "best.pth"), input_size=64)
    assert backbone.provenance.report.unexpected == ("head.weight", "head.bias")
    torch.testing.assert_close(run(backbone, images()) @ model.head.weight.T + model.head.bias, run(model, images()))


def test_learned_relative_positions_are_not_dropped_silently(small, tmp_path) -> None:
    """An LP form fine-tuned with them is not the LP form; on request they may go."""
    model = noisy(create_classifier("PanDerm_Base_LP", "random", **small, relative_positions=True))
    path = save(model, tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match="learned relative positions in 2 blocks, which PanDerm_Base_LP lacks"):
        create_backbone("PanDerm_Base_LP", path, input_size=64)
    given = create_backbone("PanDerm_Base_LP", path, input_size=64, options={"use_rel_pos_bias": True})
    assert torch.equal(given.blocks[0].attn.relative_position_bias_table,
                       model.blocks[0].attn.relative_position_bias_table)
    assert create_backbone("PanDerm_Base_LP", path, input_size=64, options={"use_rel_pos_bias": False})


def edit(content: dict, *path: str, value: object) -> dict:
    """Set (or with None delete) a value inside."""
    *way, last = path
    place = content
    for key in way:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


BAD = {
    "a backbone": (lambda c: {k: v for k, v in c["model"].items() if "head" not in k},
                   "no fine-tuned classifier: it seems to be a BEiT of width 32 and depth 2, without a head. "
                   "Pass it as --pretrained_checkpoint"),
    "a bare state dict": (lambda c: c["model"], "BEiT .* with a head, but does not say how it was built"),
    "no tensors": (lambda c: {"epoch": 3}, "a file without a model's tensors"),
    "a tensor less": (lambda c: edit(c, "model", "blocks.1.gamma_1", value=None), "lacks blocks.1.gamma_1"),
    "a tensor more": (lambda c: edit(c, "model", "extra", value=torch.ones(1)), "has extra, which the model lacks"),
    "another shape": (lambda c: edit(c, "model", "head.bias", value=torch.ones(5)), r"head.bias of shape \(5,\), not"),
    "NaN": (lambda c: edit(c, "model", "head.bias", value=torch.full((4,), torch.nan)), "NaN or infinity in head.bias"),
    "a newer format": (lambda c: edit(c, "meta", "format", value=2), "format 2 and this version reads 1"),
    "no class names": (lambda c: edit(c, "meta", "class_names", value=None), "lacks class_names"),
    "too few class names": (lambda c: edit(c, "meta", "class_names", value=["a"]), "names 1 classes for 4 outputs"),
    "a hub model": (lambda c: edit(c, "meta", "recipe", "architecture", value="hf-hub:a/b"), "hf-hub:a/b.* is none of"),
    "another file": (lambda c: edit(c, "meta", "recipe", "arguments", "checkpoint_path", value="x"), "is none of timm"),
    "an unknown argument": (lambda c: edit(c, "meta", "recipe", "arguments", "colour", value=1), "cannot build"),
    "under way": (lambda c: edit(c, "rng", value={}), "newest state of a training, .*take checkpoint-best.pth"),
    "LoRA's own names": (lambda c: edit(c, "model", "blocks.0.attn.qkv.lora_A.default.weight", value=torch.ones(1)),
                         "has blocks.0.attn.qkv.lora_A.default.weight, which the model lacks"),
    "another published model": (lambda c: {"model": c["model"], "args": argparse.Namespace(model="swin")}, "'swin'"),
    "a linear probe": (lambda c: {"model": c["model"], "args": argparse.Namespace(
        model="PanDerm_Base_FT", enable_linear_eval=True)}, "without the final norm"),
    "published without a head": (lambda c: {"model": {k: v for k, v in c["model"].items() if "head" not in k},
                                            "args": argparse.Namespace(model="PanDerm_Base_FT")}, "without a head"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_refused(small, tmp_path, case: str) -> None:
    """With what the file seems to be and what to do."""
    change, words = BAD[case]
    path = save(create_classifier("PanDerm_Base_FT", "random", **small), tmp_path / "best.pth")
    torch.save(change(torch.load(path)), path)
    with pytest.raises(CheckpointError) as error:
        load_classifier(path)
    assert re.search(words, str(error.value), re.S), str(error.value)


def test_meta_is_plain_and_counts_its_classes(small) -> None:
    """JSON takes it; three names for four outputs are a bug of the caller."""
    model = create_classifier("PanDerm_Base_FT", "random", **small, drop_path=0.1)
    meta = classifier_meta(model, class_names=("a", "b", "c", "d"), task="multilabel", amp_dtype="fp32")
    assert json.loads(json.dumps(meta)) == meta
    assert meta["recipe"]["arguments"] == {"img_size": 64, "drop_path_rate": 0.1}
    assert meta["weights_sha256"] == model.provenance.sha256 and meta["data_config"]["input_size"] == [3, 64, 64]
    with pytest.raises(ValueError, match="3 class names for 4"):
        classifier_meta(model, class_names="abc", task="multiclass", amp_dtype="fp32")
