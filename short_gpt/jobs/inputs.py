"""What jobs read and how: texts, windows of them, models. Plain data, checked when used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from short_gpt.data.disjoint import hold_out
from short_gpt.data.texts import read_texts, texts
from short_gpt.data.windows import BOS, at_least, count_of, windows
from short_gpt.models.numbering import check_count
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.memory import bytes_of
from short_gpt.wrappers.opening import check_tokenizer, layers_of, open_model, reads_tokenizer
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_model import ShortModel

Encode = Callable[[str], Sequence[int]]
Notify = Callable[[str], object]


def ignore(_: str) -> None:
    """Tells nobody; what jobs that have to say something take unless told otherwise."""


def listed(names: str) -> list[str]:
    """Names with commas between, with or without spaces.

    Example:
        >>> listed("piqa, arc_easy")
        ['piqa', 'arc_easy']
    """
    return [name.strip() for name in names.split(",")]


@dataclass(frozen=True)
class TextSource:
    """Texts by the name of their source.

    Args:
        data: pg19, a local file or folder of .txt, .jsonl or .parquet, or a hub data set's name.
        split: split of a data set of the hub, of pg19, or of a folder that has files or sub-folders
            of that name; all else is read whole.
        column: column of the text in .jsonl, .parquet and hub data sets.
        max_texts: take only the first so many texts; a seed draws from all that are taken, so set
            it for a data set that is too large to be read whole.

    Example:
        >>> TextSource("novels/", max_texts=100)
        TextSource(data='novels/', split='validation', column='text', max_texts=100)
    """

    data: str = "pg19"
    split: str = "validation"
    column: str = "text"
    max_texts: int | None = None

    def read(self) -> Iterable[str]:
        """The texts, with a progress bar.

        Raises:
            OSError, ShortGPTError: as `short_gpt.texts`.
        """
        return read_texts(self.data, self.split, self.column, self.max_texts)

    def read_apart(self, eval_data: str | None, *, seed: int = 0) -> tuple[list[str], list[str]]:
        """The texts, and others to evaluate on: those of ``eval_data``, or a tenth held out."""
        found = list(self.read())
        if eval_data is None:
            return hold_out(found, seed=seed)
        return found, list(texts(eval_data, column=self.column))


def source_of(data: str | TextSource) -> TextSource:
    """The source that is meant by a name alone, or that is given."""
    return TextSource(data) if isinstance(data, str) else data


@dataclass(frozen=True)
class Cut:
    """How texts are cut into windows that do not overlap.

    Args:
        size: tokens in a window.
        max_windows: stop after so many; all if not given.
        seed: of the random order of all windows; none reads them in the order of the texts.
        bos: first leaves it in front of a text's first window alone, every puts it in front of
            every window; if not given, every for Gemma, which needs it, else first.
    """

    size: int = 1024
    max_windows: int | None = None
    seed: int | None = 0
    bos: str | None = field(default=None, kw_only=True)

    @property
    def step(self) -> int:
        """Tokens from the start of a window to that of the next."""
        return self.size

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, before a model is loaded."""
        if self.bos is not None and self.bos not in BOS:
            raise ShortGPTError(f"bos = {self.bos!r}: expected {' or '.join(BOS)}")
        if self.max_windows is not None:
            at_least(1, "max_windows", self.max_windows)
        windows([], lambda _: [], size=self.size, stride=self.step)

    def windows(
        self, found: Iterable[str], encode: Encode, bos: str = "first"
    ) -> Iterable[list[int]]:
        """Windows of token ids; see `short_gpt.windows`.

        Args:
            found: texts.
            encode: the model's.
            bos: where it stands if nothing else was asked for, such as ``short.bos``.
        """
        return windows(
            found,
            encode,
            size=self.size,
            stride=self.step,
            seed=self.seed,
            limit=self.max_windows,
            bos=self.bos or bos,
        )


@dataclass(frozen=True)
class StridedCut(Cut):
    """How texts are cut into windows that may overlap, as the ShortGPT authors' do.

    Args:
        stride: tokens between the starts of windows.
        seed: of the random order of all windows, and of the random method; none reads them in the
            order of the texts.
    """

    stride: int = 256

    @property
    def step(self) -> int:
        return self.stride


