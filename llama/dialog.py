"""The dialog formats of Llama 2 and Llama 3 chat models: messages in, token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from llama.errors import InputError
from llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a dialog."""

    role: Role
    content: str


Dialog = Sequence[Message]

INST, SYS = ("[INST]", "[/INST]"), ("<<SYS>>\n", "\n<</SYS>>\n\n")
LLAMA2_TAGS = (*INST, "<<SYS>>", "<</SYS>>")
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


def encode_dialog(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """Token ids that ask the model for the next assistant message.

    Raises:
        InputError: the roles are not [system,] user, assistant, ..., user, or the tokenizer
            belongs to neither family.
    """
    check_roles(dialog)
    if tokenizer.dialog_format == "llama2":
        return _encode_llama2(tokenizer, dialog)
    if tokenizer.dialog_format == "llama3":
        return _encode_llama3(tokenizer, dialog)
    raise InputError(
        "this tokenizer has neither Llama 2's nor Llama 3's dialog format; write the model's own "
        "chat template into a prompt and call text_completion"
    )


def is_unsafe(tokenizer: Tokenizer, dialog: Dialog) -> bool:
    """Whether a Llama 2 dialog holds the format's own tags, which would forge turns.

    Llama 3's markers are special tokens, which a message's text never becomes.
    """
    if tokenizer.dialog_format != "llama2":
        return False
    return any(tag in message["content"] for message in dialog for tag in LLAMA2_TAGS)


def check_roles(dialog: Dialog) -> None:
    """Raises InputError unless the roles are [system,] user, assistant, ..., user."""
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if turns != expected or len(turns) % 2 == 0:
        raise InputError(
            f"expected roles [system,] user, assistant, user, ... ending with user, got {roles}"
        )


def _encode_llama2(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """``<s>[INST] question [/INST] answer </s>`` for every turn; the system text in the first."""
    contents = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        contents = [SYS[0] + contents[0] + SYS[1] + contents[1], *contents[2:]]
    ids: list[int] = []
    for question, answer in zip(contents[:-1:2], contents[1::2], strict=True):
        text = f"{INST[0]} {question.strip()} {INST[1]} {answer.strip()} "
        ids += tokenizer.encode(text, bos=True, eos=True)
    last = f"{INST[0]} {contents[-1].strip()} {INST[1]}"
    return ids + tokenizer.encode(last, bos=True, eos=False)


def _encode_llama3(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """A header with the role before every message, ``<|eot_id|>`` behind; an open answer last."""
    special = tokenizer.special_tokens

    def header(role: str) -> list[int]:
        name = tokenizer.encode(role, bos=False, eos=False)
        gap = tokenizer.encode("\n\n", bos=False, eos=False)
        return [special["<|start_header_id|>"], *name, special["<|end_header_id|>"], *gap]

    ids = [special["<|begin_of_text|>"]]
    for message in dialog:
        text = tokenizer.encode(message["content"].strip(), bos=False, eos=False)
        ids += [*header(message["role"]), *text, special["<|eot_id|>"]]
    return ids + header("assistant")
