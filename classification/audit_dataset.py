"""Images that are the same picture, within lists and between them: before a training, and before a test is believed.

    python3 audit_dataset.py pretraining.csv HAM10000.csv --output pairs.csv

Every list is a CSV with a column image, or a folder. The splits of a CSV with a column split count as lists of their
own. Exit code 0: nothing is in two lists; 1: something is; 2: a mistake in the input.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TypeVar

import pandas as pd

from furnace.command_line import at_least, clean_path, entry_point, logger, new_parser, optional_path, parse
from furnace.data.image_prints import Prints, image_prints
from furnace.data.manifest import SPLITS, Manifest
from furnace.data.overlap import LARGEST_THRESHOLD, THRESHOLD, Pair, describe, find_overlap
from furnace.data.unlabelled import read_images
from furnace.runtime import files
from furnace.runtime.files import UserError

TOLD = 20
COLUMNS = ["list_a", "split_a", "image_a", "list_b", "split_b", "image_b", "kind", "distance", "similarity",
           "orientation"]
Part = tuple[str, str]  # path of the list, split ("" without)
Result = TypeVar("Result")


def audit_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = new_parser("Images that are the same picture, exactly or nearly, within lists and between them.")
    parser.add_argument("lists", nargs="+", type=clean_path, metavar="CSV_OR_FOLDER",
                        help="CSVs with a column image (splits count as lists of their own), or folders of images")
    parser.add_argument("--root_path", nargs="+", type=optional_path, default=None, metavar="FOLDER",
                        help="folder of the CSVs' images: one for all of them, or one for each list ('' for a folder "
                             "or for the CSV's own)")
    parser.add_argument("--threshold", type=at_least(0), default=THRESHOLD,
                        help="bits of 63 in which the perceptual hashes of nearly equal images may differ, at most "
                             f"{LARGEST_THRESHOLD}")
    parser.add_argument("--between_only", action="store_true",
                        help="do not look for copies within a list, which takes longest where a list is long")
    parser.add_argument("--num_workers", type=at_least(1), default=None, help="threads; left out, one per core")
    parser.add_argument("--output", type=clean_path, default=None, metavar="PAIRS.csv", help="the pairs, a line each")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Read, compare, tell; returns the exit code."""
    args = parse(audit_parser(), argv)
    roots = check_options(args)
    manifests = for_each(zip(args.lists, roots, strict=True), lambda one: read_images(*one))
    prints = for_each(manifests, lambda manifest: image_prints(manifest, workers=args.num_workers))
    parts, lists = split_up(manifests, prints)
    rows, between = [], []
    for one, other in combinations_with_replacement(lists, 2):
        if one is other and args.between_only:
            continue
        pairs = find_overlap(one, None if one is other else other, threshold=args.threshold, workers=args.num_workers)
        logger.info("%s", summary(pairs, parts, one, other))
        rows += [row_of(pair, parts) for pair in pairs]
        between += pairs if one is not other else []
    for pair in between[:TOLD]:
        logger.info("  %s of %s and %s of %s: %s", pair.first, name(parts[pair.list_a]), pair.second,
                    name(parts[pair.list_b]), describe(pair))
    if len(between) > TOLD:
        logger.info("  ... and %d more between lists", len(between) - TOLD)
    if args.output is not None:
        files.write_table(args.output, pd.DataFrame(rows, columns=COLUMNS))
        logger.info("%d pairs written to %s", len(rows), args.output)
    return 1 if between else 0


def check_options(args: argparse.Namespace) -> list[Path | None]:
    """Refuse before the work what would fail after it; returns the folder of each list's images."""
    if args.threshold > LARGEST_THRESHOLD:
        raise UserError(f"--threshold {args.threshold} is above {LARGEST_THRESHOLD}: too many different images would "
                        "have to be compared closely")
    real = [path.resolve() for path in args.lists]
    if twice := sorted({str(path) for path in real if real.count(path) > 1}):
        raise UserError(f"{', '.join(twice)} is given twice: name each list once")
    if args.output is not None:
        if args.output.suffix.lower() != ".csv":
            raise UserError(f"--output {args.output} must end in .csv")
        files.refuse_outputs([args.output], args.lists, overwrite=args.overwrite)
    roots = args.root_path or [None]
    if len(roots) == 1:
        return [None if path.is_dir() else roots[0] for path in args.lists]
    if len(roots) != len(args.lists):
        raise UserError(f"--root_path gives {len(roots)} folders for {len(args.lists)} lists: give one for all, or one "
                        "for each ('' for a folder, or for the CSV's own)")
    return roots


def for_each(values: Iterable, function: Callable[..., Result]) -> list[Result]:
    """The results of all; the mistakes of all lists are told together."""
    results, mistakes = [], []
    for value in values:
        try:
            results.append(function(value))
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return results


def split_up(manifests: Sequence[Manifest], prints: Sequence[Prints]) -> tuple[list[Part], list[Prints]]:
    """Every split as a list of its own, numbered in order."""
    parts: list[Part] = []
    lists = []
    for manifest, of_all in zip(manifests, prints, strict=True):
        splits = manifest.frame["split"]
        for split in sorted(splits.unique(), key=lambda text: ((*SPLITS, text).index(text), text)):
            lists.append(of_all.take((splits == split).to_numpy().nonzero()[0], number=len(parts)))
            parts.append((str(manifest.csv_path), split))
    return parts, lists


def name(part: Part) -> str:
    """A list in words."""
    return f"{part[0]} ({part[1]})" if part[1] else part[0]


def summary(pairs: Sequence[Pair], parts: Sequence[Part], one: Prints, other: Prints) -> str:
    """One line on a pair of lists."""
    exact = sum(pair.kind == "exact" for pair in pairs)
    counts = f"{exact:,} exact and {len(pairs) - exact:,} near pairs"
    if one is other:
        return f"within {name(parts[one.number])}, {len(one):,} images: {counts}"
    first, second = len({pair.first for pair in pairs}), len({pair.second for pair in pairs})
    return (f"between {name(parts[one.number])} and {name(parts[other.number])}: {counts}"
            + (f", {first:,} of {len(one):,} and {second:,} of {len(other):,} images" if pairs else ""))


def row_of(pair: Pair, parts: Sequence[Part]) -> tuple:
    """A line of the output."""
    return (*parts[pair.list_a], pair.first, *parts[pair.list_b], pair.second, pair.kind, pair.distance,
            round(pair.similarity, 4), pair.orientation)


if __name__ == "__main__":
    sys.exit(main())
