"""Bars on a terminal and in a file."""

import io
import sys
import time

from furnace.runtime.progress import progress


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def states(stderr: io.StringIO, monkeypatch) -> int:
    """How often a bar of 20 steps of 15 ms is drawn."""
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(progress(time.sleep(0.015) or i for i in range(20))) == list(range(20))
    return stderr.getvalue().count("it [")


def test_a_file_gets_the_beginning_and_the_end(monkeypatch) -> None:
    assert states(io.StringIO(), monkeypatch) == 2
    assert states(Terminal(), monkeypatch) > 2


def test_options_are_those_of_tqdm(monkeypatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress(total=8, unit="image", desc="here") as bar:
        bar.update(8)
    assert "here: 100%" in stderr.getvalue() and "8/8" in stderr.getvalue() and "image/s" in stderr.getvalue()
    with progress(total=8, disable=True) as bar:
        bar.update(8)
    assert stderr.getvalue().count("8/8") == 1
