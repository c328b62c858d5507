"""Several runs of one training, over seeds and folds, as one table: means and standard deviations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from furnace.runtime import files

SHARED = ("task", "data_set", "model", "head", "recipe", "amp_dtype", "class_names", "tta")  # alike in all runs


def summarise(folder: Path, settings: list[dict[str, Any]], outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds and folds; writes table.csv, a row per run and split.

    Returns:
        What results.json of the parent holds.
    """
    rows = [{"split": split, **setting, "best_epoch": outcome["best_epoch"],
             **{name: entry["value"] for name, entry in scored["metrics"].items()}}
            for setting, outcome in zip(settings, outcomes, strict=True)
            for split, scored in outcome["splits"].items()]
    table = pd.DataFrame(rows)
    files.write_table(folder / "table.csv", table)
    metrics = [name for name in outcomes[0]["splits"]["test"]["metrics"]]
    summary = []
    for split, runs in table.groupby("split", sort=False):
        for name in metrics:
            values = runs[name].dropna().to_numpy(dtype=float)
            summary.append({"split": split, "metric": name, "runs": len(values),
                            "mean": float(np.mean(values)) if len(values) else None,
                            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None})
    shared = {key: outcomes[0][key] for key in SHARED if key in outcomes[0]}
    return {**shared, "runs": settings, "summary": summary}


def summary_lines(results: dict[str, Any], shown: Sequence[str]) -> str:
    """The summary for the eye, of these metrics: mean (SD) over the runs."""
    lines = [f"{results['data_set']}, {results['model']}: mean (SD) over {len(results['runs'])} runs"]
    for entry in results["summary"]:
        if entry["metric"] in shown and entry["mean"] is not None:
            spread = "" if entry["sd"] is None else f" ({entry['sd']:.4f})"
            lines.append(f"  {entry['split']:<9} {entry['metric']:<17} {entry['mean']:.4f}{spread}")
    return "\n".join(lines)
