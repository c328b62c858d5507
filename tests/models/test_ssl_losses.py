"""Losses of hybrid pretraining: published numbers, closed forms, slow versions, one process against two."""

import copy
import math
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from furnace.models.ssl_losses import (
    assignment_entropies,
    dino_loss,
    feature_rank,
    ibot_loss,
    koleo_loss,
    mask_weights,
    masked_bce,
    sinkhorn,
    weighted_sum,
)
from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan
from toy_training import ToySampler, toy_fit

LN2 = math.log(2)
TABLE = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)  # nobody asks source 2


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(actual: torch.Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=tolerance)


# ----------------------------------------------------------------------------------------------------------- Sinkhorn

def exp_sinkhorn(logits: torch.Tensor, temperature: float, iterations: int) -> torch.Tensor:
    """The textbook: float64, exponentials, divisions."""
    q = (logits.double() / temperature).exp()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True)
    return q


def test_sinkhorn_golden() -> None:
    """I3; and the temperature divides."""
    logits = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [0, 0, 0, 0]])
    first = [0.026574, 0.118248, 0.321431, 0.533748]
    for temperature in (1.0, 0.04):
        q = sinkhorn(logits * temperature, temperature=temperature)
        near(q, [first, first[::-1], [0.189610, 0.310390, 0.310390, 0.189610]])
        near(q.sum(dim=0), [0.749932, 0.750068, 0.750068, 0.749932])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(2, 12), st.floats(0.03, 2), st.integers(1, 6), st.integers(0, 99))
def test_sinkhorn_is_the_exponential_one(n: int, k: int, temperature: float, iterations: int, seed: int) -> None:
    """I1, I4: rows sum to 1, nothing negative, the textbook's values, no change by a constant."""
    logits = normal(n, k, seed=seed)
    q = sinkhorn(logits, temperature=temperature, iterations=iterations)
    near(q.sum(dim=1), torch.ones(n), 1e-5)
    assert q.dtype == torch.float32 and not q.requires_grad and float(q.min()) >= 0
    near(q.double(), exp_sinkhorn(logits, temperature, iterations), 2e-5)
    near(sinkhorn(logits + 3, temperature=temperature, iterations=iterations), q, 2e-4)


def test_sinkhorn_uses_all_prototypes_alike() -> None:
    """I2: near B / K after three iterations, equal to it after many."""
    logits = normal(16, 64, scale=0.1)
    after = {n: sinkhorn(logits, temperature=0.07, iterations=n).sum(dim=0) for n in (1, 3, 100)}
    assert (after[100] - 0.25).abs().max() < 1e-4 < (after[3] - 0.25).abs().max() < 0.2
    assert (after[3] - 0.25).abs().max() < (after[1] - 0.25).abs().max()
    near(sinkhorn(normal(3, 4096), temperature=0.07).sum(dim=1), torch.ones(3), 1e-5)


@pytest.mark.parametrize("scale,temperature", [(50.0, 0.04), (1e4, 1e-6), (1e-6, 1e3)])
def test_sinkhorn_is_finite(scale: float, temperature: float) -> None:
    """I4: where exponentials overflow, also of half precision, also with a prototype that nobody is near."""
    logits = normal(8, 6, scale=scale)
    logits[:, 2] -= 10 * scale
    if scale > 1:
        assert not exp_sinkhorn(logits, temperature, 3).isfinite().all()
    for given_logits in (logits, logits.bfloat16()):
        q = sinkhorn(given_logits, temperature=temperature)
        assert q.isfinite().all()
        near(q.sum(dim=1), torch.ones(8), 1e-5)


def test_sinkhorn_without_samples_and_refusals() -> None:
    """No masked token gives no row."""
    assert sinkhorn(torch.zeros(0, 4), temperature=0.1).shape == (0, 4)
    for wrong in ({"temperature": 0.0}, {"temperature": math.nan}, {"temperature": 1.0, "iterations": 0}):
        with pytest.raises(ValueError, match="temperature above 0"):
            sinkhorn(torch.zeros(2, 2), **wrong)
    with pytest.raises(ValueError, match="flatten the views"):
        sinkhorn(torch.zeros(2, 2, 2), temperature=1.0)


# --------------------------------------------------------------------------------------------------------------- DINO

