"""Reading checkpoints safely and writing results atomically.

``UserError`` is the one exception for mistakes that a user can mend: entry scripts print its message and end with
exit code 2, without a traceback.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import yaml


class UserError(ValueError):
    """A mistake in the input, the options or the machine's set-up; the message says how to mend it."""


class ProcessError(UserError):
    """A mistake that one of several processes met: that process tells it, for the others know nothing of it."""


class CheckpointError(UserError):
    """A checkpoint file that is absent, unreadable, unsafe, or not of the model that was asked for."""


class OutputError(UserError):
    """An output that cannot be written, or that would write over something."""


# ---------------------------------------------------------------------------------------------------------- writing

@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` and move it into place at the end; readers see the old file or the new.

    Yields:
        A binary file object.

    Raises:
        OutputError: the folder cannot be written or the disk is full; nothing is left behind and an older ``path``
            stays as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; results are shared like any other file
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def output_error(path: str | Path, error: OSError) -> OutputError:
    """Say what went wrong while writing ``path``, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "the disk is full (or a quota is reached): free some space or choose another place"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "no permission to write there: choose another place"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        remedy = "a part of this path is a file, not a folder: choose another place"
    else:
        remedy = "choose another place"
    return OutputError(f"cannot write {path}: {error.strerror or error}; {remedy}")


OUTPUT_SUFFIXES = (".csv", ".png", ".npz", ".safetensors")


def refuse_outputs(outputs: Iterable[Path], inputs: Iterable[Path], *, overwrite: bool,
                   option: str = "--output") -> None:
    """No output may be an input, lie in an input folder, be of another kind, or (without ``overwrite``) be there.

    Args:
        outputs: files to write (by OUTPUT_SUFFIXES), and folders.
        inputs: files and folders that are read.
        overwrite: outputs that are there may be replaced.
        option: that says where they go.

    Raises:
        OutputError: the first that is wrong.
    """
    inputs = list(inputs)
    for path in outputs:
        for source in inputs:
            if source.is_dir() and path.resolve().is_relative_to(source.resolve()):
                raise OutputError(f"{path} would be written into the input folder {source}: choose {option} "
                                  "elsewhere")
            if path.exists() and source.exists() and path.samefile(source):
                raise OutputError(f"{path} is the input; nothing was written: choose another {option}")
        if path.exists() and path.is_dir() == (path.suffix.lower() in OUTPUT_SUFFIXES):
            raise OutputError(f"{path} is a {'folder' if path.is_dir() else 'file'}: choose another {option}")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} is there already: choose another {option}, or add --overwrite")


def folder_name(text: str) -> str:
    """A text as the name of a folder: letters, digits, dot, underscore, hyphen; of a long one (a path) its end."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text).lstrip("-.")[-100:]


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON (no NaN) atomically, indented for a reader."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(path: str | Path, value: dict[str, Any]) -> None:
    """Write a flat YAML file atomically, keys in their order."""
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a CSV atomically; floats with nine digits, so that float32 values come back bit for bit."""
    with atomic_write(path) as file:
        file.write(table.to_csv(index=False, float_format="%.9g", lineterminator="\n").encode("utf-8"))


def check_space(folder: str | Path, needed: int) -> None:
    """Refuse a folder that cannot take ``needed`` bytes, before hours of work whose result would not fit.

    Raises:
        OutputError: too little space.
    """
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(f"the disk of {folder} has {free:,} bytes free and the results need about {needed:,}: the "
                          "disk is full; free some space or choose another place")


def append_row(path: str | Path, header: str, row: str, *, once: bool = False) -> bool:
    """Append a line to a shared CSV table; several processes may do so at the same time.

    The file is locked while it is read and extended. A write that fails half-way (disk full) is taken back.

    Args:
        path: the table; made with ``header`` as its first line when it does not exist.
        header: expected first line.
        row: the line to add.
        once: add nothing when the very same line already stands in the table.

    Returns:
        True when the line was added.

    Raises:
        OutputError: the file cannot be written, or its first line is another header (it is somebody else's file).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            before = file.read()
            lines = before.decode("utf-8", errors="replace").splitlines()
            if lines and lines[0].strip() != header:
                raise foreign_table(path, lines[0], header)
            if once and row in lines:
                return False
            text = "" if lines else header + "\n"
            if before and not before.endswith(b"\n"):
                text = "\n" + text
            try:
                file.write((text + row + "\n").encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), len(before))
                raise
    except OSError as error:
        raise output_error(path, error) from error
    return True


def foreign_table(path: str | Path, found: str, header: str) -> OutputError:
    """The error for a table name that belongs to another file."""
    return OutputError(
        f"{path} exists and is not a results table (its first line is {found[:80]!r}, expected {header!r}); "
        "nothing was written: choose another --csv_filename"
    )


def check_table(path: str | Path, header: str) -> None:
    """Refuse a results table that is a folder or somebody else's file, before any work is done."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder: --csv_filename must name a CSV file")
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()
        if first and first != header:
            raise foreign_table(path, first, header)


# ---------------------------------------------------------------------------------------------------------- reading

def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class CheckpointFile:
    """What a checkpoint file holds, with its identity. ``content`` is plain data and tensors on the CPU."""

    path: Path
    sha256: str
    content: Any


def read_checkpoint(location: str | Path) -> CheckpointFile:
    """Read a ``.pth``/``.pt``/``.bin`` or ``.safetensors`` file; never runs code stored in it.

    Args:
        location: a local path, or ``hf-hub:owner/name`` (``hf-hub:owner/name:file`` for one file of the repository).

    Raises:
        CheckpointError: the file is absent, empty, damaged, or a pickle that holds more than plain data.
    """
    location = str(location).strip()
    path = _fetch_from_hub(location) if location.startswith("hf-hub:") else Path(location).expanduser()
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}"
                              f"{_neighbours(path)}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes): download it again")
    try:
        digest = sha256_file(path)
        content = _read_tensors(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    return CheckpointFile(path=path, sha256=digest, content=content)


# what torch.load raises on damaged files
DAMAGED = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, struct.error,
           OverflowError)


def _read_tensors(path: Path) -> Any:
    import safetensors
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path, device="cpu")
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"checkpoint {path} is damaged or not a safetensors file ({error}): "
                                  "download it again") from error
    # fine-tuned files of the published code carry their options as an argparse.Namespace: plain data, no code
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _is_pickle(path):
            raise CheckpointError(
                f"checkpoint {path} holds Python objects beside tensors and is not loaded, because unpickling them "
                "could run code. Save its state dict alone: torch.save(model.state_dict(), file)") from error
        raise CheckpointError(f"checkpoint {path} is damaged or not a PyTorch file: download it again") from error
    except DAMAGED as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged or not a PyTorch file ({reason}): "
                              "download it again") from error


def _is_pickle(path: Path) -> bool:
    """A PyTorch zip archive or a bare pickle (protocol 2 and later begin with 0x80)."""
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _neighbours(path: Path) -> str:
    """The checkpoint files that do lie in that folder, as a hint."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".pth", ".pt", ".bin", ".safetensors"))
    return f"; that folder has: {', '.join(names[:5])}" if names else "; that folder has no checkpoint files"


def _fetch_from_hub(location: str) -> Path:
    """Download (or find in the cache) one checkpoint file of a Hugging Face repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, file = location.removeprefix("hf-hub:").partition(":")
    candidates = [file] if file else ["model.safetensors", "pytorch_model.bin"]
    reason = ""
    for name in candidates:
        try:
            return Path(hf_hub_download(repository, name))
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
    raise CheckpointError(f"cannot fetch {' or '.join(candidates)} of {repository!r} from the Hugging Face hub "
                          f"({reason}): check the name and the network, or download the file and pass its path")
