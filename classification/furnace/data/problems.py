"""Problems of a data set, collected in one pass and told together."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from furnace.runtime import files
from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

PRINTED = 20
ROW = "_row"  # the manifest's column with each image's line in the CSV; no user's column has this name


class ManifestError(UserError):
    """The data set has errors; the message lists them."""

    def __init__(self, message: str, problems: "Sequence[Problem]" = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set.

    Attributes:
        kind: a short name; problems of one kind are counted together.
        text: what is wrong.
        remedy: what to do.
        file: the image, where there is one.
        row: the line in the CSV (the header is line 1).
        column: the column.
        warning: True when the run may go on.
    """

    kind: str
    text: str
    remedy: str
    file: str = ""
    row: int | None = None
    column: str = ""
    warning: bool = False

    def __str__(self) -> str:
        place = ", ".join(part for part in (f"row {self.row}" if self.row else "",
                                            f"column {self.column}" if self.column else "", self.file) if part)
        return f"{self.kind}{f' ({place})' if place else ''}: {self.text}. Remedy: {self.remedy}."


def report(problems: Sequence[Problem], *, csv_path: Path, folder: str | Path | None) -> None:
    """Log the warnings and raise for the errors, at most 20 lines each, the full list in a file of ``folder``.

    The first problem of every kind is printed before the second of any, so that no kind hides behind another.

    Raises:
        ManifestError: there is at least one error.
    """
    warnings = [problem for problem in problems if problem.warning]
    errors = [problem for problem in problems if not problem.warning]
    if warnings:
        logger.warning("%s", _text(warnings, "warning", csv_path, folder))
    if errors:
        raise ManifestError(_text(errors, "problem", csv_path, folder), errors)


def _text(problems: Sequence[Problem], word: str, csv_path: Path, folder: str | Path | None) -> str:
    seen: Counter[str] = Counter()
    ranked = []
    for order, problem in enumerate(problems):
        ranked.append((seen[problem.kind], order, problem))
        seen[problem.kind] += 1
    ranked.sort(key=lambda item: item[:2])
    counts = ", ".join(f"{count} x {kind}" for kind, count in seen.items())
    lines = [f"{len(problems)} {word}{'s' if len(problems) != 1 else ''} in {csv_path} ({counts}):"]
    lines += [f"  {problem}" for _, _, problem in ranked[:PRINTED]]
    if len(problems) > PRINTED:
        rest = f"  ... and {len(problems) - PRINTED} more"
        if folder is not None:
            every = "\n".join(str(problem) for problem in problems) + "\n"
            name = f"{csv_path.stem}_{word}s_{hashlib.sha256(every.encode()).hexdigest()[:8]}.txt"
            path = Path(folder) / name
            try:
                files.write_text(path, f"{len(problems)} {word}s in {csv_path}\n{every}")
                rest += f"; all of them are in {path}"
            except files.OutputError as error:
                rest += f" ({error})"
        lines.append(rest)
    return "\n".join(lines)
