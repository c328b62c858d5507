"""predict.py: the very probabilities of linear_eval.py, from a CSV, a folder or one image; users' mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import linear_eval
import predict
from furnace.evaluation.calibration import apply_temperature
from furnace.models import create_backbone
from helpers import small_set


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[Path, Path]:
    """(CSV, run directory): a small backbone with seeded random weights, in bf16, so that the precision matters."""
    folder = tmp_path_factory.mktemp("predict")
    csv = small_set(folder / "data", per_split={"train": 6, "val": 3, "test": 4})
    assert linear_eval.main(["--model", "timm:test_vit", "--pretrained_checkpoint", "random", "--input_size", "160",
                             "--csv_path", str(csv), "--nb_classes", "3", "--output_dir", str(folder / "out"),
                             "--amp_dtype", "bf16", "--num_workers", "0", "--seed", "3"]) == 0
    (run,) = (folder / "out" / "small").iterdir()
    return csv, run


def run(case: tuple[Path, Path], source: Path, output: Path, *more: str) -> int:
    return predict.main([str(source), "--probe", str(case[1]), "--output", str(output), "--num_workers", "0", *more])


@pytest.mark.parametrize("cache", [["--no_cache"], []])
@pytest.mark.parametrize("batch", ["1", "5", "200"])
def test_the_probabilities_that_linear_eval_wrote(case, tmp_path, cache: list[str], batch: str) -> None:
    """Text for text, although the images come in another order, among others, in batches of another size."""
    assert run(case, case[0], tmp_path / "p.csv", "--batch_size", batch, *cache) == 0
    stored = pd.read_csv(case[1] / "test.csv", dtype=str).set_index("filename")
    found = pd.read_csv(tmp_path / "p.csv", dtype=str).set_index("filename").loc[stored.index]
    assert "true_label" not in found, "the CSV's labels may be of other classes"
    for column in stored.columns.drop("true_label"):
        assert (found[column] == stored[column]).all(), column
    assert len(pd.read_csv(tmp_path / "p.csv")) == 39


def test_a_folder_without_labels(case, tmp_path) -> None:
    """The same numbers; no true_label; a sheet with a picture for every image up to --sheet."""
    folder = tmp_path / "photos"
    folder.mkdir()
    test = pd.read_csv(case[1] / "test.csv")
    for i, name in enumerate(test["filename"]):
        shutil.copy(case[0].parent / name, folder / f"{i:02d}.png")
    (folder / "notes.txt").write_text("not an image")
    assert run(case, folder, tmp_path / "p.csv", "--no_cache", "--sheet", "7") == 0
    found = pd.read_csv(tmp_path / "p.csv")
    assert "true_label" not in found and found["filename"].tolist() == [f"{i:02d}.png" for i in range(12)]
    columns = [f"probability_class_{k}" for k in range(3)]
    np.testing.assert_array_equal(found[columns].to_numpy(np.float32), test[columns].to_numpy(np.float32))
    assert found["predicted_class"].tolist() == found["predicted_label"].tolist()
    with Image.open(tmp_path / "p.png") as sheet:
        assert sheet.width > 6 * 160 and 2 * 160 < sheet.height < 3 * 260  # two rows


def test_one_image_calibrated(case, tmp_path) -> None:
    name = pd.read_csv(case[1] / "test.csv")["filename"][5]
    probe = tmp_path / "probe"
    shutil.copytree(case[1], probe)
    told = json.loads((probe / "probe.json").read_text())  # whether noise lets itself be calibrated is chance
    (probe / "probe.json").write_text(json.dumps({**told, "temperature": 1.7, "fitted_on": "9 val images"}))
    for output, more in (("p.csv", []), ("c.csv", ["--calibrated"])):
        assert run((case[0], probe), case[0].parent / name, tmp_path / output, "--sheet", "0", *more) == 0
    plain, calibrated = (pd.read_csv(tmp_path / name).filter(like="probability_class").to_numpy(float)
                         for name in ("p.csv", "c.csv"))
    np.testing.assert_allclose(calibrated, apply_temperature(plain, 1.7), atol=1e-6)
    assert np.abs(calibrated - plain).max() > 1e-5 and not list(tmp_path.glob("*.png"))


def test_a_checkpoint_that_moved(case, tmp_path, capsys) -> None:
    """The file of the weights is named again; another file is refused by its sha256."""
    csv = case[0]
    for seed in (1, 2):
        backbone = create_backbone("timm:test_vit", "random", input_size=160, seed=seed)
        torch.save(backbone.state_dict(), tmp_path / f"{seed}.pth")
    shutil.copy(tmp_path / "1.pth", tmp_path / "old.pth")
    assert linear_eval.main(["--model", "timm:test_vit", "--pretrained_checkpoint", str(tmp_path / "old.pth"),
                             "--input_size", "160", "--csv_path", str(csv), "--nb_classes", "3", "--output_dir",
                             str(tmp_path / "out"), "--amp_dtype", "fp32", "--num_workers", "0"]) == 0
    (probe,) = (tmp_path / "out" / "small").iterdir()
    moved = (case[0], probe)
    (tmp_path / "old.pth").unlink()
    assert run(moved, csv, tmp_path / "p.csv") == 2
    assert "old.pth does not exist" in capsys.readouterr().err
    assert run(moved, csv, tmp_path / "p.csv", "--pretrained_checkpoint", str(tmp_path / "2.pth")) == 2
    assert "features of other weights" in capsys.readouterr().err
    assert run(moved, csv, tmp_path / "p.csv", "--pretrained_checkpoint", str(tmp_path / "1.pth")) == 0


def test_mistakes(case, tmp_path, capsys) -> None:
    """Exit code 2, what is wrong, and nothing written."""
    csv, probe = case
    broken = tmp_path / "photos" / "x.png"
    broken.parent.mkdir()
    broken.write_bytes((csv.parent / "images" / "test_0_0.png").read_bytes()[:300])
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "p.csv"
    for words, message in (
        ([str(csv), "--probe", str(probe.parent), "--output", str(out)], "below it there are: "),
        ([str(csv), "--probe", str(tmp_path / "no"), "--output", str(out)], "does not exist"),
        ([str(tmp_path / "no.jpg"), "--probe", str(probe), "--output", str(out)], "no.jpg does not exist"),
        ([str(empty), "--probe", str(probe), "--output", str(out)], "no image"),
        ([str(broken.parent), "--probe", str(probe), "--output", str(out)], "cannot be decoded"),
        ([str(csv), "--probe", str(probe), "--output", str(tmp_path / "p.xlsx")], "must end in .csv"),
        ([str(csv), "--probe", str(probe), "--output", str(csv)], "is the input"),
        ([str(csv.parent / "images"), "--probe", str(probe), "--output", str(csv.parent / "images" / "p.csv")],
         "into the input folder"),
        ([str(csv), "--probe", str(probe), "--output", str(probe / "test.csv"), "--overwrite"],
         "into the input folder"),
    ):
        assert predict.main(words) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    out.write_text("mine")
    assert run(case, csv, out) == 2 and "--overwrite" in capsys.readouterr().err and out.read_text() == "mine"
    assert run(case, csv, out, "--overwrite") == 0 and out.read_text() != "mine"


def test_calibration_needs_val(tmp_path, capsys) -> None:
    csv = small_set(tmp_path / "data", per_split={"train": 4, "val": 0, "test": 2})
    assert linear_eval.main(["--model", "timm:test_vit", "--pretrained_checkpoint", "random", "--input_size", "160",
                             "--csv_path", str(csv), "--nb_classes", "3", "--output_dir", str(tmp_path / "out"),
                             "--amp_dtype", "fp32", "--num_workers", "0"]) == 0
    (probe,) = (tmp_path / "out" / "small").iterdir()
    assert run((csv, probe), csv, tmp_path / "p.csv", "--calibrated") == 2
    assert "there was no val split" in capsys.readouterr().err
