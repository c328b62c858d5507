"""pretraining/run.py in processes of its own, killed or told to end in mid-epoch; the same command goes on (I24)."""

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
from tiny_finetuning import one_thread
from tiny_pretraining import command, drawn_set, end_of, log_of, no_plots, pretrain

__all__ = ["no_plots", "one_thread"]  # act on every test here
TESTS = Path(__file__).resolve().parent
OPTIONS = {"num_workers": "2", "epochs": "3", "drop_path": "0.3", "save_every_steps": "2", "warmup_epochs": "1",
           "prototype_mode": "trainable"}
ENDLESS = {"epoch_length": "7"}  # updates of an epoch, more than a pass has


@pytest.fixture(scope="module")
def csv(tmp_path_factory) -> Path:
    return drawn_set(tmp_path_factory.mktemp("resume") / "data", images=22)


def options_of(csv: Path, **more: str) -> dict:
    return {"csv": csv, "eval_csv": str(csv.parent / "eval.csv"), **OPTIONS, **more}


@pytest.fixture(scope="module")
def whole(csv, tmp_path_factory, one_thread) -> Path:
    """The folder of an uninterrupted run of three epochs of five updates."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(out, **options_of(csv)) == 0
    assert [entry["update"] for entry in log_of(out)] == [5, 10, 15]
    return out


def start(out: Path, options: dict, **environment: int) -> int:
    """Run to the end or to the kill; returns the exit code. Output goes to a file beside the run."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "classification"), str(TESTS)]),
           "KILLED_SCRIPT": "pretraining/run.py", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           **{key: str(n) for key, n in environment.items()}}
    with open(out.with_suffix(".out"), "a") as file:
        return subprocess.run([sys.executable, str(TESTS / "killing_driver.py"), *command(out, **options)],
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


def test_killed_and_resumed_is_the_uninterrupted_run(csv, whole, tmp_path) -> None:
    """SIGKILL after a random update in mid-epoch and inside the write of a checkpoint; the same end, bit for bit.

    With loader workers, random depth and trained prototypes; students, teacher, moments, log and export are compared.
    """
    seed = random.randrange(10**6)
    print("seed", seed)
    draw, out, options = random.Random(seed), tmp_path / "killed", options_of(csv)
    for kill in ({"KILL_AFTER": draw.choice([1, 3, 4])}, {"KILL_IN_WRITE": draw.choice([1, 2, 3])}):
        print(kill)
        assert start(out, options, **kill) == -signal.SIGKILL
        assert not (out / "results.json").exists() and not (out / "teacher").exists()
    before = read_stored(out / "checkpoint-last.pth")["update"] if (out / "checkpoint-last.pth").exists() else 0
    print("last checkpoint", before)
    wait_for_workers(out)
    assert pretrain(out, **options) == 0
    assert end_of(out) == end_of(whole)
    assert not list(out.glob(".*.tmp")) and before < 15


def test_told_to_end_with_an_endless_sampler(csv, tmp_path) -> None:
    """SIGTERM in the second of three epochs of seven updates each, which a pass of 22 images does not have.

    That update is saved, exit code 143, and the same command ends as the uninterrupted run.
    """
    options = options_of(csv, **ENDLESS)
    assert pretrain(tmp_path / "whole", **options) == 0
    assert [entry["update"] for entry in log_of(tmp_path / "whole")] == [7, 14, 21]
    out = tmp_path / "told"
    assert start(out, options, KILL_AFTER=10, KILL_SIGNAL=signal.SIGTERM) == 143
    told = out.with_suffix(".out").read_text()
    assert "stopped by signal 15; everything so far is saved, and the same command goes on" in told
    assert "Traceback" not in told and not (out / "results.json").exists()
    stored = read_stored(out / "checkpoint-last.pth")
    assert (stored["epoch"], stored["update"]) == (1, 10) and len(log_of(out)) == 1
    assert pretrain(out, **options) == 0
    assert end_of(out) == end_of(tmp_path / "whole")


def test_resume_in_another_folder(csv, whole, tmp_path) -> None:
    """--resume takes a paused run's checkpoint to a new folder, which ends alike."""
    assert pretrain(tmp_path / "paused", max_updates="8", **options_of(csv, num_workers="0")) == 0
    out = tmp_path / "moved"
    assert pretrain(out, resume=str(tmp_path / "paused" / "checkpoint-last.pth"), **options_of(csv)) == 0
    assert end_of(out) == end_of(whole)


def test_resume_of_another_run_is_refused(csv, whole, tmp_path, capsys) -> None:
    assert pretrain(tmp_path / "other", resume=str(whole / "checkpoint-last.pth"), **options_of(csv, seed="1")) == 2
    assert "checkpoint-last.pth is of another run" in capsys.readouterr().err
