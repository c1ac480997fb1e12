"""How transformers reads a GGUF file: its header once, and nothing of it left out in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from llama.formats.gguf import ROPE_FACTORS
from llama.formats.gguf_header import read_header
from llama.formats.tokenizers import DIGITS
from short_gpt.models.pretrained import PretrainedTokenizer
from short_gpt.models.weights_report import some
from short_gpt.runtime.errors import ShortGPTError

MAPPED = "get_gguf_hf_weights_map"  # transformers' own: from names of tensors to those of weights


class _Asked(dict[str, str]):
    """A mapping that notes which names it was asked for and lacks."""

    def __init__(self, mapping: dict[str, str], left_out: list[str]) -> None:
        super().__init__(mapping)
        self._left_out = left_out

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if not found and isinstance(name, str):  # none: a tensor of all experts, which was cut up
            self._left_out.append(name)
        return found


@contextmanager
def reading_gguf() -> Iterator[list[str]]:
    """Lets transformers share one reader of a GGUF file, and notes which tensors it leaves out.

    It makes one reader each for the config, twice, the tokenizer and the weights; for a vocabulary
    of 49,000 each takes seconds. Tensors of names that it does not know it passes over.

    Returns:
        The names of those, filled while the file is read.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    reader, mapped = gguf.GGUFReader, vars(reading).get(MAPPED)
    left_out: list[str] = []
    vars(gguf).update(GGUFReader=lru_cache(maxsize=1)(reader))
    if mapped is not None:
        vars(reading).update({MAPPED: _noting(mapped, left_out)})
    try:
        yield left_out
    finally:
        vars(gguf).update(GGUFReader=reader)
        if mapped is not None:
            vars(reading).update({MAPPED: mapped})


def _noting(mapped: Callable[..., dict[str, str]], left_out: list[str]) -> Callable[..., Any]:
    return lambda *args, **options: _Asked(mapped(*args, **options), left_out)


def check_left_out(name: str, left_out: list[str]) -> None:
    """Refuses a GGUF file of which tensors would be left out.

    Args:
        name: of the file.
        left_out: as `reading_gguf` found them. Llama's divisors of the rotary frequencies count as
            known.

    Raises:
        ShortGPTError: there are any; it names them.
    """
    if others := set(left_out) - {ROPE_FACTORS}:
        raise ShortGPTError(
            f"{name} cannot be loaded: it holds {some(others)}, which transformers' model of its "
            "kind lacks and would leave out; open the model that it was made from"
        )


def mend_tokenizer(tokenizer: PretrainedTokenizer, path: Path) -> None:
    """Puts back the cut around digits that transformers drops of SmolLM2's tokenizer.

    Args:
        tokenizer: as transformers made it of the file; changed in place.
        path: the file.
    """
    from tokenizers import pre_tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or read_header(path).fields.get("tokenizer.ggml.pre") != DIGITS:
        return
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
