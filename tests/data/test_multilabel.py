"""Several labels per image: what is read, and that every fault is found; and the other new options of the reader."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest

from furnace.data.manifest import Manifest, read_manifest
from furnace.data.multilabel import label_sets, multi_hot, names_in
from furnace.data.problems import ManifestError
from furnace.runtime.files import UserError
from helpers import draw_images

HEADER = "image,labels,split"
ROWS = ("a.png,acne,train", "b.png,nevus; acne,train", "c.png,,train", "d.png,nevus,val", "e.png,acne ;nevus,test",
        "f.png,,test")  # rows 2-7, good


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.png ... i.png."""
    folder = tmp_path_factory.mktemp("images")
    draw_images(folder, [f"{name}.png" for name in "abcdefghi"], size=(9, 8))
    return folder


def read(tmp_path: Path, root: Path, *lines: str, header: str = HEADER, nb_classes: int = 0,
         task: str = "multilabel", **more) -> Manifest:
    """Write a CSV of these lines and read it."""
    path = tmp_path / "set.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return read_manifest(path, root, nb_classes=nb_classes, task=task, **more)


def faults(tmp_path: Path, root: Path, *lines: str, **more) -> list[tuple]:
    """(kind, row, column) of the errors of a CSV."""
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, root, *lines, **more)
    assert all(problem.text and problem.remedy and not problem.warning for problem in caught.value.problems)
    return [(p.kind, p.row, p.column) for p in caught.value.problems]


def names_file(tmp_path: Path, *names: str) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------- what is read

@pytest.mark.parametrize(("cell", "names"), [
    ("a", ["a"]), (" a ; b b;c", ["a", "b b", "c"]), (";a;;", ["a"]), ("", []), (" ; ", []), (None, []),
    (float("nan"), []), ("a;a", ["a", "a"])])
def test_names_in(cell, names: list[str]) -> None:
    assert names_in(cell) == names


def test_multi_hot() -> None:
    targets = multi_hot(["b;a", None, "c", "b;b;x"], ("a", "b", "c"))
    assert targets.dtype == np.float32
    assert targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert multi_hot([], ("a", "b")).shape == (0, 2)


def test_label_sets() -> None:
    ids = label_sets(np.array([[1, 0], [0, 0], [1, 0], [0, 1], [0, 0]]))
    assert ids.dtype == np.int64 and sorted(set(ids)) == [0, 1, 2]
    assert ids[0] == ids[2] and ids[1] == ids[4] and len({ids[0], ids[1], ids[3]}) == 3
    assert label_sets(np.zeros((3, 0))).tolist() == [0, 0, 0] and label_sets(np.zeros((0, 2))).tolist() == []


def test_contract(tmp_path: Path, images: Path, caplog) -> None:
    manifest = read(tmp_path, images, *ROWS)
    assert manifest.multilabel and manifest.label_column == "labels" and not caplog.records
    assert manifest.class_names == ("acne", "nevus") and manifest.nb_classes == 2
    assert manifest.targets.dtype == np.float32
    assert manifest.targets.tolist() == [[1, 0], [1, 1], [0, 0], [0, 1], [1, 1], [0, 0]]
    a, both, none, nevus, again, none_again = manifest.labels.tolist()
    assert both == again and none == none_again and len({a, both, none, nevus}) == 4
    assert list(manifest.frame.columns) == ["image", "label", "split", "_row", "labels"]


def test_parts_keep_their_targets(tmp_path: Path, images: Path) -> None:
    manifest = read(tmp_path, images, *ROWS)
    assert manifest.split("test").targets.tolist() == [[1, 1], [0, 0]]
    assert manifest.take([3, 0]).targets.tolist() == [[0, 1], [1, 0]]
    joined = manifest.split("val").join(manifest.split("train"))
    assert joined.multilabel and joined.targets.tolist() == [[0, 1], [1, 0], [1, 1], [0, 0]]
    assert manifest.take([]).targets.shape == (0, 2)
    manifest.targets[:] = 7
    assert manifest.targets.max() == 1


def test_targets_of_one_label_per_image(tmp_path: Path, images: Path) -> None:
    lines = ("a.png,1,train", "b.png,0,train", "c.png,1,test")
    manifest = read(tmp_path, images, *lines, header="image,label,split", task="multiclass", nb_classes=2)
    assert not manifest.multilabel and manifest.targets.dtype == np.int64
    assert manifest.targets.tolist() == [1, 0, 1]
    manifest.targets[:] = 7  # writable, as torch wants it, and a copy
    assert manifest.labels.tolist() == [1, 0, 1]


def test_one_class_is_enough(tmp_path: Path, images: Path) -> None:
    manifest = read(tmp_path, images, "a.png,acne,train", "b.png,,train", "c.png,acne,test", nb_classes=1)
    assert manifest.class_names == ("acne",) and manifest.targets.tolist() == [[1], [0], [1]]


