"""The commands of Segmentation.md, flag for flag.

Substitutions: paths become temporary folders, the models a tiny one with random weights; small images, one epoch.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from furnace.data.segmentation_folders import LAYOUTS
from furnace.evaluation.segmentation_metrics import NAMES
from furnace.segmentation import RECIPES
from furnace.segmentation_arguments import segmentation_parser
from helpers import ROOT, SEGMENTATION, block_with, words_of
from tiny_segmentation import MODEL, RUN, disc_picture, disc_set, results_of, segment

MORE = ["--channels", "8", "--workers", "0", "--amp_dtype", "fp32", "--resamples", "100", "--device", "cpu"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def isic(tmp_path_factory) -> Path:
    """ISIC 2018 in its archives' folders, and PH2."""
    base, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for word, count in {"Training": 4, "Validation": 2, "Test": 2}.items():
        for i in range(count):
            draw_pair(base / f"ISIC2018_Task1-2_{word}_Input" / f"ISIC_{word}{i}.jpg",
                      base / f"ISIC2018_Task1_{word}_GroundTruth" / f"ISIC_{word}{i}_segmentation.png", rng)
    for i in range(6):
        name = f"IMD{i:03d}"
        folder = base / "PH2 Dataset images" / name
        images, masks = (folder / f"{name}_{part}" for part in ("Dermoscopic_Image", "lesion"))
        draw_pair(images / f"{name}.bmp", masks / f"{name}_lesion.bmp", rng)
    return base


def draw_pair(image: Path, mask: Path, rng: np.random.Generator) -> None:
    """An image and its mask."""
    pixels, lesion = disc_picture(rng, (40, 52))
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(image)
    Image.fromarray(lesion.astype(np.uint8) * 255).save(mask)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A CSV, and a run on it."""
    folder = tmp_path_factory.mktemp("page")
    csv = disc_set(folder / "data")
    assert segment(folder / "RUN", csv=csv, epoch="1") == 0
    return csv, folder / "RUN"


def test_demo_command(demo_csv, tmp_path) -> None:
    """With a tiny backbone and the small demo set."""
    words = words_of("python3 segmentation/run.py --csv_path demo_data", {
        "demo_data/synthetic_lesions.csv": str(demo_csv), "demo": MODEL, "5": "2",
        "output_dir/segmentation/demo": str(tmp_path / "run")}, SEGMENTATION)
    assert RUN.main([*words, "--pretrained", "random", "--size", "32", *MORE[2:]]) == 0
    results = results_of(tmp_path / "run")
    assert results["head"] == "linear" and set(results["splits"]["test"]["metrics"]) == set(NAMES)


def test_any_backbone_command(isic, tmp_path) -> None:
    """ISIC 2018's folders; --size is honoured."""
    words = words_of("python3 segmentation/run.py --dataset ISIC2018", {
        "/path/to/data": str(isic), "PanDerm_Base_LP": MODEL, "384": "48",
        "pretrain_weight/panderm_bb_data6_checkpoint-499.pth": "random",
        "output_dir/segmentation/isic2018_base": str(tmp_path / "run")}, SEGMENTATION)
    assert RUN.main([*words, *MORE, "--epoch", "1", "--warmup_epochs", "0", "--batch_size", "2"]) == 0
    assert results_of(tmp_path / "run")["input_size"] == [48, 48]
    assert len(list((tmp_path / "run" / "masks").glob("ISIC_Test?_segmentation.png"))) == 2


def test_published_command(isic, tmp_path) -> None:
    """run.sh as a real process, with the published recipe's numbers and what is passed on to it."""
    command = block_with("bash run.sh", SEGMENTATION)
    command = command.replace("/path/to/panderm_ll_data6_checkpoint-499.pth", "random").replace(
        "/path/to/data", f"'{isic}'").strip()
    command += (f" --model {MODEL} --size 32 --epoch 1 --taps 0 1 2 3 {' '.join(MORE)} --save_results "
                f"--save_name '{tmp_path}/run'")
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHON": sys.executable,
                               "PYTHONPATH": str(ROOT / "classification"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "run")
    assert results["recipe"] == "panderm" and results["plan"]["micro"] == 2 and results["data_set"] == "ISIC2018"
    assert len(list((tmp_path / "run" / "overlays").iterdir())) == 2


def test_evaluation_commands(trained, isic) -> None:
    """--evaluate with views and cleaning; an external set, every image of it."""
    csv, run = trained
    words = words_of("python3 segmentation/run.py --csv_path DATA", {"DATA/masks.csv": str(csv), "RUN": str(run)},
                     SEGMENTATION)
    assert RUN.main([*words, *MORE[2:]]) == 0
    words = words_of("python3 segmentation/run.py --dataset PH2", {
        "/path/to/data": str(isic), "RUN": str(run), "RUN/checkpoint-best.pth": str(run / "checkpoint-best.pth")},
        SEGMENTATION)
    assert RUN.main([*words, *MORE[2:]]) == 0
    found = {results["data_set"]: results for results in map(results_of, run.glob("eval_*"))}
    assert found["masks"]["tta"] == "4 flips and sizes x 1, 0.75, 1.25" and found["masks"]["largest_component"]
    assert found["PH2"]["splits"]["test"]["n"] == 6 and "val" not in found["PH2"]["splits"]


def test_prediction_command_and_code(trained, tmp_path, monkeypatch) -> None:
    """--predict, and the lines of Python."""
    csv, run = trained
    (tmp_path / "photographs").symlink_to(csv.parent / "images")
    words = words_of("python3 segmentation/run.py --save_name RUN --predict", {
        "RUN": str(run), "/path/to/photographs": str(csv.parent / "images")}, SEGMENTATION)
    assert RUN.main([*words, "--workers", "0", "--device", "cpu"]) == 0
    table = pd.read_csv(run / "predict_images" / "predictions.csv")
    assert table.columns.tolist() == ["filename", "mask", "height", "width", "lesion_pixels", "lesion_share"]
    code = block_with("load_segmenter", SEGMENTATION).replace("RUN/", f"{run}/").replace("448", "64")
    space: dict = {}
    exec(code, space)
    with torch.inference_mode():
        assert space["segmenter"].model(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def test_page_names_what_there_is() -> None:
    """Data sets, scores, recipes and options of the page are those of the code."""
    assert all(f"`{name}`" in SEGMENTATION for name in (*LAYOUTS, *NAMES, *RECIPES))
    options = {option for action in segmentation_parser()._actions for option in action.option_strings}
    named = {word.strip("`.,;:()").split("`")[0] for word in SEGMENTATION.replace("`", " ").split()
             if word.startswith("--")}
    assert {word.strip(".,;:()") for word in named} - options <= {"--nproc_per_node", "--csv", "--root"}
