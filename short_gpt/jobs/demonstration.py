"""All steps on the small real model: rank, remove, refit, evaluate, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama.io.files import check_new, new_directory
from short_gpt.checkpoints.verify import check_same, fingerprint
from short_gpt.data import demo as material
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import heal_refit
from short_gpt.jobs.cells import size_without, tokens_per_second
from short_gpt.jobs.inputs import DemoRun, Notify, ignore
from short_gpt.jobs.scores import digests_of
from short_gpt.models.numbering import check_count
from short_gpt.runtime.results import write_record
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import METHODS
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.short_model import ShortModel

PROMPT = "And God said unto Noah,"
MARKER = "layers.json"
Draw = Callable[[Importance, Path], Sequence[Path]]


@dataclass(frozen=True)
class Look:
    """What a model is worth.

    Attributes:
        perplexity: of held-out chapters.
        completion: the likeliest continuation of a prompt, with the prompt.
        megabytes: of its weights in memory.
        tokens_per_second: greedy generation with the cache, one sequence.
    """

    perplexity: Perplexity
    completion: str
    megabytes: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        return {
            **self.perplexity.to_dict(),
            **{k: v for k, v in vars(self).items() if k != "perplexity"},
        }


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        importance: the scores.
        layers: lists of the layers to remove, by Block Influence and by angle.
        looks: at the original, the pruned and the refitted model, by their names.
        written: what lies in the new folder.
    """

    importance: Importance
    layers: dict[str, list[int]]
    looks: dict[str, Look]
    written: list[Path] = field(default_factory=list)


def run_demo(
    out: str = "short_gpt_demo",
    *,
    n: int = 4,
    run: DemoRun | None = None,
    overwrite: bool = False,
    draw: Draw | None = None,
    record: Mapping[str, object] | None = None,
    notify: Notify = ignore,
) -> Demo:
    """Ranks layers of SmolLM2-135M-Instruct, removes the lowest, refits, evaluates and saves.

    It reads the King James Bible.

    Args:
        out: new folder for layers.json, the pictures and the pruned checkpoint.
        n: how many layers to remove.
        run: windows, seed and device.
        overwrite: whether an earlier demo is replaced.
        draw: writes pictures of the scores into the folder and names them; None leaves them out.
        record: what else is kept in layers.json.
        notify: called with what is about to run, once all is checked.

    Raises:
        FileExistsError: ``out`` exists.
        ShortGPTError: a number is out of range.
        ConnectionError, MissingPackageError: the model or the book cannot be fetched.
        RuntimeError: the saved checkpoint is not the model in memory.

    Example:
        >>> run_demo("demo").layers["block_influence"]  # doctest: +SKIP
        [14, 13, 3, 12]
    """
    run, target = run or DemoRun(), Path(out)
    run.check()
    check_count(n, material.N_LAYERS)
    check_new(target, marker=MARKER, overwrite=overwrite)
    notify("SmolLM2-135M-Instruct reads the King James Bible\n")
    model = str(material.checkpoint())
    short = open_model(model, device=run.device, max_seq_len=1024)
    learned, held = (run.windows(short, part) for part in ("calibration", "held_out"))
    short.measure(learned)
    low, block = (short.layers_to_remove(n=n, angular=angular) for angular in (False, True))
    found = Demo(short.importance, {"block_influence": low, "angular": block}, {})
    found.looks[f"whole, {material.N_LAYERS} layers"] = _look(short, held)
    with short.without_layers(low):
        found.looks[f"cut, {len(short.present)} layers"] = _look(short, held)
    short.evidence["method"] = METHODS["bi"]
    heal_refit(short, low, learned)
    found.looks[f"refitted, {len(short.present)} layers"] = _look(short, held)
    more = {**(record or {}), "seed": run.seed, "scored": digests_of(model)}
    _save(short, target, found, draw, more, overwrite)
    return found


def _look(short: ShortModel, held: Sequence[Sequence[int]]) -> Look:
    text = PROMPT + short.generate([PROMPT], max_gen_len=24, temperature=0)[0]
    return Look(
        short.perplexity(held),
        " ".join(text.split()),
        size_without(short, ())[1] / 1e6,
        tokens_per_second(short, held[0]),
    )


def _save(
    short: ShortModel,
    out: Path,
    found: Demo,
    draw: Draw | None,
    record: Mapping[str, object],
    overwrite: bool,
) -> None:
    """Writes the folder, whole or not at all, and compares the checkpoint in it with the model."""
    result = {name: look.to_dict() for name, look in found.looks.items()}
    content = {**record, "layers": found.layers, "result": result}
    content["importance"] = found.importance.to_dict()
    facts = {"data": "King James Bible", "result": result}
    with new_directory(out, marker=MARKER, overwrite=overwrite) as partial:
        write_record(partial / MARKER, content)
        pictures = [] if draw is None else draw(found.importance, partial)
        short.save(partial / "pruned", facts=facts)
        found.written.extend(out / p.name for p in (partial / MARKER, *pictures))
        found.written.append(out / "pruned")
        _check_same(short, partial / "pruned", str(out / "pruned"))


def _check_same(short: ShortModel, directory: Path, name: str) -> None:
    """Loads a pruned checkpoint; raises RuntimeError unless it is the model in memory."""
    first = next(iter(short.decoder.layers.parameters()))
    device, dtype = str(first.device), str(first.dtype).removeprefix("torch.")
    again = open_model(str(directory), max_seq_len=1024, device=device, dtype=dtype)
    ids = short.encode("In the beginning")
    names = ("the model in memory", f"{name}, loaded again,")
    check_same(fingerprint(short, ids=ids), fingerprint(again, ids=ids), names=names)
