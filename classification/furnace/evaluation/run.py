"""The run directory of an evaluation: one folder per data set, backbone and set of options."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from furnace.data.manifest import Manifest
from furnace.evaluation.features import Extraction, settle_amp_dtype
from furnace.models import Provenance
from furnace.runtime import files
from furnace.runtime.run_directory import RunDirectory, fingerprint, open_run

# options that cannot change the numbers, or that stand in the fingerprint by their content (CSV, images, weights)
NOT_IN_FINGERPRINT = {"config", "csv_path", "root_path", "class_names", "pretrained_checkpoint", "strict_split",
                      "batch_size", "num_workers", "device", "compile", "cache_dir", "no_cache", "output_dir",
                      "csv_filename", "overwrite", "no_auto_resume"}


def open_evaluation_run(task: str, settings: dict[str, Any], manifest: Manifest, provenance: Provenance, *,
                        also: dict[str, Any] | None = None, left_out: Iterable[str] = (),
                        folder: Callable[[str], Path] | None = None) -> RunDirectory:
    """The folder ``output_dir/<data set>/<model>_<first 8 of the fingerprint>``, new or continued.

    Args:
        task: what is computed.
        settings: the script's options, ``vars(args)``; with seed, output_dir, overwrite, no_auto_resume and model.
        manifest: the data set.
        provenance: the backbone.
        also: what else decides the numbers.
        left_out: options besides NOT_IN_FINGERPRINT that cannot change the numbers.
        folder: another folder, from the first 8 of the fingerprint.
    """
    left_out = NOT_IN_FINGERPRINT | set(left_out)
    parts = {**{key: value for key, value in settings.items() if key not in left_out}, "task": task, **(also or {}),
             "csv_sha256": manifest.sha256, "images_digest": manifest.images_digest,
             "weights_sha256": provenance.sha256, "class_names": ";".join(manifest.class_names)}
    mark = fingerprint(parts)[:8]
    path = Path(settings["output_dir"]) / manifest.name / f"{files.folder_name(settings['model'])}_{mark}" \
        if folder is None else folder(mark)
    files.check_space(path, 2**20 + len(manifest.split("test")) * (80 + 16 * manifest.nb_classes))
    return open_run(path, parts=parts, overwrite=settings["overwrite"],
                    auto_resume=not settings["no_auto_resume"],
                    environment={"seed": settings.get("seeds") or settings["seed"], "csv_sha256": manifest.sha256,
                                 "weights": provenance.to_dict()})


def settle_precision(settings: dict[str, Any], run: RunDirectory, backbone: torch.nn.Module, manifest: Manifest,
                     how: Extraction) -> Extraction:
    """Resolve ``--amp_dtype auto`` once; an unfinished run keeps what it had settled on. Writes args.yaml.

    Args:
        settings: the script's options, ``vars(args)``.
        run: the run's directory.
        backbone: on any device; it is moved.
        manifest: the images whose features are wanted.
        how: the extraction's settings.

    Returns:
        ``how`` with bf16, fp16 or fp32.
    """
    asked = run.previous.get("resolved_amp_dtype", "auto") if how.amp_dtype == "auto" else how.amp_dtype
    amp_dtype = settle_amp_dtype(asked, backbone.to(how.device), manifest, how)
    run.write_arguments({**settings, "resolved_amp_dtype": amp_dtype})
    return dataclasses.replace(how, amp_dtype=amp_dtype)
