"""How many of a pruned model's greedy tokens the whole model accepts, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama.checkpoint.meta import read_conversion
from llama.io.sources import is_meta
from short_gpt.data.texts import texts
from short_gpt.data.windows import Window, at_least
from short_gpt.evaluation.drafts import LENGTHS, Acceptance, check_same_tokens, draft_agreement
from short_gpt.jobs.inputs import Cut, Opening, TextSource, check_model, source_of
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.short_model import ShortModel

MOST = 2**17  # tokens that the longest Llama takes, where a checkpoint does not say how many
LONGEST = 2048  # tokens of a prompt from a file and of what is written behind it


@dataclass(frozen=True)
class Drafting(Cut):
    """What is written, and behind what: windows of the data, or prompts of a file.

    Args:
        prompts: file with a prompt in every line, or in every row of .jsonl or .parquet; windows
            of the data if not given.
        tokens: that the whole model writes behind every prompt; fewer where it ends its text.
    """

    size: int = 128
    max_windows: int | None = 32
    prompts: str | None = field(default=None, kw_only=True)
    tokens: int = field(default=64, kw_only=True)

    def check(self) -> None:
        super().check()
        at_least(1, "tokens", self.tokens)

    def read(self, column: str = "text") -> list[str]:
        """The prompts of the file, from this column of rows; none without a file."""
        if self.prompts is None:
            return []
        found = list(texts(Path(self.prompts), column=column))
        if self.prompts.lower().endswith(".txt"):
            found = [line for text in found for line in text.splitlines() if line.strip()]
        if not found:
            raise ShortGPTError(f"{self.prompts} holds no prompt: expected one in every line")
        return found


@dataclass(frozen=True)
class Drafts:
    """What the whole model accepts of drafts.

    Attributes:
        lengths: by the length of a draft, the shortest first.
        prompts: that were read.
    """

    lengths: tuple[Acceptance, ...]
    prompts: int

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        return {"prompts": self.prompts, "lengths": [found.to_dict() for found in self.lengths]}


def draft(
    model: str,
    pruned: str,
    data: str | TextSource = "pg19",
    *,
    drafting: Drafting | None = None,
    opening: Opening | None = None,
) -> Drafts:
    """How many of a pruned model's greedy tokens the whole model accepts, as drafts of 1 to 8.

    Args:
        model: the whole one: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF
            file.
        pruned: the one that drafts, of any format, with the same tokenizer. Both are in memory.
        data: texts, whose windows are the prompts.
        drafting: how windows are cut, or prompts in their place, and how much is written behind.
        opening: of both models.

    Raises:
        OSError, ShortGPTError: a model, the texts or a setting; or the tokenizers differ.

    Example:
        >>> draft("llama-2-7b", "llama-2-5b", "novels/").lengths[3].share  # doctest: +SKIP
        0.5
    """
    drafting, opening, source = drafting or Drafting(), opening or Opening(), source_of(data)
    drafting.check()
    for name in (model, pruned):
        check_model(name)
    opening.check(model, pruned)
    own = drafting.read(source.column)
    size = LONGEST if own else drafting.size + drafting.tokens
    for name in (model, pruned):
        _check_length(name, drafting, size)
    found = [] if own else list(source.read())
    whole, small = (opening.of(name).whole(name, size=size) for name in (model, pruned))
    check_same_tokens(whole, small, (model, pruned))
    cut = drafting.windows(found, whole.encode, whole.bos) if not own else _encoded(whole, own)
    prompts = list(cut)
    done = draft_agreement(whole, small, prompts, tokens=drafting.tokens, progress=True)
    return Drafts(tuple(done.at(length) for length in LENGTHS), len(prompts))


def _check_length(model: str, drafting: Drafting, size: int) -> None:
    """Raises ShortGPTError where a model in Meta's format would hold positions that none has."""
    if not is_meta(model):  # it says how many it takes, and holds no more than are written
        return
    most = read_conversion(Path(model)).get("max_position_embeddings", MOST)
    if isinstance(most, int) and size > most:
        raise ShortGPTError(
            f"`size` {drafting.size} and `tokens` {drafting.tokens} are more than {model} takes, "
            f"{most}: give fewer"
        )


def _encoded(whole: ShortModel, own: Sequence[str]) -> list[Window]:
    """Prompts of a file, each a text of its own."""
    return [Window(whole.encode(prompt), number) for number, prompt in enumerate(own)]
