"""Images of a manifest as tensors: in order, each exactly once over all processes, or as a sampler draws them."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from furnace.data.images import DECODE_ERRORS, load_rgb
from furnace.data.manifest import ROW, Manifest
from furnace.data.samplers import Draw, TrainSampler
from furnace.data.transforms import Transform
from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import ProcessError, UserError
from furnace.runtime.progress import progress
from furnace.runtime.seeding import seed_of, seeded

# Images per loaded batch at most; --batch_size is an upper bound. A published batch of 1000 with 16 workers would hold
# 19 GB of pixels without being faster; on a CPU small batches stay in the cache (measured: 8 is twice as fast as 32 for
# EfficientNet-Lite0 and the same for a ViT).
LARGEST_BATCH = {"cuda": 128, "mps": 32, "cpu": 8}


@dataclass
class Batch:
    """What a loader yields.

    Attributes:
        images: (B, 3, H, W) float32, or (B, V, 3, H, W) of a transform with V views, or None when no file of the batch
            could be decoded.
        indices: (B,) positions in the manifest.
        broken: (position, reason) of the files that could not be decoded.
    """

    images: torch.Tensor | None
    indices: list[int]
    broken: list[tuple[int, str]]

    def pin_memory(self) -> "Batch":
        """Called by the loader before a copy to a GPU."""
        if self.images is not None:
            self.images = self.images.pin_memory()
        return self


class ImageDataset(Dataset):
    """``dataset[i]`` is (tensor, i), or (reason, i) for a file that cannot be decoded, so that all can be listed.

    With a seed, a transform's random numbers depend on (seed, epoch, position) of a ``Draw``, or on (seed, 0, i) of an
    index, and on nothing else: not on the workers, the batches or what was drawn before. The process's own generators
    stay where they are.
    """

    def __init__(self, manifest: Manifest, transform: Transform, seed: int | None = None) -> None:
        self.manifest = manifest
        self.transform = transform
        self.seed = seed
        self.load = getattr(transform, "load", load_rgb)

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, key: int | Draw) -> tuple[torch.Tensor | str, int]:
        draw = key if isinstance(key, Draw) else Draw(index=key, epoch=0, position=key)
        image, reason = decode(self.load, self.manifest.path_of(draw.index))
        if reason is not None:
            return reason, draw.index
        if self.seed is None:
            return self.transform(image), draw.index
        with seeded(self.seed, draw.epoch, draw.position):
            return self.transform(image), draw.index


class StridedSampler(Sampler[int]):
    """Of these positions the rank-th, the (rank + world_size)-th, ...: each in one process, none twice, no padding."""

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = positions[distributed.rank()::distributed.world_size()]

    def __iter__(self) -> Iterator[int]:
        return map(int, self.positions)

    def __len__(self) -> int:
        return len(self.positions)


LINGER = 20  # seconds that a loader worker goes on after SIGTERM


def outlive_signals(worker: int) -> None:
    """For a loader worker: the main process must be able to finish an update and save when a job is told to end.

    SIGTERM and Ctrl-C often go to every process of a job. A worker goes on for LINGER seconds after the first SIGTERM,
    which may also be the main process's own while it exits, and ends at the second.
    """
    def end_later(number: int, frame: FrameType | None) -> None:
        if signal.alarm(LINGER):
            os._exit(128 + number)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, end_later)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(items: list[tuple[torch.Tensor | str, int]]) -> Batch:
    """Stack the good images, list the broken ones."""
    good = [(image, index) for image, index in items if isinstance(image, torch.Tensor)]
    broken = [(index, reason) for reason, index in items if isinstance(reason, str)]
    images = torch.stack([image for image, _ in good]) if good else None  # B x (3, H, W) -> (B, 3, H, W)
    return Batch(images=images, indices=[index for _, index in good], broken=broken)


def build_loader(manifest: Manifest, transform: Transform, *, batch_size: int, num_workers: int | None = None,
                 device: torch.device | str = "cpu", seed: int | None = None) -> DataLoader:
    """A loader over a manifest in its order; under torchrun each process gets its share.

    Args:
        manifest: the images.
        transform: from ``build_transform``, or any function from a PIL RGB image to a tensor.
        batch_size: upper bound of images per batch; the last batch is as small as it falls.
        num_workers: decoding processes; None picks by the machine (at most 8, and no more than there are CPUs).
        device: where the batches will go; pinned memory and larger batches for cuda.
        seed: of a random transform, whose numbers then depend on the image's place alone.
    """
    return loader_in_order(ImageDataset(manifest, transform, seed), batch_size=batch_size, num_workers=num_workers,
                           device=device)


def loader_in_order(dataset: Dataset, *, batch_size: int, num_workers: int | None = None,
                    device: torch.device | str = "cpu", collate_fn: Callable[[list], Any] = collate) -> DataLoader:
    """The loader of any dataset in its order; the options are those of ``build_loader``."""
    kind = torch.device(device).type
    return DataLoader(dataset, batch_size=min(batch_size, LARGEST_BATCH.get(kind, 32)),
                      sampler=StridedSampler(range(len(dataset))), num_workers=_workers(num_workers, len(dataset)),
                      collate_fn=collate_fn, worker_init_fn=outlive_signals, pin_memory=kind == "cuda")


def build_train_loader(manifest: Manifest, transform: Transform, sampler: TrainSampler, *, plan: BatchPlan, seed: int,
                       num_workers: int | None = None, device: torch.device | str = "cpu",
                       pin_memory: bool = True) -> DataLoader:
    """A loader of this process's micro-batches, from where ``loader.sampler.set_position`` says.

    Args:
        manifest: the training images.
        transform: from ``build_train_transform``.
        sampler: draws whole updates, so that every batch has ``plan.micro`` images (fewer where a file is broken).
        plan: the sampler's.
        seed: of the augmentation.
        num_workers: decoding processes, which live on between epochs; None picks.
        device: where the batches will go.
        pin_memory: for a cuda device.
    """
    return loader_of_draws(ImageDataset(manifest, transform, seed), sampler, plan=plan, seed=seed,
                           num_workers=num_workers, device=device, pin_memory=pin_memory)


def loader_of_draws(dataset: Dataset, sampler: TrainSampler, *, plan: BatchPlan, seed: int,
                    collate_fn: Callable[[list], Batch] = collate, num_workers: int | None = None,
                    device: torch.device | str = "cpu", pin_memory: bool = True) -> DataLoader:
    """The training loader of any dataset that takes a ``Draw``; the options are those of ``build_train_loader``."""
    num_workers = _workers(num_workers, len(dataset))
    own = torch.Generator().manual_seed(seed_of(seed, "loader"))  # else an epoch's start would draw from the global one
    return DataLoader(dataset, batch_size=plan.micro, sampler=sampler, num_workers=num_workers, collate_fn=collate_fn,
                      worker_init_fn=outlive_signals, persistent_workers=num_workers > 0, generator=own,
                      pin_memory=pin_memory and torch.device(device).type == "cuda")


def subset_loader(loader: DataLoader, positions: Sequence[int]) -> DataLoader:
    """The same loader over some of its manifest's images, in the order of ``positions``."""
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=StridedSampler(positions),
                      num_workers=min(loader.num_workers, len(positions)), collate_fn=collate,
                      worker_init_fn=outlive_signals,
                      pin_memory=loader.pin_memory)


