"""How a checkpoint is opened."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from llama.sources import find_source, is_gguf
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.settings import Needs, Values, setting


def _kind(model: object) -> str | None:
    """A source's kind; None of one that does not exist, which is refused later."""
    with suppress(FileNotFoundError):
        return find_source(str(model)).kind
    return None


def _tokenizer_is_read(values: Values) -> bool:
    if values.get("stream") or values.get("stream_teacher"):
        return True
    models = [values.get(name) for name in ("model", "pruned", "teacher")]
    return any(_kind(model) in ("meta", None) for model in models if model is not None)


TOKENIZER = Needs("a model in Meta's format (others bring their own tokenizer)", _tokenizer_is_read)
PRECISIONS = FLOAT32, MIXED, AUTO = ("float32", "mixed", "auto")
READING = ("shrink", "rank", "heal", "compare", "evaluate", "reproduce")


def _becomes_hf(values: Values) -> bool:
    to_hf = values["to"] == "hf" or (values["to"] is None and not is_gguf(str(values["out"])))
    return to_hf and (is_gguf(str(values["model"])) or _kind(values["model"]) == "gguf")


OPENED = Needs("a GGUF file written as a directory", _becomes_hf, commands=("prune",))


@dataclass(frozen=True)
class OpenOptions:
    """How a checkpoint is opened; what a format does not know has no effect on it.

    Args:
        tokenizer_path: tokenizer of a Meta checkpoint, looked for beside it if not given; other
            models bring their own, and refuse one.
        device: cpu, cuda, mps or another that PyTorch has here; the best there is if not given.
        dtype: float32, bfloat16 or float16; if not given, float32 on cpu, bfloat16 on cuda that
            has it, else float16.
        precision: of reading windows, to score, search, evaluate, refit and train: float32 keeps
            the model's dtype; mixed takes matrix products in bfloat16, with weights and the stream
            of a float32 model in float32; auto times both on one window, and takes mixed where
            that is faster by a third. Generation, tasks and proofs of what was written are not
            affected.
        trust_remote_code: run the Python files that come with a Hugging Face model; look at them
            first. Without it such a model is refused, unless transformers knows its kind.
        max_seq_len: longest window in tokens, of Meta's format or streamed.
        max_batch_size: most windows read at once, of Meta's format or streamed.
        n_prune_layers: how many layers `remove_layers` takes out; may be set later.
        seed: of what a model samples.
        model_parallel_size: ranks that share one model under torchrun; None is all of them for
            Meta's format and 1 for others, which cannot be shared.
        max_memory: of a streamed model's process in the machine's memory, in bytes or like "3GB";
            None takes half of what is free.
    """

    tokenizer_path: str | None = setting(None, value="FILE", needs=TOKENIZER)
    device: str | None = setting(None, needs=OPENED)
    dtype: str | None = setting(None, needs=OPENED)
    precision: str = setting(FLOAT32, commands=READING)
    trust_remote_code: bool = False
    # what the jobs derive from their own settings
    max_seq_len: int = setting(2048, commands=())
    max_batch_size: int = setting(1, commands=())
    n_prune_layers: int | None = setting(None, commands=())
    seed: int = setting(1, commands=())
    model_parallel_size: int | None = setting(None, commands=())
    max_memory: str | int | None = setting(None, commands=())

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ShortGPTError(
                f"`precision` {self.precision}: expected one of {', '.join(PRECISIONS)}"
            )

    def check(self, *, stream: bool) -> None:
        """Raises ShortGPTError for options that do not go together."""
        if not -(2**63) <= self.seed < 2**63:
            raise ShortGPTError(f"seed = {self.seed}: expected a whole number below 2**63")
        if self.max_memory is not None and not stream:
            raise ShortGPTError(
                f"max_memory {self.max_memory} bounds a streamed model; pass stream as well, or "
                "leave it out"
            )
        if self.model_parallel_size is not None and stream:
            raise ShortGPTError(
                f"`model_parallel_size` {self.model_parallel_size}: `stream` holds one layer on "
                "one rank; leave one of them out"
            )
