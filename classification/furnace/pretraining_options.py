"""What a pretraining depends on, and the numbers that change with every update."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from furnace.data.multicrop import Crops
from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan, plan_batches
from furnace.runtime.optim import Schedules, cosine_schedule

LABEL_SOURCES = ("text", "class_mean", "orthogonal", "random")
BIASES = ("prior", "zero")
MODES = ("frozen", "trainable", "warmup")
REFERENCE_BATCH = 1024  # images of an update at which the learning rate is --base_lr


@dataclass(frozen=True, kw_only=True)
class PretrainingOptions:
    """What a run depends on besides data and evaluation; the names and meanings are the command line's."""

    model: str
    pretrained_checkpoint: str | None
    patch_size: int | None
    layer_scale_init_value: float | None
    drop_path: float
    global_crops_size: int
    local_crops_size: int
    local_crops_number: int
    global_crops_scale: list[float]
    local_crops_scale: list[float]
    dinov2_compat: bool
    mask_sample_probability: float
    mask_ratio_min_max: list[float]
    head_n_prototypes: int
    head_hidden_dim: int
    head_bottleneck_dim: int
    prototypes: str
    text_encoder: str
    text_pooling: str
    prototype_mode: str
    prototype_lr: float
    prototype_warmup_epochs: float
    label_temperature: float | None
    label_bias: str
    dino_loss_weight: float
    ibot_loss_weight: float
    koleo_loss_weight: float
    label_loss_weight: float
    label_loss_weight_end: float | None
    label_warmup_epochs: float
    batch_size: int
    update_freq: int
    epochs: int
    epoch_length: int
    max_updates: int
    base_lr: float
    min_lr: float
    warmup_epochs: float
    layer_decay: float
    patch_embed_lr_mult: float
    freeze_last_layer_epochs: float
    weight_decay: float
    weight_decay_end: float
    clip_grad: float | None
    momentum_teacher: float
    final_momentum_teacher: float
    teacher_temp: float
    warmup_teacher_temp: float
    warmup_teacher_temp_epochs: float
    eval_freq: int
    seed: int
    device: str
    amp_dtype: str
    compile: bool
    grad_checkpointing: bool
    num_workers: int | None
    pin_mem: bool
    save_ckpt_freq: int
    save_every_steps: int
    resume: Path | None

    @property
    def crops(self) -> Crops:
        """The views of an image."""
        return Crops(global_size=self.global_crops_size, local_size=self.local_crops_size,
                     local_crops=self.local_crops_number, global_scale=tuple(self.global_crops_scale),
                     local_scale=tuple(self.local_crops_scale), dinov2_compat=self.dinov2_compat)


def cut_batches(images: int, options: PretrainingOptions) -> BatchPlan:
    """How the training is cut into updates; ``epoch_length`` updates make an epoch where it is given.

    Too large passes are halved to two images at least: Sinkhorn and KoLeo compare the images of a pass.
    """
    plan = plan_batches(images, batch_size=options.batch_size, update_freq=options.update_freq,
                        world_size=distributed.world_size(), least=2)
    return dataclasses.replace(plan, steps_per_epoch=options.epoch_length) if options.epoch_length else plan


def build_schedules(options: PretrainingOptions, plan: BatchPlan) -> Schedules:
    """Every number that changes, for every update (recipe of DINOv2; invariants in tests/test_pretraining.py).

    The rate rises to base_lr * sqrt(images of an update / 1024) and falls by a cosine; weight decay and teacher
    momentum go by cosines from start to end; the teacher's temperature rises in a straight line.
    """
    updates = options.epochs * plan.steps_per_epoch

    def epochs(number: float) -> int:
        return int(number * plan.steps_per_epoch + 1e-6)  # 0.29 of 100 is 29

    peak = options.base_lr * math.sqrt(plan.per_update / REFERENCE_BATCH)
    rate = cosine_schedule(peak, options.min_lr, updates=updates, warmup=epochs(options.warmup_epochs))
    last_layer = rate.copy()
    last_layer[:epochs(options.freeze_last_layer_epochs)] = 0.0
    prototype_rate = rate * (options.prototype_lr / options.base_lr)
    if options.prototype_mode == "warmup":
        prototype_rate[:epochs(options.prototype_warmup_epochs)] = 0.0
    rising = min(epochs(options.warmup_teacher_temp_epochs), updates)
    temperature = np.full(updates, options.teacher_temp)
    temperature[:rising] = np.linspace(options.warmup_teacher_temp, options.teacher_temp,
                                       epochs(options.warmup_teacher_temp_epochs))[:rising]
    end = options.label_loss_weight if options.label_loss_weight_end is None else options.label_loss_weight_end
    return {"lr": rate, "last_layer_lr": last_layer, "prototype_lr": prototype_rate,
            "weight_decay": cosine_schedule(options.weight_decay, options.weight_decay_end, updates=updates),
            "ema": cosine_schedule(options.momentum_teacher, options.final_momentum_teacher, updates=updates),
            "teacher_temperature": temperature,
            "dino_weight": np.full(updates, options.dino_loss_weight),
            "ibot_weight": np.full(updates, options.ibot_loss_weight),
            "koleo_weight": np.full(updates, options.koleo_loss_weight),
            "label_weight": cosine_schedule(options.label_loss_weight, end, updates=updates,
                                            warmup=epochs(options.label_warmup_epochs))}
