"""The CSV of a data set, read and checked once.

Contract: ``image`` (path below the image folder), ``split`` (train, val, test) and ``label`` (integers from 0) or, for
two classes, ``binary_label`` (0/1) or, with several labels per image, ``labels`` (class names between semicolons).
Other columns are kept; ``class_name``, ``patient_id`` and ``lesion_id`` are used where they exist. Every problem of the
file is found in one pass and reported together.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from furnace.data.class_names import read_class_names, some
from furnace.data.csv_table import image_folder, missing_column, parse_csv, read_csv_bytes
from furnace.data.images import check_files
from furnace.data.multilabel import LABELS, multi_hot, read_label_sets
from furnace.data.problems import ROW, Problem, report

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
GROUP_COLUMNS = ("patient_id", "lesion_id")
MOST_CLASSES = 10_000  # a higher label is rather an id than a class


@dataclass(frozen=True)
class Manifest:
    """A checked table of labelled images; immutable. Splits and subsets are Manifests too.

    Attributes:
        frame: a row per image: image (str), label (int64), split, ROW (line of the CSV), then the other columns as
            text (NaN where empty); with binary_label or labels, a label column beside it is kept as multiclass_label.
        name: the CSV's stem, the name of the data set.
        csv_path: the file.
        root: the folder that ``image`` is relative to.
        sha256: of the CSV's bytes.
        images_digest: sha256 over every image's name and content, so that other pictures are another data set.
        class_names: one per class, ``class_names[label]``; with several labels per image, of the columns of
            ``targets``.
        label_column: label, binary_label or (several labels per image) labels.
        group_columns: patient_id and lesion_id, those that exist.
    """

    frame: pd.DataFrame
    name: str
    csv_path: Path
    root: Path
    sha256: str
    images_digest: str
    class_names: tuple[str, ...]
    label_column: str
    group_columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def nb_classes(self) -> int:
        """The number of classes of the whole data set."""
        return len(self.class_names)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 classes; with several labels per image, numbers of the different sets of labels."""
        return self.frame["label"].to_numpy(dtype=np.int64)

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.label_column == LABELS

    @property
    def targets(self) -> np.ndarray:
        """(N,) int64 classes, or (N, K) float32 zeros and ones where an image may have several; a copy."""
        return multi_hot(self.frame[LABELS], self.class_names) if self.multilabel else self.labels.copy()

    @property
    def filenames(self) -> list[str]:
        """The ``image`` column."""
        return self.frame["image"].tolist()

    def path_of(self, index: int) -> Path:
        """Where image ``index`` lies."""
        return self.root / self.frame["image"].iat[index]

    def split(self, name: str) -> "Manifest":
        """The images of train, val or test, in the CSV's order."""
        return replace(self, frame=self.frame[self.frame["split"] == name].reset_index(drop=True))

    def join(self, other: "Manifest") -> "Manifest":
        """This one's images, then the other's (of the same data set)."""
        return replace(self, frame=pd.concat([self.frame, other.frame], ignore_index=True))

    def with_splits(self, splits: Sequence[str]) -> "Manifest":
        """The same images, otherwise split; (N,) train, val or test."""
        return replace(self, frame=self.frame.assign(split=list(splits)))

    def take(self, indices: Sequence[int]) -> "Manifest":
        """The images at these positions, in this order."""
        return replace(self, frame=self.frame.iloc[list(indices)].reset_index(drop=True))


