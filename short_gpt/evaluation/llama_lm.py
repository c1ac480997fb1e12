"""A Llama in Meta's format as the lm-evaluation-harness knows models.

Shapes: B requests, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama import Llama
from short_gpt.data.windows import batches
from short_gpt.evaluation.harness import harness
from short_gpt.models.decoder import Decoder, pad
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar

# context and continuation as texts (None for a window of a longer text) and as token ids
Request = tuple[tuple[str, str] | None, list[int], list[int]]
MAX_GEN_TOKENS = 256  # lm-eval's value for a task that names none
FIRST_TOKENS = 32


class Instance(Protocol):
    """A request as lm-eval gives it; ``args`` are a text, or a text and settings."""

    @property
    def args(self) -> tuple: ...


class LlamaLike(Protocol):
    """What `llama_lm` asks of a model of this library."""

    decoder: Decoder

    @property
    def llama(self) -> Llama: ...

    def encode(self, text: str) -> list[int]: ...


def llama_lm(short: LlamaLike, *, batch_size: int = 1) -> object:
    """A Llama as the lm-evaluation-harness knows models, for ``lm_eval.simple_evaluate``.

    It gives the log-likelihoods that `hugging_face_lm` gives on the same weights: the softmax is in
    float32, and the tokenizer decides what is put before a text.

    Args:
        short: its model is not copied.
        batch_size: requests read at once.

    Raises:
        MissingPackageError: lm-eval is missing.
    """
    template = harness("api.model").TemplateLM
    return type("LlamaLM", (_LlamaLM, template), {})(short, batch_size)


class _LlamaLM:
    """A Llama under the methods that lm-eval's ``TemplateLM``, mixed in, asks for.

    It does what lm-eval's own class for transformers does: the same tokens in front, the same cuts.
    Special tokens are never read from the text.
    """

    def __init__(self, short: LlamaLike, batch_size: int) -> None:
        super().__init__()
        self.short, self.batch_size = short, batch_size
        self.max_length = short.decoder.max_seq_len
        self._words = short.llama.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before what has no context: bos, or eos where there is none."""
        return self._words.bos_id if self._words.bos_id >= 0 else self._words.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        if add_special_tokens is None:
            return self.short.encode(string)
        return self._words.encode(string, bos=add_special_tokens, eos=False)

    def tok_decode(self, tokens: Iterable[int]) -> str:
        return self._words.decode(list(tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Nats of each continuation, and whether greedy decoding gives it.

        Requests that differ only in the last token, such as the answers A to D, share one pass.
        """
        places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length or not context:
                raise ShortGPTError(
                    f"a request has {len(context)} tokens of context and {len(continuation)} to "
                    f"predict; this model takes 1 or more and 1 to {self.max_length} (max_seq_len)"
                )
            # what is read lacks the last token, which is only predicted
            places[tuple((context + continuation)[-self.max_length - 1 : -1])].append(i)
        done: dict[int, tuple[float, bool]] = {}
        with bar(
            "loglikelihood", total=len(requests), unit="request", show=not disable_tqdm
        ) as shown:
            for batch in batches(sorted(places, key=len, reverse=True), self.batch_size):
                tokens, _ = pad(batch, self.short.decoder)
                for read, row in zip(batch, self.short.decoder.logits(tokens), strict=True):
                    for i in places[read]:
                        done[i] = _score(row[: len(read)], requests[i][2])
                    shown.update(len(places[read]))
        return [done[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of whole texts, each token predicted once, after as much context as fits."""
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            for context, continuation in self._rolling(request.args[0]):
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (nats, _) in zip(owners, found, strict=True):
            totals[i] += nats
        return totals

    def _rolling(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        utils = harness("utils")
        cut = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(utils.make_disjoint_window, cut)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts up to a stop string, greedy unless the task says otherwise."""
        done = []
        with bar(
            "generate_until", total=len(requests), unit="request", show=not disable_tqdm
        ) as shown:
            for request in requests:
                done.append(self._generate(*request.args))
                shown.update(1)
        return done

    def _generate(self, text: str, settings: Mapping[str, object]) -> str:
        chosen = _generation(settings)
        room = self.max_length - chosen.max_gen_toks
        if room < 1:
            raise ShortGPTError(
                f"{chosen.max_gen_toks} tokens to generate leave no room for a prompt: the "
                f"model takes {self.max_length} (max_seq_len)"
            )
        prompt = self.tok_encode(text)[-room:] or [self.prefix_token_id]
        made: list[int] = []
        count = FIRST_TOKENS  # stop strings mostly come early: look, and go on if there is none
        while True:
            count = min(count, chosen.max_gen_toks - len(made))
            (new,), _ = self.short.llama.generate(
                [prompt + made], count, chosen.temperature, chosen.top_p
            )
            made += new
            whole = self.tok_decode(made)
            cut = min((whole.find(s) for s in chosen.until if s in whole), default=len(whole))
            if cut < len(whole) or len(new) < count or len(made) >= chosen.max_gen_toks:
                return whole[:cut]
            count *= 2


@dataclass(frozen=True)
class Generation:
    """How a task wants a text continued."""

    until: list[str]
    max_gen_toks: int
    temperature: float
    top_p: float


def _generation(settings: Mapping[str, object]) -> Generation:
    """A task's settings in lm-eval's normal form; ShortGPTError if one would be without effect."""
    given = harness("models.utils").normalize_gen_kwargs(dict(settings), MAX_GEN_TOKENS)
    greedy = not given.pop("do_sample", False)
    temperature = given.pop("temperature", 1.0)
    chosen = Generation(
        until=[stop for stop in given.pop("until") if stop],
        max_gen_toks=given.pop("max_gen_toks"),
        temperature=0.0 if greedy else temperature,
        top_p=given.pop("top_p", 1.0),
    )
    if greedy:
        given.pop("top_k", None)
    if given.get("num_beams") == 1:
        del given["num_beams"]
    if given:
        raise ShortGPTError(
            f"generation settings {given} have no meaning for a Llama in Meta's format; it knows "
            "do_sample, temperature, top_p, until and max_gen_toks"
        )
    return chosen


def _score(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Nats of the tokens that the last (S, V) logits predict, and whether all are likeliest.

    The logits are those of all that was read: of context and continuation, without the last token.
    """
    targets = torch.tensor(continuation, device=logits.device)
    logits = logits[-len(targets) :]  # row i of (T, V) predicts token i of the continuation
    nats = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == targets).all())
