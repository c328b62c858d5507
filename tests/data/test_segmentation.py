"""A CSV of images and masks: what is read, what is drawn, and that all faults are found in one pass."""

import logging
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from furnace.data.problems import ManifestError
from furnace.data.segmentation import SegmentationManifest, read_segmentation
from furnace.data.splits import make_folds, take_percent
from furnace.runtime.files import UserError
from helpers import HAM, draw_images, write_csv

SIZE = (14, 10)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images i0.png ... with masks m0.png ..., of i pixels lesion (that of i0 is empty), and bad ones."""
    folder = tmp_path_factory.mktemp("set")
    draw_images(folder, [f"i{i}.png" for i in range(40)], size=SIZE)
    for i in range(40):
        mask = np.zeros(SIZE[0] * SIZE[1], np.uint8)
        mask[:i] = 255
        Image.fromarray(mask.reshape(SIZE[1], SIZE[0])).save(folder / f"m{i}.png")
    Image.fromarray(np.zeros((SIZE[0], SIZE[1]), np.uint8)).save(folder / "turned.png")
    Image.fromarray(np.full((SIZE[1], SIZE[0]), 3, np.uint8)).save(folder / "three.png")
    return folder


def table(root: Path, tmp_path: Path, count: int = 40, **columns) -> SegmentationManifest:
    """A CSV of the first images read; some columns replaced."""
    splits = (["train"] * 3 + ["val", "test"]) * 8
    given = {"image": [f"i{i}.png" for i in range(count)], "mask": [f"m{i}.png" for i in range(count)],
             "split": splits[:count], **columns}
    options = {key: given.pop(key) for key in list(given) if not isinstance(given[key], list)}
    csv = write_csv(tmp_path / "seg.csv", **{key: value for key, value in given.items() if value})
    return read_segmentation(csv, root_path=root, **options)


def faults(*args, **more) -> list[tuple]:
    with pytest.raises(ManifestError) as caught:
        table(*args, **more)
    return [(p.kind, p.row, p.column) for p in caught.value.problems]


def test_contract(root: Path, tmp_path: Path) -> None:
    manifest = table(root, tmp_path, label=[str(i % 7) for i in range(40)])
    assert list(manifest.frame.columns) == ["image", "label", "split", "_row", "mask", "lesion_pixels", "own_label",
                                              "content_id"]
    assert manifest.frame["lesion_pixels"].tolist() == list(range(40))
    assert manifest.labels.tolist() == [0] * 40 and manifest.class_names == ("lesion",)
    assert manifest.frame["own_label"].tolist() == [str(i % 7) for i in range(40)]
    assert manifest.frame["_row"].tolist() == list(range(2, 42))
    assert (manifest.name, manifest.label_column, manifest.split_note) == ("seg", "mask", "")
    assert manifest.mask_path_of(7) == root / "m7.png" and manifest.path_of(7) == root / "i7.png"
    with pytest.raises(FrozenInstanceError):
        manifest.name = "other"


def test_parts_are_segmentation_manifests(root: Path, tmp_path: Path) -> None:
    manifest = table(root, tmp_path)
    for part in (manifest.split("val"), manifest.take([3, 8]), make_folds(manifest, 4, 0)[0],
                 take_percent(manifest.split("train"), 0.5), manifest.split("val").join(manifest.split("test"))):
        assert isinstance(part, SegmentationManifest)
        assert all(int(part.mask_path_of(i).stem[1:]) == int(part.path_of(i).stem[1:]) for i in range(len(part)))
    assert len(take_percent(manifest.split("train"), 0.5)) == 12


def test_the_digest_covers_images_and_masks(root: Path, tmp_path: Path) -> None:
    first = table(root, tmp_path).images_digest
    assert table(root, tmp_path).images_digest == first
    other = [f"m{i}.png" for i in range(40)]
    other[5] = "m6.png"
    assert table(root, tmp_path, mask=other).images_digest != first
    images = [f"i{i}.png" for i in range(39)] + ["i0.png"]
    with pytest.raises(ManifestError):
        table(root, tmp_path, image=images)


def test_folds_keep_lesions_together(root: Path, tmp_path: Path) -> None:
    lesions = [f"L{i // 5}" for i in range(40)]
    folds = make_folds(table(root, tmp_path, lesion_id=lesions, split=["train"] * 30 + ["test"] * 10), 3, seed=1)
    for fold in folds:
        cut = fold.frame[fold.frame["split"] != "test"]
        assert (cut.groupby("lesion_id")["split"].nunique() == 1).all() and (cut["split"] == "val").sum() == 10
    vals = [i for fold in folds for i in fold.split("val").filenames]
    assert sorted(vals) == sorted(f"i{i}.png" for i in range(30))


# ------------------------------------------------------------------------------------------------------- drawn splits

def test_val_is_drawn_from_train(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = ["train"] * 32 + ["test"] * 8
    with caplog.at_level(logging.INFO):
        manifest = table(root, tmp_path, split=split)
    assert manifest.frame["split"].value_counts().to_dict() == {"train": 28, "test": 8, "val": 4}
    assert manifest.split_note == "seg: no official val, 4 of 32 train images drawn for it (12.5%, seed 0)"
    assert manifest.split_note in caplog.text
    assert manifest.split("test").filenames == [f"i{i}.png" for i in range(32, 40)], "test is left alone"
    again, other = table(root, tmp_path, split=split), table(root, tmp_path, split=split, seed=1)
    assert again.filenames == manifest.filenames and again.split("val").filenames == manifest.split("val").filenames
    assert other.split("val").filenames != manifest.split("val").filenames
    assert len(table(root, tmp_path, split=split, val_fraction=0.25).split("val")) == 8
    assert len(table(root, tmp_path, split=split, val_fraction=0.0).split("val")) == 0


def test_val_is_drawn_by_lesions_and_patients(root: Path, tmp_path: Path) -> None:
    """Lesions 0-1, 2-3, ... and patients joining two lesions: groups of four images."""
    manifest = table(root, tmp_path, split=["train"] * 40, needed=("train",), val_fraction=0.3,
                     lesion_id=[f"L{i // 2}" for i in range(40)], patient_id=[f"P{i // 4}" for i in range(40)])
    assert (manifest.frame.groupby("patient_id")["split"].nunique() == 1).all()
    assert len(manifest.split("val")) == 12
    assert "(whole patients and lesions, 30.0%, seed 0)" in manifest.split_note


def test_one_lesion_cannot_be_divided(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one lesion or patient in train, of which no val can be drawn"):
        table(root, tmp_path, 4, split=["train"] * 3 + ["test"], lesion_id=["L"] * 3 + ["M"])


# -------------------------------------------------------------------------------------------------------------- faults

def test_all_faults_in_one_pass(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = ["i0.png", "i1.png", "i2.png", "gone.png", "i4.png", "i4.png", "i6.png", "i6.png", "i8.png"]
    masks = ["m0.png", "turned.png", "three.png", "m3.png", "m4.png", "m5.png", "m6.png", "m6.png", "nowhere.png"]
    split = ["train", "train", "train", "train", "train", "train", "train", "test", "dev"]
    lesion = ["A", "B", "C", "D", "E", "E", "G", "G", "I"]
    found = faults(root, tmp_path, 9, image=images, mask=masks, split=split, lesion_id=lesion)
    assert set(found) == {("unknown split", 10, "split"), ("missing file", 5, "image"), ("mask values", 4, "mask"),
                          ("mask of another size", 3, "mask"), ("missing mask", 10, "mask"), ("two masks", 7, "image")}
    assert len(found) == 6
    for warning in ("empty mask (row 2, column mask, m0.png)", "image in two splits (row 9",
                    "lesion in two splits (row 8"):
        assert warning in caplog.text
    assert "10 x 14 pixels and its image i1.png 14 x 10" in str(
        pytest.raises(ManifestError, table, root, tmp_path, 9, image=images, mask=masks, split=split).value)


def test_strict_splits(root: Path, tmp_path: Path) -> None:
    split = ["train", "train", "test"]
    assert faults(root, tmp_path, 3, split=split, lesion_id=["A", "B", "B"], strict_split=True) == [
        ("lesion in two splits", 3, "lesion_id")]


def test_two_masks_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has the masks m0.png and m1.png in rows 2, 3. Remedy: keep the right row"):
        table(root, tmp_path, 3, image=["i0.png", "i0.png", "i2.png"], split=["train", "train", "test"])


@pytest.mark.parametrize("column", ["image", "mask", "split"])
def test_missing_columns(root: Path, tmp_path: Path, column: str) -> None:
    assert ("missing column", None, column) in faults(root, tmp_path, **{column: []})


def test_empty_splits(root: Path, tmp_path: Path) -> None:
    assert faults(root, tmp_path, split=["train"] * 40) == [("empty split", None, "split")]
    assert faults(root, tmp_path, split=["test"] * 40) == [("empty split", None, "split")]
    assert len(table(root, tmp_path, split=["test"] * 40, needed=("test",)).split("val")) == 0


def test_an_empty_mask_is_a_warning(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = table(root, tmp_path)
    assert len(manifest) == 40 and "1 warning" in caplog.text and "1 x empty mask" in caplog.text


def test_one_source(root: Path, tmp_path: Path) -> None:
    for given in ({}, {"csv_path": "x.csv", "dataset": "PH2"}):
        with pytest.raises(UserError, match="pass either a CSV"):
            read_segmentation(**given)
    with pytest.raises(UserError, match=r"--val_fraction 1.0 is not in \[0, 1\)"):
        read_segmentation("x.csv", val_fraction=1.0)
    with pytest.raises(UserError, match="does not exist"):
        read_segmentation(tmp_path / "gone.csv")


@pytest.mark.skipif(not HAM.is_dir(), reason="the real images are not beside the repository")
def test_real_masks(tmp_path: Path) -> None:
    """A few of HAM10000's 1-bit masks; the rows without a mask are told."""
    import pandas as pd

    rows = pd.read_csv(HAM / "metadata.csv").groupby("split").head(20)
    csv = tmp_path / "ham.csv"
    rows.to_csv(csv, index=False)
    with pytest.raises(ManifestError) as caught:
        read_segmentation(csv, root_path=HAM)
    assert [p.kind for p in caught.value.problems] == ["missing mask"] * 20
    rows[rows["mask"].notna()].assign(split=["train"] * 20 + ["test"] * 20).to_csv(csv, index=False)
    manifest = read_segmentation(csv, root_path=HAM)
    assert (manifest.frame["lesion_pixels"] > 0).all() and manifest.group_columns == ("lesion_id",)
