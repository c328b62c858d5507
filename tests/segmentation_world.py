"""Ways to run a part of segmentation/run.py on a small data set, for the checks of its flags."""

import itertools
import json
import math
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

from furnace import segmentation, training
from furnace.models import panderm
from furnace.models.segmentation_files import load_segmenter
from furnace.models.tuning import merged_state
from furnace.runtime.checkpoints import BEST
from furnace.runtime.trainer import fit
from tiny_segmentation import RUN, command, disc_set

TINY = {"embed_dim": 32, "num_heads": 2}  # of PanDerm's and DermINO's models, their depths kept


class Reached(Exception):  # noqa: N818 - not an error
    """``main`` has come to ``fit``; ``got`` is what it was to get."""

    def __init__(self, got: SimpleNamespace) -> None:
        super().__init__()
        self.got = got


class Undecided(nn.Module):
    """A model that always answers one half; its logits keep a gradient."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 2, H, W) zeros."""
        return torch.zeros(len(images), 2, *images.shape[-2:], requires_grad=True)


class World:
    """8 train, 3 val and 4 test images of discs, a tiny model, and ways to run a part of the script."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any) -> None:
        self.folder, self.monkeypatch, self.capsys, self.caplog = folder, monkeypatch, capsys, caplog
        self.csv, self.count = disc_set(folder / "data"), itertools.count()
        self.main = RUN.main

    def argv(self, words: tuple, options: dict[str, str | None]) -> list[str]:
        """The usual command but for ``options``, a fresh folder, and ``words``."""
        return command(self.folder / f"out{next(self.count)}", *map(str, words), csv=self.csv, **options)

    def table(self, name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
        """The data set's CSV, changed, in a file beside it."""
        path = self.csv.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        change(pd.read_csv(self.csv)).to_csv(path, index=False)
        return path

    def reach(self, *words: Any, **options: str | None) -> SimpleNamespace:
        """What ``fit`` is to get from this command: state, step, evaluate, loader, plan, schedules, run, options.

        Besides, ``asked``: the SegmentationOptions; ``masking``: how val's masks are made (None without val).
        """
        names, seen = ("state", "step", "evaluate", "loader", "plan", "schedules", "run"), {"masking": None}

        def stop(*given: Any, options: Any) -> None:
            raise Reached(SimpleNamespace(**dict(zip(names, given, strict=True)), options=options, **seen))

        self.monkeypatch.setattr(training, "fit", stop)
        with pytest.MonkeyPatch.context() as patch:
            record(patch, segmentation, "make_evaluate", lambda manifest, how: seen.update(masking=how))
            record(patch, RUN, "train_once", lambda *given: seen.update(asked=given[5]))
            with pytest.raises(Reached) as reached:
                self.main(self.argv(words, options))
        return reached.value.got

    def fit(self, got: SimpleNamespace, evaluate: Callable | None = None) -> dict[str, Any]:
        """The training that was to begin."""
        return fit(got.state, got.step, evaluate or got.evaluate, got.loader, got.plan, got.schedules, got.run,
                   options=got.options)

    def tested(self, *words: Any, **options: str | None) -> Path:
        """The run's folder after a command that trains nothing but does all else."""
        def no_training(state: Any, *given: Any, options: Any) -> dict[str, Any]:
            if options.track is not None:
                options.track({"epoch": 0, "update": 3, "train_loss": 1.5})
            best = {"model": merged_state(state.model), "epoch": 0, "meta": options.meta}
            if options.save:
                given[-1].write_tensors(BEST, best)
            return best

        self.monkeypatch.setattr(training, "fit", no_training)
        return self.ran(*words, **options)

    def ran(self, *words: Any, **options: str | None) -> Path:
        """The folder of a command that ended well."""
        argv = self.argv(words, options)
        assert self.main(argv) == 0, self.capsys.readouterr().err
        return Path(argv[len(argv) - argv[::-1].index("--save_name")])

    def refused(self, *words: Any, **options: str | None) -> str:
        """What is said when a command ends with exit code 2."""
        self.capsys.readouterr()
        assert self.main(self.argv(words, options)) == 2
        return self.capsys.readouterr().err

    def evaluated(self, trained: Path, *words: Any) -> Path:
        """The folder of a test of ``trained``'s checkpoint-best.pth."""
        folder = self.ran("--evaluate", "--checkpoint", trained / BEST, *words, size=None, model=None)
        (inside,) = folder.iterdir()
        return inside

    def predicted(self, trained: Path, images: Path, *words: Any) -> Path:
        """The folder of the masks of ``images``."""
        argv = self.argv(("--predict", images, "--checkpoint", trained / BEST, *words),
                         {"size": None, "model": None, "csv_path": None})
        assert self.main(argv) == 0, self.capsys.readouterr().err
        return Path(argv[argv.index("--save_name") + 1]) / f"predict_{images.stem}"


