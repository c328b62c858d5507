"""The checkpoint files of a training: written whole or not at all, the one before kept, damage found when read.

checkpoint-last.pth is the newest state, checkpoint-previous.pth the one before, checkpoint-best.pth the chosen model.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from furnace.runtime import distributed, files
from furnace.runtime.files import CheckpointError, UserError
from furnace.runtime.run_directory import RunDirectory
from furnace.runtime.train_state import TrainState, read_stored, read_whole

logger = logging.getLogger(__name__)

LAST, PREVIOUS, NEXT, BEST = (f"checkpoint-{name}.pth" for name in ("last", "previous", "next", "best"))


class Checkpoints:
    """The checkpoint files of a run directory. The main process writes; all read."""

    def __init__(self, run: RunDirectory, *, meta: dict[str, Any], keep_every_epochs: int = 0) -> None:
        self.run, self.folder, self.fingerprint = run, run.path, run.fingerprint
        self.meta, self.keep_every = meta, keep_every_epochs

    def resume(self, state: TrainState, elsewhere: Path | None = None) -> None:
        """Bring ``state`` to the newest checkpoint that is whole; remove what a killed process left half-written.

        Args:
            state: as at the start.
            elsewhere: a checkpoint of this very run to take where the folder has none.
        """
        if distributed.is_main():
            for path in self.folder.glob(".checkpoint-*.tmp"):
                path.unlink()
        found = distributed.on_main(lambda: self._newest(elsewhere))
        if found is None:
            files.check_space(self.folder, _bytes_needed(state))
            return
        state.load_dict(read_stored(found))
        if state.best_epoch is not None:
            distributed.on_main(lambda: self._check_best(found.parent / BEST))
        logger.info("continuing after %d epochs and %d updates (%s)", state.epoch, state.update, found.name)

    def _check_best(self, beside: Path) -> None:
        """Bring the best model from beside the checkpoint; what is wrong with it is told now, not at the end."""
        try:
            content = read_whole(beside)
            if beside.parent != self.folder and not (self.folder / BEST).exists():
                self.save_best(content)
        except CheckpointError as error:
            raise UserError(f"{error}: the best epoch's model is lost; copy {BEST} back, or add --overwrite to start "
                            "the run again") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Two processes (a job and its requeued twin) must not train in one folder."""
        with contextlib.ExitStack() as stack:
            distributed.on_main(lambda: stack.enter_context(self.run.lock()))
            yield

    def _newest(self, elsewhere: Path | None) -> Path | None:
        present = [path for path in (self.folder / LAST, self.folder / PREVIOUS) if path.exists()]
        if present and elsewhere is not None:
            logger.info("--resume %s is not read: %s has a newer state", elsewhere, self.folder)
        present = present or [elsewhere] * (elsewhere is not None)
        faults = []
        for path in present:
            try:
                if read_stored(path).get("fingerprint") != self.fingerprint:
                    raise CheckpointError(f"{path} is of another run")
                return path
            except CheckpointError as error:
                faults.append(str(error))
                if path != present[-1]:
                    logger.warning("%s; taking the one before", error)
        if faults:
            remedy = "leave out --resume" if present == [elsewhere] else "add --overwrite to start the run again"
            raise UserError(f"{'; '.join(faults)}: no checkpoint is left to continue from; {remedy}")
        return None

    def save_last(self, state: TrainState) -> None:
        """checkpoint-last.pth; the former one becomes checkpoint-previous.pth, both whole at any moment."""
        if not distributed.is_main():
            return
        self.run.write_tensors(NEXT, {**state.to_dict(), "fingerprint": self.fingerprint, "meta": self.meta})
        try:
            if (self.folder / LAST).exists():
                os.replace(self.folder / LAST, self.folder / PREVIOUS)
            os.replace(self.folder / NEXT, self.folder / LAST)
        except OSError as error:
            raise files.output_error(self.folder / LAST, error) from error

    def save_epoch(self, state: TrainState, best: dict[str, Any] | None) -> None:
        """The best model first: a run that dies in between evaluates this epoch again and writes the same."""
        if not distributed.is_main():
            return
        if best is not None:
            self.save_best(best)
        self.save_last(state)
        if self.keep_every and state.epoch % self.keep_every == 0:
            copy = self.folder / f"checkpoint-{state.epoch}.pth"
            copy.unlink(missing_ok=True)
            try:
                os.link(self.folder / LAST, copy)
            except OSError:  # a file system without links
                shutil.copyfile(self.folder / LAST, copy)

    def save_best(self, best: dict[str, Any]) -> None:
        """checkpoint-best.pth."""
        if distributed.is_main():
            self.run.write_tensors(BEST, best)

    def read_best(self) -> dict[str, Any]:
        """What checkpoint-best.pth holds."""
        return read_whole(self.folder / BEST)

    def kept(self) -> str:
        """In words, what is there after a failure."""
        return f"the last checkpoint, {self.folder / LAST}, is of before" if (self.folder / LAST).exists() else \
            "no checkpoint was written yet"


def _bytes_needed(state: TrainState) -> int:
    """Three files of model, average and the optimiser's two values per trained number, and the best model."""
    def size(module: torch.nn.Module, trained: bool = False) -> int:
        values = [p for p in module.parameters() if p.requires_grad] if trained else module.state_dict().values()
        return sum(value.numel() * value.element_size() for value in values)

    model = size(state.model)
    one = model + 2 * size(state.model, trained=True) + (0 if state.ema is None else model)
    return 3 * one + model
