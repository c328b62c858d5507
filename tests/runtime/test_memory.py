"""Halving until a step fits, played with a step that runs out of memory."""

import pytest
import torch
from torch import nn

from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import UserError
from furnace.runtime.memory import fitting_plan

CPU = torch.device("cpu")


def limited(most: int, seen: list[int]):
    """A step that takes at most so many images."""
    def step(model, batch, values):
        seen.append(len(batch))
        if len(batch) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return model(batch).square().sum() * values["lr"], len(batch), {}
    return step


def test_halves_until_it_fits() -> None:
    """64 -> 16, four times the passes; weights, statistics, gradients and generators are as before."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator, seen = torch.get_rng_state(), []
    plan = fitting_plan(model, limited(20, seen), lambda n: torch.randn(n, 3), BatchPlan(64, 2, 1, 7), {"lr": 0.1},
                        device=CPU, amp_dtype="fp32")
    assert plan == BatchPlan(16, 8, 1, 7) and seen == [64, 32, 16]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


def test_what_fits_stays() -> None:
    """No change, one try."""
    plan, seen = BatchPlan(8, 1, 1, 7), []
    assert fitting_plan(nn.Linear(3, 3), limited(8, seen), lambda n: torch.ones(n, 3), plan, {"lr": 1.0}, device=CPU,
                        amp_dtype="fp32") == plan and seen == [8]


def test_one_image_too_many() -> None:
    """Advice instead of a traceback."""
    with pytest.raises(UserError, match="1 image does not fit into the GPU's memory.*--grad_checkpointing"):
        fitting_plan(nn.Linear(3, 3), limited(0, []), lambda n: torch.ones(n, 3), BatchPlan(4, 1, 1, 7), {"lr": 1.0},
                     device=CPU, amp_dtype="fp32")


def test_the_process_with_the_least_memory_decides(monkeypatch) -> None:
    """All take the smallest pass."""
    monkeypatch.setattr("furnace.runtime.distributed.gather_lists", lambda items: [*items, 4])
    plan = fitting_plan(nn.Linear(3, 3), limited(16, []), lambda n: torch.ones(n, 3), BatchPlan(16, 1, 2, 7),
                        {"lr": 1.0}, device=CPU, amp_dtype="fp32")
    assert plan == BatchPlan(4, 4, 2, 7)


def test_a_trial_asks_nothing_of_other_processes(monkeypatch) -> None:
    """A step's sums over the processes would wait for those that had no need to try again."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("furnace.runtime.distributed.gather_lists", lambda items: items)
    seen = []

    def step(model, batch, values):
        seen.append(distributed.world_size())
        if len(batch) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return model(batch).square().sum(), len(batch), {}

    assert fitting_plan(nn.Linear(3, 3), step, lambda n: torch.ones(n, 3), BatchPlan(8, 1, 2, 7), {"lr": 1.0},
                        device=CPU, amp_dtype="fp32") == BatchPlan(4, 2, 2, 7)
    assert seen == [1, 1] and distributed.world_size() == 2


def test_never_below_the_least() -> None:
    """The head needs two images: one is not tried, and the message says why."""
    seen = []
    with pytest.raises(UserError, match="2 images do not fit into the GPU's memory.*2 are needed"):
        fitting_plan(nn.Linear(3, 3), limited(1, seen), lambda n: torch.ones(n, 3), BatchPlan(8, 1, 1, 7, least=2),
                     {"lr": 1.0}, device=CPU, amp_dtype="fp32")
    assert seen == [8, 4, 2]
    plan = fitting_plan(nn.Linear(3, 3), limited(3, []), lambda n: torch.ones(n, 3), BatchPlan(8, 1, 1, 7, least=2),
                        {"lr": 1.0}, device=CPU, amp_dtype="fp32")
    assert plan == BatchPlan(2, 4, 1, 7, least=2)
