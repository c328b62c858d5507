"""Files of a test and a prediction: names without collisions, masks as the challenges have them, tables, sheets."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from furnace.data.masks import load_mask
from furnace.data.segmentation import read_segmentation
from furnace.data.unlabelled import read_images
from furnace.evaluation.lesion_masks import Masking, lesion_masks
from furnace.evaluation.segmentation_metrics import NAMES, image_metrics
from furnace.evaluation.segmentation_sheets import PREDICTION, TRUTH, outlined
from furnace.models.segmentation_files import Segmenter, segmenter_meta, segmenter_of
from furnace.models.segmenter import create_segmenter
from furnace.runtime.files import UserError
from furnace.runtime.run_directory import open_run
from furnace.segmentation_results import (
    Testing,
    draw_worst,
    output_names,
    predict_photographs,
    score_images,
    score_splits,
    write_mask,
)
from helpers import write_csv
from tiny_segmentation import MODEL, disc_set

HOW = Masking(transform="default", mean=(0.7, 0.55, 0.5), std=(0.2, 0.2, 0.2), device=torch.device("cpu"),
              num_workers=0)
TESTING = Testing(masking=HOW, overlays=True, resamples=100)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory):
    """2 train, 3 val and 4 test images, two of each lesion."""
    return read_segmentation(disc_set(tmp_path_factory.mktemp("discs") / "d", train=2, copies=2))


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    """Random, half of the pixels lesion."""
    model = create_segmenter(MODEL, "random", input_size=32, channels=8, drop_path=0.0, seed=1)
    with torch.no_grad():
        model.decode_head.conv_seg.weight.mul_(20)
        noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        model.decode_head.conv_seg.bias[1] -= model(noise).diff(dim=1).median()
    meta = segmenter_meta(model, amp_dtype="fp32")
    return segmenter_of({"model": model.state_dict(), "meta": meta, "epoch": 7}, source="memory")


# --------------------------------------------------------------------------------------------------------------- names

@pytest.mark.parametrize("filenames,wanted", [
    (["images/a.png", "images/b.jpg"], ["a", "b"]),
    (["x/images/a.png", "x/more/b.png", "x/more/deep/c.png"], ["images/a", "more/b", "more/deep/c"]),
    (["a.png", "deep/b.png"], ["a", "deep/b"]),
    (["one.png"], ["one"]), (["far/away/one.png"], ["one"]),
    (["../d/a.png", "../d/b.png"], ["a", "b"]), (["../d/a.png", "../e/b.png"], ["d/a", "e/b"]),
    (["../a.png", "b.png"], ["a", "b"]), (["/data/x/a.png", "/data/y/b.png"], ["x/a", "y/b"]),
    (["/data/x/a.png"], ["a"]), (["/data/a.png", "more/b.png"], ["data/a", "more/b"]),
    (["i/a.png", "i/a.jpg", "i/b.png"], ["a.png", "a.jpg", "b"]), (["i/a.b.png", "i/a.png"], ["a.b", "a"]),
    (["./i/a.png", "i/b.png"], ["a", "b"]), (["i/plain", "i/b.png"], ["plain", "b"])])
def test_names_of_the_files(filenames: list[str], wanted: list[str]) -> None:
    """Below the folder in common, without extension where that is enough, and never outside of the run's folder."""
    assert output_names(filenames) == wanted


@pytest.mark.parametrize("filenames", [
    ["../a/x.png", "a/x.png"], ["/a/x.png", "a/x.png"], ["i/a.png", "i/a.jpg", "i/a.png.png"],
    ["../../x.png", "../x.png", "x.png"]])
def test_two_images_never_have_one_name(filenames: list[str]) -> None:
    """The second mask would be written over the first."""
    made = output_names(filenames)
    assert len(set(made)) == len(filenames)
    assert not any(Path(name).is_absolute() or ".." in Path(name).parts for name in made)


# --------------------------------------------------------------------------------------------------------------- masks

