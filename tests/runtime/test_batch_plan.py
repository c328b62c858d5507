"""How a training set is cut into updates."""

import logging

import pytest

from furnace.runtime.batch_plan import BatchPlan, plan_batches
from furnace.runtime.files import UserError


def test_published_number_of_updates() -> None:
    """len(train) // (batch x update_freq x processes); the rest of an epoch is dropped."""
    plan = plan_batches(8207, batch_size=128, update_freq=2, world_size=4)
    assert plan == BatchPlan(micro=128, accumulation=2, world_size=4, steps_per_epoch=8)
    assert (plan.per_update, plan.draws_per_epoch) == (1024, 8192)


@pytest.mark.parametrize("images,batch,freq,world,even,wanted", [
    (20, 128, 1, 1, False, (20, 1)), (21, 128, 1, 1, True, (20, 1)), (21, 128, 1, 2, False, (10, 1)),
    (20, 8, 4, 1, False, (8, 2)), (3, 4, 1, 2, False, (1, 1)), (5, 2, 4, 1, True, (2, 2))])
def test_train_smaller_than_an_update(images, batch, freq, world, even, wanted, caplog) -> None:
    """One update an epoch, of nearly all images, with a warning."""
    with caplog.at_level(logging.WARNING):
        plan = plan_batches(images, batch_size=batch, update_freq=freq, world_size=world, even=even)
    assert (plan.micro, plan.accumulation, plan.steps_per_epoch) == (*wanted, 1)
    assert plan.per_update <= images and f"train has {images} images" in caplog.text


@pytest.mark.parametrize("images,batch,world,even,words", [
    (1, 4, 2, False, "too few for 2 processes"), (1, 4, 1, True, "mixup or cutmix, which pair images"),
    (100, 7, 1, True, "--batch_size 7.*must be even")])
def test_impossible_plans(images, batch, world, even, words) -> None:
    """Said before any model is built."""
    with pytest.raises(UserError, match=words):
        plan_batches(images, batch_size=batch, world_size=world, even=even)


def test_halving_keeps_the_update() -> None:
    """Half the images a pass, twice the passes."""
    plan = BatchPlan(micro=12, accumulation=1, world_size=2, steps_per_epoch=5)
    halved = plan.halved().halved()
    assert (halved.micro, halved.accumulation, halved.per_update) == (3, 4, plan.per_update)
    with pytest.raises(UserError, match="3 images do not fit"):
        halved.halved()
    paired = BatchPlan(micro=12, accumulation=1, world_size=1, steps_per_epoch=5, even=True).halved()
    with pytest.raises(UserError, match="6 images .*mixup pairs them"):
        paired.halved()
