"""From a model to a smaller one that works, in one call: choose, refit, train, judge, write."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from llama.checkpoint.meta import Checkpoint
from llama.io.files import check_new, check_output, new_directory
from llama.io.json_files import read_json
from llama.io.sources import Source as Weights
from llama.io.sources import find_source, is_gguf, resolve
from llama.tokenizer import find_tokenizer
from short_gpt.checkpoints.gguf import about_types, check_saved
from short_gpt.checkpoints.gguf_layers import LAYER, Stack
from short_gpt.checkpoints.hf import save_as_meta
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.records import PROVENANCE
from short_gpt.checkpoints.target import Target, check_format, check_new_gguf, out_paths
from short_gpt.data.disjoint import without_overlap
from short_gpt.data.texts import OWN, source_names, texts
from short_gpt.evaluation.cells import Cells
from short_gpt.evaluation.paired import losses, together
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import DistillSettings, HealingJob, RefitSettings, Source, Step, choosing
from short_gpt.healing.choosing import FEW, FIRST, MOST, REFIT, choose_healed, pruned_losses
from short_gpt.healing.lora import require_packages, seconds_a_step
from short_gpt.healing.recipe import Recipe, recipe_for
from short_gpt.healing.texts import Learning
from short_gpt.jobs.comparing import size_without, tokens_per_second, windows_digest
from short_gpt.jobs.conversion import convert
from short_gpt.jobs.dial import Dial, Shrinking
from short_gpt.jobs.healing import CLOSED_WINDOWS
from short_gpt.jobs.inputs import SIZE, Notify, Tasks, TextSource, about_own, ignore, source_of
from short_gpt.jobs.page import is_page, page
from short_gpt.jobs.saving import interruptible
from short_gpt.jobs.settings import HealingWindows
from short_gpt.jobs.shrunk import PLAIN, REPORT, Look, Shrunk, next_steps, report_of
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import duration
from short_gpt.runtime.state import StateFile, hold, joined
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import AUTO, METHODS, SEARCHED, choose
from short_gpt.selection.search import most_layers_run
from short_gpt.wrappers.opening import open_trainable
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.own_text import AT_ONCE, COUNT, TIMED, writes
from short_gpt.wrappers.short_hf import ShortHFModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHAT = "What is the capital of France, and what is it known for?"  # of models with a chat template
ANSWER = 48  # tokens of a completion
CHECKS, HELD = 8, 16  # evaluations of a training, each on at most so many windows


@interruptible()
def shrink(
    model: str | PathLike[str] | PreTrainedModel,
    out: str | PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dial: Dial | None = None,
    data: str | TextSource = "self",
    windows: HealingWindows | None = None,
    settings: Shrinking | None = None,
    tasks: Tasks | None = None,
    opening: OpenOptions | None = None,
    overwrite: bool = False,
    notify: Notify = ignore,
    **changes: Any,
) -> Shrunk:
    """Writes a smaller model that works: layers chosen and removed, the rest healed and judged.

    Interrupted or killed, the same call continues from the folder ``OUT.shrinking``, which is gone
    once ``out`` is whole. ``out`` gets a page with all of this, or a GGUF file has it beside it.

    Args:
        model: Hugging Face directory or hub id, Meta directory or GGUF file; or a loaded model of
            transformers, which is shrunk in place too.
        out: new directory, or GGUF file if it ends with .gguf.
        tokenizer: of a loaded model.
        dial: how small.
        data: texts that choose the layers and heal; "self" is what the model itself writes.
        windows: how texts are cut, and which evaluate.
        settings: method, minutes of training, format and so on.
        tasks: also run on the original, the pruned and the healed model.
        opening: how the model is opened.
        overwrite: replace an earlier output.
        notify: called with what will be done and how long it takes, before it is.
        changes: fields of ``dial`` and ``settings``, as in ``ratio=0.5`` or ``dry_run=True``.

    Raises:
        ShortGPTError: a setting, the model or the texts are refused.
        FileExistsError: ``out`` exists.

    Example:
        >>> print(shrink("llama-2-7b", "llama-2-5b", ratio=0.25))  # doctest: +SKIP
    """
    sizes = {f.name for f in fields(Dial)} & changes.keys()
    dial = replace(dial or Dial(), **{name: changes.pop(name) for name in sizes})
    settings = replace(settings or Shrinking(), **changes)
    windows, tasks, opening = (
        windows or HealingWindows(),
        tasks or Tasks(),
        opening or OpenOptions(),
    )
    for group in (dial, settings, windows, tasks):
        group.check()
    if settings.minutes is not None:
        require_packages()
    target = Path(out)
    source = find_source(model) if isinstance(model, str | PathLike) else None
    to = settings.to or ("gguf" if is_gguf(out) else "hf")
    check_format(out, to)
    _check_out(target, to, source, overwrite=overwrite)
    texts_of = source_of(data)
    texts_of.kinds()  # refuses what cannot be read before a model is loaded
    for name in [] if windows.eval_data is None else source_names(windows.eval_data):
        texts(name, column=texts_of.column)
    folder = Path(f"{target}.shrinking")
    lock = None if settings.dry_run else hold(folder)
    if isinstance(model, str | PathLike):
        assert source is not None
        short = open_trainable(source, opening)
    else:
        short = ShortHFModel(model, tokenizer=tokenizer)
    if to != "hf" and short.model.config.model_type != "llama" and not _from_gguf(source, to):
        raise ShortGPTError(
            f"`to` {to} is for a Llama, got {short.model.config.model_type}: leave it out"
        )
    how = (source, target, to, dial, settings, texts_of, windows, tasks, opening, notify)
    run = _Run(short, *how)
    if settings.dry_run:
        return Shrunk(target, run.plan)
    notify(run.plan)
    try:
        result = run.done(overwrite=overwrite)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # what is kept to continue from stays
            folder.rmdir()
        del lock
    return result


@dataclass
class _Run:
    """One shrinking: what it reads and writes, and what was measured so far."""

    short: ShortHFModel
    source: Weights | None  # None of a loaded model
    out: Path
    to: str
    dial: Dial
    settings: Shrinking
    texts: TextSource
    cut: HealingWindows
    tasks: Tasks
    opening: OpenOptions
    notify: Notify

    def __post_init__(self) -> None:
        self.folder = Path(f"{self.out}.shrinking")
        self.size = self.cut.size or min(SIZE, self.short.decoder.max_seq_len)
        self.count = len(self.short.kept)
        self.own = [name for name in source_names(self.texts.data) if name in OWN]
        minutes, many = self.settings.minutes, 3 * CLOSED_WINDOWS
        limit = CLOSED_WINDOWS if minutes is None else many if self.own else None
        self.limit = self.cut.max_windows or limit  # windows to learn from
        self.probe = [i % self.short.decoder.vocab_size for i in range(self.size)]
        self.parameters, self.stored = self._sizes()  # before any layer goes
        sizes, rest = self.parameters
        if self.dial.memory is not None:
            sizes, rest = [size + self.cache for size in self.stored[0]], self.stored[1]
        open_ended = self.dial.max_perplexity_ratio is not None
        self.n = None if open_ended else self.dial.count(sizes, rest)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights as they are written: the source's own, unless one was asked for."""
        ours = self.short.model.dtype
        if self.source is None or self.opening.dtype is not None or self.source.kind == "gguf":
            return ours
        if self.source.kind == "meta":
            infos = Checkpoint(self.source).infos.values()
            return max(infos, key=lambda info: math.prod(info.shape)).dtype
        config = read_json(resolve(self.source) / "config.json")
        name = config.get("dtype") or config.get("torch_dtype")
        return getattr(torch, str(name), ours)

    @cached_property
    def cache(self) -> int:
        """Bytes of a layer's KV cache."""
        config = self.short.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        itemsize = 2 if self.to == "gguf" else self.dtype.itemsize  # llama.cpp's is float16
        return 2 * heads * width * self.dial.context * self.dial.batch * itemsize

    def _sizes(self) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
        """Parameters of each layer and of the rest, and bytes of both as they are written."""
        total = size_without(self.short, ())[0]
        layers = [total - size_without(self.short, [i])[0] for i in self.short.kept]
        parameters = layers, total - sum(layers)
        if not _from_gguf(self.source, self.to):
            width = self.dtype.itemsize
            return parameters, ([width * size for size in layers], width * parameters[1])
        sizes = [0] * (self.count + 1)  # each tensor in its own type; the rest last
        for name, entry in Stack.open(str(self.source)).parts.tensors.items():
            match = LAYER.fullmatch(name)
            sizes[min(int(match[1]), self.count) if match else self.count] += entry.nbytes
        return parameters, (sizes[:-1], sizes[-1])

    @cached_property
    def plan(self) -> str:
        """What will be done, and about how long each part takes."""
        a_pass, count, method = (
            self.short.seconds_a_window(self.probe),
            self.count,
            self.settings.method,
        )
        few, rounds = FEW * a_pass / count, 1 if method == "perplexity" else self.n or count // 2
        search = few * most_layers_run(count, rounds)
        auto = choosing.BUDGET * FIRST * a_pass
        chosen = auto if method == AUTO else search if method in SEARCHED else MOST * a_pass
        parts = {"writing its own text": self._seconds_of_own_text()} if self.own else {}
        if self.n is None:
            tries = math.ceil(math.log2(count)) * (REFIT * 3 + 1) * MOST / 4 * a_pass
            parts["finding how many layers"] = few * most_layers_run(count, count - 2) + tries
        parts["choosing them, at most" if method == AUTO else "choosing them"] = chosen
        parts["the refit"] = REFIT * min(self.limit or CLOSED_WINDOWS, CLOSED_WINDOWS) * a_pass
        parts["training"] = 60 * (self.settings.minutes or 0)
        parts["judging"] = 3 * self.cut.eval_windows * a_pass
        times = [f"{name} {duration(time)}" for name, time in parts.items() if time]
        fitted = [self.probe] * min(self.limit or CLOSED_WINDOWS, CLOSED_WINDOWS)
        memory = self._refit().plan(self.short, Learning(fitted, [], []), None).describe()
        sizes, rest = self.parameters
        n, left = self.n or "some", sum(sizes) + rest - sum(sorted(sizes)[: self.n or 0])
        kept = f", at most {left / 1e6:.1f} M parameters stay" if self.n else ""
        lines = [f"{n} of {count} layers go ({self.dial.name}){kept}"]
        lines += [f"a window of {self.size} tokens takes {duration(a_pass)}: {', '.join(times)}"]
        lines += [f"in all about {duration(sum(parts.values()))}; {memory}"]
        return "\n".join(lines)

    def _seconds_of_own_text(self) -> float:
        """Timed on a few steps."""
        share = -(-(self.limit or COUNT) // len(source_names(self.texts.data)))
        texts, times = len(self.own) * share, list[float]()

        def likeliest(logits: torch.Tensor) -> torch.Tensor:  # (B, V) to (B,)
            times.append(perf_counter())
            return logits.argmax(-1)

        self.short.continued([[0]] * min(AT_ONCE, texts), TIMED, likeliest)
        step = (times[-1] - times[0]) / (TIMED - 1)
        return step * self.size * math.ceil(texts / AT_ONCE)

    def _refit(self) -> RefitSettings:
        return RefitSettings(max_windows=CLOSED_WINDOWS)

    def done(self, *, overwrite: bool) -> Shrunk:
        """Does all of it; continues what the folder holds."""
        short, cut, settings = self.short, self.cut, self.settings
        self.folder.mkdir(parents=True, exist_ok=True)
        place = (self.texts.split, self.texts.column, self.texts.max_texts, cut.seed)
        windows = Source(self.texts.data, cut.eval_data, *place).windows(
            short.encode,
            self.size,
            bos=cut.bos or short.bos,
            limit=self.limit,
            eval_windows=cut.eval_windows,
            drop_overlap=cut.drop_overlap,
            validate=settings.minutes is not None,
            write=writes(short, self.size, seed=cut.seed, beside=self.folder / REPORT),
        )
        self.windows = windows
        digests = {"training": windows.training, "evaluation": windows.evaluation}
        identity = joined(
            short.identity(),
            {name: windows_digest(own) for name, own in digests.items()},
            {**asdict(self.dial), "method": settings.method, "minutes": settings.minutes},
            {"prompt": settings.prompt, "tasks": self.tasks.tasks},
        )
        self.cells = Cells(StateFile(self.folder / "state.json", identity, folder=self.folder))
        self.choosing = StateFile(self.folder / "choice.json", identity, folder=self.folder)
        scores = Importance.from_dict(self.cells.value("scores", self._scores))
        short.importance = scores
        layers, choice = self._chosen(scores)
        if _from_gguf(self.source, self.to):
            check_saved(str(self.source), layers, scores.block_influence.tolist())
        looks = {"original": self._look("original")}
        with short.without_layers(layers):
            looks["pruned"] = self._look("pruned")
            steps = self._steps(len(layers))
        work = self.folder / "healing"
        begun = work.is_dir() and any(work.iterdir())
        job = HealingJob(
            short, windows, layers, settings=steps, work_dir=work, resume=begun, notify=self.notify
        )
        evidence = job.run()
        looks["healed"] = self._look("healed")
        quality = {
            kind: {_state(name): p for name, p in states.items() if _state(name) in looks}
            for kind, states in evidence.by_kind.items()
        }
        remarks = [about_own(self.texts.data, cut.eval_data), windows.left_out]
        if self.dtype != short.model.dtype:
            remarks.append(f"judged in {short.model.dtype}, written in {self.dtype}")
        result = Shrunk(
            self.out,
            self.plan,
            self.count,
            layers,
            settings.method,
            quality,
            looks,
            self._prompt(),
            [],
            evidence.steps,
            choice,
            scores,
            next_steps(self.out, self.to),
        )
        short.evidence |= {"method": METHODS[settings.method], "eval_data": cut.eval_data}
        short.evidence |= {"size": self.size}
        built = self._write(evidence.perplexity)
        if _from_gguf(self.source, self.to):
            remarks.append(about_types(str(self.source), built))
        result = replace(result, remarks=[remark for remark in remarks if remark])
        self._place(built, result, overwrite=overwrite)
        return result

    def _scores(self) -> dict[str, object]:
        before, self.short.importance = self.short.importance, Importance.empty(self.short.kept)
        try:
            self.short.measure(self.windows.training[:MOST], all_tokens=True)
            return self.short.importance.to_dict()
        finally:
            self.short.importance = before

    def _chosen(self, scores: Importance) -> tuple[list[int], dict[str, Any]]:
        """The layers to remove, and how auto chose them."""
        n = self.n or self.cells.value("how many", self._within)
        method, windows = self.settings.method, self.windows.training[:MOST]
        if method == AUTO:
            how = self.cells.value("choice", partial(self._auto, n))
            return list(how["layers"]), dict(how)
        if method in SEARCHED:
            search = partial(self.short.search, windows[:FEW], n, method=method)
            return self.cells.resumed("search", lambda s: search(state=s).removed), {}
        return choose(scores, n, method=method, seed=self.cut.seed), {}

    def _auto(self, n: int) -> dict[str, Any]:
        windows = self.windows.training[:MOST]
        return choose_healed(self.short, windows, n, state=self.choosing).to_dict()

    def _within(self) -> int:
        """The most layers, of a greedy search's, whose refitted model keeps the ratio."""
        short, ratio, every = (
            self.short,
            self.dial.max_perplexity_ratio or 1.0,
            self.windows.training,
        )
        held = max(2, min(len(every), MOST) // 4)
        fit = every[held:MOST]
        judging, _ = without_overlap(every[:held], fit)
        search = partial(short.search, fit[:FEW], self.count - 2)
        order = self.cells.resumed("order", lambda s: search(state=s).removed)
        original = together(self.cells.losses("original", lambda: losses(short.decoder, judging)))

        def rise(n: int) -> float:
            run = partial(pruned_losses, short, order[:n], judging, fit_on=fit)
            return together(self.cells.losses(f"without {n}", run)).value / original.value

        low, high = 0, self.count - 2  # the ratio holds at the first
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if rise(middle) <= ratio else (low, middle - 1)
        if not low:
            raise ShortGPTError(
                f"{self.dial.name}: without layer {order[0]} alone, refitted, the perplexity rises "
                f"by {rise(1):.3f} already; allow more"
            )
        return low

    def _steps(self, n: int) -> list[Step]:
        """The refit, and a distillation of so many steps as take the minutes."""
        if self.settings.minutes is None:
            return [self._refit()]
        recipe = recipe_for(self.short.model.config, "small", seed=self.cut.seed)
        steps = self.cells.value(
            "steps", partial(self._steps_in, 60 * self.settings.minutes, recipe)
        )
        every = max(1, steps // CHECKS)
        own = replace(recipe, steps=steps, warmup=min(recipe.warmup, steps // 8), eval_every=every)
        return [self._refit(), DistillSettings(own)]

    def _steps_in(self, seconds: float, recipe: Recipe) -> int:
        """Training steps that fit, by one that is timed; the teacher reads each window before."""
        a_pass = self.short.seconds_a_window(self.probe)
        step = seconds_a_step(self.short, self.probe, recipe) + recipe.batch * a_pass
        return max(1, int((seconds - (CHECKS + 1) * HELD * a_pass) / step))

    def _prompt(self) -> str:
        chat = self.short.tokenizer is not None and self.short.tokenizer.chat_template
        return self.settings.prompt or (CHAT if chat else PLAIN)

    def _look(self, state: str) -> Look:
        """Measured once; the text is that of the model as it is now."""
        return Look(*self.cells.value(f"look {state}", self._measured))

    def _measured(self) -> list[Any]:
        short, tokenizer, prompt = self.short, self.short.tokenizer, self._prompt()
        assert tokenizer is not None  # texts were encoded by it
        ids = short.encode(prompt)
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": prompt}]
            rendered = tokenizer.apply_chat_template(
                turn, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(str(rendered), add_special_tokens=False)["input_ids"]
        answer = short.greedy(ids, ANSWER)
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        speed = tokens_per_second(short, self.windows.evaluation[0])
        numbers, size = (
            rest + sum(each[i] for i in short.present)
            for each, rest in (self.parameters, self.stored)
        )
        memory = size + self.cache * len(short.present)
        return [text, speed, numbers, size, memory, vars(self.tasks.run(short))]

    def _write(self, measured: Mapping[str, Perplexity]) -> Path:
        """The model in the folder, in its format, read again and compared."""
        short, built = self.short, self.folder / self.out.name
        shutil.rmtree(built, ignore_errors=True)
        how: dict[str, Any] = {"facts": {"data": self.texts.data}, "measured": measured}
        if _from_gguf(self.source, self.to):
            return short.save(built, **how, overwrite=True)
        short.model.to(self.dtype)
        if self.to == "hf":
            return short.save_pretrained(built, **how)
        scratch = self.folder / f"{self.out.stem}-hf"
        shutil.rmtree(scratch, ignore_errors=True)
        if self.to == "gguf":
            short.save_pretrained(scratch, **how)
            return convert(str(scratch), str(built), to="gguf", overwrite=True, notify=self.notify)
        record = Provenance.of(short, short.source, **how)
        if self.source is not None and self.source.kind == "meta":
            tokenizer = Path(self.opening.tokenizer_path or find_tokenizer(self.source))
        else:
            assert short.tokenizer is not None
            short.tokenizer.save_pretrained(scratch)
            tokenizer = find_tokenizer(scratch)
        target = Target(built, "meta", False, short.check_saved)
        return save_as_meta(short.model, target, record=record, tokenizer_path=tokenizer)

    def _place(self, built: Path, result: Shrunk, *, overwrite: bool) -> None:
        """Puts model and page where they belong, whole or not at all."""
        if self.to == "gguf":
            report_of(self.out).write_text(page(result), encoding="utf-8")
            for here, there in reversed([*zip(out_paths(built), out_paths(self.out), strict=True)]):
                here.replace(there)
            return
        with new_directory(self.out, marker=PROVENANCE, overwrite=overwrite) as partial:
            for path in built.iterdir():
                path.rename(partial / path.name)
            (partial / REPORT).write_text(page(result), encoding="utf-8")


def _from_gguf(source: Weights | None, to: str) -> bool:
    """Whether tensors keep the types of a GGUF file."""
    return source is not None and source.kind == to == "gguf"


def _state(name: str) -> str:
    """The short name of a state: ``"original, 30 layers"`` is ``"original"``."""
    return name.partition(",")[0]


def _check_out(out: Path, to: str, source: Weights | None, *, overwrite: bool) -> None:
    if to == "gguf":
        check_new_gguf(out, overwrite=overwrite)
        check_output(report_of(out), overwrite=True, ours=is_page)
    else:
        path = None if source is None else source.path
        check_new(out, marker=PROVENANCE, overwrite=overwrite, source=path)
