"""Atomic writes, the shared table, and safe reading."""

import errno
import multiprocessing
import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import save_file

from furnace.runtime import files
from furnace.runtime.files import CheckpointError, OutputError, append_row, atomic_write, read_checkpoint

HEADER = "Dataset,ACC"


def test_atomic_write_replaces_as_a_whole(tmp_path) -> None:
    """An exception inside leaves the old content and no temporary file."""
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("number,words", [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"),
                                          (errno.ENOTDIR, "is a file, not a folder"), (errno.EIO, "cannot write")])
def test_write_errors_say_what_to_do(tmp_path, monkeypatch, number: int, words: str) -> None:
    """The disk fills up while the bytes go out: nothing is left, the old file stays."""
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=words):
        files.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_json_is_strict(tmp_path) -> None:
    """NaN is no JSON."""
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"auroc": float("nan")})
    assert not os.listdir(tmp_path)


def test_table_header_once_rows_in_order(tmp_path) -> None:
    """And ``once`` leaves an existing line alone."""
    path = tmp_path / "results" / "t.csv"
    assert append_row(path, HEADER, "a,1") and append_row(path, HEADER, "b,2")
    assert not append_row(path, HEADER, "a,1", once=True)
    assert append_row(path, HEADER, "a,1")
    assert path.read_text() == "Dataset,ACC\na,1\nb,2\na,1\n"


def test_table_without_final_newline(tmp_path) -> None:
    """An edited file does not glue two rows together."""
    path = tmp_path / "t.csv"
    path.write_text("Dataset,ACC\na,1")
    append_row(path, HEADER, "b,2")
    assert path.read_text() == "Dataset,ACC\na,1\nb,2\n"


@pytest.mark.parametrize("act", [lambda p: append_row(p, HEADER, "a,1"), lambda p: files.check_table(p, HEADER)])
def test_foreign_table_is_not_touched(tmp_path, act) -> None:
    """Somebody else's CSV of that name."""
    path = tmp_path / "t.csv"
    path.write_text("image,label,split\n")
    with pytest.raises(OutputError, match="is not a results table"):
        act(path)
    assert path.read_text() == "image,label,split\n"


def test_table_that_is_a_folder(tmp_path) -> None:
    """The published default ended in IsADirectoryError after all the work."""
    with pytest.raises(OutputError, match="is a folder"):
        files.check_table(tmp_path, HEADER)


def test_half_written_row_is_taken_back(tmp_path, monkeypatch) -> None:
    """Disk full while a row is added."""
    path = tmp_path / "t.csv"
    append_row(path, HEADER, "a,1")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="disk is full"):
        append_row(path, HEADER, "b,2")
    assert path.read_text() == "Dataset,ACC\na,1\n"


def _append_many(path, name: str) -> None:
    for i in range(50):
        append_row(path, HEADER, f"{name}{i},0")


def test_two_processes_lose_no_row(tmp_path) -> None:
    """200 rows by four processes, one header."""
    path = tmp_path / "t.csv"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, name)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = path.read_text().splitlines()
    assert lines.count(HEADER) == 1 and len(set(lines)) == 201


class Evil:
    """Its unpickling would make a file."""

    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch) -> None:
    """Zip archive and bare pickle."""
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    torch.save({"model": Evil()}, tmp_path / "zip.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"model": Evil()}))
    for name in ("zip.pth", "bare.pth"):
        with pytest.raises(CheckpointError, match="could run code"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_absent_files(tmp_path) -> None:
    """Each says which file and what to do."""
    torch.save({"a": torch.ones(1000)}, tmp_path / "good.pth")
    save_file({"a": torch.ones(1000)}, tmp_path / "good.safetensors")
    for name in ("good.pth", "good.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name.replace("good", "cut")).write_bytes(content[:len(content) // 2])
    (tmp_path / "page.pth").write_text("<html>Google Drive - Virus scan warning</html>")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "archive.pth").write_bytes(b"Rar!")
    for name, words in {"cut.pth": "damaged", "cut.safetensors": "damaged", "page.pth": "damaged or not a PyTorch",
                        "empty.pth": "0 bytes", "archive.pth": "damaged",
                        "none.pth": "does not exist; that folder has: archive.pth, cut.pth",
                        "no/where.pth": "the folder .* does not exist either", "": "is a folder"}.items():
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(tmp_path / name)


def test_read_checkpoint_hashes_the_bytes(tmp_path) -> None:
    """sha256 as any tool prints it."""
    import hashlib
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    read = read_checkpoint(f"  {tmp_path / 'a.pth'} ")
    assert read.sha256 == hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    assert torch.equal(read.content["a"], torch.ones(3))
