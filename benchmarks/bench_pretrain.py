"""How fast a configuration of hybrid pretraining runs here, how much of that is loading, and what small crops cost.

    python benchmarks/bench_pretrain.py -c pretraining/configs/ham_cpu.yaml --data_csv DATA/images --num_workers 2
    python benchmarks/bench_pretrain.py -c pretraining/configs/dermino_base.yaml --data_csv DATA/images \\
        --pretrained_checkpoint random --batch_size 64 --repeats 20

The options are those of pretraining/run.py, and ``--repeats``. It runs the toolkit's own loop (``runtime.trainer.fit``
with student, teacher, losses, AdamW and moving average; no file is written) and prints one table:

- the loader alone, in this process and with ``--num_workers`` processes;
- the training with that loader: images/s, seconds of an update, the share of them spent waiting for a batch;
- an update with all crops after an update with the large crops of the same images alone, batches in memory: the ratio
  of their times, and beside it the ratio of their FLOPs as torch counts them in the very same step (teacher, student,
  losses, backward).

With ``--ontology`` the label loss is part of the step; the prototypes are then random ones, which cost the same.
"""

import argparse
import dataclasses
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from bench_finetune import spread
from timm.utils import ModelEmaV3
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from furnace.command_line import entry_point, parse
from furnace.data.multicrop import MultiCropBatch
from furnace.data.pretraining_data import PretrainingData, read_pretraining
from furnace.engine_for_pretraining import make_step
from furnace.models.dino import DinoModel, parameter_groups
from furnace.models.prototypes import random_vectors
from furnace.pretraining import build_backbone, build_loader_of, build_model
from furnace.pretraining_arguments import pretraining_parser, settle_options
from furnace.pretraining_options import PretrainingOptions, build_schedules, cut_batches
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.optim import create_optimizer
from furnace.runtime.precision import autocast, pick_device, resolve_amp_dtype
from furnace.runtime.train_state import TrainState
from furnace.runtime.trainer import FitOptions, fit, train_mode

WARMUP = 2  # updates, or pairs of them, that do not count
KEPT = 4  # forward passes whose batches are kept in memory and given again
COUNTED = 8  # images of the step whose FLOPs are counted: attention in its plain form needs memory


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Timed:
    """A loader for ``fit`` that measures, for every forward pass, the wait for its batch and the work on it.

    Of an update's last pass the work includes clipping, the optimiser's step and the moving average; ``applied`` is
    when that step began.
    """

    def __init__(self, batches: Any, sampler: Any) -> None:
        """``batches`` is iterable; ``sampler`` has ``set_position``."""
        self.batches, self.sampler = batches, sampler
        self.waited: list[float] = []
        self.worked: list[float] = []
        self.passed: list[float] = []  # of an update's last pass: until the optimiser's step
        self.given = 0.0

    def __iter__(self) -> Iterator[MultiCropBatch]:
        began = time.perf_counter()
        for batch in self.batches:
            self.given = time.perf_counter()
            self.waited.append(self.given - began)
            yield batch
            synchronize()
            began = time.perf_counter()
            self.worked.append(began - self.given)

    def applied(self, *_: Any) -> None:
        """Hook of the optimiser, before its step."""
        synchronize()
        self.passed.append(time.perf_counter() - self.given)


def per_update(values: list[float], plan: BatchPlan) -> list[float]:
    """Sums over the forward passes of each whole update."""
    n = plan.accumulation
    return [sum(values[i:i + n]) for i in range(0, len(values) - n + 1, n)]


def run_fit(model: DinoModel, data: PretrainingData, timed: Timed, plan: BatchPlan, options: PretrainingOptions
            ) -> None:
    """One epoch by the toolkit, as ``furnace.pretraining.pretrain`` puts it together, without files and evaluation."""
    groups = parameter_groups(model, layer_decay=options.layer_decay, patch_embed_scale=options.patch_embed_lr_mult)
    state = TrainState(model, create_optimizer(groups), ema=ModelEmaV3(model))
    state.optimizer.register_step_pre_hook(timed.applied)
    device = pick_device(options.device)
    fit(state, make_step(data.manifest, lambda: state.ema.module, device=device), None, timed, plan,
        build_schedules(options, plan),
        options=FitOptions(epochs=1, seed=options.seed, device=device, amp_dtype=options.amp_dtype,
                           clip=options.clip_grad, compile=options.compile))


# ------------------------------------------------------------------------------------------------------ the three parts

