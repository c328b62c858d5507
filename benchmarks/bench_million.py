"""A million cached features: read them, fit the published probe, ask 10,000 neighbours, score, and the peak memory.

    python benchmarks/bench_million.py FOLDER [--rows 1000000] [--width 768]

Writes random features of 7 overlapping classes as cache chunks into FOLDER (3 GB; kept, so that a second start reads
them), then measures each step. The peak is the operating system's (ru_maxrss).
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from furnace.evaluation.feature_cache import KEY_BYTES, FeatureCache
from furnace.evaluation.knn import knn_probabilities, nearest_neighbours
from furnace.evaluation.linear_probe import fit_linear_probe
from furnace.evaluation.metrics import classification_metrics
from furnace.evaluation.statistics import Resampling, bootstrap_intervals

CLASSES, CHUNK, QUERIES = 7, 4096, 10_000


def peak() -> float:
    """GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keys_of(rows: int) -> np.ndarray:
    """(rows, 16) uint8, each another."""
    return np.pad(np.arange(rows, dtype=np.int64).view(np.uint8).reshape(rows, 8), ((0, 0), (0, KEY_BYTES - 8)))


def draw(rows: int, width: int, first: int, labels: np.ndarray) -> np.ndarray:
    """(rows, width) float32 around class centres."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, width), dtype=np.float32)
    noise = np.random.default_rng((1, first)).standard_normal((rows, width), dtype=np.float32)
    return 0.05 * centres[labels] + noise


def main() -> None:
    """Measure the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    args = parser.parse_args()
    labels = np.random.default_rng(2).integers(0, CLASSES, args.rows)
    keys = keys_of(args.rows)
    cache = FeatureCache(args.folder, {"model": f"random_{args.rows}_{args.width}"})
    if cache.count(keys) < args.rows:
        for first in range(0, args.rows, CHUNK):
            part = slice(first, min(first + CHUNK, args.rows))
            cache.write(keys[part], draw(part.stop - first, args.width, first, labels[part]))

    def step(name: str, function):
        began = time.perf_counter()
        value = function()
        print(f"{name:<46} {time.perf_counter() - began:8.1f} s   peak so far {peak():.2f} GiB", flush=True)
        return value

    embeddings, known = step("read the cache", lambda: cache.load(keys, args.width))
    assert known.all()
    train, test = embeddings[:-QUERIES], embeddings[-QUERIES:]
    probe = step(f"fit the probe on {len(train):,} x {args.width}",
                 lambda: fit_linear_probe(train, labels[:-QUERIES], nb_classes=CLASSES))
    print(f"    {probe.iterations} iterations")
    probabilities = step("predict all", lambda: probe.predict_proba(embeddings))
    indices, similarities = step(f"20 nearest neighbours of {QUERIES:,} queries",
                                 lambda: nearest_neighbours(train, test, 20))
    votes = knn_probabilities(indices, similarities, labels[:-QUERIES], nb_classes=CLASSES)
    metrics = step("metrics of all", lambda: classification_metrics(labels, probabilities))
    step(f"metrics of {QUERIES:,} with 1,000 resamples",
         lambda: bootstrap_intervals(labels[-QUERIES:], probabilities[-QUERIES:], Resampling()))
    right = (votes.argmax(1) == labels[-QUERIES:]).mean()
    print(f"accuracy of the probe {metrics['acc']:.4f}, of k-NN {right:.4f}; peak {peak():.2f} GiB")


if __name__ == "__main__":
    main()
