"""Every option of pretraining/run.py has an effect: a check per option, of something that it changes.

The commands run through ``main``. ``World.reach`` stops it where the training would begin and keeps what ``fit`` was
to get; ``World.fit`` then trains for real; ``World.tested`` does all but the training.
"""

import dataclasses
import itertools
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from furnace import pretraining, pretraining_results
from furnace.command_line import parse
from furnace.data import multicrop
from furnace.models import create_backbone, dino
from furnace.models.prototypes import orthogonal_vectors, random_vectors
from furnace.pretraining_arguments import pretraining_parser
from furnace.runtime import trainer
from furnace.runtime.checkpoints import Checkpoints
from furnace.runtime.trainer import fit
from helpers import draw_images, write_csv
from tiny_pretraining import RUN, command, drawn_set

CHECKS: dict[str, Callable[["World"], None]] = {}  # option -> what shows its effect
ONTOLOGY = ("id,name,synonyms,parent,sources", "malignant,malignant,,,ham10000",
            "melanoma,melanoma,,malignant,ham10000", "nevus,nevus,nv,,ham10000", "keratosis,keratosis,bkl,,ham10000")
NAMES = ("state", "step", "evaluate", "loader", "plan", "schedules", "run")  # what ``fit`` gets
ROOT_RATE = math.sqrt(4 / 1024)  # 4 images an update


def shows(*flags: str) -> Callable:
    """Enter a check for these options."""
    def enter(check: Callable[["World"], None]) -> Callable[["World"], None]:
        assert not CHECKS.keys() & set(flags)
        CHECKS.update(dict.fromkeys(flags, check))
        return check
    return enter


class Reached(Exception):  # noqa: N818 - not an error
    """``main`` has come to ``fit``; ``got`` is what it was to get."""

    def __init__(self, got: SimpleNamespace) -> None:
        super().__init__()
        self.got = got


