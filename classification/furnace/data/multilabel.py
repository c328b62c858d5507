"""Several labels per image: the column ``labels`` of class names separated by semicolons."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from furnace.data.class_names import some
from furnace.data.problems import ROW, Problem
from furnace.runtime.files import UserError

LABELS = "labels"
SEPARATOR = ";"


def multi_hot(cells: Iterable[str | None], class_names: tuple[str, ...]) -> np.ndarray:
    """Cells of names to (N, K) float32 zeros and ones; names that are no class are left out."""
    place = {name: k for k, name in enumerate(class_names)}
    rows = [[place[name] for name in names_in(cell) if name in place] for cell in cells]
    targets = np.zeros((len(rows), len(class_names)), dtype=np.float32)
    for row, classes in zip(targets, rows, strict=True):
        row[classes] = 1
    return targets


def names_in(cell: str | None) -> list[str]:
    """The names of a cell, without blanks around them; an empty cell has none."""
    return [name.strip() for name in cell.split(SEPARATOR) if name.strip()] if isinstance(cell, str) else []


def read_label_sets(frame: pd.DataFrame, nb_classes: int, class_names_file: str | Path | None,
                    problems: list[Problem]) -> tuple[str, ...]:
    """Check the column ``labels`` and set ``label`` to the number of each row's set of classes.

    Rows with the same classes, in any order, have the same number; -1 where a name is not known.

    Args:
        frame: the table as text; its column label is written.
        nb_classes: the number of classes that the user expects, 0 for what is found.
        class_names_file: a text file with one class name a line, in the wanted order.
        problems: extended.

    Returns:
        The K class names: the file's, else those of all rows, sorted.
    """
    cells = [names_in(cell) for cell in frame[LABELS]]
    found = sorted({name for names in cells for name in names})
    class_names = _names_of_file(class_names_file, problems) if class_names_file else tuple(found)
    unknown = _check_cells(frame, cells, class_names, problems)
    if not class_names_file:
        _warn_of_names_alike(found, problems)
    if not class_names:
        problems.append(Problem("no classes", column=LABELS, text="no row has a label",
                                remedy="write the class names of each image, separated by semicolons"))
    elif nb_classes and nb_classes != len(class_names):
        problems.append(Problem("number of classes", column=LABELS, text=f"there are {len(class_names)} classes "
                                f"({some(class_names)}) and --nb_classes is {nb_classes}",
                                remedy=f"pass --nb_classes {len(class_names)}, or leave it out"))
    targets = multi_hot(frame[LABELS], class_names)
    frame["label"] = np.where(unknown, -1, label_sets(targets))
    if "split" in frame:
        _check_splits(frame["split"].to_numpy(), targets, class_names, problems)
    return class_names


def label_sets(targets: np.ndarray) -> np.ndarray:
    """(N, K) zeros and ones to (N,) int64 numbers of the different rows, from 0."""
    if not targets.size:
        return np.zeros(len(targets), dtype=np.int64)
    return np.unique(targets, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _names_of_file(file: str | Path, problems: list[Problem]) -> tuple[str, ...]:
    path = Path(str(file).strip()).expanduser()
    if not path.is_file():
        raise UserError(f"--class_names {path} is no file: it must be a text file with one name a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--class_names {path} is not UTF-8 text: save it as UTF-8") from error
    names = [line.strip() for line in lines if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(Problem("class names", file=str(path), text=f"{some(twice)} stands twice",
                                remedy="write one name a line, each once"))
    return tuple(dict.fromkeys(names))


def _check_cells(frame: pd.DataFrame, cells: list[list[str]], class_names: tuple[str, ...],
                 problems: list[Problem]) -> np.ndarray:
    """(N,) bool, the rows with a name that is no class; names written twice are warned of."""
    unknown = np.zeros(len(cells), dtype=bool)
    alike = {name.casefold(): name for name in class_names}
    known = set(class_names)
    for i, (names, row) in enumerate(zip(cells, frame[ROW], strict=True)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            problems.append(Problem("repeated name", row=int(row), column=LABELS, warning=True,
                                    text=f"{some(twice)} stands twice in the cell", remedy="write it once"))
        for name in dict.fromkeys(names):
            if name not in known:
                unknown[i] = True
                guess = alike.get(name.casefold(), "one of its names, or add this one to it")
                problems.append(Problem("unknown class", row=int(row), column=LABELS, remedy=f"write {guess}",
                                        text=f"{name!r} is not in the file of --class_names"))
    return unknown


def _warn_of_names_alike(names: list[str], problems: list[Problem]) -> None:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.casefold(), []).append(name)
    for alike in groups.values():
        if len(alike) > 1:
            problems.append(Problem("names alike", column=LABELS, warning=True, text=f"{some(alike)} are taken for "
                                    f"{len(alike)} classes", remedy="write the name in one way if they are one"))


def _check_splits(splits: np.ndarray, targets: np.ndarray, class_names: tuple[str, ...],
                  problems: list[Problem]) -> None:
    """Every class occurs in train; warnings where it does not occur elsewhere, or nothing else does."""
    train, other = targets[splits == "train"], targets[np.isin(splits, ("val", "test"))]
    if not len(train):
        return
    in_train = train.any(axis=0)

    def add(kind: str, which: np.ndarray, text: str, remedy: str, warning: bool) -> None:
        if which.any():
            names = some(name for name, one in zip(class_names, which, strict=True) if one)
            problems.append(Problem(kind, column=LABELS, text=text.format(names), remedy=remedy, warning=warning))

    add("class absent from train", ~in_train, "no train image has class {}", "add some, or take the class out", False)
    add("class in every train image", train.all(axis=0), "all train images have class {}: a model cannot learn when "
        "it is absent", "add images without it, or take the class out", True)
    if len(other):
        add("class in train only", in_train & ~other.any(axis=0), "no val or test image has class {}: most of its "
            "metrics are not defined", "put some of its images into val and test", True)
