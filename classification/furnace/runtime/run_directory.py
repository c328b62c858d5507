"""One folder per run: its arguments, environment, log, predictions and results, and the rules for using it again.

A run has a fingerprint, the SHA-256 of everything that can change its numbers. The folder of a run with the same
fingerprint is continued, or, when finished, answered from; one with another fingerprint is never written to unless the
user says ``--overwrite``.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from furnace.runtime import distributed, files
from furnace.runtime.files import OutputError, UserError

logger = logging.getLogger(__name__)

ENV, ARGS, LOG, RESULTS = "env.json", "args.yaml", "log.txt", "results.json"
RUN_FILES = (ENV, ARGS, LOG, RESULTS, "val.csv", "test.csv", "external.csv", "table.csv", "summary.csv",
             "probe.safetensors", "probe.json", "plots", "masks", "overlays", "prototypes.safetensors", "teacher")
ONCE = ("config", "overwrite", "no_auto_resume")  # said for one start of a run, not part of it
PATIENCE = 8.0  # seconds; loader workers of a killed process hold its lock until they look for it, every 5 s
PREVIOUS = "previous"  # where --overwrite moves the files of the run before
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pandas", "scikit-learn", "Pillow")


def fingerprint(parts: dict[str, Any]) -> str:
    """Hex SHA-256 of a flat dictionary of plain values, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class RunDirectory:
    """A run's folder. Make one with ``open_run``.

    Attributes:
        path: the folder.
        parts: what decides the run's numbers.
        fingerprint: hex SHA-256 of the parts.
        previous: arguments that an earlier, unfinished process of the same run settled (empty for a new run).
    """

    def __init__(self, path: Path, parts: dict[str, Any], previous: dict[str, Any]) -> None:
        self.path = path
        self.parts = parts
        self.fingerprint = fingerprint(parts)
        self.previous = previous

    def child_path(self, setting: dict[str, Any]) -> Path:
        """The folder inside of the run of one seed, fold or fraction."""
        return self.path / "_".join(f"{key}_{value}" for key, value in setting.items())

    def child_is_finished(self, setting: dict[str, Any]) -> bool:
        """Whether that run has its results, and they are of this parent's options."""
        path = self.child_path(setting) / RESULTS
        return path.exists() and _read_json(path).get("fingerprint") == fingerprint(self.child_parts(setting))

    def child_parts(self, setting: dict[str, Any]) -> dict[str, Any]:
        """What decides the numbers of the run of one seed, fold or fraction."""
        return {**self.parts, **setting, "parent": self.fingerprint}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; another process that wants it is refused.

        Raises:
            UserError: another process holds it.
        """
        with open(self.path / ENV, "rb") as file:
            end = time.monotonic() + PATIENCE
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > end:
                        raise UserError(f"another process is at work in {self.path}: wait for it, or "
                                        "stop it") from error
                    time.sleep(0.2)
                except OSError:
                    logger.warning("%s is on a file system without locks: see that no second process uses it",
                                   self.path)
                    break
            yield

    def write_arguments(self, arguments: dict[str, Any]) -> None:
        """Write args.yaml; it can be given to ``-c`` again."""
        arguments = {key: value for key, value in arguments.items() if key not in ONCE}
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}
        files.write_yaml(self.path / ARGS, plain)

    def write_predictions(self, split: str, table: pd.DataFrame) -> Path:
        """Write ``<split>.csv`` (see ``files.write_table``)."""
        path = self.path / f"{split}.csv"
        files.write_table(path, table)
        return path

    def write_tensors(self, name: str, content: dict[str, Any]) -> None:
        """Write tensors and plain values for ``runtime.files.read_checkpoint``, whole or not at all."""
        import torch

        with files.atomic_write(self.path / name) as file:
            torch.save(content, file)

    def write_log(self, entry: dict[str, Any]) -> None:
        """Add one JSON object as a line of log.txt."""
        path = self.path / LOG
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        files.write_text(path, before + json.dumps(entry) + "\n")

    def write_log_lines(self, entries: Sequence[dict[str, Any]]) -> None:
        """Write log.txt anew, a JSON object per line."""
        files.write_text(self.path / LOG, "".join(json.dumps(entry) + "\n" for entry in entries))

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json. Its presence marks the run as finished, so it is written last."""
        files.write_json(self.path / RESULTS, {**results, "fingerprint": self.fingerprint})

    def read_results(self) -> dict[str, Any] | None:
        """The stored results of a finished run, else None.

        Raises:
            UserError: results.json is not valid JSON (somebody edited it).
        """
        path = self.path / RESULTS
        if not path.exists():
            return None
        return _read_json(path)


