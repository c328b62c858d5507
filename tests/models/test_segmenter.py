"""Segmenters on any backbone: taps, sizes, tuning, layers, and their start."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from furnace.models import create_backbone, panderm
from furnace.models.classifier import create_classifier
from furnace.models.loading import resample_abs_positions
from furnace.models.segmenter import build_segmenter, create_segmenter, default_taps, feature_levels, resize_segmenter
from furnace.models.tuning import merged_state, no_weight_decay, set_tuning
from furnace.runtime.files import UserError
from furnace.runtime.optim import layer_decay_groups

VIT = "timm:vit_tiny_patch16_224"
CNN = "timm:resnet18"
SMALL = {"input_size": 64, "channels": 8}


@pytest.fixture(autouse=True)
def small_panderm(monkeypatch) -> None:
    """PanDerm_Base_* of width 32 and depth 4."""
    monkeypatch.setitem(panderm.SIZES, "Base", {"embed_dim": 32, "depth": 4, "num_heads": 2})


def images(height: int = 64, width: int = 64, n: int = 2) -> torch.Tensor:
    """Noise."""
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """Every parameter moved, so that nothing is zero by its start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# -------------------------------------------------------------------------------------------------------- any backbone

@pytest.mark.parametrize("name,head", [
    (VIT, "upernet"), ("PanDerm_Base_FT", "upernet"), ("PanDerm_Base_FT", "linear"), (CNN, "linear"),
    ("timm:convnext_atto", "upernet"), ("timm:tf_efficientnet_lite0", "upernet"),
    ("timm:tf_efficientnet_lite0", "linear"), ("timm:vit_small_patch14_reg4_dinov2", "linear")])
def test_every_trainable_parameter_learns(name: str, head: str) -> None:
    """Logits at the images' size, and no parameter without a gradient: such stall a distributed training."""
    side = 56 if "14" in name else 64
    model = create_segmenter(name, "random", head=head, nb_classes=3, input_size=side, channels=8).train()
    logits = model(images(side, side))
    assert logits.shape == (2, 3, side, side) and logits.dtype == torch.float32
    logits.square().mean().backward()
    idle = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


@torch.no_grad()
def test_taps_are_normalised_outputs_of_their_blocks() -> None:
    """Each map is the final norm of that block's patch tokens, row by row; the linear head sees the last one."""
    model = shaken(create_segmenter("PanDerm_Base_LP", "random", input_size=(64, 96), channels=8, pyramid=False))
    outputs = {}
    for i, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda _, __, y, i=i: outputs.update({i: y}))
    maps = model.features(images(64, 96))
    for tap, x in zip(model.taps, maps, strict=True):
        tokens = F.layer_norm(outputs[tap][:, 1:], (32,), model.backbone.norm.weight, model.backbone.norm.bias, 1e-6)
        assert x.shape == (2, 32, 4, 6)
        torch.testing.assert_close(x[:, :, 1, 2], tokens[:, 1 * 6 + 2])
    assert model.forward_low(images(64, 96)).shape == (2, 2, 4, 6) and model.neck is None


@torch.no_grad()
def test_linear_logits_are_linear_in_the_backbones_tokens() -> None:
    """From forward_features of the registry's own model, then bilinear without aligned corners."""
    model = create_segmenter(VIT, "random", head="linear", input_size=64, seed=5)
    backbone = create_backbone(VIT, "random", input_size=64, seed=5)
    tokens = backbone.forward_features(images())[:, 1:] / (1 + 1e-5) ** 0.5  # the fresh norm's running variance is 1
    head = model.decode_head.conv_seg
    low = (tokens @ head.weight[:, :, 0, 0].T + head.bias).transpose(1, 2).reshape(2, 2, 4, 4)
    expected = F.interpolate(low, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images()), expected, atol=1e-6, rtol=1e-4)
    assert model.taps == (11,) and model.recipe["channels"] is None


