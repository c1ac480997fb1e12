"""Building a model from a checkpoint directory and generating with it: the reference's API.

Shapes: B prompts, S new positions, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.args import check_split
from llama.checkpoint.meta import LAYER_NAME, Checkpoint, check_vocabulary, split_dim
from llama.errors import InputError, check
from llama.files import StrPath
from llama.model import Transformer
from llama.parallel import (
    choose_device,
    choose_dtype,
    initialize,
    model_parallel_rank,
    model_parallel_size,
)
from llama.tokenizer import UNSAFE_ERROR, Dialog, Message, Tokenizer, encode_dialog, is_unsafe

FIRST_CHECK = 32  # tokens until `ended` is called; stop strings mostly come early
COLDEST = 1e-6  # temperatures below take the likeliest token: they could round to 0 in float32


class Details(TypedDict, total=False):
    """Tokens as texts and their log probabilities in nats; empty without ``logprobs``."""

    tokens: list[str]
    logprobs: list[float]


class CompletionPrediction(Details):
    """A completed text."""

    generation: str


class ChatPrediction(Details):
    """An assistant's answer."""

    generation: Message


class Llama:
    """A Transformer and its tokenizer; `build` makes one from a checkpoint directory."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int = 1,
        ckpt_dir: Path | None = None,
        tokenizer_path: Path | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.ckpt_dir = ckpt_dir
        self.tokenizer_path = tokenizer_path
        self._generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)

    @staticmethod
    def build(
        ckpt_dir: StrPath,
        tokenizer_path: StrPath,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Llama:
        """Loads a Llama 2 or Llama 3 checkpoint in Meta's format; files are checked before weights.

        Args:
            ckpt_dir: Directory with ``params.json`` and ``consolidated.*.pth``.
            tokenizer_path: SentencePiece model, tiktoken ranks or ``tokenizer.json``.
            max_seq_len: Longest prompt plus generation, in tokens.
            max_batch_size: Most prompts in one call of `generate`.
            model_parallel_size: Ranks that share the model (torchrun), any number that divides the
                heads. Default: all running ranks.
            seed: Seed of the sampling; equal on all ranks of a model. Default: 1.
            device: Device of the model. Default: CUDA, MPS or CPU, the first there is.
            dtype: Dtype of weights and hidden states. Default: float32 on CPU, bfloat16 on CUDA,
                float16 elsewhere.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        tokenizer = Tokenizer(tokenizer_path)
        checkpoint = Checkpoint(ckpt_dir, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        check_vocabulary(
            tokenizer, tokenizer_path, checkpoint.args.vocab_size, checkpoint.directory
        )
        initialize(model_parallel_size, device=device)
        return Llama(
            load_model(checkpoint, device=device, dtype=dtype),
            tokenizer,
            seed=seed,
            ckpt_dir=checkpoint.directory,
            tokenizer_path=Path(str(tokenizer_path)),
        )

    @torch.no_grad()
    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        ended: Callable[[list[int]], bool] | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continues prompts of any lengths, all at once.

        The batch starts at the end of the shortest prompt; a longer prompt's own tokens take
        precedence, so the model never sees padding.

        Args:
            prompt_tokens: B lists of token ids, none empty or longer than ``max_seq_len``.
            max_gen_len: Most tokens to add to each prompt.
            temperature: 0 takes the likeliest token; higher values sample more evenly.
            top_p: Probability that the smallest set of tokens to sample from exceeds.
            logprobs: Return log probabilities. Default: False.
            echo: Start the results with the prompt. Default: False.
            ended: Says of a prompt's new tokens that no more are needed, as after a stop string;
                called after 32 new tokens, 64 later, 128 later, and so on. Default: None.

        Returns:
            B lists of tokens, ending before the first stop token, and, with ``logprobs``, B
            lists of their log probabilities in nats (a prompt's first token has 0), else None.
        """
        self._check_prompts(prompt_tokens)
        check_numbers(max_gen_len, temperature, top_p)
        lengths = [len(t) for t in prompt_tokens]
        total = min(self.model.params.max_seq_len, max_gen_len + max(lengths))
        choose = partial(_choose, temperature=temperature, top_p=top_p, generator=self._generator)
        stops = sorted(getattr(self.tokenizer, "stop_tokens", None) or {self.tokenizer.eos_id})
        tokens, scores = _decode(self.model, prompt_tokens, total, stops, choose, logprobs, ended)
        out_tokens, out_scores = [], []
        for row, row_scores, length in zip(tokens.tolist(), scores.tolist(), lengths, strict=True):
            limit = min(len(row), length + max_gen_len)
            end = next((i for i in range(length, limit) if row[i] in stops), limit)
            start = 0 if echo else length
            out_tokens.append(row[start:end])
            out_scores.append(row_scores[start:end])
        return out_tokens, out_scores if logprobs else None

    def _check_prompts(self, prompt_tokens: Sequence[Sequence[int]]) -> None:
        params, count = self.model.params, len(prompt_tokens)
        most = f"1 to max_batch_size = {params.max_batch_size}"
        check(0 < count <= params.max_batch_size, "number of prompts", count, most)
        for i, prompt in enumerate(prompt_tokens):
            check(not isinstance(prompt, int), f"prompt {i}", prompt, "a list of token ids")
            most = f"1 to max_seq_len = {params.max_seq_len}"
            check(0 < len(prompt) <= params.max_seq_len, f"tokens of prompt {i}", len(prompt), most)
            ends, last = [min(prompt), max(prompt)], params.vocab_size - 1
            check(ends[0] >= 0 and ends[1] <= last, f"ids in prompt {i}", ends, f"0 to {last}")

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Completes texts; arguments as in `generate`, ``max_gen_len`` None means as long as fits.

        Example:
            >>> llama.text_completion(["I am an avid fan of "], max_gen_len=20)  # doctest: +SKIP
            [{'generation': 'the Harry Potter series...'}]
        """
        check(not isinstance(prompts, str), "prompts", prompts, "a list of texts")
        encoded = [self.tokenizer.encode(p, bos=self.tokenizer.add_bos, eos=False) for p in prompts]
        length = self._gen_len(max_gen_len)
        tokens, scores = self.generate(encoded, length, temperature, top_p, logprobs, echo)
        return [
            {"generation": self.tokenizer.decode(ids), **self._details(ids, scores, i)}
            for i, ids in enumerate(tokens)
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Answers dialogs in the tokenizer family's format; arguments as in `text_completion`.

        ``dialogs`` are lists of ``{"role", "content"}``: an optional system message, then user and
        assistant in turn, a user last.
        """
        encoded = [encode_dialog(self.tokenizer, dialog) for dialog in dialogs]
        length = self._gen_len(max_gen_len)
        tokens, scores = self.generate(encoded, length, temperature, top_p, logprobs)
        results: list[ChatPrediction] = []
        for i, (ids, dialog) in enumerate(zip(tokens, dialogs, strict=True)):
            unsafe = is_unsafe(self.tokenizer, dialog)
            text = UNSAFE_ERROR if unsafe else self.tokenizer.decode(ids)
            answer: Message = {"role": "assistant", "content": text}
            results.append({"generation": answer, **self._details(ids, scores, i)})
        return results

    def _details(self, ids: list[int], scores: list[list[float]] | None, i: int) -> Details:
        """The tokens of a prediction as texts, and their log probabilities, if there are any."""
        if scores is None:
            return {}
        return {"tokens": [self.tokenizer.decode([t]) for t in ids], "logprobs": scores[i]}

    def _gen_len(self, max_gen_len: int | None) -> int:
        return self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len


def load_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The checkpoint's Transformer on any number of ranks that divides the heads.

    Each rank maps its own file if there is one, else it joins each tensor and copies its part. Tied
    weights stay tied.
    """
    rank, ranks = model_parallel_rank(), model_parallel_size()
    check_split(checkpoint.args, ranks)
    by_vocabulary, file_per_rank = checkpoint.vocab_parallel, len(checkpoint.shards) == ranks
    model = Transformer(checkpoint.args, vocab_parallel=by_vocabulary, device="meta")
    state: dict[str, nn.Parameter] = {}
    parameters: dict[object, nn.Parameter] = {}
    for names in _mapped_groups(checkpoint, file_per_rank):
        with checkpoint.mapped():
            for name in names:
                # what shares its bytes in the files does so on a rank too, if it is cut alike
                dim = split_dim(name, vocab_parallel=by_vocabulary) if ranks > 1 else None
                source = (checkpoint.infos[name].storage, dim)
                if source not in parameters:
                    part = checkpoint.read(name, rank=rank, ranks=ranks)
                    # a copy where the part is not the file's: a view would keep other parts mapped
                    layout = torch.contiguous_format
                    part = part.to(device, dtype, copy=not file_per_rank, memory_format=layout)
                    parameters[source] = nn.Parameter(part)
                state[name] = parameters[source]
    # assign: the parameters on "meta" have no memory that values could be copied to
    model.load_state_dict(state, strict=True, assign=True)
    model.freqs_cis = model.freqs_cis.to(device)
    return model.eval()


def _mapped_groups(checkpoint: Checkpoint, file_per_rank: bool) -> list[list[str]]:
    """Names read while the files are mapped once: all, or a layer's, as pages count as memory."""
    groups: dict[str, list[str]] = {}
    for name in sorted(checkpoint.infos.keys() - checkpoint.ignored):
        layer = LAYER_NAME.fullmatch(name)
        groups.setdefault(layer[1] if layer and not file_per_rank else "", []).append(name)
    return list(groups.values())


def check_numbers(max_gen_len: int, temperature: float, top_p: float) -> None:
    """Raises InputError for settings by which nothing can be generated."""
    check(max_gen_len >= 0, "max_gen_len", max_gen_len, "0 or more")
    check(0 <= temperature < math.inf, "temperature", temperature, "a finite number from 0 on")
    check(0 <= top_p <= 1, "top_p", top_p, "0 to 1")


def check_logits(logits: Tensor) -> None:
    """Raises InputError for logits from which no token can be chosen; -inf forbids a token."""
    if not (logits < torch.inf).all():  # NaN is not below it either
        raise InputError(
            "the model gives NaN or infinite logits: a weight is damaged, or the dtype cannot hold "
            "its values; open it in float32"
        )


def _choose(
    logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator
) -> Tensor:
    """A token for each row of logits: (B, V) to (B,); InputError if they are NaN."""
    check_logits(logits)
    if temperature < COLDEST:
        return logits.argmax(-1)
    # the largest is 0 after the shift, so that no temperature makes it overflow
    shifted = (logits - logits.amax(-1, keepdim=True)) / temperature
    return sample_top_p(torch.softmax(shifted, dim=-1), top_p, generator=generator)


def sample_top_p(probs: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Draws a token from the nucleus (Holtzman et al. 2019, arXiv:1904.09751): (B, V) to (B,).

    The nucleus is the smallest set of likeliest tokens whose probability exceeds p; p = 0 takes
    the likeliest token. The rows of ``probs`` sum to 1.
    """
    ordered, index = probs.sort(dim=-1, descending=True)  # (B, V) each
    # Exclusive sums: the token with which p is passed still belongs, the first one always does.
    before = ordered.cumsum(dim=-1) - ordered
    nucleus = torch.where(before > p, 0.0, ordered)
    # (B, 1) positions in the order; multinomial itself divides the rows by their sums
    choice = torch.multinomial(nucleus, 1, generator=generator)
    return index.gather(-1, choice).squeeze(-1)


def _decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    total: int,
    stop_tokens: Sequence[int],
    choose: Callable[[Tensor], Tensor],
    logprobs: bool,
    ended: Callable[[list[int]], bool] | None,
) -> tuple[Tensor, Tensor]:
    """Fills T <= ``total`` positions, until every prompt is at its end: (B, T) tokens, nats."""
    device = next(model.parameters()).device
    tokens = torch.zeros(len(prompts), total, dtype=torch.long)
    is_prompt = torch.zeros(len(prompts), total, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        is_prompt[row, : len(prompt)] = True
    tokens, is_prompt = tokens.to(device), is_prompt.to(device)  # (B, T) each
    scores = torch.zeros(tokens.shape, device=device)
    stop = torch.tensor(stop_tokens, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    previous, shortest, next_check = 0, min(len(p) for p in prompts), FIRST_CHECK
    # A prompt that fills all positions still gets its own log probabilities.
    for position in range(shortest, total + (logprobs and shortest == total)):
        # only the positions that are not in the cache: the prompts at first, then one at a time
        states = model.hidden(tokens[:, previous:position], previous)  # (B, S, D)
        logits = model.head(states if logprobs else states[:, -1:])  # (B, S or 1, V)
        if position < total:
            in_prompt = is_prompt[:, position]  # (B,): a longer prompt has its token here
            chosen = torch.where(in_prompt, tokens[:, position], choose(logits[:, -1]))
            tokens[:, position] = chosen
            done |= ~in_prompt & torch.isin(chosen, stop)
            if ended is not None and position + 1 - shortest == next_check:
                rows = tokens[:, : position + 1].tolist()
                new = [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]
                done |= torch.tensor([bool(row) and ended(row) for row in new], device=device)
                next_check += next_check + FIRST_CHECK  # twice as many tokens until the next one
        if logprobs:
            targets = tokens[:, previous + 1 : position + 1]  # (B, S) or, at the end, (B, S - 1)
            predicted = logits[:, : targets.shape[1]].transpose(1, 2)  # (B, V, S)
            nats = F.cross_entropy(predicted, targets, reduction="none")
            scores[:, previous + 1 : position + 1] = -nats
        previous = position
        if done.all():
            return tokens[:, : position + 1], scores[:, : position + 1]
    return tokens, scores
