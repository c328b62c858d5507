"""External test sets: labels by name or number, the rows that count, faults, and images shared with train."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from furnace.data.external import read_external, warn_of_shared_images
from furnace.data.manifest import read_manifest
from furnace.data.problems import ManifestError
from furnace.runtime.files import UserError
from helpers import draw_images, small_set, write_csv

NAMES = ("nevus", "Melanoma", "basal cell carcinoma")
IMAGES = ["a.png", "b.png", "c.png", "d.png"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images."""
    draw_images(tmp_path / "ddi", IMAGES, seed=9)
    return tmp_path / "ddi"


def read(root: Path, class_names: tuple[str, ...] = NAMES, label_column: str = "label", more: dict | None = None,
         **columns):
    """Write a CSV beside the images and read it."""
    csv = write_csv(root / "ddi.csv", image=columns.pop("image", IMAGES), **columns)
    return read_external(csv, class_names=class_names, nb_classes=len(class_names),
                         label_column=label_column, **(more or {}))


def faults(root: Path, **arguments) -> list[tuple]:
    """(kind, row, column) of the errors."""
    with pytest.raises(ManifestError) as caught:
        read(root, **arguments)
    return [(p.kind, p.row, p.column) for p in caught.value.problems]


# ----------------------------------------------------------------------------------------------------------- labels

def test_labels_by_name(root: Path, caplog) -> None:
    """The CSV's own numbers, in another order, are not read, which is said once."""
    names = ["MELANOMA", " nevus ", "melanoma", "Nevus"]
    with caplog.at_level(logging.INFO):
        manifest = read(root, label=[0, 1, 0, 1], class_name=names, patient_id=[1, 1, 2, 2])
    assert manifest.labels.tolist() == [1, 0, 1, 0] and manifest.labels.dtype == np.int64
    assert manifest.class_names == NAMES and manifest.nb_classes == 3 and manifest.label_column == "class_name"
    assert manifest.frame["own_label"].tolist() == ["0", "1", "0", "1"] and manifest.group_columns == ("patient_id",)
    assert list(manifest.frame.columns)[:4] == ["image", "label", "split", "_row"]
    assert caplog.text.count("by the names in the column class_name; the numbers in label are not read") == 1


def test_names_need_no_label_column(root: Path) -> None:
    assert read(root, class_name=["nevus"] * 4).labels.tolist() == [0] * 4


def test_names_that_differ_by_capitals_only(root: Path) -> None:
    """Compared exactly."""
    manifest = read(root, class_names=("BCC", "bcc"), class_name=["bcc", "BCC", "BCC", "bcc"])
    assert manifest.labels.tolist() == [1, 0, 0, 1]
    assert faults(root, class_names=("BCC", "bcc"), class_name=["bcc", "Bcc", "BCC", "bcc"]) == [
        ("unknown class", 3, "class_name")]


@pytest.mark.parametrize("arguments", [{"class_names": ("0", "1", "2"), "class_name": ["x", "y", "z", "x"]}, {}],
                         ids=["train without names", "external without names"])
def test_labels_by_number(root: Path, caplog, arguments: dict) -> None:
    with caplog.at_level(logging.INFO):
        manifest = read(root, label=[2, "1.0", 0, 2], **arguments)
    assert manifest.labels.tolist() == [2, 1, 0, 2] and manifest.label_column == "label"
    assert "by the numbers in the column label" in caplog.text and "own_label" not in manifest.frame


def test_binary_label(root: Path) -> None:
    both = {"label": [5, 6, 7, 8], "binary_label": [0, 1, 1, 0]}
    manifest = read(root, class_names=("0", "1"), label_column="binary_label", **both)
    assert manifest.labels.tolist() == [0, 1, 1, 0]
    assert manifest.frame["multiclass_label"].tolist() == ["5", "6", "7", "8"]
    also = read(root, class_names=("0", "1"), label_column="label", **both)
    assert also.labels.tolist() == [0, 1, 1, 0], "binary_label counts, whichever column train had"
    for column, other in (("label", "binary_label"), ("binary_label", "label")):
        manifest = read(root, class_names=("0", "1"), label_column=column, **{other: [0, 1, 1, 0]})
        assert manifest.labels.tolist() == [0, 1, 1, 0] and manifest.label_column == other


# ------------------------------------------------------------------------------------------------------------- rows

