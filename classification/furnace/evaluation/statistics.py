"""Confidence intervals and paired tests: bootstrap of images, patients or lesions, and DeLong's test.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993); DeLong, DeLong and Clarke-Pearson, Biometrics 44
(1988); Obuchowski, Biometrics 53 (1997) for clusters; Hand and Till, Machine Learning 45 (2001) for several classes.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm

from furnace.data.manifest import GROUP_COLUMNS
from furnace.evaluation.metrics import NAMES, Metrics, checked_inputs, classification_metrics
from furnace.evaluation.weighted_metrics import WeightedMetrics

LEVEL = 0.95
MOST_UNDEFINED = 0.05  # share of resamples that may lack a value before no interval is given
DELONG = {"auroc": "ovo", "auroc_ovr": "ovr"}
CHUNK_BYTES = 64 * 2**20  # of one array of weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resampling:
    """How resamples are drawn.

    Attributes:
        unit: what is drawn: "image", "patient" or "lesion".
        clusters: (N,) the unit of each image, any labels; None when each image is its own.
        stratify: keep the number of images of every class; not with clusters, which may hold several classes.
        resamples: how many.
        seed: of resample r together with r, so that no result depends on how the work is split.
    """

    unit: str = "image"
    clusters: np.ndarray | None = None
    stratify: bool = False
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stratify and self.clusters is not None:
            raise ValueError("clusters are never stratified: one may hold images of several classes")
        if self.resamples < 1:
            raise ValueError(f"need at least 1 resample, got {self.resamples}")

    def describe(self) -> str:
        """In words, e.g. "1,000 resamples of patients (patient_id)"."""
        column = "" if self.clusters is None else f" ({self.unit}_id)"
        return f"{self.resamples:,} resamples of {self.unit}s{column}" + ", stratified by class" * self.stratify


def resampling_for(frame: pd.DataFrame, *, stratify: bool = False, resamples: int = 1000, seed: int = 0) -> Resampling:
    """Patients if the table names them, else lesions, else images.

    Args:
        frame: a row per image; patient_id and lesion_id are used, an empty id is a group of its own.
        stratify: keep the number of images of every class; groups are resampled whole instead, with a warning.
        resamples: how many.
        seed: of the resamples.
    """
    for column in GROUP_COLUMNS:
        if column not in frame or not frame[column].notna().any():
            continue
        codes = pd.factorize(frame[column])[0]  # -1 where empty
        codes[codes < 0] = codes.max() + 1 + np.arange((codes < 0).sum())
        if len(np.unique(codes)) == len(codes):
            continue  # a patient per image says nothing; lesions may
        unit = column.removesuffix("_id")
        if stratify:
            logger.warning("%ss (%s) are resampled whole: the resamples are not stratified by class", unit, column)
        return Resampling(unit=unit, clusters=codes, resamples=resamples, seed=seed)
    return Resampling(stratify=stratify, resamples=resamples, seed=seed)


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; ``reason`` says why one of them is None."""

    value: float | None
    low: float | None
    high: float | None
    reason: str | None = None


def bootstrap_intervals(y_true: np.ndarray, probabilities: np.ndarray, resampling: Resampling) -> dict[str, Interval]:
    """95 % interval of every metric: percentiles of the resamples, for ece corrected for its bias.

    The expected calibration error of a sample is too high, because the gaps of its bins are taken without their signs,
    and that of a resample is too high once more. Its interval is of resamples in which every gap keeps the sign that
    it has in the sample (those vary as they should and are not biased), moved down by the bias that the resamples show
    (their mean ece - the value), cut to [0, 1] and widened where needed to hold the value. It begins at 0 when the
    value is no higher than the resamples' deviations from the sample make it in 97.5 % of a calibrated model's samples.
    Resamples in which a metric is undefined are left out; with more than 5 % of them there is no interval.

    Args:
        y_true: (N,) integers in 0..K-1.
        probabilities: (N, K), or (N,) probabilities of class 1.
        resampling: how the resamples are drawn.

    Returns:
        Interval by the names of NAMES.
    """
    y_true, p = checked_inputs(y_true, probabilities)
    metrics = classification_metrics(y_true, p)
    draws = _resampled(y_true, [p], resampling, [metrics])[0]
    intervals = {}
    for name in NAMES:
        value = None if np.isnan(metrics[name]) else metrics[name]
        reason = metrics.reasons.get(name) or too_few_draws(draws[name], y_true, resampling)
        if reason:
            intervals[name] = Interval(value, None, None, reason)
            continue
        low, high = _limits(draws[name])
        if name == "ece":
            noise = np.percentile(draws["noise_ece"], 50 * (1 + LEVEL))
            low, high = max(0.0, min(low, value)) if value > noise else 0.0, min(1.0, max(high, value))
        intervals[name] = Interval(value, low, high)
    return intervals


