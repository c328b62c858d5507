"""Per-image predictions of a test set: reading any toolkit's CSV, and matching several of them image by image.

Columns: ``filename`` or ``image_path``; ``true_label``; ``probability_class_0..K-1``, or ``probability`` (binary, of
class 1); ``predicted_label``, ``patient_id`` and ``lesion_id`` where they exist.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from furnace.data.csv_table import missing_column, parse_csv, read_csv_bytes
from furnace.data.images import EXTENSIONS
from furnace.data.manifest import GROUP_COLUMNS
from furnace.data.problems import ROW, ManifestError, Problem, report
from furnace.runtime.files import UserError

FILE_COLUMNS = ("filename", "image_path")
METADATA_COLUMNS = ("image", "filename", "image_path", "image_id", "img_id")  # where metadata names its images
SUM_TOLERANCE = 1e-3  # of a row of probabilities; published files have eight digits
GENERIC = ("test", "val")  # stems that say nothing about the model


@dataclass(frozen=True)
class Predictions:
    """Checked predictions of one model on one set of images.

    Attributes:
        name: what tables call it.
        filenames: N names as they stand in the file, all different.
        labels: (N,) int64 in 0..K-1.
        probabilities: (N, K) float64, rows summing to 1 within SUM_TOLERANCE.
        path: the CSV.
        groups: N rows with patient_id and lesion_id, those that exist; None for an empty cell.
    """

    name: str
    filenames: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    path: Path
    groups: pd.DataFrame

    def __len__(self) -> int:
        return len(self.filenames)


def default_names(paths: Sequence[Path]) -> list[str]:
    """The stems; where these are equal or generic ("test"), the folders' names, and folder_stem where those are, too.

    Raises:
        UserError: the same file twice, or names that are equal all the same.
    """
    resolved = [path.resolve() for path in paths]
    stems, folders = [path.stem for path in resolved], [path.parent.name for path in resolved]
    generic = len(set(stems)) < len(stems) or any(stem in GENERIC for stem in stems)
    names = folders if generic else stems
    if len(set(names)) < len(names):
        names = [f"{folder}_{stem}" for folder, stem in zip(folders, stems, strict=True)]
    if len(set(names)) < len(names):
        raise UserError("some predictions have the same name (is a file given twice?): "
                        f"{', '.join(map(str, paths))}; give each a name of its own by --names")
    return names


def read_all(paths: Sequence[Path], names: Sequence[str], report_folder: Path | None = None) -> list[Predictions]:
    """Read several files; the problems of all of them are told together.

    Raises:
        UserError: at least one file has errors.
    """
    found, messages = [], []
    for path, name in zip(paths, names, strict=True):
        try:
            found.append(read_predictions(path, name, report_folder))
        except UserError as error:
            messages.append(str(error))
    if messages:
        raise ManifestError("\n".join(messages))
    return found


def read_predictions(path: str | Path, name: str | None = None, report_folder: Path | None = None) -> Predictions:
    """Read and check one file.

    Args:
        path: the CSV.
        name: what tables call it; by default as ``default_names`` says.
        report_folder: where the full list goes when there are more than 20 problems.

    Raises:
        ManifestError: one or more errors, listed with row and remedy.
        UserError: the file does not exist.
    """
    path = Path(path).expanduser()
    problems: list[Problem] = []
    frame = parse_csv(read_csv_bytes(path, "predictions"), path, problems)
    column = next((column for column in FILE_COLUMNS if column in frame), None)
    if column is None:
        problems.append(missing_column(frame, "filename", "add a column filename (or image_path)"))
    else:
        _check_names(frame, column, problems)
    probabilities = _probabilities(frame, problems)
    labels = _labels(frame, None if probabilities is None else probabilities.shape[1], problems)
    if probabilities is not None:
        _check_rows(frame, probabilities, problems)
        _check_predicted(frame, probabilities, problems)
    report(problems, csv_path=path, folder=report_folder)
    return Predictions(name=name or default_names([path])[0], filenames=frame[column].tolist(), labels=labels,
                       probabilities=probabilities, path=path,
                       groups=frame[[column for column in GROUP_COLUMNS if column in frame]])


def _check_names(frame: pd.DataFrame, column: str, problems: list[Problem]) -> None:
    """None empty, none twice."""
    for row in frame.loc[frame[column].isna(), ROW]:
        problems.append(Problem("no file name", row=int(row), column=column, text="is empty", remedy="name the image"))
    known = frame[frame[column].notna()]
    for name, rows in known[known[column].duplicated(keep=False)].groupby(column, sort=False)[ROW]:
        problems.append(Problem("repeated file name", row=int(rows.iat[1]), column=column, file=name,
                                text=f"stands in rows {', '.join(map(str, rows))}", remedy="keep one row per image"))


def _probabilities(frame: pd.DataFrame, problems: list[Problem]) -> np.ndarray | None:
    """(N, K) numbers, NaN where a cell is none; None when the columns are not there."""
    of_class = sorted(int(column.removeprefix("probability_class_")) for column in frame
                      if re.fullmatch(r"probability_class_\d{1,6}", column))
    if of_class and (len(of_class) < 2 or of_class != list(range(len(of_class)))):
        problems.append(missing_column(frame, f"probability_class_{_first_gap(of_class)}",
                                       "the columns must be probability_class_0, _1, ... without a gap"))
        return None
    if not of_class and "probability" not in frame:
        problems.append(missing_column(frame, "probability_class_0", "add probability_class_0, _1, ... or, for two "
                                       "classes, probability (of class 1)"))
        return None
    columns = [f"probability_class_{k}" for k in of_class] or ["probability"]
    values = frame[columns].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    for i, j in np.argwhere(~np.isfinite(values)):
        cell = frame[columns[j]].iat[i]
        problems.append(Problem("no probability", row=int(frame[ROW].iat[i]), column=columns[j],
                                text="is empty" if cell is None else f"{cell!r} is not a finite number",
                                remedy="write a number from 0 to 1, or predict this image again"))
    values = np.where(np.isfinite(values), values, np.nan)
    return values if of_class else np.concatenate([1 - values, values], axis=1)  # (N, 1) -> (N, 2)


def _first_gap(numbers: Sequence[int]) -> int:
    return next(k for k in range(len(numbers) + 1) if k not in numbers)


def _labels(frame: pd.DataFrame, k: int | None, problems: list[Problem]) -> np.ndarray | None:
    """(N,) true classes; -1 where a cell is none."""
    if "true_label" not in frame:
        problems.append(missing_column(frame, "true_label", "add the true class of every image, from 0"))
        return None
    numbers = pd.to_numeric(frame["true_label"], errors="coerce").astype(float)
    whole = np.isfinite(numbers) & (numbers % 1 == 0)
    for i in np.flatnonzero(~whole | (numbers < 0) | (numbers >= (np.inf if k is None else k))):
        cell = frame["true_label"].iat[i]
        text = "is empty" if cell is None else f"{cell!r} is not an integer" if not whole.iat[i] else \
            f"{cell} is not in 0..{'' if k is None else k - 1}"
        remedy = "number the classes from 0" if k is None or not whole.iat[i] else \
            f"the file has the probabilities of {k} classes: give the labels of the same classes, from 0"
        problems.append(Problem("bad label", row=int(frame[ROW].iat[i]), column="true_label", text=text, remedy=remedy))
    return numbers.where(whole, -1).to_numpy().astype(np.int64)


def _check_rows(frame: pd.DataFrame, probabilities: np.ndarray, problems: list[Problem]) -> None:
    """Nothing outside 0..1, rows that sum to 1, and ``probability`` equal to probability_class_1 beside it."""
    single = "probability_class_0" not in frame
    written = probabilities[:, 1:] if single else probabilities  # (N, 1 or K), as in the file
    outside = (written < 0) | (written > 1 + SUM_TOLERANCE)
    remedy = f"if these are logits, write their {'sigmoid' if single else 'softmax'}" if (written < 0).any() else \
        "if these are per cent, divide by 100"
    for i in np.flatnonzero(outside.any(axis=1)):
        value = written[i][outside[i]][0]
        problems.append(Problem("not a probability", row=int(frame[ROW].iat[i]), remedy=remedy,
                                text=f"{value:g} is {'negative' if value < 0 else 'above 1'}"))
    sums = probabilities.sum(axis=1)
    for i in np.flatnonzero(~outside.any(axis=1) & (np.abs(sums - 1) > SUM_TOLERANCE)):
        problems.append(Problem("sum of probabilities", row=int(frame[ROW].iat[i]), text=f"the row sums to "
                                f"{sums[i]:.4f}, not 1", remedy="write the softmax over all classes"))
    if not single and "probability" in frame and probabilities.shape[1] == 2:
        beside = pd.to_numeric(frame["probability"], errors="coerce").to_numpy(dtype=float)
        for i in np.flatnonzero(~(np.abs(beside - probabilities[:, 1]) <= SUM_TOLERANCE)):
            problems.append(Problem("two probabilities", row=int(frame[ROW].iat[i]), column="probability",
                                    text=f"{beside[i]:g} beside probability_class_1 = {probabilities[i, 1]:g}",
                                    remedy="keep the right column"))


def _check_predicted(frame: pd.DataFrame, probabilities: np.ndarray, problems: list[Problem]) -> None:
    """One warning when predicted_label is not the most probable class; equal probabilities say nothing."""
    if "predicted_label" not in frame or not np.isfinite(probabilities).all():
        return
    predicted = pd.to_numeric(frame["predicted_label"], errors="coerce").to_numpy(dtype=float)
    k = probabilities.shape[1]
    known = np.isin(predicted, range(k))
    own = probabilities[np.arange(len(frame)), np.where(known, predicted, 0).astype(int)]
    wrong = np.flatnonzero(~known | (own < probabilities.max(axis=1)))
    if len(wrong):
        problems.append(Problem("predicted_label", row=int(frame[ROW].iat[wrong[0]]), column="predicted_label",
                                warning=True, text=f"is not the class of the highest probability in {len(wrong):,} of "
                                f"{len(frame):,} rows", remedy="none needed: the metrics here are of the most probable "
                                "class; a file made with another threshold has other accuracies"))


# --------------------------------------------------------------------------------------------------------- matching

def match_names(names: Sequence[str], others: Sequence[str]) -> np.ndarray | None:
    """Where each name stands in ``others``.

    Tried in turn: the whole path, its last two parts, the base name; then the same without the image suffix. The first
    that finds every name, and no two names in one place, counts.

    Returns:
        (N,) positions, or None.
    """
    for keep_suffix in (True, False):
        for parts in (None, 2, 1):
            keys, found = [_key(name, parts, keep_suffix) for name in names], {}
            twice = set()
            for position, other in enumerate(others):
                key = _key(other, parts, keep_suffix)
                twice |= {key} & found.keys()
                found[key] = position
            if len(set(keys)) == len(keys) and all(key in found and key not in twice for key in keys):
                return np.array([found[key] for key in keys], dtype=np.int64)
    return None


def _key(name: str, parts: int | None, keep_suffix: bool) -> str:
    path = PurePosixPath(str(name).strip().replace("\\", "/"))
    if not keep_suffix and path.suffix.lower() in EXTENSIONS:
        path = path.with_suffix("")
    return str(path) if parts is None else "/".join(path.parts[-parts:])


def _absent(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The names whose base name, without suffix, is not among the others'."""
    there = {_key(other, 1, False) for other in others}
    return [name for name in names if _key(name, 1, False) not in there]


