"""How long an update of a segmenter takes: this toolkit's training loop against a plain PyTorch loop.

    python benchmarks/bench_segmentation.py --csv DATA/masks.csv --root DATA --head linear [--model demo]

Trains two copies of one segmenter on the same augmented batches, an update of one after an update of the other:
``runtime.trainer.fit`` as segmentation/run.py calls it, and the obvious loop (autocast, the same heads and loss,
backward, AdamW over the same parameter groups). It prints the ratio of their times, what decoding and augmenting costs,
and how far the weights of the two are apart at the end.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench_finetune import Alternating, spread
from torch import nn

from furnace.data.joint_transforms import IGNORED, build_joint_transform
from furnace.data.samplers import TrainSampler
from furnace.data.segmentation import SegmentationManifest, read_segmentation
from furnace.data.segmentation_datasets import SegmentationBatch, build_segmentation_loader
from furnace.engine_for_segmentation import make_step
from furnace.models.segmenter import create_segmenter
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.optim import create_optimizer, layer_decay_groups, set_values
from furnace.runtime.precision import autocast
from furnace.runtime.train_state import TrainState
from furnace.runtime.trainer import FitOptions, fit

CPU = torch.device("cpu")
RATES = {"lr": 1e-4, "weight_decay": 0.05}


def plain_update(model: nn.Module, amp_dtype: str) -> Callable[[SegmentationBatch], None]:
    """The obvious update: cross-entropy and soft Dice, each a mean over the images."""
    optimizer = create_optimizer(layer_decay_groups(model, layer_decay=0.75))
    set_values(optimizer, RATES)
    torch.nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    model.train()

    def update(batch: SegmentationBatch) -> None:
        optimizer.zero_grad()
        with autocast(CPU, amp_dtype):
            logits = model(batch.images.to(memory_format=torch.channels_last)).float()
            known = (batch.masks != IGNORED).flatten(1).float()
            entropy = F.cross_entropy(logits, batch.masks, ignore_index=IGNORED, reduction="none").flatten(1)
            lesion, truth = logits.softmax(1)[:, 1].flatten(1) * known, (batch.masks == 1).flatten(1).float()
            dice = (2 * (lesion * truth).sum(1) + 1) / (lesion.sum(1) + truth.sum(1) + 1)
            loss = (entropy.sum(1) / known.sum(1) + 1 - dice).mean()
        loss.backward()
        optimizer.step()

    return update


def ours(model: nn.Module, loader: Alternating, plan: BatchPlan, manifest: SegmentationManifest, amp_dtype: str
         ) -> None:
    """One epoch by the toolkit."""
    state = TrainState(model, create_optimizer(layer_decay_groups(model, layer_decay=0.75)))
    fit(state, make_step(manifest, device=CPU, dice_weight=1.0), None, loader, plan,
        {name: np.full(plan.steps_per_epoch, value) for name, value in RATES.items()},
        options=FitOptions(epochs=1, seed=0, device=CPU, amp_dtype=amp_dtype))


def main() -> None:
    """Read the command line, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--head", default="upernet")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--amp_dtype", default="fp32")
    args = parser.parse_args()

    model, other = (create_segmenter(args.model, args.checkpoint, head=args.head, channels=args.channels,
                                     input_size=args.size) for _ in range(2))
    manifest = read_segmentation(args.csv, root_path=args.root).split("train")
    manifest = manifest.take(np.linspace(0, len(manifest) - 1, (args.repeats + 2) * args.batch_size).astype(int))
    plan = BatchPlan(args.batch_size, 1, 1, args.repeats + 2)
    config = model.provenance.data_config
    transform = build_joint_transform(size=args.size, mean=tuple(config["mean"]), std=tuple(config["std"]))
    loader = build_segmentation_loader(manifest, transform, TrainSampler(len(manifest), plan=plan, seed=0), plan=plan,
                                       seed=0, num_workers=0)
    both = Alternating(loader, plain_update(other, args.amp_dtype))
    ours(model, both, plan, manifest, args.amp_dtype)

    mine, plain = both.our_seconds[2:], both.other_seconds[2:]
    print(f"{args.model} with head {args.head}, batches of {args.batch_size} images of {args.size} px, "
          f"{torch.get_num_threads()} threads, {args.repeats} alternations after 2 that do not count; seconds of an "
          "update, median [quartiles]")
    print(f"  plain loop, {args.amp_dtype}     {spread(plain)}")
    print(f"  this toolkit, {args.amp_dtype}   {spread(mine)}")
    print(f"  ratio               {spread([a / b for a, b in zip(mine, plain, strict=True)])}; of the medians "
          f"{statistics.median(mine) / statistics.median(plain):.3f}")
    print(f"  decoding and augmenting a batch (one process) {spread(both.data_seconds[2:])}")
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    difference = max(float((p - q).detach().abs().max()) for p, q in pairs)
    print(f"  largest difference of a weight after {plan.steps_per_epoch} updates: {difference:.1e}")


if __name__ == "__main__":
    main()
