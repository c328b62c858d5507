"""One process or several under ``torchrun``: who am I, and what do the others have.

Every function also works in a single process, where it does nothing.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from furnace.runtime.files import UserError

T = TypeVar("T")
_alone = False  # see ``alone``


def start() -> None:
    """Join the process group when torchrun started this process (it sets RANK and WORLD_SIZE)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))


def stop() -> None:
    """Leave the process group together, after a common end; a process that failed just exits."""
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.1)  # torch 2.4 holds the GIL while it joins gloo's thread, which may still need it for a tensor
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process counts as the only one: what it tries, the others need not try with it."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def is_main() -> bool:
    """True in the process that writes files and logs."""
    return rank() == 0


def on_main(function: Callable[[], T]) -> T:
    """Call ``function`` in the main process alone and give its (picklable) value to every process.

    Raises:
        UserError: the main process raised one; every process raises it, so that all end together.
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_lists(items: list[T]) -> list[T]:
    """Concatenate every process's list, in rank order, in every process."""
    if world_size() == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def share_buffers(module: torch.nn.Module) -> None:
    """Give every process the main process's buffers (batch statistics): they are not averaged while training."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_strided(local: np.ndarray, total: int) -> np.ndarray | None:
    """Put rows together that were dealt out like cards: row ``i`` of the whole lay in process ``i % world_size``.

    Args:
        local: (n_rank, D) float32 rows of this process, in order.
        total: N, the number of rows of the whole.

    Returns:
        (N, D) in the main process, None elsewhere. The main process holds the whole and one process's part at a time.
    """
    size, me = world_size(), rank()
    if size == 1:
        return local
    widths = gather_lists([local.shape[1]])
    if me != 0:
        if len(local):
            dist.send(torch.from_numpy(np.ascontiguousarray(local)), dst=0)
        return None
    whole = np.empty((total, max(widths)), dtype=np.float32)
    whole[0::size] = local
    for source in range(1, size):
        part = torch.empty(len(range(source, total, size)), max(widths))
        if len(part):
            dist.recv(part, src=source)
            whole[source::size] = part.numpy()
    return whole
