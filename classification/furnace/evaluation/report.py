"""Results as files and as a table for the eye."""

import numpy as np
import pandas as pd

from furnace.evaluation.metrics import Metrics

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


def table_row(data_set: str, metrics: Metrics) -> str:
    """The data set's line of the published table, four decimals, ``nan`` where a metric is not defined."""
    name = f'"{data_set}"' if "," in data_set else data_set
    return ",".join([name, *(f"{metrics[key]:.4f}" for key in TABLE_METRICS)])


def metric_lines(results: dict[str, dict], title: str) -> str:
    """A two-column table of the ``metrics`` of a split of results.json, with reasons for what is missing."""
    lines = [title]
    for name, entry in results.items():
        value = "nan" if entry["value"] is None else f"{entry['value']:.4f}"
        lines.append(f"  {name:<12} {value:>7}" + (f"   ({entry['reason']})" if entry["reason"] else ""))
    return "\n".join(lines)
