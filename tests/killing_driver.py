"""run_class_finetuning.py in a process that kills itself: KILL_AFTER updates, or in the KILL_IN_WRITE-th torch.save."""

import os
import signal
import sys

import torch

import run_class_finetuning
from furnace.runtime import trainer

updates, writes = int(os.environ.get("KILL_AFTER", "0")), int(os.environ.get("KILL_IN_WRITE", "0"))
update, save = trainer._Fit._update, torch.save


def die() -> None:
    """As the kernel's out-of-memory killer does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def counted_update(self, batches):
    """Dies when the weights have changed and nothing of it is written yet."""
    global updates
    result = update(self, batches)
    updates -= 1
    if updates == 0:
        print("killed after update", self.state.update, flush=True)
        die()
    return result


def counted_save(content, file):
    """Dies with half of the file written."""
    global writes
    writes -= 1
    if writes == 0:
        file.write(b"PK" + bytes(50_000))
        file.flush()
        die()
    save(content, file)


trainer._Fit._update, torch.save = counted_update, counted_save
torch.set_num_threads(1)
sys.exit(run_class_finetuning.main())
