"""The lesion that a segmenter sees in each photograph, as a mask of the photograph's own size.

The protocol: the picture is squashed to the model's size by the evaluation transform of its recipe, or cut into
overlapping windows that are; the probability of the lesion (softmax, float32) is averaged over flips and sizes, brought
back to the picture's size (bilinear, corners not aligned), and a pixel is lesion where it is above 0.5.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from furnace.data.class_names import some
from furnace.data.datasets import refuse_broken
from furnace.data.joint_transforms import build_image_transform
from furnace.data.manifest import Manifest
from furnace.data.segmentation_datasets import Photo, build_photo_loader
from furnace.data.windows import Box, predict_in_windows
from furnace.evaluation.features import NotFiniteError, SteadyForward
from furnace.evaluation.masks import largest_component
from furnace.models.segmenter import SegmentationModel, resize_segmenter
from furnace.runtime import distributed
from furnace.runtime.files import UserError
from furnace.runtime.precision import autocast, prepare_for_inference
from furnace.runtime.progress import progress

THRESHOLD = 0.5
FLIPS = ((), (3,), (2,), (2, 3))  # axes of (B, C, H, W): none, left and right, up and down, both
SCALES = (1.0, 0.75, 1.25)  # of the model's size, for test-time augmentation
STEP = 32  # sizes of networks with a pyramid of their own are multiples of it


@dataclass(frozen=True)
class Masking:
    """How masks are made.

    Attributes:
        transform: the recipe of the evaluation transform (``data.joint_transforms``).
        mean: of its normalisation.
        std: of it.
        device: where the model runs.
        amp_dtype: bf16, fp16 or fp32.
        batch_size: pictures, or windows, per forward pass at most.
        num_workers: decoding processes; None picks.
        flips: average over the four flips.
        scales: average over inputs of these multiples of the model's size.
        window: (h, w) in pixels of the picture; pictures are cut into such windows. None squashes the whole.
        overlap: least share of a window's side that neighbours have in common.
        largest: keep the largest lesion and fill its holes; an empty mask stays empty.
    """

    transform: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    amp_dtype: str = "fp32"
    batch_size: int = 12
    num_workers: int | None = None
    flips: bool = False
    scales: tuple[float, ...] = (1.0,)
    window: tuple[int, int] | None = None
    overlap: float = 0.5
    largest: bool = False

    @property
    def views(self) -> str:
        """In words, for results.json."""
        parts = [*(["4 flips"] if self.flips else []),
                 *([f"sizes x {', '.join(f'{scale:g}' for scale in self.scales)}"] if self.scales != (1.0,) else [])]
        return " and ".join(parts) or "none"


def lesion_masks(model: SegmentationModel, manifest: Manifest, how: Masking, *, description: str = "masks"
                 ) -> Iterator[tuple[int, np.ndarray]]:
    """(position in the manifest, (H, W) bool) of every photograph; under torchrun of this process's share of them.

    Args:
        model: (B, 3, h, w) -> (B, 2, h, w) logits; put into eval mode on the device.
        manifest: the photographs.
        how: settings.
        description: of the progress bar.

    Raises:
        ProcessError: files that cannot be decoded: all of them, after the last of them was met.
        NotFiniteError: logits that are not finite, with the files, after the last; in every process.
    """
    model = model.to(how.device).eval()
    sizes = scaled_sizes(model, how.scales)
    transforms = [build_image_transform(how.transform, size=size, mean=how.mean, std=how.std) for size in sizes]
    loader = build_photo_loader(manifest, [] if how.window else transforms, device=how.device,
                                batch_size=1 if how.window else max(1, min(how.batch_size, len(manifest))),
                                num_workers=how.num_workers)
    forwards = [SteadyForward(lesion_probability(prepare_for_inference(
        of_size(model, size).to(how.device), how.amp_dtype)),
        how.batch_size if how.window else loader.batch_size) for size in sizes]
    broken: list[tuple[int, str]] = []
    bad: list[int] = []
    with progress(total=len(loader.sampler), unit="image", desc=description, disable=not distributed.is_main()) as bar:
        for batch in loader:
            broken += batch.broken
            if batch.photos and not broken:
                for index, mask in _masks_of(batch.photos, forwards, transforms, how):
                    if mask is None:
                        bad.append(index)
                    else:
                        yield index, mask
            bar.update(len(batch.photos) + len(batch.broken))
    if broken := distributed.gather_lists(broken):
        refuse_broken(manifest, broken)
    if bad := sorted(distributed.gather_lists(bad)):  # in all processes: one alone would end without a word
        raise NotFiniteError(f"the logits of {some([manifest.filenames[index] for index in bad])} are not finite in "
                             f"{how.amp_dtype} (run with --amp_dtype fp32)")


def of_size(model: SegmentationModel, size: tuple[int, int]) -> SegmentationModel:
    """The model for images of this size: itself where it takes any.

    Raises:
        UserError: it cannot be brought to that size.
    """
    fixed = model.plain or "img_size" in model.recipe["backbone"]["arguments"]
    return resize_segmenter(model, size) if fixed else model


def check_scales(model: SegmentationModel, scales: Sequence[float]) -> None:
    """Whether a model can see images of these multiples of its size: to be known before a training, not after it.

    Raises:
        UserError: the model cannot see images of them.
    """
    try:
        for size in scaled_sizes(model, scales):
            of_size(model, size)
    except UserError as error:
        raise UserError(f"--tta scales: {error} (--tta flips works)") from error


def scaled_sizes(model: SegmentationModel, scales: Sequence[float]) -> list[tuple[int, int]]:
    """(h, w) of the inputs of these multiples of the model's size, at the nearest multiples of its patches."""
    patch = getattr(getattr(model.backbone, "patch_embed", None), "patch_size", None) if model.plain else None
    steps = (STEP, STEP) if patch is None else torch.nn.modules.utils._pair(patch)
    sizes = [model.input_size if scale == 1 else tuple(
        max(1, round(side * scale / step)) * step for side, step in zip(model.input_size, steps, strict=True))
        for scale in scales]
    return list(dict.fromkeys(sizes))


