"""Command-line options of segmentation/run.py: every published flag, and ours; the recipes are their defaults."""

import argparse
import dataclasses
import os
from pathlib import Path

import torch

from furnace.command_line import at_least, clean_path, logger, new_parser, not_negative, optional_path, share
from furnace.data.segmentation import VAL_FRACTION
from furnace.data.segmentation_folders import LAYOUTS
from furnace.engine_for_segmentation import MONITORS
from furnace.models.segmenter import HEADS
from furnace.runtime import distributed
from furnace.runtime.files import UserError
from furnace.runtime.precision import pick_device
from furnace.segmentation import RECIPES, SegmentationOptions
from furnace.training_arguments import (
    add_accepted_options,
    add_checkpoint_options,
    add_course_options,
    add_optimiser_options,
    add_training_machine_options,
    add_tuning_options,
    say_what_holds,
)

SCRIPT = "segmentation/run.py"
# what a test or a prediction reads of a training's options; --kfold is refused there
READ_WHEN_READY = {"recipe", "model", "head", "size", "device", "amp_dtype", "num_workers", "test_batch_size", "kfold",
                   "resume"}
FOLDS = 5  # of --kfold without a number, as published
PUBLISHED_PAIR = {"cae_seg": "PanDerm_Large_LP"}  # with UPerNet
PUBLISHED_ELSE = ("UNet", "vit_large")  # names of the published code that could not work there
# what the parts that other scripts share call this script's options
HERE = {"--pretrained_checkpoint": "--pretrained", "--epochs": "--epoch", "--input_size": "--size",
        "--num_workers": "--workers", "--log_dir": "--use_tensorboard"}