@torch.no_grad()
def test_pooled_forms_norm_their_taps_too(tmp_path) -> None:
    """PanDerm_*_FT keeps the pretrained norm behind the pooling: for segmentation it is before, as in the LP form."""
    torch.manual_seed(1)
    state = create_backbone("PanDerm_Base_LP", "random", input_size=64).state_dict()
    torch.save({key: torch.randn_like(value) * 0.3 for key, value in state.items()}, tmp_path / "pretrained.pth")
    lp, ft = (create_segmenter(f"PanDerm_Base_{form}", tmp_path / "pretrained.pth", **SMALL) for form in ("LP", "FT"))
    assert torch.equal(ft.backbone.norm.weight, lp.backbone.norm.weight) and (lp.backbone.norm.weight != 1).all()
    torch.testing.assert_close(ft(images()), lp(images()), atol=1e-5, rtol=1e-5)


def test_default_taps() -> None:
    """After each quarter; PanDerm's own at depth 24; of a CNN the ends of the last four resolutions."""
    def plain(depth: int) -> list[tuple[int, int, int]]:
        return [(8, 14, 14)] * depth

    assert default_taps(plain(12), head="upernet") == (2, 5, 8, 11)
    assert default_taps(plain(24), head="upernet") == (7, 11, 15, 23)
    assert default_taps(plain(4), head="upernet") == (0, 1, 2, 3)
    assert default_taps(plain(40), head="upernet") == (9, 19, 29, 39)
    assert default_taps(plain(2), head="upernet") == (0, 0, 1, 1)
    stages = [(8, 112, 112), (16, 56, 56), (32, 28, 28), (48, 14, 14), (64, 14, 14), (96, 7, 7)]
    assert default_taps(stages, head="upernet") == (1, 2, 4, 5)
    assert default_taps(stages, head="linear") == (5,)


def test_widths_of_the_published_and_of_others() -> None:
    """PanDerm and DermINO: the backbone's width; else 256; a CNN has no neck and is cut behind its last tap."""
    assert create_segmenter("PanDerm_Base_LP", "random", input_size=64).recipe["channels"] == 32
    model = create_segmenter(CNN, "random", input_size=64, taps=(1, 2))
    assert model.recipe["channels"] == 256 and model.neck is None
    assert [tuple(x.shape) for x in model.features(images())] == [(2, 64, 16, 16), (2, 128, 8, 8)]
    assert not any(key.startswith(("backbone.layer3", "backbone.layer4")) for key in model.state_dict())


def test_drop_path_rises_to_its_rate() -> None:
    """Linear over the blocks, as published."""
    model = create_segmenter("PanDerm_Base_LP", "random", **SMALL, drop_path=0.15)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.backbone.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15])


