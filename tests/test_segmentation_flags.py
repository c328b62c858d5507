"""Every option of segmentation/run.py has an effect: a check per option, of something that it changes.

The commands run through ``main``. ``World.reach`` stops it where the training would begin and keeps what ``fit`` was
to get; ``World.fit`` then trains for real; ``World.tested`` goes on to the test with the model untrained;
``World.evaluated`` and ``World.predicted`` use a model of a short training.
"""

import ast
import inspect
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from scipy import ndimage
from torch import nn

from furnace import segmentation, segmentation_results
from furnace.command_line import parse
from furnace.data.joint_transforms import IGNORED
from furnace.data.segmentation_datasets import build_segmentation_loader
from furnace.evaluation import lesion_masks
from furnace.models import OptionError, dermino, panderm
from furnace.models.segmentation_files import load_segmenter
from furnace.models.segmentation_heads import LinearHead, UPerHead
from furnace.models.segmenter import SegmentationModel
from furnace.published import TAKES_VALUE, accepted_only
from furnace.runtime.checkpoints import BEST, Checkpoints
from furnace.segmentation_arguments import SCRIPT, segmentation_parser
from segmentation_world import (
    TINY,
    World,
    drop_rates,
    half_cosine,
    loss_of,
    masks_of,
    panderm_file,
    parts_of,
    public_set,
    record,
    scales,
    size_of,
    train_disc_model,
    trainable,
)
from tiny_segmentation import MODEL, RUN, results_of, table_of

CHECKS: dict[str, Callable[[World], None]] = {}  # option -> what shows its effect
BARE = dict.fromkeys(("model", "batch_size", "epoch", "warmup_epochs", "channels"))  # left to the recipe


def shows(*flags: str) -> Callable:
    """Enter a check for these options."""
    def enter(check: Callable[[World], None]) -> Callable[[World], None]:
        assert not CHECKS.keys() & set(flags)
        CHECKS.update(dict.fromkeys(flags, check))
        return check
    return enter


# -------------------------------------------------------------------------------------------------------------- model

@shows("--recipe")
def check_recipe(world: World) -> None:
    """Ours unless another is asked for; the command line wins, wherever it stands. More in ``test_recipes``."""
    assert world.reach().loader.dataset.transform.recipe == "default"
    for words in (["--recipe", "panderm", "--lr", 0.1], ["--lr", 0.1, "--recipe", "panderm"]):
        got = world.reach(*words, "--layer_decay", 0.5, "--dice_weight", 2, "--decay_weights", "--drop_path", 0)
        assert (got.asked.recipe, got.asked.lr, got.asked.min_lr, got.asked.dice_weight) == ("panderm", 0.1, 0, 2)
        assert not any(drop_rates(got.state.model)) and min(scales(got, "lr_scale").values()) == 0.5**7
        assert set(scales(got, "weight_decay_scale").values()) == {0, 1}


@shows("--model")
def check_model(world: World) -> None:
    """Another network; cae_seg is the published pair; what never worked is refused."""
    assert type(world.reach().state.model.backbone).__name__ == "VisionTransformer"
    got = world.reach(model="cae_seg", channels=None)
    assert got.options.meta["model"] == "PanDerm_Large_LP" and got.state.model.taps == (7, 11, 15, 23)
    assert isinstance(got.state.model.decode_head, UPerHead) and got.state.model.recipe["channels"] == 32
    for name in ("UNet", "vit_large"):
        assert f"--model {name} could not run" in world.refused(model=name)
    assert world.reach(model="timm:test_resnet").state.model.neck is None


@shows("--pretrained")
def check_pretrained(world: World) -> None:
    """The backbone starts with this file's weights."""
    state = panderm_file(world.folder / "a.pth")
    got = world.reach(model="PanDerm_Base_LP", pretrained=str(world.folder / "a.pth"))
    for name in ("blocks.7.mlp.fc1.weight", "norm.weight", "cls_token"):
        assert torch.equal(got.state.model.state_dict()[f"backbone.{name}"], state[name])
    torch.save({"x": torch.ones(3)}, world.folder / "b.pth")
    assert "b.pth" in world.refused(model="PanDerm_Base_LP", pretrained=str(world.folder / "b.pth"))


@shows("--size")
def check_size(world: World) -> None:
    """Side of the images and masks, or height and width; of a checkpoint, too; drop path survives."""
    for words, size, places in (([], (32, 32), 4), (["--size", 48], (48, 48), 9), (["--size", 32, 48], (32, 48), 6)):
        got = world.reach("--drop_path", 0.3, *words)
        batch, model = next(iter(got.loader)), got.state.model
        assert batch.images.shape == (4, 3, *size) and batch.masks.shape == (4, *size) and model.input_size == size
        assert model.backbone.pos_embed.shape[1] - model.backbone.num_prefix_tokens == places
        assert drop_rates(model) == pytest.approx(list(np.linspace(0, 0.3, 6)))
    fixed = world.reach("--size", 32, 48, model="PanDerm_Base_LP")
    assert "backbone.pos_embed" not in trainable(fixed) and "backbone.cls_token" in trainable(fixed)
    assert size_of(world.tested("--size", 48, 32) / BEST) == (48, 32)
    assert world.reach(size=None).asked.size == (224, 224)
    assert "multiple of the patch size" in world.refused("--size", 40)
    found = [world.evaluated(world.trained, *words) for words in ([], ["--size", 48, 64])]
    assert [results_of(folder)["input_size"] for folder in found] == [[32, 32], [48, 64]]
    assert not table_of(found[0]).equals(table_of(found[1]))


@shows("--head", "--taps")
def check_head(world: World) -> None:
    """What looks at which blocks; blocks behind the last are cut off."""
    for words, kind, taps, width in (([], UPerHead, (1, 2, 4, 5), 64), (["--head", "linear"], LinearHead, (5,), 64),
                                     (["--head", "linear", "--taps", 0, 1], LinearHead, (0, 1), 128),
                                     (["--taps", 0, 1, 1, 2], UPerHead, (0, 1, 1, 2), 64)):
        channels = {"channels": None} if kind is LinearHead else {}
        model = world.reach(*words, **channels).state.model
        assert isinstance(model.decode_head, kind) and model.taps == taps
        assert len(model.backbone.blocks) == taps[-1] + 1
        assert kind is UPerHead or model.decode_head.conv_seg.in_channels == width
    assert "counted from 0 to 5" in world.refused("--taps", 1, 2, 3, 6)


@shows("--channels", "--pool_scales")
def check_upernet(world: World) -> None:
    """Width inside UPerNet and sides of its pooled grids; no grid of 1 x 1 trains on single images."""
    head = world.reach("--channels", 12, "--pool_scales", 2, 4).state.model.decode_head
    assert head.conv_seg.in_channels == head.bottleneck.conv.out_channels == 12
    assert [branch[0].output_size for branch in head.psp_modules] == [2, 4]
    usual = world.reach(channels=None).state.model.decode_head
    assert usual.conv_seg.in_channels == 256 and len(usual.psp_modules) == 4
    assert world.reach("--pool_scales", 2, "--batch_size", 1).plan.micro == 1
    assert "needs 2 images" in world.refused("--batch_size", 1)


@shows("--pyramid", "--no_pyramid")
def check_pyramid(world: World) -> None:
    """The logits' own resolution: four times that of the patches, or theirs."""
    for words, side in (([], 8), (["--no_pyramid"], 2), (["--no_pyramid", "--pyramid"], 8)):
        model = world.reach(*words).state.model
        assert model.forward_low(torch.zeros(2, 3, 32, 32)).shape == (2, 2, side, side)


