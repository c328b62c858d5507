"""Where a vision transformer looks: the attention of its last block, and pictures of it.

The maps show what the last block gathers from, not why a probe decided; they are a check for rulers, hairs and black
corners, no explanation.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from furnace.data.datasets import build_loader
from furnace.data.manifest import Manifest
from furnace.data.transforms import build_transform
from furnace.evaluation.features import Extraction
from furnace.evaluation.sheets import Tile, image_sheet
from furnace.runtime import files
from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

COLOURS = matplotlib.colormaps["viridis"]  # perceptually uniform, told apart with every kind of colour blindness
OPACITY = 0.55  # of the strongest attention; the lesion must stay visible
PAIRS = 4  # photograph and overlay, in a row of the sheet
WORKS = "it works for timm's VisionTransformer, Eva and Beit (PanDerm, DermINO, DINOv2, DINOv3)"


def require_attention(backbone: nn.Module) -> nn.Module:
    """The attention layer of the last block, for the architectures whose maps can be had.

    Raises:
        UserError: a CNN, or a transformer without one attention over all tokens.
    """
    if not isinstance(backbone, VisionTransformer | Eva | Beit):
        raise UserError(f"{type(backbone).__name__} has no attention from one token to all patches: {WORKS}")
    layer = getattr(backbone.blocks[-1], "attn", None)
    if not isinstance(getattr(layer, "attn_drop", None), nn.Dropout) or not hasattr(layer, "fused_attn"):
        raise UserError(f"the blocks of this {type(backbone).__name__} ({type(backbone.blocks[-1]).__name__}) have no "
                        f"plain attention: {WORKS} with ordinary blocks")
    return layer


@torch.no_grad()
def attention_maps(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Attention to each patch in the last block: that of the class token, without one the mean over the patches' own.

    It is softmax(Q K^T / sqrt(d) + bias) over all tokens, after which the class and register tokens' shares are cut
    off: a map sums to at most 1.

    Args:
        backbone: a VisionTransformer, Eva or Beit of timm, e.g. from ``create_backbone``; left as it was, also when an
            error occurs.
        images: (B, 3, H, W), transformed as for the backbone, on its device.

    Returns:
        (B, heads, h, w) float32, one value per patch.

    Raises:
        UserError: another architecture.
    """
    layer = require_attention(backbone)
    with _captured(backbone, layer) as seen:
        backbone(images)
    attention = seen[0].float()  # (B, heads, tokens, tokens), rows are queries
    prefix = backbone.num_prefix_tokens
    grid = tuple(backbone.patch_embed.dynamic_feat_size(tuple(images.shape[-2:])))
    if attention.shape[-1] != prefix + grid[0] * grid[1]:
        raise UserError(f"{type(backbone).__name__} attends to {attention.shape[-1]} tokens, not to {prefix} and a "
                        f"grid of {grid[0]} x {grid[1]} patches: {WORKS}")
    if attention.shape[1] != layer.num_heads:  # differential attention subtracts one softmax from another
        raise UserError(f"{type(layer).__name__} has {attention.shape[1]} softmaxes for {layer.num_heads} heads: "
                        f"{WORKS}")
    has_class_token = getattr(backbone, "cls_token", None) is not None
    rows = attention[:, :, 0] if has_class_token else attention[:, :, prefix:].mean(dim=2)
    return rows[..., prefix:].unflatten(-1, grid)  # (B, heads, h * w) -> (B, heads, h, w)


@contextlib.contextmanager
def _captured(backbone: nn.Module, layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What goes into the layer's dropout, the softmax; the layer computes it itself only where it is not fused."""
    seen: list[torch.Tensor] = []
    handle = layer.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fused, training = layer.fused_attn, backbone.training
    modes = {module: module.training for module in backbone.modules()} if training else {}
    layer.fused_attn = False
    backbone.eval()
    try:
        yield seen
    finally:
        handle.remove()
        layer.fused_attn = fused
        for module, mode in modes.items():
            module.training = mode


def seen_view(image: torch.Tensor, data_config: dict[str, Any]) -> Image.Image:
    """The resized and cropped picture that a backbone sees, from its (3, H, W) tensor."""
    mean, std = (torch.tensor(data_config[key], device=image.device)[:, None, None] for key in ("mean", "std"))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())  # (3, H, W) -> (H, W, 3)


def attention_overlay(image: Image.Image, attention: torch.Tensor | np.ndarray) -> Image.Image:
    """Lay the mean over the heads over a picture, in the colours of viridis from least to most of this picture.

    The strongest attention covers about half of the picture's own colour, the weakest nothing. Equal attention
    everywhere leaves the picture as it is.

    Args:
        image: RGB, the view that the backbone saw (``seen_view``).
        attention: (heads, h, w).

    Returns:
        RGB of the image's size.
    """
    values = np.asarray(torch.as_tensor(attention).float().cpu()).mean(axis=0)
    low, high = float(values.min()), float(values.max())
    values = (values - low) / (high - low) if high - low > 1e-12 else np.zeros_like(values)
    grid = Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    share = np.asarray(grid).clip(0, 1)[..., None]  # (H, W, 1)
    colour = COLOURS(share[..., 0])[..., :3] * 255
    opacity = OPACITY * share
    mixed = np.asarray(image.convert("RGB")) * (1 - opacity) + colour * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw_attention(folder: str | Path, backbone: nn.Module, manifest: Manifest, how: Extraction) -> list[Path]:
    """Overlays of a manifest's images, one PNG each, and sheet.png with photograph and overlay side by side.

    Args:
        folder: made when it is not there.
        backbone: from ``create_backbone``.
        manifest: the images to draw.
        how: device, batch size and transform; the forward pass is in fp32 here.

    Returns:
        The paths, the sheet last.

    Raises:
        UserError: an architecture without such maps, or files that cannot be decoded.
    """
    require_attention(backbone)
    folder, device = Path(folder), how.device
    loader = build_loader(manifest, build_transform(backbone, how.transform), batch_size=min(how.batch_size, 8),
                          num_workers=0, device=device)
    backbone = backbone.to(device)
    paths, pairs = [], []
    for batch in loader:
        if batch.broken:
            raise UserError("\n".join(f"{manifest.path_of(i)} cannot be decoded: {why}" for i, why in batch.broken))
        maps = attention_maps(backbone, batch.images.to(device))
        for image, attention, index in zip(batch.images, maps, batch.indices, strict=True):
            name = manifest.filenames[index]
            paths.append(folder / f"{index:04d}_{Path(name).stem[:100]}.png")
            with files.atomic_write(paths[-1]) as file:
                attention_overlay(seen_view(image, backbone.provenance.data_config), attention).save(file, "PNG")
            pairs.append([Tile(manifest.path_of(index), name), Tile(paths[-1], "attention")])
    rows = [sum(pairs[i:i + PAIRS], []) for i in range(0, len(pairs), PAIRS)]
    image_sheet(folder / "sheet.png", rows, title=f"Attention of the last block of {backbone.provenance.name}, mean "
                f"over heads, in the part of the picture that it sees")
    return [*paths, folder / "sheet.png"]
