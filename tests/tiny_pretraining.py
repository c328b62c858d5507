"""Runs of pretraining/run.py in this process, with a tiny model on drawn images of which half have labels."""

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from furnace import pretraining_results
from furnace.runtime.train_state import read_stored
from helpers import ROOT, write_csv

CONFIGS = ROOT / "pretraining" / "configs"
ONTOLOGY = CONFIGS / "dermatology.csv"
MODEL = "timm:test_vit"  # 6 blocks, width 64, patches of 16
OPTIONS = {"model": MODEL, "pretrained_checkpoint": "random", "ontology": str(ONTOLOGY), "prototypes": "random",
           "global_crops_size": "48", "local_crops_size": "32", "local_crops_number": "2", "head_n_prototypes": "32",
           "head_hidden_dim": "16", "head_bottleneck_dim": "8", "drop_path": "0.1", "batch_size": "4", "epochs": "2",
           "warmup_epochs": "0", "base_lr": "2e-2", "momentum_teacher": "0.9", "warmup_teacher_temp_epochs": "1",
           "freeze_last_layer_epochs": "0", "num_workers": "0", "device": "cpu", "amp_dtype": "fp32"}
WORDS = ("melanoma", "nv", "bkl")  # an id and synonyms of the ontology, which a label may be written as


def load_run() -> ModuleType:
    """pretraining/run.py as a module; three folders of the repository have a run.py."""
    spec = importlib.util.spec_from_file_location("pretraining_run", ROOT / "pretraining" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = load_run()


@pytest.fixture(autouse=True)
def no_plots(monkeypatch) -> None:
    """Most of the time of such runs; the fixtures of a module draw theirs. For a module that imports its name."""
    for name in ("plot_pretraining", "draw_crops", "draw_patch_pca"):
        monkeypatch.setattr(pretraining_results, name, lambda *words, **options: None)


def pretrain(out: Path, *words: str, csv: Path | None = None, **options: str | None) -> int:
    """``main``; returns the exit code."""
    return RUN.main(command(out, *words, csv=csv, **options))


def command(out: Path, *words: str, csv: Path | None = None, **options: str | None) -> list[str]:
    """The words of a command line: the usual options, ``options`` instead of some of them (None: left out), more."""
    chosen = {**OPTIONS, "output_dir": str(out), **({"data_csv": str(csv)} if csv else {}), **options}
    return [word for name, value in chosen.items() if value is not None
            for word in (f"--{name}", *value.split())] + list(words)


def draw(path: Path, kind: int, rng: np.random.Generator) -> None:
    """A noise image of about 60 x 56 px, darker from kind to kind."""
    pixels = rng.normal((190, 130, 70)[kind], 40, (60 + kind, 56, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def drawn_set(folder: Path, *, images: int = 13, labelled: int | None = None, seed: int = 0) -> Path:
    """pretraining.csv with so many images, every other one (or the first ``labelled``) with a label, and eval.csv.

    All are of the source ham10000. eval.csv beside it has six train and six val images of its own, of three classes.
    """
    rng, kinds = np.random.default_rng(seed), [i % 3 for i in range(images)]
    for i, kind in enumerate(kinds):
        draw(folder / "images" / f"{i:02}.png", kind, rng)
    has = [i % 2 == 0 if labelled is None else i < labelled for i in range(images)]
    csv = write_csv(folder / "pretraining.csv", image=[f"images/{i:02}.png" for i in range(images)],
                    labels=[WORDS[kind] if one else "" for kind, one in zip(kinds, has, strict=True)],
                    source=["ham10000"] * images)
    rows = [(f"eval/{split}_{i}.png", i % 3, split) for split in ("train", "val") for i in range(6)]
    for name, kind, _ in rows:
        draw(folder / name, kind, rng)
    names, labels, splits = zip(*rows, strict=True)
    write_csv(folder / "eval.csv", image=list(names), label=list(labels), split=list(splits))
    return csv


def log_of(run: Path) -> list[dict[str, Any]]:
    """log.txt, without the clock."""
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """The bytes of every tensor."""
    return {key: value.contiguous().numpy().tobytes() for key, value in state.items()}


def end_of(run: Path) -> dict[str, Any]:
    """What two runs that are the same must end with, to the bit."""
    last = read_stored(run / "checkpoint-last.pth")
    best = torch.load(run / "checkpoint-best.pth", weights_only=True)
    moments = {f"{number}.{key}": value for number, entry in last["optimizer"]["state"].items()
               for key, value in entry.items()}
    return {"log": log_of(run), "model": bits(last["model"]), "model_ema": bits(last["model_ema"]),
            "optimizer": bits(moments), "best": bits(best["model"]),
            **{f"teacher/{name}": (run / "teacher" / name).read_bytes()
               for name in ("model.safetensors", "heads.safetensors")}}


def stored_of(run: Path) -> dict:
    """checkpoint-last.pth."""
    return read_stored(run / "checkpoint-last.pth")


def best_of(run: Path) -> dict[str, torch.Tensor]:
    """The teacher of checkpoint-best.pth."""
    return torch.load(run / "checkpoint-best.pth", weights_only=True)["model"]


def backbone_in(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone's tensors under their bare names."""
    return {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}


def even_masks(crops: int, grid: tuple[int, int], **_: Any) -> np.ndarray:
    """Two patches of both views of the images at even positions: none in the second of two processes."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    even = (rank + processes * np.arange(crops // 2)) % 2 == 0
    hidden = np.zeros((2, crops // 2, grid[0] * grid[1]), dtype=bool)
    hidden[:, even, 1] = hidden[:, even, 5] = True
    return hidden.reshape(crops, -1)
