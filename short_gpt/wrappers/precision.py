"""In which precision a model reads windows: that of its dtype, or with products in bfloat16."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch.utils.benchmark import Timer

from short_gpt.models.decoder import mixed_precision
from short_gpt.runtime import replicas
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import duration, is_first_rank, print_above_bars
from short_gpt.wrappers.options import AUTO, FLOAT32, MIXED, OpenOptions
from short_gpt.wrappers.scored_model import ScoredModel

ENOUGH = 2 / 3  # of a window's time in float32: auto takes mixed for that or less
EMULATED = 2.0  # times that of a product in float32: no window is faster in mixed
Short = TypeVar("Short", bound=ScoredModel)


def in_precision(short: Short, options: OpenOptions) -> Short:
    """The model, which from here on reads windows in the precision of its options.

    What is taken, and why, is written to stderr. All ranks must call it. ShortGPTError: mixed on
    a device that does not multiply bfloat16.
    """
    dtype, device = short.runs_in()
    if options.precision == FLOAT32:
        return short
    if dtype is not torch.float32:
        _say(f"that of {dtype}, which `{options.precision}` does not change")
    elif options.precision == AUTO:
        short.decoder.mixed = _is_faster(short, bfloat16_cost(device), options.max_seq_len)
    elif math.isinf(bfloat16_cost(device)):
        raise ShortGPTError(f"`precision` {MIXED}: {device} multiplies no bfloat16; leave it out")
    else:
        short.decoder.mixed = True
        _say(f"{MIXED} (matrix products in bfloat16)")
    short.evidence |= short.about_precision
    return short


def _is_faster(short: ScoredModel, cost: float, size: int) -> bool:
    team, decoder = replicas.current(short.decoder.device), short.decoder
    if team.any_rank(cost > EMULATED):  # on all ranks or on none
        _say(f"{FLOAT32} (a product in bfloat16 takes {cost:.1f} times as long)")
        return False
    window, seconds = [0] * min(size, decoder.max_seq_len), []
    for decoder.mixed in (False, True):
        seconds.append(short.seconds_a_window(window))
    plain, mixed = map(duration, seconds)
    if slow := team.any_rank(seconds[1] > ENOUGH * seconds[0]):
        _say(f"{FLOAT32} ({plain} a window; {mixed} in {MIXED}, which is not faster by a third)")
    else:
        _say(f"{MIXED} ({mixed} a window against {plain})")
    return not slow


def bfloat16_cost(device: torch.device) -> float:
    """The time of a matrix product in bfloat16, in that of one in float32; infinite without any."""
    x = torch.ones(256, 256, device=device)
    try:
        # a value is read after the product on every device; not all have a way to wait for it
        product = Timer("(x @ x)[0, 0].item()", globals={"x": x})
        plain = product.timeit(5).mean
        with mixed_precision(True, device):
            mixed, dtype = product.timeit(5).mean, (x @ x).dtype
    except RuntimeError:  # of CUDA without bfloat16
        return math.inf
    return mixed / plain if dtype is torch.bfloat16 else math.inf


def _say(what: str) -> None:
    if is_first_rank():
        print_above_bars(f"precision: {what}")
