"""DermINO's ViT-B/14 on timm's DINOv2 models, with and without register tokens.

The feature is the class token after the final norm, the one that DermINO's own downstream evaluation uses.

Source: Xu et al., "DermINO: Hybrid Pretraining for a Versatile Dermatology Foundation Model", arXiv 2508.12190.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

# Resize 256 bicubic, centre crop 224, ImageNet statistics: the evaluation of its downstream code.
DERMINO_EVAL = {"input_size": (3, 224, 224), "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic",
                "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
VIT_BASE_14 = {"patch_size": 14, "embed_dim": 768, "depth": 12, "num_heads": 12, "init_values": 1e-5,
               "global_pool": "token"}
FORMS = {"DermINO_Base": {}, "DermINO_Base_reg4": {"reg_tokens": 4, "no_embed_class": True}}


def _create_dermino(variant: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    arguments = {**VIT_BASE_14, **FORMS[variant], **kwargs}
    return build_model_with_cfg(VisionTransformer, variant, pretrained,
                                feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **arguments)


default_cfgs = generate_default_cfgs({
    name: {"url": "", "num_classes": 0, "fixed_input_size": True, "first_conv": "patch_embed.proj",
           "classifier": "head", **DERMINO_EVAL}
    for name in FORMS
})


@register_model
def DermINO_Base(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B/14, class token after the final norm, 768 features."""
    return _create_dermino("DermINO_Base", pretrained, **kwargs)


@register_model
def DermINO_Base_reg4(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B/14 with four register tokens, class token after the final norm, 768 features."""
    return _create_dermino("DermINO_Base_reg4", pretrained, **kwargs)
