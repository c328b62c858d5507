"""Hybrid pretraining from a manifest: puts the parts together. ``pretraining/run.py`` calls it."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

from furnace.data.datasets import build_loader
from furnace.data.manifest import Manifest
from furnace.data.multicrop import blank_batch
from furnace.data.pretraining_data import PretrainingData, build_pretraining_loader
from furnace.data.samplers import TrainSampler
from furnace.data.transforms import build_transform
from furnace.data.unlabelled import read_images
from furnace.engine_for_pretraining import make_evaluate, make_step
from furnace.evaluation.features import extract_features
from furnace.models import create_backbone
from furnace.models.dino import DinoModel, create_dino, parameter_groups, require_plain
from furnace.models.dino_files import load_heads, read_heads
from furnace.models.prototypes import (
    PrototypeHead,
    class_mean_vectors,
    orthogonal_vectors,
    project,
    random_vectors,
    read_vectors,
    text_vectors,
)
from furnace.pretraining_options import PretrainingOptions, build_schedules, cut_batches
from furnace.runtime import distributed, files
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import UserError
from furnace.runtime.memory import fitting_plan
from furnace.runtime.optim import create_optimizer
from furnace.runtime.precision import pick_device
from furnace.runtime.run_directory import RunDirectory
from furnace.runtime.train_state import TrainState
from furnace.runtime.trainer import FitOptions, fit, train_mode
from furnace.training import Trained

logger = logging.getLogger(__name__)

VECTORS = "prototypes.safetensors"
UNLABELLED_SAMPLE = 1024  # training images whose features' rank is watched where nothing is labelled


@dataclass(frozen=True)
class HeldOut:
    """Labelled images on which the teacher is judged: ``queries`` among ``gallery`` (None: unlabelled images).

    Attributes:
        gallery: the split train of ``--eval_csv``.
        queries: its split val, or test where there is no val; without a gallery some of the training images.
        classes: number of classes.
        split: what the queries are.
    """

    gallery: Manifest | None
    queries: Manifest
    classes: int
    split: str


def read_held_out(csv_path: Path | None, root_path: Path | None, train: Manifest, *, seed: int,
                  folder: Path | None = None) -> HeldOut:
    """The images that judge the teacher; without a CSV some of the training images, for their features' rank.

    Args:
        csv_path: with image, label and split: the gallery is train, the queries are val, or test where there is no val.
        root_path: folder of its images.
        train: the training images, among which no query should be.
        seed: of the choice of training images.
        folder: where the full list of problems goes.

    Raises:
        UserError: images without a label, or no gallery or no queries.
    """
    if csv_path is None:
        chosen = np.random.default_rng([seed, len(train)]).permutation(len(train))[:UNLABELLED_SAMPLE]
        return HeldOut(None, train.take(np.sort(chosen)), 0, "train")
    images = read_images(csv_path, root_path, report_folder=folder)
    gallery = images.split("train")
    split = "val" if len(images.split("val")) else "test"
    queries = images.split(split)
    if not len(gallery) or not len(queries):
        raise UserError(f"--eval_csv {csv_path} needs rows of the split train and rows of val (or test)")
    if (gallery.labels < 0).any() or (queries.labels < 0).any():
        raise UserError(f"--eval_csv {csv_path}: every image of train and {split} needs a class number from 0 in the "
                        "column label")
    seen = {os.path.realpath(train.path_of(i)) for i in range(len(train))}
    known = sum(os.path.realpath(queries.path_of(i)) in seen for i in range(len(queries)))
    if known:
        logger.warning("%d of the %d images that judge the teacher (--eval_csv) are training images, too: it has seen "
                       "them, though not necessarily their labels", known, len(queries))
    return HeldOut(gallery, queries, int(max(gallery.labels.max(), queries.labels.max())) + 1, split)


# --------------------------------------------------------------------------------------------------------- the model

def build_backbone(options: PretrainingOptions) -> torch.nn.Module:
    """The backbone at the size of the global crops, with its initial weights."""
    arguments = {name: value for name, value in (("patch_size", options.patch_size),
                                                 ("init_values", options.layer_scale_init_value)) if value is not None}
    backbone = create_backbone(options.model, options.pretrained_checkpoint, input_size=options.global_crops_size,
                               seed=options.seed, options=arguments)
    require_plain(backbone, options.model)
    patch = patch_size_of(backbone)
    for flag, side, number in (("--global_crops_size", options.global_crops_size, 2),
                               ("--local_crops_size", options.local_crops_size, options.local_crops_number)):
        if side % patch and number:
            near = max(1, round(side / patch)) * patch
            raise UserError(f"{flag} {side} is no multiple of the patch size {patch}: take {near}")
    if (grid := options.global_crops_size // patch) < 4:
        logger.warning("--global_crops_size %d makes %d x %d patches: few rectangles fit into so small a grid, and "
                       "many crops that iBOT asks a mask for have none", options.global_crops_size, grid, grid)
    return backbone


def patch_size_of(backbone: torch.nn.Module) -> int:
    """Side of a patch in pixels."""
    return backbone.patch_embed.patch_size[0]


def build_model(backbone: torch.nn.Module, vectors: torch.Tensor | None, options: PretrainingOptions,
                bias: torch.Tensor | None = None) -> DinoModel:
    """Student with heads; those of the backbone's own file where it has some of these sizes.

    Args:
        backbone: from ``build_backbone``.
        vectors: (C, D) of the label head, None without labels.
        options: the rest.
        bias: (C,) of the label head; None: 0.
    """
    head = None if vectors is None else PrototypeHead(vectors, trainable=options.prototype_mode != "frozen",
                                                      temperature=options.label_temperature, bias=bias)
    model = create_dino(backbone, name=options.model, prototypes=options.head_n_prototypes,
                        hidden=options.head_hidden_dim, bottleneck=options.head_bottleneck_dim, label_head=head,
                        drop_path=options.drop_path, seed=options.seed)
    heads = distributed.on_main(lambda: read_heads(backbone.provenance))
    load_heads(model, heads, source=backbone.provenance.file)
    if options.grad_checkpointing:
        backbone.set_grad_checkpointing(True)
    return model.to(pick_device(options.device))


def label_vectors(backbone: torch.nn.Module, data: PretrainingData, options: PretrainingOptions,
                  folder: Path | None = None) -> torch.Tensor | None:
    """The prototypes of the classes, (C, D); None without labels. All processes call it.

    Args:
        backbone: from ``build_backbone``.
        data: the classes and, for their means, the labelled images.
        options: the rest.
        folder: of an unfinished run, whose prototypes are taken where ``keep_vectors`` has put them.
    """
    if data.ontology is None:
        return None
    width, classes = backbone.num_features, len(data.ontology)
    if folder is not None and (stored := distributed.on_main(lambda: _stored_vectors(folder, classes))) is not None:
        return stored
    means = _class_means(backbone, data, options) if options.prototypes == "class_mean" else None

    def make() -> torch.Tensor:
        if options.prototypes == "text":
            vectors = text_vectors(data.ontology.names, encoder=options.text_encoder, pooling=options.text_pooling)
        elif options.prototypes == "class_mean":
            vectors = means
        elif options.prototypes == "orthogonal":
            vectors = orthogonal_vectors(classes, width, seed=options.seed)
        elif options.prototypes == "random":
            vectors = random_vectors(classes, width, seed=options.seed)
        else:
            vectors = read_vectors(Path(options.prototypes).expanduser(), classes=classes)
        return project(vectors, width, seed=options.seed)

    return distributed.on_main(make)


def label_bias(data: PretrainingData, options: PretrainingOptions) -> torch.Tensor | None:
    """(C,) what the label head's bias is at first: the classes' log odds among the labelled images, or None for 0."""
    if data.labels is None or options.label_bias == "zero":
        return None
    return torch.from_numpy(data.labels.log_odds())


def _stored_vectors(folder: Path, classes: int) -> torch.Tensor | None:
    """Those of the run in the folder; None without any, or of other classes: ``open_run`` says then what differs."""
    if not (folder / VECTORS).exists():
        return None
    try:
        return read_vectors(folder / VECTORS, classes=classes)
    except UserError:
        return None


def keep_vectors(folder: Path, vectors: torch.Tensor) -> None:
    """Write the prototypes of a new run."""
    from safetensors.torch import save

    if not (folder / VECTORS).exists():
        with files.atomic_write(folder / VECTORS) as file:
            file.write(save({"prototypes": vectors.contiguous()}))


def _class_means(backbone: torch.nn.Module, data: PretrainingData, options: PretrainingOptions
                 ) -> torch.Tensor | None:
    """Mean features of the classes' labelled images by the initial backbone; in the main process."""
    labelled = np.flatnonzero(data.labels.labelled)
    if not len(labelled):
        raise UserError("--prototypes class_mean needs labelled images: take --prototypes text")
    loader = build_loader(data.manifest.take(labelled), build_transform(backbone), batch_size=options.batch_size,
                          num_workers=options.num_workers, device=pick_device(options.device))
    features = extract_features(backbone, loader, device=pick_device(options.device), description="class means")
    if features is None:
        return None
    vectors, absent = class_mean_vectors(features.embeddings, data.labels.rows(labelled), data.labels.known(labelled))
    if absent:
        logger.warning("%d of %d classes have no image of their own: their prototypes are random", len(absent),
                       len(vectors))
        vectors[absent] = random_vectors(len(vectors), vectors.shape[1], seed=options.seed)[absent]
    return vectors


