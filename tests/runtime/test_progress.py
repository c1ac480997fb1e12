"""Bars: redrawn on a terminal, and rare whole lines in a file."""

from __future__ import annotations

import io
import sys

import pytest

from short_gpt.runtime import progress
from short_gpt.runtime.progress import bar, print_above_bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch, stream: io.StringIO) -> str:
    """What two bars, one inside the other, and a note write, each step at once."""
    monkeypatch.setattr(sys, "stderr", stream)
    with bar("outer", total=200, unit="window", delay=0) as shown:
        for step in range(200):
            shown.update()
            if step == 100:
                print_above_bars("a note")
                with bar("inner", total=2, unit="layer", delay=0) as inner:
                    inner.update(2)
    return stream.getvalue()


def test_a_file_gets_few_whole_lines(monkeypatch):
    text = drawn(monkeypatch, io.StringIO())
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert "a note" in lines and all(line.strip() for line in lines)
    own = [line for line in lines if line.startswith("outer")]
    assert "0/200" in own[0] and "200/200" in own[-1]
    assert len(own) <= 4  # the first, and what ends it: 30 seconds did not pass


def test_a_file_gets_a_line_every_so_many_seconds(monkeypatch):
    monkeypatch.setattr(progress, "RARELY", 0.0)
    assert len(drawn(monkeypatch, io.StringIO()).splitlines()) > 50


@pytest.mark.parametrize("module", [None, "ipykernel"])
def test_a_terminal_and_a_notebook_redraw_a_line(monkeypatch, module):
    stream = io.StringIO() if module else Terminal()
    if module:
        monkeypatch.setitem(sys.modules, module, progress)
    assert "\router" in drawn(monkeypatch, stream)
