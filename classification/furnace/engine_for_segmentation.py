"""Segmentation of lesions: the training step and the evaluation. The loop around them is ``runtime.trainer.fit``."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from furnace.data.datasets import refuse_broken
from furnace.data.joint_transforms import IGNORED
from furnace.data.segmentation import SegmentationManifest
from furnace.data.segmentation_datasets import SegmentationBatch, read_mask
from furnace.evaluation.features import NotFiniteError
from furnace.evaluation.lesion_masks import Masking, lesion_masks
from furnace.evaluation.segmentation_metrics import COUNTS, confusion_counts, overlap_means
from furnace.runtime import distributed
from furnace.runtime.files import UserError

MONITORS = ("jaccard", "dice", "threshold_jaccard", "pooled_dice", "pooled_jaccard")  # of val
SMOOTH = 1.0  # pixel, of the Dice loss: an image without lesion has a gradient, too


def make_step(manifest: SegmentationManifest, *, device: torch.device, dice_weight: float
              ) -> Callable[..., tuple[torch.Tensor, float, dict[str, float]]]:
    """The training step of ``trainer.fit``: forward pass and loss.

    Args:
        manifest: the training images, to name one that breaks.
        device: of the model.
        dice_weight: of the Dice loss beside cross-entropy; 0 leaves it out.
    """
    def step(model: nn.Module, batch: SegmentationBatch, values: dict[str, float]
             ) -> tuple[torch.Tensor, float, dict[str, float]]:
        if batch.broken:
            refuse_broken(manifest, batch.broken)
        images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
        loss = segmentation_loss(model(images), batch.masks.to(device, non_blocking=True), dice_weight=dice_weight)
        return loss, len(batch.indices), {}

    return step


def segmentation_loss(logits: torch.Tensor, masks: torch.Tensor, *, dice_weight: float = 1.0) -> torch.Tensor:
    """The sum over a batch of each image's cross-entropy, mean over its pixels, plus its weighted Dice loss.

    Dice loss: 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), p the softmax of the lesion, over the image's pixels (soft
    Dice of Milletari et al., V-Net, 2016, without squares). Pixels without truth count in neither.

    Args:
        logits: (B, 2, H, W).
        masks: (B, H, W) int64 of 0, 1 and IGNORED.
        dice_weight: 0 is the published loss of PanDerm and DermINO.
    """
    logits = logits.float()
    known = masks != IGNORED
    entropy = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="none").sum(dim=(1, 2))
    loss = entropy / known.sum(dim=(1, 2)).clamp(min=1)
    if dice_weight:
        lesion, truth = logits.softmax(dim=1)[:, 1] * known, masks == 1
        overlap, area = (lesion * truth).sum(dim=(1, 2)), lesion.sum(dim=(1, 2)) + truth.sum(dim=(1, 2))
        loss = loss + dice_weight * (1 - (2 * overlap + SMOOTH) / (area + SMOOTH))
    return loss.sum()


def make_evaluate(manifest: SegmentationManifest, how: Masking) -> Callable[[nn.Module], dict[str, float]]:
    """The evaluation of ``trainer.fit``: ``overlap_means`` of the val images, every mask at its own size.

    Args:
        manifest: the val images.
        how: how masks are made.
    """
    def evaluate(model: nn.Module) -> dict[str, float]:
        try:
            counts = [(index, [confusion_counts(mask, read_mask(manifest, index))[name]
                               for name in COUNTS])
                      for index, mask in lesion_masks(model, manifest, how, description="val")]
        except NotFiniteError as error:
            raise UserError(f"the training has diverged: {str(error).rpartition(' (')[0]}. Take a lower --lr, "
                            "--clip_grad 1.0, a longer warm-up, or --amp_dtype fp32, with --overwrite") from error
        return overlap_means(np.array([row for _, row in sorted(distributed.gather_lists(counts))]))

    return evaluate
