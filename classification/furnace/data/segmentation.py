"""The images and lesion masks of a segmentation data set, read and checked once.

A CSV has the columns ``image``, ``mask`` and ``split`` (both files relative to one folder), and ``patient_id`` and
``lesion_id`` where they are known. A public set is read from its archive's own folders (``segmentation_folders``).
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupShuffleSplit

from furnace.data.csv_table import image_folder, missing_column, parse_csv, read_csv_bytes
from furnace.data.images import check_files
from furnace.data.manifest import GROUP_COLUMNS, Manifest, check_group_leakage, check_repeats, check_split_names
from furnace.data.masks import check_masks
from furnace.data.problems import ROW, Problem, report
from furnace.data.segmentation_folders import known_name, read_folders
from furnace.data.splits import group_numbers
from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

VAL_FRACTION = 0.125  # of train, where a set has no val: with TEST_FRACTION 70 / 10 / 20 % of all
TEST_FRACTION = 0.2  # of a set without any official split


@dataclass(frozen=True)
class SegmentationManifest(Manifest):
    """A Manifest of images with masks: splits, folds, parts and image loaders work on it as on any other.

    ``frame`` has three columns more: mask (str, relative to ``root``), lesion_pixels (int64, of the mask's own size)
    and content_id (str, tells the image's bytes from those of others).
    Every label is 0, of the one class lesion; ``images_digest`` covers the masks, too.

    Attributes:
        split_note: what was drawn in place of an official split, "" where nothing was.
    """

    split_note: str = ""

    def mask_path_of(self, index: int) -> Path:
        """Where the mask of image ``index`` lies."""
        return self.root / self.frame["mask"].iat[index]


def read_segmentation(csv_path: str | Path | None = None, *, dataset: str | None = None,
                      parent: str | Path | None = None, root_path: str | Path | None = None,
                      val_fraction: float = VAL_FRACTION, seed: int = 0, needed: Sequence[str] = ("train", "test"),
                      strict_split: bool = False,
                      report_folder: str | Path | None = None) -> SegmentationManifest:
    """Read a segmentation data set and decode all of its masks; every problem is found in one pass.

    Where no image is val, whole patients and lesions of train become it, a share that the log and ``split_note`` state.
    PH2, HAM10000 and Waterloo have no official test set either: a fifth is drawn first.

    Args:
        csv_path: a CSV image,mask,split; or
        dataset: the name of a public set (a key of ``segmentation_folders.LAYOUTS``), with
        parent: the folder that holds it.
        root_path: the folder that the CSV's files are relative to; None means the CSV's own.
        val_fraction: share of train to draw as val where there is none; 0 draws none.
        seed: of what is drawn; a set drawn from differs with the seed and with nothing else.
        needed: splits that must not be empty: train and test, or only test where a model is scored.
        strict_split: treat leakage between splits and repeated rows as errors instead of warnings.
        report_folder: where the full list goes when there are more than 20 problems.

    Raises:
        ManifestError: one or more errors; all are in the message or in the file it names.
        UserError: there is no such file or folder, or the folder has another data set's layout.
    """
    if (csv_path is None) == (dataset is None):
        raise UserError("pass either a CSV with the columns image, mask, split or --dataset with --parent_path")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val_fraction {val_fraction} is not in [0, 1)")
    problems: list[Problem] = []
    if dataset is None:
        source = Path(csv_path).expanduser()
        content, root, name = read_csv_bytes(source), image_folder(root_path, source), source.stem
        frame = parse_csv(content, source, problems)
    else:
        name = known_name(dataset)
        frame, root = read_folders(name, "." if parent is None else parent, needed=needed, problems=problems)
        source, content = root, frame.drop(columns=ROW).to_csv(index=False).encode()
        needed = ()  # a missing folder is told already
    digest, pixels, content_ids = _check(frame, root, needed, strict_split, problems)
    if dataset is not None:  # there are no rows that a user could look at
        problems = [_without_place(problem) for problem in problems]
    report(problems, csv_path=source, folder=report_folder)
    frame = _arrange(frame, pixels, content_ids)
    repeated = frame.duplicated(["image", "split"])
    if repeated.any():  # each image is scored once
        logger.warning("%d repeated rows are left out", repeated.sum())
        frame = frame[~repeated].reset_index(drop=True)
    manifest = SegmentationManifest(
        frame=frame, name=name, csv_path=source, root=root, sha256=hashlib.sha256(content).hexdigest(),
        images_digest=digest, class_names=("lesion",), label_column="mask",
        group_columns=tuple(column for column in GROUP_COLUMNS if column in frame))
    return _draw_splits(manifest, val_fraction=val_fraction, seed=seed)


def _without_place(problem: Problem) -> Problem:
    remedy = "unpack the archive of the masks again, or move the images without a mask away"
    return replace(problem, row=None, column="", remedy=remedy if problem.kind in ("missing mask", "no mask found")
                   else problem.remedy)


def _check(frame: pd.DataFrame, root: Path, needed: Sequence[str], strict: bool,
           problems: list[Problem]) -> tuple[str, np.ndarray, list[str]]:
    """Columns, splits, files, masks, repeats, leakage; returns the digest of all files, lesion pixels, content ids."""
    remedies = {"image": "add a column with the image files", "mask": "add a column with the mask file of each image",
                "split": "add a column with train, val or test"}
    problems += [missing_column(frame, column, remedies[column]) for column in remedies if column not in frame]
    if "split" in frame:
        _check_splits(frame, needed, problems)
    digest, pixels, content_ids = "", np.full(len(frame), -1), [""] * len(frame)
    if "image" in frame:
        digest, content_ids = check_files(frame, root, problems)
        if "mask" in frame:
            mask_digest, pixels = check_masks(frame, root, problems)
            digest = hashlib.sha256(f"{digest}\n{mask_digest}".encode()).hexdigest()
            if "split" in frame:
                problems += _repeats(frame, root, content_ids, strict)
    if "split" in frame:
        for column in GROUP_COLUMNS:
            if column in frame:
                check_group_leakage(frame, column, strict, problems)
    return digest, pixels, content_ids


def _check_splits(frame: pd.DataFrame, needed: Sequence[str], problems: list[Problem]) -> None:
    undivided = len(frame) > 0 and (frame["split"] == "").all()  # a folder without an official split
    if undivided:
        return
    check_split_names(frame, problems)
    for name in needed:
        if not (frame["split"] == name).any():
            problems.append(Problem("empty split", column="split", text=f"no image has the split {name}",
                                    remedy=f"mark some rows as {name}"))


def _repeats(frame: pd.DataFrame, root: Path, content_ids: list[str], strict: bool) -> list[Problem]:
    """As for classification, with the mask in the place of the label."""
    found: list[Problem] = []
    split = frame["split"].where(frame["split"] != "", "train")  # not yet drawn
    check_repeats(frame.assign(label=pd.factorize(frame["mask"])[0], split=split), root, content_ids, strict, found,
                  told="mask")
    return [replace(problem, kind=problem.kind.replace("labels", "masks"),
                    text=problem.text.replace("has labels", "has the masks", 1),
                    remedy=problem.remedy.replace("label", "mask")) for problem in found]


def _arrange(frame: pd.DataFrame, pixels: np.ndarray, content_ids: list[str]) -> pd.DataFrame:
    """The columns of a Manifest first; a class label of the CSV's is kept as own_label."""
    if "label" in frame:
        frame = frame.rename(columns={"label": "own_label"})
    frame = frame.assign(label=np.int64(0), lesion_pixels=pixels, content_id=[one[:16] for one in content_ids])
    first = ["image", "label", "split", ROW, "mask", "lesion_pixels"]
    return frame[first + [column for column in frame.columns if column not in first]]


def _draw_splits(manifest: SegmentationManifest, *, val_fraction: float, seed: int) -> SegmentationManifest:
    """Test of a set without any split, then val of a set without one."""
    split = manifest.frame["split"].to_numpy(dtype=object, copy=True)
    notes = []
    if (split == "").all():
        split[:] = "train"
        notes.append(_draw(manifest, split, "test", TEST_FRACTION, seed))
    if val_fraction and (split == "train").any() and not (split == "val").any():
        notes.append(_draw(manifest, split, "val", val_fraction, seed))
    if not notes:
        return manifest
    note = f"{manifest.name}: " + "; ".join(notes)
    logger.info("%s", note)
    return replace(manifest.with_splits(split), split_note=note)


def _draw(manifest: SegmentationManifest, split: np.ndarray, name: str, fraction: float, seed: int) -> str:
    """Move whole groups of train to ``name``; says what was done."""
    train = np.flatnonzero(split == "train")
    groups = group_numbers(manifest.frame.iloc[train], ("image", *manifest.group_columns))
    if len(np.unique(groups)) < 2:
        raise UserError(f"{manifest.csv_path} has one {'lesion or patient' if manifest.group_columns else 'image'} in "
                        f"train, of which no {name} can be drawn: mark some rows as {name}")
    number = len(np.unique(groups))
    if np.ceil(number * fraction) >= number:
        raise UserError(f"a share of {fraction:g} of the {number} "
                        f"{'lesions or patients' if manifest.group_columns else 'images'} in train for {name} leaves "
                        "none to train on: take a smaller --val_fraction")
    drawn = next(GroupShuffleSplit(1, test_size=fraction, random_state=seed).split(train, groups=groups))[1]
    split[train[drawn]] = name
    groups = " and ".join(column.removesuffix("_id") + "s" for column in manifest.group_columns)
    return (f"no official {name}, {len(drawn)} of {len(train)} train images drawn for it "
            f"({f'whole {groups}, ' if groups else ''}{fraction:.1%}, seed {seed})")
