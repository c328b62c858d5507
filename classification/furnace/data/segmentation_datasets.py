"""Images with their masks as tensors, as a sampler draws them; and photographs in order, for a model's masks.

In an evaluation the model sees images only, and its map is scored against the mask at the mask's own size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from furnace.data.datasets import Batch, decode, loader_in_order, loader_of_draws, refuse_broken
from furnace.data.images import load_rgb
from furnace.data.joint_transforms import JointTransform
from furnace.data.manifest import Manifest
from furnace.data.masks import load_mask
from furnace.data.samplers import Draw, TrainSampler
from furnace.data.segmentation import SegmentationManifest
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.seeding import seeded

Item = tuple[torch.Tensor | str, torch.Tensor | None, int]


@dataclass
class SegmentationBatch(Batch):
    """A Batch with masks: (B, h, w) int64 of 0, 1 and 255 (no truth there), or None as ``images`` is."""

    masks: torch.Tensor | None

    def pin_memory(self) -> "SegmentationBatch":
        """Called by the loader before a copy to a GPU."""
        super().pin_memory()
        if self.masks is not None:
            self.masks = self.masks.pin_memory()
        return self


class SegmentationDataset(Dataset):
    """``dataset[i]`` is (image, mask, i), or (reason, None, i) where a file cannot be decoded.

    Keys and seeds are those of ``ImageDataset``: the random numbers of a transform depend on (seed, epoch, position) of
    a ``Draw``, or on (seed, 0, i) of an index, and on nothing else.
    """

    def __init__(self, manifest: SegmentationManifest, transform: JointTransform, seed: int | None = None) -> None:
        self.manifest = manifest
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, key: int | Draw) -> Item:
        draw = key if isinstance(key, Draw) else Draw(index=key, epoch=0, position=key)
        image, reason = decode(load_rgb, self.manifest.path_of(draw.index))
        if reason is not None:
            return reason, None, draw.index
        mask, reason = decode(load_mask, self.manifest.mask_path_of(draw.index))
        if reason is not None:
            return f"its mask {self.manifest.frame['mask'].iat[draw.index]}: {reason}", None, draw.index
        if self.seed is None:
            return *self.transform(image, mask), draw.index
        with seeded(self.seed, draw.epoch, draw.position):
            return *self.transform(image, mask), draw.index


def read_mask(manifest: SegmentationManifest, index: int) -> np.ndarray:
    """The mask of an image, (H, W) bool at its own size.

    Raises:
        ProcessError: it cannot be decoded (any longer), with its row.
    """
    mask, reason = decode(load_mask, manifest.mask_path_of(index))
    if reason is not None:
        refuse_broken(manifest, [(index, f"its mask {manifest.frame['mask'].iat[index]}: {reason}")])
    return mask


def collate_with_masks(items: list[Item]) -> SegmentationBatch:
    """Stack the good images and their masks, list the broken ones."""
    good = [item for item in items if isinstance(item[0], torch.Tensor)]
    broken = [(index, image) for image, _, index in items if isinstance(image, str)]
    return SegmentationBatch(
        images=torch.stack([image for image, _, _ in good]) if good else None,  # B x (3, h, w) -> (B, 3, h, w)
        masks=torch.stack([mask for _, mask, _ in good]) if good else None,  # B x (h, w) -> (B, h, w)
        indices=[index for _, _, index in good], broken=broken)


def build_segmentation_loader(manifest: SegmentationManifest, transform: JointTransform, sampler: TrainSampler, *,
                              plan: BatchPlan, seed: int, num_workers: int | None = None,
                              device: torch.device | str = "cpu", pin_memory: bool = True) -> DataLoader:
    """The training loader, from where ``loader.sampler.set_position`` says; as ``build_train_loader``, with masks.

    Args:
        manifest: the training images.
        transform: from ``build_joint_transform``.
        sampler: draws whole updates.
        plan: the sampler's.
        seed: of the augmentation.
        num_workers: decoding processes, which live on between epochs; None picks.
        device: where the batches will go.
        pin_memory: for a cuda device.
    """
    return loader_of_draws(SegmentationDataset(manifest, transform, seed), sampler, plan=plan, seed=seed,
                           collate_fn=collate_with_masks, num_workers=num_workers, device=device,
                           pin_memory=pin_memory)


@dataclass
class Photo:
    """A photograph for a model.

    Attributes:
        index: its place in the manifest.
        size: (H, W) of the picture in pixels.
        inputs: the whole picture as the model wants it, (3, h, w) float32 for each of its sizes; or
        pixels: (3, H, W) uint8, to be cut into windows.
    """

    index: int
    size: tuple[int, int]
    inputs: list[torch.Tensor]
    pixels: torch.Tensor | None = None


@dataclass
class PhotoBatch:
    """Photographs of any sizes, and (position, reason) of files that cannot be decoded."""

    photos: list[Photo]
    broken: list[tuple[int, str]]


class PhotoDataset(Dataset):
    """``dataset[i]`` is a Photo, or (i, reason) for a file that cannot be decoded.

    Args:
        manifest: the images.
        transforms: from ``build_image_transform``, one for each size of input; none keeps the pixels.
    """

    def __init__(self, manifest: Manifest, transforms: Sequence[Callable[[Image.Image], torch.Tensor]]) -> None:
        self.manifest, self.transforms = manifest, transforms

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Photo | tuple[int, str]:
        image, reason = decode(load_rgb, self.manifest.path_of(index))
        if reason is not None:
            return index, reason
        size = (image.height, image.width)
        if not self.transforms:
            return Photo(index, size, [], functional.pil_to_tensor(image))
        return Photo(index, size, [transform(image) for transform in self.transforms])


def collate_photos(items: list[Photo | tuple[int, str]]) -> PhotoBatch:
    """Lists; nothing is stacked, since sizes differ."""
    return PhotoBatch([item for item in items if isinstance(item, Photo)],
                      [item for item in items if not isinstance(item, Photo)])


def build_photo_loader(manifest: Manifest, transforms: Sequence[Callable[[Image.Image], torch.Tensor]], *,
                       batch_size: int, num_workers: int | None = None, device: torch.device | str = "cpu"
                       ) -> DataLoader:
    """Photographs in the manifest's order; under torchrun each process gets its share, none twice.

    Args:
        manifest: the images.
        transforms: as for ``PhotoDataset``.
        batch_size: photographs per batch at most.
        num_workers: decoding processes; None picks.
        device: where they will go; on a CPU small batches are fastest.
    """
    return loader_in_order(PhotoDataset(manifest, transforms), batch_size=batch_size, num_workers=num_workers,
                           device=device, collate_fn=collate_photos)
