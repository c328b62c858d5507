"""Fine-tuning from a manifest to test results: puts the parts together, for one seed and fold.

``run_class_finetuning.py`` calls it once, or once per seed and fold.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import nn

from furnace.data.datasets import Batch, build_train_loader
from furnace.data.manifest import Manifest
from furnace.data.samplers import TrainSampler, class_balanced_weights
from furnace.data.splits import make_folds, take_percent_finetuning
from furnace.data.transforms import build_train_transform, build_transform
from furnace.engine_for_finetuning import make_evaluate, make_step
from furnace.models import OptionError
from furnace.models.classifier import classifier_meta, create_classifier
from furnace.models.tuning import merged_state, no_weight_decay, set_tuning
from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan, plan_batches
from furnace.runtime.files import UserError
from furnace.runtime.memory import fitting_plan
from furnace.runtime.optim import Schedules, cosine_schedule, create_optimizer, ema_schedule, layer_decay_groups
from furnace.runtime.precision import pick_device, resolve_amp_dtype
from furnace.runtime.run_directory import RunDirectory
from furnace.runtime.train_state import TrainState
from furnace.runtime.trainer import FitOptions, fit, train_mode

logger = logging.getLogger(__name__)

DROP_PATH = 0.1  # the published default, for architectures that have it


@dataclass(frozen=True)
class FinetuningOptions:
    """What a run depends on besides data, seed and fold; the names and meanings are the command line's."""

    model: str
    pretrained_checkpoint: str | None
    input_size: int
    tune: str
    lora_rank: int
    lora_alpha: float
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
    batch_size: int
    update_freq: int
    epochs: int
    start_epoch: int
    early_stop: int
    model_ema: bool
    model_ema_decay: float
    model_ema_force_cpu: bool
    opt: str
    opt_eps: float | None
    opt_betas: list[float] | None
    momentum: float
    clip_grad: float | None
    weight_decay: float
    weight_decay_end: float | None
    disable_weight_decay_on_rel_pos_bias: bool
    lr: float
    layer_decay: float
    warmup_lr: float
    min_lr: float
    warmup_epochs: float
    warmup_steps: int
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
    monitor: str
    disable_eval_during_finetuning: bool
    device: str
    amp_dtype: str
    compile: bool
    grad_checkpointing: bool
    num_workers: int | None
    pin_mem: bool
    save_ckpt: bool
    save_ckpt_freq: int
    save_every_steps: int
    resume: Path | None

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
    if options.drop_path is not None:
        return build(drop_path=options.drop_path)
    try:
        return build(drop_path=DROP_PATH)
    except OptionError as error:
        if error.option != "drop_path_rate":
            raise
        return build()


def settings_of(seeds: list[int], folds: int) -> list[dict[str, Any]]:
    """A dictionary per run: the seed, and the fold where there are folds."""
    return [{"seed": seed, **({"fold": fold} if folds else {})} for seed in seeds for fold in range(max(1, folds))]


