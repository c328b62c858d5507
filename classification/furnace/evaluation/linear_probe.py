"""PanDerm's published linear probe: full-batch logistic regression with an unsquared norm, by L-BFGS.

Minimises, over W (K, D) and b (K,):

    mean cross-entropy + (1 / C) * 0.5 * ||W||_F        with C = D * K / 100,

K being the number of distinct train labels. The norm is not squared and the bias is not penalised, so scikit-learn's
``LogisticRegression(C=...)`` is another objective. No standardisation, no class weights, no choice on val.

The arithmetic is float64, where the published code had float32: with few images and nearly collinear features float32
stops early, at a point that depends on the last bits of the features (probabilities moved by 0.014 under noise of 1e-6,
and were 0.045 from the optimum; in float64 0.0005 and 0.005, on 140 real images). Where float32 does converge, the two
agree.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

MAX_ITERATIONS = 1000
BLOCK_BYTES = 1 << 26  # of features in float64 at a time, so that a million images need no second copy of them


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe.

    Attributes:
        weight: (K, D) float32, a row per class that occurred in train.
        bias: (K,) float32.
        classes: (K,) the labels of the rows, ascending.
        nb_classes: width of ``predict_proba``; classes that train lacks get probability 0.
        cost: C of the objective.
        objective: its final value.
        iterations: L-BFGS iterations.
    """

    weight: np.ndarray
    bias: np.ndarray
    classes: np.ndarray
    nb_classes: int
    cost: float
    objective: float
    iterations: int

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        """(N, D) features to (N, nb_classes) float32 probabilities."""
        weight, bias = (torch.from_numpy(part).double() for part in (self.weight, self.bias))
        probabilities = np.zeros((len(features), self.nb_classes), dtype=np.float32)
        first = 0
        for x in _Float64Blocks(features, "cpu"):  # float64: the last bit does not depend on how many rows there are
            probabilities[first:first + len(x), self.classes] = F.linear(x, weight, bias).softmax(dim=1).float().numpy()
            first += len(x)
        return probabilities


def fit_linear_probe(features: np.ndarray, labels: np.ndarray, *, nb_classes: int | None = None, seed: int = 0,
                     max_iterations: int = MAX_ITERATIONS, device: torch.device | str = "cpu") -> LinearProbe:
    """Fit the published probe.

    Args:
        features: (N, D).
        labels: (N,) integers from 0.
        nb_classes: the number of classes of the data set; None takes the highest label + 1.
        seed: of the start (PyTorch's default initialisation of a linear layer); published is 0.
        max_iterations: of L-BFGS.
        device: where to fit, in float64 (on the CPU instead of mps).

    Raises:
        UserError: fewer than two classes in ``labels``, or features that are not finite.
        ValueError: a label outside 0..nb_classes-1.
    """
    if not all(np.isfinite(part).all() for part in _blocks(features)):
        raise UserError("the features are not finite: extract them with --amp_dtype fp32")
    classes, targets = np.unique(np.asarray(labels), return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"the train images have {len(classes)} class: a probe needs two or more "
                        "(take a larger --percent_data, or --percent_mode stratified)")
    nb_classes = int(classes.max()) + 1 if nb_classes is None else nb_classes
    if classes.min() < 0 or classes.max() >= nb_classes:
        raise ValueError(f"labels {classes.min()}..{classes.max()} are not in 0..{nb_classes - 1}")
    device = torch.device("cpu") if torch.device(device).type == "mps" else device  # mps has no float64
    y = torch.from_numpy(targets.astype(np.int64)).to(device)
    parts = _Float64Blocks(features, device)
    width = features.shape[1]
    cost = width * len(classes) / 100
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        head = torch.nn.Linear(width, len(classes))  # on the CPU: the same start on every device
    head = head.to(device, torch.float64)

    def objective(backward: bool) -> torch.Tensor:
        total = 0.5 / cost * torch.linalg.vector_norm(head.weight)
        if backward:
            total.backward()
        first = 0
        for x in parts:  # (n, D)
            loss = F.cross_entropy(head(x), y[first:first + len(x)], reduction="sum") / len(y)
            if backward:
                loss.backward()
            total, first = total.detach() + loss.detach(), first + len(x)
        return total

    optimiser = torch.optim.LBFGS(head.parameters(), lr=1.0, max_iter=max_iterations, max_eval=max_iterations * 5 // 4,
                                  history_size=100, tolerance_grad=1e-7, tolerance_change=1e-9,
                                  line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        return objective(backward=True)

    optimiser.step(closure)
    state = optimiser.state[head.weight]
    iterations = int(state["n_iter"])
    if iterations >= max_iterations or state["func_evals"] >= max_iterations * 5 // 4:
        logger.warning("the linear probe stopped after %d iterations without converging", iterations)
    with torch.no_grad():
        final = float(objective(backward=False))
    if not np.isfinite(final):
        raise UserError(f"the linear probe diverged (objective {final}): are the features finite and of sane size?")
    weight, bias = (tensor.detach().float().cpu().numpy() for tensor in (head.weight, head.bias))
    return LinearProbe(weight=weight, bias=bias,
                       classes=classes.astype(np.int64), nb_classes=nb_classes, cost=cost, objective=final,
                       iterations=iterations)


def _blocks(features: np.ndarray) -> list[np.ndarray]:
    """Views of so many rows that a block is BLOCK_BYTES in float64."""
    rows = max(1, BLOCK_BYTES // (8 * max(1, features.shape[1])))
    return [features[i:i + rows] for i in range(0, len(features), rows)]


class _Float64Blocks:
    """Iterates over (n, D) float64 tensors; converted once where they are few, else anew in every pass."""

    def __init__(self, features: np.ndarray, device: torch.device | str) -> None:
        self.device = device
        self.parts: list[np.ndarray | torch.Tensor] = _blocks(features)
        if len(self.parts) <= 4:
            self.parts = [self._convert(part) for part in self.parts]

    def _convert(self, part: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(part, dtype=np.float64)).to(self.device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (part if isinstance(part, torch.Tensor) else self._convert(part) for part in self.parts)