def test_dino_golden() -> None:
    """I6."""
    uniform = torch.full((2, 5, 4), 0.25)
    student = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(10, 5, 4)
    near(dino_loss(student, uniform), 1.940190)
    near(dino_loss(student, uniform, temperature=0.2), float(-(student[0, 0] / 0.2).log_softmax(0).mean()))
    near(dino_loss(torch.zeros(10, 5, 4), uniform), math.log(4))


@pytest.mark.parametrize("n_local", [0, 1, 8])
def test_dino_is_the_mean_over_pairs(n_local: int) -> None:
    """Every pair but those of a view with itself; 18 with 8 local views."""
    student, teacher = normal(2 + n_local, 3, 7), normal(2, 3, 7, seed=1).softmax(dim=-1)
    pairs = []
    for t in range(2):
        for s in range(2 + n_local):
            if s != t:
                log_p = (student[s] / 0.1).log_softmax(dim=-1)
                pairs.append(float(sum(-(teacher[t, b] * log_p[b]).sum() for b in range(3)) / 3))
    assert len(pairs) == 2 + 2 * n_local
    near(dino_loss(student, teacher), sum(pairs) / len(pairs), 1e-5)


def test_dino_excludes_the_same_view() -> None:
    """What the teacher says of view 1 does not move the student's view 1."""
    student = normal(2, 3, 4).requires_grad_()
    one, other = normal(2, 3, 4, seed=1).softmax(dim=-1), normal(2, 3, 4, seed=2).softmax(dim=-1)
    gradients = [torch.autograd.grad(dino_loss(student, torch.stack([first, one[1]])), student)[0]
                 for first in (one[0], other[0])]
    assert torch.equal(gradients[0][0], gradients[1][0]) and not torch.equal(gradients[0][1], gradients[1][1])


@pytest.mark.parametrize("student,teacher", [((1, 3, 4), (2, 3, 4)), ((4, 3, 4), (4, 3, 4)), ((4, 3, 4), (2, 2, 4))])
def test_dino_refuses_other_shapes(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    """Broadcasting would make a number of them."""
    with pytest.raises(ValueError, match="two global views first"):
        dino_loss(torch.zeros(student), torch.zeros(teacher))


# --------------------------------------------------------------------------------------------------------------- iBOT

def test_mask_weights() -> None:
    """I19: they sum to 1 in each masked crop, in the order of the tokens."""
    masks = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 1, 1]], dtype=torch.bool)
    weights = mask_weights(masks)
    assert weights.dtype == torch.float32
    near(weights, [1 / 3] * 3 + [1] + [1 / 4] * 4)
    near(torch.zeros(4).index_add(0, masks.nonzero()[:, 0], weights), [1.0, 0, 1, 1])


def test_ibot_golden() -> None:
    """I7: one of two crops masked; padding changes nothing, whatever its target."""
    masks = torch.tensor([[True, False, True], [False, False, False]])
    student, teacher, weights = torch.zeros(2, 4), torch.full((2, 4), 0.25), mask_weights(masks)
    near(ibot_loss(student, teacher, weights, crops=2), math.log(4) / 2)
    padded = [torch.cat([x, normal(3, *x.shape[1:])]) for x in (student, teacher)]
    near(ibot_loss(*padded, F.pad(weights, (0, 3)), crops=2), math.log(4) / 2)


def test_ibot_is_the_mean_over_crops() -> None:
    """A slow version; only masked tokens get a gradient, padding none."""
    masks = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    tokens = normal(3, 5, 6).requires_grad_()
    teacher = normal(3, 5, 6, seed=1).softmax(dim=-1)
    slow = 0.0
    for crop in range(3):
        entropies = [float(-(teacher[crop, t] * (tokens.detach()[crop, t] / 0.2).log_softmax(0)).sum())
                     for t in range(5) if masks[crop, t]]
        slow += sum(entropies) / max(len(entropies), 1) / 3
    padding = normal(2, 6).requires_grad_()
    loss = ibot_loss(torch.cat([tokens[masks], padding]), torch.cat([teacher[masks], teacher[0, :2]]),
                     F.pad(mask_weights(masks), (0, 2)), crops=3, temperature=0.2)
    near(loss, slow, 1e-5)
    loss.backward()
    assert torch.equal(tokens.grad.abs().sum(dim=-1) > 0, masks) and not padding.grad.any()


