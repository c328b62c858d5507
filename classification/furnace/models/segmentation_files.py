"""The files of trained segmenters: ours, and those of PanDerm's published segmentation (Lightning).

A file of this toolkit holds ``{"model": state dict, "meta": segmenter_meta(...), "epoch": n}``; a published one
``{"state_dict": ..., "epoch": n, ...}`` with ``model.segmentor.`` before every key. Both come back with
``load_segmenter``.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from furnace.models import Provenance, hash_state, panderm
from furnace.models.classifier import READS_FILES, load_exactly
from furnace.models.loading import LoadReport, State, describe_state, unwrap
from furnace.models.segmenter import SegmentationModel, build_segmenter, resize_segmenter
from furnace.runtime.files import CheckpointError, UserError, read_checkpoint

FORMAT = 1  # of segmenter_meta
TASK = "segmentation"
META_KEYS = ("model", "recipe", "class_names", "amp_dtype", "data_config", "transform", "weights_sha256")
RECIPE_KEYS = {"backbone", "head", "nb_classes", "input_size", "taps", "channels", "pool_scales", "dropout", "pyramid"}
CLASS_NAMES = ("background", "lesion")

# the published code: images squashed to 224 px (bicubic), brought to [-1, 1]
PUBLISHED_CONFIG = {"input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 1.0,
                    "crop_mode": "squash", "interpolation": "bicubic"}
PUBLISHED_PREFIX = ("_orig_mod.", "module.", "model.", "segmentor.")  # DDP's and Lightning's wrappers, in any order
PUBLISHED_NAMES = {"backbone.fpn1.": "neck.fpn1.", "backbone.fpn2.": "neck.fpn2."}  # and ours
OF_A_CLASSIFIER = ("head.weight", "fc.weight", "classifier.weight", "head.fc.weight")


def segmenter_meta(model: SegmentationModel, *, class_names: Sequence[str] = CLASS_NAMES, amp_dtype: str,
                   transform: str = "default", data_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint must say beside the tensors, as plain values.

    Args:
        model: from ``create_segmenter``.
        class_names: K names in the order of the outputs, the background first.
        amp_dtype: the precision of the training.
        transform: the recipe whose evaluation transform the images went through: default, panderm or dermino.
        data_config: the numbers of that transform; None: the backbone's own.
    """
    provenance, nb_classes = model.provenance, model.recipe["nb_classes"]
    if len(class_names) != nb_classes:
        raise ValueError(f"{len(class_names)} class names for {nb_classes} outputs")
    return {"format": FORMAT, "task": TASK, "model": provenance.name, "recipe": model.recipe,
            "class_names": list(class_names), "amp_dtype": amp_dtype, "transform": transform,
            "data_config": data_config or provenance.data_config, "weights_sha256": provenance.sha256}