@shows("--dropout")
def check_dropout(world: World) -> None:
    """Before the last layer: none; DermINO's linear head has 0.1; what is said wins."""
    linear, dermino_recipe = ["--head", "linear"], ["--recipe", "dermino"]
    for words, rate in (([], 0), (["--dropout", 0.3], 0.3), (linear, 0), (dermino_recipe, 0.1),
                        ([*dermino_recipe, "--head", "upernet"], 0), ([*dermino_recipe, "--dropout", 0], 0)):
        model = world.reach(*words, channels=None).state.model
        assert model.decode_head.dropout.p == rate == model.recipe["dropout"]


@shows("--drop_path")
def check_drop_path(world: World) -> None:
    """Rates of the blocks, 0.1 at the last; a model without it works and refuses a rate."""
    for words, last in (([], 0.1), (["--drop_path", 0.3], 0.3), (["--drop_path", 0], 0)):
        assert drop_rates(world.reach(*words).state.model) == pytest.approx(list(np.linspace(0, last, 6)))

    make = segmentation.create_segmenter

    def without(*given: Any, drop_path: float = 0.0, **named: Any) -> Any:
        if drop_path:
            raise OptionError("no stochastic depth here", "drop_path_rate")
        return make(*given, **named)

    world.monkeypatch.setattr(segmentation, "create_segmenter", without)
    world.reach()
    assert "no stochastic depth" in world.refused("--drop_path", 0.1)


@shows("--tune")
def check_tune(world: World) -> None:
    """What the optimiser has."""
    full = world.reach()
    head = {name for name, _ in full.state.model.named_parameters() if name.startswith(("neck.", "decode_head."))}
    assert trainable(full) == {name for name, _ in full.state.model.named_parameters()} > head
    assert trainable(world.reach("--tune", "head")) == head
    lora = trainable(world.reach("--tune", "lora"))
    assert len(lora - head) == 2 * 6 * 4 and all(".lora_" in name for name in lora - head)  # A, B; blocks; layers


@shows("--lora_rank", "--lora_alpha")
def check_lora(world: World) -> None:
    """The matrices' shape, and the factor of what they add: alpha / rank."""
    for words, rank, alpha in (([], 8, 16), (["--lora_rank", 3], 3, 16), (["--lora_alpha", 4], 8, 4)):
        layer = world.reach("--tune", "lora", *words).state.model.backbone.blocks[0].mlp.fc1
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        nn.init.ones_(second)
        assert first.shape == (rank, 64)
        torch.testing.assert_close(layer.get_delta_weight("default"), second @ first * alpha / rank)


# --------------------------------------------------------------------------------------------------------------- data

@shows("--dataset", "--parent_path")
def check_dataset(world: World) -> None:
    """A public set in its archive's folders, found below the parent, a slash at its end or none."""
    world.csv, parent = None, public_set(world.folder)
    for path in (parent, f"{parent}/"):
        got = world.reach("--dataset", "ISIC2018", "--parent_path", path)
        assert [len(got.loader.dataset), got.loader.dataset.manifest.name] == [6, "ISIC2018"]
        assert got.loader.dataset.manifest.path_of(0).name == "ISIC_0000000.jpg"
    assert "ISIC2018" in world.refused("--dataset", "ISIC2018", "--parent_path", world.folder / "discs")
    assert "none of ISIC2016" in world.refused("--dataset", "staining134", "--parent_path", parent)


@shows("--csv_path")
def check_csv(world: World) -> None:
    """The images of that file."""
    other = world.table("other.csv", lambda table: table[~table["image"].str.contains("train_[567]")])
    assert len(world.reach().loader.dataset) == 8 and len(world.reach("--csv_path", other).loader.dataset) == 5


@shows("--root_path")
def check_root(world: World) -> None:
    """The folder of images and masks; of the photographs that --predict's CSV names, too."""
    moved = world.table("elsewhere/moved.csv", lambda table: table)
    assert "images/train_0.png" in world.refused("--csv_path", moved)
    manifest = world.reach("--csv_path", moved, "--root_path", world.csv.parent).loader.dataset.manifest
    assert manifest.path_of(0) == world.csv.parent / "images/train_0.png"
    assert manifest.mask_path_of(0) == world.csv.parent / "masks/train_0.png"
    assert len(masks_of(world.predicted(world.trained, moved, "--root_path", world.csv.parent))) == 15


@shows("--val_fraction")
def check_val_fraction(world: World) -> None:
    """Of train, where there is no val; 0 draws none."""
    without = world.table("without.csv", lambda table: table[table["split"] != "val"])
    for words, train in (([], 7), (["--val_fraction", 0.5], 4), (["--val_fraction", 0], 8)):
        got = world.reach("--csv_path", without, *words)
        assert len(got.loader.dataset) == train and (got.evaluate is None) == (train == 8)
    assert len(world.reach("--val_fraction", 0.5).loader.dataset) == 8


@shows("--percent")
def check_percent(world: World) -> None:
    """Fewer train images, by a seeded draw; val stays."""
    names = [set(world.reach("--percent", 50, *words).loader.dataset.manifest.filenames)
             for words in ([], [], ["--seed", 1])]
    assert [len(part) for part in names] == [4, 4, 4] and names[0] == names[1] != names[2]
    assert len(table_of(world.tested("--percent", 50), "val")) == 3
    assert len(world.reach("--percent", 100).loader.dataset) == 8
    for share in (0, 10):
        assert f"--percent {share} of 8 train images is no image" in world.refused("--percent", share)


