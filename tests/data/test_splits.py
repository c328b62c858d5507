"""Subsets of the train split (the published shuffles and the stratified choice), and folds."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furnace.data.manifest import Manifest
from furnace.data.splits import make_folds, take_percent, take_percent_finetuning
from furnace.runtime.files import UserError
from helpers import GOLDEN

PUBLISHED = json.loads((GOLDEN / "percent_data.json").read_text())
SAMPLER = json.loads((GOLDEN / "sampler.json").read_text())


def manifest(labels: list[int], images: list[str] | None = None, splits: list[str] | None = None,
             **groups: list) -> Manifest:
    """A manifest without files; ``groups`` are patient_id and lesion_id."""
    frame = pd.DataFrame({"image": images or [f"{i}.png" for i in range(len(labels))],
                          "label": np.array(labels, dtype=np.int64), "split": splits or ["train"] * len(labels),
                          "_row": range(2, len(labels) + 2), **groups})
    return Manifest(frame=frame, name="x", csv_path=Path("x.csv"), root=Path("."), sha256="", images_digest="",
                    class_names=tuple(map(str, range(max(labels, default=0) + 1))), label_column="label",
                    group_columns=tuple(groups))


def labelled(cells: list[str | None], names: tuple[str, ...], splits: list[str] | None = None) -> Manifest:
    """A manifest without files, with several labels per image."""
    plain = manifest([0] * len(cells), splits=splits)
    return Manifest(**{**vars(plain), "frame": plain.frame.assign(labels=pd.Series(cells, dtype=object)),
                       "class_names": names, "label_column": "labels"})


@pytest.fixture(scope="module")
def published_train() -> Manifest:
    """The train split of the golden's table."""
    images, labels, _, splits = zip(*PUBLISHED["csv_rows"], strict=True)
    train = manifest(list(labels), list(images), list(splits)).split("train")
    assert len(train) == 48
    return train


def test_published_subset_and_order(published_train: Manifest) -> None:
    assert take_percent(published_train, 0.25).filenames == PUBLISHED["lp"]


def test_published_subset_of_fine_tuning() -> None:
    images, labels, _, splits = zip(*PUBLISHED["csv_rows"], strict=True)
    whole = manifest(list(labels), list(images), list(splits))
    before = whole.frame.copy()
    part = take_percent_finetuning(whole, 0.25)
    assert part.filenames == PUBLISHED["ft"] and set(part.frame["split"]) == {"train"}
    assert take_percent_finetuning(whole, 0.3).filenames[:12] == PUBLISHED["ft"]
    assert sorted(take_percent_finetuning(whole, 1.0).filenames) == sorted(whole.split("train").filenames)
    assert take_percent_finetuning(whole, 0.25, seed=1).filenames != PUBLISHED["ft"]
    assert whole.frame.equals(before)


def test_published_order_of_fine_tuning() -> None:
    whole = manifest([0] * 5 + [1] * 3 + [2] * 2 + [0, 1], [f"im_{i:03d}.png" for i in range(12)],
                     ["train"] * 10 + ["val", "test"])
    train = take_percent_finetuning(whole, 1.0)
    assert train.filenames == SAMPLER["train_order_after_shuffle"]
    assert train.labels.tolist() == SAMPLER["labels_in_order"]


def test_fine_tuning_subset_refuses_and_warns(caplog) -> None:
    whole = manifest([0] * 40 + [1, 1], splits=["train"] * 41 + ["test"])
    with pytest.raises(UserError, match=r"--percent_data 0.02 of 41 train images is no image"):
        take_percent_finetuning(whole, 0.02)
    with pytest.raises(ValueError, match="is not in"):
        take_percent_finetuning(whole, 0.0)
    assert not caplog.records
    assert set(take_percent_finetuning(whole, 0.05).labels) == {0}
    assert "leaves no train image of class 1: the model does not learn them" in caplog.text


def test_a_lost_class_of_several_labels(caplog) -> None:
    whole = labelled(["a;b"] + ["a"] * 30, ("a", "b"))
    assert not take_percent_finetuning(whole, 0.1).targets[:, 1].any()
    assert "no train image of class b: " in caplog.text


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


# ------------------------------------------------------------------------------------------------------------ folds

def vals(folds: list[Manifest]) -> list[set[int]]:
    """The places of the val images of each fold."""
    return [set(np.flatnonzero((fold.frame["split"] == "val").to_numpy()).tolist()) for fold in folds]


def check_partition(whole: Manifest, folds: list[Manifest]) -> None:
    """Every pooled image is val once and train otherwise; nothing but the split differs."""
    splits = whole.frame["split"].to_numpy()
    assert sorted(i for part in vals(folds) for i in part) == np.flatnonzero(splits != "test").tolist()
    for fold in folds:
        new = fold.frame["split"].to_numpy()
        assert ((new == "test") == (splits == "test")).all() and set(new) <= {"train", "val", "test"}
        assert len(fold.split("val")) and len(fold.split("train"))
        assert fold.frame.drop(columns="split").equals(whole.frame.drop(columns="split"))


