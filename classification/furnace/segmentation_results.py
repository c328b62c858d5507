"""What a segmenter's test leaves: masks, outlined photographs, a table of the images, metrics with intervals."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from furnace.data.images import load_rgb
from furnace.data.manifest import Manifest
from furnace.data.masks import load_mask
from furnace.data.segmentation import SegmentationManifest
from furnace.data.segmentation_datasets import read_mask
from furnace.evaluation.lesion_masks import Masking, lesion_masks
from furnace.evaluation.segmentation_metrics import score_segmentation, segmentation_row
from furnace.evaluation.segmentation_sheets import PREDICTION, Case, outlined, worst_cases_sheet, worst_rows
from furnace.evaluation.statistics import resampling_for
from furnace.models.segmentation_files import Segmenter
from furnace.runtime import distributed, files
from furnace.runtime.files import UserError
from furnace.runtime.run_directory import RunDirectory

logger = logging.getLogger(__name__)

SHOWN = ("dice", "jaccard", "threshold_jaccard", "hd95", "boundary_f1")
MASKS, OVERLAYS, WORST = "masks", "overlays", "worst_cases.png"


@dataclass(frozen=True)
class Testing:
    """How a segmenter is tested.

    Attributes:
        masking: how masks are made.
        overlays: write each test image with the true and the predicted outline.
        resamples: of the bootstrap.
    """

    masking: Masking
    overlays: bool
    resamples: int


def unseen(segmenter: Segmenter, splits: dict[str, SegmentationManifest], *, drawn: bool
           ) -> dict[str, SegmentationManifest]:
    """The splits without a val that was trained on (of another seed, or of a fold).

    Raises:
        UserError: the test was drawn, and images of it were trained on.
    """
    seen = {name: int(part.frame["content_id"].isin(segmenter.trained_on).sum()) for name, part in splits.items()}
    if seen["test"]:
        test = splits["test"]
        text = f"{segmenter.path} was trained on {seen['test']} of the {len(test)} test images"
        if drawn and segmenter.split_note:
            raise UserError(f"{text}: its training drew otherwise ({segmenter.split_note}): pass the --seed and "
                            "--val_fraction of the training")
        logger.warning("%s: the scores are too good", text)
    if seen["val"]:
        logger.warning("%d of the %d val images were trained on: val is left out", seen["val"], len(splits["val"]))
        return {"test": splits["test"]}
    return splits


def score_splits(run: RunDirectory, segmenter: Segmenter, splits: dict[str, SegmentationManifest], how: Testing, *,
                 data_set: str, split_note: str = "") -> dict[str, Any]:
    """Predict and score val and test; write ``<split>.csv``, and of test the masks and the sheet of the worst cases.

    All processes call it; each writes the masks of its own images.

    Args:
        run: the directory.
        segmenter: the chosen model.
        splits: by name; empty ones are left out.
        how: settings.
        data_set: its name.
        split_note: what was drawn in place of an official split.

    Returns:
        What results.json holds, in the main process; {} in others.
    """
    results: dict[str, Any] = {}
    for name, manifest in splits.items():
        if len(manifest):
            table = score_images(run.path, name, segmenter, manifest, how)
            if distributed.is_main():
                run.write_predictions(name, table)
                results[name] = score_segmentation(table, resampling=resampling_for(
                    manifest.frame, stratify=False, resamples=how.resamples))
                if name == "test":
                    draw_worst(run.path, manifest, table)
    if not distributed.is_main():
        return {}
    recipe = segmenter.model.recipe
    return {"task": "segmentation", "data_set": data_set, "model": segmenter.name, "head": recipe["head"],
            "recipe": segmenter.transform, "input_size": list(segmenter.input_size), "taps": recipe["taps"],
            "weights_sha256": segmenter.sha256, "amp_dtype": how.masking.amp_dtype,
            "class_names": list(segmenter.class_names), "best_epoch": segmenter.epoch, "tta": how.masking.views,
            "window": how.masking.window, "largest_component": how.masking.largest,
            **({"split_note": split_note} if split_note else {}), "splits": results}


def score_images(folder: Path, name: str, segmenter: Segmenter, manifest: SegmentationManifest, how: Testing
                 ) -> pd.DataFrame | None:
    """A row per image (``segmentation_row``) in the manifest's order; None but in the main process."""
    names = output_names(manifest.filenames)
    rows = []
    for index, mask in lesion_masks(segmenter.model, manifest, how.masking, description=name):
        truth = read_mask(manifest, index)
        rows.append((index, segmentation_row(manifest.filenames[index], mask, truth)))
        if name == "test":
            write_mask(folder / MASKS / f"{names[index]}_segmentation.png", mask)
            if how.overlays:
                picture = outlined(load_rgb(manifest.path_of(index)), [truth, mask])
                write_picture(folder / OVERLAYS / f"{names[index]}.png", picture)
    rows = sorted(distributed.gather_lists(rows), key=lambda row: row[0])
    return pd.DataFrame([row for _, row in rows]) if distributed.is_main() else None


