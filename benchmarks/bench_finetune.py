"""How long an update takes: this toolkit's training loop against a plain PyTorch loop, and memory.

    python benchmarks/bench_finetune.py --csv DATA/metadata.csv --root DATA [--model timm:vit_base_patch16_224]
    python benchmarks/bench_finetune.py --csv DATA/metadata.csv --root DATA --memory

The first form trains two copies of one model on the same augmented batches, an update of one after an update of the
other: ``runtime.trainer.fit`` as run_class_finetuning.py calls it, and the obvious loop (autocast, cross-entropy,
backward, AdamW over the same parameter groups). It prints the ratio of their times; then bf16 against fp32 of ours as a
share of the machine's own ratio for a bare matrix product, measured in the same alternation.

``--memory`` trains a few updates in processes of their own, with and without gradient checkpointing, LoRA and head, and
prints each one's peak memory as the operating system counts it.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_extract import matmul_seconds
from torch import nn

from furnace.data.datasets import Batch, build_train_loader
from furnace.data.manifest import Manifest, read_manifest
from furnace.data.samplers import TrainSampler
from furnace.data.transforms import build_train_transform
from furnace.engine_for_finetuning import make_step
from furnace.models.classifier import create_classifier
from furnace.models.tuning import set_tuning
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.optim import create_optimizer, layer_decay_groups, set_values
from furnace.runtime.precision import autocast
from furnace.runtime.train_state import TrainState
from furnace.runtime.trainer import FitOptions, fit, train_mode

CPU = torch.device("cpu")
RATES = {"lr": 1e-4, "weight_decay": 0.05}
SMOOTHING = 0.1


class Alternating:
    """A loader that does something of its own before each batch, and times both it and what is done with the batch."""

    def __init__(self, loader: Any, other: Callable[[Batch], None]) -> None:
        self.loader, self.sampler, self.other = loader, loader.sampler, other
        self.other_seconds: list[float] = []
        self.our_seconds: list[float] = []
        self.data_seconds: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            drawn = time.perf_counter()
            self.other(batch)
            other = time.perf_counter()
            yield batch
            self.our_seconds.append(time.perf_counter() - other)
            self.other_seconds.append(other - drawn)
            self.data_seconds.append(drawn - began)


def build(args: argparse.Namespace, tune: str = "full") -> nn.Module:
    """The classifier; the same weights each time."""
    model = create_classifier(args.model, args.checkpoint, nb_classes=7)
    set_tuning(model, tune)
    return model


def train_loader(args: argparse.Namespace, model: nn.Module, updates: int) -> tuple[Any, BatchPlan, Manifest]:
    """Augmented batches of real images, decoded in this process."""
    manifest = read_manifest(args.csv, args.root, nb_classes=7).split("train")
    manifest = manifest.take(np.linspace(0, len(manifest) - 1, updates * args.batch_size).astype(int))
    plan = BatchPlan(args.batch_size, 1, 1, updates)
    sampler = TrainSampler(len(manifest), plan=plan, seed=0)
    transform = build_train_transform(model.provenance.data_config)
    return build_train_loader(manifest, transform, sampler, plan=plan, seed=0, num_workers=0), plan, manifest


def ours(model: nn.Module, loader: Any, plan: BatchPlan, manifest: Manifest, amp_dtype: str) -> None:
    """One epoch by the toolkit."""
    state = TrainState(model, create_optimizer(layer_decay_groups(model, layer_decay=0.9)))
    fit(state, make_step(manifest, device=CPU, smoothing=SMOOTHING), None, loader, plan,
        {name: np.full(plan.steps_per_epoch, value) for name, value in RATES.items()},
        options=FitOptions(epochs=1, seed=0, device=CPU, amp_dtype=amp_dtype))


def plain_update(model: nn.Module, manifest: Manifest, amp_dtype: str) -> Callable[[Batch], None]:
    """The obvious update."""
    optimizer = create_optimizer(layer_decay_groups(model, layer_decay=0.9))
    set_values(optimizer, RATES)
    torch.nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    model.train()

    def update(batch: Batch) -> None:
        targets = torch.from_numpy(manifest.labels[batch.indices])
        optimizer.zero_grad()
        with autocast(CPU, amp_dtype):
            loss = F.cross_entropy(model(batch.images.to(memory_format=torch.channels_last)), targets,
                                   label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()

    return update


def spread(values: list[float]) -> str:
    """Median with the middle half."""
    low, high = np.percentile(values, [25, 75])
    return f"{statistics.median(values):7.3f} [{low:.3f}, {high:.3f}]"


def compare(args: argparse.Namespace) -> None:
    """Ours against the plain loop in one precision; then ours in bf16 against ours in fp32."""
    print(f"{args.model}, batches of {args.batch_size}, {torch.get_num_threads()} threads, {args.repeats} alternations "
          "after 2 that do not count; seconds of an update, median [quartiles]")
    model, other = build(args), build(args)
    loader, plan, manifest = train_loader(args, model, args.repeats + 2)
    both = Alternating(loader, plain_update(other, manifest, args.amp_dtype))
    ours(model, both, plan, manifest, args.amp_dtype)
    mine, plain = both.our_seconds[2:], both.other_seconds[2:]
    print(f"  plain loop, {args.amp_dtype}     {spread(plain)}")
    print(f"  this toolkit, {args.amp_dtype}   {spread(mine)}")
    print(f"  ratio               {spread([a / b for a, b in zip(mine, plain, strict=True)])}; of the medians "
          f"{statistics.median(mine) / statistics.median(plain):.3f}")
    print(f"  decoding and augmenting a batch (one process) {spread(both.data_seconds[2:])}")
    difference = max(float((p - q).abs().max()) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    print(f"  largest difference of a weight after {len(both.our_seconds)} updates: {difference:.1e}")
    model, other = build(args), build(args)
    ratios: list[float] = []
    loader, plan, manifest = train_loader(args, model, args.repeats + 2)
    slow = plain_update(other, manifest, "fp32")
    both = Alternating(loader, slow)
    for _ in range(5):
        ratios.append(matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16))
    ours(model, both, plan, manifest, "bf16")
    for _ in range(5):
        ratios.append(matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16))
    fast, slow_seconds = both.our_seconds[2:], both.other_seconds[2:]
    speed = [a / b for a, b in zip(slow_seconds, fast, strict=True)]
    print(f"  fp32 : bf16 of an update {spread(speed)}; of a bare {spread(ratios)} matrix product; share "
          f"{statistics.median(speed) / statistics.median(ratios):.2f}")


def memory(args: argparse.Namespace) -> None:
    """Each setting in a process of its own."""
    print(f"{args.model}, batches of {args.batch_size}, {args.amp_dtype}: peak resident memory, GB (before the first "
          "update: interpreter, libraries, weights)")
    for tune in ("full", "lora", "head"):
        for checkpointing in (False, True):
            if tune == "head" and checkpointing:
                continue
            words = ["--once", tune, *["--grad_checkpointing"] * checkpointing]
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], *words], check=True,
                                  stdout=subprocess.PIPE, text=True)
            told = json.loads(done.stdout.splitlines()[-1])
            print(f"  {tune:<5} {'with' if checkpointing else 'without'} --grad_checkpointing: {told['peak']:.2f} "
                  f"({told['before']:.2f}); {told['seconds']:.2f} s an update; {told['trained']:,} trained parameters")


def once(args: argparse.Namespace) -> None:
    """Three updates."""
    model = build(args, args.once)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    loader, plan, manifest = train_loader(args, model, 3)
    train_mode(model, model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timed = Alternating(loader, lambda batch: None)
    ours(model, timed, plan, manifest, args.amp_dtype)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "before": before / 1e6,
                      "seconds": statistics.median(timed.our_seconds),
                      "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=None)
    parser.add_argument("--model", default="timm:vit_base_patch16_224")
    parser.add_argument("--checkpoint", default="random")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--amp_dtype", default="fp32")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--once", metavar="TUNE", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--grad_checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    (once if args.once else memory if args.memory else compare)(args)


if __name__ == "__main__":
    main()
