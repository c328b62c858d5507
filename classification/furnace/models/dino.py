"""Student and teacher of hybrid pretraining: a plain vision transformer, a DINO head, an iBOT head, a label head.

The teacher is a copy of the student that ``runtime.trainer`` moves along as an exponential moving average, heads
included. Both look at a picture through ``DinoModel.tokens``, which takes crops of any size and masked patches.

Source: Oquab et al., "DINOv2", 2023; Zhou et al., "iBOT", 2022; Xu et al., "DermINO", arXiv 2508.12190.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed
from timm.models import checkpoint_seq
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from furnace.models.loading import resample_abs_positions
from furnace.models.prototypes import PrototypeHead
from furnace.runtime.files import UserError

OFFSET = 0.1  # of DINOv2's resampled positions, see ``resample_abs_positions``
LABEL_HEAD = "label_head."


class Outputs(NamedTuple):
    """What the losses need; V views of B images, M masked patches, K prototypes, C classes.

    Attributes:
        dino: (V, B, K) logits of the DINO head, the two global views first.
        ibot: (M, K) logits of the iBOT head for the masked patches, in the order of ``masks``.
        classes: (2, B, D) class tokens of the global views after the final norm, before any head.
        labels: (2, B, C) logits, None without a label head.
    """

    dino: torch.Tensor
    ibot: torch.Tensor
    classes: torch.Tensor
    labels: torch.Tensor | None


class UnitPrototypes(nn.Module):
    """A linear layer whose rows have the length ``weight_g`` (weight normalisation), by DINO's tensor names."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        rows = nn.Linear(width, prototypes, bias=False).weight  # PyTorch's own start
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(rows.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., prototypes)."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v.float(), dim=1))


class DinoHead(nn.Module):
    """Three layers, a unit vector, prototypes: (..., D) -> (..., K). 23,138,560 numbers for 768 and DermINO's sizes."""

    def __init__(self, width: int, *, prototypes: int = 65536, hidden: int = 2048, bottleneck: int = 256) -> None:
        """Weights from a truncated normal of 0.02, biases 0.

        Args:
            width: D, of the backbone.
            prototypes: K.
            hidden: of the two inner layers.
            bottleneck: of the vector that is compared with the prototypes.
        """
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = UnitPrototypes(bottleneck, prototypes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., K) cosines times the prototypes' lengths."""
        return self.last_layer(F.normalize(self.mlp(x).float(), dim=-1, eps=1e-6))


