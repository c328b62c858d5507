"""Classifiers: any backbone of the registry with a linear head, and the files that fine-tuning leaves.

A file of this toolkit holds ``{"model": state dict, "meta": classifier_meta(...), "epoch": n}``; that of the published
code ``{"model": state dict, "args": argparse.Namespace, "epoch": "best", ...}``. Both come back with
``load_classifier``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import trunc_normal_
from torch import nn

from furnace.models import (
    ENTRIES,
    OptionError,
    Provenance,
    build_architecture,
    create_backbone,
    data_config_of,
    entry_of,
    hash_state,
)
from furnace.models.loading import PLAIN, RELATIVE_TABLE, LoadReport, State, best_prefix, describe_state, unwrap
from furnace.runtime.files import CheckpointError, UserError, read_checkpoint
from furnace.runtime.seeding import seeded

FORMAT = 1  # of classifier_meta
META_KEYS = ("model", "recipe", "nb_classes", "class_names", "task", "amp_dtype", "data_config", "weights_sha256")
# arguments of timm.create_model that would make it read other files
READS_FILES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
# what to try when an architecture lacks an argument; None leaves it out
INSTEAD = {"pos_drop_rate": None, "proj_drop_rate": "drop_rate", "init_values": "ls_init_value"}


# ------------------------------------------------------------------------------------------------------------- making

def create_classifier(name: str, checkpoint: str | Path | None = None, *, nb_classes: int, input_size: int = 224,
                      seed: int = 0, pool: str | None = None, drop: float = 0.0, attn_drop: float = 0.0,
                      drop_path: float = 0.0, layer_scale: float | None = None,
                      relative_positions: bool | None = None, trainable_positions: bool = False,
                      init_scale: float = 0.001, model_keys: Sequence[str] | None = None,
                      prefix: str = "") -> nn.Module:
    """Build a backbone with its weights and a fresh linear head, in eval mode.

    Args:
        name: as for ``create_backbone``.
        checkpoint: as for ``create_backbone``; a head in the file is not used.
        nb_classes: K, outputs of the head.
        input_size: side of the square images in pixels.
        seed: of the head, and of the backbone where it is random.
        pool: "token" (class token after the pretrained final norm), "avg" (mean of the patch tokens), None for the
            model's own (of PanDerm_*_FT: avg).
        drop: dropout behind the positions, the attention's projection and in the MLP; in models without these, before
            the head.
        attn_drop: dropout of the attention weights.
        drop_path: highest rate of stochastic depth.
        layer_scale: start of the layer scales; those of a checkpoint win.
        relative_positions: learned relative position biases in every block (BEiT's and PanDerm's); None for the
            model's own. Where the file has none they start at zero.
        trainable_positions: train PanDerm's sin-cos table, which else stays as it is.
        init_scale: factor of the head's start (truncated normal of std 0.02, bias zero).
        model_keys: keys under which the file may hold its state dict.
        prefix: what stands before the backbone's keys in the file; "" finds it.

    Returns:
        A module ``(B, 3, input_size, input_size) -> (B, K)`` logits with ``num_features``, ``provenance`` (of the
        backbone), ``classifier_names`` (the head's parameters) and ``recipe`` (plain values that build it again).

    Raises:
        UserError: see ``create_backbone``; also an option that the architecture lacks, or fewer than one class.
    """
    if nb_classes < 1:
        raise UserError(f"a classifier needs at least one class, not {nb_classes}: give --nb_classes")
    wanted = {"global_pool": pool, "pos_drop_rate": drop or None, "proj_drop_rate": drop or None,
              "attn_drop_rate": attn_drop or None, "drop_path_rate": drop_path or None,
              "init_values": layer_scale or None, "use_rel_pos_bias": relative_positions}
    options = {key: value for key, value in wanted.items() if value is not None}
    while True:
        try:
            backbone = create_backbone(name, checkpoint, input_size=input_size, seed=seed, options=options,
                                       model_keys=model_keys, prefix=prefix)
            break
        except OptionError as error:
            options = _without(options, error)
    model = add_head(backbone, nb_classes, name=name, seed=seed, init_scale=init_scale)
    if trainable_positions:
        positions = getattr(model, "pos_embed", None)
        if not isinstance(positions, nn.Parameter):
            raise UserError(f"--model {name} has no table of positions to train: leave trainable positions out")
        positions.requires_grad = True
    return model


def _without(options: dict[str, Any], error: OptionError) -> dict[str, Any]:
    """The options without the one that an architecture refused, or with the one that stands for it there."""
    if error.option not in INSTEAD:
        raise error
    other = INSTEAD[error.option]
    return {other if key == error.option else key: value for key, value in options.items()
            if key != error.option or other is not None}


def add_head(backbone: nn.Module, nb_classes: int, *, name: str, seed: int = 0, init_scale: float = 0.001
             ) -> nn.Module:
    """The same network with a linear head: built again by timm, so that the head is where timm puts it.

    Args:
        backbone: from ``create_backbone``.
        nb_classes: K.
        name: of the model, for messages.
        seed: of the head's weights.
        init_scale: factor of the head's weights.

    Raises:
        UserError: the architecture has no place for a head.
    """
    recipe = {**backbone.recipe, "nb_classes": nb_classes}
    model = build_again(recipe)
    result = model.load_state_dict(backbone.state_dict(), strict=False)
    head = set(result.missing_keys)
    names = tuple(key for key, _ in model.named_parameters() if key in head)
    if not names or result.unexpected_keys:
        raise UserError(f"--model {name} has no classifier in timm: take another architecture")
    modules = {key.rpartition(".")[0] for key in names}
    with torch.no_grad(), seeded("head", seed):
        for module in (model.get_submodule(key) for key in sorted(modules)):
            if isinstance(module, nn.Linear | nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                module.weight.mul_(init_scale)
                if module.bias is not None:
                    module.bias.zero_()
    model.num_features, model.provenance, model.classifier_names = backbone.num_features, backbone.provenance, names
    return model


def build_again(recipe: dict[str, Any]) -> nn.Module:
    """The network of a recipe, without its weights."""
    model = build_architecture(recipe["architecture"], recipe["arguments"], num_classes=recipe["nb_classes"])
    model.recipe = recipe
    return model


def classifier_meta(model: nn.Module, *, class_names: Sequence[str], task: str, amp_dtype: str,
                    crop_pct: float | None = None) -> dict[str, Any]:
    """What a checkpoint must say beside the tensors, as plain values.

    Args:
        model: from ``create_classifier``.
        class_names: K names in the order of the outputs.
        task: multiclass or multilabel.
        amp_dtype: the precision of the training.
        crop_pct: of the images, where it is not the data config's.
    """
    provenance, nb_classes = model.provenance, model.recipe["nb_classes"]
    if len(class_names) != nb_classes:
        raise ValueError(f"{len(class_names)} class names for {nb_classes} outputs")
    return {"format": FORMAT, "model": provenance.name, "recipe": model.recipe, "nb_classes": nb_classes,
            "class_names": list(class_names), "task": task, "amp_dtype": amp_dtype,
            "data_config": provenance.data_config, "crop_pct": crop_pct, "weights_sha256": provenance.sha256}


# ------------------------------------------------------------------------------------------------------------ reading

@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned classifier and what its file says of it.

    Attributes:
        model: (B, 3, H, W) -> (B, K) logits, in eval mode, with ``provenance`` (the file's) and ``recipe``.
        name: of its backbone, as for ``create_backbone``.
        class_names: K names in the order of the outputs.
        task: multiclass or multilabel.
        amp_dtype: bf16, fp16 or fp32.
        data_config: input_size, mean, std, crop_pct, crop_mode, interpolation.
        crop_pct: given for the training in place of the data config's, else None.
        sha256: of the file's bytes; of the tensors where there is no file.
        path: of the file.
        epoch: of the training, from which the weights are; the published code writes "best".
        temperature: that calibrates the probabilities, fitted on val; None where there was none to fit.
    """

    model: nn.Module
    name: str
    class_names: tuple[str, ...]
    task: str
    amp_dtype: str
    data_config: dict[str, Any]
    crop_pct: float | None
    sha256: str
    path: Path
    epoch: int | str | None
    temperature: float | None = None


def load_classifier(path: str | Path) -> FineTuned:
    """Read a fine-tuned classifier of this toolkit or of the published PanDerm code, every tensor accounted for.

    Raises:
        CheckpointError: the file is something else; the message says what it seems to be.
    """
    file = read_checkpoint(path)
    return classifier_of(file.content, source=str(file.path), sha256=file.sha256)


def classifier_of(content: Any, *, source: str, sha256: str | None = None) -> FineTuned:
    """The classifier that the content of a file describes; see ``load_classifier``.

    Args:
        content: what the file holds, or would hold: ``{"model", "meta", "epoch"}``.
        source: the file, or the place that it is of, for messages.
        sha256: of the file; None hashes the tensors.
    """
    whole = content if isinstance(content, dict) else {}
    state, meta, args = whole.get("model"), whole.get("meta"), whole.get("args")
    if isinstance(state, dict) and isinstance(meta, dict) and "format" in meta:
        state = unwrap(state)
        _check_meta(meta, source)
    elif isinstance(state, dict) and isinstance(args, argparse.Namespace):
        state = _plain(unwrap(state))
        meta = _published_meta(state, args, source)
    else:
        raise CheckpointError(_what_it_is(content, source))
    if "rng" in whole:
        raise CheckpointError(f"{source} is the newest state of a training, not the chosen model: take "
                              "checkpoint-best.pth of that run")
    model = _rebuild(meta["recipe"], source)
    load_exactly(model, state, name=meta["model"], source=source)
    sha256 = sha256 or hash_state(model)
    config = meta["data_config"] or data_config_of(model, entry_of(meta["model"]), 224)
    model.provenance = Provenance(name=meta["model"], weights="file", file=source, sha256=sha256,
                                  report=LoadReport(matched=tuple(state)), data_config=config)
    return FineTuned(model=model, name=meta["model"], class_names=tuple(meta["class_names"]), task=meta["task"],
                     amp_dtype=meta["amp_dtype"], data_config=config, crop_pct=meta.get("crop_pct"), sha256=sha256,
                     path=Path(source), epoch=whole.get("epoch"), temperature=meta.get("temperature"))


def load_exactly(model: nn.Module, state: State, *, name: str, source: str) -> None:
    """Load a state dict that must have the model's tensors, no more and no fewer.

    Raises:
        CheckpointError: it has not, or a tensor is not finite.
    """
    target = model.state_dict()
    faults = [f"lacks {key}" for key in target if key not in state]
    faults += [f"has {key}, which the model lacks" for key in state if key not in target]
    faults += [f"has {key} of shape {tuple(state[key].shape)}, not {tuple(value.shape)}" for key, value in
               target.items() if key in state and state[key].shape != value.shape]
    faults += [f"has NaN or infinity in {key}" for key, value in state.items()
               if value.is_floating_point() and not value.isfinite().all()]
    if faults:
        raise CheckpointError(f"checkpoint {source} does not hold the classifier {name} that it says it holds: it "
                              f"{'; it '.join(faults[:4])}{'; ...' if len(faults) > 4 else ''}. Nothing was loaded: "
                              "the file is damaged or was edited; take another copy")
    model.load_state_dict(state)


def _rebuild(recipe: dict[str, Any], source: str) -> nn.Module:
    try:
        return build_again(recipe)
    except UserError as error:
        raise CheckpointError(f"{source}: timm {timm.__version__} cannot build its model ({error}): use the version "
                              "of timm that it was trained with (env.json of its run has it)") from error


def _check_meta(meta: dict[str, Any], source: str) -> None:
    """The description is whole, of a version that is known, and asks timm for nothing but a network."""
    if meta["format"] != FORMAT:
        raise CheckpointError(f"{source} is of format {meta['format']!r} and this version reads {FORMAT}: update")
    absent = [key for key in META_KEYS if key not in meta]
    recipe = meta.get("recipe")
    if absent or not isinstance(recipe, dict) or not {"architecture", "arguments", "nb_classes"} <= recipe.keys():
        raise CheckpointError(f"{source}: its description lacks {', '.join(absent) or 'the recipe'}: the file was "
                              "edited; take another copy")
    if not timm.is_model(recipe["architecture"]) or READS_FILES & recipe["arguments"].keys():
        raise CheckpointError(f"{source}: its recipe ({recipe['architecture']!r}) is none of timm {timm.__version__}"
                              ": use the version of timm that it was trained with")
    if not len(meta["class_names"]) == meta["nb_classes"] == recipe["nb_classes"]:
        raise CheckpointError(f"{source} names {len(meta['class_names'])} classes for {recipe['nb_classes']} "
                              "outputs: the file was edited; take another copy")


def _plain(state: State) -> State:
    """A published state dict without DDP's prefix and without the index buffers, which timm computes."""
    prefix = best_prefix(state, dict.fromkeys(("cls_token", "head.weight", "head.bias")), PLAIN)
    return {key.removeprefix(prefix): value for key, value in state.items()
            if not key.endswith("relative_position_index")}


def _published_meta(state: State, args: argparse.Namespace, source: str) -> dict[str, Any]:
    """The description of a published file: options from its args, the form from its tensors."""
    name, head = getattr(args, "model", None), state.get("head.weight")
    if name not in ENTRIES or not name.startswith("PanDerm_"):
        raise CheckpointError(f"{source} was trained as --model {name!r}; of the published code's files "
                              "PanDerm_Base_FT and PanDerm_Large_FT are known here")
    if head is None or head.ndim != 2:
        raise CheckpointError(_what_it_is(state, source))
    if getattr(args, "enable_linear_eval", False):
        raise CheckpointError(f"{source} was trained with --enable_linear_eval, which the published code ran "
                              "without the final norm: train it again (linear_eval.py, or --tune head)")
    nb_classes = head.shape[0]
    arguments = {"img_size": 224, "global_pool": "avg" if "fc_norm.weight" in state else "token",
                 "use_rel_pos_bias": any(key.endswith(RELATIVE_TABLE) for key in state)}
    recipe = {"architecture": ENTRIES[name].architecture, "arguments": arguments, "nb_classes": nb_classes}
    return {"model": name, "recipe": recipe, "class_names": [str(k) for k in range(nb_classes)], "task": "multiclass",
            "amp_dtype": "fp32", "data_config": None}


def _what_it_is(content: Any, source: str) -> str:
    """Why a file is no fine-tuned classifier, and what to do with it."""
    state = unwrap(content)
    marks = dict.fromkeys(("cls_token", "patch_embed.proj.weight", "conv1.weight", "blocks.0.attn.q_bias"))
    prefix = best_prefix(state, marks, PLAIN)
    bare = {key.removeprefix(prefix): value for key, value in state.items()}
    what = describe_state(bare) if bare else "a file without a model's tensors"
    if bare and any(key in bare for key in ("head.weight", "fc.weight", "classifier.weight", "head.fc.weight")):
        return (f"{source} seems to be {what} with a head, but does not say how it was built nor of which classes: "
                "take the checkpoint-best.pth that run_class_finetuning.py wrote, or pass this file as "
                "--pretrained_checkpoint and train")
    return (f"{source} is no fine-tuned classifier: it seems to be {what}, without a head. Pass it as "
            "--pretrained_checkpoint to run_class_finetuning.py or linear_eval.py; what they train can be loaded here")
