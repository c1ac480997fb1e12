"""short-gpt generate: completes a text."""

from __future__ import annotations

from dataclasses import dataclass

import short_gpt
from short_gpt.cli.options import say
from short_gpt.jobs import OpenOptions
from short_gpt.jobs.choice_settings import layer_list
from short_gpt.runtime.settings import Needs, setting

SAMPLES = Needs("a --temperature above 0", lambda values: values["temperature"] != 0)


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    Args:
        max_gen_len: most tokens to add.
        temperature: 0 takes the likeliest token.
        top_p: sample from the smallest set of tokens with this probability.
        seed: of the sampling.
        skip_prefill: layers to skip while the prompt is read, as in 21,22,23; they run while text
            is added (ShortGPT-gen).
    """

    max_gen_len: int = 64
    temperature: float = 0.6
    top_p: float = setting(0.9, needs=SAMPLES)
    seed: int = setting(1, needs=SAMPLES)
    skip_prefill: object = setting(None, value="N,N")


def generate(
    model: str,
    prompt: str,
    *,
    sampling: Sampling = Sampling(),
    opening: OpenOptions = OpenOptions(),
) -> None:
    """Completes a text.

    Example: short-gpt generate llama-2-7b "I am an avid fan of"

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        prompt: the text to continue.
    """
    short = short_gpt.open_model(model, opening, seed=sampling.seed)
    skip = sampling.skip_prefill
    skipped = [] if skip is None else layer_list(skip, "skip_prefill")
    how = (sampling.max_gen_len, sampling.temperature, sampling.top_p)
    with short.skipped_in_prefill(skipped):
        text = short.generate([prompt], *how)[0]
    say(f"{prompt}{text}")
