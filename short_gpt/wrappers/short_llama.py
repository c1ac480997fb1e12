"""ShortGPT for a Llama in Meta's format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import torch

from llama import Llama
from llama.tokenizer import find_tokenizer
from short_gpt.checkpoints.meta import save_meta
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.target import Target
from short_gpt.checkpoints.verify import check_same, fingerprint_aligned, one_by_one
from short_gpt.evaluation.harness import llama_lm
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.models.computation import params_entries
from short_gpt.models.meta import MetaDecoder
from short_gpt.models.reference import ReferenceLlama
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.short_model import ShortModel
from short_gpt.wrappers.streamed_llama import StreamedLlama


class ShortLlama(ShortModel):
    """Scores and removes layers of a `llama.Llama`, or of an instance of Meta's own ``Llama``.

    The model is read only through hooks on ``llama.model.layers``.

    Args:
        llama: has ``model`` and ``tokenizer``.
        n_prune_layers: how many layers `remove_layers` takes out; may be set later.

    Example:
        >>> short = ShortLlama(llama, n_prune_layers=9)  # doctest: +SKIP
        >>> short.eval_importance([short.encode(text)])  # doctest: +SKIP
        >>> short.remove_layers()  # doctest: +SKIP
        [27, 26, 25, 28, 24, 29, 23, 21, 22]
    """

    def __init__(self, llama: ReferenceLlama, n_prune_layers: int | None = None) -> None:
        super().__init__(MetaDecoder(llama.model), n_prune_layers)
        self.llama = llama

    @property
    def configuration(self) -> Mapping[str, object]:
        return params_entries(self.llama.model.params)

    @overload
    @classmethod
    def from_checkpoint(
        cls,
        ckpt_dir: str | os.PathLike[str],
        n_prune_layers: int | None = ...,
        *,
        tokenizer_path: str | os.PathLike[str] | None = ...,
        max_seq_len: int = ...,
        max_batch_size: int = ...,
        device: str | None = ...,
        dtype: str | None = ...,
        stream: Literal[False] = ...,
    ) -> ShortLlama: ...

    @overload
    @classmethod
    def from_checkpoint(
        cls,
        ckpt_dir: str | os.PathLike[str],
        n_prune_layers: int | None = ...,
        *,
        tokenizer_path: str | os.PathLike[str] | None = ...,
        max_seq_len: int = ...,
        max_batch_size: int = ...,
        device: str | None = ...,
        dtype: str | None = ...,
        stream: Literal[True],
        max_memory: str | int | None = ...,
    ) -> StreamedLlama: ...

    @classmethod
    def from_checkpoint(
        cls,
        ckpt_dir: str | os.PathLike[str],
        n_prune_layers: int | None = None,
        *,
        tokenizer_path: str | os.PathLike[str] | None = None,
        max_seq_len: int = 2048,
        max_batch_size: int = 1,
        device: str | None = None,
        dtype: str | None = None,
        stream: bool = False,
        max_memory: str | int | None = None,
    ) -> ShortLlama | StreamedLlama:
        """Opens a checkpoint directory, in memory or to be streamed.

        Args:
            ckpt_dir: in Meta's format; with ``stream`` also a Llama of Hugging Face's format.
            n_prune_layers: how many layers `remove_layers` takes out; may be set later.
            tokenizer_path: tokenizer file; None looks beside the checkpoint.
            max_seq_len: longest window, in tokens.
            max_batch_size: most windows read at once.
            device: None takes CUDA, MPS or CPU, the first there is.
            dtype: of weights and states; None is float32 on CPU, bfloat16 on CUDA, else float16.
            stream: whether to hold one layer at a time: a `StreamedLlama`, which scores
                and removes but does not generate.
            max_memory: of the process when streamed, in bytes or like "3GB"; None takes half of
                what is free.

        Raises:
            FileNotFoundError: a file is missing.
            ShortGPTError: a file is damaged or does not fit the others, or ``max_memory`` is too
                little or given without ``stream``.
        """
        if stream:
            return StreamedLlama(
                ckpt_dir,
                n_prune_layers,
                tokenizer_path=tokenizer_path,
                max_seq_len=max_seq_len,
                batch_size=max_batch_size,
                device=device,
                dtype=dtype,
                max_memory=max_memory,
            )
        if max_memory is not None:
            raise ShortGPTError(
                "max_memory bounds a streamed model; pass stream as well, or leave it out"
            )
        path = tokenizer_path or find_tokenizer(ckpt_dir)
        llama = Llama.build(ckpt_dir, path, max_seq_len, max_batch_size, device=device, dtype=dtype)
        return cls(llama, n_prune_layers)

    def encode(self, text: str) -> list[int]:
        bos = getattr(self.llama.tokenizer, "add_bos", True)
        return self.llama.tokenizer.encode(text, bos=bos, eos=False)

    def eval_importance(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int = 0,
        temperature: float = 0.6,
        top_p: float = 0.9,
        angular: bool = False,
    ) -> None:
        """Scores one batch of prompts and adds it to the scores so far.

        Args:
            prompt_tokens: B lists of token ids, of any lengths up to ``max_seq_len``.
            max_gen_len: if positive, prompts are scored with a continuation of so many tokens.
            temperature: of that generation.
            top_p: of that generation.
            angular: accepted for older scripts; one pass always gives both measures.

        Raises:
            ShortGPTError: a prompt is empty, too long, or holds ids outside the vocabulary.
            NotFiniteError: a state is NaN or infinite; nothing of the batch is counted.
        """
        if max_gen_len > 0:
            prompt_tokens, _ = self.llama.generate(
                prompt_tokens, max_gen_len, temperature, top_p, echo=True
            )
        self.measure(prompt_tokens, batch_size=max(len(prompt_tokens), 1), progress=False)

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]:
        """The ``count`` likeliest next tokens; nothing ends them early."""
        tokens = torch.tensor([ids], device=self.decoder.device)
        start = 0
        for _ in range(count):
            if use_cache:
                # only what the cache does not hold yet: the prompt, then one token a step
                logits = self.llama.model(tokens[:, start:], start)
                start = tokens.shape[1]
            else:
                logits = self.decoder.logits(tokens)
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
        return tokens[0, len(ids) :].tolist()

    @property
    def stop_tokens(self) -> frozenset[int]:
        tokenizer = self.llama.tokenizer
        return frozenset(getattr(tokenizer, "stop_tokens", None) or {tokenizer.eos_id})

    def generate(
        self,
        prompts: Sequence[str],
        max_gen_len: int = 50,
        temperature: float = 0.6,
        top_p: float = 0.9,
    ) -> list[str]:
        done = self.llama.text_completion(prompts, temperature, top_p, max_gen_len)
        return [str(prediction["generation"]) for prediction in done]

    def harness_model(self, *, batch_size: int = 1) -> object:
        return llama_lm(self, batch_size=batch_size)

    def save(
        self,
        out_dir: str | os.PathLike[str],
        *,
        ckpt_dir: str | os.PathLike[str] | None = None,
        facts: Mapping[str, object] | None = None,
        measured: Mapping[str, Perplexity] | None = None,
        provenance: Mapping[str, object] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes the checkpoint with the layers removed, in Meta's format.

        The source's bytes are copied tensor by tensor: its dtype and sharding stay, and
        `Llama.build` on the result gives the logits of the model in memory bit for bit. Weights
        that a patch or `remove_sublayers` changed are written as they are now, in the source's
        dtype; that takes a source of one file.

        Args:
            out_dir: the new directory; appears whole or not at all.
            ckpt_dir: the source; None takes the one that ``Llama.build`` loaded.
            facts: as in `ScoredModel.save`.
            measured: as in `ScoredModel.save`.
            provenance: the older name of ``facts``.
            overwrite: whether an existing pruned checkpoint is replaced; nothing else ever is.

        Raises:
            RuntimeError: nothing was removed, or weights were changed and what was saved, read
                again, is not the model in memory; it is deleted.
            ShortGPTError: no source is known, or it has another number of layers; or weights were
                changed and it has several files or several ranks share the model; or a fact has
                the name of a record of the library's own.
            FileExistsError: ``out_dir`` exists.
        """
        source = ckpt_dir or getattr(self.llama, "ckpt_dir", None)
        if source is None:
            raise ShortGPTError(
                "pass ckpt_dir: this Llama does not know where its weights came from"
            )
        facts = {**(facts or {}), **(provenance or {})}
        record = Provenance.of(self, source, facts=facts, measured=measured)
        path = getattr(self.llama, "tokenizer_path", None)
        verify = self._verify if isinstance(self.llama, Llama) else None
        target = Target(out_dir, "meta", overwrite, verify)
        return save_meta(self, target, source=source, record=record, tokenizer_path=path)

    def _verify(self, directory: Path) -> None:
        # not called for an instance of the reference's own package, which may round otherwise
        count = max(min(8, self._max_seq_len // 2), 1)
        check_same(
            *one_by_one(
                lambda: fingerprint_aligned(self, count),
                lambda: fingerprint_aligned(self._read_again(directory), count),
            )
        )

    def _read_again(self, directory: Path) -> ShortLlama:
        dtype, device = self._layers_run_in()
        tokenizer, size = find_tokenizer(directory), self._max_seq_len
        return ShortLlama(Llama.build(directory, tokenizer, size, 1, device=device, dtype=dtype))

    @property
    def _max_seq_len(self) -> int:
        return self.decoder.max_seq_len or 2048
