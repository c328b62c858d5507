"""What is trained in each mode; LoRA learns, and folds into the plain weights."""

import sys

import pytest
import torch
from torch import nn

from furnace.models import create_backbone, panderm
from furnace.models.classifier import add_head, build_again, create_classifier, load_exactly
from furnace.models.tuning import merged_state, no_weight_decay, set_tuning
from furnace.runtime.files import UserError

HEAD = ["head.weight", "head.bias"]


@pytest.fixture(autouse=True)
def small_panderm(monkeypatch) -> None:
    """PanDerm_Base_* of width 32 and depth 2."""
    monkeypatch.setitem(panderm.SIZES, "Base", {"embed_dim": 32, "depth": 2, "num_heads": 2})


def classifier(name: str = "PanDerm_Base_FT", seed: int = 0, **options) -> nn.Module:
    """Of 64 px and 3 classes, with a head that lets gradients through."""
    return create_classifier(name, "random", nb_classes=3, input_size=64, seed=seed, init_scale=50.0, **options)


def images() -> torch.Tensor:
    """Noise."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def train_step(model: nn.Module, rate: float = 0.5) -> None:
    """One step of gradient descent over what is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images()), torch.tensor([0, 2])).backward()
    optimizer.step()


def test_full_trains_all_but_what_the_model_freezes() -> None:
    """PanDerm's sin-cos positions stay frozen, or are trained when asked for."""
    model = classifier()
    names = set_tuning(model, "full")
    assert set(names) == {key for key, _ in model.named_parameters()} - {"pos_embed"}
    assert "pos_embed" in set_tuning(classifier(trainable_positions=True), "full")


def test_head_trains_the_head_alone() -> None:
    """A step moves it and nothing else; a distilled DeiT has two."""
    model = classifier()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert set_tuning(model, "head") == HEAD
    train_step(model)
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == set(HEAD)
    deit = classifier("timm:deit_tiny_distilled_patch16_224")
    assert set_tuning(deit, "head") == [*HEAD, "head_dist.weight", "head_dist.bias"]


LORA = {  # model: (how it is made small, layers with LoRA, one of them)
    "PanDerm_Base_FT": ({}, 8, "blocks.1.attn.qkv"),
    "PanDerm_Base_LP": ({}, 8, "blocks.0.mlp.fc2"),
    "timm:vit_tiny_patch16_224": ({"depth": 2}, 8, "blocks.1.attn.proj"),
    "timm:eva02_tiny_patch14_224": ({"depth": 2, "img_size": 56}, 8, "blocks.0.attn.qkv"),
    "timm:resnet18": ({}, 3, "layer2.0.downsample.0"),
    "timm:mobilenetv3_small_050": ({}, 41, "blocks.1.0.conv_pw"),
    "timm:convnext_atto": ({"depths": [1, 1, 2, 1], "ls_init_value": 0.5}, 10, "stages.2.blocks.1.mlp.fc1"),
}


@pytest.mark.parametrize("name", LORA)
def test_lora_learns_everywhere_and_folds(name: str) -> None:
    """The start is unchanged; after a step every matrix has a gradient and the output differs; merged, it is equal."""
    options, count, place = LORA[name]
    size = options.get("img_size", 64)
    backbone = create_backbone(name, "random", input_size=size, options=options)
    model = add_head(backbone, 3, name=name, init_scale=50.0)
    x = images()[..., :size, :size]
    keys, plain = list(model.state_dict()), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        start = model(x)
    names = set_tuning(model, "lora", rank=4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), start, atol=1e-5, rtol=1e-5)
    lora = [key for key in names if ".lora_" in key]
    assert len(lora) == 2 * count
    assert f"{place}.lora_A.default.weight" in lora and f"{place}.lora_B.default.weight" in lora
    assert set(names) == {*lora, *model.classifier_names}

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # the first matrices learn once the second ones are not zero
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 2])).backward()
        silent = [key for key, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
        optimizer.step()
    assert not silent, silent
    with torch.no_grad():
        trained = model(x)
        for key in model.classifier_names:
            model.get_parameter(key).copy_(plain[key])
        assert (model(x) - start).abs().max() > 1e-3 * start.abs().max()  # through LoRA, not through the head
    load_and_compare(model, keys, plain, x, trained=trained)


def load_and_compare(model: nn.Module, keys: list[str], plain: dict, x: torch.Tensor, *, trained: torch.Tensor) -> None:
    """merged_state has the plain names and gives the logits of the model, which stays as it is."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = merged_state(model)
    assert list(state) == keys and not any(value.requires_grad for value in state.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = build_again(model.recipe)
    load_exactly(again, state, name="", source="")
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), atol=1e-5 * max(1.0, float(trained.abs().max())), rtol=1e-5)
    changed = {key for key in keys if not torch.equal(state[key], plain[key])}
    assert changed and all(key.endswith(".weight") for key in changed - set(model.classifier_names))


def test_scale_is_alpha_over_rank() -> None:
    """The folded weight is W + alpha / rank * B A."""
    model = classifier()
    set_tuning(model, "lora", rank=4, alpha=12)
    layer = model.blocks[0].mlp.fc1
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    want = layer.base_layer.weight + 12 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(merged_state(model)["blocks.0.mlp.fc1.weight"], want)


def test_lora_starts_from_its_seed() -> None:
    """Not from the global generator, which is left alone."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = []
    for seed in (0, 0, 1):
        model = classifier()
        set_tuning(model, "lora", seed=seed)
        first.append(model.blocks[0].attn.qkv.lora_A["default"].weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_without_lora_the_state_is_the_models() -> None:
    """full and head."""
    model = classifier()
    set_tuning(model, "head")
    state = merged_state(model)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_refusals(monkeypatch) -> None:
    """An unknown mode, no place for LoRA, a rank of nothing, peft absent."""
    with pytest.raises(UserError, match="'prompt' is unknown: use full, lora, head"):
        set_tuning(classifier(), "prompt")
    with pytest.raises(UserError, match="LevitDistilled has neither.*--tune full or --tune head"):
        set_tuning(create_classifier("timm:levit_128s", "random", nb_classes=3), "lora")
    with pytest.raises(UserError, match="--lora_rank 0"):
        set_tuning(classifier(), "lora", rank=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[lora\]'"):
        set_tuning(classifier(), "lora")


def test_weight_decay_of_relative_tables() -> None:
    """Decayed as published, or not when asked; positions and class token never."""
    model = classifier()
    tables = {f"blocks.{i}.attn.relative_position_bias_table" for i in (0, 1)}
    assert no_weight_decay(model, relative_positions=False) == {"pos_embed", "cls_token"}
    assert no_weight_decay(model, relative_positions=True) == {"pos_embed", "cls_token"} | tables
    assert no_weight_decay(classifier("timm:resnet18"), relative_positions=True) == set()
    assert no_weight_decay(classifier("timm:vit_tiny_patch16_224"), relative_positions=True) >= {"pos_embed"}
