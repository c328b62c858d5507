"""Command-line options that every training script has: what is trained, the optimiser, the machine, the files."""

import argparse

from furnace.command_line import at_least, logger, not_negative, positive, share
from furnace.published import TAKES_VALUE, accepted_only, refused
from furnace.runtime.files import UserError

ALIASES = {"--smoke_test": ("--smoke",)}  # as the published run.sh writes them


def add_accepted_options(parser: argparse.ArgumentParser, script: str) -> None:
    """The published flags of a script that have no effect here, and those that end it."""
    group = parser.add_argument_group("accepted, without effect", "each is answered by a line that says what holds")
    for flag, text in (accepted_only(script) | refused(script)).items():
        if flag in TAKES_VALUE:
            group.add_argument(flag, default=None, metavar="X", help=text)
        else:
            group.add_argument(flag, *ALIASES.get(flag, ()), action="store_true", help=text)


def say_what_holds(args: argparse.Namespace, script: str) -> None:
    """A line for every flag without effect that was given.

    Raises:
        UserError: a flag that is refused was given.
    """
    for flag, text in refused(script).items():
        if getattr(args, flag[2:]):
            raise UserError(f"{flag} is not supported: {text}")
    for flag, text in accepted_only(script).items():
        if getattr(args, flag[2:]) not in (None, False):
            logger.info("%s has no effect: %s", flag, text)


def add_tuning_options(parser: argparse.ArgumentParser) -> None:
    """Which weights are trained."""
    group = parser.add_argument_group("what is trained")
    group.add_argument("--tune", choices=["full", "lora", "head"], default="full",
                       help="what is trained: every weight, low-rank additions and the head, or the head alone")
    group.add_argument("--lora_rank", type=at_least(1), default=8, help="rank of --tune lora")
    group.add_argument("--lora_alpha", type=positive, default=16.0, help="the additions are scaled by alpha / rank")


def add_course_options(group: argparse._ArgumentGroup) -> None:
    """The course of a training, besides batch size and epochs, which scripts name differently."""
    group.add_argument("--update_freq", type=at_least(1), default=1, help="forward passes per update of the weights")
    group.add_argument("--start_epoch", type=at_least(0), default=0, help="begin at this epoch of the schedules")
    group.add_argument("--early_stop", type=at_least(0), default=0, metavar="N",
                       help="end after N epochs without a better val; 0 never does")
    group.add_argument("--seed", type=at_least(0), default=0, help="of everything random")
    group.add_argument("--seeds", type=at_least(0), nargs="+", default=None, help="several runs, one of each seed")
    group.add_argument("--model_ema", action="store_true", help="evaluate and keep a moving average of the weights")
    group.add_argument("--model_ema_decay", type=share, default=0.9999, help="of the average")
    group.add_argument("--model_ema_force_cpu", action="store_true", help="keep the average in the CPU's memory")


def add_optimiser_options(parser: argparse.ArgumentParser) -> None:
    """Optimiser and schedules."""
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
    group.add_argument("--warmup_epochs", type=not_negative, default=5.0, help="length of the warm-up")
    group.add_argument("--warmup_steps", type=int, default=-1, help="the same in updates; from 1 on it counts")


def add_training_machine_options(parser: argparse.ArgumentParser, *workers: str) -> argparse._ArgumentGroup:
    """Device, precision, memory; ``workers`` are the names of the number of loader processes."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--amp_dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                       help="precision; auto takes bf16 where a short probe finds it faster")
    group.add_argument("--compile", action="store_true", help="torch.compile: minutes at first, then faster")
    group.add_argument("--grad_checkpointing", action="store_true",
                       help="keep fewer activations and compute them again: less memory, a third more time")
    group.add_argument(*workers, type=at_least(0), default=None, dest="num_workers",
                       help="decoding processes; left out, chosen from the machine")
    group.add_argument("--pin_mem", action="store_true", default=True, dest="pin_mem",
                       help="page-locked batches for a GPU")
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="without them")
    return group


def add_checkpoint_options(group: argparse._ArgumentGroup) -> None:
    """What happens to an earlier run, and which checkpoints are written."""
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
