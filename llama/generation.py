"""Building a model from a checkpoint directory and generating with it: the reference's API.

Shapes: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch

from llama.checkpoint.meta import Checkpoint, check_vocabulary
from llama.dialog import UNSAFE_ERROR, Dialog, Message, encode_dialog, is_unsafe
from llama.errors import InputError
from llama.loading import load_model
from llama.model import Transformer
from llama.parallel import choose_device, choose_dtype, initialize
from llama.sampling import Sampling, decode, sample_top_p
from llama.tokenizer import Tokenizer

__all__ = ["ChatPrediction", "CompletionPrediction", "Details", "Llama", "sample_top_p"]


class Details(TypedDict, total=False):
    """Tokens as texts and their log probabilities in nats, only if asked for."""

    tokens: list[str]
    logprobs: list[float]


class CompletionPrediction(Details):
    """A completed text."""

    generation: str


class ChatPrediction(Details):
    """An assistant's answer."""

    generation: Message


def check_numbers(max_gen_len: int, temperature: float, top_p: float) -> None:
    """Raises InputError for settings by which nothing can be generated."""
    if max_gen_len < 0:
        raise InputError(f"max_gen_len must be 0 or more, got {max_gen_len}")
    if not 0 <= temperature < math.inf or not 0 <= top_p <= 1:
        raise InputError(
            f"expected a temperature of 0 or more and a top_p in 0..1, got {temperature} and "
            f"{top_p}"
        )