def test_split_column(root: Path, caplog) -> None:
    """Only test rows count, and only they are checked."""
    with caplog.at_level(logging.INFO):
        manifest = read(root, image=["gone.png", "b.png", "a.png", "d.png"], label=["x", 1, 2, 1],
                        split=["train", "test", "test", "val"])
    assert manifest.filenames == ["b.png", "a.png"] and manifest.labels.tolist() == [1, 2]
    assert manifest.frame["_row"].tolist() == [3, 4] and set(manifest.frame["split"]) == {"test"}
    assert "2 of 4 images, those of the split test" in caplog.text
    assert len(manifest.split("test")) == 2


def test_no_split_column(root: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        manifest = read(root, label=[0, 1, 2, 0])
    assert len(manifest.split("test")) == 4 and "all 4 images (it has no split column)" in caplog.text


# ----------------------------------------------------------------------------------------------------------- faults

def test_faults_come_together(root: Path) -> None:
    (root / "d.png").write_text("text")
    found = faults(root, image=["a.png", "gone.png", "d.png", "a.png", ""], split=["test", "tset", "test", "test", ""],
                   class_name=["nevus", "nevus", "wart", "melanoma", "nevus"])
    assert found == [("unknown split", 3, "split"), ("unknown split", 6, "split"), ("unknown class", 4, "class_name"),
                     ("not an image", 4, "image"), ("two labels", 5, "image")]


def test_unknown_class_names_the_known_ones(root: Path) -> None:
    words = r"row 3, column class_name.*no class 'wart'; known are nevus, Melanoma, basal cell carcinoma\. .*delete"
    with pytest.raises(ManifestError, match=words) as error:
        read(root, class_name=["nevus", "wart", "", "nevus"])
    assert "row 4, column class_name): the cell is empty" in str(error.value) and "numbers in" not in str(error.value)
    with pytest.raises(ManifestError, match="delete the column class_name so that the numbers in label count"):
        read(root, class_name=["wart"] * 4, label=[0] * 4)


def test_number_out_of_range(root: Path) -> None:
    """Without the proposal to raise --nb_classes: the probe's classes are given."""
    with pytest.raises(ManifestError, match=r"row 3.*3 is not in 0\.\.2.*training set's 3 classes") as error:
        read(root, label=[0, 3, 1, 1])
    assert "--nb_classes" not in str(error.value)
    assert faults(root, label=["mel", "", -1, 0]) == [("bad label", row, "label") for row in (2, 3, 4)]


def test_missing_columns(root: Path) -> None:
    with pytest.raises(ManifestError, match="3 classes of the training set, from 0, or a column class_name"):
        read(root, age=[1, 2, 3, 4])
    csv = write_csv(root / "ddi.csv", picture=IMAGES, label=[0] * 4)
    with pytest.raises(ManifestError, match="the columns are: picture, label. Remedy: add a column named image"):
        read_external(csv, class_names=NAMES, nb_classes=3, label_column="label")
    assert faults(root, label=[0] * 4, split=["train"] * 4) == [("empty split", None, "split")]
    with pytest.raises(UserError, match="the external test set .*nowhere.csv does not exist"):
        read_external(root / "nowhere.csv", class_names=NAMES, nb_classes=3, label_column="label")


def test_repeated_rows(root: Path, caplog) -> None:
    """A warning, an error with strict_split."""
    arguments = {"image": ["a.png", "a.png"], "label": [1, 1]}
    assert len(read(root, **arguments)) == 2 and "stands in rows 2, 3" in caplog.text
    assert faults(root, more={"strict_split": True}, **arguments) == [("repeated row", 3, "image")]


# ---------------------------------------------------------------------------------------------------- shared images

def test_shared_images(root: Path, tmp_path: Path, caplog) -> None:
    """By content, whatever they are called."""
    train = read_manifest(small_set(tmp_path / "train"), nb_classes=3)
    external = read(root, label=[0, 1, 2, 0])
    assert warn_of_shared_images(train, external) == [] and "image also in train" not in caplog.text
    shutil.copy(train.path_of(3), root / "b.png")
    assert warn_of_shared_images(train, external) == [("b.png", train.filenames[3])]
    assert f"image also in train (row 3, column image, b.png): is {train.filenames[3]} of small" in caplog.text
    assert warn_of_shared_images(train.take([0, 1, 2]), external) == []
    with pytest.raises(ManifestError, match="1 problem in"):
        warn_of_shared_images(train, external, strict_split=True)
