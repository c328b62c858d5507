"""The command against the published protocol written out: plain timm Beit, Pillow, torch, and nothing of furnace.

What is compared is the predictions CSV that ``linear_eval.py`` wrote, by file name.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from timm.models.beit import Beit

from helpers import HAM, ROOT, golden_state, make_ckpt

LARGEST_DIFFERENCE = 5e-3


def plain_features(paths: list[Path], state: dict) -> torch.Tensor:
    """(N, 768) class tokens behind the final norm, one image at a time."""
    model = Beit(global_pool="token", num_classes=0, init_values=0.1, use_abs_pos_emb=True, use_rel_pos_bias=False)
    model.load_state_dict(state, strict=True)
    model.eval()
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.228, 0.224, 0.225])
    rows = []
    with torch.no_grad():
        for path in paths:
            image = Image.open(path).convert("RGB")
            w, h = image.size
            short = min(w, h)
            image = image.resize((256 * w // short, 256 * h // short), Image.BILINEAR)
            left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
            pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
            tensor = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None]
            rows.append(model(tensor)[0])
    return torch.stack(rows)


def plain_probe(x: torch.Tensor, y: torch.Tensor) -> torch.nn.Linear:
    """Mean cross-entropy + (1/C) 0.5 ||W||, C = D K / 100, the norm not squared, train only, published L-BFGS.

    In float64: float32 stops where rounding lets it, 0.045 in a probability from the optimum on these features.
    """
    k = len(y.unique())
    c = x.shape[1] * k / 100
    torch.manual_seed(0)
    layer = torch.nn.Linear(x.shape[1], k).double()
    x = x.double()
    optimiser = torch.optim.LBFGS(layer.parameters(), line_search_fn="strong_wolfe", max_iter=1000, history_size=100,
                                  tolerance_grad=1e-7, tolerance_change=1e-9)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(x), y) + 0.5 * layer.weight.norm() / c
        loss.backward()
        return loss

    optimiser.step(closure)
    return layer


def compare(csv: Path, root: Path, checkpoint: Path, output: Path, classes: int, **options: str) -> None:
    """Run the command as a process and the plain protocol here; compare by file name."""
    command = [sys.executable, ROOT / "classification" / "linear_eval.py", "--model", "PanDerm_Base_LP", "--csv_path",
               csv, "--root_path", f"{root}/ ", "--pretrained_checkpoint", checkpoint, "--nb_classes", str(classes),
               "--output_dir", output, "--amp_dtype", "fp32", "--batch_size", "1000"]
    subprocess.run(list(map(str, command)), check=True)
    written = pd.read_csv(next(output.glob("*/*/test.csv")), index_col="filename")
    table = pd.read_csv(csv)
    column = "binary_label" if classes == 2 else "label"
    train = table[table["split"] == "train"].sample(frac=1, random_state=42)
    test = table[table["split"] == "test"]
    state = golden_state("keys_base.json", "sincos")
    layer = plain_probe(plain_features([root / name for name in train["image"]], state),
                        torch.tensor(train[column].tolist()))
    with torch.no_grad():
        logits = layer(plain_features([root / name for name in test["image"]], state).double())
    want = pd.DataFrame(logits.softmax(1).numpy(), index=test["image"])
    assert len(written) == len(test) and set(written.index) == set(test["image"])
    got = written.loc[want.index, [f"probability_class_{k}" for k in range(classes)]].to_numpy()
    assert np.abs(got - want.to_numpy()).max() < LARGEST_DIFFERENCE
    assert (written.loc[test["image"], "true_label"].to_numpy() == test[column].to_numpy()).all()
    assert got.std(axis=0).min() > 0.01, "the comparison says something only where the probabilities vary"


@pytest.fixture(scope="module")
def sincos_checkpoint(tmp_path_factory) -> Path:
    """Base weights with the released files' position table."""
    path = tmp_path_factory.mktemp("weights") / "base.pth"
    torch.save(golden_state("keys_base.json", "sincos"), path)
    return path


@pytest.mark.parametrize("classes", [6, 2])
def test_demo_images(demo_csv: Path, sincos_checkpoint: Path, tmp_path: Path, classes: int) -> None:
    """18 train and 6 test images of the demo set, with all classes."""
    table = pd.read_csv(demo_csv)
    part = pd.concat([group.head(3 if split == "train" else 1) for (split, _), group in
                      table[table["split"] != "val"].groupby(["split", "label"])])
    csv = tmp_path / "part.csv"
    part.to_csv(csv, index=False)
    compare(csv, demo_csv.parent, sincos_checkpoint, tmp_path / "out", classes)


@pytest.mark.slow
@pytest.mark.skipif(not HAM.exists(), reason="the real images are not beside the project")
def test_real_images(sincos_checkpoint: Path, tmp_path: Path) -> None:
    """210 dermoscopy images: 20 train and 10 test of each of seven classes."""
    table = pd.read_csv(HAM / "metadata.csv")
    part = pd.concat([group.head(20 if split == "train" else 10) for (split, _), group in
                      table[table["split"] != "val"].groupby(["split", "label"])])
    assert len(part) == 210
    csv = tmp_path / "ham_part.csv"
    part.to_csv(csv, index=False)
    compare(csv, HAM, sincos_checkpoint, tmp_path / "out", 7)


def test_the_goldens_state_is_what_timm_takes() -> None:
    """The oracle itself: its table of positions is the published one."""
    state = golden_state("keys_base.json", "sincos")
    np.testing.assert_array_equal(state["pos_embed"].numpy(), make_ckpt.sincos(768))
