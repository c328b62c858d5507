"""Evaluation of a frozen backbone without training: k nearest neighbours, few shots, and image retrieval.

    python3 knn_eval.py --model PanDerm_Base_LP --pretrained_checkpoint FILE.pth --nb_classes 6 \
        --csv_path DATA/2000.csv --root_path DATA/images --output_dir results

The neighbours that vote are train images; nothing is chosen on val or test, every --k is reported.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from furnace.arguments import extraction_of, knn_eval_parser, settle_input_size
from furnace.command_line import entry_point, logger, parse
from furnace.data.manifest import Manifest, read_manifest
from furnace.evaluation.features import backbone_features
from furnace.evaluation.knn_evaluation import evaluate_neighbours, result_lines
from furnace.evaluation.run import open_evaluation_run, settle_precision
from furnace.models import create_backbone
from furnace.runtime import distributed
from furnace.runtime.files import UserError
from furnace.runtime.run_directory import RunDirectory

TASK = "knn"


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; returns the exit code."""
    args = parse(knn_eval_parser(), argv)
    manifest = read_manifest(args.csv_path, args.root_path, nb_classes=args.nb_classes,
                             class_names_file=args.class_names, strict_split=args.strict_split,
                             report_folder=args.output_dir if distributed.is_main() else None)
    check_options(args, manifest)
    how = extraction_of(args)
    settle_input_size(args)
    backbone = create_backbone(args.model, args.pretrained_checkpoint, input_size=args.input_size, seed=args.seed)
    run = distributed.on_main(lambda: open_evaluation_run(TASK, vars(args), manifest, backbone.provenance))
    results = distributed.on_main(run.read_results)
    if results and (run.path / "test.csv").exists():
        report_finished(run, results)
        return 0

    began = time.perf_counter()
    train, val, test = (manifest.split(name) for name in ("train", "val", "test"))
    images = train.join(val).join(test) if args.gallery == "train_val" else train.join(test)
    how = distributed.on_main(lambda: settle_precision(vars(args), run, backbone, images, how))
    features = backbone_features(backbone, images, how)
    if features is None:
        return 0
    split = evaluate_neighbours(run, images, features.embeddings, ks=args.k, temperature=args.temperature,
                                shots=args.shots, episodes=args.episodes, gallery=args.gallery,
                                exclude=None if args.exclude == "none" else args.exclude, shown=args.queries_shown,
                                stratify=args.bootstrap == "stratified", resamples=args.resamples, seed=args.seed,
                                device=how.device)
    results = {"task": TASK, "data_set": manifest.name, "model": args.model,
               "weights_sha256": backbone.provenance.sha256, "amp_dtype": how.amp_dtype,
               "class_names": list(manifest.class_names), "train_images": len(train), "splits": {"test": split}}
    run.write_log({"train_images": len(train), "test_images": len(test), "extracted": features.extracted,
                   "seconds": round(time.perf_counter() - began, 1)})
    run.write_results(results)
    report_finished(run, results)
    return 0


def check_options(args: argparse.Namespace, manifest: Manifest) -> None:
    """Settle ``--exclude`` and drop repeated values; refuse what the data set does not have."""
    args.k, args.shots = (list(dict.fromkeys(values)) for values in (args.k, args.shots))
    if args.exclude is None:
        args.exclude = "lesion_id" if "lesion_id" in manifest.group_columns else "none"
    elif args.exclude not in (*manifest.group_columns, "none"):
        raise UserError(f"--exclude {args.exclude}: {args.csv_path} has no column {args.exclude}; add it, or pass "
                        "--exclude none (the query itself is left out all the same)")
    if args.gallery == "train_val" and not len(manifest.split("val")):
        raise UserError(f"--gallery train_val: {args.csv_path} has no val images; pass --gallery train")


def report_finished(run: RunDirectory, results: dict[str, Any]) -> None:
    """Print a run's numbers and name its files."""
    if distributed.is_main():
        logger.info("%s", result_lines(results))
        logger.info("results in %s (%s)", run.path, ", ".join(sorted(path.name for path in run.path.iterdir())))


if __name__ == "__main__":
    sys.exit(main())