def loader_rates(data: PretrainingData, model: DinoModel, options: PretrainingOptions, *, workers: int | None,
                 repeats: int) -> tuple[int, list[float]]:
    """The number of loader processes, and images/s of the loader alone in ``repeats`` stretches of time."""
    plan = cut_batches(len(data.manifest), options)
    probe = build_loader_of(data, model, plan, dataclasses.replace(options, num_workers=workers))
    window = max(1, probe.num_workers)  # batches; workers deliver in bursts
    ahead = window * (1 + (probe.prefetch_factor or 0))  # made before the clock starts
    passes = ahead + window * repeats
    plan = dataclasses.replace(plan, accumulation=1, steps_per_epoch=passes)
    batches = iter(build_loader_of(data, model, plan, dataclasses.replace(options, num_workers=workers,
                                                                          epoch_length=passes)))
    for _ in range(ahead):
        next(batches)
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        images = sum(len(next(batches).indices) for _ in range(window))
        rates.append(images / (time.perf_counter() - began))
    return probe.num_workers, rates


def with_loader(model: DinoModel, data: PretrainingData, options: PretrainingOptions, *, repeats: int
                ) -> tuple[list[float], list[float], list[MultiCropBatch]]:
    """Train from the loader; seconds of waiting and of work of each update, and a few batches."""
    plan = dataclasses.replace(cut_batches(len(data.manifest), options), steps_per_epoch=WARMUP + repeats + 1)
    loader = build_loader_of(data, model, plan, options)
    kept: list[MultiCropBatch] = []

    def batches() -> Iterator[MultiCropBatch]:
        for batch in loader:
            if len(kept) < KEPT:
                kept.append(batch)
            yield batch

    timed = Timed(batches(), loader.sampler)
    run_fit(model, data, timed, plan, options)
    end = WARMUP + repeats  # the work of the last pass is not measured
    return (per_update(timed.waited, plan)[WARMUP:end], per_update(timed.worked, plan)[WARMUP:end], kept)


class Anywhere:
    """A sampler's ``set_position`` for batches that are in memory."""

    def set_position(self, epoch: int, update: int) -> None:
        """Nothing depends on it."""


