"""Whatever a chat template fails by is one line of ours."""

from __future__ import annotations

import json

import pytest

from short_gpt import ShortGPTError, open_model, own_samples
from short_gpt.data.texts import Conversation

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
DIALOG = Conversation(json.dumps(MESSAGES))
FAILING = {
    "{{ raise_exception('no\nway') }}": r"refuses \[{'role': 'user', .*: no\\nway; give plain text",
    "{{ 1//0 }}": "division or modulo by zero",
    "{% include 'other' %}": "no loader",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth exceeded",
    "{% for m in messages %}{{ m.content + 1 }}{% endfor %}": "can only concatenate str",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% for": "unexpected 'end of template'",
    "{{ '\\ud800' }}": r"holds '\\ud800' as character 0, half a surrogate pair",
}


@pytest.fixture(scope="module")
def short(llama_folders):
    return open_model(str(llama_folders / "hf"), device="cpu")


@pytest.mark.parametrize("template", FAILING, ids=range(len(FAILING)))
def test_a_failing_template_is_one_line_where_a_dialog_is_asked_for(short, template):
    short.tokenizer.chat_template = template
    asks = [lambda: short.encode(DIALOG), lambda: own_samples(short, 1, 20, chat=True)]
    for ask in asks:
        with pytest.raises(ShortGPTError, match=FAILING[template]) as error:
            ask()
        assert "\n" not in str(error.value)
    assert short.encode("text") and own_samples(short, 1, 20, progress=False)


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ '' }}", None])
def test_what_begins_no_dialog_alike_is_refused_for_own_dialogs_alone(short, template):
    short.tokenizer.chat_template = template
    with pytest.raises(ShortGPTError, match="no chat template that begins all dialogs alike, for"):
        own_samples(short, 1, 20, chat=True)
    if template == "{{ messages[0].content }}":
        ids = short.encode(DIALOG)
        assert (short.decode(ids), ids.start) == ("Hello", 0)


def test_the_opening_is_not_needed_to_read_a_dialog(short):
    """A template that takes no user alone."""
    refuses = "{{ raise_exception('no') }}"
    short.tokenizer.chat_template = "{% if messages[1] %}A{% else %}" + refuses + "{% endif %}"
    ids = short.encode(DIALOG)
    assert (short.decode(ids), ids.start) == ("A", 0)
