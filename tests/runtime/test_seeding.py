"""Seeds made of parts, and generators that are put back."""

import random

import numpy as np
import torch

from furnace.runtime.seeding import seed_all, seed_of, seeded

SEED_1_23 = 2066947493687275496  # the same on every machine and with every version: runs are resumed elsewhere


def draws() -> tuple[float, float, float]:
    """One of each generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_parts_and_their_order_decide() -> None:
    """No two of these are equal; (1, 23) is not (12, 3)."""
    seeds = [seed_of(1, 23), seed_of(12, 3), seed_of(23, 1), seed_of(1, 2, 3), seed_of("1", "24"), seed_of(0)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 23) == SEED_1_23


def test_seed_all_repeats() -> None:
    """All three generators."""
    seed_all(3, "step", 7)
    first = draws()
    seed_all(3, "step", 7)
    assert draws() == first
    seed_all(3, "step", 8)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_seeded_leaves_the_generators_alone() -> None:
    """Inside the same numbers each time, outside as if nothing had been drawn."""
    seed_all(1)
    wanted = [draws(), draws()]
    seed_all(1)
    found = [draws()]
    with seeded(5, 2):
        inside = draws()
    found.append(draws())
    with seeded(5, 2):
        assert draws() == inside
    assert found == wanted
