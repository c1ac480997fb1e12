"""Settings of all ways to heal, which need no torch: of closed forms, and of training with LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from short_gpt.runtime.errors import at_least, check, refused

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
