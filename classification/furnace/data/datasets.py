"""Images of a manifest as tensors, in order, each exactly once over all processes."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from furnace.data.images import DECODE_ERRORS, load_rgb
from furnace.data.manifest import Manifest
from furnace.data.transforms import Transform
from furnace.runtime import distributed

# Images per loaded batch at most; --batch_size is an upper bound. A published batch of 1000 with 16 workers would hold
# 19 GB of pixels without being faster; on a CPU small batches stay in the cache (measured: 8 is twice as fast as 32 for
# EfficientNet-Lite0 and the same for a ViT).
LARGEST_BATCH = {"cuda": 128, "mps": 32, "cpu": 8}


@dataclass
class Batch:
    """What a loader yields.

    Attributes:
        images: (B, 3, H, W) float32, or None when no file of the batch could be decoded.
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
    """``dataset[i]`` is (tensor, i), or (reason, i) for a file that cannot be decoded, so that all can be listed."""

    def __init__(self, manifest: Manifest, transform: Transform) -> None:
        self.manifest = manifest
        self.transform = transform
        self.load = getattr(transform, "load", load_rgb)

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | str, int]:
        try:
            image = self.load(self.manifest.path_of(index))
        except DECODE_ERRORS as error:
            return str(error) or type(error).__name__, index
        return self.transform(image), index


class StridedSampler(Sampler[int]):
    """Of these positions the rank-th, the (rank + world_size)-th, ...: each in one process, none twice, no padding."""

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = positions[distributed.rank()::distributed.world_size()]

    def __iter__(self) -> Iterator[int]:
        return map(int, self.positions)

    def __len__(self) -> int:
        return len(self.positions)


def collate(items: list[tuple[torch.Tensor | str, int]]) -> Batch:
    """Stack the good images, list the broken ones."""
    good = [(image, index) for image, index in items if isinstance(image, torch.Tensor)]
    broken = [(index, reason) for reason, index in items if isinstance(reason, str)]
    images = torch.stack([image for image, _ in good]) if good else None  # B x (3, H, W) -> (B, 3, H, W)
    return Batch(images=images, indices=[index for _, index in good], broken=broken)


def build_loader(manifest: Manifest, transform: Transform, *, batch_size: int, num_workers: int | None = None,
                 device: torch.device | str = "cpu") -> DataLoader:
    """A loader over a manifest in its order; under torchrun each process gets its share.

    Args:
        manifest: the images.
        transform: from ``build_transform``, or any function from a PIL RGB image to a tensor.
        batch_size: upper bound of images per batch; the last batch is as small as it falls.
        num_workers: decoding processes; None picks by the machine (at most 8, and no more than there are CPUs).
        device: where the batches will go; pinned memory and larger batches for cuda.
    """
    kind = torch.device(device).type
    if num_workers is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = min(8, cpus)
    dataset = ImageDataset(manifest, transform)
    return DataLoader(dataset, batch_size=min(batch_size, LARGEST_BATCH.get(kind, 32)),
                      sampler=StridedSampler(range(len(dataset))), num_workers=min(num_workers, len(dataset)),
                      collate_fn=collate, pin_memory=kind == "cuda")


def subset_loader(loader: DataLoader, positions: Sequence[int]) -> DataLoader:
    """The same loader over some of its manifest's images, in the order of ``positions``."""
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=StridedSampler(positions),
                      num_workers=min(loader.num_workers, len(positions)), collate_fn=collate,
                      pin_memory=loader.pin_memory)
