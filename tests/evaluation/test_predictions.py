"""Reading predictions CSVs of every form, their faults, and matching by file name."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from furnace.evaluation import predictions as subject
from furnace.evaluation.predictions import (
    Predictions,
    aggregate,
    align,
    default_names,
    join_groups,
    match_names,
    read_all,
    read_predictions,
)
from furnace.evaluation.report import predictions_table
from furnace.runtime.files import UserError
from helpers import write_csv


def some_predictions(n: int = 12, k: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and probabilities (N, K)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, k, n), rng.dirichlet(np.ones(k), n)


def made(filenames: list[str], labels: list[int], probabilities, name: str = "A", **groups: list) -> Predictions:
    """Predictions without a file."""
    return Predictions(name, filenames, np.array(labels), np.array(probabilities, dtype=float), Path(f"{name}.csv"),
                       pd.DataFrame(groups, dtype=object, index=range(len(filenames))))


# ---------------------------------------------------------------------------------------------------------- reading

@pytest.mark.parametrize("k", [2, 5])
def test_own_files_come_back(tmp_path, k: int) -> None:
    """What linear_eval.py writes."""
    labels, p = some_predictions(k=k)
    predictions_table([f"a/{i}.jpg" for i in range(12)], labels, p).to_csv(tmp_path / "m.csv", index=False)
    read = read_predictions(tmp_path / "m.csv")
    assert (read.name, len(read), read.filenames[3]) == ("m", 12, "a/3.jpg") and not len(read.groups.columns)
    np.testing.assert_array_equal(read.labels, labels)
    np.testing.assert_allclose(read.probabilities, p, atol=1e-15)


def test_published_fine_tuning_form(tmp_path) -> None:
    """image_path, eight decimals; the columns in any order, eleven classes sorted by number."""
    labels, p = some_predictions(k=11)
    table = predictions_table([f"{i}.jpg" for i in range(12)], labels, p).rename(columns={"filename": "image_path"})
    table[list(table)[::-1]].to_csv(tmp_path / "m.csv", index=False, float_format="%.8f")
    np.testing.assert_allclose(read_predictions(tmp_path / "m.csv").probabilities, p, atol=1e-8)


def test_published_binary_form(tmp_path) -> None:
    """probability is class 1's; predicted_label may be left out."""
    path = write_csv(tmp_path / "m.csv", filename=["a", "b"], true_label=[0, 1], probability=[0.2, 0.9])
    np.testing.assert_allclose(read_predictions(path).probabilities, [[0.8, 0.2], [0.1, 0.9]])


def test_groups_of_the_file(tmp_path) -> None:
    """Kept; an empty cell is None."""
    path = write_csv(tmp_path / "m.csv", filename=["a", "b"], true_label=[0, 1], probability=[0.2, 0.9],
                     lesion_id=["L1", None], age=[3, 4])
    assert read_predictions(path).groups.to_dict("list") == {"lesion_id": ["L1", None]}


GOOD = {"filename": ["a", "b", "c", "d"], "true_label": [0, 1, 2, 0], "probability_class_0": [0.7, 0.1, 0.2, 0.5],
        "probability_class_1": [0.2, 0.8, 0.2, 0.25], "probability_class_2": [0.1, 0.1, 0.6, 0.25]}