def lesion_probability(model: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """(B, 3, h, w) -> (B, h, w) float32: the softmax's class 1."""
    return lambda images: model(images).float().softmax(dim=1)[:, 1]


def _masks_of(photos: list[Photo], forwards: list[SteadyForward], transforms: list[Any], how: Masking
              ) -> Iterator[tuple[int, np.ndarray | None]]:
    """Masks of a batch, None where the logits are not finite.

    Outside of inference mode in between, so that a training around it is not touched.
    """
    if how.window is None:
        maps = _predict([photo.inputs for photo in photos], forwards, how)  # (B, h, w)
    for number, photo in enumerate(photos):
        if how.window is None:
            whole = to_size(maps[number], photo.size)
        else:
            whole = _in_windows(photo, forwards, transforms, how)
        if not torch.isfinite(whole).all():
            yield photo.index, None
            continue
        mask = (whole > THRESHOLD).cpu().numpy()
        yield photo.index, largest_component(mask) if how.largest else mask


@torch.inference_mode()
def _predict(inputs: list[list[torch.Tensor]], forwards: list[SteadyForward], how: Masking) -> torch.Tensor:
    """(B, h, w) mean probabilities, of the first size of input, from B pictures in each of the sizes."""
    total, count = None, 0
    with autocast(how.device, how.amp_dtype):
        for forward, images in zip(forwards, zip(*inputs, strict=True), strict=True):
            images = torch.stack(images).to(how.device, memory_format=torch.channels_last)
            for axes in FLIPS if how.flips else FLIPS[:1]:
                found = forward(images.flip(axes) if axes else images)  # (B, h, w)
                found = found.flip([axis - 1 for axis in axes]) if axes else found
                found = found if total is None else to_size(found, total.shape[-2:])
                total, count = found if total is None else total + found, count + 1
    return total / count


def _in_windows(photo: Photo, forwards: list[SteadyForward], transforms: list[Any], how: Masking) -> torch.Tensor:
    """(H, W) probabilities, blended."""
    window = tuple(min(side, whole) for side, whole in zip(how.window, photo.size, strict=True))

    def crop(box: Box) -> list[torch.Tensor]:
        part = photo.pixels[:, box.top:box.bottom, box.left:box.right]
        return [transform(part) for transform in transforms]

    return predict_in_windows(crop, lambda inputs: to_size(_predict(inputs, forwards, how), window), photo.size,
                              window=window, overlap=how.overlap, batch_size=how.batch_size)


def to_size(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(..., h, w) -> (..., H, W), bilinear, corners not aligned."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])  # (B, 1, h, w)
    return F.interpolate(flat, size=tuple(size), mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)
