"""Training a segmenter from a manifest: puts the parts together, for one seed and fold.

``segmentation/run.py`` calls it once, or once per seed and fold.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from furnace.data.joint_transforms import build_joint_transform, recipe_normalisation
from furnace.data.samplers import TrainSampler
from furnace.data.segmentation import SegmentationManifest
from furnace.data.segmentation_datasets import SegmentationBatch, build_segmentation_loader
from furnace.data.splits import take_percent
from furnace.engine_for_segmentation import make_evaluate, make_step
from furnace.evaluation.lesion_masks import Masking
from furnace.models.segmentation_files import segmenter_meta
from furnace.models.segmenter import SegmentationModel, create_segmenter
from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan, plan_batches
from furnace.runtime.files import UserError
from furnace.runtime.precision import pick_device
from furnace.runtime.run_directory import RunDirectory
from furnace.training import Trained, TrainingOptions, folds_of, prepare_model, train, with_drop_path

logger = logging.getLogger(__name__)

# What a recipe means for each option; what the command line says wins. Published: PanDerm's run.sh, where one image of
# each of two GPUs makes a batch of 2, and DermINO's downstream evaluation.
DEFAULT = {"model": None, "head": "upernet", "taps": None, "channels": None, "pool_scales": [1, 2, 3, 6],
           "pyramid": True, "dropout": None, "drop_path": None, "tune": "full", "dice_weight": 1.0, "opt": "adamw",
           "lr": 5e-4, "weight_decay": 0.05, "decay_all": False, "layer_decay": 0.75, "cosine_by": "update",
           "warmup_epochs": 1.0, "min_lr": 1e-6, "batch_size": 16, "epochs": 50}
RECIPES: dict[str, dict[str, Any]] = {
    "default": DEFAULT,
    "panderm": DEFAULT | {"model": "cae_seg", "drop_path": 0.15, "dice_weight": 0.0, "lr": 1e-4, "decay_all": True,
                          "layer_decay": 1.0, "cosine_by": "epoch", "warmup_epochs": 0.0, "min_lr": 0.0,
                          "batch_size": 2, "epochs": 100},
    "dermino": DEFAULT | {"model": "DermINO_Base", "head": "linear", "pyramid": False, "drop_path": 0.0,
                          "tune": "head", "dice_weight": 0.0, "opt": "adam", "lr": 1e-3, "weight_decay": 0.0,
                          "layer_decay": 1.0, "cosine_by": "epoch", "warmup_epochs": 0.0, "min_lr": 0.0,
                          "batch_size": 64, "epochs": 20},
}
LINEAR_DROPOUT = {"dermino": 0.1}  # before a linear head, where nothing else is said
SIZE = 224  # of the model's input, where nothing else is said


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(TrainingOptions):
    """What a run depends on besides data, seed and fold; the names and meanings are the command line's.

    ``size`` is (H, W) of the model's input in pixels; ``kfold`` the number of folds, 0 for none.
    """

    recipe: str
    model: str
    pretrained: str | None
    size: tuple[int, int]
    head: str
    taps: list[int] | None
    channels: int | None
    pool_scales: list[int]
    pyramid: bool
    dropout: float | None
    drop_path: float | None
    dice_weight: float
    decay_all: bool
    cosine_by: str
    percent: float
    kfold: int
    test_batch_size: int


def build_model(options: SegmentationOptions, seed: int) -> SegmentationModel:
    """The segmenter with its backbone's pretrained weights, before anything is frozen or added."""
    dropout = options.dropout
    if dropout is None:
        dropout = LINEAR_DROPOUT.get(options.recipe, 0.0) if options.head == "linear" else 0.0
    build = functools.partial(
        create_segmenter, options.model, options.pretrained, head=options.head, input_size=options.size,
        taps=options.taps, channels=options.channels, pool_scales=options.pool_scales, dropout=dropout,
        pyramid=options.pyramid, seed=seed)
    return with_drop_path(build, options.drop_path)