def test_a_mask_is_written_as_the_challenges_have_it(tmp_path: Path) -> None:
    """8 bit, one channel, 0 and 255, at its own size; folders are made; read back it is the same."""
    mask = np.zeros((5, 9), bool)
    mask[1:3, 2:7] = True
    path = tmp_path / "deep" / "a_segmentation.png"
    write_mask(path, mask)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "L" and picture.size == (9, 5)
        assert np.array_equal(np.asarray(picture), np.where(mask, 255, 0))
    assert np.array_equal(load_mask(path), mask)
    write_mask(path, ~mask)
    assert np.array_equal(load_mask(path), ~mask) and [p.name for p in path.parent.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------------------------------- prediction

def test_photographs(discs, segmenter: Segmenter, tmp_path: Path) -> None:
    """A row per image in order, the masks that the model gives, and nothing but their outline on the picture."""
    manifest = read_images(discs.root / "images")
    table = predict_photographs(tmp_path / "out", segmenter, manifest, HOW)
    assert list(table.columns) == ["filename", "mask", "height", "width", "lesion_pixels", "lesion_share"]
    assert list(table["filename"]) == list(manifest.filenames) and len(table) == 9
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "predictions.csv"), table)
    masks = dict(lesion_masks(segmenter.model, manifest, HOW))
    assert 0 < sum(mask.any() for mask in masks.values())
    for i, row in enumerate(table.itertuples()):
        stem = Path(manifest.filenames[i]).stem
        assert row.mask == f"masks/{stem}_segmentation.png"
        assert np.array_equal(load_mask(tmp_path / "out" / row.mask), masks[i])
        overlay = tmp_path / "out" / "overlays" / f"{stem}.png"
        with Image.open(manifest.path_of(i)) as photo, Image.open(overlay) as seen:
            assert (row.height, row.width) == (photo.height, photo.width) == masks[i].shape
            wanted = outlined(photo, [masks[i]], colours=[PREDICTION])
            assert np.array_equal(np.asarray(seen), np.asarray(wanted))
        assert row.lesion_pixels == masks[i].sum() and row.lesion_share == pytest.approx(masks[i].mean(), abs=1e-15)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["masks", "overlays", "predictions.csv"]


def test_processes_share_the_photographs(discs, segmenter: Segmenter, tmp_path: Path, monkeypatch) -> None:
    """Each writes the masks of its own; the table of all, in order, is the main process's."""
    manifest, parts = read_images(discs.root / "images"), []
    alone = predict_photographs(tmp_path / "alone", segmenter, manifest, HOW)
    monkeypatch.setattr("furnace.runtime.distributed.world_size", lambda: 2)
    monkeypatch.setattr("furnace.runtime.distributed.rank", lambda: 1)
    monkeypatch.setattr("furnace.runtime.distributed.gather_lists", lambda items: parts.extend(items) or items)
    assert predict_photographs(tmp_path / "both", segmenter, manifest, HOW) is None
    assert not (tmp_path / "both" / "predictions.csv").exists()
    assert len(list((tmp_path / "both" / "masks").iterdir())) == 4
    monkeypatch.setattr("furnace.runtime.distributed.rank", lambda: 0)
    monkeypatch.setattr("furnace.runtime.distributed.gather_lists", lambda items: [*parts, *items] if items else [])
    pd.testing.assert_frame_equal(predict_photographs(tmp_path / "both", segmenter, manifest, HOW), alone)
    for path in (tmp_path / "alone").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "both" / path.relative_to(tmp_path / "alone")).read_bytes()


# ------------------------------------------------------------------------------------------------------------- the test

def test_images_are_scored_at_their_own_size(discs, segmenter: Segmenter, tmp_path: Path) -> None:
    """Rows as ``image_metrics`` has them of the mask that was written; true and predicted outline on the picture."""
    test = discs.split("test")
    table = score_images(tmp_path, "test", segmenter, test, TESTING)
    assert list(table["filename"]) == list(test.filenames)
    for i, row in enumerate(table.to_dict("records")):
        stem = Path(test.filenames[i]).stem
        mask, truth = load_mask(tmp_path / "masks" / f"{stem}_segmentation.png"), load_mask(test.mask_path_of(i))
        assert {name: row[name] for name in image_metrics(mask, truth)} == pytest.approx(
            image_metrics(mask, truth), nan_ok=True, abs=1e-12)
        with Image.open(test.path_of(i)) as photo, Image.open(tmp_path / "overlays" / f"{stem}.png") as seen:
            wanted = outlined(photo, [truth, mask], colours=[TRUTH, PREDICTION])
            assert np.array_equal(np.asarray(seen), np.asarray(wanted))
    other = tmp_path / "val"
    score_images(other, "val", segmenter, discs.split("val"), TESTING)
    assert not other.exists(), "masks are written of test only"
    score_images(other, "test", segmenter, test, dataclasses.replace(TESTING, overlays=False))
    assert [path.name for path in other.iterdir()] == ["masks"]


