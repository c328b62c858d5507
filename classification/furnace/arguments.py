"""Command-line options of the entry scripts.

Each script's parser is put together from the groups below. ``published`` says of every flag of the published scripts
what became of it here.
"""

import argparse
from pathlib import Path

from furnace.command_line import at_least, clean_path, file_name, fraction, new_parser, optional_path, positive
from furnace.data.transforms import TRANSFORMS
from furnace.evaluation import knn
from furnace.evaluation.feature_cache import default_cache_dir
from furnace.evaluation.feature_export import PROJECTIONS
from furnace.evaluation.features import Extraction
from furnace.evaluation.probe_sweep import MONITORS
from furnace.models import own_size
from furnace.runtime.precision import pick_device


def linear_eval_parser() -> argparse.ArgumentParser:
    """The options of linear_eval.py."""
    parser = new_parser("Linear evaluation: features of a frozen backbone, a linear probe on train, metrics on test.")
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument("--test_csv", type=optional_path, default=None,
                        help="an external test set, evaluated besides; its classes are found by class_name")
    parser.add_argument("--test_root", type=optional_path, default=None, help="folder of its images")
    parser.add_argument("--percent_data", type=fraction, nargs="+", default=[1.0],
                        help="share of the train images that is used, in (0, 1]; several for a label-efficiency curve")
    parser.add_argument("--percent_mode", choices=["published", "stratified"], default="published",
                        help="published: the first part of one shuffle; stratified: the same share of every class")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=None,
                        help="several draws of the subset; left out, that of --seed")
    parser.add_argument("--probe", choices=["published", "sweep"], default="published",
                        help="published: PanDerm's, nothing chosen; sweep: logistic regression, strength chosen on val")
    parser.add_argument("--monitor", choices=MONITORS, default=None,
                        help="metric on val by which --probe sweep chooses; left out, bacc")
    add_interval_options(parser)
    add_machine_options(parser, batch_size=200)
    add_cache_options(parser)
    add_output_options(parser)
    parser.add_argument("--csv_filename", default="results.csv", type=file_name,
                        help="name of the results table inside output_dir; a line is added per run")
    return parser


def predict_parser() -> argparse.ArgumentParser:
    """The options of predict.py."""
    parser = new_parser("Probabilities for photographs without labels, by a probe that linear_eval.py saved or a "
                        "classifier that run_class_finetuning.py trained.")
    parser.add_argument("input", type=clean_path, help="an image, a folder of images, or a CSV with a column image")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--probe", type=clean_path, metavar="RUN_DIR", help="run directory of linear_eval.py")
    model.add_argument("--checkpoint", type=clean_path, metavar="FILE.pth",
                       help="checkpoint-best.pth of run_class_finetuning.py, or of the published code")
    parser.add_argument("--output", type=clean_path, required=True, metavar="OUT.csv",
                        help="the predictions; a contact sheet OUT.png is drawn beside it")
    parser.add_argument("--root_path", type=optional_path, default=None, help="folder of a CSV's images")
    parser.add_argument("--pretrained_checkpoint", type=str.strip, default=None,
                        help="the backbone's file, where it is no longer at the place that the probe noted")
    parser.add_argument("--calibrated", action="store_true",
                        help="divide the logits by the temperature that was fitted on val")
    parser.add_argument("--sheet", type=at_least(0), default=48, metavar="N",
                        help="pictures on the contact sheet at most; 0 for none")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that are there")
    add_machine_options(parser, batch_size=200, precision=False)
    add_cache_options(parser)
    return parser


