"""Layer-wise rates, schedules and the published trajectory."""

import json

import numpy as np
import pytest
import timm
import torch

from furnace.models import create_backbone
from furnace.models.tuning import no_weight_decay
from furnace.runtime.files import UserError
from furnace.runtime.optim import cosine_schedule, create_optimizer, ema_schedule, layer_decay_groups, set_values
from helpers import GOLDEN

GROUPS = json.loads((GOLDEN / "layer_decay_groups.json").read_text())


@pytest.mark.parametrize("size,decay", [("Base", 0.65), ("Base", 0.9), ("Large", 0.65), ("Large", 0.9)])
def test_groups_of_the_published_code(size: str, decay: float) -> None:
    """Every parameter's rate and weight decay, and the number of groups."""
    golden = GROUPS[f"{size.lower()}_{decay}"]
    with torch.device("meta"):
        model = timm.create_model(f"PanDerm_{size}_FT", num_classes=6)
    groups = layer_decay_groups(model, layer_decay=decay, no_weight_decay=no_weight_decay(
        model, relative_positions=False))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert found.keys() == golden["params"].keys() and len(groups) == golden["n_groups"]
    for name, wanted in golden["params"].items():
        assert found[name]["lr_scale"] == pytest.approx(wanted["lr_scale"], rel=1e-6), name
        assert 0.05 * found[name]["weight_decay_scale"] == pytest.approx(wanted["weight_decay"], rel=1e-6), name


def test_relative_positions_without_weight_decay() -> None:
    """--disable_weight_decay_on_rel_pos_bias."""
    with torch.device("meta"):
        model = timm.create_model("PanDerm_Base_FT", num_classes=2)
    groups = layer_decay_groups(model, layer_decay=0.9, no_weight_decay=no_weight_decay(model, relative_positions=True))
    names = {id(p): name for name, p in model.named_parameters()}
    without = {names[id(p)] for group in groups if not group["weight_decay_scale"] for p in group["params"]}
    assert sum(name.endswith("relative_position_bias_table") for name in without) == 12


def test_schedules_of_the_published_code() -> None:
    """Warm-up by epochs, by steps, and a constant weight decay."""
    golden = np.load(GOLDEN / "lr_schedule.npz")
    for key, warmup in (("lr_b5e4_m1e6_e50_it10_w10", 100), ("lr_warmup_steps37", 37)):
        np.testing.assert_allclose(cosine_schedule(5e-4, 1e-6, updates=len(golden[key]), warmup=warmup), golden[key],
                                   rtol=1e-6)
    np.testing.assert_allclose(cosine_schedule(0.05, 0.05, updates=500), golden["wd_const"], rtol=1e-6)


def test_schedule_by_hand() -> None:
    """0.1, 0.3, 0.5, then half a cosine of four values to 0.1 from 0.5."""
    wanted = [0.1, 0.3, 0.5] + [0.1 + 0.2 * (1 + c) for c in (1, np.sqrt(0.5), 0, -np.sqrt(0.5))]
    np.testing.assert_allclose(cosine_schedule(0.5, 0.1, updates=7, warmup=3, warmup_start=0.1), wanted, rtol=1e-12)
    with pytest.raises(UserError, match="warm-up of 7 updates leaves none of the 7"):
        cosine_schedule(0.5, 0.1, updates=7, warmup=7)


def test_decay_of_the_average() -> None:
    """0.1 at first, then up to the asked."""
    np.testing.assert_allclose(ema_schedule(0.5, 12), [min(0.5, (1 + t) / (10 + t)) for t in range(12)])


def test_values_reach_the_groups() -> None:
    """lr x lr_scale, weight decay x its scale, and a schedule of another name."""
    weight, bias, last = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = create_optimizer([{"params": [weight], "lr_scale": 0.5, "weight_decay_scale": 1.0},
                                  {"params": [bias], "lr_scale": 0.5, "weight_decay_scale": 0.0},
                                  {"params": [last], "lr_schedule": "last_layer_lr"}])
    set_values(optimizer, {"lr": 0.2, "weight_decay": 0.04, "last_layer_lr": 0.0})
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.04), (0.1, 0.0), (0.0, 0.04)]


def test_optimisers_by_timms_names() -> None:
    """With eps, betas and momentum where they exist; an option that an optimiser lacks is refused, not dropped."""
    def made(**options):
        return create_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))]}], **options)

    adam = made(eps=1e-6, betas=(0.8, 0.95))
    assert type(adam) is torch.optim.AdamW
    assert (adam.param_groups[0]["eps"], adam.param_groups[0]["betas"]) == (1e-6, (0.8, 0.95))
    assert made().param_groups[0]["eps"] == 1e-8
    sgd = made(name="sgd", momentum=0.7)
    assert type(sgd) is torch.optim.SGD and sgd.param_groups[0]["momentum"] == 0.7
    with pytest.raises(UserError, match="--opt sgd has no --opt_betas"):
        made(name="sgd", betas=(0.8, 0.95))


def test_unknown_optimiser() -> None:
    """Named."""
    with pytest.raises(UserError, match="--opt adamx"):
        create_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))]}], name="adamx")


def test_layers_of_a_cnn() -> None:
    """timm's own numbering: stem lowest, classifier at 1."""
    model = timm.create_model("resnet10t", num_classes=3)
    groups = layer_decay_groups(model, layer_decay=0.5)
    scale = {name: group["lr_scale"] for group in groups for p in group["params"]
             for name, q in model.named_parameters() if q is p}
    assert scale["fc.weight"] == 1 and scale["conv1.0.weight"] < scale["layer1.0.conv1.weight"] < \
        scale["layer4.0.conv1.weight"] < 1


def test_create_backbone_keeps_positions_frozen() -> None:
    """Frozen parameters are in no group."""
    model = create_backbone("timm:vit_tiny_patch16_224", "random", input_size=32)
    model.pos_embed.requires_grad = False
    assert all(p is not model.pos_embed for group in layer_decay_groups(model, layer_decay=0.9)
               for p in group["params"])
