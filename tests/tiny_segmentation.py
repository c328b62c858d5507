"""Runs of segmentation/run.py in this process, with a tiny model on drawn images whose lesion shows."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from helpers import ROOT, write_csv

MODEL = "timm:test_vit"  # 6 blocks, width 64, patches of 16
OPTIONS = {"model": MODEL, "pretrained": "random", "size": "32", "batch_size": "4", "epoch": "2", "warmup_epochs": "0",
           "channels": "8", "workers": "0", "device": "cpu", "amp_dtype": "fp32", "resamples": "100"}


def load_run() -> ModuleType:
    """segmentation/run.py as a module; three folders of the repository have a run.py."""
    spec = importlib.util.spec_from_file_location("segmentation_run", ROOT / "segmentation" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = load_run()


def segment(out: Path, *words: str, csv: Path | None = None, **options: str | None) -> int:
    """``main``; returns the exit code."""
    return RUN.main(command(out, *words, csv=csv, **options))


def command(out: Path, *words: str, csv: Path | None = None, **options: str | None) -> list[str]:
    """The words of a command line: the usual options, ``options`` instead of some of them (None: left out), more."""
    chosen = {**OPTIONS, "save_name": str(out), **({"csv_path": str(csv)} if csv else {}), **options}
    return [word for name, value in chosen.items() if value is not None
            for word in (f"--{name}", *value.split())] + list(words)


def disc_picture(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 skin with a dark disc somewhere, and its (H, W) bool mask."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    radius = rng.uniform(0.2, 0.35) * min(size)
    centre = rng.uniform(0.4, 0.6, 2) * size
    mask = np.hypot(y - centre[0], x - centre[1]) < radius
    pixels = np.where(mask[..., None], (90, 60, 50), (220, 180, 160)) + rng.normal(0, 12, (height, width, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), mask


def disc_set(folder: Path, *, train: int = 8, val: int = 3, test: int = 4, size: tuple[int, int] = (40, 52),
             seed: int = 0, copies: int = 1) -> Path:
    """masks.csv with so many images of dark discs, sizes differing a little, ``copies`` of each lesion."""
    rng = np.random.default_rng(seed)
    rows = [(split, i) for split, n in (("train", train), ("val", val), ("test", test)) for i in range(n)]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for split, i in rows:
        pixels, mask = disc_picture(rng, (size[0] + i % 3, size[1] + i % 2))
        Image.fromarray(pixels).save(folder / "images" / f"{split}_{i}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{split}_{i}.png")
    return write_csv(folder / "masks.csv", image=[f"images/{split}_{i}.png" for split, i in rows],
                     mask=[f"masks/{split}_{i}.png" for split, i in rows], split=[split for split, _ in rows],
                     lesion_id=[f"{split}{i // copies}" for split, i in rows])


def results_of(run: Path) -> dict[str, Any]:
    """results.json."""
    return json.loads((run / "results.json").read_text())


def end_of(run: Path) -> dict[str, Any]:
    """What two runs that are the same must end with, to the bit."""
    log = [{key: value for key, value in json.loads(line).items() if key != "seconds"}
           for line in (run / "log.txt").read_text().splitlines()]
    weights = torch.load(run / "checkpoint-best.pth", weights_only=True)["model"]
    masks = {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted((run / "masks").rglob("*.png"))}
    return {"log": log, "best": {key: value.numpy().tobytes() for key, value in weights.items()}, "masks": masks,
            **{name: (run / name).read_bytes() for name in ("val.csv", "test.csv")}}


def table_of(run: Path, split: str = "test") -> pd.DataFrame:
    """A run's table of images."""
    return pd.read_csv(run / f"{split}.csv")