def extract_features_parser() -> argparse.ArgumentParser:
    """The options of extract_features.py."""
    parser = new_parser("Features of a frozen backbone as a file, with a map of them and pictures of its attention.")
    parser.add_argument("input", type=clean_path, help="an image, a folder of images, or a CSV with a column image")
    parser.add_argument("--output", type=clean_path, required=True, metavar="FEATURES.npz",
                        help="the file, .npz or .safetensors; its images are listed in FEATURES.csv beside it")
    parser.add_argument("--root_path", type=optional_path, default=None, help="folder of a CSV's images")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that are there")
    add_model_options(parser)
    group = parser.add_argument_group("pictures")
    group.add_argument("--scatter", choices=PROJECTIONS, default=None,
                       help="draw the features in two dimensions, as FEATURES_pca.png or FEATURES_umap.png")
    group.add_argument("--color", default=None, metavar="COLUMN", help="column of the CSV that colours the points")
    group.add_argument("--attention", type=at_least(1), nargs="?", const=16, default=None, metavar="N",
                       help="draw the attention over the first N images (16) in the folder FEATURES_attention")
    add_machine_options(parser, batch_size=200)
    add_cache_options(parser)
    return parser


def add_interval_options(parser: argparse.ArgumentParser) -> None:
    """How 95 % intervals are made."""
    group = parser.add_argument_group("intervals")
    group.add_argument("--bootstrap", choices=["plain", "stratified"], default="plain",
                       help="resample images as they come, or within each class; with patient_id or lesion_id in the "
                            "CSV whole patients (lesions) are resampled")
    group.add_argument("--resamples", type=at_least(100), default=1000, help="of the bootstrap")


def knn_eval_parser() -> argparse.ArgumentParser:
    """The options of knn_eval.py."""
    parser = new_parser("Evaluation without training: k nearest neighbours, few shots, and retrieval.")
    add_model_options(parser)
    add_data_options(parser)
    group = parser.add_argument_group("neighbours")
    group.add_argument("--k", nargs="+", type=at_least(1), default=list(knn.NEIGHBOURS),
                       help="numbers of neighbours that vote; test.csv has the predictions of 20, else of the first")
    group.add_argument("--temperature", type=positive, default=knn.TEMPERATURE,
                       help="a neighbour's vote is exp(cosine similarity / temperature)")
    group.add_argument("--shots", nargs="+", type=at_least(1), default=[1, 2, 4, 8, 16],
                       help="labelled train images per class of the few-shot evaluation")
    group.add_argument("--episodes", type=at_least(2), default=knn.EPISODES, help="random draws for each of --shots")
    group = parser.add_argument_group("retrieval")
    group.add_argument("--gallery", choices=["train", "train_val", "test"], default="train",
                       help="where the test images look for others of their class; test: among the other test images")
    group.add_argument("--exclude", choices=["lesion_id", "patient_id", "none"], default=None,
                       help="gallery images of the query's own lesion or patient are left out, the same image always; "
                            "left out, lesion_id where the CSV has it")
    group.add_argument("--queries_shown", type=at_least(0), default=8,
                       help="queries that plots/retrieval.png shows with their five nearest images; 0 draws none")
    add_interval_options(parser)
    add_machine_options(parser, batch_size=200)
    add_cache_options(parser)
    add_output_options(parser)
    return parser


def evaluate_predictions_parser() -> argparse.ArgumentParser:
    """The options of evaluate_predictions.py."""
    parser = new_parser("Score predictions CSVs of this or the published toolkits again: metrics with 95 % intervals, "
                     "plots, and each further file compared with the first.")
    parser.add_argument("predictions", nargs="+", type=clean_path, metavar="PRED.csv",
                        help="filename or image_path, true_label, probability_class_0.. (binary: probability)")
    parser.add_argument("--names", nargs="+", default=None,
                        help="what to call the files; left out, their names, or their folders' where those are equal")
    parser.add_argument("--class_names", type=clean_path, default=None, help="text file with a class name a line")
    group = parser.add_argument_group("patients and lesions")
    group.add_argument("--csv_path", type=clean_path, default=None,
                       help="metadata with patient_id or lesion_id of the images, joined by file name")
    group.add_argument("--group_column", choices=["patient_id", "lesion_id"], default=None,
                       help="what the intervals resample; left out, patient_id, else lesion_id, else images")
    group.add_argument("--aggregate", choices=["lesion_id"], default=None,
                       help="one prediction per lesion: the mean probability over its images")
    add_interval_options(parser)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the resamples")
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=clean_path, default=Path("output_dir"),
                       help="folder of results.json, table.csv, table.md and plots/")
    group.add_argument("--overwrite", action="store_true", help="replace the results of an earlier evaluation there")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which backbone with which weights."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, type=str.strip, help="PanDerm_Base_LP, PanDerm_Large_LP, "
                       "DermINO_Base, dinov2, imgnet_large21k, SwAVDerm, demo, timm:NAME, hf-hub:OWNER/NAME, or the "
                       "folder of an exported teacher (pretraining/run.py)")
    group.add_argument("--pretrained_checkpoint", type=str.strip, default=None,
                       help="checkpoint file (.pth, .safetensors), hf-hub:OWNER/NAME, or 'random' for an untrained "
                            "baseline; left out, the weights that belong to the model's name")
    group.add_argument("--input_size", type=at_least(16), default=None,
                       help="side of the images in pixels; left out, that of the model's folder, else 224")