@dataclass(frozen=True)
class Segmenter:
    """A trained segmenter and what its file says of it.

    Attributes:
        model: (B, 3, H, W) -> (B, K, H, W) logits, in eval mode, with ``provenance`` (the file's) and ``recipe``.
        name: of its backbone, as for ``create_backbone``.
        class_names: K names in the order of the outputs.
        amp_dtype: bf16, fp16 or fp32.
        data_config: input_size, mean, std, crop_pct, crop_mode, interpolation.
        transform: the recipe of its evaluation transform: default, panderm or dermino.
        sha256: of the file's bytes; of the tensors where there is no file.
        path: of the file.
        epoch: of the training, from which the weights are.
        trained_on: content ids of the images that it was trained on, as far as the file says.
        split_note: what that training drew in place of an official split.
    """

    model: SegmentationModel
    name: str
    class_names: tuple[str, ...]
    amp_dtype: str
    data_config: dict[str, Any]
    transform: str
    sha256: str
    path: Path
    epoch: int | str | None
    trained_on: frozenset[str] = frozenset()
    split_note: str = ""

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W) of the images that the model sees, in pixels."""
        return self.model.input_size


def load_segmenter(path: str | Path, *, input_size: int | Sequence[int] | None = None) -> Segmenter:
    """Read a segmenter of this toolkit or of the published PanDerm code, every tensor accounted for.

    Args:
        path: the file.
        input_size: side, or (height, width), in pixels, to bring it to; None keeps its own.

    Raises:
        CheckpointError: the file is something else; the message says what it seems to be.
    """
    file = read_checkpoint(path)
    return segmenter_of(file.content, source=str(file.path), sha256=file.sha256, input_size=input_size)


def segmenter_of(content: Any, *, source: str, sha256: str | None = None,
                 input_size: int | Sequence[int] | None = None) -> Segmenter:
    """The segmenter that the content of a file describes; see ``load_segmenter``.

    Args:
        content: what the file holds, or would hold: ``{"model", "meta", "epoch"}``.
        source: the file, or the place that it is of, for messages.
        sha256: of the file; None hashes the tensors.
        input_size: see ``load_segmenter``.
    """
    whole = content if isinstance(content, dict) else {}
    state, meta = whole.get("model"), whole.get("meta")
    if isinstance(state, dict) and isinstance(meta, dict) and meta.get("task") == TASK:
        state = unwrap(state)
        _check_meta(meta, source)
    else:
        state = published_names(unwrap(content))
        if not _is_published(state):
            raise CheckpointError(_what_it_is(content, source))
        meta = _published_meta(state, source)
    if any(".lora_" in key for key in state):
        raise CheckpointError(f"{source} is a training with LoRA that is under way, its changes not yet folded into "
                              "the weights: take checkpoint-best.pth of that run")
    try:
        model = build_segmenter(meta["recipe"])
    except UserError as error:
        raise CheckpointError(f"{source}: timm {timm.__version__} cannot build its model ({error}): use the version "
                              "of timm that it was trained with (env.json of its run has it)") from error
    load_exactly(model, state, name=f"of pixels (segmenter) {meta['model']}", source=source)
    sha256 = sha256 or hash_state(model)
    model.provenance = Provenance(name=meta["model"], weights="file", file=source, sha256=sha256,
                                  report=LoadReport(matched=tuple(state)), data_config=meta["data_config"])
    if input_size is not None:
        model = resize_segmenter(model, input_size)
    return Segmenter(model=model, name=meta["model"], class_names=tuple(meta["class_names"]),
                     amp_dtype=meta["amp_dtype"], data_config=model.provenance.data_config,
                     transform=meta["transform"], sha256=sha256, path=Path(source), epoch=whole.get("epoch"),
                     trained_on=frozenset(meta.get("trained_on", ())), split_note=meta.get("split_note", ""))


def published_names(state: State) -> State:
    """A published state dict under this toolkit's names: no wrapper's prefix, the pyramid in ``neck.``."""
    wrappers = re.compile(f"(?:{'|'.join(map(re.escape, PUBLISHED_PREFIX))})+")
    named = {}
    for key, value in state.items():
        bare = key[match.end():] if (match := wrappers.match(key)) else key
        old = next((old for old in PUBLISHED_NAMES if bare.startswith(old)), "")
        named[PUBLISHED_NAMES.get(old, "") + bare[len(old):]] = value
    return named


def _is_published(state: State) -> bool:
    return {"neck.fpn1.0.weight", "decode_head.conv_seg.weight", "backbone.cls_token"} <= state.keys()


def _published_meta(state: State, source: str) -> dict[str, Any]:
    """The description of a published file, from the shapes of its tensors."""
    width = state["backbone.cls_token"].shape[-1]
    depth = len({match[1] for key in state if (match := re.match(r"backbone\.blocks\.(\d+)\.", key))})
    size = next((size for size, numbers in panderm.SIZES.items()
                 if (numbers["embed_dim"], numbers["depth"]) == (width, depth)), None)
    if size is None:
        raise CheckpointError(f"{source} is a segmenter in the published layout on a backbone of width {width} and "
                              f"depth {depth}, which is none of PanDerm's: Base and Large are known here")
    nb_classes, channels = state["decode_head.conv_seg.weight"].shape[:2]
    name = f"PanDerm_{size}_LP"
    # without taps: the constructor's default is the published choice for this depth
    recipe = {"backbone": {"architecture": name, "arguments": {"img_size": 224}}, "head": "upernet",
              "nb_classes": nb_classes, "input_size": [224, 224], "taps": None, "channels": channels,
              "pool_scales": [1, 2, 3, 6], "dropout": 0.0, "pyramid": True}
    names = CLASS_NAMES if nb_classes == 2 else tuple(map(str, range(nb_classes)))
    return {"model": name, "recipe": recipe, "class_names": names, "amp_dtype": "fp32", "transform": "panderm",
            "data_config": dict(PUBLISHED_CONFIG)}


def _check_meta(meta: dict[str, Any], source: str) -> None:
    """The description is whole, of a version that is known, and asks timm for nothing but a network."""
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{source} is of format {meta.get('format')!r} and this version reads {FORMAT}: update")
    absent = [key for key in META_KEYS if key not in meta]
    recipe = meta.get("recipe")
    backbone = recipe.get("backbone") if isinstance(recipe, dict) else None
    if absent or not isinstance(recipe, dict) or recipe.keys() != RECIPE_KEYS or not isinstance(backbone, dict) \
            or backbone.keys() != {"architecture", "arguments"}:
        raise CheckpointError(f"{source}: its description lacks {', '.join(absent) or 'a whole recipe'}: the file was "
                              "edited; take another copy")
    if not timm.is_model(backbone["architecture"]) or READS_FILES & backbone["arguments"].keys():
        raise CheckpointError(f"{source}: its recipe ({backbone['architecture']!r}) is none of timm {timm.__version__}"
                              ": use the version of timm that it was trained with")
    if len(meta["class_names"]) != recipe["nb_classes"]:
        raise CheckpointError(f"{source} names {len(meta['class_names'])} classes for {recipe['nb_classes']} "
                              "outputs: the file was edited; take another copy")


def _what_it_is(content: Any, source: str) -> str:
    """Why a file is no segmenter, and what to do with it."""
    whole = content if isinstance(content, dict) else {}
    meta, args = whole.get("meta"), whole.get("args")
    state = published_names(unwrap(content))
    bare = {key.removeprefix("backbone.").removeprefix("encoder."): value for key, value in state.items()}
    what = describe_state(bare) if bare else "a file without a model's tensors"
    train = "pass it as --pretrained with its --model to segmentation/run.py and train a segmenter from it"
    if isinstance(meta, dict) and "class_names" in meta:
        return (f"{source} is a classifier ({meta.get('model')}, {len(meta['class_names'])} classes), not a "
                f"segmenter: {train}, or give the checkpoint-best.pth of a segmentation run")
    if isinstance(args, argparse.Namespace):
        return (f"{source} is a classifier of the published code ({getattr(args, 'model', 'model unknown')}), not a "
                f"segmenter: {train}, or give the checkpoint-best.pth of a segmentation run")
    if any(key.startswith("decode_head.") for key in state):
        return (f"{source} is a segmenter ({what}), but neither in this toolkit's nor in PanDerm's published layout: "
                "give the checkpoint-best.pth of a segmentation run, or the published .ckpt as it is")
    if any(key in bare for key in OF_A_CLASSIFIER):
        return f"{source} is no segmenter: it seems to be {what} with a classification head: {train}"
    return f"{source} is no segmenter: it seems to be {what}, without a head: {train}"
