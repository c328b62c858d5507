"""Metrics of masks: closed forms, the ISIC challenge's own score on PNG files, and brute force."""

import math
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from furnace.evaluation.segmentation_metrics import (
    COUNTS,
    NAMES,
    OF_AN_IMAGE,
    confusion_counts,
    image_metrics,
    overlap_means,
    pooled_metrics,
    score_segmentation,
    segmentation_row,
)
from furnace.evaluation.statistics import Resampling, resampling_for

EMPTY, FULL = np.zeros((8, 8), dtype=bool), np.ones((8, 8), dtype=bool)


def square(start: int, end: int, size: int = 8) -> np.ndarray:
    """Rows and columns start..end - 1."""
    mask = np.zeros((size, size), dtype=bool)
    mask[start:end, start:end] = True
    return mask


def blob(seed: int, *, shape: tuple[int, int] = (450, 600), shift: float = 0.0, size: float = 0.5) -> np.ndarray:
    """An uneven disc."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    y, x = y - height / 2 - shift, x - width / 2 - shift
    return np.hypot(y, x) < height * size / 2 * (1 + 0.1 * np.sin(5 * np.arctan2(y, x) + seed))


def table_of(pairs: list[tuple[np.ndarray, np.ndarray]]) -> pd.DataFrame:
    """A row per (predicted, truth)."""
    return pd.DataFrame([segmentation_row(f"{i}.png", *pair) for i, pair in enumerate(pairs)])


# ------------------------------------------------------------------------------------------------------ one image

def test_the_published_example() -> None:
    """4 x 4 squares that share 4 pixels: Dice 1/4, Jaccard 1/7; 24 of 64 pixels wrong."""
    metrics = image_metrics(square(0, 4), square(2, 6))
    assert tuple(metrics) == OF_AN_IMAGE and all(type(value) is float for value in metrics.values())
    assert metrics["dice"] == 0.25 and metrics["jaccard"] == pytest.approx(1 / 7, abs=1e-15)
    assert metrics["threshold_jaccard"] == 0 and metrics["pixel_acc"] == 40 / 64
    assert metrics["sensitivity"] == 0.25 and metrics["specificity"] == 36 / 48
    assert confusion_counts(square(0, 4), square(2, 6)) == {"tp": 4, "fp": 12, "fn": 12, "tn": 36}


def test_predicted_and_truth_are_not_interchangeable() -> None:
    """A square of 4 inside one of 16: nothing false is found, a quarter of the lesion is."""
    metrics = image_metrics(square(2, 4), square(1, 5))
    assert metrics["sensitivity"] == 0.25 and metrics["specificity"] == 1
    metrics = image_metrics(square(1, 5), square(2, 4))
    assert metrics["sensitivity"] == 1 and metrics["specificity"] == 48 / 60


@pytest.mark.parametrize(("predicted", "truth", "expected"), [
    (EMPTY, EMPTY, {"dice": 1, "jaccard": 1, "threshold_jaccard": 1, "pixel_acc": 1, "sensitivity": math.nan,
                    "specificity": 1, "hd95": math.nan, "boundary_f1": math.nan}),
    (EMPTY, square(2, 6), {"dice": 0, "jaccard": 0, "threshold_jaccard": 0, "pixel_acc": 0.75, "sensitivity": 0,
                           "specificity": 1, "hd95": math.nan, "boundary_f1": 0}),
    (square(2, 6), EMPTY, {"dice": 0, "jaccard": 0, "threshold_jaccard": 0, "pixel_acc": 0.75,
                           "sensitivity": math.nan, "specificity": 0.75, "hd95": math.nan, "boundary_f1": 0}),
    (FULL, FULL, {"dice": 1, "jaccard": 1, "threshold_jaccard": 1, "pixel_acc": 1, "sensitivity": 1,
                  "specificity": math.nan, "hd95": 0, "boundary_f1": 1}),
], ids=["both empty", "nothing predicted", "nothing there", "full"])
def test_the_edges(predicted: np.ndarray, truth: np.ndarray, expected: dict) -> None:
    """1 for nothing against nothing, 0 for one of them, NaN for what has no meaning."""
    assert image_metrics(predicted, truth) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("found", "expected"), [(13, 0.65), (12, 0.0), (20, 1.0)])
def test_threshold_jaccard_keeps_the_threshold_itself(found: int, expected: float) -> None:
    """13 of 20 pixels are exactly 0.65."""
    truth = np.zeros((1, 30), dtype=bool)
    truth[:, :20] = True
    predicted = truth.copy()
    predicted[:, found:] = False
    metrics = image_metrics(predicted, truth)
    assert metrics["threshold_jaccard"] == expected and metrics["jaccard"] == found / 20


def test_distances_of_parallel_lines() -> None:
    """Every pixel is 5 pixels from the other line; the tolerance counts its end."""
    predicted, truth = (np.zeros((20, 20), dtype=bool) for _ in range(2))
    predicted[3], truth[8] = True, True
    assert image_metrics(predicted, truth)["hd95"] == 5
    for tolerance, expected in ((5, 1), (4.99, 0)):
        assert image_metrics(predicted, truth, tolerance=tolerance)["boundary_f1"] == expected


def test_boundary_f1_is_the_harmonic_mean_of_two_shares() -> None:
    """A line of 10 pixels, of which 4 are found: precision 1; within 2 pixels of these 4 lie 6 of the 10."""
    truth, predicted = (np.zeros((9, 30), dtype=bool) for _ in range(2))
    truth[4, 5:15], predicted[4, 5:9] = True, True
    assert image_metrics(predicted, truth)["boundary_f1"] == pytest.approx(2 * 0.6 / 1.6, abs=1e-15)
    assert image_metrics(predicted, truth, tolerance=0)["boundary_f1"] == pytest.approx(2 * 0.4 / 1.4, abs=1e-15)
    # distances: four times 0 one way; 0 0 0 0 1 2 3 4 5 6 the other; the 95th percentile of 14 is at 12.35
    assert image_metrics(predicted, truth)["hd95"] == pytest.approx(5.35, abs=1e-12)


def slow_hd95(predicted: np.ndarray, truth: np.ndarray) -> float:
    """All pairs of boundary pixels; the percentile by hand."""
    def edge(mask: np.ndarray) -> list[tuple[int, int]]:
        padded = np.pad(mask, 1)
        return [(y, x) for y, x in np.argwhere(mask)
                if not (padded[y, x + 1] and padded[y + 2, x + 1] and padded[y + 1, x] and padded[y + 1, x + 2])]

    sides = edge(predicted), edge(truth)
    distances = sorted(min(math.dist(one, other) for other in others)
                       for side, others in (sides, sides[::-1]) for one in side)
    place = 0.95 * (len(distances) - 1)
    low = math.floor(place)
    high = min(low + 1, len(distances) - 1)
    return distances[low] + (place - low) * (distances[high] - distances[low])


@pytest.mark.parametrize("seed", range(12))
def test_hd95_equals_brute_force(seed: int) -> None:
    """Noise, blobs and single pixels."""
    rng = np.random.default_rng(seed)
    noise = rng.random((2, 14, 17))
    predicted, truth = (noise > 0.8) if seed % 2 else ndimage.gaussian_filter(noise, (0, 2, 2)) > 0.5
    predicted[rng.integers(14), rng.integers(17)] = truth[rng.integers(14), rng.integers(17)] = True
    assert image_metrics(predicted, truth)["hd95"] == pytest.approx(slow_hd95(predicted, truth), abs=1e-9)


def test_a_mismatch_and_what_is_no_mask_are_refused() -> None:
    """Sizes are named; nothing is resized silently."""
    for function in (image_metrics, confusion_counts):
        with pytest.raises(ValueError, match="600 x 450 pixels and the true one 224 x 224"):
            function(np.ones((450, 600), dtype=bool), np.ones((224, 224), dtype=bool))
        with pytest.raises(ValueError, match="bool"):
            function(np.full((4, 4), 255, dtype=np.uint8), np.ones((4, 4), dtype=bool))


# --------------------------------------------------------------------------------------- the challenge's own score

def challenge_pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """(predicted, truth) of 600 x 450: good, bad, round the threshold, empty, and errors unseen at 224 pixels."""
    truth = blob(0)
    lines = truth.copy()
    unseen = sorted(set(range(450)) - {math.floor(i * 450 / 224) for i in range(224)})
    lines[unseen[::4]] = True
    empty = np.zeros_like(truth)
    corner = empty.copy()
    corner[:9, :9] = True
    return [(blob(1), truth), (blob(0, shift=25), truth), (blob(0, shift=26), truth), (blob(0, shift=90), truth),
            (lines, truth), (empty, truth), (empty, empty), (corner, truth), (blob(2, size=0.6), blob(1, size=0.62))]


def test_equal_to_the_challenge_s_score_on_png_files(tmp_path) -> None:
    """Each image, and the means; sensitivity and specificity where they are defined."""
    from isic_challenge_scoring.load_image import iter_image_pairs
    from isic_challenge_scoring.segmentation import SegmentationScore

    pairs = challenge_pairs()
    for folder, which in (("predicted", 0), ("truth", 1)):
        (tmp_path / folder).mkdir()
        for number, pair in enumerate(pairs):
            name = f"ISIC_{number:07d}_segmentation.png"
            Image.fromarray(pair[which].astype(np.uint8) * 255).save(tmp_path / folder / name)
    theirs = {"dice": "dice", "jaccard": "jaccard", "threshold_jaccard": "threshold_jaccard", "pixel_acc": "accuracy",
              "sensitivity": "sensitivity", "specificity": "specificity"}
    files = list(iter_image_pairs(tmp_path / "truth", tmp_path / "predicted"))
    table = table_of([(file.prediction_image > 128, file.truth_image > 128) for file in files])
    assert len(files) == 9
    assert list(table["threshold_jaccard"].eq(0)) == [False, False, True, True, True, True, False, True, False]
    assert table["jaccard"][1:3].between(0.64, 0.66).all(), "on both sides of the threshold"
    for file, row in zip(files, table.to_dict("records"), strict=True):
        expected = SegmentationScore([file]).macro_average
        for ours, name in theirs.items():
            if not math.isnan(row[ours]):
                assert row[ours] == pytest.approx(expected[name], abs=1e-12), (file.image_id, ours)
    means = SegmentationScore.from_dir(tmp_path / "truth", tmp_path / "predicted").macro_average
    scored = score_segmentation(table, resampling=Resampling(resamples=20))["metrics"]
    for name in ("dice", "jaccard", "threshold_jaccard", "pixel_acc", "specificity"):
        assert scored[name]["value"] == pytest.approx(means[theirs[name]], abs=1e-6)


def test_errors_that_vanish_at_224_pixels_count_at_native_size() -> None:
    """Lines one pixel high lie between the rows that nearest sampling keeps."""
    lines, truth = challenge_pairs()[4]
    rows, columns = np.arange(224) * 450 // 224, np.arange(224) * 600 // 224
    assert image_metrics(lines[rows][:, columns], truth[rows][:, columns])["dice"] == 1
    dice = 2 * truth.sum() / (truth.sum() + lines.sum())  # the lines only add pixels
    assert dice < 0.8 and image_metrics(lines, truth)["dice"] == pytest.approx(dice, abs=1e-15)


# ----------------------------------------------------------------------------------------------------- all images

def test_pooled_metrics_are_of_summed_pixels() -> None:
    """A large bad and a small good image: not the mean of the two."""
    table = table_of([(square(0, 4), square(2, 6)), (square(0, 2), square(0, 2))])
    pooled = pooled_metrics(table)
    assert pooled == pytest.approx({"pooled_dice": 2 * 8 / (2 * 8 + 24), "pooled_jaccard": 8 / 32}, abs=1e-15)
    assert pooled["pooled_dice"] != pytest.approx(table["dice"].mean())
    assert pooled_metrics({"tp": 3, "fp": 1, "fn": 0}) == pytest.approx({"pooled_dice": 6 / 7, "pooled_jaccard": 0.75})
    assert pooled_metrics({"tp": [0, 0], "fp": [0, 0], "fn": [0, 0]}) == {"pooled_dice": 1, "pooled_jaccard": 1}


def random_table(n: int, *, seed: int = 0) -> pd.DataFrame:
    """Metrics of noise; some images without a lesion or a prediction."""
    rng = np.random.default_rng(seed)
    pairs = [tuple(rng.random((2, 9, 9)) > rng.random() * 0.9) for _ in range(n)]
    pairs[0], pairs[1], pairs[2] = (EMPTY, EMPTY), (EMPTY, square(1, 4)), (square(2, 5), EMPTY)
    return table_of(pairs)


def test_means_of_the_overlaps_are_those_of_the_whole_score() -> None:
    """What an epoch is chosen by is what the test reports, images without lesion included; nothing else is in it."""
    table = random_table(30)
    means = overlap_means(table[list(COUNTS)].to_numpy())
    scored = score_segmentation(table, resampling=Resampling(resamples=20))["metrics"]
    assert list(means) == ["dice", "jaccard", "threshold_jaccard", "pixel_acc", "pooled_dice", "pooled_jaccard"]
    for name, value in means.items():
        assert type(value) is float and value == pytest.approx(scored[name]["value"], abs=1e-14)


def test_means_of_the_overlaps_by_hand() -> None:
    """Dice 1/4, 1 (nothing there, nothing found) and 0 (found where nothing is); Jaccard 1/7, 1, 0."""
    pairs = [(square(0, 4), square(2, 6)), (EMPTY, EMPTY), (square(2, 6), EMPTY)]
    means = overlap_means(np.array([[confusion_counts(*pair)[name] for name in COUNTS] for pair in pairs]))
    assert means == pytest.approx({
        "dice": (0.25 + 1) / 3, "jaccard": (1 / 7 + 1) / 3, "threshold_jaccard": 1 / 3,
        "pixel_acc": (40 / 64 + 1 + 48 / 64) / 3, "pooled_dice": 8 / (8 + 24 + 16), "pooled_jaccard": 4 / 44},
        abs=1e-15)
    assert overlap_means(np.array([[13, 0, 7, 0], [12, 0, 8, 0]]))["threshold_jaccard"] == 0.325, "0.65 itself counts"


@pytest.mark.parametrize("groups", [None, 7])
def test_intervals_equal_those_of_tables_drawn_one_by_one(groups: int | None) -> None:
    """Rows repeated as drawn, means and pooled metrics of every such table, percentiles of all."""
    table = random_table(30)
    clusters = None if groups is None else np.arange(30) % groups
    resampling = Resampling(unit="image" if groups is None else "patient", clusters=clusters, resamples=200, seed=5)
    result = score_segmentation(table, resampling=resampling)
    units = [np.array([i]) for i in range(30)] if groups is None else [np.flatnonzero(clusters == g) for g in
                                                                       range(groups)]
    draws = []
    for r in range(200):
        drawn = np.random.default_rng((5, r)).integers(0, len(units), len(units))
        rows = table.iloc[np.concatenate([units[u] for u in drawn])]
        draws.append({**rows[list(OF_AN_IMAGE)].mean(), **pooled_metrics(rows)})
    draws = pd.DataFrame(draws)
    assert tuple(result["metrics"]) == NAMES and result["resampling"] == resampling.describe()
    for name, entry in result["metrics"].items():
        value = table[name].mean() if name in table else pooled_metrics(table)[name]
        assert entry["value"] == pytest.approx(value, abs=1e-12)
        assert entry["low"] == pytest.approx(np.percentile(draws[name], 2.5), abs=1e-12)
        assert entry["high"] == pytest.approx(np.percentile(draws[name], 97.5), abs=1e-12)
        assert entry["low"] < entry["value"] < entry["high"]


def test_what_is_left_out_and_what_is_empty_is_counted() -> None:
    """3 images without hd95 and 2 without sensitivity among 30; none in the metrics that all have."""
    result = score_segmentation(random_table(30), resampling=Resampling(resamples=50))
    assert (result["n"], result["empty_truth"], result["empty_predicted"]) == (30, 2, 2)
    reasons = {name: entry["reason"] for name, entry in result["metrics"].items() if entry["reason"]}
    assert reasons == {"sensitivity": "mean of 28 of 30 images: the true mask is empty in 2",
                       "hd95": "mean of 27 of 30 images: the predicted or the true mask is empty in 3",
                       "boundary_f1": "mean of 29 of 30 images: both masks are empty in 1"}


def test_a_metric_that_no_image_has_is_none_with_a_reason() -> None:
    """Nothing predicted anywhere: Dice 0, no distance."""
    result = score_segmentation(table_of([(EMPTY, square(0, k)) for k in (2, 3, 4)]),
                                resampling=Resampling(resamples=20))["metrics"]
    assert result["hd95"] == {"value": None, "low": None, "high": None,
                              "reason": "not defined: the predicted or the true mask is empty in 3"}
    assert result["dice"] == {"value": 0, "low": 0, "high": 0, "reason": None}


def test_no_interval_where_resamples_lack_the_value_or_nothing_can_be_drawn() -> None:
    """The value stays; the reason says both what was left out and why there is no interval."""
    pairs = [(EMPTY, square(0, 3))] * 3 + [(square(0, 4), square(1, 4))]
    entry = score_segmentation(table_of(pairs), resampling=Resampling(resamples=400))["metrics"]["hd95"]
    assert entry["value"] == image_metrics(*pairs[-1])["hd95"] and entry["low"] is None
    # (3/4)^4 = 32 % of the resamples lack the last image
    known, lacking = entry["reason"].split("; no interval: not defined in ")
    assert known == "mean of 1 of 4 images: the predicted or the true mask is empty in 3"
    assert lacking.endswith("% of the resamples") and 25 < int(lacking.split("%")[0]) < 39
    entry = score_segmentation(table_of(pairs[-1:]), resampling=Resampling(resamples=20))["metrics"]["dice"]
    assert entry["low"] is None and entry["reason"] == "one image cannot be resampled"


def test_the_order_of_the_images_changes_no_value() -> None:
    """Whatever the batches or ranks were."""
    table = random_table(40)
    shuffled = table.sample(frac=1, random_state=1)
    first, second = (score_segmentation(one, resampling=Resampling(resamples=10))["metrics"] for one in
                     (table, shuffled))
    for name in NAMES:
        assert first[name]["value"] == pytest.approx(second[name]["value"], abs=1e-14)


def test_a_table_read_back_from_csv_gives_the_same(tmp_path) -> None:
    """NaN included."""
    table = random_table(12)
    table.to_csv(tmp_path / "t.csv", index=False)
    read = pd.read_csv(tmp_path / "t.csv")
    resampling = resampling_for(read, resamples=30)
    assert score_segmentation(read, resampling=resampling) == score_segmentation(table, resampling=resampling)


def test_wrong_tables_are_refused() -> None:
    """Each would make a wrong number."""
    table = random_table(6)
    for wrong, message in ((table.drop(columns=["tp", "hd95"]), "lacks hd95 and tp"), (table.iloc[:0], "no images"),
                           (pd.concat([table, table.iloc[2:3]]), "twice: 2.png")):
        with pytest.raises(ValueError, match=message):
            score_segmentation(wrong, resampling=Resampling(resamples=5))
    with pytest.raises(ValueError, match="stratify"):
        score_segmentation(table, resampling=Resampling(resamples=5, stratify=True))


def test_a_thousand_images_and_resamples_take_less_than_two_seconds() -> None:
    """They are matrix products."""
    rng = np.random.default_rng(0)
    columns = {name: rng.random(1000) for name in OF_AN_IMAGE} | {name: rng.integers(1, 99, 1000) for name in COUNTS}
    table = pd.DataFrame({"filename": range(1000), **columns})
    start = time.process_time()
    score_segmentation(table, resampling=Resampling(resamples=1000))
    assert time.process_time() - start < 2
