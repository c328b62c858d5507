"""Segment skin lesions: train a head on any backbone, test it, or write masks for new photographs.

    python run.py --dataset ISIC2018 --parent_path DATA/ --model cae_seg --recipe panderm \
        --pretrained panderm_ll_data6_checkpoint-499.pth --save_name RUN
    python run.py --csv_path DATA/masks.csv --model demo --head upernet --save_name RUN
    python run.py ... --save_name RUN --evaluate [--checkpoint FILE]
    python run.py --save_name RUN --predict FOLDER_OR_CSV [--checkpoint FILE]

Trains on train, chooses the epoch on val, tests once. The same command goes on where an unfinished run was.
"""

import argparse
import dataclasses
import functools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import furnace as furnace
except ModuleNotFoundError as missing:
    if missing.name != "furnace":
        raise
    print("error: this script needs the package furnace: type\n  pip install -r requirements.txt && pip install -e ."
          "\nin the repository's root", file=sys.stderr)
    sys.exit(2)

from furnace.command_line import entry_point, logger, own_option_names, parse
from furnace.data.datasets import require_decodable
from furnace.data.segmentation import SegmentationManifest, read_segmentation
from furnace.data.unlabelled import read_images
from furnace.evaluation.lesion_masks import SCALES, Masking, check_scales
from furnace.evaluation.report import metric_lines
from furnace.evaluation.run import open_evaluation_run
from furnace.evaluation.summary import summarise, summary_lines
from furnace.evaluation.training_plots import plot_learning_curve
from furnace.models import Provenance
from furnace.models.segmentation_files import Segmenter, load_segmenter, segmenter_of
from furnace.models.segmenter import SegmentationModel
from furnace.runtime import distributed, files
from furnace.runtime.checkpoints import BEST
from furnace.runtime.files import UserError
from furnace.runtime.precision import pick_device
from furnace.runtime.run_directory import RunDirectory, child_runs
from furnace.runtime.tracking import tracking
from furnace.segmentation import (
    RECIPES,
    SIZE,
    SegmentationOptions,
    build_model,
    cut_batches,
    draw_data,
    train_once,
)
from furnace.segmentation_arguments import HERE, PUBLISHED_PAIR, segmentation_parser, settle_options
from furnace.segmentation_results import SHOWN, Testing, predict_photographs, score_splits, unseen
from furnace.training import build_schedules, settings_of, settle_precision

TASK = "segmentation"
# options that cannot change the numbers, besides those of every evaluation
NOT_IN_FINGERPRINT = {"dataset", "parent_path", "pretrained", "evaluate", "checkpoint", "predict", "resume_fold",
                      "resume", "grad_checkpointing", "pin_mem", "save_ckpt", "save_ckpt_freq", "save_every_steps",
                      "save_results", "test_batch_size", "gpu", "wandb", "wandb_project", "log_name", "description",
                      "tags", "id", "use_tensorboard", "cfg", "patch_size", "window_size", "embed_dim", "depths",
                      "num_heads", "dataset_path", "split", "smoke_test", "resume_wandb", "update_config"}
