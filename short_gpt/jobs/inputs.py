"""What jobs read: texts cut into windows, and tasks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

from short_gpt.data.texts import (
    OWN,
    Default,
    TextsInMemory,
    check_named_once,
    evaluation_texts,
    read_kinds,
    source_names,
)
from short_gpt.data.windows import Text, mix, windows
from short_gpt.runtime.errors import at_least, check
from short_gpt.runtime.settings import READ, Settings, listed, setting

if TYPE_CHECKING:
    from short_gpt.evaluation.tasks import TaskRun
    from short_gpt.healing.context import HealingWindows
    from short_gpt.wrappers.scored_model import ScoredModel
    from short_gpt.wrappers.short_model import ShortModel

Data = str | PathLike[str] | Iterable[object]  # a name or a path, or texts in memory
SIZE, STRIDE = 1024, 256  # of the ShortGPT authors' windows
EVAL_WINDOWS = 32


@dataclass(frozen=True)
class WindowSettings(Settings):
    """Texts by the names of their sources, and the windows of tokens that they are cut into.

    Example:
        >>> WindowSettings("novels/", size=512).step
        512
    """

    HEADING: ClassVar = READ
    data: Data = setting(
        Default("pg19"),
        "Texts: pg19, demo, a file or folder of .txt, .jsonl or .parquet, or a data set of the "
        "hub; to choose layers or to heal also self, text that the model itself writes, of a chat "
        "model half of it dialogs (self:text and self:chat are one of the two); several by commas "
        "are read in equal parts. A name may end with a split and a number of texts, as in "
        "pg19:train[:100] or novels/:test. Default split: validation.",
        value="TEXTS",
    )
    column: str | None = setting(
        None,
        "Column of the text, or of lists of messages, in .jsonl, .parquet and data sets of the "
        "hub. Default: text, or messages where there is no text.",
        rare=True,
    )
    eval_data: Data | None = setting(
        None,
        "Texts to evaluate on. Default: a tenth of the texts of data, or the end of a lone text, "
        "is held out.",
        value="TEXTS",
    )
    prompts: str | None = setting(
        None,
        "File of prompts, one a line, or .jsonl with prompt, or messages whose last user's is the "
        "prompt. Those with the right answer, in shrink: what the models are asked, instead of 40 "
        "of ours. The others: what a user asks in the dialogs of self, which the original answers.",
        value="FILE",
        rare=True,
    )
    size: int | None = setting(SIZE, "Tokens in a window.")
    max_windows: int | None = setting(None, "Windows to read, in random order. Default: all.")
    eval_windows: int | None = setting(None, "Windows to evaluate on. Default: 32.", rare=True)
    stride: int | None = setting(
        None,
        "Tokens between the starts of windows. Default: the size, so that none overlap.",
        rare=True,
    )
    seed: int | None = setting(
        0,
        "Seed of the random order of windows, and of all else that is random; none reads them in "
        "the order of the texts.",
        rare=True,
    )

    def __post_init__(self) -> None:
        for name in ("data", "eval_data"):
            value: Any = getattr(self, name)
            if isinstance(value, PathLike):
                object.__setattr__(self, name, os.fspath(value))
            elif not isinstance(value, str | None):
                object.__setattr__(self, name, TextsInMemory(value))

    @property
    def name(self) -> str:
        """The name of the texts."""
        assert isinstance(self.data, str)  # see `__post_init__`
        return self.data

    @property
    def eval_name(self) -> str | None:
        """The name of the texts to evaluate on, if there are others for that."""
        assert isinstance(self.eval_data, str | None)
        return self.eval_data

    @property
    def own(self) -> list[str]:
        """The sources that the model itself writes."""
        return [name for name in source_names(self.name) if name in OWN]

    @property
    def asked(self) -> list[str]:
        """The prompts that the model answers in dialogs of its own; without a file none."""
        from short_gpt.evaluation.answers import to_learn

        return [] if self.prompts is None else to_learn(self.prompts)

    @property
    def step(self) -> int:
        """Tokens from the start of a window to that of the next."""
        size = SIZE if self.size is None else self.size
        return size if self.stride is None else self.stride

    def check(self, *, shuffled: bool = False) -> None:
        """Raises ShortGPTError for a number out of range, before a model is loaded.

        ``shuffled`` windows need a seed.
        """
        counts = {"max_windows": self.max_windows, "eval_windows": self.eval_windows}
        at_least(1, optional=True, **counts)
        at_least(0, optional=not shuffled, seed=self.seed)
        size = SIZE if self.size is None else self.size
        windows([], lambda _: [], size=size, stride=self.step)
        dialogs = not self.asked or {"self", "self:chat"} & {*self.own}
        expected = "self or self:chat in `data`, whose dialogs ask those without right answers"
        check(dialogs, "prompts", self.prompts, expected)

    def kinds(self) -> list[Iterable[Text]]:
        """The texts of each source, as `data.texts.read_kinds`."""
        check_named_once(source_names(self.name))
        return read_kinds(self.name, self.column)

    def check_texts(self) -> None:
        """Reads the first text of each source, and of each to evaluate on, or raises."""
        self.kinds()
        evaluation_texts(self.eval_name, self.column)

    def cut(
        self, kinds: Sequence[Iterable[Text]], short: ScoredModel, limit: int | None = None
    ) -> Iterable[list[int]]:
        """Windows of token ids of several kinds of text, in equal parts; see `data.windows.mix`."""
        how = {"size": self.size or SIZE, "stride": self.step, "bos": short.bos}
        limit = self.max_windows if limit is None else limit
        return mix(kinds, short.encode, seed=self.seed, limit=limit, equal=True, **how)

    def learning(
        self,
        short: ScoredModel,
        size: int,
        limit: int | None,
        *,
        validate: bool,
        beside: str | PathLike[str] | None,
    ) -> HealingWindows:
        """Windows to learn from, ``limit`` of them, and others, as `healing_windows`.

        Text that the model writes is kept ``beside`` a file. To ``validate``, some are held out for
        the choice of a training step.
        """
        from short_gpt.healing.context import healing_windows
        from short_gpt.wrappers.own_text import own_text_writer

        seed = self.seed or 0
        return healing_windows(
            self.name,
            short.encode,
            size,
            eval_data=self.eval_name,
            column=self.column,
            seed=seed,
            bos=short.bos,
            limit=self.max_windows or limit,
            eval_windows=self.eval_windows or EVAL_WINDOWS,
            validate=validate,
            write=own_text_writer(short, size, seed=seed, beside=beside, prompts=self.asked),
        )


@dataclass(frozen=True)
class Tasks(Settings):
    """Tasks of the lm-evaluation-harness."""

    tasks: str | None = setting(
        None,
        "Tasks by commas, such as piqa,arc_easy, or paths of YAML files of tasks. Default: none.",
        value="A,B",
    )
    limit: int | None = setting(
        None, "Documents of each task, the first ones. Default: all.", needs="tasks"
    )
    num_fewshot: int | None = setting(
        None, "Examples in each prompt. Default: the tasks' own numbers.", rare=True, needs="tasks"
    )

    @property
    def names(self) -> list[str]:
        return listed(self.tasks or "")

    def check(self) -> None:
        from short_gpt.evaluation.tasks import task_names

        at_least(0, optional=True, num_fewshot=self.num_fewshot)
        at_least(1, optional=True, limit=self.limit)
        if self.tasks is not None:
            task_names(self.names)

    def run(self, short: ShortModel, *, batch_size: int) -> TaskRun:
        """Every metric of every task, and the values of documents; nothing without tasks.

        So many prompts are read together.
        """
        from short_gpt.evaluation.tasks import TaskRun, TaskSuite

        if self.tasks is None:
            return TaskRun({})
        suite = TaskSuite(self.names, self.limit, self.num_fewshot, batch_size=batch_size)
        return suite.documents(short)


def check_model(source: str | PathLike[str], n: int | None = None) -> int | None:
    """Raises errors of a source before it is loaded, and of removing n layers.

    Returns how many layers it has, if files here say so.
    """
    from short_gpt.checkpoints.prune import layers_of
    from short_gpt.models.numbering import check_count

    n_layers = layers_of(source)
    if n_layers and n is not None:
        check_count(n, n_layers)
    return n_layers


def about_bos(bos: str) -> str | None:
    """The remark on windows that are not cut the ShortGPT authors' way; None if they are."""
    return "bos at the start of every window" if bos == "every" else None


def about_own(data: str, eval_data: str | None = None) -> str | None:
    """The remark where a model is evaluated on its own text only."""
    names = source_names(data)
    if eval_data is not None or not {*names} <= {*OWN}:
        return None
    why = "text that the model itself wrote, and perplexity on own samples is not quality"
    return f"evaluated on {', '.join(names)}: {why}; name a text to evaluate on"
