"""Command-line options of run_class_finetuning.py: every published flag, and ours."""

import argparse
from pathlib import Path

from furnace.arguments import add_interval_options, add_model_options
from furnace.command_line import at_least, clean_path, fraction, logger, new_parser, optional_path, positive
from furnace.engine_for_finetuning import MONITORS
from furnace.published import TAKES_VALUE, accepted_only, refused
from furnace.runtime.files import UserError

SCRIPT = "run_class_finetuning.py"


def finetuning_parser() -> argparse.ArgumentParser:
    """The options of run_class_finetuning.py."""
    parser = new_parser("Fine-tuning of a backbone for classification: train on train, choose the epoch on val, test "
                        "once. With --eval --resume CHECKPOINT only the test.")
    _add_model(parser)
    _add_data(parser)
    _add_training(parser)
    _add_optimiser(parser)
    _add_augmentation(parser)
    _add_evaluation(parser)
    add_interval_options(parser)
    _add_machine(parser)
    _add_output(parser)
    group = parser.add_argument_group("accepted, without effect", "each is answered by a line that says what holds")
    for flag, text in (accepted_only(SCRIPT) | refused(SCRIPT)).items():
        if flag in TAKES_VALUE:
            group.add_argument(flag, default=None, metavar="X", help=text)
        else:
            group.add_argument(flag, action="store_true", help=text)
    return parser


def say_what_holds(args: argparse.Namespace) -> None:
    """A line for every flag without effect that was given.

    Raises:
        UserError: a flag that is refused was given.
    """
    for flag, text in refused(SCRIPT).items():
        if getattr(args, flag[2:]):
            raise UserError(f"{flag} is not supported: {text}")
    for flag, text in accepted_only(SCRIPT).items():
        if getattr(args, flag[2:]) not in (None, False):
            logger.info("%s has no effect: %s", flag, text)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    group = parser.add_argument_group("fine-tuned model")
    group.add_argument("--tune", choices=["full", "lora", "head"], default="full",
                       help="what is trained: every weight, low-rank additions and the head, or the head alone")
    group.add_argument("--lora_rank", type=at_least(1), default=8, help="rank of --tune lora")
    group.add_argument("--lora_alpha", type=positive, default=16, help="the additions are scaled by alpha / rank")
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
    group.add_argument("--update_freq", type=at_least(1), default=1, help="forward passes per update of the weights")
    group.add_argument("--epochs", type=at_least(1), default=30, help="passes over train")
    group.add_argument("--start_epoch", type=at_least(0), default=0, help="begin at this epoch of the schedules")
    group.add_argument("--early_stop", type=at_least(0), default=0, metavar="N",
                       help="end after N epochs without a better val; 0 never does")
    group.add_argument("--seed", type=at_least(0), default=0, help="of everything random")
    group.add_argument("--seeds", type=at_least(0), nargs="+", default=None, help="several runs, one of each seed")
    group.add_argument("--model_ema", action="store_true", help="evaluate and keep a moving average of the weights")
    group.add_argument("--model_ema_decay", type=share, default=0.9999, help="of the average")
    group.add_argument("--model_ema_force_cpu", action="store_true", help="keep the average in the CPU's memory")


def _add_optimiser(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimiser")
    group.add_argument("--opt", default="adamw", help="timm's name of it")
    group.add_argument("--opt_eps", type=positive, default=None, help="of Adam and the like (AdamW's own: 1e-8)")
    group.add_argument("--opt_betas", type=share, nargs=2, default=None, help="of Adam and the like")
    group.add_argument("--momentum", type=share, default=0.9, help="of SGD")
    group.add_argument("--clip_grad", type=positive, default=None, help="largest norm of the gradients; left out, any")
    group.add_argument("--weight_decay", type=not_negative, default=0.05, help="of weights, not of biases and norms")
    group.add_argument("--weight_decay_end", type=not_negative, default=None,
                       help="weight decay goes there by a cosine; left out, it stays")
    group.add_argument("--disable_weight_decay_on_rel_pos_bias", action="store_true",
                       help="none of relative position biases")
    group.add_argument("--lr", type=positive, default=5e-4, help="highest learning rate, of the head")
    group.add_argument("--layer_decay", type=positive, default=0.9, help="factor of the rate from each layer down")
    group.add_argument("--warmup_lr", type=not_negative, default=0.0, help="rate at the start of the warm-up")
    group.add_argument("--min_lr", type=not_negative, default=1e-6, help="rate at the end of the cosine")
    group.add_argument("--warmup_epochs", type=not_negative, default=5, help="length of the warm-up")
    group.add_argument("--warmup_steps", type=int, default=-1, help="the same in updates; from 1 on it counts")


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
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--amp_dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                       help="precision; auto takes bf16 where a short probe finds it faster")
    group.add_argument("--compile", action="store_true", help="torch.compile: minutes at first, then faster")
    group.add_argument("--grad_checkpointing", action="store_true",
                       help="keep fewer activations and compute them again: less memory, a third more time")
    group.add_argument("--num_workers", type=at_least(0), default=None,
                       help="decoding processes; left out, chosen from the machine")
    group.add_argument("--pin_mem", action="store_true", default=True, dest="pin_mem",
                       help="page-locked batches for a GPU")
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="without them")
    group.add_argument("--enable_multi_print", action="store_true", help="every process prints its log")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=clean_path, default=Path("output_dir/finetuning"),
                       help="the run's folder; several seeds or folds have folders inside")
    group.add_argument("--overwrite", action="store_true", help="run again although a run is there")
    group.add_argument("--auto_resume", action="store_false", default=False, dest="no_auto_resume",
                       help="continue an unfinished run")
    group.add_argument("--no_auto_resume", action="store_true", dest="no_auto_resume",
                       help="refuse to continue an unfinished run")
    group.add_argument("--save_ckpt", action="store_true", default=True, dest="save_ckpt", help="write checkpoints")
    group.add_argument("--no_save_ckpt", action="store_false", dest="save_ckpt",
                       help="write none: the run cannot be resumed, nor its model be used later")
    group.add_argument("--save_ckpt_freq", type=at_least(0), default=0, metavar="N",
                       help="keep checkpoint-<epoch>.pth every N epochs; 0 keeps none")
    group.add_argument("--save_every_steps", type=at_least(0), default=0, metavar="N",
                       help="write checkpoint-last.pth every N updates, too, not only after each epoch")
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases")
    group.add_argument("--wandb_name", default="demo", help="its project")
    group.add_argument("--exp_name", default=None, help="the run's name there")
    group.add_argument("--log_dir", type=optional_path, default=None, help="TensorBoard event files go there")


def share(text: str) -> float:
    """A number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value
