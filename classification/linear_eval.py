"""Linear evaluation of a frozen backbone on a labelled image set: from a CSV to test metrics.

    python3 linear_eval.py --model PanDerm_Base_LP --pretrained_checkpoint FILE.pth --nb_classes 6 \
        --csv_path DATA/2000.csv --root_path DATA/images --output_dir results

The published probe is fitted on train alone; val, where there is one, only calibrates it. ``--probe sweep`` chooses its
strength on val. Test is evaluated once. Several ``--percent_data`` or ``--seeds`` give a table and a curve.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from furnace.arguments import extraction_of, linear_eval_parser, settle_input_size
from furnace.command_line import entry_point, logger, parse
from furnace.data.external import read_external, warn_of_shared_images
from furnace.data.manifest import Manifest, read_manifest
from furnace.evaluation.features import backbone_features
from furnace.evaluation.linear_evaluation import (
    TASK,
    LabelledFeatures,
    Protocol,
    draw_subsets,
    evaluate_once,
    needed_images,
    summarise_runs,
    summary_lines,
)
from furnace.evaluation.report import TABLE_HEADER, metric_lines
from furnace.evaluation.run import open_evaluation_run, settle_precision
from furnace.models import create_backbone
from furnace.runtime import distributed, files
from furnace.runtime.files import UserError
from furnace.runtime.run_directory import RunDirectory, child_runs


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the linear evaluation; returns the exit code."""
    args = parse(linear_eval_parser(), argv)
    check_options(args)
    table = args.output_dir / args.csv_filename
    refuse_input_as_table(table, args.csv_path)
    files.check_table(table, TABLE_HEADER)
    manifest, external = read_data(args)
    settings = [{"percent_data": percent, "seed": seed} for percent in args.percent_data for seed in args.seeds]
    subsets = draw_subsets(manifest, settings, args.percent_mode)
    needed = needed_images(manifest, subsets)
    how = extraction_of(args)
    settle_input_size(args)
    backbone = create_backbone(args.model, args.pretrained_checkpoint, input_size=args.input_size, seed=args.seed)
    outside = {"external": external and f"{external.sha256} {external.images_digest}"}
    run = distributed.on_main(lambda: open_evaluation_run(
        TASK, vars(args), manifest, backbone.provenance, left_out={"test_csv", "test_root"},
        also={"probe_precision": "float64", **outside}))
    results = distributed.on_main(lambda: stored_results(run, "table.csv" if settings[1:] else "test.csv"))
    if results:
        report_finished(run, results, table, earlier=True)
        return 0

    began = time.perf_counter()
    how = distributed.on_main(lambda: settle_precision(vars(args), run, backbone, needed, how))
    features = backbone_features(backbone, needed, how)
    elsewhere = None if external is None else backbone_features(backbone, external, how)
    if features is None:
        return 0
    extracted = features.extracted + (elsewhere.extracted if elsewhere else 0)
    data = LabelledFeatures(needed, features.embeddings)
    outer = None if elsewhere is None else LabelledFeatures(external, elsewhere.embeddings)
    protocol = Protocol(probe=args.probe, monitor=args.monitor, stratify=args.bootstrap == "stratified",
                        resamples=args.resamples, amp_dtype=how.amp_dtype, transform=args.transform,
                        checkpoint=args.pretrained_checkpoint, model_seed=args.seed, device=how.device)
    if settings[1:]:
        outcomes = child_runs(run, settings, lambda child, setting: evaluate_once(
            child, setting, subsets[settings.index(setting)], data, outer, protocol, backbone.provenance, plots=False),
            overwrite=args.overwrite)
        results = summarise_runs(run, outcomes)
    else:
        results = evaluate_once(run, settings[0], subsets[0], data, outer, protocol, backbone.provenance)
    run.write_log({"images_extracted": extracted, "seconds": round(time.perf_counter() - began, 1)})
    run.write_results(results)
    report_finished(run, results, table, earlier=False)
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect; fill in the defaults that depend on others."""
    if args.monitor and args.probe != "sweep":
        raise UserError("--monitor chooses the strength of --probe sweep; the published probe has nothing to choose")
    if args.test_root and not args.test_csv:
        raise UserError("--test_root is the image folder of --test_csv, which is missing")
    args.monitor = args.monitor or ("bacc" if args.probe == "sweep" else None)
    args.seeds = list(dict.fromkeys(args.seeds or [args.seed]))
    args.percent_data = sorted(set(args.percent_data))


def read_data(args: argparse.Namespace) -> tuple[Manifest, Manifest | None]:
    """The data set and the external test set, every problem of either told before any work."""
    folder = args.output_dir if distributed.is_main() else None
    manifest = read_manifest(args.csv_path, args.root_path, nb_classes=args.nb_classes,
                             class_names_file=args.class_names, strict_split=args.strict_split, report_folder=folder)
    if args.test_csv is None:
        return manifest, None
    external = read_external(args.test_csv, args.test_root, class_names=manifest.class_names,
                             nb_classes=manifest.nb_classes, label_column=manifest.label_column,
                             strict_split=args.strict_split, report_folder=folder)
    seen = manifest.split("train")
    if args.probe == "sweep":  # its final fit has val, too
        seen = seen.join(manifest.split("val"))
    warn_of_shared_images(seen, external, strict_split=args.strict_split, report_folder=folder)
    return manifest, external


def refuse_input_as_table(table: Path, csv_path: Path) -> None:
    """The results table must not be the data set's own CSV, nor be called like the folder of its runs."""
    if table.name == csv_path.stem:
        raise files.OutputError(f"--csv_filename {table.name} is the name of the folder of this data set's runs: "
                                "choose another name")
    if table.exists() and csv_path.exists() and table.samefile(csv_path):
        raise files.OutputError(f"--csv_filename {table.name} in --output_dir is the input {csv_path}; nothing was "
                                "written: choose another name")


def stored_results(run: RunDirectory, file: str) -> dict[str, Any] | None:
    """The results of a finished run whose file is still there."""
    results = run.read_results()
    return results if results and "table_rows" in results and (run.path / file).exists() else None


def report_finished(run: RunDirectory, results: dict[str, Any], table: Path, *, earlier: bool) -> None:
    """Print a run's metrics and name its files; its lines go to the table, for an earlier run where it lacks them."""
    if not distributed.is_main():
        return
    for row in results["table_rows"]:
        files.append_row(table, TABLE_HEADER, row, once=earlier)
    if "summary" in results:
        logger.info("%s", summary_lines(results))
    for name, split in results.get("splits", {}).items():
        logger.info("%s", metric_lines(split["metrics"], f"{results['data_set']}, {results['model']}: {split['n']} "
                                       f"{name} images, {results['amp_dtype']}; 95 % intervals: {split['resampling']}"))
    names = sorted(path.name for path in run.path.iterdir())
    children = [name for name in names if name.startswith("percent_data_")]
    wrote = ", ".join([name for name in names if name not in children] + [f"{len(children)} runs"] * bool(children))
    logger.info("results in %s (%s); table %s", run.path, wrote, table)


if __name__ == "__main__":
    sys.exit(main())
