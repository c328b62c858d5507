"""Fine-tune a backbone for classification, or test a fine-tuned one.

    python3 run_class_finetuning.py --model PanDerm_Large_FT --pretrained_checkpoint FILE.pth --nb_classes 7 \
        --csv_path DATA/HAM_clean.csv --root_path DATA/images --output_dir RUN
    python3 run_class_finetuning.py ... --eval --resume RUN/checkpoint-best.pth --TTA

Trains on train, chooses the epoch on val, tests once. The same command goes on where an unfinished run was.
"""

import argparse
import dataclasses
import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from furnace.arguments import settle_input_size
from furnace.command_line import entry_point, logger, parse
from furnace.data.datasets import require_decodable
from furnace.data.external import read_external, warn_of_shared_images
from furnace.data.manifest import Manifest, read_manifest
from furnace.evaluation.report import metric_lines
from furnace.evaluation.run import open_evaluation_run
from furnace.evaluation.summary import summarise, summary_lines
from furnace.evaluation.training_plots import plot_learning_curve
from furnace.finetuning import (
    FinetuningOptions,
    build_classifier,
    draw_data,
    monitor_of,
    train_once,
)
from furnace.finetuning_arguments import SCRIPT, finetuning_parser
from furnace.finetuning_results import SHOWN, Testing, check_fit, score_splits
from furnace.models import Provenance
from furnace.models.classifier import classifier_of, load_classifier
from furnace.runtime import distributed
from furnace.runtime.checkpoints import BEST
from furnace.runtime.files import UserError
from furnace.runtime.precision import pick_device
from furnace.runtime.run_directory import RunDirectory, child_runs
from furnace.runtime.tracking import tracking
from furnace.training import settings_of, settle_precision
from furnace.training_arguments import say_what_holds

TASK = "finetuning"
# options that cannot change the numbers, besides those of every evaluation
NOT_IN_FINGERPRINT = {"data_path", "eval_data_path", "test_csv_path", "data_set", "mode", "eval", "resume",
                      "grad_checkpointing", "pin_mem", "save_ckpt", "save_ckpt_freq", "save_every_steps", "wandb",
                      "wandb_name", "exp_name", "log_dir", "enable_multi_print", "ood_eval", "dist_eval",
                      "imagenet_default_mean_and_std", "world_size", "local_rank", "dist_on_itp", "dist_url",
                      "enable_deepspeed"}
