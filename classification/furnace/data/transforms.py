"""From a PIL image to the tensor that a backbone was trained to see."""

import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from furnace.data.images import load_rgb_tensor
from furnace.runtime.files import UserError

Transform = Callable[[Image.Image], torch.Tensor]
TRANSFORMS = ("published", "fast")


def build_transform(backbone: torch.nn.Module | dict[str, Any], mode: str = "published") -> Transform:
    """The evaluation transform of a backbone: resize, centre crop, scale to [0, 1], normalise, by its own numbers.

    The shorter side goes to floor(input_size / crop_pct) pixels with antialiasing. For PanDerm that is 256 bilinear,
    then 224, as published.

    Args:
        backbone: what ``create_backbone`` returned, or a data config with timm's keys (input_size, mean, std,
            crop_pct, crop_mode, interpolation).
        mode: ``published`` decodes and resizes with Pillow. ``fast`` decodes to and resizes an 8-bit tensor, 1.5 to 2
            times as fast from camera files; before normalisation a pixel differs by 1/255 at most.

    Returns:
        A function from a PIL RGB image to a (3, H, W) float32 tensor.

    Raises:
        UserError: ``fast`` for a backbone that resizes otherwise than bilinear (bicubic differs by up to 2/255) or
            crops otherwise than a central square.
    """
    config = backbone if isinstance(backbone, dict) else backbone.provenance.data_config
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
