"""Text that a model itself writes, to calibrate on; B texts at once, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.generation import COLDEST, check_logits
from short_gpt.checkpoints.target import StrPath
from short_gpt.data.disjoint import hold_out
from short_gpt.data.prompts import BUILT_IN, in_turn, prompt_of, prompts
from short_gpt.data.texts import OWN, Conversation
from short_gpt.data.windows import Text, Window, batches, common_start, starts_texts
from short_gpt.evaluation.answers import to_learn
from short_gpt.models.decoder import writing_precision
from short_gpt.runtime import replicas
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError, at_least, check
from short_gpt.runtime.memory import free_memory
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_model import ShortModel

COUNT = 96  # texts where no number is given
AT_ONCE = 64  # texts written at once at most: more bring hardly any speed on a CPU
GREEDY = 4  # one of so many answers is greedy
MIN_HELD_OUT = 4  # texts held out at least where no other text judges
Write = Callable[[bool | None, int], Sequence[Text]]  # from `own_samples`' chat, and how many
STREAMED = (
    "a streamed model writes no text of its own: let a copy that fits into memory, such as a GGUF "
    "file in few bits, write it to a file (on the command line: short-gpt generate COPY --samples "
    "96 --max_new_tokens 1152 --out own.jsonl), and give that as `data`"
)


def own_samples(
    short: ScoredModel,
    count: int = COUNT,
    size: int = 1024,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    prompts: StrPath | Iterable[object] | None = None,
    batch_size: int | None = None,
    beside: StrPath | None = None,
    progress: bool = True,
) -> list[Window]:
    """Texts that the model writes, each a window of ``size`` token ids: half of them dialogs.

    A text begins with bos, and nothing ends it. A dialog is in the chat template: a user's turns
    are `data.prompts`, each followed by the model's answer up to its own stop; the answers alone
    are ``counted`` in its window, the tokens that a training learns. Every token of the
    model's is drawn from softmax(logits / temperature) over the whole vocabulary (as for
    fine-tuning in arXiv:2410.09982 and quantization in arXiv:2305.17888), or is the likeliest in
    every fourth answer. A draw is the token where the cumulated probability exceeds a uniform
    number by seed, text and position alone: batch and count change a text only where rounding
    decides between two tokens. A model that reads windows with products in bfloat16 writes so, too.
    Replicas (torchrun) share the texts, and all get every one.

    Args:
        count: Number of texts. Default: 96.
        size: Tokens of each, with bos if the tokenizer puts it before a text. Default: 1024.
        chat: Write dialogs alone, or none. Default: half of the texts, if the model `chats`.
        prompts: The user's turns: texts, or lists of messages with role and content, the last
            user's of which is answered; or a file as `evaluation.answers.questions` reads, whose
            prompts with right answers are left out. Default: `data.prompts`.
        batch_size: Texts written at once; with a number, the batches are those of one process.
            Default: up to 64, in half of the free memory.
        beside: File beside which texts are kept, by a digest of weights and settings: a later
            call writes only what is missing. Default: none are kept.

    Raises:
        ShortGPTError: a streamed model, a setting out of range, or no chat template.

    Example:
        >>> heal_refit(short, layers, own_samples(short, 96, 512))  # doctest: +SKIP
    """
    if not isinstance(short, ShortModel):
        raise ShortGPTError(STREAMED)
    replicas.require_whole_model("text that the model itself writes")
    at_least(1, count=count)
    at_least(0, seed=seed)
    at_least(1, optional=True, batch_size=batch_size)
    check(COLDEST <= temperature < math.inf, "temperature", temperature, "a number above 0")
    asked = None if prompts is None else _asked(short, prompts, size)
    check(chat is not False or asked is None, "chat", chat, "dialogs, for `prompts`")
    openings, unseen = _openings(short, chat, asked=asked is not None)
    starts = [len(ids) - (0 if dialog else unseen) for dialog, ids in openings.items()]
    start, most = max(starts), short.decoder.max_seq_len
    at_least(2, size=size)
    check(start < size <= most, "size", size, f"more than {start} tokens and at most {most}")
    writer = _Writer(short, openings, size + unseen, unseen, temperature, seed, asked)
    texts = writer.texts(count, batch_size, beside, progress)
    return [writer.window(row, ids) for row, ids in enumerate(texts)]


def _openings(
    short: ShortModel, chat: bool | None, *, asked: bool
) -> tuple[dict[bool, list[int]], int]:
    """What texts and dialogs begin with; and how many tokens of bos no text is read with."""
    usual, openings = starts_texts(short.encode), dict[bool, list[int]]()  # of dialogs or not
    if not chat:
        openings[False] = usual or short.opening()
    if chat or asked or (chat is None and short.chats):
        with nullcontext() if chat or asked else suppress(ShortGPTError):
            openings[True] = short.opening(chat=True)
    return openings, 0 if chat or usual else len(openings[False])


def _asked(short: ShortModel, prompts: StrPath | Iterable[object], size: int) -> list[str]:
    """The user's prompts; ShortGPTError unless each leaves room for an answer in a window."""
    if isinstance(prompts, str | PathLike):
        every: list[str | None] = [*to_learn(Path(prompts))]
    else:
        every = [prompt_of(prompt) for prompt in prompts]
    asked = [prompt for prompt in every if prompt is not None]
    expected = "texts, or messages with a user's, without right answers"
    check(asked and len(asked) == len(every), "prompts", prompts, expected)
    for prompt in asked:
        room = f"at most {size - 1} tokens with the chat template, to fit `size` with an answer"
        check(len(short.turn(prompt)) < size, "prompt", f"{prompt:.40}", room)
    return asked