def test_class_names_file_gives_the_order(tmp_path: Path, images: Path) -> None:
    file = names_file(tmp_path, "nevus", "", " acne ")
    manifest = read(tmp_path, images, *ROWS, class_names_file=file, nb_classes=2)
    assert manifest.class_names == ("nevus", "acne") and manifest.targets[0].tolist() == [0, 1]


def test_a_column_label_is_kept(tmp_path: Path, images: Path) -> None:
    manifest = read(tmp_path, images, *(f"{row},x" for row in ROWS), header=HEADER + ",label")
    assert manifest.frame["multiclass_label"].tolist() == ["x"] * 6 and manifest.nb_classes == 2


def test_unknown_task(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ValueError, match="neither multiclass nor multilabel"):
        read(tmp_path, images, *ROWS, task="multi")


# ----------------------------------------------------------------------------------------------------------- faults

def test_column_missing(tmp_path: Path, images: Path) -> None:
    assert faults(tmp_path, images, *ROWS, header="image,Labels,split") == [("missing column", None, "labels")]
    with pytest.raises(ManifestError, match="rename Labels to labels"):
        read(tmp_path, images, *ROWS, header="image,Labels,split")
    found = faults(tmp_path, images, "x.png,a", header="image,label")
    assert found == [("missing column", None, "labels"), ("missing column", None, "split"),
                     ("wrong folder", None, ""), ("missing file", 2, "image")]


def test_unknown_names(tmp_path: Path, images: Path) -> None:
    lines = [*ROWS, "g.png,Acne;wart,train", "h.png,wart;wart,val"]
    file = names_file(tmp_path, "acne", "nevus")
    expected = [("unknown class", 8, "labels"), ("unknown class", 8, "labels"), ("unknown class", 9, "labels")]
    assert faults(tmp_path, images, *lines, class_names_file=file) == expected
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, images, *lines, class_names_file=file)
    assert [p.remedy for p in caught.value.problems] == ["write acne"] + ["write one of its names, or add this one to "
                                                                          "it"] * 2


def test_an_unknown_name_is_not_a_second_label(tmp_path: Path, images: Path) -> None:
    file = names_file(tmp_path, "acne", "nevus")
    found = faults(tmp_path, images, *ROWS, "a.png,wart,train", class_names_file=file)
    assert found == [("unknown class", 8, "labels")]


@pytest.mark.parametrize("nb_classes", [1, 3])
def test_another_number_of_classes(tmp_path: Path, images: Path, nb_classes: int) -> None:
    assert faults(tmp_path, images, *ROWS, nb_classes=nb_classes) == [("number of classes", None, "labels")]
    with pytest.raises(ManifestError, match=r"2 classes \(acne and nevus\) .*pass --nb_classes 2, or leave it out"):
        read(tmp_path, images, *ROWS, nb_classes=nb_classes)


def test_no_class_at_all(tmp_path: Path, images: Path) -> None:
    assert faults(tmp_path, images, "a.png,,train", "b.png,;,test") == [("no classes", None, "labels")]


def test_class_absent_from_train(tmp_path: Path, images: Path) -> None:
    lines = [*ROWS, "g.png,wart,test"]
    assert faults(tmp_path, images, *lines) == [("class absent from train", None, "labels")]
    file = names_file(tmp_path, "acne", "nevus", "cyst")
    with pytest.raises(ManifestError, match="no train image has class cyst"):
        read(tmp_path, images, *ROWS, class_names_file=file)


@pytest.mark.parametrize(("line", "kind", "phrase"), [
    ("g.png,wart,train", "class in train only", "no val or test image has class wart"),
    ("g.png,acne; nevus;acne,train", "repeated name", r"\(row 8, column labels\): acne stands twice"),
])
def test_warnings(tmp_path: Path, images: Path, caplog, line: str, kind: str, phrase: str) -> None:
    assert len(read(tmp_path, images, *ROWS, line)) == 7
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"1 warning in {tmp_path / 'set.csv'} (1 x {kind})" in record.message
    caplog.clear()
    with pytest.raises(ManifestError):
        read(tmp_path, images, *ROWS, line, "no.png,acne,train")
    (record,) = caplog.records
    assert re.search(phrase, record.message)


def test_a_class_of_every_train_image_warns(tmp_path: Path, images: Path, caplog) -> None:
    read(tmp_path, images, "a.png,x;y,train", "b.png,x,train", "c.png,y,test", "d.png,x,test")
    assert "1 x class in every train image" in caplog.text and "all train images have class x" in caplog.text


def test_names_alike_warn(tmp_path: Path, images: Path, caplog) -> None:
    manifest = read(tmp_path, images, *ROWS, "g.png,Acne,train", "h.png,Acne,test")
    assert manifest.class_names == ("Acne", "acne", "nevus")
    assert "Acne and acne are taken for 2 classes" in caplog.text