def test_start_is_seeded_and_leaves_the_generators_alone() -> None:
    """The same seed the same model; another seed another head."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, again, other = (create_segmenter("PanDerm_Base_LP", "random", **SMALL, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True))
    for key in ("decode_head.conv_seg.weight", "decode_head.bottleneck.conv.weight", "neck.fpn2.0.weight"):
        assert not torch.equal(one.state_dict()[key], other.state_dict()[key])
    assert not one.training and one.provenance.weights == "random"


@pytest.mark.parametrize("arguments,message", [
    ({"input_size": 100}, "--size 100 does not suit"),
    ({"input_size": (64, 100)}, "100 is no multiple of its patch size 16; take 96 or 112"),
    ({"input_size": (64, 64), "head": "unet"}, "use upernet or linear"),
    ({"input_size": 64, "taps": (0, 9)}, "it has 4 levels, counted from 0 to 3"),
    ({"input_size": 64, "taps": (3, 1)}, "rising order"),
    ({"input_size": 64, "taps": (1, 3)}, "four levels, but 2 taps"),
    ({"input_size": 64, "nb_classes": 1}, "at least two classes")])
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    """Each with its remedy."""
    with pytest.raises(UserError, match=message):
        create_segmenter("PanDerm_Base_LP", "random", **arguments)


# --------------------------------------------------------------------------------------------------------------- sizes

@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 32)])
def test_positions_are_resampled_once(size: tuple[int, int]) -> None:
    """Bicubic without antialias from the pretrained table to the grid; all else stays."""
    model = create_segmenter("PanDerm_Base_LP", "random", input_size=224, channels=8)
    model.backbone.pos_embed += 0.1 * torch.randn(1, 197, 32)
    other = resize_segmenter(model, size)
    grid = (size[0] // 16, size[1] // 16)
    torch.testing.assert_close(other.backbone.pos_embed, resample_abs_positions(model.backbone.pos_embed, grid, 1))
    assert other(images(*size)).shape == (2, 2, *size) and not other.backbone.pos_embed.requires_grad
    mine, its = model.state_dict(), other.state_dict()
    assert all(torch.equal(mine[key], its[key]) for key in mine if key != "backbone.pos_embed")
    assert other.provenance.data_config["input_size"] == [3, *size] and resize_segmenter(model, 224) is model
    with pytest.raises(ValueError, match="resize them, or the segmenter"):
        other(images(224, 224))


@torch.no_grad()
def test_created_non_square_is_the_resized_square(tmp_path) -> None:
    """From a file at 224: the same as a model of 224 brought to the size."""
    torch.manual_seed(1)
    state = create_backbone("PanDerm_Base_LP", "random").state_dict()
    torch.save({key: torch.randn_like(value) for key, value in state.items()}, tmp_path / "pretrained.pth")
    direct, square = (create_segmenter("PanDerm_Base_LP", tmp_path / "pretrained.pth", input_size=size, channels=8)
                      for size in ((48, 80), 224))
    resized = resize_segmenter(square, (48, 80)).state_dict()
    assert all(torch.equal(value, resized[key]) for key, value in direct.state_dict().items())
    assert direct.recipe["input_size"] == [48, 80] and direct.input_size == (48, 80)


@torch.no_grad()
def test_relative_positions_of_a_rectangle() -> None:
    """PanDerm_*_FT at 64 x 96; from there it cannot go on to another size, and says so."""
    model = create_segmenter("PanDerm_Base_FT", "random", input_size=(64, 96), channels=8)
    assert model.backbone.blocks[0].attn.relative_position_bias_table.shape[0] == 7 * 11 + 3
    assert model(images(64, 96)).shape == (2, 2, 64, 96)
    with pytest.raises(UserError, match="keep that size"):
        resize_segmenter(model, 64)


@torch.no_grad()
def test_convolutions_take_any_size() -> None:
    """A CNN has no table; odd sizes, too."""
    model = create_segmenter(CNN, "random", input_size=(65, 90), channels=8)
    assert model(images(65, 90)).shape == (2, 2, 65, 90) and model(images(40, 33)).shape == (2, 2, 40, 33)


# ------------------------------------------------------------------------------------------------- training and layers

@torch.no_grad()
def test_recipe_builds_it_again() -> None:
    """Plain values; the state dict fits and the logits are the same."""
    for arguments in ({"name": "PanDerm_Base_FT", "taps": (0, 1, 1, 3)}, {"name": CNN, "pool_scales": (1, 4)},
                      {"name": VIT, "head": "linear"}):
        model = shaken(create_segmenter(checkpoint="random", **SMALL, **arguments))
        again = build_segmenter(model.recipe)
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again(images()), model(images()), atol=0, rtol=0)
        assert again.recipe == model.recipe and again.classifier_names == model.classifier_names


@pytest.mark.parametrize("name", ["PanDerm_Base_LP", CNN])
def test_tuning_the_head_leaves_the_backbone(name: str) -> None:
    """Neck and head are trained; nothing of the backbone."""
    model = create_segmenter(name, "random", **SMALL)
    trained = set_tuning(model, "head")
    assert set(trained) == set(model.classifier_names) and not any(key.startswith("backbone.") for key in trained)
    parts = {key.split(".")[0] for key in trained}
    assert parts == ({"decode_head"} if name == CNN else {"decode_head", "neck"})


@pytest.mark.parametrize("name", ["PanDerm_Base_LP", CNN])
def test_lora_learns_and_folds_back(name: str) -> None:
    """LoRA is in the backbone alone, gets a gradient, and its folded weights give the same logits."""
    model = create_segmenter(name, "random", **SMALL)
    plain = model(images())
    trained = set_tuning(model, "lora", rank=2)
    lora = [key for key in trained if ".lora_" in key]
    assert lora and all(key.startswith("backbone.") for key in lora)
    assert set(trained) - set(lora) == set(model.classifier_names)
    torch.testing.assert_close(model(images()), plain)
    model.train()(images()).square().mean().backward()
    assert all(model.get_parameter(key).grad.abs().sum() > 0 for key in lora if ".lora_B." in key)
    with torch.no_grad():
        for key in lora:
            model.get_parameter(key).normal_(std=0.3)
        model.eval()
        merged = build_segmenter(model.recipe)
        merged.load_state_dict(merged_state(model))
        changed = model(images())
        torch.testing.assert_close(merged(images()), changed, atol=1e-5, rtol=1e-4)
        assert (changed - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["PanDerm_Base_LP", VIT, CNN, "timm:convnext_atto"])
def test_layers_are_numbered_as_in_a_classifier(name: str) -> None:
    """Each backbone parameter has a classifier's rate and decay; neck and head have the full rate."""
    def of_each(model: nn.Module) -> dict[str, tuple[float, float]]:
        names = {p: key for key, p in model.named_parameters()}
        exempt = no_weight_decay(model, relative_positions=False)
        return {names[p]: (group["lr_scale"], group["weight_decay_scale"])
                for group in layer_decay_groups(model, layer_decay=0.5, no_weight_decay=exempt)
                for p in group["params"]}

    segmenter = of_each(create_segmenter(name, "random", **SMALL))
    classifier = of_each(create_classifier(name, "random", nb_classes=2, input_size=64))
    ours = {key.removeprefix("backbone."): value for key, value in segmenter.items() if key.startswith("backbone.")}
    heads = [value[0] for key, value in segmenter.items() if not key.startswith("backbone.")]
    assert ours and ours == {key: classifier[key] for key in ours} and set(heads) == {1.0}
    assert len({rate for rate, _ in ours.values()}) > 2
    if "PanDerm" in name:
        assert segmenter["backbone.cls_token"] == (0.5**5, 0.0)
        assert segmenter["backbone.blocks.3.attn.qkv.weight"] == (0.5, 1.0)


