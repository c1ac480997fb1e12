"""Text that a model itself writes, to calibrate on; B texts at once, S tokens, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from llama.generation import COLDEST, check_logits
from llama.io.files import check_writable
from llama.ranks import several_ranks
from short_gpt.data.disjoint import hold_out
from short_gpt.data.texts import OwnText
from short_gpt.data.windows import Text, Window, at_least, starts_texts
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.memory import free_memory
from short_gpt.runtime.progress import above_bars, bar, duration
from short_gpt.runtime.state import StateFile
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_model import ShortModel

COUNT = 96  # texts where no number is given: the most that was measured (docs/calibration.md)
AT_ONCE = 64  # texts written at once at most: more bring hardly any speed on a CPU
TIMED = 3  # steps by which the time is foretold
Kind = Iterable[Text] | OwnText
Write = Callable[[bool, int], Sequence[Text]]
STREAMED = (
    "a streamed model writes no text of its own: let a copy that fits into memory, such as a GGUF "
    "file in few bits, write it to a file, short-gpt generate COPY --samples 96 --out own.jsonl, "
    "and read that, --data own.jsonl"
)


def own_samples(
    short: ScoredModel,
    count: int = COUNT,
    size: int = 1024,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    batch_size: int | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> list[Window]:
    """Texts that the model itself writes after bos, each one window of token ids.

    Every token is drawn from softmax(logits / temperature) over the whole vocabulary, and nothing
    ends a text: after an end of text another one begins. Fine-tuning and quantization on a model's
    own text: arXiv:2410.09982, arXiv:2305.17888. The ids are what the model wrote; encoding their
    text would give others.

    A draw is argmax(logits / temperature - log E) with E ~ Exp(1), V numbers that depend on the
    seed, the text and the position alone. So neither ``count`` nor ``batch_size`` changes a text,
    except where rounding decides between two tokens that are nearly equal.

    Args:
        count: how many texts.
        size: tokens in each, with bos if the tokenizer puts it before a text.
        chat: write dialogs, both sides, after the chat template's system prompt and open user turn,
            which are in the window.
        batch_size: texts written at once; None is up to 64, in half of the memory that is free.
        folder: where unfinished and finished texts are kept, by a digest of weights and settings;
            a later call writes only what is missing. None keeps nothing.

    Raises:
        ShortGPTError: a streamed model, a setting out of range, or no chat template.

    Example:
        >>> windows = own_samples(short, 96, 512)  # doctest: +SKIP
        >>> heal_refit(short, layers, windows)  # doctest: +SKIP
    """
    _check(short, count, size, temperature, seed)
    assert isinstance(short, ShortModel)
    usual = [] if chat else starts_texts(short.encode)
    opening = usual or short.opening(chat=chat)
    unseen = 0 if chat or usual else len(opening)  # bos that the tokenizer puts before no text
    if len(opening) - unseen >= size:
        raise ShortGPTError(f"size = {size}: the chat template begins with {len(opening)} tokens")
    texts, state = [[*opening] for _ in range(count)], None
    if folder is not None:
        settings = {"opening": opening, "length": size + unseen, "temperature": temperature}
        identity = {**short.identity(), **settings, "seed": seed}
        path = folder / f"self-{json_digest(identity)}.json"
        check_writable(path)
        state = StateFile(path, identity)
        kept = (state.content or {}).get("texts", [])
        texts = [*kept, *texts[len(kept) :]]
    writer = _Writer(short, texts, size + unseen, temperature, seed, state)
    writer.write(count, batch_size, progress)
    return [Window(ids[unseen:], text) for text, ids in enumerate(texts[:count])]


def writes(
    short: ScoredModel, size: int, *, seed: int | None = 0, folder: Path | None = None
) -> Write:
    """What writes texts of a run's own model: from whether they are chats, and how many."""

    def write(chat: bool, count: int) -> Sequence[Text]:
        return own_samples(short, count, size, seed=seed or 0, chat=chat, folder=folder)

    return write


