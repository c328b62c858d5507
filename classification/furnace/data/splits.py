"""Subsets of a split, for label-efficiency experiments."""

import logging

import numpy as np

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
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} is not in (0, 1]")
    shuffled = train.take(train.frame.sample(frac=1, random_state=PUBLISHED_SEED + seed).index)
    if mode == "published":
        part = shuffled.take(range(int(len(train) * fraction)))
    elif mode == "stratified":
        labels = shuffled.labels
        keep = [np.flatnonzero(labels == k)[: max(1, round(int((labels == k).sum()) * fraction))]
                for k in np.unique(labels)]
        part = shuffled.take(np.sort(np.concatenate(keep)))
    else:
        raise ValueError(f"mode {mode!r} is neither published nor stratified")
    if not len(part):
        raise UserError(f"--percent_data {fraction} of {len(train)} train images is no image: take a larger fraction")
    lost = sorted(set(train.labels.tolist()) - set(part.labels.tolist()))
    if lost:
        logger.warning("--percent_data %s leaves no train image of class %s: their probability is 0 "
                       "(--percent_mode stratified keeps every class)", fraction, ", ".join(map(str, lost)))
    return part
