"""What a segmentation is put together from: recipes as published, the model, the images of a run, its batches."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from furnace import segmentation
from furnace.data.segmentation import SegmentationManifest, read_segmentation
from furnace.models import panderm
from furnace.models.segmenter import SegmentationModel
from furnace.runtime.files import UserError
from furnace.runtime.run_directory import open_run
from furnace.segmentation import (
    RECIPES,
    SegmentationOptions,
    build_model,
    cut_batches,
    draw_data,
    least_batch,
    train_once,
)
from furnace.segmentation_arguments import segmentation_parser
from furnace.training import build_schedules, build_state, prepare_model, settings_of
from tiny_segmentation import RUN, command, disc_set

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW = {"embed_dim": 32, "num_heads": 2}  # the published depths, so that taps are as they are


def options_of(*words: str, recipe: str = "default", **options: str | None) -> SegmentationOptions:
    """As ``main`` makes them of a command line."""
    line = command(Path("x"), *words, csv=Path("x.csv"), recipe=recipe, **options)
    args = RUN.parse(segmentation_parser(recipe), line)
    RUN.settle_options(args)
    args.size = args.size or (segmentation.SIZE, segmentation.SIZE)
    return SegmentationOptions(**{field.name: getattr(args, field.name)
                                  for field in dataclasses.fields(SegmentationOptions)})


def published(recipe: str, *words: str, **options: str | None) -> SegmentationOptions:
    """A recipe with nothing said but the data."""
    nothing = dict.fromkeys(("model", "size", "batch_size", "epoch", "warmup_epochs", "channels"))
    return options_of(*words, recipe=recipe, **{**nothing, **options})


@pytest.fixture
def narrow(monkeypatch) -> None:
    """PanDerm of width 32; depth and everything else are its own."""
    monkeypatch.setitem(panderm.SIZES, "Large", {"depth": 24, **NARROW})


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> SegmentationManifest:
    """24 train (two of each lesion), 6 val and 4 test images."""
    return read_segmentation(disc_set(tmp_path_factory.mktemp("discs") / "d", train=24, val=6, test=4, size=(20, 24),
                                      copies=2))


# ------------------------------------------------------------------------------------------------------------- recipes

PUBLISHED = {
    # spec: PanDerm's run.sh; AdamW 1e-4, 0.05 on everything, no layer decay, cosine by epoch to 0, no warm-up, 100
    # epochs of one image on each of two GPUs, cross-entropy alone, drop path 0.15, the backbone trained
    "panderm": {"model": "PanDerm_Large_LP", "head": "upernet", "pool_scales": [1, 2, 3, 6], "pyramid": True,
                "drop_path": 0.15, "dropout": None, "tune": "full", "dice_weight": 0.0, "opt": "adamw",
                "opt_betas": None, "opt_eps": None, "lr": 1e-4, "weight_decay": 0.05, "weight_decay_end": None,
                "decay_all": True, "layer_decay": 1.0, "cosine_by": "epoch", "warmup_epochs": 0.0, "warmup_steps": -1,
                "min_lr": 0.0, "clip_grad": None, "epochs": 100, "batch_size": 2, "update_freq": 1,
                "model_ema": False, "early_stop": 0, "monitor": "jaccard", "size": (224, 224), "channels": None,
                "taps": None, "percent": 100.0, "kfold": 0},
    # spec 2.4: frozen backbone, Adam 1e-3 without decay, 20 epochs of cosine (stepped by epoch, not by update, which is
    # the fault), batch 64, cross-entropy
    "dermino": {"model": "DermINO_Base", "head": "linear", "pyramid": False, "drop_path": 0.0, "tune": "head",
                "dice_weight": 0.0, "opt": "adam", "lr": 1e-3, "weight_decay": 0.0, "layer_decay": 1.0,
                "cosine_by": "epoch", "warmup_epochs": 0.0, "warmup_steps": -1, "min_lr": 0.0, "clip_grad": None,
                "epochs": 20, "batch_size": 64, "size": (224, 224), "channels": None, "pool_scales": [1, 2, 3, 6]},
    "default": {"head": "upernet", "tune": "full", "dice_weight": 1.0, "decay_all": False, "cosine_by": "update",
                "warmup_epochs": 1.0, "layer_decay": 0.75, "opt": "adamw", "pyramid": True, "size": (224, 224)},
}


@pytest.mark.parametrize("recipe,name", [(recipe, name) for recipe, numbers in PUBLISHED.items() for name in numbers])
def test_the_numbers_of_a_recipe(recipe: str, name: str) -> None:
    """Through the parser, with nothing else said."""
    options = published(recipe, **({"model": "demo"} if recipe == "default" else {}))
    assert getattr(options, name) == PUBLISHED[recipe][name]


def test_the_command_line_wins_over_a_recipe() -> None:
    options = published("panderm", "--decay_weights", lr="0.002", epoch="7", dice_weight="0.5", drop_path="0")
    assert (options.lr, options.epochs, options.dice_weight, options.drop_path, options.decay_all) == (
        0.002, 7, 0.5, 0.0, False)
    assert options.weight_decay == 0.05 and options.recipe == "panderm"


def test_recipes_say_the_same_things() -> None:
    """Each of them of every option, so that one recipe's default cannot be left over for another."""
    assert len({frozenset(recipe) for recipe in RECIPES.values()}) == 1
    assert set(PUBLISHED["panderm"]) >= set(RECIPES["panderm"])


