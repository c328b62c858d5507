"""The fine-tuning step and evaluation: losses by other libraries, the published trajectory, metrics and views."""

import json

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from furnace.data.datasets import Batch
from furnace.data.manifest import read_manifest
from furnace.engine_for_finetuning import classification_loss, make_step
from furnace.models.tuning import no_weight_decay
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.optim import create_optimizer, layer_decay_groups
from furnace.runtime.train_state import TrainState
from furnace.runtime.trainer import FitOptions, fit
from helpers import GOLDEN, golden_state, make_ckpt, small_set

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """9 images of 3 classes for train, 3 for val, 6 for test."""
    csv = small_set(tmp_path_factory.mktemp("small"), per_split={"train": 3, "val": 1, "test": 2})
    return read_manifest(csv, nb_classes=3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_timms(smoothing: float) -> None:
    """Sums over the batch: classes, and the soft targets of mixup."""
    logits, classes = torch.randn(6, 5), torch.tensor([0, 1, 4, 4, 2, 3])
    soft = torch.softmax(torch.randn(6, 5), dim=1)
    assert float(classification_loss(logits, classes, smoothing=smoothing)) == pytest.approx(
        6 * float(LabelSmoothingCrossEntropy(smoothing)(logits, classes)), rel=1e-5)
    assert float(classification_loss(logits, soft, smoothing=smoothing)) == pytest.approx(
        6 * float(SoftTargetCrossEntropy()(logits, soft)), rel=1e-5)


def test_loss_of_several_labels() -> None:
    """Binary cross-entropy: mean over classes, sum over images, targets smoothed towards one half."""
    logits, targets = torch.randn(4, 3), torch.tensor([[1., 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    found = float(classification_loss(logits, targets, smoothing=0.2, multilabel=True))
    p, smooth = torch.sigmoid(logits), targets * 0.8 + 0.1
    wanted = -(smooth * p.log() + (1 - smooth) * (1 - p).log()).mean(dim=1).sum()
    assert found == pytest.approx(float(wanted), rel=1e-5)


def test_loss_in_float32_under_bf16() -> None:
    """Logits of a bf16 forward pass are not summed in bf16."""
    logits, classes = torch.randn(256, 7).bfloat16(), torch.zeros(256, dtype=torch.long)
    assert classification_loss(logits, classes).dtype == torch.float32


class Recorder(nn.Module):
    """Keeps what it is given; logits are the channel means."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.detach().clone())
        return self.scale * images.mean(dim=(2, 3))


def test_a_step_finds_its_targets_by_place(small) -> None:
    """Batches name their images by place in the manifest; sum, weight."""
    images = torch.rand(4, 3, 8, 8)
    loss, weight, logs = make_step(small.split("train"), device=CPU)(
        Recorder(), Batch(images, [8, 0, 3, 3], []), {})
    labels = torch.from_numpy(small.split("train").labels[[8, 0, 3, 3]])
    wanted = nn.functional.cross_entropy(images.mean(dim=(2, 3)), labels, reduction="sum")
    assert (float(loss.detach()), weight, logs) == (pytest.approx(float(wanted), rel=1e-6), 4, {})


def test_mixup_and_erasing_reach_the_model(small) -> None:
    """Mixup's pictures and targets; erasing leaves the first half alone with two splits."""
    images, indices = torch.rand(4, 3, 8, 8), [0, 3, 6, 1]
    model = Recorder()
    torch.manual_seed(0)
    np.random.seed(0)
    mixup = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=3)
    loss = make_step(small.split("train"), device=CPU, smoothing=0.1, mixup=mixup)(
        model, Batch(images.clone(), indices, []), {})[0]
    np.random.seed(0)
    mixed, targets = mixup(images.clone(), torch.from_numpy(small.split("train").labels[indices]))
    assert torch.equal(model.seen[0], mixed) and not torch.equal(mixed, images)
    wanted = 4 * float(SoftTargetCrossEntropy()(mixed.mean(dim=(2, 3)), targets))
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    erasing = RandomErasing(1.0, mode="const", num_splits=2, device="cpu")
    make_step(small.split("train"), device=CPU, erasing=erasing)(model, Batch(images.clone(), indices, []), {})
    changed = [not torch.equal(a, b) for a, b in zip(model.seen[1], images, strict=True)]
    assert changed == [False, False, True, True]


def test_the_published_trajectory() -> None:
    """Three AdamW steps of PanDerm_Base_FT by the product's loop: losses, norms, logits, weights."""
    golden = json.loads((GOLDEN / "train_steps.json").read_text())
    state = {key: value for key, value in golden_state("keys_ft_base.json").items()
             if not key.endswith("relative_position_index") and not key.startswith("head.")}
    model = timm.create_model("PanDerm_Base_FT", num_classes=6)
    assert model.load_state_dict(state, strict=False).missing_keys == ["head.weight", "head.bias"]
    with torch.no_grad():
        for key, shape in (("weight", (6, 768)), ("bias", (6,))):
            getattr(model.head, key).copy_(torch.from_numpy(make_ckpt.fill(f"head.{key}", shape)))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.from_numpy(np.load(GOLDEN / "input_randn_2x3x224x224.npy"))

    class Loader:
        class sampler:  # noqa: N801
            @staticmethod
            def set_position(epoch: int, update: int) -> None:
                """Always the same batch."""

        def __iter__(self):
            return iter([Batch(images, [0, 1], [])] * 3)

    class Set:
        targets, multilabel = np.array([1, 4]), False

    groups = layer_decay_groups(model, layer_decay=0.65,
                                no_weight_decay=no_weight_decay(model, relative_positions=False))
    trained, losses = TrainState(model, create_optimizer(groups)), []
    step = make_step(Set, device=CPU, smoothing=0.1)

    def recorded(runner, batch, values):
        loss, weight, logs = step(runner, batch, values)
        losses.append(float(loss.detach()) / weight)
        return loss, weight, logs

    fit(trained, recorded, None, Loader(), BatchPlan(2, 1, 1, 3), {
        "lr": np.array([1e-4, 3e-4, 5e-4]), "weight_decay": np.full(3, 0.05)}, options=FitOptions(
            epochs=1, seed=0, device=CPU))
    assert losses == pytest.approx([entry["loss"] for entry in golden["steps"]], rel=1e-5)
    assert trained.history[0]["train_grad_norm"] == pytest.approx(
        np.mean([entry["grad_norm"] for entry in golden["steps"]]), rel=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(model.eval()(images).numpy(), golden["logits_after"], atol=1e-4)
    for key, wanted in golden["delta"].items():
        moved = float((model.state_dict()[key] - start[key]).norm())
        assert moved == pytest.approx(wanted, rel=1e-5), key
