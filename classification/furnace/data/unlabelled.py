"""Images without the contract of a data set: one file, a folder, or a CSV that names them."""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import pandas as pd

from furnace.data.csv_table import image_folder, missing_column, parse_csv, read_csv_bytes
from furnace.data.images import EXTENSIONS, check_files
from furnace.data.manifest import GROUP_COLUMNS, Manifest
from furnace.data.problems import ROW, ManifestError, Problem, report
from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "filename", "image_path")  # the first that a CSV has
LABEL_COLUMNS = ("label", "binary_label")
LABEL_TEXT = "label_text"  # where a label column goes that holds no class numbers


def read_images(source: str | Path, root: str | Path | None = None, *,
                report_folder: str | Path | None = None) -> Manifest:
    """The images of a file, a folder or a CSV, checked as far as their headers; labels are not needed.

    Args:
        source: an image file; a folder, read with its subfolders, hidden entries and files without an image's
            extension left out; or a CSV with a column image (or filename, image_path; absolute paths are allowed).
        root: the folder that the CSV's images are relative to, None for the CSV's own.
        report_folder: where the full list goes when there are more than 20 problems.

    Returns:
        A Manifest without class names. Its frame has image, label (int64, -1 where there is none), split ("" where
        there is none), ROW (line of the CSV; else the image's number), and the CSV's other columns as text. A column
        label that holds no class numbers is kept as label_text.

    Raises:
        ManifestError: one or more errors; all are in the message or in the file it names.
        UserError: there is nothing of that name, or no image in the folder.
    """
    source = Path(source).expanduser()
    if source.suffix.lower() == ".csv" and not source.is_dir():
        return _read_csv(source, root, report_folder)
    if not source.exists():
        raise UserError(f"{source} does not exist: give an image file, a folder of images or a CSV")
    if root is not None:
        raise UserError(f"--root_path belongs to a CSV, and {source} is {'a folder' if source.is_dir() else 'a file'}: "
                        "leave it out")
    folder = source if source.is_dir() else source.parent
    problems: list[Problem] = []
    names = _image_names(folder, problems) if source.is_dir() else [source.name]
    frame = pd.DataFrame({"image": pd.Series(_encodable(names, problems), dtype=object)})
    frame["label"], frame["split"], frame[ROW] = -1, "", range(1, len(frame) + 1)
    digest, _ = check_files(frame, folder, problems)
    if not source.is_dir() and source.suffix.lower() not in EXTENSIONS and problems:
        raise ManifestError(f"{source} is neither an image that Pillow can read, nor a .csv, nor a folder", problems)
    report(problems, csv_path=source, folder=report_folder)
    name = source.stem if source.is_file() else folder.resolve().name or "images"
    content = hashlib.sha256("\n".join(sorted(frame["image"])).encode())
    return Manifest(frame=frame.astype({"label": "int64"}), name=name, csv_path=source, root=folder,
                    sha256=content.hexdigest(), images_digest=digest, class_names=(), label_column="label",
                    group_columns=())


def open_image_csv(csv_path: Path, root_path: str | Path | None, report_folder: str | Path | None
                   ) -> tuple[bytes, Path, pd.DataFrame, list[Problem]]:
    """A CSV's bytes, its image folder, its rows as text with the column image, and what is wrong so far.

    Raises:
        ManifestError: no column names the images.
        UserError: the CSV or the folder does not exist.
    """
    content = read_csv_bytes(csv_path, "the CSV")
    root = image_folder(root_path, csv_path)
    problems: list[Problem] = []
    frame = parse_csv(content, csv_path, problems)
    column = next((name for name in IMAGE_COLUMNS if name in frame), None)
    if column is None:
        problems.append(missing_column(frame, "image", "add a column named image (or filename, image_path)"))
        report(problems, csv_path=csv_path, folder=report_folder)
    return content, root, frame.rename(columns={column: "image"}), problems


