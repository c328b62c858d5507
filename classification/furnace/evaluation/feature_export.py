"""Features as files for other programs, with a list of their images, and in two dimensions."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save as safetensors_bytes

from furnace.data.manifest import Manifest
from furnace.data.problems import ROW
from furnace.data.unlabelled import LABEL_TEXT
from furnace.evaluation.features import Features
from furnace.runtime import files
from furnace.runtime.files import UserError

FORMATS = (".npz", ".safetensors")
PROJECTIONS = ("pca", "umap")


def write_features(path: str | Path, features: Features, metadata: dict[str, Any]) -> None:
    """Write features atomically.

    ``.npz``: embeddings (N, D) float32, filenames (N,) text, labels (N,) int64 where there are any (-1: this image has
    none), metadata (JSON text); read it by ``numpy.load``, without pickle. ``.safetensors``: embeddings and labels as
    tensors, filenames (a JSON list) and metadata (JSON) in its header.

    Args:
        path: ends in .npz or .safetensors.
        features: from ``backbone_features``.
        metadata: plain values.
    """
    arrays = {"embeddings": np.ascontiguousarray(features.embeddings, dtype=np.float32)}
    if (features.labels >= 0).any():
        arrays["labels"] = features.labels
    text = json.dumps(metadata, ensure_ascii=False)
    with files.atomic_write(path) as file:
        if Path(path).suffix == ".npz":
            np.savez(file, filenames=np.array(features.filenames, dtype=np.str_), metadata=np.array(text), **arrays)
        else:
            header = {"metadata": text, "filenames": json.dumps(features.filenames, ensure_ascii=False)}
            file.write(safetensors_bytes(arrays, metadata=header))


def image_table(manifest: Manifest) -> pd.DataFrame:
    """What is known of the images: row (of the arrays, from 0), filename, and the other columns of the input.

    Args:
        manifest: from ``read_images``.

    Returns:
        One row per image. Columns of the input that are called row or filename, but are not the images' names, become
        input_row and input_filename.
    """
    frame = manifest.frame
    table = pd.DataFrame({"row": range(len(frame)), "filename": frame["image"]})
    if LABEL_TEXT in frame:
        table["label"] = frame[LABEL_TEXT]
    elif manifest.label_column == "label" and (frame["label"] >= 0).any():
        table["label"] = frame["label"].where(frame["label"] >= 0).astype("Int64")
    if (frame["split"] != "").any():
        table["split"] = frame["split"]
    for name in frame.columns:
        if name not in ("image", "label", "split", ROW, LABEL_TEXT):
            table[f"input_{name}" if name in ("row", "filename") else name] = frame[name]
    return table


def project(embeddings: np.ndarray, method: str, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Features in two dimensions, for a scatter.

    Args:
        embeddings: (N, D), N >= 3.
        method: ``pca``: the two directions of largest variance. ``umap`` (McInnes et al., arXiv 1802.03426; needs the
            package umap-learn): neighbours stay neighbours, distances between groups mean little.
        seed: of UMAP; the same seed gives the same map on the same machine.

    Returns:
        (N, 2) and a title.

    Raises:
        UserError: fewer than three images, or umap-learn is not installed.
    """
    if len(embeddings) < 3:
        raise UserError(f"--scatter needs at least 3 images, and there {'is' if len(embeddings) == 1 else 'are'} "
                        f"{len(embeddings)}")
    if method == "pca":
        centred = embeddings.astype(np.float64) - embeddings.mean(axis=0, dtype=np.float64)
        variances, axes = np.linalg.eigh(centred.T @ centred)  # (D,) ascending, (D, D)
        share = variances[-2:].sum() / variances.sum() if variances.sum() > 0 else 1.0
        return centred @ axes[:, :-3:-1], f"PCA, {100 * share:.0f} % of the variance"
    umap = import_umap()
    neighbours = min(15, len(embeddings) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own defaults
        reducer = umap.UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1,
                            init="spectral" if len(embeddings) > 15 else "random")
        return reducer.fit_transform(embeddings), f"UMAP, {neighbours} neighbours, seed {seed}"


def import_umap() -> Any:
    """The optional package umap-learn.

    Raises:
        UserError: it is not installed.
    """
    try:
        import umap
    except ModuleNotFoundError as error:
        raise UserError("--scatter umap needs a package: pip install umap-learn (or pip install -e '.[plots]'); "
                        "--scatter pca works without") from error
    return umap
