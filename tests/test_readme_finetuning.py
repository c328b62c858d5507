"""The README's fine-tuning commands, flag for flag.

Substitutions: /path/to/your/PanDerm becomes a temporary folder, PanDerm_Large_FT a tiny model, the published file
random weights; fewer epochs, smaller images and batches.
"""

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
import yaml

import predict
import run_class_finetuning
from furnace.command_line import parse
from furnace.finetuning_arguments import finetuning_parser
from helpers import block_with, small_set, words_of

SMALL = {"--model": "timm:test_vit", "--pretrained_checkpoint": "random", "--nb_classes": "3", "--epochs": "2",
         "--warmup_epochs": "1", "--batch_size": "4"}
MORE = ["--input_size", "32", "--num_workers", "0", "--amp_dtype", "fp32", "--resamples", "100"]


def published_words() -> list[str]:
    """The options of the training command."""
    command = block_with("python3 run_class_finetuning.py \\").split("python3 run_class_finetuning.py", 1)[1]
    return shlex.split(command.replace("\\\n", " ").replace("$MODEL_NAME", "PanDerm_Large_FT"))


def training_words(folder: Path) -> list[str]:
    """The same with SMALL in place."""
    words = [word.replace("/path/to/your/PanDerm", str(folder)) for word in published_words()]
    return [SMALL.get(words[i - 1], word) if i else word for i, word in enumerate(words)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    """The data, and the run that the README's command made."""
    folder = tmp_path_factory.mktemp("readme")
    data = folder / "Evaluation_datasets" / "HAM10000_clean"
    small = small_set(data, per_split={"train": 6, "val": 2, "test": 3})
    table = pd.read_csv(small)
    table["image"] = table["image"].str.removeprefix("images/")
    table.to_csv(data / "HAM_clean.csv", index=False)
    words = training_words(folder) + MORE
    assert run_class_finetuning.main(words) == 0
    return folder, words


def test_training_command(trained, caplog) -> None:
    """Files as the README lists them; the flag without effect is answered; again: the stored results."""
    folder, words = trained
    run = folder / "output_dir" / "HAM_clean"
    assert sorted(path.name for path in run.iterdir()) == [
        "args.yaml", "checkpoint-best.pth", "checkpoint-last.pth", "checkpoint-previous.pth", "env.json", "log.txt",
        "plots", "results.json", "test.csv", "val.csv"]
    assert sorted(path.stem for path in (run / "plots").iterdir()) == [
        "confusion", "learning_curve", "precision_recall", "reliability", "roc"]
    results = json.loads((run / "results.json").read_text())
    assert results["tta"] == "published" and results["splits"]["test"]["n"] == 9 and results["data_set"] == "HAM_clean"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with caplog.at_level("INFO"):
        assert run_class_finetuning.main(words) == 0
    assert "--imagenet_default_mean_and_std has no effect: the backbone's own data config" in caplog.text
    assert "this run is finished" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_recipe_is_the_published_one() -> None:
    """The values that the published README gave."""
    args = parse(finetuning_parser(), published_words())
    wanted = yaml.safe_load("{batch_size: 128, lr: 0.0005, epochs: 50, warmup_epochs: 10, layer_decay: 0.65, "
                            "drop_path: 0.2, weight_decay: 0.05, mixup: 0.8, cutmix: 1.0, weights: true, TTA: true, "
                            "monitor: acc, update_freq: 1, nb_classes: 7, reprob: 0.0, aa: '', smoothing: 0.1, "
                            "warmup_lr: 0.0, min_lr: 1.0e-06, train_interpolation: bilinear}")
    assert {key: getattr(args, key) for key in wanted} == wanted


def test_evaluation_and_prediction_commands(trained, tmp_path, monkeypatch) -> None:
    """--eval, and predict.py --checkpoint, on the run's files."""
    folder, _ = trained
    data, run = folder / "Evaluation_datasets" / "HAM10000_clean", folder / "output_dir" / "HAM_clean"
    best = str(run / "checkpoint-best.pth")
    monkeypatch.chdir(tmp_path)
    words = words_of("python3 run_class_finetuning.py --model PanDerm_Large_FT", {
        "PanDerm_Large_FT": "timm:test_vit", "7": "3", "DATA/HAM_clean.csv": str(data / "HAM_clean.csv"),
        "DATA/images": str(data / "images"), "RUN/checkpoint-best.pth": best, "RUN": str(run)})
    assert run_class_finetuning.main([*words, "--num_workers", "0", "--resamples", "100"]) == 0
    (tested,) = run.glob("eval_*")
    assert (tested / "val.csv").read_bytes() == (run / "val.csv").read_bytes()
    words = words_of("python3 predict.py --checkpoint", {"RUN/checkpoint-best.pth": best,
                                                         "PHOTOS": str(data / "images")})
    assert predict.main([*words, "--num_workers", "0"]) == 0
    assert len(pd.read_csv("predictions.csv")) == 33 and Path("predictions.png").exists()
