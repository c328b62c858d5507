"""Runs of run_class_finetuning.py in this process, with a tiny model on drawn images whose class shows."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import run_class_finetuning
from furnace import finetuning_results
from furnace.runtime.train_state import read_stored
from helpers import write_csv

MODEL = "timm:test_vit"
OPTIONS = {"model": MODEL, "pretrained_checkpoint": "random", "nb_classes": "3", "input_size": "32", "batch_size": "6",
           "epochs": "3", "warmup_epochs": "0", "lr": "1e-3", "init_scale": "1", "num_workers": "0", "device": "cpu",
           "amp_dtype": "fp32", "resamples": "100"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Faster for models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch) -> None:
    """Half of the time of such runs; the fixtures of a module draw theirs."""
    monkeypatch.setattr(run_class_finetuning, "plot_learning_curve", lambda *words, **options: None)
    monkeypatch.setattr(finetuning_results, "draw_classification_plots",
                        lambda folder, *words, **options: folder.mkdir(parents=True, exist_ok=True))


def finetune(csv: Path, out: Path, *words: str, **options: str) -> int:
    """``main``; returns the exit code."""
    return run_class_finetuning.main(command(csv, out, *words, **options))


def command(csv: Path, out: Path, *words: str, **options: str) -> list[str]:
    """The words of a command line: the usual options, ``options`` instead of some of them, and more."""
    chosen = {**OPTIONS, **options, "csv_path": str(csv), "output_dir": str(out)}
    return [word for name, value in chosen.items() for word in (f"--{name}", value)] + list(words)


def drawn_set(folder: Path, *, classes: int = 3, train: int = 6, val: int = 4, test: int = 4, seed: int = 0,
              copies: int = 1) -> Path:
    """A CSV with so many noise images of each class, brighter from class to class, ``copies`` of each patient."""
    rng = np.random.default_rng(seed)
    rows = [(f"{split}_{k}_{i}.png", k, split) for split, n in (("train", train), ("val", val), ("test", test))
            for k in range(classes) for i in range(n)]
    (folder / "images").mkdir(parents=True)
    for name, k, _ in rows:
        level = 40 + 120 * k / (classes - 1) + rng.normal(0, 25)
        pixels = np.clip(rng.normal(level, 30, (40, 36, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    return write_csv(folder / "drawn.csv", image=[f"images/{name}" for name, _, _ in rows],
                     label=[k for _, k, _ in rows], split=[split for _, _, split in rows],
                     patient_id=[f"{split}{k}-{i // copies}" for i, (_, k, split) in enumerate(rows)])


def results_of(run: Path) -> dict[str, Any]:
    """results.json."""
    return json.loads((run / "results.json").read_text())


def log_of(run: Path) -> list[dict[str, Any]]:
    """log.txt, without the clock."""
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def probabilities_of(table: pd.DataFrame | Path) -> np.ndarray:
    """(N, K) from a run's CSV."""
    table = pd.read_csv(table) if isinstance(table, Path) else table
    return table.filter(regex="^probability_").to_numpy(float)


def end_of(run: Path) -> dict[str, Any]:
    """What two runs that are the same must end with, to the bit."""
    best = read_stored_weights(run / "checkpoint-best.pth")
    last = read_stored(run / "checkpoint-last.pth")
    return {"best": best, "last": {key: value.numpy().tobytes() for key, value in last["model"].items()},
            "log": log_of(run), **{name: (run / name).read_bytes() for name in ("val.csv", "test.csv")}}


def read_stored_weights(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a chosen model."""
    return {key: value.numpy().tobytes() for key, value in torch.load(path, weights_only=True)["model"].items()}


def values_of(scored: dict[str, Any]) -> dict[str, float]:
    """The metrics of a split in results.json; NaN where one is not defined."""
    return {name: math.nan if entry["value"] is None else entry["value"] for name, entry in scored["metrics"].items()}
