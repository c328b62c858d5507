"""Several random crops of one image, as DINO, DINOv2 and DermINO train on them, and a batch of them.

Two global crops keep much of the image, local ones little. The random changes are the published ones (torchvision's
RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale, GaussianBlur, RandomSolarize), computed three
to four times as fast: resizing on 8-bit tensors, colours in floats without rounding between the steps. On two cores
torchvision's functions for Pillow images, which round to 8 bits after every step, would cost half of the training; the
tests compare with them.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import pil_to_tensor

from furnace.data.images import load_rgb_tensor
from furnace.runtime.files import UserError

RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height
FLIP, JITTER, GREY = 0.5, 0.8, 0.2  # chances of each crop
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1  # factors in 1 - c to 1 + c; hue in -c to c turns
SIGMA = (0.1, 2.0)  # of the blur, in pixels
REACH = 4  # pixels to either side that the blur takes in: a kernel of 9
SOLARIZE = 128  # values from here on are inverted
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
OWN_HUE = np.array([0, 2, 4], dtype=np.float32)[:, None, None]  # of red, green and blue, in sixths of the circle


@dataclass(frozen=True, kw_only=True)
class Crops:
    """What the crops of an image are; the defaults are DermINO's (arXiv 2508.12190).

    Attributes:
        global_size: pixels of a global crop's side; there are two.
        local_size: pixels of a local crop's side.
        local_crops: local crops of an image; 0 for none.
        global_scale: smallest and largest share of the image's area in a global crop.
        local_scale: the same of a local crop.
        dinov2_compat: blur with 1 - p instead of the chance p that the recipe declares, as the released code of
            DINOv2 did and so DermINO's: the first global crop never and the second nine times of ten.
    """

    global_size: int = 224
    local_size: int = 98
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    dinov2_compat: bool = False


class MultiCrop:
    """An image to its crops; ``load`` is the file decoder that goes with it. Made by ``build_multicrop``."""

    load = staticmethod(load_rgb_tensor)

    def __init__(self, crops: Crops, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.crops = crops
        self.scale = 1 / (255 * torch.tensor(std, dtype=torch.float32)[:, None, None])  # (3, 1, 1)
        self.shift = -torch.tensor(mean)[:, None, None] / torch.tensor(std)[:, None, None]
        self.blurs = (1.0, 0.1, 0.5)  # chances of the first and second global and of a local crop
        if crops.dinov2_compat:
            self.blurs = tuple(1 - chance for chance in self.blurs)

    def __call__(self, image: Image.Image | torch.Tensor,
                 rng: random.Random | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut and change an image at random.

        Args:
            image: RGB, or (3, H, W) uint8.
            rng: the random numbers; None takes Python's own generator, which ``runtime.seeding.seeded`` seeds.

        Returns:
            Globals (2, 3, G, G) and locals (L, 3, l, l), float32, normalised.
        """
        rng = rng or random
        pixels = image if isinstance(image, torch.Tensor) else pil_to_tensor(image)
        pixels = pixels[None].contiguous(memory_format=torch.channels_last)  # twice to four times as fast to resize
        crops, (first, second, other) = self.crops, self.blurs
        return (self._views(pixels, crops.global_size, crops.global_scale, [(first, 0.0), (second, 0.2)], rng),
                self._views(pixels, crops.local_size, crops.local_scale, [(other, 0.0)] * crops.local_crops, rng))

    def _views(self, pixels: torch.Tensor, size: int, scale: tuple[float, float], chances: list[tuple[float, float]],
               rng: random.Random) -> torch.Tensor:
        """A crop for each pair of chances (blur, solarize) -> (V, 3, size, size)."""
        views = torch.empty(len(chances), 3, size, size)
        for values, (blurred, solarized) in zip(views.numpy(), chances, strict=True):  # in 0..255; the same memory
            cut = resized_crop(pixels, crop_box(*pixels.shape[-2:], scale, rng), size)  # (size, size, 3) uint8
            values[:] = (cut[:, ::-1] if rng.random() < FLIP else cut).transpose(2, 0, 1)
            if rng.random() < JITTER:
                jitter(values, rng)
            if rng.random() < GREY:
                values[:] = luma(values)
            if rng.random() < blurred:
                blur(values, rng.uniform(*SIGMA))
            if rng.random() < solarized:
                np.subtract(255, values, out=values, where=values >= SOLARIZE)
        return views.mul_(self.scale).add_(self.shift)


