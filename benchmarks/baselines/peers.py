"""The same model cut by ShortGPT, OptiPFair and llama.cpp: layers, quality, time, lines of code.

SmolLM2-135M-Instruct; the same windows for all that score layers, and the same held-out windows
judge what each wrote, opened by transformers. Each row runs a snippet of user code from the model's
path to that of a smaller one, and counts its lines. In the rows of GGUF the count says nothing: a
user types one shell command that is told the layers, and the snippet calls the function behind it.
Then tiny random models whose removed layers change nothing, because their output projections are
zero: a right cut predicts what they predict.

    pip install optipfair==0.4.2 llama-cpp-py-sync
    python benchmarks/baselines/peers.py --out benchmarks/results/peers.json

OptiPFair scores layers and cuts the ones that it is told, by default the last. llama.cpp cuts the
ones that it is told (``llama-quantize --prune-layers 3,12 IN OUT copy``; here the function behind
it, see `gemma_kinds`). ``--state FILE`` keeps rows, and the same command continues.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.baselines import gemma_kinds
from benchmarks.lib.outcome import begin, finish
from llama.formats.hf import meta_to_hf
from llama.tokenizer import Tokenizer
from short_gpt import windows
from short_gpt.checkpoints import prune_checkpoint
from short_gpt.data import demo
from short_gpt.evaluation.perplexity import Perplexity, Sample, difference
from short_gpt.healing.choosing import ResultCache
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile

# What a user writes. Given are `source` and `out`, paths; `learned`, windows of token ids; `n`, a
# number of layers. `layers` are those removed; llama.cpp and the rows of GGUF are told them.
OURS = """
from short_gpt import ShortHFModel
short = ShortHFModel(source, n_prune_layers=n)
short.measure(learned)
layers = short.remove_layers()
short.save_pretrained(out)
"""
REFITTED = """
from short_gpt import ShortHFModel, heal_refit
short = ShortHFModel(source, n_prune_layers=n)
short.measure(learned)
layers = short.layers_to_remove()
heal_refit(short, layers, learned)
short.save_pretrained(out)
"""
OPTIPFAIR = """
import torch
from optipfair import analyze_layer_importance, prune_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(source)
batches = DataLoader([torch.tensor(window) for window in learned])
scores = analyze_layer_importance(model, batches)
layers = sorted(scores, key=scores.get)[:n]
model = prune_model(model, pruning_type="DEPTH", layer_indices=layers)
model.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
"""
LAST = """
from optipfair import prune_model
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(source)
layers = range(len(model.model.layers) - n, len(model.model.layers))
model = prune_model(model, pruning_type="DEPTH", num_layers_to_remove=n)
model.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
"""
OURS_GGUF = """
from short_gpt.checkpoints import prune_checkpoint
prune_checkpoint(source, out, layers)
"""
LLAMA_CPP = """
from benchmarks.baselines.gemma_kinds import cut_by_llama_cpp
cut_by_llama_cpp(source, out, layers)
"""


class Tool(NamedTuple):
    """A way from a model to a smaller one."""

    code: str
    gguf: bool = False  # from a GGUF file to another


TOOLS = {
    "ShortGPT, Block Influence": Tool(OURS),
    "ShortGPT, Block Influence and refit": Tool(REFITTED),
    "OptiPFair, its scores": Tool(OPTIPFAIR),
    "OptiPFair, its default": Tool(LAST),
    "ShortGPT, GGUF": Tool(OURS_GGUF, gguf=True),
    "llama.cpp, GGUF": Tool(LLAMA_CPP, gguf=True),
}
SAME = 1e-4  # nats by which a model's perplexity may differ where the layers are the same
EXACT = 1e-5  # of logits, by which a cut that removes what changes nothing may change them
# Tiny models whose config lists a property of every layer: the kinds of attention, and rotations.
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 12}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "smollm3": {},
    "llama4_text": {"intermediate_size_mlp": 64, "num_local_experts": 2},
    "qwen3_moe": {
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [2, 6],
    },
}
Windows = Sequence[Sequence[int]]


def main(
    counts: int | Sequence[int] = (4, 8),
    size: int = 512,
    learned: int = 8,
    judged: int = 8,
    state: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the tables, and writes the JSON file if ``out`` is given.

    Args:
        counts: numbers of layers to remove.
        size: tokens of a window.
        learned, judged: windows to score layers and to refit on, and to evaluate on.
        state: file to continue from.
    """
    begin(out, overwrite=overwrite)
    logging.getLogger("optipfair").setLevel(logging.WARNING)
    content: dict[str, Any] = {"tokens_per_window": size, "learned": learned, "judged": judged}
    names = ("optipfair", "llama-cpp-py-sync", "transformers")
    content |= {"tools": {name: version(name) for name in names}}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), size, learned, judged, state)
        value = run.cells.value
        families = {kind: value(kind, partial(kinds, kind, (1, 4))) for kind in FAMILIES}
        compared = partial(gemma_kinds.compared, Path(folder))
        gemma = [value(f"GGUF {own}", partial(compared, own)) for own in gemma_kinds.SETS]
        rows = {str(n): run.rows(n) for n in ([counts] if isinstance(counts, int) else counts)}
        original = run.original()["perplexity"]
    content |= {"original": original, "rows": rows, "families": families, "gemma3_gguf": gemma}
    print(table(content))
    finish("peers", limits(content), content, out=out, overwrite=overwrite)


