"""What a pretraining shows of itself: pictures and warnings after every epoch, and results.json."""

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from furnace.data.block_masks import block_masks
from furnace.data.images import load_rgb
from furnace.data.multicrop import build_multicrop
from furnace.data.pretraining_data import PretrainingData
from furnace.data.transforms import build_transform
from furnace.evaluation.pretraining_plots import draw_crops, draw_patch_pca, plot_pretraining
from furnace.models.dino import DinoModel
from furnace.pretraining import HeldOut, patch_size_of
from furnace.pretraining_options import PretrainingOptions
from furnace.runtime.precision import pick_device
from furnace.runtime.run_directory import RunDirectory
from furnace.runtime.seeding import seed_of, seeded
from furnace.training import Trained

logger = logging.getLogger(__name__)

SHOWN = 6  # images of the pictures
COLLAPSED = 0.02  # share of the information that a batch could have; a healthy teacher is far above


class Progress:
    """Called with the teacher and the log after every epoch, in the main process."""

    def __init__(self, folder: Path, data: PretrainingData, model: DinoModel, options: PretrainingOptions,
                 track: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Nothing is drawn yet.

        Args:
            folder: of the pictures.
            data: the training images, of which the first few are shown.
            model: for its patches and data config.
            options: of the training.
            track: further places of the curves.
        """
        self.folder, self.data, self.options, self.track = folder, data, options, track
        self.config, self.patch = model.backbone.provenance.data_config, patch_size_of(model.backbone)
        self.images = range(min(SHOWN, len(data.manifest)))

    def __call__(self, teacher: DinoModel, history: list[dict[str, Any]]) -> None:
        """Draw the curves and the patch features; warn of a collapse."""
        if self.track is not None:
            self.track(history[-1])
        plot_pretraining(self.folder / "learning_curve.png", history)
        if not (self.folder / "crops.png").exists():
            self._draw_crops()
        self._draw_features(teacher)
        if (warning := collapse_warning(history)) is not None:
            logger.warning("%s", warning)

    def _draw_crops(self) -> None:
        mean, std = tuple(self.config["mean"]), tuple(self.config["std"])
        make = build_multicrop(self.options.crops, mean=mean, std=std)
        with seeded(self.options.seed, "crops.png"):
            views = [make(load_rgb(self.data.manifest.path_of(i))) for i in self.images]
        side = self.options.global_crops_size // self.patch
        masks = block_masks(2 * len(views), (side, side), share=self.options.mask_sample_probability,
                            ratio=tuple(self.options.mask_ratio_min_max),
                            rng=np.random.default_rng(seed_of(self.options.seed, "crops.png")))
        draw_crops(self.folder / "crops.png", torch.stack([large for large, _ in views], dim=1),
                   torch.stack([small for _, small in views], dim=1) if self.options.local_crops_number else None,
                   torch.from_numpy(masks).unflatten(0, (2, len(views))), mean=mean, std=std, patch_size=self.patch)

    @torch.no_grad()
    def _draw_features(self, teacher: DinoModel) -> None:
        transform = build_transform(teacher.backbone)
        images = torch.stack([transform(load_rgb(self.data.manifest.path_of(i))) for i in self.images])
        tokens = teacher.tokens(images.to(pick_device(self.options.device)))[:, teacher.prefix:]
        side = self.options.global_crops_size // self.patch
        draw_patch_pca(self.folder / "patch_features.png", images, tokens.float().cpu(), grid=(side, side),
                       mean=tuple(self.config["mean"]), std=tuple(self.config["std"]))


def collapse_warning(history: list[dict[str, Any]]) -> str | None:
    """Why the last epoch looks like a collapse, None where it does not.

    A teacher that sees all images alike gives each the same assignment, whether to one prototype or to all evenly: the
    entropy of the mean assignment is then the mean of their entropies. Both are in units of ln K. The first epoch, of
    heads that know nothing yet, is not judged.
    """
    if len(history) < 2:
        return None
    marginal, each = (history[-1].get(f"train_teacher_{name}", math.nan) for name in
                      ("marginal_entropy", "assignment_entropy"))
    if not marginal - each < COLLAPSED:
        return None
    kind = "one prototype" if marginal < 0.5 else "all prototypes evenly"
    return (f"the teacher assigns all images to {kind} (entropy of the mean assignment {marginal:.3f}, of single ones "
            f"{each:.3f}, of ln K): the training has collapsed or not begun to learn. Take a lower --base_lr or "
            "--warmup_teacher_temp, a longer --warmup_epochs, or larger batches")


def results_of(data: PretrainingData, held_out: HeldOut, model: DinoModel, trained: Trained, run: RunDirectory
               ) -> dict[str, Any]:
    """What results.json holds."""
    last = trained.history[-1]
    metrics = {name.removeprefix("val_"): {"value": value, "low": None, "high": None,
                                           "reason": None if value is not None else "not defined"}
               for name, value in last.items() if name.startswith("val_")}
    protocol = "weighted k-NN of the class tokens, k 20, T 0.07; last epoch's teacher"
    splits = {held_out.split: {"n": len(held_out.queries), "protocol": protocol, "metrics": metrics}}
    labelled = 0 if data.labels is None else int(data.labels.labelled.sum())
    return {"task": "pretraining", "data_set": data.manifest.name, "model": model.backbone.provenance.name,
            "weights_sha256": model.backbone.provenance.sha256, "teacher": str(run.path / "teacher"),
            "train_images": len(data.manifest), "labelled_images": labelled, "updates": trained.updates,
            "plan": dataclasses.asdict(trained.plan), "trained_parameters": trained.parameters, "splits": splits,
            "losses": {name.removeprefix("train_"): value for name, value in last.items()
                       if name.startswith("train_")}}
