"""An entry script in a process that ends itself: after KILL_AFTER updates, or in the KILL_IN_WRITE-th torch.save.

KILLED_SCRIPT is its path below the repository, KILL_SIGNAL the signal (9 unless it is said).
"""

import importlib.util
import os
import signal
import sys

import torch

from furnace.runtime import trainer
from helpers import ROOT

updates, writes = int(os.environ.get("KILL_AFTER", "0")), int(os.environ.get("KILL_IN_WRITE", "0"))
number = int(os.environ.get("KILL_SIGNAL", signal.SIGKILL))
script = ROOT / os.environ.get("KILLED_SCRIPT", "classification/run_class_finetuning.py")
update, save = trainer._Fit._update, torch.save


def die() -> None:
    """As the kernel's out-of-memory killer does it, or a queue."""
    os.kill(os.getpid(), number)


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
spec = importlib.util.spec_from_file_location("killed_script", script)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.exit(module.main())
