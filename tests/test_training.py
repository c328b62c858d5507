"""The parts of every training: schedules, weight decay, shared batch statistics, freezing."""

import dataclasses
import logging
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from furnace import training
from furnace.models.segmenter import create_segmenter
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import UserError
from furnace.runtime.optim import set_values
from furnace.training import (
    TrainingOptions,
    build_schedules,
    build_state,
    prepare_model,
    settings_of,
    settle_precision,
    share_statistics,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = BatchPlan(micro=2, accumulation=1, world_size=1, steps_per_epoch=7)
PANDERM = {"lr": 1e-4, "min_lr": 0.0, "epochs": 100, "warmup_epochs": 0.0, "weight_decay": 0.05}


def options(**changes: Any) -> TrainingOptions:
    """Settings that do nothing special, but for some."""
    usual = {"tune": "full", "lora_rank": 4, "lora_alpha": 8.0, "batch_size": 2, "update_freq": 1, "epochs": 10,
             "start_epoch": 0, "early_stop": 0, "model_ema": False, "model_ema_decay": 0.9,
             "model_ema_force_cpu": False, "opt": "adamw", "opt_eps": None, "opt_betas": None, "momentum": 0.9,
             "clip_grad": None, "weight_decay": 0.05, "weight_decay_end": None,
             "disable_weight_decay_on_rel_pos_bias": False, "lr": 1e-3, "layer_decay": 1.0, "warmup_lr": 1e-6,
             "min_lr": 1e-6, "warmup_epochs": 1.0, "warmup_steps": -1, "monitor": "dice", "device": "cpu",
             "amp_dtype": "fp32", "compile": False, "grad_checkpointing": False, "num_workers": 0, "pin_mem": False,
             "save_ckpt": False, "save_ckpt_freq": 0, "save_every_steps": 0, "resume": None}
    return TrainingOptions(**{**usual, **changes})


def tiny(name: str = "timm:test_vit", **more: Any) -> nn.Module:
    return create_segmenter(name, "random", input_size=32, channels=8, **more)


# ----------------------------------------------------------------------------------------------------------- schedules

def test_the_published_rates_by_epoch() -> None:
    """PanDerm's: 1e-4, 100 epochs, as PyTorch's CosineAnnealingLR stepped once an epoch; constant within each."""
    rates = build_schedules(options(**PANDERM), PLAN, cosine_by="epoch")["lr"].reshape(100, 7)
    assert (rates == rates[:, :1]).all()
    for epoch, rate in ((0, 1e-4), (1, 9.997533e-5), (50, 5e-5), (99, 2.467198e-8)):
        assert rates[epoch, 0] == pytest.approx(rate, rel=1e-6)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0)
    for epoch in range(100):
        assert rates[epoch, 0] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_rates_by_update() -> None:
    """A line of one epoch from warmup_lr to lr, then half a cosine over what is left, a new value each update."""
    rates = build_schedules(options(), PLAN)["lr"]
    assert len(rates) == 70 and rates[0] == 1e-6 and rates[6] == rates[7] == pytest.approx(1e-3)
    assert np.allclose(np.diff(rates[:7]), (1e-3 - 1e-6) / 6)
    wanted = [1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * i / 63)) / 2 for i in range(63)]
    assert rates[7:] == pytest.approx(wanted) and len(set(rates[8:])) == 62
    stepped = build_schedules(options(warmup_steps=3), PLAN)["lr"]
    assert stepped[:3] == pytest.approx(np.linspace(1e-6, 1e-3, 3)) and stepped[3] == pytest.approx(1e-3)
    with pytest.raises(UserError, match="warm-up of 70 updates"):
        build_schedules(options(warmup_epochs=10.0), PLAN)


def test_weight_decay_and_average() -> None:
    """Constant unless an end is given; the average only when it is asked for."""
    assert set(build_schedules(options(), PLAN)) == {"lr", "weight_decay"}
    assert (build_schedules(options(), PLAN)["weight_decay"] == 0.05).all()
    made = build_schedules(options(weight_decay_end=0.2, model_ema=True, **{**PANDERM, "epochs": 4}), PLAN,
                           cosine_by="epoch")
    assert {name: len(values) for name, values in made.items()} == {"lr": 28, "weight_decay": 28, "ema": 28}
    assert made["weight_decay"][0] == pytest.approx(0.05) and made["weight_decay"][14] == pytest.approx(0.125)
    assert made["ema"][0] == pytest.approx(0.1) and made["ema"].max() <= 0.9


