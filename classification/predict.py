"""Probabilities for photographs without labels.

    python3 predict.py --probe RUN_DIR IMAGE_OR_FOLDER_OR_CSV --output out.csv

RUN_DIR is a run directory of linear_eval.py. The same backbone, transform and precision are used as there, so that an
image gets the very probabilities that linear_eval.py wrote for it. A contact sheet is drawn beside the CSV.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from furnace.arguments import extraction_of, predict_parser
from furnace.command_line import entry_point, logger, parse
from furnace.data.unlabelled import read_images
from furnace.evaluation.calibration import apply_temperature
from furnace.evaluation.features import backbone_features
from furnace.evaluation.report import predictions_table
from furnace.evaluation.saved_probe import SavedProbe, load_probe
from furnace.evaluation.sheets import Tile, image_sheet
from furnace.models import create_backbone
from furnace.runtime import distributed, files
from furnace.runtime.files import UserError

COLUMNS = 6  # of the contact sheet


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Predict; returns the exit code."""
    args = parse(predict_parser(), argv)
    sheet = args.output.with_suffix(".png")
    if args.output.suffix.lower() != ".csv":
        raise UserError(f"--output {args.output} must end in .csv")
    outputs = [args.output, sheet] if args.sheet else [args.output]
    distributed.on_main(lambda: files.refuse_outputs(outputs, [args.input, args.probe], overwrite=args.overwrite))
    saved = load_probe(args.probe)
    if args.calibrated and saved.temperature is None:
        raise UserError(f"--calibrated: the probe in {args.probe} has no temperature: there was no val split, "
                        "or none could be told from it")
    manifest = read_images(args.input, args.root_path)
    backbone = backbone_of(saved, args.pretrained_checkpoint)
    how = extraction_of(args, amp_dtype=saved.amp_dtype, transform=saved.transform)
    features = backbone_features(backbone, manifest, how)
    if features is None:
        return 0
    probabilities = saved.probe.predict_proba(features.embeddings)
    if args.calibrated:
        probabilities = apply_temperature(probabilities, saved.temperature)
    files.write_table(args.output, as_table(manifest.filenames, probabilities, saved.class_names))
    wrote = [str(args.output)]
    if args.sheet:
        tiles = [Tile(manifest.path_of(i), caption(manifest.filenames[i], probabilities[i], saved.class_names))
                 for i in range(min(args.sheet, len(manifest)))]
        image_sheet(sheet, [tiles[i:i + COLUMNS] for i in range(0, len(tiles), COLUMNS)],
                    title=f"{saved.model}: {len(tiles)} of {len(manifest)} images, the three most probable classes")
        wrote.append(str(sheet))
    counts = np.bincount(probabilities.argmax(axis=1), minlength=len(saved.class_names))
    logger.info("%d images: %s", len(manifest), ", ".join(f"{count} x {name}" for name, count in
                                                          zip(saved.class_names, counts, strict=True) if count))
    logger.info("%s probabilities in %s", "calibrated" if args.calibrated else "uncalibrated", " and ".join(wrote))
    return 0


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


def as_table(filenames: list[str], probabilities: np.ndarray, class_names: Sequence[str]) -> pd.DataFrame:
    """The columns of a run's test.csv with the class's name and without true_label: labels are never read here."""
    table = predictions_table(filenames, np.zeros(len(filenames), int), probabilities).drop(columns="true_label")
    table.insert(table.columns.get_loc("predicted_label") + 1, "predicted_class",
                 [class_names[k] for k in table["predicted_label"]])
    return table


def caption(name: str, probabilities: np.ndarray, class_names: Sequence[str]) -> str:
    """File name and the three most probable classes."""
    best = np.argsort(-probabilities, kind="stable")[:3]
    return "\n".join([Path(name).name, *(f"{probabilities[k]:.2f} {class_names[k]}" for k in best)])


if __name__ == "__main__":
    sys.exit(main())