class World:
    """Nine images, five with labels of a small ontology; a tiny model; ways to run a part of the script."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any) -> None:
        self.folder, self.monkeypatch, self.capsys, self.caplog = folder, monkeypatch, capsys, caplog
        self.csv, self.count = drawn_set(folder / "data", images=9), itertools.count()
        self.eval_csv = self.csv.parent / "eval.csv"
        (folder / "o.csv").write_text("\n".join(ONTOLOGY) + "\n")

    def argv(self, words: tuple, options: dict[str, str | None]) -> list[str]:
        """The usual command but for ``options``, a fresh folder, and ``words``."""
        return command(self.folder / f"out{next(self.count)}", *map(str, words),
                       **{"data_csv": str(self.csv), "ontology": str(self.folder / "o.csv"), **options})

    def reach(self, *words: Any, **options: str | None) -> SimpleNamespace:
        """What ``fit`` is to get from this command."""
        def stop(*given: Any, options: Any) -> None:
            raise Reached(SimpleNamespace(**dict(zip(NAMES, given, strict=True)), options=options))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretraining, "fit", stop)
            with pytest.raises(Reached) as reached:
                assert RUN.main(self.argv(words, options)) == 0, self.capsys.readouterr().err
        return reached.value.got

    def fit(self, got: SimpleNamespace, evaluate: Callable | None = None) -> dict[str, Any]:
        """The training that was to begin."""
        return fit(got.state, got.step, evaluate or (lambda model: {"feature_rank": 2.0}), got.loader, got.plan,
                   got.schedules, got.run, options=got.options)

    def tested(self, *words: Any, **options: str | None) -> Path:
        """The run's folder after a command that trains nothing but does all else."""
        def no_training(state: Any, *_: Any, options: Any) -> dict[str, Any]:
            state.update = 3
            state.history += [{"epoch": i, "update": 3, "train_loss": 1.5} for i in range(options.epochs)]
            options.track(state.history[-1])
            return {"model": state.ema.module.state_dict(), "epoch": 0, "meta": options.meta}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretraining, "fit", no_training)
            return self.ran(*words, **options)

    def ran(self, *words: Any, **options: str | None) -> Path:
        """The folder of a command that ended well."""
        argv = self.argv(words, options)
        assert RUN.main(argv) == 0, self.capsys.readouterr().err
        return Path(argv[len(argv) - argv[::-1].index("--output_dir")])

    def refused(self, *words: Any, **options: str | None) -> str:
        """What is said when a command ends with exit code 2."""
        self.capsys.readouterr()
        assert RUN.main(self.argv(words, options)) == 2
        return self.capsys.readouterr().err

    def table(self, name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
        """The data set's CSV, changed, in a file beside it."""
        path = self.csv.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        change(pd.read_csv(self.csv)).to_csv(path, index=False)
        return path


def recorded(patch: pytest.MonkeyPatch, place: Any, name: str) -> list[tuple[tuple, dict, Any]]:
    """The arguments and result of every call of a function from now on."""
    function, calls = getattr(place, name), []

    def call(*given: Any, **named: Any) -> Any:
        result = function(*given, **named)
        calls.append((given, named, result))
        return result

    patch.setattr(place, name, call)
    return calls


def first_batch(got: SimpleNamespace) -> multicrop.MultiCropBatch:
    return next(iter(got.loader))


def group_values(got: SimpleNamespace, name: str) -> dict[str, Any]:
    """A number of each trained parameter, by the parameter's name."""
    return {key: group[name] for group in got.state.optimizer.param_groups for key in group["names"]}


# --------------------------------------------------------------------------------------------------------------- data

@shows("--data_csv", "--root_path")
def check_data(world: World) -> None:
    """The images of that file or folder; their folder."""
    fewer = world.table("fewer.csv", lambda table: table[:6])
    assert [len(world.reach(**words).loader.dataset) for words in ({}, {"data_csv": str(fewer)})] == [9, 6]
    got = world.reach(data_csv=str(world.csv.parent / "images"), ontology=None)
    assert len(got.loader.dataset) == 9 and first_batch(got).targets is None and got.state.model.label_head is None
    moved = world.table("elsewhere/moved.csv", lambda table: table)
    assert "images/00.png" in world.refused(data_csv=str(moved))
    got = world.reach("--root_path", world.csv.parent, data_csv=str(moved))
    assert got.loader.dataset.manifest.path_of(0) == world.csv.parent / "images/00.png"


@shows("--ontology", "--label_ancestors", "--no_label_ancestors")
def check_ontology(world: World) -> None:
    """The classes; what a label says of those above it."""
    assert "pass --ontology" in world.refused(ontology=None)
    for words, above in (([], True), (["--no_label_ancestors"], False),
                         (["--no_label_ancestors", "--label_ancestors"], True)):
        got = world.reach(*words)
        labels = got.loader.collate_fn.labels
        assert labels.rows([0]).tolist() == [[float(above), 1, 0, 0]]
        assert got.state.model.label_head.weight.shape == (4, 64)
        assert labels.rows([4]).tolist() == [[0, 0, 1, 0]], "nv"
        assert set(map(tuple, first_batch(got).targets.tolist())) <= {(above, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1),
                                                                      (0, 0, 0, 0)}


@shows("--lenient_labels")
def check_lenient(world: World) -> None:
    """An unknown label is told, and its image unlabelled."""
    odd = world.table("odd.csv", lambda table: table.assign(labels=table["labels"].where(table.index != 2, "wart")))
    assert "wart" in world.refused(data_csv=str(odd))
    got = world.reach("--lenient_labels", data_csv=str(odd))
    assert got.loader.collate_fn.labels.labelled.tolist() == [i in (0, 4, 6, 8) for i in range(9)]
    assert "wart" in world.caplog.text


@shows("--eval_csv", "--eval_root")
def check_eval(world: World) -> None:
    """Whose images judge: k-NN beside the rank; their folder."""
    assert world.reach().evaluate(world.reach().state.model.eval()).keys() == {"feature_rank"}
    for words in (["--eval_csv", world.eval_csv],
                  ["--eval_csv", shutil.copy(world.eval_csv, world.folder), "--eval_root", world.csv.parent]):
        got = world.reach(*words)
        found = got.evaluate(got.state.model.eval())
        assert found.keys() == {"knn_acc", "knn_bacc", "feature_rank"} and 0 <= found["knn_acc"] <= 1
    told = world.refused("--eval_csv", world.folder / "eval.csv")
    assert "eval/train_0.png" in told or "--eval_root" in told
    assert "--root_path" not in told
    assert "--eval_root is of --eval_csv" in world.refused("--eval_root", world.folder)


@shows("--eval_freq")
def check_eval_freq(world: World) -> None:
    """Which epochs have numbers; the last has them always."""
    for words, due in (([], [True] * 3), (["--eval_freq", 2], [False, True, True]),
                       (["--eval_freq", 9], [False, False, True])):
        got = world.reach(*words, epochs="3")
        world.fit(got, got.evaluate)
        assert [entry["val_feature_rank"] is not None for entry in got.state.history] == due


@shows("--forbid_overlap", "--forbid_overlap_root")
def check_overlap(world: World) -> None:
    """Images of a test list among the training images end the command; several lists."""
    own = world.table("own.csv", lambda table: table[["image"]][3:5])
    draw_images(world.folder, ["t0.png", "t1.png"], seed=9)
    other = write_csv(world.folder / "other.csv", image=["t0.png", "t1.png"])
    world.reach("--forbid_overlap", other)
    told = world.refused("--forbid_overlap", other, own)
    assert "2 training images are also in a test list" in told and "images/03.png" in told
    (world.folder / "lists").mkdir()
    (world.folder / "lists" / "own.csv").write_bytes(own.read_bytes())
    moved = world.folder / "lists" / "own.csv"
    assert "2 training images" in world.refused("--forbid_overlap", moved, "--forbid_overlap_root", own.parent)
    told = world.refused("--forbid_overlap", moved)
    assert "--forbid_overlap_root" in told and "--root_path" not in told  # the images are not in the list's folder
    told = world.refused("--forbid_overlap", moved, "--forbid_overlap_root", own.parent, own.parent)
    assert "one folder, or one for each list" in told


# -------------------------------------------------------------------------------------------------------------- model

@shows("--model")
def check_model(world: World) -> None:
    """Another network; one that is not for it, or none, is refused."""
    assert [len(world.reach(model=name).state.model.backbone.blocks)
            for name in ("timm:test_vit", "timm:vit_tiny_patch16_224")] == [6, 12]
    assert "has no class token" in world.refused(model="timm:test_vit3")
    assert "for plain vision transformers" in world.refused(model="timm:test_resnet")
    assert "--model is missing" in world.refused(model=None)


@shows("--pretrained_checkpoint")
def check_pretrained(world: World) -> None:
    """The start; of student and teacher."""
    there = create_backbone("timm:test_vit", "random", input_size=48, seed=7)
    torch.save(there.state_dict(), world.folder / "start.pth")
    got = world.reach(pretrained_checkpoint=str(world.folder / "start.pth"))
    for model in (got.state.model, got.state.ema.module):
        assert all(torch.equal(value, model.backbone.state_dict()[key]) for key, value in there.state_dict().items())
    assert not torch.equal(world.reach().state.model.backbone.cls_token, there.cls_token)
    torch.save({"x": torch.ones(3)}, world.folder / "bad.pth")
    assert "bad.pth" in world.refused(pretrained_checkpoint=str(world.folder / "bad.pth"))


@shows("--patch_size")
def check_patch_size(world: World) -> None:
    """Side of the patches: 6 x 6 of 8 px instead of 3 x 3 of 16."""
    for words, patches in (([], 9), (["--patch_size", 8], 36)):
        got = world.reach(*words)
        assert first_batch(got).masks.shape[2] == patches
        assert got.state.model.backbone.patch_embed.num_patches == patches


@shows("--layer_scale_init_value")
def check_layer_scale(world: World) -> None:
    """There, with this value, or as the architecture has it."""
    name = "timm:test_vit"
    assert not any("ls1.gamma" in key for key in world.reach(model=name).state.model.state_dict())
    model = world.reach("--layer_scale_init_value", 0.25, model=name).state.model
    assert all((block.ls1.gamma == 0.25).all() and (block.ls2.gamma == 0.25).all() for block in model.backbone.blocks)


@shows("--drop_path")
def check_drop_path(world: World) -> None:
    """The same rate in all blocks; 0.4 unless told."""
    for given, rate in ((None, 0.4), ("0.2", 0.2), ("0", 0.0)):
        blocks = world.reach(drop_path=given).state.model.backbone.blocks
        assert {getattr(part, "drop_prob", 0.0) for block in blocks
                for part in (block.drop_path1, block.drop_path2)} == {rate}


@shows("--head_n_prototypes", "--head_hidden_dim", "--head_bottleneck_dim")
def check_heads(world: World) -> None:
    """The shapes of both heads."""
    for words, wanted in (([], (32, 16, 8)), (["--head_n_prototypes", 40], (40, 16, 8)),
                          (["--head_hidden_dim", 12], (32, 12, 8)), (["--head_bottleneck_dim", 5], (32, 16, 5))):
        model = world.reach(*words).state.model
        for head in (model.dino_head, model.ibot_head):
            prototypes, bottleneck = head.last_layer.weight_v.shape
            assert (prototypes, head.mlp[2].weight.shape[0], bottleneck) == wanted


# -------------------------------------------------------------------------------------------------------------- views

@shows("--global_crops_size", "--local_crops_size", "--local_crops_number")
def check_crops(world: World) -> None:
    """Shapes of the batches; the model is of the large crops' size."""
    for words, large, small in (([], 48, (2, 32)), (["--global_crops_size", 64], 64, (2, 32)),
                                (["--local_crops_size", 16], 48, (2, 16)), (["--local_crops_number", 3], 48, (3, 32)),
                                (["--local_crops_number", 0], 48, None)):
        got = world.reach(*words)
        batch = first_batch(got)
        assert batch.globals.shape == (2, 4, 3, large, large)
        assert got.state.model.backbone.patch_embed.img_size == (large, large)
        assert (batch.locals is None) == (small is None)
        assert small is None or batch.locals.shape == (small[0], 4, 3, small[1], small[1])


@shows("--global_crops_scale", "--local_crops_scale")
def check_scales(world: World) -> None:
    """Shares of the area that crops have: two large ones of an image, then the small ones."""
    for words, ranges in (([], ((0.3, 1.0), (0.04, 0.34))),
                          (["--global_crops_scale", 0.3, 0.4], ((0.28, 0.42), (0.04, 0.34))),
                          (["--local_crops_scale", 0.9, 1], ((0.3, 1.0), (0.85, 1.0)))):
        got = world.reach(*words)
        with pytest.MonkeyPatch.context() as patch:
            boxes = recorded(patch, multicrop, "crop_box")
            list(got.loader)
        shares = np.array([box[2] * box[3] / (given[0] * given[1]) for given, _, box in boxes]).reshape(-1, 4)
        assert len(shares) == 8
        for part, (low, high) in zip((shares[:, :2], shares[:, 2:]), ranges, strict=True):
            assert low <= part.min() and part.max() <= high and np.ptp(part) > (high - low) / 4
    assert "the first is the smaller one" in world.refused("--global_crops_scale", 1, 0.5)


@shows("--dinov2_compat")
def check_compat(world: World) -> None:
    """How many crops of an image are blurred: 1 + 0.1 of the large ones as declared, 0 + 0.9 as released."""
    got = {flag: world.reach(*words, "--batch_size", 9, "--local_crops_number", 0)
           for flag, words in ((False, []), (True, ["--dinov2_compat"]))}
    for compat, first in ((False, 1.0), (True, 0.0)):
        with pytest.MonkeyPatch.context() as patch:
            views = recorded(patch, multicrop.MultiCrop, "_views")
            list(got[compat].loader)
        chances = [given[4] for given, _, _ in views if len(given[4]) == 2]
        assert {pair[0][0] for pair in chances} == {first} and {pair[1][0] for pair in chances} == {0.1 + 0.8 * compat}


@shows("--mask_sample_probability", "--mask_ratio_min_max")
def check_masks(world: World) -> None:
    """How many of a batch's large crops are masked, and how much of them: patches of 36."""
    for words, crops, low, high in (([], 4, 1, 18), (["--mask_sample_probability", 1], 8, 1, 18),
                                    (["--mask_sample_probability", 0], 0, 0, 0),
                                    (["--mask_ratio_min_max", 0.5, 0.5], 4, 14, 18),
                                    (["--mask_ratio_min_max", 0.8, 0.8], 4, 20, 29)):
        masked = first_batch(world.reach("--patch_size", 8, *words)).masks.sum(dim=2).flatten()
        masked = masked[masked > 0]
        assert len(masked) == crops and all(low <= number <= high for number in masked.tolist())


# ------------------------------------------------------------------------------------------- objective and the course

SCHEDULES = {  # option -> (value, schedule, at update, what it is there by default, what with the option)
    "--dino_loss_weight": (0.3, "dino_weight", -1, 1.0, 0.3),
    "--ibot_loss_weight": (0.4, "ibot_weight", -1, 1.0, 0.4),
    "--koleo_loss_weight": (0.5, "koleo_weight", -1, 0.1, 0.5),
    "--label_loss_weight": (0.6, "label_weight", -1, 1.0, 0.6),
    "--label_loss_weight_end": (0.0, "label_weight", 4, 1.0, 0.5),
    "--label_warmup_epochs": (2, "label_weight", 1, 1.0, 1 / 3),
    "--momentum_teacher": (0.5, "ema", 0, 0.9, 0.5),
    "--final_momentum_teacher": (0.95, "ema", 4, 0.95, 0.925),
    "--warmup_teacher_temp": (0.01, "teacher_temperature", 0, 0.04, 0.01),
    "--teacher_temp": (0.1, "teacher_temperature", -1, 0.07, 0.1),
    "--warmup_teacher_temp_epochs": (2, "teacher_temperature", 1, 0.07, 0.05),
    "--base_lr": (0.04, "lr", 0, 0.02 * ROOT_RATE, 0.04 * ROOT_RATE),
    "--min_lr": (1e-4, "lr", 4, (0.02 * ROOT_RATE + 1e-6) / 2, (0.02 * ROOT_RATE + 1e-4) / 2),
    "--warmup_epochs": (1, "lr", 0, 0.02 * ROOT_RATE, 0.0),
    "--freeze_last_layer_epochs": (2, "last_layer_lr", 3, None, 0.0),
    "--weight_decay": (0.3, "weight_decay", 0, 0.04, 0.3),
    "--weight_decay_end": (0.06, "weight_decay", 4, 0.12, 0.05),
}


@shows(*SCHEDULES)
def check_schedules(world: World) -> None:
    """A number of the eight updates of four epochs, without and with the option; what else there is stays."""
    usual = world.reach(epochs="4").schedules
    assert all(len(values) == 8 for values in usual.values())
    for flag, (value, name, at, before, after) in SCHEDULES.items():
        found = world.reach(flag, value, epochs="4").schedules
        before = usual["lr"][at] if before is None else before
        assert usual[name][at] == pytest.approx(before, rel=1e-3), flag
        assert found[name][at] == pytest.approx(after, rel=1e-3), flag
        changed = {key for key in usual if not np.array_equal(usual[key], found[key])}
        assert changed == ({"lr", "last_layer_lr", "prototype_lr"} if name == "lr" else {name}) \
            or flag == "--base_lr" and changed == {"lr", "last_layer_lr"}, flag


@shows("--prototype_mode", "--prototype_lr", "--prototype_warmup_epochs")
def check_prototype_mode(world: World) -> None:
    """Whether they learn, how fast, from when on: what two epochs do to them."""
    quick = ["--prototype_lr", 0.05]
    for words, moved in (([], [False, False]), (["--prototype_mode", "trainable"], [True, True]),
                         (["--prototype_mode", "warmup", "--prototype_warmup_epochs", 1], [False, True])):
        got, found = world.reach(*quick, *words), []
        head = got.state.model.label_head
        start = head.weight.detach().clone()
        world.fit(got, lambda model, head=head, start=start, found=found:
                  found.append(not torch.equal(head.weight, start)) or {})
        assert found == moved
    rates = [world.reach("--prototype_mode", "trainable", *words).schedules["prototype_lr"][0]
             for words in ([], ["--prototype_lr", 5e-4])]
    assert rates == pytest.approx([1e-4 * ROOT_RATE, 5e-4 * ROOT_RATE])


@shows("--prototypes")
def check_prototypes(world: World) -> None:
    """What the label head begins with, by the seed."""
    rows = np.eye(4, 64, dtype=np.float32)
    np.save(world.folder / "rows.npy", rows)
    for name, wanted in (("random", random_vectors(4, 64, seed=0)), ("orthogonal", orthogonal_vectors(4, 64, seed=0)),
                         (str(world.folder / "rows.npy"), torch.from_numpy(rows))):
        torch.testing.assert_close(world.reach(prototypes=name).state.model.label_head.weight, wanted)
    with pytest.MonkeyPatch.context() as patch:
        means = recorded(patch, pretraining, "class_mean_vectors")
        world.reach(prototypes="class_mean")
    assert means[0][0][0].shape == (5, 64), "features of the labelled images"
    assert "none of text, class_mean, orthogonal, random" in world.refused(prototypes="coder")


@shows("--text_encoder", "--text_pooling")
def check_text(world: World) -> None:
    """What is asked of which encoder."""
    asked = []

    def vectors(names: list[str], **how: str) -> torch.Tensor:
        asked.append((list(names), how["encoder"], how["pooling"]))
        return random_vectors(4, 64, seed=3)

    world.monkeypatch.setattr(pretraining, "text_vectors", vectors)
    for words in ([], ["--text_encoder", "bert"], ["--text_pooling", "pooler"]):
        torch.testing.assert_close(world.reach(*words, prototypes=None).state.model.label_head.weight,
                                   random_vectors(4, 64, seed=3))
    names = ["malignant", "melanoma", "nevus", "keratosis"]
    assert asked == [(names, "GanjinZero/coder_all", "mean"), (names, "bert", "mean"),
                     (names, "GanjinZero/coder_all", "pooler")]


@shows("--label_temperature")
def check_label_temperature(world: World) -> None:
    """Logits of a class token: a product, or a cosine over the temperature."""
    x = 3 * torch.randn(5, 64)
    for words, inputs in (([], x), (["--label_temperature", 0.2], torch.nn.functional.normalize(x) / 0.2)):
        head = world.reach(*words).state.model.label_head
        torch.testing.assert_close(head(x), inputs @ head.weight.T + head.bias)


@shows("--label_bias")
def check_label_bias(world: World) -> None:
    """Two melanomas, which are malignant, one nevus and two keratoses among five; in student and teacher."""
    odds = torch.tensor([3 / 4, 3 / 4, 2 / 5, 3 / 4]).log()
    for words, wanted in (([], odds), (["--label_bias", "prior"], odds), (["--label_bias", "zero"], torch.zeros(4))):
        got = world.reach(*words)
        for model in (got.state.model, got.state.ema.module):
            torch.testing.assert_close(model.label_head.bias.detach(), wanted)
            assert not model.label_head.bias.requires_grad


@shows("--batch_size", "--update_freq")
def check_batches(world: World) -> None:
    """Images of a forward pass; passes of an update."""
    for words, wanted in (([], (4, 1, 2)), (["--batch_size", 3], (3, 1, 3)), (["--update_freq", 2], (4, 2, 1))):
        got = world.reach(*words, epochs="1")
        passes, step = [], got.step
        got.step = lambda model, batch, values, step=step, passes=passes: (
            passes.append(batch.globals.shape[1]), step(model, batch, values))[1]
        world.fit(got)
        assert passes == [wanted[0]] * wanted[1] * wanted[2] and got.state.update == wanted[2]


@shows("--epochs", "--epoch_length", "--max_updates")
def check_course(world: World) -> None:
    """How many epochs of how many updates; where it pauses, with the schedules of the whole."""
    for words, updates, length, epochs in (([], 4, 4, 2), (["--epochs", 1], 2, 2, 1), (["--epoch_length", 3], 6, 6, 2),
                                           (["--max_updates", 3], 3, 4, 1)):
        got = world.reach(*words)
        world.fit(got)
        assert (got.state.update, len(got.schedules["lr"]), len(got.state.history)) == (updates, length, epochs)
    folder = world.ran("--max_updates", 3)
    assert (folder / "teacher" / "config.json").exists() and not (folder / "results.json").exists()
    assert json.loads((folder / "teacher" / "config.json").read_text())["furnace"]["updates"] == 3


@shows("--layer_decay", "--patch_embed_lr_mult")
def check_rates_of_layers(world: World) -> None:
    """Factors of the rate; the decay's exponent counts from the last of six blocks."""
    for words, block, patches in (([], 1.0, 0.2), (["--layer_decay", 0.5], 0.5**4, 0.2 * 0.5**7),
                                  (["--patch_embed_lr_mult", 1], 1.0, 1.0)):
        scales = group_values(world.reach(*words), "lr_scale")
        assert scales["backbone.blocks.2.attn.qkv.weight"] == pytest.approx(block)
        assert scales["backbone.patch_embed.proj.weight"] == pytest.approx(patches)
        assert scales["dino_head.mlp.0.weight"] == 1


@shows("--clip_grad")
def check_clip(world: World) -> None:
    """Largest norm of a part's gradients as the optimiser gets them."""
    for words, limit in (([], 3.0), (["--clip_grad", 1e-3], 1e-3), (["--clip_grad", 0], None)):
        got, norms = world.reach(*words, epochs="1"), []
        assert got.options.clip == limit

        def note(optimizer: Any, *_: Any, norms=norms) -> None:
            for part in ("backbone", "dino_head"):
                grads = [p.grad.norm() for group in optimizer.param_groups if group["clip_group"] == part
                         for p in group["params"]]
                norms.append(float(torch.stack(grads).norm()))

        got.state.optimizer.register_step_pre_hook(note)
        world.fit(got)
        assert max(norms) <= (limit or math.inf) * 1.001 and (limit != 1e-3 or max(norms) > 0.99e-3)
        assert limit is not None or max(norms) > 2e-3


@shows("--seed")
def check_seed(world: World) -> None:
    """Weights, heads, order and crops."""
    zero, again, one = (world.reach("--seed", seed) for seed in (0, 0, 1))
    for name in ("backbone.cls_token", "dino_head.mlp.0.weight", "label_head.weight"):
        values = [got.state.model.state_dict()[name] for got in (zero, again, one)]
        assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    batches = [first_batch(got) for got in (zero, again, one)]
    assert torch.equal(batches[0].globals, batches[1].globals) and torch.equal(batches[0].masks, batches[1].masks)
    assert batches[0].indices == batches[1].indices != batches[2].indices


# ------------------------------------------------------------------------------------------------------------ machine

@shows("--device")
def check_device(world: World) -> None:
    """Where the model is; what the machine lacks is refused."""
    assert next(world.reach("--device", "cpu").state.model.parameters()).device.type == "cpu"
    assert "--device quantum" in world.refused("--device", "quantum")
    world.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no cuda" in world.refused("--device", "cuda")


@shows("--amp_dtype")
def check_precision(world: World) -> None:
    """The format in which the layers compute, of the student and of the teacher."""
    for words, wanted in (([], torch.float32), (["--amp_dtype", "bf16"], torch.bfloat16)):
        got, found = world.reach(*words, epochs="1"), [set(), set()]
        got.options = dataclasses.replace(got.options, track=None)  # pictures are made in float32
        for model, seen in zip((got.state.model, got.state.ema.module), found, strict=True):
            model.backbone.blocks[0].mlp.fc1.register_forward_hook(lambda *call, seen=seen: seen.add(call[2].dtype))
        world.fit(got)
        assert found == [{wanted}, {wanted}]


@shows("--compile")
def check_compile(world: World) -> None:
    """The student goes through torch.compile."""
    compiled = []
    world.monkeypatch.setattr(trainer.torch, "compile", lambda model: (compiled.append(model), model)[1])
    for words, wanted in (([], 0), (["--compile"], 1)):
        compiled.clear()
        got = world.reach(*words, epochs="1")
        world.fit(got)
        assert compiled == [got.state.model] * wanted


@shows("--grad_checkpointing")
def check_grad_checkpointing(world: World) -> None:
    """Blocks of the student are computed again; the same loss."""
    losses = []
    for words, wanted in (([], 0), (["--grad_checkpointing"], 4)):  # large and small crops of two updates
        got = world.reach(*words, epochs="1")
        with pytest.MonkeyPatch.context() as patch:
            calls = recorded(patch, dino, "checkpoint_seq")
            world.fit(got)
        assert len(calls) == wanted
        losses.append(got.state.history[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@shows("--num_workers", "--pin_mem", "--no_pin_mem")
def check_loader(world: World) -> None:
    """Processes that decode, the same batches; page-locked ones are asked for, for a GPU."""
    assert [world.reach(num_workers=n).loader.num_workers for n in ("0", "3")] == [0, 3]
    calls = recorded(world.monkeypatch, pretraining, "build_pretraining_loader")
    for words, wanted in (([], True), (["--no_pin_mem"], False), (["--no_pin_mem", "--pin_mem"], True)):
        world.reach(*words)
        assert calls[-1][1]["pin_memory"] == wanted


# ------------------------------------------------------------------------------------------------------------- output

@shows("--output_dir")
def check_output(world: World) -> None:
    """Everything is there."""
    folder = world.tested("--output_dir", world.folder / "a" / "b")
    assert folder == world.folder / "a" / "b"
    assert {"results.json", "args.yaml", "env.json", "teacher", "prototypes.safetensors"} <= {
        path.name for path in folder.iterdir()}
    assert json.loads((folder / "results.json").read_text())["teacher"] == str(folder / "teacher")


@shows("--overwrite")
def check_overwrite(world: World) -> None:
    """Another run in the folder is refused, naming what differs, or moved away."""
    there = ["--output_dir", world.folder / "run"]
    world.tested(*there)
    assert "min_lr: 1e-06 there, 0.1 now" in world.refused(*there, "--min_lr", 0.1)
    world.reach(*there, "--min_lr", 0.1, "--overwrite")
    assert (world.folder / "run" / "previous" / "results.json").exists()


@shows("--auto_resume", "--no_auto_resume")
def check_auto_resume(world: World) -> None:
    """An unfinished run goes on, unless it must not."""
    there = ["--output_dir", world.folder / "run"]
    world.fit(world.reach(*there))
    assert "unfinished" in world.refused(*there, "--no_auto_resume")
    for words in ([], ["--no_auto_resume", "--auto_resume"]):
        got = world.reach(*there, *words)
        got.step = None  # nothing is left to do
        world.fit(got)
        assert got.state.update == 4


@shows("--resume")
def check_resume(world: World) -> None:
    """From a checkpoint in another folder: the rest alone, to the same end."""
    whole = world.reach()
    world.fit(whole)
    paused = world.reach("--max_updates", 2)
    world.fit(paused)
    got = world.reach("--resume", paused.run.path / "checkpoint-last.pth")
    passes, step = [], got.step
    got.step = lambda *given: (passes.append(1), step(*given))[1]
    world.fit(got)
    assert len(passes) == 2 and got.state.update == 4
    assert all(torch.equal(value, got.state.model.state_dict()[key])
               for key, value in whole.state.model.state_dict().items())


@shows("--save_ckpt", "--no_save_ckpt", "--save_ckpt_freq", "--save_every_steps")
def check_save(world: World) -> None:
    """Which epochs are kept, when the last state is written; without any it is refused."""
    assert "--no_save_ckpt is not for pretraining" in world.refused("--no_save_ckpt")
    world.reach("--no_save_ckpt", "--save_ckpt")
    written: list[int] = []
    save = Checkpoints.save_last
    world.monkeypatch.setattr(Checkpoints, "save_last", lambda files, state: (written.append(state.update),
                                                                              save(files, state))[1])
    for words, kept, saved in (([], [], [2, 4]), (["--save_ckpt_freq", 1], [1, 2], [2, 4]),
                               (["--save_ckpt_freq", 2], [2], [2, 4]), (["--save_every_steps", 1], [], [1, 2, 3, 4])):
        written.clear()
        got = world.reach(*words)
        world.fit(got)
        assert sorted(path.name for path in got.run.path.glob("checkpoint-[0-9]*.pth")) == [
            f"checkpoint-{epoch}.pth" for epoch in kept]
        assert sorted(set(written)) == saved


@shows("--wandb", "--wandb_project", "--exp_name")
def check_wandb(world: World) -> None:
    """What the package is asked for, and the numbers; nothing without --wandb; a message where it is absent."""
    asked, logged = [], []
    run = SimpleNamespace(log=lambda entry, step: logged.append((step, entry["train_loss"])), finish=lambda: None)
    world.monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: (asked.append(how), run)[1]))
    words = ["--wandb_project", "skin", "--exp_name", "first"]
    named = world.tested(*words)
    assert not asked
    usual = world.tested("--wandb")
    world.tested("--wandb", *words)
    assert [(how["project"], how["name"]) for how in asked] == [("pretraining", None), ("skin", "first")]
    marks = {json.loads((folder / "results.json").read_text())["fingerprint"] for folder in (named, usual)}
    assert logged == [(3, 1.5)] * 2 and {mark[:16] for mark in marks} == {asked[0]["id"]}
    world.monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in world.refused("--wandb")


@shows("--log_dir")
def check_tensorboard(world: World) -> None:
    """Event files in that folder."""
    pytest.importorskip("torch.utils.tensorboard")
    for words, there in (([], False), (["--log_dir", world.folder / "events"], True)):
        world.tested(*words)
        assert bool(list((world.folder / "events").glob("events.out.tfevents.*"))) == there


# -------------------------------------------------------------------------------------------------------------- tests

@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any, one_thread: None) -> World:
    """Without pictures, which take longer than all else."""
    for name in ("plot_pretraining", "draw_crops", "draw_patch_pca"):
        monkeypatch.setattr(pretraining_results, name, lambda *given, **named: None)
    caplog.set_level(logging.INFO)
    return World(tmp_path, monkeypatch, capsys, caplog)


