"""Block masks: how many crops, how many patches, and that they are blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furnace.data import block_masks as module
from furnace.data.block_masks import block_masks, hide


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("crops", "share", "masked"), [(64, 0.5, 32), (7, 0.5, 3), (2, 0.5, 1), (8, 1.0, 8), (8, 0, 0),
                                                        (1, 0.5, 0), (10, 0.39, 3)])
def test_as_many_crops_as_declared(crops: int, share: float, masked: int) -> None:
    """The others are not touched."""
    masks = block_masks(crops, (16, 16), share=share, rng=generator())
    assert masks.shape == (crops, 256) and masks.dtype == bool
    assert masks.any(axis=1).sum() == masked


def test_every_part_of_the_interval_has_its_crop() -> None:
    """The i-th smallest of n masked crops hides between p_i and p_(i+1) of its patches, p = linspace(0.1, 0.5, n + 1).

    A crop may miss up to three of its patches.
    """
    parts = 256 * np.linspace(0.1, 0.5, 33)
    for seed in range(30):
        count = np.sort(block_masks(64, (16, 16), rng=generator(seed)).sum(axis=1))[32:]
        assert (count <= parts[1:].astype(int)).all() and (count >= parts[:-1].astype(int) - 3).all()


def test_measured_shares() -> None:
    """The smallest, mean and largest share of the published masks: 0.094, 0.298, 0.496."""
    share = np.concatenate([block_masks(128, (16, 16), rng=generator(seed)).mean(axis=1) for seed in range(20)])
    share = share[share > 0]
    assert len(share) == 20 * 64
    assert 0.085 <= share.min() <= 0.11 and share.mean() == pytest.approx(0.298, abs=0.002)
    assert 0.49 <= share.max() <= 0.5


def test_hide_is_nearly_always_exact() -> None:
    """Published: exact in 92.5 %, never more, at most three too few."""
    rng, missing = generator(), []
    for _ in range(3000):
        wanted, mask = int(256 * rng.uniform(0.1, 0.5)), np.zeros((16, 16), dtype=bool)
        hide(mask, wanted, rng)
        missing.append(wanted - mask.sum())
    missing = np.array(missing)
    assert missing.min() == 0 and missing.max() <= 3 and (missing == 0).mean() == pytest.approx(0.925, abs=0.02)


def test_a_request_of_nothing_hides_nothing() -> None:
    assert not block_masks(8, (16, 16), share=1, ratio=(0, 0), rng=generator()).any()
    assert not block_masks(8, (3, 3), share=1, ratio=(0.05, 0.1), rng=generator()).any()


def test_rectangles() -> None:
    """A first one is whole, of 4 to 128 patches and an aspect of 0.3 to 1 / 0.3 (before rounding), anywhere."""
    rng, sizes, union = generator(), [], np.zeros((16, 16), dtype=bool)
    for _ in range(3000):
        mask = np.zeros((16, 16), dtype=bool)
        added = module._hide_rectangle(mask, 256, rng)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        h, w = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert added == mask.sum() == h * w
        sizes.append((h, w))
        union |= mask
    h, w = np.array(sizes).T
    assert union.all() and (h * w).max() <= 128 and (h * w).min() >= 3 and 100 < np.quantile(h * w, 0.95)
    assert ((h + 0.5) / (w - 0.5) >= 0.3).all() and ((h - 0.5) / (w + 0.5) <= 1 / 0.3).all()
    assert (h > 1.5 * w).mean() > 0.15 and (w > 1.5 * h).mean() > 0.15 and max(h.max(), w.max()) <= 15
    np.testing.assert_allclose((h * w).mean(), (4 + 128) / 2, rtol=0.15)  # areas are drawn uniformly


def test_a_rectangle_adds_no_more_than_wanted() -> None:
    rng = generator()
    for most in (1, 2, 3, 10):
        mask = generator(most).random((16, 16)) < 0.3
        before = mask.sum()
        added = module._hide_rectangle(mask, most, rng)
        assert mask.sum() - before == added <= most


def test_any_crop_may_be_masked() -> None:
    """Not the first half (which would be the first view of all images)."""
    hidden = np.mean([block_masks(16, (8, 8), rng=generator(seed)).any(axis=1) for seed in range(200)], axis=0)
    assert 0.3 < hidden.min() and hidden.max() < 0.7
    amount = np.mean([block_masks(16, (8, 8), rng=generator(seed)).sum(axis=1) for seed in range(200)], axis=0)
    assert amount.max() < 1.6 * amount.min()  # nor do later crops hide more


@settings(max_examples=60, deadline=None)
@given(crops=st.integers(0, 9), height=st.integers(1, 9), width=st.integers(1, 9), share=st.floats(0, 1),
       low=st.floats(0, 1), more=st.floats(0, 1), seed=st.integers(0, 9))
def test_any_grid(crops: int, height: int, width: int, share: float, low: float, more: float, seed: int) -> None:
    """Never too many crops or patches, and it ends."""
    ratio = (low, low + (1 - low) * more)
    masks = block_masks(crops, (height, width), share=share, ratio=ratio, rng=generator(seed))
    assert masks.shape == (crops, height * width)
    assert masks.any(axis=1).sum() <= int(crops * share)
    assert masks.sum(axis=1).max(initial=0) <= height * width * ratio[1]
    again = block_masks(crops, (height, width), share=share, ratio=ratio, rng=generator(seed))
    np.testing.assert_array_equal(masks, again)


@pytest.mark.parametrize(("share", "ratio"), [(1.5, (0.1, 0.5)), (0.5, (0.5, 0.1)), (0.5, (-0.1, 0.5)), (0.5, (0, 2))])
def test_shares_that_cannot_be(share: float, ratio: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be in 0 to 1"):
        block_masks(4, (4, 4), share=share, ratio=ratio, rng=generator())
