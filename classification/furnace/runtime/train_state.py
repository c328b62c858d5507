"""Everything that a training has learned and drawn so far, as plain values that a file can hold and bring back."""

import copy
import random
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn

from furnace.runtime.files import CheckpointError, read_checkpoint

COUNTERS = ("epoch", "update", "best", "best_epoch", "sums", "history")


@dataclass
class TrainState:
    """What changes while a model is trained.

    Attributes:
        model: without any wrapper.
        optimizer: over the model's trainable parameters.
        ema: the moving average of the model, None for none.
        scaler: of fp16 gradients; None in other precisions.
        epoch: epochs that are finished, their evaluation included.
        update: updates that are done, over all epochs.
        best: monitored value of the best epoch so far, None before the first.
        best_epoch: the number of that epoch, from 0.
        sums: of the unfinished epoch: name -> sum over its updates.
        history: what log.txt says, an entry per finished epoch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None = None
    scaler: torch.amp.GradScaler | None = None
    epoch: int = 0
    update: int = 0
    best: float | None = None
    best_epoch: int | None = None
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def evaluated(self) -> nn.Module:
        """The model whose metrics count: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that a file of it is read without running code."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "model_ema": None if self.ema is None else self.ema.module.state_dict(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "rng": generator_states(), **{name: copy.deepcopy(getattr(self, name)) for name in COUNTERS}}

    def load_dict(self, stored: dict[str, Any]) -> None:
        """Bring back what ``to_dict`` gave.

        Raises:
            CheckpointError: it is of another model or optimiser.
        """
        try:
            self.model.load_state_dict(stored["model"])
            self.optimizer.load_state_dict(stored["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(stored["model_ema"])
            if self.scaler is not None:
                self.scaler.load_state_dict(stored["scaler"])
            set_generator_states(stored["rng"])
            for name in COUNTERS:
                setattr(self, name, stored[name])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError("the checkpoint is of another training "
                                  f"({str(error).splitlines()[0][:200] if str(error) else error!r})") from error


def generator_states() -> dict[str, Any]:
    """Where Python's, NumPy's and PyTorch's generators are."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(),
              "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached]}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: dict[str, Any]) -> None:
    """Bring the generators back to ``generator_states()``."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def read_whole(path: Path) -> Any:
    """The content of a file that torch.save wrote, every byte of it compared with its checksums.

    Raises:
        CheckpointError: absent or damaged.
    """
    content = read_checkpoint(path).content
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if damaged:
        raise CheckpointError(f"{path} is damaged (checksum of {damaged})")
    return content


def read_stored(path: Path) -> dict[str, Any]:
    """Read a file that holds ``TrainState.to_dict()``; see ``read_whole``.

    Raises:
        CheckpointError: absent, damaged, or not such a file.
    """
    content = read_whole(path)
    if not isinstance(content, dict) or not {"model", "optimizer", "rng", *COUNTERS} <= content.keys():
        raise CheckpointError(f"{path} is not a checkpoint of an unfinished training of this toolkit")
    return content
