"""The shape of a model: the content of a checkpoint's ``params.json``."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields

from llama.errors import InputError, check
from llama.files import JsonObject

# Llama 3.1's rotary scaling factor is not in params.json: it is 8, and 32 for the two small 3.2
# models, known by their width (https://github.com/meta-llama/llama-models/issues/166 and /241).
ROPE_FACTOR, ROPE_FACTOR_OF_WIDTH = 8.0, {2048: 32.0, 3072: 32.0}
MAX_INTEGER = 2**31 - 1  # of any number in params.json: larger ones would fail in arithmetic


@dataclass
class ModelArgs:
    """The shape of a model: the keys of ``params.json`` and the two limits of a run.

    ``n_kv_heads`` None means ``n_heads``; ``vocab_size`` -1 the tokenizer's size;
    ``rope_scaling_factor`` None the released model's (only with ``use_scaled_rope``).
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    max_batch_size: int = 32
    max_seq_len: int = 2048

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer: 2/3 of 4 D, scaled, rounded up to ``multiple_of``."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    @property
    def rope_factor(self) -> float | None:
        """The 3.1 scaling factor of the rotary wavelengths; None if they are not scaled."""
        if not self.use_scaled_rope:
            return None
        return self.rope_scaling_factor or ROPE_FACTOR_OF_WIDTH.get(self.dim, ROPE_FACTOR)

    @classmethod
    def from_params(cls, params: JsonObject, **limits: int) -> ModelArgs:
        """Arguments from a ``params.json``, whose keys may stand under ``"model"``, or InputError.

        ``limits`` are ``max_batch_size`` and ``max_seq_len``, which bound generation.
        """
        params = params.get("model", params)
        unknown = sorted(set(params) - {f.name for f in fields(cls)})
        missing = sorted({"dim", "n_layers", "n_heads"} - set(params))
        if unknown or missing:
            problem = f"has unknown keys {unknown}" if unknown else f"lacks {missing}"
            raise InputError(f"params.json {problem}")
        args = cls(**{**params, **limits})
        args.check()
        return args

    def check(self) -> None:
        """Raises InputError unless the numbers describe a model."""
        limits = ("max_batch_size", "max_seq_len")
        names = ("dim", "n_layers", "n_heads", "kv_heads", "multiple_of", *limits)
        check_positive(**{name: getattr(self, name) for name in names})
        if self.vocab_size != -1:
            check_positive("a positive integer or -1", vocab_size=self.vocab_size)
        for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor"):
            value = getattr(self, name)
            ok = value is None or (isinstance(value, int | float) and value > 0)
            check(ok, name, value, "a positive number")
        scaled = self.use_scaled_rope
        check(scaled in (True, False, None), "use_scaled_rope", scaled, "true or false")
        heads, kv_heads = self.n_heads, self.kv_heads
        even = not self.dim % heads and not self.head_dim % 2
        check(even, "dim", self.dim, f"{heads} heads (n_heads) of an even width")
        check(not heads % kv_heads, "n_heads", heads, f"a multiple of n_kv_heads {kv_heads}")


def check_positive(expected: str = "a positive integer", **numbers: object) -> None:
    """Raises InputError for the first value that is not an integer from 1 to `MAX_INTEGER`."""
    for name, value in numbers.items():
        ok = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_INTEGER
        check(ok, name, value, expected)


def some(names: Collection[object]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(map(str, names))[:3]) + more


def kv_heads_of_rank(params: ModelArgs, rank: int, ranks: int) -> list[int]:
    """The key/value heads that one of several ranks needs for its query heads, in their order.

    Where a head serves query heads of several ranks, each of these holds it.

    Example:
        >>> args = ModelArgs(n_heads=8, n_kv_heads=2)
        >>> [kv_heads_of_rank(args, rank, 4) for rank in range(4)]
        [[0], [0], [1], [1]]
    """
    count, group = params.n_heads // ranks, params.n_heads // params.kv_heads
    first = rank * count
    return [head // group for head in range(first, first + count, math.gcd(count, group))]


def check_split(params: ModelArgs, ranks: int) -> None:
    """Raises InputError unless query heads, widths and vocabulary divide among the ranks."""
    shares = {
        "n_heads": params.n_heads,
        "the feed-forward width": params.ffn_dim,
        "dim": params.dim,
        "vocab_size": params.vocab_size,
    }
    for name, value in shares.items():
        check(not value % ranks, name, value, f"a multiple of the {ranks} model-parallel ranks")