@dataclass(frozen=True)
class Opening:
    """How a model is opened.

    Args:
        tokenizer_path: tokenizer of a Meta checkpoint, found beside it if not given; other models
            bring their own.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
        trust_remote_code: run the Python files that come with a Hugging Face model; look at them
            first. Without it such a model is refused, unless transformers knows its kind.
    """

    tokenizer_path: str | None = None
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False

    def check(self, *models: str, stream: bool = False) -> None:
        """Raises ShortGPTError for a tokenizer that none of these models is read with."""
        check_tokenizer(self.tokenizer_path, *models, stream=stream)

    def of(self, source: str, *, stream: bool = False) -> Opening:
        """What counts for one of several models: a tokenizer only where one is read."""
        if self.tokenizer_path is None or reads_tokenizer(source, stream=stream):
            return self
        return replace(self, tokenizer_path=None)

    def whole(self, source: str, *, size: int, batch_size: int = 1) -> ShortModel:
        """The model in memory, for windows of up to ``size`` tokens."""
        return open_model(source, max_seq_len=size, max_batch_size=batch_size, **vars(self))


@dataclass(frozen=True)
class Streaming:
    """Whether a model need not fit into memory.

    Args:
        stream: hold one layer at a time in memory: for a Llama larger than the machine, in Meta's
            format or Hugging Face's, healed by the refit. What it takes is said before it starts.
        max_memory: of the whole process with stream, as in 3GB; half of what is free if not
            given.
    """

    stream: bool = False
    max_memory: str | None = None

    def check(self, methods: Sequence[str]) -> None:
        """Raises ShortGPTError where methods of healing need the whole model, or for no size."""
        if self.max_memory is not None:
            bytes_of(self.max_memory)
            if not self.stream:
                raise ShortGPTError(
                    f"`max_memory` {self.max_memory} bounds `stream`; add that, or leave it out"
                )
        if self.stream and [*methods] != ["refit"]:
            raise ShortGPTError(
                f"`stream` holds one layer at a time, which the refit alone heals by, got `method` "
                f"{','.join(methods)}; refit first, and heal what that wrote"
            )


@dataclass(frozen=True)
class Running:
    """How windows go through a model that need not fit into memory.

    Args:
        batch_size: windows read at once, by each replica.
        stream: hold one layer at a time in memory: for a Llama larger than the machine, in Meta's
            format or Hugging Face's. What it takes is said before it starts.
        max_memory: of the whole process with stream, as in 3GB; half of what is free if not
            given.
    """

    batch_size: int = 1
    stream: bool = False
    max_memory: str | None = None

    def whole(self, source: str, opening: Opening, size: int, ranks: int | None) -> ShortModel:
        """The model in memory; ``ranks`` share one of Meta's format."""
        return open_model(
            source,
            max_seq_len=size,
            max_batch_size=self.batch_size,
            model_parallel_size=ranks,
            **vars(opening),
        )

    def open(self, source: str, opening: Opening, size: int, ranks: int | None) -> ScoredModel:
        """The model, in memory or streamed; ``ranks`` share one of Meta's format."""
        if not self.stream:
            return self.whole(source, opening, size, ranks)
        if ranks is not None:
            raise ShortGPTError(
                f"`model_parallel_size` {ranks}: `stream` holds one layer on one rank; leave one "
                "of them out"
            )
        return open_model(
            source,
            stream=True,
            max_seq_len=size,
            max_batch_size=self.batch_size,
            max_memory=self.max_memory,
            **vars(opening),
        )


@dataclass(frozen=True)
class Scoring(Running):
    """How a model is scored.

    Args:
        max_memory: with stream, of the whole process, half of what is free if not given; else for
            the states that perplexity and sleb store, 2GB if not given.
        model_parallel_size: under torchrun, ranks that share one model of Meta's format; all if
            not given. The others are replicas, which share the windows.
    """

    model_parallel_size: int | None = None


def check_model(source: str, n: int | None = None, *, name: str = "n") -> None:
    """Raises what would go wrong with a source, and a number of layers, after it is loaded.

    Args:
        source: the checkpoint.
        n: how many layers are to go.
        name: what the user calls n.
    """
    n_layers = layers_of(source)
    if n_layers and n is not None:
        check_count(n, n_layers, name=name)


def about_bos(bos: str) -> str | None:
    """What is to be said of windows that are not cut the ShortGPT authors' way."""
    return "bos in front of every window" if bos == "every" else None


def known_total(found: Iterable[list[int]], limit: int | None) -> int | None:
    """How many windows are to come, as far as that is known."""
    counted = count_of(found)
    return limit if counted is None else counted
