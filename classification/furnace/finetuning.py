"""Fine-tuning from a manifest to test results: puts the parts together, for one seed and fold.

``run_class_finetuning.py`` calls it once, or once per seed and fold.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn
from torch.utils.data import DataLoader

from furnace.data.datasets import Batch, build_train_loader
from furnace.data.manifest import Manifest
from furnace.data.samplers import TrainSampler, class_balanced_weights
from furnace.data.splits import take_percent_finetuning
from furnace.data.transforms import build_train_transform, build_transform
from furnace.engine_for_finetuning import make_evaluate, make_step
from furnace.models.classifier import classifier_meta, create_classifier
from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan, plan_batches
from furnace.runtime.files import UserError
from furnace.runtime.precision import pick_device
from furnace.runtime.run_directory import RunDirectory
from furnace.training import Trained, TrainingOptions, folds_of, prepare_model, train, with_drop_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinetuningOptions(TrainingOptions):
    """What a run depends on besides data, seed and fold; the names and meanings are the command line's."""

    model: str
    pretrained_checkpoint: str | None
    input_size: int
    use_mean_pooling: bool | None
    use_cls: bool
    rel_pos_bias: bool | None
    sin_pos_emb: bool
    layer_scale_init_value: float | None
    drop: float
    attn_drop_rate: float
    drop_path: float | None
    init_scale: float
    model_key: str
    model_prefix: str
    percent_data: float
    folds: int
    weights: bool
    color_jitter: float | None
    aa: str
    train_interpolation: str
    crop_pct: float | None
    reprob: float
    remode: str
    recount: int
    resplit: bool
    smoothing: float
    mixup: float
    cutmix: float
    cutmix_minmax: list[float] | None
    mixup_prob: float
    mixup_switch_prob: float
    mixup_mode: str
    disable_eval_during_finetuning: bool

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


def build_classifier(options: FinetuningOptions, nb_classes: int, seed: int) -> nn.Module:
    """The headed model with its pretrained weights, before anything is frozen or added."""
    build = functools.partial(
        create_classifier, options.model, options.pretrained_checkpoint, nb_classes=nb_classes,
        input_size=options.input_size, seed=seed, drop=options.drop, attn_drop=options.attn_drop_rate,
        pool="token" if options.use_cls else "avg" if options.use_mean_pooling else None,
        layer_scale=options.layer_scale_init_value, relative_positions=options.rel_pos_bias,
        trainable_positions=not options.sin_pos_emb, init_scale=options.init_scale,
        model_keys=tuple(options.model_key.split("|")), prefix=options.model_prefix)
    return with_drop_path(build, options.drop_path)


def draw_data(manifest: Manifest, settings: list[dict[str, Any]], options: FinetuningOptions
              ) -> list[tuple[Manifest, Manifest]]:
    """The train images (a share of them, in the published order) and the val images of every run.

    Raises:
        UserError: a share without images, too few groups for the folds, or a monitor that is not defined on val.
    """
    drawn = [(take_percent_finetuning(whole, options.percent_data, setting["seed"]), whole.split("val"))
             for setting, whole in zip(settings, folds_of(manifest, settings, options.folds), strict=True)]
    for _, val in drawn:
        monitor_of(val, options)
    if not options.disable_eval_during_finetuning and not all(len(val) for _, val in drawn):
        logger.warning("there are no val images: the last epoch's model is taken")
    return drawn


def monitor_of(val: Manifest, options: FinetuningOptions) -> str | None:
    """The metric by which the epoch is chosen, None where nothing is chosen.

    Raises:
        UserError: it is not defined on these images.
    """
    if options.disable_eval_during_finetuning or not len(val):
        return None
    absent = sorted(set(range(val.nb_classes)) - set(val.labels.tolist()))
    if options.monitor == "auroc" and absent and not val.multilabel:
        raise UserError(f"--monitor auroc is not defined on val: it has no image of class "
                        f"{', '.join(val.class_names[k] for k in absent)}; take --monitor bacc, or add some")
    return options.monitor


def train_once(run: RunDirectory, model: nn.Module, seed: int, train_images: Manifest, val: Manifest,
               options: FinetuningOptions, track: Callable[[dict[str, Any]], None] | None = None) -> Trained:
    """Train one model.

    Args:
        run: its directory; an unfinished training in it is continued.
        model: from ``build_classifier`` with this seed.
        seed: of everything random.
        train_images: to train on.
        val: the images by which the epoch is chosen.
        options: the rest, ``amp_dtype`` settled.
        track: see ``runtime.tracking``.
    """
    device, monitor = pick_device(options.device), monitor_of(val, options)
    config = model.provenance.data_config
    meta = classifier_meta(model, class_names=train_images.class_names, task=_task(train_images),
                           amp_dtype=options.amp_dtype, crop_pct=options.crop_pct)
    parameters = prepare_model(model, options, seed=seed, name=options.model)
    transform = build_train_transform(config, color_jitter=options.color_jitter, auto_augment=options.aa,
                                      interpolation=options.train_interpolation, crop_pct=options.crop_pct)
    weights = class_balanced_weights(train_images.labels) if options.weights else None

    def build_loader(plan: BatchPlan) -> DataLoader:
        sampler = TrainSampler(len(train_images), plan=plan, seed=seed, weights=weights)
        return build_train_loader(train_images, transform, sampler, plan=plan, seed=seed,
                                  num_workers=options.num_workers, device=device, pin_memory=options.pin_mem)

    def make_batch(images: int) -> Batch:
        return Batch(images=torch.zeros(images, *config["input_size"]), indices=[0] * images, broken=[])

    evaluate = None if monitor is None else make_evaluate(
        val, build_transform(config, crop_pct=options.crop_pct), device=device, amp_dtype=options.amp_dtype,
        batch_size=options.batch_size, num_workers=options.num_workers)
    plan = plan_batches(len(train_images), batch_size=options.batch_size, update_freq=options.update_freq,
                        world_size=distributed.world_size(), even=options.mixes)
    return train(run, model, plan, step=build_step(train_images, options, device), evaluate=evaluate,
                 build_loader=build_loader, make_batch=make_batch, seed=seed, meta=meta, parameters=parameters,
                 options=options, track=track)


def build_step(train_images: Manifest, options: FinetuningOptions, device: torch.device) -> Any:
    """The training step with its mixing and erasing."""
    mixup = erasing = None
    if options.mixes:
        mixup = Mixup(mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, cutmix_minmax=options.cutmix_minmax,
                      prob=options.mixup_prob, switch_prob=options.mixup_switch_prob, mode=options.mixup_mode,
                      label_smoothing=options.smoothing, num_classes=train_images.nb_classes)
    if options.reprob > 0:
        erasing = RandomErasing(options.reprob, mode=options.remode, max_count=options.recount,
                                num_splits=2 if options.resplit else 0, device=device.type)
    return make_step(train_images, device=device, smoothing=options.smoothing, mixup=mixup, erasing=erasing)


def _task(manifest: Manifest) -> str:
    return "multilabel" if manifest.multilabel else "multiclass"