# ----------------------------------------------------------------------------------------------------------- optimiser

def decayed(model: nn.Module, **more: Any) -> dict[str, float]:
    """The weight decay of each trained parameter after ``set_values``."""
    state = build_state(model, options(), PLAN, **more)
    set_values(state.optimizer, {"lr": 1.0, "weight_decay": 0.05})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}


def test_decay_of_weights_or_of_everything() -> None:
    """Biases, norms and positions are spared, or, as in PanDerm's code, not; frozen ones are in no group."""
    model = tiny()
    frozen = "backbone.patch_embed.proj.weight"
    model.get_parameter(frozen).requires_grad = False
    every = {name for name, p in model.named_parameters() if p.requires_grad}
    some = decayed(model)
    assert some.keys() == every and frozen not in some
    spared = {name for name, value in some.items() if value == 0}
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.norm.weight", "decode_head.conv_seg.bias",
            "neck.fpn1.1.weight"} & every <= spared
    assert all(model.get_parameter(name).ndim == 1 or name.split(".")[-1] in ("pos_embed", "cls_token", "reg_token")
               for name in spared)
    assert {value for name, value in some.items() if name not in spared} == {0.05}
    assert decayed(model, decay_all=True) == {name: 0.05 for name in every}


def test_layers_keep_their_rates_when_everything_is_decayed() -> None:
    """--decay_all says nothing of the rates."""
    model = tiny()
    scales = []
    for everything in (False, True):
        state = build_state(model, options(layer_decay=0.5), PLAN, decay_all=everything)
        scales.append({id(p): group["lr_scale"] for group in state.optimizer.param_groups for p in group["params"]})
    assert scales[0] == scales[1] and len(set(scales[0].values())) >= 5 and max(scales[0].values()) == 1


def test_start_epoch_and_average() -> None:
    state = build_state(tiny(), options(start_epoch=3, model_ema=True), PLAN)
    assert (state.epoch, state.update) == (3, 21) and state.ema is not None
    assert build_state(tiny(), options(), PLAN).ema is None


# ---------------------------------------------------------------------------------------------------- shared statistics

def two_processes(monkeypatch) -> None:
    monkeypatch.setattr("furnace.runtime.distributed.world_size", lambda: 2)


class Both(nn.Module):
    """PyTorch's normalisation and timm's with an activation, as EfficientNets have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03))
        self.block = BatchNormAct2d(4, act_layer=nn.ReLU)


def test_gpus_share_their_batch_statistics(monkeypatch) -> None:
    """Both kinds are turned into the one over all processes; keys, values and the optimiser's parameters stay."""
    two_processes(monkeypatch)
    model = Both()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.rand(value.shape).to(value.dtype) + 1)
    before, kept = {key: value.clone() for key, value in model.state_dict().items()}, dict(model.named_parameters())
    share_statistics(model, CUDA)
    assert isinstance(model.stem[1], nn.SyncBatchNorm) and isinstance(model.block, nn.SyncBatchNorm)
    assert (model.stem[1].eps, model.stem[1].momentum) == (1e-3, 0.03)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    model.eval()
    x = torch.randn(2, 4, 3, 3)
    wanted = torch.relu(torch.nn.functional.batch_norm(x, before["block.running_mean"], before["block.running_var"],
                                                       before["block.weight"], before["block.bias"], eps=1e-5))
    torch.testing.assert_close(model.block(x), wanted)


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_efficientnet"])
def test_a_segmenter_s_statistics_are_shared_whole(monkeypatch, name: str) -> None:
    """No normalisation of batches is left in head, pyramid or backbone; a single image is then enough for the head."""
    two_processes(monkeypatch)
    model = tiny(name)
    keys, logits = list(model.state_dict()), model.eval()(torch.ones(1, 3, 32, 32))
    share_statistics(model, CUDA)
    left = [key for key, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and not isinstance(module, nn.SyncBatchNorm)]
    assert not left and list(model.state_dict()) == keys
    torch.testing.assert_close(model.eval()(torch.ones(1, 3, 32, 32)), logits)


