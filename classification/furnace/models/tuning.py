"""How much of a classifier is trained: all of it, low-rank changes (LoRA) and the head, or the head alone.

LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, through peft. It goes into the linear
layers of transformer blocks (qkv, proj, fc1, fc2; ConvNeXt's blocks have such too), in other CNNs into the 1x1
convolutions.
"""

import re

import torch
from torch import nn

from furnace.models.loading import RELATIVE_TABLE
from furnace.runtime.files import UserError
from furnace.runtime.seeding import seeded

MODES = ("full", "lora", "head")
IN_BLOCKS = re.compile(r"(?:^|\.)(?:blocks|layers|stages)\.\d+\.(?:.+\.)?(?:qkv|proj|fc1|fc2)$")
ADAPTER = "default"  # peft's name


def set_tuning(model: nn.Module, mode: str, *, rank: int = 8, alpha: float = 16, seed: int = 0) -> list[str]:
    """Choose the parameters that a training changes.

    Args:
        model: from ``create_classifier``; ``lora`` changes it in place, its outputs stay as they are.
        mode: full (all but what the model freezes itself, such as PanDerm's positions), lora or head.
        rank: of LoRA's matrices.
        alpha: LoRA's changes are scaled by alpha / rank.
        seed: of LoRA's first matrices; the second ones start at zero.

    Returns:
        The names of the trainable parameters, in the model's order.

    Raises:
        UserError: unknown mode, no place for LoRA, or peft is not installed.
    """
    if mode not in MODES:
        raise UserError(f"--tune {mode!r} is unknown: use {', '.join(MODES)}")
    if mode == "lora":
        _inject_lora(model, rank=rank, alpha=alpha, seed=seed)
    if mode != "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in model.classifier_names or ".lora_" in name
    if mode == "head":  # its trunk is a fixed function: no dropout of positions, no drop path
        heads = {name.rpartition(".")[0].split(".")[0] for name in model.classifier_names}
        model.stay_eval = tuple(name for name, module in model.named_modules()
                                if name and next(module.parameters(), None) is None and name.split(".")[0] not in heads
                                and "head" not in name)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _inject_lora(model: nn.Module, *, rank: int, alpha: float, seed: int) -> None:
    """Wrap every fitting layer in peft's LoRA; random numbers come from ``seed`` and from nowhere else."""
    if rank < 1:
        raise UserError(f"--lora_rank {rank} is no rank: take 1 or more (8 is usual)")
    places = _lora_places(model)
    if not places:
        raise UserError(f"--tune lora: {type(model).__name__} has neither transformer blocks with linear layers nor "
                        "1x1 convolutions to change: take --tune full or --tune head")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--tune lora needs peft: pip install -e '.[lora]' (or pip install peft)") from error
    for module in model.modules():
        if getattr(module, "q_bias", None) is not None and hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # else timm multiplies by the raw weight and never calls LoRA
    exactly = "|".join(map(re.escape, places))  # a list would match other layers by their endings
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=exactly, lora_dropout=0.0, bias="none")
    with seeded("lora", seed):
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _lora_places(model: nn.Module) -> list[str]:
    """Full names of the layers to wrap: the linear ones of blocks, else 1x1 convolutions.

    Exact types only: subclasses (standardised weights and the like) compute something else from their weight, which
    could not be folded back.
    """
    heads = {name.rpartition(".")[0] for name in model.classifier_names}
    linear = [name for name, module in model.named_modules()
              if type(module) is nn.Linear and IN_BLOCKS.search(name) and name not in heads
              and not _is_bypassed(model, name)]
    return linear or [name for name, module in model.named_modules()
                      if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1
                      and name not in heads]


def _is_bypassed(model: nn.Module, name: str) -> bool:
    """A qkv layer whose raw weight its attention reads, without a switch to have the layer called instead."""
    parent, _, leaf = name.rpartition(".")
    attention = model.get_submodule(parent)
    return leaf == "qkv" and getattr(attention, "q_bias", None) is not None \
        and not hasattr(attention, "qkv_bias_separate")


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict under timm's own names, LoRA's changes added to the weights; the model stays as it is.

    Args:
        model: after ``set_tuning`` in any mode.
    """
    wrapped = {name: module for name, module in model.named_modules()
               if hasattr(module, "base_layer") and hasattr(module, "lora_A")}
    state = {}
    for key, value in model.state_dict().items():
        owner, found, rest = key.partition(".base_layer.")
        if found and owner in wrapped:
            if rest == "weight":
                value = value + wrapped[owner].get_delta_weight(ADAPTER).to(value.dtype)
            state[f"{owner}.{rest}"] = value
        elif ".lora_" not in key:
            state[key] = value
    return state


def no_weight_decay(model: nn.Module, *, relative_positions: bool) -> set[str]:
    """The parameters without weight decay, besides those of one dimension.

    timm's list for the model (class token, positions), but the tables of relative positions are decayed, as published.

    Args:
        model: a timm model.
        relative_positions: leave the tables of relative positions undecayed, too.
    """
    listed = getattr(model, "no_weight_decay", set)()
    names = {name for name in listed if not name.endswith(RELATIVE_TABLE)}
    if relative_positions:
        names |= {name for name, _ in model.named_parameters() if name.endswith(RELATIVE_TABLE)}
    return names
