"""The settings of a job: what it reads and how it runs.

A field is an argument in Python and a flag in the shell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

from short_gpt.data.texts import (
    OWN,
    Default,
    TextsInMemory,
    check_named_once,
    default_text,
    evaluation_texts,
    has_columns,
    has_split,
    read_kinds,
    read_texts,
    source_names,
)
from short_gpt.data.windows import BOS, Text, count_of, mix, windows
from short_gpt.runtime.errors import ShortGPTError, at_least
from short_gpt.runtime.settings import READ, RUN, Needs, Values, needs_one_of, setting

if TYPE_CHECKING:
    from short_gpt.evaluation.tasks import TaskRun, TaskSuite
    from short_gpt.wrappers.options import OpenOptions
    from short_gpt.wrappers.scored_model import ScoredModel
    from short_gpt.wrappers.short_model import ShortModel

Notify = Callable[[str], object]
Encode = Callable[[str], Sequence[int]]
SIZE, STRIDE = 1024, 256  # of the ShortGPT authors' windows
SCORED = ("rank", "reproduce")  # the commands that score layers


def ignore(_: str) -> None:
    """The default ``notify`` of jobs."""


def listed(names: str) -> list[str]:
    """Names with commas between, with or without spaces."""
    return [name.strip() for name in names.split(",")]


def whole_numbers(
    numbers: object, name: str, example: str, *, what: str = "whole numbers", empty: bool = False
) -> list[int]:
    """One number or several as a list; ShortGPTError for anything else, and for an empty list.

    A string of numbers, as in "3 4", is several.
    """
    several = [numbers] if isinstance(numbers, int) else numbers
    if isinstance(numbers, str):
        several = None
        if re.search(r"\d", numbers) and re.fullmatch(r"[\d\s,]+", numbers):
            with suppress(ValueError):  # more digits than Python reads
                several = [int(number) for number in re.findall(r"\d+", numbers)]
    right = isinstance(several, Sequence) and all(type(i) is int for i in several)
    if not right or not (several or empty):
        raise ShortGPTError(f"expected {what} as in `{name}` {example}, got {numbers!r}")
    return list(several)  # type: ignore[call-overload]


def layer_list(layers: object) -> list[int]:
    """Layer numbers as a list: one, several, or none; ShortGPTError for anything else."""
    return whole_numbers(layers, "layers", "21,22,23", what="layer numbers", empty=True)


# What flags need


def _sources(values: Values) -> list[str]:
    return source_names(str(values["data"]))


SPLITS = Needs(
    "data with splits (pg19, a data set of the hub, a folder with files of that name)",
    lambda v: any(has_split(name, str(v["split"])) for name in _sources(v)),
)
COLUMNS = Needs(
    "data with columns (.jsonl, .parquet or a data set of the hub)",
    lambda v: any(map(has_columns, _sources(v) + [str(v[k]) for k in ["eval_data"] if v.get(k)])),
)
TASKS = needs_one_of("`tasks`", "tasks")
# rank bounds the states of a search by it too
STREAM = Needs("`stream`", lambda v: bool(v["stream"]), commands=("heal",))
SEARCH_MEMORY = {
    "rank": "Without stream, of the states that the searches by loss store; 2GB if not given."
}
TEXT = Needs("`data` (a text, or wikitext-2, c4, ptb, pg19)", lambda v: v["data"] != "none")


# What is read


@dataclass(frozen=True)
class TextSource:
    """Texts by the name of their source.

    Args:
        data: pg19, demo, a local file or folder of .txt, .jsonl or .parquet, or a hub data set's
            name; to choose layers or to heal by also self, text that the model itself writes
            (self:chat is dialogs), and several with commas between, read in equal parts.
        split: split of a data set of the hub, of pg19, or of a folder that has sub-folders of that
            name, files that begin with it, or files that all have a split in their names; all else
            is read in full.
        column: column of the text in .jsonl, .parquet and hub data sets.
        max_texts: take at most this many texts, the first ones; a seed draws from all that are
            taken, so set it for a data set that is too large to be read in full.
        chat: the texts are conversations: messages with role and content, in the column messages
            if no other is named, which the model's chat template renders.

    Example:
        >>> TextSource("novels/", max_texts=100)
        TextSource(data='novels/', split='validation', column='text', max_texts=100, chat=False)
    """

    HEADING: ClassVar = READ
    data: str = setting(Default("pg19"), value="TEXTS")
    split: str = setting("validation", needs=SPLITS)
    column: str = setting("text", needs=COLUMNS)
    max_texts: int | None = None
    chat: bool = setting(False, needs=COLUMNS)

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


# a name or a path, texts in memory, or with settings
Data = str | PathLike[str] | Iterable[object] | TextSource


def source_of(data: Data) -> TextSource:
    """The source itself, or that of a name or of texts in memory."""
    return data if isinstance(data, TextSource) else TextSource(data)  # type: ignore[arg-type]


def name_texts(settings: object, field: str) -> None:
    """Makes a name of a field of settings: a path's own, or `data.texts.TextsInMemory`."""
    if isinstance(value := getattr(settings, field), PathLike):
        object.__setattr__(settings, field, os.fspath(value))
    elif not isinstance(value, str | None):
        object.__setattr__(settings, field, TextsInMemory(value))


