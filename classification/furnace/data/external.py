"""An external test set: images of another source, judged by the classes of the set that a probe was fitted on."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from furnace.data.class_names import numbered
from furnace.data.csv_table import image_folder, missing_column, parse_csv, read_csv_bytes
from furnace.data.images import check_files
from furnace.data.manifest import GROUP_COLUMNS, Manifest, check_labels, check_repeats, check_split_names
from furnace.data.problems import ROW, Problem, report

logger = logging.getLogger(__name__)


def read_external(csv_path: str | Path, root_path: str | Path | None = None, *, class_names: Sequence[str],
                  nb_classes: int, label_column: str, strict_split: bool = False,
                  report_folder: str | Path | None = None) -> Manifest:
    """Read and check the CSV of an external test set and the files it names.

    Where both sets name their classes (here in the column ``class_name``), labels go by name, without regard to
    capitals and surrounding blanks, and the numbers of this CSV are not read: other sets count in another order.
    Otherwise they go by number. Of a CSV with a split column the test images are taken, else all.

    Args:
        csv_path: the CSV.
        root_path: the folder of its images; None means the CSV's own.
        class_names: of the set that the probe was fitted on, in label order; "0", "1", ... count as no names.
        nb_classes: of that set, the length of ``class_names``.
        label_column: label or binary_label, as in that set.
        strict_split: treat repeated rows as errors instead of warnings.
        report_folder: where the full list goes when there are more than 20 problems.

    Returns:
        A Manifest whose images all have the split test, with ``class_names`` as given. Classes may be absent. A label
        column that is not used is kept as own_label (beside binary_label as multiclass_label).

    Raises:
        ManifestError: one or more errors; all are in the message or in the file it names.
        UserError: the CSV or the image folder does not exist.
    """
    csv_path = Path(csv_path).expanduser()
    content = read_csv_bytes(csv_path, "the external test set")
    root = image_folder(root_path, csv_path, "--test_root")
    problems: list[Problem] = []
    frame = _test_rows(parse_csv(content, csv_path, problems), csv_path, problems)
    if "image" not in frame:
        problems.append(missing_column(frame, "image", "add a column named image"))
    labels, used = _labels(frame, tuple(class_names), nb_classes, label_column, problems)
    if "label" in frame and used != "label":
        frame["multiclass_label" if used == "binary_label" else "own_label"] = frame["label"]
    frame["label"], frame["split"] = labels, "test"
    digest = ""
    if "image" in frame:
        digest, content_ids = check_files(frame, root, problems)
        check_repeats(frame, root, content_ids, strict_split, problems)
    report(problems, csv_path=csv_path, folder=report_folder)
    first = ["image", "label", "split", ROW]
    return Manifest(frame=frame[first + [name for name in frame.columns if name not in first]].astype(
                        {"label": "int64"}), name=csv_path.stem, csv_path=csv_path, root=root,
                    sha256=hashlib.sha256(content).hexdigest(), images_digest=digest, class_names=tuple(class_names),
                    label_column=used, group_columns=tuple(name for name in GROUP_COLUMNS if name in frame))


def warn_of_shared_images(train: Manifest, external: Manifest, *, strict_split: bool = False,
                          report_folder: str | Path | None = None) -> list[tuple[str, str]]:
    """The images of an external set that are, by content, also in the set that a probe was fitted on; told as warnings.

    Args:
        train: the images that the fit has seen.
        external: from ``read_external``.
        strict_split: refuse instead of warning.
        report_folder: where the full list goes when there are more than 20.

    Returns:
        (name in external, name in train) for each such image, in external's order.

    Raises:
        ManifestError: with ``strict_split``, there is one.
    """
    _, train_ids = check_files(train.frame, train.root, [])
    _, external_ids = check_files(external.frame, external.root, [])
    known = {content: name for content, name in zip(train_ids, train.filenames, strict=True) if content}
    found, problems = [], []
    for name, content, row in zip(external.filenames, external_ids, external.frame[ROW], strict=True):
        if content in known:
            found.append((name, known[content]))
            problems.append(Problem("image also in train", row=int(row), column="image", file=name,
                                    warning=not strict_split, text=f"is {known[content]} of {train.name}",
                                    remedy="delete the row: the test result is too good otherwise"))
    report(problems, csv_path=external.csv_path, folder=report_folder)
    return found


def _test_rows(frame: pd.DataFrame, csv_path: Path, problems: list[Problem]) -> pd.DataFrame:
    """The rows of the split test; all where there is no split column."""
    if "split" not in frame:
        logger.info("external test set %s: all %d images (it has no split column)", csv_path, len(frame))
        return frame
    check_split_names(frame, problems)
    test = frame[frame["split"] == "test"].reset_index(drop=True)
    if not len(test) and len(frame):
        problems.append(Problem("empty split", column="split", text="no image has the split test", remedy="mark some "
                                "rows as test, or delete the column split to take every image"))
    logger.info("external test set %s: %d of %d images, those of the split test", csv_path, len(test), len(frame))
    return test


def _labels(frame: pd.DataFrame, class_names: tuple[str, ...], nb_classes: int, label_column: str,
            problems: list[Problem]) -> tuple[pd.Series, str]:
    """(N,) class numbers of the training set, -1 where a row has none; and the column they came from."""
    numbers = [name for name in ("label", "binary_label") if name in frame]
    if class_names != numbered(nb_classes) and "class_name" in frame:
        ignored = f"; the numbers in {' and '.join(numbers)} are not read" if numbers else ""
        logger.info("labels of the external test set: by the names in the column class_name%s", ignored)
        return _labels_by_name(frame, class_names, label_column, problems), "class_name"
    if nb_classes == 2 and numbers:
        column = numbers[-1]  # binary_label where both are there, as in read_manifest
    elif label_column in frame:
        column = label_column
    else:
        remedy = f"add a column with the {nb_classes} classes of the training set, from 0"
        if class_names != numbered(nb_classes):
            remedy += ", or a column class_name with their names"
        problems.append(missing_column(frame, label_column, remedy))
        return pd.Series(-1, index=frame.index, dtype=np.int64), label_column
    logger.info("labels of the external test set: by the numbers in the column %s", column)
    return check_labels(frame, column, nb_classes, problems, too_high=f"write the number of one of the training set's "
                        f"{nb_classes} classes, or delete the row"), column


def _labels_by_name(frame: pd.DataFrame, class_names: tuple[str, ...], label_column: str,
                    problems: list[Problem]) -> pd.Series:
    exact = {name: k for k, name in enumerate(class_names)}
    alike = {_plain(name): k for k, name in enumerate(class_names)}
    if len(alike) < len(class_names):  # names that differ by capitals only
        alike = {}
    other_way = f", or delete the column class_name so that the numbers in {label_column} count" \
        if label_column in frame else ""
    labels = []
    for name, row in zip(frame["class_name"], frame[ROW], strict=True):
        labels.append(-1 if name is None else exact.get(name, alike.get(_plain(name), -1)))
        if labels[-1] < 0:
            text = "the cell is empty" if name is None else f"the training set has no class {name!r}"
            problems.append(Problem("unknown class", row=int(row), column="class_name",
                                    text=f"{text}; known are {', '.join(class_names)}",
                                    remedy=f"write one of these, delete the row{other_way}"))
    return pd.Series(labels, index=frame.index, dtype=np.int64)


def _plain(name: str) -> str:
    return name.strip().casefold()
