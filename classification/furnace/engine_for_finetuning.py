"""Fine-tuning of a classifier: the training step, the evaluation, and test-time augmentation.

The loop around them is ``runtime.trainer.fit``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn

from furnace.data.datasets import Batch, build_loader, refuse_broken
from furnace.data.manifest import Manifest
from furnace.data.tta import TTAHandler as TTAHandler  # its views are in data/tta.py
from furnace.data.tta import ViewMean
from furnace.evaluation.features import NotFiniteError, extract_features
from furnace.evaluation.metrics import classification_metrics
from furnace.evaluation.multilabel import multilabel_metrics
from furnace.runtime import distributed
from furnace.runtime.files import UserError

MONITORS = ("acc", "recall", "auroc", "bacc", "loss")  # of val, by which the best epoch may be chosen


def make_step(manifest: Manifest, *, device: torch.device, smoothing: float = 0.0, mixup: Mixup | None = None,
              erasing: RandomErasing | None = None) -> Callable[..., tuple[torch.Tensor, float, dict[str, float]]]:
    """The training step of ``trainer.fit``: random erasing, mixup, forward pass, loss.

    Args:
        manifest: the training images; a batch names its images by their places in it.
        device: of the model.
        smoothing: of the labels, in [0, 1).
        mixup: timm's, which smooths the labels itself; not for several labels per image.
        erasing: timm's, over a batch on the device.
    """
    targets = torch.from_numpy(manifest.targets).to(device)  # (N,) int64, or (N, K) float32

    def step(model: nn.Module, batch: Batch, values: dict[str, float]) -> tuple[torch.Tensor, float, dict[str, float]]:
        if batch.broken:
            refuse_broken(manifest)
        images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
        wanted = targets[torch.tensor(batch.indices, device=device)]
        if erasing is not None:
            images = erasing(images)
        if mixup is not None:
            images, wanted = mixup(images, wanted)
        loss = classification_loss(model(images), wanted, smoothing=smoothing, multilabel=manifest.multilabel)
        return loss, len(batch.indices), {}

    return step


def classification_loss(logits: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0,
                        multilabel: bool = False) -> torch.Tensor:
    """The sum of a batch's losses, in float32, as published.

    Cross-entropy, with label smoothing for classes and as it is for the soft targets of mixup; for several labels per
    image the mean over the classes of binary cross-entropy, targets smoothed towards 0.5.

    Args:
        logits: (B, K).
        targets: (B,) int64 classes, (B, K) soft targets whose rows sum to 1, or (B, K) zeros and ones (multilabel).
        smoothing: in [0, 1).
        multilabel: whether an image may have several labels.
    """
    logits = logits.float()
    if multilabel:
        smooth = targets * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(dim=1).sum()
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    return -(targets * F.log_softmax(logits, dim=-1)).sum()


@dataclass(frozen=True)
class Predicted:
    """What a model says of the images of a manifest, in its order.

    Attributes:
        logits: (N, K) float32.
        probabilities: (N, K) float64; rows sum to 1, or, with several labels per image, each is of its own.
    """

    logits: np.ndarray
    probabilities: np.ndarray


def predict(model: nn.Module, manifest: Manifest, transform: Callable[..., torch.Tensor], *, device: torch.device,
            amp_dtype: str, batch_size: int, num_workers: int | None = None, seed: int | None = None,
            multilabel: bool = False, description: str = "predicting") -> Predicted | None:
    """Predict every image once; under torchrun the processes share them.

    Args:
        model: (B, 3, H, W) -> (B, K) logits.
        manifest: the images.
        transform: of an image; one that gives (V, 3, H, W) views has their logits averaged.
        device: where to run.
        amp_dtype: bf16, fp16 or fp32.
        batch_size: images, or views, per forward pass at most.
        num_workers: decoding processes; None picks.
        seed: of random views.
        multilabel: whether an image may have several labels: a sigmoid each instead of one softmax.
        description: of the progress bar.

    Returns:
        The predictions in the main process, None in others.
    """
    views = getattr(transform, "views", 1)
    loader = build_loader(manifest, transform, batch_size=max(1, batch_size // views), num_workers=num_workers,
                          device=device, seed=seed)
    found = extract_features(ViewMean(model), loader, device=device, amp_dtype=amp_dtype, description=description)
    if found is None:
        return None
    logits = torch.from_numpy(found.embeddings).double()
    probabilities = logits.sigmoid() if multilabel else logits.softmax(dim=1)
    return Predicted(found.embeddings, probabilities.numpy())


def make_evaluate(manifest: Manifest, transform: Callable[..., torch.Tensor], **how: Any
                  ) -> Callable[[nn.Module], dict[str, float]]:
    """The evaluation of ``trainer.fit``: metrics of the val images by the names of MONITORS, and some more.

    Args:
        manifest: the val images.
        transform: the evaluation's.
        **how: further arguments of ``predict``.
    """
    def evaluate(model: nn.Module) -> dict[str, float]:
        try:
            found = predict(model, manifest, transform, multilabel=manifest.multilabel, description="val", **how)
        except NotFiniteError as error:
            raise UserError(f"the training has diverged: {str(error).split('(')[0].strip()}. Take a lower --lr, "
                            "--clip_grad 1.0, a longer warm-up, or --amp_dtype fp32, with --overwrite") from error
        return distributed.on_main(lambda: val_metrics(manifest, found))

    return evaluate


def val_metrics(manifest: Manifest, found: Predicted) -> dict[str, float]:
    """loss (without smoothing), acc, bacc, recall, auroc, weighted_f1 (classes) or macro_f1 (several labels).

    ``auroc`` is one-vs-rest, as published for fine-tuning, and of class 1 when binary; ``recall`` is the mean over the
    classes, so equal to ``bacc`` for one class per image.
    """
    targets = manifest.targets
    loss = classification_loss(torch.from_numpy(found.logits), torch.from_numpy(targets),
                               multilabel=manifest.multilabel)
    values = {"loss": float(loss) / len(targets)}
    if manifest.multilabel:
        metrics = multilabel_metrics(targets, found.probabilities)
        names = {"acc": "acc", "bacc": "bacc", "recall": "sensitivity", "auroc": "auroc", "macro_f1": "macro_f1"}
    else:
        metrics = classification_metrics(targets, found.probabilities)
        names = {"acc": "acc", "bacc": "bacc", "recall": "bacc", "auroc": "auroc_ovr", "weighted_f1": "weighted_f1"}
    return values | {name: metrics[source] for name, source in names.items()}