def test_results_of_the_splits(discs, segmenter: Segmenter, tmp_path: Path) -> None:
    """What results.json says: which model, how, and every metric with its interval, lesions drawn as a whole."""
    run = open_run(tmp_path / "run", parts={"x": 1}, environment={})
    how = dataclasses.replace(TESTING, masking=dataclasses.replace(HOW, flips=True, largest=True))
    results = score_splits(run, segmenter, {name: discs.split(name) for name in ("val", "test")}, how,
                           data_set="discs", split_note="drawn")
    assert {key: results[key] for key in results if key != "splits"} == {
        "task": "segmentation", "data_set": "discs", "model": MODEL, "head": "upernet", "recipe": "default",
        "input_size": [32, 32], "taps": [*segmenter.model.taps], "weights_sha256": segmenter.sha256,
        "amp_dtype": "fp32", "class_names": ["background", "lesion"], "best_epoch": 7, "tta": "4 flips",
        "window": None, "largest_component": True, "split_note": "drawn"}
    assert json.loads(json.dumps(results)) == results
    for name, count in (("val", 3), ("test", 4)):
        split, table = results["splits"][name], pd.read_csv(run.path / f"{name}.csv")
        assert split["n"] == len(table) == count and tuple(split["metrics"]) == NAMES
        assert split["metrics"]["dice"]["value"] == pytest.approx(table["dice"].mean(), abs=1e-9)
        assert split["resampling"] == "100 resamples of lesions (lesion_id)"
    assert (run.path / "plots" / "worst_cases.png").is_file()


def test_a_split_without_images_is_left_out(discs, segmenter: Segmenter, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", parts={"x": 1}, environment={})
    empty = discs.take([])
    results = score_splits(run, segmenter, {"val": empty, "test": discs.split("test")}, TESTING, data_set="discs")
    assert list(results["splits"]) == ["test"] and not (run.path / "val.csv").exists() and "split_note" not in results


def test_an_image_that_stands_in_two_rows_of_test(discs, segmenter: Segmenter, tmp_path: Path) -> None:
    """A repeated row is only warned of when the set is read: it must not end the run after the training."""
    rows = discs.frame.iloc[[0, 2, 5, 6, 5]]
    csv = write_csv(tmp_path / "twice.csv", image=list(rows["image"]), mask=list(rows["mask"]),
                    split=list(rows["split"]))
    try:
        manifest = read_segmentation(csv, root_path=discs.root)
    except UserError:
        return  # refused at the start is as good
    run = open_run(tmp_path / "run", parts={"x": 1}, environment={})
    score_splits(run, segmenter, {"test": manifest.split("test")}, TESTING, data_set="twice")


def test_the_sheet_shows_the_worst(discs, segmenter: Segmenter, tmp_path: Path, monkeypatch) -> None:
    """Lowest Dice first, from the masks that were written."""
    shown = []
    monkeypatch.setattr("furnace.segmentation_results.worst_cases_sheet",
                        lambda path, cases, title: shown.append((path, cases, title)))
    test = discs.split("test")
    table = score_images(tmp_path, "test", segmenter, test, TESTING)
    table["dice"] = [0.5, 0.1, 0.9, 0.3]
    draw_worst(tmp_path, test, table)
    ((path, cases, title),) = shown
    assert path == tmp_path / "plots" / "worst_cases.png" and title == "Lowest Dice of 4 test images first"
    assert [case.name for case in cases] == ["test_1.png", "test_3.png", "test_0.png", "test_2.png"]
    for case, i in zip(cases, (1, 3, 0, 2), strict=True):
        assert case.path == test.path_of(i) and np.array_equal(case.truth, load_mask(test.mask_path_of(i)))
        assert np.array_equal(case.predicted, load_mask(tmp_path / "masks" / f"test_{i}_segmentation.png"))
