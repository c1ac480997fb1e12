"""Settings of LoRA healing, and the published ones."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from short_gpt.models.families import FAMILIES
from short_gpt.runtime.errors import ShortGPTError, at_least


class ModelConfig(Protocol):
    """The config of a model of transformers, by which the paper's table is looked up."""

    @property
    def model_type(self) -> str: ...

    def get_text_config(self, decoder: bool) -> ModelConfig: ...


@dataclass(frozen=True)
class Recipe:
    """Settings of LoRA; the defaults are those of Gromov et al.

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
    batch: int = 16  # windows a step
    micro_batch: int = 1  # windows read at once; divides ``batch``
    size: int = 2048  # tokens of a window, as a recommendation to whoever cuts them
    seed: int = 0  # of everything random
    eval_every: int = 100  # steps from one evaluation, and one checkpoint, to the next
    patience: int | None = None  # evaluations without improvement before it stops; None: never
    four_bit: bool = False  # train over weights in 4 bits (QLoRA), merge into unquantized ones
    gradient_checkpointing: bool = False  # less memory for a second forward pass
    report_to: str | None = None  # services of `TrainingArguments`, as in "wandb,tensorboard"

    def __post_init__(self) -> None:
        counts = ("rank", "steps", "batch", "micro_batch", "eval_every")
        at_least(1, **{name: getattr(self, name) for name in counts})
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ShortGPTError(
                f"alpha = {self.alpha}: expected above 0; changes of this scale learn nothing"
            )
        if self.batch % self.micro_batch:
            raise ShortGPTError(
                f"`batch` {self.batch} is not a multiple of `micro_batch` {self.micro_batch}"
            )
        if not 0 < (rate := self.learning_rate) < math.inf:
            raise ShortGPTError(f"learning_rate = {rate}: expected a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ShortGPTError(f"dropout = {self.dropout}: expected at least 0 and below 1")
        at_least(0, optional=True, warmup=self.warmup)
        at_least(1, optional=True, patience=self.patience)

    @property
    def warmup_steps(self) -> int:
        return min(100, self.steps // 10) if self.warmup is None else self.warmup


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
DEMO_RECIPE |= {"batch": 1, "warmup": 0}
ALL, OUTPUTS = ("all",), ("outputs",)
# For minutes on a few processor cores: short windows, few steps of few windows, a high rate.
SMALL = {"rank": 32, "alpha": 64, "dropout": 0.0, "modules": ALL}
SMALL |= {"size": 512, "steps": 160, "warmup": 8, "batch": 2, "eval_every": 20}
NARROW, RATES = 576, (1e-3, 2.5e-4)  # widest model of the first rate, at which a wider one diverged
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "demo": DEMO_RECIPE, "small": SMALL}


def recipe_for(config: ModelConfig, preset: str = "paper", **changes: Any) -> Recipe:
    """The published settings for a model, with ``changes`` of its attributes.

    The preset "paper" takes rank, learning rate and size from the paper's table where it has the
    model's type and widths, else rank 64 and 3e-4. "demo" is the public demonstration: rank 8,
    alpha 32, q_proj and v_proj, 1e-6; "small" takes minutes on a few processor cores, and
    trains the attention's projections too, at 1e-3 up to a width of 576 and 2.5e-4 above.
    """
    if preset not in PRESETS:
        raise ShortGPTError(f"preset {preset!r} is unknown: expected one of {', '.join(PRESETS)}")
    unknown = set(changes) - set(Recipe.__dataclass_fields__)
    if unknown:
        raise ShortGPTError(f"no setting {sorted(unknown)}; there are {[*asdict(Recipe())]}")
    if preset == "demo":
        return Recipe(**{**DEMO_RECIPE, **changes})
    text = config.get_text_config(decoder=True)
    if preset == "small":
        wide = getattr(text, "hidden_size", 0) > NARROW
        small: dict[str, Any] = {**SMALL, "learning_rate": RATES[wide]}
        small["warmup"] = min(small["warmup"], changes.get("steps", small["steps"]) // 2)
        return Recipe(**{**small, **changes})
    published: dict[str, Any] = {}
    for model, settings in PAPER:
        values = {name: value for name, value in zip(MODEL, model, strict=True) if value}
        if all(getattr(text, name, None) == value for name, value in values.items()):
            published = dict(zip(("rank", "learning_rate", "size"), settings, strict=True))
    if text.model_type == "qwen":
        published["modules"] = FAMILIES["qwen"].lora
    return Recipe(**published | changes)