@dataclass(frozen=True)
class Cut:
    """How texts are cut into windows.

    Args:
        size: tokens in a window.
        max_windows: stop after this many of the random order; all if not given.
        seed: of the random order of all windows; none reads them in the order of the texts.
        stride: tokens between the starts of windows; none takes the size, so that none overlap, and
            the method auto takes at least the size.
        bos: put the BOS token before a text's first window (first) or each (every); if not
            given, every for Gemma, which needs it, else first.
    """

    HEADING: ClassVar = READ
    size: int = SIZE
    max_windows: int | None = setting(None, more={"rank": "(48 for the method auto)"})
    seed: int | None = setting(0, more={"rank": "It is also that of the random method."})
    stride: int | None = setting(None, commands=SCORED)
    bos: str | None = None

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
class Reading:
    """The text whose perplexity is compared.

    Args:
        data: wikitext-2, c4, ptb or pg19, cut as published results do; a local file or folder, or
            several with commas between, each evaluated on its own; none.
        source: a local copy of wikitext-2, c4, ptb (which needs one) or pg19.
        column: column of the text in .jsonl and .parquet.
        chat: the texts are conversations, in the column messages if no other is named.
        size: tokens in a window.
        max_windows: read only this many windows, the first ones; of several texts an equal part.
        bos: first puts it before a text's first window alone, as published results do; every
            before every window; if not given, every for Gemma, which needs it.
        batch_size: windows read at once, and prompts of the tasks.
    """

    HEADING: ClassVar = READ
    data: str = setting(Default("wikitext-2"), value="TEXTS")
    source: str | None = setting(None, value="TEXTS")
    column: str = setting("text", needs=COLUMNS)
    chat: bool = setting(False, needs=COLUMNS)
    size: int = setting(2048, needs=TEXT)
    max_windows: int | None = setting(None, needs=TEXT)
    bos: str | None = setting(None, needs=TEXT)
    batch_size: int = setting(1, heading=RUN)

    def __post_init__(self) -> None:
        name_texts(self, "data")

    def check(self) -> None:
        from short_gpt.evaluation.protocols import PROTOCOLS, check_copy

        if self.source is not None and self.data not in PROTOCOLS:
            known = " or ".join(PROTOCOLS)
            raise ShortGPTError(f"`source` is a copy of {known}; `data` is {self.data}")
        if self.data == "ptb":
            check_copy(self.data, self.source)
        if (self.chat or self.column != Reading.column) and self.data in PROTOCOLS:
            raise ShortGPTError(f"`column` and `chat` are of other texts than {self.data}")
        Cut(self.size, self.max_windows, bos=self.bos).check()
        at_least(1, batch_size=self.batch_size)
        names = source_names(self.data)
        check_named_once(names)
        if self.max_windows is not None and self.max_windows < len(names):
            raise ShortGPTError(
                f"`max_windows` = {self.max_windows}: expected at least one for each of "
                f"{len(names)} texts"
            )

    def own_texts(self) -> dict[str, list[str]]:
        """The texts of each local file or folder; none of a protocol, whose first is read."""
        from short_gpt.evaluation.protocols import PROTOCOLS, rows_of

        if self.data in PROTOCOLS:
            with default_text(self.data):
                rows_of(self.data, self.source)
        if self.data in ("none", *PROTOCOLS):
            return {}
        column = TextSource(self.data, column=self.column, chat=self.chat).column
        names = source_names(self.data)
        return {name: [*read_texts(name, None, column, None)] for name in names}

    def windows(
        self, short: ShortModel, own: Mapping[str, Sequence[str]]
    ) -> dict[str, list[list[int]]]:
        """By name, windows of the protocol's text, or of each of ``own``."""
        from short_gpt.evaluation.protocols import protocol

        size, limit, bos = self.size, self.max_windows, self.bos or short.bos
        if not own:
            source = self.source
            read = protocol(self.data, short.encode, size=size, limit=limit, source=source, bos=bos)
            return {self.data: list(read)}
        each = None if limit is None else limit // len(own)
        cut = Cut(size, each, None, bos=bos)
        return {name: list(cut.windows(texts, short.encode)) for name, texts in own.items()}


