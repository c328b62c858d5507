"""A backbone as a folder: ``config.json`` and ``model.safetensors`` as timm lays them out on the Hugging Face hub.

``export_backbone`` writes one, ``create_backbone(FOLDER)`` reads it, and so does
``timm.create_model("local-dir:FOLDER", pretrained=True)`` (for PanDerm's and DermINO's architectures after
``import furnace.models``). Folders that timm's ``save_for_hf`` wrote are read, too.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save as safetensors_bytes
from timm.models import PretrainedCfg
from torch import nn

from furnace.runtime import files
from furnace.runtime.files import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LOCAL = "local-dir:"  # timm's own prefix
WEIGHT_NAMES = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # the first that is there, as timm does
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
TRANSFORM_KEYS = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
# of timm.create_model, that would make it read other files or are the caller's choice
NOT_ARCHITECTURE = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
                    "num_classes", "features_only"}
FLEXIBLE = ("dynamic_img_size", "use_naflex")  # such a model takes images of any size
# what timm raises on arguments of the wrong kind
BUILD_ERRORS = (TypeError, AttributeError, RuntimeError, LookupError, ArithmeticError)
HOLDS = (f"an exported model is a folder with {CONFIG} and {WEIGHTS}, as the pretraining writes to teacher/ and timm's "
         "save_for_hf anywhere")


@dataclass(frozen=True)
class Exported:
    """What a folder says.

    Attributes:
        folder: with config.json.
        weights: the file of tensors; None where there is none.
        architecture: timm's name.
        arguments: of timm's constructor, without rates of dropout; with img_size where the model is built for one.
        size: side in pixels of the square images that the tensors are for.
        evaluation: mean, std, crop_pct, crop_mode, interpolation.
    """

    folder: Path
    weights: Path | None
    architecture: str
    arguments: dict[str, Any]
    size: int
    evaluation: dict[str, Any]


def export_backbone(folder: Path, backbone: nn.Module, *, input_size: int, data_config: Mapping[str, Any],
                    about: Mapping[str, Any]) -> None:
    """Write a backbone as a folder; an older export in it is replaced, other files stay.

    Args:
        folder: is made when absent.
        backbone: with ``recipe`` and ``num_features``, as ``create_backbone`` returns it; its tensors may have changed.
        input_size: side in pixels of the images that it was built for.
        data_config: mean, std, crop_pct, crop_mode and interpolation of its evaluation.
        about: plain values that say where the weights come from; under "furnace" in config.json.

    Raises:
        ValueError: the tensors are not those of the recipe at this size, or one is not finite.
        OutputError: the folder cannot be written.
    """
    architecture, _, tag = backbone.recipe["architecture"].partition(".")
    arguments = architecture_arguments(backbone.recipe["arguments"])
    state = {key: value.detach().cpu().contiguous().clone() for key, value in backbone.state_dict().items()}
    _check_state(state, architecture, arguments, input_size)
    own = backbone.pretrained_cfg
    fixed = bool(own.get("fixed_input_size") or "img_size" in arguments)
    transform = {key: list(data_config[key]) if isinstance(data_config[key], tuple) else data_config[key]
                 for key in TRANSFORM_KEYS}
    pool = getattr(backbone, "global_pool", None)
    config = {
        "architecture": architecture, "num_classes": 0, "num_features": backbone.num_features,
        **({"global_pool": pool} if isinstance(pool, str) and pool else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            **({"tag": tag} if tag else {}), "custom_load": False, "input_size": [3, input_size, input_size],
            "fixed_input_size": fixed and not any(arguments.get(key) for key in FLEXIBLE), **transform,
            "num_classes": 0, "first_conv": own.get("first_conv"), "classifier": own.get("classifier")},
        "furnace": dict(about),
    }
    folder = Path(folder)
    with files.atomic_write(folder / WEIGHTS) as file:
        file.write(safetensors_bytes(state, metadata={"format": "pt"}))
    files.write_json(folder / CONFIG, config)


def architecture_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that make the network; rates of dropout belong to a training, not to its result."""
    return {key: value for key, value in arguments.items()
            if key not in NOT_ARCHITECTURE and key != "drop_rate" and not key.endswith("_drop_rate")
            and key not in ("drop_path_rate", "drop_block_rate")}


def _check_state(state: dict[str, torch.Tensor], architecture: str, arguments: dict[str, Any], size: int) -> None:
    """The tensors are those of the network that config.json will describe."""
    if "img_size" in arguments and timm.layers.to_2tuple(arguments["img_size"]) != (size, size):
        raise ValueError(f"the backbone was built for {arguments['img_size']} pixels, not {size}")
    with torch.random.fork_rng(devices=[]):
        fresh = timm.create_model(architecture, num_classes=0, **arguments).state_dict()
    wrong = sorted(key for key in fresh.keys() | state.keys()
                   if key not in fresh or key not in state or fresh[key].shape != state[key].shape)
    if wrong:
        raise ValueError(f"{len(wrong)} tensors are not those of {architecture} at {size} pixels ({wrong[0]}, ...): "
                         "export the backbone alone, as its recipe builds it")
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors hold NaN or infinity ({broken[0]}, ...)")


