"""From a PIL image to the tensor that a backbone was trained to see."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import v2

from furnace.data.images import load_rgb_tensor
from furnace.runtime.files import UserError

Transform = Callable[[Image.Image], torch.Tensor]
TRANSFORMS = ("published", "fast")
CROP_SCALE = (0.75, 1.0)  # share of the area that the random crop of training keeps
ROTATION = 45  # degrees either way
HUE = 0.2
SECTION = r"[a-z]+[0-9][0-9.]*|tweights|t3aw?"  # of a timm policy; timm skips what it does not understand


def data_config_of(backbone: torch.nn.Module | dict[str, Any], crop_pct: float | None = None) -> dict[str, Any]:
    """A backbone's data config, or the config that was given, with ``crop_pct`` where that is not None.

    Raises:
        UserError: crop_pct is not in (0, 1].
    """
    config = backbone if isinstance(backbone, dict) else backbone.provenance.data_config
    if crop_pct is None:
        return config
    if not 0 < crop_pct <= 1:
        raise UserError(f"--crop_pct {crop_pct} is not in (0, 1]: it is the side of the crop over the resized image's")
    return {**config, "crop_pct": crop_pct}


def build_transform(backbone: torch.nn.Module | dict[str, Any], mode: str = "published", *,
                    crop_pct: float | None = None) -> Transform:
    """The evaluation transform of a backbone: resize, centre crop, scale to [0, 1], normalise, by its own numbers.

    The shorter side goes to floor(input_size / crop_pct) pixels with antialiasing. For PanDerm that is 256 bilinear,
    then 224, as published.

    Args:
        backbone: what ``create_backbone`` returned, or a data config with timm's keys (input_size, mean, std,
            crop_pct, crop_mode, interpolation).
        mode: ``published`` decodes and resizes with Pillow. ``fast`` decodes to and resizes an 8-bit tensor, 1.5 to 2
            times as fast from camera files; before normalisation a pixel differs by 1/255 at most.
        crop_pct: instead of the backbone's own.

    Returns:
        A function from a PIL RGB image to a (3, H, W) float32 tensor.

    Raises:
        UserError: ``fast`` for a backbone that resizes otherwise than bilinear (bicubic differs by up to 2/255) or
            crops otherwise than a central square.
    """
    config = data_config_of(backbone, crop_pct)
    size, mean, std = tuple(config["input_size"]), tuple(config["mean"]), tuple(config["std"])
    if mode == "published":
        return create_transform(input_size=size, is_training=False, mean=mean, std=std, crop_pct=config["crop_pct"],
                                crop_mode=config["crop_mode"], interpolation=config["interpolation"])
    if mode != "fast":
        raise ValueError(f"transform {mode!r} is none of {', '.join(TRANSFORMS)}")
    if config["crop_mode"] != "center" or size[1] != size[2] or config["interpolation"] != "bilinear":
        raise UserError("--transform fast is for square centre crops after bilinear resizing, where it stays within "
                        f"1/255; this backbone has {config['crop_mode']} {size[1]} x {size[2]} after "
                        f"{config['interpolation']}: leave it out")
    return FastTransform(shorter=math.floor(size[1] / config["crop_pct"]), side=size[1], mean=mean, std=std)


class FastTransform:
    """Resize and crop on 8-bit tensors, float last; ``load`` is the file decoder that goes with it."""

    load = staticmethod(load_rgb_tensor)

    def __init__(self, *, shorter: int, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.steps = v2.Compose([v2.Resize([shorter], antialias=True), v2.CenterCrop([side]),
                                 v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    def __call__(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """A PIL RGB image or a (3, H, W) uint8 tensor -> (3, side, side) float32."""
        return self.steps(image if isinstance(image, torch.Tensor) else v2.functional.pil_to_tensor(image))


# --------------------------------------------------------------------------------------------------------- training

def build_train_transform(backbone: torch.nn.Module | dict[str, Any], *, color_jitter: float | None = None,
                          auto_augment: str = "", interpolation: str = "bilinear",
                          crop_pct: float | None = None) -> Transform:
    """The training transform, by default as published for fine-tuning.

    The shorter side goes to floor(input_size / crop_pct) pixels, bilinear; then a random crop of 75 to 100 % of the
    area, resized to input_size; both flips at one half; a rotation by up to 45 degrees (nearest, black corners); a
    change of hue by up to 0.2; the backbone's own normalisation. Seed it through ``ImageDataset``.

    Args:
        backbone: as for ``build_transform``.
        color_jitter: strength c for brightness, contrast and saturation as well, each by a factor in 1 - c to 1 + c.
        auto_augment: a policy in timm's notation (rand-m9-mstd0.5-inc1, augmix-m3, v0, original, 3a for DeiT III's
            3-Augment) in the colour jitter's place; with ``color_jitter``, before it.
        interpolation: of the random crop: bilinear, bicubic, or random, one of them per image.
        crop_pct: instead of the backbone's own.

    Returns:
        A function from a PIL RGB image to a (3, H, W) float32 tensor.

    Raises:
        UserError: a policy that timm does not know, a negative colour jitter, or a crop_pct not in (0, 1].
    """
    config = data_config_of(backbone, crop_pct)
    size, mean, std = tuple(config["input_size"]), tuple(config["mean"]), tuple(config["std"])
    steps: list[Any] = [transforms.Resize(math.floor(max(size[1:]) / config["crop_pct"])),
                        _random_crop(size[1:], interpolation), transforms.RandomHorizontalFlip(),
                        transforms.RandomVerticalFlip(), transforms.RandomRotation(ROTATION)]
    if auto_augment:
        steps.append(_auto_augment(auto_augment, mean))
    if color_jitter is not None or not auto_augment:
        strength = color_jitter or 0.0
        if strength < 0:
            raise UserError(f"--color_jitter {strength} is negative")
        steps.append(transforms.ColorJitter(strength, strength, strength, hue=HUE))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def _random_crop(size: tuple[int, int], interpolation: str) -> Callable[[Image.Image], Image.Image]:
    if interpolation == "random":
        return RandomResizedCropAndInterpolation(size, scale=CROP_SCALE, interpolation="random")
    modes = {"bilinear": transforms.InterpolationMode.BILINEAR, "bicubic": transforms.InterpolationMode.BICUBIC}
    if interpolation not in modes:
        raise ValueError(f"interpolation {interpolation!r} is none of {', '.join(modes)}, random")
    return transforms.RandomResizedCrop(size, scale=CROP_SCALE, interpolation=modes[interpolation])


def _auto_augment(policy: str, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment, AugMix or AutoAugment, with the settings of timm's own training transform."""
    name, *sections = policy.split("-")
    build = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(name, auto_augment_transform)
    settings: dict[str, Any] = {"img_mean": tuple(round(255 * m) for m in mean)}
    if name == "augmix":
        settings["translate_pct"] = 0.3
    try:
        if not all(re.fullmatch(SECTION, section) for section in sections):
            raise ValueError(policy)
        return build(policy, settings)
    except (AssertionError, ValueError) as error:
        raise UserError(f"--aa {policy}: timm has no such policy; write rand-m9-mstd0.5-inc1 (or other numbers), "
                        "augmix-m3, v0, original, or 3a") from error
