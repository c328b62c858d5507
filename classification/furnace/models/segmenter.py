"""Segmenters: a head on the feature maps of any backbone of the registry.

The state dict has ``backbone.`` (timm's names), ``neck.`` (the feature pyramid of plain transformers) and
``decode_head.``; ``segmentation_files`` reads and describes files of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import nn

from furnace.models import build_architecture, create_backbone, dermino, entry_of, panderm
from furnace.models.loading import resample_positions
from furnace.models.segmentation_heads import FeaturePyramid, LinearHead, UPerHead, resize
from furnace.runtime.files import UserError
from furnace.runtime.seeding import seeded

HEADS = ("upernet", "linear")
PUBLISHED = (*panderm.default_cfgs, *dermino.default_cfgs)  # their UPerNet is as wide as the backbone
PUBLISHED_TAPS = {24: (7, 11, 15, 23)}  # depth: blocks; PanDerm's, not evenly spaced
CHANNELS = 256


class SegmentationModel(nn.Module):
    """``(B, 3, H, W) -> (B, K, H, W)`` logits.

    Args:
        backbone: a timm model without a head; what no tap needs is cut off.
        head: upernet or linear.
        nb_classes: K.
        input_size: (H, W) in pixels. Networks without a table of positions take other sizes, too.
        taps: blocks of a plain transformer, or levels of a network with a pyramid of its own, counted from 0; None
            takes ``default_taps``.
        channels: C inside the UPerNet head.
        pool_scales: of the UPerNet head.
        dropout: before the last layer.
        pyramid: bring the four taps of a plain transformer to x4, x2, x1, x0.5 before the UPerNet head; False leaves
            them at one resolution, as DermINO does.
        seed: of neck and head.

    Attributes:
        recipe: plain values from which ``build_segmenter`` makes the same network.
        classifier_names: the parameters of neck and head.
        plain: the backbone has one resolution; its taps go through its final norm.
        minimum_batch: images that a training step needs on one device.

    Raises:
        UserError: a size, tap or head that does not suit the backbone.
    """

    def __init__(self, backbone: nn.Module, *, head: str, nb_classes: int, input_size: Sequence[int],
                 taps: Sequence[int] | None = None, channels: int | None = None,
                 pool_scales: Sequence[int] = (1, 2, 3, 6), dropout: float = 0.0, pyramid: bool = True,
                 seed: int = 0) -> None:
        super().__init__()
        if head not in HEADS:
            raise UserError(f"--head {head!r} is unknown: use {' or '.join(HEADS)}")
        if nb_classes < 2:
            raise UserError(f"a segmenter needs at least two classes (background is one), not {nb_classes}")
        levels = feature_levels(backbone, input_size)
        self.input_size = tuple(input_size)
        self.plain = len({level[1:] for level in levels}) == 1
        self.taps = _checked_taps(taps, levels, head=head)
        self._wanted = sorted(set(self.taps))  # timm returns each block once, in its own order
        self.backbone = _cut(backbone, self._wanted, plain=self.plain)
        widths = [levels[tap][0] for tap in self.taps]
        pyramid = pyramid and self.plain and head == "upernet"
        if pyramid and (len(widths) != 4):
            raise UserError(f"the pyramid of a plain transformer has four levels, but {len(widths)} taps were given: "
                            "give four, or leave the pyramid out")
        with seeded("segmentation head", seed):
            self.neck = FeaturePyramid(widths[0]) if pyramid else None
            if head == "upernet":
                channels = channels or CHANNELS
                self.decode_head = UPerHead(widths, channels=channels, nb_classes=nb_classes, pool_scales=pool_scales,
                                            dropout=dropout)
            else:
                self.decode_head = LinearHead(widths, nb_classes=nb_classes, dropout=dropout)
        self.classifier_names = tuple(name for name, _ in self.named_parameters() if not name.startswith("backbone."))
        self.minimum_batch = self.decode_head.minimum_batch
        self.recipe = {"backbone": backbone.recipe, "head": head, "nb_classes": nb_classes,
                       "input_size": list(self.input_size), "taps": list(self.taps), "channels": channels,
                       "pool_scales": list(pool_scales), "dropout": dropout, "pyramid": pyramid}

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) -> for each level a map (B, width, h, w), as the head sees it."""
        if self.plain and tuple(x.shape[-2:]) != self.input_size:
            raise ValueError(f"images of {tuple(x.shape[-2:])} for a segmenter of {self.input_size}: resize them, or "
                             "the segmenter (resize_segmenter)")
        maps = self.backbone.forward_intermediates(x, indices=self._wanted, norm=self.plain, output_fmt="NCHW",
                                                   intermediates_only=True)
        maps = [maps[self._wanted.index(tap)] for tap in self.taps]
        return maps if self.neck is None else self.neck(maps)

    def forward_low(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, K, h, w) logits at the head's own resolution."""
        return self.decode_head(self.features(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, K, H, W) logits, float32 also under autocast."""
        return resize(self.forward_low(x).float(), x.shape[-2:])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The backbone's activations are computed again in the backward pass instead of kept."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """timm's list for the backbone: class token, positions, ..."""
        return {f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Layers for timm's layer decay: the backbone's as in a classifier, neck and head the last one."""
        numbers = group_parameters(self.backbone, self.backbone.group_matcher(coarse=coarse), reverse=True)
        return lambda name: float(numbers.get(name.removeprefix("backbone."), "inf"))


# ------------------------------------------------------------------------------------------------------- the backbone

@torch.no_grad()
def feature_levels(backbone: nn.Module, input_size: Sequence[int]) -> list[tuple[int, int, int]]:
    """(width, rows, columns) of each map that a backbone gives, found with one black image.

    Raises:
        UserError: it gives no maps, or not at this size.
    """
    name = backbone.recipe["architecture"]
    if not hasattr(backbone, "forward_intermediates"):
        raise UserError(f"--model {name} gives no feature maps in timm {timm.__version__}: take another architecture")
    height, width = input_size
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    for side, step in zip(input_size, timm.layers.to_2tuple(patch or 1), strict=True):
        if side % step or side < 1:
            near = sorted({max(side // step, 1) * step, (max(side, 0) // step + 1) * step})
            raise UserError(f"--size {height} x {width} does not suit {name}: {side} is no multiple of its patch size "
                            f"{step}; take {' or '.join(map(str, near))}")
    try:
        maps = backbone.forward_intermediates(torch.zeros(1, 3, height, width), intermediates_only=True)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--size {height} x {width} does not suit {name} ({error})") from error
    return [(x.shape[1], x.shape[2], x.shape[3]) for x in maps]


def default_taps(levels: Sequence[tuple[int, int, int]], *, head: str) -> tuple[int, ...]:
    """Where a head looks at the backbone unless it is told.

    A linear head: at the end. UPerNet on a plain transformer: after each quarter of the blocks (of 12: 2, 5, 8, 11;
    of 24 PanDerm's 7, 11, 15, 23); on a network with a pyramid of its own: at the end of each of the last four
    resolutions.

    Args:
        levels: from ``feature_levels``.
        head: upernet or linear.
    """
    depth = len(levels)
    if head == "linear":
        return (depth - 1,)
    if len({level[1:] for level in levels}) == 1:
        return PUBLISHED_TAPS.get(depth) or tuple(max(-(-quarter * depth // 4) - 1, 0) for quarter in range(1, 5))
    ends = [i for i in range(depth) if i + 1 == depth or levels[i][1:] != levels[i + 1][1:]]
    return tuple(ends[-4:])


def _checked_taps(taps: Sequence[int] | None, levels: Sequence[tuple[int, int, int]], *, head: str
                  ) -> tuple[int, ...]:
    """The taps, each of a level that is there, from fine to coarse."""
    taps = tuple(taps) if taps else default_taps(levels, head=head)
    if any(not 0 <= tap < len(levels) for tap in taps) or list(taps) != sorted(taps):
        raise UserError(f"taps {', '.join(map(str, taps))} do not suit the backbone: it has {len(levels)} levels, "
                        f"counted from 0 to {len(levels) - 1}; give them in rising order")
    return taps


def _cut(backbone: nn.Module, wanted: list[int], *, plain: bool) -> nn.Module:
    """Leave out what no tap needs: parameters without a gradient would stall a distributed training."""
    behind = getattr(backbone, "fc_norm", None)
    if plain and isinstance(getattr(backbone, "norm", None), nn.Identity) and isinstance(behind, nn.Module):
        # forms that average the tokens have the pretrained final norm behind the pooling; here it is before
        backbone.norm, backbone.fc_norm = behind, nn.Identity()
    backbone.prune_intermediate_layers(wanted, prune_norm=not plain, prune_head=True)
    return backbone


# ------------------------------------------------------------------------------------------------------------- making

def create_segmenter(name: str, checkpoint: str | Path | None = None, *, head: str = "upernet", nb_classes: int = 2,
                     input_size: int | Sequence[int] = 224, taps: Sequence[int] | None = None,
                     channels: int | None = None, pool_scales: Sequence[int] = (1, 2, 3, 6), drop_path: float = 0.0,
                     dropout: float = 0.0, pyramid: bool = True, seed: int = 0,
                     model_keys: Sequence[str] | None = None, prefix: str = "") -> SegmentationModel:
    """Build a backbone with its weights and a fresh segmentation head, in eval mode.

    Args:
        name: as for ``create_backbone``.
        checkpoint: as for ``create_backbone``; a head in the file is not used.
        head, nb_classes, taps, pool_scales, dropout, pyramid: see ``SegmentationModel``.
        input_size: side, or (height, width), in pixels; a multiple of the patch size. Positions are resampled.
        channels: C inside UPerNet; None: as wide as the backbone for PanDerm and DermINO, else 256.
        drop_path: highest rate of stochastic depth.
        seed: of the head, and of the backbone where it is random.
        model_keys: keys under which the file may hold its state dict.
        prefix: what stands before the backbone's keys in the file; "" finds it.

    Returns:
        The model, with ``provenance`` (of the backbone) besides its own attributes.

    Raises:
        UserError: see ``create_backbone`` and ``SegmentationModel``.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    # the registry builds squares; at a backbone's own size its positions are resampled once, not twice
    side = size[0] if size[0] == size[1] else entry_of(name).size
    options = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        backbone = create_backbone(name, checkpoint, input_size=side, seed=seed, options=options,
                                   model_keys=model_keys, prefix=prefix)
    except UserError as error:
        if type(error) is UserError and str(error).startswith("--input_size"):
            raise UserError(str(error).replace("--input_size", "--size", 1)) from error
        raise
    provenance = backbone.provenance
    if name in PUBLISHED:
        channels = channels or backbone.num_features
    model = SegmentationModel(backbone, head=head, nb_classes=nb_classes, input_size=(side, side), taps=taps,
                              channels=channels, pool_scales=pool_scales, dropout=dropout, pyramid=pyramid, seed=seed)
    model.provenance = provenance
    return resize_segmenter(model.eval(), size)


def build_segmenter(recipe: dict[str, Any]) -> SegmentationModel:
    """The network of a recipe, without its weights, in eval mode.

    Raises:
        UserError: this version of timm cannot build it.
    """
    parts = dict(recipe)
    of_backbone = parts.pop("backbone")
    backbone = build_architecture(of_backbone["architecture"], of_backbone["arguments"])
    backbone.recipe = of_backbone
    return SegmentationModel(backbone, **parts).eval()


def resize_segmenter(model: SegmentationModel, input_size: int | Sequence[int]) -> SegmentationModel:
    """The same segmenter for images of another size, its positions resampled.

    Args:
        model: in any mode of tuning but with LoRA.
        input_size: side, or (height, width), in pixels.

    Returns:
        ``model`` itself when it is of that size, else another one, in eval mode.

    Raises:
        UserError: the size does not suit, or positions that depend on it cannot be resampled.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if size == model.input_size:
        return model
    recipe = dict(model.recipe, input_size=list(size))
    arguments = recipe["backbone"]["arguments"]
    if "img_size" in arguments:
        recipe["backbone"] = dict(recipe["backbone"], arguments=dict(arguments, img_size=list(size)))
    other = build_segmenter(recipe)
    bare = {key.removeprefix("backbone."): value for key, value in model.state_dict().items()
            if key.startswith("backbone.")}
    bare, _ = resample_positions(bare, other.backbone, other.backbone.state_dict(),
                                 grid=getattr(getattr(model.backbone, "patch_embed", None), "grid_size", None))
    unfit = [key for key, value in other.backbone.state_dict().items() if bare[key].shape != value.shape]
    if unfit:
        raise UserError(f"a segmenter of {model.input_size[0]} x {model.input_size[1]} pixels cannot be brought to "
                        f"{size[0]} x {size[1]}: {unfit[0]} belongs to its size; keep that size")
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    other.load_state_dict({**rest, **{f"backbone.{key}": value for key, value in bare.items()}})
    config = dict(model.provenance.data_config, input_size=[3, *size])
    other.provenance = dataclasses.replace(model.provenance, data_config=config)
    return other
