"""Shared by the tests: goldens, small data sets, and small checkpoints."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
HAM = ROOT.parent / "shared" / "data" / "ham10000_224"

_spec = importlib.util.spec_from_file_location("make_ckpt", GOLDEN / "make_ckpt.py")
make_ckpt = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_ckpt)


def golden_state(keys: str, variant: str = "rng") -> dict:
    """The state dict that the goldens were made with, e.g. ``golden_state("keys_base.json")``."""
    return dict(make_ckpt.build(json.loads((GOLDEN / keys).read_text()), variant))


def draw_images(folder: Path, names: list[str], *, size: tuple[int, int] = (40, 32), seed: int = 0) -> None:
    """Noise images, each another; ``size`` is (width, height)."""
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def write_csv(path: Path, **columns: list) -> Path:
    """A CSV from columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def small_set(folder: Path, *, classes: int = 3, per_split: dict[str, int] | None = None) -> Path:
    """A CSV with images: by default 4 train, 1 val and 2 test images of each class, a patient per image."""
    per_split = per_split or {"train": 4, "val": 1, "test": 2}
    rows = [(f"images/{split}_{k}_{i}.png", k, split) for split, n in per_split.items()
            for k in range(classes) for i in range(n)]
    draw_images(folder, [name for name, _, _ in rows])
    return write_csv(folder / "small.csv", image=[r[0] for r in rows], label=[r[1] for r in rows],
                     split=[r[2] for r in rows], patient_id=[f"P{i}" for i in range(len(rows))])


# -------------------------------------------------------------------------------------------- the README's commands

README, SEGMENTATION, PRETRAINING = ((ROOT / f"{name}.md").read_text() for name in ("README", "Segmentation",
                                                                                     "Pretraining"))
BLOCKS = re.findall(r"```(?:bash|python|shell)\n(.*?)```", README, re.S)


def block_with(text: str, page: str = README) -> str:
    """The page's only code block that contains ``text``."""
    found = [block for block in re.findall(r"```(?:bash|python|shell)\n(.*?)```", page, re.S) if text in block]
    assert len(found) == 1, f"{len(found)} blocks contain {text!r}"
    return found[0]


def words_of(command: str, substitutions: dict[str, str], page: str = README) -> list[str]:
    """The options of the page's only command with this beginning, some words replaced."""
    lines = block_with(command, page).replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith(command)]
    words = shlex.split(line.removeprefix(command.split(".py")[0] + ".py"))
    assert set(substitutions) <= set(words), f"the command has other words: {words}"
    return [substitutions.get(word, word) for word in words]
