"""Features kept on disk, so that an image is decoded and encoded once per backbone and not once per run.

A cache folder belongs to one way of making features (weights, model, transform, precision, versions); inside, an image
is known by its path, size and modification time. Features are appended in chunk files named by the SHA-256 of their
content: a chunk is there whole or not at all, a damaged one is found by its name and made again, and processes that
write at the same time cannot disturb each other. Files with other names are left alone.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load as load_bytes
from safetensors.numpy import save as save_bytes

from furnace.data.manifest import Manifest
from furnace.runtime import files

logger = logging.getLogger(__name__)

VERSION = 1  # of the chunk files
CHUNK = re.compile(r"chunk-([0-9a-f]{64})\.safetensors")
KEY_BYTES = 16
CHUNK_IMAGES = 4096  # a chunk is written when it has so many images ...
CHUNK_SECONDS = 20.0  # ... or after this time: a kill loses no more than that
STALE_SECONDS = 86400.0  # temporary files of killed processes go after a day


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/furnace``, else ``~/.cache/furnace``."""
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".cache") / "furnace"


def image_keys(manifest: Manifest) -> np.ndarray:
    """(N, 16) uint8: a hash of each image's absolute path, size in bytes and modification time in nanoseconds."""
    root, keys = os.path.abspath(manifest.root), np.empty((len(manifest), KEY_BYTES), dtype=np.uint8)
    for i, name in enumerate(manifest.filenames):
        path = os.path.join(root, name)
        try:
            stat = os.stat(path)
            text = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
        except OSError:  # gone since the CSV was checked: the decoder will say so
            text = f"{path}\0missing"
        keys[i] = np.frombuffer(hashlib.sha256(text.encode()).digest()[:KEY_BYTES], dtype=np.uint8)
    return keys


class FeatureCache:
    """The cached features of one backbone with one transform and one precision.

    Attributes:
        folder: ``<root>/<model>_<first 16 of the SHA-256 of identity>``.
    """

    def __init__(self, root: str | Path, identity: dict[str, Any]) -> None:
        """Name the folder; nothing is written before there is a feature to keep.

        Args:
            root: the cache directory, shared by all backbones.
            identity: everything besides the image that a feature depends on, as plain values; has the key ``model``.
        """
        self.identity = {"cache_version": VERSION, **identity}
        text = json.dumps(self.identity, sort_keys=True)
        model = files.folder_name(str(identity["model"]))
        self.folder = Path(root).expanduser() / f"{model}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self._full = False

    def count(self, keys: np.ndarray) -> int:
        """How many of these images are known, by the chunks' lists alone."""
        wanted, known = {key.tobytes() for key in keys}, set()
        for path in self._chunks():
            with contextlib.suppress(OSError, safetensors.SafetensorError):  # load tells of damaged ones
                with safetensors.safe_open(path, framework="numpy") as file:
                    known |= wanted & {key.tobytes() for key in file.get_tensor("keys")}
        return len(known)

    def load(self, keys: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """What is known of these images.

        Args:
            keys: (N, 16) from ``image_keys``.
            width: D.

        Returns:
            embeddings (N, D) float32, rows of unknown images undefined; known (N,) bool.
        """
        embeddings = np.empty((len(keys), width), dtype=np.float32)
        known = np.zeros(len(keys), dtype=bool)
        wanted: dict[bytes, list[int]] = {}
        for i, key in enumerate(keys):
            wanted.setdefault(key.tobytes(), []).append(i)
        for path in sorted(self._chunks()):
            if len(wanted) == 0:
                break
            chunk = self._read(path, wanted, width)
            if chunk is None:
                continue
            for row, key in enumerate(chunk["keys"]):
                for i in wanted.pop(key.tobytes(), ()):
                    embeddings[i], known[i] = chunk["embeddings"][row], True
        return embeddings, known

    def _chunks(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder) as entries:
            for entry in entries:
                if CHUNK.fullmatch(entry.name):
                    yield Path(entry.path)

    def _read(self, path: Path, wanted: dict[bytes, list[int]], width: int) -> dict[str, np.ndarray] | None:
        """A verified chunk, or None when it holds none of the wanted images or is damaged."""
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                if not any(key.tobytes() in wanted for key in file.get_tensor("keys")):
                    return None
            content = path.read_bytes()
            whole = hashlib.sha256(content).hexdigest() == CHUNK.fullmatch(path.name).group(1)
            chunk = load_bytes(content) if whole else {}
        except FileNotFoundError:  # another process found it damaged first
            return None
        except (OSError, safetensors.SafetensorError):
            chunk = {}
        if chunk and chunk["embeddings"].shape == (len(chunk["keys"]), width):
            return chunk
        logger.warning("cache chunk %s is damaged: its images are extracted again", path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def write(self, keys: np.ndarray, embeddings: np.ndarray) -> None:
        """Append a chunk of features; images whose features are not finite are left out.

        A cache that cannot be written (disk full, no permission) costs a warning and not the run.
        """
        good = np.isfinite(embeddings).all(axis=1)
        if self._full or not good.any():
            return
        kept = {"keys": keys[good], "embeddings": embeddings[good]}
        content = save_bytes({key: np.ascontiguousarray(value) for key, value in kept.items()})  # it ignores strides
        try:
            if not (self.folder / "identity.json").exists():
                files.write_json(self.folder / "identity.json", self.identity)
                self._remove_stale()
            with files.atomic_write(self.folder / f"chunk-{hashlib.sha256(content).hexdigest()}.safetensors") as file:
                file.write(content)
        except files.OutputError as error:
            self._full = True
            reason = str(error).split("; ")[0]
            logger.warning("%s: the run goes on without keeping further features (--cache_dir names another place, "
                           "--no_cache none)", reason)

    def _remove_stale(self) -> None:
        """Temporary files that killed processes left."""
        for path in self.folder.glob(".chunk-*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()


class ChunkWriter:
    """Collects features and hands them to the cache a chunk at a time; as a context, also what is left at the end.

    With a cache of None it does nothing.
    """

    def __init__(self, cache: FeatureCache | None, *, images: int = CHUNK_IMAGES,
                 seconds: float = CHUNK_SECONDS) -> None:
        self.cache, self.images, self.seconds = cache, images, seconds
        self._keys: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._since = time.monotonic()

    def add(self, keys: np.ndarray, embeddings: np.ndarray) -> None:
        """A batch: keys (B, 16), embeddings (B, D) float32."""
        if self.cache is None:
            return
        self._keys.append(keys)
        self._rows.append(embeddings)
        if sum(map(len, self._rows)) >= self.images or time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        if self.cache is not None and self._rows:
            self.cache.write(np.concatenate(self._keys), np.concatenate(self._rows))
        self._keys, self._rows, self._since = [], [], time.monotonic()

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
