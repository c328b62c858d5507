"""Which images a training epoch draws, in which order, and which of them are this process's."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.seeding import seed_of

MULTINOMIAL_LIMIT = 2**24  # torch.multinomial takes no more categories


class Draw(NamedTuple):
    """An image to load in training.

    Attributes:
        index: its place in the manifest.
        epoch: from 0.
        position: of the draw in the epoch, over all processes; with the epoch it seeds the augmentation.
    """

    index: int
    epoch: int
    position: int


class TrainSampler(Sampler[Draw]):
    """This process's draws of an epoch, from an update on.

    An epoch is a random order of all images or, with weights, as many draws with replacement, cut to whole updates.
    It depends on seed and epoch alone: processes deal it out like cards, so that together they draw each position
    once, an update has the same images whatever the number of processes, and a resumed run goes on as it would have.

    An endless sampler goes through one random order of all images after another, and an epoch is the next
    ``plan.draws_per_epoch`` of these draws, be they a part of a pass or several passes.
    """

    def __init__(self, images: int, *, plan: BatchPlan, seed: int, weights: torch.Tensor | None = None,
                 endless: bool = False) -> None:
        """Start at the first update of epoch 0.

        Args:
            images: N, of the training set.
            plan: sizes of an update and an epoch.
            seed: of the orders.
            weights: (N,) chances of the images, up to a factor; None draws each image once.
            endless: let an epoch have fewer or more draws than there are images; without weights.
        """
        if endless and (weights is not None or images < 1):
            raise ValueError(f"an endless sampler of {images} images{' with weights' if weights is not None else ''}")
        if plan.draws_per_epoch > images and not endless:
            raise ValueError(f"an epoch of {plan.draws_per_epoch} draws is more than {images} images")
        if weights is not None and len(weights) != images:
            raise ValueError(f"{len(weights)} weights for {images} images")
        self.images, self.plan, self.seed, self.weights, self.endless = images, plan, seed, weights, endless
        self.epoch, self.update = 0, 0

    def set_position(self, epoch: int, update: int) -> None:
        """The next iteration begins with ``update`` (from 0, within the epoch) of ``epoch``."""
        self.epoch, self.update = epoch, update

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """(draws_per_epoch,) int64 places in the manifest, of all processes."""
        if self.endless:
            first = epoch * self.plan.draws_per_epoch  # counted from the start of training
            return self._endless_draws(first, first + self.plan.draws_per_epoch)
        seed = seed_of(self.seed, epoch)
        generator = torch.Generator().manual_seed(seed)
        if self.weights is None:
            drawn = torch.randperm(self.images, generator=generator).numpy()
        elif self.images <= MULTINOMIAL_LIMIT:
            drawn = torch.multinomial(self.weights, self.images, replacement=True, generator=generator).numpy()
        else:
            chances = self.weights.double().numpy()
            drawn = np.random.default_rng(seed).choice(self.images, self.images, p=chances / chances.sum())
        return drawn[:self.plan.draws_per_epoch]

    def _endless_draws(self, first: int, end: int) -> np.ndarray:
        """(end - first,) int64 places of the draws from ``first`` on, cut from the orders of whole passes."""
        passes = range(first // self.images, -(-end // self.images))
        orders = [torch.randperm(self.images, generator=torch.Generator().manual_seed(seed_of(self.seed, "pass", p)))
                  for p in passes]
        skipped = passes.start * self.images
        return torch.cat(orders).numpy()[first - skipped:end - skipped]

    def __iter__(self) -> Iterator[Draw]:
        indices, epoch = self.epoch_indices(self.epoch), self.epoch
        return (Draw(int(indices[position]), epoch, position) for position in self._positions())

    def __len__(self) -> int:
        """This process's draws that are left from the position on."""
        return len(self._positions())

    def _positions(self) -> range:
        first = self.update * self.plan.per_update + distributed.rank()
        return range(first, self.plan.draws_per_epoch, self.plan.world_size)


def class_balanced_weights(labels: Sequence[int] | np.ndarray) -> torch.Tensor:
    """Weights with which every class that occurs is drawn equally often, as published.

    Args:
        labels: (N,) classes of the images that are trained on.

    Returns:
        (N,) float32: N / (C x images of the image's class), C the number of classes that occur.
    """
    _, inverse, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return torch.from_numpy((len(inverse) / (len(counts) * counts[inverse])).astype(np.float32))