def test_panderm_s_optimiser_and_rates(narrow) -> None:
    """One rate, decay of everything but the frozen positions; 1e-4 falls by epoch, 2.467198e-8 in the last."""
    options = published("panderm", pretrained="random", size="64", channels="8")
    model = build_model(options, 0)
    plan = dataclasses.replace(cut_batches_of(options, 10, model), steps_per_epoch=5)
    rates = build_schedules(options, plan, cosine_by=options.cosine_by)["lr"]
    assert rates[[0, 4, 5, 250, 499]] == pytest.approx([1e-4, 1e-4, 9.997533e-5, 5e-5, 2.467198e-8], rel=1e-6)
    groups = build_state(model, options, plan, decay_all=options.decay_all).optimizer.param_groups
    assert {(group["lr_scale"], group["weight_decay_scale"]) for group in groups} == {(1.0, 1.0)}
    assert groups[0]["betas"] == (0.9, 0.999) and groups[0]["eps"] == 1e-8
    counted = sum(p.numel() for group in groups for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters()) - model.backbone.pos_embed.numel()


# ----------------------------------------------------------------------------------------------------------- the model

def drop_rates(model: SegmentationModel) -> list[float]:
    return [block.drop_path1.drop_prob if hasattr(block.drop_path1, "drop_prob") else 0.0
            for block in model.backbone.blocks]


def test_panderm_s_model(narrow) -> None:
    """Taps 7, 11, 15, 23, its pyramid, the width of the backbone, drop path rising to 0.15, positions frozen."""
    model = build_model(published("panderm", pretrained="random"), 0)
    assert model.taps == (7, 11, 15, 23) and model.input_size == (224, 224) and model.neck is not None
    assert model.recipe["channels"] == 32 and model.recipe["dropout"] == 0 and model.recipe["nb_classes"] == 2
    assert drop_rates(model) == pytest.approx([0.15 * i / 23 for i in range(24)])
    assert not model.backbone.pos_embed.requires_grad
    with torch.no_grad():
        sizes = [tuple(x.shape[-2:]) for x in model.features(torch.zeros(1, 3, 224, 224))]
    assert sizes == [(56, 56), (28, 28), (14, 14), (7, 7)]


@pytest.mark.parametrize("head,taps,dropout", [("linear", (11,), 0.1), ("upernet", (2, 5, 8, 11), 0.0)])
def test_dermino_s_models(head: str, taps: tuple, dropout: float) -> None:
    """Linear on the last block with dropout 0.1; or UPerNet as wide as the backbone, all its maps at one resolution.

    The backbone is frozen; of the linear head 2 x 768 of the normalisation and 2 x 769 are trained.
    """
    options = published("dermino", pretrained="random", head=head, size="28")
    model = build_model(options, 0)
    assert (model.taps, model.recipe["channels"], model.recipe["dropout"], model.neck) == (taps, 768, dropout, None)
    assert drop_rates(model) == [0.0] * 12 and model.minimum_batch == (1 if head == "linear" else 2)
    count = prepare_model(model, options, seed=0, name=options.model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("decode_head.") for name in trained)
    if head == "linear":
        assert count == 2 * 768 + 2 * 769


@pytest.mark.parametrize("recipe,words,wanted", [
    ("default", {"head": "linear"}, 0.0), ("dermino", {"head": "linear"}, 0.1),
    ("dermino", {"head": "linear", "dropout": "0.3"}, 0.3), ("dermino", {"head": "linear", "dropout": "0"}, 0.0),
    ("dermino", {"head": "upernet"}, 0.0), ("default", {"head": "upernet", "dropout": "0.2"}, 0.2)])
