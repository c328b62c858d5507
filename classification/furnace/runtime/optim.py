"""Optimiser, layer-wise learning rates, and the values that change with every update."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from furnace.runtime.files import UserError

Schedules = dict[str, np.ndarray]  # name (lr, weight_decay, ema, ...) -> (updates,) values


def layer_decay_groups(model: nn.Module, *, layer_decay: float, no_weight_decay: Collection[str] = ()) -> list[dict]:
    """Parameter groups after BEiT: the deeper a layer, the lower its learning rate; biases and norms without decay.

    A parameter of layer i of L (0: patches and positions, L: head) has the rate lr * layer_decay^(L - i).

    Args:
        model: a timm model; its ``group_matcher`` numbers the layers. Frozen parameters are in no group.
        layer_decay: 1 gives every layer the same rate.
        no_weight_decay: names of parameters without weight decay, besides those of one dimension.

    Returns:
        Groups with ``params``, ``lr_scale`` and ``weight_decay_scale`` (0 or 1): multipliers of the schedules.
    """
    groups = param_groups_layer_decay(model, weight_decay=1.0, no_weight_decay_list=tuple(no_weight_decay),
                                      layer_decay=layer_decay)
    return [{"params": group["params"], "lr_scale": group.get("lr_scale", 1.0),
             "weight_decay_scale": float(group["weight_decay"])} for group in groups]


def create_optimizer(groups: list[dict[str, Any]], *, name: str = "adamw", momentum: float = 0.9,
                     eps: float | None = None, betas: Sequence[float] | None = None) -> torch.optim.Optimizer:
    """An optimiser of timm's list over parameter groups; learning rate and weight decay come from the schedules.

    Args:
        groups: from ``layer_decay_groups``.
        name: adamw, sgd, lamb, lion, ... (timm's names).
        momentum: of SGD and the like.
        eps: of Adam and the like; None is the optimiser's own (AdamW: 1e-8).
        betas: of Adam and the like; None is the optimiser's own (AdamW: 0.9, 0.999).

    Raises:
        UserError: timm has no such optimiser, or it does not take these options.
    """
    options = {key: value for key, value in (("eps", eps), ("betas", None if betas is None else tuple(betas)))
               if value is not None}
    try:
        made = create_optimizer_v2(groups, opt=name, lr=0.0, weight_decay=0.0, momentum=momentum, **options)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"--opt {name} with these options is none of timm's optimisers ({error}): adamw, sgd, lamb, "
                        "lion, adopt and others are") from error
    dropped = [f"--opt_{key}" for key in options if key not in made.param_groups[0]]
    if dropped:
        raise UserError(f"--opt {name} has no {' and no '.join(dropped)}: leave out what it does not take")
    return made


def set_values(optimizer: torch.optim.Optimizer, values: dict[str, float]) -> None:
    """Give each group the rate and the weight decay of this update.

    A group reads the schedule ``lr`` or the one that it names under ``lr_schedule``, times its ``lr_scale``; weight
    decay likewise times ``weight_decay_scale``.
    """
    for group in optimizer.param_groups:
        group["lr"] = values[group.get("lr_schedule", "lr")] * group.get("lr_scale", 1.0)
        if "weight_decay" in values:
            group["weight_decay"] = values["weight_decay"] * group.get("weight_decay_scale", 1.0)


def cosine_schedule(start: float, end: float, *, updates: int, warmup: int = 0,
                    warmup_start: float = 0.0) -> np.ndarray:
    """A value per update: a straight line from ``warmup_start`` up to ``start``, then half a cosine towards ``end``.

    As published: the line reaches ``start`` at its last update, the cosine begins with it again, and the last value
    lies a little above ``end``.

    Args:
        start: highest value.
        end: lowest value of the cosine.
        updates: N, of the whole training.
        warmup: updates of the line.
        warmup_start: first value of the line.

    Returns:
        (N,) float64.

    Raises:
        UserError: the line is as long as the training.
    """
    if warmup and warmup >= updates:
        raise UserError(f"a warm-up of {warmup} updates leaves none of the {updates} of this training: take a smaller "
                        "--warmup_epochs (or --warmup_steps), or more --epochs")
    line = np.linspace(warmup_start, start, warmup)
    n = updates - warmup
    return np.concatenate([line, [end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / n)) for i in range(n)]])


def ema_schedule(decay: float, updates: int) -> np.ndarray:
    """min(decay, (1 + t) / (10 + t)) for the updates t = 0, 1, ...: short runs, too, forget the untrained head."""
    t = np.arange(updates)
    return np.minimum(decay, (1 + t) / (10 + t))
