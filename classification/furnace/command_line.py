"""How an entry script reads its command line and ends: values, the YAML file of ``-c``, exit codes."""

import argparse
import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from furnace.runtime import distributed
from furnace.runtime.files import ProcessError, UserError
from furnace.runtime.trainer import Stopped

logger = logging.getLogger(__name__)  # of the entry scripts

RESOLVED = "resolved_"  # in a run's args.yaml: what the run settled by itself, no option


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``-c``."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("-c", "--config", type=clean_path, default=None, metavar="FILE.yaml",
                        help="options from a YAML file (a run's args.yaml, too); the command line wins")
    return parser


def optional_path(text: str) -> Path | None:
    """A path; blank means not given."""
    return clean_path(text) if text.strip() else None


def clean_path(text: str) -> Path:
    """A path without the blanks that copied commands carry around."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text.strip()).expanduser()


def file_name(text: str) -> str:
    """A bare file name: the published default, empty, crashed after all the work."""
    name = text.strip()
    if not name or len(name) > 200 or name in (".", "..") or "/" in name or "\\" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name (no folder, not empty), e.g. results.csv")
    return name


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]: 0.1 means 10 %")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def share(text: str) -> float:
    """A number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def at_least(low: int) -> Callable[[str], int]:
    """An integer parser with a lower bound."""
    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return value
    return integer


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line over the YAML file of ``-c``.

    Raises:
        UserError: the file is absent, no mapping, or names an unknown option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("-c", "--config", type=clean_path)
    config = finder.parse_known_args(argv)[0].config
    from_file: list[str] = []
    if config is not None:
        if not config.is_file():
            raise UserError(f"-c {config} does not exist")
        try:
            options = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"-c {config} is not valid YAML: {error}") from error
        if not isinstance(options, dict):
            raise UserError(f"-c {config} must hold lines such as 'model: PanDerm_Base_LP'")
        options = {key: value for key, value in options.items() if not str(key).startswith(RESOLVED)}
        actions: dict[str, list[argparse.Action]] = {}
        for action in parser._actions:
            actions.setdefault(action.dest, []).append(action)
        unknown = sorted(set(map(str, options)) - set(actions))
        if unknown:
            raise UserError(f"-c {config} names unknown options: {', '.join(unknown)}")
        for key, value in options.items():
            from_file += _as_arguments(actions[key], value, config)
    return parser.parse_args(from_file + argv)


def _as_arguments(actions: list[argparse.Action], value: object, config: Path) -> list[str]:
    """One YAML entry as command-line words, so that argparse checks it like any other.

    A switch may be of two flags, one for true and one for false.
    """
    action = actions[-1]
    if not action.option_strings:
        raise UserError(f"-c {config}: {action.dest} must stand on the command line, not in the file")
    flag = action.option_strings[-1]
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"-c {config}: {action.dest} must be true or false, not {value!r}")
        return [one.option_strings[-1] for one in actions if one.const is value]
    values = value if isinstance(value, list) else [value]
    return [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *map(str, values)]


@contextlib.contextmanager
def own_option_names(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, messages of parts that other scripts share name the options of this one.

    Args:
        names: what other scripts call an option -> what this one does.
    """
    try:
        yield
    except UserError as error:
        error.args = (re.sub(r"--\w+", lambda flag: names.get(flag[0], flag[0]), str(error)),)
        raise


def entry_point(function: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Wrap a script's ``main(argv)``: logging, process group, and a user's mistakes as a message with exit code 2."""

    @functools.wraps(function)
    def main(argv: Sequence[str] | None = None) -> int:
        distributed_rank = int(os.environ.get("RANK", "0"))
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        logging.getLogger().setLevel(logging.INFO if distributed_rank == 0 else logging.ERROR)
        for noisy in ("httpx", "timm"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        try:
            distributed.start()
            code = function(argv)
            distributed.stop()
            return code
        except Stopped as stopped:
            if distributed_rank == 0:
                print(f"{stopped}; everything so far is saved, and the same command goes on", file=sys.stderr)
            return stopped.code
        except UserError as error:
            if distributed_rank == 0 or isinstance(error, ProcessError):
                print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; the same command starts the unfinished part again", file=sys.stderr)
            return 130

    return main
