"""Settings of shrink and compare, until these take `jobs.inputs.Windows` and `OpenOptions`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from short_gpt.data.texts import (
    OWN,
    Default,
    TextsInMemory,
    check_named_once,
    evaluation_texts,
    read_kinds,
    source_names,
)
from short_gpt.data.windows import BOS, Text, mix, windows
from short_gpt.jobs.inputs import SIZE
from short_gpt.runtime.errors import ShortGPTError, at_least
from short_gpt.runtime.settings import READ, Settings, setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from short_gpt.healing.context import Learning
    from short_gpt.wrappers.options import OpenOptions
    from short_gpt.wrappers.scored_model import ScoredModel

    Encode = Callable[[str], Sequence[int]]


def source_of(data: object) -> TextSource:
    """The source itself, or that of a name or of texts in memory."""
    return data if isinstance(data, TextSource) else TextSource(data)  # type: ignore[arg-type]


def name_texts(settings: object, field: str) -> None:
    """Makes a name of a field of settings: a path's own, or `data.texts.TextsInMemory`."""
    if isinstance(value := getattr(settings, field), PathLike):
        object.__setattr__(settings, field, os.fspath(value))
    elif not isinstance(value, str | None):
        object.__setattr__(settings, field, TextsInMemory(value))


@dataclass(frozen=True)
class TextSource(Settings):
    """Texts by the name of their source.

    Example:
        >>> TextSource("novels/", max_texts=100)
        TextSource(data='novels/', split='validation', column='text', max_texts=100, chat=False)
    """

    HEADING: ClassVar = READ
    data: str = setting(
        Default("pg19"),
        "Pg19, demo, a local file or folder of .txt, .jsonl or .parquet, or a hub data set's "
        "name; to choose layers or to heal by also self, text that the model itself writes "
        "(self:chat is dialogs), and several with commas between, read in equal parts.",
        value="TEXTS",
    )
    split: str = setting(
        "validation",
        "Split of a data set of the hub, of pg19, or of a folder that has sub-folders of that "
        "name, files that begin with it, or files that all have a split in their names; all "
        "else is read in full.",
    )
    column: str = setting("text", "Column of the text in .jsonl, .parquet and hub data sets.")
    max_texts: int | None = setting(
        None,
        "Take at most this many texts, the first ones; a seed draws from all that are taken, so "
        "set it for a data set that is too large to be read in full.",
    )
    chat: bool = setting(
        False,
        "The texts are conversations: messages with role and content, in the column messages if "
        "no other is named, which the model's chat template renders.",
    )

    def __post_init__(self) -> None:
        name_texts(self, "data")
        if self.chat and self.column == TextSource.column:
            object.__setattr__(self, "column", "messages")

    @property
    def own(self) -> list[str]:
        """The sources that the model itself writes."""
        return [name for name in source_names(self.data) if name in OWN]

    def kinds(self) -> list[Iterable[Text]]:
        """The texts of each source, as `data.texts.read_kinds`."""
        names = source_names(self.data)
        check_named_once(names)
        return read_kinds(self.data, self.split, self.column, self.max_texts)

    def check(self, eval_data: str | None) -> None:
        """Reads the first text of each source, and of each to evaluate on, or raises."""
        self.kinds()
        evaluation_texts(eval_data, self.column)


@dataclass(frozen=True)
class Cut(Settings):
    """How texts are cut into windows."""

    HEADING: ClassVar = READ
    size: int = setting(SIZE, "Tokens in a window.")
    max_windows: int | None = setting(
        None, "Stop after this many of the random order; all if not given."
    )
    seed: int | None = setting(
        0, "Of the random order of all windows; none reads them in the order of the texts."
    )
    stride: int | None = setting(
        None,
        "Tokens between the starts of windows; none takes the size, so that none overlap, and "
        "the method auto takes at least the size.",
    )
    bos: str | None = setting(
        None,
        "Put the BOS token before a text's first window (first) or each (every); if not given, "
        "every for Gemma, which needs it, else first.",
    )

    @property
    def step(self) -> int:
        """Tokens from the start of a window to that of the next."""
        return self.size if self.stride is None else self.stride

    def check(self) -> None:
        if self.bos is not None and self.bos not in BOS:
            raise ShortGPTError(f"bos = {self.bos!r}: expected {' or '.join(BOS)}")
        at_least(1, optional=True, max_windows=self.max_windows)
        at_least(0, optional=True, seed=self.seed)
        windows([], lambda _: [], size=self.size, stride=self.step)

    def windows(
        self, texts: Iterable[Text], encode: Encode, bos: str = "first"
    ) -> Iterable[list[int]]:
        """Windows of token ids, as `short_gpt.windows`; ``bos`` holds where none is set."""
        return self.mixed([texts], encode, bos)

    def mixed(
        self, kinds: Sequence[Iterable[Text]], encode: Encode, bos: str = "first"
    ) -> Iterable[list[int]]:
        """The same of several kinds of text, in equal parts; see `data.windows.mix`."""
        cutting = {"size": self.size, "stride": self.step, "bos": self.bos or bos}
        limit, seed = self.max_windows, self.seed
        return mix(kinds, encode, seed=seed, limit=limit, equal=True, **cutting)