def segmentation_parser(recipe: str = "default") -> argparse.ArgumentParser:
    """The options of segmentation/run.py, with the numbers of a recipe as defaults."""
    parser = new_parser("Segmentation of skin lesions: train on train, choose the epoch on val, test once. With "
                        "--evaluate only the test, with --predict masks of new photographs.")
    _add_model(parser)
    _add_data(parser)
    _add_training(parser)
    add_optimiser_options(parser)
    _add_evaluation(parser)
    _add_machine(parser)
    _add_output(parser)
    add_accepted_options(parser, SCRIPT)
    parser.set_defaults(recipe=recipe, **RECIPES[recipe])
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--recipe", choices=list(RECIPES),
                       help="ours (default), or PanDerm's or DermINO's published one: transform, loss, and the "
                            "defaults of the options below")
    group.add_argument("--model", type=str.strip,
                       help="cae_seg (PanDerm_Large_LP with UPerNet, as published), or a backbone: PanDerm_Base_LP, "
                            "DermINO_Base, dinov2, demo, timm:NAME, hf-hub:OWNER/NAME")
    group.add_argument("--pretrained", type=str.strip, default=None,
                       help="the backbone's checkpoint file, hf-hub:OWNER/NAME, or 'random'; left out, the weights "
                            "that belong to the model's name")
    group.add_argument("--size", type=at_least(16), nargs="+", default=None, metavar="PIXELS",
                       help="side of the model's input, or its height and width; left out, 224, or that of the "
                            "checkpoint")
    group.add_argument("--head", choices=HEADS, help="UPerNet, or one linear layer on the last map")
    group.add_argument("--taps", type=at_least(0), nargs="+",
                       help="blocks (levels of a network with a pyramid) that the head looks at, from 0; left out, "
                            "four spread over the depth, for a linear head the last")
    group.add_argument("--channels", type=at_least(1),
                       help="width inside UPerNet; left out, PanDerm's and DermINO's own width, else 256")
    group.add_argument("--pool_scales", type=at_least(1), nargs="+", help="of UPerNet's pyramid pooling")
    group.add_argument("--pyramid", action="store_true", dest="pyramid",
                       help="bring the taps of a plain transformer to four resolutions before UPerNet")
    group.add_argument("--no_pyramid", action="store_false", dest="pyramid", help="leave them at one, as DermINO does")
    group.add_argument("--dropout", type=share,
                       help="before the last layer; left out, the recipe's (dermino with a linear head: 0.1, else 0)")
    group.add_argument("--drop_path", type=share,
                       help="stochastic depth of the backbone; left out, 0.1 where it has it")
    add_tuning_options(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default=None,
                       help=f"a public set in its archives' folders: {', '.join(LAYOUTS)}; or --csv_path")
    group.add_argument("--parent_path", type=clean_path, default=Path("data"), help="the folder that holds it")
    group.add_argument("--csv_path", type=optional_path, default=None, help="a CSV with image, mask, split")
    group.add_argument("--root_path", type=optional_path, default=None,
                       help="folder of the CSV's images and masks (or of those that --predict's CSV names); left out, "
                            "the CSV's own")
    group.add_argument("--val_fraction", type=share, default=VAL_FRACTION,
                       help="share of train that becomes val where a set has none")
    group.add_argument("--percent", type=not_negative, default=100.0, help="per cent of the train images, up to 100")
    group.add_argument("--kfold", type=at_least(0), nargs="?", const=FOLDS, default=0, metavar="K",
                       help=f"cross-validation in {FOLDS}, or K, parts of train and val (lesions and patients kept "
                            "together); test is left alone")
    group.add_argument("--strict_split", action="store_true",
                       help="refuse leakage between splits and repeated rows instead of warning")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("-b", "--batch_size", type=at_least(1), help="images of a forward pass of one process")
    group.add_argument("--epoch", type=at_least(1), dest="epochs", help="passes over train")
    group.add_argument("--resume", type=int, default=-1, dest="resume_fold", metavar="FOLD",
                       help="with --kfold: make or continue this fold alone, e.g. one per job; -1: all")
    group.add_argument("--dice_weight", type=not_negative, help="of the Dice loss beside cross-entropy; 0: none")
    group.add_argument("--cosine_by", choices=["update", "epoch"],
                       help="the rate falls with every update, or stays as it is within an epoch (no warm-up then)")
    group.add_argument("--decay_all", action="store_true", dest="decay_all",
                       help="weight decay of biases, norms and positions, too, as PanDerm's code has it")
    group.add_argument("--decay_weights", action="store_false", dest="decay_all", help="of weights alone")
    group.add_argument("--monitor", choices=MONITORS, default=MONITORS[0],
                       help="metric of val by which the epoch is chosen")
    add_course_options(group)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--evaluate", action="store_true", help="only test: --checkpoint, or the best of --save_name")
    group.add_argument("--checkpoint", type=optional_path, default=None, metavar="FILE",
                       help="of --evaluate and --predict: a checkpoint-best.pth, or a published .ckpt")
    group.add_argument("--predict", type=optional_path, default=None, metavar="INPUT",
                       help="an image, a folder, or a CSV with a column image: write masks and outlined pictures")
    group.add_argument("--all_as_test", action="store_true",
                       help="with --evaluate: test on every image of the set, whatever its split (an external set)")
    group.add_argument("--tta", choices=["flips", "scales"], nargs="*", default=None,
                       help="test-time augmentation: average over four flips and three sizes, or over one of them")
    group.add_argument("--largest_component", action="store_true",
                       help="keep the largest lesion of a mask and fill its holes")
    group.add_argument("--window", type=at_least(16), nargs="+", default=None, metavar="PIXELS",
                       help="cut large pictures into overlapping windows of this side (or height and width), each "
                            "squashed to --size; left out, the whole picture is")
    group.add_argument("--overlap", type=share, default=0.5, help="least common share of neighbouring windows")
    group.add_argument("--test_batch_size", type=at_least(1), default=12, help="pictures per forward pass at most")
    group.add_argument("--save_results", action="store_true",
                       help="write every test image with the true and the predicted outline")
    group.add_argument("--resamples", type=at_least(100), default=1000, help="of the bootstrap")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = add_training_machine_options(parser, "--workers", "--worker")
    group.add_argument("--gpu", default=None, metavar="NUMBERS", help='of the GPUs to use, e.g. "0" or "0,1"')


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--save_name", "--output_dir", type=clean_path, default=Path("output_dir/segmentation"),
                       dest="output_dir",
                       help="the run's folder; several seeds or folds have folders inside")
    add_checkpoint_options(group)
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases")
    group.add_argument("--wandb_project", default="segmentation", help="its project")
    group.add_argument("--log_name", default=None, help="the run's name there")
    group.add_argument("--description", default=None, help="its notes")
    group.add_argument("--tags", nargs="+", default=None, help="its tags")
    group.add_argument("--id", default=None, help="its id; left out, the run's fingerprint")
    group.add_argument("--use_tensorboard", action="store_true", help="TensorBoard event files in --save_name/log")


