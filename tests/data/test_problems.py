"""How problems are told: one line each, every kind visible, the full list in a file."""

import logging
from pathlib import Path

import pytest

from furnace.data.problems import PRINTED, ManifestError, Problem, report
from furnace.runtime.files import UserError

CSV = Path("set.csv")


def many(kind: str, n: int, **more) -> list[Problem]:
    """n problems of a kind."""
    return [Problem(kind, row=i + 2, text=f"{kind} {i}", remedy="mend it", **more) for i in range(n)]


@pytest.mark.parametrize(("place", "expected"), [
    ({}, "bad label: is empty. Remedy: fill it."),
    ({"row": 7}, "bad label (row 7): is empty. Remedy: fill it."),
    ({"row": 7, "column": "label", "file": "a.png"},
     "bad label (row 7, column label, a.png): is empty. Remedy: fill it."),
    ({"column": "label"}, "bad label (column label): is empty. Remedy: fill it."),
])
def test_one_line(place: dict, expected: str) -> None:
    assert str(Problem("bad label", text="is empty", remedy="fill it", **place)) == expected


def test_nothing_to_report(caplog) -> None:
    report([], csv_path=CSV, folder=None)
    assert not caplog.records


def test_warnings_are_logged_and_the_run_goes_on(caplog) -> None:
    report(many("repeat", 2, warning=True), csv_path=CSV, folder=None)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.splitlines() == ["2 warnings in set.csv (2 x repeat):",
                                           "  repeat (row 2): repeat 0. Remedy: mend it.",
                                           "  repeat (row 3): repeat 1. Remedy: mend it."]


def test_errors_are_raised_and_carry_the_problems(caplog) -> None:
    problems = many("label", 1) + many("repeat", 1, warning=True)
    with pytest.raises(ManifestError) as caught:
        report(problems, csv_path=CSV, folder=None)
    assert isinstance(caught.value, UserError) and caught.value.problems == problems[:1]
    assert str(caught.value).splitlines() == ["1 problem in set.csv (1 x label):",
                                              "  label (row 2): label 0. Remedy: mend it."]
    assert "1 warning in set.csv (1 x repeat):" in caplog.text


def test_the_first_of_every_kind_comes_first(tmp_path: Path) -> None:
    problems = many("missing", 50) + many("split", 3) + many("label", 1)
    with pytest.raises(ManifestError) as caught:
        report(problems, csv_path=CSV, folder=tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "54 problems in set.csv (50 x missing, 3 x split, 1 x label):"
    assert [line.split(": ")[1] for line in lines[1:6]] == [
        f"{name}. Remedy" for name in ("missing 0", "split 0", "label 0", "missing 1", "split 1")]
    assert len(lines) == 1 + PRINTED + 1
    (file,) = tmp_path.iterdir()
    assert lines[-1] == f"  ... and 34 more; all of them are in {file}"
    assert file.name.startswith("set_problems_")
    assert file.read_text().splitlines() == ["54 problems in set.csv", *map(str, problems)]


def test_more_kinds_than_lines_are_all_counted() -> None:
    problems = [problem for i in range(30) for problem in many(f"kind{i}", 1)]
    with pytest.raises(ManifestError) as caught:
        report(problems, csv_path=CSV, folder=None)
    assert all(f"1 x kind{i}" in str(caught.value) for i in range(30))
    assert str(caught.value).splitlines()[-1] == "  ... and 10 more"


def test_warnings_and_errors_have_files_of_their_own(tmp_path: Path, caplog) -> None:
    with pytest.raises(ManifestError):
        report(many("label", 21) + many("repeat", 22, warning=True), csv_path=CSV, folder=tmp_path)
    warnings, problems = sorted(tmp_path.iterdir(), key=lambda path: path.name, reverse=True)
    assert warnings.read_text().startswith("22 warnings") and problems.read_text().startswith("21 problems")
    assert str(warnings) in caplog.text


def test_the_file_name_follows_the_content(tmp_path: Path) -> None:
    for problems in (many("label", 21), many("label", 21), many("label", 22)):
        with pytest.raises(ManifestError):
            report(problems, csv_path=CSV, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
