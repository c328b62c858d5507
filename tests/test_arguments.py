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
from furnace.published import FINETUNING, LINEAR, PUBLISHED, SEGMENTATION, TAKES_VALUE, accepted_only, refused
from furnace.runtime.files import ProcessError, UserError
from furnace.segmentation import RECIPES
from furnace.segmentation_arguments import segmentation_parser

PARSERS = {"linear_eval.py": linear_eval_parser, "predict.py": predict_parser, "knn_eval.py": knn_eval_parser,
           "extract_features.py": extract_features_parser, "evaluate_predictions.py": evaluate_predictions_parser,
           "run_class_finetuning.py": finetuning_parser, "segmentation/run.py": segmentation_parser}
NEEDED = ["--model", "demo", "--csv_path", "a.csv"]


@pytest.mark.parametrize("script", PUBLISHED)
def test_every_published_flag_is_accepted(script: str) -> None:
    """And nothing stands in the table that the parser lacks."""
    flags = {flag for action in PARSERS[script]()._actions for flag in action.option_strings}
    assert set(PUBLISHED[script]) <= flags


def test_published_segmentation_flags() -> None:
    """The table is of the published run.py's flags, no more and no less."""
    words = """cfg workers gpu batch_size test_batch_size epoch resume lr weight_decay pretrained size kfold model
        patch_size window_size embed_dim depths num_heads save_name dataset dataset_path parent_path split smoke_test
        seed percent save_results log_name description tags id resume_wandb update_config use_tensorboard evaluate"""
    assert set(SEGMENTATION) == {f"--{word}" for word in words.split()}


def test_published_segmentation_command() -> None:
    """run.sh as published, its abbreviations and -b included."""
    words = """--worker 8 --gpu 0,1 -b 1 --test_batch_size 1 --epoch 100 --lr 1e-4 --weight_decay 0.05
        --log_name cae_seg_lr_1e-4_decay_0.05_full --model cae_seg --size 224 --dataset ISIC2018 --parent_path data/
        --save_name out --seed 0 --smoke"""
    args = parse(segmentation_parser(), words.split())
    assert (args.num_workers, args.gpu, args.batch_size, args.test_batch_size, args.epochs, args.lr, args.weight_decay,
            args.model, args.size, args.dataset, str(args.parent_path), str(args.output_dir), args.smoke_test) == (
                8, "0,1", 1, 1, 100, 1e-4, 0.05, "cae_seg", [224], "ISIC2018", "data", "out", True)


@pytest.mark.parametrize("script", PUBLISHED)
def test_the_table_says_what_becomes_of_a_flag(script: str) -> None:
    """Notices and refusals are the options of the parser's own group, with that text; all others work."""
    parser, table = PARSERS[script](), PUBLISHED[script]
    without = {**accepted_only(script), **refused(script)}
    found = {action.option_strings[0]: action for group in parser._action_groups
             if group.title == "accepted, without effect" for action in group._group_actions}
    assert {flag: action.help for flag, action in found.items()} == without
    assert all((action.nargs == 0) == (flag not in TAKES_VALUE) for flag, action in found.items())
    assert all(text.startswith("works as ") for flag, text in table.items() if flag not in without)


def test_values_of_a_notice_are_of_a_flag() -> None:
    """The list of the flags that take one has no strangers."""
    assert set(TAKES_VALUE) <= set(LINEAR) | set(FINETUNING) | set(SEGMENTATION)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_the_parsers_defaults(recipe: str) -> None:
    """Every number of a recipe is an option's, and none is left at the option's own default."""
    args = vars(parse(segmentation_parser(recipe), []))
    assert {name: args[name] for name in RECIPES[recipe]} == RECIPES[recipe] and args["recipe"] == recipe
    assert RECIPES[recipe].keys() == RECIPES["default"].keys()


@pytest.mark.parametrize("script", PARSERS)
def test_defaults_are_of_their_options_type(script: str) -> None:
    """A default written to args.yaml and read from there must give the same fingerprint: 16 is not 16.0."""
    parsers = [segmentation_parser(recipe) for recipe in RECIPES] if script == "segmentation/run.py" \
        else [PARSERS[script]()]
    for action in (action for parser in parsers for action in parser._actions):
        values = action.default if isinstance(action.default, list) else [action.default]
        for value in values if action.type is not None else []:
            if value is not None:
                again = action.type(str(value))
                assert (again, type(again)) == (value, type(value)), action.option_strings


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