def _examples(values: Sequence[str]) -> str:
    return f"{', '.join(map(str, values[:3]))}{', ...' if len(values) > 3 else ''}"


def align(first: Predictions, second: Predictions) -> Predictions:
    """``second`` in the order of ``first``, matched by file name, with the names and groups of ``first``.

    Raises:
        UserError: other images, other labels, or another number of classes; examples are named.
    """
    who = f"{second.name} cannot be compared with {first.name}:"
    if first.probabilities.shape[1] != second.probabilities.shape[1]:
        raise UserError(f"{who} {second.probabilities.shape[1]} classes and {first.probabilities.shape[1]}; compare "
                        "predictions of the same classes")
    positions = match_names(first.filenames, second.filenames)
    if positions is None or len(first) != len(second):
        here, there = _absent(first.filenames, second.filenames), _absent(second.filenames, first.filenames)
        parts = [f"images only in {owner.name}: {len(names):,} ({_examples(names)})"
                 for names, owner in ((here, first), (there, second)) if names]
        raise UserError(f"{who} {'; '.join(parts) or _repeated(first, second)}. Compare predictions of the same images")
    aligned = replace(second, filenames=first.filenames, labels=second.labels[positions],
                      probabilities=second.probabilities[positions], groups=first.groups)
    wrong = np.flatnonzero(aligned.labels != first.labels)
    if len(wrong):
        examples = "; ".join(f"{first.filenames[i]} is {first.labels[i]} in {first.name} and {aligned.labels[i]} in "
                             f"{second.name}" for i in wrong[:3])
        raise UserError(f"{who} the true labels of {len(wrong):,} of {len(first):,} images differ: {examples}. Number "
                        "the classes alike")
    return aligned


