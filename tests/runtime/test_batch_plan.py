"""How a training set is cut into updates."""

import logging

import pytest

from furnace.runtime.batch_plan import BatchPlan, plan_batches
from furnace.runtime.files import ProcessError, UserError


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


@pytest.mark.parametrize("images,batch,freq,world,micro", [(100, 8, 1, 1, 8), (3, 8, 1, 1, 3), (1, 8, 1, 1, 1),
                                                           (100, 1, 4, 2, 1)])
def test_the_least_of_a_pass_is_kept_in_the_plan(images, batch, freq, world, micro) -> None:
    """Also where the images are fewer; it changes no number. The caller, who knows the head, says what is wrong."""
    plan = plan_batches(images, batch_size=batch, update_freq=freq, world_size=world, least=2)
    assert plan.least == 2 and plan.micro == micro
    plain = plan_batches(images, batch_size=batch, update_freq=freq, world_size=world)
    assert plain.least == 1 and (plan.micro, plan.accumulation, plan.steps_per_epoch, plan.per_update) == (
        plain.micro, plain.accumulation, plain.steps_per_epoch, plain.per_update)


@pytest.mark.parametrize("micro,least,halvings", [(16, 2, 3), (16, 4, 2), (12, 2, 2), (12, 5, 1), (2, 2, 0), (2, 1, 1)])
def test_halving_stops_at_the_least(micro: int, least: int, halvings: int) -> None:
    """The last plan still has enough images; the message says how many are needed."""
    plan = BatchPlan(micro=micro, accumulation=1, world_size=1, steps_per_epoch=5, least=least)
    for _ in range(halvings):
        plan = plan.halved()
    assert plan.micro == micro // 2**halvings >= least and plan.accumulation == 2**halvings and plan.least == least
    words = rf"{plan.micro} images? do(es)? not fit .*{f'{least} are needed' if least > 1 else 'be halved:'}"
    with pytest.raises(ProcessError, match=words):
        plan.halved()