class DinoModel(nn.Module):
    """Backbone and heads; called once per training step with all crops."""

    def __init__(self, backbone: nn.Module, *, prototypes: int = 65536, hidden: int = 2048, bottleneck: int = 256,
                 label_head: PrototypeHead | None = None) -> None:
        """See ``create_dino``."""
        super().__init__()
        width = backbone.num_features
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        sizes = {"prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck}
        self.dino_head, self.ibot_head = DinoHead(width, **sizes), DinoHead(width, **sizes)
        self.label_head = label_head

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token and registers."""
        return getattr(self.backbone, "num_prefix_tokens", 1)

    def tokens(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """The backbone's tokens after its final norm, for images of any size that its patches divide.

        Args:
            images: (B, 3, H, W).
            masks: (B, N) bool: patches that the mask token replaces before positions are added.

        Returns:
            (B, prefix + N, D).
        """
        vit = self.backbone
        x = vit.patch_embed.proj(images)  # (B, D, h, w)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # -> (B, N, D)
        x = getattr(vit.patch_embed, "norm", nn.Identity())(x)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        first = [token.expand(len(x), -1, -1) for token in (vit.cls_token, getattr(vit, "reg_token", None))
                 if token is not None]
        apart = getattr(vit, "no_embed_class", False)  # positions are of patches alone
        places = self.positions(grid, 0 if apart else self.prefix)
        x = torch.cat([*first, x + places], dim=1) if apart else torch.cat([*first, x], dim=1) + places
        x = vit.pos_drop(x)
        x = getattr(vit, "norm_pre", nn.Identity())(x)
        if getattr(vit, "grad_checkpointing", False) and self.training:
            x = checkpoint_seq(vit.blocks, x)
        else:
            for block in vit.blocks:
                x = block(x)
        return vit.norm(x)

    def positions(self, grid: tuple[int, int], prefix: int) -> torch.Tensor:
        """(1, prefix + h * w, D) the backbone's positions for a grid, resampled as DINOv2 does for small crops."""
        table = self.backbone.pos_embed
        if grid == tuple(self.backbone.patch_embed.grid_size):
            return table
        return resample_abs_positions(table, grid, prefix, tuple(self.backbone.patch_embed.grid_size), offset=OFFSET)

    def forward(self, global_crops: torch.Tensor, masks: torch.Tensor, local_crops: torch.Tensor | None = None
                ) -> Outputs:
        """The student: masked global crops and local crops.

        Args:
            global_crops: (2, B, 3, G, G), all of view 1, then all of view 2.
            masks: (2, B, N) bool.
            local_crops: (L, B, 3, l, l), or None.
        """
        images = global_crops.shape[1]
        flat = masks.flatten(0, 1)  # (2, B, N) -> (2B, N)
        tokens = self.tokens(global_crops.flatten(0, 1), flat)  # (2B, P + N, D)
        classes = tokens[:, 0]
        views = [classes]
        if local_crops is not None:
            views.append(self.tokens(local_crops.flatten(0, 1))[:, 0])  # (L * B, D), one pass for all of them
        dino = self.dino_head(torch.cat(views))  # ((2 + L) * B, K)
        classes = classes.unflatten(0, (2, images))
        return Outputs(dino=dino.unflatten(0, (-1, images)), ibot=self.ibot_head(tokens[:, self.prefix:][flat]),
                       classes=classes, labels=None if self.label_head is None else self.label_head(classes))

    @torch.no_grad()
    def targets(self, global_crops: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher: logits of whole global crops, and of those patches that the student sees masked.

        Args:
            global_crops: (2, B, 3, G, G).
            masks: (2, B, N) bool.

        Returns:
            (2, B, K) of the DINO head, in the crops' order, and (M, K) of the iBOT head.
        """
        images, flat = global_crops.shape[1], masks.flatten(0, 1)
        tokens = self.tokens(global_crops.flatten(0, 1))
        dino = self.dino_head(tokens[:, 0]).unflatten(0, (2, images))
        return dino, self.ibot_head(tokens[:, self.prefix:][flat])


def create_dino(backbone: nn.Module, *, name: str, prototypes: int = 65536, hidden: int = 2048, bottleneck: int = 256,
                label_head: PrototypeHead | None = None, drop_path: float = 0.0, seed: int = 0) -> DinoModel:
    """Put heads on a backbone.

    Args:
        backbone: from ``create_backbone``, at the size of the global crops.
        name: the user's, for messages.
        prototypes: of the DINO and the iBOT head, each.
        hidden: of the heads.
        bottleneck: of the heads.
        label_head: over the class token.
        drop_path: the same rate in all blocks, of the student (a module in eval mode has none).
        seed: of the heads' start.

    Raises:
        UserError: not a plain vision transformer with a class token and absolute positions.
    """
    require_plain(backbone, name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = DinoModel(backbone, prototypes=prototypes, hidden=hidden, bottleneck=bottleneck, label_head=label_head)
    for block in backbone.blocks:
        for part in ("drop_path1", "drop_path2"):
            setattr(block, part, DropPath(drop_path) if drop_path else nn.Identity())
    return model


def require_plain(backbone: nn.Module, name: str) -> None:
    """Refuse what cannot be masked and cropped this way.

    Raises:
        UserError: not a plain vision transformer with a class token and absolute positions.
    """
    fault = None
    if not isinstance(backbone, VisionTransformer | Beit):
        fault = f"is a {type(backbone).__name__}"
    elif getattr(backbone, "cls_token", None) is None:
        fault = "has no class token"
    elif getattr(backbone, "dist_token", None) is not None:
        fault = "has a distillation token"
    elif not isinstance(backbone.patch_embed, PatchEmbed):
        fault = f"embeds its patches by {type(backbone.patch_embed).__name__}"
    elif not all(hasattr(block, part) for block in backbone.blocks for part in ("attn", "drop_path1", "drop_path2")):
        fault = f"has blocks of another kind ({type(backbone.blocks[0]).__name__})"
    elif getattr(backbone, "pos_embed", None) is None or any(
            getattr(block.attn, "rel_pos_bias", None) is not None
            or getattr(block.attn, "relative_position_bias_table", None) is not None for block in backbone.blocks):
        fault = "has no absolute positions alone, which crops of several sizes need"
    elif not isinstance(backbone.norm, nn.LayerNorm):
        fault = "pools its patches before the final norm"
    elif not isinstance(getattr(backbone, "norm_pre", nn.Identity()), nn.Identity | nn.LayerNorm):
        fault = "has another first norm"
    if fault:
        raise UserError(f"--model {name} {fault}: hybrid pretraining is for plain vision transformers with a class "
                        "token, e.g. timm:vit_small_patch16_224, timm:vit_base_patch14_dinov2.lvd142m, DermINO_Base or "
                        "PanDerm_Base_LP")


# ----------------------------------------------------------------------------------------------------------- training

def parameter_groups(model: DinoModel, *, layer_decay: float = 1.0, patch_embed_scale: float = 0.2
                     ) -> list[dict[str, Any]]:
    """Groups of the student's trainable parameters, as DINOv2 has them.

    Rates: ``layer_decay`` ** (depth + 1 - layer), layer 0 the embeddings and tokens, 1 the first block, depth + 1 the
    final norm and the heads; patches are embedded at ``patch_embed_scale`` of that. The heads' last layers follow the
    schedule ``last_layer_lr``, the label head ``prototype_lr``. Biases, norms and layer scales have no weight decay;
    class token, positions and mask token have. The gradients of backbone and heads are clipped apart.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    depth = len(model.backbone.blocks)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        schedule, scale = "lr", 1.0
        if name.startswith(LABEL_HEAD):
            schedule = "prototype_lr"
        elif ".last_layer." in name:
            schedule = "last_layer_lr"
        elif not name.startswith(("dino_head.", "ibot_head.")):
            scale = layer_decay ** (depth + 1 - _layer_of(name, depth))
            scale *= patch_embed_scale if ".patch_embed." in name else 1.0
        decays = not (name.endswith("bias") or "norm" in name or "gamma" in name or name.startswith(LABEL_HEAD))
        part = name.split(".")[0]
        clip = part if part.endswith("_head") else "backbone"
        group = groups.setdefault((clip, schedule, scale, decays), {
            "params": [], "names": [], "lr_schedule": schedule, "lr_scale": scale,
            "weight_decay_scale": float(decays), "clip_group": clip})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layer_of(name: str, depth: int) -> int:
    """0 for what comes before the blocks, 1 to depth for the blocks, depth + 1 after them."""
    if name == "mask_token":
        return 0
    part = name.split(".")[1:]  # without "backbone"
    if part[0] in ("cls_token", "reg_token", "pos_embed", "patch_embed"):
        return 0
    return int(part[1]) + 1 if part[0] == "blocks" else depth + 1