# ------------------------------------------------------------------------------------------------------- the training

def pretrain(run: RunDirectory, model: DinoModel, data: PretrainingData, held_out: HeldOut,
             options: PretrainingOptions, *, meta: dict[str, Any],
             track: Callable[[DinoModel, list[dict[str, Any]]], None] | None = None) -> Trained:
    """Pretrain; an unfinished training in the run's directory is continued.

    Args:
        run: its directory.
        model: from ``build_model``.
        data: the training images.
        held_out: what the teacher is judged on.
        options: the rest, ``amp_dtype`` settled.
        meta: what checkpoint-best.pth says of itself.
        track: called in the main process after every epoch with the teacher and the log so far.

    Returns:
        The training; ``best["model"]`` is the last teacher.
    """
    device = pick_device(options.device)
    plan = cut_batches(len(data.manifest), options)
    schedules = build_schedules(options, plan)
    groups = parameter_groups(model, layer_decay=options.layer_decay, patch_embed_scale=options.patch_embed_lr_mult)
    state = TrainState(model, create_optimizer(groups), ema=ModelEmaV3(model))
    step = make_step(data.manifest, lambda: state.ema.module, device=device)
    patch = patch_size_of(model.backbone)
    classes = None if model.label_head is None else len(data.ontology)
    if device.type == "cuda":
        train_mode(model, model)
        asked = plan.micro
        plan = fitting_plan(model, step, lambda n: blank_batch(n, options.crops, patch_size=patch, classes=classes),
                            plan, {name: float(values[0]) for name, values in schedules.items()}, device=device,
                            amp_dtype=options.amp_dtype)
        if plan.micro < asked:
            logger.warning("Sinkhorn and KoLeo now compare %d images of a process in place of %d", plan.micro, asked)
    evaluate = make_evaluate(
        held_out.gallery, held_out.queries, classes=held_out.classes, device=device, amp_dtype=options.amp_dtype,
        num_workers=options.num_workers,
        due=lambda: (state.epoch + 1) % options.eval_freq == 0 or state.epoch + 1 == options.epochs)
    best = fit(state, step, evaluate, build_loader_of(data, model, plan, options), plan, schedules, run,
               options=FitOptions(
                   epochs=options.epochs, seed=options.seed, device=device, amp_dtype=options.amp_dtype,
                   clip=options.clip_grad, save_every_steps=options.save_every_steps,
                   keep_every_epochs=options.save_ckpt_freq, max_updates=options.max_updates, compile=options.compile,
                   meta=meta, track=None if track is None else lambda _: track(state.ema.module, state.history),
                   resume=options.resume))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Trained(best, state.history, plan, trained, state.update)


def build_loader_of(data: PretrainingData, model: DinoModel, plan: BatchPlan, options: PretrainingOptions
                    ) -> DataLoader:
    """The training loader."""
    sampler = TrainSampler(len(data.manifest), plan=plan, seed=options.seed, endless=options.epoch_length > 0)
    config = model.backbone.provenance.data_config
    return build_pretraining_loader(
        data, options.crops, sampler, plan=plan, seed=options.seed, patch_size=patch_size_of(model.backbone),
        mean=tuple(config["mean"]), std=tuple(config["std"]), mask_share=options.mask_sample_probability,
        mask_ratio=tuple(options.mask_ratio_min_max), num_workers=options.num_workers,
        device=pick_device(options.device), pin_memory=options.pin_mem)
