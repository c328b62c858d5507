"""Images for pretraining, some of them with labels of an ontology, and the loader of their crops.

The CSV has a column ``image`` (or filename, image_path) and, where they are there, ``labels`` (ids, names or synonyms
of the ontology between semicolons; empty: unlabelled), ``source`` (the data set, by which the ontology tells which
classes were annotated) and ``split`` (only train and empty cells are trained on).
"""

import hashlib
import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from furnace.data.block_masks import block_masks
from furnace.data.class_names import some
from furnace.data.csv_table import missing_column
from furnace.data.datasets import decode, loader_of_draws
from furnace.data.image_labels import ImageLabels, encode_labels
from furnace.data.images import check_files
from furnace.data.manifest import GROUP_COLUMNS, SPLITS, Manifest, check_split_names
from furnace.data.multicrop import Crops, MultiCrop, MultiCropBatch, build_multicrop
from furnace.data.multilabel import LABELS
from furnace.data.ontology import Ontology, read_ontology
from furnace.data.problems import ROW, Problem, report
from furnace.data.samplers import Draw, TrainSampler
from furnace.data.unlabelled import LABEL_TEXT, open_image_csv, read_images
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import UserError
from furnace.runtime.seeding import seed_of

logger = logging.getLogger(__name__)

SOURCE = "source"


@dataclass(frozen=True)
class PretrainingData:
    """What pretraining learns from.

    Attributes:
        manifest: the images that are trained on; all have the split train.
        labels: of the same rows; None without an ontology.
        ontology: the classes; None for pure self-supervision.
    """

    manifest: Manifest
    labels: ImageLabels | None
    ontology: Ontology | None


# ---------------------------------------------------------------------------------------------------------- reading

def read_pretraining(source: str | Path, root_path: str | Path | None = None, *, ontology: str | Path | None = None,
                     label_ancestors: bool = True, strict_labels: bool = True,
                     report_folder: str | Path | None = None) -> PretrainingData:
    """Read the images of a folder or a CSV, and the labels where there is an ontology; all problems in one list.

    Rows of val and test are left out, and their files and labels are not looked at.

    Args:
        source: a folder, read with its subfolders; or a CSV, as the module says.
        root_path: the folder that the CSV's images are relative to; None for the CSV's own.
        ontology: CSV of the classes; None for pure self-supervision.
        label_ancestors: whether a label implies its ancestors.
        strict_labels: whether labels that cannot count are errors, as for ``encode_labels``.
        report_folder: where the full list goes when there are more than 20 problems.

    Raises:
        ManifestError: one or more errors in the CSV or the ontology.
        UserError: there is no such file or folder, or no image to train on; or the two inputs do not belong together.
    """
    source = Path(source).expanduser()
    classes = None if ontology is None else read_ontology(ontology, report_folder=report_folder)
    if source.suffix.lower() != ".csv" or source.is_dir():
        if classes is not None:
            raise UserError(f"--ontology is for labels, and {source} is no CSV: leave it out, or give a CSV with the "
                            f"columns image, {LABELS} and {SOURCE}")
        manifest = read_images(source, root_path, report_folder=report_folder)
        manifest, labels = manifest.with_splits(["train"] * len(manifest)), None
    else:
        manifest, labels = _read_csv(source, root_path, classes, label_ancestors, strict_labels, report_folder)
    _tell(manifest, labels)
    return PretrainingData(manifest=manifest, labels=labels, ontology=classes)


def _read_csv(csv_path: Path, root_path: str | Path | None, ontology: Ontology | None, label_ancestors: bool,
              strict: bool, report_folder: str | Path | None) -> tuple[Manifest, ImageLabels | None]:
    content, root, frame, problems = open_image_csv(csv_path, root_path, report_folder)
    kept = _trained_on(frame, csv_path, problems)
    digest, _ = check_files(frame[kept], root, problems)
    first_names = _tell_repeats(frame, kept, root, problems)
    frame = frame[kept].reset_index(drop=True)
    labels = _encode(frame, first_names, ontology, label_ancestors, strict, problems)
    report(problems, csv_path=csv_path, folder=report_folder)
    if "label" in frame:
        frame[LABEL_TEXT] = frame["label"]
    frame = frame.assign(label=np.int64(-1), split="train")
    first = ["image", "label", "split", ROW]
    return Manifest(frame=frame[first + [name for name in frame.columns if name not in first]], name=csv_path.stem,
                    csv_path=csv_path, root=root, sha256=hashlib.sha256(content).hexdigest(), images_digest=digest,
                    class_names=(), label_column="label",
                    group_columns=tuple(name for name in GROUP_COLUMNS if name in frame)), labels