def _workers(asked: int | None, images: int) -> int:
    """None: one per CPU that this process may use, at most 8; never more than images."""
    if asked is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        asked = min(8, cpus)
    return min(asked, images)


# ----------------------------------------------------------------------------------------------------- broken files

def refuse_broken(manifest: Manifest, broken: list[tuple[int, str]] | None = None) -> NoReturn:
    """End a run in which a file could not be decoded; the message lists all such files.

    Args:
        manifest: the images.
        broken: (position, reason) of every one; None decodes all images to find them, as training needs, which has not
            seen them all when it meets the first.

    Raises:
        ProcessError: always.
    """
    if broken is None:
        found = broken_files(manifest)
    else:
        found = [(int(manifest.frame[ROW].iat[i]), manifest.path_of(i), reason) for i, reason in sorted(broken)]
    if not found:
        raise ProcessError("an image could not be decoded a moment ago, and now every one can: the storage is not "
                           "reliable. Start the same command again; a training run goes on where it was.")
    raise ProcessError(_told(found))


def _told(found: list[tuple[int, Path, str]]) -> str:
    lines = [f"  row {row}, {path}: {reason}" for row, path, reason in found]
    return (f"{len(found)} image{'s' if len(found) > 1 else ''} cannot be decoded:\n" + "\n".join(lines) +
            "\n  Copy or download them again, or delete their rows (an unfinished training goes on with the same list "
            "and files only).")


def require_decodable(manifest: Manifest) -> None:
    """Decode every image once, before work that would meet a damaged file hours later.

    Raises:
        UserError: files that cannot be decoded, all of them.
    """
    if found := broken_files(manifest):
        raise UserError(_told(found))


def broken_files(manifest: Manifest) -> list[tuple[int, Path, str]]:
    """Decode every image, with threads; returns (row of the CSV, path, reason) of those that cannot be decoded."""
    paths = [manifest.path_of(i) for i in range(len(manifest))]
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        reasons = list(progress(pool.map(_reason, paths), total=len(paths), unit="image", desc="decoding",
                                disable=not distributed.is_main()))
    return [(int(row), path, reason) for row, path, reason in zip(manifest.frame[ROW], paths, reasons, strict=True)
            if reason is not None]


def _reason(path: Path) -> str | None:
    return decode(load_rgb, path)[1]


def decode(load: Callable[[Path], Any], path: Path) -> tuple[Any, str | None]:
    """The image and None, or None and why it cannot be decoded."""
    try:
        return load(path), None
    except DECODE_ERRORS as error:
        return None, str(error) or type(error).__name__