def read_manifest(csv_path: str | Path, root_path: str | Path | None = None, *, nb_classes: int,
                  task: str = "multiclass", image_column: str = "image", class_names_file: str | Path | None = None,
                  strict_split: bool = False, report_folder: str | Path | None = None) -> Manifest:
    """Read and check a data set's CSV and the files it names.

    Args:
        csv_path: the CSV (UTF-8, with or without byte-order mark).
        root_path: the folder of the images; None means the CSV's own folder.
        nb_classes: the number of classes; 2 reads ``binary_label`` (or ``label`` where only that exists). With
            multilabel 0 takes what is found.
        task: multiclass (a class per image) or multilabel (the column ``labels``; an empty cell: none of the classes).
        image_column: the column that names the images, called image from here on; another column of that name is
            left out.
        class_names_file: a text file with one class name a line, in label order.
        strict_split: treat leakage between splits and repeated rows as errors instead of warnings.
        report_folder: where the full list goes when there are more than 20 problems.

    Raises:
        ManifestError: one or more errors; all are in the message or in the file it names.
        UserError: the CSV or the image folder does not exist.
    """
    if task not in ("multiclass", "multilabel"):
        raise ValueError(f"task {task!r} is neither multiclass nor multilabel")
    csv_path = Path(csv_path).expanduser()
    content = read_csv_bytes(csv_path)
    root = image_folder(root_path, csv_path)
    problems: list[Problem] = []
    frame = parse_csv(content, csv_path, problems)
    label_column, nb_classes = _label_column(frame, nb_classes, task, problems)
    frame = _name_image_column(frame, image_column, problems)
    if "split" in frame:
        frame["split"] = _check_splits(frame, problems)
    else:
        problems.append(missing_column(frame, "split", "add a column named split"))
    class_names = _read_classes(frame, label_column, nb_classes, class_names_file, problems)
    images_digest = ""
    if "image" in frame:
        images_digest, content_ids = check_files(frame, root, problems)
        if label_column and "split" in frame:
            check_repeats(frame, root, content_ids, strict_split, problems,
                          told=LABELS if label_column == LABELS else "label")
    groups = tuple(column for column in GROUP_COLUMNS if column in frame)
    if "split" in frame:
        for column in groups:
            check_group_leakage(frame, column, strict_split, problems)
    report([replace(problem, column=image_column) if problem.column == "image" else problem for problem in problems],
           csv_path=csv_path, folder=report_folder)
    first = ["image", "label", "split", ROW]
    return Manifest(frame=frame[first + [c for c in frame.columns if c not in first]].astype({"label": "int64"}),
                    name=csv_path.stem, csv_path=csv_path, root=root, sha256=hashlib.sha256(content).hexdigest(),
                    images_digest=images_digest, class_names=class_names, label_column=label_column,
                    group_columns=groups)


def _label_column(frame: pd.DataFrame, nb_classes: int, task: str, problems: list[Problem]) -> tuple[str | None, int]:
    """The column of the labels (binary_label for two classes, else label), and the number of classes.

    Without a number of classes the CSV's own is taken, as an error, so that the rest is checked in the same pass.
    """
    if task == "multilabel":
        if LABELS in frame:
            return LABELS, nb_classes
        problems.append(missing_column(frame, LABELS, "add a column with the class names of each image, separated by "
                                       "semicolons, or take --task multiclass"))
        return None, nb_classes
    wanted = "binary_label" if nb_classes == 2 else "label"
    if nb_classes < 1 and not {"label", "binary_label"}.isdisjoint(frame.columns):
        wanted = "label" if "label" in frame else "binary_label"
        nb_classes = _count_classes(frame, wanted, problems)
        return (wanted if nb_classes else None), nb_classes
    if wanted in frame:
        return wanted, nb_classes
    if nb_classes == 2 and "label" in frame:
        logger.info("the CSV has no binary_label column: taking label as the two classes")
        return "label", nb_classes
    remedy = "add a column with integers from 0"
    if "binary_label" in frame:
        remedy = "pass --nb_classes 2 to use the column binary_label, or add a column label"
    problems.append(missing_column(frame, wanted, remedy))
    return None, nb_classes


def _count_classes(frame: pd.DataFrame, column: str, problems: list[Problem]) -> int:
    """The number of classes that the labels speak for, 0 where they do not; an error that says what to pass."""
    numbers = pd.to_numeric(frame[column], errors="coerce").astype(float)
    highest = numbers[np.isfinite(numbers)].max() if np.isfinite(numbers).any() else -1
    if not 0 <= highest < MOST_CLASSES:
        problems.append(Problem("number of classes", column=column, text="--nb_classes is missing, and the column does "
                                "not tell it", remedy="number the classes from 0 and pass --nb_classes"))
        return 0
    count = 2 if column == "binary_label" else max(2, int(highest) + 1)
    problems.append(Problem("number of classes", column=column, text=f"--nb_classes is missing; the CSV has labels "
                            f"0..{int(highest)}", remedy=f"pass --nb_classes {count}"))
    return count


