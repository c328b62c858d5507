"""What the training of any task is put together from: options, schedules, optimiser, average, memory, the call of fit.

``finetuning`` and ``segmentation`` bring model, step, evaluation and loader.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from furnace.data.manifest import Manifest
from furnace.data.splits import make_folds
from furnace.models import OptionError
from furnace.models.tuning import merged_state, no_weight_decay, set_tuning
from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import UserError
from furnace.runtime.memory import fitting_plan
from furnace.runtime.optim import Schedules, cosine_schedule, create_optimizer, ema_schedule, layer_decay_groups
from furnace.runtime.precision import pick_device, resolve_amp_dtype
from furnace.runtime.run_directory import RunDirectory
from furnace.runtime.train_state import TrainState
from furnace.runtime.trainer import FitOptions, fit, train_mode

logger = logging.getLogger(__name__)

DROP_PATH = 0.1  # the published default of fine-tuning, for architectures that have it


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What any training depends on besides model, data, seed and fold; names and meanings are the command line's."""

    tune: str
    lora_rank: int
    lora_alpha: float
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
    monitor: str | None
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


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        best: ``{"model", "epoch", "meta"}`` of the chosen epoch, as checkpoint-best.pth holds it.
        history: log.txt's entries.
        plan: how the images were cut into updates.
        parameters: how many numbers were trained.
        updates: how often.
    """

    best: dict[str, Any]
    history: list[dict[str, Any]]
    plan: BatchPlan
    parameters: int
    updates: int


def settings_of(seeds: list[int], folds: int) -> list[dict[str, Any]]:
    """A dictionary per run: the seed, and the fold where there are folds."""
    return [{"seed": seed, **({"fold": fold} if folds else {})} for seed in seeds for fold in range(max(1, folds))]


def folds_of(manifest: Manifest, settings: list[dict[str, Any]], folds: int) -> list[Manifest]:
    """The whole data set of each of ``settings_of``, its train and val as the fold has them (0 folds: as they are)."""
    if not folds:
        return [manifest] * len(settings)
    made = {seed: make_folds(manifest, folds, seed) for seed in {setting["seed"] for setting in settings}}
    return [made[setting["seed"]][setting["fold"]] for setting in settings]


def with_drop_path(build: Callable[..., nn.Module], asked: float | None) -> Any:
    """The model that ``build(drop_path=...)`` makes; where nothing was asked for, DROP_PATH if it can have any."""
    if asked is not None:
        return build(drop_path=asked)
    try:
        return build(drop_path=DROP_PATH)
    except OptionError as error:
        if error.option != "drop_path_rate":
            raise
        return build()


def settle_precision(options: Any, run: RunDirectory, model: nn.Module,
                     input_size: int | tuple[int, int]) -> Any:
    """Resolve ``--amp_dtype auto`` once; an unfinished run keeps what it had settled on.

    Args:
        options: a dataclass with ``amp_dtype`` and ``device``, as they were asked for.
        run: the run's directory.
        model: moved to the device, in eval mode.
        input_size: side, or (height, width), of its images in pixels.

    Returns:
        ``options`` with bf16, fp16 or fp32.
    """
    asked = run.previous.get("resolved_amp_dtype", "auto") if options.amp_dtype == "auto" else options.amp_dtype
    device = pick_device(options.device)
    return dataclasses.replace(options, amp_dtype=resolve_amp_dtype(asked, model.to(device).eval(), device, input_size))


def prepare_model(model: nn.Module, options: TrainingOptions, *, seed: int, name: str) -> int:
    """Freeze or extend what ``tune`` says, on the device.

    Args:
        model: with its pretrained weights and a fresh head.
        options: of the training.
        seed: of LoRA's additions.
        name: of the model, for messages.

    Returns:
        How many numbers are trained.
    """
    trained = set(set_tuning(model, options.tune, rank=options.lora_rank, alpha=options.lora_alpha, seed=seed))
    if options.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"--grad_checkpointing: timm's {name} cannot do it; leave it out") from error
    model.to(pick_device(options.device))
    return sum(parameter.numel() for key, parameter in model.named_parameters() if key in trained)


def train(run: RunDirectory, model: nn.Module, plan: BatchPlan, *, step: Callable[..., Any],
          evaluate: Callable[[nn.Module], dict[str, float]] | None, build_loader: Callable[[BatchPlan], DataLoader],
          make_batch: Callable[[int], Any], seed: int, meta: dict[str, Any], parameters: int,
          options: TrainingOptions, track: Callable[[dict[str, Any]], None] | None = None,
          cosine_by: str = "update", decay_all: bool = False, sync_bn: bool = False) -> Trained:
    """Train a prepared model; an unfinished training in the run's directory is continued.

    Args:
        run: its directory.
        model: after ``prepare_model``.
        plan: from ``plan_batches``.
        step: see ``runtime.trainer``.
        evaluate: likewise; None when nothing is to be chosen.
        build_loader: makes the training loader of a plan, which a GPU's memory may have changed.
        make_batch: so many black images, to try whether a step fits into a GPU's memory.
        seed: of everything random.
        meta: what checkpoint-best.pth says of itself.
        parameters: how many numbers are trained.
        options: the rest, ``amp_dtype`` settled.
        track: see ``runtime.tracking``.
        cosine_by: see ``build_schedules``.
        decay_all: weight decay of biases, norms and positions, too.
        sync_bn: batch statistics over all GPUs instead of each one's own.
    """
    device = pick_device(options.device)
    schedules = build_schedules(options, plan, cosine_by=cosine_by)
    state = build_state(model, options, plan, decay_all=decay_all)
    if device.type == "cuda" and plan.micro >= getattr(model, "minimum_batch", 1):  # less could not be halved
        train_mode(model, model)
        # the trial has no other process's images to share statistics with: it needs what one process alone would
        alone = dataclasses.replace(plan, least=getattr(model, "minimum_batch", 1))
        plan = fitting_plan(model, step, make_batch, alone, {name: float(v[0]) for name, v in schedules.items()},
                            device=device, amp_dtype=options.amp_dtype)
    if sync_bn:
        share_statistics(model, device)
    monitor = None if evaluate is None else options.monitor
    best = fit(state, step, evaluate, build_loader(plan), plan, schedules, run, options=FitOptions(
        epochs=options.epochs, seed=seed, device=device, amp_dtype=options.amp_dtype, clip=options.clip_grad,
        monitor=monitor, lower_is_better=monitor == "loss", early_stop=options.early_stop, save=options.save_ckpt,
        save_every_steps=options.save_every_steps, keep_every_epochs=options.save_ckpt_freq, compile=options.compile,
        meta=meta, export=merged_state, track=track, resume=options.resume))
    return Trained(best, state.history, plan, parameters, state.update)


def share_statistics(model: nn.Module, device: torch.device) -> None:
    """Turn a model's batch normalisation into the one over all processes; PyTorch has it for GPUs only."""
    if distributed.world_size() == 1 or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    if device.type == "cuda":
        convert_sync_batchnorm(model)  # in place but for the model itself, which is no normalisation
    else:
        logger.warning("on a %s each process has its own batch statistics (PyTorch shares them between GPUs only)",
                       device.type)


