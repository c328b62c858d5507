"""The losses of hybrid pretraining (DermINO on DINOv2), and the numbers that tell whether it collapses.

Everything is computed in float32 whatever comes in, also under autocast.

Several processes: ``dino_loss``, ``ibot_loss`` and ``masked_bce`` return this process's share, scaled so that the
*average* over the processes is the loss of their joint batch; so is then the average of the gradients, which is what
DDP makes of them. ``koleo_loss`` compares the images of one process, as published; its average over the processes is
what is optimised. With ``runtime.trainer`` a step therefore ends in ::

    total, logs = weighted_sum({"dino": ..., "ibot": ..., "koleo": ..., "label": ...}, weights)
    return images * total, images, logs

where ``images`` is the same number in every process (a BatchPlan's ``micro``): the trainer divides the sum of the first
by the sum of the second, over processes and accumulated passes. Two processes are then one with their joint batch.
Accumulated passes are averaged with equal weights: each label loss is the mean over the labelled crops of its own pass.

All processes must call these functions equally often, also those without a labelled image or a masked token.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F

from furnace.runtime import distributed

STUDENT_TEMPERATURE = 0.1
KOLEO_FLOOR = 1e-8  # times 1 + sqrt(D): the distance that the published loss gives to equal vectors


# -------------------------------------------------------------------------------------------------------- the teacher

@torch.no_grad()
def sinkhorn(logits: torch.Tensor, *, temperature: float, iterations: int = 3) -> torch.Tensor:
    """Soft assignments of samples to prototypes which use all prototypes alike (Sinkhorn-Knopp).

    Each iteration gives the prototypes equal mass over the samples of all processes, and then every sample the mass 1
    (Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, 2020). The factors that
    depend on the number of samples cancel in the last step, so that processes may hold different numbers of them, or
    none, as with masked tokens. In the log domain nothing overflows or is divided by zero.

    Args:
        logits: (N, K) of the teacher's head: both global views together, or all masked tokens; without padding rows,
            which would count as samples.
        temperature: of the teacher.
        iterations: at least 1.

    Returns:
        (N, K) float32 without a gradient; rows sum to 1. Finite while logits / temperature is, in float32.

    Raises:
        ValueError: no temperature above 0, no iteration, or another shape.
    """
    if not temperature > 0 or iterations < 1:
        raise ValueError(f"sinkhorn needs a temperature above 0 and at least one iteration, not {temperature} and "
                         f"{iterations}")
    if logits.ndim != 2:
        raise ValueError(f"sinkhorn takes logits (samples, prototypes), not {tuple(logits.shape)}: flatten the views")
    log_q = logits.float() / temperature
    for _ in range(iterations):
        log_q -= _log_prototype_mass(log_q)
        log_q = log_q.log_softmax(dim=1)
    return log_q.exp_()


def _log_prototype_mass(log_q: torch.Tensor) -> torch.Tensor:
    """(N, K) -> (K,) the log of each prototype's mass over the samples of all processes."""
    top = log_q.amax(dim=0) if len(log_q) else log_q.new_full(log_q.shape[1:], -math.inf)
    _reduce(top, largest=True)
    return top + _reduce((log_q - top).exp().sum(dim=0)).log()


# ----------------------------------------------------------------------------------------------------- self-supervision

def dino_loss(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = STUDENT_TEMPERATURE
              ) -> torch.Tensor:
    """Cross-entropy between the teacher's assignments of one view and the student's of another.

    The mean over the images and over the pairs of one of the teacher's two global views and another view of the
    student's: 2 + 2 x locals pairs, 18 with 8 local views (Oquab et al., DINOv2, 2023).

    Args:
        student: (V, B, K) logits, the two global views first. Heads work on (V * B, K), all of view 1, then all of
            view 2, and so on: ``x.unflatten(0, (V, B))``.
        teacher: (2, B, K) assignments, from ``sinkhorn``, in the same order.
        temperature: of the student.

    Returns:
        This process's share of the mean, a scalar.

    Raises:
        ValueError: shapes that do not belong together.
    """
    views, images, _ = student.shape
    if views < 2 or teacher.shape != (2, *student.shape[1:]):
        raise ValueError(f"the student's logits {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} are "
                         "not (views, images, prototypes), two global views first, and (2, images, prototypes)")
    log_p = (student.float() / temperature).log_softmax(dim=-1)
    local = log_p[2:].sum(dim=0)  # (B, K): pairs with one teacher view are added before the product, not after
    pairs = sum((teacher[view].float() * (log_p[1 - view] + local)).sum() for view in (0, 1))
    return _global_mean(-pairs / (2 * views - 2), images)