@dataclass(frozen=True)
class Difference:
    """Two models on the same images: first - second, its 95 % interval and two-sided p; ``reason`` for what is None."""

    first: float | None
    second: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    test: str
    reason: str | None = None


def paired_differences(y_true: np.ndarray, first: np.ndarray, second: np.ndarray,
                       resampling: Resampling) -> dict[str, Difference]:
    """Differences of every metric between two models, each resample used for both.

    The p of the paired bootstrap is 2 (1 + the smaller number of resampled differences on one side of 0) / (1 + R), at
    most 1, of the draws that make the interval. The p of auroc and auroc_ovr is DeLong's.

    Args:
        y_true: (N,) integers in 0..K-1.
        first: (N, K), or (N,) probabilities of class 1.
        second: as first, the other model.
        resampling: how the resamples are drawn.

    Returns:
        Difference by the names of NAMES.
    """
    y_true, first = checked_inputs(y_true, first)
    second = checked_inputs(y_true, second)[1]
    if first.shape != second.shape:
        raise ValueError(f"the models must have the same classes, got {first.shape} and {second.shape}")
    metrics = [classification_metrics(y_true, p) for p in (first, second)]
    draws = _resampled(y_true, [first, second], resampling, metrics)
    differences = {}
    for name in NAMES:
        values = [None if np.isnan(one[name]) else one[name] for one in metrics]
        test = "DeLong" if name in DELONG else "paired bootstrap"
        differing = draws[0][name] - draws[1][name]
        reason = metrics[0].reasons.get(name) or metrics[1].reasons.get(name)
        difference = None if reason else values[0] - values[1]
        reason = reason or too_few_draws(differing, y_true, resampling)
        if reason:
            differences[name] = Difference(*values, difference, None, None, None, test, reason)
            continue
        low, high = _limits(differing)
        if name in DELONG:
            tested = delong(y_true, first, second, how=DELONG[name], clusters=resampling.clusters)
            p_value, reason = tested.p_value, tested.reason
        else:
            p_value = _bootstrap_p(differing)
        differences[name] = Difference(*values, difference, low, high, p_value, test, reason)
    return differences


def _resampled(y_true: np.ndarray, models: list[np.ndarray], resampling: Resampling,
               metrics: list[Metrics]) -> list[dict[str, np.ndarray]]:
    """Of each model what its intervals are taken from, (R,) by name: the metrics of all resamples, and for ece the
    signed one less the bias, as the docstring of ``bootstrap_intervals`` says."""
    prepared = [WeightedMetrics(y_true, p) for p in models]
    parts: list[list[dict[str, np.ndarray]]] = [[] for _ in models]
    for weights in resampling_weights(y_true, resampling):
        for part, of_model in zip(parts, prepared, strict=True):
            part.append(of_model(weights))
    draws = [{name: np.concatenate([values[name] for values in part]) for name in part[0]} for part in parts]
    for one, values in zip(draws, metrics, strict=True):
        one["ece"] = one.pop("signed_ece") - (one["ece"].mean() - values["ece"])
    return draws


def resampling_weights(y_true: np.ndarray, resampling: Resampling) -> Iterator[np.ndarray]:
    """(r, N) counts of the next r resamples, few enough to fit CHUNK_BYTES as float64."""
    n = len(y_true)
    unit_of = np.arange(n)
    if resampling.clusters is not None:
        if len(resampling.clusters) != n:
            raise ValueError(f"{len(resampling.clusters)} clusters for {n} images")
        unit_of = pd.factorize(np.asarray(resampling.clusters))[0]
    units = int(unit_of.max()) + 1
    strata = [np.flatnonzero(y_true == k) for k in np.unique(y_true)] if resampling.stratify else [np.arange(units)]
    rows = int(np.clip(CHUNK_BYTES // (8 * n), 1, 64))
    for start in range(0, resampling.resamples, rows):
        chunk = np.empty((min(rows, resampling.resamples - start), n), dtype=np.int32)
        for r, counts in enumerate(chunk, start):
            rng = np.random.default_rng((resampling.seed, r))
            drawn = np.concatenate([stratum[rng.integers(0, len(stratum), len(stratum))] for stratum in strata])
            counts[:] = np.bincount(drawn, minlength=units)[unit_of]
        yield chunk


def too_few_draws(draws: np.ndarray, y_true: np.ndarray, resampling: Resampling) -> str | None:
    """Why these draws make no interval."""
    units = len(y_true if resampling.clusters is None else np.unique(resampling.clusters))
    if units < 2:
        return f"one {resampling.unit} cannot be resampled"
    undefined = np.isnan(draws).mean()
    if undefined > MOST_UNDEFINED:
        return f"no interval: undefined in {undefined:.0%} of the resamples, where a class is missing"
    return None


def _limits(draws: np.ndarray) -> tuple[float, float]:
    """Percentiles of the defined draws."""
    low, high = np.nanpercentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def _bootstrap_p(draws: np.ndarray) -> float:
    """Two-sided p of the difference 0, consistent with ``_limits``."""
    draws = draws[~np.isnan(draws)]
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (1 + tail) / (1 + len(draws))))


