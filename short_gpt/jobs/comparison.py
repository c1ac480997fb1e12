"""All methods x numbers of layers x healings on one checkpoint, and the healings that train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from short_gpt.data import demo
from short_gpt.data.windows import Text
from short_gpt.healing import choosing
from short_gpt.jobs.cases import (
    PATCHED,
    RAW,
    Cases,
    Shares,
)
from short_gpt.jobs.comparing import ComparisonResult, compare
from short_gpt.jobs.costs import end_dry_run
from short_gpt.jobs.inputs import Data, Tasks, TextSource, check_model, source_of
from short_gpt.jobs.saving import Saving, as_begun, interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import check_alone
from short_gpt.runtime.settings import takes_fields
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.own_text import own_text_writer, split_own_text


@takes_fields("compare")
@interruptible()
def compare_checkpoint(
    model: str | None,
    data: Data = TextSource(),
    *,
    cases: Cases = Cases(healings=(RAW, PATCHED)),
    shares: Shares = Shares(),
    tasks: Tasks = Tasks(),
    opening: OpenOptions = OpenOptions(),
    saving: Saving = Saving(),
    dry_run: bool = False,
    **fields: Any,
) -> ComparisonResult:
    """What `compare` does, for a checkpoint and texts by their names.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file; None
            compares on the demo's small model and book.
        data: texts to choose layers and to heal by.
        tasks: also run on the models without healing.
        dry_run: raise `DryRun`, which says what would be done, in place of the work.
        fields: single settings by their names, in place of objects: ``counts=[4, 8]``.

    Example:
        >>> compare_checkpoint("llama-2-7b", cases=Cases("bi", 9)).rows[1].n  # doctest: +SKIP
        9
    """
    check_alone("compare")
    tasks.check()
    saving.check()
    if model is None and (source_of(data) != TextSource() or shares.eval_data is not None):
        raise ShortGPTError(
            "without a MODEL, the demo's model reads its own book: name a MODEL, or leave out "
            "`data` and `eval_data`"
        )
    shares.check()
    source = str(demo.checkpoint()) if model is None else model
    if (n_layers := check_model(source)) is not None:
        cases = cases.within(n_layers)
    kinds: Sequence[Iterable[Text]]
    held: Sequence[Sequence[Text]]
    if model is None:
        kinds, held = [demo.bible()], [demo.bible("held_out")]
    else:
        kinds, held = source_of(data).kinds(), shares.held(source_of(data).column)
    size = shares.size
    short = open_model(source, as_begun(opening, saving.state), max_seq_len=size)
    cases = cases.within(len(short.kept))
    if dry_run:
        seeds = {"random": cases.seeds}
        sets = len(cases.numbers) * sum(seeds.get(name, 1) for name in cases.names)
        models = 1 + sets * len(cases.heals)
        work = f"compare {models} models of {source}: {', '.join(cases.names)} x {cases.numbers} "
        work += f"layers x {', '.join(cases.heals)}; searches and writing own text take more"
        refits = sum(healing != RAW for healing in cases.heals) * choosing.REFIT_PASSES * sets
        count = models * shares.eval_windows + (1 + refits) * shares.max_windows
        end = partial(end_dry_run, short, work, shares.size, count)
    own = own_text_writer(short, size, seed=shares.seed, beside=saving.state)
    write = (lambda *_: end()) if dry_run else own
    limits = (shares.max_windows, shares.seed)
    calibration, evaluation = split_own_text(kinds, held, write, *limits)
    held_out = shares.cut(short, evaluation, shares.eval_windows)
    fit_on = shares.cut(short, calibration, shares.max_windows)
    if dry_run:
        end()
    how: Any = {"cases": cases, "tasks": tasks.suite(), "state": saving.state}
    result = compare(short, fit_on, held_out, **how)
    return replace(result, bos=shares.bos or short.bos, precision=short.about_precision)
