"""A training small enough to be worked out: linear regression with dropout noise, by the one loop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.optim import cosine_schedule, create_optimizer, ema_schedule
from furnace.runtime.run_directory import RunDirectory, open_run
from furnace.runtime.seeding import seed_of
from furnace.runtime.train_state import TrainState
from furnace.runtime.trainer import FitOptions, fit


class ToySampler:
    """Draws of an epoch from an update on, all of one process."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan, self.epoch, self.update = plan, 0, 0

    def set_position(self, epoch: int, update: int) -> None:
        self.epoch, self.update = epoch, update

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.plan.draws_per_epoch, generator=torch.Generator().manual_seed(self.epoch))
        return iter(order[self.update * self.plan.per_update:].tolist())


class ToyLoader:
    """Micro-batches (B, 3) -> (B, 1): the target is the sum of the inputs."""

    def __init__(self, plan: BatchPlan) -> None:
        self.sampler, self.plan = ToySampler(plan), plan
        self.inputs = torch.randn(plan.draws_per_epoch, 3, generator=torch.Generator().manual_seed(7))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        drawn = list(self.sampler)
        for at in range(0, len(drawn), self.plan.micro):
            inputs = self.inputs[drawn[at:at + self.plan.micro]]
            yield inputs, inputs.sum(dim=1, keepdim=True)


def toy_step(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], values: dict[str, float]) -> Any:
    """Sum of squared errors, weighted by the number of rows."""
    error = model(batch[0]) - batch[1]
    return error.square().sum(), len(batch[0]), {"rows": float(len(batch[0]))}


def toy_evaluate(model: nn.Module) -> dict[str, float]:
    """Mean absolute distance of the weights from 1; draws a number, as loaders do."""
    torch.rand(())
    model.eval()
    return {"distance": float((model[1].weight.detach() - 1).abs().mean())}


def toy_model(dropout: float = 0.3) -> nn.Module:
    """The same start each time."""
    model = nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.2, -0.1, 0.4]]))
        model[1].bias.zero_()
    return model


def toy_run(folder: Path, **parts: Any) -> RunDirectory:
    """A run directory."""
    return open_run(folder, parts={"toy": 1, **parts}, environment={})


def toy_fit(run: RunDirectory | None = None, *, plan: BatchPlan | None = None, epochs: int = 3, step: Any = toy_step,
            evaluate: Any = toy_evaluate, ema: bool = True, model: nn.Module | None = None, loader: Any = None,
            **options: Any) -> tuple[TrainState, dict[str, Any]]:
    """Fit the toy; returns the state and the best model."""
    plan = plan or BatchPlan(micro=4, accumulation=2, world_size=1, steps_per_epoch=5)
    model = model or toy_model()
    updates = epochs * plan.steps_per_epoch
    schedules = {"lr": cosine_schedule(0.05, 0.001, updates=updates, warmup=2),
                 "weight_decay": cosine_schedule(0.1, 0.2, updates=updates), "ema": ema_schedule(0.9, updates)}
    state = TrainState(model, create_optimizer([{"params": [p for p in model.parameters() if p.requires_grad]}]),
                       ema=ModelEmaV3(model) if ema else None)
    chosen = {"monitor": "distance", "lower_is_better": True} if evaluate else {}
    best = fit(state, step, evaluate, loader or ToyLoader(plan), plan, schedules, run,
               options=FitOptions(**{"epochs": epochs, "seed": 3, "device": torch.device("cpu"), **chosen, **options}))
    return state, best


def digest(state: TrainState) -> int:
    """One number of everything in a state that a resume must bring back."""
    def flat(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {str(key): flat(item) for key, item in value.items()}
        return [flat(item) for item in value] if isinstance(value, list | tuple) else value

    stored = flat(state.to_dict())
    stored["history"] = [{key: value for key, value in entry.items() if key != "seconds"}
                         for entry in stored["history"]]
    return seed_of(str(stored))
