"""Settings of all ways to heal, without torch: of closed forms, of training, and of jobs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from short_gpt.runtime.errors import ShortGPTError, at_least, check, refused
from short_gpt.runtime.settings import CHOOSE, Settings, count_of, listed, setting, whole_numbers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from short_gpt.healing.context import Step

T = TypeVar("T")
# methods that `compare` takes by default
COMPARED = "bi,angular,deepest,relative_magnitude,perplexity,sleb,reverse,random"
CLOSED_WINDOWS = 64  # that a closed form reads; training after it begins with other windows
PARTS = ("attention", "mlp")
RIDGES = (1e-2, 1e-1, 1.0)
WHERE = ("all", "gaps")


def check_above_0(most: float = math.inf, **numbers: Any) -> None:
    """Raises ShortGPTError unless these are finite numbers above 0, and at most ``most``."""
    for name, value in numbers.items():
        number = hasattr(value, "__float__") and not isinstance(value, bool)
        if not (number and 0 < value < math.inf and value <= most):
            limit = "" if most == math.inf else f" and at most {most:g}"
            raise refused(name, value, f"a number above 0{limit}")


@dataclass(frozen=True)
class RefitSettings:
    """Settings of the refit."""

    parts: tuple[str, ...] = PARTS  # sublayers to solve
    # relative to the weighted inputs' mean square; of several, each matrix takes the one of least
    # error on held-out windows. None is 2 F / N, twice the inputs divided by the tokens
    ridge: float | Sequence[float] | None = None
    # a factor of every solved change, above 0 and at most 1. C is best for the inputs of the pruned
    # model; the layers that follow were trained on others, and half of it has the lower loss
    step_size: float = 0.5
    # "all": every kept layer from the first gap on; "gaps": the last projection of the layers
    # before gaps alone, on the original model's hidden states
    where: str = WHERE[0]
    # a token weighs 1 / ||T||^2; where T is more than so many times as long as h + W m, the present
    # state, 1 / (lost ||h + W m||)^2, unless a norm follows the matrix; 1 or more, None: never
    lost: float | None = 2.0
    # GGUF type of the kept layers' matrices, as in "q3_k", of a model that was opened from a GGUF
    # file: these are rounded first, and every kept layer is solved with what rounding left of it.
    # Targets are the original's. None: the types of the file
    type: str | None = None

    def __post_init__(self) -> None:
        some = self.parts and not isinstance(self.parts, str) and {*self.parts} <= {*PARTS}
        check(some, "parts", self.parts, f"some of {', '.join(PARTS)}")
        for ridge in self.ridges or ():
            check_above_0(ridge=ridge)
        check(self.where in WHERE, "where", self.where, f"one of {', '.join(WHERE)}")
        check(self.lost is None or 1 <= self.lost < math.inf, "lost", self.lost, "1 or more")
        check_above_0(1, step_size=self.step_size)
        everywhere = self.type is None or self.where == WHERE[0]
        check(everywhere, "where", self.where, f"{WHERE[0]} with a type")

    @property
    def ridges(self) -> Sequence[float] | None:
        """Those that held-out windows choose from; None for 2 F / N."""
        if self.ridge is None or isinstance(self.ridge, Sequence):
            return self.ridge
        return (self.ridge,)


@dataclass(frozen=True)
class PatchSettings(RefitSettings):
    """Settings of the patch: those of the refit, of the layers before gaps alone."""

    ridge: float | Sequence[float] | None = RIDGES
    step_size: float = 1.0
    where: str = WHERE[1]


@dataclass(frozen=True)
class Recipe:
    """Settings of LoRA on text, and on what a teacher predicts (distillation).

    The defaults are those of Gromov et al.; `Recipe.parse` reads others from a text.

    Example:
        >>> Recipe(rank=8).steps
        5000
    """

    rank: int = 64  # of the changes
    alpha: int | None = None  # their scale times the rank; None is the rank
    dropout: float = 0.05  # before them
    # ends of linear maps' names; None: the MLP's; ("all",): also q_proj, k_proj, v_proj and o_proj;
    # ("outputs",): the output projections, such as o_proj and down_proj
    modules: tuple[str, ...] | None = None
    learning_rate: float = 3e-4  # at its peak, after the warm-up; a half cosine to 0 follows
    steps: int = 5000  # of the optimizer
    warmup: int | None = None  # steps until the peak; None: a tenth of all, at most 100
    batch_size: int = 16  # windows a step
    micro_batch: int = 1  # windows read at once; divides ``batch_size``
    size: int = 2048  # tokens of a window, as a recommendation to whoever cuts them
    seed: int = 0  # of everything random
    eval_every: int = 100  # steps from one evaluation, and one checkpoint, to the next
    patience: int | None = None  # evaluations without improvement before it stops; None: never
    gradient_checkpointing: bool = False  # less memory for a second forward pass
    report_to: str | None = None  # services of `TrainingArguments`, as in "wandb,tensorboard"
    # of distillation alone
    top_k: int = 64  # tokens kept of each prediction, beside the total of all others
    temperature: float = 1.0  # both models' logits are divided by it
    kl_share: float = 1.0  # of the divergence in the loss, above 0; the rest is the text's own

    def __post_init__(self) -> None:
        counts = ("rank", "steps", "batch_size", "micro_batch", "eval_every", "top_k")
        at_least(1, **{name: getattr(self, name) for name in counts})
        at_least(0, optional=True, warmup=self.warmup)
        at_least(1, optional=True, patience=self.patience)
        check_above_0(learning_rate=self.learning_rate, temperature=self.temperature)
        check_above_0(1, kl_share=self.kl_share)
        if self.alpha is not None:
            check_above_0(alpha=self.alpha)
        dropout = self.dropout if hasattr(self.dropout, "__float__") else -1
        check(0 <= dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        multiple = f"a multiple of `micro_batch` {self.micro_batch}"
        check(self.batch_size % self.micro_batch == 0, "batch_size", self.batch_size, multiple)

    @property
    def warmup_steps(self) -> int:
        return min(100, self.steps // 10) if self.warmup is None else self.warmup

    def steps_for(self, reads: int, windows: int) -> int:
        """Steps that read so many windows, of ``windows`` different ones, over and over.

        The last step of a round is of the windows that are left.

        Example:
            >>> Recipe(batch_size=4).steps_for(13, 6)
            5
        """
        rounds, rest = divmod(reads, windows)
        return rounds * -(-windows // self.batch_size) + -(-rest // self.batch_size)

    @classmethod
    def parse(
        cls,
        recipe: str | Mapping[str, Any] | Recipe = "",
        config: PretrainedConfig | None = None,
        **defaults: Any,
    ) -> Recipe:
        """A recipe from a preset's name and changes, as in ``"small,steps=400,rank=16"``.

        Args:
            recipe: Text; or a dict of changes, with the name as its ``preset``; or a `Recipe`,
                which is returned as it is. Names in a list stand between "+". Default: "paper".
            config: Config of the model to train, which `recipe_for` looks up. Default: none, which
                checks a recipe before a model is opened.
            defaults: Settings that take the place of the preset's, unless the recipe has them.

        Raises:
            ShortGPTError: a setting or preset is unknown, or a value is out of range.

        Example:
            >>> Recipe.parse("demo,steps=400").rank
            8
        """
        if isinstance(recipe, Recipe):
            return recipe
        check(isinstance(recipe, str | Mapping), "recipe", recipe, "text, a dict or a Recipe")
        changes = _changes(recipe) if isinstance(recipe, str) else {**recipe}
        preset = changes.pop("preset", None) or "paper"
        return recipe_for(config, preset, **{**defaults, **changes})


def _changes(recipe: str) -> dict[str, Any]:
    """The settings named in a text, and its preset if it begins with one."""
    changes: dict[str, Any] = {}
    types = {field.name: str(field.type) for field in fields(Recipe)}
    for number, item in enumerate(filter(None, recipe.replace(" ", "").split(","))):
        name, equals, text = item.partition("=")
        if not equals and not number:
            changes["preset"] = name
        else:
            check(equals, "recipe", recipe, f"changes such as steps=400, not {name}")
            changes[name] = _value(name, text, types.get(name, "str"))
    return changes


def _value(name: str, text: str, kind: str) -> Any:
    """The value of a setting whose type is annotated as ``kind``."""
    if text.lower() == "none" and "None" in kind:
        return None
    try:
        if kind.startswith("bool"):
            return {"yes": True, "true": True, "no": False, "false": False}[text.lower()]
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
    except (KeyError, ValueError):
        raise refused(name, text, kind.split(" |")[0]) from None
    names = text.split("+")
    return tuple(names) if kind.startswith("tuple") else ",".join(names)


# Gromov et al., table of appendix A: a config's values (None: any), and the settings for such a
# model. The numbers of layers are left out, so that pruned models are known too.
MODEL = ("model_type", "vocab_size", "hidden_size", "intermediate_size")
PAPER: tuple[tuple[tuple[object, ...], tuple[int, float, int]], ...] = (
    (("llama", 32000, 4096, 11008), (2, 3e-4, 2048)),  # rank, learning rate, size
    (("llama", 32000, 5120, 13824), (64, 3e-4, 4096)),
    (("llama", 32000, 8192, 28672), (8, 3e-5, 4096)),
    (("qwen", None, 4096, None), (64, 3e-4, 2048)),
    (("qwen", None, 5120, None), (64, 3e-4, 4096)),
    (("mistral", 32000, 4096, 14336), (4, 3e-6, 2048)),
    (("phi", 51200, 2560, None), (64, 2e-4, 2048)),
)
# The public healing demonstration of ShortGPT for Hugging Face models.
DEMO_RECIPE = {"rank": 8, "alpha": 32, "learning_rate": 1e-6, "modules": ("q_proj", "v_proj")}
DEMO_RECIPE |= {"batch_size": 1, "warmup": 0}
ALL, OUTPUTS = ("all",), ("outputs",)
# For minutes on a few processor cores: short windows, few steps of few windows, a high rate.
SMALL = {"rank": 32, "alpha": 64, "dropout": 0.0, "modules": ALL}
SMALL |= {"size": 512, "steps": 160, "warmup": 8, "batch_size": 2, "eval_every": 20}
NARROW, RATES = 576, (1e-3, 2.5e-4)  # widest model of the first rate, at which a wider one diverged
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "demo": DEMO_RECIPE, "small": SMALL}


def recipe_for(config: PretrainedConfig | None, preset: str = "paper", **changes: Any) -> Recipe:
    """The published settings for a model, with ``changes`` of its attributes.

    The preset "paper" takes rank, learning rate and size from the paper's table where it has the
    model's type and widths, else rank 64 and 3e-4. "demo" is the public demonstration: rank 8,
    alpha 32, q_proj and v_proj, 1e-6; "small" takes minutes on a few processor cores, and
    trains the attention's projections too, at 1e-3 up to a width of 576 and 2.5e-4 above.
    """
    names = [field.name for field in fields(Recipe)]
    for what, name, expected in (
        ("preset", preset, [*PRESETS]),
        *(("setting", name, names) for name in changes),
    ):
        if name not in expected:
            near = get_close_matches(name, expected, n=1) or [", ".join(expected)]
            raise refused(f"{what} of a recipe", name, near[0])
    settings = dict(PRESETS[preset])
    text = None if config is None else config.get_text_config(decoder=True)
    if preset == "small":
        settings["learning_rate"] = RATES[getattr(text, "hidden_size", 0) > NARROW]
        steps = changes.get("steps", settings["steps"])
        at_least(1, steps=steps)
        settings["warmup"] = min(settings["warmup"], steps // 2)
    if preset == "paper":
        for model, published in PAPER:
            values = {name: value for name, value in zip(MODEL, model, strict=True) if value}
            if all(getattr(text, name, None) == value for name, value in values.items()):
                settings = dict(zip(("rank", "learning_rate", "size"), published, strict=True))
    return Recipe(**settings | changes)


CLOSED_FORM = ("ridge", "step_size")  # settings of closed forms
DISTILLED = ("top_k", "temperature", "kl_share")  # of a recipe, for distill alone
CHECKS = 40  # evaluations of a long training, at most


@dataclass(frozen=True)
class Healing(Settings):
    """How the model is healed."""

    HEADING: ClassVar = CHOOSE
    heal_by: str = setting(
        "refit",
        "Way to heal: refit, patch, lora or distill; or several by commas, a closed form first.",
    )
    ridge: float | None = setting(
        None,
        "Ridge of a closed form, relative to the mean square of the inputs. Default: in the refit "
        "2 F / N, twice the inputs of the matrix divided by the tokens; in the patch what held-out "
        "windows choose.",
        rare=True,
    )
    step_size: float | None = setting(
        None,
        "Share of the solved change that a closed form applies, above 0 and at most 1. Default: "
        "0.5 in the refit, 1 in the patch.",
        rare=True,
    )
    recipe: str | Mapping[str, object] | None = setting(
        None,
        "Settings of lora and distill: a preset (paper, demo or small) and changes, such as "
        "small,steps=400,rank=16,batch_size=4 or distill's top_k=64; in Python "
        "also a dict or a Recipe, which describes all. Default: paper.",
    )
    tokens: str | int | None = setting(
        None,
        "Tokens that lora and distill read, as in 400k or 1.6M, instead of the recipe's steps; "
        "more than once where the texts have fewer.",
        value="COUNT",
    )
    teacher: str | None = setting(
        None,
        "Original model of which MODEL is a part, for distill; with stream it is read by the "
        "layer. Default: MODEL itself, before layers go.",
        rare=True,
    )

    def check(self, steps: Mapping[str, Step]) -> list[str]:
        """The methods, of ``steps``; ShortGPTError for what none of them can do."""
        methods = listed(self.heal_by)
        for name in methods:
            some = f"one of {', '.join(steps)}, or several by commas"
            check(name in steps, "heal_by", name, some)
        training = [name for name, step in steps.items() if step.trains]
        users = {"recipe": training, "tokens": training, "teacher": ["distill"]}
        for name in CLOSED_FORM:
            users[name] = [n for n, s in steps.items() if name in _names_of(s.settings)]
        for name, ways in users.items():
            if getattr(self, name) is not None and not {*ways} & {*methods}:
                raise ShortGPTError(f"`{name}` is for `heal_by` {' or '.join(ways)}")
        for name in {*methods}.difference(training):
            self.closed(steps[name].settings)
        if {*training} & {*methods}:
            recipe = self.trained()  # raises for values out of range
            changed = [n for n in DISTILLED if getattr(recipe, n) != getattr(Recipe, n)]
            if changed and "distill" not in methods:
                raise ShortGPTError(f"{', '.join(changed)} of `recipe`: for `heal_by` distill")
            check_installed(recipe)
            at_least(1, optional=True, tokens=self.count)
            free = self.count is None or all(self.trained(steps=n).steps == n for n in (1, 2))
            check(free, "tokens", self.tokens, "a recipe without steps, which say the same")
        return methods

    @property
    def count(self) -> int | None:
        """The tokens that a training reads; None where the recipe's steps say it."""
        return None if self.tokens is None else count_of(self.tokens, "tokens")

    def closed(self, kind: type[T]) -> T:
        """The settings of a closed form, of a class; ShortGPTError for one out of range."""
        changes = {n: getattr(self, n) for n in CLOSED_FORM if n in _names_of(kind)}
        return kind(**{n: v for n, v in changes.items() if v is not None})

    def trained(
        self,
        config: PretrainedConfig | None = None,
        *,
        seed: int = 0,
        few_bits: bool = False,
        steps: int | None = None,
    ) -> Recipe:
        """The recipe for a model of transformers.

        ``few_bits``: what it changes is rounded again, and so a preset that changes all maps
        changes the output projections alone. ``steps`` follow from ``tokens``.
        """
        if isinstance(self.recipe, Recipe):
            return self.recipe if steps is None else replace(self.recipe, steps=steps)
        parse = partial(Recipe.parse, self.recipe or "", config, seed=seed)
        recipe = parse()
        if steps is not None:  # how often it is evaluated stays, if the recipe says it
            recipe = parse(steps=steps, eval_every=max(recipe.eval_every, -(-steps // CHECKS)))
        outputs = few_bits and recipe.modules == ALL
        return replace(recipe, modules=OUTPUTS) if outputs else recipe


def _names_of(kind: type) -> set[str]:
    return {one.name for one in fields(kind)}


def check_installed(recipe: Recipe) -> None:
    """Raises ShortGPTError for a service that a recipe reports to and the machine lacks."""
    from transformers.integrations import get_available_reporting_integrations

    known = ["all", "none", *get_available_reporting_integrations()]
    for name in recipe.report_to.split(",") if recipe.report_to else ():
        check(name in known, "report_to", name, f"an installed service of {', '.join(known)}")


@dataclass(frozen=True)
class Cases(Settings):
    """What is compared: every method x number of layers x healing.

    Example:
        >>> Cases("bi, sleb", 2).methods
        ['bi', 'sleb']
    """

    HEADING: ClassVar = CHOOSE
    method: str | Sequence[str] = setting(
        COMPARED, "Names as of the method of rank, with commas between.", value="A,B"
    )
    n: object = setting(
        (2, 4, 8, 12),
        "Numbers of layers to remove, as in 2,4,8; by default those of 2, 4, 8 and 12 that the "
        "model allows.",
        value="N,N",
    )
    heal_by: str | Sequence[str] = setting(
        "raw,patch",
        "Ways to heal: of raw (none), patch and refit, with commas between.",
        value="A,B",
    )

    @property
    def methods(self) -> list[str]:
        return listed(self.method)

    @property
    def counts(self) -> list[int]:
        counts = whole_numbers(self.n, "n", "2,4,8")
        at_least(1, n=min(counts))
        return counts

    @property
    def healings(self) -> list[str]:
        return listed(self.heal_by)

    def within(self, n_layers: int) -> Cases:
        """These cases for a model of so many layers: of the default numbers, those it allows.

        Raises ShortGPTError if it has too few for the numbers that the user set.
        """
        from short_gpt.models.numbering import check_count
        from short_gpt.selection.methods import BY_LOSS

        # searches keep the first and the last layer
        most, counts = n_layers - (2 if {*self.methods} & {*BY_LOSS} else 1), self.counts
        if self.n is Cases.n:
            counts = [n for n in counts if n <= most] or [1]
        for n in counts:
            check_count(n, n_layers, most=most, name="`n`")
        return replace(self, n=counts)

    def check(self, healings: Collection[str]) -> None:
        """Raises ShortGPTError for an unknown name."""
        from short_gpt.selection.methods import check_method

        for name in self.methods:
            check_method(name)
        for name in self.healings:
            check(name in healings, "`heal_by`", name, f"some of {', '.join(healings)}")
