"""Subsets of the train split: the published shuffle and the stratified choice."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furnace.data.manifest import Manifest
from furnace.data.splits import take_percent
from furnace.runtime.files import UserError
from helpers import GOLDEN

PUBLISHED = json.loads((GOLDEN / "percent_data.json").read_text())


def manifest(labels: list[int], images: list[str] | None = None, splits: list[str] | None = None) -> Manifest:
    """A manifest without files."""
    frame = pd.DataFrame({"image": images or [f"{i}.png" for i in range(len(labels))],
                          "label": np.array(labels, dtype=np.int64), "split": splits or ["train"] * len(labels),
                          "_row": range(2, len(labels) + 2)})
    return Manifest(frame=frame, name="x", csv_path=Path("x.csv"), root=Path("."), sha256="", images_digest="",
                    class_names=tuple(map(str, range(max(labels, default=0) + 1))), label_column="label",
                    group_columns=())


@pytest.fixture(scope="module")
def published_train() -> Manifest:
    """The train split of the golden's table."""
    images, labels, _, splits = zip(*PUBLISHED["csv_rows"], strict=True)
    train = manifest(list(labels), list(images), list(splits)).split("train")
    assert len(train) == 48
    return train


def test_published_subset_and_order(published_train: Manifest) -> None:
    assert take_percent(published_train, 0.25).filenames == PUBLISHED["lp"]


@pytest.mark.parametrize(("fraction", "size"), PUBLISHED["lp_len_p"].items())
def test_published_sizes(published_train: Manifest, fraction: str, size: int) -> None:
    part = take_percent(published_train, float(fraction))
    assert len(part) == size
    whole = take_percent(published_train, 1.0).filenames
    assert part.filenames == whole[:size] and sorted(whole) == sorted(published_train.filenames)
    assert whole != published_train.filenames  # shuffled even at 1


@pytest.mark.parametrize("mode", ["published", "stratified"])
def test_seeds(published_train: Manifest, mode: str) -> None:
    def draw(seed: int) -> list[str]:
        return take_percent(published_train, 0.5, mode=mode, seed=seed).filenames

    assert draw(0) == draw(0) != draw(1)
    assert draw(1) != draw(2)


def test_the_train_split_is_not_touched(published_train: Manifest) -> None:
    before = published_train.frame.copy()
    for mode in ("published", "stratified"):
        take_percent(published_train, 0.3, mode=mode)
    assert published_train.frame.equals(before)


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), fraction=st.floats(0.01, 1.0),
       seed=st.integers(0, 5))
def test_stratified_keeps_every_class_and_its_share(labels: list[int], fraction: float, seed: int) -> None:
    part = take_percent(manifest(labels), fraction, mode="stratified", seed=seed)
    counts, kept = np.bincount(labels, minlength=5), np.bincount(part.labels, minlength=5)
    assert ((kept > 0) == (counts > 0)).all() and (kept <= counts).all()
    assert (np.abs(kept - counts * fraction)[counts > 0] <= np.where(counts * fraction < 0.5, 1, 0.5 + 1e-9)[counts > 0]
            ).all()
    assert len(set(part.filenames)) == len(part)
    assert [labels[int(name.removesuffix(".png"))] for name in part.filenames] == part.labels.tolist()


def test_stratified_is_mixed_and_nested_in_one_shuffle() -> None:
    train = manifest([0] * 20 + [1] * 20)
    shuffled = take_percent(train, 1.0).filenames
    part = take_percent(train, 0.5, mode="stratified")
    assert np.bincount(part.labels).tolist() == [10, 10]
    assert part.filenames == [name for name in shuffled if name in set(part.filenames)]
    assert part.labels.tolist() not in ([0] * 10 + [1] * 10, [1] * 10 + [0] * 10)


def test_a_lost_class_warns(caplog) -> None:
    train = manifest([0] * 40 + [1])
    with caplog.at_level(logging.WARNING):
        part = take_percent(train, 0.05)
        assert part.labels.tolist() == [0, 0] and part.nb_classes == 2
    assert "no train image of class 1: their probability is 0" in caplog.text
    caplog.clear()
    assert set(take_percent(train, 0.05, mode="stratified").labels) == {0, 1} and not caplog.records


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_fraction_outside_its_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="is not in"):
        take_percent(manifest([0, 1] * 5), fraction, mode="stratified")


@pytest.mark.parametrize("fraction", [0.01, 0.09])
def test_no_image_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=rf"--percent_data {fraction} of 10 train images is no image"):
        take_percent(manifest([0, 1] * 5), fraction)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="neither published nor stratified"):
        take_percent(manifest([0, 1]), 0.5, mode="random")
