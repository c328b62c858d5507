"""Linear evaluation of a frozen backbone on a labelled image set: from a CSV to test metrics.

    python3 linear_eval.py --model PanDerm_Base_LP --pretrained_checkpoint FILE.pth --nb_classes 6 \
        --csv_path DATA/2000.csv --root_path DATA/images --output_dir results

The probe is fitted on train alone; val is not read; test is evaluated once.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from furnace.arguments import entry_point, linear_eval_parser, logger, parse
from furnace.data.datasets import build_loader
from furnace.data.manifest import Manifest, read_manifest
from furnace.data.splits import take_percent
from furnace.data.transforms import build_transform
from furnace.evaluation.features import extract_features
from furnace.evaluation.linear_probe import fit_linear_probe
from furnace.evaluation.metrics import classification_metrics
from furnace.evaluation.report import TABLE_HEADER, metric_lines, predictions_table, table_row
from furnace.models import Provenance, create_backbone
from furnace.runtime import distributed, files
from furnace.runtime.precision import pick_device, resolve_amp_dtype
from furnace.runtime.run_directory import RunDirectory, fingerprint, open_run

TASK = "linear_probe"
# options that cannot change the numbers, or that stand in the fingerprint by their content (CSV, images, weights)
NOT_IN_FINGERPRINT = {"config", "csv_path", "root_path", "class_names", "pretrained_checkpoint", "strict_split",
                      "batch_size", "num_workers", "device", "output_dir", "csv_filename", "overwrite",
                      "no_auto_resume"}


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the linear evaluation; returns the exit code."""
    args = parse(linear_eval_parser(), argv)
    table = args.output_dir / args.csv_filename
    refuse_input_as_table(table, args.csv_path)
    files.check_table(table, TABLE_HEADER)
    manifest = read_manifest(args.csv_path, args.root_path, nb_classes=args.nb_classes,
                             class_names_file=args.class_names, strict_split=args.strict_split,
                             report_folder=args.output_dir if distributed.is_main() else None)
    train = take_percent(manifest.split("train"), args.percent_data, mode=args.percent_mode, seed=args.seed)
    test = manifest.split("test")
    device = pick_device(args.device)
    backbone = create_backbone(args.model, args.pretrained_checkpoint, input_size=args.input_size, seed=args.seed)
    run, finished = distributed.on_main(lambda: open_linear_run(args, manifest, backbone.provenance))
    if finished:
        report_finished(run, finished, table, earlier=True)
        return 0

    began = time.perf_counter()
    amp_dtype = distributed.on_main(lambda: settle_precision(args, run, backbone.to(device), device))
    loader = build_loader(train.join(test), build_transform(backbone), batch_size=args.batch_size,
                          num_workers=args.num_workers, device=device)
    features = extract_features(backbone, loader, device=device, amp_dtype=amp_dtype)
    if features is None:
        return 0
    probe = fit_linear_probe(features.embeddings[:len(train)], train.labels, nb_classes=manifest.nb_classes,
                             seed=args.seed, device=device)
    probabilities = probe.predict_proba(features.embeddings[len(train):])
    metrics = classification_metrics(test.labels, probabilities)
    seconds = round(time.perf_counter() - began, 1)
    run.write_log({"train_images": len(train), "test_images": len(test), "cost": probe.cost,
                   "objective": probe.objective, "iterations": probe.iterations, "seconds": seconds})
    run.write_predictions("test", predictions_table(test.filenames, test.labels, probabilities))
    results = {"task": TASK, "data_set": manifest.name, "model": args.model,
               "weights_sha256": backbone.provenance.sha256, "amp_dtype": amp_dtype,
               "class_names": list(manifest.class_names), "table_row": table_row(manifest.name, metrics),
               "splits": {"test": {"n": len(test), "metrics": metrics.to_results()}}}
    run.write_results(results)
    report_finished(run, results, table, earlier=False)
    return 0


def refuse_input_as_table(table: Path, csv_path: Path) -> None:
    """The results table must not be the data set's own CSV, nor be called like the folder of its runs."""
    if table.name == csv_path.stem:
        raise files.OutputError(f"--csv_filename {table.name} is the name of the folder of this data set's runs: "
                                "choose another name")
    if table.exists() and csv_path.exists() and table.samefile(csv_path):
        raise files.OutputError(f"--csv_filename {table.name} in --output_dir is the input {csv_path}; nothing was "
                                "written: choose another name")


def open_linear_run(args: argparse.Namespace, manifest: Manifest,
                    provenance: Provenance) -> tuple[RunDirectory, dict[str, Any] | None]:
    """The folder ``output_dir/<data set>/<model>_<fingerprint>``, and its results when the run was finished."""
    settings = {key: value for key, value in vars(args).items() if key not in NOT_IN_FINGERPRINT}
    parts = {"task": TASK, "probe_precision": "float64", **settings, "csv_sha256": manifest.sha256,
             "images_digest": manifest.images_digest,
             "weights_sha256": provenance.sha256, "class_names": ";".join(manifest.class_names)}
    model = "".join(c if c.isalnum() or c in "._-" else "-" for c in args.model)
    path = args.output_dir / manifest.name / f"{model}_{fingerprint(parts)[:8]}"
    files.check_space(path, 65536 + len(manifest.split("test")) * (80 + 16 * manifest.nb_classes))
    run = open_run(path, parts=parts, overwrite=args.overwrite, auto_resume=not args.no_auto_resume,
                   environment={"seed": args.seed, "csv_sha256": manifest.sha256, "weights": provenance.to_dict()})
    results = run.read_results()
    complete = results and "table_row" in results and (run.path / "test.csv").exists()
    return run, results if complete else None


def settle_precision(args: argparse.Namespace, run: RunDirectory, backbone, device) -> str:
    """Resolve ``--amp_dtype auto`` once; an unfinished run keeps what it had settled on. Writes args.yaml."""
    amp_dtype = args.amp_dtype
    if amp_dtype == "auto":
        amp_dtype = run.previous.get("resolved_amp_dtype", "auto")
    amp_dtype = resolve_amp_dtype(amp_dtype, backbone, device, args.input_size)
    run.write_arguments({**vars(args), "resolved_amp_dtype": amp_dtype})
    return amp_dtype


def report_finished(run: RunDirectory, results: dict[str, Any], table: Path, *, earlier: bool) -> None:
    """Print a run's metrics and name its files; its line goes to the table, for an earlier run where it lacks."""
    if not distributed.is_main():
        return
    files.append_row(table, TABLE_HEADER, results["table_row"], once=earlier)
    test = results["splits"]["test"]
    logger.info("%s", metric_lines(test["metrics"], f"{results['data_set']}, {results['model']}: "
                                   f"{test['n']} test images, {results['amp_dtype']}"))
    logger.info("results in %s (test.csv, results.json, args.yaml, env.json, log.txt); table %s", run.path, table)


if __name__ == "__main__":
    sys.exit(main())
