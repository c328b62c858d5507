"""Checkpoint files: whole or not there, the one before kept, damage found."""

import errno
import os

import pytest
import torch

from furnace.runtime import files
from furnace.runtime.files import OutputError, UserError
from furnace.runtime.run_directory import open_run
from furnace.runtime.train_state import read_stored
from toy_training import digest, toy_fit, toy_model, toy_run, toy_step


class Killed(Exception):
    """Stands for the end of the process."""


def killer(at: int):
    """A step that dies at the given micro-batch."""
    count = []

    def step(model, batch, values):
        count.append(1)
        if len(count) == at:
            raise Killed
        return toy_step(model, batch, values)

    return step


@pytest.fixture
def killed(tmp_path):
    """A run that died in its third epoch, with two checkpoints; and how it should end."""
    with pytest.raises(Killed):
        toy_fit(toy_run(tmp_path / "run"), step=killer(25))
    return tmp_path / "run", digest(toy_fit()[0])


def test_the_one_before_is_kept(killed) -> None:
    """last is of epoch 2, previous of epoch 1, nothing else."""
    folder, _ = killed
    assert [read_stored(folder / f"checkpoint-{name}.pth")["epoch"] for name in ("last", "previous")] == [2, 1]
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == [
        "checkpoint-best.pth", "checkpoint-last.pth", "checkpoint-previous.pth"]


def damage(path, how: str) -> None:
    """Spoil a file."""
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[:len(content) // 2]
    elif how == "empty":
        content = b""
    elif how == "bit":  # inside a tensor
        with torch.no_grad():
            weight = read_stored(path)["model"]["1.weight"].numpy().tobytes()
        at = bytes(content).index(weight)
        content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "bit"])
def test_a_damaged_file_falls_back_to_the_one_before(killed, how: str, caplog) -> None:
    """Even one flipped bit; the end is the same."""
    folder, wanted = killed
    damage(folder / "checkpoint-last.pth", how)
    state, _ = toy_fit(toy_run(folder))
    assert digest(state) == wanted and "taking the one before" in caplog.text


def test_both_damaged(killed) -> None:
    """Refused: nothing is started anew unasked."""
    folder, _ = killed
    for name in ("last", "previous"):
        damage(folder / f"checkpoint-{name}.pth", "cut")
    with pytest.raises(UserError, match="no checkpoint is left.*--overwrite"):
        toy_fit(toy_run(folder))


def test_died_between_the_two_renames(killed) -> None:
    """last is missing then."""
    folder, wanted = killed
    os.replace(folder / "checkpoint-last.pth", folder / "checkpoint-next.pth")
    assert digest(toy_fit(toy_run(folder))[0]) == wanted


def test_what_a_killed_write_left_is_removed(killed) -> None:
    """Gigabytes, in real runs."""
    folder, wanted = killed
    (folder / ".checkpoint-next.pth.abc.tmp").write_bytes(b"half")
    assert digest(toy_fit(toy_run(folder))[0]) == wanted
    assert not list(folder.glob(".*.tmp"))


def test_a_checkpoint_elsewhere(killed, tmp_path) -> None:
    """--resume: of the very run; another run's is refused."""
    folder, wanted = killed
    state, _ = toy_fit(toy_run(tmp_path / "moved"), resume=folder / "checkpoint-last.pth")
    assert digest(state) == wanted
    with pytest.raises(UserError, match="is of another run.*leave out --resume"):
        toy_fit(toy_run(tmp_path / "other", lr=3), resume=folder / "checkpoint-last.pth")
    with pytest.raises(UserError, match="not a checkpoint of an unfinished training"):
        toy_fit(toy_run(tmp_path / "another"), resume=folder / "checkpoint-best.pth")