def draw_worst(folder: Path, manifest: SegmentationManifest, table: pd.DataFrame) -> None:
    """The sheet of the test images with the lowest Dice, from the masks that were written."""
    names = output_names(manifest.filenames)
    cases = [Case(manifest.path_of(i), Path(manifest.filenames[i]).name, read_mask(manifest, i),
                  load_mask(folder / MASKS / f"{names[i]}_segmentation.png")) for i in worst_rows(table).index]
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    worst_cases_sheet(folder / "plots" / WORST, cases, title=f"Lowest Dice of {len(table)} test images first")


def predict_photographs(folder: Path, segmenter: Segmenter, manifest: Manifest, how: Masking) -> pd.DataFrame | None:
    """Masks and outlined photographs of images without truth, and predictions.csv, a row per image.

    Args:
        folder: gets masks/, overlays/ and predictions.csv.
        segmenter: a trained one.
        manifest: the photographs.
        how: settings.

    Returns:
        filename, mask, height, width, lesion_pixels, lesion_share; None but in the main process.
    """
    names, rows = output_names(manifest.filenames), []
    for index, mask in lesion_masks(segmenter.model, manifest, how, description="predicting"):
        file = f"{MASKS}/{names[index]}_segmentation.png"
        write_mask(folder / file, mask)
        write_picture(folder / OVERLAYS / f"{names[index]}.png",
                      outlined(load_rgb(manifest.path_of(index)), [mask], colours=[PREDICTION]))
        lesion = int(np.count_nonzero(mask))
        rows.append((index, {"filename": manifest.filenames[index], "mask": file, "height": mask.shape[0],
                             "width": mask.shape[1], "lesion_pixels": lesion, "lesion_share": lesion / mask.size}))
    rows = sorted(distributed.gather_lists(rows), key=lambda row: row[0])
    if not distributed.is_main():
        return None
    table = pd.DataFrame([row for _, row in rows])
    files.write_table(folder / "predictions.csv", table)
    return table


def output_names(filenames: Sequence[str]) -> list[str]:
    """A name for each image's files: its own without extension, below the folder that all have in common."""
    folders = [os.path.dirname(name) for name in filenames]
    common = os.path.commonpath(folders) if len({os.path.isabs(name) for name in folders}) == 1 else ""
    inside = [Path(os.path.relpath(name, common) if common else name) for name in filenames]
    plain = ["/".join(part for part in path.parts if part not in ("..", path.anchor)) for path in inside]
    stems = [name[:len(name) - len(Path(name).suffix)] for name in plain]
    count = Counter(stems)
    names = [stem if count[stem] == 1 else name for stem, name in zip(stems, plain, strict=True)]
    same, taken = Counter(name.casefold() for name in names), {name.casefold() for name in names}
    for i, name in enumerate(names):  # ../x/a.png beside x/a.png; a.jpg beside a.jpg.png; A.png beside a.png
        if same[name.casefold()] > 1:
            number = next(number for number in range(1, len(names) + 2) if f"{name}_{number}".casefold() not in taken)
            names[i] = f"{name}_{number}"
            taken.add(names[i].casefold())
    return names


def write_mask(path: Path, mask: np.ndarray) -> None:
    """An 8-bit PNG of 0 and 255, as the ISIC challenges have it."""
    write_picture(path, Image.fromarray(mask.astype(np.uint8) * 255))


def write_picture(path: Path, picture: Image.Image) -> None:
    """A PNG, whole or not at all."""
    try:
        with files.atomic_write(path) as file:
            picture.save(file, format="PNG", compress_level=1)  # of 24 megapixels: seconds, not most of a minute
    except files.OutputError as error:
        raise files.ProcessError(str(error)) from error  # the other processes do not meet it
