"""The cache: the same numbers with and without it, after kills, damage, a full disk, and from two processes at once."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import furnace
from furnace.data.datasets import build_loader
from furnace.data.manifest import Manifest, read_manifest
from furnace.evaluation import feature_cache
from furnace.evaluation.feature_cache import KEY_BYTES, ChunkWriter, FeatureCache, default_cache_dir, image_keys
from furnace.evaluation.features import Extraction, backbone_features, extract_features, settle_amp_dtype
from furnace.models import create_backbone
from furnace.runtime import files
from helpers import draw_images, small_set

KEYS = np.arange(5 * KEY_BYTES, dtype=np.uint8).reshape(5, KEY_BYTES)
ROWS = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    """An empty cache."""
    return FeatureCache(tmp_path / "cache", {"model": "timm:x/y", "amp_dtype": "fp32"})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """21 images."""
    return read_manifest(small_set(tmp_path_factory.mktemp("set")), nb_classes=3)


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    """A real one with provenance, small and fast."""
    return create_backbone("timm:test_vit", "random", input_size=160)


def chunks(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.glob("chunk-*.safetensors"))


def test_what_was_written_is_read_back(cache: FeatureCache) -> None:
    assert cache.count(KEYS) == 0 and not cache.folder.exists()
    cache.write(KEYS[:2], ROWS[:2])
    cache.write(KEYS[3:], ROWS[3:])
    found, known = cache.load(KEYS[::-1], 7)
    assert known.tolist() == [True, True, False, True, True]
    np.testing.assert_array_equal(found[known], ROWS[::-1][known])
    assert cache.count(KEYS) == 4 and cache.count(KEYS[1:3]) == 1 and len(chunks(cache)) == 2
    cache.write(KEYS[:2], ROWS[:2])  # the same content has the same name
    assert len(chunks(cache)) == 2


def test_any_memory_order(cache: FeatureCache) -> None:
    cache.write(np.asfortranarray(KEYS), np.asfortranarray(ROWS))
    found, known = cache.load(KEYS, 7)
    assert known.all()
    np.testing.assert_array_equal(found, ROWS)


def test_one_image_in_two_rows(cache: FeatureCache) -> None:
    cache.write(KEYS[:1], ROWS[:1])
    found, known = cache.load(KEYS[[0, 1, 0]], 7)
    assert known.tolist() == [True, False, True]
    np.testing.assert_array_equal(found[[0, 2]], ROWS[[0, 0]])


def test_features_that_are_not_finite_are_not_kept(cache: FeatureCache) -> None:
    rows = ROWS.copy()
    rows[1, 2], rows[3] = np.nan, np.inf
    cache.write(KEYS, rows)
    assert cache.load(KEYS, 7)[1].tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "end"])
def test_a_damaged_chunk_is_found_and_goes(cache: FeatureCache, damage: str, caplog) -> None:
    cache.write(KEYS[:2], ROWS[:2])
    cache.write(KEYS[2:], ROWS[2:])
    path = next(path for path in chunks(cache) if path.stat().st_size == min(p.stat().st_size for p in chunks(cache)))
    content = bytearray(path.read_bytes())
    content[{"flip": len(content) - 3, "end": -1}.get(damage, 0)] ^= 0 if damage in ("cut", "empty") else 0x40
    path.write_bytes({"cut": content[:len(content) // 2], "empty": b""}.get(damage, bytes(content)))
    found, known = cache.load(KEYS, 7)
    assert known.tolist() == [False, False, True, True, True] and not path.exists()
    np.testing.assert_array_equal(found[2:], ROWS[2:])
    assert "is damaged: its images are extracted again" in caplog.text
    cache.write(KEYS[:2], ROWS[:2])
    assert cache.load(KEYS, 7)[1].all()


def test_other_files_in_the_folder_are_left_alone(cache: FeatureCache) -> None:
    cache.write(KEYS, ROWS)
    others = {"notes.txt": b"mine", "chunk-abc.safetensors": b"no", "features.npz": b"", ".hidden": b"x",
              f"chunk-{'0' * 64}.safetensors.bak": b"y"}
    for name, content in others.items():
        (cache.folder / name).write_bytes(content)
    (cache.folder / "sub").mkdir()
    assert cache.load(KEYS, 7)[1].all()
    for name, content in others.items():
        assert (cache.folder / name).read_bytes() == content


def test_a_full_disk_costs_the_cache_and_not_the_run(cache: FeatureCache, manifest, backbone, monkeypatch,
                                                     caplog) -> None:
    real, written = files.os.fdopen, []

    class Full:
        """A file whose disk is full after 100 bytes of the second chunk."""

        def __init__(self, file, name: str) -> None:
            self.file, self.name = file, name

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def write(self, content: bytes) -> int:
            if content[8:9] == b"{" and len(content) > 200:  # a chunk, not identity.json
                written.append(len(content))
                if len(written) > 1:
                    self.file.write(content[:100])
                    raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content)

    monkeypatch.setattr(files.os, "fdopen", lambda fd, mode: Full(real(fd, mode), ""))
    monkeypatch.setattr(feature_cache, "CHUNK_IMAGES", 4)
    monkeypatch.setattr(ChunkWriter.__init__, "__kwdefaults__", {"images": 4, "seconds": 1e9})
    how = Extraction(device=torch.device("cpu"), batch_size=2, num_workers=0, cache_dir=cache.folder.parent)
    found = backbone_features(backbone, manifest, how)
    assert len(written) == 2, "after the first failure nothing more is tried"
    assert caplog.text.count("the run goes on without keeping further features") == 1
    kept = how.cache(backbone)
    assert len(chunks(kept)) == 1 and not list(kept.folder.glob(".*.tmp"))
    monkeypatch.undo()
    plain = backbone_features(backbone, manifest, Extraction(device=torch.device("cpu"), batch_size=2, num_workers=0))
    np.testing.assert_array_equal(found.embeddings, plain.embeddings)
    again = backbone_features(backbone, manifest, how)
    assert again.extracted == 21 - 4
    np.testing.assert_array_equal(again.embeddings, plain.embeddings)


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = FeatureCache(tmp_path / "file", {"model": "m"})
    cache.write(KEYS, ROWS)
    assert "cannot write" in caplog.text and "--no_cache" in caplog.text
    assert not cache.load(KEYS, 7)[1].any() and cache.count(KEYS) == 0


def test_temporary_files_of_killed_processes_go_after_a_day(cache: FeatureCache) -> None:
    cache.folder.mkdir(parents=True)
    old, new = cache.folder / ".chunk-a.safetensors.x.tmp", cache.folder / ".chunk-b.safetensors.y.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    cache.write(KEYS, ROWS)
    assert not old.exists() and new.exists()


def test_default_folder(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache_dir() == Path("/elsewhere/furnace")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache_dir() == Path.home() / ".cache" / "furnace"


# --------------------------------------------------------------------------------------------------- with a backbone

def test_second_time_nothing_is_decoded(manifest, backbone, tmp_path, monkeypatch) -> None:
    how = Extraction(device=torch.device("cpu"), batch_size=4, num_workers=0, cache_dir=tmp_path)
    first = backbone_features(backbone, manifest.take(range(9)), how)
    rest = backbone_features(backbone, manifest, how)
    assert (first.extracted, rest.extracted) == (9, 12)
    monkeypatch.setattr("furnace.data.images.Image.open", lambda *_: pytest.fail("an image was opened"))
    again = backbone_features(backbone, manifest.take(range(20, -1, -1)), how)
    assert again.extracted == 0
    np.testing.assert_array_equal(again.embeddings, rest.embeddings[::-1])
    np.testing.assert_array_equal(again.embeddings[::-1][:9], first.embeddings)


def test_every_way_of_making_features_has_its_own_folder(manifest, backbone, tmp_path) -> None:
    """Another precision, transform, size, seed of random weights or model never answers for this one."""
    base = Extraction(device=torch.device("cpu"), batch_size=4, num_workers=0, cache_dir=tmp_path)
    folders = {base.cache(backbone).folder, base.cache(backbone, "bf16").folder}
    for change in ({"transform": "fast"}, {"compile": True}, {"device": torch.device("meta")}):
        folders.add(Extraction(**{**vars(base), **change}).cache(backbone).folder)
    for other in (create_backbone("timm:test_vit", "random", input_size=160, seed=1),
                  create_backbone("timm:test_vit", "random", input_size=320),
                  create_backbone("timm:test_vit2", "random", input_size=160)):
        folders.add(base.cache(other).folder)
    assert len(folders) == 8
    exact = backbone_features(backbone, manifest, base)
    rough = backbone_features(backbone, manifest, Extraction(**{**vars(base), "amp_dtype": "bf16"}))
    assert rough.extracted == 21 and 1e-6 < np.abs(exact.embeddings - rough.embeddings).max() < 0.1


def test_auto_precision_follows_the_cache(manifest, backbone, tmp_path, monkeypatch) -> None:
    """Only where more than half of these images are cached; an explicit precision is taken as it is."""
    how = Extraction(device=torch.device("cpu"), batch_size=4, num_workers=0, amp_dtype="auto", cache_dir=tmp_path)
    monkeypatch.setattr("furnace.evaluation.features.resolve_amp_dtype", lambda requested, *_: f"timed {requested}")
    assert settle_amp_dtype("auto", backbone, manifest, how) == "timed auto"
    fp32 = Extraction(**{**vars(how), "amp_dtype": "fp32"})
    backbone_features(backbone, manifest.take(range(10)), fp32)
    assert settle_amp_dtype("auto", backbone, manifest, how) == "timed auto"
    assert settle_amp_dtype("auto", backbone, manifest.take(range(12)), how) == "fp32"
    backbone_features(backbone, manifest, Extraction(**{**vars(how), "amp_dtype": "bf16"}))
    assert settle_amp_dtype("auto", backbone, manifest, how) == "bf16"
    assert settle_amp_dtype("fp32", backbone, manifest, how) == "timed fp32"


def test_a_changed_image_is_extracted_again(tmp_path, backbone) -> None:
    manifest = read_manifest(small_set(tmp_path / "set"), nb_classes=3)
    how = Extraction(device=torch.device("cpu"), batch_size=4, num_workers=0, cache_dir=tmp_path / "cache")
    before = backbone_features(backbone, manifest, how)
    path = manifest.path_of(6)
    stat = path.stat()
    draw_images(path.parent, [path.name], seed=99)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = backbone_features(backbone, manifest, how)
    changed = np.flatnonzero((before.embeddings != after.embeddings).any(axis=1))
    assert after.extracted == 1 and changed.tolist() == [6]


def test_image_keys(tmp_path) -> None:
    """Path, size and time each make another key; the order of the rows does not."""
    manifest = read_manifest(small_set(tmp_path), nb_classes=3)
    keys = image_keys(manifest)
    assert keys.shape == (21, KEY_BYTES) and len({key.tobytes() for key in keys}) == 21
    np.testing.assert_array_equal(image_keys(manifest.take([5, 2])), keys[[5, 2]])
    path = manifest.path_of(3)
    stat = path.stat()
    with open(path, "ab") as file:
        file.write(b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    longer = image_keys(manifest)
    assert (longer[3] != keys[3]).any() and (np.delete(longer, 3, 0) == np.delete(keys, 3, 0)).all()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert (image_keys(manifest)[3] != longer[3]).any()
    path.unlink()
    assert len({*(key.tobytes() for key in image_keys(manifest)), longer[3].tobytes()}) == 22


# ------------------------------------------------------------------------------------------ killed, and side by side

FORKER = """
import sys
sys.path[:0] = [{library!r}]
import os, pathlib, time
import numpy as np, torch
from furnace.data.manifest import read_manifest
from furnace.evaluation.feature_cache import ChunkWriter
from furnace.evaluation.features import Extraction, backbone_features
from furnace.models import create_backbone
torch.set_num_threads(1)
manifest = read_manifest({csv!r}, nb_classes=3)


