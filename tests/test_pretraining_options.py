"""The parts of a pretraining: the published schedules (I14 to I16), prototypes of all kinds, held-out images."""

import dataclasses
import math

import numpy as np
import pytest

from furnace.command_line import parse
from furnace.pretraining_arguments import pretraining_parser, settle_options
from furnace.pretraining_options import PretrainingOptions, build_schedules, cut_batches
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import UserError
from helpers import ROOT

CONFIGS = ROOT / "pretraining" / "configs"
PLAN = BatchPlan(256, 1, 8, 400)


def options_of(*words: str, config: str = "dermino_base") -> PretrainingOptions:
    args = parse(pretraining_parser(), ["-c", str(CONFIGS / f"{config}.yaml"), "--data_csv", "x.csv", *words])
    settle_options(args)
    return PretrainingOptions(**{field.name: getattr(args, field.name)
                                 for field in dataclasses.fields(PretrainingOptions)})


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    """Recipe 1.5: 8 x 256 images, 100 epochs of 400 updates."""
    return build_schedules(options_of(), PLAN)


def test_learning_rate(published) -> None:
    """I14: the peak twice, the end just above 1e-6."""
    rate = published["lr"]
    assert len(rate) == 40_000 and rate[0] == 0
    assert rate[1] == pytest.approx(7.0728e-7, rel=1e-4)
    assert rate[3999] == rate[4000] == pytest.approx(2.8284271e-3, rel=1e-8)
    assert rate[20000] == pytest.approx(1.6602023e-3, rel=1e-7)
    assert rate[22000] == pytest.approx(1.4147136e-3, rel=1e-7)
    assert rate[39999] == pytest.approx(1.00000538e-6, rel=1e-8)


def test_weight_decay_momentum_temperature(published) -> None:
    """I15."""
    decay, momentum, temperature = (published[name] for name in ("weight_decay", "ema", "teacher_temperature"))
    assert decay[0] == pytest.approx(0.04) and decay[20000] == pytest.approx(0.12)
    assert decay[10000] == pytest.approx(0.0634315, abs=1e-7) and decay[39999] == pytest.approx(0.2, abs=1e-7)
    assert momentum[0] == 0.992 and momentum[10000] == pytest.approx(0.9931716, abs=1e-7)
    assert momentum[20000] == pytest.approx(0.996) and momentum[39999] == pytest.approx(1.0, abs=1e-9)
    assert momentum.max() <= 1
    assert temperature[0] == 0.04 and temperature[6000] == pytest.approx(0.0550013, abs=1e-7)
    assert (temperature[11999:] == 0.07).all() and temperature[11998] < 0.07


def test_last_layer_rests(published) -> None:
    """I16."""
    assert (published["last_layer_lr"][:400] == 0).all()
    assert (published["last_layer_lr"][400:] == published["lr"][400:]).all() and published["lr"][400] > 0


@pytest.mark.parametrize("plan, factor", [(BatchPlan(256, 1, 8, 400), math.sqrt(2)), (BatchPlan(64, 1, 1, 400), 0.25),
                                          (BatchPlan(64, 4, 1, 400), 0.5)])
def test_rate_goes_with_the_root_of_the_batch(plan, factor) -> None:
    """I16: of all images of an update, accumulated ones, too."""
    assert build_schedules(options_of(), plan)["lr"].max() == pytest.approx(2e-3 * factor)


def test_loss_weights(published) -> None:
    assert {name: set(np.unique(values)) for name, values in published.items() if name.endswith("_weight")} == {
        "dino_weight": {1.0}, "ibot_weight": {1.0}, "koleo_weight": {0.1}, "label_weight": {1.0}}
    moved = build_schedules(options_of("--label_warmup_epochs", "10", "--label_loss_weight", "2",
                                       "--label_loss_weight_end", "0"), PLAN)["label_weight"]
    assert moved[0] == 0 and moved[3999] == moved[4000] == 2 and moved[22000] == pytest.approx(1) and moved[-1] < 1e-6


