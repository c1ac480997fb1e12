"""Questions with short answers: how many a model answers right, and its answers as windows.

Removing layers costs answers long before it costs loss on text. A model is asked greedily, and a
right answer has to stand in what it writes; nobody judges it, and no code is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from short_gpt.data.prompts import prompt_of
from short_gpt.data.texts import check_plain
from short_gpt.data.windows import Answer, batches
from short_gpt.models.decoder import Decoder
from short_gpt.runtime.errors import ShortGPTError, at_least
from short_gpt.runtime.progress import bar

BUILT_IN = Path(__file__).with_name("questions.jsonl")  # of this project, in no benchmark
AT_ONCE = 20  # prompts answered at once
PLAIN = "Question: {}\nAnswer:"  # of a model without a chat template
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # the separators of "1,024,000"


class Answering(Protocol):
    """What `ask` needs of a model; see `wrappers.short_model.ShortModel`."""

    @property
    def decoder(self) -> Decoder: ...
    @property
    def chats(self) -> bool: ...
    @property
    def stop_tokens(self) -> frozenset[int]: ...
    def prompt_ids(self, prompt: str) -> list[int]: ...
    def greedy_many(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], *, special: bool = True) -> str: ...


class Question(NamedTuple):
    """A prompt, and the answers to it that are right, any of them; none where nobody knows.

    A prompt with earlier messages is a `data.texts.Conversation`, which takes a chat template.
    """

    prompt: str
    right: tuple[str, ...] = ()


class Reply(NamedTuple):
    """What a model answered.

    Attributes:
        prompt_ids: Token ids of the prompt, with those of the chat template.
        ids: Token ids of the answer, with the token that ended it if the model wrote one.
        text: The answer, without special tokens.
        right: Whether it is right; None where no right answer is known.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    right: bool | None


def questions(path: str | Path | None = None) -> list[Question]:
    """Reads questions from a file.

    Args:
        path: A file ``.jsonl``, each line an object with "prompt", or "messages" of which the
            last user's is the prompt, and, if right answers are known, "right", a text or a list of
            texts; or another file, each line a prompt. Empty lines are skipped. Default: 40
            questions of this library, with right answers: facts, arithmetic, what a line of Python
            prints, lists and words.

    Raises:
        ShortGPTError: a line is something else, or there is no question.

    Example:
        >>> questions()[0]
        Question(prompt='What is the capital of France? Answer with one word.', right=('Paris',))
    """
    file, each = BUILT_IN if path is None else Path(path), list[Question]()
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ShortGPTError(f"{file}: {error}") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and file.suffix == ".jsonl":
            each.append(_question(line, f"{file}, line {number}"))
        elif line:
            each.append(Question(line))
    if not each:
        raise ShortGPTError(f"{file} has no question: expected one a line")
    return each


def _question(line: str, where: str) -> Question:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    given = content if isinstance(content, dict) else {}
    prompt = prompt_of(given.get("prompt", given.get("messages")))
    right = given.get("right") or []
    right = [right] if isinstance(right, str) else right
    texts = [prompt, *(right if isinstance(right, list) else [None])]
    if prompt is None or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ShortGPTError(
            f'{where}: expected {{"prompt": "..."}} or "messages" with a user\'s, and perhaps '
            f'"right", a text or a list of texts; got {line:.60}'
        )
    return Question(prompt, tuple(right))


def to_learn(path: str | Path) -> list[str]:
    """The prompts of a file that a model answers to learn from: those without a right answer.

    What has one, in the file or among this library's questions, judges, and is left out.
    """
    every = questions(path)
    judged = {question.prompt for question in (*every, *questions()) if question.right}
    return [question.prompt for question in every if question.prompt not in judged]


def is_right(question: Question, text: str) -> bool | None:
    """Whether a right answer stands in a text; None for a question without one.

    It stands there as whole words, upper or lower case. A number does not stand in a longer one:
    "42" is in "It is 42." but not in "142", "42.5" or "-42". Thousands may be separated by commas.

    Example:
        >>> is_right(Question("2 to the 10th?", ("1024",)), "That is 1,024.")
        True
    """
    if not question.right:
        return None
    return any(_stands(answer, _plain(text)) for answer in map(_plain, question.right))


def _plain(text: str) -> str:
    return THOUSANDS.sub("", " ".join(text.casefold().split()))


def _stands(answer: str, text: str) -> bool:
    before = r"(?<!\d,)(?<![\w.\u2212-])" if answer[0].isdigit() else r"(?<!\w)"
    after = r"(?!\w|[.,]\d)" if answer[-1].isdigit() else r"(?!\w)"
    return re.search(before + re.escape(answer) + after, text) is not None


def ask(
    model: Answering,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 32,
    progress: bool = True,
) -> list[Reply]:
    """Asks a model, which answers by its likeliest tokens.

    A prompt is a user's turn of the model's chat template. Without one it is "Question: ...
    Answer:", and the first line break ends the answer.

    Args:
        model: A model in memory, such as `open_model` returns.
        questions: What is asked, each on its own.
        max_new_tokens: Most tokens of an answer; fewer where the context ends. Default: 32.
        progress: Show a progress bar. Default: yes.

    Raises:
        ShortGPTError: a prompt fills the model's context.
    """
    at_least(1, max_new_tokens=max_new_tokens)
    chats, context = model.chats, model.decoder.max_seq_len
    for question in () if chats else questions:
        check_plain(question.prompt)
    asked = [q.prompt if chats else PLAIN.format(q.prompt) for q in questions]
    prompts = [model.prompt_ids(prompt) for prompt in asked]
    replies = dict[int, Reply]()
    with bar("answers", total=len(questions), unit="question", show=progress) as shown:
        # prompts of like length together, because the shorter ones are padded
        for rows in batches(sorted(range(len(prompts)), key=lambda i: len(prompts[i])), AT_ONCE):
            room = min(max_new_tokens, context - len(prompts[rows[-1]]))
            written = model.greedy_many([prompts[i] for i in rows], room)
            for i, new in zip(rows, written, strict=True):
                ids = _ended(model, new, line=not chats)
                text = model.decode(ids, special=False)
                text = (text if chats else text.split("\n")[0]).strip()
                replies[i] = Reply(prompts[i], ids, text, is_right(questions[i], text))
            shown.update(len(rows))
    return [replies[i] for i in range(len(questions))]


def _ended(model: Answering, ids: list[int], *, line: bool) -> list[int]:
    """The ids up to the token that ends an answer, or its ``line``, if `greedy` writes on."""
    for count, token in enumerate(ids, 1):
        if token in model.stop_tokens or (line and "\n" in model.decode(ids[:count])):
            return ids[:count]
    return ids


def answer_windows(replies: Sequence[Reply]) -> list[Answer]:
    """Windows of which only the answers are predicted, for the distance from the original.

    Each is a prompt and its answer, and counts as a text of its own; a reply without a token has
    none.
    """
    windows = []
    for number, (prompt, answer, *_) in enumerate(replies):
        counted = bytes(len(prompt)) + b"\1" * len(answer)
        if answer:
            windows.append(Answer([*prompt, *answer], number, len(prompt), counted=counted))
    return windows
