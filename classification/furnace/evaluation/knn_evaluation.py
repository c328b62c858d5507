"""Everything that knn_eval.py reports, on features that are there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from furnace.data.manifest import Manifest
from furnace.evaluation.knn import k_shot, knn_probabilities, nearest_neighbours, simpleshot_probabilities
from furnace.evaluation.report import predictions_table, score_split
from furnace.evaluation.retrieval import evaluate_retrieval
from furnace.evaluation.statistics import resampling_for
from furnace.runtime import files
from furnace.runtime.run_directory import RunDirectory

SHOWN_K = 20  # whose predictions test.csv has, where it is among the ks
TABLE_METRICS = ("bacc", "acc", "auroc", "weighted_f1")


def evaluate_neighbours(run: RunDirectory, images: Manifest, embeddings: np.ndarray, *, ks: Sequence[int],
                        temperature: float, shots: Sequence[int], episodes: int, gallery: str = "train",
                        exclude: str | None = None, shown: int = 8, stratify: bool = False, resamples: int = 1000,
                        seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Classify the test images by k-NN and prototypes, and rank the gallery for them.

    Writes test.csv (predictions of k = 20, else of the first k), table.csv and plots/retrieval.png.

    Args:
        run: the directory.
        images: train, then val for the gallery train_val, then test.
        embeddings: (N, D) features of the images.
        ks: numbers of neighbours; a k above the number of train images takes all of them.
        temperature: of the votes.
        shots, episodes: of ``knn.k_shot``.
        gallery: train, train_val or test (leave-one-out).
        exclude, shown: of ``retrieval.evaluate_retrieval``.
        stratify, resamples: of the bootstrap.
        seed: of the few-shot draws and the shown queries.
        device: where to compare features.

    Returns:
        What results.json has of the test split: the entries of ``score_split`` for test.csv's k, "k", "knn" by k,
        "simpleshot", "k_shot" and "retrieval".
    """
    train, test, classes = images.split("train"), images.split("test"), images.nb_classes
    n, first = len(train), len(images) - len(test)
    features, queries = embeddings[:n], embeddings[first:]
    indices, similarities = nearest_neighbours(features, queries, min(max(ks), n), device=device)
    votes = {k: knn_probabilities(indices, similarities, train.labels, nb_classes=classes, k=min(k, n),
                                  temperature=temperature) for k in ks}
    main_k = SHOWN_K if SHOWN_K in votes else ks[0]
    run.write_predictions("test", predictions_table(test.filenames, test.labels, votes[main_k]))
    prototypes = simpleshot_probabilities(features, train.labels, queries, nb_classes=classes, device=device)
    few = k_shot(features, train.labels, queries, test.labels, nb_classes=classes, shots=shots, episodes=episodes,
                 seed=seed)
    pool = (test, queries) if gallery == "test" else (images.take(range(first)), embeddings[:first])
    ranking = evaluate_retrieval(*pool, test, queries, exclude=exclude, sheet=run.path / "plots" / "retrieval.png",
                                 shown=shown, stratify=stratify, resamples=resamples, seed=seed, device=device)
    resampling = resampling_for(test.frame, stratify=stratify, resamples=resamples)
    scored = {k: score_split(test.labels, p, resampling=resampling) for k, p in votes.items()}
    split = {**scored[main_k], "k": main_k,
             "knn": {str(k): {"neighbours": min(k, n), "metrics": scored[k]["metrics"]} for k in ks},
             "simpleshot": {"metrics": score_split(test.labels, prototypes, resampling=resampling)["metrics"]},
             "k_shot": few, "retrieval": {"gallery": gallery, **ranking}}
    files.write_table(run.path / "table.csv", result_table(split))
    return split


def result_table(split: dict[str, Any]) -> pd.DataFrame:
    """A row per method and metric: method, metric, value, low, high (NaN where there is no value)."""
    methods = {f"knn_{k}": entry["metrics"] for k, entry in split["knn"].items()}
    methods["simpleshot"] = split["simpleshot"]["metrics"]
    methods = {name: {key: metrics[key] for key in TABLE_METRICS} for name, metrics in methods.items()}
    methods |= {f"{entry['shots']}_shot": entry["metrics"] for entry in split["k_shot"]}
    methods["retrieval"] = split["retrieval"]["metrics"]
    return pd.DataFrame([{"method": method, "metric": name, **{key: entry[key] for key in ("value", "low", "high")}}
                         for method, metrics in methods.items() for name, entry in metrics.items()]
                        ).astype({"value": float, "low": float, "high": float})


def result_lines(results: dict[str, Any]) -> str:
    """The numbers for the eye, a line per method, and what is to be known of them."""
    split = results["splits"]["test"]
    lines = [f"{results['data_set']}, {results['model']}: {split['n']} test images, {results['amp_dtype']}; "
             f"95 % intervals from {split['resampling']}, for few shots over the draws"]
    for method, rows in result_table(split).groupby("method", sort=False):
        cells = [f"{row.metric} {row.value:.4f}" + ("" if np.isnan(row.low) else f" [{row.low:.4f}, {row.high:.4f}]")
                 for row in rows.itertuples()]
        lines.append(f"  {method:<11} " + "  ".join(cells))
    for entry in split["k_shot"]:
        if entry["short_classes"]:
            names = ", ".join(results["class_names"][label] for label in entry["short_classes"])
            lines.append(f"  {entry['shots']}_shot: {names}: fewer than {entry['shots']} train images, all of them in "
                         "each draw")
    ranking = split["retrieval"]
    lines.append(f"  retrieval: {ranking['queries']} queries in {ranking['gallery_images']} images "
                 f"({ranking['gallery']}), {ranking['excluded']} left out; {ranking['without_relevant']} queries "
                 "without a relevant image")
    lines.append(f"  test.csv has the predictions of knn_{split['k']}")
    return "\n".join(lines)
