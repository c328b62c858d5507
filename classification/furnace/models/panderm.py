"""PanDerm's vision transformers (ViT-B/16 and ViT-L/16 as in BEiT/CAE) on timm's ``Beit``.

``PanDerm_{Base,Large}_LP``: the frozen feature extractor of the published linear evaluation; its feature is the class
token after the final LayerNorm. ``PanDerm_{Base,Large}_FT``: the published fine-tuning form, with relative position
biases in every block and ``fc_norm`` on the mean of the patch tokens.

Source: Yan et al., "A multimodal vision foundation model for clinical dermatology", Nature Medicine 2025.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.beit import Beit

from furnace.models.loading import RELATIVE_TABLE, LoadRules

# The published evaluation: shorter side to 256 (bilinear), centre crop 224. The first std is 0.228 and not ImageNet's
# 0.229: the published numbers were made with it, so it is kept.
PANDERM_EVAL = {"input_size": (3, 224, 224), "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bilinear",
                "mean": (0.485, 0.456, 0.406), "std": (0.228, 0.224, 0.225)}

SIZES = {"Base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
         "Large": {"embed_dim": 1024, "depth": 24, "num_heads": 16}}
FORMS = {"LP": {"global_pool": "token", "use_rel_pos_bias": False},
         "FT": {"global_pool": "avg", "use_rel_pos_bias": True}}


def sincos_positions(dim: int, grid: tuple[int, int], temperature: float = 10000.0) -> torch.Tensor:
    """The fixed 2-D sin-cos table of PanDerm's pretraining.

    Args:
        dim: channels D, a multiple of 4. The quarters are sin and cos of the row, then sin and cos of the column.
        grid: rows and columns of patches.

    Returns:
        (1, 1 + rows * columns, D); row 0, the class token's, is zero.
    """
    frequencies = temperature ** (-torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0], dtype=torch.float32),
                                   torch.arange(grid[1], dtype=torch.float32), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies[None, :] for axis in (rows, columns)]  # 2 x (patches, D / 4)
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)  # (patches, D)
    return torch.cat([torch.zeros(1, dim), table])[None]


class PanDerm(Beit):
    """timm's Beit with PanDerm's frozen sin-cos positions. ``(B, 3, 224, 224) -> (B, D)`` with ``num_classes=0``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pos_embed.data.copy_(sincos_positions(self.embed_dim, self.patch_embed.grid_size))
        self.pos_embed.requires_grad = False

    @property
    def load_rules(self) -> LoadRules:
        """A norm behind the pooling takes the pretrained final norm; relative positions start at zero."""
        behind = not isinstance(self.fc_norm, torch.nn.Identity)
        relative = self.blocks[0].attn.relative_position_bias_table is not None
        return LoadRules(rename={"norm.": "fc_norm."} if behind else {}, may_miss=(RELATIVE_TABLE,) if relative else ())


def _create_panderm(variant: str, pretrained: bool, **kwargs: Any) -> PanDerm:
    _, size, form = variant.split("_")
    arguments = {"patch_size": 16, "init_values": 0.1, "use_abs_pos_emb": True, **SIZES[size], **FORMS[form], **kwargs}
    return build_model_with_cfg(PanDerm, variant, pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"},
                                **arguments)


default_cfgs = generate_default_cfgs({
    f"PanDerm_{size}_{form}": {"url": "", "num_classes": 0, "fixed_input_size": True, "first_conv": "patch_embed.proj",
                               "classifier": "head", "license": "cc-by-nc-nd-4.0", **PANDERM_EVAL}
    for size in SIZES for form in FORMS
})


@register_model
def PanDerm_Base_LP(pretrained: bool = False, **kwargs: Any) -> PanDerm:
    """ViT-B/16, class token after the final norm, 768 features."""
    return _create_panderm("PanDerm_Base_LP", pretrained, **kwargs)


@register_model
def PanDerm_Base_FT(pretrained: bool = False, **kwargs: Any) -> PanDerm:
    """ViT-B/16, relative positions, mean of the patch tokens, 768 features."""
    return _create_panderm("PanDerm_Base_FT", pretrained, **kwargs)


@register_model
def PanDerm_Large_LP(pretrained: bool = False, **kwargs: Any) -> PanDerm:
    """ViT-L/16, class token after the final norm, 1024 features."""
    return _create_panderm("PanDerm_Large_LP", pretrained, **kwargs)


@register_model
def PanDerm_Large_FT(pretrained: bool = False, **kwargs: Any) -> PanDerm:
    """ViT-L/16, relative positions, mean of the patch tokens, 1024 features."""
    return _create_panderm("PanDerm_Large_FT", pretrained, **kwargs)