def test_ibot_without_masks() -> None:
    """0 and a gradient of 0, which DDP waits for."""
    tokens, masks = normal(2, 3, 4).requires_grad_(), torch.zeros(2, 3, dtype=torch.bool)
    loss = ibot_loss(tokens[masks], torch.zeros(0, 4), mask_weights(masks), crops=2)
    loss.backward()
    assert float(loss.detach()) == 0 and tokens.grad is not None and not tokens.grad.any()


# -------------------------------------------------------------------------------------------------------------- KoLeo

ANGLES = torch.arange(3) * 2 * math.pi / 3


@pytest.mark.parametrize("points,expected", [
    (torch.eye(5), -math.log(2) / 2), (torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), -0.346574),
    (torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1), -0.549306), (torch.tensor([[1.0, 0], [-1, 0]]), -LN2),
    (torch.tensor([[0.6, 0.8], [0.6, 0.8]]), 17.5393), (torch.ones(3, 768), 15.0633), (torch.ones(1, 4), 0.0),
    (torch.ones(0, 4), 0.0)], ids=["orthonormal", "square", "triangle", "antipodal", "equal", "equal 768", "one", "no"])
def test_koleo_goldens(points: torch.Tensor, expected: float) -> None:
    """I8, with any length of the rows; gradients are finite everywhere, and 0 between equal rows."""
    for lengths in (torch.ones(len(points), 1), 2.0 ** torch.arange(len(points))[:, None]):
        x = (points * lengths).requires_grad_()
        loss = koleo_loss(x)
        near(loss, expected, 1e-5)
        loss.backward()
        assert x.grad.isfinite().all() and (expected <= 0 or not x.grad.any())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(2, 6), st.integers(0, 999))
def test_koleo_is_the_slow_one(n: int, d: int, seed: int) -> None:
    """Nearest by cosine among the others; distance of the vectors. The gradient goes through both."""
    x = normal(n, d, seed=seed).requires_grad_()
    unit, logs = F.normalize(x.double(), dim=1), []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        j = max(others, key=lambda j: float((unit[i] * unit[j]).sum().detach()))
        logs.append(-(unit[i] - unit[j]).square().sum().sqrt().log())
    slow, loss = sum(logs) / n, koleo_loss(x)
    near(loss.double(), slow.detach(), 2e-4)
    expected, = torch.autograd.grad(slow, x)
    near(torch.autograd.grad(loss, x)[0], expected, 2e-3 * max(1, float(expected.abs().max())))


def test_koleo_pushes_near_pairs_apart() -> None:
    """Equal rows among others have no gradient of their own, and near ones, 1e-5 apart, the right one."""
    x = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1e-5]], requires_grad=True)
    koleo_loss(x).backward()
    assert not x.grad[:2].any()
    near(x.grad[2:, 2] * 1e-5, [0.5, -0.5], 1e-2)  # of -(2 ln |a - b|) / 4