def written(
    kinds: Sequence[Kind], write: Write | None, limit: int | None, *, spare: bool = False
) -> list[Iterable[Text]]:
    """The kinds, with what the model writes: its share of ``limit`` windows, or `COUNT`.

    ``spare`` asks for a tenth more, to be held out.
    """
    count = COUNT if limit is None else -(-limit // len(kinds))
    count += -(-count // 9) if spare else 0
    filled = list[Iterable[Text]]()
    for kind in kinds:
        if not isinstance(kind, OwnText):
            filled.append(kind)
        elif write is None:
            raise ShortGPTError("self: expected what writes it, as in write=writes(short, size)")
        else:
            filled.append(write(kind.chat, count))
    return filled


def written_apart(
    kinds: Sequence[Kind],
    held: Sequence[Sequence[Text]],
    write: Write | None,
    limit: int | None,
    seed: int = 0,
) -> tuple[Sequence[Sequence[Text]], Sequence[Sequence[Text]]]:
    """`written` kinds, and others to evaluate on: those ``held``, if any, or a tenth held out.

    Text of the model's own is held out only where there is no other.
    """
    own = [isinstance(kind, OwnText) for kind in kinds]
    spare = not held and all(own)
    texts = [list(kind) for kind in written(kinds, write, limit, spare=spare)]
    if held:
        return texts, held
    nothing = list[Text]()
    parts = [
        (kind, nothing) if mine and not spare else hold_out(kind, seed=seed)
        for kind, mine in zip(texts, own, strict=True)
    ]
    return [kept for kept, _ in parts], [part for _, part in parts if part]


def _check(short: ScoredModel, count: int, size: int, temperature: float, seed: int) -> None:
    if not isinstance(short, ShortModel):
        raise ShortGPTError(STREAMED)
    if several_ranks():
        raise ShortGPTError("a model's own text is written on one rank: start the command alone")
    for least, name, value in ((1, "count", count), (2, "size", size), (0, "seed", seed)):
        at_least(least, name, value)
    if size > short.decoder.max_seq_len:
        raise ShortGPTError(f"size = {size}: this model takes {short.decoder.max_seq_len} tokens")
    if not COLDEST <= temperature < math.inf:
        raise ShortGPTError(f"temperature = {temperature}: expected above 0, 1 as the model is")


def draw(logits: Tensor, temperature: float, keys: Sequence[tuple[int, int, int]]) -> Tensor:
    """A token for each row of logits, (B, V) to (B,), by its seed, text and position."""
    check_logits(logits)
    shape = logits.shape[1]
    noise = np.stack([np.random.default_rng(key).standard_exponential(shape) for key in keys])
    # E may be as small as a rare token's probability, which the logarithm holds in float32
    gumbel = -torch.from_numpy(np.log(noise)).to(logits.device, torch.float32)  # (B, V)
    return (logits / temperature + gumbel).argmax(-1)


class _Writer:
    """Texts on their way: token ids, which grow up to ``length``."""

    def __init__(
        self,
        short: ShortModel,
        texts: list[list[int]],
        length: int,
        temperature: float,
        seed: int,
        state: StateFile | None,
    ) -> None:
        self._short, self._texts, self._length = short, texts, length
        self._temperature, self._seed, self._state = temperature, seed, state

    def write(self, count: int, batch_size: int | None, progress: bool) -> None:
        """Completes the first ``count`` texts; saves what is there when it ends, however it ends"""
        missing = sum(self._length - len(ids) for ids in self._texts[:count])
        if not missing:
            return
        at_once = batch_size or self._fitting()
        with bar("writing", total=missing, unit="token", show=progress) as shown:
            try:
                while rows := self._next(count, at_once):
                    if progress and shown.n == 0:
                        above_bars(self._forecast(rows, missing))
                    self._continue(rows, shown.update)
            finally:
                if self._state is not None:
                    self._state.save({"texts": self._texts})

    def _next(self, count: int, at_once: int) -> list[int]:
        """Unfinished texts of one length: a batch that was interrupted, or new ones."""
        short = [i for i in range(count) if len(self._texts[i]) < self._length]
        alike = (i for i in short if len(self._texts[i]) == len(self._texts[short[0]]))
        return list(islice(alike, at_once))

    def _continue(self, rows: Sequence[int], update: Callable[[int], object]) -> None:
        def choose(logits: Tensor) -> Tensor:  # (B, V) to (B,)
            position = len(self._texts[rows[0]])
            keys = [(self._seed, row, position) for row in rows]
            tokens = draw(logits, self._temperature, keys)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                self._texts[row].append(token)
            update(len(rows))
            if self._state is not None and self._state.due():
                self._state.save({"texts": self._texts})
            return tokens

        ids = [self._texts[row] for row in rows]
        self._short.continued(ids, self._length - len(ids[0]), choose)

    def _forecast(self, rows: Sequence[int], missing: int) -> str:
        """How long the writing takes, from steps that are timed and written again."""
        times: list[float] = []

        def choose(logits: Tensor) -> Tensor:
            times.append(perf_counter())
            return draw(logits, self._temperature, [(self._seed, row, 0) for row in rows])

        ids = [self._texts[row] for row in rows]
        self._short.continued(ids, min(TIMED, self._length - len(ids[0])), choose)
        step = (times[-1] - times[0]) / max(len(times) - 1, 1)
        kept = f"kept in {self._state.path}" if self._state else "kept nowhere: no state is named"
        return (
            f"the model writes {missing:,} tokens of its own, {len(rows)} texts at once: about "
            f"{duration(step * missing / len(rows))}; {kept}"
        )

    def _fitting(self) -> int:
        """How many texts at once leave half of the memory free, by an upper bound."""
        layers, device = self._short.decoder.layers, self._short.decoder.device
        weight = next(layers.parameters())
        # a layer of width D has some 12 D^2 weights or more, and caches at most 2 D a token
        width = math.sqrt(sum(p.numel() for p in layers[0].parameters()) / 12)
        text = 2 * width * len(layers) * self._length * weight.element_size()
        text += 24 * self._short.decoder.vocab_size  # logits and noise
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        return max(1, min(AT_ONCE, int(free / 2 / text)))
