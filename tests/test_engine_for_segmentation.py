"""The segmentation step and evaluation: losses in closed form and by other code, a plain loop, metrics of val."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from furnace.data.joint_transforms import IGNORED, build_joint_transform
from furnace.data.masks import load_mask
from furnace.data.samplers import TrainSampler
from furnace.data.segmentation import read_segmentation
from furnace.data.segmentation_datasets import SegmentationBatch, SegmentationDataset, build_segmentation_loader
from furnace.engine_for_segmentation import MONITORS, make_evaluate, make_step, segmentation_loss
from furnace.evaluation.lesion_masks import Masking, lesion_masks
from furnace.evaluation.segmentation_metrics import score_segmentation, segmentation_row
from furnace.evaluation.statistics import Resampling
from furnace.models.segmenter import create_segmenter
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import ProcessError, UserError
from furnace.runtime.optim import create_optimizer, layer_decay_groups
from furnace.runtime.train_state import TrainState
from furnace.runtime.trainer import FitOptions, fit
from helpers import write_csv
from tiny_segmentation import MODEL, disc_set

CPU = torch.device("cpu")
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SIDE = 32
HOW = Masking(transform="dermino", **HALF, device=CPU, num_workers=0)
LN2 = 0.693147180559945

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory):
    """12 train, 5 val and 2 test images."""
    return read_segmentation(disc_set(tmp_path_factory.mktemp("discs") / "d", train=12, val=5, test=2))


def tiny(**options) -> nn.Module:
    return create_segmenter(MODEL, "random", input_size=SIDE, channels=8, seed=0, **options)


# ----------------------------------------------------------------------------------------------------------- the loss

def noise(batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and masks with some pixels without truth."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, 2, 6, 5, generator=generator)
    masks = torch.randint(0, 2, (batch, 6, 5), generator=generator)
    masks[torch.rand(batch, 6, 5, generator=generator) < 0.3] = IGNORED
    return logits, masks


@pytest.mark.parametrize("ignored", [0, 1, 11])
def test_equal_logits_cost_ln_2(ignored: int) -> None:
    """0.693147 an image, whatever they are, whatever part of it is without truth."""
    masks = torch.zeros(4, 3, 4, dtype=torch.int64)
    masks[:, 1] = 1
    masks.view(4, -1)[:, :ignored] = IGNORED
    loss = segmentation_loss(torch.full((4, 2, 3, 4), 1.7), masks, dice_weight=0)
    assert float(loss) == pytest.approx(4 * LN2, abs=1e-6)


def test_dice_term_by_hand() -> None:
    """p = 0.5 on 12 known pixels, 5 of them lesion: 1 - (2 * 2.5 + 1) / (6 + 5 + 1) = 1/2."""
    masks = torch.full((1, 4, 4), IGNORED)
    masks[0, :3], masks[0, 0], masks[0, 1, 0] = 0, 1, 1
    logits = torch.zeros(1, 2, 4, 4)
    assert float(segmentation_loss(logits, masks, dice_weight=1)) == pytest.approx(LN2 + 0.5, abs=1e-6)
    assert float(segmentation_loss(logits, masks, dice_weight=0.3)) == pytest.approx(LN2 + 0.15, abs=1e-6)
    assert float(segmentation_loss(logits, masks)) == pytest.approx(LN2 + 0.5, abs=1e-6), "weight 1 unless told"


def test_a_perfect_and_an_opposite_map() -> None:
    """0, and the distance of the logits plus 1 - 1 / (p + t + 1)."""
    masks = torch.zeros(1, 4, 5, dtype=torch.int64)
    masks[0, :2] = 1  # 10 of 20
    logits = 40.0 * torch.stack([1 - masks[0], masks[0]])[None].float()
    assert float(segmentation_loss(logits, masks)) == pytest.approx(0, abs=1e-6)
    assert float(segmentation_loss(logits.flip(1), masks)) == pytest.approx(40 + 1 - 1 / 21, abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_loss_written_out(weight: float) -> None:
    """Pixel by pixel in float64."""
    logits, masks = noise()
    wanted = 0.0
    for image, mask in zip(logits.double().numpy(), masks.numpy(), strict=True):
        entropy, overlap, area, known = 0.0, 0.0, 0.0, 0
        for place in np.argwhere(mask != IGNORED):
            background, lesion = np.exp(image[:, place[0], place[1]])
            p, t = lesion / (background + lesion), mask[tuple(place)]
            entropy -= math.log(p if t else 1 - p)
            overlap, area, known = overlap + p * t, area + p + t, known + 1
        wanted += entropy / known + weight * (1 - (2 * overlap + 1) / (area + 1))
    assert float(segmentation_loss(logits, masks, dice_weight=weight)) == pytest.approx(wanted, rel=1e-6)


def test_without_ignored_pixels_it_is_the_published_cross_entropy() -> None:
    """Mean over the pixels of a batch, times its images."""
    logits, masks = noise()
    masks = masks.clamp(max=1)
    wanted = 3 * F.cross_entropy(logits, masks)
    assert float(segmentation_loss(logits, masks, dice_weight=0)) == pytest.approx(float(wanted), rel=1e-6)


def test_an_image_without_lesion() -> None:
    """Its Dice loss is 1 - 1 / (sum of p + 1): less lesion is better, with a gradient."""
    logits = torch.zeros(1, 2, 4, 5, requires_grad=True)
    masks = torch.zeros(1, 4, 5, dtype=torch.int64)
    loss = segmentation_loss(logits, masks)
    assert float(loss) == pytest.approx(LN2 + 1 - 1 / 11, abs=1e-6)
    loss.backward()
    assert (logits.grad[:, 1] > 0).all() and (logits.grad[:, 0] < 0).all()


def test_an_image_without_any_truth_costs_nothing() -> None:
    """Neither loss nor gradient, and no 0 / 0."""
    logits = noise()[0].requires_grad_()
    loss = segmentation_loss(logits, torch.full((3, 6, 5), IGNORED))
    loss.backward()
    assert float(loss) == 0 and not logits.grad.any()


def test_an_image_s_loss_does_not_depend_on_the_others() -> None:
    """The sum of each alone: an image with little truth weighs as much as any other."""
    logits, masks = noise(5)
    masks[2, 1:] = IGNORED
    alone = [float(segmentation_loss(logits[i:i + 1], masks[i:i + 1])) for i in range(5)]
    assert float(segmentation_loss(logits, masks)) == pytest.approx(sum(alone), rel=1e-6)
    assert len({round(value, 4) for value in alone}) == 5


def test_pixels_without_truth_have_no_gradient() -> None:
    logits, masks = noise()
    logits.requires_grad_()
    segmentation_loss(logits, masks).backward()
    gradient = logits.grad.abs().sum(dim=1)
    assert (gradient[masks == IGNORED] == 0).all() and (gradient[masks != IGNORED] > 0).all()


def test_loss_in_float32_under_bf16() -> None:
    """Logits of a bf16 forward pass are not summed in bf16, also under autocast."""
    logits, masks = noise()
    wanted = segmentation_loss(logits.bfloat16().float(), masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = segmentation_loss(logits.bfloat16(), masks)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(float(wanted), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- the step

class Pixels(nn.Module):
    """A linear function of each pixel's colours, without statistics of a batch; keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 2, 1), []
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[0.3, -0.2, 0.1], [-0.4, 0.2, 0.5]])[..., None, None])
            self.conv.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return self.conv(images)


