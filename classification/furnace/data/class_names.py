"""What the classes of a data set are called."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from furnace.data.problems import Problem
from furnace.runtime.files import UserError


def read_class_names(frame: pd.DataFrame, nb_classes: int, file: str | Path | None,
                     problems: list[Problem]) -> tuple[str, ...]:
    """From --class_names, else the class_name column (unless the classes are binary_label's), else the numbers."""
    numbers = numbered(nb_classes)
    if file:
        path = Path(str(file).strip()).expanduser()
        if not path.is_file():
            raise UserError(f"--class_names {path} is no file: it must be a text file with one name a line")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"--class_names {path} is not UTF-8 text: save it as UTF-8") from error
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if len(names) != nb_classes or len(set(names)) != len(names):
            problems.append(Problem("class names", file=str(path), text=f"has {len(set(names))} different names for "
                            f"{nb_classes} classes", remedy="write one name a line, in the order of the labels"))
            return numbers
        return tuple(names)
    if not {"class_name", "label"} <= set(frame.columns):
        return numbers
    known = frame[frame["class_name"].notna() & (frame["label"] >= 0)]
    per_label = known.groupby("label")["class_name"].unique()
    if nb_classes == 2 and per_label.map(len).gt(1).any():
        return numbers  # names of finer classes beside a binary label
    for label, names in per_label.items():
        if len(names) > 1:
            problems.append(Problem("class names", column="class_name", text=f"class {label} is called "
                            f"{some(names)}", remedy="give each class one name"))
    for name, labels in known.groupby("class_name")["label"].unique().items():
        if len(labels) > 1:
            problems.append(Problem("class names", column="class_name", text=f"{name!r} names the classes "
                            f"{some(sorted(labels))}", remedy="give each class a name of its own"))
    return tuple(str(per_label[k][0]) if k in per_label.index else str(k) for k in range(nb_classes))


def numbered(nb_classes: int) -> tuple[str, ...]:
    """The names of classes without names: "0", "1", ..."""
    return tuple(map(str, range(nb_classes)))


def some(values: Iterable[object], most: int = 4) -> str:
    """The first few values for a message."""
    values = list(values)
    return " and ".join(map(str, values[:most])) + (" ..." if len(values) > most else "")