def build_schedules(options: TrainingOptions, plan: BatchPlan, *, cosine_by: str = "update") -> Schedules:
    """Learning rate, weight decay and, with an average, its decay, for every update.

    ``cosine_by`` "epoch" has no warm-up and keeps the rate within an epoch, as PanDerm's published segmentation.
    """
    updates = options.epochs * plan.steps_per_epoch
    warmup = options.warmup_steps if options.warmup_steps > 0 else int(options.warmup_epochs * plan.steps_per_epoch)
    end = options.weight_decay if options.weight_decay_end is None else options.weight_decay_end
    if cosine_by == "epoch":
        rate = np.repeat(cosine_schedule(options.lr, options.min_lr, updates=options.epochs), plan.steps_per_epoch)
    else:
        rate = cosine_schedule(options.lr, options.min_lr, updates=updates, warmup=warmup,
                               warmup_start=options.warmup_lr)
    schedules = {"lr": rate, "weight_decay": cosine_schedule(options.weight_decay, end, updates=updates)}
    if options.model_ema:
        schedules["ema"] = ema_schedule(options.model_ema_decay, updates)
    return schedules


def build_state(model: nn.Module, options: TrainingOptions, plan: BatchPlan, *, decay_all: bool = False) -> TrainState:
    """Optimiser and average of a model on its device, at the start."""
    exempt = no_weight_decay(model, relative_positions=options.disable_weight_decay_on_rel_pos_bias)
    groups = layer_decay_groups(model, layer_decay=options.layer_decay, no_weight_decay=exempt)
    if decay_all:
        groups = [{**group, "weight_decay_scale": 1.0} for group in groups]
    optimizer = create_optimizer(groups, name=options.opt, momentum=options.momentum, eps=options.opt_eps,
                                 betas=options.opt_betas)
    ema = None
    if options.model_ema:
        ema = ModelEmaV3(model, device=torch.device("cpu") if options.model_ema_force_cpu else None)
    return TrainState(model, optimizer, ema=ema, epoch=options.start_epoch,
                      update=options.start_epoch * plan.steps_per_epoch)