def build_multicrop(crops: Crops, *, mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """The function from an image to its crops.

    Args:
        crops: sizes, number and shares of the area.
        mean: of the three channels, for values in 0..1.
        std: likewise.

    Raises:
        UserError: sizes or shares that make no crop.
    """
    for name, size in (("global", crops.global_size), ("local", crops.local_size)):
        if size <= REACH:
            raise UserError(f"--{name}_crops_size {size} is too small: the blur needs {REACH + 1} pixels, and a crop "
                            "should have several patches a side")
    for name, (low, high) in (("global", crops.global_scale), ("local", crops.local_scale)):
        if not 0 < low <= high <= 1:
            raise UserError(f"--{name}_crops_scale {low} {high}: give the smallest and largest share of the image's "
                            "area, above 0 and at most 1")
    if crops.local_crops < 0:
        raise UserError(f"--local_crops_number {crops.local_crops} is negative: 0 makes no local crops")
    return MultiCrop(crops, mean=tuple(mean), std=tuple(std))


# ----------------------------------------------------------------------------------------------------------- pixels

def crop_box(height: int, width: int, scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part of an image, as torchvision's RandomResizedCrop draws it.

    The share of the area is uniform in ``scale`` and the logarithm of the aspect ratio uniform in RATIO. After ten that
    do not fit, it is the largest centred part with an aspect in RATIO.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(pixels: torch.Tensor, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """A part of (1, 3, H, W) uint8 in channels-last memory, bicubic with antialiasing -> (size, size, 3) uint8."""
    top, left, height, width = box
    part = pixels[..., top:top + height, left:left + width]
    part = interpolate(part, (size, size), mode="bicubic", antialias=True)  # what torchvision's resize calls
    return part[0].permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------- colours
# In place on (3, H, W) float32 in 0..255; numpy, because torch takes three times as long to begin an operation.

def jitter(values: np.ndarray, rng: random.Random) -> None:
    """Brightness, contrast, saturation and hue, in random order."""
    for step in rng.sample(range(4), 4):
        if step == 0:
            values *= rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)
            np.minimum(values, 255, out=values)
        elif step == 1:
            blend(values, luma(values).mean(), rng.uniform(1 - CONTRAST, 1 + CONTRAST))
        elif step == 2:
            blend(values, luma(values), rng.uniform(1 - SATURATION, 1 + SATURATION))
        else:
            turn_hue(values, rng.uniform(-HUE, HUE))


def luma(values: np.ndarray) -> np.ndarray:
    """(3, H, W) -> (H, W), the grey of ITU-R 601."""
    grey = values[0] * LUMA[0]
    grey += values[1] * LUMA[1]
    grey += values[2] * LUMA[2]
    return grey


def blend(values: np.ndarray, other: np.ndarray | np.float32, factor: float) -> None:
    """factor x values + (1 - factor) x other, cut to 0..255."""
    values *= factor
    values += other * np.float32(1 - factor)
    np.clip(values, 0, 255, out=values)


def turn_hue(values: np.ndarray, turns: float) -> None:
    """Add ``turns`` (-1/6 to 1/6 of the circle) to the hue; value and saturation stay.

    With hue h in sixths of the circle from red, V the largest channel and C its distance to the smallest, a channel
    whose own hue is o (0, 2, 4) has V - C x clip(|h - o| - 1, 0, 1), |.| being the way on the circle.
    """
    red, green, blue = values
    top = np.maximum(np.maximum(red, green), blue)  # V
    chroma = top - np.minimum(np.minimum(red, green), blue)
    hue, start = red - green, np.full_like(top, 4 + 6 * turns)  # where blue is largest
    for largest, before, after, own in ((green, blue, red, 2), (red, green, blue, 0)):  # of two largest the first
        here = largest == top
        np.subtract(before, after, out=hue, where=here)
        np.copyto(start, own + 6 * turns, where=here)
    hue /= np.maximum(chroma, np.float32(1e-6))
    hue += start  # -2 to 6
    np.subtract(hue, OWN_HUE, out=values)  # -6 to 6
    np.abs(values, out=values)
    values -= 3
    np.abs(values, out=values)  # 3 - the way on the circle
    np.subtract(2, values, out=values)
    np.clip(values, 0, 1, out=values)
    values *= chroma
    np.subtract(top, values, out=values)


def blur(values: np.ndarray, sigma: float) -> None:
    """A Gaussian of nine values along both axes, the edges mirrored, as torchvision's gaussian_blur.

    torchvision multiplies by the 81 products; one axis after the other is the same in a fifth of the time.
    """
    weights = np.exp(-0.5 * (np.arange(REACH + 1) / sigma) ** 2)
    weights = (weights / (weights[0] + 2 * weights[1:].sum())).astype(np.float32)
    across = _along_rows(values, weights)
    values[:] = _along_rows(across.swapaxes(1, 2), weights).swapaxes(1, 2)


def _along_rows(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of the neighbours on the last axis; (C, A, B), of any order in memory."""
    length = values.shape[2]
    padded = np.concatenate([values[..., REACH:0:-1], values, values[..., -2:-2 - REACH:-1]], axis=2)  # (C, A, B + 8)
    total = padded[..., REACH:REACH + length] * weights[0]
    pair = np.empty_like(total)
    for d in range(1, REACH + 1):
        np.add(padded[..., REACH - d:REACH - d + length], padded[..., REACH + d:REACH + d + length], out=pair)
        pair *= weights[d]
        total += pair
    return total


# ------------------------------------------------------------------------------------------------------------ batch

@dataclass
class MultiCropBatch:
    """What the pretraining loader yields: of B images the first view of all, then the second of all, and so on.

    Attributes:
        globals: (2, B, 3, G, G) float32, or None when no file of the batch could be decoded.
        locals: (L, B, 3, l, l) float32; None without local crops.
        masks: (2, B, N) bool over the N patches of a global crop, row by row; True is hidden from the student.
        targets: (B, K) float32, 1 where a class is present; None without an ontology.
        known: (B, K) bool, the classes that count in the label loss, none of an unlabelled image.
        indices: (B,) positions in the manifest.
        broken: (position, reason) of the files that could not be decoded.
    """

    globals: torch.Tensor | None
    locals: torch.Tensor | None
    masks: torch.Tensor | None
    targets: torch.Tensor | None
    known: torch.Tensor | None
    indices: list[int]
    broken: list[tuple[int, str]]

    def pin_memory(self) -> "MultiCropBatch":
        """Called by the loader before a copy to a GPU."""
        for name in ("globals", "locals", "masks", "targets", "known"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.pin_memory())
        return self


def blank_batch(images: int, crops: Crops, *, patch_size: int, classes: int | None, mask_share: float = 0.5,
                mask_ratio: tuple[float, float] = (0.1, 0.5)) -> MultiCropBatch:
    """Grey images with as many masked patches as a batch can have, for the trial of a GPU's memory.

    Args:
        images: B.
        crops: their sizes.
        patch_size: pixels of a patch's side.
        classes: K of the ontology, whose classes are all known and absent; None without one.
        mask_share: as for ``block_masks``.
        mask_ratio: likewise.
    """
    patches = (crops.global_size // patch_size) ** 2
    masked = int(2 * images * mask_share)
    most = (patches * np.linspace(*mask_ratio, masked + 1)[1:]).astype(int)  # of each masked crop
    masks = torch.zeros(2 * images, patches, dtype=torch.bool)
    masks[:masked] = torch.arange(patches) < torch.from_numpy(most)[:, None]
    size, small = crops.global_size, crops.local_size
    return MultiCropBatch(
        globals=torch.zeros(2, images, 3, size, size), masks=masks.view(2, images, patches),
        locals=torch.zeros(crops.local_crops, images, 3, small, small) if crops.local_crops else None,
        targets=None if classes is None else torch.zeros(images, classes),
        known=None if classes is None else torch.ones(images, classes, dtype=torch.bool),
        indices=list(range(images)), broken=[])
