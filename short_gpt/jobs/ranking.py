"""Scores of a checkpoint's layers, and what a method would remove by them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.ranks import is_distributed
from llama.sources import find_source
from short_gpt.checkpoints.scores import Digests, digests_of
from short_gpt.data.windows import count_of
from short_gpt.healing.choosing import MAX_WINDOWS, HealedChoice, choose_healed
from short_gpt.healing.refit import RefitSettings
from short_gpt.jobs.inputs import SIZE, WindowSettings, check_model
from short_gpt.jobs.saving import Running, interruptible
from short_gpt.models.numbering import check_count
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.frames import Table
from short_gpt.runtime.progress import check_alone, is_first_rank
from short_gpt.runtime.state import StateFile, joined
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import RunState
from short_gpt.scoring.stopping import Verdict
from short_gpt.selection.methods import AUTO, KLD, choose
from short_gpt.selection.search import Search
from short_gpt.selection.settings import Answer
from short_gpt.wrappers.opening import as_short, open_model
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.own_text import own_text_writer, with_own_text
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_model import ShortModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class Ranking(Table):
    """What `rank` measured."""

    answer: Answer  # what was asked
    seed: int | None = None  # of the windows, and of the random method
    importance: Importance | None = None  # the scores of one pass; None of a method by loss
    search: Search | None = None  # what a search by loss removed; None of the others
    choice: HealedChoice | None = None  # what auto chose; None of the others
    verdict: Verdict | None = None  # whether the answer is settled; None without a stop
    state: StateFile | None = None  # the file of the run; `finish` deletes it
    scored: Digests = field(default_factory=dict)  # of the model's files, for `prune` and `heal`
    bos: str = "first"  # which windows began with it: first of each text, or every
    precision: Mapping[str, str] = field(default_factory=dict)  # `ScoredModel.about_precision`

    @property
    def layers(self) -> list[int]:
        """The layers to remove, in original numbers: least important first, or a block."""
        if self.search is not None:
            return self.search.removed
        if self.choice is not None:
            return self.choice.layers
        if self.answer.n is None or self.importance is None:
            raise ShortGPTError("the ranking was made without n: pass n, or use choose")
        method, seed = self.answer.method, self.seed or 0
        return choose(self.importance, self.answer.n, method=method, seed=seed)

    def to_dict(self) -> dict[str, object]:
        """The scores and the verdict, or the search, and the weights' digests, ready for JSON."""
        source = {"bos": self.bos, "scored": dict(self.scored), **self.precision}
        if self.importance is not None:
            settled = None if self.verdict is None else asdict(self.verdict)
            return {"importance": self.importance.to_dict(), "settled": settled, **source}
        chosen = {"method": self.answer.method, "layers": self.layers}
        how = {"choice": self.choice.to_dict()} if self.choice else {"search": vars(self.search)}
        return {"chosen": chosen, **how, **source}

    @property
    def columns(self) -> dict[str, list[object]]:
        """`Importance.columns` and whether each is removed; else the layers or sets with losses."""
        if self.choice is not None:
            sets = self.choice.candidates
            named: list[object] = [", ".join(one.methods) for one in sets]
            kld: list[object] = [one.kld for one in sets]
            return {"methods": named, "layers": [one.layers for one in sets], "kld": kld}
        if self.importance is None:
            assert self.search is not None
            steps, measure = self.search.steps, "kld" if self.answer.method == KLD else "loss"
            return {"layer": [layer for layer, _ in steps], measure: [value for _, value in steps]}
        if self.answer.n is None:
            return self.importance.columns
        gone = [layer in self.layers for layer in self.importance.layers]
        return {**self.importance.columns, "remove": [*gone]}

    def __repr__(self) -> str:
        parts = [self.answer.method + ("" if self.answer.n is None else f": {self.layers}")]
        parts += [] if self.importance is None else [repr(self.importance)]
        if self.verdict is not None:
            parts += ["settled" if self.verdict.settled else "NOT settled"]
        return f"Ranking({', '.join(parts)})"

    def finish(self) -> None:
        """Deletes the state, once the result is safe."""
        if self.state is not None and is_first_rank():
            self.state.clear()


