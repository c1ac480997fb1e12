"""How a checkpoint is opened, how windows go through it, and how a text is continued."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from llama.files import JsonObject
from short_gpt.runtime.errors import ShortGPTError, at_least, check
from short_gpt.runtime.settings import Settings, setting

PRECISIONS = FLOAT32, MIXED, FASTER = ("float32", "mixed", "auto")
# what jobs take of `OpenOptions`: those that read windows, also of a model by the layer
LOADING = ("device", "dtype", "trust_remote_code")
READING = (*LOADING, "precision")
STREAMING = (*READING, "stream")
MAX_NEW_TOKENS = 2**20  # more than Llamas are trained for; their cache is allocated in advance


@dataclass(frozen=True)
class OpenOptions(Settings):
    """How a checkpoint is opened; what a format does not know has no effect on it."""

    # of a Meta checkpoint or a streamed model, instead of the one beside it; others bring their own
    tokenizer_path: str | None = None
    device: str | None = setting(
        None,
        "cpu, cuda, mps or another that PyTorch has here. Default: the best there is.",
        rare=True,
    )
    dtype: str | None = setting(
        None,
        "float32, bfloat16 or float16. Default: float32 on cpu, bfloat16 on cuda that has it, else "
        "float16.",
        rare=True,
    )
    precision: str = setting(
        FLOAT32,
        "Precision of reading windows, to score, search, evaluate, refit and train, and of writing "
        "text of the model's own: float32 keeps the model's dtype; mixed takes matrix products in "
        "bfloat16, with weights and the stream of a float32 model in float32; auto takes mixed "
        "where this processor multiplies so in two thirds of the time or less. Answers, tasks, "
        "what heal and shrink report in the end, and proofs of what was written are not affected, "
        "nor are models in half precision.",
        rare=True,
    )
    trust_remote_code: bool = setting(
        False,
        "Run the Python files that come with a Hugging Face model; look at them first. Without it "
        "such a model is refused, unless transformers knows its kind.",
        rare=True,
    )
    stream: bool | str | int = setting(
        False,
        "Hold one layer at a time in memory: for a Llama larger than the machine, in Meta's format "
        "or Hugging Face's. A size such as 3GB bounds the memory of the whole process, else half "
        "of what is free does.",
        value="SIZE",
    )
    # ranks under torchrun that share one model of Meta's format, the others being replicas, which
    # share the windows; None is all, and 1 for other formats, which cannot be shared
    model_parallel_size: int | None = None
    batch_size: int = setting(1, "Windows read at once, by each replica.", rare=True)
    max_seq_len: int = 2048  # longest window in tokens, of Meta's format or streamed
    n_prune_layers: int | None = None  # that `remove_layers` takes out; may be set later
    seed: int = 1  # of what a model samples

    def __post_init__(self) -> None:
        known = f"one of {', '.join(PRECISIONS)}"
        check(self.precision in PRECISIONS, "precision", self.precision, known)
        at_least(1, batch_size=self.batch_size)
        check(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a whole number below 2**63")
        if self.max_memory is not None:
            from short_gpt.runtime.memory import bytes_of

            bytes_of(self.max_memory, "stream")
        if self.model_parallel_size is not None and self.stream:
            raise ShortGPTError(
                f"model_parallel_size = {self.model_parallel_size}: `stream` holds one layer on "
                "one rank; leave one of them out"
            )

    def as_begun(self, state: str | PathLike[str] | None) -> OpenOptions:
        """The options with the precision of the run in a state, where `auto` would choose one."""
        from short_gpt.runtime.state import USUAL, read_record

        if self.precision != FASTER or state is None or not Path(state).is_file():
            return self
        run: JsonObject = {}
        with suppress(ShortGPTError):  # a damaged state is refused when it is continued
            run = read_record(state).get("run", {})
        return self.changed({"precision": {**USUAL, **run}["precision"]})

    @property
    def max_memory(self) -> str | int | None:
        """Memory of a streamed model's process; None is half of what is free."""
        return None if isinstance(self.stream, bool) else self.stream


@dataclass(frozen=True)
class Sampling(Settings):
    """How a text is continued."""

    max_new_tokens: int = setting(64, "Tokens to add at most; those of each sample.")
    temperature: float = setting(0.6, "Divisor of the logits; 0 takes the likeliest token.")
    top_p: float = setting(0.9, "Sample from the smallest set of tokens with this probability.")
    seed: int = setting(1, "Seed of the sampling.", rare=True)

    def __post_init__(self) -> None:
        at_least(0, max_new_tokens=self.max_new_tokens, seed=self.seed)
        most, count = f"at most {MAX_NEW_TOKENS:,}", self.max_new_tokens
        check(count <= MAX_NEW_TOKENS, "max_new_tokens", count, most)
        check(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        check(0 <= self.top_p <= 1, "top_p", self.top_p, "0 to 1")