def _trained_on(frame: pd.DataFrame, csv_path: Path, problems: list[Problem]) -> np.ndarray:
    """(N,) bool: the rows of train or of no split."""
    if "split" not in frame:
        return np.ones(len(frame), dtype=bool)
    check_split_names(frame[frame["split"].notna()], problems)
    kept = (frame["split"].isna() | (frame["split"] == "train")).to_numpy()
    left = frame["split"].isin(SPLITS).to_numpy() & ~kept
    if left.any():
        logger.info("%s: %d rows of val and test are left out", csv_path, left.sum())
    if left.any() and left.all():
        problems.append(Problem("empty split", column="split", text="no image has the split train",
                                remedy="mark the images to train on as train, or leave their cells empty"))
    return kept


def _tell_repeats(frame: pd.DataFrame, kept: np.ndarray, root: Path, problems: list[Problem]) -> list[str | None]:
    """Warn of one file in several rows; returns for each row that is kept the first name of its file.

    A file may stand under two sources: ``encode_labels`` compares the labels.
    """
    named = frame.loc[frame["image"].notna(), "image"]
    identity = named.map(lambda name: os.path.realpath(root / name.replace("\0", "")))
    first = named.groupby(identity, sort=False).transform("first")
    cells = frame.reindex(columns=[SOURCE, LABELS])
    for file, rows in frame.loc[named.index[identity.duplicated(keep=False)]].groupby(first, sort=False):
        trained = rows[kept[rows.index]]
        again = trained[cells.loc[trained.index].duplicated()]
        if 0 < len(trained) < len(rows):
            others = rows.loc[~rows.index.isin(trained.index), "split"]
            problems.append(Problem("image in two splits", row=int(trained[ROW].iat[0]), column="split", file=file,
                                    warning=True, text=f"is in train and in {some(others.unique())} (rows "
                                    f"{', '.join(map(str, rows[ROW]))})",
                                    remedy="take it out of train: a test result is too good otherwise"))
        if len(again):
            problems.append(Problem("repeated row", row=int(again[ROW].iat[0]), column="image", file=file, warning=True,
                                    text=f"stands in rows {', '.join(map(str, trained[ROW]))}",
                                    remedy="keep one: it is seen more often than the others"))
    return first.reindex(frame.index)[kept].tolist()


def _encode(frame: pd.DataFrame, images: list[str | None], ontology: Ontology | None, label_ancestors: bool,
            strict: bool, problems: list[Problem]) -> ImageLabels | None:
    """The labels of these rows; None without an ontology or a column of labels."""
    if ontology is not None and LABELS not in frame:
        also = " (label holds one class number, and is not read)" if "label" in frame else ""
        problems.append(missing_column(frame, LABELS, "add a column with each image's classes between semicolons, or "
                                       f"leave --ontology out{also}"))
    if LABELS not in frame:
        return None
    filled = frame[LABELS].notna()
    if ontology is None:
        if filled.any():
            problems.append(Problem("labels without an ontology", row=int(frame.loc[filled, ROW].iat[0]), column=LABELS,
                                    text=f"{filled.sum():,} rows have labels, and nothing says what they mean",
                                    remedy="pass --ontology FILE.csv, or take the column out"))
        return None
    if SOURCE not in frame and filled.any():
        problems.append(missing_column(frame, SOURCE, "add a column with the data set of each labelled image: the "
                                       "ontology says which classes it annotates"))
    found: list[Problem] = []
    sources = frame[SOURCE] if SOURCE in frame else [None] * len(frame)
    labels = encode_labels(ontology, frame[LABELS], sources, label_ancestors=label_ancestors, problems=found,
                           images=images, lines=frame[ROW], strict=strict)
    problems += [problem for problem in found if SOURCE in frame or problem.kind != "labels without a source"]
    if len(frame) and not labels.labelled.any():
        problems.append(Problem("no labelled image", column=LABELS, warning=True, text="no label counts for the loss",
                                remedy="fill labels and source, or leave --ontology out"))
    return labels


def _tell(manifest: Manifest, labels: ImageLabels | None) -> None:
    """One line of numbers in the log."""
    words = [f"{len(manifest):,} images to train on"]
    if labels is not None:
        present = np.zeros(len(labels.ontology), dtype=bool)
        present[np.unique(labels.classes)] = True
        if labels.label_ancestors:
            present |= labels.ontology.ancestors[present].any(axis=0)
        words.append(f"{labels.labelled.sum():,} with labels, of {present.sum()} of {len(present)} classes")
    if SOURCE in manifest.frame:
        counts = manifest.frame[SOURCE].fillna("none").value_counts()
        words.append("sources: " + ", ".join(f"{name} {count:,}" for name, count in counts[:12].items())
                     + (f" and {len(counts) - 12} more" if len(counts) > 12 else ""))
    logger.info("%s: %s", manifest.csv_path, "; ".join(words))