def extract(cache, output, images, delay):
    ChunkWriter.__init__.__kwdefaults__.update(images=int(images), seconds=1e9)
    backbone = create_backbone("timm:test_vit", "random", input_size=160)
    plain = backbone.forward
    def slow(x):
        time.sleep(float(delay))
        return plain(x)
    backbone.forward = slow
    print("begin", flush=True)
    how = Extraction(device=torch.device("cpu"), batch_size=3, num_workers=0, cache_dir=pathlib.Path(cache))
    found = backbone_features(backbone, manifest, how)
    np.save(output, found.embeddings)
    print("extracted", found.extracted, flush=True)


for line in sys.stdin:  # imports cost seconds: each extraction is a fork of this process, which has computed nothing
    pid = os.fork()
    if pid == 0:
        extract(*line.rstrip().split("|"))
        os._exit(0)
    print("pid", pid, flush=True)
"""


class Forker:
    """Extractions in processes of their own, quickly started."""

    def __init__(self, csv: Path) -> None:
        script = FORKER.format(library=str(Path(furnace.__file__).parent.parent), csv=str(csv))
        self.process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)

    def start(self, cache: Path, output: Path, *, images: int = 6, delay: float = 0.0) -> int:
        """Begin one; returns its process id."""
        self.process.stdin.write(f"{cache}|{output}|{images}|{delay}\n")
        self.process.stdin.flush()
        return int(self.next("pid"))

    def next(self, word: str) -> str:
        """The rest of the next line that begins with a word."""
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise AssertionError(f"the processes ended without {word!r}")


@pytest.fixture
def forker(tmp_path: Path):
    """On a set of 60 images."""
    forker = Forker(small_set(tmp_path / "set", per_split={"train": 14, "val": 3, "test": 3}))
    yield forker
    forker.process.kill()


def test_killed_ten_times_the_features_are_bit_equal(forker: Forker, tmp_path) -> None:
    """SIGKILL at a random moment of the extraction, ten times; each start goes on where the last chunk ended."""
    forker.start(tmp_path / "plain", tmp_path / "plain.npy")
    forker.next("extracted")
    rng, counts = random.Random(20261125), []
    print("seed 20261125")
    for _ in range(10):
        pid = forker.start(tmp_path / "cache", tmp_path / "never.npy", delay=0.15)
        forker.next("begin")
        time.sleep(rng.uniform(0.1, 0.6))
        os.kill(pid, signal.SIGKILL)
        counts.append(sum(1 for _ in (tmp_path / "cache").glob("*/chunk-*.safetensors")))
    time.sleep(0.2)
    counts.append(sum(1 for _ in (tmp_path / "cache").glob("*/chunk-*.safetensors")))
    assert not (tmp_path / "never.npy").exists(), "a kill came after the end: the delays are too short"
    assert counts[-1] > counts[0] and 0 < counts[-1] < 10, counts
    forker.start(tmp_path / "cache", tmp_path / "last.npy")
    assert int(forker.next("extracted")) == 60 - 6 * counts[-1]
    np.testing.assert_array_equal(np.load(tmp_path / "last.npy"), np.load(tmp_path / "plain.npy"))


def test_two_processes_at_once(forker: Forker, tmp_path) -> None:
    """Both write the same folder at the same time; every chunk is whole, both have every feature."""
    for k in range(2):
        forker.start(tmp_path / "cache", tmp_path / f"{k}.npy", images=3, delay=0.02)
    for _ in range(2):
        forker.next("extracted")
    np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
    forker.start(tmp_path / "cache", tmp_path / "2.npy", images=3)
    assert forker.next("extracted") == "0"
    np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "2.npy"))


def test_ctrl_c_keeps_what_was_extracted(manifest, backbone, tmp_path) -> None:
    loader = build_loader(manifest, lambda image: torch.zeros(3, 160, 160), batch_size=3, num_workers=0)
    cache = FeatureCache(tmp_path, {"model": "m"})
    calls = []

    class Interrupted(torch.nn.Module):
        num_features = backbone.num_features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return backbone(x)

    with pytest.raises(KeyboardInterrupt):
        extract_features(Interrupted(), loader, device="cpu", cache=cache)
    assert cache.load(image_keys(manifest), backbone.num_features)[1].sum() == 9