def draw_data(manifest: Manifest, settings: list[dict[str, Any]], options: FinetuningOptions
              ) -> list[tuple[Manifest, Manifest]]:
    """The train images (a share of them, in the published order) and the val images of every run.

    Raises:
        UserError: a share without images, too few groups for the folds, or a monitor that is not defined on val.
    """
    folds: dict[int, list[Manifest]] = {}
    drawn = []
    for setting in settings:
        seed, whole = setting["seed"], manifest
        if options.folds:
            folds[seed] = folds.get(seed) or make_folds(manifest, options.folds, seed)
            whole = folds[seed][setting["fold"]]
        drawn.append((take_percent_finetuning(whole, options.percent_data, seed), whole.split("val")))
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


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        best: ``{"model", "epoch", "meta"}`` of the chosen epoch, as checkpoint-best.pth holds it.
        history: log.txt's entries.
        plan: how the images were cut into updates.
        parameters: how many numbers were trained.
    """

    best: dict[str, Any]
    history: list[dict[str, Any]]
    plan: BatchPlan
    parameters: int


def train_once(run: RunDirectory, model: nn.Module, seed: int, train: Manifest, val: Manifest,
               options: FinetuningOptions, track: Callable[[dict[str, Any]], None] | None = None) -> Trained:
    """Train one model.

    Args:
        run: its directory; an unfinished training in it is continued.
        model: from ``build_classifier`` with this seed.
        seed: of everything random.
        train: the images to train on.
        val: those by which the epoch is chosen.
        options: the rest, ``amp_dtype`` settled.
        track: see ``runtime.tracking``.
    """
    device, monitor = pick_device(options.device), monitor_of(val, options)
    config = model.provenance.data_config
    meta = classifier_meta(model, class_names=train.class_names, task=_task(train), amp_dtype=options.amp_dtype,
                           crop_pct=options.crop_pct)
    trained = set_tuning(model, options.tune, rank=options.lora_rank, alpha=options.lora_alpha, seed=seed)
    if options.grad_checkpointing:
        _checkpoint_gradients(model, options.model)
    model.to(device)
    plan = plan_batches(len(train), batch_size=options.batch_size, update_freq=options.update_freq,
                        world_size=distributed.world_size(), even=options.mixes)
    schedules = build_schedules(options, plan)
    step = build_step(train, options, device)
    state = build_state(model, options, plan)
    if device.type == "cuda":
        plan = _fit_into_memory(model, step, plan, schedules, config, options, device)
    transform = build_train_transform(config, color_jitter=options.color_jitter, auto_augment=options.aa,
                                      interpolation=options.train_interpolation, crop_pct=options.crop_pct)
    weights = class_balanced_weights(train.labels) if options.weights else None
    sampler = TrainSampler(len(train), plan=plan, seed=seed, weights=weights)
    loader = build_train_loader(train, transform, sampler, plan=plan, seed=seed, num_workers=options.num_workers,
                                device=device, pin_memory=options.pin_mem)
    evaluate = None if monitor is None else make_evaluate(
        val, build_transform(config, crop_pct=options.crop_pct), device=device, amp_dtype=options.amp_dtype,
        batch_size=options.batch_size, num_workers=options.num_workers)
    best = fit(state, step, evaluate, loader, plan, schedules, run, options=FitOptions(
        epochs=options.epochs, seed=seed, device=device, amp_dtype=options.amp_dtype, clip=options.clip_grad,
        monitor=monitor, lower_is_better=monitor == "loss", early_stop=options.early_stop, save=options.save_ckpt,
        save_every_steps=options.save_every_steps, keep_every_epochs=options.save_ckpt_freq, compile=options.compile,
        meta=meta, export=merged_state, track=track, resume=options.resume))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Trained(best, state.history, plan, sum(sizes[name] for name in trained))


def build_step(train: Manifest, options: FinetuningOptions, device: torch.device) -> Any:
    """The training step with its mixing and erasing."""
    mixup = erasing = None
    if options.mixes:
        mixup = Mixup(mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, cutmix_minmax=options.cutmix_minmax,
                      prob=options.mixup_prob, switch_prob=options.mixup_switch_prob, mode=options.mixup_mode,
                      label_smoothing=options.smoothing, num_classes=train.nb_classes)
    if options.reprob > 0:
        erasing = RandomErasing(options.reprob, mode=options.remode, max_count=options.recount,
                                num_splits=2 if options.resplit else 0, device=device.type)
    return make_step(train, device=device, smoothing=options.smoothing, mixup=mixup, erasing=erasing)


def build_schedules(options: FinetuningOptions, plan: BatchPlan) -> Schedules:
    """Learning rate, weight decay and, with an average, its decay, for every update."""
    updates = options.epochs * plan.steps_per_epoch
    warmup = options.warmup_steps if options.warmup_steps > 0 else int(options.warmup_epochs * plan.steps_per_epoch)
    end = options.weight_decay if options.weight_decay_end is None else options.weight_decay_end
    schedules = {"lr": cosine_schedule(options.lr, options.min_lr, updates=updates, warmup=warmup,
                                       warmup_start=options.warmup_lr),
                 "weight_decay": cosine_schedule(options.weight_decay, end, updates=updates)}
    if options.model_ema:
        schedules["ema"] = ema_schedule(options.model_ema_decay, updates)
    return schedules


def build_state(model: nn.Module, options: FinetuningOptions, plan: BatchPlan) -> TrainState:
    """Optimiser and average of a model on its device, at the start."""
    exempt = no_weight_decay(model, relative_positions=options.disable_weight_decay_on_rel_pos_bias)
    groups = layer_decay_groups(model, layer_decay=options.layer_decay, no_weight_decay=exempt)
    optimizer = create_optimizer(groups, name=options.opt, momentum=options.momentum, eps=options.opt_eps,
                                 betas=options.opt_betas)
    ema = None
    if options.model_ema:
        ema = ModelEmaV3(model, device=torch.device("cpu") if options.model_ema_force_cpu else None)
    return TrainState(model, optimizer, ema=ema, epoch=options.start_epoch,
                      update=options.start_epoch * plan.steps_per_epoch)


def settle_precision(options: FinetuningOptions, run: RunDirectory, model: nn.Module) -> FinetuningOptions:
    """Resolve ``--amp_dtype auto`` once; an unfinished run keeps what it had settled on."""
    asked = run.previous.get("resolved_amp_dtype", "auto") if options.amp_dtype == "auto" else options.amp_dtype
    device = pick_device(options.device)
    return dataclasses.replace(options, amp_dtype=resolve_amp_dtype(asked, model.to(device).eval(), device,
                                                                    options.input_size))


def _task(manifest: Manifest) -> str:
    return "multilabel" if manifest.multilabel else "multiclass"


def _checkpoint_gradients(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--grad_checkpointing: timm's {name} cannot do it; leave it out") from error


def _fit_into_memory(model: nn.Module, step: Any, plan: BatchPlan, schedules: Schedules, config: dict[str, Any],
                     options: FinetuningOptions, device: torch.device) -> BatchPlan:
    def make_batch(images: int) -> Batch:
        return Batch(images=torch.zeros(images, *config["input_size"]), indices=[0] * images, broken=[])

    train_mode(model, model)
    return fitting_plan(model, step, make_batch, plan, {name: float(v[0]) for name, v in schedules.items()},
                        device=device, amp_dtype=options.amp_dtype)
