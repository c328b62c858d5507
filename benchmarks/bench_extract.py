"""How fast features come: this toolkit's extraction against a plain loop, and the cache against both.

    python benchmarks/bench_extract.py --csv DATA/metadata.csv --root DATA [--model timm:vit_base_patch16_224]
    python benchmarks/bench_extract.py --csv DATA/metadata.csv --root DATA --whole

The first form takes ``--images`` images and alternates two sides, ``--repeats`` times each: ``extract_features`` as the
scripts call it (bf16, decoding workers), and a plain loop over the same timm model (inference mode, fp32, the same
batches, threads and decoded by the same workers). It prints the ratio of their times, the machine's own bf16:fp32 ratio
for a bare matrix product, measured in the same alternation, and the share of decoding in both.

``--whole`` extracts every image of the CSV into an empty cache in a process of its own, then asks for them again in a
new process, and prints both times without the imports.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from furnace.data.datasets import build_loader
from furnace.data.manifest import Manifest
from furnace.data.transforms import build_transform
from furnace.data.unlabelled import read_images
from furnace.evaluation.features import Extraction, backbone_features
from furnace.models import create_backbone

SIDE = 3072  # of the bare matrix product


def matmul_seconds(dtype: torch.dtype) -> float:
    """Best of three products of two square matrices."""
    a, b = (torch.randn(SIDE, SIDE, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return best


@torch.inference_mode()
def plain_loop(backbone: torch.nn.Module, manifest: Manifest, batch_size: int) -> tuple[float, np.ndarray]:
    """Seconds and (N, D) features of the obvious loop in fp32."""
    loader = build_loader(manifest, build_transform(backbone), batch_size=batch_size)
    began = time.perf_counter()
    rows = [backbone(batch.images) for batch in loader]
    return time.perf_counter() - began, torch.cat(rows).numpy()


def ours(backbone: torch.nn.Module, manifest: Manifest, batch_size: int) -> tuple[float, np.ndarray]:
    """Seconds and features of the scripts' extraction in bf16, without a cache."""
    how = Extraction(device=torch.device("cpu"), batch_size=batch_size, amp_dtype="bf16")
    began = time.perf_counter()
    features = backbone_features(backbone, manifest, how)
    return time.perf_counter() - began, features.embeddings


def decode_seconds(backbone: torch.nn.Module, manifest: Manifest) -> float:
    """Seconds of decoding and transforming alone, in this process."""
    dataset = build_loader(manifest, build_transform(backbone), batch_size=1).dataset
    began = time.process_time()
    for i in range(len(dataset)):
        dataset[i]
    return time.process_time() - began


def compare(args: argparse.Namespace) -> None:
    """Alternate both sides and the matrix products."""
    backbone = create_backbone(args.model, args.checkpoint)
    manifest = read_images(args.csv, args.root)
    manifest = manifest.take(np.linspace(0, len(manifest) - 1, args.images).astype(int))
    ours(backbone, manifest.take(range(16)), args.batch_size)  # warm up
    plain_loop(backbone, manifest.take(range(16)), args.batch_size)
    times: dict[str, list[float]] = {"plain fp32": [], "ours bf16": [], "speed-up": [], "matmul ratio": [], "share": []}
    for _ in range(args.repeats):
        ratio = matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16)
        slow, exact = plain_loop(backbone, manifest, args.batch_size)
        fast, rough = ours(backbone, manifest, args.batch_size)
        for name, value in (("plain fp32", slow), ("ours bf16", fast), ("speed-up", slow / fast),
                            ("matmul ratio", ratio), ("share", slow / fast / ratio)):
            times[name].append(value)
    print(f"{args.model}, {args.images} images, batches of {args.batch_size}, {torch.get_num_threads()} threads, "
          f"{args.repeats} alternations; median [min, max]")
    for name, values in times.items():
        print(f"  {name:<14} {statistics.median(values):8.3f} [{min(values):.3f}, {max(values):.3f}]")
    decoding = decode_seconds(backbone, manifest)
    threads = torch.get_num_threads()
    for name in ("plain fp32", "ours bf16"):
        print(f"  decoding, share of the core-seconds of {name}: "
              f"{decoding / (threads * statistics.median(times[name])):.1%}")
    cosine = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    print(f"  bf16 against fp32 features: cosine at least {cosine.min():.5f}")


def whole(args: argparse.Namespace) -> None:
    """Cold and warm, each in a new process."""
    with tempfile.TemporaryDirectory() as cache:
        told = []
        for _ in range(2):
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--once", cache], check=True,
                                  stdout=subprocess.PIPE, text=True)
            told.append(json.loads(done.stdout.splitlines()[-1]))
        size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    cold, warm = told
    print(f"{args.model}, {args.amp_dtype}: {cold['images']} images; cache {size / 1e6:.1f} MB")
    print(f"  first run   {cold['seconds']:8.1f} s, {cold['extracted']} images decoded")
    print(f"  second run  {warm['seconds']:8.1f} s, {warm['extracted']} images decoded: "
          f"{warm['seconds'] / cold['seconds']:.2%} of the first")


def once(args: argparse.Namespace) -> None:
    """One run in this process; the time from after the imports to the features: CSV, files, weights, cache, forward."""
    began = time.perf_counter()
    backbone = create_backbone(args.model, args.checkpoint)
    how = Extraction(device=torch.device("cpu"), batch_size=args.batch_size, amp_dtype=args.amp_dtype,
                     cache_dir=Path(args.once))
    features = backbone_features(backbone, read_images(args.csv, args.root), how)
    print(json.dumps({"seconds": time.perf_counter() - began, "extracted": features.extracted,
                      "images": len(features.embeddings)}))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=None)
    parser.add_argument("--model", default="timm:vit_base_patch16_224")
    parser.add_argument("--checkpoint", default="random")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--amp_dtype", default="bf16")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--once", metavar="CACHE", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    (once if args.once else whole if args.whole else compare)(args)


if __name__ == "__main__":
    main()
