"""The CSV contract: what is read, and that every fault is found, named and placed."""

import contextlib
import hashlib
import logging
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from furnace.data.manifest import Manifest, read_manifest
from furnace.data.problems import ManifestError
from furnace.runtime.files import UserError
from helpers import draw_images, small_set, write_csv

HEADER = "image,label,split"
ROWS = ("a.png,0,train", "b.png,1,train", "c.png,0,val", "d.png,0,test", "e.png,1,test")  # rows 2-6, good


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.png ... i.png, a text file, an empty file and a folder, all three with names of images."""
    folder = tmp_path_factory.mktemp("images")
    draw_images(folder, [f"{name}.png" for name in "abcdefghi"] + ["sub/a.png"], size=(9, 8))
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "folder.png").mkdir()
    return folder


def read(tmp_path: Path, root: Path, *lines: str, header: str = HEADER, nb_classes: int = 2, **more) -> Manifest:
    """Write a CSV of these lines and read it."""
    path = tmp_path / "set.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return read_manifest(path, root, nb_classes=nb_classes, **more)


def faults(tmp_path: Path, root: Path, *lines: str, **more) -> list[tuple]:
    """(kind, row, column) of the errors of a CSV."""
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, root, *lines, **more)
    for problem in caught.value.problems:
        assert problem.text and problem.remedy and not problem.warning
    return [(p.kind, p.row, p.column) for p in caught.value.problems]


# -------------------------------------------------------------------- what is read

def test_contract(tmp_path: Path, images: Path) -> None:
    manifest = read(tmp_path, images, *ROWS)
    content = (tmp_path / "set.csv").read_bytes()
    assert manifest.filenames == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert manifest.labels.tolist() == [0, 1, 0, 0, 1] and manifest.labels.dtype == np.int64
    assert manifest.frame["_row"].tolist() == [2, 3, 4, 5, 6]
    assert list(manifest.frame.columns) == ["image", "label", "split", "_row"]
    assert (manifest.name, manifest.root, manifest.csv_path) == ("set", images, tmp_path / "set.csv")
    assert manifest.sha256 == hashlib.sha256(content).hexdigest()
    assert manifest.class_names == ("0", "1") and manifest.nb_classes == 2 and manifest.group_columns == ()
    assert manifest.path_of(3) == images / "d.png" and len(manifest) == 5


def test_root_defaults_to_the_folder_of_the_csv(tmp_path: Path) -> None:
    manifest = read_manifest(small_set(tmp_path), nb_classes=3)
    assert manifest.root == tmp_path and len(manifest) == 21 and manifest.group_columns == ("patient_id",)


@pytest.mark.parametrize("change", [
    lambda text: b"\xef\xbb\xbf" + text.encode(),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.replace("\n", "\r").encode(),
    lambda text: text.replace(",", " , ").encode(),
    lambda text: text.replace("a.png", '"a.png"').encode(),
    lambda text: text.replace("\n", ",\n").encode(),
    lambda text: text.replace("\n", "\n\n , ,\n").encode(),
    lambda text: text.replace(",0,", ",0.0,").replace(",1,", ",1.0,").encode(),
], ids=["byte-order mark", "CRLF", "CR", "blanks", "quotes", "trailing comma", "blank lines", "label 1.0"])
def test_spreadsheet_habits(tmp_path: Path, images: Path, change) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes(change("\n".join([HEADER, *ROWS]) + "\n"))
    manifest = read_manifest(path, images, nb_classes=2)
    assert manifest.filenames == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert manifest.labels.tolist() == [0, 1, 0, 0, 1]
    assert manifest.frame["split"].tolist() == ["train", "train", "val", "test", "test"]
    assert list(manifest.frame.columns) == ["image", "label", "split", "_row"]


def test_row_numbers_after_blank_lines(tmp_path: Path, images: Path) -> None:
    lines = ["", ROWS[0], "", ",,", ROWS[1], ROWS[3], "x.png,1,test"]
    assert faults(tmp_path, images, *lines) == [("missing file", 8, "image")]
    manifest = read(tmp_path, images, *lines[:-1], ROWS[4])
    assert manifest.frame["_row"].tolist() == [3, 6, 7, 8]


def test_extra_columns_are_kept(tmp_path: Path, images: Path) -> None:
    lines = [f"{row},{age},x y" for row, age in zip(ROWS, ("007", "", "5.0", "NA", "1"), strict=True)]
    manifest = read(tmp_path, images, *lines, header=HEADER + ",age,my site")
    assert list(manifest.frame.columns) == ["image", "label", "split", "_row", "age", "my site"]
    assert manifest.frame["age"].isna().tolist() == [False, True, False, False, False]
    assert manifest.frame["age"].dropna().tolist() == ["007", "5.0", "NA", "1"]  # text, as written
    assert manifest.split("test").frame["age"].tolist() == ["NA", "1"]


def test_absolute_image_paths(tmp_path: Path, images: Path) -> None:
    manifest = read(tmp_path, tmp_path, *(f"{images}/{row}" for row in ROWS))
    assert manifest.path_of(1) == images / "b.png"


def test_binary_label(tmp_path: Path, images: Path) -> None:
    lines = [f"{row},{binary}" for row, binary in zip(ROWS, (1, 0, 1, 1, 0), strict=True)]
    two = read(tmp_path, images, *lines, header=HEADER + ",binary_label")
    assert two.label_column == "binary_label" and two.labels.tolist() == [1, 0, 1, 1, 0]
    lines[1] = "b.png,2,train,0"
    lines.append("f.png,1,train,0")
    three = read(tmp_path, images, *lines, header=HEADER + ",binary_label", nb_classes=3)
    assert three.label_column == "label" and three.labels.tolist() == [0, 2, 0, 0, 1, 1]


def test_binary_falls_back_to_label(tmp_path: Path, images: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        assert read(tmp_path, images, *ROWS).label_column == "label"
    assert "no binary_label column" in caplog.text


def test_three_classes_need_label(tmp_path: Path, images: Path) -> None:
    header = "image,binary_label,split"
    with pytest.raises(ManifestError, match="pass --nb_classes 2"):
        read(tmp_path, images, *ROWS, header=header, nb_classes=3)
    assert read(tmp_path, images, *ROWS, header=header).labels.tolist() == [0, 1, 0, 0, 1]


# --------------------------------------------------------------------- class names

def test_class_name_column(tmp_path: Path, images: Path) -> None:
    names = ("nevus", "melanoma", "", "nevus", "melanoma")
    lines = [f"{row},{name}" for row, name in zip(ROWS, names, strict=True)]
    assert read(tmp_path, images, *lines, header=HEADER + ",class_name").class_names == ("nevus", "melanoma")
    lines = [f"{row},{name}" for row, name in zip(ROWS, ("nevus", "", "", "nevus", ""), strict=True)]
    assert read(tmp_path, images, *lines, header=HEADER + ",class_name").class_names == ("nevus", "1")


def test_finer_class_names_beside_a_binary_label(tmp_path: Path, images: Path) -> None:
    lines = [f"{row},{name}" for row, name in zip(ROWS, ("nevus", "mel", "angioma", "nevus", "bcc"), strict=True)]
    header = "image,binary_label,split,class_name"
    assert read(tmp_path, images, *lines, header=header).class_names == ("0", "1")


@pytest.mark.parametrize(("names", "phrase"), [
    (("x", "y", "z", "w"), "class 0 is called x and w"), (("x", "x", "z", "x"), "'x' names the classes 0 and 1")])
def test_class_name_column_with_faults(tmp_path: Path, images: Path, names, phrase) -> None:
    rows = ("a.png,0,train", "b.png,1,train", "c.png,2,train", "d.png,0,test")
    lines = [f"{row},{name}" for row, name in zip(rows, names, strict=True)]
    with pytest.raises(ManifestError, match=phrase) as caught:
        read(tmp_path, images, *lines, header=HEADER + ",class_name", nb_classes=3)
    assert {p.kind for p in caught.value.problems} == {"class names"}


def test_class_names_file(tmp_path: Path, images: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\ufeffmélanome malin\n\n naevus \n", encoding="utf-8")
    lines = [f"{row},other{row[6]}" for row in ROWS]
    manifest = read(tmp_path, images, *lines, header=HEADER + ",class_name", class_names_file=f"{names} ")
    assert manifest.class_names == ("mélanome malin", "naevus")  # the file wins over the column


@pytest.mark.parametrize("text", ["one\n", "one\ntwo\nthree\n", "one\none\n", ""])
def test_class_names_file_of_wrong_length(tmp_path: Path, images: Path, text: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    assert faults(tmp_path, images, *ROWS, class_names_file=tmp_path / "names.txt") == [("class names", None, "")]


def test_class_names_file_absent(tmp_path: Path, images: Path) -> None:
    with pytest.raises(UserError, match="--class_names .*is no file"):
        read(tmp_path, images, *ROWS, class_names_file=tmp_path / "no.txt")


# ---------------------------------------------------------------- faults, one each

@pytest.mark.parametrize("label", ["mel", "", "-1", "1.5", "nan", "inf", "-inf", "1e30", "2", "0,5", "1 0", "NaN"])
def test_bad_label(tmp_path: Path, images: Path, label: str) -> None:
    cell = f'"{label}"'
    lines = [*ROWS, f"f.png,{cell},train", "g.png,1,train"]
    assert faults(tmp_path, images, *lines) == [("bad label", 7, "label")]


@pytest.mark.parametrize(("label", "phrase"), [
    ("mel", r"'mel' is not an integer. Remedy: number the classes from 0"),
    ("", "is empty. Remedy: give every image a class from 0 to 1"),
    ("-1", r"-1 is not in 0\.\.1. Remedy: number the classes from 0"),
    ("1.5", "'1.5' is not an integer"),
    ("4", r"4 is not in 0\.\.1. Remedy: pass --nb_classes 5")])
def test_bad_label_says_the_remedy(tmp_path: Path, images: Path, label: str, phrase: str) -> None:
    with pytest.raises(ManifestError, match=rf"bad label \(row 7, column label\): {phrase}"):
        read(tmp_path, images, *ROWS, f"f.png,{label},train")


@pytest.mark.parametrize(("change", "expected"), [
    ({5: "nowhere.png,1,train"}, [("missing file", 7, "image")]),
    ({5: "empty.jpg,1,train"}, [("empty file", 7, "image")]),
    ({5: "text.jpg,1,train"}, [("not an image", 7, "image")]),
    ({5: "folder.png,1,train"}, [("missing file", 7, "image")]),
    ({5: ",1,train"}, [("no file name", 7, "image")]),
    ({5: "f.png,1,dev"}, [("unknown split", 7, "split")]),
    ({5: "f.png,1,Train"}, [("unknown split", 7, "split")]),
    ({5: "f.png,1,"}, [("unknown split", 7, "split")]),
    ({5: "f.png,1"}, [("unknown split", 7, "split")]),
    ({5: "f.png,1,train,more"}, [("ragged row", 7, "")]),
    ({5: "a.png,1,train"}, [("two labels", 7, "image")]),
    ({5: "./sub//a.png,0,train", 6: "sub/a.png,1,train"}, [("two labels", 8, "image")]),
    ({1: "b.png,0,train"}, [("class absent from train", None, "label")]),
    ({0: "a.png,0,val", 1: "b.png,1,val"}, [("empty split", None, "split")]),
    ({3: "d.png,0,val", 4: "e.png,1,val"}, [("empty split", None, "split")]),
])
def test_one_fault(tmp_path: Path, images: Path, change: dict[int, str], expected: list) -> None:
    lines = list(ROWS) + [""] * max(0, max(change) + 1 - len(ROWS))
    for index, line in change.items():
        lines[index] = line
    assert faults(tmp_path, images, *lines) == expected


@pytest.mark.parametrize(("header", "expected"), [
    ("image,class,split", [("missing column", None, "label")]),
    ("file,label,split", [("missing column", None, "image")]),
    ("image,label,fold", [("missing column", None, "split")]),
    ("file,class,fold", [("missing column", None, name) for name in ("label", "image", "split")]),
    ("Image,label,split", [("missing column", None, "image")])])
def test_missing_columns(tmp_path: Path, images: Path, header: str, expected: list) -> None:
    found = faults(tmp_path, images, *ROWS, header=header, nb_classes=3)
    assert [problem for problem in found if problem[0] == "missing column"] == expected
    with pytest.raises(ManifestError, match=f"the columns are: {', '.join(header.split(','))}. Remedy"):
        read(tmp_path, images, *ROWS, header=header, nb_classes=3)


def test_repeated_column(tmp_path: Path, images: Path) -> None:
    lines = [f"{row},1" for row in ROWS]
    assert faults(tmp_path, images, *lines, header=HEADER + ",label") == [("repeated column", 1, "label")]


def test_empty_val_is_fine(tmp_path: Path, images: Path) -> None:
    manifest = read(tmp_path, images, *ROWS[:2], *ROWS[3:])
    assert len(manifest.split("val")) == 0 and len(manifest.split("test")) == 2


def test_missing_extension_is_guessed(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ManifestError, match=r"Remedy: write f\.png"):
        read(tmp_path, images, *ROWS, "f,1,train")


@pytest.mark.parametrize(("word", "guess"), [
    ("training", "write train."), ("Validation", "write val."), ("dev", "write val."), ("Testing", "write test."),
    ("fold1", "write train, val or test.")])
def test_split_names_are_guessed(tmp_path: Path, images: Path, word: str, guess: str) -> None:
    with pytest.raises(ManifestError, match=rf"'{word}' is none of train, val, test. Remedy: {guess}"):
        read(tmp_path, images, *ROWS, f"f.png,1,{word}")


def test_wrong_root_is_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ManifestError, match="not one of the 5 images lies under .*elsewhere.*--root_path"):
        read(tmp_path, tmp_path / "elsewhere", *ROWS)


@pytest.mark.parametrize(("content", "phrase"), [
    (b"image,label,split\na.png,0,train\nb\xe9.png,1,train\n", r"not UTF-8 text \(byte 33, row 3\)"),
    ("image,label,split\na.png,0,train\n".encode("utf-16"), "not UTF-8"),
    (b"image;label;split\na.png;0;train\n", "semicolons"),
    (b"image\tlabel\tsplit\na.png\t0\ttrain\n", "tabs"),
    (b"", "is empty"),
    (b"\n , \n\n", "is empty"),
    (b'image,label,split\n"a.png,0,train\n', "not a valid CSV"),
])
def test_unreadable_text(tmp_path: Path, content: bytes, phrase: str) -> None:
    (tmp_path / "set.csv").write_bytes(content)
    with pytest.raises(ManifestError, match=phrase):
        read_manifest(tmp_path / "set.csv", nb_classes=2)


def test_header_alone(tmp_path: Path, images: Path) -> None:
    kinds = [kind for kind, _, _ in faults(tmp_path, images)]
    assert kinds == ["no rows", "empty split", "empty split"]


def test_csv_or_root_absent(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "real.csv", image=["a.png"], label=[0], split=["train"])
    with pytest.raises(UserError, match=r"does not exist; .* has: real\.csv"):
        read_manifest(tmp_path / "rael.csv", nb_classes=2)
    with pytest.raises(UserError, match="is a folder"):
        read_manifest(tmp_path, nb_classes=2)
    with pytest.raises(UserError, match="--root_path .* is not a folder"):
        read_manifest(path, tmp_path / "no", nb_classes=2)


# ------------------------------------------------------------- warnings and strict

LEAKS = [
    (HEADER, "a.png,0,train", "repeated row", r"stands in rows 2, 7"),
    (HEADER, "./a.png,0,train", "repeated row", r"stands in rows 2, 7"),
    (HEADER, "a.png,0,test", "image in two splits", r"train and test \(rows 2, 7\)"),
    (HEADER + ",patient_id", "f.png,0,test,Pa", "patient in two splits", "Pa has images in train and test"),
    (HEADER + ",lesion_id", "f.png,0,val,Pa", "lesion in two splits", "Pa has images in train and val"),
]


@pytest.mark.parametrize(("header", "line", "kind", "phrase"), LEAKS)
def test_leaks_warn(tmp_path: Path, images: Path, caplog, header: str, line: str, kind: str, phrase: str) -> None:
    lines = [f"{row},P{row[0]}" if header != HEADER else row for row in ROWS]
    read(tmp_path, images, *lines, header=header)
    assert not caplog.records
    assert len(read(tmp_path, images, *lines, line, header=header)) == 6
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"1 x {kind}" in record.message
    with pytest.raises(ManifestError, match=phrase) as caught:
        read(tmp_path, images, *lines, line, header=header, strict_split=True)
    assert [problem.kind for problem in caught.value.problems] == [kind]


def test_an_empty_group_is_its_own(tmp_path: Path, images: Path, caplog) -> None:
    lines = [f"{row},," for row in ROWS]
    manifest = read(tmp_path, images, *lines, header=HEADER + ",patient_id,lesion_id", strict_split=True)
    assert manifest.group_columns == ("patient_id", "lesion_id") and not caplog.records


def test_same_file_name_in_another_folder_is_another_image(tmp_path: Path, images: Path, caplog) -> None:
    read(tmp_path, images, *ROWS, "sub/a.png,1,test", strict_split=True)
    assert not caplog.records


def test_warnings_do_not_hide_errors(tmp_path: Path, images: Path, caplog) -> None:
    assert faults(tmp_path, images, *ROWS, "a.png,0,test", "x.png,1,test") == [("missing file", 8, "image")]
    assert "image in two splits" in caplog.text


# ------------------------------------------------------------- many faults at once

def test_ten_faults_in_one_report(tmp_path: Path, images: Path, caplog) -> None:
    lines = [
        "a.png,0,train,P1,nevus", "b.png,1,train,P2,mel", "c.png,0,test,P3,nevus",
        "x.png,0,train,P4,nevus",        # 5 missing
        "empty.jpg,0,train,P5,nevus",    # 6 0 bytes
        "text.jpg,0,train,P6,nevus",     # 7 not an image
        "d.png,mel,train,P7,nevus",      # 8 label
        "e.png,0,trian,P8,nevus",        # 9 split
        ",0,train,P9,nevus",             # 10 no name
        "a.png,1,train,P1,mel",          # 11 two labels
        "f.png,0,train,P10,nevus,oh,no",  # 12 ragged
        "g.png,0,test,P2,nevus",         # 13 leak by patient
        "b.png,1,test,P2,mel",           # 14 leak by image
        "h.png,0,test,P11,wart",         # 15 class 0 has two names
        "c.png,0,test,P3,nevus",         # 16 repeat
    ]
    expected = {"missing file": 5, "empty file": 6, "not an image": 7, "bad label": 8, "unknown split": 9,
                "no file name": 10, "two labels": 11, "ragged row": 12, "patient in two splits": 3,
                "image in two splits": 14, "repeated row": 16, "class names": None, "class absent from train": None}
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, images, *lines, header=HEADER + ",patient_id,class_name", nb_classes=3, strict_split=True)
    assert {p.kind: p.row for p in caught.value.problems} == expected
    message = str(caught.value)
    assert message.startswith(f"13 problems in {tmp_path / 'set.csv'} (")
    for kind, row in expected.items():
        assert f"1 x {kind}" in message and f"  {kind} ({f'row {row}' if row else ''}" in message
    assert message.count("Remedy:") == 13 and not caplog.records


def test_more_than_twenty_problems(tmp_path: Path, images: Path) -> None:
    lines = [f"no{i}.png,0,train" for i in range(30)] + ["empty.jpg,0,train", "h.png,mel,train"]
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, images, *ROWS, *lines, report_folder=tmp_path / "reports")
    message = str(caught.value)
    assert message.count("Remedy:") == 20 and "... and 12 more; all of them are in" in message
    assert "30 x missing file" in message and "  empty file (row 37" in message and "  bad label (row 38" in message
    (file,) = (tmp_path / "reports").iterdir()
    assert str(file) in message
    text = file.read_text()
    assert text.startswith("32 problems in") and text.count("Remedy:") == 32
    assert all(f"no{i}.png does not exist" in text for i in range(30))


def test_twenty_problems_need_no_file(tmp_path: Path, images: Path) -> None:
    lines = [f"no{i}.png,0,train" for i in range(20)]
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, images, *ROWS, *lines, report_folder=tmp_path / "reports")
    assert str(caught.value).count("Remedy:") == 20 and "more" not in str(caught.value)
    assert not (tmp_path / "reports").exists()


# ---------------------------------------------------------- identity, immutability

def test_digests(tmp_path: Path) -> None:
    path = small_set(tmp_path)
    first = read_manifest(path, nb_classes=3)
    contents = {name: (tmp_path / name).read_bytes() for name in sorted(first.filenames)}
    ids = {name: hashlib.sha256(str(len(content)).encode() + content[:32768]) for name, content in contents.items()}
    text = "".join(f"{name}\0{digest.hexdigest()}\n" for name, digest in ids.items())  # all are below 32 kB
    assert first.images_digest == hashlib.sha256(text.encode()).hexdigest()
    path.write_text(path.read_text() + "\n")
    same = read_manifest(path, nb_classes=3)
    assert same.sha256 != first.sha256 and same.images_digest == first.images_digest
    draw_images(tmp_path, ["images/train_0_0.png"], size=(11, 7))
    assert read_manifest(path, nb_classes=3).images_digest != first.images_digest


def test_split_and_take_are_new_manifests(tmp_path: Path, images: Path) -> None:
    manifest = read(tmp_path, images, *ROWS)
    before = manifest.frame.copy()
    test = manifest.split("test")
    assert test.filenames == ["d.png", "e.png"] and test.frame.index.tolist() == [0, 1]
    taken = manifest.take([3, 0, 3])
    assert taken.filenames == ["d.png", "a.png", "d.png"] and taken.frame.index.tolist() == [0, 1, 2]
    assert taken.frame["_row"].tolist() == [5, 2, 5] and len(manifest.take([])) == 0
    for part in (test, taken):
        assert (part.sha256, part.class_names, part.root) == (manifest.sha256, manifest.class_names, manifest.root)
        part.frame.loc[0, "image"] = "changed"
    assert manifest.frame.equals(before)
    with contextlib.suppress(ValueError):  # read-only, or a copy
        manifest.labels[0] = 1
    assert manifest.labels[0] == 0
    with pytest.raises(FrozenInstanceError):
        manifest.name = "other"


def test_the_inputs_are_not_written_to(tmp_path: Path) -> None:
    path = small_set(tmp_path)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    read_manifest(path, nb_classes=3)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()} == before


# ----------------------------------------------------------------- bugs still open

def test_wrong_root_is_named_before_the_files(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, tmp_path / "elsewhere", *(f"{i}.png,{i % 2},{('train', 'test')[i % 3 == 0]}" for i in range(25)))
    assert "pass the --root_path that the image column" in str(caught.value)


def test_a_column_named_row_is_kept_or_refused(tmp_path: Path, images: Path) -> None:
    try:
        manifest = read(tmp_path, images, *(f"{row},site{i}" for i, row in enumerate(ROWS)), header=HEADER + ",row")
    except ManifestError as error:
        assert "row" in {problem.column for problem in error.problems}
    else:
        assert any("site0" in map(str, manifest.frame[column]) for column in manifest.frame)


def test_a_null_byte_in_a_name(tmp_path: Path, images: Path) -> None:
    (found,) = faults(tmp_path, images, *ROWS, "x\0y.png,1,train")
    assert found[1] == 7


def test_class_names_file_that_is_not_utf8(tmp_path: Path, images: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"n\xe9vus\nother\n")
    with pytest.raises(UserError, match="UTF-8"):
        read(tmp_path, images, *ROWS, class_names_file=tmp_path / "names.txt")


def test_a_bad_label_is_not_a_second_label(tmp_path: Path, images: Path) -> None:
    assert ("two labels", 7, "image") not in faults(tmp_path, images, *ROWS, "a.png,mel,train")


def test_a_mistyped_split_is_not_a_leak(tmp_path: Path, images: Path, caplog) -> None:
    assert faults(tmp_path, images, *ROWS, "a.png,0,trian") == [("unknown split", 7, "split")]
    assert "image in two splits" not in caplog.text


@pytest.mark.parametrize("spelling", ["{root}/a.png", "sub/../a.png"])
def test_one_image_by_two_paths_is_a_leak(tmp_path: Path, images: Path, spelling: str) -> None:
    with pytest.raises(ManifestError, match="image in two splits"):
        read(tmp_path, images, *ROWS, f"{spelling.format(root=images)},0,test", strict_split=True)


def test_a_huge_label_does_not_become_advice(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, images, *ROWS, "f.png,1e30,train")
    assert "pass --nb_classes 1000000000000" not in str(caught.value)


def test_join_keeps_both_orders(tmp_path: Path, images: Path) -> None:
    """The first one's rows, then the other's; neither changes."""
    manifest = read(tmp_path, images, *ROWS)
    train, test = manifest.split("train"), manifest.split("test")
    both = test.join(train)
    assert both.filenames == test.filenames + train.filenames and both.labels.tolist() == [*test.labels, *train.labels]
    assert len(train) + len(test) == len(both) and both.path_of(len(test)) == train.path_of(0)


@pytest.mark.parametrize("make", [lambda a, b: b.symlink_to(a), lambda a, b: b.write_bytes(a.read_bytes())])
def test_a_linked_or_copied_image_in_two_splits_is_told(tmp_path: Path, images: Path, make) -> None:
    """A link is the same image; a copy under another name is told too, as a warning unless strict."""
    make(images / "a.png", images / "again.png")
    try:
        rows = [row for row in ROWS] + ["again.png,0,test"]
        assert ROWS[0].startswith("a.png,0,train")
        with pytest.raises(ManifestError, match="image in two splits|copied image"):
            read(tmp_path, images, *rows, strict_split=True)
        assert len(read(tmp_path, images, *rows)) == len(rows)
    finally:
        (images / "again.png").unlink()
