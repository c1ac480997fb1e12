"""Scores of a checkpoint's layers, and what a method would remove by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from llama.parallel import several_ranks
from short_gpt.jobs.answer import Answer
from short_gpt.jobs.forecast import first_of, forecast
from short_gpt.jobs.inputs import (
    Notify,
    Opening,
    Scoring,
    StridedCut,
    TextSource,
    check_model,
    ignore,
    known_total,
    source_of,
)
from short_gpt.jobs.saving import TimedSaving, interruptible
from short_gpt.jobs.scored import UNKNOWN, Scored
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.memory import bytes_of
from short_gpt.runtime.progress import first_rank
from short_gpt.runtime.state import StateFile, joined
from short_gpt.scoring.following import Following
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.state import RunState
from short_gpt.scoring.stopping import Stop, Verdict
from short_gpt.selection.methods import BY_LOSS, choose
from short_gpt.selection.search import Search
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_model import ShortModel


@dataclass(frozen=True)
class Ranking:
    """What `rank` found.

    Attributes:
        answer: what was asked.
        seed: of the windows, and of the random method.
        importance: the scores of one pass; None of a method by loss.
        search: what a method by loss removed; None of the others.
        verdict: whether the answer is settled; None if all windows were to be read.
        state: the file of the run; `finish` deletes it.
        scored: of which weights and tokenizer, by which `prune` and `heal` tell them.
        bos: which windows began with it: first of each text, or every.
    """

    answer: Answer
    seed: int | None = None
    importance: Importance | None = None
    search: Search | None = None
    verdict: Verdict | None = None
    state: StateFile | None = None
    scored: Scored = UNKNOWN
    bos: str = "first"

    @property
    def layers(self) -> list[int]:
        """The layers to remove, in original numbers: least important first, or a block.

        Raises:
            ShortGPTError: the ranking was made without a number of layers.
        """
        if self.search is not None:
            return self.search.removed
        if self.answer.n is None or self.importance is None:
            raise ShortGPTError("the ranking was made without n: pass n, or use choose")
        method, seed = self.answer.method, self.seed or 0
        return choose(self.importance, self.answer.n, method=method, seed=seed)

    def to_dict(self) -> dict[str, object]:
        """The scores and the verdict, or the search, and of which weights, ready for JSON."""
        scored = {"scored": vars(self.scored)}
        if self.importance is not None:
            found = {"importance": self.importance.to_dict(), "settled": _settled(self.verdict)}
            return {**found, "bos": self.bos, **scored}
        assert self.search is not None
        chosen = {"method": self.answer.method, "layers": self.search.removed}
        return {"chosen": chosen, "search": vars(self.search), "bos": self.bos, **scored}

    def finish(self) -> None:
        """Deletes the state, once the result is safe."""
        if self.state is not None and first_rank():
            self.state.clear()


def rank(
    model: str,
    data: str | TextSource = "pg19",
    *,
    n: int | None = None,
    answer: Answer | None = None,
    cut: StridedCut | None = None,
    opening: Opening | None = None,
    running: Scoring | None = None,
    saving: TimedSaving | None = None,
    notify: Notify = ignore,
    detailed: bool = False,
) -> Ranking:
    """Scores every layer of a checkpoint: Block Influence and angular distances, in one pass.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        data: texts to score on.
        n: how many layers to remove; short for ``answer=Answer(n)``.
        answer: what is asked, in full.
        cut, opening, running, saving: how windows are cut, the model opened, run, the run saved.
        notify: is told what a streamed run will take in memory, before it starts.
        detailed: whether it is also told the time that a run of one pass will take, from a window
            that is timed, and how the answer stands while it goes on.

    Returns:
        The scores, with ``layers`` if a number of layers was asked for.

    Raises:
        OSError, ShortGPTError: the model, the texts or a setting; before anything long if possible.
        NotFiniteError: a weight or a state is NaN or infinite.

    Example:
        >>> rank("llama-2-7b", "novels/", n=9).layers  # doctest: +SKIP
        [27, 26, 25, 28, 24, 29, 23, 21, 22]
    """
    answer, texts, saving = answer or Answer(n), source_of(data), saving or TimedSaving()
    settings = _Settings(texts, answer, cut or StridedCut(), running or Scoring(), saving)
    check_ranking(model, answer, settings.cut, settings.running)
    found = texts.read()
    place = (opening or Opening(), settings.cut.size, settings.running.model_parallel_size)
    # of the files as they are now
    scored = Scored.of(model, place[0].tokenizer_path) if first_rank() else UNKNOWN
    if answer.by_loss:
        result = _searched(settings.running.whole(model, *place), found, settings)
    else:
        short = settings.running.open(model, *place)
        result = _measured(short, found, settings, notify, detailed)
    return replace(result, scored=scored)


@dataclass(frozen=True)
class _Settings:
    """All settings of a ranking."""

    texts: TextSource
    answer: Answer
    cut: StridedCut
    running: Scoring
    saving: TimedSaving

    def state(
        self, short: ScoredModel, windows: Sequence[Sequence[int]] | None = None
    ) -> StateFile | None:
        """The file that the run is saved in, if it has a name.

        Args:
            windows: all that a search reads; a run of one pass tells its own as it reads them.
        """
        if self.saving.state is None:  # a digest of all weights takes seconds
            return None
        text = {} if windows is None else {"text": json_digest(windows)}
        identity = joined(self._identity(short), short.identity(), text)
        return self.saving.file(identity, every=self.saving.save_every)

    def _identity(self, short: ScoredModel) -> dict[str, object]:
        """The settings that a saved run depends on, by the names that an error shows."""
        cut, answer = self.cut, self.answer
        parts: list[Mapping[str, object]] = [vars(self.texts)]
        parts += [{"size": cut.size, "seed": cut.seed, "stride": cut.stride}]
        parts += [{"sublayers": answer.sublayers, "batch_size": self.running.batch_size}]
        if answer.by_loss:  # only these read a fixed number of windows for a fixed number of layers
            parts += [{"method": answer.method, "n": answer.n, "candidates": answer.candidates}]
            parts += [{"max_windows": cut.max_windows, "max_memory": self.running.max_memory}]
        parts += [{"method of all tokens": answer.method == "angular_all"}]
        if (bos := cut.bos or short.bos) != "first":  # else as in states of earlier versions
            parts += [{"bos": bos}]
        return joined(*parts)


def check_ranking(model: str, answer: Answer, cut: StridedCut, running: Scoring) -> None:
    """Raises what would go wrong after the model is loaded.

    Raises:
        ShortGPTError: a number is out of range, or the method does not do with a streamed model.
    """
    check_model(model, answer.n)
    if answer.candidates is not None:
        check_model(model, answer.candidates, name="candidates")
    cut.check()
    answer.rule(cut.seed)  # refuses a confidence out of range
    if running.stream and (answer.by_loss or answer.method == "angular_all"):
        why = "the whole model for every candidate" if answer.by_loss else "all states"
        raise ShortGPTError(
            f"`method` {answer.method} needs {why}; choose another, or leave out `stream`"
        )
    if running.max_memory is not None:
        bytes_of(running.max_memory)
        if not running.stream and not answer.by_loss:
            raise ShortGPTError(
                f"`max_memory` {running.max_memory} bounds `stream` and the methods "
                f"{', '.join(BY_LOSS)}; add `stream`, or leave it out"
            )
    if answer.by_loss and several_ranks():
        raise ShortGPTError(f"`method` {answer.method} runs on one rank; start it alone")


def _measured(
    short: ScoredModel,
    found: Iterable[str],
    settings: _Settings,
    notify: Notify,
    detailed: bool,
) -> Ranking:
    """The scores of one pass."""
    answer, cut, size = settings.answer, settings.cut, settings.running.batch_size
    windows = cut.windows(found, short.encode, short.bos)
    state, bos = settings.state(short), cut.bos or short.bos
    if (plan := short.plan_text(size)) is not None:
        notify(plan)
    follow = None
    if detailed:
        windows = _forecast(short, windows, settings, state, notify)
        rule = Stop(answer.n or 1, answer.method == "angular")
        stops = answer.rule(cut.seed)
        follow = Following(notify, stops or rule, stops=stops is not None)
    with interruptible():
        verdict = short.measure(
            windows,
            batch_size=size,
            total=known_total(windows, cut.max_windows),
            stop=answer.rule(cut.seed),
            state=RunState(state) if state is not None else None,
            sublayers=answer.sublayers,
            all_tokens=answer.method == "angular_all",
            follow=follow,
        )
    return Ranking(answer, cut.seed, short.importance, verdict=verdict, state=state, bos=bos)


def _forecast(
    short: ScoredModel,
    windows: Iterable[list[int]],
    settings: _Settings,
    state: StateFile | None,
    notify: Notify,
) -> Iterable[list[int]]:
    """Tells how long the run will take; returns the windows."""
    first, windows = first_of(windows)
    if first is not None:
        before = 0 if state is None else RunState(state).sums(short.kept).n_windows
        line = forecast(
            short,
            first,
            batch_size=settings.running.batch_size,
            rule=settings.answer.rule(settings.cut.seed),
            total=known_total(windows, settings.cut.max_windows),
            population=getattr(windows, "population", None),
            read=before,
        )
        notify(line)
    return windows


def _searched(short: ShortModel, found: Iterable[str], settings: _Settings) -> Ranking:
    """What a method that runs the model without layers removes."""
    answer, running = settings.answer, settings.running
    cut, few = settings.cut, None
    windows, bos = list(cut.windows(found, short.encode, short.bos)), cut.bos or short.bos
    state = settings.state(short, windows)
    with interruptible():
        if answer.candidates is not None:
            short.measure(windows, batch_size=running.batch_size)
            few = short.layers_to_remove(n=answer.candidates)
        search = short.search(
            windows,
            answer.n or 0,  # checked: it is given
            method=answer.method,
            candidates=few,
            batch_size=running.batch_size,
            max_memory=bytes_of(running.max_memory or "2GB"),
            state=state,
        )
    return Ranking(answer, cut.seed, search=search, state=state, bos=bos)


def _settled(verdict: Verdict | None) -> dict[str, object] | None:
    """A verdict, ready for JSON."""
    if verdict is None:
        return None
    return {**vars(verdict), "stop": vars(verdict.stop), "pair": list(verdict.pair)}
