"""Classification without training: weighted k nearest neighbours, nearest prototypes, and few-shot draws.

The features may be large: they are read in blocks, normalised on the fly, and no (queries x train) matrix is kept. On
top of the features the functions take some hundred megabytes at most.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from furnace.runtime.progress import progress

TRAIN_BLOCK, QUERY_BLOCK = 16_384, 1024  # rows that are compared at a time: 64 MB of similarities
TEMPERATURE = 0.07
NEIGHBOURS = (10, 20, 100, 200)
EPISODES = 100
NORMAL_95 = 1.959964  # 97.5 % quantile of the standard normal distribution

Groups = tuple[np.ndarray, np.ndarray]  # codes of the train images (N,) and of the queries (M,); below 0: no group


def nearest_neighbours(train: np.ndarray, queries: np.ndarray, k: int, *, exclude: Groups | None = None,
                       device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """The k train images of highest cosine similarity for each query.

    Args:
        train: (N, D) features, not necessarily normalised. A zero vector has similarity 0 to everything.
        queries: (M, D).
        k: how many.
        exclude: group codes of train and queries: a query gets no neighbour with its own code (itself, another image
            of the same lesion). A code below 0 is no group.
        device: where to compute, in float32 (on the CPU instead of mps).

    Returns:
        Indices (M, k) int64 and similarities (M, k) float32, in descending order, equal similarities by index. Where a
        query has fewer than k neighbours the rest is -1 and -inf.

    Raises:
        ValueError: k below 1, or shapes that do not fit.
    """
    if k < 1:
        raise ValueError(f"k = {k}: at least one neighbour")
    check_features(train, queries, exclude)
    device = compute_device(device)
    indices = torch.full((len(queries), k), -1, dtype=torch.int64)
    values = torch.full((len(queries), k), -torch.inf)
    with progress(total=len(train), unit="image", desc="neighbours", delay=5, leave=False) as bar:
        for first, rows in blocks(train, TRAIN_BLOCK, device):
            rows = F.normalize(rows)
            for start, some in blocks(queries, QUERY_BLOCK, device):
                similarities = F.normalize(some) @ rows.T  # (m, D) x (D, n) -> (m, n)
                if exclude is not None:
                    similarities.masked_fill_(same_group(exclude, first, len(rows), start, len(some), device),
                                              -torch.inf)
                found, at = top(similarities, min(k, len(rows)))
                here = slice(start, start + len(some))
                values[here], indices[here] = _merge(values[here], indices[here], found.cpu(), at.cpu() + first, k)
            bar.update(len(rows))
    indices[values == -torch.inf] = -1
    return indices.numpy(), values.numpy()


def top(similarities: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row of (m, n), descending, equal ones by column: values and columns, (m, k)."""
    values, columns = similarities.topk(k, dim=1)
    # torch.topk picks any of equal values: rows where one equal to the last was left out are sorted as a whole
    tied = (similarities >= values[:, -1:]).sum(dim=1) > k
    if tied.any():
        ordered, order = similarities[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = ordered[:, :k], order[:, :k]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _merge(values: torch.Tensor, indices: torch.Tensor, more: torch.Tensor, at: torch.Tensor,
           k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of the neighbours so far, (m, k), and of a later block's, (m, b): of equal ones the earlier."""
    values, order = torch.cat([values, more], dim=1).sort(dim=1, descending=True, stable=True)
    return values[:, :k], torch.cat([indices, at], dim=1).gather(1, order)[:, :k]


def check_features(train: np.ndarray, queries: np.ndarray, exclude: Groups | None = None) -> None:
    """Raise ValueError for shapes that do not fit together."""
    if train.ndim != 2 or queries.ndim != 2 or train.shape[1] != queries.shape[1] or not len(train):
        raise ValueError(f"need (N, D) and (M, D) features with N > 0, got {train.shape} and {queries.shape}")
    if exclude is not None and (exclude[0].shape, exclude[1].shape) != ((len(train),), (len(queries),)):
        raise ValueError(f"group codes {[codes.shape for codes in exclude]} for {len(train)} and {len(queries)} rows")


def compute_device(device: torch.device | str) -> torch.device:
    """The device, the CPU instead of mps (which lacks float64 and a topk of any size)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def blocks(features: np.ndarray, size: int, device: torch.device,
           dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, torch.Tensor]]:
    """Pieces of at most ``size`` rows: the first row's index, and (b, D) on the device."""
    for first in range(0, len(features), size):
        block = np.asarray(features[first:first + size])
        if not block.flags.writeable:  # a memory map: torch wants to be able to write
            block = block.copy()
        yield first, torch.from_numpy(np.ascontiguousarray(block)).to(device, dtype)


def same_group(codes: Groups, first: int, n: int, start: int, m: int, device: torch.device) -> torch.Tensor:
    """(m, n) bool: query ``start + i`` and train image ``first + j`` are of one group."""
    theirs = torch.from_numpy(np.array(codes[0][first:first + n], dtype=np.int64)).to(device)
    ours = torch.from_numpy(np.array(codes[1][start:start + m], dtype=np.int64)).to(device)
    return (ours[:, None] == theirs[None]) & (ours[:, None] >= 0)


def knn_probabilities(indices: np.ndarray, similarities: np.ndarray, train_labels: np.ndarray, *, nb_classes: int,
                      k: int | None = None, temperature: float = TEMPERATURE) -> np.ndarray:
    """Weighted k-NN of Wu et al. 2018, as in DINO (Caron et al. 2021): each neighbour votes exp(similarity / T).

    The votes of the k neighbours are divided by their sum (published code of some follow-ups divides by the sum over
    the largest k, so that a smaller k's do not sum to 1; the predicted class is the same).

    Args:
        indices, similarities: (M, K) from ``nearest_neighbours``.
        train_labels: (N,).
        nb_classes: width of the result.
        k: use the first k of the K neighbours, all when None.
        temperature: T; 0.07 is DINO's.

    Returns:
        (M, nb_classes) float64; classes that no neighbour has get 0.

    Raises:
        ValueError: a query has no neighbour at all, more neighbours are asked for than there are, or T is not above 0.
    """
    k = indices.shape[1] if k is None else k
    if not 1 <= k <= indices.shape[1] or not temperature > 0:
        raise ValueError(f"k = {k} of {indices.shape[1]} neighbours, temperature {temperature}")
    if (indices[:, 0] < 0).any():
        raise ValueError(f"query {int(np.argmax(indices[:, 0] < 0))} has no neighbour to vote")
    similarities = similarities[:, :k].astype(np.float64)
    votes = np.exp((similarities - similarities[:, :1]) / temperature)  # the highest votes 1; -inf votes 0
    probabilities = np.zeros((len(indices), nb_classes))
    rows = np.broadcast_to(np.arange(len(indices))[:, None], votes.shape)
    np.add.at(probabilities, (rows, np.asarray(train_labels)[indices[:, :k]]), votes)
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def simpleshot_probabilities(train: np.ndarray, train_labels: np.ndarray, queries: np.ndarray, *, nb_classes: int,
                             device: torch.device | str = "cpu") -> np.ndarray:
    """Nearest class prototype, SimpleShot's CL2N (Wang et al. 2019): centred by the train mean, then L2-normalised.

    A prototype is the mean of its class's transformed features. Only the argmax, the class of the prototype at the
    smallest Euclidean distance, is SimpleShot's; the softmax of the negative squared distances turns it into
    probabilities in the same order, as the AUROC needs them (they are not calibrated).

    Args:
        train: (N, D).
        train_labels: (N,).
        queries: (M, D).
        nb_classes: width of the result; classes without train images get 0.
        device: where to compute, in float64 (on the CPU instead of mps).

    Returns:
        (M, nb_classes) float64.
    """
    check_features(train, queries)
    device = compute_device(device)
    labels = torch.from_numpy(np.array(train_labels, dtype=np.int64)).to(device)
    mean = train_mean(train, device)
    prototypes = torch.zeros(nb_classes, train.shape[1], dtype=torch.float64, device=device)
    for first, rows in blocks(train, TRAIN_BLOCK, device, torch.float64):
        prototypes.index_add_(0, labels[first:first + len(rows)], F.normalize(rows - mean))
    counts = labels.bincount(minlength=nb_classes)
    prototypes /= counts.clamp(min=1)[:, None]
    probabilities = np.empty((len(queries), nb_classes))
    for start, some in blocks(queries, TRAIN_BLOCK, device, torch.float64):
        distances = torch.cdist(F.normalize(some - mean), prototypes).square()
        distances[:, counts == 0] = torch.inf
        probabilities[start:start + len(some)] = (-distances).softmax(dim=1).cpu().numpy()
    return probabilities


def train_mean(train: np.ndarray, device: torch.device) -> torch.Tensor:
    """(D,) float64, summed block by block."""
    return sum(rows.sum(dim=0) for _, rows in blocks(train, TRAIN_BLOCK, device, torch.float64)) / len(train)


def k_shot(train: np.ndarray, train_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray, *,
           nb_classes: int, shots: Sequence[int] = (1, 2, 4, 8, 16), episodes: int = EPISODES,
           seed: int = 0) -> list[dict[str, Any]]:
    """How good the nearest prototype is when only k train images of each class have a label.

    Each episode draws k images of every class without replacement (all of a class that has fewer) and classifies the
    same queries by SimpleShot's CL2N. The centre is the mean of the whole train set, whose labels it does not need.
    The interval is the normal one of the mean over the draws, value +- 1.96 sd / sqrt(episodes), as is usual in
    few-shot work: it speaks of the draws, the test set being fixed, and not of other test images.

    Args:
        train, train_labels: (N, D), (N,).
        queries, query_labels: (M, D), (M,).
        nb_classes: K; classes without train images are never predicted.
        shots: the values of k.
        episodes: draws for each k, at least 2. Default 100.
        seed: of the draws; each k has its own stream, so that its result does not depend on the others.

    Returns:
        For each k ``{"shots", "episodes", "short_classes", "metrics": {"bacc" | "acc": {"value", "low", "high", "sd",
        "reason"}}}``; ``short_classes`` has fewer than k train images. bacc is the mean recall of the classes that
        occur among the queries.
    """
    check_features(train, queries)
    if min(shots) < 1 or episodes < 2:
        raise ValueError(f"shots {list(shots)} must be 1 or more, episodes {episodes} 2 or more")
    cpu = torch.device("cpu")
    mean = train_mean(train, cpu)
    members = [np.flatnonzero(np.asarray(train_labels) == label) for label in range(nb_classes)]
    present = np.array([label for label in range(nb_classes) if len(members[label])])
    classes, truth, counts = np.unique(query_labels, return_inverse=True, return_counts=True)
    one_hot = np.eye(len(classes))[truth]  # (M, classes)
    moved = torch.cat([F.normalize(some - mean).float() for _, some in blocks(queries, TRAIN_BLOCK, cpu,
                                                                             torch.float64)])
    results = []
    for k in shots:
        draw, scores = np.random.default_rng([seed, k]), np.empty((episodes, 2))
        for episode in range(episodes):
            chosen = [draw.choice(members[label], min(k, len(members[label])), replace=False) for label in present]
            right = present[_nearest_prototype(train, chosen, mean, moved)] == query_labels
            scores[episode] = (right @ one_hot / counts).mean(), right.mean()
        short = [label for label in range(nb_classes) if len(members[label]) < k]
        results.append({"shots": int(k), "episodes": episodes, "short_classes": short,
                        "metrics": {name: _interval_of_mean(scores[:, i]) for i, name in enumerate(("bacc", "acc"))}})
    return results


def _nearest_prototype(train: np.ndarray, chosen: list[np.ndarray], mean: torch.Tensor,
                       queries: torch.Tensor) -> np.ndarray:
    """(M,) position in ``chosen`` of the nearest prototype; ``queries`` (M, D) are transformed already."""
    rows = torch.from_numpy(np.asarray(train[np.concatenate(chosen)], dtype=np.float64))
    sizes = [len(indices) for indices in chosen]
    prototypes = torch.stack([part.mean(dim=0) for part in F.normalize(rows - mean).split(sizes)]).float()
    # |q - p|^2 = |q|^2 + |p|^2 - 2 q.p, and |q| is the same for all prototypes
    return (prototypes.square().sum(dim=1) - 2 * queries @ prototypes.T).argmin(dim=1).numpy()


def _interval_of_mean(scores: np.ndarray) -> dict[str, float | None]:
    """Mean over the draws (E,), its 95 % normal interval, and the draws' standard deviation."""
    value, sd = float(scores.mean()), float(scores.std(ddof=1))
    half = NORMAL_95 * sd / len(scores) ** 0.5
    return {"value": value, "low": value - half, "high": value + half, "sd": sd, "reason": None}
