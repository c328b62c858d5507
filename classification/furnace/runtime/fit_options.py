"""How ``runtime.trainer.fit`` trains, beside state, data and schedules."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class FitOptions:
    """How to train; what the numbers depend on besides state, data and schedules.

    Attributes:
        epochs: of the whole training.
        seed: of the steps' random numbers.
        device: where the model is.
        amp_dtype: bf16, fp16 or fp32.
        clip: largest gradient norm of each clip group (a group's key ``clip_group``; all in one otherwise), or None.
        monitor: the metric of ``evaluate`` by which the best epoch is chosen; None takes the last.
        lower_is_better: of the monitored metric.
        early_stop: end after so many epochs without a better value; 0 never does.
        save: write checkpoints; without them nothing can be resumed, and the best model is in memory only.
        save_every_steps: updates between two checkpoints within an epoch; 0 for none.
        keep_every_epochs: keep checkpoint-<epoch>.pth every so many epochs; 0 keeps none.
        max_updates: pause after this update of the whole training, its schedules unchanged; 0 goes to the end.
        compile: run the model through torch.compile.
        meta: plain values that go into checkpoint-best.pth, so that the file explains itself.
        export: the state dict for checkpoint-best.pth from a model.
        resume: a checkpoint-last.pth of this very run in another folder, to go on from where this folder has none.
        track: called with each epoch's entry of the log.
    """

    epochs: int
    seed: int
    device: torch.device
    amp_dtype: str = "fp32"
    clip: float | None = None
    monitor: str | None = None
    lower_is_better: bool = False
    early_stop: int = 0
    save: bool = True
    save_every_steps: int = 0
    keep_every_epochs: int = 0
    max_updates: int = 0
    compile: bool = False
    meta: dict[str, Any] = field(default_factory=dict)
    export: Callable[[nn.Module], dict[str, torch.Tensor]] = nn.Module.state_dict
    resume: Path | None = None
    track: Callable[[dict[str, Any]], None] | None = None
