"""Every flag of run_class_finetuning.py has an effect: a check per flag, of something that it changes.

The commands run through ``main``. ``World.reach`` stops it where the training would begin and keeps what ``fit`` was
to get; ``World.fit`` then trains for real; ``World.tested`` goes on to the test with the model untrained.
"""

import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import nn
from torchvision import transforms

import run_class_finetuning
from flag_world import (
    CLEAN,
    GREY,
    Watcher,
    World,
    augmented,
    noise_picture,
    probabilities,
    rates,
    results_of,
    trainable,
    watch,
)
from furnace import finetuning, finetuning_results
from furnace.data.datasets import build_train_loader
from furnace.finetuning_arguments import finetuning_parser
from furnace.models import create_backbone, panderm
from furnace.published import TAKES_VALUE, accepted_only
from furnace.runtime.checkpoints import Checkpoints
from furnace.runtime.seeding import seeded
from helpers import draw_images

CHECKS: dict[str, Callable[["World"], None]] = {}  # flag -> what shows its effect


def shows(*flags: str) -> Callable:
    """Enter a check for these flags."""
    def enter(check: Callable[[World], None]) -> Callable[[World], None]:
        assert not CHECKS.keys() & set(flags)
        CHECKS.update(dict.fromkeys(flags, check))
        return check
    return enter


# -------------------------------------------------------------------------------------------------------------- model

@shows("--model")
def check_model(world: World) -> None:
    """Another network."""
    assert type(world.reach().state.model).__name__ == "PanDerm"
    assert type(world.reach("--model", "timm:test_vit").state.model).__name__ == "VisionTransformer"


