"""From an image and its mask to what a segmenter trains on: one geometry for both, nearest for the mask.

Every transform squashes to ``size`` and loses the aspect, as both published recipes do: a map of the model's output
goes back to the image's own size by one resize, without crops to undo.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2
from torchvision.transforms.v2 import functional

RECIPES = ("default", "panderm", "dermino")
IGNORED = 255  # of a mask: no truth there, the loss leaves it out
HALF = (0.5, 0.5, 0.5)  # PanDerm's segmentation normalises to [-1, 1], unlike its classification
CROP_SCALE = (0.5, 1.0)  # share of the area that the random crop keeps
CROP_RATIO = (3 / 4, 4 / 3)
ROTATION = 45  # degrees either way; with both flips
JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05}


def recipe_normalisation(recipe: str, data_config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std: PanDerm's recipe has its own, the others take the backbone's data config."""
    return (HALF, HALF) if recipe == "panderm" else (tuple(data_config["mean"]), tuple(data_config["std"]))


class JointTransform:
    """(PIL RGB, (H, W) bool) -> ((3, h, w) float32, (h, w) int64 of 0, 1 and IGNORED); random numbers are PyTorch's."""

    def __init__(self, recipe: str, *, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Made by ``build_joint_transform``."""
        self.recipe, self.size = recipe, size
        self.augment = v2.Compose(_augmentations(recipe))
        self.normalise = _normalisation(mean, std)

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Resize both (for the default recipe a random part of both), augment, normalise the image."""
        if mask.shape != (image.height, image.width):
            raise ValueError(f"a mask of {mask.shape} pixels for an image of {(image.height, image.width)}")
        pixels = functional.pil_to_tensor(image)  # (3, H, W) uint8
        truth = torch.from_numpy(mask.astype(np.uint8))[None]  # (1, H, W)
        if self.recipe == "default":
            top, left, height, width = RandomResizedCrop.get_params(pixels, list(CROP_SCALE), list(CROP_RATIO))
            pixels = pixels[:, top:top + height, left:left + width]
            truth = truth[:, top:top + height, left:left + width]
        image_and_mask = (tv_tensors.Image(_squash(pixels, self.recipe, self.size)),
                          tv_tensors.Mask(_squash_mask(truth, self.recipe, self.size)))
        pixels, truth = self.augment(*image_and_mask)
        return self.normalise(pixels.as_subclass(torch.Tensor)), truth.as_subclass(torch.Tensor)[0].long()


def build_joint_transform(recipe: str = "default", *, size: int | tuple[int, int], mean: tuple[float, ...],
                          std: tuple[float, ...]) -> JointTransform:
    """The training transform of a recipe. Seed it through ``SegmentationDataset``.

    Args:
        recipe: ``default``: a random part of 50 to 100 % of the area squashed to ``size`` (bilinear, antialiased), both
            flips, a rotation by up to 45 degrees (corners black and IGNORED), changes of colour. ``panderm``, as
            published: squashed (bicubic without antialias), changes of colour, grey, autocontrast, inversion; no
            geometry. ``dermino``: squashed (bilinear, antialiased), nothing random; its mask by nearest, where the
            published bilinear one gives the pixels of the outline to no class.
        size: side, or (h, w), of the result.
        mean: of the normalisation, e.g. from ``recipe_normalisation``.
        std: of it.

    Raises:
        ValueError: another recipe.
    """
    return JointTransform(_known(recipe), size=_pair(size), mean=mean, std=std)


def build_image_transform(recipe: str = "default", *, size: int | tuple[int, int], mean: tuple[float, ...],
                          std: tuple[float, ...]) -> Callable[[Image.Image | torch.Tensor], torch.Tensor]:
    """The evaluation transform of a recipe: PIL RGB, or (3, H, W) uint8, squashed to (3, h, w) float32.

    Args:
        recipe: as for ``build_joint_transform``; decides how the image is resized.
        size: side, or (h, w), of the result.
        mean: of the normalisation.
        std: of it.
    """
    recipe, size, normalise = _known(recipe), _pair(size), _normalisation(mean, std)

    def transform(image: Image.Image | torch.Tensor) -> torch.Tensor:
        pixels = image if isinstance(image, torch.Tensor) else functional.pil_to_tensor(image)
        return normalise(_squash(pixels, recipe, size))

    return transform


def _augmentations(recipe: str) -> list[v2.Transform]:
    if recipe == "default":
        return [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
                v2.RandomRotation(ROTATION, interpolation=InterpolationMode.BILINEAR,
                                  fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}),
                v2.ColorJitter(**JITTER)]
    if recipe == "panderm":
        return [v2.ColorJitter(0.2, 0.2, 0.2, 0.2), v2.RandomGrayscale(0.2), v2.RandomAutocontrast(0.2),
                v2.RandomInvert(0.2)]
    return [v2.Identity()]


def _normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> v2.Compose:
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def _squash(pixels: torch.Tensor, recipe: str, size: tuple[int, int]) -> torch.Tensor:
    """(3, H, W) uint8 to (3, h, w) uint8."""
    if recipe == "panderm":  # on floats: torchvision's own way for 8 bits depends on its version
        resized = torch.nn.functional.interpolate(pixels[None].float(), size, mode="bicubic", align_corners=False,
                                                  antialias=False)
        return resized[0].round().clamp(0, 255).to(torch.uint8)
    return functional.resize(pixels, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)


def _squash_mask(mask: torch.Tensor, recipe: str, size: tuple[int, int]) -> torch.Tensor:
    """(1, H, W) to (1, h, w); PanDerm's nearest takes the pixel left of the middle, the others' the middle one."""
    mode = "nearest" if recipe == "panderm" else "nearest-exact"
    return torch.nn.functional.interpolate(mask[None], size, mode=mode)[0]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _known(recipe: str) -> str:
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is none of {', '.join(RECIPES)}")
    return recipe
