"""segmentation/run.py: no image is scored that was trained on, without a word; and none is scored twice."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from furnace.data.segmentation import read_segmentation
from furnace.runtime.files import UserError
from tiny_segmentation import disc_picture, disc_set, results_of, segment, table_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ph2(tmp_path_factory) -> Path:
    """20 pairs in PH2's folders, which has no official split."""
    base, rng = tmp_path_factory.mktemp("ph2"), np.random.default_rng(0)
    for i in range(20):
        name, (pixels, lesion) = f"IMD{i:03d}", disc_picture(rng, (40, 52))
        for part, picture in (("Dermoscopic_Image", pixels), ("lesion", lesion.astype(np.uint8) * 255)):
            path = base / "PH2 Dataset images" / name / f"{name}_{part}"
            path.mkdir(parents=True)
            Image.fromarray(picture).save(path / (f"{name}.bmp" if part[0] == "D" else f"{name}_lesion.bmp"))
    return base


def test_a_drawn_test_is_that_of_the_training(ph2, tmp_path, capsys) -> None:
    """Another seed draws another test, which holds images that were trained on."""
    data = ["--dataset", "PH2", "--parent_path", str(ph2)]
    run = tmp_path / "run"
    assert segment(run, *data, "--seed", "3", epoch="1") == 0
    trained = set(read_segmentation(dataset="PH2", parent=ph2, seed=3).split("train").filenames)
    other = set(read_segmentation(dataset="PH2", parent=ph2, seed=0).split("test").filenames)
    capsys.readouterr()
    assert segment(run, *data, "--evaluate") == 2
    told = capsys.readouterr().err
    assert f"was trained on {len(trained & other)} of the {len(other)} test images" in told
    assert "seed 3" in told and "pass the --seed and --val_fraction of the training" in told
    assert not list(run.glob("eval_*"))
    assert segment(run, *data, "--evaluate", "--seed", "3") == 0
    (tested,) = run.glob("eval_*")
    assert table_of(tested).equals(table_of(run))


def test_a_seen_test_is_told(ph2, tmp_path, caplog) -> None:
    """Where the user marks all images as test, a line says how many were seen."""
    data = ["--dataset", "PH2", "--parent_path", str(ph2)]
    assert segment(tmp_path / "run", *data, epoch="1") == 0
    with caplog.at_level("WARNING"):
        assert segment(tmp_path / "run", *data, "--evaluate", "--all_as_test") == 0
    assert "was trained on 14 of the 20 test images: the scores are too good" in caplog.text


def test_a_folds_val_is_left_out(tmp_path, caplog) -> None:
    """A fold was trained on val images of the CSV."""
    csv = disc_set(tmp_path / "data", train=6, val=3)
    assert segment(tmp_path / "run", "--kfold", "3", csv=csv, epoch="1") == 0
    with caplog.at_level("WARNING"):
        best = tmp_path / "run" / "seed_0_fold_1" / "checkpoint-best.pth"
        assert segment(tmp_path / "eval", "--evaluate", "--checkpoint", str(best), csv=csv) == 0
    (tested,) = (tmp_path / "eval").glob("eval_*")
    assert "val images were trained on: val is left out" in caplog.text
    assert list(results_of(tested)["splits"]) == ["test"]


def test_a_repeated_row_counts_once(tmp_path, caplog) -> None:
    """The run ends, with as many rows as images."""
    csv = disc_set(tmp_path / "data")
    table = pd.read_csv(csv)
    pd.concat([table, table[table["split"] == "test"].head(1)]).to_csv(csv, index=False)
    with caplog.at_level("WARNING"):
        assert segment(tmp_path / "run", csv=csv, epoch="1") == 0
    assert "1 repeated rows are left out" in caplog.text and len(table_of(tmp_path / "run")) == 4


def test_a_val_fraction_that_leaves_nothing(tmp_path) -> None:
    """A message in place of scikit-learn's traceback."""
    csv = disc_set(tmp_path / "data", train=12, val=0)
    with pytest.raises(UserError, match="leaves none to train on: take a smaller --val_fraction"):
        read_segmentation(csv, val_fraction=0.95)


def test_options_of_a_training_have_no_effect_on_a_test(tmp_path, caplog) -> None:
    """They are named in one line, those that the test reads are not."""
    csv = disc_set(tmp_path / "data")
    assert segment(tmp_path / "run", csv=csv, epoch="1") == 0
    for words, named in ((["--evaluate", "--lr", "3", "--taps", "1", "--tta"], "--evaluate"),
                         (["--predict", str(csv.parent / "images"), "--lr", "3", "--taps", "1"], "--predict")):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert segment(tmp_path / "run", *words, csv=csv if named == "--evaluate" else None, batch_size=None,
                           epoch=None, warmup_epochs=None, pretrained=None, channels=None, resamples=None) == 0
        assert f"--lr, --taps: no effect with {named}, where nothing is trained" in caplog.text
