"""Dermatology foundation-model toolkit: load a backbone, extract features, evaluate.

The public names below are imported on first use, so that ``import furnace`` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "create_backbone": "furnace.models",
    "list_backbones": "furnace.models",
    "build_transform": "furnace.data.transforms",
    "read_manifest": "furnace.data.manifest",
    "build_loader": "furnace.data.datasets",
    "extract_features": "furnace.evaluation.features",
    "fit_linear_probe": "furnace.evaluation.linear_probe",
    "classification_metrics": "furnace.evaluation.metrics",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'furnace' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
