"""Image retrieval: how well the images of a query's class come first when a gallery is ranked by cosine similarity."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from furnace.data.manifest import Manifest
from furnace.evaluation.knn import Groups, blocks, check_features, compute_device, nearest_neighbours, same_group
from furnace.evaluation.sheets import RIGHT, WRONG, Tile, image_sheet
from furnace.evaluation.statistics import resampling_for, resampling_weights, too_few_draws
from furnace.runtime.progress import progress

NAMES = ("recall_at_1", "recall_at_5", "recall_at_10", "map_at_r", "ndcg_at_10")
RANKS, DEPTH = (1, 5, 10), 10
CELLS = 1 << 23  # similarities that are ranked at a time: 32 MB, some 300 MB with keys and ranks
GALLERY_BLOCK = 16_384
NEIGHBOURS_SHOWN = 5


def evaluate_retrieval(gallery: Manifest, gallery_features: np.ndarray, queries: Manifest,
                       query_features: np.ndarray, *, exclude: str | None, sheet: Path, shown: int = 8,
                       stratify: bool = False, resamples: int = 1000, seed: int = 0,
                       device: torch.device | str = "cpu") -> dict[str, Any]:
    """Mean scores of all queries with 95 % intervals, and a picture of some of them.

    Args:
        gallery, gallery_features: N images and their (N, D) features; the queries' own for leave-one-out.
        queries, query_features: M images, (M, D).
        exclude: patient_id or lesion_id, see ``group_codes``.
        sheet: the PNG of queries with their five nearest images.
        shown: how many queries it shows; 0 draws none.
        stratify, resamples: of the bootstrap, see ``statistics.resampling_for``.
        seed: of the choice of shown queries.
        device: where to compare features.

    Returns:
        ``mean_scores`` with "gallery_images" and "excluded" (what a query cannot find, in words).
    """
    codes = group_codes(gallery.frame, queries.frame, exclude)
    scores = retrieval_scores(gallery_features, gallery.labels, query_features, queries.labels, exclude=codes,
                              device=device)
    some = queries_to_show(queries.labels, shown, seed=seed)
    if len(some):
        found = nearest_neighbours(gallery_features, query_features[some], NEIGHBOURS_SHOWN,
                                   exclude=(codes[0], codes[1][some]), device=device)
        neighbour_sheet(sheet, gallery, queries.take(some), *found,
                        title=f"{queries.name}: queries and their nearest images by cosine similarity. "
                              "Blue frame: the query's class, orange: another")
    excluded = f"the query itself and its {exclude}" if exclude else "the query itself"
    return {"gallery_images": len(gallery), "excluded": excluded,
            **mean_scores(scores, queries.frame, stratify=stratify, resamples=resamples)}


def mean_scores(scores: dict[str, np.ndarray], frame: pd.DataFrame, *, stratify: bool = False,
                resamples: int = 1000) -> dict[str, Any]:
    """Means over the queries that have a relevant image, with 95 % percentile intervals of resampled queries.

    Args:
        scores: (M,) for each name, NaN where a query has no relevant image.
        frame: M rows of the queries, whose patients (or lesions) are resampled as a whole where they are known.
        stratify, resamples: see ``statistics.resampling_for``.

    Returns:
        ``{"queries", "without_relevant", "resampling", "metrics": {name: {"value", "low", "high", "reason"}}}``.
    """
    kept = ~np.isnan(next(iter(scores.values())))
    result = {"queries": int(kept.sum()), "without_relevant": int((~kept).sum())}
    if not kept.any():
        reason = "no query has a relevant image in the gallery"
        return {**result, "resampling": None, "metrics": {name: {"value": None, "low": None, "high": None,
                                                                 "reason": reason} for name in scores}}
    resampling = resampling_for(frame[kept].reset_index(drop=True), stratify=stratify, resamples=resamples)
    labels = frame["label"].to_numpy()[kept]
    metrics = {}
    for name, score in scores.items():
        values = score[kept]
        draws = resampling_weights(labels, resampling)
        means = np.concatenate([counts @ values / counts.sum(axis=1) for counts in draws])
        reason = too_few_draws(means, labels, resampling)
        low, high = (None, None) if reason else map(float, np.percentile(means, [2.5, 97.5]))
        metrics[name] = {"value": float(values.mean()), "low": low, "high": high, "reason": reason}
    return {**result, "resampling": resampling.describe(), "metrics": metrics}


def retrieval_scores(gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray, *,
                     exclude: Groups | None = None, device: torch.device | str = "cpu") -> dict[str, np.ndarray]:
    """Rank the gallery for every query by cosine similarity and score the ranking.

    An image of the gallery is relevant when it has the query's label. Equal similarities rank by index.

    - recall_at_k: 1 when any of the first k is relevant, else 0 (Recall@K of metric learning);
    - map_at_r: MAP@R of Musgrave et al. 2020, with R the number of relevant images in the gallery: the sum of the
      precisions at the relevant ranks among the first R, divided by R;
    - ndcg_at_10: nDCG with relevance 0 or 1 and the discount log2(rank + 1), cut at rank 10 as is usual for retrieval
      benchmarks (over the whole ranking it hardly tells models apart when classes are large); the ideal ranking has
      min(R, 10) relevant images first.

    Args:
        gallery: (N, D) features, not necessarily normalised.
        gallery_labels: (N,).
        queries: (M, D).
        query_labels: (M,).
        exclude: group codes (N,), (M,), see ``group_codes``: a query's own group is taken out of the gallery.
        device: where to compute, in float32 (on the CPU instead of mps).

    Returns:
        (M,) float64 for each of NAMES, NaN for a query without a relevant image in the gallery.
    """
    check_features(gallery, queries, exclude)
    device = compute_device(device)
    labels, wanted = (torch.from_numpy(np.array(y, dtype=np.int64)).to(device) for y in (gallery_labels, query_labels))
    norms = torch.cat([rows.norm(dim=1) for _, rows in blocks(gallery, GALLERY_BLOCK, device)]).clamp(min=1e-12)
    scores = {name: np.full(len(queries), np.nan) for name in NAMES}
    with progress(total=len(queries), unit="query", desc="retrieval", delay=5, leave=False) as bar:
        for start, some in blocks(queries, max(1, CELLS // len(gallery)), device):
            some, here = F.normalize(some), slice(start, start + len(some))
            similarities = torch.cat([some @ rows.T for _, rows in blocks(gallery, GALLERY_BLOCK, device)], dim=1)
            similarities /= norms  # (m, N)
            relevant = wanted[here, None] == labels[None]
            if exclude is not None:
                own = same_group(exclude, 0, len(gallery), start, len(some), device)
                similarities.masked_fill_(own, -torch.inf)
                relevant &= ~own
            totals = relevant.sum(dim=1)
            depth = min(len(gallery), max(DEPTH, int(totals.max())))
            ranked = rank_relevance(similarities, relevant)[:, :depth]
            for name, values in ranking_scores(ranked, totals).items():
                scores[name][here] = values.cpu().numpy()
            bar.update(len(some))
    return scores


def rank_relevance(similarities: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Order ``relevant`` (m, N) by descending similarities (m, N), equal ones by column.

    One integer per place holds similarity, column and relevance, so that a plain sort of numbers will do: several times
    faster than a stable sort with its indices.
    """
    bits = (0.0 - similarities).view(torch.int32)  # ascending; 0 - x leaves no negative zero
    bits ^= (bits >> 31) & 0x7FFFFFFF  # negative floats: now the integers have the floats' order
    keys = bits.long()
    keys <<= 32
    keys |= torch.arange(similarities.shape[1], device=keys.device) << 1
    keys |= relevant
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)
    else:
        keys = keys.sort(dim=1).values
    return (keys & 1).bool()