class Llama:
    """A Transformer and its tokenizer; `build` makes one from a checkpoint directory.

    Attributes:
        model: the `Transformer`.
        tokenizer: the `Tokenizer`.
        ckpt_dir: where the weights came from, or None.
    """

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
        ckpt_dir: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str],
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Llama:
        """Loads a Llama 2 or Llama 3 checkpoint in Meta's format.

        Everything that can be wrong with the files is found before weights are read.

        Args:
            ckpt_dir: directory with ``params.json`` and ``consolidated.*.pth``.
            tokenizer_path: SentencePiece model, tiktoken ranks or ``tokenizer.json``.
            max_seq_len: longest prompt plus generation, in tokens.
            max_batch_size: most prompts in one call of `generate`.
            model_parallel_size: ranks that share the model (torchrun); None: all running ranks.
                Any number of files loads on any number of ranks that divides the heads.
            seed: of the sampling; equal on all ranks of a model.
            device: None takes CUDA, MPS or CPU, the first there is.
            dtype: of weights and states; None is float32 on CPU, bfloat16 on CUDA, else float16.

        Raises:
            FileNotFoundError: a file is missing.
            InputError: a file is damaged or does not fit the others, or the model does not divide
                among the ranks.
        """
        on_device = choose_device(device)
        weights_dtype = choose_dtype(dtype, on_device)
        limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        tokenizer = Tokenizer(tokenizer_path)
        checkpoint = Checkpoint(ckpt_dir, **limits)
        check_vocabulary(checkpoint, tokenizer, tokenizer_path)
        initialize(model_parallel_size, device=on_device)
        model = load_model(checkpoint, device=on_device, dtype=weights_dtype)
        return Llama(
            model,
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
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continues prompts of any lengths, all at once.

        The batch starts at the end of the shortest prompt and moves one position at a time; a
        longer prompt's own tokens take precedence, so the model never sees padding.

        Args:
            prompt_tokens: B lists of token ids, none empty.
            max_gen_len: most tokens to add to each prompt.
            temperature: 0 takes the likeliest token; higher values sample more evenly.
            top_p: samples from the smallest set of tokens whose probability exceeds this.
            logprobs: whether to return log probabilities.
            echo: whether the results start with the prompt.

        Returns:
            B lists of tokens, ending before the first stop token, and, with ``logprobs``, B
            lists of their log probabilities in nats (a prompt's first token has 0), else None.

        Raises:
            InputError: a prompt is empty or longer than ``max_seq_len``, ``max_batch_size`` is
                exceeded, or a token id is not in the vocabulary.
        """
        self._check_prompts(prompt_tokens)
        check_numbers(max_gen_len, temperature, top_p)
        lengths = [len(t) for t in prompt_tokens]
        total = min(self.model.params.max_seq_len, max_gen_len + max(lengths))
        sampling = Sampling(temperature, top_p, self._generator, logprobs)
        stops = self._stop_tokens()
        tokens, scores = decode(self.model, prompt_tokens, total, stops, sampling=sampling)
        out_tokens, out_scores = [], []
        for row, row_scores, length in zip(tokens.tolist(), scores.tolist(), lengths, strict=True):
            end = self._end(row, length, min(total, length + max_gen_len))
            start = 0 if echo else length
            out_tokens.append(row[start:end])
            out_scores.append(row_scores[start:end])
        return out_tokens, out_scores if logprobs else None

    def _check_prompts(self, prompt_tokens: Sequence[Sequence[int]]) -> None:
        params = self.model.params
        if not 0 < len(prompt_tokens) <= params.max_batch_size:
            raise InputError(
                f"expected 1 to max_batch_size = {params.max_batch_size} prompts, "
                f"got {len(prompt_tokens)}"
            )
        for i, prompt in enumerate(prompt_tokens):
            if isinstance(prompt, int):
                raise InputError("expected a list of prompts, each a list of token ids, got one")
            if not 0 < len(prompt) <= params.max_seq_len:
                raise InputError(
                    f"prompt {i} has {len(prompt)} tokens; expected 1 to max_seq_len = "
                    f"{params.max_seq_len}"
                )
            if min(prompt) < 0 or max(prompt) >= params.vocab_size:
                raise InputError(
                    f"prompt {i} has token ids outside 0..{params.vocab_size - 1}: "
                    f"{min(prompt)}..{max(prompt)}"
                )

    def _stop_tokens(self) -> list[int]:
        return sorted(getattr(self.tokenizer, "stop_tokens", None) or {self.tokenizer.eos_id})

    def _end(self, row: list[int], start: int, limit: int) -> int:
        """Where the generation that begins at ``start`` ends: the first stop token or the limit."""
        stops = self._stop_tokens()
        return next((i for i in range(start, limit) if row[i] in stops), limit)

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
        length = self._gen_len(max_gen_len)
        tokens, scores = self.generate(
            self._encoded(prompts), length, temperature, top_p, logprobs, echo
        )
        return [
            {"generation": self.tokenizer.decode(ids), **self._details(ids, scores, i)}
            for i, ids in enumerate(tokens)
        ]

    def _encoded(self, prompts: Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise InputError("expected a list of prompts, got one string: pass [prompt]")
        add_bos = self.tokenizer.add_bos
        return [self.tokenizer.encode(p, bos=add_bos, eos=False) for p in prompts]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Answers dialogs in the format of the tokenizer's family, Llama 2 or Llama 3.

        Args:
            dialogs: lists of ``{"role", "content"}``: an optional system message, then user and
                assistant in turn, a user last. Others arguments as in `text_completion`.

        Raises:
            InputError: roles out of order, or a tokenizer of neither family.
        """
        encoded = [encode_dialog(self.tokenizer, dialog) for dialog in dialogs]
        tokens, scores = self.generate(
            encoded, self._gen_len(max_gen_len), temperature, top_p, logprobs
        )
        results: list[ChatPrediction] = []
        for i, (ids, dialog) in enumerate(zip(tokens, dialogs, strict=True)):
            unsafe = is_unsafe(self.tokenizer, dialog)
            text = UNSAFE_ERROR if unsafe else self.tokenizer.decode(ids)
            answer: Message = {"role": "assistant", "content": text}
            results.append({"generation": answer, **self._details(ids, scores, i)})
        return results

    def _details(self, ids: list[int], scores: list[list[float]] | None, i: int) -> Details:
        """The tokens of a prediction as texts, and their log probabilities, if asked for."""
        if scores is None:
            return {}
        return {"tokens": [self.tokenizer.decode([t]) for t in ids], "logprobs": scores[i]}

    def _gen_len(self, max_gen_len: int | None) -> int:
        return self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len
