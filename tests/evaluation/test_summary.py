"""Several runs as one table: means and standard deviations by hand."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from furnace.evaluation.summary import summarise, summary_lines

SETTINGS = [{"seed": 0, "fold": 0}, {"seed": 0, "fold": 1}, {"seed": 1, "fold": 0}]
METRICS = {"test": {"dice": [0.8, 0.9, 0.7], "hd95": [None, 4.0, 10.0], "sensitivity": [None, None, 0.5],
                    "specificity": [None, None, None]},
           "val": {"dice": [0.5, 0.5, 0.5], "hd95": [1.0, 2.0, 3.0], "sensitivity": [0.1, 0.2, 0.6],
                   "specificity": [1.0, 1.0, 0.4]}}


def outcome(run: int, splits: tuple[str, ...] = ("val", "test")) -> dict[str, Any]:
    """results.json of one run."""
    return {"task": "segmentation", "data_set": "ham", "model": "demo", "head": "linear", "best_epoch": 10 + run,
            "class_names": ["background", "lesion"], "setting": SETTINGS[run], "weights_sha256": str(run),
            "splits": {split: {"n": 5, "metrics": {name: {"value": values[run], "low": None, "high": None}
                                                   for name, values in METRICS[split].items()}} for split in splits}}


def entries(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(entry["split"], entry["metric"]): entry for entry in results["summary"]}


def test_means_and_standard_deviations_by_hand(tmp_path: Path) -> None:
    """Of n - 1; a run without the metric is left out and the number of runs says so."""
    results = summarise(tmp_path, SETTINGS, [outcome(run) for run in range(3)])
    found = entries(results)
    assert found["test", "dice"] == {"split": "test", "metric": "dice", "runs": 3, "mean": pytest.approx(0.8),
                                     "sd": pytest.approx(0.1)}  # deviations 0, 0.1, -0.1: sqrt(0.02 / 2)
    assert found["test", "hd95"] == {"split": "test", "metric": "hd95", "runs": 2, "mean": 7.0,
                                     "sd": pytest.approx(math.sqrt(18))}
    assert found["test", "sensitivity"] == {"split": "test", "metric": "sensitivity", "runs": 1, "mean": 0.5,
                                            "sd": None}
    assert found["test", "specificity"] == {"split": "test", "metric": "specificity", "runs": 0, "mean": None,
                                            "sd": None}
    assert found["val", "dice"]["sd"] == 0 and found["val", "sensitivity"]["mean"] == pytest.approx(0.3)
    assert len(found) == 8
    assert results["runs"] == SETTINGS and results["model"] == "demo" and results["head"] == "linear"
    assert not {"setting", "best_epoch", "weights_sha256", "splits"} & results.keys(), "they differ between the runs"


def test_the_table_has_a_row_per_run_and_split(tmp_path: Path) -> None:
    """Seed, fold, chosen epoch, values; what is not defined is empty."""
    summarise(tmp_path, SETTINGS, [outcome(run) for run in range(3)])
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table.columns) == ["split", "seed", "fold", "best_epoch", *METRICS["test"]]
    assert list(table["split"]) == ["val", "test"] * 3 and list(table["best_epoch"]) == [10, 10, 11, 11, 12, 12]
    assert list(zip(table["seed"], table["fold"], strict=True)) == [(0, 0)] * 2 + [(0, 1)] * 2 + [(1, 0)] * 2
    tests = table[table["split"] == "test"]
    assert list(tests["dice"]) == METRICS["test"]["dice"] and tests["hd95"].isna().tolist() == [True, False, False]


def test_a_single_run_has_no_deviation(tmp_path: Path) -> None:
    """And a fold without val images only the split that it has."""
    results = summarise(tmp_path, SETTINGS[:1], [outcome(0, ("test",))])
    assert entries(results)["test", "dice"] == {"split": "test", "metric": "dice", "runs": 1, "mean": 0.8, "sd": None}
    assert {split for split, _ in entries(results)} == {"test"}


def test_lines_for_the_eye(tmp_path: Path) -> None:
    """What is shown, with the deviation where there is one; what is not defined is left out."""
    results = summarise(tmp_path, SETTINGS, [outcome(run) for run in range(3)])
    lines = summary_lines(results, ("dice", "sensitivity", "specificity")).splitlines()
    assert lines[0] == "ham, demo: mean (SD) over 3 runs"
    assert [line.split() for line in lines[1:]] == [
        ["val", "dice", "0.5000", "(0.0000)"], ["val", "sensitivity", "0.3000", "(0.2646)"],
        ["val", "specificity", "0.8000", "(0.3464)"], ["test", "dice", "0.8000", "(0.1000)"],
        ["test", "sensitivity", "0.5000"]]


def test_settings_and_outcomes_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        summarise(tmp_path, SETTINGS, [outcome(0)])
