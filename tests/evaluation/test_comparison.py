"""The table of several models: numbers, order, layout."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from furnace.evaluation.comparison import compare, comparison_table, markdown_table, table_cells, text_table
from furnace.evaluation.metrics import NAMES, classification_metrics
from furnace.evaluation.predictions import Predictions
from furnace.evaluation.statistics import Resampling, paired_differences


def three_models(n: int = 90) -> list[Predictions]:
    """One good, one bad, one in between, on the same images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, n)
    sets = []
    for name, skill in (("good", 2.5), ("bad", 0.3), ("a|b", 1.2)):
        p = np.exp(rng.normal(size=(n, 3)) + skill * np.eye(3)[labels])
        sets.append(Predictions(name, [f"{i}" for i in range(n)], labels, p / p.sum(axis=1, keepdims=True),
                                Path(f"{name}.csv"), pd.DataFrame(index=range(n))))
    return sets


def test_values_and_differences() -> None:
    """Values are the metrics'; a difference is the further model minus the first, with the paired interval."""
    sets, resampling = three_models(), Resampling(resamples=200)
    results = compare(sets, resampling)
    table = comparison_table(results).set_index(["metric", "model"])
    assert list(table.index)[:4] == [("acc", "good"), ("acc", "bad"), ("acc", "a|b"), ("bacc", "good")]
    assert len(table) == 3 * len(NAMES) and (table["n"] == 90).all()
    paired = paired_differences(sets[1].labels, sets[1].probabilities, sets[0].probabilities, resampling)
    for one in sets:
        values = classification_metrics(one.labels, one.probabilities)
        for metric in NAMES:
            row = table.loc[(metric, one.name)]
            assert row["value"] == values[metric] and row["low"] <= row["high"]
            if one is sets[0]:
                assert row[["difference", "p_value", "compared_with", "test"]].isna().all()
            else:
                assert row["difference"] == pytest.approx(values[metric] - table.loc[(metric, "good"), "value"])
                assert row["compared_with"] == "good" and isinstance(row["test"], str)
    row = table.loc[("bacc", "bad")]
    assert (row["difference_low"], row["difference_high"], row["p_value"]) == (
        paired["bacc"].low, paired["bacc"].high, paired["bacc"].p_value)
    assert row["difference_high"] < 0 and row["p_value"] < 0.05


def test_undefined_is_nan_with_its_reason() -> None:
    """A class without images."""
    first, second, _ = three_models()
    keep = first.labels != 2
    sets = [Predictions(one.name, one.filenames[:keep.sum()], one.labels[keep], one.probabilities[keep], one.path,
                        one.groups[keep]) for one in (first, second)]
    results = compare(sets, Resampling(resamples=100))
    table = comparison_table(results).set_index(["metric", "model"])
    assert np.isnan(table.loc[("auroc", "bad"), "value"]) and np.isnan(table.loc[("auroc", "bad"), "difference"])
    assert results["differences"]["bad"]["metrics"]["auroc"]["difference"] is None
    cells = table_cells(table.reset_index())
    assert results["differences"]["bad"]["metrics"]["auroc"]["reason"] == "class 2 is absent from these images"
    row = next(row for row in cells if row[:2] == ["auroc", "bad"])
    assert row[2] == "nan (class 2 is absent from these images)" and row[4:7] == ["", "", ""]


def test_layouts() -> None:
    """Signs, brackets, small p, escaped names; a metric's name once; one model has no columns of differences."""
    row = {"n": 5, "value": 0.81239, "low": 0.7, "high": 0.9, "reason": None, "compared_with": None, "difference": None,
           "difference_low": None, "difference_high": None, "p_value": None, "test": None}
    table = pd.DataFrame([{"metric": "acc", "model": "A", **row}, {
        "metric": "acc", "model": "a|b", **row, "difference": -0.1, "difference_low": -0.2, "difference_high": 0.01,
        "p_value": 0.00004, "test": "DeLong"}])
    cells = table_cells(table)
    assert cells[1] == ["acc", "A", "0.8124", "[0.7000, 0.9000]", "", "", "", ""]
    assert cells[2] == ["acc", "a|b", "0.8124", "[0.7000, 0.9000]", "-0.1000", "[-0.2000, +0.0100]", "<0.0001",
                        "DeLong"]
    assert markdown_table(cells).splitlines()[1::2] == [
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| acc | a\\|b | 0.8124 | [0.7000, 0.9000] | -0.1000 | [-0.2000, +0.0100] | <0.0001 | DeLong |"]
    lines = text_table(cells).splitlines()
    assert lines[1].startswith("acc ") and lines[2].startswith("        a|b")
    assert lines[0].index("value") == lines[2].index("0.8124")
    no_interval = table_cells(table.assign(low=np.nan, high=np.nan, reason="one patient"))
    assert no_interval[1][2:4] == ["0.8124", "none (one patient)"]
    assert table_cells(table[:1])[0] == ["metric", "model", "value", "95 % CI"]