def _repeated(*of: Predictions) -> str:
    """Why names cannot be matched although every base name is on both sides."""
    counts = Counter(_key(name, 1, False) for predictions in of for name in set(predictions.filenames))
    names = [name for name, n in counts.most_common(3) if n > len(of)] or [counts.most_common(1)[0][0]]
    return f"several images have one name in different folders ({_examples(names)}), so that folders must agree, too"


def join_groups(predictions: Predictions, csv_path: Path) -> Predictions:
    """Take patient_id and lesion_id from a metadata CSV, by file name.

    Args:
        predictions: of some or all images that the CSV names.
        csv_path: the metadata, its images in a column image, filename, image_path, image_id or img_id; folders and
            suffixes may differ.

    Raises:
        UserError: no such column, images that the CSV lacks, or an image with two groups.
    """
    problems: list[Problem] = []
    frame = parse_csv(read_csv_bytes(csv_path), csv_path, problems)
    named = next((column for column in METADATA_COLUMNS if column in frame), None)
    wanted = [column for column in GROUP_COLUMNS if column in frame]
    if named is None:
        problems.append(missing_column(frame, "image", f"name the images in {', '.join(METADATA_COLUMNS)}"))
    if not wanted:
        problems.append(missing_column(frame, "patient_id", "give a CSV with patient_id or lesion_id, or leave "
                                       "out --csv_path"))
    report(problems, csv_path=csv_path, folder=None)
    table = frame.loc[frame[named].notna(), [named, *wanted]].drop_duplicates()
    positions = match_names(predictions.filenames, table[named].tolist())
    if positions is None:
        absent = _absent(predictions.filenames, table[named].tolist())
        raise UserError(f"--csv_path {csv_path}, column {named}, " + (
            f"lacks {len(absent):,} of the {len(predictions):,} images of {predictions.path}, e.g. {_examples(absent)}"
            if absent else f"names an image twice with different {' and '.join(wanted)}, or several under one base name"
        ) + ": give the metadata of the test images, one row per image")
    return replace(predictions, groups=table[wanted].iloc[positions].reset_index(drop=True))