class Run:
    """The model in both formats, its windows, and what is measured, every cell once."""

    def __init__(
        self, folder: Path, size: int, learned: int, judged: int, state: str | None
    ) -> None:
        self.folder = folder
        tokenizer = Tokenizer(demo.checkpoint() / "tokenizer.json")
        encode = partial(tokenizer.encode, bos=False, eos=False)
        cut = {"size": size, "stride": size, "seed": 0}
        self.learned = [[*w] for w in windows(demo.bible(), encode, limit=learned, **cut)]
        self.judged = [*windows(demo.bible("held_out"), encode, limit=judged, **cut)]
        read = json_digest([self.learned, [[*w] for w in self.judged]])
        identity = {"model": demo.MODEL.sha256, "windows": read}
        self.cells = ResultCache(None if state is None else StateFile(state, identity, every=0.0))

    @cached_property
    def hf(self) -> Path:
        """The model in Hugging Face's format."""
        path = self.folder / "original"
        meta_to_hf(demo.checkpoint(), path)
        return path

    def original(self) -> dict[str, Any]:
        return self._measured("original", lambda: {"path": self.hf})

    def rows(self, n: int) -> dict[str, dict[str, Any]]:
        """What every tool makes of the model."""
        first, layers = self.original(), None
        found: dict[str, dict[str, Any]] = {}
        for name, tool in TOOLS.items():
            row = self._measured(f"{n} {name}", partial(self._cut, tool, n, layers))
            layers = layers or row["layers"]  # those of Block Influence
            change = difference(parts(first, self.judged), parts(row, self.judged))
            found[name] = {**row, "nats": change.nats, "standard_error": change.standard_error}
        return found

    def _cut(self, tool: Tool, n: int, layers: Sequence[int] | None) -> dict[str, Any]:
        """Runs a snippet; what it wrote, the layers, seconds, and lines of code."""
        out = self.folder / ("cut.gguf" if tool.gguf else "cut")
        source = demo.gguf_file() if tool.gguf else self.hf
        given = {"source": source, "out": out, "n": n, "learned": self.learned, "layers": layers}
        started = perf_counter()
        exec(tool.code, given)
        seconds = perf_counter() - started
        content = {"layers": sorted(given["layers"]), "seconds": seconds}  # type: ignore[type-var]
        return {"path": out, **content, "lines": len(tool.code.split("\n")) - 2}

    def _measured(self, cell: str, write: Any) -> dict[str, Any]:
        """What a model is worth that ``write`` writes; it is removed then."""

        def measure() -> dict[str, Any]:
            made = write()
            path = made.pop("path")
            losses = window_losses(path, self.judged)
            if path != self.hf:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            nats, tokens = sum(losses), sum(len(w) - 1 for w in self.judged)
            return {**made, "perplexity": math.exp(nats / tokens), "window_nats": losses}

        return self.cells.value(cell, measure)


def parts(row: Mapping[str, Any], judged: Windows) -> list[Perplexity]:
    """The losses of windows, each with its text."""
    pairs = zip(row["window_nats"], judged, strict=True)
    return [Perplexity.of([Sample(w.text, nats, len(w) - 1)]) for nats, w in pairs]


