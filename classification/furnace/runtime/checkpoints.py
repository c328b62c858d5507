"""The checkpoint files of a training: written whole or not at all, the one before kept, damage found when read.

checkpoint-last.pth is the newest state, checkpoint-previous.pth the one before, checkpoint-best.pth the chosen model.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from furnace.runtime import distributed, files
from furnace.runtime.files import CheckpointError, UserError, read_checkpoint
from furnace.runtime.run_directory import RunDirectory
from furnace.runtime.train_state import TrainState, read_stored

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
            size = sum(v.numel() * v.element_size() for v in state.model.state_dict().values())
            files.check_space(self.folder, size * (12 if state.ema is None else 15))
            return
        state.load_dict(read_stored(found))
        logger.info("continuing after %d epochs and %d updates (%s)", state.epoch, state.update, found.name)

    def _newest(self, elsewhere: Path | None) -> Path | None:
        present = [path for path in (self.folder / LAST, self.folder / PREVIOUS) if path.exists()]
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
        if (self.folder / LAST).exists():
            os.replace(self.folder / LAST, self.folder / PREVIOUS)
        os.replace(self.folder / NEXT, self.folder / LAST)

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
        return read_checkpoint(self.folder / BEST).content

    def kept(self) -> str:
        """In words, what is there after a failure."""
        return f"the last checkpoint, {self.folder / LAST}, is of before" if (self.folder / LAST).exists() else \
            "no checkpoint was written yet"
