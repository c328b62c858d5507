"""The predictions table, the published table's row and the table for the eye."""

import io

import numpy as np
import pandas as pd
import pytest

from furnace.evaluation.metrics import NAMES, Metrics, classification_metrics
from furnace.evaluation.report import TABLE_HEADER, TABLE_METRICS, metric_lines, predictions_table, table_row

VALUES = {name: i / 16 for i, name in enumerate(NAMES)}


def test_predictions_of_three_classes() -> None:
    p = np.array([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]], dtype=np.float32)
    table = predictions_table(["a,b.png", "c.png"], np.array([2, 0]), p)
    assert list(table.columns) == ["filename", "true_label", "predicted_label", "probability_class_0",
                                   "probability_class_1", "probability_class_2"]
    assert table["filename"].tolist() == ["a,b.png", "c.png"]
    assert table["true_label"].tolist() == [2, 0] and table["predicted_label"].tolist() == [1, 0]
    np.testing.assert_array_equal(table.filter(like="probability_class_").to_numpy(), p)
    again = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    assert again["filename"].tolist() == ["a,b.png", "c.png"]
    np.testing.assert_array_equal(again.filter(like="probability_class_").to_numpy(np.float32), p)


def test_predictions_of_two_classes() -> None:
    table = predictions_table(["a.png"], np.array([1]), np.array([[0.25, 0.75]]))
    assert list(table.columns) == ["filename", "true_label", "predicted_label", "probability", "probability_class_0",
                                   "probability_class_1"]
    assert table.iloc[0].tolist() == ["a.png", 1, 1, 0.75, 0.25, 0.75]


def test_predictions_of_no_image() -> None:
    table = predictions_table([], np.zeros(0, dtype=int), np.zeros((0, 3)))
    assert len(table) == 0 and len(table.columns) == 6


@pytest.mark.parametrize(("name", "quoted"), [("HAM10000", "HAM10000"), ("a,b", '"a,b"'),
                                              ("PAD-UFES 20", "PAD-UFES 20")])
def test_table_row(name: str, quoted: str) -> None:
    row = table_row(name, Metrics(VALUES, {}))
    assert row == f"{quoted},0.1250,0.2500,0.0625,0.0000,0.3750"
    (read,) = pd.read_csv(io.StringIO(f"{TABLE_HEADER}\n{row}\n")).to_dict("records")
    assert read == {"Dataset": name, "W_F1": 0.125, "AUROC": 0.25, "BACC": 0.0625, "ACC": 0.0, "AUPR": 0.375}


def test_table_names_follow_the_published_header() -> None:
    names = {"W_F1": "weighted_f1", "AUROC": "auroc", "BACC": "bacc", "ACC": "acc", "AUPR": "aupr"}
    assert tuple(names[column] for column in TABLE_HEADER.split(",")[1:]) == TABLE_METRICS


def test_table_row_rounds_and_says_nan() -> None:
    metrics = Metrics({**VALUES, "acc": 0.91959798, "auroc": float("nan")}, {"auroc": "class 1 is absent"})
    assert table_row("x", metrics) == "x,0.1250,nan,0.0625,0.9196,0.3750"


def test_metric_lines() -> None:
    metrics = classification_metrics([0, 0, 2], [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    lines = metric_lines(metrics.to_results(), "test").splitlines()
    assert lines[0] == "test" and [line.split()[0] for line in lines[1:]] == list(NAMES)
    table = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert table["acc"] == "0.6667" and table["bacc"] == "0.7500" and table["auroc"] == "nan"
    assert lines[1 + NAMES.index("auroc")].endswith("nan   (class 1 is absent from these images)")
    assert lines[1] == "  acc           0.6667"