def settle_input_size(args: argparse.Namespace) -> None:
    """Fill in ``--input_size``.

    Raises:
        UserError: ``--model`` is a path without a model.
    """
    if args.input_size is None:
        args.input_size = own_size(args.model)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Which images, labels and splits."""
    group = parser.add_argument_group("data")
    group.add_argument("--csv_path", required=True, type=clean_path, help="CSV with image, split, label/binary_label")
    group.add_argument("--root_path", type=optional_path, default=None,
                       help="folder of the images; left out, the CSV's own")
    group.add_argument("--nb_classes", type=at_least(2), default=2,
                       help="number of classes; 2 reads the column binary_label, else label")
    group.add_argument("--class_names", type=clean_path, default=None,
                       help="text file with a class name a line; left out, the column class_name, if any")
    group.add_argument("--strict_split", action="store_true",
                       help="refuse leakage between splits and repeated rows instead of warning")


def add_machine_options(parser: argparse.ArgumentParser, *, batch_size: int, precision: bool = True) -> None:
    """Device and loading; with ``precision`` also what decides the features: number format, transform, seed."""
    group = parser.add_argument_group("machine")
    group.add_argument("--batch_size", type=at_least(1), default=batch_size, help="images per batch at most")
    group.add_argument("--num_workers", type=at_least(0), default=None,
                       help="decoding processes; left out, chosen from the machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--compile", action="store_true",
                       help="run the backbone through torch.compile: minutes at first, then a few per cent faster")
    if not precision:
        return
    group.add_argument("--amp_dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                       help="precision of the backbone; auto takes bf16 where a short probe finds it faster. "
                            "Published numbers are fp32")
    group.add_argument("--transform", choices=TRANSFORMS, default="published",
                       help="published: decoded and resized with Pillow; fast: on 8-bit tensors, within 1/255 of it")
    group.add_argument("--seed", type=at_least(0), default=0, help="0 gives the published draws")


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Where features are kept between runs."""
    group = parser.add_argument_group("feature cache")
    group.add_argument("--cache_dir", type=clean_path, default=default_cache_dir(),
                       help="folder where features are kept, so that no image is encoded twice by one backbone")
    group.add_argument("--no_cache", action="store_true", help="neither read nor keep features")


def extraction_of(args: argparse.Namespace, **settled: str) -> Extraction:
    """The machine and cache options as one value; ``settled`` replaces amp_dtype and transform where no option says."""
    made = {key: settled.get(key) or getattr(args, key) for key in ("amp_dtype", "transform")}
    return Extraction(device=pick_device(args.device), batch_size=args.batch_size, num_workers=args.num_workers,
                      compile=args.compile, cache_dir=None if args.no_cache else args.cache_dir, **made)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where results go and what happens to older ones."""
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=clean_path, default=Path("output_dir"), help="folder of all results")
    group.add_argument("--overwrite", action="store_true", help="run again although results are there")
    group.add_argument("--no_auto_resume", action="store_true", help="refuse to continue an unfinished run")