def draw_data(manifest: SegmentationManifest, settings: list[dict[str, Any]], options: SegmentationOptions
              ) -> list[tuple[SegmentationManifest, SegmentationManifest]]:
    """The train images (a share of them) and the val images of every run.

    Raises:
        UserError: a share without images, or too few lesions (patients, images) for the folds.
    """
    drawn = []
    for setting, whole in zip(settings, folds_of(manifest, settings, options.kfold), strict=True):
        train_images = whole.split("train")
        if options.percent < 100:
            number = int(options.percent * len(train_images) / 100)  # as published; n * 0.29 is below 29 of 100
            if number < 1:
                raise UserError(f"--percent {options.percent:g} of {len(train_images)} train images is no image: take "
                                "more (it counts in hundredths: 10 is a tenth)")
            train_images = take_percent(train_images, 1.0, seed=setting["seed"]).take(range(number))
        drawn.append((train_images, whole.split("val")))
    if not all(len(val) for _, val in drawn):
        logger.warning("there are no val images: the last epoch's model is taken")
    return drawn


def cut_batches(train_images: SegmentationManifest, model: SegmentationModel, options: SegmentationOptions
                ) -> BatchPlan:
    """How the training is cut into updates.

    Raises:
        UserError: too few images for one update, or for the head's batch normalisation.
    """
    plan = plan_batches(len(train_images), batch_size=options.batch_size, update_freq=options.update_freq,
                        world_size=distributed.world_size(), least=least_batch(model, options))
    if plan.micro < plan.least:
        raise UserError(
            f"--batch_size {plan.micro}: the batch normalisation of --head {options.head} needs {plan.least} images "
            "together in a training step (of one image its 1 x 1 map has no variance): take --batch_size 2 or more"
            + ("" if distributed.world_size() > 1 else ", or one image on each of two GPUs with torchrun")
            + (f" ({len(train_images)} train images)" if len(train_images) < 2 * plan.least else ""))
    return plan


def least_batch(model: SegmentationModel, options: SegmentationOptions) -> int:
    """Images that a forward pass of one process needs; GPUs of several processes share their batch statistics."""
    together = distributed.world_size() if pick_device(options.device).type == "cuda" else 1
    return -(-model.minimum_batch // together)


def train_once(run: RunDirectory, model: SegmentationModel, seed: int, train_images: SegmentationManifest,
               val: SegmentationManifest, options: SegmentationOptions,
               track: Callable[[dict[str, Any]], None] | None = None) -> Trained:
    """Train one model.

    Args:
        run: its directory; an unfinished training in it is continued.
        model: from ``build_model`` with this seed.
        seed: of everything random.
        train_images: to train on.
        val: the images by which the epoch is chosen; where there are none the last is taken.
        options: the rest, ``amp_dtype`` settled.
        track: see ``runtime.tracking``.
    """
    device = pick_device(options.device)
    plan = cut_batches(train_images, model, options)
    mean, std = recipe_normalisation(options.recipe, model.provenance.data_config)
    meta = segmenter_meta(model, amp_dtype=options.amp_dtype, transform=options.recipe,
                          data_config={**model.provenance.data_config, "mean": list(mean), "std": list(std)})
    meta |= {"trained_on": sorted(train_images.frame["content_id"]), "split_note": train_images.split_note}
    parameters = prepare_model(model, options, seed=seed, name=options.model)
    transform = build_joint_transform(options.recipe, size=options.size, mean=mean, std=std)

    def build_loader(plan: BatchPlan) -> DataLoader:
        sampler = TrainSampler(len(train_images), plan=plan, seed=seed)
        return build_segmentation_loader(train_images, transform, sampler, plan=plan, seed=seed,
                                         num_workers=options.num_workers, device=device, pin_memory=options.pin_mem)

    def make_batch(images: int) -> SegmentationBatch:
        return SegmentationBatch(images=torch.zeros(images, 3, *options.size), indices=[0] * images, broken=[],
                                 masks=torch.zeros(images, *options.size, dtype=torch.int64))

    evaluate = None if not len(val) else make_evaluate(val, Masking(
        transform=options.recipe, mean=mean, std=std, device=device, amp_dtype=options.amp_dtype,
        batch_size=options.test_batch_size, num_workers=options.num_workers))
    return train(run, model, plan, step=make_step(train_images, device=device, dice_weight=options.dice_weight),
                 evaluate=evaluate, build_loader=build_loader, make_batch=make_batch, seed=seed, meta=meta,
                 parameters=parameters, options=options, track=track, cosine_by=options.cosine_by,
                 decay_all=options.decay_all, sync_bn=True)