# ---------------------------------------------------------------------------------------------------------- reading

def find_exported(name: str) -> Path | None:
    """The folder or file of weights that a model's name means; None when it means neither.

    A bare word is a folder only where that folder has a config.json, so that other names keep their meaning.

    Raises:
        UserError: the name is a path without an exported model.
    """
    path = Path(os.path.expanduser(name.removeprefix(LOCAL)))
    if path.is_dir() and (path / CONFIG).is_file():
        return path
    if path.is_file() and (path.parent / CONFIG).is_file():
        return path.parent if path.name == CONFIG else path
    if not (name.startswith((LOCAL, "~", ".")) or os.sep in name or path.suffix in WEIGHT_SUFFIXES):
        return None
    if path.is_dir():
        inner = sorted(entry.parent.name for entry in path.glob(f"*/{CONFIG}"))
        raise UserError(f"--model {name}: that folder has no {CONFIG}: {HOLDS}"
                        + (f"; did you mean {path / inner[0]}?" if inner else ""))
    if path.is_file():
        raise UserError(f"--model {name} is a file without {CONFIG} beside it: {HOLDS}; the weights of a model that "
                        "has a name are passed by --pretrained_checkpoint FILE")
    raise UserError(f"--model {name}: there is no such folder ({HOLDS}); a model on the Hugging Face hub is "
                    "hf-hub:OWNER/NAME")


def read_exported(path: Path) -> Exported:
    """Read what ``find_exported`` found; the tensors are not read.

    Raises:
        UserError: config.json is damaged, not timm's, of an unknown architecture, or not for square RGB images.
    """
    folder = path if path.is_dir() else path.parent
    source = folder / CONFIG
    try:
        config = json.loads(source.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{source} is damaged or not JSON ({error}): copy the folder again") from error
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise UserError(f"{source} is not timm's (no 'architecture'): convert the weights to a timm model and pass "
                        "them with --model timm:NAME --pretrained_checkpoint FILE")
    if not timm.is_model(architecture):
        raise UserError(f"{source}: timm {timm.__version__} has no model {architecture!r}: update timm, or take the "
                        "version that the folder was made with")
    pretrained = config.get("pretrained_cfg", config)  # timm's older files have all in one
    arguments = config.get("model_args") or {}
    if not isinstance(pretrained, dict) or not isinstance(arguments, dict):
        raise UserError(f"{source}: model_args and pretrained_cfg must be objects: copy the folder again")
    channels, size = _image_size(pretrained, arguments, source)
    if channels != 3:
        raise UserError(f"{source}: the model takes {channels} channels and the images here have 3")
    arguments = {key: value for key, value in architecture_arguments(arguments).items() if key != "in_chans"}
    if pretrained.get("fixed_input_size") or "img_size" in arguments:
        arguments["img_size"] = size
    weights = path if path.is_file() else next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()),
                                               None)
    return Exported(folder=folder, weights=weights, architecture=architecture, arguments=arguments, size=size,
                    evaluation=_transform(pretrained, source))


def _image_size(pretrained: dict[str, Any], arguments: dict[str, Any], source: Path) -> tuple[int, int]:
    """Channels and side; model_args, which built the tensors, win."""
    shape = pretrained.get("input_size", PretrainedCfg().input_size)
    channels = arguments.get("in_chans", shape[0] if _is_list(shape, 3) else None)
    side = arguments.get("img_size", shape[1:] if _is_list(shape, 3) else None)
    sides = [side, side] if isinstance(side, int) else side
    if not isinstance(channels, int) or not _is_list(sides, 2) or not all(isinstance(n, int) and n > 0 for n in sides):
        raise UserError(f"{source}: input_size {shape!r} and img_size {side!r} are not the size of an image: copy the "
                        "folder again")
    fixed = pretrained.get("fixed_input_size") or "img_size" in arguments
    if fixed and sides[0] != sides[1]:
        raise UserError(f"{source}: the model is for images of {sides[0]} x {sides[1]} pixels and the images here are "
                        "square")
    return channels, sides[-1]


def _transform(pretrained: dict[str, Any], source: Path) -> dict[str, Any]:
    """The evaluation's transform, timm's defaults for what the file leaves out."""
    config = {key: pretrained.get(key, getattr(PretrainedCfg(), key)) for key in TRANSFORM_KEYS}
    right = {"mean": _is_list(config["mean"], 3) and all(map(_is_number, config["mean"])),
             "std": _is_list(config["std"], 3) and all(_is_number(x) and x > 0 for x in config["std"]),
             "crop_pct": _is_number(config["crop_pct"]) and 0 < config["crop_pct"] <= 1,
             "crop_mode": config["crop_mode"] in ("center", "squash", "border"),
             "interpolation": config["interpolation"] in ("nearest", "bilinear", "bicubic", "lanczos", "box",
                                                          "hamming")}
    wrong = [key for key in TRANSFORM_KEYS if not right[key]]
    if wrong:
        raise UserError(f"{source}: {wrong[0]} of pretrained_cfg is {config[wrong[0]]!r}, which no transform of images "
                        "can use: correct it")
    return config


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
