"""Results as files and as a table for the eye."""

from typing import Any

import numpy as np
import pandas as pd

from furnace.evaluation.calibration import apply_temperature, operating_points
from furnace.evaluation.metrics import Metrics, classification_metrics
from furnace.evaluation.statistics import Resampling, bootstrap_intervals

TABLE_HEADER = "Dataset,W_F1,AUROC,BACC,ACC,AUPR"  # the published results table
TABLE_METRICS = ("weighted_f1", "auroc", "bacc", "acc", "aupr")


def predictions_table(filenames: list[str], y_true: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """A row per image: filename, true_label, predicted_label, (binary: probability,) probability_class_0..K-1.

    Args:
        filenames: N names.
        y_true: (N,).
        probabilities: (N, K).
    """
    table = pd.DataFrame({"filename": filenames, "true_label": y_true, "predicted_label": probabilities.argmax(axis=1)})
    if probabilities.shape[1] == 2:
        table["probability"] = probabilities[:, 1]
    for k in range(probabilities.shape[1]):
        table[f"probability_class_{k}"] = probabilities[:, k]
    return table


def score_split(y_true: np.ndarray, probabilities: np.ndarray, *, resampling: Resampling,
                temperature: float | None = None, fitted_on: str | None = None) -> dict[str, Any]:
    """Everything that results.json says of a split.

    Args:
        y_true: (N,).
        probabilities: (N, K), uncalibrated.
        resampling: how the 95 % intervals are made.
        temperature: of a temperature scaling fitted elsewhere; ECE and Brier score are then told before and after.
        fitted_on: the images it was fitted on, in words.

    Returns:
        ``{"n", "resampling", "metrics": {name: {"value", "low", "high", "reason"}}, "operating_points",
        "calibration"}``.
    """
    metrics = classification_metrics(y_true, probabilities)
    intervals = bootstrap_intervals(y_true, probabilities, resampling)
    entries = metrics.to_results()
    for name, interval in intervals.items():
        entries[name].update(low=interval.low, high=interval.high, reason=entries[name]["reason"] or interval.reason)
    calibration = None
    if temperature is not None:
        after = classification_metrics(y_true, apply_temperature(probabilities, temperature))
        calibration = {"temperature": temperature, "fitted_on": fitted_on,
                       "ece_before": metrics["ece"], "ece_after": after["ece"],
                       "brier_before": metrics["brier"], "brier_after": after["brier"]}
    return {"n": len(y_true), "resampling": resampling.describe(), "metrics": entries,
            "operating_points": operating_points(y_true, probabilities), "calibration": calibration}


def table_row(data_set: str, metrics: Metrics) -> str:
    """The data set's line of the published table, four decimals, ``nan`` where a metric is not defined."""
    name = f'"{data_set}"' if "," in data_set else data_set
    return ",".join([name, *(f"{metrics[key]:.4f}" for key in TABLE_METRICS)])


def metric_lines(results: dict[str, dict], title: str) -> str:
    """A table of the ``metrics`` of a split of results.json: value, 95 % interval, reasons for what is missing."""
    lines, width = [title], max([12, *map(len, results)])
    for name, entry in results.items():
        value = "nan" if entry["value"] is None else f"{entry['value']:.4f}"
        interval = "" if entry["low"] is None else f"  [{entry['low']:.4f}, {entry['high']:.4f}]"
        lines.append(f"  {name:<{width}} {value:>7}{interval}" + (f"   ({entry['reason']})" if entry["reason"] else ""))
    return "\n".join(lines)