def weights_file(world: World, name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """A state dict of the small PanDerm, noise by its name."""
    backbone = create_backbone("PanDerm_Base_LP", "random", input_size=32)
    with seeded(name):
        return {prefix + key: torch.randn_like(value) for key, value in backbone.state_dict().items()}


@shows("--pretrained_checkpoint")
def check_pretrained(world: World) -> None:
    """Its weights are the start."""
    state = weights_file(world, "a")
    torch.save(state, world.folder / "a.pth")
    model = world.reach("--pretrained_checkpoint", world.folder / "a.pth").state.model
    assert torch.equal(model.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
    assert torch.equal(model.fc_norm.weight, state["norm.weight"])


@shows("--model_key")
def check_model_key(world: World) -> None:
    """Of two state dicts in a file, the one that stands first in the list."""
    both = {"model": weights_file(world, "a"), "teacher": weights_file(world, "b")}
    torch.save(both, world.folder / "both.pth")
    file = ["--pretrained_checkpoint", world.folder / "both.pth"]
    assert torch.equal(world.reach(*file).state.model.cls_token, both["model"]["cls_token"])
    found = world.reach(*file, "--model_key", "teacher|model").state.model.cls_token
    assert torch.equal(found, both["teacher"]["cls_token"])


@shows("--model_prefix")
def check_model_prefix(world: World) -> None:
    """Of two networks in a file, the one with this prefix."""
    both = {**weights_file(world, "a", "encoder."), **weights_file(world, "b", "momentum.")}
    torch.save(both, world.folder / "both.pth")
    for prefix in ("encoder.", "momentum."):
        got = world.reach("--pretrained_checkpoint", world.folder / "both.pth", "--model_prefix", prefix)
        assert torch.equal(got.state.model.cls_token, both[f"{prefix}cls_token"])


@shows("--input_size")
def check_input_size(world: World) -> None:
    """Side of the images, and places of the positions."""
    got = world.reach("--input_size", 48)
    assert next(iter(got.loader)).images.shape == (4, 3, 48, 48) and got.state.model.pos_embed.shape[1] == 10
    assert next(iter(world.reach().loader)).images.shape == (4, 3, 32, 32)


@shows("--tune", "--enable_linear_eval")
def check_tune(world: World) -> None:
    """What the optimiser has."""
    head = {"head.weight", "head.bias"}
    assert trainable(world.reach("--tune", "head")) == head == trainable(world.reach("--enable_linear_eval"))
    lora = trainable(world.reach("--tune", "lora"))
    assert len(lora - head) == 2 * 2 * 4 and all(".lora_" in name for name in lora - head)  # A, B; blocks; layers
    full = world.reach()
    assert trainable(full) == {name for name, _ in full.state.model.named_parameters()} - {"pos_embed"}


@shows("--lora_rank", "--lora_alpha")
def check_lora(world: World) -> None:
    """The matrices' shape, and the factor of what they add: alpha / rank."""
    for rank, alpha in ((8, 16), (3, 16), (8, 4)):
        layer = world.reach("--tune", "lora", "--lora_rank", rank, "--lora_alpha", alpha).state.model.blocks[0].mlp.fc1
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        nn.init.ones_(second)
        assert first.shape == (rank, 32)
        torch.testing.assert_close(layer.get_delta_weight("default"), second @ first * alpha / rank)


@shows("--use_mean_pooling", "--use_cls")
def check_pooling(world: World) -> None:
    """Mean: fc_norm behind it. Class token: the final norm before. LP models take the token by themselves."""
    for name, words, mean in (("FT", [], True), ("FT", ["--use_cls"], False), ("LP", [], False),
                              ("LP", ["--use_mean_pooling"], True)):
        state = world.reach("--model", f"PanDerm_Base_{name}", *words).state.model.state_dict()
        assert ("fc_norm.weight" in state, "norm.weight" in state) == (mean, not mean)
    assert "exclude each other" in world.refused("--use_cls", "--use_mean_pooling")


@shows("--rel_pos_bias", "--disable_rel_pos_bias")
def check_relative_positions(world: World) -> None:
    """A table in every block; FT models have them, LP models have not."""
    for name, words, tables in (("FT", [], 2), ("FT", ["--disable_rel_pos_bias"], 0), ("LP", [], 0),
                                ("LP", ["--rel_pos_bias"], 2)):
        state = world.reach("--model", f"PanDerm_Base_{name}", *words).state.model.state_dict()
        assert sum(key.endswith("relative_position_bias_table") for key in state) == tables


@shows("--sin_pos_emb", "--disable_sin_pos_emb")
def check_positions(world: World) -> None:
    """Fixed, or trained."""
    assert "pos_embed" in trainable(world.reach("--disable_sin_pos_emb"))
    assert "pos_embed" not in trainable(world.reach("--disable_sin_pos_emb", "--sin_pos_emb"))


@shows("--layer_scale_init_value")
def check_layer_scale(world: World) -> None:
    """Start of the gammas."""
    for words, value in (([], 0.1), (["--layer_scale_init_value", 0.3], 0.3)):
        torch.testing.assert_close(world.reach(*words).state.model.blocks[1].gamma_2.detach(), torch.full((32,), value))


@shows("--drop", "--attn_drop_rate")
def check_dropout(world: World) -> None:
    """Positions, projections and MLPs; attention weights."""
    none = dict.fromkeys(("positions", "projection", "mlp", "attention"), 0.0)
    assert rates(world.reach()) == none
    assert rates(world.reach("--attn_drop_rate", 0.2)) == {**none, "attention": 0.2}
    assert rates(world.reach("--drop", 0.3)) == {**dict.fromkeys(none, 0.3), "attention": 0.0}


@shows("--drop_path")
def check_drop_path(world: World) -> None:
    """The rate of the last block; 0.1 as published; a model without it works and refuses a rate."""
    def last(*words: Any) -> float:
        return getattr(world.reach(*words).state.model.blocks[1].drop_path1, "drop_prob", 0.0)

    assert (last(), last("--drop_path", 0.4), last("--drop_path", 0)) == pytest.approx((0.1, 0.4, 0.0))


@shows("--init_scale")
def check_init_scale(world: World) -> None:
    """The head's start, 0.001 times as published."""
    small, large = (world.reach(*words).state.model.head.weight for words in ([], ["--init_scale", 1]))
    torch.testing.assert_close(small, large * 0.001)


# --------------------------------------------------------------------------------------------------------------- data

@shows("--csv_path")
def check_csv(world: World) -> None:
    """The images of that file."""
    other = world.table("other.csv", lambda table: table[~table["image"].str.contains("train_._3")])
    assert len(world.reach().loader.dataset) == 12 and len(world.reach("--csv_path", other).loader.dataset) == 9


@shows("--root_path", "--data_path")
def check_root(world: World) -> None:
    """The folder of the images."""
    (world.folder / "elsewhere").mkdir()
    moved = world.table("elsewhere/moved.csv", lambda table: table)
    assert "images/train_0_0.png" in world.refused("--csv_path", moved)
    for flag in ("--root_path", "--data_path"):
        dataset = world.reach("--csv_path", moved, flag, world.folder).loader.dataset
        assert dataset.manifest.path_of(0).parent == world.folder / "images"


@shows("--image_key")
def check_image_key(world: World) -> None:
    """The column of the images."""
    other = world.table("other.csv", lambda table: table.rename(columns={"image": "photo"}))
    assert "image" in world.refused("--csv_path", other)
    assert len(world.reach("--csv_path", other, "--image_key", "photo").loader.dataset) == 12


@shows("--task")
def check_task(world: World) -> None:
    """Several labels: an output per name, and binary cross-entropy, its targets smoothed."""
    several = world.table("several.csv", lambda table: table.assign(labels=["a;b", "b;c", "c"] * 7))
    got = world.reach("--csv_path", several, "--task", "multilabel", "--nb_classes", 0)
    assert got.options.meta["class_names"] == ["a", "b", "c"] and got.options.monitor == "auroc"
    batch = next(iter(got.loader))
    wanted = torch.tensor(got.loader.dataset.manifest.targets[batch.indices])
    loss = F.binary_cross_entropy_with_logits(torch.tensor([[2.0, 0.0, 0.0]]).expand(4, -1), wanted * 0.9 + 0.05)
    assert float(got.step(Watcher(), batch, {})[0]) == pytest.approx(4 * float(loss))


@shows("--nb_classes")
def check_classes(world: World) -> None:
    """2 reads binary_label; fewer than there are is refused; 0 is asked for."""
    both = world.table("both.csv", lambda table: table.assign(binary_label=(table["label"] == 1).astype(int)))
    assert world.reach("--csv_path", both).state.model.head.out_features == 3
    got = world.reach("--csv_path", both, "--nb_classes", 2)
    assert got.state.model.head.out_features == 2 and got.options.monitor == "auroc"
    assert np.bincount(got.loader.dataset.manifest.labels).tolist() == [8, 4]
    assert "--nb_classes" in world.refused("--nb_classes", 2) and "--nb_classes 3" in world.refused("--nb_classes", 0)


@shows("--class_names")
def check_class_names(world: World) -> None:
    """They go into the checkpoint."""
    (world.folder / "names.txt").write_text("naevus\nmelanoma\nother\n")
    got = world.reach("--class_names", world.folder / "names.txt")
    assert got.options.meta["class_names"] == ["naevus", "melanoma", "other"]
    assert world.reach().options.meta["class_names"] != got.options.meta["class_names"]


@shows("--data_set")
def check_data_set(world: World) -> None:
    """The name in the results."""
    assert results_of(world.tested("--data_set", "HAM"))["data_set"] == "HAM"
    assert results_of(world.tested())["data_set"] == "small"


@shows("--percent_data")
def check_percent(world: World) -> None:
    """Fewer train images; val stays."""
    got = world.reach("--percent_data", 0.5)
    assert len(got.loader.dataset) == 6 and got.plan.steps_per_epoch == 1


@shows("--folds")
def check_folds(world: World) -> None:
    """Train and val are pooled: 15 images, of which each of three folds leaves 5 for val."""
    got = world.reach("--folds", 3)
    assert got.run.path.name == "seed_0_fold_0" and len(got.loader.dataset) == 10
    folder = world.tested("--folds", 3)
    val = [set(pd.read_csv(folder / f"seed_0_fold_{i}" / "val.csv")["filename"]) for i in range(3)]
    assert [len(part) for part in val] == [5, 5, 5] and len(set.union(*val)) == 15


@shows("--weights")
def check_weights(world: World) -> None:
    """Draws with replacement, the classes as often; without, each image once."""
    rare = world.table("rare.csv", lambda table: table[~table["image"].str.contains("train_1_[12]")])
    once, weighted = (world.reach("--csv_path", rare, "--batch_size", 10, *words) for words in ([], ["--weights"]))
    assert sorted(once.loader.sampler.epoch_indices(0)) == list(range(10))
    labels = weighted.loader.dataset.manifest.labels
    drawn = np.concatenate([labels[weighted.loader.sampler.epoch_indices(epoch)] for epoch in range(300)])
    assert np.bincount(drawn) / 3000 == pytest.approx([1 / 3] * 3, abs=0.04)  # 4.6 standard errors


@shows("--test_csv_path", "--eval_data_path")
def check_external(world: World) -> None:
    """An external test set, whose images lie in another folder."""
    draw_images(world.folder / "clinic", ["a.png", "b.png", "c.png"], seed=9)
    pd.DataFrame({"image": ["a.png", "b.png", "c.png"], "label": [0, 1, 2]}).to_csv(world.folder / "new.csv")
    external = ["--test_csv_path", world.folder / "new.csv"]
    assert "a.png" in world.refused(*external)
    folder = world.tested(*external, "--eval_data_path", world.folder / "clinic")
    assert results_of(folder)["splits"]["external"]["n"] == 3 and len(probabilities(folder, "external")) == 3
    assert "external" not in results_of(world.tested())["splits"]


@shows("--strict_split")
def check_strict(world: World) -> None:
    """A patient in train and test is refused, not only warned of."""
    leak = world.table("leak.csv", lambda table: table.assign(patient_id=["P", *table["patient_id"][1:-1], "P"]))
    world.reach("--csv_path", leak)
    assert "patient" in world.refused("--csv_path", leak, "--strict_split")


# ----------------------------------------------------------------------------------------------------------- training

@shows("--mode", "--eval", "--resume")
def check_evaluation_only(world: World) -> None:
    """--eval and --mode eval test the file of --resume; without them it is a training to go on with."""
    best = world.tested("--init_scale", 1) / "checkpoint-best.pth"
    for words in (["--eval"], ["--mode", "eval"]):
        assert "--resume CHECKPOINT" in world.refused(*words)
        folder = world.tested(*words, "--resume", best)
        assert [path.name[:5] for path in folder.iterdir()] == ["eval_"]
        np.testing.assert_array_equal(probabilities(next(folder.iterdir())), probabilities(best.parent))
    before = world.reach()
    world.fit(before)
    shutil.copytree(before.run.path, world.folder / "moved")
    after = world.reach("--resume", world.folder / "moved" / "checkpoint-last.pth")
    after.step = None  # nothing is left to do
    world.fit(after)
    assert after.state.update == 6
    assert all(torch.equal(a, b) for a, b in zip(before.state.model.parameters(), after.state.model.parameters(),
                                                 strict=True))


@shows("--batch_size", "--update_freq")
def check_batches(world: World) -> None:
    """Images of a forward pass; passes of an update."""
    for words, wanted in (([], (4, 1, 3)), (["--batch_size", 6], (6, 1, 2)), (["--update_freq", 3], (4, 3, 1))):
        got, passes = world.reach(*words, "--epochs", 1, "--no_save_ckpt"), []
        step = got.step
        got.step = lambda model, batch, values, step=step, passes=passes: (passes.append(len(batch.images)),
                                                                           step(model, batch, values))[1]
        world.fit(got)
        assert passes == [wanted[0]] * wanted[1] * wanted[2] and got.state.update == wanted[2]


@shows("--epochs", "--start_epoch")
def check_epochs(world: World) -> None:
    """As many as asked for, from the one asked for."""
    for words, epochs in (([], [0, 1]), (["--epochs", 3], [0, 1, 2]), (["--epochs", 3, "--start_epoch", 2], [2])):
        got = world.reach("--no_save_ckpt", *words)
        world.fit(got)
        assert [entry["epoch"] for entry in got.state.history] == epochs
        assert got.state.update == len(got.schedules["lr"]) == 3 * (epochs[-1] + 1)


@shows("--early_stop")
def check_early_stop(world: World) -> None:
    """Two epochs without a better val after the first."""
    for words, ran in (([], 5), (["--early_stop", 2], 3)):
        got = world.reach("--epochs", 5, "--no_save_ckpt", *words)
        world.fit(got, lambda model: {"acc": 0.5})
        assert got.state.epoch == ran


@shows("--seed", "--seeds")
def check_seed(world: World) -> None:
    """Head, order and augmentation; several make a run each, and a summary."""
    zero, one = world.reach(), world.reach("--seed", 1)
    assert not torch.equal(zero.state.model.head.weight, one.state.model.head.weight)
    assert not torch.equal(next(iter(zero.loader)).images, next(iter(one.loader)).images)
    assert [draw.index for draw in zero.loader.sampler] != [draw.index for draw in one.loader.sampler]
    assert torch.equal(world.reach("--seeds", 1, 2).state.model.head.weight, one.state.model.head.weight)
    folder = world.tested("--seeds", 1, 2)
    assert set(pd.read_csv(folder / "table.csv")["seed"]) == {1, 2} and results_of(folder)["summary"][0]["runs"] == 2


@shows("--model_ema", "--model_ema_decay", "--model_ema_force_cpu")
def check_average(world: World) -> None:
    """It is there, follows at its pace, and is where it is told to be."""
    assert world.reach().state.ema is None
    for decay in (0.0, 1.0):
        got = world.reach("--model_ema", "--model_ema_decay", decay, "--lr", 0.1, "--epochs", 1, "--no_save_ckpt")
        start = got.state.model.head.weight.detach().clone()
        got.schedules["ema"] = np.minimum(got.schedules["ema"], decay)
        world.fit(got)
        average, end = got.state.ema.module.head.weight, got.state.model.head.weight
        assert torch.equal(average, end) == (decay == 0) and not torch.equal(average, start)
    slow = world.reach("--model_ema", "--epochs", 40).schedules["ema"]
    fast = world.reach("--model_ema", "--epochs", 40, "--model_ema_decay", 0.5).schedules["ema"]
    assert slow[-1] == pytest.approx(120 / 129) and fast[-1] == 0.5 and slow[0] == fast[0] == 0.1
    assert world.reach("--model_ema").state.ema.device is None
    assert world.reach("--model_ema", "--model_ema_force_cpu").state.ema.device == torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- optimiser

@shows("--opt", "--opt_eps", "--opt_betas", "--momentum")
def check_optimiser(world: World) -> None:
    """Its kind and numbers; the published ones by default."""
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
                          "--batch_size", 12, "--epochs", 1, *words)
        start = [p.detach().clone() for p in got.state.model.parameters()]
        world.fit(got)
        moved.append(math.sqrt(sum(float((p.detach() - s).square().sum()) for p, s in
                                   zip(got.state.model.parameters(), start, strict=True))))
    assert moved[0] > 0.01 and moved[1] == pytest.approx(0.001, rel=1e-3)


@shows("--weight_decay", "--weight_decay_end")
def check_weight_decay(world: World) -> None:
    """Constant, or on its way by a cosine."""
    assert set(world.reach().schedules["weight_decay"]) == {0.05}
    assert set(world.reach("--weight_decay", 0.2).schedules["weight_decay"]) == {0.2}
    ending = world.reach("--weight_decay_end", 0.01).schedules["weight_decay"]
    assert ending == pytest.approx([0.01 + 0.02 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])


@shows("--disable_weight_decay_on_rel_pos_bias")
def check_table_decay(world: World) -> None:
    """The tables are decayed, as published, unless told otherwise."""
    for words, scale in (([], 1.0), (["--disable_weight_decay_on_rel_pos_bias"], 0.0)):
        got = world.reach(*words)
        table = got.state.model.blocks[0].attn.relative_position_bias_table
        found = [group["weight_decay_scale"] for group in got.state.optimizer.param_groups
                 if any(p is table for p in group["params"])]
        assert found == [scale]


@shows("--lr", "--min_lr", "--warmup_lr", "--warmup_epochs", "--warmup_steps")
def check_rates(world: World) -> None:
    """A line from warmup_lr to lr, then half a cosine towards min_lr."""
    def wanted(lr: float, low: float, start: float, line: int) -> list[float]:
        n = 12 - line
        return [*np.linspace(start, lr, line), *(low + (lr - low) * (1 + math.cos(math.pi * i / n)) / 2
                                                 for i in range(n))]

    for words, numbers in (([], (5e-4, 1e-6, 0, 0)), (["--lr", 0.1], (0.1, 1e-6, 0, 0)),
                           (["--min_lr", 1e-4], (5e-4, 1e-4, 0, 0)), (["--warmup_epochs", 2], (5e-4, 1e-6, 0, 6)),
                           (["--warmup_epochs", 2, "--warmup_lr", 1e-5], (5e-4, 1e-6, 1e-5, 6)),
                           (["--warmup_epochs", 2, "--warmup_steps", 4], (5e-4, 1e-6, 0, 4))):
        assert world.reach("--epochs", 4, *words).schedules["lr"] == pytest.approx(wanted(*numbers))


@shows("--layer_decay")
def check_layer_decay(world: World) -> None:
    """Patches, two blocks, head."""
    for words, decay in (([], 0.9), (["--layer_decay", 0.5], 0.5)):
        found = {group["lr_scale"] for group in world.reach(*words).state.optimizer.param_groups}
        assert sorted(found) == pytest.approx([decay ** k for k in (3, 2, 1, 0)])


# ------------------------------------------------------------------------------------------------------- augmentation

@shows("--color_jitter")
def check_jitter(world: World) -> None:
    """Hue leaves grey as it is; brightness does not."""
    middle = (slice(None), slice(None), 16, 16)
    torch.testing.assert_close(world.drawn(GREY)[middle], torch.full((8, 3), 120 / 255), atol=1e-5, rtol=0)
    assert world.drawn(GREY, "--color_jitter", 0.8)[middle].std() > 0.05


@shows("--aa")
def check_policy(world: World) -> None:
    """timm's policies change grey, too; unknown ones are refused."""
    assert world.drawn(GREY, "--aa", "rand-m9-mstd0.5-inc1")[:, :, 16, 16].std() > 0.01
    assert "--aa nonsense" in world.refused("--aa", "nonsense")


@shows("--train_interpolation")
def check_interpolation(world: World) -> None:
    """The same crop, its pixels a little different; random is one or the other."""
    filters, resize = [], Image.Image.resize
    world.monkeypatch.setattr(Image.Image, "resize", lambda image, size, resample=None, *more, **how: (
        filters.append(resample), resize(image, size, resample, *more, **how))[1])
    pictures, found = [], []
    for words in ([], ["--train_interpolation", "bicubic"], ["--train_interpolation", "random"]):
        filters.clear()
        pictures.append(world.drawn(noise_picture(), *words))
        found.append(filters.count(Image.Resampling.BICUBIC))  # of 8 crops
    assert 1e-4 < float((pictures[0] - pictures[1]).abs().mean()) < 0.03
    assert found[:2] == [0, 8] and 0 < found[2] < 8


@shows("--crop_pct")
def check_crop(world: World) -> None:
    """Side before the crop, in training and in the test, also of the stored model."""
    got = world.reach("--crop_pct", 0.5)
    assert [c.transform.transforms[0].size for c in (got.loader.dataset, world.reach().loader.dataset)] == [64, 36]
    assert got.options.meta["crop_pct"] == 0.5
    wide, usual = (world.tested("--init_scale", 1, *words) for words in (["--crop_pct", 0.5], []))
    assert np.abs(probabilities(wide) - probabilities(usual)).max() > 1e-4


@shows("--reprob", "--remode", "--recount", "--resplit")
def check_erasing(world: World) -> None:
    """Rectangles: as likely, filled, many and placed as told."""
    def erased(*words: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen = world.watched(*words).seen
        return seen, seen != CLEAN

    assert not erased()[1].any()
    some = torch.cat([watch(world.reach("--batch_size", 12, "--reprob", 0.5), seed).seen != CLEAN
                      for seed in range(8)]).flatten(1).any(dim=1)
    assert 0.3 < some.float().mean() < 0.7
    for mode in ("pixel", "rand", "const"):
        seen, where = erased("--reprob", 1, "--remode", mode)
        assert where.flatten(1).any(dim=1).all()
        assert [len(set(seen[i, 0][where[i, 0]].tolist())) > 1 for i in range(12)] == [mode == "pixel"] * 12
        assert bool((seen[where] == 0).all()) == (mode == "const")
    assert erased("--reprob", 1)[1].flatten(1).any(dim=1).all()
    parts = [max(ndimage.label(one[0])[1] for one in erased("--reprob", 1, "--recount", n)[1].numpy()) for n in (1, 6)]
    assert parts[0] == 1 < parts[1]
    split = erased("--reprob", 1, "--resplit")[1].flatten(1).any(dim=1)
    assert split.tolist() == [False] * 6 + [True] * 6


@shows("--smoothing")
def check_smoothing(world: World) -> None:
    """The loss of constant logits, by its formula."""
    log_p = torch.tensor([2.0, 0, 0]).log_softmax(dim=0)
    for words, share in (([], 0.1), (["--smoothing", 0.4], 0.4), (["--smoothing", 0], 0)):
        made = world.watched(*words)
        wanted = -((1 - share) * log_p[made.labels].sum() + share * 12 * log_p.mean())
        assert made.loss == pytest.approx(float(wanted), rel=1e-5)


def mixture(seen: torch.Tensor, partner: torch.Tensor | None = None) -> torch.Tensor:
    """(B, 3, H, W): the share of its partner (the image at the mirrored place) in every pixel."""
    partner = CLEAN.flip(0) if partner is None else partner
    return (seen - CLEAN) / (partner - CLEAN)


@shows("--mixup", "--cutmix", "--cutmix_minmax", "--mixup_prob", "--mixup_switch_prob")
def check_mixing(world: World) -> None:
    """Mixup: the same share in every pixel; cutmix: all or nothing of each; as likely as told."""
    def kinds(*words: Any) -> set[str]:
        got, found = world.reach("--batch_size", 12, *words), set()
        for seed in range(12):
            share = mixture(watch(got, seed).seen).flatten(1)
            median = share.median()
            whole = bool((((share - 1).abs() < 0.01) | (share.abs() < 0.01)).all())
            even = bool(((share - median).abs() < 0.02).float().mean() > 0.98)  # but where the two are alike
            found.add("none" if whole and not share.abs().max() > 0.01 else "cut" if whole else "mix" if even else "?")
        return found

    assert kinds() == {"none"}
    assert kinds("--mixup", 5) == {"mix"} and kinds("--cutmix", 5) == {"cut"}
    assert kinds("--mixup", 5, "--cutmix", 5) == {"mix", "cut"}
    assert kinds("--mixup", 5, "--mixup_prob", 0) == {"none"}
    assert kinds("--mixup", 5, "--cutmix", 5, "--mixup_switch_prob", 1) == {"cut"}
    assert kinds("--mixup", 5, "--cutmix", 5, "--mixup_switch_prob", 0) == {"mix"}
    got = world.reach("--batch_size", 12, "--cutmix_minmax", 0.2, 0.4)  # a side of 6 to 11 of 32 pixels
    for seed in range(12):
        cut = (mixture(watch(got, seed).seen) > 0.5)[0, 0]
        assert all(6 <= int(cut.any(dim=d).sum()) <= 11 for d in (0, 1))
    assert "--cutmix_minmax" in world.refused("--cutmix_minmax", 0.5, 0.5)
    soft, log_p = world.watched("--mixup", 5, "--smoothing", 0), torch.tensor([2.0, 0, 0]).log_softmax(dim=0)
    share = float(mixture(soft.seen).median())
    wanted = -sum((1 - share) * log_p[a] + share * log_p[b] for a, b in zip(soft.labels, soft.labels.flip(0),
                                                                             strict=True))
    assert soft.loss == pytest.approx(float(wanted), rel=1e-3)


@shows("--mixup_mode")
def check_mixup_mode(world: World) -> None:
    """One share for a batch, a pair, or an image."""
    for mode, different in (("batch", 1), ("pair", 6), ("elem", 12)):
        seen = world.watched("--mixup", 5, "--mixup_mode", mode).seen
        shares = mixture(seen).flatten(1).median(dim=1).values
        assert len(set((shares * 1e4).round().int().tolist())) == different


# --------------------------------------------------------------------------------------------------------- evaluation

@shows("--monitor")
def check_monitor(world: World) -> None:
    """The chosen epoch is that of the best value of this metric; of the loss, the lowest."""
    for words, epoch in (([], 1), (["--monitor", "bacc"], 0), (["--monitor", "recall"], 1), (["--monitor", "auroc"], 0),
                         (["--monitor", "loss"], 0)):
        metrics = iter([{"acc": 0.1, "bacc": 0.9, "recall": 0.1, "auroc": 0.9, "loss": 0.1},
                        {"acc": 0.9, "bacc": 0.1, "recall": 0.9, "auroc": 0.1, "loss": 0.9}])
        chosen = world.fit(world.reach("--no_save_ckpt", *words), lambda model, metrics=metrics: next(metrics))
        assert chosen["epoch"] == epoch


@shows("--disable_eval_during_finetuning")
def check_no_evaluation(world: World) -> None:
    """The last epoch, and no metrics of val on the way."""
    got = world.reach("--disable_eval_during_finetuning")
    assert world.fit(got)["epoch"] == 1 and not any(key.startswith("val_") for key in got.state.history[0])
    got = world.reach("--monitor", "loss")
    world.fit(got)
    assert got.state.history[0]["val_loss"] > 0


@shows("--TTA", "--tta_views")
def check_views(world: World) -> None:
    """Other probabilities on test, not on val; the views differ, too."""
    plain, random, fixed = (world.tested("--init_scale", 1, *words) for words in (
        [], ["--TTA"], ["--TTA", "--tta_views", "deterministic"]))
    assert [results_of(folder)["tta"] for folder in (plain, random, fixed)] == [None, "published", "deterministic"]
    for a, b in ((plain, random), (plain, fixed), (random, fixed)):
        assert np.abs(probabilities(a) - probabilities(b)).max() > 1e-4
        np.testing.assert_array_equal(probabilities(a, "val"), probabilities(b, "val"))


@shows("--bootstrap", "--resamples")
def check_intervals(world: World) -> None:
    """How they are made is in the results, and they differ."""
    plain, strata, many = (results_of(world.tested("--init_scale", 1, *words))["splits"]["test"] for words in (
        [], ["--bootstrap", "stratified"], ["--resamples", 300]))
    assert "100" in plain["resampling"] and "300" in many["resampling"]
    assert plain["resampling"] != strata["resampling"]
    bounds = [(split["metrics"]["auroc"]["low"], split["metrics"]["acc"]["low"], split["metrics"]["acc"]["high"],
               split["metrics"]["brier"]["high"]) for split in (plain, strata, many)]
    assert len(set(bounds)) == 3


# ------------------------------------------------------------------------------------------------------------ machine

@shows("--device")
def check_device(world: World) -> None:
    """Where the model is; what the machine lacks is refused."""
    assert next(world.reach("--device", "cpu").state.model.parameters()).device.type == "cpu"
    assert "--device quantum" in world.refused("--device", "quantum")
    world.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no cuda" in world.refused("--device", "cuda")


def formats(world: World, *words: Any) -> set[torch.dtype]:
    """The number formats of a linear layer's outputs in a training with its evaluation."""
    got, found = world.reach("--epochs", 1, *words), set()
    got.state.model.blocks[0].mlp.fc1.register_forward_hook(lambda *call: found.add(call[2].dtype))
    world.fit(got)
    return found


@shows("--amp_dtype")
def check_precision(world: World) -> None:
    """The format in which the layers compute."""
    assert formats(world) == {torch.float32}
    assert formats(world, "--amp_dtype", "bf16") == {torch.bfloat16}


@shows("--compile")
def check_compile(world: World) -> None:
    """torch.compile gets the model."""
    compiled = []
    world.monkeypatch.setattr(torch, "compile", lambda module: (compiled.append(module), module)[1])
    world.fit(world.reach("--epochs", 1))
    assert not compiled
    got = world.reach("--epochs", 1, "--compile")
    world.fit(got)
    assert compiled == [got.state.model]


@shows("--grad_checkpointing")
def check_checkpointing(world: World) -> None:
    """A block is computed again for the gradients."""
    for words, passes in (([], 1), (["--grad_checkpointing"], 2)):
        got, calls = world.reach("--drop_path", 0, *words), []
        got.state.model.train().blocks[0].mlp.fc1.register_forward_hook(lambda *call, calls=calls: calls.append(1))
        got.step(got.state.model, next(iter(got.loader)), {})[0].backward()
        assert len(calls) == passes


@shows("--num_workers")
def check_workers(world: World) -> None:
    """Processes that decode; the images are the same."""
    loader = world.reach("--num_workers", 2).loader
    batches = iter(loader)
    assert torch.equal(next(batches).images, next(iter(world.reach().loader)).images)
    assert len(batches._workers) == 2


@shows("--pin_mem", "--no_pin_mem")
def check_pinning(world: World) -> None:
    """Of a loader for a GPU."""
    made = []

    def build(*args: Any, **kwargs: Any) -> Any:
        made.append(build_train_loader(*args, **{**kwargs, "device": "cuda"}).pin_memory)
        return build_train_loader(*args, **kwargs)

    world.monkeypatch.setattr(finetuning, "build_train_loader", build)
    for words in ([], ["--no_pin_mem"], ["--no_pin_mem", "--pin_mem"]):
        world.reach(*words)
    assert made == [True, False, True]


@shows("--enable_multi_print")
def check_multi_print(world: World) -> None:
    """The second process is silent, or is not."""
    world.monkeypatch.setenv("RANK", "1")
    for words, spoke in (([], False), (["--enable_multi_print"], True)):
        world.caplog.clear()
        world.tested(*words)
        assert any(record.levelno == logging.INFO for record in world.caplog.records) == spoke


# ------------------------------------------------------------------------------------------------------------- output

@shows("--output_dir")
def check_output_dir(world: World) -> None:
    """The run's folder."""
    folder = world.folder / "my run"
    assert world.tested("--output_dir", folder) == folder
    assert {"results.json", "test.csv", "args.yaml", "checkpoint-best.pth"} <= {path.name for path in folder.iterdir()}


@shows("--overwrite")
def check_overwrite(world: World) -> None:
    """Another run in the folder is refused, naming what differs; or moved away."""
    there = ["--output_dir", world.folder / "run"]
    world.tested(*there)
    assert "lr: 0.0005 there, 0.1 now" in world.refused(*there, "--lr", 0.1)
    world.reach(*there, "--lr", 0.1, "--overwrite")
    assert (world.folder / "run" / "previous" / "results.json").exists()


@shows("--auto_resume", "--no_auto_resume")
def check_auto_resume(world: World) -> None:
    """An unfinished run goes on, unless it must not."""
    there = ["--output_dir", world.folder / "run"]
    world.reach(*there)
    assert "unfinished" in world.refused(*there, "--no_auto_resume")
    world.reach(*there)
    world.reach(*there, "--no_auto_resume", "--auto_resume")


@shows("--save_ckpt", "--no_save_ckpt")
def check_save(world: World) -> None:
    """Checkpoint files, or none; the model is the same."""
    weights = []
    for words, files in (([], 3), (["--no_save_ckpt"], 0), (["--no_save_ckpt", "--save_ckpt"], 3)):
        got = world.reach(*words)
        weights.append(world.fit(got)["model"]["head.weight"])
        assert len(list(got.run.path.glob("checkpoint-*.pth"))) == files  # last, previous, best
        assert len(list(world.tested(*words).glob("checkpoint-best.pth"))) == min(files, 1)
    assert torch.equal(weights[0], weights[1])


@shows("--save_ckpt_freq", "--save_every_steps")
def check_often(world: World) -> None:
    """Kept epochs; and how often the newest state is written: 2 epochs of 3 updates."""
    written, save = [], Checkpoints.save_last
    world.monkeypatch.setattr(Checkpoints, "save_last", lambda self, state: (written.append(state.update),
                                                                             save(self, state)))
    for words, kept, saved in (([], [], [3, 6]), (["--save_ckpt_freq", 1], [1, 2], [3, 6]),
                               (["--save_ckpt_freq", 2], [2], [3, 6]),
                               (["--save_every_steps", 2], [], [2, 3, 5, 6])):
        written.clear()
        got = world.reach(*words)
        world.fit(got)
        assert sorted(path.name for path in got.run.path.glob("checkpoint-[0-9]*.pth")) == [
            f"checkpoint-{epoch}.pth" for epoch in kept]
        assert written == saved


@shows("--wandb", "--wandb_name", "--exp_name")
def check_wandb(world: World) -> None:
    """The project, the run's name there, and its numbers; nothing without --wandb; a message where it is absent."""
    asked, logged = [], []
    run = SimpleNamespace(log=lambda entry, step: logged.append((step, entry["train_loss"])), finish=lambda: None)
    world.monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: (asked.append(how), run)[1]))
    world.tested("--wandb_name", "skin", "--exp_name", "first")
    assert not asked
    world.tested("--wandb")
    world.tested("--wandb", "--wandb_name", "skin", "--exp_name", "first")
    assert [(how["project"], how["name"]) for how in asked] == [("demo", None), ("skin", "first")]
    assert logged == [(3, 1.5)] * 2
    world.monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in world.refused("--wandb")