@dataclass(frozen=True)
class DeLong:
    """Areas under the ROC curve.

    Attributes:
        values: of the first model, and of the second if there is one.
        variance: of the one value, or of the difference first - second; NaN when a class has a single image.
        p_value: two-sided, of no difference; None for one model, and with a reason where it is not defined.
        reason: why p_value is None.
    """

    values: tuple[float, ...]
    variance: float
    p_value: float | None
    reason: str | None = None


def delong(y_true: np.ndarray, first: np.ndarray, second: np.ndarray | None = None, *, how: str = "ovo",
           clusters: np.ndarray | None = None) -> DeLong:
    """DeLong's variance and test of the area under the ROC curve, for any number of classes.

    The macro averages are linear combinations of the two-sample U-statistics A_ab (class a above class b by the
    probability of a), so an image's influence is the same combination of its placement values. The class sizes are
    taken as fixed. Influences are summed within a cluster, whose number G gives the factor G / (G - 1).

    Args:
        y_true: (N,) integers in 0..K-1, every class present.
        first: (N, K), or (N,) probabilities of class 1.
        second: the other model, paired by image.
        how: "ovo" (one-versus-one macro) or "ovr" (one-versus-rest macro); the same when binary.
        clusters: (N,) patient or lesion of each image.

    Returns:
        Values, variance and p.

    Raises:
        ValueError: a class is absent.
    """
    y_true, p = checked_inputs(y_true, first)
    models = [p] if second is None else [p, checked_inputs(y_true, second)[1]]
    found = [_influences(y_true, one, how) for one in models]
    values = tuple(value for value, _ in found)
    influence = found[0][1] if second is None else found[0][1] - found[1][1]
    variance = _variance(influence, y_true, clusters)
    if second is None:
        return DeLong(values, variance, None, "one model: nothing to compare")
    difference = values[0] - values[1]
    if np.isnan(variance):
        return DeLong(values, variance, None, "a class has a single image, or all images are of one group: no variance")
    # equal rankings leave only rounding, at most 1e-16 an image
    if variance <= 1e-28:
        same = abs(difference) < 1e-12
        return DeLong(values, 0.0, 1.0 if same else None, None if same else "the difference has no variance")
    return DeLong(values, variance, float(2 * norm.sf(abs(difference) / np.sqrt(variance))))


def _influences(y_true: np.ndarray, p: np.ndarray, how: str) -> tuple[float, np.ndarray]:
    """The macro area and the (N,) influences of the images, which sum to 0 in every class."""
    if how not in ("ovo", "ovr"):
        raise ValueError(f'how is "ovo" or "ovr", not {how!r}')
    n, k = len(y_true), p.shape[1]
    sizes = np.bincount(y_true, minlength=k)
    if not sizes.all():
        raise ValueError(f"class {np.flatnonzero(sizes == 0)[0]} is absent from these images")
    p = p if k == 2 else p / p.sum(axis=1, keepdims=True)  # as the AUROC of metrics.py
    area, influence = 0.0, np.zeros(n)
    for a in (1,) if k == 2 else range(k):
        for b in range(k):
            if a == b:
                continue
            share = 1.0 if k == 2 else 1 / (k * (k - 1)) if how == "ovo" else sizes[b] / (n - sizes[a]) / k
            over, under = y_true == a, y_true == b
            of_a, of_b = _placements(p[over, a], p[under, a])
            area += share * of_a.mean()
            influence[over] += share * (of_a - of_a.mean()) / sizes[a]
            influence[under] += share * (of_b - of_b.mean()) / sizes[b]
    return float(area), influence


def _placements(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m,) share of the negatives below each positive, and (n,) share of the positives above each negative."""
    def below(values: np.ndarray, among: np.ndarray) -> np.ndarray:
        among = np.sort(among)
        return (np.searchsorted(among, values, "left") + np.searchsorted(among, values, "right")) / (2 * len(among))
    return below(positive, negative), 1 - below(negative, positive)


def _variance(influence: np.ndarray, y_true: np.ndarray, clusters: np.ndarray | None) -> float:
    """Sum of squares, corrected by n / (n - 1) in every class or by G / (G - 1) over clusters; NaN of 0 / 0."""
    if clusters is None:
        sizes = np.bincount(y_true)
        squares = np.bincount(y_true, weights=influence ** 2)
        return float((squares * sizes / (sizes - 1)).sum()) if sizes.min() > 1 else float("nan")
    codes = pd.factorize(np.asarray(clusters))[0]
    groups = codes.max() + 1
    if groups < 2:
        return float("nan")
    return float((np.bincount(codes, weights=influence) ** 2).sum() * groups / (groups - 1))