@pytest.mark.parametrize("save_number", [1, 2, 4])
def test_disk_full_while_a_checkpoint_is_written(tmp_path, monkeypatch, save_number: int) -> None:
    """The run ends with the reason; what was there stays whole, and with room the run goes on to the same end."""
    real, count = torch.save, []

    def save(content, file):
        count.append(1)
        real(content, file)
        if len(count) == save_number:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OutputError, match="the disk is full"):
        toy_fit(toy_run(tmp_path / "run"))
    assert not list((tmp_path / "run").glob(".*.tmp"))
    for path in (tmp_path / "run").glob("checkpoint-last.pth"):
        read_stored(path)
    monkeypatch.setattr(torch, "save", real)
    assert digest(toy_fit(toy_run(tmp_path / "run"))[0]) == digest(toy_fit()[0])


def test_too_small_a_disk_is_told_at_the_start(tmp_path, monkeypatch) -> None:
    """Before hours of work."""
    def full(folder, needed: int) -> None:
        assert needed == 3 * (16 + 32 + 16) + 16
        raise OutputError("the disk is full")

    monkeypatch.setattr(files, "check_space", full)
    with pytest.raises(OutputError, match="the disk is full"):
        toy_fit(toy_run(tmp_path / "run"))


@pytest.mark.parametrize("links", [True, False])
def test_kept_epochs(tmp_path, monkeypatch, links: bool) -> None:
    """--save_ckpt_freq 2 of 5 epochs: 2 and 4, whole; also where the file system has no links."""
    if not links:
        def link(source, target) -> None:
            raise OSError(errno.EPERM, "no links")

        monkeypatch.setattr(os, "link", link)
    toy_fit(toy_run(tmp_path / "run"), epochs=5, keep_every_epochs=2)
    assert [(n, read_stored(tmp_path / "run" / f"checkpoint-{n}.pth")["epoch"]) for n in (2, 4)] == [(2, 2), (4, 4)]
    assert not list((tmp_path / "run").glob("checkpoint-[135].pth"))


def test_best_file_explains_itself(tmp_path) -> None:
    """meta goes in, and the exported names."""
    _, best = toy_fit(toy_run(tmp_path / "run"), meta={"model": "toy"},
                      export=lambda model: {f"x.{key}": value for key, value in model.state_dict().items()})
    stored = torch.load(tmp_path / "run" / "checkpoint-best.pth", weights_only=True)
    assert stored["meta"] == {"model": "toy"} and set(stored["model"]) == {"x.1.weight", "x.1.bias"}
    assert best["epoch"] == stored["epoch"]


def test_a_lost_best_model_is_told_at_once(killed) -> None:
    """Not after the last epoch."""
    folder, _ = killed
    damage(folder / "checkpoint-best.pth", "cut")
    with pytest.raises(UserError, match="the best epoch's model is lost"):
        toy_fit(toy_run(folder))


def test_two_processes_in_one_folder(tmp_path) -> None:
    """The second is refused, also with --overwrite; when the first is gone, it may."""
    run = toy_run(tmp_path / "run")
    with run.lock():
        with pytest.raises(UserError, match="another process is at work"):
            toy_fit(toy_run(tmp_path / "run"))
        with pytest.raises(UserError, match="another process is at work"):
            open_run(tmp_path / "run", parts={"toy": 2}, environment={}, overwrite=True)
    toy_fit(toy_run(tmp_path / "run"))


def test_space_needed_counts_what_is_trained(tmp_path, monkeypatch) -> None:
    """Three files of weights and the optimiser's two values per trained number, and the best model."""
    asked = []
    monkeypatch.setattr(files, "check_space", lambda folder, needed: asked.append(needed))
    model = toy_model()
    toy_fit(toy_run(tmp_path / "a"), model=model, ema=False)
    frozen = toy_model()
    frozen[1].weight.requires_grad = False
    toy_fit(toy_run(tmp_path / "b"), model=frozen, ema=False)
    assert asked == [3 * (16 + 32) + 16, 3 * (16 + 8) + 16]