FAULTS = {
    "missing name": ({"filename": None}, r"missing column \(column filename\): the columns are: true_label"),
    "missing label": ({"true_label": None}, r"missing column \(column true_label\)"),
    "capital letters": ({"true_label": None, "True_Label": [0, 1, 2, 0]}, "rename True_Label to true_label"),
    "no probabilities": (dict.fromkeys(list(GOOD)[2:]), r"missing column \(column probability_class_0\).*two classes"),
    "a gap": ({"probability_class_1": None}, r"missing column \(column probability_class_1\).*without a gap"),
    "text": ({"probability_class_1": [0.2, "high", 0.2, 0.25]}, r"row 3, column probability_class_1\): 'high' is not"),
    "NaN": ({"probability_class_1": [0.2, 0.8, "nan", 0.25]}, r"row 4, column probability_class_1\): 'nan' is not a"),
    "infinite": ({"probability_class_1": [0.2, 0.8, "inf", 0.25]}, r"row 4, .*'inf' is not a finite"),
    "empty": ({"probability_class_2": [0.1, 0.1, 0.6, None]}, r"row 5, column probability_class_2\): is empty"),
    "sum": ({"probability_class_2": [0.1, 0.1, 0.6, 0.3]}, r"row 5\): the row sums to 1\.0500, not 1"),
    "negative": ({"probability_class_0": [0.7, -0.1, 0.2, 0.5]}, r"row 3\): -0\.1 is negative\. Remedy: .*softmax"),
    "per cent": ({"probability_class_0": [70, 10, 20, 50], "probability_class_1": [20, 80, 20, 25],
                  "probability_class_2": [10, 10, 60, 25]}, r"row 2\): 70 is above 1\. Remedy: .*divide by 100"),
    "label too high": ({"true_label": [0, 1, 3, 0]}, r"row 4, column true_label\): 3 is not in 0\.\.2.*3 classes"),
    "label negative": ({"true_label": [0, -1, 2, 0]}, r"row 3, column true_label\): -1 is not in 0\.\.2"),
    "label half": ({"true_label": [0, 1.5, 2, 0]}, r"row 3, column true_label\): '1\.5' is not an integer"),
    "label a name": ({"true_label": ["nv", 1, 2, 0]}, r"row 2, column true_label\): 'nv' is not an integer"),
    "label empty": ({"true_label": [0, None, 2, 0]}, r"row 3, column true_label\): is empty"),
    "repeated": ({"filename": ["a", "b", "a", "d"]}, r"row 4, column filename, a\): stands in rows 2, 4"),
    "no name": ({"filename": ["a", None, "c", "d"]}, r"row 3, column filename\): is empty"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_a_file(tmp_path, case: str) -> None:
    """Each named with its row and a remedy, and nothing else said."""
    changes, words = FAULTS[case]
    path = write_csv(tmp_path / "m.csv", **{k: v for k, v in {**GOOD, **changes}.items() if v is not None})
    with pytest.raises(UserError, match=words) as error:
        read_predictions(path)
    assert "1 problem in" in str(error.value) or case == "per cent"


def test_all_faults_at_once_of_all_files(tmp_path) -> None:
    """One pass, one message, the good file unmentioned."""
    bad = write_csv(tmp_path / "bad.csv", **{**GOOD, "true_label": ["x", 1, 2, 7], "filename": ["a", "a", "c", "d"],
                                             "probability_class_0": [0.7, 0.3, "?", -0.5]})
    good = write_csv(tmp_path / "good.csv", **GOOD)
    with pytest.raises(UserError) as error:
        read_all([bad, good, tmp_path / "absent.csv"], ["b", "g", "a"])
    text = str(error.value)
    for words in ("row 2, column true_label", "row 5, column true_label", "rows 2, 3", "row 3): the row sums to 1.2",
                  "row 4, column probability_class_0", "row 5): -0.5", "6 problems", "absent.csv does not exist"):
        assert words in text, text
    assert "good.csv (" not in text


def test_binary_columns_that_disagree(tmp_path) -> None:
    """probability beside probability_class_1."""
    path = write_csv(tmp_path / "m.csv", filename=["a", "b"], true_label=[0, 1], probability=[0.2, 0.1],
                     probability_class_0=[0.8, 0.1], probability_class_1=[0.2, 0.9])
    with pytest.raises(UserError, match=r"row 3, column probability\): 0\.1 beside probability_class_1 = 0\.9"):
        read_predictions(path)


def test_other_predicted_label_warns_once(tmp_path, caplog) -> None:
    """A tie does not; the count and the first row are told."""
    table = {**GOOD, "predicted_label": [0, 1, 2, 0]}
    table["probability_class_1"], table["probability_class_2"] = [0.2, 0.8, 0.2, 0.5], [0.1, 0.1, 0.6, 0.0]
    read_predictions(write_csv(tmp_path / "m.csv", **{**table, "predicted_label": [0, 1, 2, 1]}))
    read_predictions(write_csv(tmp_path / "m.csv", **table))
    assert not caplog.records
    read_predictions(write_csv(tmp_path / "m.csv", **{**table, "predicted_label": [0, 0, 9, 0]}))
    assert "row 3, column predicted_label): is not the class of the highest probability in 2 of 4 rows" in caplog.text


def test_default_names(tmp_path) -> None:
    """Stems; folders for equal or generic stems; both together; else an error."""
    assert default_names([Path("x/a.csv"), Path("x/b.csv")]) == ["a", "b"]
    assert default_names([Path("x/a.csv"), Path("y/a.csv")]) == ["x", "y"]
    assert default_names([Path("x/test.csv")]) == ["x"]
    assert default_names([Path("x/a.csv"), Path("x/test.csv")]) == ["x_a", "x_test"]
    with pytest.raises(UserError, match="given twice"):
        default_names([Path("a.csv"), Path("./a.csv")])


# --------------------------------------------------------------------------------------------------------- matching

@pytest.mark.parametrize("names,others,want", [
    (["a/1.jpg", "b/1.jpg"], ["b/1.jpg", "a/1.jpg"], [1, 0]),
    (["x/a/1.jpg", "x/b/1.jpg"], ["/y/b/1.jpg", "/y/a/1.jpg"], [1, 0]),
    (["a/1.jpg", "a/2.jpg"], ["2.jpg", "1.jpg"], [1, 0]),
    (["C:\\data\\1.jpg"], ["0.jpg", "data/1.jpg"], [1]),
    (["a/1.jpg", "a/2.JPG"], ["2", "3", "1"], [2, 0]),
    (["1.0", "2.5"], ["2.5.png", "1.0.png"], [1, 0]),
    (["1.jpg", "1.png"], ["1.png", "1.jpg"], [1, 0]),
    (["1.jpg", "1.png"], ["1", "2"], None),
    (["a/1.jpg"], ["b/1.jpg", "c/1.jpg"], None),
    (["1.jpg"], ["2.jpg"], None),
])
def test_match_names(names: list[str], others: list[str], want: list[int] | None) -> None:
    """By as much of the path as needed; never two names to one place, never by guess."""
    found = match_names(names, others)
    assert found is None if want is None else found.tolist() == want


def test_align_reorders() -> None:
    """Every image keeps its own row; names and groups are the first's."""
    labels, p = some_predictions(k=3)
    _, q = some_predictions(k=3, seed=1)
    order = np.random.default_rng(2).permutation(12)
    first = made([f"{i}.jpg" for i in range(12)], labels, p, lesion_id=list("abcdefghijkl"))
    aligned = align(first, made([f"/far/{i}.jpg" for i in order], labels[order], q[order], name="B"))
    np.testing.assert_array_equal(aligned.probabilities, q)
    np.testing.assert_array_equal(aligned.labels, labels)
    assert aligned.filenames == first.filenames and aligned.groups is first.groups and aligned.name == "B"


def test_align_refuses() -> None:
    """Other images, labels or classes, with examples of both sides."""
    p = [[0.6, 0.4]] * 3
    first = made(["a.jpg", "b.jpg", "c.jpg"], [0, 1, 0], p)
    with pytest.raises(UserError, match=r"B cannot be compared with A: images only in A: 1 \(c\.jpg\); images "
                                        r"only in B: 2 \(d\.jpg, e\.jpg\)"):
        align(first, made(["a.jpg", "b.jpg", "d.jpg", "e.jpg"], [0] * 4, [[0.6, 0.4]] * 4, name="B"))
    with pytest.raises(UserError, match=r"images only in B: 1 \(z\.jpg\)"):
        align(first, made(["a.jpg", "b.jpg", "c.jpg", "z.jpg"], [0] * 4, [[0.6, 0.4]] * 4, name="B"))
    with pytest.raises(UserError, match=r"labels of 2 of 3 images differ: b\.jpg is 1 in A and 0 in B; c\.jpg"):
        align(first, made(["x/c.jpg", "x/b.jpg", "x/a.jpg"], [1, 0, 0], p, name="B"))
    with pytest.raises(UserError, match="3 classes and 2"):
        align(first, made(["a.jpg", "b.jpg", "c.jpg"], [0, 1, 0], [[0.6, 0.2, 0.2]] * 3, name="B"))
    with pytest.raises(UserError, match=r"one name in different folders \(1\)"):
        align(made(["x/1.jpg", "y/1.jpg"], [0, 1], p[:2]), made(["u/1.jpg", "v/1.jpg"], [0, 1], p[:2], name="B"))


def test_join_groups(tmp_path) -> None:
    """By image_id without folder and suffix; the metadata in any order, with more images, repeated rows tolerated."""
    path = write_csv(tmp_path / "meta.csv", image_id=["i3", "i1", "i2", "i0", "i1"], lesion_id=["L3", "L1", None, "L0",
                                                                                               "L1"])
    one = made(["/x/i2.jpg", "/x/i0.jpg", "/x/i1.jpg"], [0, 1, 0], [[0.6, 0.4]] * 3)
    assert join_groups(one, path).groups.to_dict("list") == {"lesion_id": [None, "L0", "L1"]}


@pytest.mark.parametrize("columns,words", [
    ({"image_id": ["i1"], "lesion_id": ["L"]}, r"lacks 1 of the 2 images of A\.csv, e\.g\. /x/i2\.jpg"),
    ({"image_id": ["i1", "i2", "i2"], "lesion_id": ["a", "b", "c"]}, "twice with different lesion_id"),
    ({"name": ["i1", "i2"], "lesion_id": ["a", "b"]}, r"missing column \(column image\)"),
    ({"image": ["i1", "i2"], "sex": ["m", "f"]}, r"missing column \(column patient_id\): .*or leave out --csv_path"),
])
def test_join_groups_refuses(tmp_path, columns: dict, words: str) -> None:
    """Never a guess, never a silent gap."""
    one = made(["/x/i1.jpg", "/x/i2.jpg"], [0, 1], [[0.6, 0.4]] * 2)
    with pytest.raises(UserError, match=words):
        join_groups(one, write_csv(tmp_path / "meta.csv", **columns))


def test_aggregate_by_hand() -> None:
    """Two lesions of two and one image, and two images without an id."""
    one = made(list("abcde"), [1, 0, 1, 0, 1], [[0.2, 0.8], [0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.1, 0.9]],
               lesion_id=["L", None, "L", "M", None], patient_id=["P", "Q", "P", "P", "R"])
    lesions = aggregate(one)
    assert lesions.filenames == ["L", "image b", "M", "image e"] and lesions.labels.tolist() == [1, 0, 0, 1]
    np.testing.assert_allclose(lesions.probabilities, [[0.35, 0.65], [0.9, 0.1], [0.7, 0.3], [0.1, 0.9]])
    assert lesions.groups.to_dict("list") == {"patient_id": ["P", "Q", "P", "R"]}
    assert not len(aggregate(made(["a"], [0], [[1, 0]], lesion_id=["L"])).groups.columns)


def test_aggregate_refuses() -> None:
    """Two labels or two patients in a lesion; no column."""
    p = [[0.6, 0.4]] * 2
    with pytest.raises(UserError, match=r"images of one lesion_id differ in label: L \(0 and 1\)"):
        aggregate(made(["a", "b"], [0, 1], p, lesion_id=["L", "L"]))
    with pytest.raises(UserError, match=r"differ in patient_id: L \(P and Q\)"):
        aggregate(made(["a", "b"], [1, 1], p, lesion_id=["L", "L"], patient_id=["P", "Q"]))
    with pytest.raises(UserError, match=r"needs the column lesion_id: A\.csv has none"):
        aggregate(made(["a", "b"], [0, 1], p))


def test_tolerance_is_that_of_the_metrics() -> None:
    """What is read can be scored."""
    from furnace.evaluation.metrics import classification_metrics
    p = np.array([[0.6 + 0.9 * subject.SUM_TOLERANCE, 0.4], [0.3, 0.7]])
    assert classification_metrics(np.array([0, 1]), p)["acc"] == 1