def record(patch: pytest.MonkeyPatch, place: Any, name: str, note: Callable[..., Any]) -> None:
    """Let ``note`` see the arguments of every call of a function."""
    function = getattr(place, name)
    patch.setattr(place, name, lambda *given, **named: (note(*given, **named), function(*given, **named))[1])


def train_disc_model(folder: Path) -> Path:
    """The folder of a short training whose masks differ from image to image."""
    csv = disc_set(folder / "data")
    assert RUN.main(command(folder / "run", "--lr", "0.003", csv=csv, epoch="6")) == 0  # on one thread
    return folder / "run"


def panderm_file(path: Path, form: str = "PanDerm_Base_LP") -> dict[str, torch.Tensor]:
    """Write weights of a small PanDerm, numbers by their names, and return them."""
    model = panderm.__dict__[form](img_size=32, num_classes=0)
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}
    torch.save(state, path)
    return state


def public_set(folder: Path) -> Path:
    """The folder that holds ISIC 2018 as its archives unpack: 6 train, 2 val, 3 test images."""
    csv = disc_set(folder / "discs", train=6, val=2, test=3)
    words = {"train": "Training", "val": "Validation", "test": "Test"}
    for number, row in pd.read_csv(csv).iterrows():
        word, name = words[row["split"]], f"ISIC_{number:07d}"
        for kind, source, ending in (("ISIC2018_Task1-2_{}_Input", row["image"], ".jpg"),
                                     ("ISIC2018_Task1_{}_GroundTruth", row["mask"], "_segmentation.png")):
            target = folder / "public" / kind.format(word) / f"{name}{ending}"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(csv.parent / source).save(target)
    return folder / "public"


def trainable(got: SimpleNamespace) -> set[str]:
    """Names of what the optimiser trains."""
    ids = {id(p) for group in got.state.optimizer.param_groups for p in group["params"]}
    return {name for name, p in got.state.model.named_parameters() if id(p) in ids}


def scales(got: SimpleNamespace, name: str) -> dict[str, float]:
    """A factor of each trained parameter: ``lr_scale`` or ``weight_decay_scale``."""
    of = {id(p): group[name] for group in got.state.optimizer.param_groups for p in group["params"]}
    return {key: of[id(p)] for key, p in got.state.model.named_parameters() if id(p) in of}


def drop_rates(model: nn.Module) -> list[float]:
    """Stochastic depth of each block."""
    return [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.backbone.blocks]


def half_cosine(high: float, low: float, n: int) -> list[float]:
    """n values from ``high`` towards ``low``."""
    return [low + (high - low) * (1 + math.cos(math.pi * i / n)) / 2 for i in range(n)]


def loss_of(got: SimpleNamespace) -> tuple[float, np.ndarray]:
    """An ``Undecided`` model's mean loss over the first batch, and the batch's masks."""
    batch = next(iter(got.loader))
    loss, weight, _ = got.step(Undecided(), batch, {})
    return float(loss.detach()) / weight, batch.masks.numpy()


def masks_of(folder: Path) -> dict[str, np.ndarray]:
    """The masks that were written, by file name."""
    return {path.name: np.asarray(Image.open(path)) > 0 for path in sorted((folder / "masks").rglob("*.png"))}


def parts_of(folder: Path) -> dict[str, Any]:
    """What a run's fingerprint is of."""
    return json.loads((folder / "env.json").read_text())["fingerprint_parts"]


def size_of(path: Path) -> tuple[int, int]:
    """Of a stored segmenter's input."""
    return load_segmenter(path).input_size