@shows("--kfold")
def check_folds(world: World) -> None:
    """Train and val are pooled and cut, in five unless told, lesions together; test is left alone."""
    folder = world.tested("--kfold")
    val = [set(table_of(folder / f"seed_0_fold_{i}", "val")["filename"]) for i in range(5)]
    assert sum(map(len, val)) == len(set.union(*val)) == 11 and {len(part) for part in val} == {2, 3}
    assert results_of(folder)["summary"][0]["runs"] == 5 and len(pd.read_csv(folder / "table.csv")) == 10
    assert all(table_of(folder / f"seed_0_fold_{i}")["filename"].str.contains("test_").all() for i in range(5))
    pairs = world.table("pairs.csv", lambda table: table.assign(lesion_id=np.arange(15) // 2))
    trained = set(world.reach("--csv_path", pairs, "--kfold", 2).loader.dataset.manifest.frame["lesion_id"])
    assert len(trained) < 6 and "3 folds" not in world.refused("--csv_path", pairs, "--kfold", 7)


@shows("--resume")
def check_resume(world: World) -> None:
    """This fold alone; the last one that was missing brings the summary."""
    there = ["--save_name", world.folder / "run", "--kfold", 3]
    assert world.reach("--kfold", 3, "--resume", 1).run.path.name == "seed_0_fold_1"
    for fold, left in ((2, 2), (0, 1)):
        folder = world.tested(*there, "--resume", fold)
        assert f"fold {fold} is finished; the summary comes when {left} more are" in world.caplog.messages
        assert (folder / f"seed_0_fold_{fold}" / "results.json").exists()
        assert not (folder / "results.json").exists() and not (folder / "seed_0_fold_1").exists()
    assert results_of(world.tested(*there, "--resume", 1))["summary"][0]["runs"] == 3
    assert "this run is finished:" in (world.tested(*there), world.caplog.messages)[1]


@shows("--strict_split")
def check_strict(world: World) -> None:
    """A lesion in train and test is refused, not only warned of."""
    leak = world.table("leak.csv", lambda table: table.assign(lesion_id=["L", *table["lesion_id"][1:-1], "L"]))
    world.reach("--csv_path", leak)
    assert "lesion" in world.refused("--csv_path", leak, "--strict_split")


# ----------------------------------------------------------------------------------------------------------- training

@shows("-b", "--batch_size", "--update_freq")
def check_batches(world: World) -> None:
    """Images of a forward pass; passes of an update."""
    for words, wanted in (([], (4, 1, 2)), (["-b", 2], (2, 1, 4)), (["--batch_size", 8], (8, 1, 1)),
                          (["--update_freq", 2], (4, 2, 1))):
        got, passes = world.reach(*words, "--no_save_ckpt", epoch="1"), []
        record(world.monkeypatch, got, "step", lambda model, batch, values, to=passes: to.append(len(batch.images)))
        world.fit(got, lambda model: {"jaccard": 0.5})
        assert passes == [wanted[0]] * wanted[1] * wanted[2] and got.state.update == wanted[2]


@shows("--epoch", "--start_epoch")
def check_epochs(world: World) -> None:
    """As many as asked for, from the one asked for."""
    for words, epochs in (([], [0, 1]), (["--epoch", 3], [0, 1, 2]), (["--epoch", 3, "--start_epoch", 2], [2])):
        got = world.reach("--no_save_ckpt", *words)
        world.fit(got, lambda model: {"jaccard": 0.5})
        assert [entry["epoch"] for entry in got.state.history] == epochs
        assert got.state.update == len(got.schedules["lr"]) == 2 * (epochs[-1] + 1)


@shows("--early_stop")
def check_early_stop(world: World) -> None:
    """Two epochs without a better val after the first."""
    for words, ran in (([], 5), (["--early_stop", 2], 3)):
        got = world.reach("--epoch", 5, "--no_save_ckpt", *words)
        world.fit(got, lambda model: {"jaccard": 0.5})
        assert got.state.epoch == ran


@shows("--seed", "--seeds")
def check_seed(world: World) -> None:
    """Head, order and augmentation; several make a run each, and a summary."""
    zero, one = world.reach(), world.reach("--seed", 1)
    heads = [got.state.model.decode_head.conv_seg.weight for got in (zero, one, world.reach("--seeds", 1, 2))]
    assert not torch.equal(heads[0], heads[1]) and torch.equal(heads[1], heads[2])
    assert not torch.equal(next(iter(zero.loader)).images, next(iter(one.loader)).images)
    assert [draw.index for draw in zero.loader.sampler] != [draw.index for draw in one.loader.sampler]
    folder = world.tested("--seeds", 1, 2, 1)
    assert set(pd.read_csv(folder / "table.csv")["seed"]) == {1, 2} and results_of(folder)["summary"][0]["runs"] == 2


@shows("--model_ema", "--model_ema_decay", "--model_ema_force_cpu")
def check_average(world: World) -> None:
    """It is there, at its pace, where it is told to be, and it is what is kept."""
    assert world.reach().state.ema is None
    slow, fast = (world.reach("--model_ema", "--epoch", 40, *words).schedules["ema"]
                  for words in ([], ["--model_ema_decay", 0.5]))
    assert slow[-1] == pytest.approx(80 / 89) and fast[-1] == 0.5 and slow[0] == fast[0] == 0.1
    assert world.reach("--model_ema").state.ema.device is None
    assert world.reach("--model_ema", "--model_ema_force_cpu").state.ema.device == torch.device("cpu")
    got = world.reach("--model_ema", "--lr", 0.1, "--no_save_ckpt", epoch="1")
    kept = world.fit(got, lambda model: {"jaccard": 0.5})["model"]["decode_head.conv_seg.weight"]
    assert torch.equal(kept, got.state.ema.module.decode_head.conv_seg.weight)
    assert not torch.equal(kept, got.state.model.decode_head.conv_seg.weight)


@shows("--dice_weight")
def check_dice(world: World) -> None:
    """The loss of a model that always says one half, by its formula."""
    for words, weight in (([], 1.0), (["--dice_weight", 0], 0.0), (["--dice_weight", 2.5], 2.5)):
        loss, masks = loss_of(world.reach(*words))
        known, lesion = (masks != IGNORED).sum(axis=(1, 2)), (masks == 1).sum(axis=(1, 2))
        dice = 1 - (2 * 0.5 * lesion + 1) / (0.5 * known + lesion + 1)
        assert loss == pytest.approx(math.log(2) + weight * dice.mean(), rel=1e-5)


@shows("--cosine_by")
def check_cosine(world: World) -> None:
    """The rate falls with every update, or once an epoch."""
    for words, wanted in (([], half_cosine(5e-4, 1e-6, 8)),
                          (["--cosine_by", "epoch"], list(np.repeat(half_cosine(5e-4, 1e-6, 4), 2)))):
        assert world.reach(*words, epoch="4").schedules["lr"] == pytest.approx(wanted)


@shows("--decay_all", "--decay_weights")
def check_decay_all(world: World) -> None:
    """Everything, or matrices but for positions and class token."""
    for words, everything in (([], False), (["--decay_all"], True), (["--decay_all", "--decay_weights"], False)):
        got = world.reach(*words)
        for name, scale in scales(got, "weight_decay_scale").items():
            flat = name.endswith((".bias", "pos_embed", "cls_token", "reg_token")) \
                or got.state.model.get_parameter(name).ndim == 1
            assert scale == (everything or not flat), name


@shows("--monitor")
def check_monitor(world: World) -> None:
    """The chosen epoch is that of the best value of this metric; the evaluation has them all."""
    names = ("jaccard", "dice", "threshold_jaccard", "pooled_dice", "pooled_jaccard")
    assert set(names) <= world.reach().evaluate(world.reach().state.model).keys()
    for wanted in names:
        metrics = iter([{name: float(name == wanted) for name in names}, dict.fromkeys(names, 0.5)])
        chosen = world.fit(world.reach("--no_save_ckpt", "--monitor", wanted), lambda model, it=metrics: next(it))
        assert chosen["epoch"] == 0
    metrics = iter([dict.fromkeys(names[1:], 1.0) | {"jaccard": 0.1}, dict.fromkeys(names, 0.5)])
    assert world.fit(world.reach("--no_save_ckpt"), lambda model: next(metrics))["epoch"] == 1


# ---------------------------------------------------------------------------------------------------------- optimiser

@shows("--opt", "--opt_eps", "--opt_betas", "--momentum")
def check_optimiser(world: World) -> None:
    """Its kind and numbers."""
    def group(*words: Any) -> dict[str, Any]:
        optimizer = world.reach(*words).state.optimizer
        return {"kind": type(optimizer).__name__, **optimizer.param_groups[0]}

    usual = group()
    assert (usual["kind"], usual["eps"], usual["betas"]) == ("AdamW", 1e-8, (0.9, 0.999))
    assert group("--opt_eps", 1e-6)["eps"] == 1e-6 and group("--opt_betas", 0.8, 0.98)["betas"] == (0.8, 0.98)
    plain, heavy = group("--opt", "sgd"), group("--opt", "sgd", "--momentum", 0.5)
    assert (plain["kind"], plain["momentum"], heavy["momentum"]) == ("SGD", 0.9, 0.5)
    assert "--opt nonsense" in world.refused("--opt", "nonsense")


@shows("--clip_grad")
def check_clip(world: World) -> None:
    """One update of SGD at rate 1 moves the weights by the norm of the gradients, or by the limit."""
    moved = []
    for words in ([], ["--clip_grad", 0.001]):
        got = world.reach("--opt", "momentum", "--momentum", 0, "--lr", 1, "--weight_decay", 0, "--layer_decay", 1,
                          "--batch_size", 8, "--epoch", 1, "--no_save_ckpt", *words)
        start = [p.detach().clone() for p in got.state.model.parameters()]
        world.fit(got, lambda model: {"jaccard": 0.5})
        moved.append(math.sqrt(sum(float((p.detach() - s).square().sum()) for p, s in
                                   zip(got.state.model.parameters(), start, strict=True))))
    assert moved[0] > 0.01 and moved[1] == pytest.approx(0.001, rel=1e-3)


@shows("--weight_decay", "--weight_decay_end")
def check_weight_decay(world: World) -> None:
    """Constant, or on its way by a cosine."""
    assert set(world.reach().schedules["weight_decay"]) == {0.05}
    assert set(world.reach("--weight_decay", 0.2).schedules["weight_decay"]) == {0.2}
    ending = world.reach("--weight_decay_end", 0.01).schedules["weight_decay"]
    assert ending == pytest.approx(half_cosine(0.05, 0.01, 4))


@shows("--disable_weight_decay_on_rel_pos_bias")
def check_table_decay(world: World) -> None:
    """The tables are decayed, as published, unless told otherwise."""
    for words, scale in (([], 1.0), (["--disable_weight_decay_on_rel_pos_bias"], 0.0)):
        found = scales(world.reach(*words, model="PanDerm_Base_FT"), "weight_decay_scale")
        tables = [value for name, value in found.items() if name.endswith("relative_position_bias_table")]
        assert tables == [scale] * 12


@shows("--lr", "--min_lr", "--warmup_lr", "--warmup_epochs", "--warmup_steps")
def check_rates(world: World) -> None:
    """A line from warmup_lr to lr, then half a cosine towards min_lr: 4 epochs of 2 updates."""
    for words, (lr, low, start, line) in (
            ([], (5e-4, 1e-6, 0, 0)), (["--lr", 0.1], (0.1, 1e-6, 0, 0)), (["--min_lr", 1e-4], (5e-4, 1e-4, 0, 0)),
            (["--warmup_epochs", 1.5], (5e-4, 1e-6, 0, 3)),
            (["--warmup_epochs", 2, "--warmup_lr", 1e-5], (5e-4, 1e-6, 1e-5, 4)),
            (["--warmup_epochs", 2, "--warmup_steps", 3], (5e-4, 1e-6, 0, 3))):
        wanted = [*np.linspace(start, lr, line), *half_cosine(lr, low, 8 - line)]
        assert world.reach("--epoch", 4, *words).schedules["lr"] == pytest.approx(wanted)


@shows("--layer_decay")
def check_layer_decay(world: World) -> None:
    """Patches, six blocks, head."""
    for words, decay in (([], 0.75), (["--layer_decay", 0.5], 0.5)):
        found = scales(world.reach(*words), "lr_scale")
        for name, power in (("backbone.patch_embed.proj.weight", 7), ("backbone.blocks.0.mlp.fc1.weight", 6),
                            ("backbone.blocks.5.mlp.fc1.weight", 1), ("neck.fpn1.0.weight", 0),
                            ("decode_head.conv_seg.weight", 0)):
            assert found[name] == pytest.approx(decay**power)


# --------------------------------------------------------------------------------------------------------- evaluation

@shows("--evaluate", "--checkpoint")
def check_evaluation_only(world: World) -> None:
    """The best of --save_name, or a file from elsewhere, is tested in a folder of its own; nothing is trained."""
    shutil.copytree(world.trained, world.folder / "run")
    assert "train first, or pass --checkpoint" in world.refused("--evaluate")
    for words in (["--save_name", world.folder / "run"], ["--checkpoint", world.trained / BEST]):
        folder = world.ran("--evaluate", *words, csv_path=str(world.trained_csv))
        (inside,) = folder.glob("eval_*")
        assert (inside / "test.csv").read_bytes() == (world.trained / "test.csv").read_bytes()
        assert (inside / "val.csv").read_bytes() == (world.trained / "val.csv").read_bytes()
        assert not list(inside.glob("checkpoint-*")) and not (inside / "log.txt").exists()
    for words in (["--head", "linear"], ["--model", "demo"], ["--recipe", "panderm"]):
        told = world.refused("--evaluate", "--checkpoint", world.trained / BEST, *words, channels=None)
        assert f"was trained with {words[0]}" in told


@shows("--predict")
def check_predict(world: World) -> None:
    """Masks and outlined pictures of a folder, a file or a CSV, each at its own size."""
    images = world.csv.parent / "images"
    folder = world.predicted(world.trained, images)
    table, masks = pd.read_csv(folder / "predictions.csv"), masks_of(folder)
    assert len(table) == len(masks) == 15 and masks["train_1_segmentation.png"].shape == (41, 53)
    assert Image.open(folder / "overlays" / "train_1.png").size == (53, 41)
    assert [int(masks[Path(row["mask"]).name].sum()) for _, row in table.iterrows()] == table["lesion_pixels"].tolist()
    for source, count in ((images / "test_0.png", 1), (world.csv, 15)):
        found = masks_of(world.predicted(world.trained, source))
        assert len(found) == count and np.array_equal(found["test_0_segmentation.png"],
                                                      masks["test_0_segmentation.png"])


@shows("--all_as_test")
def check_all_as_test(world: World) -> None:
    """Every image of a set, also of one without a test split."""
    external = world.table("external.csv", lambda table: table.assign(split="train"))
    assert "no image has the split test" in world.refused("--evaluate", "--checkpoint", world.trained / BEST,
                                                          "--csv_path", external)
    results = results_of(world.evaluated(world.trained, "--all_as_test", "--csv_path", external))
    assert {name: split["n"] for name, split in results["splits"].items()} == {"test": 15}
    assert results["split_note"] == "all images are test (--all_as_test)"
    usual = results_of(world.evaluated(world.trained))["splits"]
    assert {name: split["n"] for name, split in usual.items()} == {"val": 3, "test": 4}


@shows("--tta")
def check_views(world: World) -> None:
    """Both, or one; with flips the mask of a mirrored picture is the mirrored mask."""
    wanted = {(): "none", ("--tta",): "4 flips and sizes x 1, 0.75, 1.25", ("--tta", "flips"): "4 flips",
              ("--tta", "scales"): "sizes x 1, 0.75, 1.25"}
    folders = {words: world.evaluated(world.trained, "--size", 64, *words) for words in wanted}
    assert {words: results_of(folder)["tta"] for words, folder in folders.items()} == wanted
    tables = [table_of(folder) for folder in folders.values()]
    assert all(not tables[i].equals(tables[j]) for i in range(4) for j in range(i))
    world.csv.parent.joinpath("pair").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(pixels).resize((32, 32)))
    for name, one in (("a", picture), ("b", picture[:, ::-1]), ("c", picture[::-1])):
        Image.fromarray(one).save(world.csv.parent / "pair" / f"{name}.png")
    for words, same in (([], False), (["--tta", "flips"], True)):
        a, b, c = masks_of(world.predicted(world.trained, world.csv.parent / "pair", *words)).values()
        off = max(np.mean(a != b[:, ::-1]), np.mean(a != c[::-1]))
        assert (off < 0.002) == same and a.any() and not a.all()


@shows("--largest_component")
def check_largest(world: World) -> None:
    """Of two lesions with holes the larger one, without its hole."""
    def two(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        drawn = torch.zeros(*size)
        drawn[2:8, 2:8], drawn[12:30, 12:30], drawn[18:24, 18:24] = 1, 1, 0
        return drawn

    world.monkeypatch.setattr(lesion_masks, "to_size", two)
    for words, pixels in (([], 36 + 18**2 - 36), (["--largest_component"], 18**2)):
        masks = masks_of(world.predicted(world.trained, world.csv.parent / "images", *words))
        assert {int(mask.sum()) for mask in masks.values()} == {pixels}
        assert {ndimage.label(mask)[1] for mask in masks.values()} == {2 if not words else 1}
    assert results_of(world.evaluated(world.trained, "--largest_component"))["largest_component"] is True


@shows("--window", "--overlap")
def check_windows(world: World) -> None:
    """Pictures of 40 x 52 cut into such windows: how many forward passes see, and other masks."""
    plain, seen = world.evaluated(world.trained), []
    record(world.monkeypatch, lesion_masks, "predict_in_windows", lambda crop, forward, size, **how: seen.append(how))
    for words, window, overlap in ((["--window", 24], (24, 24), 0.5), (["--window", 20, 32], (20, 32), 0.5),
                                   (["--window", 24, "--overlap", 0.1], (24, 24), 0.1)):
        seen.clear()
        folder = world.evaluated(world.trained, *words)
        assert [(how["window"], how["overlap"]) for how in seen] == [(window, overlap)] * 7
        assert results_of(folder)["window"] == list(window) and not table_of(folder).equals(table_of(plain))
    assert results_of(plain)["window"] is None


@shows("--test_batch_size")
def check_test_batch(world: World) -> None:
    """Pictures of a forward pass at most, in the test and in each epoch's evaluation; the masks are the same."""
    sizes, found = [], []
    record(world.monkeypatch, SegmentationModel, "forward", lambda model, images: sizes.append(len(images)))
    for words, most in (([], 12), (["--test_batch_size", 1], 1), (["--test_batch_size", 2], 2)):
        assert world.reach(*words).masking.batch_size == most
        sizes.clear()
        found.append(table_of(world.evaluated(world.trained, *words)))
        assert set(sizes) == {min(most, 3), min(most, 4)}  # val has 3 images, test 4
    assert found[0].equals(found[1]) and found[0].equals(found[2])


@shows("--save_results")
def check_overlays(world: World) -> None:
    """A picture of every test image."""
    for words, count in (([], 0), (["--save_results"], 4)):
        folder = world.evaluated(world.trained, *words)
        assert len(list((folder / "overlays").glob("test_*.png"))) == count
        assert len(masks_of(folder)) == 4


@shows("--resamples")
def check_resamples(world: World) -> None:
    """How many is in the results, and the intervals differ."""
    few, many = (results_of(world.evaluated(world.trained, "--resamples", n))["splits"]["test"] for n in (100, 300))
    assert "100" in few["resampling"] and "300" in many["resampling"]
    assert few["metrics"]["dice"]["value"] == many["metrics"]["dice"]["value"]
    assert any(few["metrics"][name]["low"] != many["metrics"][name]["low"] for name in ("dice", "pixel_acc", "hd95"))


# ------------------------------------------------------------------------------------------------------------ machine

@shows("--device")
def check_device(world: World) -> None:
    """Where the model is; what the machine lacks is refused."""
    assert next(world.reach("--device", "cpu").state.model.parameters()).device.type == "cpu"
    assert "--device quantum" in world.refused("--device", "quantum")
    world.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in ([], ["--evaluate", "--checkpoint", world.trained / BEST]):
        assert "no cuda" in world.refused("--device", "cuda", *words)


@shows("--gpu")
def check_gpu(world: World) -> None:
    """One number per process; a machine without GPUs says so."""
    world.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch sees no GPU here" in world.refused("--gpu", 0, device=None)
    world.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    world.monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    chosen = []
    world.monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def device(gpu: str) -> str:
        args = parse(segmentation_parser(), world.argv(("--gpu", gpu), {"device": None}))
        RUN.settle_options(args)
        return args.device

    assert [device(gpu) for gpu in ("0", "0,", "2")] == ["cuda:0", "cuda:0", "cuda:2"] == list(map(str, chosen))
    assert "torchrun --nproc_per_node 2" in world.refused("--gpu", "0,1", device=None)
    for wrong in ("x", "0,x", " "):
        assert "pass the numbers of GPUs" in world.refused("--gpu", wrong, device=None)
    assert "4 CUDA device(s)" in world.refused("--gpu", 4, device=None)
    world.monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    world.monkeypatch.setenv("LOCAL_RANK", "1")
    assert device("3,1") == "cuda:1"
    assert "names 1 and 2 processes run" in world.refused("--gpu", 0, device=None)


@shows("--amp_dtype")
def check_precision(world: World) -> None:
    """The format in which the layers compute, in a training, its evaluation and a test."""
    for words, wanted in (([], torch.float32), (["--amp_dtype", "bf16"], torch.bfloat16)):
        got, found = world.reach("--epoch", 1, "--no_save_ckpt", *words), set()
        got.state.model.backbone.blocks[0].mlp.fc1.register_forward_hook(
            lambda *call, found=found: found.add(call[2].dtype))
        world.fit(got)
        assert found == {wanted} and got.masking.amp_dtype == got.options.meta["amp_dtype"] == got.options.amp_dtype
    for asked, used in (("auto", "fp32"), ("bf16", "bf16")):
        assert results_of(world.evaluated(world.trained, "--amp_dtype", asked))["amp_dtype"] == used


@shows("--compile")
def check_compile(world: World) -> None:
    """torch.compile gets the model."""
    compiled = []
    world.monkeypatch.setattr(torch, "compile", lambda module: (compiled.append(module), module)[1])
    for words in ([], ["--compile"]):
        got = world.reach("--epoch", 1, "--no_save_ckpt", *words)
        world.fit(got, lambda model: {"jaccard": 0.5})
        assert compiled == [got.state.model] * len(words)


@shows("--grad_checkpointing")
def check_checkpointing(world: World) -> None:
    """A block is computed again for the gradients."""
    for words, passes in (([], 1), (["--grad_checkpointing"], 2)):
        got, calls = world.reach("--drop_path", 0, *words), []
        got.state.model.train().backbone.blocks[0].mlp.fc1.register_forward_hook(
            lambda *call, calls=calls: calls.append(1))
        got.step(got.state.model, next(iter(got.loader)), {})[0].backward()
        assert len(calls) == passes


@shows("--workers", "--worker")
def check_workers(world: World) -> None:
    """Processes that decode; the images are the same; none works, too."""
    wanted = next(iter(world.reach("--workers", 0).loader))
    for flag in ("--workers", "--worker"):
        got = world.reach(flag, 1)
        batches = iter(got.loader)
        batch = next(batches)
        assert torch.equal(batch.images, wanted.images) and torch.equal(batch.masks, wanted.masks)
        assert len(batches._workers) == got.masking.num_workers == 1


@shows("--pin_mem", "--no_pin_mem")
def check_pinning(world: World) -> None:
    """Of a loader for a GPU."""
    made = []

    def build(*args: Any, **kwargs: Any) -> Any:
        made.append(build_segmentation_loader(*args, **{**kwargs, "device": "cuda"}).pin_memory)
        return build_segmentation_loader(*args, **kwargs)

    world.monkeypatch.setattr(segmentation, "build_segmentation_loader", build)
    for words in ([], ["--no_pin_mem"], ["--no_pin_mem", "--pin_mem"]):
        world.reach(*words)
    assert made == [True, False, True]


# ------------------------------------------------------------------------------------------------------------- output

@shows("--save_name", "--output_dir")
def check_save_name(world: World) -> None:
    """The run's folder."""
    folder = world.folder / "my run"
    assert world.tested("--save_name", folder) == folder
    assert world.reach("--output_dir", world.folder / "other").run.path == world.folder / "other"
    assert {"results.json", "test.csv", "val.csv", "args.yaml", "masks"} <= {path.name for path in folder.iterdir()}


@shows("--overwrite")
def check_overwrite(world: World) -> None:
    """Another run in the folder is refused, naming what differs, or moved away; so are masks of --predict."""
    there = ["--save_name", world.folder / "run"]
    world.tested(*there)
    assert "lr: 0.0005 there, 0.1 now" in world.refused(*there, "--lr", 0.1)
    world.reach(*there, "--lr", 0.1, "--overwrite")
    assert (world.folder / "run" / "previous" / "results.json").exists()
    photographs = ["--predict", world.csv.parent / "images", "--checkpoint", world.trained / BEST, *there]
    usual = {"model": None, "csv_path": None}
    world.ran(*photographs, **usual)
    assert "holds an earlier prediction" in world.refused(*photographs, **usual)
    world.ran(*photographs, "--overwrite", **usual)


@shows("--auto_resume", "--no_auto_resume")
def check_auto_resume(world: World) -> None:
    """An unfinished run goes on, unless it must not."""
    there = ["--save_name", world.folder / "run"]
    there += ["--tune", "head"]
    world.fit(world.reach(*there), lambda model: {"jaccard": 0.5})
    assert "unfinished" in world.refused(*there, "--no_auto_resume")
    for words in ([], ["--no_auto_resume", "--auto_resume"]):
        got = world.reach(*there, *words)
        got.step = None  # nothing is left to do
        world.fit(got)
        assert got.state.update == 4


@shows("--save_ckpt", "--no_save_ckpt")
def check_save(world: World) -> None:
    """Checkpoint files, or none; the model is the same."""
    weights = []
    for words, count in (([], 3), (["--no_save_ckpt"], 0), (["--no_save_ckpt", "--save_ckpt"], 3)):
        got = world.reach(*words, "--tune", "head")
        weights.append(world.fit(got, lambda model: {"jaccard": 0.5})["model"]["decode_head.conv_seg.weight"])
        assert len(list(got.run.path.glob("checkpoint-*.pth"))) == count  # last, previous, best
    assert torch.equal(weights[0], weights[1])


@shows("--save_ckpt_freq", "--save_every_steps")
def check_often(world: World) -> None:
    """Kept epochs; and how often the newest state is written: 2 epochs of 4 updates."""
    written = []
    record(world.monkeypatch, Checkpoints, "save_last", lambda files, state: written.append(state.update))
    for words, kept, saved in (([], [], [4, 8]), (["--save_ckpt_freq", 1], [1, 2], [4, 8]),
                               (["--save_ckpt_freq", 2], [2], [4, 8]),
                               (["--save_every_steps", 3], [], [3, 4, 7, 8])):
        written.clear()
        got = world.reach("--batch_size", 2, "--tune", "head", *words)
        world.fit(got, lambda model: {"jaccard": 0.5})
        assert sorted(path.name for path in got.run.path.glob("checkpoint-[0-9]*.pth")) == [
            f"checkpoint-{epoch}.pth" for epoch in kept]
        assert written == saved


@shows("--wandb", "--wandb_project", "--log_name", "--description", "--tags", "--id")
def check_wandb(world: World) -> None:
    """What the package is asked for, and the numbers; nothing without --wandb; a message where it is absent."""
    asked, logged = [], []
    run = SimpleNamespace(log=lambda entry, step: logged.append((step, entry["train_loss"])), finish=lambda: None)
    world.monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: (asked.append(how), run)[1]))
    words = ["--wandb_project", "skin", "--log_name", "first", "--description", "a note", "--tags", "a", "b",
             "--id", "x7"]
    named = world.tested(*words)
    assert not asked
    usual = world.tested("--wandb")
    world.tested("--wandb", *words)
    names = ("project", "name", "notes", "tags", "id", "resume")
    mark = results_of(usual)["fingerprint"]
    assert [tuple(how[name] for name in names) for how in asked] == [
        ("segmentation", None, None, (), mark[:16], "allow"), ("skin", "first", "a note", ["a", "b"], "x7", "allow")]
    assert logged == [(3, 1.5)] * 2 and results_of(named)["fingerprint"] == mark
    asked.clear()
    world.tested("--wandb", "--seeds", 1, 2)
    assert len({how["id"] for how in asked}) == 2
    world.monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in world.refused("--wandb")


