"""Segmentation runs beside two trivial baselines, and each against the first, image by image.

    python benchmarks/compare_segmentations.py --csv DATA/masks.csv --root DATA RUN_DIR [RUN_DIR ...]

Baselines, on the same test images at their own size: the disc in the middle whose size is best on train, and Otsu's
threshold (the darker side; its largest component, holes filled). 95 % intervals resample lesions or patients where the
CSV has them, else images; the paired ones use each resample for both.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from furnace.data.images import load_rgb
from furnace.data.masks import load_mask
from furnace.data.segmentation import SegmentationManifest, read_segmentation
from furnace.evaluation.mask_baselines import best_disc, centred_disc, otsu_mask
from furnace.evaluation.masks import largest_component
from furnace.evaluation.segmentation_metrics import score_segmentation, segmentation_row
from furnace.evaluation.statistics import Resampling, resampling_for, resampling_weights

SHOWN = ("dice", "jaccard", "threshold_jaccard", "hd95", "boundary_f1")


def table_of(manifest: SegmentationManifest, predict: Callable[[int], np.ndarray]) -> pd.DataFrame:
    """A row per image of what a function draws."""
    return pd.DataFrame([segmentation_row(name, predict(i), load_mask(manifest.mask_path_of(i)))
                         for i, name in enumerate(tqdm(manifest.filenames))])


def baselines(train: SegmentationManifest, test: SegmentationManifest) -> dict[str, pd.DataFrame]:
    """Tables by name."""
    fraction = best_disc(load_mask(train.mask_path_of(i)) for i in range(len(train)))

    def disc(i: int) -> np.ndarray:
        return centred_disc(load_mask(test.mask_path_of(i)).shape, fraction)

    def otsu(i: int) -> np.ndarray:
        return largest_component(otsu_mask(load_rgb(test.path_of(i))))

    return {f"centred disc, {fraction:g} of the side": table_of(test, disc), "Otsu, largest component":
            table_of(test, otsu)}


def difference(first: pd.DataFrame, second: pd.DataFrame, name: str, resampling: Resampling) -> str:
    """Mean of second - first over the images, with its interval; images where either is not defined are left out."""
    values = (second[name] - first[name]).to_numpy(float)
    known = ~np.isnan(values)
    draws = np.concatenate([(weights @ np.where(known, values, 0.0)) / np.maximum(weights @ known, 1)
                            for weights in resampling_weights(np.zeros(len(values)), resampling)])
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{values[known].mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=None)
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    manifest = read_segmentation(args.csv, root_path=args.root)
    test = manifest.split("test")
    resampling = resampling_for(test.frame)
    tables = {str(run): pd.read_csv(run / "test.csv") for run in args.runs}
    for run, table in tables.items():
        if table["filename"].tolist() != test.filenames:
            raise SystemExit(f"{run} has other test images than {args.csv}")
    tables |= baselines(manifest.split("train"), test)
    first = next(iter(tables.values()))
    print(f"{len(test)} test images; 95 % intervals: {resampling.describe()}")
    for name, table in tables.items():
        metrics = score_segmentation(table, resampling=resampling)["metrics"]
        print(name)
        for metric in SHOWN:
            entry = metrics[metric]
            interval = "" if entry["low"] is None else f" [{entry['low']:.4f}, {entry['high']:.4f}]"
            against = "" if table is first else f"; minus the first {difference(first, table, metric, resampling)}"
            print(f"  {metric:<17} {entry['value']:.4f}{interval}{against}")


if __name__ == "__main__":
    main()