def test_dropout_of_head_and_recipe(recipe: str, words: dict, wanted: float) -> None:
    assert build_model(options_of(recipe=recipe, channels=None, **words), 0).recipe["dropout"] == wanted


def test_drop_path_where_the_architecture_has_it() -> None:
    """0.1 unless told; densenet has none: left out, and refused when asked for."""
    assert drop_rates(build_model(options_of(), 0))[-1] == pytest.approx(0.1)
    assert drop_rates(build_model(options_of(drop_path="0.4"), 0))[-1] == pytest.approx(0.4)
    without = functools.partial(options_of, model="timm:densenet121", head="linear", channels=None)
    assert build_model(without(), 0).input_size == (32, 32)
    with pytest.raises(UserError, match="--drop_path"):
        build_model(without(drop_path="0.2"), 0)


def test_a_model_depends_on_its_seed_and_size() -> None:
    first, same, other = (build_model(options_of(size="32 48"), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[key]) for key, value in first.items())
    assert not torch.equal(first["decode_head.conv_seg.weight"], other["decode_head.conv_seg.weight"])
    assert build_model(options_of(size="32 48"), 0).input_size == (32, 48)


# -------------------------------------------------------------------------------------------------- the images of a run

def names(manifest: SegmentationManifest) -> set[str]:
    return set(manifest.filenames)


def test_all_images_unless_told(discs) -> None:
    ((train, val),) = draw_data(discs, [{"seed": 0}], options_of())
    assert names(train) == names(discs.split("train")) and names(val) == names(discs.split("val"))


def test_a_share_of_train(discs) -> None:
    """int(per cent of n), drawn by the seed; a smaller share is part of a larger one; val is left whole."""
    drawn = {}
    for percent in ("10", "50", "75"):
        ((train, val),) = draw_data(discs, [{"seed": 0}], options_of(percent=percent))
        drawn[percent] = names(train)
        assert len(val) == 6 and names(train) < names(discs.split("train"))
    assert [len(part) for part in drawn.values()] == [2, 12, 18] and drawn["10"] < drawn["50"] < drawn["75"]
    (again, _), (other, _) = draw_data(discs, [{"seed": 0}, {"seed": 1}], options_of(percent="50"))
    assert names(again) == drawn["50"] != names(other) and len(other) == 12


def test_no_image_is_refused(discs) -> None:
    with pytest.raises(UserError, match=r"--percent 4 of 24 train images is no image.*10 is a tenth"):
        draw_data(discs, [{"seed": 0}], options_of(percent="4"))
    with pytest.raises(UserError, match="--percent 0 of 24"):
        draw_data(discs, [{"seed": 0}], options_of(percent="0"))


@pytest.mark.parametrize("images,percent,wanted", [(100, "29", 29), (100, "58", 58), (100, "10", 10), (7, "50", 3)])
def test_a_share_is_exact(discs, images: int, percent: str, wanted: int) -> None:
    """29 of a hundred are 29: 100 * 0.29 is a little less than that in floating point."""
    many = dataclasses.replace(discs, frame=discs.split("train").frame.iloc[[i % 24 for i in range(images)]]
                               .reset_index(drop=True))
    ((train, _),) = draw_data(many, [{"seed": 0}], options_of(percent=percent))
    assert len(train) == wanted


def test_folds_of_every_seed(discs) -> None:
    """Each image of train and val is val once; a lesion is on one side; test is not touched; a seed cuts once."""
    settings = settings_of([0, 1], 3)
    drawn = draw_data(discs, settings, options_of(kfold="3"))
    pooled = names(discs.split("train")) | names(discs.split("val"))
    cuts = []
    for start in (0, 3):
        vals = [names(val) for _, val in drawn[start:start + 3]]
        assert sum(map(len, vals)) == 30 and set.union(*vals) == pooled
        for train, val in drawn[start:start + 3]:
            assert names(train) | names(val) == pooled and not names(train) & names(val)
            assert not set(train.frame["lesion_id"]) & set(val.frame["lesion_id"])
        cuts.append({frozenset(val) for val in vals})
    assert cuts[0] != cuts[1]
    ((train, val), *_) = draw_data(discs, settings[:3], options_of(kfold="3", percent="50"))
    assert len(train) == int((30 - len(val)) / 2) and names(train) < names(drawn[0][0]) and names(val) == names(
        drawn[0][1])