def test_every_option_has_a_check() -> None:
    """And every check an option."""
    flags = {flag for action in pretraining_parser()._actions for flag in action.option_strings}
    assert flags - {"-h", "--help", "-c", "--config"} == set(CHECKS)


@pytest.mark.parametrize("check", dict.fromkeys(CHECKS.values()), ids=lambda check: check.__name__[6:])
def test_options(check: Callable[[World], None], world: World) -> None:
    """What the options change."""
    check(world)


SAME_RUN = {"--max_updates": 3, "--save_every_steps": 5, "--save_ckpt_freq": 2, "--grad_checkpointing": None,
            "--num_workers": 1, "--no_pin_mem": None, "--exp_name": "x", "--wandb_project": "y"}
OTHER_RUN = {"--epochs": 3, "--batch_size": 3, "--update_freq": 2, "--seed": 1, "--base_lr": 0.5, "--drop_path": 0.3,
             "--prototypes": "orthogonal", "--no_label_ancestors": None, "--dinov2_compat": None, "--epoch_length": 2,
             "--koleo_loss_weight": 0.2, "--mask_ratio_min_max": "0.2 0.3", "--prototype_mode": "trainable",
             "--clip_grad": 1, "--label_temperature": 0.1, "--label_bias": "zero"}


def test_what_makes_it_another_run(world: World) -> None:
    """What cannot change the numbers leaves the run the same one; what can is named by the refusal."""
    def words(flag: str, value: Any) -> list[str]:
        return [flag] + ([] if value is None else str(value).split())

    usual = world.reach().run.fingerprint
    same = [word for flag, value in SAME_RUN.items() for word in words(flag, value)]
    assert world.reach(*same).run.fingerprint == usual
    marks = [world.reach(*words(flag, value)).run.fingerprint for flag, value in OTHER_RUN.items()]
    assert len({usual, *marks}) == len(OTHER_RUN) + 1


def test_args_yaml_is_the_same_run(world: World) -> None:
    """Every option comes back from the run's args.yaml as it was given, and makes the same run."""
    words = ("--mask_ratio_min_max", 0.2, 0.4, "--clip_grad", 0, "--no_label_ancestors", "--dinov2_compat",
             "--label_temperature", 0.3, "--eval_csv", world.eval_csv, "--no_pin_mem", "--forbid_overlap",
             write_csv(world.eval_csv.with_name("test.csv"), image=["eval/val_0.png"]))
    argv = world.argv(words, {})
    world.monkeypatch.setattr(world, "argv", lambda words, options: [str(word) for word in words])
    first = world.reach(*argv)
    file = ["-c", str(first.run.path / "args.yaml")]
    given, back = (vars(parse(pretraining_parser(), one)) for one in (argv, file))
    assert {**back, "config": None} == given
    again = world.reach(*file, "--output_dir", world.folder / "again")
    assert again.run.fingerprint == first.run.fingerprint and again.options.clip is None
