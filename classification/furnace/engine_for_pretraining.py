"""Hybrid pretraining: the training step and the evaluation. The loop around them is ``runtime.trainer.fit``."""

import logging
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from furnace.data.datasets import build_loader, refuse_broken
from furnace.data.manifest import Manifest
from furnace.data.multicrop import MultiCropBatch
from furnace.data.transforms import build_transform
from furnace.evaluation.features import NotFiniteError, extract_features
from furnace.evaluation.knn import knn_probabilities, nearest_neighbours
from furnace.models.dino import DinoModel
from furnace.models.ssl_losses import (
    assignment_entropies,
    dino_loss,
    feature_rank,
    ibot_loss,
    koleo_loss,
    mask_weights,
    masked_bce,
    sinkhorn,
    weighted_sum,
)
from furnace.runtime import distributed
from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

PARTS = ("dino", "ibot", "koleo", "label")  # of the objective, by the names of the schedules <part>_weight
NEIGHBOURS = 20  # of the k-NN after an epoch


def make_step(manifest: Manifest, teacher: Callable[[], DinoModel], *, device: torch.device
              ) -> Callable[..., tuple[torch.Tensor, float, dict[str, float]]]:
    """The training step of ``trainer.fit``: the teacher's targets, the student's outputs, the objective.

    L = w_dino L_dino + w_ibot L_ibot + w_koleo (KoLeo of view 1 + KoLeo of view 2) + w_label L_label, each weight a
    schedule; DermINO's are 1, 1, 0.1, 1. What is logged under a part's name is its weighted share, so that the parts
    sum to the loss.

    Args:
        manifest: the training images, to name one that breaks.
        teacher: gives the moving average of the model.
        device: of the model.
    """
    def step(model: nn.Module, batch: MultiCropBatch, values: Mapping[str, float]
             ) -> tuple[torch.Tensor, float, dict[str, float]]:
        if batch.broken:
            refuse_broken(manifest, batch.broken)
        crops, masks = batch.globals.to(device, non_blocking=True), batch.masks.to(device, non_blocking=True)
        local = None if batch.locals is None else batch.locals.to(device, non_blocking=True)
        of_classes, of_patches = teacher().targets(crops, masks)
        temperature = values["teacher_temperature"]
        assigned = sinkhorn(of_classes.flatten(0, 1), temperature=temperature).unflatten(0, of_classes.shape[:2])
        patches_assigned = sinkhorn(of_patches, temperature=temperature)
        out = model(crops, masks, local)
        parts = {"dino": dino_loss(out.dino, assigned),
                 "ibot": ibot_loss(out.ibot, patches_assigned, mask_weights(masks.flatten(0, 1)),
                                   crops=masks.shape[0] * masks.shape[1]),
                 "koleo": koleo_loss(out.classes[0]) + koleo_loss(out.classes[1])}
        if out.labels is not None:
            parts["label"] = masked_bce(out.labels, batch.targets.to(device, non_blocking=True),
                                        batch.known.to(device, non_blocking=True))
        total, logs = weighted_sum(parts, {name: values[f"{name}_weight"] for name in parts})
        spread = assignment_entropies((of_classes.flatten(0, 1).float() / temperature).softmax(dim=1))
        images = len(batch.indices)
        return images * total, images, {**logs, **{f"teacher_{name}": value for name, value in spread.items()}}

    return step


def make_evaluate(gallery: Manifest | None, queries: Manifest, *, classes: int, device: torch.device, amp_dtype: str,
                  num_workers: int | None, due: Callable[[], bool], batch_size: int = 64
                  ) -> Callable[[nn.Module], dict[str, float]]:
    """The evaluation of ``trainer.fit``: what the teacher's class tokens are worth so far.

    Weighted k-NN with 20 neighbours and temperature 0.07 (Caron et al., DINO, 2021) of the queries among the gallery,
    both through the backbone's own evaluation transform at the size of the global crops; and the effective rank of
    the queries' features (RankMe).

    Args:
        gallery: labelled images; None leaves the k-NN out.
        queries: labelled images of which the metrics are; without a gallery any images.
        classes: of the labels.
        device: of the model.
        amp_dtype: bf16, fp16 or fp32.
        num_workers: decoding processes.
        due: whether this epoch is evaluated; where not, all values are NaN.
        batch_size: images per batch at most.
    """
    def evaluate(model: DinoModel) -> dict[str, float]:
        names = ["feature_rank"] if gallery is None else ["knn_acc", "knn_bacc", "feature_rank"]
        if not due():
            return dict.fromkeys(names, math.nan)
        images = queries if gallery is None else gallery.join(queries)
        loader = build_loader(images, build_transform(model.backbone), batch_size=batch_size, num_workers=num_workers,
                              device=device)
        try:
            features = extract_features(model.backbone, loader, device=device, amp_dtype=amp_dtype,
                                        description="evaluation")
        except NotFiniteError as error:
            raise UserError(f"the training has diverged: {str(error).rpartition(' (')[0]}. Take a lower --base_lr, "
                            "--clip_grad 1.0, a longer warm-up, or --amp_dtype fp32, with --overwrite") from error
        return distributed.on_main(lambda: _judge(features.embeddings, gallery, queries, classes))

    return evaluate


def _judge(embeddings: np.ndarray, gallery: Manifest | None, queries: Manifest, classes: int) -> dict[str, float]:
    """(N, D) features of the gallery, then of the queries, to metrics."""
    first = 0 if gallery is None else len(gallery)
    rank = {"feature_rank": feature_rank(torch.from_numpy(embeddings[first:]))}
    if gallery is None:
        return rank
    train, asked = embeddings[:first], embeddings[first:]
    indices, similarities = nearest_neighbours(train, asked, min(NEIGHBOURS, first))
    predicted = knn_probabilities(indices, similarities, gallery.labels, nb_classes=classes).argmax(axis=1)
    right = predicted == queries.labels
    recalls = [right[queries.labels == label].mean() for label in np.unique(queries.labels)]
    return {"knn_acc": float(right.mean()), "knn_bacc": float(np.mean(recalls)), **rank}