# what a test depends on, and what open_evaluation_run reads
TEST_OPTIONS = {"model", "amp_dtype", "TTA", "tta_views", "seed", "bootstrap", "resamples", "output_dir", "overwrite",
                "no_auto_resume", "class_names", "image_key"}


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tune or test; returns the exit code."""
    args = parse(finetuning_parser(), argv)
    if not args.eval:  # the checkpoint knows its own
        settle_input_size(args)
    given = dict(vars(args))  # args.yaml says what was asked for, so that -c args.yaml --seed 5 means it
    settle_options(args)
    manifest, external = read_data(args)
    if args.eval:
        return test_checkpoint(args, given, manifest, external)
    options = FinetuningOptions(**{field.name: getattr(args, field.name)
                                   for field in dataclasses.fields(FinetuningOptions)})
    settings = settings_of(args.seeds, args.folds)
    data = draw_data(manifest, settings, options)  # every fault of the data before the first weight is trained
    model = build_classifier(options, manifest.nb_classes, args.seeds[0])
    run = open_run_of(args, manifest, external, model.provenance)
    results = distributed.on_main(run.read_results)
    if results:
        logger.info("this run is finished%s:", "" if args.resume is None else f" (--resume {args.resume} is not read)")
        report(run, results)
        return 0
    if not run.previous:  # a new run
        distributed.on_main(lambda: [require_decodable(images) for images in (manifest, external) if images])
    options = distributed.on_main(functools.partial(settle_precision, options, run, model, options.input_size))
    distributed.on_main(lambda: run.write_arguments({**given, "resolved_amp_dtype": options.amp_dtype,
                                                     "resolved_monitor": options.monitor}))
    built = [model]
    del model

    def run_one(directory: RunDirectory, setting: dict[str, Any]) -> dict[str, Any]:
        train, val = data[settings.index(setting)]
        splits = {"val": val, "test": manifest.split("test"), "external": external}
        first = built and setting == settings[0]
        model = built.pop() if first else build_classifier(options, manifest.nb_classes, setting["seed"])
        return finetune(directory, setting, model, train, splits, options, args)

    if settings[1:]:
        outcomes = child_runs(run, settings, run_one, overwrite=args.overwrite, together=True)
        results = distributed.on_main(lambda: summarise(run.path, settings, outcomes))
    else:
        results = run_one(run, settings[0])
    distributed.on_main(lambda: run.write_results(results))
    report(run, results)
    return 0


def settle_options(args: argparse.Namespace) -> None:
    """Say what holds instead of flags without effect; fill in what depends on others; refuse contradictions."""
    say_what_holds(args, SCRIPT)
    if args.enable_multi_print:
        logging.getLogger().setLevel(logging.INFO)
    args.eval = args.eval or args.mode == "eval"
    args.root_path = args.root_path or args.data_path
    args.tune = "head" if args.enable_linear_eval else args.tune
    args.seeds = list(dict.fromkeys(args.seeds or [args.seed]))
    multilabel, default = args.task == "multilabel", finetuning_parser().get_default
    args.monitor = args.monitor or ("auroc" if multilabel or args.nb_classes == 2 else "acc")
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    wrong = [
        (args.eval and args.resume is None, "--eval needs --resume CHECKPOINT, the file to test"),
        (not multilabel and args.nb_classes == 1, "--nb_classes 1: two or more are needed to tell apart"),
        (multilabel and mixes, "mixup and cutmix mix single labels: leave them out with --task multilabel"),
        (multilabel and args.weights, "--weights balances single labels: leave it out with --task multilabel"),
        (mixes and args.batch_size % 2 == 1,
         f"--batch_size {args.batch_size}: mixup and cutmix pair the images of a batch, so it must be even"),
        (args.use_cls and args.use_mean_pooling, "--use_cls and --use_mean_pooling exclude each other"),
        (args.tta_views != default("tta_views") and not args.TTA, "--tta_views chooses the views of --TTA: add it"),
        (args.tune != "lora" and any(getattr(args, name) != default(name) for name in ("lora_rank", "lora_alpha")),
         "--lora_rank and --lora_alpha are of --tune lora: add it"),
        (args.folds == 1, "--folds 1 is no cross-validation: take 2 or more"),
        (args.start_epoch >= args.epochs, f"--start_epoch {args.start_epoch} is not below --epochs {args.epochs}"),
        (args.resume is not None and not args.eval and len(args.seeds) * max(1, args.folds) > 1,
         "--resume continues one run: leave out --seeds and --folds"),
        (args.eval_data_path and not args.test_csv_path, "--eval_data_path is the folder of --test_csv_path's images"),
        (bool(args.test_csv_path) and multilabel, "--test_csv_path is not for --task multilabel"),
        (args.opt_betas is not None and max(args.opt_betas) == 1, "--opt_betas are numbers below 1"),
        (args.cutmix_minmax is not None and not args.eval and
         int(args.input_size * args.cutmix_minmax[0]) >= int(args.input_size * args.cutmix_minmax[1]),
         "--cutmix_minmax is a lower and a higher bound, a pixel apart at least"),
        (args.resume is not None and not args.resume.is_file(), f"--resume {args.resume} does not exist"),
    ]
    faults = [text for fault, text in wrong if fault]
    if faults:
        raise UserError("\n  ".join(faults))


def read_data(args: argparse.Namespace) -> tuple[Manifest, Manifest | None]:
    """The data set and the external test set, every problem of either told before any work."""
    folder = args.output_dir if distributed.is_main() else None
    manifest = read_manifest(args.csv_path, args.root_path, nb_classes=args.nb_classes, task=args.task,
                             image_column=args.image_key, class_names_file=args.class_names,
                             strict_split=args.strict_split, report_folder=folder)
    args.data_set = args.data_set or manifest.name
    if args.test_csv_path is None:
        return manifest, None
    external = read_external(args.test_csv_path, args.eval_data_path, class_names=manifest.class_names,
                             nb_classes=manifest.nb_classes, label_column=manifest.label_column,
                             strict_split=args.strict_split, report_folder=folder)
    seen = manifest.split("train").join(manifest.split("val"))
    warn_of_shared_images(seen, external, strict_split=args.strict_split, report_folder=folder)
    return manifest, external


def open_run_of(args: argparse.Namespace, manifest: Manifest, external: Manifest | None,
                provenance: Provenance) -> RunDirectory:
    """``--output_dir`` itself for a training; for a test a folder inside, named by what the test depends on."""
    settings = {key: value for key, value in vars(args).items() if not args.eval or key in TEST_OPTIONS}
    also = {"label_task": args.task, "processes": distributed.world_size(), "batch_size": args.batch_size}
    also = {"evaluation_only": args.eval, "external": external and f"{external.sha256} {external.images_digest}",
            **({} if args.eval else also)}
    return distributed.on_main(lambda: open_evaluation_run(
        TASK, settings, manifest, provenance, also=also, left_out=NOT_IN_FINGERPRINT,
        folder=lambda mark: args.output_dir / f"eval_{mark}" if args.eval else args.output_dir))


def finetune(run: RunDirectory, setting: dict[str, Any], model: nn.Module, train: Manifest,
             splits: dict[str, Manifest | None], options: FinetuningOptions, args: argparse.Namespace
             ) -> dict[str, Any]:
    """Train one model and test it; returns what results.json holds."""
    with tracking(folder=run.path, run_id=run.fingerprint[:16], config=run.parts, run_name=args.exp_name,
                  wandb_project=args.wandb_name if args.wandb else None, tensorboard=args.log_dir) as track:
        trained = train_once(run, model, setting["seed"], train, splits["val"], options, track)
    classifier = classifier_of(trained.best, source=str(run.path / BEST))
    results = score_splits(run, classifier, splits, testing_of(args, setting["seed"]), data_set=args.data_set)
    if distributed.is_main():
        if options.save_ckpt:
            trained.best["meta"]["temperature"] = results["temperature"]
            run.write_tensors(BEST, trained.best)
        plot_learning_curve(run.path / "plots" / "learning_curve.png", trained.history,
                            best_epoch=trained.best["epoch"], monitor=monitor_of(splits["val"], options))
        results |= {"tune": options.tune, "setting": setting, "plan": dataclasses.asdict(trained.plan),
                    "train_images": len(train), "trained_parameters": trained.parameters}
    return results


def test_checkpoint(args: argparse.Namespace, given: dict[str, Any], manifest: Manifest,
                    external: Manifest | None) -> int:
    """``--eval``: test the checkpoint of ``--resume``."""
    classifier = load_classifier(args.resume)
    check_fit(classifier, manifest, model=args.model)
    own = classifier.data_config["input_size"][-1]
    if args.input_size not in (own, None):
        raise UserError(f"--input_size {args.input_size}: {args.resume} was trained with images of {own} pixels")
    if args.pretrained_checkpoint:
        logger.info("--pretrained_checkpoint is not read with --eval: %s has all weights", args.resume)
    if args.amp_dtype != "auto":
        classifier = dataclasses.replace(classifier, amp_dtype=args.amp_dtype)
    run = open_run_of(args, manifest, external, classifier.model.provenance)
    results = distributed.on_main(run.read_results)
    if not results:
        distributed.on_main(lambda: run.write_arguments(given))
        splits = {"val": manifest.split("val"), "test": manifest.split("test"), "external": external}
        results = score_splits(run, classifier, splits, testing_of(args, args.seed), data_set=args.data_set)
        distributed.on_main(lambda: run.write_results(results))
    report(run, results)
    return 0


def testing_of(args: argparse.Namespace, seed: int) -> Testing:
    """How the chosen model is tested."""
    return Testing(tta=args.TTA, tta_views=args.tta_views, seed=seed, device=pick_device(args.device),
                   batch_size=args.batch_size, num_workers=args.num_workers,
                   stratify=args.bootstrap == "stratified", resamples=args.resamples)


def report(run: RunDirectory, results: dict[str, Any]) -> None:
    """Print the metrics and name the files."""
    if not distributed.is_main():
        return
    if "summary" in results:
        logger.info("%s", summary_lines(results, SHOWN))
    for name, split in results.get("splits", {}).items():
        if name != "val":
            logger.info("%s", metric_lines(split["metrics"], f"{results['data_set']}, {results['model']}: {split['n']} "
                                           f"{name} images, {results['amp_dtype']}; 95 % intervals: "
                                           f"{split['resampling']}"))
    logger.info("results in %s (%s)", run.path, ", ".join(sorted(path.name for path in run.path.iterdir()
                                                                   if not path.name.startswith("."))))


if __name__ == "__main__":
    sys.exit(main())
