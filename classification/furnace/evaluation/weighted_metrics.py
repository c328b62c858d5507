"""The metrics of many resamples at once, a resample given by how often it holds each image.

The definitions are those of ``furnace.evaluation.metrics``. What does not depend on the resample (orders, ties, bins)
is computed once; a resample then costs sums, running sums and products.
"""

import numpy as np
from scipy import sparse

from furnace.evaluation.metrics import ECE_BINS, NAMES, checked_inputs

NEEDS_EVERY_CLASS = ("macro_f1", "auroc", "auroc_ovr", "aupr", "sensitivity")


def weighted_metrics(y_true: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of NAMES of each of R resamples.

    Args:
        y_true: (N,) integers in 0..K-1.
        probabilities: (N, K), rows summing to 1, or (N,) probabilities of class 1.
        weights: (R, N) counts; image i occurs ``weights[r, i]`` times in resample r.

    Returns:
        (R,) float64 by name, NaN where ``classification_metrics`` of the resample is NaN.
    """
    values = WeightedMetrics(y_true, probabilities)(weights)
    return {name: values[name] for name in NAMES}


class WeightedMetrics:
    """``weighted_metrics`` of fixed images, prepared for many calls.

    Args:
        y_true: (N,) integers in 0..K-1.
        probabilities: (N, K) or (N,) as above.
    """

    def __init__(self, y_true: np.ndarray, probabilities: np.ndarray) -> None:
        y_true, p = checked_inputs(y_true, probabilities)
        self.k = k = p.shape[1]
        self.by_class = np.argsort(y_true, kind="stable")  # images in the order of their classes
        y_true, p = y_true[self.by_class], p[self.by_class]
        bounds = np.searchsorted(y_true, np.arange(k + 1))
        self.blocks = [slice(low, high) for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
        self.sums = _sums_over_images(y_true, p)
        self.gaps = self.sums[k * k:-1].sum(axis=1)[:, None] / len(p)  # (ECE_BINS, 1) accuracy - confidence, by share
        # as in metrics.py: the multi-class AUROC is of rows that sum to 1 exactly, the others of the rows as given
        rows = p if k == 2 else p / p.sum(axis=1, keepdims=True)
        self.scored = (1,) if k == 2 else range(k)
        self.ranks = {a: _Ranks(rows[:, a], self.blocks[a]) for a in self.scored}
        self.precision = {a: _Precision(p[:, a], self.blocks[a]) for a in self.scored}

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """(R, N) counts -> (R,) values by the names of NAMES, and two statistics for the interval of ece.

        "signed_ece": each bin's gap with the sign that it has in the images themselves, so that what resampling adds
        to a gap is not folded to the positive side. "noise_ece": the ece of the resample's gaps less the images' own.
        """
        w = np.ascontiguousarray(np.asarray(weights).T[self.by_class], dtype=np.float64)  # (R, N) -> (N, R)
        k, blocks = self.k, self.blocks
        sums = self.sums @ w  # (K * K + ECE_BINS + 1, N) @ (N, R)
        confusion = sums[:k * k].reshape(k, k, -1)  # (true, predicted, R)
        n = confusion.sum(axis=1)  # (K, R) images of each class
        with np.errstate(divide="ignore", invalid="ignore"):
            values = _confusion_metrics(confusion)
            gaps = sums[k * k:-1] / n.sum(axis=0)  # (ECE_BINS, R)
            values["ece"] = np.abs(gaps).sum(axis=0)
            values["signed_ece"] = (np.sign(self.gaps) * gaps).sum(axis=0)
            values["noise_ece"] = np.abs(gaps - self.gaps).sum(axis=0)
            values["brier"] = sums[-1] / n.sum(axis=0)
            wins = np.zeros((k, k, w.shape[1]))  # (a, b, R) pairs where class a's image has the higher p_a
            for a in self.scored:
                wins[a] = self.ranks[a].wins(w, blocks)
            values |= _auroc(wins, n)
            values["aupr"] = np.mean([self.precision[a].average(w) / n[a] for a in self.scored], axis=0)
        return _undefined(values, confusion, n)


def _sums_over_images(y_true: np.ndarray, p: np.ndarray) -> sparse.csr_array:
    """(K * K + ECE_BINS + 1, N): times weights it gives the confusion matrix, the bins' gaps and the Brier sum."""
    n, k = p.shape
    y_pred, confidence, image = p.argmax(axis=1), p.max(axis=1), np.arange(n)
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    brier = (p[:, 1] - y_true) ** 2 if k == 2 else ((p - np.eye(k)[y_true]) ** 2).sum(axis=1)
    rows = np.concatenate([y_true * k + y_pred, k * k + bins, np.full(n, k * k + ECE_BINS)])
    entries = np.concatenate([np.ones(n), (y_true == y_pred) - confidence, brier])
    return sparse.csr_array((entries, (rows, np.tile(image, 3))), shape=(k * k + ECE_BINS + 1, n))


def _confusion_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """(K, K, R) true by predicted -> values, NaN from 0 / 0 where a class is absent."""
    k = len(confusion)
    n, predicted = confusion.sum(axis=1), confusion.sum(axis=0)  # (K, R)
    right, total = np.einsum("kkr->kr", confusion), n.sum(axis=0)  # (K, R), (R,)
    recall, either = right / n, n + predicted
    f1 = np.where(either > 0, 2 * right / either, 0.0)
    specificity = 1 - (predicted - right) / (total - n)
    distance = (np.arange(k)[:, None] - np.arange(k)) ** 2
    observed = np.einsum("ij,ijr->r", distance, confusion)
    by_chance = np.einsum("ij,ir,jr->r", distance, n, predicted) / total
    return {"acc": right.sum(axis=0) / total,
            "bacc": np.where(n > 0, recall, 0).sum(axis=0) / (n > 0).sum(axis=0),
            "weighted_f1": (f1 * n).sum(axis=0) / total,
            "macro_f1": f1.mean(axis=0),
            "kappa": 1 - observed / by_chance,
            "sensitivity": recall[1] if k == 2 else recall.mean(axis=0),
            "specificity": specificity[1] if k == 2 else specificity.mean(axis=0)}


def _auroc(wins: np.ndarray, n: np.ndarray) -> dict[str, np.ndarray]:
    """One-versus-one and one-versus-rest macro averages; class 1 against 0 when binary.

    Args:
        wins: (K, K, R) Mann-Whitney counts of class a over b by the score of a.
        n: (K, R) images of each class.
    """
    k = len(n)
    if k == 2:
        binary = wins[1, 0] / (n[0] * n[1])
        return {"auroc": binary, "auroc_ovr": binary.copy()}
    pairs = wins / (n[:, None] * n)
    one_vs_one = np.mean([pairs[a, b] for a in range(k) for b in range(k) if a != b], axis=0)
    one_vs_rest = (wins.sum(axis=1) / (n * (n.sum(axis=0) - n))).mean(axis=0)
    return {"auroc": one_vs_one, "auroc_ovr": one_vs_rest}


def _undefined(values: dict[str, np.ndarray], confusion: np.ndarray, n: np.ndarray) -> dict[str, np.ndarray]:
    """NaN exactly where metrics.py has a reason, and nowhere else."""
    k = len(n)
    present = n > 0  # (K, R)
    one_class = present.sum(axis=0) <= 1
    undefined = {name: ~present.all(axis=0) for name in NEEDS_EVERY_CLASS}
    if k == 2:
        undefined |= {"aupr": ~present[1], "sensitivity": ~present[1]}
    undefined["specificity"] = one_class & (present[1] if k == 2 else True)
    undefined["kappa"] = (confusion > 0).sum(axis=(0, 1)) <= 1
    undefined["kappa"] &= np.einsum("kkr->r", confusion) == n.sum(axis=0)  # that one cell is on the diagonal
    nothing = ~present.any(axis=0)
    return {name: np.where(undefined.get(name, False) | nothing, np.nan, values[name]) for name in values}


class _Ranks:
    """Mann-Whitney counts of one class's images over those of each other class, a tie counting half."""

    def __init__(self, score: np.ndarray, block: slice) -> None:
        """(N,) scores of the class, and where its images are."""
        self.block = block
        positive = np.sort(score[block])
        self.order = np.argsort(-score[block], kind="stable")
        above = len(positive) - np.searchsorted(positive, score, side="right")  # (N,) images of the class above each
        level = len(positive) - np.searchsorted(positive, score, side="left")  # above or tied
        places, self.place = np.unique(above * (len(positive) + 1) + level, return_inverse=True)
        self.above, self.level = np.divmod(places, len(positive) + 1)

    def wins(self, w: np.ndarray, blocks: list[slice]) -> np.ndarray:
        """(N, R) weights -> (K, R) counts against each class, 0 against its own."""
        running = np.zeros((len(self.order) + 1, w.shape[1]))
        np.cumsum(w[self.block][self.order], axis=0, out=running[1:])
        table = running[self.above]
        table += running[self.level]
        table /= 2
        return np.stack([np.zeros(w.shape[1]) if block == self.block else
                         np.einsum("nr,nr->r", table.take(self.place[block], axis=0), w[block]) for block in blocks])


class _Precision:
    """Average precision of one class against the rest: precision at every threshold, tied images together."""

    def __init__(self, score: np.ndarray, block: slice) -> None:
        """(N,) scores of the class, and where its images are."""
        self.block = block
        thresholds, which = np.unique(score[block], return_inverse=True)
        m = len(thresholds)
        step = m - np.searchsorted(thresholds, score, side="right")  # (N,) of descending thresholds; m: below them all
        image = np.flatnonzero(step < m)
        self.steps = sparse.csr_array((np.ones(len(image)), (step[image], image)), shape=(m, len(score)))
        self.own = sparse.csr_array((np.ones(len(which)), (m - 1 - which, np.arange(len(which)))),
                                    shape=(m, len(which)))

    def average(self, w: np.ndarray) -> np.ndarray:
        """(N, R) weights -> (R,) sum over the class's images of the precision at their threshold."""
        called = np.cumsum(self.steps @ w, axis=0)  # (m, R) images at or above each threshold
        own = self.own @ w[self.block]
        return (own * np.cumsum(own, axis=0) / np.maximum(called, 1)).sum(axis=0)