def with_and_without(model: DinoModel, data: PretrainingData, kept: list[MultiCropBatch], options: PretrainingOptions,
                     *, repeats: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """An update with all crops, then one with the large ones of the same images, again and again.

    Returns:
        Seconds of whole updates with and without small crops; then the same until the optimiser's step.
    """
    pairs = WARMUP + repeats
    plan = dataclasses.replace(cut_batches(len(data.manifest), options), steps_per_epoch=2 * pairs + 1)
    n = plan.accumulation

    def batches() -> Iterator[MultiCropBatch]:
        source = itertools.cycle(kept)
        for _ in range(pairs + 1):
            those = list(itertools.islice(source, n))
            yield from those
            yield from (dataclasses.replace(batch, locals=None) for batch in those)

    timed = Timed(batches(), Anywhere())
    run_fit(model, data, timed, plan, options)
    whole = per_update(timed.worked, plan)
    before = [sum(timed.worked[i * n:i * n + n - 1]) + timed.passed[i] for i in range(2 * pairs)]
    return (whole[2 * WARMUP:2 * pairs:2], whole[2 * WARMUP + 1:2 * pairs:2],
            before[2 * WARMUP:2 * pairs:2], before[2 * WARMUP + 1:2 * pairs:2])


def count_flops(model: DinoModel, data: PretrainingData, batch: MultiCropBatch, options: PretrainingOptions) -> float:
    """FLOPs per image of a forward pass of teacher and student, the losses and the backward pass.

    Products of matrices and convolutions count, two for a multiplication and an addition. Attention is computed by
    plain products here, for torch has no formula for its CPU kernel.
    """
    device, images = pick_device(options.device), min(COUNTED, len(batch.indices))

    def first(value: torch.Tensor | None, dim: int) -> torch.Tensor | None:
        return None if value is None else value.narrow(dim, 0, images).contiguous()

    part = dataclasses.replace(batch, globals=first(batch.globals, 1), locals=first(batch.locals, 1),
                               masks=first(batch.masks, 1), targets=first(batch.targets, 0),
                               known=first(batch.known, 0), indices=batch.indices[:images])
    values = {name: float(series[0]) for name, series in build_schedules(
        options, dataclasses.replace(cut_batches(len(data.manifest), options), steps_per_epoch=1)).items()}
    teacher = ModelEmaV3(model)
    step = make_step(data.manifest, lambda: teacher.module, device=device)
    train_mode(model, model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with autocast(device, options.amp_dtype):
            loss, _, _ = step(model, part, values)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / images


# ------------------------------------------------------------------------------------------------------------- together

def read_options(argv: Sequence[str] | None) -> tuple[PretrainingOptions, argparse.Namespace, int]:
    """Options of pretraining/run.py cut to a course of one epoch without a warm-up, their namespace, the repeats."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  epilog="all options of pretraining/run.py are taken, too", allow_abbrev=False)
    own.add_argument("--repeats", type=int, default=10, help="measurements of each kind (default: %(default)s)")
    mine, rest = own.parse_known_args(argv)
    if mine.repeats < 1:
        own.error("--repeats must be at least 1")
    args = parse(pretraining_parser(), rest)
    settle_options(args)
    options = PretrainingOptions(**{field.name: getattr(args, field.name)
                                    for field in dataclasses.fields(PretrainingOptions)})
    return dataclasses.replace(options, epochs=1, epoch_length=1, warmup_epochs=0.0, label_warmup_epochs=0.0,
                               prototype_warmup_epochs=0.0, freeze_last_layer_epochs=0.0, max_updates=0,
                               resume=None), args, mine.repeats


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, time, print."""
    options, args, repeats = read_options(argv)
    data = read_pretraining(args.data_csv, args.root_path, ontology=args.ontology,
                            label_ancestors=args.label_ancestors, strict_labels=not args.lenient_labels)
    device = pick_device(options.device)
    backbone = build_backbone(options).to(device)
    options = dataclasses.replace(options, amp_dtype=resolve_amp_dtype(options.amp_dtype, backbone.eval(), device,
                                                                       options.global_crops_size))
    vectors = None if data.ontology is None else random_vectors(len(data.ontology), backbone.num_features, seed=0)
    model = build_model(backbone, vectors, options)
    plan = cut_batches(len(data.manifest), options)

    _, alone = loader_rates(data, model, options, workers=0, repeats=repeats)
    workers, parallel = loader_rates(data, model, options, workers=options.num_workers, repeats=repeats)
    waits, works, kept = with_loader(model, data, options, repeats=repeats)
    updates = [wait + work for wait, work in zip(waits, works, strict=True)]
    where = (torch.cuda.get_device_name() if device.type == "cuda" else
             f"{device.type} with {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}")
    passes = f" in {plan.accumulation} passes" if plan.accumulation > 1 else ""
    processes = f"{workers} loader process{'es' * (workers != 1)}"
    rows = [
        ("loader alone, this process, images/s", spread(alone)),
        *([(f"loader alone, {processes}, images/s", spread(parallel))] if workers else []),
        (f"training with {processes}, images/s", spread([plan.per_update / s for s in updates])),
        ("seconds of an update", spread(updates)),
        ("of it waiting for batches", f"{100 * sum(waits) / sum(updates):.1f} %")]
    if options.local_crops_number:
        rows += crops_rows(model, data, kept, plan, options, repeats=repeats)
    rows.append(("peak memory", peak_memory(device)))
    print(f"{options.model}: an update is of {plan.per_update} images{passes}, 2 x {options.global_crops_size} and "
          f"{options.local_crops_number} x {options.local_crops_size} pixels; {options.amp_dtype} on {where}; torch "
          f"{torch.__version__}; {repeats} repeats after {WARMUP} that do not count; median [quartiles]\n")
    print("\n".join(f"| {name} | {' '.join(value.split())} |" for name, value in [("", ""), ("---", "---"), *rows]))
    return 0


def crops_rows(model: DinoModel, data: PretrainingData, kept: list[MultiCropBatch], plan: BatchPlan,
               options: PretrainingOptions, *, repeats: int) -> list[tuple[str, str]]:
    """The lines about the small crops."""
    whole, large, whole_pass, large_pass = with_and_without(model, data, kept, options, repeats=repeats)
    counts = [(count_flops(model, data, batch, options),
               count_flops(model, data, dataclasses.replace(batch, locals=None), options)) for batch in kept[:2]]
    full, bare = (statistics.mean(values) for values in zip(*counts, strict=True))
    ratios = [a / b for a, b in zip(whole, large, strict=True)]
    of_passes = [a / b for a, b in zip(whole_pass, large_pass, strict=True)]
    return [
        (f"update with 2 + {options.local_crops_number} crops, batches in memory, s", spread(whole)),
        ("update with the 2 large crops alone, s", spread(large)),
        ("ratio of the two, pair by pair", spread(ratios)),
        ("the same without optimiser and moving average", spread(of_passes)),
        ("GFLOPs per image with all crops, with the large ones", f"{full / 1e9:.2f}, {bare / 1e9:.2f}"),
        ("ratio that the FLOPs predict", f"{full / bare:.3f}"),
        ("measured / predicted: updates; without optimiser and moving average",
         f"{statistics.median(ratios) * bare / full:.3f}; {statistics.median(of_passes) * bare / full:.3f}"),
        ("TFLOP/s of an update with all crops", f"{full * plan.per_update / statistics.median(whole) / 1e12:.3f}")]


def peak_memory(device: torch.device) -> str:
    """Of this process, without loader processes; on a GPU what PyTorch had allocated."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of the GPU"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return f"{most * (1 if sys.platform == 'darwin' else 1024) / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
