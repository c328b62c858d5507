"""The training sampler: the published weights, each draw once over the processes, and the tail after a resume."""

import json

import numpy as np
import pytest
import torch

from furnace.data import samplers
from furnace.data.samplers import Draw, TrainSampler, class_balanced_weights
from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan
from helpers import GOLDEN

PLAN = BatchPlan(micro=3, accumulation=2, world_size=1, steps_per_epoch=4)  # 24 draws
PUBLISHED = json.loads((GOLDEN / "sampler.json").read_text())


def drawn(sampler: TrainSampler, epoch: int = 0, update: int = 0) -> list[Draw]:
    """What an iteration gives from this position on."""
    sampler.set_position(epoch, update)
    return list(sampler)


def of_ranks(monkeypatch, world_size: int, update: int, **more) -> list[list[Draw]]:
    """Every process's draws of epoch 3, of updates of 12 images, 48 in all."""
    plan = BatchPlan(micro=12 // world_size, accumulation=1, world_size=world_size, steps_per_epoch=4)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sampler = TrainSampler(50, plan=plan, seed=7, **more)
        shares.append(drawn(sampler, 3, update))
        assert len(sampler) == len(shares[-1])
    return shares


# ---------------------------------------------------------------------------------------------------------- weights

@pytest.mark.parametrize(("call", "count"), [("sampler_call", 10), ("sampler_call_percent_data_0.5", 5)])
def test_published_weights(call: str, count: int) -> None:
    """With a part of the data, of that part (the published code gave the rest's weights, too, and failed)."""
    found = class_balanced_weights(PUBLISHED["labels_in_order"][:count])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), PUBLISHED[call]["weights"][:count], rtol=1e-6)


def test_classes_that_do_not_occur_do_not_count() -> None:
    found = class_balanced_weights(np.array([5, 5, 5, 2]))
    np.testing.assert_allclose(found.numpy(), [4 / 6, 4 / 6, 4 / 6, 2], rtol=1e-6)


@pytest.mark.parametrize("limit", [2**24, 10], ids=["torch", "numpy"])
def test_frequencies(monkeypatch, limit: int) -> None:
    """Of 20,000 draws within five standard deviations; with replacement; both ways of drawing depend on the seed."""
    monkeypatch.setattr(samplers, "MULTINOMIAL_LIMIT", limit)
    labels = np.repeat([0, 1, 2], [15_000, 4_000, 1_000])
    plan = BatchPlan(micro=20_000, accumulation=1, world_size=1, steps_per_epoch=1)
    sampler = TrainSampler(20_000, plan=plan, seed=0, weights=class_balanced_weights(labels))
    indices = sampler.epoch_indices(0)
    counts = np.bincount(labels[indices], minlength=3)
    assert counts.sum() == 20_000
    assert np.abs(counts - 20_000 / 3).max() < 5 * np.sqrt(20_000 * 2 / 9)
    within = np.bincount(indices[labels[indices] == 2] - 19_000, minlength=1_000)  # 6.7 each
    assert within.max() < 25 and (within > 0).mean() > 0.99
    np.testing.assert_array_equal(sampler.epoch_indices(0), indices)
    assert (sampler.epoch_indices(1) != indices).any()


def test_zero_weight_is_never_drawn() -> None:
    weights = torch.ones(24)
    weights[::2] = 0
    assert all(draw.index % 2 for draw in drawn(TrainSampler(24, plan=PLAN, seed=0, weights=weights)))


# ------------------------------------------------------------------------------------------------------------ order

def test_an_epoch_is_a_permutation_cut_to_updates() -> None:
    draws = drawn(TrainSampler(26, plan=PLAN, seed=0), 5)
    assert [draw.position for draw in draws] == list(range(24)) and {draw.epoch for draw in draws} == {5}
    indices = [draw.index for draw in draws]
    assert len(set(indices)) == 24 and set(indices) <= set(range(26)) and indices != sorted(indices)
    assert all(type(index) is int for index in indices)


