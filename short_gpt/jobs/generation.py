"""Texts that a model writes: a prompt continued, or samples of its own."""

from __future__ import annotations

import json
from pathlib import Path

from llama.files import check_output, new_file
from short_gpt.jobs.saving import interruptible
from short_gpt.runtime.errors import ShortGPTError, at_least, check
from short_gpt.runtime.progress import is_first_rank
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.options import OpenOptions, Sampling
from short_gpt.wrappers.own_text import own_samples


@interruptible()
def generate(
    model: str,
    prompt: str | None,
    sampling: Sampling,
    samples: int | None,
    out: str | None,
    opening: OpenOptions,
) -> str | Path:
    """What `jobs.generate` does."""
    check(isinstance(prompt, str | None), "prompt", prompt, "one text")
    if [samples is None, out is None] != [prompt is not None] * 2:
        raise ShortGPTError("expected either a `prompt` to continue, or `samples` and `out`")
    if prompt is None:
        return _write_samples(model, samples or 0, Path(str(out)), sampling, opening)
    size = sampling.max_new_tokens
    # Meta's format has no limit of its own: room for a token a byte of the prompt, bos and eos
    room = max(opening.max_seq_len, len(prompt.encode(errors="replace")) + 2 + size)
    short = open_model(model, opening, seed=sampling.seed, max_seq_len=room)
    read, most = len(short.encode(prompt)), short.decoder.max_seq_len
    if read + size > most:
        raise ShortGPTError(
            f"`prompt` has {read:,} tokens and `max_new_tokens` is {size:,}, but the model's "
            f"context is {most:,}: shorten them"
        )
    text = short.generate([prompt], size, sampling.temperature, sampling.top_p)[0]
    return f"{prompt}{text}"


def _write_samples(
    model: str, count: int, out: Path, sampling: Sampling, opening: OpenOptions
) -> Path:
    """Writes `own_samples` of a checkpoint as texts to a .jsonl file, which ``data`` reads."""
    at_least(1, samples=count)
    check(out.suffix == ".jsonl", "`out`", out.name, "the name of a .jsonl file")
    if out.is_file():  # no flag replaces it
        raise FileExistsError(f"{out} exists; choose another name")
    check_output(out, overwrite=False, replaces=Path.is_file)
    size, seed = sampling.max_new_tokens, sampling.seed
    short = open_model(model, opening, max_seq_len=size, model_parallel_size=1)
    if not 2 <= size <= (most := short.decoder.max_seq_len):
        raise ShortGPTError(f"`max_new_tokens` {size}: this model takes 2 to {most:,}")
    texts = own_samples(short, count, size, seed=seed, beside=out)
    if is_first_rank():
        with new_file(out, overwrite=False, replaces=Path.is_file) as partial:
            lines = (json.dumps({"text": short.decode(ids)}) + "\n" for ids in texts)
            partial.write_text("".join(lines), encoding="utf-8")
    return out
