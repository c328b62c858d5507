"""Ways to run a part of run_class_finetuning.py on a small data set, for the checks of its flags."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import run_class_finetuning
from furnace import training
from furnace.models.tuning import merged_state
from furnace.runtime.seeding import seed_all, seeded
from furnace.runtime.trainer import fit
from helpers import small_set

BASE = ["--model", "PanDerm_Base_FT", "--pretrained_checkpoint", "random", "--nb_classes", "3", "--input_size", "32",
        "--batch_size", "4", "--epochs", "2", "--warmup_epochs", "0", "--num_workers", "0", "--amp_dtype", "fp32",
        "--device", "cpu", "--resamples", "100"]  # 12 train images: 3 updates an epoch
GREY = Image.new("RGB", (40, 32), (120, 120, 120))
CLEAN = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(5)) + 1


class Reached(Exception):  # noqa: N818 - not an error
    """``main`` has come to ``fit``; ``got`` is what it was to get."""

    def __init__(self, got: SimpleNamespace) -> None:
        super().__init__()
        self.got = got


class Watcher(nn.Module):
    """A model that keeps its images and always answers the same."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        self.images = images.clone()
        return torch.tensor([[2.0, 0.0, 0.0]]).expand(len(images), -1)


class World:
    """A small data set, a small PanDerm, and ways to run a part of the script."""

    def __init__(self, folder: Path, monkeypatch, capsys, caplog) -> None:
        self.folder, self.monkeypatch, self.capsys, self.caplog = folder, monkeypatch, capsys, caplog
        self.csv, self.count = small_set(folder), itertools.count()

    def argv(self, words: tuple) -> list[str]:
        """The base command, a fresh output folder, and ``words``."""
        return [*BASE, "--csv_path", str(self.csv), "--output_dir", str(self.folder / f"out{next(self.count)}"),
                *map(str, words)]

    def table(self, name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
        """The data set's CSV, changed, in a file beside it."""
        change(pd.read_csv(self.csv)).to_csv(self.folder / name, index=False)
        return self.folder / name

    def reach(self, *words: Any) -> SimpleNamespace:
        """What ``fit`` is to get from this command: state, step, evaluate, loader, plan, schedules, run, options."""
        names = ("state", "step", "evaluate", "loader", "plan", "schedules", "run")

        def stop(*given: Any, options: Any) -> None:
            raise Reached(SimpleNamespace(**dict(zip(names, given, strict=True)), options=options))

        self.monkeypatch.setattr(training, "fit", stop)
        with pytest.raises(Reached) as reached:
            run_class_finetuning.main(self.argv(words))
        return reached.value.got

    def fit(self, got: SimpleNamespace, evaluate: Callable | None = None) -> dict[str, Any]:
        """The training that was to begin."""
        return fit(got.state, got.step, evaluate or got.evaluate, got.loader, got.plan, got.schedules, got.run,
                   options=got.options)

    def tested(self, *words: Any) -> Path:
        """The run's folder after a command that trains nothing but does all else."""
        def no_training(state: Any, *_: Any, options: Any) -> dict[str, Any]:
            if options.track is not None:
                options.track({"epoch": 0, "update": 3, "train_loss": 1.5})
            return {"model": merged_state(state.model), "epoch": 0, "meta": options.meta}

        self.monkeypatch.setattr(training, "fit", no_training)
        argv = self.argv(words)
        assert run_class_finetuning.main(argv) == 0, self.capsys.readouterr().err
        return Path(argv[len(argv) - 1 - argv[::-1].index("--output_dir") + 1])

    def refused(self, *words: Any) -> str:
        """What is said when a command ends with exit code 2."""
        self.capsys.readouterr()
        assert run_class_finetuning.main(self.argv(words)) == 2
        return self.capsys.readouterr().err

    def watched(self, *words: Any, seed: int = 0) -> SimpleNamespace:
        """What the training step gives to a model for twelve images, and its loss."""
        got = self.reach("--batch_size", 12, *words)
        return watch(got, seed)

    def drawn(self, picture: Image.Image, *words: Any, n: int = 8) -> torch.Tensor:
        """(n, 3, H, W): a picture, augmented under n seeds, with colours from 0 to 1."""
        dataset = self.reach(*words).loader.dataset
        return torch.stack([augmented(dataset.transform, picture, i) for i in range(n)])


def watch(got: SimpleNamespace, seed: int = 0) -> SimpleNamespace:
    """One step over a batch of CLEAN with a Watcher."""
    if not hasattr(got, "batch"):
        got.batch = next(iter(got.loader))
    batch, watcher = got.batch, Watcher()
    batch.images = CLEAN[:len(batch.indices)].clone()
    seed_all(seed)
    loss, _, _ = got.step(watcher, batch, {})
    return SimpleNamespace(seen=watcher.images, loss=float(loss),
                           labels=torch.tensor(got.loader.dataset.manifest.labels[batch.indices]))


def augmented(transform: Callable, picture: Image.Image, seed: int) -> torch.Tensor:
    """A transform's output with its normalisation (PanDerm's) undone."""
    with seeded(seed):
        return transform(picture) * torch.tensor([0.228, 0.224, 0.225]).view(3, 1, 1) \
            + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)


def noise_picture() -> Image.Image:
    """Smooth colours, so that resizing matters a little."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 32))


def trainable(got: SimpleNamespace) -> set[str]:
    """Names of what the optimiser trains."""
    ids = {id(p) for group in got.state.optimizer.param_groups for p in group["params"]}
    return {name for name, p in got.state.model.named_parameters() if id(p) in ids}


def rates(got: SimpleNamespace) -> dict[str, float]:
    """Dropout of the first block and before it."""
    model = got.state.model
    return {"positions": model.pos_drop.p, "projection": model.blocks[0].attn.proj_drop.p,
            "mlp": model.blocks[0].mlp.drop2.p, "attention": model.blocks[0].attn.attn_drop.p}


def results_of(folder: Path) -> dict[str, Any]:
    """results.json."""
    return json.loads((folder / "results.json").read_text())


def probabilities(folder: Path, split: str = "test") -> np.ndarray:
    """(N, 3) of a split's CSV."""
    return pd.read_csv(folder / f"{split}.csv").filter(like="probability").to_numpy()
