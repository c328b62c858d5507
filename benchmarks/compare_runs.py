"""Balanced accuracy of finished runs on the same test images, with plain image bootstraps by scikit-learn's metric.

    python benchmarks/compare_runs.py RUN_DIR [RUN_DIR ...]

Prints each run's value with its 95 % percentile interval (1,000 resamples that hold every class, seed 0), then each
later run's difference from the first, resampled in pairs.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import balanced_accuracy_score

RESAMPLES = 1000


def main() -> None:
    """Compare the run directories named on the command line."""
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders:
        sys.exit(__doc__)
    tables = [pd.read_csv(folder / "test.csv").set_index("filename") for folder in folders]
    truth = tables[0]["true_label"].to_numpy()
    predicted = [table.loc[tables[0].index, "predicted_label"].to_numpy() for table in tables]
    rng, draws = np.random.default_rng(0), []
    while len(draws) < RESAMPLES:
        draw = rng.integers(0, len(truth), len(truth))
        if len(np.unique(truth[draw])) == len(np.unique(truth)):
            draws.append(draw)
    resampled = np.array([[balanced_accuracy_score(truth[draw], p[draw]) for draw in draws] for p in predicted])
    for folder, p, values in zip(folders, predicted, resampled, strict=True):
        low, high = np.percentile(values, [2.5, 97.5])
        print(f"{folder.name}: {balanced_accuracy_score(truth, p):.4f} [{low:.4f}, {high:.4f}]")
    for folder, p, values in zip(folders[1:], predicted[1:], resampled[1:], strict=True):
        low, high = np.percentile(resampled[0] - values, [2.5, 97.5])
        gap = balanced_accuracy_score(truth, predicted[0]) - balanced_accuracy_score(truth, p)
        print(f"{folders[0].name} - {folder.name}: {gap:.4f} [{low:.4f}, {high:.4f}]")


if __name__ == "__main__":
    main()