def test_autocast_gives_float32_logits() -> None:
    """The loss is computed on float32, whatever the precision of the layers."""
    model = create_segmenter("PanDerm_Base_LP", "random", **SMALL)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, low = model(images()), model.forward_low(images())
    assert logits.dtype == torch.float32 and low.dtype == torch.bfloat16
    np.testing.assert_allclose(logits.numpy(), model(images()).detach().numpy(), atol=0.05)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    """--use_checkpoint trades time for memory, nothing else."""
    gradients = []
    for enable in (False, True):
        model = create_segmenter("PanDerm_Base_LP", "random", **SMALL)
        model.set_grad_checkpointing(enable)
        assert model.backbone.grad_checkpointing is enable
        model(images()).square().mean().backward()
        gradients.append(model.backbone.blocks[1].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


def test_architecture_without_maps_is_refused() -> None:
    """Not every timm model gives them."""
    without = nn.Conv2d(3, 4, 3)
    without.recipe = {"architecture": "some_net"}
    with pytest.raises(UserError, match="some_net gives no feature maps"):
        feature_levels(without, (64, 64))


def test_grids_of_one_number_of_places() -> None:
    """4 x 4 and 2 x 8 patches have tables of one shape, and are not the same places."""
    square = create_segmenter("timm:test_vit", "random", input_size=64, channels=8)
    table = square.backbone.pos_embed[:, 1:].detach()
    wide = resize_segmenter(square, (32, 128)).backbone.pos_embed[:, 1:].detach()
    places = table.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(places, size=(2, 8), mode="bicubic").flatten(2).transpose(1, 2)
    assert wide.shape == table.shape and torch.equal(wide, wanted) and not torch.equal(wide, table)
