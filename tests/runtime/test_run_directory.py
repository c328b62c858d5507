"""When a run's folder is made, continued, answered from, or refused."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import yaml

from furnace.runtime.files import OutputError, UserError
from furnace.runtime.run_directory import RunDirectory, child_runs, fingerprint, open_run

PARTS = {"model": "demo", "seed": 0, "percent_data": 1.0}


def opened(path, parts=PARTS, **kwargs) -> RunDirectory:
    """With an environment entry."""
    return open_run(path, parts=parts, environment={"seed": 0}, **kwargs)


def test_new_run_writes_its_environment(tmp_path) -> None:
    """Versions, git revision, fingerprint."""
    run = opened(tmp_path / "run")
    env = json.loads((run.path / "env.json").read_text())
    assert env["fingerprint"] == run.fingerprint == fingerprint(PARTS) and env["fingerprint_parts"] == PARTS
    assert env["versions"]["torch"] and env["git_revision"] and env["seed"] == 0
    assert run.read_results() is None and run.previous == {}


def test_fingerprint_depends_on_every_part_and_not_on_order() -> None:
    """A changed value, a further key."""
    assert fingerprint(PARTS) == fingerprint(dict(reversed(PARTS.items())))
    assert len({fingerprint(p) for p in (PARTS, {**PARTS, "seed": 1}, {**PARTS, "more": None})}) == 3


def test_unfinished_run_is_continued_with_what_it_settled(tmp_path) -> None:
    """args.yaml of the first process."""
    opened(tmp_path).write_arguments({"amp_dtype": "bf16", "output_dir": tmp_path})
    assert opened(tmp_path).previous == {"amp_dtype": "bf16", "output_dir": str(tmp_path)}


def test_no_auto_resume_refuses_an_unfinished_run(tmp_path) -> None:
    """But not a finished one."""
    run = opened(tmp_path)
    with pytest.raises(OutputError, match="unfinished.*--no_auto_resume"):
        opened(tmp_path, auto_resume=False)
    run.write_results({"task": "x"})
    assert opened(tmp_path, auto_resume=False).read_results() == {"task": "x", "fingerprint": run.fingerprint}


def test_other_run_is_refused_by_what_differs(tmp_path) -> None:
    """Nothing changes on disk."""
    opened(tmp_path).write_results({"task": "x"})
    before = (tmp_path / "env.json").read_bytes()
    with pytest.raises(OutputError, match=r"percent_data: 1\.0 there, 0\.5 now.*--overwrite") as error:
        opened(tmp_path, {**PARTS, "percent_data": 0.5})
    assert "seed" not in str(error.value) and (tmp_path / "env.json").read_bytes() == before


def test_overwrite_moves_a_runs_own_files_only(tmp_path) -> None:
    """A stranger's file stays."""
    opened(tmp_path).write_results({"task": "x"})
    (tmp_path / "notes.md").write_text("mine")
    run = opened(tmp_path, {**PARTS, "seed": 9}, overwrite=True)
    assert run.read_results() is None and sorted(os.listdir(tmp_path)) == ["env.json", "notes.md", "previous"]
    assert json.loads((tmp_path / "previous" / "results.json").read_text())["task"] == "x", "nothing is lost"


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_something_else_is_refused(tmp_path, overwrite: bool) -> None:
    """It holds a test.csv that no run wrote: never deleted, not even with --overwrite."""
    (tmp_path / "test.csv").write_text("image,label\n")
    with pytest.raises(OutputError, match="not the folder of a run"):
        opened(tmp_path, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["test.csv"]


def test_file_in_the_place_of_the_folder(tmp_path) -> None:
    """--output_dir names a file, or lies below one."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match="file, not a folder"):
            opened(path)


def test_damaged_env(tmp_path) -> None:
    """A half-edited file is a message, and --overwrite helps."""
    opened(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "env.json").write_text(content)
        with pytest.raises(UserError, match="damaged.*--overwrite"):
            opened(tmp_path)
    opened(tmp_path, overwrite=True)


def test_predictions_come_back_bit_for_bit(tmp_path) -> None:
    """Nine digits hold a float32."""
    values = np.random.default_rng(0).random(1000, dtype=np.float32)
    path = opened(tmp_path).write_predictions("test", pd.DataFrame({"filename": "a.jpg", "p": values}))
    assert np.array_equal(pd.read_csv(path)["p"].to_numpy(np.float32), values)


def test_log_has_a_json_object_a_line(tmp_path) -> None:
    """Appended."""
    run = opened(tmp_path)
    run.write_log({"epoch": 0})
    run.write_log({"epoch": 1})
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]


def test_arguments_are_plain_yaml(tmp_path) -> None:
    """Paths as text, order kept."""
    opened(tmp_path).write_arguments({"model": "demo", "output_dir": tmp_path / "x", "root_path": None})
    assert yaml.safe_load((tmp_path / "args.yaml").read_text()) == {"model": "demo", "root_path": None,
                                                                    "output_dir": str(tmp_path / "x")}


def test_overwrite_moves_the_plots_too(tmp_path) -> None:
    """Twice: the plots of the run before the last one make room."""
    for number in range(3):
        run = opened(tmp_path, overwrite=True)
        assert not (tmp_path / "plots").exists()
        (tmp_path / "plots").mkdir()
        (tmp_path / "plots" / f"{number}.png").write_bytes(b"x")
        run.write_results({"number": number})
    assert [p.name for p in (tmp_path / "previous" / "plots").iterdir()] == ["1.png"]


SETTINGS = [{"percent_data": p, "seed": s} for p in (0.1, 1.0) for s in (0, 1)]


def test_child_runs_are_run_directories_inside(tmp_path) -> None:
    """In the order of the settings, each with a fingerprint of its own; finished ones are answered from."""
    parent, calls = opened(tmp_path), []

    def run_one(run: RunDirectory, setting: dict) -> dict:
        calls.append(setting)
        assert run.path == tmp_path / f"percent_data_{setting['percent_data']}_seed_{setting['seed']}"
        return {"value": 10 * setting["percent_data"] + setting["seed"]}

    outcomes = child_runs(parent, SETTINGS, run_one)
    assert [outcome["value"] for outcome in outcomes] == [1, 2, 10, 11] and calls == SETTINGS
    assert len({outcome["fingerprint"] for outcome in outcomes} | {parent.fingerprint}) == 5
    again = child_runs(opened(tmp_path), SETTINGS + [{"percent_data": 0.5, "seed": 0}], run_one)
    assert [outcome["value"] for outcome in again] == [1, 2, 10, 11, 5] and len(calls) == 5
    child_runs(opened(tmp_path), SETTINGS[:1], run_one, overwrite=True)
    assert len(calls) == 6


def test_a_child_that_fails_is_begun_again_and_no_other(tmp_path) -> None:
    """As after a kill: the finished ones stay, the unfinished one has no results."""
    calls = []

    def run_one(run: RunDirectory, setting: dict) -> dict:
        calls.append(setting)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"value": 0}

    with pytest.raises(KeyboardInterrupt):
        child_runs(opened(tmp_path), SETTINGS, run_one)
    child_runs(opened(tmp_path), SETTINGS, run_one)
    assert calls == [*SETTINGS[:3], *SETTINGS[2:]]


def test_a_run_that_had_not_begun_is_replaced(tmp_path) -> None:
    """A command with a refused option left env.json and args.yaml; the mended command is not stopped by them."""
    first = open_run(tmp_path / "r", parts={"opt": "nonsense"}, environment={})
    first.write_arguments({"opt": "nonsense"})
    second = open_run(tmp_path / "r", parts={"opt": "adamw"}, environment={})
    assert json.loads((tmp_path / "r" / "env.json").read_text())["fingerprint_parts"] == {"opt": "adamw"}
    second.write_log({"epoch": 0})
    with pytest.raises(OutputError, match="holds another run"):
        open_run(tmp_path / "r", parts={"opt": "sgd"}, environment={})


def test_children_made_together(tmp_path) -> None:
    """Every process is told the children's results; finished ones are not made again."""
    parent, made = open_run(tmp_path / "p", parts={"a": 1}, environment={}), []

    def one(child, setting) -> dict:
        made.append(setting["seed"])
        return {"value": setting["seed"] * 2}

    for _ in range(2):
        outcomes = child_runs(parent, [{"seed": 1}, {"seed": 2}], one, together=True)
        assert [outcome["value"] for outcome in outcomes] == [2, 4]
    assert made == [1, 2]