def open_run(path: str | Path, *, parts: dict[str, Any], environment: dict[str, Any], overwrite: bool = False,
             auto_resume: bool = True) -> RunDirectory:
    """Make, continue or refuse a run directory.

    Args:
        path: the folder.
        parts: what decides the run's numbers, as a flat dictionary.
        environment: what env.json keeps beside the versions (seed, sha256 of CSV and weights).
        overwrite: start again in a folder that holds another run, or this run finished; a run's own files (and no
            others) are moved into its subfolder ``previous``.
        auto_resume: continue an unfinished run of the same fingerprint; otherwise it is refused.

    Raises:
        OutputError: the folder holds another run, files that are no run's, or an unfinished run with ``auto_resume``
            off; or it cannot be written.
    """
    path = Path(path)
    previous: dict[str, Any] = {}
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, not a folder: choose another --output_dir")
    present = [name for name in RUN_FILES if (path / name).exists()]
    present += sorted(found.name for found in path.glob("checkpoint-*.pth"))
    if present and not (path / ENV).exists():
        raise OutputError(f"{path} holds {', '.join(present)} but no {ENV}, so it is not the folder of a run of this "
                          "toolkit; nothing was written: choose another --output_dir")
    begun = set(present) - {ENV, ARGS}
    stored = _read_json(path / ENV) if present and not overwrite else {}
    if stored and not begun and stored.get("fingerprint") != fingerprint(parts):
        logger.info("%s holds a run that had not begun: it is replaced", path)
    elif present and not overwrite:
        _refuse_other_run(path, stored.get("fingerprint_parts", {}), parts)
        if RESULTS not in present and not auto_resume:
            raise OutputError(f"{path} holds this very run, unfinished: leave out --no_auto_resume to continue it, "
                              "or add --overwrite to start again")
        previous = _read_yaml(path / ARGS)
        return RunDirectory(path, parts, previous)
    if present:
        with RunDirectory(path, parts, previous).lock():
            pass
    for name in reversed(present):  # env.json last: whenever this is cut off, the folder is still a run's
        try:
            (path / PREVIOUS).mkdir(exist_ok=True)
            if (path / PREVIOUS / name).is_dir():
                shutil.rmtree(path / PREVIOUS / name)
            os.replace(path / name, path / PREVIOUS / name)
        except OSError as error:
            raise files.output_error(path / name, error) from error
    files.write_json(path / ENV, {"fingerprint": fingerprint(parts), "fingerprint_parts": parts, **environment,
                                  **describe_environment()})
    return RunDirectory(path, parts, previous)


def child_runs(parent: RunDirectory, settings: Sequence[dict[str, Any]],
               run_one: Callable[[RunDirectory, dict[str, Any]], dict[str, Any]], *, overwrite: bool = False,
               together: bool = False) -> list[dict[str, Any]]:
    """The one loop over seeds, folds and fractions: each setting is a run directory inside the parent's.

    Args:
        parent: the run that was asked for.
        settings: flat dictionaries such as ``{"percent_data": 0.1, "seed": 3}``; the folder is named after them.
        run_one: makes the run in its directory and returns its results; the child is finished when it has returned.
        overwrite: make finished children again.
        together: every process is here and calls ``run_one``; otherwise the main process alone.

    Returns:
        The results of every child, in the order of ``settings``; those of finished children as they were stored.
    """
    on_main = distributed.on_main if together else lambda function: function()

    def open_children() -> list[RunDirectory]:
        return [open_run(parent.child_path(setting),
                         environment={"seed": setting.get("seed")}, overwrite=overwrite,
                         parts=parent.child_parts(setting)) for setting in settings]

    children = on_main(open_children)  # before the first is made: an interrupted overwrite must not leave some old ones
    outcomes = []
    for child, setting in zip(children, settings, strict=True):
        if on_main(child.read_results) is None:
            results = run_one(child, setting)
            on_main(functools.partial(child.write_results, results))
        outcomes.append(on_main(child.read_results))
    return outcomes


def _refuse_other_run(path: Path, stored: dict[str, Any], parts: dict[str, Any]) -> None:
    """Name the differences between the run in the folder and the one that is asked for."""
    ours = json.loads(json.dumps(parts, default=str))
    if stored == ours:
        return
    differences = [f"{key}: {stored.get(key)!r} there, {ours.get(key)!r} now"
                   for key in sorted({*stored, *ours}) if stored.get(key) != ours.get(key)]
    raise OutputError(f"{path} holds another run ({'; '.join(differences)}): choose another --output_dir, "
                      "or add --overwrite to replace it")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): add --overwrite to start the run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: add --overwrite to start the run again")
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: add --overwrite to start the run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: add --overwrite to start the run again")
    return content


def describe_environment() -> dict[str, Any]:
    """Git revision (with ``+changes`` when the tree is not clean), versions, machine."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"git_revision": _git_revision(), "versions": versions, "platform": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}


def _git_revision() -> str:
    """The revision of this toolkit's own checkout; "unknown" without git or outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        status = subprocess.run(["git", "status", "--porcelain", "--", here], cwd=here, capture_output=True, text=True,
                                timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if revision.returncode or status.returncode:
        return "unknown"
    return revision.stdout.strip() + ("+changes" if status.stdout.strip() else "")