def window_losses(path: Path, judged: Windows) -> list[float]:
    """The summed loss of every window, by transformers alone."""
    folder, file = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    model = AutoModelForCausalLM.from_pretrained(folder, **file, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for window in judged:
            ids = torch.tensor([[*window]])  # (1, S)
            losses.append(model(input_ids=ids, labels=ids).loss.item() * (len(window) - 1))
    return losses


# Models whose layers differ in kind


def kinds(family: str, removed: Sequence[int]) -> dict[str, Any]:
    """How far the cut of a tiny model changes its logits, in memory and from its files."""
    from optipfair import prune_model

    def theirs(source: Path, out: Path) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(source)
        prune_model(model, pruning_type="DEPTH", layer_indices=[*removed], show_progress=False)
        model.save_pretrained(out)
        return predicted(model)

    def ours(source: Path, out: Path) -> Tensor:
        prune_checkpoint(source, out, removed)
        return predicted(AutoModelForCausalLM.from_pretrained(out))

    found: dict[str, Any] = {"removed": [*removed]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny(family, removed)
        model.save_pretrained(folder / "source")
        expected = predicted(model)
        for tool, cut in (("ours", ours), ("theirs", theirs)):
            in_memory = cut(folder / "source", folder / tool)
            found[tool] = {"in_memory": (in_memory - expected).abs().max().item()}
            try:
                again = predicted(AutoModelForCausalLM.from_pretrained(folder / tool))
            except Exception as error:  # whatever other people's files make of it
                found[tool] |= {"from_files": None, "error": str(error).strip().splitlines()[0]}
            else:
                found[tool]["from_files"] = (again - expected).abs().max().item()
    return found


def tiny(family: str, zero: Sequence[int]) -> PreTrainedModel:
    """A random model in whose layers ``zero`` the output projections are zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1 if "norm" in name else 0, 0.3)
        for index in zero:
            for name, weight in model.model.layers[index].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    weight.zero_()
    return model


def predicted(model: PreTrainedModel) -> Tensor:
    """Log probabilities of a text of several sliding windows, (S, V)."""
    ids = torch.randint(3, SHAPE["vocab_size"], (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)


# What is printed


def limits(content: Mapping[str, Any]) -> list[str]:
    """Cuts of the same layers that differ, and cuts of ours that change what they should not."""
    missed = []
    for n, rows in content["rows"].items():
        ours, theirs = rows["ShortGPT, GGUF"], rows["llama.cpp, GGUF"]
        if abs(ours["nats"] - theirs["nats"]) > SAME:
            missed.append(f"{n} layers: the GGUF cuts of the same layers differ")
        ours, theirs = rows["ShortGPT, Block Influence"], rows["OptiPFair, its scores"]
        if ours["layers"] == theirs["layers"] and abs(ours["nats"] - theirs["nats"]) > SAME:
            missed.append(f"{n} layers: cuts of the same layers differ")
    for family, found in content["families"].items():
        own = found["ours"]
        if own["from_files"] is None or max(own["in_memory"], own["from_files"]) > EXACT:
            missed.append(f"our cut of {family} changes what it predicts")
    rounding = gemma_kinds.ROUNDING
    missed += [
        f"our cut of Gemma 3 without {found['removed']} changes what it predicts"
        for found in content["gemma3_gguf"]
        if found["ours"]["difference"] > rounding
    ]
    return missed


def table(content: Mapping[str, Any]) -> str:
    """A line for every tool and number of layers, and one for every family."""
    lines = [f"original: perplexity {content['original']:.3f}"]
    for n, rows in content["rows"].items():
        for name, row in rows.items():
            change = f"{row['nats']:+.4f} ({row['standard_error']:.4f})"
            effort = "1 command" if TOOLS[name].gguf else f"{row['lines']} lines"
            lines.append(
                f"{n:>3}  {name:<38}{row['perplexity']:>9.3f}  {change:<18}{row['seconds']:>7.1f} s"
                f"  {effort:<9}  {row['layers']}"
            )
    for family, found in content["families"].items():
        own = [
            found[tool]["error"] if (v := found[tool][where]) is None else f"{v:.2g}"
            for tool in ("ours", "theirs")
            for where in ("in_memory", "from_files")
        ]
        lines.append(
            f"{family} without {found['removed']}: ours {own[0]}, read again {own[1]}; "
            f"OptiPFair's {own[2]}, read again {own[3]}"
        )
    return "\n".join([*lines, gemma_kinds.table(content["gemma3_gguf"])])


if __name__ == "__main__":
    fire.Fire(main)
