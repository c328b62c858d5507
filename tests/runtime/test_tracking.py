"""wandb and TensorBoard, offline; nothing unless asked for."""

import sys

import pytest

from furnace.runtime.files import UserError
from furnace.runtime.tracking import tracking

ENTRIES = [{"epoch": 0, "update": 5, "train_loss": 2.0, "val_bacc": None, "lr": 1e-4},
           {"epoch": 1, "update": 10, "train_loss": 1.5, "val_bacc": 0.5, "lr": 2e-4}]


def test_nothing_unless_asked_for(tmp_path, monkeypatch) -> None:
    """Neither package is imported."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with tracking(folder=tmp_path, run_id="x", config={}) as track:
        assert track is None
    assert not list(tmp_path.iterdir())


def test_tensorboard_holds_the_numbers(tmp_path) -> None:
    """By update; what is not defined is left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking(folder=tmp_path, run_id="x", config={}, tensorboard=tmp_path / "events") as track:
        for entry in ENTRIES:
            track(entry)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(5, 2.0), (10, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("val_bacc")] == [(10, 0.5)]


def test_tensorboard_missing(tmp_path, monkeypatch) -> None:
    """The error names the pip command."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install"):
        with tracking(folder=tmp_path, run_id="x", config={}, tensorboard=tmp_path / "events"):
            pass


def test_wandb_gets_project_name_and_numbers(tmp_path, monkeypatch) -> None:
    """A stand-in for the package: what is asked of it, with notes and tags, and that the run is finished."""
    calls, described = [], []

    class Run:
        def log(self, numbers, step):
            calls.append((step, numbers["train_loss"]))

        def finish(self):
            calls.append("finished")

    class Wandb:
        @staticmethod
        def init(**options):
            calls.append((options["project"], options["name"], options["id"], options["resume"]))
            described.append((options["notes"], list(options["tags"]), options["config"], options["dir"]))
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    with tracking(folder=tmp_path, run_id="abc", config={"lr": 1}, wandb_project="demo", run_name="mine") as track:
        for entry in ENTRIES:
            track(entry)
    assert calls == [("demo", "mine", "abc", "allow"), (5, 2.0), (10, 1.5), "finished"]
    with tracking(folder=tmp_path, run_id="abc", config={}, wandb_project="demo", notes="why it was run",
                  tags=["ham", "upernet"]):
        pass
    assert described == [(None, [], {"lr": 1}, str(tmp_path)),
                         ("why it was run", ["ham", "upernet"], {}, str(tmp_path))]