def test_elsewhere_a_warning(monkeypatch, caplog) -> None:
    """A CPU's processes keep their own, and the log says so; without such layers, or alone, there is nothing to say."""
    model = tiny()
    kinds = [type(module) for module in model.modules()]
    caplog.clear()  # of the model's making
    with caplog.at_level(logging.WARNING):
        share_statistics(model, CUDA)  # one process
        two_processes(monkeypatch)
        share_statistics(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), CPU)
        assert not caplog.text
        share_statistics(model, CPU)
    assert "on a cpu each process has its own batch statistics" in caplog.text
    assert [type(module) for module in model.modules()] == kinds


# ------------------------------------------------------------------------------------------------ what is trained, once

@pytest.mark.parametrize("tune", ["full", "head", "lora"])
def test_prepare_model_counts_what_is_trained(tune: str) -> None:
    """By the flags of the parameters; the head always, the backbone's own weights only in full."""
    model = tiny()
    own = {name for name, _ in model.named_parameters()}
    count = prepare_model(model, options(tune=tune), seed=0, name="test_vit")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert count == sum(trained.values()) and set(model.classifier_names) <= trained.keys()
    backbone = {name for name in trained if name.startswith("backbone.")}
    if tune == "full":
        assert trained.keys() == own
    elif tune == "head":
        assert not backbone and trained.keys() == set(model.classifier_names)
    else:
        assert backbone and all(".lora_" in name for name in backbone)
        ranks = {p.shape[0] for name, p in model.named_parameters() if ".lora_A" in name}
        assert ranks == {4}


def test_lora_depends_on_its_seed_alone() -> None:
    states = []
    for number, seed in enumerate((5, 5, 6)):
        model = tiny()
        torch.manual_seed(number)
        prepare_model(model, options(tune="lora"), seed=seed, name="test_vit")
        states.append(torch.cat([p.detach().flatten() for name, p in model.named_parameters() if ".lora_A" in name]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_grad_checkpointing() -> None:
    """The same gradients; a network that cannot do it is named."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny()
        prepare_model(model, options(grad_checkpointing=checkpointing), seed=0, name="test_vit")
        assert model.backbone.grad_checkpointing is checkpointing
        model.eval()(torch.ones(2, 3, 32, 32)).square().mean().backward()
        gradients.append(model.get_parameter("backbone.blocks.0.attn.qkv.weight").grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(UserError, match="--grad_checkpointing: timm's VGG cannot do it"):
        prepare_model(timm.create_model("vgg11", num_classes=0, device="meta"), options(grad_checkpointing=True),
                      seed=0, name="VGG")


def test_settings_of_seeds_and_folds() -> None:
    assert settings_of([3], 0) == [{"seed": 3}]
    assert settings_of([3, 1], 0) == [{"seed": 3}, {"seed": 1}]
    assert settings_of([3, 1], 2) == [{"seed": 3, "fold": 0}, {"seed": 3, "fold": 1}, {"seed": 1, "fold": 0},
                                      {"seed": 1, "fold": 1}]


def test_precision_is_settled_once(monkeypatch) -> None:
    """auto is probed at the size of the input; an unfinished run keeps what it had; what is asked for is not probed."""
    probed = []
    monkeypatch.setattr(training, "resolve_amp_dtype", lambda asked, model, device, size: probed.append(
        (asked, model.training, size)) or ("bf16" if asked == "auto" else asked))
    model = tiny().train()
    for asked, previous, wanted in (("auto", {}, "bf16"), ("auto", {"resolved_amp_dtype": "fp32"}, "fp32"),
                                    ("fp16", {"resolved_amp_dtype": "bf16"}, "fp16")):
        run = SimpleNamespace(previous=previous)
        settled = settle_precision(options(amp_dtype=asked), run, model, (32, 48))
        assert settled == dataclasses.replace(options(), amp_dtype=wanted)
    assert probed == [("auto", False, (32, 48)), ("fp32", False, (32, 48)), ("fp16", False, (32, 48))]