def _read_csv(csv_path: Path, root_path: str | Path | None, report_folder: str | Path | None) -> Manifest:
    content, root, frame, problems = open_image_csv(csv_path, root_path, report_folder)
    frame["split"] = frame["split"].fillna("") if "split" in frame else ""
    label_column = _read_labels(frame)
    digest, _ = check_files(frame, root, problems)
    _warn_of_repeats(frame, root, problems)
    report(problems, csv_path=csv_path, folder=report_folder)
    first = ["image", "label", "split", ROW]
    frame = frame[first + [name for name in frame.columns if name not in first]].astype({"label": "int64"})
    return Manifest(frame=frame, name=csv_path.stem, csv_path=csv_path, root=root,
                    sha256=hashlib.sha256(content).hexdigest(), images_digest=digest, class_names=(),
                    label_column=label_column, group_columns=tuple(name for name in GROUP_COLUMNS if name in frame))


def _read_labels(frame: pd.DataFrame) -> str:
    """Set ``label`` to class numbers, -1 where there are none; returns the column they came from."""
    for column in LABEL_COLUMNS:
        if column not in frame:
            continue
        numbers = pd.to_numeric(frame[column], errors="coerce").astype(float)
        if (numbers.notna() == frame[column].notna()).all() and (numbers.dropna() % 1 == 0).all() \
                and numbers.dropna().between(0, 2**31).all() and numbers.notna().any():
            if column != "label" and "label" in frame:
                frame[LABEL_TEXT] = frame["label"]
            frame["label"] = numbers.fillna(-1).astype(np.int64)
            return column
    if "label" in frame:
        logger.info("the column label holds no class numbers: kept as text")
        frame[LABEL_TEXT] = frame["label"]
    frame["label"] = -1
    return "label"


def _warn_of_repeats(frame: pd.DataFrame, root: Path, problems: list[Problem]) -> None:
    """One file in several rows."""
    named = frame[frame["image"].notna()]
    identity = named["image"].map(lambda name: os.path.realpath(root / name.replace("\0", "")))
    for _, rows in named.groupby(identity[identity.duplicated(keep=False)], sort=False):
        problems.append(Problem("repeated row", row=int(rows[ROW].iat[1]), column="image", warning=True,
                                file=rows["image"].iat[0], text=f"stands in rows {', '.join(map(str, rows[ROW]))}",
                                remedy="keep one"))


# ---------------------------------------------------------------------------------------------------------- folders

def _image_names(folder: Path, problems: list[Problem]) -> list[str]:
    """Names below ``folder``, sorted. A link to a folder is followed once, unless it leads back into the tree."""
    top = os.path.realpath(folder)
    seen, names, others = {top}, [], 0

    def unreadable(error: OSError) -> None:
        problems.append(Problem("unreadable folder", file=str(error.filename), text=error.strerror or str(error),
                                remedy="make it readable for you, or move it elsewhere"))

    for here, subfolders, found in os.walk(folder, followlinks=True, onerror=unreadable):
        subfolders[:] = [name for name in sorted(subfolders) if not name.startswith(".")
                         and _enter(os.path.join(here, name), top, seen)]
        for name in found:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in EXTENSIONS:
                names.append(os.path.relpath(os.path.join(here, name), folder))
            else:
                others += 1
    if not names and not problems:
        raise UserError(f"{folder} holds no image ({others} other files); images are told by their extension: "
                        f"{', '.join(sorted(EXTENSIONS))}")
    logger.info("%s: %d images%s", folder, len(names), f", {others} other files left out" if others else "")
    return sorted(names)


def _enter(path: str, top: str, seen: set[str]) -> bool:
    """Whether to walk into a subfolder, by its real place."""
    real = os.path.realpath(path)
    inside = os.path.commonpath([real, top])
    if real in seen or (os.path.islink(path) and inside in (top, real)):
        return False
    seen.add(real)
    return True


def _encodable(names: list[str], problems: list[Problem]) -> list[str]:
    """The names that are text; results could not hold the others."""
    good = []
    for name in names:
        try:
            name.encode()
            good.append(name)
        except UnicodeEncodeError:
            problems.append(Problem("file name", file=ascii(name), text="is not UTF-8 text", remedy="rename the file"))
    return good
