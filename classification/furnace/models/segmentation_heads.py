"""Heads that turn a backbone's feature maps into a map of class logits.

``UPerHead`` is UPerNet's (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018) in the form and
with the tensor names of PanDerm's published segmentation; ``FeaturePyramid`` makes its four resolutions from a plain
vision transformer (Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, and
BEiT's segmentation). ``LinearHead`` is DINOv2's and DermINO's linear evaluation of patch tokens.

Every resize is bilinear with align_corners False, as published. Batch normalisation is ``BatchNorm2d``; a distributed
training turns it into the synchronised one.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from furnace.runtime.files import UserError


def resize(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear, corners not aligned."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


class ConvBlock(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; keeps the resolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / (outputs * kernel**2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        return F.relu(self.bn(self.conv(x)))


def _classifier(inputs: int, nb_classes: int) -> nn.Conv2d:
    """The last 1x1 convolution: normal of std 0.01, bias zero."""
    layer = nn.Conv2d(inputs, nb_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class FeaturePyramid(nn.Module):
    """Four maps of one resolution become x4, x2, x1 and x0.5 of it.

    Args:
        width: channels D of every map.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fpn1 = nn.Sequential(nn.ConvTranspose2d(width, width, 2, stride=2), nn.BatchNorm2d(width), nn.GELU(),
                                  nn.ConvTranspose2d(width, width, 2, stride=2))
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(width, width, 2, stride=2))

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Four (B, D, h, w) -> (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w), (B, D, h // 2, w // 2)."""
        # ceil_mode: a grid of one patch has a half, too
        last = F.max_pool2d(maps[3], 2, stride=2, ceil_mode=min(maps[3].shape[-2:]) < 2)
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), maps[2], last]


class UPerHead(nn.Module):
    """UPerNet: pyramid pooling on the coarsest map, a top-down path, all levels fused at the finest resolution.

    Args:
        widths: channels of each map, finest first.
        channels: C of every layer inside.
        nb_classes: K.
        pool_scales: sides of the pooled grids.
        dropout: of whole channels, before the last convolution.
    """

    def __init__(self, widths: Sequence[int], *, channels: int, nb_classes: int,
                 pool_scales: Sequence[int] = (1, 2, 3, 6), dropout: float = 0.0) -> None:
        super().__init__()
        self.conv_seg = _classifier(channels, nb_classes)
        self.dropout = nn.Dropout2d(dropout)
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBlock(widths[-1], channels, 1))
                                         for scale in pool_scales)
        self.bottleneck = ConvBlock(widths[-1] + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvBlock(width, channels, 1) for width in widths[:-1])
        self.fpn_convs = nn.ModuleList(ConvBlock(channels, channels, 3) for _ in widths[:-1])
        self.fpn_bottleneck = ConvBlock(len(widths) * channels, channels, 3)
        self.minimum_batch = 2 if 1 in pool_scales else 1

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps (B, widths[i], h_i, w_i), finest first -> (B, K, h_0, w_0) logits.

        Raises:
            UserError: one image in a training step: its 1x1 grid has no variance to normalise by.
        """
        if self.training and len(maps[0]) < self.minimum_batch and type(self.bottleneck.bn) is nn.BatchNorm2d:
            raise UserError("the UPerNet head normalises pooled maps of 1x1 over the batch and cannot train on one "
                            "image at a time: take --batch_size 2 or more (or --head linear)")
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self._pooled(maps[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[-2:])
        levels[:-1] = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)]
        fused = torch.cat([resize(level, levels[0].shape[-2:]) for level in levels], dim=1)  # (B, levels * C, h_0, w_0)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(fused)))

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D, h, w) -> (B, C, h, w): the map beside its averages over coarser and coarser grids."""
        pooled = [resize(branch(x), x.shape[-2:]) for branch in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class LinearHead(nn.Module):
    """Batch normalisation, dropout of whole channels, a 1x1 convolution; several maps are concatenated.

    Args:
        widths: channels of each map.
        nb_classes: K.
        dropout: rate; 0.1 in DermINO's.
    """

    minimum_batch = 1

    def __init__(self, widths: Sequence[int], *, nb_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(sum(widths))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = _classifier(sum(widths), nb_classes)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps (B, widths[i], h_i, w_i), the finest first -> (B, K, h_0, w_0) logits."""
        x = torch.cat([resize(x, maps[0].shape[-2:]) for x in maps], dim=1)
        return self.conv_seg(self.dropout(self.bn(x)))
