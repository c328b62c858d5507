"""Parsers: published flags, YAML defaults, refusals."""

import pytest
import yaml

from furnace.arguments import (
    evaluate_predictions_parser,
    extract_features_parser,
    knn_eval_parser,
    linear_eval_parser,
    predict_parser,
)
from furnace.command_line import entry_point, parse
from furnace.finetuning_arguments import finetuning_parser
from furnace.published import PUBLISHED
from furnace.runtime.files import ProcessError, UserError

PARSERS = {"linear_eval.py": linear_eval_parser, "predict.py": predict_parser, "knn_eval.py": knn_eval_parser,
           "extract_features.py": extract_features_parser, "evaluate_predictions.py": evaluate_predictions_parser,
           "run_class_finetuning.py": finetuning_parser}
NEEDED = ["--model", "demo", "--csv_path", "a.csv"]


@pytest.mark.parametrize("script", PUBLISHED)
def test_every_published_flag_is_accepted(script: str) -> None:
    """And nothing stands in the table that the parser lacks."""
    flags = {flag for action in PARSERS[script]()._actions for flag in action.option_strings}
    assert set(PUBLISHED[script]) <= flags


@pytest.mark.parametrize("script", PARSERS)
def test_every_option_has_help(script: str) -> None:
    """A user reads --help first."""
    assert all(action.help for action in PARSERS[script]()._actions)


def test_published_defaults() -> None:
    """Fraction 1, two classes, batches of 200."""
    args = parse(linear_eval_parser(), NEEDED)
    assert (args.percent_data, args.nb_classes, args.batch_size, args.seed) == ([1.0], 2, 200, 0)


def test_blanks_around_values_do_no_harm() -> None:
    """The published command has one behind --root_path."""
    args = parse(linear_eval_parser(), [*NEEDED, "--root_path", "data/images/ ", "--csv_filename", " r.csv "])
    assert str(args.root_path) == "data/images" and args.csv_filename == "r.csv"


def test_yaml_sets_defaults_and_the_command_line_wins(tmp_path) -> None:
    """All kinds of values; None means not given."""
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"model": "demo", "csv_path": "b.csv", "percent_data": 0.1, "strict_split": True,
                                      "overwrite": False, "root_path": None, "nb_classes": 7}))
    args = parse(linear_eval_parser(), ["-c", str(config), "--nb_classes", "3"])
    assert (args.model, str(args.csv_path), args.percent_data, args.strict_split, args.overwrite, args.root_path,
            args.nb_classes) == ("demo", "b.csv", [0.1], True, False, None, 3)


@pytest.mark.parametrize("content,words", [("nb_clases: 3", "unknown options: nb_clases"), ("- a", "must hold lines"),
                                           ("a: [", "not valid YAML"), ("strict_split: 3", "must be true or false")])
def test_bad_yaml(tmp_path, content: str, words: str) -> None:
    """Refused, never ignored."""
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=words):
        parse(linear_eval_parser(), [*NEEDED, "-c", str(tmp_path / "c.yaml")])


def test_what_a_run_settled_is_no_option(tmp_path) -> None:
    """args.yaml carries resolved_* beside the options."""
    (tmp_path / "c.yaml").write_text("amp_dtype: auto\nresolved_amp_dtype: bf16\n")
    assert parse(linear_eval_parser(), [*NEEDED, "-c", str(tmp_path / "c.yaml")]).amp_dtype == "auto"


def test_blank_root_path_is_the_csvs_folder() -> None:
    """Not the current one."""
    assert parse(linear_eval_parser(), [*NEEDED, "--root_path", " "]).root_path is None


def test_absent_yaml() -> None:
    """Named."""
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        parse(linear_eval_parser(), [*NEEDED, "--config", "nowhere.yaml"])


@pytest.mark.parametrize("words", [["--percent_data", "0"], ["--percent_data", "10"], ["--percent_data", "-1"],
                                   ["--nb_classes", "1"], ["--batch_size", "0"], ["--num_workers", "-1"],
                                   ["--amp_dtype", "fp8"], ["--percent_mode", "x"], ["--modle", "demo"],
                                   ["--percent", "0.5"], ["--csv_filename", ""], ["--csv_filename", "a/b.csv"],
                                   ["--csv_filename", "x" * 300], ["--input_size", "8"]])
def test_bad_values_exit_with_2(words: list[str], capsys) -> None:
    """argparse's own usage message names the option."""
    with pytest.raises(SystemExit) as error:
        parse(linear_eval_parser(), [*NEEDED, *words])
    assert error.value.code == 2 and words[0] in capsys.readouterr().err


def test_entry_point_turns_user_errors_into_exit_code_2(capsys) -> None:
    """Other errors keep their traceback: they are ours."""
    @entry_point
    def mistake(argv) -> int:
        raise UserError("give another file")

    @entry_point
    def bug(argv) -> int:
        raise KeyError("x")

    @entry_point
    def stopped(argv) -> int:
        raise KeyboardInterrupt

    assert mistake([]) == 2 and capsys.readouterr().err == "error: give another file\n"
    assert stopped([]) == 130
    with pytest.raises(KeyError):
        bug([])


@pytest.mark.parametrize("option", ["--cache_dir", "--output_dir", "--csv_path"])
def test_an_empty_path_is_refused(option: str, capsys) -> None:
    """It would be the current folder."""
    with pytest.raises(SystemExit) as ended:
        parse(linear_eval_parser(), [*NEEDED, option, " "])
    assert ended.value.code == 2 and "the path is empty" in capsys.readouterr().err


@pytest.mark.parametrize("error,told", [(UserError("give another file"), ""), (ProcessError("a.jpg is broken"),
                                                                               "error: a.jpg is broken\n")])
def test_helping_processes_tell_what_they_alone_know(error, told: str, monkeypatch, capsys) -> None:
    """Under torchrun the main process tells the common mistakes, each process its own."""
    monkeypatch.setenv("RANK", "1")

    @entry_point
    def mistake(argv) -> int:
        raise error

    assert mistake([]) == 2 and capsys.readouterr().err == told