def _name_image_column(frame: pd.DataFrame, image_column: str, problems: list[Problem]) -> pd.DataFrame:
    """The named column as ``image``."""
    if image_column not in frame:
        remedy = f"add a column named {image_column}" + ("" if image_column == "image" else ", or pass the right "
                                                         "--image_key")
        problems.append(missing_column(frame, image_column, remedy))
        return frame.drop(columns="image", errors="ignore")
    if image_column == "image":
        return frame
    return frame.drop(columns="image", errors="ignore").rename(columns={image_column: "image"})


def _read_classes(frame: pd.DataFrame, label_column: str | None, nb_classes: int, class_names_file: str | Path | None,
                  problems: list[Problem]) -> tuple[str, ...]:
    """Set ``label`` from its column, and name the classes."""
    if label_column not in (None, "label") and "label" in frame:
        frame["multiclass_label"] = frame["label"]
    if label_column == LABELS:
        return read_label_sets(frame, nb_classes, class_names_file, problems)
    if label_column:
        frame["label"] = check_labels(frame, label_column, nb_classes, problems)
        if "split" in frame:
            _check_train_classes(frame, nb_classes, label_column, problems)
    return read_class_names(frame, nb_classes, class_names_file, problems) if nb_classes else ()


def _check_splits(frame: pd.DataFrame, problems: list[Problem]) -> pd.Series:
    """Every split name known, train and test not empty."""
    check_split_names(frame, problems)
    for name in ("train", "test"):
        if not (frame["split"] == name).any():
            problems.append(Problem("empty split", column="split", text=f"no image has the split {name}",
                                    remedy=f"mark some rows as {name}"))
    return frame["split"]


def check_split_names(frame: pd.DataFrame, problems: list[Problem]) -> None:
    """Every row is in train, val or test."""
    for row, value in frame.loc[~frame["split"].isin(SPLITS), [ROW, "split"]].itertuples(index=False):
        guess = {"tr": "train", "va": "val", "de": "val", "te": "test"}.get(str(value).lower()[:2])
        problems.append(Problem("unknown split", row=row, column="split",
                                text="is empty" if value is None else f"{value!r} is none of train, val, test",
                                remedy=f"write {guess}" if value and guess else "write train, val or test"))


def check_labels(frame: pd.DataFrame, column: str, nb_classes: int, problems: list[Problem], *,
                 too_high: str = "") -> pd.Series:
    """Text to class numbers ("1.0" counts as 1); -1 where that fails.

    Args:
        frame: the table, as text.
        column: where the numbers stand.
        nb_classes: K; the numbers are 0 to K - 1.
        problems: extended by the rows without a class.
        too_high: the remedy for a number from K on; "" proposes a higher --nb_classes.

    Returns:
        (N,) int64.
    """
    numbers = pd.to_numeric(frame[column], errors="coerce").astype(float)
    whole = numbers.notna() & np.isfinite(numbers) & (numbers % 1 == 0)
    known = whole & (numbers >= 0) & (numbers < nb_classes)
    highest = int(numbers[whole].max()) if whole.any() else -1
    for index in np.flatnonzero(~known):
        value = frame[column].iat[index]
        if value is None:
            text, remedy = "is empty", f"give every image a class from 0 to {nb_classes - 1}"
        elif value.lower() in ("true", "false"):
            text, remedy = f"{value!r} is not an integer", "write 1 for True and 0 for False"
        elif not whole.iat[index]:
            text, remedy = f"{value!r} is not an integer", "number the classes from 0 (names may stand in class_name)"
        else:
            text = f"{value} is not in 0..{nb_classes - 1}"
            fits = 0 < numbers.iat[index] and highest < MOST_CLASSES
            remedy = f"pass --nb_classes {highest + 1}" if fits else "number the classes from 0"
            remedy = too_high if too_high and numbers.iat[index] > 0 else remedy
        problems.append(Problem("bad label", row=int(frame[ROW].iat[index]), column=column, text=text,
                                remedy=remedy))
    return numbers.where(known, -1).astype("int64")


