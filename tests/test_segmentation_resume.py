"""segmentation/run.py in processes of its own, killed or told to end in mid-epoch; the same command goes on."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from furnace.runtime.train_state import read_stored
from helpers import ROOT
from tiny_finetuning import log_of, one_thread
from tiny_segmentation import command, disc_set, end_of, segment

__all__ = ["one_thread"]  # acts on every test here
TESTS = Path(__file__).resolve().parent
WORDS = ("--model_ema", "--model_ema_decay", "0.9", "--save_every_steps", "2")
OPTIONS = {"workers": "2", "epoch": "3", "drop_path": "0.2", "dropout": "0.1", "lr": "3e-3", "layer_decay": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread) -> tuple[Path, Path]:
    """(CSV, the folder of an uninterrupted run of three epochs of five updates)."""
    folder = tmp_path_factory.mktemp("whole")
    csv = disc_set(folder / "data", train=22)
    assert segment(folder / "run", *WORDS, csv=csv, **OPTIONS) == 0
    assert len(log_of(folder / "run")) == 3 and log_of(folder / "run")[-1]["update"] == 15
    return csv, folder / "run"


def start(csv: Path, out: Path, *words: str, **environment: int) -> int:
    """Run to the end or to the kill; returns the exit code. Output goes to a file beside the run."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "classification"), str(TESTS)]),
           "KILLED_SCRIPT": "segmentation/run.py", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           **{key: str(n) for key, n in environment.items()}}
    with open(out.with_suffix(".out"), "a") as file:
        return subprocess.run([sys.executable, str(TESTS / "killing_driver.py"),
                               *command(out, *WORDS, *words, csv=csv, **OPTIONS)],
                              env=env, stdout=file, stderr=file, timeout=300).returncode


def wait_for_workers(out: Path) -> None:
    """The loader workers of a killed process hold the folder until they see that it is gone, after 5 s at most."""
    end = time.monotonic() + 30
    with open(out / "env.json", "rb") as file:
        while time.monotonic() < end:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)


def test_killed_and_resumed_is_the_uninterrupted_run(whole, tmp_path) -> None:
    """SIGKILL after random updates in mid-epoch and once inside the write of a checkpoint; the same end, bit for bit.

    With loader workers, a moving average and random depth; masks, tables and the chosen weights are compared.
    """
    csv, uncut = whole
    seed = random.randrange(10**6)
    print("seed", seed)
    draw, out = random.Random(seed), tmp_path / "killed"
    for kill in ({"KILL_AFTER": draw.choice([1, 3, 4])}, {"KILL_IN_WRITE": draw.choice([1, 2, 3])},
                 {"KILL_AFTER": draw.choice([1, 2, 3])}):
        print(kill)
        assert start(csv, out, **kill) == -signal.SIGKILL
        assert not (out / "results.json").exists()
    before = read_stored(out / "checkpoint-last.pth")["update"] if (out / "checkpoint-last.pth").exists() else 0
    print("last checkpoint", before)
    wait_for_workers(out)
    assert segment(out, *WORDS, csv=csv, **OPTIONS) == 0
    assert end_of(out) == end_of(uncut)
    last, other = (read_stored(folder / "checkpoint-last.pth") for folder in (out, uncut))
    for name in ("model", "model_ema"):
        assert {key: value.numpy().tobytes() for key, value in last[name].items()} == {
            key: value.numpy().tobytes() for key, value in other[name].items()}
    assert not list(out.glob(".*.tmp")) and before < 15


def test_told_to_end_in_mid_epoch(whole, tmp_path) -> None:
    """SIGTERM within the third update of the second epoch: that update is saved, exit code 143, and it goes on."""
    csv, uncut = whole
    out = tmp_path / "told"
    assert start(csv, out, KILL_AFTER=8, KILL_SIGNAL=signal.SIGTERM) == 143
    told = out.with_suffix(".out").read_text()
    assert "stopped by signal 15; everything so far is saved, and the same command goes on" in told
    assert "Traceback" not in told and not (out / "results.json").exists()
    stored = read_stored(out / "checkpoint-last.pth")
    assert (stored["epoch"], stored["update"]) == (1, 8) and len(log_of(out)) == 1
    assert segment(out, *WORDS, csv=csv, **OPTIONS) == 0
    assert end_of(out) == end_of(uncut)
