"""Does a training step fit into the GPU's memory? Tried before the training, so that no run dies of it later."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.precision import autocast

logger = logging.getLogger(__name__)


def fitting_plan(model: nn.Module, step: Callable[..., Any], make_batch: Callable[[int], Any], plan: BatchPlan,
                 values: dict[str, float], *, device: torch.device, amp_dtype: str) -> BatchPlan:
    """Halve the images of a forward pass, with twice as many passes per update, until forward and backward pass fit.

    The optimiser's two values per trained parameter, and with several processes a third for the exchange of gradients,
    are set aside meanwhile. Weights, buffers and random generators are as before afterwards. All processes get the plan
    of the one with the least memory.

    Args:
        model: in train mode, on the device.
        step: as ``trainer.fit`` calls it.
        make_batch: a batch of so many images of the right size.
        plan: as it was asked for.
        values: of the schedules, for ``step``.
        device: of the model.
        amp_dtype: bf16, fp16 or fp32.
    """
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        while True:
            try:
                _try_step(model, step, make_batch(plan.micro), values, device, amp_dtype)
                break
            except torch.cuda.OutOfMemoryError:
                pass  # outside the handler the failed step's tensors are free
            model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            plan = plan.halved()
            logger.warning("the GPU's memory is too small: going on with %d images a forward pass and %d passes an "
                           "update (the update has the same images)", plan.micro, plan.accumulation)
    model.zero_grad(set_to_none=True)
    for name, value in model.named_buffers():
        value.copy_(buffers[name])
    smallest = min(distributed.gather_lists([plan.micro]))
    while plan.micro > smallest:
        plan = plan.halved()
    return plan


def _try_step(model: nn.Module, step: Callable[..., Any], batch: Any, values: dict[str, float], device: torch.device,
              amp_dtype: str) -> None:
    """One forward and backward pass beside the memory that the optimiser will take."""
    kept = [torch.empty_like(p) for p in model.parameters() if p.requires_grad
            for _ in range(2 + (distributed.world_size() > 1))]
    with autocast(device, amp_dtype), distributed.alone():  # a process that tries again must not wait for the others
        loss, weight, _ = step(model, batch, values)
    (loss / weight).backward()
    del kept