def test_another_epoch_or_seed_is_another_order() -> None:
    orders = {tuple(draw.index for draw in drawn(TrainSampler(24, plan=PLAN, seed=seed), epoch))
              for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9 and all(sorted(order) == list(range(24)) for order in orders)


def test_what_is_left_out_changes_with_the_epoch() -> None:
    sampler = TrainSampler(26, plan=PLAN, seed=0)
    assert set().union(*(sampler.epoch_indices(epoch) for epoch in range(4))) == set(range(26))


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for weights in (None, torch.ones(24)):
        drawn(TrainSampler(24, plan=PLAN, seed=0, weights=weights))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


@pytest.mark.parametrize("weights", [None, torch.arange(1.0, 25.0)], ids=["uniform", "weighted"])
@pytest.mark.parametrize("update", [0, 1, 3, 4])
def test_resuming_gives_the_tail(update: int, weights: torch.Tensor | None) -> None:
    whole = drawn(TrainSampler(24, plan=PLAN, seed=1, weights=weights), 2)
    fresh = TrainSampler(24, plan=PLAN, seed=1, weights=weights)
    assert drawn(fresh, 2, update) == whole[6 * update:] and len(fresh) == 24 - 6 * update


@pytest.mark.parametrize("weights", [None, torch.arange(1.0, 51.0)], ids=["uniform", "weighted"])
@pytest.mark.parametrize("update", [0, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_draws(monkeypatch, world_size: int, update: int, weights: torch.Tensor | None) -> None:
    """Each position once; every update has the images that it has in one process."""
    alone, = of_ranks(monkeypatch, 1, update, weights=weights)
    shares = of_ranks(monkeypatch, world_size, update, weights=weights)
    assert len(alone) == 48 - 12 * update and {len(share) for share in shares} == {len(alone) // world_size}
    assert sorted((draw for share in shares for draw in share), key=lambda draw: draw.position) == alone
    per_rank = 12 // world_size
    for number in range(4 - update):
        together = {draw for share in shares for draw in share[number * per_rank:(number + 1) * per_rank]}
        assert together == set(alone[12 * number:12 * number + 12])


# ---------------------------------------------------------------------------------------------------------- endless

def endless(images: int, plan: BatchPlan = PLAN, seed: int = 0) -> TrainSampler:
    return TrainSampler(images, plan=plan, seed=seed, endless=True)


@pytest.mark.parametrize("images", [1, 5, 10, 24, 50, 240])
def test_an_endless_sampler_goes_through_whole_passes(images: int) -> None:
    """Epochs of 24 draws, whatever the number of images; each pass has every image once, in another order."""
    draws = [draw for epoch in range(10) for draw in drawn(endless(images), epoch)]
    assert [draw.epoch for draw in draws] == [epoch for epoch in range(10) for _ in range(24)]
    assert [draw.position for draw in draws] == list(range(24)) * 10
    indices = [draw.index for draw in draws]
    passes = [indices[start:start + images] for start in range(0, 240, images)]
    assert all(sorted(order) == list(range(images)) for order in passes if len(order) == images)
    assert all(len(set(order)) == len(order) for order in passes)
    if images >= 10:
        assert len({tuple(order) for order in passes}) == len(passes) and passes[0] != sorted(passes[0])


def test_an_endless_order_is_its_own() -> None:
    """Seeds differ; the plan's cut does not matter, nor what was drawn before."""
    halved = BatchPlan(micro=1, accumulation=6, world_size=1, steps_per_epoch=4)
    expected = endless(10).epoch_indices(3)
    np.testing.assert_array_equal(endless(10, halved).epoch_indices(3), expected)
    assert (endless(10, seed=1).epoch_indices(3) != expected).any()
    sampler = endless(10)
    drawn(sampler, 7), drawn(sampler, 0)
    assert [draw.index for draw in drawn(sampler, 3)] == expected.tolist()


@pytest.mark.parametrize("update", [0, 1, 3, 4])
def test_an_endless_sampler_resumes_with_the_tail(update: int) -> None:
    whole, fresh = drawn(endless(10), 2), endless(10)
    assert drawn(fresh, 2, update) == whole[6 * update:] and len(fresh) == 24 - 6 * update


@pytest.mark.parametrize("update", [0, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_endless_draws(monkeypatch, world_size: int, update: int) -> None:
    alone, = of_ranks(monkeypatch, 1, update, endless=True)
    shares = of_ranks(monkeypatch, world_size, update, endless=True)
    assert len(alone) == 48 - 12 * update and {len(share) for share in shares} == {len(alone) // world_size}
    assert sorted((draw for share in shares for draw in share), key=lambda draw: draw.position) == alone


@pytest.mark.parametrize(("images", "more", "words"), [
    (0, {}, "endless sampler of 0 images"), (24, {"weights": torch.ones(24)}, "sampler of 24 images with weights")])
def test_an_endless_sampler_that_cannot_be(images: int, more: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainSampler(images, plan=PLAN, seed=0, endless=True, **more)


def test_sizes_that_do_not_fit_are_bugs() -> None:
    with pytest.raises(ValueError, match="24 draws is more than 23 images"):
        TrainSampler(23, plan=PLAN, seed=0)
    with pytest.raises(ValueError, match="3 weights for 24 images"):
        TrainSampler(24, plan=PLAN, seed=0, weights=torch.ones(3))