@pytest.mark.parametrize("amp", [False, True])
def test_koleo_finds_the_nearest_of_near_ones(amp: bool) -> None:
    """Angles whose cosines are all 1 in float32, let alone in bf16."""
    angles = torch.tensor([3e-4, 0, 1e-4, 2.0])
    distances = [2e-4, 1e-4, 1e-4, 2 * math.sin((2 - 3e-4) / 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        loss = koleo_loss(torch.stack([angles.cos(), angles.sin()], dim=1))
    near(loss, -sum(map(math.log, distances)) / 4, 1e-3)


# ------------------------------------------------------------------------------------------------------------- labels

def test_masked_bce_goldens() -> None:
    """I9."""
    logits = torch.tensor([[2.0, -1, 0, 9, 9, 9]], requires_grad=True)
    known = torch.tensor([[1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    loss = masked_bce(logits, torch.tensor([[1, 0, 0, 0, 0, 0]]), known)
    near(loss, 0.377779)
    loss.backward()
    assert torch.equal(logits.grad != 0, known)
    for seed in range(3):
        mask = normal(4, 6, seed=seed) > 0
        mask[:, 0] = True
        near(masked_bce(torch.zeros(4, 6), (normal(4, 6) > 0).float(), mask), LN2)


def test_masked_bce_of_a_table_of_sources() -> None:
    """A slow version: several views, an unlabelled image, a source that annotates nothing, targets unknown as NaN."""
    logits = normal(2, 5, 5).requires_grad_()
    targets = (normal(5, 5, seed=1) > 0).float()
    sources = torch.tensor([1, -1, 0, 2, 0])
    targets[1], targets[3], targets[0, 0] = math.nan, math.nan, math.nan
    each = []
    for view in range(2):
        for i, source in enumerate(sources.tolist()):
            classes = [c for c in range(5) if source >= 0 and TABLE[source, c]]
            p = logits.detach()[view, i].sigmoid()
            terms = [float(-(p[c] if targets[i, c] else 1 - p[c]).log()) for c in classes]
            each += [sum(terms) / len(terms)] if terms else []
    assert len(each) == 6
    loss = masked_bce(logits, targets, TABLE, sources)
    near(loss, sum(each) / 6, 1e-5)
    loss.backward()
    used = torch.stack([TABLE[s] & (s >= 0) for s in sources])
    assert torch.equal(logits.grad != 0, used.expand(2, 5, 5))
    known = TABLE[sources.clamp(min=0)] & (sources >= 0)[:, None]
    near(masked_bce(logits, targets, known), loss.detach())
    near(masked_bce(logits[0], targets, known) + masked_bce(logits[1], targets, known), 2 * loss.detach())


def test_masked_bce_of_unlabelled_images() -> None:
    """I10: none labelled is 0, not NaN; one more unlabelled image changes nothing."""
    logits = normal(3, 5).requires_grad_()
    loss = masked_bce(logits, torch.zeros(3, 5), TABLE, torch.tensor([-1, 2, -1]))
    loss.backward()
    assert float(loss.detach()) == 0 and not logits.grad.any()
    some = masked_bce(logits[:2], torch.ones(2, 5), TABLE, torch.tensor([0, 1]))
    near(masked_bce(logits, torch.ones(3, 5), TABLE, torch.tensor([0, 1, -1])), some.detach())
    assert masked_bce(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool)) == 0


def test_masked_bce_refuses_other_shapes() -> None:
    """A mask of floats, one of another size, logits of other images."""
    for logits, known in ((torch.zeros(2, 5), torch.ones(2, 5)), (torch.zeros(2, 5), TABLE),
                          (torch.zeros(4, 5), TABLE[:2])):
        with pytest.raises(ValueError, match="are not"):
            masked_bce(logits, torch.zeros(2, 5), known)


# ------------------------------------------------------------------------------------------- precision, sum, the alarms

def test_computed_in_float32() -> None:
    """Half-precision inputs give what their float32 copies give, under autocast too; gradients come back in half."""
    student, teacher = normal(4, 3, 8, scale=5).bfloat16(), normal(2, 3, 8, seed=1).softmax(dim=-1)
    masks = torch.ones(3, 2, dtype=torch.bool)
    losses: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: dino_loss(x, teacher), lambda x: koleo_loss(x[0]),
        lambda x: ibot_loss(x[:2].flatten(0, 1), teacher.flatten(0, 1), mask_weights(masks), crops=3),
        lambda x: masked_bce(x, (teacher[0] > 0.1).float(), teacher[1] > 0.1),
        lambda x: sinkhorn(x[0], temperature=0.04)]
    for loss in losses:
        expected = loss(student.float())
        half = student.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(half)
            assert torch.equal(loss(student.float()), expected)
        assert value.dtype == torch.float32 and torch.equal(value, expected)
        if value.requires_grad:
            value.backward()
            assert half.grad.dtype == torch.bfloat16 and half.grad.any()


def test_weighted_sum() -> None:
    """I12: the log's numbers are the terms of the sum; weight 0 leaves a gradient of 0."""
    x = torch.tensor([2.0, 3.0, 5.0], requires_grad=True)
    total, logs = weighted_sum(dict(zip("abc", x, strict=True)), {"c": 0.0, "a": 1.0, "b": 0.1})
    assert logs == pytest.approx({"a": 2.0, "b": 0.3, "c": 0.0}) and list(logs) == ["a", "b", "c"]
    assert float(total.detach()) == pytest.approx(sum(logs.values()))
    total.backward()
    near(x.grad, [1, 0.1, 0])
    for weights in ({"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}):
        with pytest.raises(ValueError, match="not the same"):
            weighted_sum({"a": x[0], "b": x[1]}, weights)


def test_assignment_entropies() -> None:
    """Closed forms; a collapsed teacher before and after Sinkhorn."""
    def both(p: torch.Tensor) -> tuple[float, float]:
        found = assignment_entropies(p)
        return found["assignment_entropy"], found["marginal_entropy"]

    assert both(torch.eye(4)) == pytest.approx((0, 1))
    assert both(torch.eye(4)[[1, 1, 1]]) == pytest.approx((0, 0))
    assert both(torch.full((3, 4), 0.25)) == pytest.approx((1, 1))
    assert both(torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0]])) == pytest.approx(
        (0.25, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)))
    assert all(map(math.isnan, both(torch.zeros(0, 4))))
    alike = torch.tensor([9.0, 0, 0, 0]).expand(6, 4)
    assert max(both((alike / 0.5).softmax(dim=-1))) < 1e-3
    assert both(sinkhorn(alike, temperature=0.5)) == pytest.approx((1, 1))
    with pytest.raises(ValueError, match="at least 2"):
        assignment_entropies(torch.ones(3, 1))


def test_feature_rank() -> None:
    """Closed forms; no change by scale or rotation; not a number where there is none."""
    assert feature_rank(torch.eye(6)[:4]) == pytest.approx(4)
    assert feature_rank(normal(7, 1) @ normal(1, 5, seed=1)) == pytest.approx(1, abs=1e-4)
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    expected = 2 ** 1.5  # exp of (ln 2 + ln 4) / 2
    assert feature_rank(shares.diag()) == pytest.approx(expected)
    turn = torch.linalg.qr(normal(3, 3).double())[0]
    assert feature_rank(30 * turn @ shares.diag() @ turn.T) == pytest.approx(expected)
    wide = normal(40, 5)
    values = torch.linalg.eigvalsh(wide.double().T @ wide.double()).sqrt()
    p = values / values.sum()
    assert feature_rank(wide.requires_grad_()) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-5)
    for nothing in (torch.zeros(3, 4), torch.zeros(0, 4), torch.tensor([[1.0, math.nan]])):
        assert math.isnan(feature_rank(nothing))