def mask_weights(masks: torch.Tensor) -> torch.Tensor:
    """The weight of each masked token: 1 / the number of its crop's masked tokens.

    Args:
        masks: (C, N) bool, tokens of C global crops, True where masked.

    Returns:
        (M,) float32 for the masked tokens in the order of ``tokens[masks]``; the weights of a crop sum to 1.
    """
    return masks.sum(dim=1, keepdim=True).clamp(min=1).float().reciprocal().expand(masks.shape)[masks]


def ibot_loss(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, *, crops: int,
              temperature: float = STUDENT_TEMPERATURE) -> torch.Tensor:
    """Cross-entropy between the teacher's assignment of a patch and the student's of the same patch, masked.

    The mean over a crop's masked patches, summed over the crops and divided by the number of all global crops, those
    without a mask too (Zhou et al., iBOT, 2022, as in DINOv2).

    Args:
        student: (M, K) logits of the masked tokens. A buffer may be padded with finite rows of weight 0.
        teacher: (M, K) assignments, from ``sinkhorn`` of the real rows.
        weights: (M,), from ``mask_weights``; 0 for padding.
        crops: C, all global crops of this process, masked or not.
        temperature: of the student.

    Returns:
        This process's share of the mean, a scalar; 0 where nothing is masked.
    """
    log_p = (student.float() / temperature).log_softmax(dim=-1)
    entropy = -(teacher.float() * log_p).sum(dim=-1)  # (M,)
    return _global_mean((weights.float() * entropy).sum(), crops)


def koleo_loss(features: torch.Tensor) -> torch.Tensor:
    """Spread the images of a batch over the sphere: the mean of -log(distance to the nearest other image).

    Rows are scaled to length 1 first; of unit vectors the nearest is also the one with the largest cosine. An image is
    never its own neighbour, not even when all others lie opposite (Sablayrolles et al., Spreading vectors for
    similarity search, 2019). Equal rows have the published distance of (1 + sqrt(D)) 1e-8 and no gradient.

    Args:
        features: (B, D) class tokens of one view, before the head.

    Returns:
        The mean over this process's rows, a scalar; 0 for fewer than two.
    """
    if len(features) < 2:
        return features[:0].float().sum()  # 0, with a gradient of 0
    x = F.normalize(features.float(), dim=1)
    with torch.no_grad():  # without a matrix product: those lose equal rows to rounding, and autocast halves them
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.fill_diagonal_(math.inf).argmin(dim=1)
    distance = torch.linalg.vector_norm(x - x[nearest], dim=1)
    return -(distance + KOLEO_FLOOR * (1 + math.sqrt(x.shape[1]))).log().mean()


# --------------------------------------------------------------------------------------------------------------- labels

