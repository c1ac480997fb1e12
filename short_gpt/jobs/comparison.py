"""All methods x numbers of layers x healing on one checkpoint, nothing measured twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from llama.parallel import several_ranks
from short_gpt.data import demo
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.experiments.comparison import LORA, Comparison, Row
from short_gpt.jobs.cases import Cases, Shares, Windows
from short_gpt.jobs.evaluation import Tasks
from short_gpt.jobs.inputs import Cut, Opening, TextSource, check_model, source_of
from short_gpt.jobs.lora_comparison import LoraHealer, LoraSettings
from short_gpt.jobs.saving import Saving, interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile
from short_gpt.scored_model import ScoredModel
from short_gpt.short_model import ShortModel

Heal = Callable[[list[int]], list[Perplexity]]


@dataclass(frozen=True)
class Compared:
    """What a comparison measured.

    Attributes:
        rows: a row a model, the whole one first.
        agreement: of the methods, by number of layers; empty without a greedy search.
        tasks: results by the layers removed, as in ``"[3, 4]"``.
        state: the file of the run; `finish` deletes it.
    """

    rows: list[Row]
    agreement: list[dict[str, object]]
    tasks: dict[str, dict[str, float]]
    state: StateFile | None = None

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"rows": rows, "agreement": self.agreement, "tasks": self.tasks}

    def finish(self) -> None:
        """Deletes the state, once the result is safe."""
        if self.state is not None:
            self.state.clear()


def compare(
    short: ShortModel,
    calibration: Windows,
    evaluation: Windows,
    cases: Cases | None = None,
    *,
    few: int = 4,
    lora: Heal | None = None,
    tasks: Tasks | None = None,
    state: StateFile | None = None,
) -> Compared:
    """Measures every method x number of layers x healing on one model, nothing twice.

    Args:
        short: the whole model; it is left as it was.
        calibration: windows of token ids that choose layers and fit patches.
        evaluation: windows of other text.
        cases: what is compared.
        few: how many of the calibration windows the searches by loss read.
        lora: heals a model without these layers and gives the loss of every evaluation window.
        tasks: of the lm-evaluation-harness, for the models without healing.
        state: saves what was measured and continues from it.

    Raises:
        ShortGPTError: calibration and evaluation share text, or a case is out of range.

    Example:
        >>> done = compare(short, calibration, evaluation, Cases("bi,sleb", 8))  # doctest: +SKIP
        >>> [row.perplexity for row in done.rows]  # doctest: +SKIP
        [13.2, 52.1, 40.7]
    """
    cases, tasks = cases or Cases(), tasks or Tasks()
    comparison = Comparison(short, calibration, evaluation, few=few, state=state)
    rows = comparison.rows(
        cases.names,
        cases.numbers,
        healings=cases.healings,
        seeds=cases.seeds,
        lora=lora,
        lora_only=cases.pairs,
    )
    most = max(cases.numbers)
    greedy = "sleb" in cases.names
    agreed = [comparison.agreement(n, most) for n in cases.numbers] if greedy else []
    scored = comparison.tasks(rows, lambda: tasks.run(short)) if tasks.tasks else {}
    return Compared(rows, agreed, scored, state)


def compare_checkpoint(
    model: str | None,
    data: str | TextSource = "pg19",
    *,
    cases: Cases | None = None,
    shares: Shares | None = None,
    lora: LoraSettings | None = None,
    tasks: Tasks | None = None,
    opening: Opening | None = None,
    saving: Saving | None = None,
) -> Compared:
    """What `compare` does, for a checkpoint and texts by their names.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file; None
            compares on the demo's small model and book.
        data: texts to choose layers and to heal by.
        cases, shares, lora, tasks, opening: what is compared, on what, and how.
        saving: where the run is saved, to be continued.

    Raises:
        OSError, ShortGPTError: the model, the texts or a setting.

    Example:
        >>> compare_checkpoint("llama-2-7b", cases=Cases("bi", 9)).rows[1].n  # doctest: +SKIP
        9
    """
    cases, shares, lora = cases or Cases(), shares or Shares(), lora or LoraSettings()
    tasks, opening, texts = tasks or Tasks(), opening or Opening(), source_of(data)
    if several_ranks():
        raise ShortGPTError("compare runs on one rank; start it alone")
    cases.check()
    source, calibration, evaluation = _material(model, texts, shares)
    check_model(source, max(cases.numbers))
    Cut(shares.size, shares.max_windows).check()
    short = opening.whole(source, size=shares.size)
    held = shares.cut(short, evaluation, shares.eval_windows)
    chosen = shares.cut(short, calibration, shares.max_windows)
    identity = identity_of_comparison(short, texts, shares, (lora, tasks, opening))
    state = (saving or Saving()).file(identity)
    healer = None
    if LORA in cases.healings:
        healer = LoraHealer(source, calibration, held, shares, lora, opening, state)
        healer.check(short)
    with interruptible():
        few = shares.search_windows
        heal = None if healer is None else healer.healed
        return compare(short, chosen, held, cases, few=few, lora=heal, tasks=tasks, state=state)


def _material(
    model: str | None, texts: TextSource, shares: Shares
) -> tuple[str, list[str], list[str]]:
    """The model, texts to choose and heal by, and texts to evaluate on."""
    if model is None:
        return str(demo.checkpoint()), demo.bible("calibration"), demo.bible("held_out")
    return model, *texts.read_apart(shares.eval_data, seed=shares.seed)


def identity_of_comparison(
    short: ScoredModel,
    texts: TextSource,
    shares: Shares,
    settings: tuple[LoraSettings, Tasks, Opening],
) -> dict[str, object]:
    """What a saved comparison depends on, by the names that an error shows."""
    identity: dict[str, object] = {**vars(texts), **vars(shares)}
    for each in settings:
        identity |= vars(each)
    del identity["tokenizer_path"]
    return identity | {"weights": short.weights_digest()}
