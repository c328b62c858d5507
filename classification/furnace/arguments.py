"""Command-line options of the entry scripts.

Each script's parser is put together from the groups below. ``PUBLISHED`` says of every flag of the published scripts
what became of it here; a test holds it against the parsers.
"""

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from furnace.runtime import distributed
from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

# script -> published flag -> what became of it
PUBLISHED = {
    "linear_eval.py": {
        "--csv_path": "works as published",
        "--csv_filename": "works as published; the default, which crashed, is results.csv",
        "--root_path": "works as published; surrounding blanks and a missing final slash do no harm",
        "--model": "works as published; any timm or Hugging Face backbone besides",
        "--percent_data": "works as published",
        "--nb_classes": "works as published (2 reads binary_label); labels outside 0..nb_classes-1 are refused",
        "--batch_size": "works as an upper bound: the loader takes smaller pieces",
        "--num_workers": "works as published; the default is chosen from the machine",
        "--output_dir": "works as published; each run has a folder of its own inside",
        "--pretrained_checkpoint": "works as published; unfitting files are refused instead of ignored",
    },
}


RESOLVED = "resolved_"  # in a run's args.yaml: what the run settled by itself, no option


def optional_path(text: str) -> Path | None:
    """A path; blank means not given."""
    return clean_path(text) if text.strip() else None


def clean_path(text: str) -> Path:
    """A path without the blanks that copied commands carry around."""
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


def at_least(low: int) -> Callable[[str], int]:
    """An integer parser with a lower bound."""
    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return value
    return integer


def linear_eval_parser() -> argparse.ArgumentParser:
    """The options of linear_eval.py."""
    parser = _parser("Linear evaluation: features of a frozen backbone, a linear probe on train, metrics on test.")
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument("--percent_data", type=fraction, default=1.0,
                        help="share of the train images that is used, in (0, 1]")
    parser.add_argument("--percent_mode", choices=["published", "stratified"], default="published",
                        help="published: the first part of one shuffle; stratified: the same share of every class")
    add_machine_options(parser, batch_size=200)
    add_output_options(parser)
    parser.add_argument("--csv_filename", default="results.csv", type=file_name,
                        help="name of the results table inside output_dir; a line is added per run")
    return parser


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("-c", "--config", type=clean_path, default=None, metavar="FILE.yaml",
                        help="options from a YAML file (a run's args.yaml, too); the command line wins")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which backbone with which weights."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, type=str.strip, help="PanDerm_Base_LP, PanDerm_Large_LP, "
                       "DermINO_Base, dinov2, imgnet_large21k, SwAVDerm, demo, timm:NAME or hf-hub:OWNER/NAME")
    group.add_argument("--pretrained_checkpoint", type=str.strip, default=None,
                       help="checkpoint file (.pth, .safetensors), hf-hub:OWNER/NAME, or 'random' for an untrained "
                            "baseline; left out, the weights that belong to the model's name")
    group.add_argument("--input_size", type=at_least(16), default=224, help="side of the images in pixels")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Which images, labels and splits."""
    group = parser.add_argument_group("data")
    group.add_argument("--csv_path", required=True, type=clean_path, help="CSV with image, split, label/binary_label")
    group.add_argument("--root_path", type=optional_path, default=None,
                       help="folder of the images; left out, the CSV's own")
    group.add_argument("--nb_classes", type=at_least(2), default=2,
                       help="number of classes; 2 reads the column binary_label, else label")
    group.add_argument("--class_names", type=clean_path, default=None,
                       help="text file with a class name a line; left out, the column class_name, if any")
    group.add_argument("--strict_split", action="store_true",
                       help="refuse leakage between splits and repeated rows instead of warning")


def add_machine_options(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Device, precision, loading, seed."""
    group = parser.add_argument_group("machine")
    group.add_argument("--batch_size", type=at_least(1), default=batch_size, help="images per batch at most")
    group.add_argument("--num_workers", type=at_least(0), default=None,
                       help="decoding processes; left out, chosen from the machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--amp_dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                       help="precision of the backbone; auto takes bf16 where a short probe finds it faster. "
                            "Published numbers are fp32")
    group.add_argument("--seed", type=at_least(0), default=0, help="0 gives the published draws")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where results go and what happens to older ones."""
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=clean_path, default=Path("output_dir"), help="folder of all results")
    group.add_argument("--overwrite", action="store_true", help="run again although results are there")
    group.add_argument("--no_auto_resume", action="store_true", help="refuse to continue an unfinished run")


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
        actions = {action.dest: action for action in parser._actions}
        unknown = sorted(set(map(str, options)) - set(actions))
        if unknown:
            raise UserError(f"-c {config} names unknown options: {', '.join(unknown)}")
        for key, value in options.items():
            from_file += _as_arguments(actions[key], value, config)
    return parser.parse_args(from_file + argv)


def _as_arguments(action: argparse.Action, value: object, config: Path) -> list[str]:
    """One YAML entry as command-line words, so that argparse checks it like any other."""
    flag = action.option_strings[-1]
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"-c {config}: {action.dest} must be true or false, not {value!r}")
        return [flag] if value else []
    values = value if isinstance(value, list) else [value]
    return [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *map(str, values)]


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
        except UserError as error:
            if distributed_rank == 0:
                print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; the same command starts the unfinished part again", file=sys.stderr)
            return 130

    return main
