"""Subsets of a split, for label-efficiency experiments, and folds for cross-validation."""

import logging
import warnings

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from furnace.data.manifest import Manifest
from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

PUBLISHED_SEED = 42


def take_percent(train: Manifest, fraction: float, *, mode: str = "published", seed: int = 0) -> Manifest:
    """A part of the train split, shuffled.

    Args:
        train: the full train split.
        fraction: in (0, 1].
        mode: ``published`` takes the first int(n * fraction) rows of one shuffle, as the published linear evaluation
            does: the classes come as they fall, and a small part can lose one. ``stratified`` keeps every class's
            share, at least one image each.
        seed: seed 0 is the published shuffle (42); others are further draws.

    Raises:
        UserError: the fraction leaves no image.
    """
    _check_fraction(fraction)
    shuffled = _shuffled(train, seed)
    if mode == "published":
        part = shuffled.take(range(int(len(train) * fraction)))
    elif mode == "stratified":
        labels = shuffled.labels
        keep = [np.flatnonzero(labels == k)[: max(1, round(int((labels == k).sum()) * fraction))]
                for k in np.unique(labels)]
        part = shuffled.take(np.sort(np.concatenate(keep)))
    else:
        raise ValueError(f"mode {mode!r} is neither published nor stratified")
    _check_part(part, train, fraction, "their probability is 0 (--percent_mode stratified keeps every class)")
    return part


def take_percent_finetuning(manifest: Manifest, fraction: float, seed: int = 0) -> Manifest:
    """A part of the train split, as the published fine-tuning draws it.

    All rows of the data set are shuffled, then the first int(n * fraction) of the n train rows are taken: other images
    than ``take_percent`` takes. At fraction 1 it is the train split in that order.

    Args:
        manifest: the whole data set.
        fraction: in (0, 1].
        seed: seed 0 is the published shuffle (42); others are further draws.

    Raises:
        UserError: the fraction leaves no image.
    """
    _check_fraction(fraction)
    train = _shuffled(manifest, seed).split("train")
    part = train.take(range(int(len(train) * fraction)))
    _check_part(part, train, fraction, "the model does not learn them (take a larger fraction, or another seed)")
    return part


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} is not in (0, 1]")


def _shuffled(manifest: Manifest, seed: int) -> Manifest:
    return manifest.take(manifest.frame.sample(frac=1, random_state=PUBLISHED_SEED + seed).index)


def _check_part(part: Manifest, train: Manifest, fraction: float, consequence: str) -> None:
    """Refuse an empty part, warn of the classes that it lost."""
    if not len(part):
        raise UserError(f"--percent_data {fraction} of {len(train)} train images is no image: take a larger fraction")
    lost = _lost(part, train)
    if lost:
        logger.warning("--percent_data %s leaves no train image of class %s: %s", fraction, ", ".join(lost),
                       consequence)


def _lost(part: Manifest, whole: Manifest) -> list[str]:
    """The names of the classes that the whole has and the part has not."""
    lost = _present(whole) & ~_present(part)
    return [name for name, one in zip(whole.class_names, lost, strict=True) if one]


def _present(manifest: Manifest) -> np.ndarray:
    """(K,) whether a class occurs."""
    if manifest.multilabel:
        return manifest.targets.any(axis=0)
    return np.isin(np.arange(manifest.nb_classes), manifest.labels)


def make_folds(manifest: Manifest, folds: int, seed: int) -> list[Manifest]:
    """Cross-validation: train and val are pooled and cut into parts, each of which is val once; test is left alone.

    Images of one patient, one lesion or one file stay together, an empty id being of its own. The parts have about
    the same share of every class; an image with several labels counts as of the rarest of them.

    Args:
        manifest: the whole data set.
        folds: how many parts.
        seed: of the cut.

    Returns:
        A Manifest of the whole data set per fold, which differ in the column ``split`` only.

    Raises:
        UserError: there are fewer patients (lesions, images) than folds.
    """
    if folds < 2:
        raise ValueError(f"{folds} folds: need 2 or more")
    pooled = np.flatnonzero(manifest.frame["split"].isin(("train", "val")).to_numpy())
    images = manifest.take(pooled)
    parts = _cut(images, folds, seed)
    made, absent = [], []
    for i, part in enumerate(parts):
        split = manifest.frame["split"].to_numpy(dtype=object, copy=True)
        split[pooled], split[pooled[part]] = "train", "val"
        made.append(manifest.with_splits(split))
        for name in ("train", "val"):
            lost = _lost(made[i].split(name), images)
            if lost:
                absent.append(f"fold {i}: no {name} image of class {', '.join(lost)}")
    if absent:
        logger.warning("%d folds are many for some classes: %s", folds, "; ".join(absent))
    return made


def _cut(images: Manifest, folds: int, seed: int) -> list[np.ndarray]:
    """The places of the images of each part."""
    groups = group_numbers(images.frame, ("image", *images.group_columns))
    number = len(np.unique(groups))
    grouped = number < len(images)
    what = f"{' or '.join(images.group_columns)} groups" if grouped and images.group_columns else "images"
    if number < folds:
        raise UserError(f"{folds} folds need as many {what} in train and val, which have {number}: take fewer folds")
    strata = _strata(images)
    if np.bincount(strata).max() < folds:  # scikit-learn refuses: there is nothing to balance
        strata = np.zeros_like(strata)
    splitter = (StratifiedGroupKFold if grouped else StratifiedKFold)(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # make_folds tells of the classes that a fold lacks
        warnings.filterwarnings("ignore", message="The least populated class")
        parts = [part for _, part in splitter.split(strata, strata, groups if grouped else None)]
    if not all(map(len, parts)):
        raise UserError(f"{folds} folds: the {number} {what} of train and val cannot be cut into so many parts, take "
                        "fewer folds")
    return parts


def group_numbers(frame: pd.DataFrame, columns: tuple[str, ...]) -> np.ndarray:
    """(N,) numbers; rows that share an id in any of the columns, directly or over others, have the same."""
    rows, ids, known = [], [], 0
    for column in columns:
        codes = pd.factorize(frame[column])[0]  # -1 where empty
        rows.append(np.flatnonzero(codes >= 0))
        ids.append(codes[codes >= 0] + known)
        known += codes.max(initial=-1) + 1
    rows, ids = np.concatenate(rows), np.concatenate(ids) + len(frame)
    size = len(frame) + known  # a node per row, then one per id
    graph = coo_array((np.ones(len(rows)), (rows, ids)), shape=(size, size))
    return connected_components(graph, directed=False)[1][:len(frame)]


def _strata(manifest: Manifest) -> np.ndarray:
    """(N,) the class of each image; of several the rarest, and K for none."""
    if not manifest.multilabel:
        return manifest.labels
    targets = manifest.targets
    counts = targets.sum(axis=0)
    rarest = np.where(targets > 0, counts, np.inf).argmin(axis=1)
    return np.where(targets.any(axis=1), rarest, manifest.nb_classes)
