"""Images from a file, a folder or a CSV: what is found, in which order, and what is refused."""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from furnace.data.problems import ManifestError
from furnace.data.unlabelled import read_images
from furnace.runtime.files import UserError
from helpers import draw_images, write_csv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images in two depths, a hidden one, a hidden folder and two other files."""
    root = tmp_path / "images"
    draw_images(root, ["b.png", "a/c.jpg", "a/d.PNG", ".hidden.png", ".thumbnails/b.png"], size=(9, 8))
    (root / "notes.txt").write_text("x")
    (root / "a" / "data.csv").write_text("x")
    return root


# ----------------------------------------------------------------------------------------------- files and folders

def test_folder(folder: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        manifest = read_images(folder)
    assert manifest.filenames == ["a/c.jpg", "a/d.PNG", "b.png"]
    assert list(manifest.frame.columns) == ["image", "label", "split", "_row"]
    assert manifest.labels.tolist() == [-1, -1, -1] and manifest.labels.dtype == np.int64
    assert manifest.frame["split"].tolist() == ["", "", ""] and manifest.frame["_row"].tolist() == [1, 2, 3]
    assert (manifest.name, manifest.root, manifest.class_names) == ("images", folder, ())
    assert manifest.sha256 == hashlib.sha256(b"a/c.jpg\na/d.PNG\nb.png").hexdigest()
    assert manifest.path_of(1).is_file() and "3 images, 2 other files left out" in caplog.text


def test_images_digest_follows_the_content(folder: Path) -> None:
    first = read_images(folder)
    draw_images(folder, ["b.png"], size=(9, 8), seed=7)
    second = read_images(folder)
    assert first.sha256 == second.sha256 and first.images_digest != second.images_digest


def test_the_current_folder_has_a_name(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    assert read_images(".").name == "images" and len(read_images("")) == 3


def test_one_image(folder: Path) -> None:
    manifest = read_images(str(folder / "a" / "c.jpg"))
    assert (manifest.filenames, manifest.name, manifest.root) == (["c.jpg"], "c", folder / "a")
    (folder / "a" / "c.jpg").rename(folder / "a" / "without")
    assert read_images(folder / "a" / "without").filenames == ["without"]


def test_links_to_folders(folder: Path, tmp_path: Path) -> None:
    """Followed once; not back into the tree, and not round in circles."""
    draw_images(tmp_path, ["elsewhere/e.png", "beside/f.png", "images/z/g.png"])
    (folder / "a" / "0").symlink_to(folder / "z")
    (folder / "0").symlink_to(folder / "z")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "higher").symlink_to(tmp_path)
    (folder / "aa").symlink_to(folder / "a")
    (folder / "far").symlink_to(tmp_path / "elsewhere")
    (folder / "far2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    assert read_images(folder).filenames == ["a/c.jpg", "a/d.PNG", "b.png", "far/e.png", "z/g.png"]


def test_folder_with_faults(folder: Path) -> None:
    """Listed together."""
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.webp").write_text("no picture")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(ManifestError, match="3 problems in") as error:
        read_images(folder)
    assert [(p.kind, p.file) for p in error.value.problems] == [
        ("empty file", "empty.jpg"), ("missing file", "gone.png"), ("not an image", "text.webp")]


def test_file_name_that_is_no_text(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "b.png").rename(folder / name)
    with pytest.raises(ManifestError, match=r"caf\\udce9\.png.*not UTF-8.*rename"):
        read_images(folder)


@pytest.mark.parametrize(("name", "words"), [
    ("nowhere", "nowhere does not exist: give an image file, a folder"), ("none", "holds no image .1 other files.*jpg"),
    ("none/x.txt", "neither an image that Pillow can read, nor a .csv, nor a folder"),
    ("none/no.csv", r"no\.csv does not exist; .* has: data\.csv")])
def test_nothing_to_read(folder: Path, name: str, words: str) -> None:
    (folder / "none").mkdir()
    (folder / "none" / "x.txt").write_text("x")
    if "no.csv" in name:
        (folder / "a" / "data.csv").rename(folder / "none" / "data.csv")
    with pytest.raises(UserError, match=words):
        read_images(folder / name)


@pytest.mark.parametrize("name", ["", "b.png"])
def test_root_path_belongs_to_a_csv(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="--root_path belongs to a CSV"):
        read_images(folder / name, folder)


# ------------------------------------------------------------------------------------------------------------- CSVs

def test_csv_without_labels(folder: Path) -> None:
    csv = write_csv(folder / "list.csv", age=[5, "", 7], image=["b.png", "a/d.PNG", str(folder / "a" / "c.jpg")])
    manifest = read_images(csv)
    assert manifest.filenames == ["b.png", "a/d.PNG", str(folder / "a" / "c.jpg")]
    assert list(manifest.frame.columns) == ["image", "label", "split", "_row", "age"]
    assert manifest.labels.tolist() == [-1] * 3 and set(manifest.frame["split"]) == {""}
    assert manifest.frame["_row"].tolist() == [2, 3, 4]
    assert manifest.frame["age"].isna().tolist() == [False, True, False]
    assert (manifest.name, manifest.sha256) == ("list", hashlib.sha256(csv.read_bytes()).hexdigest())
    assert manifest.path_of(2) == folder / "a" / "c.jpg" and manifest.group_columns == ()


@pytest.mark.parametrize("column", ["filename", "image_path"])
def test_other_names_of_the_image_column(folder: Path, tmp_path: Path, column: str) -> None:
    csv = write_csv(tmp_path / "list.csv", **{column: ["b.png"], "patient_id": ["P"]})
    manifest = read_images(csv, folder)
    assert manifest.filenames == ["b.png"] and manifest.group_columns == ("patient_id",)
    both = write_csv(tmp_path / "list.csv", **{column: ["x"], "image": ["b.png"]})
    assert read_images(both, folder).frame[column].tolist() == ["x"]


@pytest.mark.parametrize(("columns", "labels", "text", "used"), [
    ({"label": [2, 0]}, [2, 0], None, "label"), ({"label": ["2.0", ""]}, [2, -1], None, "label"),
    ({"binary_label": [1, 0]}, [1, 0], None, "binary_label"),
    ({"label": ["mel", "nv"]}, [-1, -1], ["mel", "nv"], "label"),
    ({"label": ["mel", "1"]}, [-1, -1], ["mel", "1"], "label"),
    ({"label": [-1, 1]}, [-1, -1], ["-1", "1"], "label"), ({"label": [0.5, 1]}, [-1, -1], ["0.5", "1.0"], "label"),
    ({"label": ["mel", "nv"], "binary_label": [1, 0]}, [1, 0], ["mel", "nv"], "binary_label")])
def test_labels(folder: Path, columns: dict, labels: list, text: list | None, used: str) -> None:
    """Class numbers are read, names are kept as text."""
    manifest = read_images(write_csv(folder / "list.csv", image=["b.png", "a/c.jpg"], split=["test", ""], **columns))
    assert manifest.labels.tolist() == labels and manifest.label_column == used
    assert manifest.frame["split"].tolist() == ["test", ""]
    assert (manifest.frame["label_text"].tolist() if text else None) == text
    assert text or "label_text" not in manifest.frame


def test_csv_with_faults(folder: Path) -> None:
    """All in one list, with their rows."""
    (folder / "empty.jpg").write_bytes(b"")
    csv = write_csv(folder / "list.csv", image=["b.png", "", "x.png", "empty.jpg", "notes.txt", "a"], n=range(6))
    with pytest.raises(ManifestError) as error:
        read_images(csv)
    assert [(p.kind, p.row) for p in error.value.problems] == [
        ("no file name", 3), ("missing file", 4), ("empty file", 5), ("not an image", 6), ("missing file", 7)]


def test_repeated_rows_warn(folder: Path, caplog) -> None:
    """By the file, not by its spelling."""
    csv = write_csv(folder / "list.csv", image=["b.png", "a/c.jpg", "a/../b.png"])
    assert len(read_images(csv)) == 3
    assert "repeated row (row 4, column image, b.png): stands in rows 2, 4" in caplog.text


def test_csv_without_an_image_column(folder: Path) -> None:
    with pytest.raises(ManifestError, match="the columns are: Image, x. Remedy: rename Image to image"):
        read_images(write_csv(folder / "list.csv", Image=["b.png"], x=[1]))
    with pytest.raises(ManifestError, match="no images"):
        read_images(write_csv(folder / "list.csv", image=[]))
    with pytest.raises(UserError, match="--root_path .*nowhere is not a folder"):
        read_images(write_csv(folder / "list.csv", image=["b.png"]), folder / "nowhere")