def settle_options(args: argparse.Namespace) -> None:
    """Say what holds instead of flags without effect; fill in what depends on others; refuse contradictions."""
    say_what_holds(args, SCRIPT)
    default = segmentation_parser(args.recipe).get_default
    args.seeds = list(dict.fromkeys(args.seeds or [args.seed]))
    args.resume = None
    ready = args.evaluate or args.predict
    pairs = {name: getattr(args, name) for name in ("size", "window")}
    wrong = [
        *((values is not None and len(values) > 2, f"--{name} takes one number, or height and width")
          for name, values in pairs.items()),
        (args.evaluate and args.predict is not None, "--evaluate and --predict exclude each other"),
        (not ready and args.checkpoint is not None,
         "--checkpoint is of --evaluate and --predict; weights to train from are --pretrained"),
        (not args.evaluate and args.all_as_test, "--all_as_test is of --evaluate"),
        (not args.predict and (args.dataset is None) == (args.csv_path is None),
         "pass either --dataset NAME with --parent_path FOLDER, or --csv_path FILE with image, mask, split"),
        (not ready and not args.model, "--model is missing: cae_seg, a backbone's name, or demo"),
        (args.model in PUBLISHED_ELSE, f"--model {args.model} could not run in the published code, either: pass "
                                       "cae_seg, or a backbone's name with --head"),
        (args.model in PUBLISHED_PAIR and args.head != "upernet",
         "--model cae_seg is PanDerm_Large_LP with UPerNet: for a linear head pass --model PanDerm_Large_LP"),
        (args.head == "linear" and any(getattr(args, name) != default(name)
                                       for name in ("channels", "pool_scales", "pyramid")),
         "--channels, --pool_scales and --pyramid are of --head upernet"),
        (args.root_path is not None and args.dataset is not None, "--root_path is of --csv_path; a public set lies in "
                                                                  "--parent_path"),
        (args.parent_path != default("parent_path") and args.csv_path is not None,
         "--parent_path is of --dataset; the files of a CSV lie in --root_path"),
        (args.tune != "lora" and any(getattr(args, name) != default(name) for name in ("lora_rank", "lora_alpha")),
         "--lora_rank and --lora_alpha are of --tune lora: add it"),
        (args.cosine_by == "epoch" and (args.warmup_epochs > 0 or args.warmup_steps > 0),
         "--cosine_by epoch has no warm-up: add --warmup_epochs 0"),
        (args.percent > 100, f"--percent {args.percent:g} is above 100"),
        (args.val_fraction == 1, "--val_fraction 1 leaves no train image"),
        (args.overlap == 1, "--overlap 1 would need endless windows: take less, e.g. 0.5"),
        (args.overlap != default("overlap") and args.window is None, "--overlap is of --window: add it"),
        (args.kfold == 1, "--kfold 1 is no cross-validation: take 2 or more"),
        (args.kfold and ready, "--kfold is of a training: test or use one fold's --checkpoint"),
        (args.resume_fold < -1 or args.resume_fold >= max(1, args.kfold),
         f"--resume {args.resume_fold} is no fold: with --kfold {args.kfold or 5} they are 0 to "
         f"{(args.kfold or 5) - 1}, and -1 is all" + ("" if args.kfold else "; add --kfold")),
        (args.resume_fold >= 0 and len(args.seeds) > 1, "--resume FOLD goes with one seed: leave out --seeds"),
        (args.start_epoch >= args.epochs, f"--start_epoch {args.start_epoch} is not below --epoch {args.epochs}"),
        (args.opt_betas is not None and max(args.opt_betas) == 1, "--opt_betas are numbers below 1"),
        (args.id is not None and len(args.seeds) * max(1, args.kfold) > 1, "--id names one run: leave out --seeds "
                                                                           "and --kfold"),
        (args.gpu is not None and args.device != "auto", "--gpu and --device exclude each other"),
    ]
    faults = [text for fault, text in wrong if fault]
    if faults:
        raise UserError("\n  ".join(faults))
    if ready:
        _say_what_is_not_read(args)
    for name, values in pairs.items():
        setattr(args, name, None if values is None else (values[0], values[-1]))
    args.model = PUBLISHED_PAIR.get(args.model, args.model)
    args.tta = ["flips", "scales"] if args.tta == [] else sorted(set(args.tta or []))
    if args.gpu is not None:
        args.device = device_of(args.gpu)


def _say_what_is_not_read(args: argparse.Namespace) -> None:
    """A line for the options of a training that were given with --evaluate or --predict."""
    names = {field.name for field in dataclasses.fields(SegmentationOptions)} - READ_WHEN_READY
    if args.predict:
        names |= {"csv_path", "dataset", "val_fraction", "save_results", "resamples"}
    parser = segmentation_parser(args.recipe)
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    given = [flags[name] for name in sorted(names & flags.keys()) if getattr(args, name) != parser.get_default(name)]
    if given:
        logger.info("%s: no effect with %s, where nothing is trained", ", ".join(given),
                    "--predict" if args.predict else "--evaluate")


def device_of(gpu: str) -> str:
    """The device of this process among the GPUs of ``--gpu``.

    Raises:
        UserError: they are no numbers, not there, or more or fewer than the processes.
    """
    numbers = [part.strip() for part in gpu.split(",") if part.strip()]
    if not numbers or not all(part.isdigit() for part in numbers):
        raise UserError(f"--gpu {gpu!r}: pass the numbers of GPUs, e.g. 0 or 0,1")
    if not torch.cuda.is_available():
        raise UserError(f"--gpu {gpu}: PyTorch sees no GPU here; leave --gpu out to run on what there is")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    if len(numbers) != processes:
        raise UserError(f"--gpu {gpu} names {len(numbers)} and {processes} process{'es' * (processes > 1)} run: start "
                        f"torchrun --nproc_per_node {len(numbers)} run.py with these options")
    device = pick_device(f"cuda:{numbers[int(os.environ.get('LOCAL_RANK', distributed.rank()))]}")
    torch.cuda.set_device(device)
    return str(device)
