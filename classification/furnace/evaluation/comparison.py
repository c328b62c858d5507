"""Several models on the same images: metrics with intervals, paired differences to the first, and one table of all."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from furnace.evaluation.predictions import Predictions
from furnace.evaluation.report import score_split
from furnace.evaluation.statistics import Resampling, paired_differences

HEADER = ("metric", "model", "value", "95 % CI", "difference", "95 % CI of difference", "p", "test")


def compare(sets: Sequence[Predictions], resampling: Resampling) -> dict[str, Any]:
    """Score every model, and each further one against the first.

    Args:
        sets: predictions of the same images in the same order (``align``).
        resampling: of these images; one set of resamples for all models.

    Returns:
        ``{"files": {name: score_split(...)}, "differences": {name: {"compared_with", "metrics": {metric: {"difference",
        "low", "high", "p_value", "test", "reason"}}}}}``; a difference is the further model minus the first, None where
        undefined.
    """
    first, *others = sets
    scores = {one.name: score_split(one.labels, one.probabilities, resampling=resampling) for one in sets}
    differences = {}
    for other in others:
        found = paired_differences(other.labels, other.probabilities, first.probabilities, resampling)
        differences[other.name] = {"compared_with": first.name, "metrics": {
            metric: {"difference": d.difference, "low": d.low, "high": d.high, "p_value": d.p_value, "test": d.test,
                     "reason": d.reason} for metric, d in found.items()}}
    return {"files": scores, "differences": differences}


def comparison_table(results: dict[str, Any]) -> pd.DataFrame:
    """A row per metric and model, NaN where undefined.

    Args:
        results: what ``compare`` returned.

    Returns:
        metric, model, n, value, low, high, reason, compared_with, difference, difference_low, difference_high,
        p_value, test.
    """
    rows = []
    metrics = next(iter(results["files"].values()))["metrics"]
    for metric in metrics:
        for name, score in results["files"].items():
            against = results["differences"].get(name, {})
            d = against.get("metrics", {}).get(metric, {})
            rows.append({"metric": metric, "model": name, "n": score["n"], **score["metrics"][metric],
                         "compared_with": against.get("compared_with"), "difference": d.get("difference"),
                         "difference_low": d.get("low"), "difference_high": d.get("high"),
                         "p_value": d.get("p_value"), "test": d.get("test")})
    numbers = ["value", "low", "high", "difference", "difference_low", "difference_high", "p_value"]
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, float))


def table_cells(table: pd.DataFrame) -> list[list[str]]:
    """The table for a reader: a header and a row per metric and model, without the columns that say nothing."""
    rows = []
    for row in table.to_dict("records"):
        rows.append([row["metric"], row["model"], _number(row["value"], ".4f") or f"nan ({row['reason']})",
                     _interval(row["low"], row["high"], ".4f") or _why(row), _number(row["difference"], "+.4f"),
                     _interval(row["difference_low"], row["difference_high"], "+.4f"), _p(row["p_value"]),
                     row["test"] if isinstance(row["test"], str) else ""])
    alone = table["model"].nunique() == 1
    return [list(row[:4] if alone else row) for row in [HEADER, *rows]]


def text_table(cells: list[list[str]]) -> str:
    """Aligned columns; a metric's name stands once, on its first line."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines, previous = [], None
    for row in cells:
        shown = ["" if row[0] == previous else row[0], *row[1:]]
        previous = row[0]
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(shown, widths, strict=True)).rstrip())
    return "\n".join(lines)


def markdown_table(cells: list[list[str]]) -> str:
    """GitHub's form, ``|`` in names escaped."""
    header, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def _interval(low: float, high: float, form: str) -> str:
    return "" if math.isnan(low) or math.isnan(high) else f"[{low:{form}}, {high:{form}}]"


def _why(row: dict[str, Any]) -> str:
    """Why a value has no interval; a value that is missing itself has said so."""
    return "" if math.isnan(row["value"]) or not isinstance(row["reason"], str) else f"none ({row['reason']})"


def _p(value: float) -> str:
    return "" if math.isnan(value) else "<0.0001" if value < 0.0001 else f"{value:.4f}"
