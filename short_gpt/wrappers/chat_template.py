"""Chat templates: programs that come with a model, run within limits of time and length."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from time import thread_time
from typing import TYPE_CHECKING, Any

from llama.tokenizer import check_text
from short_gpt.runtime.errors import ShortGPTError, one_line

if TYPE_CHECKING:
    from types import FrameType

    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]  # its role and its content
SECONDS = 5  # of this thread's own time; templates take thousandths of one
LONGEST = 1_000_000  # characters beside ten times those of the messages


class _Stopped(BaseException):
    """A template went beyond a limit; jinja2 takes exceptions of other classes for its own."""


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    source: str,
    answer: bool = False,
) -> str:
    """The text of a dialog; with ``answer``, up to where the model of ``source`` begins to answer.

    Raises:
        ShortGPTError: the template fails or refuses, by whatever error; it takes more than 5
            seconds, or writes far more than the messages have; or half a surrogate pair.
    """
    longest = LONGEST + 10 * sum(len(message["content"]) for message in messages)
    end, before = thread_time() + SECONDS, sys.gettrace()

    def watch(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal longest
        inside = frame.f_code.co_filename == "<template>"
        if inside and event == "return" and isinstance(value, str):  # a part of the text
            longest -= len(value)
        # elsewhere an error may be lost, as in a callback of the garbage collection, and with it
        # the trace
        if inside or str(frame.f_globals.get("__name__")).startswith("jinja2."):
            if longest < 0:
                raise _Stopped(f"it writes over {LONGEST:,} characters of its own")
            if thread_time() > end:
                raise _Stopped(f"it takes over {SECONDS} seconds")
        return watch if inside else None  # of all else, each call and no line

    sys.settrace(watch)  # of this thread alone
    try:
        text = tokenizer.apply_chat_template(
            [*messages], tokenize=False, add_generation_prompt=answer
        )
        check_text(str(text))
    except (Exception, _Stopped) as error:
        reason = one_line(str(error)) or type(error).__name__
        raise ShortGPTError(
            f"the chat template of {source} refuses {messages!r:.60}: {reason}; give plain text, "
            "or a model with another template"
        ) from None
    finally:
        sys.settrace(before)
    return str(text)
