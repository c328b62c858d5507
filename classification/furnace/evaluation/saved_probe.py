"""A fitted probe as two files of a run directory: ``probe.safetensors`` (numbers) and ``probe.json`` (what they mean).

Together with the backbone they predict further photographs: the JSON names backbone, weights, transform, precision,
classes and calibration.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load as load_bytes
from safetensors.numpy import save as save_bytes

from furnace.evaluation.linear_probe import LinearProbe
from furnace.models import Provenance
from furnace.runtime import files
from furnace.runtime.files import UserError

TENSORS, DESCRIPTION = "probe.safetensors", "probe.json"
FORMAT = 1


@dataclass(frozen=True)
class SavedProbe:
    """What is needed to predict.

    Attributes:
        probe: the weights.
        class_names: K names.
        model: the backbone's name for ``create_backbone``.
        checkpoint: as it was given, an absolute path where it is a file; None for the weights of the name itself.
        weights_sha256: of the backbone's weights.
        data_config: its transform's numbers.
        seed: of random weights.
        transform: published or fast.
        amp_dtype: precision of the features.
        temperature: of temperature scaling, None where there was no val to fit it on.
        fitted_on: the images of the temperature, in words.
    """

    probe: LinearProbe
    class_names: tuple[str, ...]
    model: str
    checkpoint: str | None
    weights_sha256: str
    data_config: dict[str, Any]
    seed: int
    transform: str
    amp_dtype: str
    temperature: float | None
    fitted_on: str | None


def save_probe(folder: Path, probe: LinearProbe, *, class_names: tuple[str, ...], provenance: Provenance,
               checkpoint: str | None, seed: int, transform: str, amp_dtype: str, temperature: float | None,
               fitted_on: str | None) -> None:
    """Write both files, the description last."""
    if checkpoint and Path(checkpoint).expanduser().is_file():
        checkpoint = str(Path(checkpoint).expanduser().absolute())
    tensors = {"weight": probe.weight, "bias": probe.bias, "classes": probe.classes}
    content = save_bytes({key: np.ascontiguousarray(value) for key, value in tensors.items()})  # it ignores strides
    with files.atomic_write(folder / TENSORS) as file:
        file.write(content)
    numbers = {key: value for key, value in asdict(probe).items() if key in ("nb_classes", "cost", "iterations")}
    files.write_json(folder / DESCRIPTION, {
        "format": FORMAT, "class_names": list(class_names), "model": provenance.name, "checkpoint": checkpoint,
        "weights_sha256": provenance.sha256, "data_config": provenance.data_config, "seed": seed,
        "transform": transform, "amp_dtype": amp_dtype, "temperature": temperature, "fitted_on": fitted_on,
        "probe": numbers})


def load_probe(folder: str | Path) -> SavedProbe:
    """Read the probe of a run directory.

    Raises:
        UserError: the folder has no probe, several, or damaged files.
    """
    folder = Path(folder).expanduser()
    if folder.name in (TENSORS, DESCRIPTION):
        folder = folder.parent
    if not (folder / DESCRIPTION).is_file() or not (folder / TENSORS).is_file():
        below = sorted(str(path.parent.relative_to(folder)) for path in folder.rglob(DESCRIPTION)) if folder.is_dir() \
            else []
        hint = f"; below it there are: {', '.join(below[:8])}" if below else ""
        what = f"has no {DESCRIPTION}" if folder.is_dir() else "does not exist"
        raise UserError(f"--probe {folder} {what}: name the run directory that linear_eval.py wrote{hint}")
    try:
        told = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_bytes((folder / TENSORS).read_bytes())
        if told["format"] != FORMAT:
            raise UserError(f"{folder / DESCRIPTION} has format {told['format']}, this version reads {FORMAT}")
        numbers = told["probe"]
        probe = LinearProbe(weight=tensors["weight"], bias=tensors["bias"], classes=tensors["classes"],
                            nb_classes=numbers["nb_classes"], cost=numbers["cost"], objective=float("nan"),
                            iterations=numbers["iterations"])
        keys = ("model", "checkpoint", "weights_sha256", "data_config", "seed", "transform", "amp_dtype",
                "temperature", "fitted_on")
        return SavedProbe(probe=probe, class_names=tuple(told["class_names"]), **{key: told[key] for key in keys})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"the probe in {folder} is damaged ({type(error).__name__}: {error}): run linear_eval.py again "
                        "with --overwrite") from error