def batch_of(images: int, seed: int = 0) -> SegmentationBatch:
    generator = torch.Generator().manual_seed(seed)
    return SegmentationBatch(images=torch.randn(images, 3, 6, 5, generator=generator), masks=noise(images, seed)[1],
                             indices=list(range(images)), broken=[])


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_a_step_gives_the_sum_and_the_number_of_images(discs, weight: float) -> None:
    model, batch = Pixels(), batch_of(3)
    loss, count, logs = make_step(discs.split("train"), device=CPU, dice_weight=weight)(model, batch, {"lr": 1.0})
    wanted = segmentation_loss(model.conv(batch.images), batch.masks, dice_weight=weight)
    assert torch.equal(loss, wanted) and count == 3 and logs == {} and loss.requires_grad
    (seen,) = model.seen
    assert torch.equal(seen, batch.images) and seen.is_contiguous(memory_format=torch.channels_last)


def test_a_broken_file_ends_the_step(tmp_path: Path) -> None:
    """Named with its reason, before the model is called."""
    manifest = read_segmentation(disc_set(tmp_path / "d", train=4)).split("train")
    for i in (1, 2):
        path = tmp_path / "d" / "images" / f"train_{i}.png"
        path.write_bytes(path.read_bytes()[:500])
    transform = build_joint_transform("dermino", size=SIDE, **HALF)
    sampler = TrainSampler(4, plan=(plan := BatchPlan(4, 1, 1, 1)), seed=0)
    (batch,) = build_segmentation_loader(manifest, transform, sampler, plan=plan, seed=0, num_workers=0)
    model = Pixels()
    with pytest.raises(ProcessError, match=r"(?s)2 images cannot be decoded.*train_1\.png.*train_2\.png"):
        make_step(manifest, device=CPU, dice_weight=0)(model, batch, {})
    assert not model.seen


# ------------------------------------------------------------------------------------------------------- with the loop

