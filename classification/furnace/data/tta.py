"""Test-time augmentation: several views of every image, the mean of the model's logits over them."""

import math
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from furnace.data.transforms import build_transform, data_config_of
from furnace.runtime.files import UserError

# All presets; edit them here, or add your own. One with random views is a table of numbers: the shorter side is resized
# to input_size x ``resize``; ``*_p`` are probabilities; degrees, and torchvision's hue and saturation. One with fixed
# views is a tuple of names from FIXED.
TTA_VIEWS: dict[str, dict[str, Any] | tuple[str, ...]] = {
    "published": {"resize": 246 / 224, "hflip_p": 0.5, "vflip_p": 0.5, "degrees": (0, 270), "rotate_p": 0.3,
                  "hue": 0.25, "saturation": 0.25, "jitter_p": 0.3},
    "deterministic": ("identity", "hflip", "vflip", "rot90", "rot180", "rot270"),
}
FIXED = {"identity": ((), 0), "hflip": ((-1,), 0), "vflip": ((-2,), 0),  # mirrored dimensions of (3, H, W), then
         "rot90": ((), 1), "rot180": ((), 2), "rot270": ((), 3)}  # quarter turns, counter-clockwise
PANDERM_STD, PUBLISHED_STD = (0.228, 0.224, 0.225), (0.229, 0.224, 0.225)  # the published views alone take 0.229


class TTAHandler:
    """``transform(image)`` is (V, 3, H, W) float32, V = ``transform.views``; of an image of any size.

    The published random views are reproducible when the transform runs in an ``ImageDataset`` with a seed: they then
    depend on the image's place in the manifest, not on batches or workers.
    """

    def __init__(self, data_config: nn.Module | dict[str, Any], views: str = "published", n: int = 5, *,
                 crop_pct: float | None = None) -> None:
        """Choose a preset.

        Args:
            data_config: a backbone, or its data config.
            views: a preset of TTA_VIEWS. ``published`` has random views, normalised as published (PanDerm: std 0.229
                where training has 0.228; other backbones: their own); ``deterministic`` has the flips and quarter
                turns of the evaluation transform's image.
            n: the number of random views; fixed views are as many as the preset names.
            crop_pct: of the evaluation transform, for fixed views.

        Raises:
            UserError: no such preset or view, fewer than 1 view, or a turned view of an image that is not square.
        """
        config = data_config_of(data_config)
        if views not in TTA_VIEWS:
            raise UserError(f"TTA views {views!r}: the presets are {', '.join(TTA_VIEWS)}")
        preset, (height, width) = TTA_VIEWS[views], config["input_size"][-2:]
        self.fixed = None if isinstance(preset, dict) else preset
        self.views = n if self.fixed is None else len(self.fixed)
        if self.views < 1:
            raise UserError(f"test-time augmentation with {self.views} views: take at least 1")
        if self.fixed is None:
            self.prepare, self.augment, self.normalise = _random_steps(preset, config)
            return
        if unknown := [name for name in self.fixed if name not in FIXED]:
            raise UserError(f"TTA views {views!r}: no view is called {', '.join(unknown)}; take {', '.join(FIXED)}")
        if height != width and any(FIXED[name][1] % 2 for name in self.fixed):
            raise UserError(f"TTA views {views!r} turn the image by 90 degrees, but this backbone sees {height} x "
                            f"{width} pixels: take the published views")
        self.prepare = build_transform(config, crop_pct=crop_pct)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """A PIL RGB image -> (V, 3, H, W) float32."""
        base = self.prepare(image)
        if self.fixed is None:
            return torch.stack([self.normalise(self.augment(base)) for _ in range(self.views)])
        turned = ((base.flip(flips), turns) for flips, turns in (FIXED[name] for name in self.fixed))
        return torch.stack([torch.rot90(view, turns, dims=(-2, -1)) for view, turns in turned])


def _random_steps(preset: dict[str, Any], config: dict[str, Any]) -> tuple[transforms.Compose, ...]:
    """What is done once per image, what is drawn for every view, and the normalisation; on float tensors in [0, 1]."""
    size, std = tuple(config["input_size"][-2:]), tuple(config["std"])
    shorter = round(max(size) * preset["resize"])
    jitter = transforms.ColorJitter(hue=preset["hue"], saturation=preset["saturation"])
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Resize(shorter, antialias=True),
                                  transforms.CenterCrop(size)])
    augment = transforms.Compose([
        transforms.RandomHorizontalFlip(preset["hflip_p"]), transforms.RandomVerticalFlip(preset["vflip_p"]),
        transforms.RandomApply([transforms.RandomRotation(preset["degrees"])], preset["rotate_p"]),
        transforms.RandomApply([jitter], preset["jitter_p"])])
    if all(math.isclose(a, b) for a, b in zip(std, PANDERM_STD, strict=True)):
        std = PUBLISHED_STD
    return prepare, augment, transforms.Compose([transforms.Normalize(tuple(config["mean"]), std)])


class ViewMean(nn.Module):
    """A model over views: (B, V, 3, H, W) -> (B, K), the mean of its outputs, in float32; (B, 3, H, W) as it is.

    Of a classifier's outputs, the logits, as published.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap a classifier, or a backbone without a head."""
        super().__init__()
        self.model = model
        self.num_features = getattr(model, "num_classes", 0) or model.num_features  # width of the output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, V, 3, H, W) or (B, 3, H, W) -> (B, K)."""
        if images.ndim == 4:
            return self.model(images)
        flat = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (B x V, 3, H, W)
        return self.model(flat).unflatten(0, images.shape[:2]).float().mean(dim=1)  # (B x V, K) -> (B, V, K) -> (B, K)
