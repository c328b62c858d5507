"""The published segmenter's fill rule (spec: crc32 of the published name), for the tests of its goldens."""

import re
import zlib

import numpy as np
import torch

NEAR_ONE = re.compile(r"(?:^|\.)(?:norm|norm1|norm2|bn|fpn1\.1)\.weight$|running_var$")
GAMMA = re.compile(r"gamma_[12]$")


def fill(name: str, like: torch.Tensor) -> torch.Tensor:
    """The value of one tensor; ``name`` is the published one without its prefix."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros_like(like)
    uniform = np.random.default_rng(zlib.crc32(name.encode())).random(size=like.numel(), dtype=np.float32)
    z = (uniform - np.float32(0.5)) * np.float32(2)
    if NEAR_ONE.search(name):
        z = np.float32(1) + np.float32(0.1) * z
    elif GAMMA.search(name):
        z = np.float32(0.5) + np.float32(0.25) * z
    else:
        z = np.float32(0.04) * z
    return torch.from_numpy(z).reshape(like.shape)


def fill_published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A segmenter's state dict with the goldens' values."""
    return {key: fill(re.sub(r"^neck\.", "backbone.", key), value) for key, value in state.items()}