# ------------------------------------------------------------------------------------------------ one process and two

class Hybrid(nn.Module):
    """A trunk on each token, and three heads. (B, V, N, 4) -> (V, B, 6), (2 B, N, 6), (2, B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.dino, self.ibot = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.label = nn.Linear(8, 5)

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = self.trunk(views.transpose(0, 1)).tanh()  # (V, B, N, 8)
        classes = tokens.mean(dim=2)  # (V, B, 8)
        return self.dino(classes), self.ibot(tokens[:2].flatten(0, 1)), self.label(classes[:2])


def hybrid() -> Hybrid:
    """The same start each time."""
    model = Hybrid()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed, scale=0.3)
    return model


Images = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def hybrid_images(n: int) -> Images:
    """Views (n, 4, 3, 4), targets (n, 5) and sources (n,); few tokens will be masked, the last images have no label."""
    sources = torch.arange(n) % 4 - 1
    sources[n // 2:] = -1
    return normal(n, 4, 3, 4), (normal(n, 5, seed=1) > 0).float(), sources


def hybrid_parts(model: nn.Module, teacher: nn.Module, images: Images) -> dict[str, torch.Tensor]:
    """As an engine would: one forward pass of each network, then the losses."""
    views, targets, sources = images
    masks = views.transpose(0, 1)[:2, :, :, 0].flatten(0, 1) > 0.7  # (2 B, N)
    classes, tokens, labels = model(views)
    with torch.no_grad():
        of_classes, of_tokens, _ = teacher(views[:, :2])
    wanted = sinkhorn(of_classes.flatten(0, 1), temperature=0.07).unflatten(0, (2, -1))
    return {"dino": dino_loss(classes, wanted),
            "ibot": ibot_loss(tokens[masks], sinkhorn(of_tokens[masks], temperature=0.07), mask_weights(masks),
                              crops=len(masks)),
            "label": masked_bce(labels, targets, TABLE, sources)}


class HybridLoader:
    """This process's part of the joint micro-batches."""

    def __init__(self, plan: BatchPlan) -> None:
        self.sampler, self.plan = ToySampler(plan), plan
        self.images = hybrid_images(plan.draws_per_epoch)

    def __iter__(self) -> Iterator[Images]:
        micro, first = self.plan.micro, distributed.rank() * self.plan.micro
        for at in range(first, self.plan.draws_per_epoch, micro * self.plan.world_size):
            yield tuple(part[at:at + micro] for part in self.images)