class Batches:
    """A loader of given batches."""

    def __init__(self, batches: list[SegmentationBatch]) -> None:
        self.batches, self.sampler = batches, self

    def set_position(self, epoch: int, update: int) -> None:
        """The same every epoch."""

    def __iter__(self):
        return iter(self.batches)


def fitted(model: nn.Module, loader, plan: BatchPlan, manifest, *, lr: float = 1e-2, dice_weight: float = 1.0,
           epochs: int = 1, eps: float | None = None) -> TrainState:
    """AdamW with weight decay 0.05 on everything, as PanDerm's."""
    groups = [{**group, "weight_decay_scale": 1.0} for group in layer_decay_groups(model, layer_decay=1.0)]
    state, updates = TrainState(model, create_optimizer(groups, eps=eps)), epochs * plan.steps_per_epoch
    fit(state, make_step(manifest, device=CPU, dice_weight=dice_weight), None, loader, plan,
        {"lr": np.full(updates, lr), "weight_decay": np.full(updates, 0.05)},
        options=FitOptions(epochs=epochs, seed=0, device=CPU))
    return state


def test_three_updates_equal_a_plain_loop_and_reduce_the_loss(discs) -> None:
    """Forward, mean cross-entropy, backward, AdamW of PyTorch: the weights are the same, batch statistics too.

    A large eps: Adam would divide rounding errors by themselves.
    """
    train, plan = discs.split("train"), BatchPlan(micro=4, accumulation=1, world_size=1, steps_per_epoch=3)
    transform = build_joint_transform("dermino", size=SIDE, **HALF)
    sampler = TrainSampler(len(train), plan=plan, seed=1)
    model, plain = tiny(), tiny()
    state = fitted(model, build_segmentation_loader(train, transform, sampler, plan=plan, seed=1, num_workers=0), plan,
                   train, lr=5e-3, dice_weight=0, epochs=2, eps=1e-2)
    dataset, losses = SegmentationDataset(train, transform), []
    optimizer = torch.optim.AdamW(plain.train().parameters(), lr=5e-3, weight_decay=0.05, eps=1e-2)
    for epoch in range(2):
        order = sampler.epoch_indices(epoch)
        for start in (0, 4, 8):
            images, masks, _ = zip(*(dataset[int(i)] for i in order[start:start + 4]), strict=True)
            loss = F.cross_entropy(plain(torch.stack(images)), torch.stack(masks))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert [entry["train_loss"] for entry in state.history] == pytest.approx(
        [np.mean(losses[:3]), np.mean(losses[3:])], rel=1e-5)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key:
                                   f"{key}: {text}")
    start = tiny().state_dict()
    assert (model.state_dict()["backbone.blocks.0.attn.qkv.weight"] - start["backbone.blocks.0.attn.qkv.weight"]
            ).abs().max() > 1e-3, "the backbone is trained"
    assert losses[5] < losses[0]


def test_training_learns_the_discs(discs) -> None:
    """Twelve epochs on twelve images: loss down to 60 %, Dice of val above 0.5 (0.56 without AVX-512)."""
    train, plan = discs.split("train"), BatchPlan(micro=4, accumulation=1, world_size=1, steps_per_epoch=3)
    loader = build_segmentation_loader(train, build_joint_transform("dermino", size=SIDE, **HALF),
                                       TrainSampler(len(train), plan=plan, seed=1), plan=plan, seed=1, num_workers=0)
    model = tiny()
    before = make_evaluate(discs.split("val"), HOW)(model)["dice"]
    losses = [entry["train_loss"] for entry in fitted(model, loader, plan, train, epochs=12, lr=5e-3).history]
    assert losses[-1] < 0.6 * losses[0] and make_evaluate(discs.split("val"), HOW)(model)["dice"] > max(0.5, before)


@pytest.mark.parametrize("cut", [[2, 2], [3, 1], [1, 3]])
def test_accumulation_is_the_batch_in_one_pass(discs, cut: list[int]) -> None:
    """Also in uneven parts: the gradient is of the mean over the images of the update, not of the parts' means."""
    whole = batch_of(4)
    whole.masks[0, 1:] = IGNORED
    parts, first = [], 0
    for size in cut:
        place = slice(first, first + size)
        parts.append(SegmentationBatch(images=whole.images[place], masks=whole.masks[place],
                                       indices=whole.indices[place], broken=[]))
        first += size
    one, several = Pixels(), Pixels()
    states = [fitted(one, Batches([whole] * 3), BatchPlan(4, 1, 1, 3), discs),
              fitted(several, Batches(parts * 3), BatchPlan(2, 2, 1, 3), discs)]
    torch.testing.assert_close(one.conv.weight, several.conv.weight, rtol=1e-5, atol=1e-7)
    for name in ("train_loss", "train_grad_norm"):
        assert states[0].history[0][name] == pytest.approx(states[1].history[0][name], rel=1e-5)