def aggregate(predictions: Predictions, column: str = "lesion_id") -> Predictions:
    """Mean probability over the images of a lesion; an image without an id is a lesion of its own.

    Returns:
        A row per lesion in the order of first images, named by the id, with the patient_id if there is one.

    Raises:
        UserError: no such column, a lesion with two labels, or a lesion of two patients.
    """
    if column not in predictions.groups:
        raise UserError(f"--aggregate {column} needs the column {column}: {predictions.path} has none; give a CSV that "
                        "has it by --csv_path")
    ids = predictions.groups[column]
    ids = ids.where(ids.notna(), [f"image {name}" for name in predictions.filenames])
    codes, keys = pd.factorize(ids)
    table = pd.DataFrame({"code": codes, "label": predictions.labels, **{
        other: predictions.groups[other].to_numpy() for other in predictions.groups if other != column}})
    for field in table.columns[1:]:
        differing = np.flatnonzero(table.groupby("code")[field].nunique(dropna=False) > 1)
        if len(differing):
            examples = [f"{keys[i]} ({' and '.join(map(str, table.loc[codes == i, field].unique()))})"
                        for i in differing]
            raise UserError(f"--aggregate {column}: the images of one {column} differ in {field}: "
                            f"{_examples(examples)}; correct the {field} or leave out --aggregate")
    sums = np.zeros((len(keys), predictions.probabilities.shape[1]))
    np.add.at(sums, codes, predictions.probabilities)
    first = table.drop_duplicates("code")
    return replace(predictions, filenames=list(keys), labels=first["label"].to_numpy(),
                   probabilities=sums / np.bincount(codes)[:, None],
                   groups=first.drop(columns=["code", "label"]).reset_index(drop=True))
