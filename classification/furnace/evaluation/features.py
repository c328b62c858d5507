"""Features of a frozen backbone for every image of a manifest, in the manifest's order."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from furnace.data.datasets import build_loader, refuse_broken, subset_loader
from furnace.data.manifest import Manifest
from furnace.data.transforms import build_transform
from furnace.evaluation.feature_cache import ChunkWriter, FeatureCache, image_keys
from furnace.runtime import distributed
from furnace.runtime.files import ProcessError, UserError
from furnace.runtime.precision import autocast, pick_device, prepare_for_inference, resolve_amp_dtype
from furnace.runtime.progress import progress

logger = logging.getLogger(__name__)

PRINTED = 20


class NotFiniteError(UserError):
    """A model gave NaN or infinity."""


@dataclass(frozen=True)
class Features:
    """Row ``i`` of each belongs to image ``i`` of the manifest.

    Attributes:
        embeddings: (N, D) float32.
        labels: (N,) int64.
        filenames: N names, the manifest's ``image`` column.
        extracted: how many images were decoded and encoded; the others came from the cache.
    """

    embeddings: np.ndarray
    labels: np.ndarray
    filenames: list[str]
    extracted: int = 0


@dataclass(frozen=True)
class Extraction:
    """How features are made: the settings that every script passes on together.

    Attributes:
        batch_size: images per batch at most.
        num_workers: decoding processes, None picks.
        device: where the backbone runs.
        amp_dtype: bf16, fp16 or fp32, settled.
        transform: published or fast (``data.transforms``).
        compile: run the backbone through torch.compile.
        cache_dir: of the feature cache, None for none.
    """

    device: torch.device
    batch_size: int = 64
    num_workers: int | None = None
    amp_dtype: str = "fp32"
    transform: str = "published"
    compile: bool = False
    cache_dir: Path | None = None

    def cache(self, backbone: torch.nn.Module, amp_dtype: str | None = None) -> FeatureCache | None:
        """The cache of this backbone made this way (or in another precision), None without ``cache_dir``."""
        if self.cache_dir is None:
            return None
        made = backbone.provenance
        return FeatureCache(self.cache_dir, {
            "model": made.name, "weights_sha256": made.sha256, "data_config": made.data_config,
            "transform": self.transform, "amp_dtype": amp_dtype or self.amp_dtype, "device": self.device.type,
            "compile": self.compile, **{name: metadata.version(name) for name in (
                "torch", "timm", "Pillow", *["torchvision"] * (self.transform == "fast"))}})


def settle_amp_dtype(requested: str, backbone: torch.nn.Module, manifest: Manifest, how: Extraction) -> str:
    """Turn ``auto`` into bf16 or fp32: the one in which most of these images are cached, else by a short timing.

    A timing can fall out either way from one run to the next; a second run must not extract again for that.
    """
    if requested == "auto" and how.cache_dir is not None:
        keys = image_keys(manifest)
        known = {amp_dtype: how.cache(backbone, amp_dtype).count(keys) for amp_dtype in ("bf16", "fp32")}
        best = max(known, key=known.get)
        if 2 * known[best] > len(manifest):
            logger.info("precision: %s, in which %d of the %d images are cached", best, known[best], len(manifest))
            return best
    return resolve_amp_dtype(requested, backbone, how.device, backbone.provenance.data_config["input_size"][-1])


def backbone_features(backbone: torch.nn.Module, manifest: Manifest, how: Extraction) -> Features | None:
    """Features of all images of a manifest with the backbone's own transform, from the cache where it has them.

    Args:
        backbone: from ``create_backbone``.
        manifest: the images.
        how: settings, ``amp_dtype`` settled.

    Returns:
        Features; under torchrun in the main process, None in the others.
    """
    loader = build_loader(manifest, build_transform(backbone, how.transform), batch_size=how.batch_size,
                          num_workers=how.num_workers, device=how.device)
    return extract_features(backbone, loader, device=how.device, amp_dtype=how.amp_dtype,
                            cache=how.cache(backbone), compile_backbone=how.compile)


def extract_features(backbone: torch.nn.Module, loader: DataLoader, *, device: torch.device | str | None = None,
                     amp_dtype: str = "fp32", cache: FeatureCache | None = None, compile_backbone: bool = False,
                     description: str = "features") -> Features | None:
    """Run a frozen backbone over a loader: one forward pass per batch, in eval mode, without gradients.

    The protocol of PanDerm's linear evaluation: the backbone's pooled output as it is, neither L2-normalised nor
    standardised. The last batch is filled up with black images to the size of the others, whose features are thrown
    away, so that an image's features do not depend on how many came with it. Memory grows by N x D floats and no more.
    Once a file cannot be decoded, the rest is only decoded, so that the error lists every such file.

    Args:
        backbone: ``(B, 3, H, W) -> (B, D)``, with ``num_features`` (D).
        loader: from ``data.datasets.build_loader``.
        device: None picks cuda, mps or cpu.
        amp_dtype: bf16, fp16 or fp32 (see ``runtime.precision``); features are stored as float32.
        cache: images that it holds are neither decoded nor encoded; new features are added to it as they come.
        compile_backbone: use torch.compile (minutes at first, a few per cent faster afterwards).
        description: the progress bar's title.

    Returns:
        Features; under torchrun in the main process, None in the others.

    Raises:
        UserError: files that cannot be decoded, or features that are not finite.
    """
    device = torch.device(device) if device is not None else pick_device()
    backbone = backbone.to(device).eval()  # outside inference mode: moved weights must stay trainable
    manifest: Manifest = loader.dataset.manifest
    width, keys, rows = backbone.num_features, None, None
    missing = np.arange(len(manifest))
    if cache is not None:
        keys = image_keys(manifest)

        def look_up() -> np.ndarray:
            nonlocal rows
            rows, known = cache.load(keys, width)
            return np.flatnonzero(~known)

        missing = distributed.on_main(look_up)
        logger.info("features: %d of %d images from the cache %s", len(manifest) - len(missing), len(manifest),
                    cache.folder)
    elif distributed.is_main():
        rows = np.empty((len(manifest), width), dtype=np.float32)

    fast = prepare_for_inference(backbone, amp_dtype, compile_backbone)
    loader = subset_loader(loader, missing)
    mine = np.asarray(loader.sampler.positions, dtype=np.int64)
    alone = distributed.world_size() == 1
    out, slots = (rows, mine) if alone else (np.empty((len(mine), width), dtype=np.float32), np.arange(len(mine)))
    bad: list[int] = []
    with ChunkWriter(cache) as writer:
        def keep(first: int, batch: np.ndarray) -> None:
            images = mine[first:first + len(batch)]
            out[slots[first:first + len(batch)]] = batch
            bad.extend(images[~np.isfinite(batch).all(axis=1)].tolist())
            if cache is not None:
                writer.add(keys[images], batch)

        broken = _run(fast, loader, device, amp_dtype, keep, description) if len(mine) else []
    if broken := distributed.gather_lists(broken):
        refuse_broken(manifest, broken)
    _refuse_non_finite(distributed.gather_lists(bad), manifest, amp_dtype)
    if not alone:
        whole = distributed.gather_strided(out, len(missing))
        if whole is None:
            return None
        rows[missing] = whole
    return Features(embeddings=rows, labels=manifest.labels, filenames=manifest.filenames, extracted=len(missing))


@torch.inference_mode()
def _run(backbone: torch.nn.Module, loader: DataLoader, device: torch.device, amp_dtype: str,
         keep: Callable[[int, np.ndarray], None], description: str) -> list[tuple[int, str]]:
    """Hand this process's rows to ``keep(first, (B, D))`` batch by batch; returns the files that cannot be decoded."""
    forward = SteadyForward(backbone, loader.batch_size)
    broken: list[tuple[int, str]] = []
    done = 0
    with (progress(total=len(loader.sampler), unit="image", desc=description, disable=not distributed.is_main(),
                   smoothing=0.1) as bar, autocast(device, amp_dtype)):
        for batch in loader:
            broken += batch.broken
            if batch.images is not None and not broken:
                images = batch.images.to(device, non_blocking=True, memory_format=_layout(batch.images))
                output = forward(images)
                keep(done, output.float().cpu().numpy())
                done += len(output)
            bar.update(len(batch.indices) + len(batch.broken))
    return broken


