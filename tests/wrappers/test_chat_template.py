"""Chat templates run within limits, and whatever they fail by is one line of ours."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from threading import Thread
from time import thread_time

import pytest

from short_gpt import ShortGPTError, open_model, own_samples
from short_gpt.data.texts import Conversation
from short_gpt.wrappers import chat_template
from short_gpt.wrappers.chat_template import rendered

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
DIALOG = Conversation(json.dumps(MESSAGES))
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FAILING = {
    "{{ raise_exception('no\nway') }}": r"refuses \[{'role': 'user', .*: no\\nway; give plain text",
    "{{ 1//0 }}": "division or modulo by zero",
    "{% include 'other' %}": "no loader",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth exceeded",
    "{% for m in messages %}{{ m.content + 1 }}{% endfor %}": "can only concatenate str",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% for": "unexpected 'end of template'",
    "{{ '\\ud800' }}": r"holds '\\ud800' as character 0, half a surrogate pair",
    LOOP: "it takes over 0.2 seconds",
    "{{ [1]|slice(10**12)|list }}": "it takes over 0.2 seconds",
    "{% for i in range(999) %}{{ 'text' * 999 }}{% endfor %}": "writes over 1,000,000 characters",
}


@pytest.fixture(scope="module")
def short(llama_folders):
    return open_model(str(llama_folders / "hf"), device="cpu")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Garbage collection calls Python, where an error is lost, as under hypothesis."""
    gc.callbacks.append(callback := lambda *_: None)
    yield
    gc.callbacks.remove(callback)


@pytest.mark.parametrize("template", FAILING, ids=range(len(FAILING)))
def test_a_failing_template_is_one_line_where_a_dialog_is_asked_for(short, template, monkeypatch):
    if "seconds" in FAILING[template]:
        monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    short.tokenizer.chat_template = template
    asks = [lambda: short.encode(DIALOG), lambda: own_samples(short, 1, 20, chat=True)]
    for ask in asks:
        with pytest.raises(ShortGPTError, match=FAILING[template]) as error:
            ask()
        assert "\n" not in str(error.value)
    assert short.encode("text") and own_samples(short, 1, 20, progress=False)


def test_a_loop_is_stopped_in_any_thread_and_tracing_goes_on_after_it(short, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    short.tokenizer.chat_template, said = LOOP, []

    def ask() -> None:
        before = lambda *_: None  # noqa: E731
        outer, begun = sys.gettrace(), thread_time()
        sys.settrace(before)
        try:
            rendered(short.tokenizer, MESSAGES, source="a model")
        except ShortGPTError as error:
            said.append((str(error), thread_time() - begun < 2, sys.gettrace() is before))
        finally:
            sys.settrace(outer)

    ask()
    (thread := Thread(target=ask)).start()
    thread.join()
    message = f"the chat template of a model refuses {MESSAGES!s:.60}: it takes over 0.2 seconds"
    assert (
        said == [(f"{message}; give plain text, or a model with another template", True, True)] * 2
    )


def test_a_long_dialog_may_be_written_several_times(short):
    short.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    )
    assert (
        len(rendered(short.tokenizer, [{"role": "user", "content": "a" * 600_000}], source=""))
        == 1_200_000
    )


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ '' }}", None])
def test_what_begins_no_dialog_alike_is_refused_for_own_dialogs_alone(short, template):
    short.tokenizer.chat_template = template
    with pytest.raises(ShortGPTError, match="no chat template that begins all dialogs alike, for"):
        own_samples(short, 1, 20, chat=True)
    if template == "{{ messages[0].content }}":
        ids = short.encode(DIALOG)
        assert (short.decode(ids), ids.start) == ("Hello", 0)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", LOOP], ids=["no", "loop"])
def test_the_opening_is_not_needed_to_read_a_dialog(short, template, monkeypatch):
    """A template that takes no user alone."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    short.tokenizer.chat_template = "{% if messages[1] %}A{% else %}" + template + "{% endif %}"
    ids = short.encode(DIALOG)
    assert (short.decode(ids), ids.start) == ("A", 0)