# ------------------------------------------------------------------------------------------------------ the evaluation

def test_the_evaluation_is_the_score_of_the_same_masks(discs) -> None:
    """At each image's own size; every metric by which an epoch can be chosen is there, and a number."""
    val, model = discs.split("val"), tiny()
    with torch.no_grad():  # logits of val on both sides of 0
        images = torch.stack([SegmentationDataset(val, build_joint_transform("dermino", size=SIDE, **HALF))[i][0]
                              for i in range(len(val))])
        model.decode_head.conv_seg.bias[1] -= model(images).diff(dim=1).median()
    metrics = make_evaluate(val, HOW)(model)
    rows = [segmentation_row(val.filenames[i], mask, load_mask(val.mask_path_of(i)))
            for i, mask in lesion_masks(model, val, HOW)]
    scored = score_segmentation(pd.DataFrame(rows), resampling=Resampling(resamples=20))["metrics"]
    for name, value in metrics.items():
        assert value == pytest.approx(scored[name]["value"], abs=1e-12), name
    assert set(MONITORS) <= metrics.keys() and 0 < metrics["dice"] < 1
    flipped = make_evaluate(val, dataclasses.replace(HOW, flips=True))(model)
    assert flipped["pooled_dice"] != metrics["pooled_dice"], "how masks are made is respected"


def test_the_evaluation_of_all_processes_is_the_same(discs, monkeypatch) -> None:
    """What the others counted is in it, whatever the order."""
    val, model, parts = discs.split("val"), tiny(), []
    wanted = make_evaluate(val, HOW)(model)
    monkeypatch.setattr("furnace.runtime.distributed.world_size", lambda: 2)
    monkeypatch.setattr("furnace.runtime.distributed.gather_lists", lambda items: parts.append(items) or items)
    for rank in (0, 1):
        monkeypatch.setattr("furnace.runtime.distributed.rank", lambda rank=rank: rank)
        make_evaluate(val, HOW)(model)
    first, second = [part for part in parts if part]
    monkeypatch.setattr("furnace.runtime.distributed.gather_lists", lambda items: [*second, *first] if items else [])
    assert make_evaluate(val, HOW)(model) == wanted and (len(first), len(second)) == (3, 2)


def test_an_image_of_one_class_in_val(tmp_path: Path) -> None:
    """No lesion: 1 where none is found, 0 where one is; never not a number."""
    disc_set(tmp_path / "d", train=2, val=2, test=1)
    for i in (0, 1):
        path = tmp_path / "d" / "masks" / f"val_{i}.png"
        with Image.open(path) as mask:
            size = mask.size
        Image.new("L", size, 0).save(path)
    names = ["train_0", "val_0", "val_1", "test_0"]
    manifest = read_segmentation(write_csv(
        tmp_path / "d" / "m.csv", image=[f"images/{name}.png" for name in names],
        mask=[f"masks/{name}.png" for name in names], split=["train", "val", "val", "test"]))
    for bias, value in ((-1e3, 1.0), (1e3, 0.0)):
        model = tiny()
        with torch.no_grad():
            model.decode_head.conv_seg.bias[1] = bias
        metrics = make_evaluate(manifest.split("val"), HOW)(model)
        assert metrics == {name: value for name in metrics}


def test_a_diverged_model_is_told(discs) -> None:
    """Which image it met, and what to do about it."""
    model = tiny()
    with torch.no_grad():
        model.decode_head.conv_seg.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"diverged: the logits of images/val_0\.png.* are not finite in fp32\. Take a "
                                        r"lower --lr.*--overwrite"):
        make_evaluate(discs.split("val"), HOW)(model)


def test_the_name_of_a_diverged_image_is_told_whole(tmp_path: Path) -> None:
    """A name with brackets, as a browser gives to a second download."""
    disc_set(tmp_path / "d", train=1, val=1, test=1)
    (tmp_path / "d" / "images" / "val_0.png").rename(tmp_path / "d" / "images" / "val (1).png")
    manifest = read_segmentation(write_csv(
        tmp_path / "d" / "m.csv", image=["images/train_0.png", "images/val (1).png", "images/test_0.png"],
        mask=["masks/train_0.png", "masks/val_0.png", "masks/test_0.png"], split=["train", "val", "test"]))
    model = tiny()
    with torch.no_grad():
        model.decode_head.conv_seg.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"the logits of images/val \(1\)\.png are not finite in fp32\. Take"):
        make_evaluate(manifest.split("val"), HOW)(model)