class SteadyForward:
    """(B, [V,] 3, H, W) -> (B, ...), always by forward passes of one size; halves it when a GPU's memory is small."""

    def __init__(self, backbone: Callable[[torch.Tensor], torch.Tensor], size: int) -> None:
        self.backbone, self.size = backbone, size

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        while True:
            try:
                return torch.cat([self._padded(part) for part in images.split(self.size)])
            except torch.cuda.OutOfMemoryError as error:
                if self.size == 1:
                    raise ProcessError("one image does not fit into the GPU's memory: take --amp_dtype bf16, a smaller "
                                       "--input_size or --device cpu") from error
            self.size = (self.size + 1) // 2
            torch.cuda.empty_cache()
            logger.warning("the GPU's memory is too small: going on with batches of %d", self.size)

    def _padded(self, part: torch.Tensor) -> torch.Tensor:
        """Fill up to ``size`` with zeros (in the normalised scale), and drop their features."""
        lacking = self.size - len(part)
        if not lacking:
            return self.backbone(part)
        filled = torch.cat([part, part.new_zeros(lacking, *part.shape[1:])])
        filled = filled.contiguous(memory_format=_layout(filled))
        return self.backbone(filled)[:len(part)]


def _layout(images: torch.Tensor) -> torch.memory_format:
    """Channels last for (B, 3, H, W); (B, V, 3, H, W) has no such layout, ``data.tta.ViewMean`` makes it."""
    return torch.channels_last if images.ndim == 4 else torch.contiguous_format


def _refuse_non_finite(bad: list[int], manifest: Manifest, amp_dtype: str) -> None:
    if bad:
        names = ", ".join(manifest.filenames[i] for i in sorted(bad)[:PRINTED])
        raise NotFiniteError(f"the features of {len(bad)} images are not finite in {amp_dtype} ({names}): "
                        "run with --amp_dtype fp32")
