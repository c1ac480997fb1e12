"""ShortGPT for a Llama in Meta's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import Llama
from llama.tokenizer import encode_dialog, find_tokenizer
from short_gpt.checkpoints.meta import save_meta
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.target import StrPath, Target
from short_gpt.checkpoints.verify import check_same, fingerprint_aligned, one_by_one
from short_gpt.data.texts import check_plain
from short_gpt.data.windows import starts_texts
from short_gpt.evaluation.harness import llama_lm
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.models.decoder import MetaDecoder, in_own_dtype
from short_gpt.models.loading import params_entries, weight_stamps
from short_gpt.runtime.digest import check_unchanged
from short_gpt.runtime.errors import ShortGPTError, check
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.short_model import Prompts, ShortModel


class ShortLlama(ShortModel):
    """Scores a `llama.Llama`, or Meta's own ``Llama``, by hooks on its layers, and removes layers.

    Example:
        >>> short = ShortLlama(llama, n_prune_layers=9)  # doctest: +SKIP
        >>> short.eval_importance([short.encode(text)])  # doctest: +SKIP
        >>> short.remove_layers()  # doctest: +SKIP
        [27, 26, 25, 28, 24, 29, 23, 21, 22]
    """

    def __init__(self, llama: Llama, n_prune_layers: int | None = None) -> None:
        super().__init__(MetaDecoder(llama.model), n_prune_layers)
        self.llama, self.source = llama, getattr(llama, "ckpt_dir", None)
        self._opened = () if self.source is None else weight_stamps(self.source)

    @classmethod
    def from_checkpoint(
        cls, ckpt_dir: StrPath, n_prune_layers: int | None = None, **options: Any
    ) -> ShortLlama:
        """Opens a directory in Meta's format; ``options`` are entries of `OpenOptions` by name.

        `open_model` does so for every format, and streams.
        """
        chosen = OpenOptions(n_prune_layers=n_prune_layers, **options)
        check(not chosen.stream, "stream", True, "open_model(..., stream=True), which streams")
        tokenizer = chosen.tokenizer_path or find_tokenizer(ckpt_dir)
        names = ["max_seq_len", "seed", "device", "dtype", "model_parallel_size"]
        entries = {name: getattr(chosen, name) for name in names}
        entries["max_batch_size"] = chosen.batch_size
        llama = Llama.build(ckpt_dir, tokenizer, **entries)
        return cls(llama, n_prune_layers).in_precision(chosen.precision)

    @property
    def configuration(self) -> Mapping[str, object]:
        return params_entries(self.llama.model.params)

    @property
    def stop_tokens(self) -> frozenset[int]:
        tokenizer = self.llama.tokenizer
        return frozenset(getattr(tokenizer, "stop_tokens", None) or {tokenizer.eos_id})

    def encode(self, text: str) -> list[int]:
        check_plain(text)
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
        """Scores a batch of token ids, each with ``max_gen_len`` new ones; ignores ``angular``."""
        if max_gen_len > 0:
            prompt_tokens = self.llama.generate(
                prompt_tokens, max_gen_len, temperature, top_p, echo=True
            )[0]
        self.measure(prompt_tokens, batch_size=max(len(prompt_tokens), 1), progress=False)

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]:
        # nothing ends the text early
        tokens = torch.tensor([ids], device=self.decoder.device)  # (1, S)
        start = 0
        for _ in range(count):
            if use_cache:
                # only what the cache does not hold yet: the prompt, then one token a step
                logits = self.llama.model(tokens[:, start:], start)  # (1, S - start, V)
                start = tokens.shape[1]
            else:
                with in_own_dtype(self.decoder):
                    logits = self.decoder.logits(tokens)  # (1, S, V)
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)  # (1, S + 1)
        return tokens[0, len(ids) :].tolist()

    @torch.no_grad()
    def continued(
        self, ids: Sequence[Sequence[int]], count: int, choose: Callable[[Tensor], Tensor]
    ) -> None:
        model: Any = self.llama.model
        tokens = torch.tensor(ids, device=self.decoder.device)  # (B, S)
        start, ours = 0, hasattr(model, "hidden")  # the reference's model has no such part
        try:
            for _ in range(count):
                new = tokens[:, start:]  # what the cache does not hold yet
                last = (model.hidden(new, start) if ours else model(new, start))[:, -1]  # (B, D)
                logits, start = model.head(last) if ours else last.float(), tokens.shape[1]
                tokens = torch.cat((tokens, choose(logits)[:, None]), dim=1)  # (B, S + 1)
        finally:
            for layer in model.layers if ours else ():
                layer.attention.cache_k = layer.attention.cache_v = None  # of many texts: large

    def opening(self, *, chat: bool = False) -> list[int]:
        tokenizer = self.llama.tokenizer
        if not chat:
            return [tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id]
        return starts_texts(lambda text: self.dialog([{"role": "user", "content": text}]))

    def dialog(self, messages: Sequence[dict[str, str]], *, answer: bool = False) -> list[int]:
        if getattr(self.llama.tokenizer, "dialog_format", None) is None:
            why = "this tokenizer has neither Llama 2's nor Llama 3's dialog format"
            raise ShortGPTError(f"{why}: open it as GGUF or by transformers, or leave chats out")
        turns: Any = messages
        return encode_dialog(self.llama.tokenizer, turns)

    @property
    def answer_ends(self) -> frozenset[int]:
        return self.stop_tokens

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        return self.llama.tokenizer.decode(ids)

    def _continuations(
        self, prompts: Prompts, count: int, temperature: float, top_p: float
    ) -> list[str]:
        predictions = self.llama.text_completion(prompts, temperature, top_p, count)
        return [str(prediction["generation"]) for prediction in predictions]

    def harness_model(self, *, batch_size: int = 1) -> object:
        return llama_lm(self, batch_size=batch_size)

    def save(
        self,
        out_dir: StrPath,
        *,
        ckpt_dir: StrPath | None = None,
        facts: Mapping[str, object] | None = None,
        measured: Mapping[str, Perplexity] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes the checkpoint in Meta's format; `ScoredModel.save` has most arguments.

        Bytes are copied tensor by tensor: the dtype and sharding stay, and `Llama.build` on the
        result gives the logits of the model in memory bit for bit. Weights that a patch changed are
        written in the source's dtype, if it is one file on one rank.
        ``ckpt_dir`` is the source, if it is not what ``Llama.build`` loaded.
        """
        if (source := ckpt_dir or getattr(self.llama, "ckpt_dir", None)) is None:
            raise ShortGPTError(
                "pass ckpt_dir: this Llama does not know where its weights came from"
            )
        record = Provenance.of(self, source, facts=facts, measured=measured)
        path = getattr(self.llama, "tokenizer_path", None)
        # an instance of the reference's own package may round otherwise
        verify = self._check_saved if isinstance(self.llama, Llama) else None
        target = Target(out_dir, overwrite, verify)
        if ckpt_dir is None:  # what did not change is copied from there
            check_unchanged(self._opened)
        saved = save_meta(self, target, source=source, record=record, tokenizer_path=path)
        if saved.resolve() == Path(source).resolve():
            self._opened = weight_stamps(saved)
        return saved

    def _check_saved(self, directory: Path) -> None:
        size = self.decoder.max_seq_len or 2048
        count = max(min(8, size // 2), 1)  # tokens that are compared
        dtype, device = self.runs_in()

        def saved() -> ShortLlama:
            tokenizer = find_tokenizer(directory)
            llama = Llama.build(directory, tokenizer, size, 1, device=device, dtype=dtype)
            return ShortLlama(llama)

        ours = partial(fingerprint_aligned, self, count)
        check_same(*one_by_one(ours, lambda: fingerprint_aligned(saved(), count)))
