"""Shapes from params.json: the released models' numbers, and what is refused."""

from __future__ import annotations

import pytest
from conftest import refuses

from llama.args import ModelArgs, check_split, kv_heads_of_rank
from llama.checkpoint.meta import full_shapes
from llama.formats.hf import ffn_keys, params_json

# params.json as published by Meta, with the feed-forward width and the number of parameters.
SIZES = ("dim", "n_layers", "n_heads", "multiple_of")
WIDER = {"n_kv_heads": 8, "ffn_dim_multiplier": 1.3}
LLAMA3 = WIDER | {"vocab_size": 128256, "rope_theta": 500000.0, "norm_eps": 1e-5}
RELEASED = {
    "Llama-2-7B": ((4096, 32, 32, 256), {}, 11008, 6_738_415_616),
    "Llama-2-13B": ((5120, 40, 40, 256), {}, 13824, 13_015_864_320),
    "Llama-2-70B": ((8192, 80, 64, 4096), WIDER, 28672, 68_976_648_192),
    "Llama-3-8B": ((4096, 32, 32, 1024), LLAMA3, 14336, 8_030_261_248),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name):
    sizes, more, ffn_dim, total = RELEASED[name]
    params = dict(zip(SIZES, sizes, strict=True)) | {"vocab_size": -1, **more}
    args = ModelArgs.from_params(params)
    if args.vocab_size == -1:
        args.vocab_size = 32000
    assert args.ffn_dim == ffn_dim
    counts = [a * (b[0] if b else 1) for a, *b in full_shapes(args).values()]
    assert sum(counts) == total


@pytest.mark.parametrize(("dim", "width"), [(576, 1536), (4096, 11008), (4096, 14336), (64, 100)])
def test_any_feed_forward_width_can_be_written(dim, width):
    args = ModelArgs.from_params({"dim": dim, "n_layers": 1, "n_heads": 2, **ffn_keys(dim, width)})
    assert args.ffn_dim == width
    assert ModelArgs.from_params(params_json(args)) == args


def test_params_may_stand_under_model():
    assert ModelArgs.from_params({"model": {"dim": 64, "n_layers": 1, "n_heads": 2}}).dim == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, r"params.json lacks \['dim'\]"),
        ({"moe": 4}, r"has unknown keys \['moe'\]"),
        ({"dim": "64"}, "dim = '64': expected a positive integer"),
        ({"n_layers": 0}, "n_layers = 0: expected a positive integer"),
        ({"n_heads": 3}, "dim = 64: expected 3 heads"),
        ({"n_kv_heads": 3}, "n_heads = 4: expected a multiple of n_kv_heads 3"),
        ({"norm_eps": "small"}, "norm_eps = 'small': expected a positive number"),
        ({"vocab_size": 0}, "vocab_size = 0: expected a positive integer or -1"),
        ({"ffn_dim_multiplier": -1}, "ffn_dim_multiplier = -1: expected a positive number"),
        ({"use_scaled_rope": "false"}, "use_scaled_rope = 'false': expected true or false"),
    ],
)
def test_bad_params_are_refused(changes, message):
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, **changes}
    refuses(message, ModelArgs.from_params, {k: v for k, v in params.items() if v is not None})


def test_what_does_not_divide_among_ranks_is_refused():
    args = ModelArgs(dim=64, n_heads=4, n_kv_heads=1, vocab_size=96)
    check_split(args, 4)
    refuses("n_heads = 4: expected a multiple of the 3 model-parallel", check_split, args, 3)
    with pytest.raises(ValueError, match="vocab_size = 99: expected a multiple of the 2"):
        check_split(ModelArgs(dim=64, n_heads=4, vocab_size=99), 2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "expected"),
    [
        (8, 2, 1, [[0, 1]]),
        (8, 2, 2, [[0], [1]]),
        (8, 2, 4, [[0], [0], [1], [1]]),
        (8, 8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (128, 8, 16, [[i // 2] for i in range(16)]),  # Llama-3.1-405B mp16
        (6, 3, 2, [[0, 0, 1], [1, 2, 2]]),  # groups that end inside a rank
    ],
)
def test_key_value_heads_of_every_rank(heads, kv_heads, ranks, expected):
    args = ModelArgs(n_heads=heads, n_kv_heads=kv_heads)
    assert [kv_heads_of_rank(args, rank, ranks) for rank in range(ranks)] == expected