@shows("--log_dir")
def check_tensorboard(world: World) -> None:
    """Event files."""
    pytest.importorskip("tensorboard")
    world.tested("--log_dir", world.folder / "events")
    assert list((world.folder / "events").glob("events.out.tfevents.*"))


@shows(*accepted_only("run_class_finetuning.py"))
def check_notices(world: World) -> None:
    """They change nothing, and a line says what holds."""
    usual = world.reach()
    for flag, text in accepted_only("run_class_finetuning.py").items():
        value = ["3"] if flag in TAKES_VALUE else []
        world.caplog.clear()
        got = world.reach(flag, *value)
        assert f"{flag} has no effect: {text}" in world.caplog.messages
        assert got.run.fingerprint == usual.run.fingerprint
        assert torch.equal(got.state.model.head.weight, usual.state.model.head.weight)


@shows("--enable_deepspeed")
def check_deepspeed(world: World) -> None:
    """Refused, with what to take instead."""
    assert "torchrun" in world.refused("--enable_deepspeed")


# -------------------------------------------------------------------------------------------------------------- tests

@pytest.fixture
def world(tmp_path, monkeypatch, capsys, caplog) -> Iterator[World]:
    """PanDerm_Base_* of width 32 and depth 2; no plots."""
    monkeypatch.setitem(panderm.SIZES, "Base", {"embed_dim": 32, "depth": 2, "num_heads": 2})
    monkeypatch.setattr(run_class_finetuning, "plot_learning_curve", lambda *args, **kwargs: None)
    monkeypatch.setattr(finetuning_results, "draw_classification_plots", lambda *args, **kwargs: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: two threads would only wait for each other
    yield World(tmp_path, monkeypatch, capsys, caplog)
    torch.set_num_threads(threads)


def test_every_flag_has_a_check() -> None:
    """And every check a flag."""
    flags = {flag for action in finetuning_parser()._actions for flag in action.option_strings}
    assert flags - {"-h", "--help", "-c", "--config"} == set(CHECKS)


@pytest.mark.parametrize("check", dict.fromkeys(CHECKS.values()), ids=lambda check: check.__name__[6:])
def test_flags(check: Callable[[World], None], world: World) -> None:
    """What the flags change."""
    check(world)


def test_the_readmes_recipe_is_the_published_one(world: World) -> None:
    """Rates, decay, depth and augmentation, by the numbers of the published code."""
    got = world.reach("--input_size", 224, "--lr", "5e-4", "--epochs", 50, "--warmup_epochs", 10, "--layer_decay", 0.65,
                      "--drop_path", 0.2, "--weight_decay", 0.05, "--mixup", 0.8, "--cutmix", 1.0, "--weights", "--TTA")
    cosine = [1e-6 + 0.5 * (5e-4 - 1e-6) * (1 + math.cos(math.pi * i / 120)) for i in range(120)]
    assert got.schedules["lr"] == pytest.approx([*np.linspace(0, 5e-4, 30), *cosine])
    assert set(got.schedules["weight_decay"]) == {0.05} and got.schedules.keys() == {"lr", "weight_decay"}
    scales = {group["lr_scale"] for group in got.state.optimizer.param_groups}
    assert sorted(scales) == pytest.approx([0.65 ** k for k in (3, 2, 1, 0)])
    assert got.state.model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert got.options.monitor == "acc" and got.options.clip is None and got.loader.sampler.weights is not None
    published = transforms.Compose([
        transforms.Resize(256), transforms.RandomResizedCrop(224, scale=(0.75, 1)), transforms.RandomHorizontalFlip(),
        transforms.RandomVerticalFlip(), transforms.RandomRotation(45), transforms.ColorJitter(hue=0.2),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))])
    for seed in range(4):
        ours, theirs = (augmented(made, noise_picture(), seed) for made in (got.loader.dataset.transform, published))
        assert torch.equal(ours, theirs)