# How to run


@dataclass(frozen=True)
class Running:
    """How windows go through a model that need not fit into memory.

    Args:
        batch_size: windows read at once, by each replica.
        stream: hold one layer at a time in memory: for a Llama larger than the machine, in Meta's
            format or Hugging Face's. What it takes is printed before it starts.
        max_memory: of the whole process with stream, as in 3GB; half of what is free if not given.
        model_parallel_size: under torchrun, ranks that share one model of Meta's format; all if
            not given. The others are replicas, which share the windows.
    """

    batch_size: int = setting(1, commands=SCORED)
    stream: bool = False
    max_memory: str | None = setting(None, value="SIZE", needs=STREAM, more=SEARCH_MEMORY)
    model_parallel_size: int | None = setting(None, commands=SCORED)

    def open(self, source: str, options: OpenOptions, size: int) -> ScoredModel:
        """The model for windows of up to ``size`` tokens, in memory or streamed."""
        from short_gpt.wrappers.opening import open_model

        return open_model(
            source,
            options,
            stream=self.stream,
            max_seq_len=size,
            max_batch_size=self.batch_size,
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


@dataclass(frozen=True)
class Tasks:
    """Tasks of the lm-evaluation-harness.

    Args:
        tasks: names of tasks with commas between, such as piqa,arc_easy; none if not given.
        limit: only this many documents of each task, the first ones.
        include_path: folder with YAML files of more tasks.
        num_fewshot: examples in each prompt; the tasks' own numbers if not given.
    """

    tasks: str | None = setting(None, value="A,B")
    limit: int | None = setting(None, needs=TASKS)
    include_path: str | None = setting(None, value="FOLDER", needs=TASKS)
    num_fewshot: int | None = setting(None, commands=("evaluate",), needs=TASKS)

    @property
    def names(self) -> list[str]:
        return listed(self.tasks or "")

    def check(self) -> None:
        from short_gpt.evaluation.tasks import task_names

        at_least(0, optional=True, num_fewshot=self.num_fewshot)
        at_least(1, optional=True, limit=self.limit)
        if self.tasks is not None:
            task_names(self.names, self.include_path)

    def suite(self, *, batch_size: int = 1) -> TaskSuite | None:
        """The tasks as a suite, which reads so many prompts together; None without tasks."""
        from short_gpt.evaluation.tasks import TaskSuite

        if self.tasks is None:
            return None
        more: dict[str, Any] = {k: v for k, v in vars(self).items() if k != "tasks"}
        return TaskSuite(self.names, batch_size=batch_size, **more)

    def run(self, short: ShortModel, *, batch_size: int = 1) -> TaskRun:
        """Every metric of every task, and the values of documents; nothing without tasks."""
        from short_gpt.evaluation.tasks import TaskRun

        suite = self.suite(batch_size=batch_size)
        return TaskRun({}) if suite is None else suite.documents(short)


# What jobs share


def check_model(
    source: str | PathLike[str], n: int | None = None, *, name: str = "n"
) -> int | None:
    """Raises errors of a source before it is loaded, and of removing n layers.

    Returns how many layers it has, if files here say so.
    """
    from short_gpt.checkpoints.prune import layers_of
    from short_gpt.models.numbering import check_count

    n_layers = layers_of(source)
    if n_layers and n is not None:
        check_count(n, n_layers, name=name)
    return n_layers


def about_bos(bos: str) -> str | None:
    """The remark on windows that are not cut the ShortGPT authors' way; None if they are."""
    return "bos at the start of every window" if bos == "every" else None


def about_own(
    data: str, eval_data: str | None = None, *, advice: str = "name a text to evaluate on"
) -> str | None:
    """The remark where a model is evaluated on its own text only."""
    names = source_names(data)
    if eval_data is not None or not {*names} <= {*OWN}:
        return None
    why = "text that the model itself wrote, and perplexity on own samples is not quality"
    return f"evaluated on {', '.join(names)}: {why}; {advice}"


def known_total(windows: Iterable[list[int]], limit: int | None) -> int | None:
    """How many windows will come, if known."""
    return limit if (count := count_of(windows)) is None else count
