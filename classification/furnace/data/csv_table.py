"""A CSV file as a table of text, with the line of every row and its faults named."""

import csv
import io
from pathlib import Path

import pandas as pd

from furnace.data.problems import ROW, ManifestError, Problem
from furnace.runtime.files import UserError


def read_csv_bytes(csv_path: Path, what: str = "--csv_path") -> bytes:
    """The bytes of a CSV file.

    Args:
        csv_path: the file.
        what: how the message calls it.

    Raises:
        UserError: it does not exist; the message names the CSV files that do lie there.
    """
    if not csv_path.is_file():
        folder = csv_path.parent
        beside = sorted(p.name for p in folder.glob("*.csv"))[:5] if folder.is_dir() else []
        raise UserError(f"{what} {csv_path} {'is a folder' if csv_path.is_dir() else 'does not exist'}"
                        + (f"; {folder} has: {', '.join(beside)}" if beside else ""))
    return csv_path.read_bytes()


def image_folder(root_path: str | Path | None, csv_path: Path, what: str = "--root_path") -> Path:
    """The folder that a CSV's images are relative to: ``root_path``, else the CSV's own; ``what`` names its option.

    Raises:
        UserError: it is no folder.
    """
    root = Path(root_path).expanduser() if root_path else csv_path.parent
    if not root.is_dir():
        raise UserError(f"{what} {root} is not a folder: it must hold the images that the CSV names")
    return root


def parse_csv(content: bytes, csv_path: Path, problems: list[Problem]) -> pd.DataFrame:
    """Bytes to a table of stripped text; empty cells become None, blank lines go, ROW is the line in the file."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        raise ManifestError(f"{csv_path} is not UTF-8 text (byte {error.start}, row {line}): save it as "
                            "'CSV UTF-8' in your spreadsheet program") from error
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except csv.Error as error:
        raise ManifestError(f"{csv_path} is not a valid CSV (row {reader.line_num}: {error})") from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if not lines:
        raise ManifestError(f"{csv_path} is empty: its first line must name the columns image, label, split")
    header, body = lines[0][1], lines[1:]
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        mark = "semicolons" if ";" in header[0] else "tabs"
        raise ManifestError(f"{csv_path} separates its cells by {mark}: save it with commas")
    for name in sorted({name for name in header if name and header.count(name) > 1}):
        problems.append(Problem("repeated column", row=1, column=name, text="stands more than once in the header",
                                remedy="keep one of them"))
    for number, cells in body:
        if len(cells) > len(header) and any(cells[len(header):]):
            problems.append(Problem("ragged row", row=number, text=f"{len(cells)} cells under {len(header)} columns",
                                    remedy="put quotes around cells that contain commas"))
    columns = {name: [cells[i] if i < len(cells) and cells[i] else None for _, cells in body]
               for i, name in reversed(list(enumerate(header))) if name}  # the first of equal names wins
    frame = pd.DataFrame({name: columns[name] for name in dict.fromkeys(header) if name}, dtype=object)
    frame[ROW] = [number for number, _ in body]
    if not body:
        problems.append(Problem("no rows", text="the CSV has a header and no images", remedy="add a row per image"))
    return frame


def missing_column(frame: pd.DataFrame, column: str, remedy: str) -> Problem:
    """With the columns that are there, and the one that differs by capitals only."""
    present = [name for name in frame.columns if name != ROW]
    close = [name for name in present if name.lower() == column]
    return Problem("missing column", column=column, text=f"the columns are: {', '.join(present) or 'none'}",
                   remedy=f"rename {close[0]} to {column}" if close else remedy)
