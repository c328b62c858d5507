"""The disc against its geometry and a plain search; Otsu against the definition of its threshold."""

import numpy as np
import pytest
from PIL import Image

from furnace.evaluation import mask_baselines
from furnace.evaluation.mask_baselines import FRACTIONS, best_disc, centred_disc, otsu_mask
from furnace.evaluation.segmentation_metrics import image_metrics


def test_disc_lies_in_the_middle_and_has_its_size() -> None:
    """Pixels by their centres; symmetric; pi r^2 pixels when large."""
    rows = ["....", ".##.", ".##.", "...."]
    np.testing.assert_array_equal(centred_disc((4, 4), 0.5), [[letter == "#" for letter in row] for row in rows])
    disc = centred_disc((450, 600), 0.8)
    assert disc.shape == (450, 600) and disc.dtype == bool
    assert disc.sum() == pytest.approx(np.pi * 180 ** 2, rel=2e-3)
    np.testing.assert_array_equal(disc, disc[::-1, ::-1])
    rows, columns = np.flatnonzero(disc.any(axis=1)), np.flatnonzero(disc.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (45, 404, 120, 479)
    assert not centred_disc((450, 600), 1.6).all() and centred_disc((450, 600), 1.7).all(), "the corners are at 5/3"


def test_the_result_can_be_written_to_without_harm() -> None:
    """Nothing shared is handed out."""
    centred_disc((6, 6), 0.5)[:] = True
    assert centred_disc((6, 6), 0.5).sum() < 36


def test_best_disc_equals_a_plain_search() -> None:
    """Mean Dice of every fraction by the metric itself; masks of two sizes, one empty."""
    rng = np.random.default_rng(3)
    truths = [centred_disc((40, 60), f) ^ (rng.random((40, 60)) < 0.1) for f in (0.3, 0.62, 0.9)]
    truths += [centred_disc((50, 33), 1.1), np.zeros((50, 33), dtype=bool)]
    means = [np.mean([image_metrics(centred_disc(t.shape, f), t)["dice"] for t in truths]) for f in FRACTIONS]
    assert best_disc(iter(truths)) == FRACTIONS[int(np.argmax(means))]
    assert 0.05 < best_disc(truths) < 1.5


@pytest.mark.parametrize("fraction", [0.05, 0.7, 1.5])
def test_best_disc_finds_the_disc_itself(fraction: float) -> None:
    """Both ends included."""
    assert best_disc([centred_disc((200, 300), fraction)] * 2) == fraction


def test_a_pixel_on_the_rim_belongs_to_the_disc_in_both_functions() -> None:
    """In 25 x 30 pixels some centres lie at exactly 0.2."""
    sizes = [centred_disc((25, 30), fraction).sum() for fraction in FRACTIONS]
    np.testing.assert_array_equal(mask_baselines._rings((25, 30))[1], sizes)
    assert centred_disc((25, 30), 0.2)[12 + 2, 16]  # 2 down and 1.5 to the right of the middle: 2.5 of 12.5


def test_no_masks() -> None:
    """Nothing to choose by."""
    with pytest.raises(ValueError, match="no masks"):
        best_disc([])


def slow_otsu(grey: np.ndarray) -> float:
    """The least variance within the two sides, over all thresholds."""
    within = {}
    for threshold in range(255):
        low, high = grey[grey <= threshold], grey[grey > threshold]
        if low.size and high.size:
            within[threshold] = low.size * low.var() + high.size * high.var()
    return min(within.values())


@pytest.mark.parametrize("seed", range(4))
def test_otsu_has_the_least_variance_within(seed: int) -> None:
    """Of a dark disc on lighter skin with noise; the darker side is the lesion."""
    rng = np.random.default_rng(seed)
    disc = centred_disc((40, 50), 0.6)
    grey = np.where(disc, 80, 170) + rng.normal(0, 25, disc.shape)
    grey = grey.clip(0, 255).astype(np.uint8)
    mask = otsu_mask(np.repeat(grey[..., None], 3, axis=2))
    low, high = grey[mask].astype(float), grey[~mask].astype(float)
    assert low.max() < high.min()
    assert low.size * low.var() + high.size * high.var() == pytest.approx(slow_otsu(grey.astype(float)), rel=1e-9)
    assert image_metrics(mask, disc)["dice"] > 0.85


def test_otsu_reads_colours_as_grey_and_pictures_as_arrays() -> None:
    """Blue is darker than green by luma, though both are 255 somewhere; one colour has no lesion."""
    rgb = np.zeros((4, 6, 3), dtype=np.uint8)
    rgb[:, :2, 2], rgb[:, 2:, 1] = 255, 255
    expected = np.zeros((4, 6), dtype=bool)
    expected[:, :2] = True
    np.testing.assert_array_equal(otsu_mask(rgb), expected)
    np.testing.assert_array_equal(otsu_mask(Image.fromarray(rgb)), expected)
    assert not otsu_mask(np.full((5, 5, 3), 90, dtype=np.uint8)).any()