def _check_train_classes(frame: pd.DataFrame, nb_classes: int, column: str, problems: list[Problem]) -> None:
    """Every class occurs in the full train split."""
    train = set(frame.loc[frame["split"] == "train", "label"])
    absent = [k for k in range(nb_classes) if k not in train]
    if train and absent:
        problems.append(Problem("class absent from train", column=column,
                                text=f"no train image has class {some(absent)}",
                                remedy=f"add some, or pass the right --nb_classes (now {nb_classes})"))


def check_repeats(frame: pd.DataFrame, root: Path, content_ids: list[str], strict: bool,
                  problems: list[Problem], *, told: str = "label") -> None:
    """One image in several rows: with two labels an error; in two splits or twice in one, a warning.

    A copy under another name is a warning where it crosses splits or labels (public sets have some).

    Rows whose label or split is already reported as wrong say nothing here. ``told`` is the column that says a row's
    label in a message.
    """
    known = frame[frame["image"].notna() & frame["split"].isin(SPLITS) & (frame["label"] >= 0)]
    identity = known["image"].map(lambda name: os.path.realpath(root / name.replace("\0", "")))
    for _, rows in known.groupby(identity[identity.duplicated(keep=False)], sort=False):
        image = rows["image"].iat[0]
        lines = ", ".join(map(str, rows[ROW]))
        row = int(rows[ROW].iat[1])
        if rows["label"].nunique() > 1:
            labels = " and ".join(map(str, rows.drop_duplicates("label").sort_values("label")[told].fillna("none")))
            problems.append(Problem("two labels", row=row, column="image", file=image,
                                    text=f"has labels {labels} in rows {lines}", remedy="keep the right row"))
        if rows["split"].nunique() > 1:
            problems.append(Problem("image in two splits", row=row, column="split", file=image, warning=not strict,
                                    text=f"is in {' and '.join(map(str, rows['split'].unique()))} (rows {lines})",
                                    remedy="keep it in one split: the test result is too good otherwise"))
        elif rows["label"].nunique() == 1:
            problems.append(Problem("repeated row", row=row, column="image", file=image, warning=not strict,
                                    text=f"stands in rows {lines}", remedy="keep one"))


    content = pd.Series(content_ids, index=frame.index)[known.index]
    copies = content[(content != "") & content.duplicated(keep=False)]
    for _, rows in known.groupby(copies, sort=False):
        if identity[rows.index].nunique() > 1 and (rows["split"].nunique() > 1 or rows["label"].nunique() > 1):
            where = " and ".join(f"{image} ({split}, label {label}, row {row})" for image, split, label, row in
                                 zip(rows["image"], rows["split"], rows[told].fillna("none"), rows[ROW], strict=True))
            problems.append(Problem("copied image", row=int(rows[ROW].iat[1]), column="image", warning=not strict,
                                    file=rows["image"].iat[1], text=f"one file under several names: {where}",
                                    remedy="keep one, in one split, with the right label"))


def check_group_leakage(frame: pd.DataFrame, column: str, strict: bool, problems: list[Problem]) -> None:
    """One patient (or lesion) in two splits; an empty id is a group of its own."""
    known = frame[frame[column].notna() & frame["split"].isin(SPLITS)]
    splits = known.groupby(column, sort=False)["split"].agg(lambda values: tuple(dict.fromkeys(values)))
    rows = known.groupby(column, sort=False)[ROW].first()
    for group, names in splits[splits.map(len) > 1].items():
        problems.append(Problem(f"{column.removesuffix('_id')} in two splits", row=int(rows[group]), column=column,
                                warning=not strict, text=f"{group} has images in {' and '.join(names)}",
                                remedy="keep all of its images in one split: the test result is too good otherwise"))
