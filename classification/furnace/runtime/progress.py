"""Progress bars that suit a terminal and a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

TERMINAL, FILE = 0.1, 30.0  # seconds between two states of a bar


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """``tqdm`` that writes a state every half minute at most where stderr is a file, as in a batch job."""
    return tqdm(iterable, mininterval=TERMINAL if sys.stderr.isatty() else FILE, **options)