# what a test depends on, and what open_evaluation_run reads
TEST_OPTIONS = {"amp_dtype", "tta", "largest_component", "window", "overlap", "size", "all_as_test", "val_fraction",
                "seed", "resamples", "output_dir", "overwrite", "no_auto_resume"}


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Train, test or predict; returns the exit code."""
    with own_option_names(HERE):
        return run(argv)


def run(argv: Sequence[str] | None) -> int:
    """``main``, whose messages may name options as other scripts call them."""
    args = parse(segmentation_parser(), argv)
    if args.recipe != "default":
        args = parse(segmentation_parser(args.recipe), argv)  # its numbers are defaults: the command line wins
    given = dict(vars(args))  # args.yaml says what was asked for
    settle_options(args)
    if args.predict:
        return predict(args)
    manifest = read_data(args)
    return test_checkpoint(args, given, manifest) if args.evaluate else train(args, given, manifest)


def read_data(args: argparse.Namespace) -> SegmentationManifest:
    """Images and masks, every problem told before any work."""
    whole = args.evaluate and args.all_as_test
    manifest = distributed.on_main(lambda: read_segmentation(  # decodes all masks: once, not in every process
        args.csv_path, dataset=args.dataset, parent=args.parent_path, root_path=args.root_path,
        val_fraction=0.0 if whole else args.val_fraction, seed=args.seed, strict_split=args.strict_split,
        needed=() if whole else ("test",) if args.evaluate else ("train", "test"), report_folder=args.output_dir))
    if whole:
        manifest = dataclasses.replace(manifest.with_splits(["test"] * len(manifest)),
                                       split_note="all images are test (--all_as_test)")
    return manifest


def train(args: argparse.Namespace, given: dict[str, Any], manifest: SegmentationManifest) -> int:
    """Train and test, once or for every seed and fold."""
    args.size = args.size or (SIZE, SIZE)
    options = SegmentationOptions(**{field.name: getattr(args, field.name)
                                     for field in dataclasses.fields(SegmentationOptions)})
    settings = settings_of(args.seeds, args.kfold)
    data = draw_data(manifest, settings, options)  # every fault of the data before the first weight is trained
    built = [build_model(options, args.seeds[0])]
    for train_images, _ in data:
        build_schedules(options, cut_batches(train_images, built[0], options), cosine_by=options.cosine_by)
    if "scales" in args.tta:
        check_scales(built[0], SCALES)
    run = open_run_of(args, manifest, built[0].provenance)
    results = distributed.on_main(run.read_results)
    if results:
        logger.info("this run is finished:")
        report(run, results, args)
        return 0
    if not run.previous:  # a new run
        distributed.on_main(lambda: require_decodable(manifest))
    options = distributed.on_main(functools.partial(settle_precision, options, run, built[0], options.size))
    distributed.on_main(lambda: run.write_arguments({**given, "resolved_amp_dtype": options.amp_dtype}))

    def run_one(directory: RunDirectory, setting: dict[str, Any]) -> dict[str, Any]:
        train_images, val = data[settings.index(setting)]
        splits = {"val": val, "test": manifest.split("test")}
        model = built.pop() if built and setting["seed"] == args.seeds[0] else build_model(options, setting["seed"])
        return train_and_test(directory, setting, model, train_images, splits, manifest, options, args)

    if not settings[1:]:
        results = run_one(run, settings[0])
    else:
        wanted = settings if args.resume_fold < 0 else [settings[args.resume_fold]]
        outcomes = child_runs(run, wanted, run_one, overwrite=args.overwrite, together=True)
        left = distributed.on_main(lambda: [setting for setting in settings if setting not in wanted and not
                                            run.child_is_finished(setting)])
        if left:
            logger.info("fold %d is finished; the summary comes when %d more are", args.resume_fold, len(left))
            return 0
        if wanted != settings:
            outcomes = child_runs(run, settings, run_one, together=True)
        results = distributed.on_main(lambda: summarise(run.path, settings, outcomes))
    distributed.on_main(lambda: run.write_results(results))
    report(run, results, args)
    return 0


def open_run_of(args: argparse.Namespace, manifest: SegmentationManifest, provenance: Provenance) -> RunDirectory:
    """``--save_name`` itself for a training; for a test a folder inside, named by what the test depends on."""
    settings = {key: value for key, value in vars(args).items() if not args.evaluate or key in TEST_OPTIONS}
    also = {} if args.evaluate else {"processes": distributed.world_size(), "batch_size": args.batch_size}
    return distributed.on_main(lambda: open_evaluation_run(
        TASK, settings, manifest, provenance, also={"evaluation_only": args.evaluate, **also},
        left_out=NOT_IN_FINGERPRINT,
        folder=lambda mark: args.output_dir / f"eval_{mark}" if args.evaluate else args.output_dir))


def train_and_test(run: RunDirectory, setting: dict[str, Any], model: SegmentationModel,
                   train_images: SegmentationManifest, splits: dict[str, SegmentationManifest],
                   manifest: SegmentationManifest, options: SegmentationOptions, args: argparse.Namespace
                   ) -> dict[str, Any]:
    """One run; returns what results.json holds."""
    with tracking(folder=run.path, run_id=args.id or run.fingerprint[:16], config=run.parts, run_name=args.log_name,
                  wandb_project=args.wandb_project if args.wandb else None, notes=args.description,
                  tags=args.tags or (), tensorboard=run.path / "log" if args.use_tensorboard else None) as track:
        trained = train_once(run, model, setting["seed"], train_images, splits["val"], options, track)
    segmenter = segmenter_of(trained.best, source=str(run.path / BEST))
    results = score_splits(run, segmenter, splits, testing_of(args, segmenter), data_set=manifest.name,
                           split_note=manifest.split_note)
    if distributed.is_main():
        monitor = options.monitor if len(splits["val"]) else None
        plot_learning_curve(run.path / "plots" / "learning_curve.png", trained.history, monitor=monitor,
                            best_epoch=trained.best["epoch"], metrics=("jaccard", "dice", "threshold_jaccard"))
        results |= {"tune": options.tune, "setting": setting, "plan": dataclasses.asdict(trained.plan),
                    "train_images": len(train_images), "trained_parameters": trained.parameters}
    return results


def test_checkpoint(args: argparse.Namespace, given: dict[str, Any], manifest: SegmentationManifest) -> int:
    """``--evaluate``: test a checkpoint."""
    segmenter = read_segmenter(args)
    splits = unseen(segmenter, {name: manifest.split(name) for name in ("val", "test")},
                    drawn=bool(manifest.split_note and not args.all_as_test))
    run = open_run_of(args, manifest, segmenter.model.provenance)
    results = distributed.on_main(run.read_results)
    if results:
        logger.info("this run is finished:")
    else:
        distributed.on_main(lambda: run.write_arguments(given))
        results = score_splits(run, segmenter, splits, testing_of(args, segmenter), data_set=manifest.name,
                               split_note=manifest.split_note)
        distributed.on_main(lambda: run.write_results(results))
    report(run, results, args)
    return 0


def read_segmenter(args: argparse.Namespace) -> Segmenter:
    """The checkpoint that was asked for, brought to ``--size``.

    Raises:
        UserError: there is none, or it is not what the options say of it.
    """
    path = args.checkpoint or args.output_dir / BEST
    if not path.is_file() and args.checkpoint is None:
        folds = sorted(path.parent.glob(f"seed_*/{BEST}"))
        raise UserError(f"{path} does not exist: " + (f"pass one of this run's models, e.g. --checkpoint {folds[0]}"
                                                      if folds else "train first, or pass --checkpoint FILE"))
    segmenter = load_segmenter(path, input_size=args.size)
    asked = {"model": args.model, "head": args.head, "recipe": args.recipe}
    found = {"model": segmenter.name, "head": segmenter.model.recipe["head"], "recipe": segmenter.transform}
    usual = {**{name: RECIPES[args.recipe][name] for name in ("model", "head")}, "recipe": "default"}
    usual["model"] = PUBLISHED_PAIR.get(usual["model"], usual["model"])
    for name, value in asked.items():
        if value not in (usual[name], found[name]):
            raise UserError(f"{path} was trained with --{name} {found[name]}; you asked for {value}: leave it out")
    return segmenter


def masking_of(args: argparse.Namespace, segmenter: Segmenter) -> Masking:
    """How masks are made."""
    config = segmenter.data_config
    return Masking(transform=segmenter.transform, mean=tuple(config["mean"]), std=tuple(config["std"]),
                   device=pick_device(args.device), batch_size=args.test_batch_size, num_workers=args.num_workers,
                   amp_dtype=segmenter.amp_dtype if args.amp_dtype == "auto" else args.amp_dtype,
                   flips="flips" in args.tta, scales=SCALES if "scales" in args.tta else (1.0,), window=args.window,
                   overlap=args.overlap, largest=args.largest_component)


def testing_of(args: argparse.Namespace, segmenter: Segmenter) -> Testing:
    """How the chosen model is tested."""
    return Testing(masking=masking_of(args, segmenter), overlays=args.save_results, resamples=args.resamples)


def predict(args: argparse.Namespace) -> int:
    """``--predict``: masks and outlined pictures of new photographs."""
    segmenter = read_segmenter(args)
    manifest = read_images(args.predict, args.root_path)
    source = args.predict.resolve()
    folder = args.output_dir / f"predict_{source.name if source.is_dir() else source.stem}"
    own = [folder / name for name in ("predictions.csv", "masks", "overlays")]

    def make_room() -> None:
        unfinished = not own[0].exists()  # predictions.csv comes last: masks without it are of a prediction cut off
        again = args.overwrite or unfinished
        files.refuse_outputs(own, [args.predict, *([args.checkpoint] if args.checkpoint else [])], overwrite=True,
                             option="--save_name with --checkpoint")
        if not again:
            raise UserError(f"{folder} holds an earlier prediction: add --overwrite to replace it, or pass another "
                            f"--save_name with --checkpoint {args.checkpoint or args.output_dir / BEST}")
        own[0].unlink(missing_ok=True)  # first: a table never stands beside masks of another prediction
        for path in own[1:]:
            if path.exists():
                shutil.rmtree(path)

    distributed.on_main(make_room)
    table = predict_photographs(folder, segmenter, manifest, masking_of(args, segmenter))
    if table is not None:
        logger.info("%d images, %d without a lesion: masks, outlined pictures and predictions.csv in %s", len(table),
                    int((table["lesion_pixels"] == 0).sum()), folder)
    return 0


def report(run: RunDirectory, results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the metrics and name the files."""
    if not distributed.is_main():
        return
    if args.save_results and not any(run.path.rglob("overlays")):
        logger.info("--save_results came too late: add --overwrite to have the test images outlined")
    if "summary" in results:
        logger.info("%s", summary_lines(results, SHOWN))
    for name, split in results.get("splits", {}).items():
        if name != "val":
            empty = f"; {split['empty_truth']} without a lesion, {split['empty_predicted']} predicted so"
            logger.info("%s", metric_lines(split["metrics"], f"{results['data_set']}, {results['model']} with head "
                                           f"{results['head']}: {split['n']} {name} images{empty}, "
                                           f"{results['amp_dtype']}; 95 % intervals: {split['resampling']}"))
    logger.info("results in %s (%s)", run.path, ", ".join(sorted(path.name for path in Path(run.path).iterdir()
                                                                   if not path.name.startswith("."))))


if __name__ == "__main__":
    sys.exit(main())