@shows("--use_tensorboard")
def check_tensorboard(world: World) -> None:
    """Event files in the run's folder log."""
    for words, there in (([], False), (["--use_tensorboard"], True)):
        assert bool(list((world.tested(*words) / "log").glob("events.out.tfevents.*"))) == there


@shows("--smoke", *accepted_only(SCRIPT))
def check_notices(world: World) -> None:
    """They change nothing, and a line says what holds."""
    usual = world.reach()
    for flag, text in {**accepted_only(SCRIPT), "--smoke": accepted_only(SCRIPT)["--smoke_test"]}.items():
        world.caplog.clear()
        got = world.reach(flag, *(["3"] if flag in TAKES_VALUE else []))
        said = flag if flag != "--smoke" else "--smoke_test"
        assert [line for line in world.caplog.messages if "has no effect" in line] == [f"{said} has no effect: {text}"]
        assert got.run.fingerprint == usual.run.fingerprint


# -------------------------------------------------------------------------------------------------------------- tests

@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """The models are tiny: two threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, single_thread: None) -> Path:
    """The folder of a short training."""
    with pytest.MonkeyPatch.context() as patch:
        no_plots(patch)
        return train_disc_model(tmp_path_factory.mktemp("trained"))


def no_plots(patch: pytest.MonkeyPatch) -> None:
    """Drawings take longer than all else."""
    patch.setattr(RUN, "plot_learning_curve", lambda *args, **kwargs: None)
    patch.setattr(segmentation_results, "draw_worst", lambda *args, **kwargs: None)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any, trained: Path) -> World:
    """PanDerm's and DermINO's models of width 32, a model of a short training; no plots."""
    no_plots(monkeypatch)
    for size in panderm.SIZES:
        monkeypatch.setitem(panderm.SIZES, size, {**panderm.SIZES[size], **TINY})
    monkeypatch.setattr(dermino, "VIT_BASE_14", {**dermino.VIT_BASE_14, **TINY})
    world = World(tmp_path, monkeypatch, capsys, caplog)
    world.trained, world.trained_csv = trained, trained.parent / "data" / "masks.csv"
    return world


def test_every_option_has_a_check() -> None:
    """And every check an option."""
    flags = {flag for action in segmentation_parser()._actions for flag in action.option_strings}
    assert flags - {"-h", "--help", "-c", "--config"} == set(CHECKS)


@pytest.mark.parametrize("check", dict.fromkeys(CHECKS.values()), ids=lambda check: check.__name__[6:])
def test_options(check: Callable[[World], None], world: World) -> None:
    """What the options change."""
    check(world)


def test_panderm_recipe(world: World) -> None:
    """The published numbers: model, heads, rates, decay, loss, batch, normalisation, colours only."""
    got = world.reach("--recipe", "panderm", **BARE)
    model, asked = got.state.model, got.asked
    assert (got.options.meta["model"], model.taps, model.recipe["pool_scales"]) == (
        "PanDerm_Large_LP", (7, 11, 15, 23), [1, 2, 3, 6])
    assert model.recipe["pyramid"] and isinstance(model.decode_head, UPerHead) and model.recipe["dropout"] == 0
    assert drop_rates(model) == pytest.approx(list(np.linspace(0, 0.15, 24)))
    assert trainable(got) == {name for name, _ in model.named_parameters()} - {"backbone.pos_embed"}
    assert set(scales(got, "weight_decay_scale").values()) == set(scales(got, "lr_scale").values()) == {1.0}
    optimizer = got.state.optimizer
    assert type(optimizer) is torch.optim.AdamW and optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert optimizer.param_groups[0]["eps"] == 1e-8 and set(got.schedules["weight_decay"]) == {0.05}
    assert (asked.epochs, asked.batch_size, got.plan.micro, got.plan.steps_per_epoch) == (100, 2, 2, 4)
    for epoch, rate in ((0, 1e-4), (1, 9.997533e-5), (50, 5e-5), (99, 2.467198e-8)):
        assert got.schedules["lr"][4 * epoch:4 * epoch + 4] == pytest.approx([rate] * 4, rel=1e-6)
    assert len(got.schedules["lr"]) == 400 and got.options.clip is None and asked.tune == "full"
    assert loss_of(got)[0] == pytest.approx(math.log(2), rel=1e-6)
    transform, meta = got.loader.dataset.transform, got.options.meta
    assert transform.recipe == got.masking.transform == meta["transform"] == "panderm"
    assert meta["data_config"]["mean"] == meta["data_config"]["std"] == [0.5] * 3
    assert got.masking.mean == got.masking.std == (0.5,) * 3
    check_levels(got, mean=0.5, std=0.5)


def test_dermino_recipe(world: World) -> None:
    """The published numbers: frozen backbone, linear head, Adam, no augmentation."""
    got = world.reach("--recipe", "dermino", **BARE, size="28")
    model, asked = got.state.model, got.asked
    assert (got.options.meta["model"], model.taps, model.neck) == ("DermINO_Base", (11,), None)
    assert isinstance(model.decode_head, LinearHead) and model.decode_head.dropout.p == 0.1
    assert trainable(got) == {f"decode_head.{name}" for name, _ in model.decode_head.named_parameters()}
    assert type(got.state.optimizer) is torch.optim.Adam and set(got.schedules["weight_decay"]) == {0.0}
    assert (asked.epochs, asked.batch_size, got.plan.micro) == (20, 64, 8)  # of 8 images
    assert got.schedules["lr"] == pytest.approx(half_cosine(1e-3, 0, 20))
    assert set(scales(got, "lr_scale").values()) == {1.0} and not any(drop_rates(model))
    assert loss_of(got)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert got.loader.dataset.transform.recipe == got.masking.transform == "dermino"
    check_levels(got, mean=0.485, std=0.229)
    upernet = world.reach("--recipe", "dermino", "--head", "upernet", **BARE, size="28").state.model
    assert (upernet.taps, upernet.neck, upernet.recipe["channels"]) == ((2, 5, 8, 11), None, 32)


def test_default_recipe(world: World) -> None:
    """Ours: everything is trained, layer by layer slower, with a warm-up and Dice."""
    got = world.reach(**{**BARE, "model": MODEL}, size="64")
    assert (got.asked.epochs, got.asked.batch_size, got.asked.tune, got.asked.opt) == (50, 16, "full", "adamw")
    assert (got.asked.dice_weight, got.asked.layer_decay, got.asked.head) == (1.0, 0.75, "upernet")
    assert got.state.model.recipe["channels"] == 256 and got.state.model.neck is not None
    many = world.reach("--batch_size", 2, **{**BARE, "model": MODEL}).schedules
    assert many["lr"] == pytest.approx([*np.linspace(0, 5e-4, 4), *half_cosine(5e-4, 1e-6, 196)])
    assert set(many["weight_decay"]) == {0.05}
    masks = next(iter(got.loader)).masks
    assert set(masks.unique().tolist()) == {0, 1, IGNORED}  # corners of a rotation
    check_levels(got, mean=0.5, std=0.5)


def check_levels(got: SimpleNamespace, *, mean: float, std: float) -> None:
    """The first channel of a batch is whole numbers of 0 to 255 under this normalisation."""
    red = (next(iter(got.loader)).images[:, 0] * std + mean) * 255
    assert float((red - red.round()).abs().max()) < 1e-3 and -1e-3 < float(red.min()) <= float(red.max()) < 255.001


UNUSUAL = {  # all of the recipes, switches of two flags, lists of one and none
    "panderm": ["--tta", "flips", "--opt_betas", 0.8, 0.9, "--size", 32, 48, "--window", 24, "--overlap", 0.2],
    "dermino": ["--head", "upernet", "--kfold", 2, "--tags", "a", "--dropout", 0.2, "--pool_scales", 2],
    "default": ["--no_pyramid", "--decay_all", "--tta", "--no_pin_mem", "--taps", 1, 2, 3, "--percent", 50]}


@pytest.mark.parametrize("recipe", UNUSUAL)
def test_args_yaml_is_the_same_run(world: World, recipe: str) -> None:
    """A run's args.yaml, given to -c alone, is that run; elsewhere it is the same run again; the command line wins."""
    folder = world.tested("--recipe", recipe, *UNUSUAL[recipe])
    world.caplog.clear()
    assert world.main(["-c", str(folder / "args.yaml")]) == 0 and "this run is finished:" in world.caplog.messages
    stored = yaml.safe_load((folder / "args.yaml").read_text())
    assert world.main(["-c", str(folder / "args.yaml"), "--save_name", str(world.folder / "again")]) == 0
    assert parts_of(world.folder / "again") == parts_of(folder)
    again = yaml.safe_load((world.folder / "again" / "args.yaml").read_text())
    assert again == {**stored, "output_dir": str(world.folder / "again")}
    assert world.main(["-c", str(folder / "args.yaml"), "--lr", "0.1"]) == 2


