"""From a PIL image to the tensor that a backbone was trained to see."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform

Transform = Callable[[Image.Image], torch.Tensor]


def build_transform(backbone: torch.nn.Module | dict[str, Any]) -> Transform:
    """The evaluation transform of a backbone: resize, centre crop, scale to [0, 1], normalise, by its own numbers.

    The shorter side goes to floor(input_size / crop_pct) pixels with antialiasing. For PanDerm that is 256 bilinear,
    then 224, as published.

    Args:
        backbone: what ``create_backbone`` returned, or a data config with timm's keys (input_size, mean, std,
            crop_pct, crop_mode, interpolation).

    Returns:
        A function from a PIL RGB image to a (3, H, W) float32 tensor.
    """
    config = backbone if isinstance(backbone, dict) else backbone.provenance.data_config
    return create_transform(input_size=tuple(config["input_size"]), is_training=False, mean=tuple(config["mean"]),
                            std=tuple(config["std"]), crop_pct=config["crop_pct"], crop_mode=config["crop_mode"],
                            interpolation=config["interpolation"])