def masked_bce(logits: torch.Tensor, targets: torch.Tensor, known: torch.Tensor, sources: torch.Tensor | None = None
               ) -> torch.Tensor:
    """Binary cross-entropy over the classes that are known of each image; the rest are neither right nor wrong.

    The mean over an image's known classes, then over the crops of the images that have any. An image without a label,
    or from a source that annotates no class, contributes nothing and is not counted.

    Args:
        logits: (..., B, K): one view, or several, each with the same images.
        targets: (B, K), 1 where the image shows the class; of any value, also NaN, where the class is not known.
        known: (B, K) bool, or with ``sources`` a table (S, K) bool of the classes that each source annotates.
        sources: (B,) int64, the row of the table for each image; negative for an image without a label.

    Returns:
        This process's share of the mean over the labelled crops of all processes, a scalar; 0 where there is none.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if sources is not None:
        known = known[sources.clamp(min=0)] & (sources >= 0)[:, None]
    if known.dtype != torch.bool or known.shape != targets.shape or logits.shape[-2:] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)} and known "
                         f"{tuple(known.shape)} of {known.dtype} are not (..., B, K), (B, K) and (B, K) bool")
    truth = targets.float().masked_fill(~known, 0).expand(logits.shape)
    each = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none").masked_fill(~known, 0)
    loss = each.sum(dim=-1) / known.sum(dim=-1).clamp(min=1)  # (..., B)
    views = math.prod(logits.shape[:-2])
    return _global_mean(loss.sum(), views * known.any(dim=-1).sum())


# ------------------------------------------------------------------------------------------------------------ together

def weighted_sum(parts: Mapping[str, torch.Tensor], weights: Mapping[str, float]
                 ) -> tuple[torch.Tensor, dict[str, float]]:
    """The objective, and what each part adds to it.

    A part of weight 0 stays in the sum, so that its parameters have a gradient (of 0), which DDP waits for.

    Args:
        parts: name -> scalar, this process's share.
        weights: name -> factor at this update, for the same names.

    Returns:
        The scalar to optimise, and name -> weight x part, averaged over the processes, for the log: these sum to the
        trainer's ``loss``.

    Raises:
        ValueError: a part without a weight, or a weight without a part.
    """
    if parts.keys() != weights.keys():
        raise ValueError(f"losses {', '.join(parts)} and weights {', '.join(weights)} are not the same")
    terms = torch.stack([weights[name] * part for name, part in parts.items()])
    logged = _reduce(terms.detach().clone()) / distributed.world_size()
    return terms.sum(), dict(zip(parts, logged.tolist(), strict=True))


# --------------------------------------------------------------------------------------------------------------- alarms

@torch.no_grad()
def assignment_entropies(assignments: torch.Tensor) -> dict[str, float]:
    """How the teacher spreads samples over prototypes, over all processes, as a share of the uniform's ln K.

    Of a softmax of the teacher's logits, collapse to one prototype shows as ``marginal_entropy`` near 0. ``sinkhorn``
    spreads any batch evenly, so that of its assignments that number is always near 1, and a teacher that sees all
    images alike shows as an ``assignment_entropy`` near 1 instead.

    Args:
        assignments: (N, K) rows that sum to 1.

    Returns:
        ``assignment_entropy``: the mean of the rows' entropies, 0 (each on one prototype) to 1 (spread evenly);
        ``marginal_entropy``: the entropy of the mean row, 0 (one prototype has all) to 1 (all are used alike). NaN
        where there are no samples.

    Raises:
        ValueError: fewer than two prototypes, whose entropy has no scale.
    """
    p = assignments.float()
    if p.ndim != 2 or p.shape[1] < 2:
        raise ValueError(f"assignments are (samples, at least 2 prototypes), not {tuple(p.shape)}")
    rows = torch.special.entr(p).sum().reshape(1)
    sums = _reduce(torch.cat([rows, p.new_tensor([len(p)]), p.sum(dim=0)]))
    means = sums / sums[1]
    uniform = math.log(p.shape[1])
    return {"assignment_entropy": float(means[0]) / uniform,
            "marginal_entropy": float(torch.special.entr(means[2:]).sum()) / uniform}


@torch.no_grad()
def feature_rank(features: torch.Tensor) -> float:
    """Of how many directions the features make use: exp of the entropy of their singular values, scaled to sum 1.

    Between 1 (all on one line) and min(N, D), not centred (Garrido et al., RankMe, 2023; without its epsilon). It
    cannot pass N: compare numbers of the same images only, with N well above D.

    Args:
        features: (N, D), of this process.

    Returns:
        The effective rank; NaN where there is no feature, none but 0, or one that is not finite.
    """
    x = features.detach().cpu().double()  # MPS has no float64
    if not x.numel() or not x.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(x)
    return float(torch.special.entr(values / values.sum()).sum().exp())


# ------------------------------------------------------------------------------------------------------------ processes

def _reduce(values: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
    """The sum, or the largest, over the processes of each number; in place."""
    if distributed.world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return values


def _global_mean(total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """This process's share of the mean: the average of the shares is the sum of all totals / the sum of all counts."""
    count = _reduce(torch.as_tensor(count, dtype=torch.float32, device=total.device))
    return total * distributed.world_size() / count.clamp(min=1)
