"""One run of `shrink`: its settings, and what follows from the opened model and the texts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import chain
from os import PathLike
from pathlib import Path
from timeit import repeat, timeit
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from llama.files import check_output
from llama.sources import BuiltinName, Source, find_source, is_gguf
from short_gpt.checkpoints.gguf import check_architecture
from short_gpt.checkpoints.prune import layers_of
from short_gpt.checkpoints.target import Target
from short_gpt.costs.rivals import KINDS, RIVAL, has_quantizer
from short_gpt.costs.sizes import Opened
from short_gpt.costs.speeds import seconds_a_token
from short_gpt.data.texts import source_names
from short_gpt.evaluation.answers import AT_ONCE, Question, Reply, answer_windows, ask, questions
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.healing.choosing import GREEDY, MAX_WINDOWS, REFIT, refit_windows, windows_to_choose
from short_gpt.healing.job import STEPS
from short_gpt.healing.refit_state import plan_of
from short_gpt.healing.sets import LayerSets
from short_gpt.healing.settings import CLOSED_WINDOWS
from short_gpt.jobs.inputs import WindowSettings
from short_gpt.jobs.page import is_page
from short_gpt.jobs.saving import Running, Saving
from short_gpt.jobs.shrink_result import ANSWERS, REPORT, Answered, report_of, short_name
from short_gpt.jobs.shrink_settings import SHRUNK, ShrinkSettings
from short_gpt.jobs.shrink_time import MANY, MINUTES, PLANS, Plan, fitted
from short_gpt.models.decoder import in_own_dtype, writing_precision
from short_gpt.models.hf import layer_caches
from short_gpt.models.loading import config_digest
from short_gpt.models.numbering import check_count, check_exist
from short_gpt.runtime.digest import windows_digest
from short_gpt.runtime.errors import ShortGPTError, check
from short_gpt.runtime.memory import format_bytes
from short_gpt.runtime.progress import duration
from short_gpt.runtime.state import StateFile, joined
from short_gpt.selection.methods import AUTO
from short_gpt.wrappers import own_text
from short_gpt.wrappers.opening import open_trainable
from short_gpt.wrappers.options import FASTER, OpenOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from short_gpt.wrappers.short_model import ShortModel

Model: TypeAlias = "str | PathLike[str] | PreTrainedModel"
WINDOW = 512  # tokens
CONTEXT = 4096  # tokens of the KV cache in all
ANSWER_TOKENS = 24  # most tokens of an answer to a question
TIMING = 20  # seconds of comparing speeds, about
SLOW = 5.0  # seconds of a window that is timed once
GROWTH = 1.15  # a token after half of a text, by the first: 1.07 (16 texts) to 1.2 (64) measured
STATE, PLAN, HEALING, WRITTEN = "state.json", "plan.json", "healing", "written"
# what the folder of a run holds, which is deleted with it: own texts, what a killed save leaves
PARTS = (
    *(f"{dot}{name}*" for name in (STATE, PLAN, "self-") for dot in ("", ".")),
    *(HEALING, WRITTEN, RIVAL),
)


@dataclass
class ShrinkRun:
    """One run: the settings; from `open` on the model; from `read` on windows and saved cells."""

    model: Model
    out: Path
    settings: ShrinkSettings
    windows: WindowSettings
    opening: OpenOptions
    saving: Saving
    running: Running
    dry_run: bool
    tokenizer: PreTrainedTokenizerBase | None = None
    layers: Sequence[int] = ()  # to remove, once they are chosen
    # seconds a token, by how many texts are written at once
    _timed: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out = Path(self.out)

    # The request

    @cached_property
    def source(self) -> Source | None:
        """The model's checkpoint; None of a loaded model."""
        return find_source(self.model) if isinstance(self.model, str | PathLike) else None

    @property
    def folder(self) -> Path:
        """What a killed run continues from."""
        return Path(f"{self.out}.shrinking")

    @property
    def built(self) -> Path:
        """The model while it is written."""
        return self.folder / WRITTEN / self.out.name

    @property
    def seed(self) -> int:
        return self.windows.seed or 0

    @property
    def _method(self) -> str | None:
        """The method, if the settings name one; "" if they name layers."""
        settings = self.settings
        if settings.curve is not None and settings.method is None:
            return GREEDY  # whose sets of all sizes are one search's
        return settings.method if settings.layers is None else ""

    @property
    def method(self) -> str:
        """The method that chooses the layers."""
        return self.planned.method

    @property
    def to(self) -> str:
        """The format to write: hf or gguf."""
        return "gguf" if is_gguf(self.out) else "hf"

    @property
    def command(self) -> str:
        """The same as a command line, by the last parts of absolute paths."""
        name = "MODEL" if self.source is None else short_name(str(self.model))
        demo = isinstance(self.model, BuiltinName)  # whose command names these by default
        words = ["short-gpt", *(["demo"] if demo else ["shrink", name]), short_name(str(self.out))]
        defaults = (ShrinkSettings(), SHRUNK, OpenOptions(precision=FASTER))
        groups = (self.settings, self.windows, self.opening)
        for group, usual in zip(groups, defaults, strict=True):
            for one in (item for item in group.taken() if item.metadata["flag"]):
                value = getattr(group, one.name)
                if not isinstance(value, BuiltinName) and value != getattr(usual, one.name):
                    several = isinstance(value, list | tuple)
                    names = map(short_name, map(str, value) if several else str(value).split(","))
                    words += [f"--{one.name}", *([] if value is True else [",".join(names)])]
        return shlex.join(words)

    def check(self) -> None:
        """Raises errors that are known before a model is loaded, the cheapest first."""
        self.settings.check()
        self.windows.check(shuffled=True)
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        if other := [n for n in names if not any(fnmatch(n, part) for part in PARTS)]:
            raise ShortGPTError(
                f"{self.folder} holds {min(other)}, and is not from a run of shrink: move it away, "
                "or choose another output"
            )
        _ = self.questions  # raises for a file without any
        gguf, source, named = is_gguf(self.out), self.source, self.settings.named
        n = self.settings.n if named is None else len(named)
        if self.settings.type is not None:
            both = gguf and source is not None and source.kind == "gguf"
            check(both, "`type`", self.settings.type, "a GGUF file as the model and as `out`")
            if not has_quantizer():
                raise ShortGPTError('`type` needs a quantizer: pip install "short-gpt[rival]"')
        path = None if source is None else source.path
        if gguf:
            check_output(report_of(self.out), overwrite=True, replaces=is_page)
        Target(self.out, self.saving.overwrite).check(source=path)
        if gguf and source is not None and source.kind == "gguf":
            check_architecture(str(source)).check()
        if source is not None and n is not None and (count := layers_of(source)) is not None:
            check_count(n, count, most=count - 2)
            check_exist(named or [], range(count))
        self.windows.check_texts()

    # The model, and what will be done with it

    def open(self) -> None:
        """Opens the model; how many layers go, its sizes, its speed and the plan follow."""
        source, opening = self.source, self.opening.as_begun(self.folder / STATE)
        if source is None:
            short = open_trainable(cast("PreTrainedModel", self.model), opening, self.tokenizer)
        else:
            short = open_trainable(source, opening)
        self.short, self.opened = short, Opened(short, source, self.to, opening)
        short.check_weights()
        if self.settings.type is not None:
            short.types_in(self.settings.type)  # raises where no matrix gets smaller
        self.size = self.windows.size or min(WINDOW, short.decoder.max_seq_len)
        self.parameters, self.stored = self.opened.sizes()
        itemsize = 2 if self.to == "gguf" else self.opened.dtype.itemsize  # llama.cpp's is float16
        every = layer_caches(short.model, len(short.kept), short.decoder.device)
        self.caches = [cache.size(CONTEXT, itemsize) for cache in every]  # bytes
        sizes, rest = self.parameters
        if self.settings.memory is not None:
            layers, rest = self.opened.sizes(self.settings.type)[1]
            sizes = [a + b for a, b in zip(layers, self.caches, strict=True)]
        searched = self.settings.most_kld is not None
        self.n = None if searched else self.settings.count(sizes, rest)
        # any tokens, which do not change the time
        self.probe = [i % short.decoder.vocab_size for i in range(self.size)]
        self.a_pass = short.seconds_a_window(self.probe)
        if self.a_pass < SLOW:  # the first ones are slower
            again = (short.seconds_a_window(self.probe) for _ in range(3))
            self.a_pass = min(self.a_pass, *again)
        if self.dry_run:
            self.planned = self._fitted()
            return
        # a run that continues this one has the same plan, whatever its speed
        read = ("name", "max_windows", "eval_windows")
        asked = self._dials | {name: str(getattr(self.windows, name)) for name in read}
        asked["model"] = config_digest(short.configuration)  # whose speed it is
        state = StateFile(self.folder / PLAN, asked, folder=self.folder)
        if not state.content:
            state.save({"plan": self._fitted()})
        self.planned = Plan(*(state.content or {})["plan"])

    @property
    def _dials(self) -> dict[str, Any]:
        """Settings that choose layers and healing: questions may be others later."""
        return asdict(replace(self.settings, pick=None))

    @property
    def _most_seconds(self) -> float:
        """The time of the run."""
        usual = MINUTES.get(self.short.decoder.device.type, MINUTES[""])
        return self.settings.seconds or 60.0 * usual

    def fastest(self, layers: Sequence[int]) -> float:
        """How many times as fast the model without some layers can be."""
        return self.count / (self.count - len(layers))

    @property
    def in_llama_cpp(self) -> bool:
        """Whether speeds are those of files, in llama.cpp; else they are PyTorch's."""
        return self.opened.in_place and find_spec("xllamacpp") is not None

    @property
    def count(self) -> int:
        """Layers of the original model."""
        return len(self.caches)

    def plan(self) -> str:
        """What will be done, roughly how long it takes, and how much memory."""
        (sizes, rest), n = self.parameters, self.n
        planned = self.planned
        read = min(planned.windows or CLOSED_WINDOWS, CLOSED_WINDOWS)
        memory = format_bytes(sum(plan_of(self.short, [self.probe] * read).host.values()))
        refit = [f"the refit takes up to {memory} of the machine's memory"]
        before, gone = sum(sizes) + rest, sum(sorted(sizes)[: n or 0])
        kept = f": {before / 1e6:.1f} M parameters become {(before - gone) / 1e6:.1f} M"
        own = ", its own text included" if self.windows.own else ""
        takes = duration(self.a_pass)
        takes += " with products in bfloat16" if self.short.about_precision else ""
        go = "goes" if n == 1 else "go"
        up_to = "up to " if self.settings.curve is not None and not self.settings.pick else ""
        return "\n".join(
            [
                f"{up_to}{n or 'some'} of {self.count} layers {go} ({self.settings.size_flag})"
                + (kept if n else "")
                + (f", the others in {kind}" if (kind := self.settings.type) else ""),
                f"a window of {self.size} tokens takes {takes}: in all about "
                f"{duration(planned.seconds)}{own}, and the time to write the model and read "
                "it again",
                *self._given_up(),
                *(refit if self.settings.heal_by == REFIT else []),
            ]
        )

    @property
    def _named(self) -> dict[str, Any]:
        """Fields of the plan that the user named."""
        asked = {"method": self._method, "windows": self.windows.max_windows}
        asked["eval_windows"] = self.windows.eval_windows
        return {name: value for name, value in asked.items() if value is not None}

    def _given_up(self) -> list[str]:
        """What the time does not allow, and what it is used for."""
        plan, within = self.planned, duration(self._most_seconds)
        words = {"method": "method", "windows": "windows to learn from"}
        words["eval_windows"] = "windows to evaluate on"
        known = {*self._named, "windows" if plan.training else ""}  # a training reads more of them
        fewer = [
            f"{what} {getattr(plan, name)} instead of {getattr(PLANS[0], name)}"
            for name, what in words.items()
            if name not in known and getattr(plan, name) != getattr(PLANS[0], name)
        ]
        lines = [f"to stay within {within} (--time): {', '.join(fewer)}"] if fewer else []
        if plan.training:
            later = " of the picked size" if self.settings.curve is not None else ""
            training = duration(plan.training)
            lines.append(f"of {within} (--time), {training} go into distillation{later}")
        if plan.seconds > self._most_seconds:
            lines.append(f"nothing cheaper is left to do: it takes longer than {within}")
        return lines

    def _fitted(self) -> Plan:
        """The plan that fits into the time."""
        train_on = MANY if self.windows.own else None
        if self.settings.time is None:
            train_on = 0
        return fitted(self._seconds, self._most_seconds, self._named, train_on)

    @cached_property
    def _judging(self) -> tuple[float, float]:
        """Seconds to judge a window, in the own dtype; of them, to compare what it predicts.

        By a quarter of a window, because long texts take as much for each token.
        """
        decoder, few = self.short.decoder, self.probe[: max(2, self.size // 4)]
        reference, share = Reference(decoder), self.size / len(few)
        with in_own_dtype(decoder):
            reference.read([few])
            judge = partial(perplexity, decoder, [[few]], reference=reference)
            judged = min(repeat(judge, number=1, repeat=2))  # the first ones are slower
            comparing = judged - self.short.seconds_a_window(few)
        return share * judged, max(0.0, share * comparing)

    def _seconds(self, plan: Plan) -> float:
        """Seconds that a plan takes, without training."""
        limit, in_place = plan.windows or MAX_WINDOWS, self.opened.in_place
        counts = [] if self.settings.curve is None else self.settings.counts(self.count)
        # a search for the most layers has all sizes, auto chooses for each
        chosen: list[int | None] = [*(counts if plan.method == AUTO else counts[-1:])]
        work = [windows_to_choose(plan.method, n, self.count, limit) for n in chosen or [self.n]]
        refits = (1 + len(counts)) * refit_windows(min(limit, CLOSED_WINDOWS), 0)
        passes = refits + min(limit, MAX_WINDOWS) + sum(read for read, _ in work)
        judged, comparing = self._judging
        seconds = passes * self.a_pass + sum(compared for _, compared in work) * comparing
        # the original, the pruned, the healed model and its file; of a curve the original again
        states = 3 + in_place + (1 + len(counts) if counts else 0)
        rivals = has_quantizer() * len(KINDS) * (1 + bool(counts))  # as many of a file, about
        tokens = sum(len(self.short.encode(one.prompt)) + ANSWER_TOKENS for one in self.questions)
        asked = tokens / self.size  # windows
        seconds += (states + rivals) * (plan.eval_windows + asked) * judged
        written = ANSWER_TOKENS * math.ceil(len(self.questions) / AT_ONCE)
        seconds += states * (asked * judged + written * self._a_token(AT_ONCE))
        seconds += TIMING * (1 + (len(counts) + rivals) * bool(counts and self.in_llama_cpp))
        if sources := self.windows.own:
            names = source_names(self.windows.name)
            extra = self.windows.eval_name is None and sources == names
            each = own_text.count_of_own(plan.windows, len(names), extra=extra)
            batches = len(sources) * math.ceil(each / own_text.AT_ONCE)
            seconds += batches * self.size * self._a_token(min(own_text.AT_ONCE, each))
        return seconds

    def _a_token(self, texts: int) -> float:
        """Seconds of a token in so many texts at once, drawn from the model's predictions."""
        if texts not in self._timed:
            logits = torch.zeros(texts, self.short.decoder.vocab_size)  # (B, V)
            keys = [(0, row, 0) for row in range(texts)]
            with writing_precision(self.short.decoder):
                token = GROWTH * seconds_a_token(self.short, [[0]] * texts)
            self._timed[texts] = token + timeit(lambda: own_text.draw(logits, 1.0, keys), number=1)
        return self._timed[texts]

    @cached_property
    def questions(self) -> list[Question]:
        """What the original, the pruned and the healed model are asked, and do not learn."""
        own = [] if self.windows.prompts is None else questions(self.windows.prompts)
        return [question for question in own if question.right] or questions()

    def ask(self, short: ShortModel | None = None) -> list[Reply]:
        """The answers of the model as it is now, or of another one."""
        return ask(short or self.short, self.questions, max_new_tokens=ANSWER_TOKENS)

    # What it reads and keeps

    def read(self) -> None:
        """The windows, and the state that keeps what is measured on them."""
        plan = self.planned
        reading = self.windows.changed({"eval_windows": plan.eval_windows})
        self.parts = parts = reading.learning(
            self.short,
            self.size,
            plan.windows,
            validate=plan.training > 0,
            beside=self.folder / REPORT,
        )
        self.calibration = parts.training[:MAX_WINDOWS]  # that choose the layers
        replies = self.ask()
        self.answers = {"original": Answered.of(replies)}
        # windows by kind of text, and what the original predicts for them
        self.texts: dict[str, list[Sequence[int]]] = {
            kind: [w for w, k in zip(parts.evaluation, parts.kinds, strict=True) if k == kind]
            for kind in dict.fromkeys(parts.kinds)
        }
        self.texts[ANSWERS] = [*answer_windows(replies)]
        self.reference = Reference(self.short.decoder)
        with in_own_dtype(self.short.decoder):
            self.reference.read(chain(*self.texts.values()))
        heal_by = self.settings.heal_by
        identity = joined(
            self.short.identity(),
            {
                "training": windows_digest(parts.training),
                "evaluation": windows_digest(parts.evaluation),
                heal_by: vars(STEPS[heal_by].settings()),  # of the choice and of the healing
            },
            self._dials | {"method": self.method},
        )
        saved = StateFile(self.folder / STATE, identity, folder=self.folder)
        texts = (self.calibration, parts.evaluation)
        self.sets = LayerSets(self.short, *texts, heal_by=heal_by, state=saved)
        self.cells = self.sets.cells