# ---------------------------------------------------------------------------------------------------------- loading

class Item(NamedTuple):
    """The crops of a draw's image, or why its file cannot be decoded."""

    draw: Draw
    crops: tuple[torch.Tensor, torch.Tensor] | None
    reason: str | None


class CropsDataset(Dataset):
    """``dataset[draw]`` is an Item; its random numbers depend on (seed, epoch, position) and on nothing else."""

    def __init__(self, manifest: Manifest, transform: MultiCrop, seed: int) -> None:
        self.manifest, self.transform, self.seed = manifest, transform, seed

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, draw: Draw) -> Item:
        image, reason = decode(self.transform.load, self.manifest.path_of(draw.index))
        if reason is not None:
            return Item(draw, None, reason)
        rng = random.Random(seed_of(self.seed, draw.epoch, draw.position))
        return Item(draw, self.transform(image, rng), None)


@dataclass(frozen=True)
class CropsCollate:
    """Items to a batch: view after view, with masks and labels.

    Attributes:
        labels: of all images, or None.
        grid: (h, w) patches of a global crop.
        share: see ``block_masks``.
        ratio: likewise.
        seed: of the masks, with the epoch and position of the batch's first draw.
    """

    labels: ImageLabels | None
    grid: tuple[int, int]
    share: float
    ratio: tuple[float, float]
    seed: int

    def __call__(self, items: list[Item]) -> MultiCropBatch:
        good = [item for item in items if item.crops is not None]
        broken = [(item.draw.index, item.reason) for item in items if item.crops is None]
        if not good:
            return MultiCropBatch(None, None, None, None, None, indices=[], broken=broken)
        indices = [item.draw.index for item in good]
        larges, smalls = zip(*(item.crops for item in good), strict=True)
        rng = np.random.default_rng(seed_of(self.seed, "masks", items[0].draw.epoch, items[0].draw.position))
        masks = block_masks(2 * len(good), self.grid, share=self.share, ratio=self.ratio, rng=rng)  # (2B, N)
        labels = self.labels
        return MultiCropBatch(
            globals=torch.stack(larges, dim=1),  # B x (2, 3, G, G) -> (2, B, 3, G, G)
            locals=torch.stack(smalls, dim=1) if len(smalls[0]) else None,  # B x (L, 3, l, l) -> (L, B, 3, l, l)
            masks=torch.from_numpy(masks).unflatten(0, (2, len(good))),
            targets=None if labels is None else torch.from_numpy(labels.rows(indices)),
            known=None if labels is None else torch.from_numpy(labels.known(indices)), indices=indices, broken=broken)


def build_pretraining_loader(data: PretrainingData, crops: Crops, sampler: TrainSampler, *, plan: BatchPlan, seed: int,
                             patch_size: int, mean: Sequence[float], std: Sequence[float], mask_share: float = 0.5,
                             mask_ratio: tuple[float, float] = (0.1, 0.5), num_workers: int | None = None,
                             device: torch.device | str = "cpu", pin_memory: bool = True) -> DataLoader:
    """The loader of this process's micro-batches of crops, from where ``loader.sampler.set_position`` says.

    Args:
        data: the images and labels.
        crops: the crops of an image.
        sampler: draws whole updates, so that every batch has ``plan.micro`` images (fewer where a file is broken).
        plan: the sampler's.
        seed: of crops and masks.
        patch_size: pixels of a patch's side.
        mean: of the backbone's data config.
        std: likewise.
        mask_share: of the global crops of a batch that are masked.
        mask_ratio: smallest and largest share of the patches that a masked crop hides.
        num_workers: decoding processes, which live on between epochs; None picks. They make no difference to the crops.
        device: where the batches will go.
        pin_memory: for a cuda device.

    Raises:
        UserError: crops that are no whole number of patches, or that cannot be cut.
    """
    for name, size in (("global", crops.global_size), ("local", crops.local_size)):
        if size % patch_size and (name == "global" or crops.local_crops):
            lower = size - size % patch_size
            either = f"{lower} or {lower + patch_size}" if lower else patch_size
            raise UserError(f"--{name}_crops_size {size} is no multiple of the patch size {patch_size}: take {either}")
    side = crops.global_size // patch_size
    collate = CropsCollate(labels=data.labels, grid=(side, side), share=mask_share, ratio=mask_ratio, seed=seed)
    dataset = CropsDataset(data.manifest, build_multicrop(crops, mean=mean, std=std), seed)
    return loader_of_draws(dataset, sampler, plan=plan, seed=seed, collate_fn=collate, num_workers=num_workers,
                           device=device, pin_memory=pin_memory)