def test_without_val_images_the_last_epoch_is_taken(discs, caplog) -> None:
    alone = discs.take([i for i, split in enumerate(discs.frame["split"]) if split != "val"])
    with caplog.at_level(logging.WARNING):
        ((train, val),) = draw_data(alone, [{"seed": 0}], options_of())
    assert len(val) == 0 and len(train) == 24 and "no val images: the last epoch's model is taken" in caplog.text


# -------------------------------------------------------------------------------------------------------------- batches

def cut_batches_of(options: SegmentationOptions, images: int, model: SegmentationModel | None = None) -> Any:
    return cut_batches(range(images), model or build_model(options, 0), options)  # only their number is asked for


def test_batches() -> None:
    """Of the command line's size; the head's least number is kept in the plan."""
    plan = cut_batches_of(options_of(batch_size="4", update_freq="2"), 35)
    assert (plan.micro, plan.accumulation, plan.world_size, plan.steps_per_epoch, plan.least) == (4, 2, 1, 4, 2)
    assert cut_batches_of(options_of(head="linear", channels=None), 35).least == 1
    assert cut_batches_of(options_of(pool_scales="2 3"), 35).least == 1, "without the 1 x 1 map one image is enough"


def test_one_image_and_batch_normalisation() -> None:
    """Refused with the ways out; the number of images only where it is the reason; not for a linear head."""
    with pytest.raises(UserError, match=r"--batch_size 1: .*--head upernet needs 2 images.*take --batch_size 2 or "
                                        r"more, or one image on each of two GPUs with torchrun$"):
        cut_batches_of(options_of(batch_size="1"), 35)
    with pytest.raises(UserError, match=r"torchrun \(1 train images\)$"):
        cut_batches_of(options_of(), 1)
    assert cut_batches_of(options_of(batch_size="1", head="linear", channels=None), 35).micro == 1
    assert cut_batches_of(options_of(), 2).micro == 2


@pytest.mark.parametrize("kind,processes,wanted", [("cpu", 1, 2), ("cpu", 2, 2), ("cuda", 1, 2), ("cuda", 2, 1),
                                                   ("cuda", 3, 1)])
def test_gpus_share_what_the_head_needs(monkeypatch, kind: str, processes: int, wanted: int) -> None:
    """The published training: one image on each of two GPUs. Processes on a CPU share nothing."""
    monkeypatch.setattr(segmentation, "pick_device", lambda _: torch.device(kind))
    monkeypatch.setattr("furnace.runtime.distributed.world_size", lambda: processes)
    options = options_of(batch_size="1")
    model = build_model(options, 0)
    assert least_batch(model, options) == wanted
    if wanted == 1:
        assert cut_batches_of(options, 35, model).least == 1
    else:
        with pytest.raises(UserError, match="two GPUs" if processes == 1 else r"take --batch_size 2 or more$"):
            cut_batches_of(options, 35, model)


# ------------------------------------------------------------------------------------------------------------- training

def test_training_uses_what_the_recipe_says(discs, tmp_path: Path, monkeypatch) -> None:
    """Transform, normalisation, loss and the rest arrive where they count; the file describes them."""
    got = {}

    def recorded(name: str, function):
        def call(*args: Any, **kwargs: Any):
            got.setdefault(name, kwargs)
            return function(*args, **kwargs)
        monkeypatch.setattr(segmentation, name, call)

    for name in ("build_joint_transform", "make_step", "train"):
        recorded(name, getattr(segmentation, name))
    options = dataclasses.replace(options_of(recipe="panderm", batch_size="8", epoch="1"), save_ckpt=False)
    trained = train_once(open_run(tmp_path / "run", parts={"x": 1}, environment={}), build_model(options, 0), 0,
                         discs.split("train"), discs.split("val"), options)
    half = (0.5, 0.5, 0.5)
    assert got["build_joint_transform"] == {"size": (32, 32), "mean": half, "std": half}
    assert got["make_step"]["dice_weight"] == 0.0
    assert (got["train"]["cosine_by"], got["train"]["decay_all"], got["train"]["sync_bn"]) == ("epoch", True, True)
    meta = trained.best["meta"]
    assert meta["transform"] == "panderm" and meta["data_config"]["mean"] == meta["data_config"]["std"] == list(half)
    (entry,) = trained.history
    assert trained.plan.steps_per_epoch == 3 and entry["lr"] == 1e-4 and 0 <= entry["val_jaccard"] <= 1
    batch = got["train"]["make_batch"](3)
    assert batch.images.shape == (3, 3, 32, 32) and batch.masks.shape == (3, 32, 32) and len(batch.indices) == 3