def test_args_yaml_continues_a_run(world: World) -> None:
    """An unfinished run goes on by its args.yaml alone: the checkpoint is taken for its own."""
    before = world.reach()
    world.fit(before, lambda model: {"jaccard": 0.5})
    after = world.reach("-c", before.run.path / "args.yaml", "--save_name", before.run.path)
    assert after.run.fingerprint == before.run.fingerprint
    after.step = None  # nothing is left to do
    world.fit(after)
    assert after.state.update == 4


@pytest.mark.parametrize("size", [(64, 96), (32, 128)], ids=["no square", "a square number of patches"])
def test_another_size_of_a_model_that_is_not_square(world: World, size: tuple[int, int]) -> None:
    """Its positions are resampled from its own grid, for --tta scales and for --evaluate --size."""
    run = world.tested("--size", *size)
    assert results_of(world.evaluated(run, "--tta", "scales"))["tta"] == "sizes x 1, 0.75, 1.25"
    model, wanted = load_segmenter(run / BEST).model, (2 * size[0], 2 * size[1])
    prefix, grid = model.backbone.num_prefix_tokens, model.backbone.patch_embed.grid_size
    tables = [table[0, prefix:].T.unflatten(1, places)[None] for table, places in (
        (model.backbone.pos_embed.detach(), grid),
        (load_segmenter(run / BEST, input_size=wanted).model.backbone.pos_embed.detach(), tuple(2 * n for n in grid)))]
    twice = torch.nn.functional.interpolate(tables[0], scale_factor=2, mode="bicubic")
    torch.testing.assert_close(tables[1], twice)


