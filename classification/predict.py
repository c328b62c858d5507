"""Probabilities for photographs without labels.

    python3 predict.py --probe RUN_DIR IMAGE_OR_FOLDER_OR_CSV --output out.csv
    python3 predict.py --checkpoint RUN_DIR/checkpoint-best.pth IMAGE_OR_FOLDER_OR_CSV --output out.csv

RUN_DIR is a run directory of linear_eval.py or, for --checkpoint, of run_class_finetuning.py. The same backbone,
transform and precision are used as there, so that an image gets the very probabilities that the run wrote for it. A
contact sheet is drawn beside the CSV.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from furnace.arguments import extraction_of, predict_parser
from furnace.command_line import entry_point, logger, parse
from furnace.data.manifest import Manifest
from furnace.data.transforms import build_transform
from furnace.data.unlabelled import read_images
from furnace.engine_for_finetuning import predict
from furnace.evaluation.calibration import apply_temperature
from furnace.evaluation.features import backbone_features
from furnace.evaluation.multilabel import multilabel_table
from furnace.evaluation.report import predictions_table
from furnace.evaluation.saved_probe import SavedProbe, load_probe
from furnace.evaluation.sheets import Tile, image_sheet
from furnace.models import create_backbone
from furnace.models.classifier import load_classifier
from furnace.runtime import distributed, files
from furnace.runtime.files import UserError
from furnace.runtime.precision import pick_device

COLUMNS = 6  # of the contact sheet


@dataclass(frozen=True)
class Result:
    """(N, K) probabilities in a manifest's order, names of classes and model, and whether classes exclude others."""

    probabilities: np.ndarray
    class_names: tuple[str, ...]
    model: str
    exclusive: bool = True


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Predict; returns the exit code."""
    args = parse(predict_parser(), argv)
    sheet = args.output.with_suffix(".png")
    if args.output.suffix.lower() != ".csv":
        raise UserError(f"--output {args.output} must end in .csv")
    if args.checkpoint and args.pretrained_checkpoint:
        raise UserError("--pretrained_checkpoint is the backbone of a --probe; a --checkpoint has all weights")
    outputs = [args.output, sheet] if args.sheet else [args.output]
    distributed.on_main(lambda: files.refuse_outputs(outputs, [args.input, args.probe or args.checkpoint],
                                                     overwrite=args.overwrite))
    found = (by_probe if args.probe else by_checkpoint)(args)
    if found is None:
        return 0
    manifest, result = found
    files.write_table(args.output, as_table(manifest.filenames, result))
    wrote = [str(args.output)]
    if args.sheet:
        tiles = [Tile(manifest.path_of(i), caption(manifest.filenames[i], result.probabilities[i], result.class_names))
                 for i in range(min(args.sheet, len(manifest)))]
        image_sheet(sheet, [tiles[i:i + COLUMNS] for i in range(0, len(tiles), COLUMNS)],
                    title=f"{result.model}: {len(tiles)} of {len(manifest)} images, the three most probable classes")
        wrote.append(str(sheet))
    chosen = result.probabilities > 0.5 if not result.exclusive else \
        np.eye(len(result.class_names))[result.probabilities.argmax(axis=1)]
    logger.info("%d images: %s", len(manifest), ", ".join(
        f"{int(count)} x {name}" for name, count in zip(result.class_names, chosen.sum(axis=0), strict=True) if count))
    logger.info("%s probabilities in %s", "calibrated" if args.calibrated else "uncalibrated", " and ".join(wrote))
    return 0


def by_probe(args: argparse.Namespace) -> tuple[Manifest, Result] | None:
    """The probe of a run of linear_eval.py on features of its backbone; None in the helping processes."""
    saved = load_probe(args.probe)
    refuse_uncalibrated(args, saved.temperature)
    manifest = read_images(args.input, args.root_path)
    backbone = backbone_of(saved, args.pretrained_checkpoint)
    features = backbone_features(backbone, manifest, extraction_of(args, amp_dtype=saved.amp_dtype,
                                                                   transform=saved.transform))
    if features is None:
        return None
    probabilities = calibrated(saved.probe.predict_proba(features.embeddings), args, saved.temperature)
    return manifest, Result(probabilities, saved.class_names, saved.model)


def by_checkpoint(args: argparse.Namespace) -> tuple[Manifest, Result] | None:
    """A fine-tuned classifier; None in the helping processes."""
    classifier = load_classifier(args.checkpoint)
    refuse_uncalibrated(args, classifier.temperature)
    manifest = read_images(args.input, args.root_path)
    transform = build_transform(classifier.data_config, crop_pct=classifier.crop_pct)
    found = predict(classifier.model, manifest, transform, device=pick_device(args.device),
                    amp_dtype=classifier.amp_dtype, batch_size=args.batch_size, num_workers=args.num_workers,
                    multilabel=classifier.task == "multilabel")
    if found is None:
        return None
    probabilities = calibrated(found.probabilities, args, classifier.temperature)
    return manifest, Result(probabilities, classifier.class_names, classifier.name, classifier.task == "multiclass")


def refuse_uncalibrated(args: argparse.Namespace, temperature: float | None) -> None:
    """Before the work."""
    if args.calibrated and temperature is None:
        raise UserError(f"--calibrated: {args.probe or args.checkpoint} has no temperature: there was no val split, or "
                        "none could be told from it")


def calibrated(probabilities: np.ndarray, args: argparse.Namespace, temperature: float | None) -> np.ndarray:
    """Divided by the temperature where that was asked for."""
    return apply_temperature(probabilities, temperature) if args.calibrated else probabilities


def backbone_of(saved: SavedProbe, checkpoint: str | None) -> nn.Module:
    """The backbone that the probe was fitted on, its weights compared by SHA-256."""
    size = saved.data_config["input_size"][-1]
    backbone = create_backbone(saved.model, checkpoint or saved.checkpoint, input_size=size, seed=saved.seed)
    found = backbone.provenance
    if found.sha256 != saved.weights_sha256:
        raise UserError(f"the probe was fitted on features of other weights (sha256 {saved.weights_sha256[:12]}...) "
                        f"than {found.file} ({found.sha256[:12]}...): pass the right --pretrained_checkpoint")
    if found.data_config != saved.data_config:
        raise UserError(f"the probe was fitted with the transform {saved.data_config}, and {saved.model} now has "
                        f"{found.data_config}: run linear_eval.py again")
    return backbone


def as_table(filenames: list[str], result: Result) -> pd.DataFrame:
    """The columns of a run's test.csv with the class's name and without the true one: labels are never read here."""
    n, k = result.probabilities.shape
    if not result.exclusive:
        return multilabel_table(filenames, np.zeros((n, k)), result.probabilities, result.class_names).drop(
            columns="true_labels")
    table = predictions_table(filenames, np.zeros(n, int), result.probabilities).drop(columns="true_label")
    table.insert(table.columns.get_loc("predicted_label") + 1, "predicted_class",
                 [result.class_names[k] for k in table["predicted_label"]])
    return table


def caption(name: str, probabilities: np.ndarray, class_names: Sequence[str]) -> str:
    """File name and the three most probable classes."""
    best = np.argsort(-probabilities, kind="stable")[:3]
    return "\n".join([Path(name).name, *(f"{probabilities[k]:.2f} {class_names[k]}" for k in best)])


if __name__ == "__main__":
    sys.exit(main())
