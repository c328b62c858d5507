"""Score predictions CSVs again: all metrics with 95 % intervals, plots, and paired differences between models.

    python3 evaluate_predictions.py PanDerm/test.csv DINOv3/test.csv --names PanDerm DINOv3 \
        --csv_path HAM10000_metadata.csv --output_dir comparison

Any CSV with filename (or image_path), true_label and probability_class_0.. (binary: probability) will do. Every further
file is compared with the first on the same images.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from furnace.arguments import evaluate_predictions_parser
from furnace.command_line import entry_point, logger, parse
from furnace.data.class_names import read_class_names
from furnace.data.problems import Problem, report
from furnace.evaluation.comparison import compare, comparison_table, markdown_table, table_cells, text_table
from furnace.evaluation.plots import draw_classification_plots
from furnace.evaluation.predictions import Predictions, aggregate, align, default_names, join_groups, read_all
from furnace.evaluation.statistics import Resampling, resampling_for
from furnace.runtime import files
from furnace.runtime.files import OutputError, UserError

TASK = "evaluate_predictions"
RESULTS, TABLE, MARKDOWN, PLOTS = "results.json", "table.csv", "table.md", "plots"


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Read, compare, write; returns the exit code."""
    args = parse(evaluate_predictions_parser(), argv)
    names = names_of(args.predictions, args.names)
    refuse_output(args.output_dir, inputs=[*args.predictions, args.csv_path, args.class_names],
                  overwrite=args.overwrite)
    sets, resampling = prepare(args, names)
    class_names = class_names_of(args.class_names, sets[0])
    results = compare(sets, resampling)
    for one in sets:
        entry = {"path": str(one.path), "sha256": files.sha256_file(one.path)}
        results["files"][one.name] = {**entry, **results["files"][one.name]}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
                if key in ("csv_path", "group_column", "aggregate", "bootstrap", "resamples", "seed")}
    clear_plots(args.output_dir)
    files.write_json(args.output_dir / RESULTS, {"task": TASK, "settings": settings, "class_names": list(class_names),
                                                 **results})
    table = comparison_table(results)
    cells = table_cells(table)
    files.write_table(args.output_dir / TABLE, table)
    files.write_text(args.output_dir / MARKDOWN, markdown_table(cells))
    for one in sets:
        draw_classification_plots(args.output_dir / PLOTS / files.folder_name(one.name), one.labels, one.probabilities,
                                  class_names)
    logger.info("%s", text_table(cells))
    unit = "lesions" if args.aggregate else "images"
    logger.info("%s %s; 95 %% intervals from %s%s", f"{len(sets[0]):,}", unit, resampling.describe(),
                f"; differences are to {sets[0].name}" if len(sets) > 1 else "")
    logger.info("results in %s (%s, %s, %s, %s/)", args.output_dir, RESULTS, TABLE, MARKDOWN, PLOTS)
    return 0


def names_of(paths: Sequence[Path], given: Sequence[str] | None) -> list[str]:
    """--names, else names from the files; different as names of folders, too."""
    names = [name.strip() for name in given] if given else default_names(paths)
    if len(names) != len(paths):
        raise UserError(f"--names gives {len(names)} names for {len(paths)} predictions: give one for each, in order")
    folders = [files.folder_name(name).lower() for name in names]
    if len(set(folders)) < len(folders) or any(not folder.strip(".") for folder in folders):
        raise UserError(f"the names {', '.join(map(repr, names))} are empty or too alike for folders of plots: give "
                        "others by --names")
    return names


def refuse_output(folder: Path, *, inputs: Sequence[Path | None], overwrite: bool) -> None:
    """Former results are replaced only when asked, other files of these names never."""
    present = [name for name in (RESULTS, TABLE, MARKDOWN, PLOTS) if (folder / name).exists()]
    of_input = [name for name in present for path in inputs
                if path is not None and path.exists() and path.samefile(folder / name)]
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, not a folder: choose another --output_dir")
    if not present:
        return
    try:
        stored = json.loads((folder / RESULTS).read_text(encoding="utf-8")) if RESULTS in present else {}
    except ValueError:
        stored = {}
    ours = isinstance(stored, dict) and stored.get("task") == TASK
    if of_input or not ours:
        raise OutputError(f"{folder} holds {', '.join(of_input or present)} which this script did not write; nothing "
                          "was written: choose another --output_dir")
    if not overwrite:
        raise OutputError(f"{folder} holds the results of an earlier evaluation: choose another --output_dir, or add "
                          "--overwrite to replace them")


def clear_plots(folder: Path) -> None:
    """Remove the plots of the evaluation that is being replaced."""
    if (folder / RESULTS).exists():
        for name in json.loads((folder / RESULTS).read_text(encoding="utf-8"))["files"]:
            shutil.rmtree(folder / PLOTS / files.folder_name(name), ignore_errors=True)


def prepare(args: argparse.Namespace, names: Sequence[str]) -> tuple[list[Predictions], Resampling]:
    """The files' predictions in one order, lesions instead of images when asked, and how to resample them."""
    first, *others = read_all(args.predictions, names, args.output_dir)
    if args.csv_path is not None:
        first = join_groups(first, args.csv_path)
    if args.group_column and args.group_column not in first.groups:
        raise UserError(f"--group_column {args.group_column}: {args.csv_path or first.path} has no such column")
    sets = [first, *(align(first, other) for other in others)]
    if args.aggregate:
        sets = [aggregate(one, args.aggregate) for one in sets]
    groups = sets[0].groups
    if args.group_column:
        groups = groups[[column for column in groups if column == args.group_column]]
    resampling = resampling_for(groups, stratify=args.bootstrap == "stratified", resamples=args.resamples,
                                seed=args.seed)
    if args.aggregate and resampling.clusters is None:
        resampling = replace(resampling, unit="lesion")
    return sets, resampling


def class_names_of(file: Path | None, predictions: Predictions) -> tuple[str, ...]:
    """--class_names, else the numbers."""
    problems: list[Problem] = []
    names = read_class_names(pd.DataFrame(), predictions.probabilities.shape[1], file, problems)
    report(problems, csv_path=predictions.path, folder=None)
    return names


if __name__ == "__main__":
    sys.exit(main())