def hybrid_fit(world_size: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Three updates by the house's trainer: the weights and what it logged."""
    teacher = copy.deepcopy(hybrid())

    def step(model: nn.Module, images: Images, values: dict[str, float]) -> Any:
        parts = hybrid_parts(model, teacher, images)
        total, logs = weighted_sum(parts, {"dino": 1.0, "ibot": 0.5, "label": 2.0})
        return len(images[0]) * total, len(images[0]), logs

    plan = BatchPlan(micro=8 // world_size, accumulation=2, world_size=world_size, steps_per_epoch=3)
    state, _ = toy_fit(model=hybrid(), loader=HybridLoader(plan), step=step, plan=plan, evaluate=None, ema=False,
                       epochs=1)
    return state.model.state_dict(), state.history[0]


def joint_and_shares(rows: slice) -> dict[str, torch.Tensor]:
    """Each loss, and its gradient in one long vector, of some of eight images."""
    found = {}
    for name in ("dino", "ibot", "label"):
        model = hybrid()
        loss = hybrid_parts(model, hybrid(), tuple(part[rows] for part in hybrid_images(8)))[name]
        loss.backward()
        gradients = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()]
        found[name] = torch.cat([loss.detach().reshape(1), *gradients])
    return found


def _worker(rank: int, port: int, folder: str) -> None:
    """Compute everything alone, join, and find the same together."""
    torch.set_num_threads(1)
    logits = normal(8, 5, scale=3)
    alone = {"sinkhorn": sinkhorn(logits, temperature=0.05), "entropies": assignment_entropies(logits.softmax(dim=1)),
             "losses": joint_and_shares(slice(None)), "fit": hybrid_fit(1)}
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    distributed.start()
    for cut in (4, 5, 8, 0):  # rows of the first process; the other has the rest, or none
        rows = slice(0, cut) if rank == 0 else slice(cut, 8)
        near(sinkhorn(logits[rows], temperature=0.05), alone["sinkhorn"][rows], 1e-5)
        assert assignment_entropies(logits[rows].softmax(dim=1)) == pytest.approx(alone["entropies"], abs=1e-5)
        if cut in (4, 5):  # masked_bce: all labelled images are in the first process
            for name, share in joint_and_shares(rows).items():
                average = share.clone()
                dist.all_reduce(average)
                near(average / 2, alone["losses"][name], 1e-5)
                assert float((share - average / 2).abs().max()) > 1e-3, "the processes' shares should differ"
    total, logs = weighted_sum({"a": torch.tensor(2.0 + rank)}, {"a": 2.0})
    assert float(total) == 4 + 2 * rank and logs == {"a": 5.0}
    weights, history = hybrid_fit(2)
    for name, value in alone["fit"][0].items():
        near(weights[name], value, 1e-4)
    for name in ("train_loss", "train_dino", "train_ibot", "train_label"):
        assert history[name] == pytest.approx(alone["fit"][1][name], abs=1e-5)
    distributed.stop()
    open(f"{folder}/done{rank}", "w").close()


def test_two_processes(tmp_path) -> None:
    """I5, I10: values, averages of gradients, and weights after three updates of the trainer are those of one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=2)
    assert sorted(os.listdir(tmp_path)) == ["done0", "done1"]


def test_trainer_logs_what_it_optimises(one_thread) -> None:
    """I12 through the trainer: the logged parts sum to the logged loss, which the weights have followed."""
    weights, history = hybrid_fit(1)
    parts = [history[f"train_{name}"] for name in ("dino", "ibot", "label")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(history["train_loss"], rel=1e-5)
    assert all(not torch.equal(weights[name], value) for name, value in hybrid().state_dict().items())
