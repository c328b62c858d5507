"""Command-line options of pretraining/run.py. Where DINOv2 has a name for a number, it is that."""

import argparse
from pathlib import Path

from furnace.command_line import (
    at_least,
    clean_path,
    fraction,
    logger,
    new_parser,
    not_negative,
    optional_path,
    positive,
    share,
)
from furnace.pretraining_options import BIASES, LABEL_SOURCES, MODES
from furnace.runtime.files import UserError
from furnace.training_arguments import add_checkpoint_options, add_training_machine_options

# what the parts that other scripts share call this script's options
HERE = {"--input_size": "--global_crops_size", "--lr": "--base_lr"}


def pretraining_parser() -> argparse.ArgumentParser:
    """The options; the defaults are DermINO's published recipe (its run.sh) where it has the number."""
    parser = new_parser("Hybrid pretraining of a vision transformer: self-supervised (DINO, iBOT, KoLeo), with the "
                        "labels that are there (masked multi-label cross-entropy), towards prototypes of the classes.")
    _add_data(parser)
    _add_model(parser)
    _add_views(parser)
    _add_objective(parser)
    _add_labels(parser)
    _add_course(parser)
    add_training_machine_options(parser, "--num_workers")
    _add_output(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data_csv", type=optional_path, default=None, metavar="CSV_OR_FOLDER",
                       help="a CSV with image and, where they are known, labels (between semicolons), source, split; "
                            "or a folder of images without labels")
    group.add_argument("--root_path", type=optional_path, default=None,
                       help="folder of the CSV's images; left out, the CSV's own")
    group.add_argument("--ontology", type=optional_path, default=None, metavar="CSV",
                       help="the classes: id, name, synonyms, parent, sources (configs/dermatology.csv is one)")
    group.add_argument("--label_ancestors", action="store_true", default=True, dest="label_ancestors",
                       help="a label implies the classes above it")
    group.add_argument("--no_label_ancestors", action="store_false", dest="label_ancestors",
                       help="a label is this class alone, as published")
    group.add_argument("--lenient_labels", action="store_true",
                       help="warn instead of refusing: of labels that the ontology does not know (their images are "
                            "unlabelled then), of labels that count for nothing, of an image whose rows disagree")
    group.add_argument("--eval_csv", type=optional_path, default=None, metavar="CSV",
                       help="labelled images (image, label, split): k-NN of its val images (test, where there is no "
                            "val) among its train images")
    group.add_argument("--eval_root", type=optional_path, default=None,
                       help="folder of its images; left out, the CSV's own")
    group.add_argument("--eval_freq", type=at_least(1), default=1, metavar="N",
                       help="evaluate after every N epochs and after the last")
    group.add_argument("--forbid_overlap", type=_path_text, nargs="+", default=None, metavar="CSV",
                       help="refuse to start when an image of these lists (test sets) is among the training images, "
                            "also mirrored, turned or compressed again")
    group.add_argument("--forbid_overlap_root", type=_path_text, nargs="+", default=None, metavar="FOLDER",
                       help="folder of their images, one for all lists or one for each; left out, each list's own")


def _path_text(text: str) -> str:
    """A path as args.yaml can hold it in a list."""
    return str(clean_path(text))


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=str.strip, default=None,
                       help="a plain vision transformer: timm:vit_small_patch16_224, DermINO_Base, PanDerm_Base_LP, "
                            "dinov2, or the folder of an exported teacher")
    group.add_argument("--pretrained_checkpoint", type=str.strip, default=None,
                       help="where to start: a file (its heads are taken over, too), hf-hub:OWNER/NAME, or 'random'; "
                            "left out, the weights that belong to the model's name")
    group.add_argument("--patch_size", type=at_least(1), default=None, help="other than the model's, e.g. 14")
    group.add_argument("--layer_scale_init_value", type=positive, default=None,
                       help="LayerScale for an architecture without it, e.g. 1e-5")
    group.add_argument("--drop_path", type=share, default=0.4, help="stochastic depth of the student, in all blocks")
    group.add_argument("--head_n_prototypes", type=at_least(2), default=65536, help="of the DINO and the iBOT head")
    group.add_argument("--head_hidden_dim", type=at_least(1), default=2048, help="of both heads")
    group.add_argument("--head_bottleneck_dim", type=at_least(1), default=256, help="of both heads")