@pytest.mark.parametrize("words,options,text", [
    ([], {"model": "PanDerm_Base_LP", "pretrained": None}, "needs --pretrained FILE"),
    (["--save_name", "{trained}"], {}, "holds another run"),
    ([], {"epoch": "1", "warmup_epochs": None}, "more --epoch"),
    (["--predict", "{images}", "--checkpoint", "{trained}/checkpoint-best.pth", "--save_name", "{folder}"], {},
     "holds an earlier prediction"),
    (["--use_tensorboard"], {}, "--use_tensorboard needs TensorBoard"),
], ids=["weights", "folder", "warm-up", "masks", "tensorboard"])
def test_messages_name_options_of_this_script(world: World, words: list[str], options: dict, text: str) -> None:
    """The parts that other scripts share say what to type here."""
    world.monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (world.folder / "predict_images").mkdir()
    (world.folder / "predict_images" / "predictions.csv").write_text("filename\n")
    places = {"trained": world.trained, "images": world.csv.parent / "images", "folder": world.folder}
    told = world.refused(*(word.format(**places) for word in words), **options)
    flags = {flag for action in segmentation_parser()._actions for flag in action.option_strings}
    assert set(re.findall(r"--[a-z_]+", told)) <= flags and text in told


READY = ["--evaluate"]
CONTRADICTIONS = {  # of each a command, and the beginning of what is said
    "size": (["--size", 32, 32, 32], {}, "--size takes one number, or height and width"),
    "window": (["--window", 32, 32, 32], {}, "--window takes one number, or height and width"),
    "both": ([*READY, "--predict", "x.png"], {}, "--evaluate and --predict exclude each other"),
    "checkpoint": (["--checkpoint", "x.pth"], {}, "--checkpoint is of --evaluate and --predict"),
    "all": (["--all_as_test"], {}, "--all_as_test is of --evaluate"),
    "data": (["--dataset", "PH2"], {}, "pass either --dataset NAME"),
    "model": ([], {"model": None}, "--model is missing"),
    "published": (["--model", "UNet"], {}, "--model UNet could not run"),
    "pair": (["--model", "cae_seg", "--head", "linear"], {"channels": None}, "--model cae_seg is PanDerm_Large_LP"),
    "linear": (["--head", "linear", "--pool_scales", 2], {"channels": None},
               "--channels, --pool_scales and --pyramid are of"),
    "root": (["--dataset", "PH2", "--root_path", "x"], {"csv_path": None}, "--root_path is of --csv_path"),
    "parent": (["--parent_path", "x"], {}, "--parent_path is of --dataset"),
    "lora": (["--lora_rank", 4], {}, "--lora_rank and --lora_alpha are of --tune lora"),
    "cosine": (["--cosine_by", "epoch", "--warmup_steps", 3], {}, "--cosine_by epoch has no warm-up"),
    "percent": (["--percent", 101], {}, "--percent 101 is above 100"),
    "val": (["--val_fraction", 1], {}, "--val_fraction 1 leaves no train image"),
    "endless": (["--window", 32, "--overlap", 1], {}, "--overlap 1 would need endless windows"),
    "overlap": (["--overlap", 0.25], {}, "--overlap is of --window"),
    "one fold": (["--kfold", 1], {}, "--kfold 1 is no cross-validation"),
    "kfold": ([*READY, "--kfold", 3], {}, "--kfold is of a training"),
    "fold": (["--kfold", 3, "--resume", 3], {}, "--resume 3 is no fold: with --kfold 3 they are 0 to 2"),
    "seeds": (["--kfold", 3, "--resume", 1, "--seeds", 1, 2], {}, "--resume FOLD goes with one seed"),
    "start": (["--start_epoch", 2], {}, "--start_epoch 2 is not below --epoch 2"),
    "betas": (["--opt_betas", 0.9, 1], {}, "--opt_betas are numbers below 1"),
    "id": (["--id", "x", "--seeds", 1, 2], {}, "--id names one run"),
    "gpu": (["--gpu", 0], {}, "--gpu and --device exclude each other"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(world: World, case: str) -> None:
    """Each is told, alone, before anything is written."""
    words, options, text = CONTRADICTIONS[case]
    told = world.refused(*words, **options)
    assert told.startswith(f"error: {text}") and "\n  " not in told
    assert not list(world.folder.glob("out*"))


@pytest.mark.parametrize("words,options,text", [
    (["--resume", 1], {}, "they are 0 to 4, and -1 is all; add --kfold"),
    (["--kfold", 3, "--resume", -2], {}, "--resume -2 is no fold"),
    (["--head", "linear"], {}, "--channels, --pool_scales and --pyramid are of --head upernet"),
    (["--head", "linear", "--no_pyramid"], {"channels": None}, "--pyramid are of --head upernet"),
    (["--recipe", "panderm"], {"warmup_epochs": "2"}, "--cosine_by epoch has no warm-up"),
    (["--lora_alpha", 2], {}, "--lora_rank and --lora_alpha are of --tune lora"),
    ([], {"csv_path": None}, "pass either --dataset NAME"),
    (["--id", "x", "--kfold", 2], {}, "--id names one run"),
    (["--model", "vit_large", "--percent", 200], {}, "--percent 200 is above 100"),
])
def test_other_ways_to_contradict(world: World, words: list, options: dict, text: str) -> None:
    """The other halves of these rules; several faults are told together."""
    if "csv_path" in options:
        world.csv = None
        options = {}
    assert text in world.refused(*words, **options)


def test_every_contradiction_has_a_case() -> None:
    """A rule more in settle_options needs a case more here."""
    tree = ast.parse(inspect.getsource(RUN.settle_options))
    (rules,) = [node.value.elts for node in ast.walk(tree) if isinstance(node, ast.Assign)
                and getattr(node.targets[0], "id", "") == "wrong"]
    assert len(rules) + 1 == len(CONTRADICTIONS)  # --size and --window share a line


def test_what_is_left_alone(world: World) -> None:
    """Neighbours of the refused values work."""
    world.reach("--percent", 100, "--val_fraction", 0.99, "--start_epoch", 1, "--id", "x")
    world.reach("--window", 32, "--overlap", 0, "--head", "linear", channels=None)
    world.reach("--kfold", 0, "--resume", -1, "--seeds", 3)
    world.reach("--resume", 0)  # without folds the only one
    assert logging.getLogger("furnace").level == logging.NOTSET