def test_folds_pool_train_and_val_in_equal_shares() -> None:
    labels = [0] * 24 + [1] * 12 + [0] * 6 + [1] * 3 + [0, 1]
    whole = manifest(labels, splits=["train"] * 36 + ["val"] * 9 + ["test"] * 2)
    before = whole.frame.copy()
    folds = make_folds(whole, 3, 0)
    check_partition(whole, folds)
    for fold in folds:
        assert np.bincount(fold.split("val").labels).tolist() == [10, 5]
    assert whole.frame.equals(before)
    assert vals(folds) == vals(make_folds(whole, 3, 0)) != vals(make_folds(whole, 3, 1))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), folds=st.integers(2, 4), seed=st.integers(0, 3))
def test_groups_stay_together(data, folds: int, seed: int) -> None:
    n = data.draw(st.integers(8, 40))

    def column(cells: st.SearchStrategy) -> list:
        return data.draw(st.lists(cells, min_size=n, max_size=n))

    whole = manifest(column(st.integers(0, 2)), splits=column(st.sampled_from(["train", "val", "test"])),
                     patient_id=column(st.none() | st.integers(0, 9).map(str)),
                     lesion_id=column(st.none() | st.integers(0, 30).map(str)))
    try:
        made = make_folds(whole, folds, seed)
    except UserError as error:
        assert "take fewer folds" in str(error)
        return
    check_partition(whole, made)
    for fold in made:
        for name in ("patient_id", "lesion_id"):
            ids = [set(fold.split(split).frame[name].dropna()) for split in ("train", "val")]
            assert not ids[0] & ids[1]


def test_patients_are_cut_and_not_their_images() -> None:
    patients = [f"P{i // 5}" for i in range(60)]
    labels = [i // 5 % 2 for i in range(60)]
    folds = make_folds(manifest(labels, patient_id=patients), 3, 0)
    for fold in folds:
        val = fold.split("val")
        assert val.frame["patient_id"].nunique() == 4 and np.bincount(val.labels).tolist() == [10, 10]
        assert not set(val.frame["patient_id"]) & set(fold.split("train").frame["patient_id"])


def test_a_lesion_of_nameless_patients_stays_together() -> None:
    whole = manifest([0, 1] * 10, patient_id=[None] * 16 + ["P", "P", "P", "P"],
                     lesion_id=[f"L{i // 2}" for i in range(20)])
    for fold in make_folds(whole, 4, 0):
        assert not set(fold.split("val").frame["lesion_id"]) & set(fold.split("train").frame["lesion_id"])


def test_an_image_in_two_rows_stays_together() -> None:
    whole = manifest([0, 0, 1, 1] * 6, images=[f"{i // 2}.png" for i in range(24)])
    for fold in make_folds(whole, 3, 0):
        assert not set(fold.split("val").filenames) & set(fold.split("train").filenames)


def test_an_empty_id_is_its_own_group() -> None:
    whole = manifest([0, 1] * 10, patient_id=[None] * 18 + ["P", "P"])
    assert all(4 <= len(part) <= 6 for part in vals(make_folds(whole, 4, 0)))  # one group would be a fold of 18


def test_too_few_for_the_folds() -> None:
    with pytest.raises(UserError, match="5 folds need as many patient_id groups .* have 3: take fewer folds"):
        make_folds(manifest([0, 1] * 6, patient_id=[f"P{i % 3}" for i in range(12)]), 5, 0)
    with pytest.raises(UserError, match="5 folds need as many images .* have 4: take fewer folds"):
        make_folds(manifest([0, 1] * 3, splits=["train"] * 3 + ["val"] + ["test"] * 2), 5, 0)
    with pytest.raises(ValueError, match="need 2 or more"):
        make_folds(manifest([0, 1] * 3), 1, 0)


def test_a_rare_class_warns_and_does_not_fail(caplog, recwarn) -> None:
    whole = manifest([0] * 20 + [1] * 2)
    folds = make_folds(whole, 4, 0)
    check_partition(whole, folds)
    lacking = [i for i, fold in enumerate(folds) if not (fold.split("val").labels == 1).any()]
    assert len(lacking) == 2 and not recwarn.list
    (record,) = caplog.records
    assert all(f"fold {i}: no val image of class 1" in record.message for i in lacking)
    assert record.message.count("fold ") == 2


def test_all_classes_smaller_than_the_folds() -> None:
    whole = manifest([0, 0, 1, 1, 2, 2])
    check_partition(whole, make_folds(whole, 5, 0))


def test_balanced_folds_say_nothing(caplog) -> None:
    make_folds(manifest([0, 1] * 10), 5, 0)
    assert not caplog.records


def test_folds_of_several_labels_balance_the_rarest() -> None:
    cells = ["a"] * 24 + ["a;b"] * 6 + ["b;c"] * 3 + [None] * 9
    whole = labelled(cells, ("a", "b", "c"), splits=["train"] * 42)
    for fold in [fold for seed in range(4) for fold in make_folds(whole, 3, seed)]:
        assert fold.multilabel and fold.split("val").targets.sum(axis=0).tolist() == [10, 3, 1]
