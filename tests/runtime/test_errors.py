"""Messages for a terminal: one line each, and of arguments no more than tells them."""

from __future__ import annotations

import pytest

from short_gpt.cli.app import message_of
from short_gpt.runtime.errors import LINE, NotSavedError, ShortGPTError, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a plain one, also in Bokmål: 模型", "a plain one, also in Bokmål: 模型"),
        ("a\nmodel\r\x1b[31m\u2028x", r"a\nmodel\r\x1b[31m\u2028x"),
        ("no answer from https://ada:secret@hub/api", "no answer from https://hub/api"),
        ("no answer from https://ada:se@cret@hub/api", "no answer from https://hub/api"),
        (f"no {'x' * 299} here", f"no {'x' * 299} here"),
        (f"no '{'x' * 1500}' here", f"no '{'x' * 149} ... {'x' * 49}' here"),
    ],
)
def test_one_line(text, line):
    assert one_line(text) == line


def test_a_long_line_shows_both_of_its_ends():
    line = one_line("expected " + "a b " * 1000 + "or nothing")
    assert len(line) <= LINE and line.startswith("expected a b") and line.endswith("or nothing")


def test_a_result_that_was_not_saved_is_a_users_error_in_one_line():
    reason = "out.gguf was not written: No space left\non device; work keeps what was healed, and"
    error = NotSavedError(f"{reason} once there is a way to write, the same call continues")
    assert isinstance(error, ShortGPTError) and isinstance(error, OSError)
    line = message_of(error, ["heal", "a model", "out.gguf"])
    assert line.endswith(r"left\non device", 0, line.index("; work keeps"))
    assert line.endswith("the same call continues: short-gpt heal 'a model' out.gguf")
