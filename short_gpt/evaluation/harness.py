"""Models as the lm-evaluation-harness knows them: its own class for transformers, ours for Meta's.

lm-eval's class on a ``LlamaForCausalLM`` of a Llama's own weights gives the same results, but needs
the package protobuf for Llama 2's tokenizer and a file of it, one rank, and copies of all q and k
projections; and it reads names of special tokens in a text as these tokens.

Shapes: B requests, S tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from llama import Llama
from short_gpt.data.windows import batches
from short_gpt.models.decoder import Decoder, in_own_dtype, pad
from short_gpt.runtime.errors import ShortGPTError, required
from short_gpt.runtime.progress import bar

# context and continuation as texts (None for a window of a longer text) and as token ids
Request = tuple[tuple[str, str] | None, list[int], list[int]]
Instance = Any  # lm-eval's request, whose ``args`` are a text, or a text and settings
MAX_GEN_TOKENS = 256  # lm-eval's value for a task that names none


class LlamaLike(Protocol):
    """What `llama_lm` asks of a model of this library."""

    decoder: Decoder

    @property
    def llama(self) -> Llama: ...

    def encode(self, text: str) -> list[int]: ...


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def harness(module: str) -> ModuleType:
    """A module of lm-eval, as in ``harness("api.model")``; MissingPackageError without lm-eval."""
    with required("lm_eval", by="evaluation on tasks"):
        return import_module(f"lm_eval.{module}")


def hugging_face_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, batch_size: int = 1
) -> object:
    """A model of transformers as ``lm_eval.models.huggingface.HFLM``, its softmax in float32.

    That class puts the model into evaluation mode, in which it stays.
    """
    if tokenizer is None:
        raise ShortGPTError("pass tokenizer=... to ShortHFModel: tasks are texts")
    hflm = harness("models.huggingface").HFLM
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every model that is loaded already
    try:
        return hflm(
            model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it may get a padding token
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
    finally:
        logger.setLevel(level)


def llama_lm(short: LlamaLike, *, batch_size: int = 1) -> object:
    """A Llama as the lm-evaluation-harness knows models, for ``lm_eval.simple_evaluate``.

    Its softmax is in float32, and the tokenizer decides what is put before a text. Special tokens
    are never read from the text. The model is not copied.
    """
    template = harness("api.model").TemplateLM
    return type("LlamaLM", (_LlamaLM, template), {})(short, batch_size)


class _LlamaLM:
    """The methods that lm-eval's ``TemplateLM``, mixed in, asks for, as in its ``HFLM``."""

    def __init__(self, short: LlamaLike, batch_size: int) -> None:
        super().__init__()
        self.short, self.batch_size = short, batch_size
        self.max_length = short.decoder.max_seq_len
        self._tokenizer = short.llama.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before what has no context: bos, or eos where there is none."""
        bos = self._tokenizer.bos_id
        return bos if bos >= 0 else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        if add_special_tokens is None:
            return self.short.encode(string)
        return self._tokenizer.encode(string, bos=add_special_tokens, eos=False)

    def tok_decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        requests_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length or not context:
                raise ShortGPTError(
                    f"a request has {len(context)} tokens of context and {len(continuation)} to "
                    f"predict; this model takes 1 or more and 1 to {self.max_length} (max_seq_len)"
                )
            # The last token is only predicted, not read; requests that differ in it share one pass.
            read = (context + continuation)[-self.max_length - 1 : -1]
            requests_of[tuple(read)].append(i)
        scores: dict[int, tuple[float, bool]] = {}
        total = len(requests)
        with bar("loglikelihood", total=total, unit="request", show=not disable_tqdm) as shown:
            for batch in batches(sorted(requests_of, key=len, reverse=True), self.batch_size):
                tokens, _ = pad(batch, self.short.decoder)
                with in_own_dtype(self.short.decoder):  # as lm-eval's own class does
                    logits = self.short.decoder.logits(tokens)  # (B, S, V)
                for window, row in zip(batch, logits, strict=True):
                    for i in requests_of[window]:
                        scores[i] = _score(row[: len(window)], requests[i][2])
                    shown.update(len(requests_of[window]))
        return [scores[i] for i in range(total)]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of full texts, each token predicted once, after as much context as fits.

        As in lm-eval's ``HFLM``, the first token is predicted after the prefix token. Where the
        tokenizer itself puts bos first, that is log P(bos | bos): it counts in every text, and is
        all that an empty text has.
        """
        utils = harness("utils")
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (nats, _) in zip(owners, scores, strict=True):
            totals[i] += nats
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts up to a stop string, greedy unless the task says otherwise."""
        texts, total = [], len(requests)
        with bar("generate_until", total=total, unit="request", show=not disable_tqdm) as shown:
            for request in requests:
                texts.append(self._generate(*request.args))
                shown.update(1)
        return texts

    def _generate(self, text: str, settings: Mapping[str, object]) -> str:
        stops, limit, temperature, top_p = _generation(settings)
        room = self.max_length - limit
        if room < 1:
            raise ShortGPTError(
                f"{limit} tokens to generate leave no room for a prompt: the model takes "
                f"{self.max_length} (max_seq_len)"
            )
        prompt = self.tok_encode(text)[-room:] or [self.prefix_token_id]

        def ended(new: list[int]) -> bool:
            answer = self.tok_decode(new)
            return any(stop in answer for stop in stops)

        llama = self.short.llama
        # Meta's own cannot be asked while it runs, and goes on behind the stop string
        ends: dict[str, Any] = {"ended": ended} if isinstance(llama, Llama) else {}
        (new,), _ = llama.generate([prompt], limit, temperature, top_p, **ends)
        answer = self.tok_decode(new)
        return answer[: min((answer.find(s) for s in stops if s in answer), default=None)]


def _generation(settings: Mapping[str, object]) -> tuple[list[str], int, float, float]:
    """Stop strings, most tokens, temperature and top_p; an error for settings without effect."""
    rest = harness("models.utils").normalize_gen_kwargs(dict(settings), MAX_GEN_TOKENS)
    greedy = not rest.pop("do_sample", False)
    temperature = rest.pop("temperature", 1.0)
    stops = [stop for stop in rest.pop("until") if stop]
    limit, top_p = rest.pop("max_gen_toks"), rest.pop("top_p", 1.0)
    if greedy:
        rest.pop("top_k", None)
    if rest.get("num_beams") == 1:
        del rest["num_beams"]
    if rest:
        raise ShortGPTError(
            f"generation settings {rest} have no meaning for a Llama in Meta's format; it knows "
            "do_sample, temperature, top_p, until and max_gen_toks"
        )
    return stops, limit, 0.0 if greedy else temperature, top_p


def _score(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Nats of a continuation, and whether it is greedy, from the (S, V) logits of what was read."""
    targets = torch.tensor(continuation, device=logits.device)
    logits = logits[-len(targets) :]  # row i of (T, V) predicts token i of the continuation
    nats = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == targets).all())