def draw(logits: Tensor, temperature: float, keys: Sequence[tuple[int, int, int]]) -> Tensor:
    """A token for each row of logits, (B, V) to (B,), by its seed, text and position."""
    check_logits(logits)
    drawn = list[int]()
    # row by row, because a row stays in the processor's cache
    for row, key in zip(logits.float().cpu().numpy(), keys, strict=True):  # (V,)
        cumulative = np.exp((row - row.max()) / temperature).cumsum(dtype=np.float64)  # (V,)
        # never a token of probability 0: it adds nothing to the sum
        threshold = np.random.default_rng(key).random() * cumulative[-1]
        drawn.append(int(np.searchsorted(cumulative, threshold, side="right")))
    return torch.tensor(drawn, device=logits.device)


class _Text:
    """A text while it is written; in a dialog a user's turn follows every answer.

    Attributes:
        ids: Token ids so far.
        ahead: Token ids that come next, whatever the model predicts: they are of no answer.
    """

    def __init__(
        self,
        start: Sequence[int],
        number: int = 0,
        turns: Iterator[list[int]] | None = None,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.ids, self.ahead = [start[0]], [*start[1:]]
        self._turns, self._ends, self._answer = turns, ends, number

    @property
    def greedy(self) -> bool:
        """Whether the model writes its likeliest token."""
        return self._turns is not None and self._answer % GREEDY == 0

    def write(self, token: int) -> None:
        """Takes a token of the model's; after the end of an answer the user speaks."""
        self.ahead = [token]
        if self._turns is not None and token in self._ends:
            self.ahead += next(self._turns)
            self._answer += 1

    def read(self) -> int:
        """Moves on to the next token."""
        self.ids.append(self.ahead.pop(0))
        return self.ids[-1]


@dataclass(frozen=True)
class _Writer:
    """Writes texts of ``length`` token ids."""

    short: ShortModel
    openings: dict[bool, list[int]]  # of texts and of dialogs, those that there are
    length: int
    unseen: int  # tokens of bos, which the tokenizer puts before no text
    temperature: float
    seed: int
    asked: Sequence[str] | None = None  # the user's turns; None: the built-in ones

    def is_dialog(self, row: int) -> bool:
        """Whether the text of this number is a dialog."""
        # in turn, in every second eight the other way round: a refit holds every eighth window out
        return (row + row // 8) % 2 == 1 if len(self.openings) == 2 else True in self.openings

    def texts(
        self, count: int, batch_size: int | None, beside: StrPath | None, progress: bool
    ) -> list[list[int]]:
        """The first ``count`` texts: those kept, and others, which are kept batch by batch."""
        team = replicas.current(self.short.decoder.device)
        state = None if beside is None or team.rank else self._state(Path(beside).parent)
        kept = ((state and state.content) or {}).get("texts", [])
        texts = {i: ids for i, ids in enumerate(kept) if len(ids) == self.length}
        texts = team.gather(texts)[0]  # of several replicas the first has the state
        missing = [i for i in range(count) if i not in texts]
        share = -(-len(missing) // team.count)
        fitting = team.gather(self._fitting())
        at_once = max(1, min(share, *fitting)) if batch_size is None else batch_size
        mine = team.own_items([*batches(missing, at_once)])
        total = sum(map(len, mine)) * (self.length - 1)

        def keep() -> None:
            if state is not None and missing:
                state.save({"texts": [texts.get(i, []) for i in range(max(texts) + 1)]})

        with bar("writing", total=total, unit="token", show=progress) as shown:
            for rows in mine:
                texts |= dict(zip(rows, self.write(rows, shown.update), strict=True))
                keep()
        for part in team.gather(texts):
            texts |= part
        keep()
        return [texts[i] for i in range(count)]

    def write(self, rows: Sequence[int], done: Callable[[int], object]) -> list[list[int]]:
        """The texts of these numbers, all at once; ``done`` is told how many tokens came."""
        texts = [self._started(row) for row in rows]

        def choose(logits: Tensor) -> Tensor:  # (B, V) to (B,)
            free = [i for i, text in enumerate(texts) if not text.ahead]
            likeliest = [i for i in free if texts[i].greedy]
            drawn = [i for i in free if not texts[i].greedy]
            if likeliest:
                for i, token in zip(likeliest, logits[likeliest].argmax(-1).tolist(), strict=True):
                    texts[i].write(token)
            if drawn:
                keys = [(self.seed, rows[i], len(texts[i].ids)) for i in drawn]
                tokens = draw(logits[drawn], self.temperature, keys).tolist()
                for i, token in zip(drawn, tokens, strict=True):
                    texts[i].write(token)
            done(len(rows))
            return torch.tensor([text.read() for text in texts], device=logits.device)

        with writing_precision(self.short.decoder):
            self.short.continued([text.ids for text in texts], self.length - 1, choose)
        return [text.ids for text in texts]

    def window(self, row: int, ids: Sequence[int]) -> Window:
        """The text of this number; of a dialog the model's answers count."""
        if not self.is_dialog(row):
            return Window(ids[self.unseen :], row, len(self.openings[False]) - self.unseen)
        text, wrote, ids = self._started(row), [False], ids[: self.length - self.unseen]
        for token in ids[1:]:
            wrote.append(not text.ahead)
            if not text.ahead:
                text.write(token)
            text.read()
        start = len(common_start(ids, self.openings[True]))  # messages may bring a system prompt
        return Window(ids, row, start, counted=bytes(wrote))

    def _started(self, row: int) -> _Text:
        """The text of this number, up to where the model begins."""
        if not self.is_dialog(row):
            return _Text(self.openings[False])
        every, short, opening = self.asked, self.short, self.openings[True]
        asked = in_turn(every, self.seed, row) if every else prompts(self.seed, row)
        prompt, ends = next(asked), short.answer_ends
        start = short.turn(prompt)
        if not isinstance(prompt, Conversation):
            start = [*opening, *start[len(common_start(start, opening)) :]]
        return _Text(start, row, (short.turn(prompt, ends=ends) for prompt in asked), ends)

    def _state(self, folder: Path) -> StateFile:
        settings = {"length": self.length, "seed": self.seed, "temperature": self.temperature}
        identity = {**self.short.identity(), **settings, "opening": self.openings.get(False)}
        identity["draw"] = "inverse of the cumulated probabilities"
        if True in self.openings:
            asked = json_digest(self.asked or BUILT_IN.read_text(encoding="utf-8"))
            turn = self.short.turn("?", ends=self.short.answer_ends)
            identity["dialogs"] = [self.openings[True], turn, GREEDY, asked]
        return StateFile(folder / f"self-{json_digest(identity)}.json", identity)

    def _fitting(self) -> int:
        """How many texts at once leave half of the memory free, by an upper bound."""
        decoder, weights = self.short.decoder, [*self.short.decoder.layers[0].parameters()]
        # a layer of width D has some 12 D^2 weights or more, and caches at most 2 D a token
        width = math.sqrt(sum(p.numel() for p in weights) / 12) * weights[0].element_size()
        text = 2 * width * len(decoder.layers) * self.length + 24 * decoder.vocab_size  # and logits
        on_cuda = decoder.device.type == "cuda"
        free = torch.cuda.mem_get_info(decoder.device)[0] if on_cuda else free_memory()
        return max(1, min(AT_ONCE, int(free / 2 / text)))


# Own text among the sources of a run


def own_text_writer(
    short: ScoredModel,
    size: int,
    *,
    seed: int | None = 0,
    beside: StrPath | None = None,
    prompts: Sequence[str] = (),
) -> Write:
    """Writes the text of ``self`` for a run: `own_samples` of its model."""

    def write(chat: bool | None, count: int) -> list[Window]:
        how: dict[str, Any] = {"seed": seed or 0, "chat": chat, "beside": beside}
        how |= {"prompts": prompts} if prompts and chat is not False else {}
        return own_samples(short, count, size, **how)

    return write


def count_of_own(limit: int | None, kinds: int, *, extra: bool) -> int:
    """How many texts the model writes: one kind's share of ``limit`` windows, or `COUNT`.

    ``extra`` asks for a tenth more, at least `MIN_HELD_OUT`, to be held out.
    """
    count = COUNT if limit is None else -(-limit // kinds)
    return count + (max(-(-count // 9), MIN_HELD_OUT) if extra else 0)


def with_own_text(
    kinds: Sequence[Iterable[Text]], write: Write, limit: int | None, *, extra: bool = False
) -> list[Iterable[Text]]:
    """The kinds, with what the model writes, as many texts as `count_of_own` says."""
    count = count_of_own(limit, len(kinds), extra=extra)
    return [write(OWN[kind], count) if isinstance(kind, str) else kind for kind in kinds]


def split_own_text(
    kinds: Sequence[Iterable[Text]],
    held: Sequence[Sequence[Text]],
    write: Write,
    limit: int | None,
    seed: int = 0,
) -> tuple[Sequence[Sequence[Text]], Sequence[Sequence[Text]]]:
    """`with_own_text` kinds, and others to evaluate on: ``held``, if any, or a tenth held out.

    Text of the model's own is held out only where there is no other.
    """
    own = [isinstance(kind, str) for kind in kinds]
    extra, nothing = not held and all(own), list[Text]()
    texts = [list(kind) for kind in with_own_text(kinds, write, limit, extra=extra)]
    if held:
        return texts, held
    parts = []
    for each, mine in zip(texts, own, strict=True):
        if mine and not extra:
            parts.append((each, nothing))
        else:
            least = MIN_HELD_OUT / len(each) if extra else 0  # so many more were written
            parts.append(hold_out(each, share=max(least, 0.1), seed=seed))
    return [kept for kept, _ in parts], [part for _, part in parts if part]