def test_class_names_file_with_faults(tmp_path: Path, images: Path) -> None:
    file = names_file(tmp_path, "acne", "nevus", "acne")
    assert faults(tmp_path, images, *ROWS, class_names_file=file) == [("class names", None, "")]
    with pytest.raises(UserError, match="--class_names .*is no file"):
        read(tmp_path, images, *ROWS, class_names_file=tmp_path / "none.txt")
    file.write_bytes(b"n\xe9vus\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path, images, *ROWS, class_names_file=file)


def test_one_image_twice(tmp_path: Path, images: Path, caplog) -> None:
    with pytest.raises(ManifestError, match=r"two labels \(row 8, column image, a.png\): has labels .* in rows 2, 8"
                       ) as caught:
        read(tmp_path, images, *ROWS, "a.png,nevus,train")
    (problem,) = caught.value.problems
    assert set(problem.text.split(" in rows")[0].removeprefix("has labels ").split(" and ")) == {"acne", "nevus"}
    with pytest.raises(ManifestError, match="has labels none and acne in rows 2, 8"):
        read(tmp_path, images, *ROWS, "a.png,,train")
    caplog.clear()
    read(tmp_path, images, *ROWS, "b.png,acne;nevus,train")  # the same set in another order
    assert "1 x repeated row" in caplog.text


def test_copies_are_told_with_their_names(tmp_path: Path, images: Path, caplog) -> None:
    (tmp_path / "x.png").write_bytes((images / "a.png").read_bytes())
    read(tmp_path, images, *ROWS, f"{tmp_path / 'x.png'},,train")
    assert "a.png (train, label acne, row 2)" in caplog.text and "(train, label none, row 8)" in caplog.text


def test_all_faults_in_one_pass(tmp_path: Path, images: Path) -> None:
    lines = [*ROWS, "no.png,acne,train", "g.png,wart,trian", "h.png,mole,test"]
    found = faults(tmp_path, images, *lines, class_names_file=names_file(tmp_path, "acne", "nevus"), nb_classes=3)
    assert sorted(found, key=str) == [("missing file", 8, "image"), ("number of classes", None, "labels"),
                                      ("unknown class", 10, "labels"), ("unknown class", 9, "labels"),
                                      ("unknown split", 9, "split")]


# ------------------------------------------------------------------------- the image column, the number of classes

def test_image_column(tmp_path: Path, images: Path) -> None:
    lines = ("u,a.png,1,train", "v,b.png,0,train", "w,c.png,1,test")
    one = read(tmp_path, images, *lines, header="id,file name,label,split", task="multiclass", nb_classes=2,
               image_column="file name")
    assert one.filenames == ["a.png", "b.png", "c.png"]
    assert list(one.frame.columns) == ["image", "label", "split", "_row", "id"]
    two = read(tmp_path, images, *lines, header="image,path,label,split", task="multiclass", nb_classes=2,
               image_column="path")  # the named one wins
    assert two.filenames == one.filenames and list(two.frame.columns) == ["image", "label", "split", "_row"]


def test_faults_name_the_image_column(tmp_path: Path, images: Path) -> None:
    how = {"header": "path,label,split", "task": "multiclass", "nb_classes": 2}
    lines = ("a.png,1,train", "b.png,0,train", "x.png,1,test")
    assert faults(tmp_path, images, *lines, **how, image_column="path") == [("missing file", 4, "path")]
    assert faults(tmp_path, images, *lines, **how, image_column="img") == [("missing column", None, "img")]
    with pytest.raises(ManifestError, match="add a column named img, or pass the right --image_key"):
        read(tmp_path, images, *lines, **how, image_column="img")


@pytest.mark.parametrize(("header", "labels", "column", "text", "remedy"), [
    ("image,label,split", "0213", "label", "the CSV has labels 0..3", "pass --nb_classes 4"),
    ("image,binary_label,split", "0101", "binary_label", "the CSV has labels 0..1", "pass --nb_classes 2"),
    ("image,label,split", "0000", "label", "the CSV has labels 0..0", "pass --nb_classes 2"),
    ("image,label,split", "abcd", "label", "the column does not tell it", "number the classes from 0"),
    ("image,label,split", ("0", "1", "5", "99999"), "label", "does not tell it", "number the classes from 0"),
])
def test_number_of_classes_is_missing(tmp_path: Path, images: Path, header: str, labels: str, column: str, text: str,
                                      remedy: str) -> None:
    lines = [f"{name}.png,{label},{split}" for name, label, split in
             zip("abcd", labels, ("train", "train", "train", "test"), strict=True)]
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, images, *lines, f"x.png,{labels[0]},train", header=header, task="multiclass")
    problems = {problem.kind: problem for problem in caught.value.problems}
    assert "missing file" in problems and not {"bad label", "class names"} & set(problems)
    problem = problems["number of classes"]
    assert problem.column == column and text in problem.text and problem.remedy.startswith(remedy)


def test_names_are_not_counted_without_labels(tmp_path: Path, images: Path) -> None:
    how = {"class_names_file": names_file(tmp_path, "acne", "nevus"), "header": "image,text,split"}
    for task, column in (("multilabel", "labels"), ("multiclass", "label")):
        assert faults(tmp_path, images, *ROWS, task=task, **how) == [("missing column", None, column)]


def test_nothing_is_logged_of_a_good_set(tmp_path: Path, images: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        read(tmp_path, images, *ROWS)
    assert not caplog.records