def ranking_scores(ranked: torch.Tensor, totals: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of rankings whose relevant places are known.

    Args:
        ranked: (M, n) bool, the relevant places of each ranking from its first rank on; n is at least R, or all.
        totals: (M,) R, the number of relevant images in the gallery.

    Returns:
        (M,) float64 for each of NAMES, NaN where R is 0.
    """
    ranks = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    within = ranked & (ranks <= totals[:, None])
    precision = ranked.cumsum(dim=1, dtype=torch.int32) / ranks  # (M, n)
    gains = 1 / torch.log2(torch.arange(2, DEPTH + 2, device=ranked.device, dtype=torch.float64))
    ideal = gains.cumsum(dim=0)[totals.clamp(min=1, max=DEPTH) - 1]
    head = ranked[:, :DEPTH].double()
    scores = {f"recall_at_{k}": ranked[:, :k].any(dim=1).double() for k in RANKS}
    scores["map_at_r"] = (precision * within).sum(dim=1, dtype=torch.float64) / totals
    scores["ndcg_at_10"] = head @ gains[:head.shape[1]] / ideal
    return {name: torch.where(totals > 0, scores[name], torch.nan) for name in NAMES}


def queries_to_show(labels: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """At most ``count`` positions in (M,) labels, at random, the classes in turn so that rare ones are seen too."""
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = pd.Series(labels[order]).groupby(labels[order]).cumcount().to_numpy()  # how many of the class came before
    return order[np.lexsort((labels[order], turn))[:count]]


def neighbour_sheet(path: str | Path, gallery: Manifest, queries: Manifest, indices: np.ndarray,
                    similarities: np.ndarray, *, title: str) -> None:
    """Draw each query with its nearest images, class and similarity; the frame tells a right class.

    Args:
        path: the PNG.
        gallery: N images.
        queries: M images, a row each.
        indices, similarities: (M, k) from ``nearest_neighbours``.
        title: over the sheet.
    """
    names, rows = gallery.class_names, []
    for i, label in enumerate(queries.labels):
        row = [Tile(queries.path_of(i), f"query: {names[label]}\n{Path(queries.filenames[i]).name}")]
        for j, similarity in zip(indices[i], similarities[i], strict=True):
            if j >= 0:
                found = gallery.labels[j]
                row.append(Tile(gallery.path_of(j), f"{names[found]}\n{similarity:.3f}",
                                RIGHT if found == label else WRONG))
        rows.append(row)
    image_sheet(path, rows, title=title)


def group_codes(gallery: pd.DataFrame, queries: pd.DataFrame, column: str | None) -> Groups:
    """Which images a query must not find: itself and, with a column, those with the same id.

    Args:
        gallery: N rows with ``image`` and the column.
        queries: M rows.
        column: patient_id or lesion_id; None leaves out the same image alone. An empty id is a group of its own.

    Returns:
        Codes (N,), (M,): equal for images of one group.
    """
    both = pd.concat([gallery, queries], ignore_index=True)
    names = "image\0" + both["image"].astype(str)
    if column:
        names = ("id\0" + both[column].astype(str)).where(both[column].notna(), names)
    codes = pd.factorize(names)[0].astype(np.int64)
    return codes[:len(gallery)], codes[len(gallery):]