@interruptible()
def rank(
    model: str | PathLike[str] | object,
    windows: WindowSettings,
    answer: Answer,
    opening: OpenOptions,
    running: Running,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Ranking:
    """What `jobs.rank` does."""
    if answer.method == AUTO:  # windows to judge by must not overlap those to fit on
        limit, size = windows.max_windows or MAX_WINDOWS, windows.size or SIZE
        windows = replace(windows, stride=max(windows.step, size), max_windows=limit)
    running.check()
    check_ranking(model, answer, windows, opening)
    kinds, alone = windows.kinds(), not is_distributed()
    # of the files as they are now; ranks would wait for the first one, and not for long
    named, opening = isinstance(model, str | PathLike), opening.as_begun(running.state)
    digests = digests_of(str(model)) if named and alone else {}
    if named:
        ranks = None if alone or opening.stream else _sharing(str(model))
        opening = replace(opening, model_parallel_size=ranks)
        short: ScoredModel = open_model(str(model), opening, max_seq_len=windows.size or SIZE)
    else:
        short = as_short(model, tokenizer, options=opening)
    if answer.n is not None:  # of a file or a model at the hub, known only now
        check_count(answer.n, len(short.kept))
    write = own_text_writer(short, windows.size or SIZE, seed=windows.seed, beside=running.state)
    cut = windows.cut(with_own_text(kinds, write, windows.max_windows), short)
    file = None
    if answer.by_loss:
        cut = list(cut)
    if running.state is not None:  # a digest of all weights takes seconds
        text = {"text": json_digest(cut)} if answer.by_loss else {}
        identity = joined(_identity(windows, answer, opening, short.bos), short.identity(), text)
        file = StateFile(running.state, identity)
    how: Any = {"bos": short.bos, "precision": short.about_precision}
    result = Ranking(answer, windows.seed, state=file, scored=digests, **how)
    if answer.by_loss:
        assert isinstance(short, ShortModel) and isinstance(cut, list)  # it is not streamed
        n = answer.n or 0  # by loss it is set
        if answer.method == AUTO:
            return replace(result, choice=choose_healed(short, cut, n, state=file))
        how = {"method": answer.method, "batch_size": opening.batch_size, "state": file}
        return replace(result, search=short.search(cut, n, **how))
    if (plan := short.plan_text(opening.batch_size)) is not None:
        running.tell(plan)
    count = count_of(cut)
    importance = short.measure(
        cut,
        batch_size=opening.batch_size,
        total=windows.max_windows if count is None else count,
        stop=answer.rule(windows.seed),
        state=None if file is None else RunState(file),
        random_order=windows.seed is not None,
    )
    if named and not alone and is_first_rank():
        digests = digests_of(str(model))
    return replace(result, importance=importance, verdict=short.verdict, scored=digests)


def _sharing(model: str) -> int | None:
    """Ranks that share a model of Meta's format: one a file, or all where these do not divide."""
    source, ranks = find_source(model), int(os.environ.get("WORLD_SIZE", "1"))
    if source.kind != "meta":
        return None
    files = len([*Path(source).glob("consolidated.*.pth")])
    return None if ranks % files else files


def _identity(
    windows: WindowSettings, answer: Answer, opening: OpenOptions, bos: str
) -> dict[str, object]:
    """The settings that a saved run depends on, by the names that an error shows."""
    parts: dict[str, object] = {"data": windows.name, "column": windows.column, "bos": bos}
    parts |= {"size": windows.size, "seed": windows.seed, "stride": windows.step}
    parts["batch_size"] = opening.batch_size
    if answer.by_loss:  # only these read a fixed number of windows for a fixed number of layers
        parts |= {"method": answer.method, "n": answer.n, "max_windows": windows.max_windows}
    if answer.method == AUTO:
        parts["refit"] = vars(RefitSettings())
    return parts


def check_ranking(
    model: str | PathLike[str] | object,
    answer: Answer,
    windows: WindowSettings,
    opening: OpenOptions,
) -> None:
    """Raises errors that would otherwise come after the model is loaded or the texts are opened."""
    windows.check()
    rule = answer.rule(windows.seed)  # raises for a confidence out of range
    if answer.confidence not in (None, Answer.confidence) and rule is None:
        raise ShortGPTError("`confidence` needs `n`, a `seed` and `method` bi or angular")
    if opening.stream and answer.by_loss:
        raise ShortGPTError(
            f"`method` {answer.method} needs the model in memory for every candidate; choose "
            "another, or leave out `stream`"
        )
    if answer.by_loss:
        check_alone(f"`method` {answer.method}")
    if isinstance(model, str | PathLike):
        check_model(model, answer.n)
