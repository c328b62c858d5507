"""Heads of a pretraining as files: taken over from a checkpoint, and written beside the exported backbone.

A checkpoint may be DermINO's ``teacher_checkpoint.pth`` (``{"teacher": {"backbone....", "dino_head....", ...}}``), a
checkpoint-best.pth of this toolkit, or the folder that ``export_teacher`` wrote.
"""

import logging
from pathlib import Path
from typing import Any

from furnace.models import Provenance
from furnace.models.dino import DinoModel
from furnace.models.exported import export_backbone
from furnace.models.loading import State, unwrap
from furnace.runtime import files
from furnace.runtime.files import read_checkpoint

logger = logging.getLogger(__name__)

HEADS = "heads.safetensors"
PARTS = ("mask_token", "dino_head", "ibot_head", "label_head")


def read_heads(provenance: Provenance) -> State:
    """The heads that belong to a backbone's file: inside it, or beside it in an exported folder; empty without any."""
    if provenance.weights != "file":
        return {}
    path = Path(provenance.file)
    beside = path.parent / HEADS
    if path.suffix == ".safetensors" and beside.is_file():
        return _heads_of(read_checkpoint(beside).content)
    inside = any(part in key for key in provenance.report.unexpected for part in PARTS)
    return _heads_of(read_checkpoint(path).content) if inside else {}


def _heads_of(content: Any) -> State:
    """The tensors of PARTS under their bare names, whatever stood before them (module., teacher., backbone.)."""
    found: State = {}
    for key, value in unwrap(content).items():
        words = key.split(".")
        start = next((i for i, word in enumerate(words) if word in PARTS), None)
        if start is not None and all(word in ("module", "teacher", "model", "backbone", "_orig_mod")
                                     for word in words[:start]):
            found[".".join(words[start:])] = value
    return found


def load_heads(model: DinoModel, state: State, *, source: str) -> list[str]:
    """Take over every part of which the file has all tensors in the right shapes; the others keep their start.

    The label head is left alone: its classes are the ontology's.

    Returns:
        The names of the parts that were loaded.
    """
    own, loaded, left = model.state_dict(), [], []
    for part in PARTS[:3]:
        wanted = {key: value for key, value in own.items() if key == part or key.startswith(f"{part}.")}
        given = {key: state[key] for key in wanted if key in state}
        if not any(key == part or key.startswith(f"{part}.") for key in state):
            continue
        if all(key in given and given[key].shape == value.shape and given[key].isfinite().all()
               for key, value in wanted.items()):
            model.load_state_dict(given, strict=False)
            loaded.append(part)
        else:
            left.append(part)
    if loaded:
        logger.info("heads from %s: %s", source, ", ".join(loaded))
    if left:
        logger.warning("%s in %s: of other sizes than asked for (--head_n_prototypes, --head_hidden_dim, "
                       "--head_bottleneck_dim), incomplete, or not finite; they start afresh", " and ".join(left),
                       source)
    return loaded


def export_teacher(folder: Path, teacher: DinoModel, *, input_size: int, about: dict[str, Any]) -> None:
    """Write the backbone as ``create_backbone(FOLDER)`` and timm load it, and the heads beside it.

    Args:
        folder: gets config.json, model.safetensors and heads.safetensors.
        teacher: the moving average.
        input_size: side of the global crops in pixels.
        about: plain values for config.json: method, data, licence.
    """
    from safetensors.torch import save

    heads = {key: value.detach().cpu().contiguous() for key, value in teacher.state_dict().items()
             if key.split(".")[0] in PARTS}
    with files.atomic_write(folder / HEADS) as file:
        file.write(save(heads))
    export_backbone(folder, teacher.backbone, input_size=input_size,
                    data_config=teacher.backbone.provenance.data_config, about=about)