@dataclass(frozen=True)
class HealingWindows(Settings):
    """Windows that a healing learns from, and others to evaluate on."""

    HEADING: ClassVar = READ
    eval_data: str | None = setting(
        None,
        "Texts to evaluate on; if not given, a tenth of the texts of data is held out, or the "
        "end of a lone text.",
        value="TEXTS",
    )
    size: int | None = setting(
        None,
        "Tokens in a window; if not given, 512 in shrink, 1024 in a closed form, else the "
        "recipe's.",
    )
    max_windows: int | None = setting(
        None,
        "Windows to learn from; 64 for a closed form, all for training (192 in shrink where the "
        "model writes text of its own). Before training, a closed form reads 64 of them at "
        "most, and the training begins with others.",
    )
    eval_windows: int = setting(32, "Windows to evaluate on.")
    seed: int = setting(0, "Of the choice of texts and windows, and of training.")
    bos: str | None = setting(None, "Which windows begin with BOS; see rank.")

    def __post_init__(self) -> None:
        name_texts(self, "eval_data")

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, before a model is loaded."""
        size = SIZE if self.size is None else self.size
        Cut(size, self.max_windows, self.seed, bos=self.bos).check()
        at_least(1, eval_windows=self.eval_windows)

    def read(
        self,
        texts: TextSource,
        short: ScoredModel,
        size: int,
        limit: int | None,
        *,
        validate: bool,
        beside: str | Path,
    ) -> Learning:
        """The windows of ``size``, ``limit`` of them to learn from, as `healing_windows`.

        Text that the model writes is kept ``beside`` a file.
        """
        from short_gpt.healing.context import healing_windows
        from short_gpt.wrappers.own_text import own_text_writer

        write = own_text_writer(short, size, seed=self.seed, beside=beside)
        return healing_windows(
            texts.data,
            short.encode,
            size,
            eval_data=self.eval_data,
            split=texts.split,
            column=texts.column,
            max_texts=texts.max_texts,
            seed=self.seed,
            bos=self.bos or short.bos,
            limit=self.max_windows or limit,
            eval_windows=self.eval_windows,
            validate=validate,
            write=write,
        )


@dataclass(frozen=True)
class Running(Settings):
    """How windows go through a model that need not fit into memory."""

    batch_size: int = setting(1, "Windows read at once, by each replica.")
    stream: bool = setting(
        False,
        "Hold one layer at a time in memory: for a Llama larger than the machine, in Meta's "
        "format or Hugging Face's. What it takes is printed before it starts.",
    )
    max_memory: str | None = setting(
        None,
        "Of the whole process with stream, as in 3GB; half of what is free if not given.",
        value="SIZE",
    )
    model_parallel_size: int | None = setting(
        None,
        "Under torchrun, ranks that share one model of Meta's format; all if not given. The "
        "others are replicas, which share the windows.",
    )

    def open(self, source: str, options: OpenOptions, size: int) -> ScoredModel:
        """The model for windows of up to ``size`` tokens, in memory or streamed."""
        from short_gpt.wrappers.opening import open_model

        return open_model(
            source,
            options,
            stream=self.stream,
            max_seq_len=size,
            batch_size=self.batch_size,
            model_parallel_size=self.model_parallel_size,
            max_memory=self.max_memory if self.stream else None,
        )

    def check_bounds(self, methods: Sequence[str] = (), *, searches: bool = False) -> None:
        """Raises ShortGPTError for an invalid bound, or one that nothing here can keep to."""
        from short_gpt.runtime.memory import bytes_of

        at_least(1, batch_size=self.batch_size)
        if self.max_memory is not None:
            bytes_of(self.max_memory)
            if not self.stream and not searches:
                also = f" and the methods {', '.join(methods)}" if methods else ""
                raise ShortGPTError(
                    f"`max_memory` {self.max_memory} bounds `stream`{also}; add `stream`, or leave "
                    "it out"
                )

    def check_healing(self, methods: Sequence[str]) -> None:
        """Raises ShortGPTError where methods of healing need the model in memory."""
        self.check_bounds()
        if self.stream and [*methods] != ["refit"]:
            raise ShortGPTError(
                f"`stream` holds one layer at a time, which the refit alone heals by, got `method` "
                f"{','.join(methods)}; refit first, and heal what that wrote"
            )