def test_prototype_rate() -> None:
    """Its own base rate, the course of the others; warm-up leaves it at exactly 0."""
    rate = build_schedules(options_of("--prototype_mode", "warmup", "--prototype_lr", "1e-4",
                                      "--prototype_warmup_epochs", "20"), PLAN)
    assert (rate["prototype_lr"][:8000] == 0).all()
    np.testing.assert_allclose(rate["prototype_lr"][8000:], rate["lr"][8000:] / 20, rtol=1e-12)
    trained = build_schedules(options_of("--prototype_mode", "trainable"), PLAN)["prototype_lr"]
    assert trained[1] > 0 and trained.max() == pytest.approx(1e-4 * math.sqrt(2))


def test_temperature_may_rise_longer_than_the_training() -> None:
    temperature = build_schedules(options_of("--epochs", "15"), PLAN)["teacher_temperature"]
    assert len(temperature) == 6000 and temperature[-1] == pytest.approx(0.0549988, abs=1e-7)


def test_epoch_length() -> None:
    """DermINO's epoch is 400 updates of whatever number of images; else one pass."""
    assert cut_batches(432_776, options_of()).steps_per_epoch == 400
    assert cut_batches(1000, options_of("--epoch_length", "0", "--batch_size", "64")).steps_per_epoch == 15


def test_base_recipe_is_the_published_one() -> None:
    """Recipe 1.5, number by number."""
    expected = {
        "model": "DermINO_Base", "batch_size": 256, "epochs": 100, "epoch_length": 400, "base_lr": 0.002, "min_lr":
        1e-06, "warmup_epochs": 10, "layer_decay": 1, "patch_embed_lr_mult": 0.2, "weight_decay": 0.04,
        "weight_decay_end": 0.2, "clip_grad": 3.0, "freeze_last_layer_epochs": 1, "momentum_teacher": 0.992,
        "final_momentum_teacher": 1.0, "warmup_teacher_temp": 0.04, "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30, "head_n_prototypes": 65536, "head_hidden_dim": 2048,
        "head_bottleneck_dim": 256, "drop_path": 0.4, "mask_sample_probability": 0.5, "mask_ratio_min_max": [0.1,
        0.5], "global_crops_size": 224, "global_crops_scale": [0.32, 1.0], "local_crops_size": 98,
        "local_crops_scale": [0.05, 0.32], "local_crops_number": 8, "dino_loss_weight": 1, "ibot_loss_weight": 1,
        "koleo_loss_weight": 0.1, "label_loss_weight": 1, "label_loss_weight_end": None, "label_temperature": None,
        "label_bias": "zero", "prototypes": "text", "text_encoder": "GanjinZero/coder_all", "text_pooling": "pooler",
        "prototype_mode": "frozen", "dinov2_compat": True, "layer_scale_init_value": None, "patch_size": None}
    options = dataclasses.asdict(options_of())
    assert {name: options[name] for name in expected} == expected


def test_large_recipe_differs_where_it_says() -> None:
    base, large = (dataclasses.asdict(options_of(config=name)) for name in ("dermino_base", "dermino_large"))
    assert {name: large[name] for name in base if base[name] != large[name]} == {
        "model": "dinov2", "batch_size": 64, "update_freq": 4, "grad_checkpointing": True}


@pytest.mark.parametrize("words, why", [
    (["--global_crops_scale", "1", "0.3"], "the first is the smaller one"),
    (["--prototypes", "coder"], "none of text, class_mean"), (["--no_save_ckpt"], "is lost"),
    (["--eval_root", "x"], "--eval_csv: add it"),
    (["--dino_loss_weight", "0", "--ibot_loss_weight", "0", "--koleo_loss_weight", "0", "--label_loss_weight", "0"],
     "nothing would be trained")])
def test_contradictions(words, why) -> None:
    with pytest.raises(UserError, match=why):
        options_of(*words)


def test_all_contradictions_at_once() -> None:
    args = parse(pretraining_parser(), ["--mask_ratio_min_max", "0.5", "0.1"])
    with pytest.raises(UserError) as caught:
        settle_options(args)
    assert all(word in str(caught.value) for word in ("--data_csv", "--model", "--mask_ratio_min_max"))
