"""Runs of the README's recipe as processes of their own, killed and resumed; one process and two give the same."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from furnace.runtime.train_state import read_stored
from helpers import ROOT, small_set

TESTS = Path(__file__).resolve().parent
RECIPE = ["--model", "timm:test_vit", "--pretrained_checkpoint", "random", "--nb_classes", "3", "--input_size", "32",
          "--batch_size", "4", "--lr", "5e-4", "--epochs", "4", "--warmup_epochs", "1", "--layer_decay", "0.65",
          "--drop_path", "0.2", "--weight_decay", "0.05", "--mixup", "0.8", "--cutmix", "1.0", "--weights", "--TTA",
          "--model_ema", "--num_workers", "2", "--amp_dtype", "fp32", "--save_every_steps", "2", "--resamples", "100"]


def start(csv: Path, out: Path, *words: str, processes: int = 1, timeout: int = 300, **environment: int) -> int:
    """Run to the end or to the kill; returns the exit code. Output goes to a file beside the run."""
    launcher = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "classification"), str(TESTS)]),
           "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **{key: str(n) for key, n in environment.items()}}
    with open(out.with_suffix(".out"), "a") as file:
        done = subprocess.run([*launcher, str(TESTS / "killing_driver.py"), *RECIPE, "--csv_path", str(csv),
                               "--output_dir", str(out), *words], env=env, stdout=file, stderr=file, timeout=timeout)
    return done.returncode


def final(out: Path) -> dict:
    """What must be equal at the end."""
    stored = read_stored(out / "checkpoint-last.pth")
    best = torch.load(out / "checkpoint-best.pth", weights_only=True)
    for entry in stored["history"]:
        entry.pop("seconds")
    names = ("model", "model_ema", "optimizer", "rng", "epoch", "update", "best", "history")
    kept = {key: stored[key] for key in names}
    return {**kept, "best_model": best["model"], "best_epoch": best["epoch"]}


def assert_same(a, b, where: str = "") -> None:
    """Bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or a != a and b != b, where


@pytest.mark.parametrize("processes, killed", [(1, 4), (2, 3)])
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, processes: int, killed: int) -> None:
    """SIGKILL after random updates and once inside the write of a checkpoint; then the same end, bit for bit."""
    csv = small_set(tmp_path, per_split={"train": 8 * processes, "val": 2, "test": 3})  # 6 updates an epoch
    seed = random.randrange(10**6)
    print("seed", seed)
    assert start(csv, tmp_path / "whole", processes=processes) == 0
    draw, kills = random.Random(seed), 0
    for number in range(killed):
        kill = {"KILL_IN_WRITE": draw.choice([1, 2, 3])} if number == 1 else {"KILL_AFTER": draw.choice([2, 3, 4, 5])}
        print(kill)
        kills += start(csv, tmp_path / "killed", processes=processes, **kill) != 0
    assert kills >= killed - 1
    assert start(csv, tmp_path / "killed", processes=processes) == 0
    assert "continuing after" in (tmp_path / "killed.out").read_text()
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))
    assert not list((tmp_path / "killed").glob(".*.tmp"))
    for name in ("test.csv", "val.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_two_processes_are_one(tmp_path) -> None:
    """The same global batches, without what is random per process: weights to 1e-5, the metrics of val equal.

    And a checkpoint tested by one process and by two gives the same predictions.
    """
    csv = small_set(tmp_path, per_split={"train": 16, "val": 3, "test": 3})
    words = ["--drop_path", "0", "--mixup", "0", "--cutmix", "0"]
    assert start(csv, tmp_path / "one", *words, "--batch_size", "8") == 0
    assert start(csv, tmp_path / "two", *words, "--batch_size", "2", "--update_freq", "2", processes=2) == 0
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    for key, value in one["model"].items():
        assert torch.allclose(value, two["model"][key], rtol=1e-4, atol=1e-5), key
    for mine, other in zip(one["history"], two["history"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
        for name in ("val_acc", "val_bacc", "val_auroc", "val_weighted_f1"):
            assert mine[name] == other[name]
    words = ["--eval", "--resume", str(tmp_path / "one" / "checkpoint-best.pth")]
    assert start(csv, tmp_path / "eval1", *words) == start(csv, tmp_path / "eval2", *words, processes=2) == 0
    folders = [next((tmp_path / name).glob("eval_*")) for name in ("eval1", "eval2")]
    for name in ("val.csv", "test.csv"):  # batches of another size round otherwise on some processors
        pd.testing.assert_frame_equal(*(pd.read_csv(folder / name) for folder in folders), rtol=0, atol=1e-6)
