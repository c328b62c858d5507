"""Features of a frozen backbone for every image of a manifest, in the manifest's order."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from furnace.data.manifest import ROW, Manifest
from furnace.runtime import distributed
from furnace.runtime.files import UserError
from furnace.runtime.precision import autocast, pick_device

logger = logging.getLogger(__name__)

PRINTED = 20


@dataclass(frozen=True)
class Features:
    """Row ``i`` of each belongs to image ``i`` of the manifest.

    Attributes:
        embeddings: (N, D) float32.
        labels: (N,) int64.
        filenames: N names, the manifest's ``image`` column.
    """

    embeddings: np.ndarray
    labels: np.ndarray
    filenames: list[str]


def extract_features(backbone: torch.nn.Module, loader: DataLoader, *, device: torch.device | str | None = None,
                     amp_dtype: str = "fp32", description: str = "features") -> Features | None:
    """Run a frozen backbone over a loader: one forward pass per batch, in eval mode, without gradients.

    The protocol of PanDerm's linear evaluation: the backbone's pooled output as it is, neither L2-normalised nor
    standardised. Memory grows by N x D floats and no more. Once a file cannot be decoded, the rest is only decoded,
    so that the error lists every such file.

    Args:
        backbone: ``(B, 3, H, W) -> (B, D)``.
        loader: from ``data.datasets.build_loader``.
        device: None picks cuda, mps or cpu.
        amp_dtype: bf16, fp16 or fp32 (see ``runtime.precision``); features are stored as float32.
        description: the progress bar's title.

    Returns:
        Features; under torchrun in the main process, None in the others.

    Raises:
        UserError: files that cannot be decoded, or features that are not finite.
    """
    device = torch.device(device) if device is not None else pick_device()
    backbone = backbone.to(device).eval()  # outside inference mode: moved weights must stay trainable
    manifest = loader.dataset.manifest
    embeddings, broken = _run(backbone, loader, device, amp_dtype, description)
    _refuse_broken(distributed.gather_lists(broken), manifest)
    bad = [loader.sampler.positions[i] for i in np.flatnonzero(~np.isfinite(embeddings).all(axis=1))]
    _refuse_non_finite(distributed.gather_lists(bad), manifest, amp_dtype)
    whole = distributed.gather_strided(embeddings, len(manifest))
    if whole is None:
        return None
    return Features(embeddings=whole, labels=manifest.labels, filenames=manifest.filenames)


@torch.inference_mode()
def _run(backbone: torch.nn.Module, loader: DataLoader, device: torch.device, amp_dtype: str,
         description: str) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """This process's rows (n, D), and the files that could not be decoded."""
    count = len(loader.sampler)
    embeddings: np.ndarray | None = None
    broken: list[tuple[int, str]] = []
    done = 0
    with tqdm(total=count, unit="image", desc=description, disable=not distributed.is_main(), smoothing=0.1) as bar:
        for batch in loader:
            broken += batch.broken
            if batch.images is not None and not broken:
                with autocast(device, amp_dtype):
                    output = backbone(batch.images.to(device, non_blocking=True))
                if embeddings is None:
                    embeddings = np.empty((count, output.shape[1]), dtype=np.float32)
                embeddings[done:done + len(output)] = output.float().cpu().numpy()
                done += len(output)
            bar.update(len(batch.indices) + len(batch.broken))
    if embeddings is None:  # more processes than images, or nothing could be decoded
        embeddings = np.empty((0, backbone.num_features), dtype=np.float32)
    return embeddings, broken


def _refuse_broken(broken: list[tuple[int, str]], manifest: Manifest) -> None:
    if not broken:
        return
    broken = sorted(broken)
    lines = [f"  row {manifest.frame[ROW].iat[i]}, {manifest.path_of(i)}: {reason}" for i, reason in broken]
    raise UserError(f"{len(broken)} image{'s' if len(broken) > 1 else ''} cannot be decoded:\n" + "\n".join(lines) +
                    "\n  Copy or download them again, or delete their rows.")


def _refuse_non_finite(bad: list[int], manifest: Manifest, amp_dtype: str) -> None:
    if bad:
        names = ", ".join(manifest.filenames[i] for i in sorted(bad)[:PRINTED])
        raise UserError(f"the features of {len(bad)} images are not finite in {amp_dtype} ({names}): "
                        "run with --amp_dtype fp32")
