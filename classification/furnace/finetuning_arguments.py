"""Command-line options of run_class_finetuning.py: every published flag, and ours."""

import argparse
from pathlib import Path

from furnace.arguments import add_interval_options, add_model_options
from furnace.command_line import (
    at_least,
    clean_path,
    fraction,
    new_parser,
    not_negative,
    optional_path,
    positive,
    share,
)
from furnace.engine_for_finetuning import MONITORS
from furnace.training_arguments import (
    add_accepted_options,
    add_checkpoint_options,
    add_course_options,
    add_optimiser_options,
    add_training_machine_options,
    add_tuning_options,
)

SCRIPT = "run_class_finetuning.py"


def finetuning_parser() -> argparse.ArgumentParser:
    """The options of run_class_finetuning.py."""
    parser = new_parser("Fine-tuning of a backbone for classification: train on train, choose the epoch on val, test "
                        "once. With --eval --resume CHECKPOINT only the test.")
    _add_model(parser)
    _add_data(parser)
    _add_training(parser)
    add_optimiser_options(parser)
    _add_augmentation(parser)
    _add_evaluation(parser)
    add_interval_options(parser)
    _add_machine(parser)
    _add_output(parser)
    add_accepted_options(parser, SCRIPT)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_tuning_options(parser)
    group = parser.add_argument_group("fine-tuned model")
    group.add_argument("--enable_linear_eval", action="store_true", help="the same as --tune head")
    group.add_argument("--use_mean_pooling", action="store_true", default=None,
                       help="mean of the patch tokens; left out with --use_cls, the model's own (PanDerm: the mean)")
    group.add_argument("--use_cls", action="store_true", help="class token after the final norm")
    group.add_argument("--rel_pos_bias", action="store_true", default=None, dest="rel_pos_bias",
                       help="relative position biases (PanDerm_*_FT: on)")
    group.add_argument("--disable_rel_pos_bias", action="store_false", default=None, dest="rel_pos_bias",
                       help="none of them")
    group.add_argument("--sin_pos_emb", action="store_true", default=True, dest="sin_pos_emb",
                       help="PanDerm's fixed sin-cos positions")
    group.add_argument("--disable_sin_pos_emb", action="store_false", dest="sin_pos_emb",
                       help="train the positions, from the checkpoint's on")
    group.add_argument("--layer_scale_init_value", type=positive, default=None,
                       help="start of LayerScale where no checkpoint has it; left out, the model's own (PanDerm: 0.1)")
    group.add_argument("--drop", type=share, default=0.0, help="dropout in attention projections, MLPs, positions")
    group.add_argument("--attn_drop_rate", type=share, default=0.0, help="dropout of attention weights")
    group.add_argument("--drop_path", type=share, default=None,
                       help="stochastic depth, rising to this in the last block; left out, 0.1 where the model has it")
    group.add_argument("--init_scale", type=positive, default=0.001, help="factor of the head's random start")
    group.add_argument("--model_key", default="model|module|state_dict|teacher",
                       help="keys under which a checkpoint's weights are looked for, in this order")
    group.add_argument("--model_prefix", default="", help="what stands before the backbone's keys; left out, found")


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--csv_path", required=True, type=clean_path,
                       help="CSV with image, split, label/binary_label/labels")
    group.add_argument("--root_path", type=optional_path, default=None,
                       help="folder of the images; left out, --data_path or the CSV's own")
    group.add_argument("--data_path", type=optional_path, default=None, help="the same as --root_path")
    group.add_argument("--image_key", default="image", help="column that names the images")
    group.add_argument("--task", choices=["multiclass", "multilabel"], default="multiclass",
                       help="multilabel: several labels per image, from a column labels of ;-separated names")
    group.add_argument("--nb_classes", type=at_least(0), default=0,
                       help="number of classes; 2 reads the column binary_label, else label (multilabel: 0, counted)")
    group.add_argument("--class_names", type=clean_path, default=None,
                       help="text file with a class name a line; left out, the column class_name, if any")
    group.add_argument("--data_set", default="", help="the data set's name in the results; left out, the CSV's")
    group.add_argument("--percent_data", type=fraction, default=1.0, help="share of the train images, in (0, 1]")
    group.add_argument("--folds", type=at_least(0), default=0,
                       help="cross-validation: train and val are pooled and cut into so many parts (by patient_id or "
                            "lesion_id where the CSV has it), each val once; test is left alone")
    group.add_argument("--weights", action="store_true",
                       help="draw train images with replacement, every class as often (N / (C x count))")
    group.add_argument("--test_csv_path", type=optional_path, default=None, help="an external test set, besides")
    group.add_argument("--eval_data_path", type=optional_path, default=None, help="folder of its images")
    group.add_argument("--strict_split", action="store_true",
                       help="refuse leakage between splits and repeated rows instead of warning")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--mode", choices=["train", "eval"], default="train", help="eval is the same as --eval")
    group.add_argument("--batch_size", type=at_least(1), default=64, help="images of a forward pass of one process")
    group.add_argument("--epochs", type=at_least(1), default=30, help="passes over train")
    add_course_options(group)


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation")
    group.add_argument("--color_jitter", type=not_negative, default=None,
                       help="strength for brightness, contrast and saturation; left out, hue 0.2 alone")
    group.add_argument("--aa", default="", metavar="POLICY",
                       help="RandAugment or AutoAugment by timm's names, e.g. rand-m9-mstd0.5-inc1, instead of jitter")
    group.add_argument("--train_interpolation", choices=["bilinear", "bicubic", "random"], default="bilinear",
                       help="of the random crop")
    group.add_argument("--crop_pct", type=fraction, default=None,
                       help="images are resized to input_size / crop_pct before a crop; left out, the backbone's own")
    group.add_argument("--reprob", type=share, default=0.0, help="probability of random erasing")
    group.add_argument("--remode", choices=["pixel", "rand", "const"], default="pixel", help="what is put there")
    group.add_argument("--recount", type=at_least(1), default=1, help="erased rectangles at most")
    group.add_argument("--resplit", action="store_true", help="leave the first half of a batch without erasing")
    group.add_argument("--smoothing", type=share, default=0.1, help="of the labels")
    group.add_argument("--mixup", type=not_negative, default=0.0, help="alpha of mixup; 0 is off")
    group.add_argument("--cutmix", type=not_negative, default=0.0, help="alpha of cutmix; 0 is off")
    group.add_argument("--cutmix_minmax", type=share, nargs=2, default=None, help="bounds of the cut; turns cutmix on")
    group.add_argument("--mixup_prob", type=share, default=1.0, help="of mixing a batch at all")
    group.add_argument("--mixup_switch_prob", type=share, default=0.5, help="of cutmix where both are on")
    group.add_argument("--mixup_mode", choices=["batch", "pair", "elem"], default="batch",
                       help="one mixture for a batch, a pair, or an image")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--monitor", choices=MONITORS, default=None,
                       help="metric of val by which the epoch is chosen; left out, auroc of two classes, else acc "
                            "(multilabel: auroc)")
    group.add_argument("--disable_eval_during_finetuning", action="store_true",
                       help="do not look at val; take the last epoch")
    group.add_argument("--eval", action="store_true", help="only test, the checkpoint of --resume")
    group.add_argument("--resume", type=optional_path, default=None, metavar="CHECKPOINT",
                       help="what --eval tests; without it, checkpoint-last.pth of this run, moved elsewhere")
    group.add_argument("--TTA", action="store_true", help="test-time augmentation: mean logits of several views")
    group.add_argument("--tta_views", choices=["published", "deterministic"], default="published",
                       help="published: five random ones; deterministic: identity, flips and rotations")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = add_training_machine_options(parser, "--num_workers")
    group.add_argument("--enable_multi_print", action="store_true", help="every process prints its log")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=clean_path, default=Path("output_dir/finetuning"),
                       help="the run's folder; several seeds or folds have folders inside")
    add_checkpoint_options(group)
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases")
    group.add_argument("--wandb_name", default="demo", help="its project")
    group.add_argument("--exp_name", default=None, help="the run's name there")
    group.add_argument("--log_dir", type=optional_path, default=None, help="TensorBoard event files go there")