def _add_views(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("views")
    group.add_argument("--global_crops_size", type=at_least(8), default=224, metavar="PIXELS",
                       help="side of the two large crops")
    group.add_argument("--local_crops_size", type=at_least(8), default=98, metavar="PIXELS",
                       help="side of the small ones")
    group.add_argument("--local_crops_number", type=at_least(0), default=8, help="small crops per image")
    group.add_argument("--global_crops_scale", type=fraction, nargs=2, default=[0.32, 1.0], metavar="SHARE",
                       help="least and largest share of the area")
    group.add_argument("--local_crops_scale", type=fraction, nargs=2, default=[0.05, 0.32], metavar="SHARE",
                       help="the same of the small crops")
    group.add_argument("--dinov2_compat", action="store_true",
                       help="blur with 1 - p instead of p, as DINOv2's and DermINO's released weights were trained")
    group.add_argument("--mask_sample_probability", type=share, default=0.5, help="share of large crops with a mask")
    group.add_argument("--mask_ratio_min_max", type=share, nargs=2, default=[0.1, 0.5], metavar="SHARE",
                       help="least and largest share of masked patches")


def _add_objective(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("objective")
    for name, value in (("dino", 1.0), ("ibot", 1.0), ("koleo", 0.1)):
        group.add_argument(f"--{name}_loss_weight", type=not_negative, default=value, help="of this loss")
    group.add_argument("--momentum_teacher", type=share, default=0.992, help="of the moving average, at the start")
    group.add_argument("--final_momentum_teacher", type=share, default=1.0, help="and, by a cosine, at the end")
    group.add_argument("--warmup_teacher_temp", type=positive, default=0.04, help="temperature at the start")
    group.add_argument("--teacher_temp", type=positive, default=0.07, help="temperature after the warm-up")
    group.add_argument("--warmup_teacher_temp_epochs", type=not_negative, default=30.0, help="length of that warm-up")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labels")
    group.add_argument("--label_loss_weight", type=not_negative, default=1.0,
                       help="of the cross-entropy over the known classes of labelled images")
    group.add_argument("--label_loss_weight_end", type=not_negative, default=None,
                       help="the weight goes there by a cosine; left out, it stays")
    group.add_argument("--label_warmup_epochs", type=not_negative, default=0.0,
                       help="the weight rises from 0 over so many epochs")
    group.add_argument("--prototypes", type=str.strip, default="text", metavar="SOURCE",
                       help=f"the classes' prototypes: {', '.join(LABEL_SOURCES)}, or a FILE.npy or FILE.safetensors "
                            "with a row per class of the ontology")
    group.add_argument("--text_encoder", type=str.strip, default="GanjinZero/coder_all",
                       help="of --prototypes text: a Hugging Face model's name or folder")
    group.add_argument("--text_pooling", choices=["mean", "pooler"], default="mean",
                       help="mean over the words, or the pooler's output with padding attended to, as published")
    group.add_argument("--prototype_mode", choices=MODES, default="frozen",
                       help="fixed (published), trained, or trained after --prototype_warmup_epochs")
    group.add_argument("--prototype_lr", type=positive, default=1e-4,
                       help="the base rate of trained prototypes; warm-up, cosine and batch size act as on --base_lr")
    group.add_argument("--prototype_warmup_epochs", type=not_negative, default=10.0, help="of --prototype_mode warmup")
    group.add_argument("--label_temperature", type=positive, default=None,
                       help="logits are cosines over this temperature; left out, products with the class token")
    group.add_argument("--label_bias", choices=BIASES, default="prior",
                       help="where the logits' bias starts (and stays with --prototype_mode frozen): the classes' log "
                            "odds among the labelled images, or 0, as published")


def _add_course(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=at_least(2), default=256, help="images of a forward pass of one process")
    group.add_argument("--update_freq", type=at_least(1), default=1, help="forward passes per update of the weights")
    group.add_argument("--epochs", type=at_least(1), default=100, help="length of the training")
    group.add_argument("--epoch_length", type=at_least(0), default=0, metavar="UPDATES",
                       help="updates of an epoch; 0: as many as one pass over the images has")
    group.add_argument("--max_updates", type=at_least(0), default=0, metavar="N",
                       help="pause after N updates and export the teacher (a smoke test, a time-boxed job); the same "
                            "command without it goes on; 0: to the end")
    group.add_argument("--base_lr", type=positive, default=2e-3,
                       help="highest learning rate for 1024 images an update; it goes with their square root")
    group.add_argument("--min_lr", type=not_negative, default=1e-6, help="rate at the end of the cosine")
    group.add_argument("--warmup_epochs", type=not_negative, default=10.0, help="length of the warm-up from 0")
    group.add_argument("--layer_decay", type=positive, default=1.0, help="factor of the rate from each layer down")
    group.add_argument("--patch_embed_lr_mult", type=not_negative, default=0.2, help="of the patches' embedding")
    group.add_argument("--freeze_last_layer_epochs", type=not_negative, default=1.0,
                       help="the heads' last layers rest so long")
    group.add_argument("--weight_decay", type=not_negative, default=0.04, help="at the start")
    group.add_argument("--weight_decay_end", type=not_negative, default=0.2, help="and, by a cosine, at the end")
    group.add_argument("--clip_grad", type=not_negative, default=3.0,
                       help="largest norm of the gradients of backbone and heads, each; 0: any")
    group.add_argument("--seed", type=at_least(0), default=0, help="of everything random")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=clean_path, default=Path("output_dir/pretraining"), help="the run's folder")
    group.add_argument("--resume", type=optional_path, default=None, metavar="FILE",
                       help="a checkpoint-last.pth of this very run in another folder, to go on from")
    add_checkpoint_options(group)
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases")
    group.add_argument("--wandb_project", default="pretraining", help="its project")
    group.add_argument("--exp_name", default=None, help="the run's name there")
    group.add_argument("--log_dir", type=optional_path, default=None, help="TensorBoard event files go there")


def settle_options(args: argparse.Namespace) -> None:
    """Fill in what depends on others; refuse contradictions, all of them at once."""
    wrong = [
        (args.data_csv is None, "--data_csv is missing: a CSV with a column image, or a folder of images"),
        (not args.model, "--model is missing, e.g. timm:vit_small_patch16_224"),
        (args.eval_root is not None and args.eval_csv is None, "--eval_root is of --eval_csv: add it"),
        (not args.save_ckpt, "--no_save_ckpt is not for pretraining: a run that cannot be resumed is lost"),
        *((length >= args.epochs, f"--{name} {length:g} leaves nothing of --epochs {args.epochs}: take fewer, or "
           "more --epochs") for name, length in
          ((name, getattr(args, name)) for name in
           ("warmup_epochs", "label_warmup_epochs", "freeze_last_layer_epochs",
            *(["prototype_warmup_epochs"] if args.prototype_mode == "warmup" else [])))),
        (args.forbid_overlap_root is not None and len(args.forbid_overlap_root) not in
         (1, len(args.forbid_overlap or [])), "--forbid_overlap_root is one folder, or one for each list of "
                                              "--forbid_overlap"),
        *((low > high, f"--{name} {low:g} {high:g}: the first is the smaller one") for name, (low, high) in
          ((name, getattr(args, name)) for name in ("global_crops_scale", "local_crops_scale", "mask_ratio_min_max"))),
        (args.prototypes not in LABEL_SOURCES and not args.prototypes.endswith((".npy", ".safetensors")),
         f"--prototypes {args.prototypes} is none of {', '.join(LABEL_SOURCES)}, and no .npy or .safetensors file"),
        (not any(getattr(args, f"{name}_loss_weight") for name in
                 ("dino", "ibot", "koleo", *(["label"] if args.ontology else []))),
         "all loss weights are 0 (that of labels needs --ontology): nothing would be trained"),
    ]
    if faults := [text for fault, text in wrong if fault]:
        raise UserError("\n  ".join(faults))
    args.clip_grad = args.clip_grad or None
    args.forbid_overlap = [Path(text) for text in args.forbid_overlap or []]
    args.forbid_overlap_root = args.forbid_overlap_root and [Path(text) for text in args.forbid_overlap_root]
    if args.ontology is None and args.data_csv.suffix.lower() == ".csv":
        logger.info("without --ontology the training is self-supervised: options of labels and prototypes rest")
