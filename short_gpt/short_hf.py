"""ShortGPT for causal language models of transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama.io.files import new_directory
from llama.io.json_files import write_json
from llama.parallel import choose_device
from short_gpt.checkpoints.card import card_of, provenance
from short_gpt.checkpoints.meta import PROVENANCE
from short_gpt.checkpoints.verify import fingerprint
from short_gpt.data.windows import windows
from short_gpt.evaluation.tasks import hugging_face_lm
from short_gpt.models.hf import HFDecoder
from short_gpt.models.loading import load
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.short_model import ShortModel


class ShortHFModel(ShortModel):
    """Scores and removes layers of a ``transformers`` causal language model.

    Args:
        model_name: a hub id, a local directory, a GGUF file, or a loaded model.
        layers_path: where its layers are, as in ``"model.layers"``; None finds them.
        n_prune_layers: how many layers `remove_layers` takes out; may be set later.
        tokenizer: needed with a loaded model to read texts; None loads the model's own, if it has
            one.
        device: where the model goes when it is loaded; None leaves it where it is loaded to.
        options: passed on to ``from_pretrained``: ``dtype`` (the files' if not given),
            ``device_map``, ``offload_folder``, ``quantization_config``, ``revision`` and the like.

    Attributes:
        model: the ``transformers`` model.
        tokenizer: its tokenizer, or None.
        source: where the model came from.

    Raises:
        MissingPackageError: transformers is missing.
        OSError, ShortGPTError: the model cannot be loaded, or its layers cannot be found.

    Example:
        >>> short = ShortHFModel("mistralai/Mistral-7B-v0.1", n_prune_layers=9)  # doctest: +SKIP
        >>> short.eval_importance([text], max_seq_len=1024)  # doctest: +SKIP
        >>> short.remove_layers()  # doctest: +SKIP
        >>> short.save_pretrained("mistral-5b")  # doctest: +SKIP
    """

    def __init__(
        self,
        model_name: Any,
        layers_path: str | None = None,
        n_prune_layers: int | None = None,
        *,
        tokenizer: Any = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        place = _place(device, options)
        if isinstance(model_name, str | os.PathLike):
            model, tokenizer = load(str(model_name), options, tokenizer)
        elif options:
            raise ShortGPTError(f"options {sorted(options)} are for loading; the model is loaded")
        else:
            model = model_name
        if place is not None and not getattr(model, "is_quantized", False):
            model.to(place)
        decoder = HFDecoder(model.eval(), layers_path)
        super().__init__(decoder, n_prune_layers)
        self._layers_path = decoder.layers_path
        self.model = model
        self.tokenizer = tokenizer
        named = isinstance(model_name, str | os.PathLike)
        self.source = str(model_name) if named else str(model.config.name_or_path or "a model")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts in front."""
        return self._tokenizer()(text, verbose=False)["input_ids"]

    def eval_importance(
        self,
        prompts: Sequence[str],
        max_seq_len: int,
        stride: int = 256,
        max_gen_len: int = 0,
        temperature: float = 0.6,
        top_p: float = 0.9,
        angular: bool = False,
    ) -> None:
        """Scores texts and adds them to the scores so far.

        Args:
            prompts: texts of any length.
            max_seq_len: tokens of a window; longer texts are cut into windows.
            stride: tokens between the starts of windows.
            max_gen_len: if positive, each text's first ``max_seq_len`` tokens are first continued
                by up to so many tokens, and both are scored together.
            temperature, top_p: of that generation.
            angular: accepted for older scripts; one pass always gives both measures.

        Raises:
            ShortGPTError: no text gives a window of two tokens.
            NotFiniteError: a state is NaN or infinite.
        """
        if isinstance(prompts, str):
            raise ShortGPTError("expected a list of texts, got one string: pass [text]")
        if max_gen_len > 0:
            ids = (self.encode(p)[:max_seq_len] for p in prompts)
            self.measure([self._continue(i, max_gen_len, temperature, top_p) for i in ids])
            return
        cut = windows(prompts, self.encode, size=max_seq_len, stride=stride, tail="keep")
        self.measure(cut, progress=False)

    def generate(
        self,
        prompts: Sequence[str],
        max_gen_len: int = 50,
        temperature: float = 0.6,
        top_p: float = 0.9,
    ) -> list[str]:
        """Continues texts, one by one; ``temperature`` 0 takes the likeliest token.

        Raises:
            ShortGPTError: one text instead of a list, or a text without a token.
        """
        if isinstance(prompts, str):
            raise ShortGPTError("expected a list of texts, got one string: pass [text]")
        done = []
        for prompt in prompts:
            ids = self.encode(prompt)
            new = self._continue(ids, max_gen_len, temperature, top_p)[len(ids) :]
            done.append(self._tokenizer().decode(new, skip_special_tokens=True))
        return done

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]:
        """Up to ``count`` likeliest next tokens, by the model's own generation config."""
        tokens = torch.tensor([ids], device=self.decoder.device)
        out = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            use_cache=use_cache,
        )
        return out[0, len(ids) :].tolist()

    @torch.no_grad()
    def _continue(
        self, ids: list[int], max_gen_len: int, temperature: float, top_p: float
    ) -> list[int]:
        if not ids:
            raise ShortGPTError(
                "a text has no tokens to continue; its tokenizer puts none in front"
            )
        tokens = torch.tensor([ids], device=self.decoder.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        out = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_gen_len,
            **sampling,
        )
        return out[0].tolist()

    def save_pretrained(
        self,
        out_dir: str | os.PathLike[str],
        *,
        verify: bool = True,
        overwrite: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes model, config, generation config and tokenizer for plain ``from_pretrained``.

        Beside them stand a model card and ``pruning.json``: the layers removed and kept, their
        scores, the perplexities measured.

        Args:
            out_dir: the new directory; appears whole or not at all.
            facts: more to keep in both, such as ``{"data": "PG-19"}``.
            verify: load the result again and compare: the same logits, bit for bit, and the same
                greedy generation with and without the cache.

            overwrite: whether an earlier pruned model is replaced; nothing else ever is.

        Raises:
            FileExistsError: ``out_dir`` exists.
            RuntimeError: the saved model is not the one in memory, or the model lacks layers for
                a trial; nothing is left behind.
        """

        self.check_whole()
        out, facts = Path(str(out_dir)), facts or {}
        with new_directory(out, marker=PROVENANCE, overwrite=overwrite) as partial:
            self.model.save_pretrained(partial)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)
            card = card_of(self, self.source, facts)
            (partial / "README.md").write_text(card, encoding="utf-8")
            write_json(partial / PROVENANCE, provenance(self, facts))
            if verify:
                self._verify(partial)
        return out

    def save(
        self,
        out_dir: str | os.PathLike[str],
        *,
        facts: Mapping[str, object] | None = None,
        overwrite: bool = False,
    ) -> Path:
        return self.save_pretrained(out_dir, facts=facts, overwrite=overwrite)

    def harness_model(self, *, batch_size: int = 1) -> object:
        return hugging_face_lm(self.model, self.tokenizer, batch_size=batch_size)

    def _verify(self, directory: Path) -> None:
        again = type(self.model).from_pretrained(directory, dtype=self.model.dtype)
        for weight in again.parameters():  # mapped weights lie unaligned and may round otherwise
            weight.data = weight.data.clone()
        if not getattr(again, "is_quantized", False):  # those are where they belong
            again.to(self.decoder.device)
        saved = ShortHFModel(again, self._layers_path)
        (ours, _, _), (theirs, cached, uncached) = fingerprint(self), fingerprint(saved)
        if not torch.equal(ours, theirs):
            off = (ours - theirs).abs().max()
            raise RuntimeError(f"the saved model's logits differ by up to {off:.3g}; not saved")
        if cached != uncached:
            raise RuntimeError("the saved model generates otherwise with its cache; not saved")

    def _check_weights(self) -> None:
        # offloaded weights cannot be looked at; their states are, whenever they are read
        if not any(weight.is_meta for weight in self.decoder.layers.parameters()):
            super()._check_weights()

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ShortGPTError(
                f"{self.source} came without a tokenizer, which texts need: pass tokenizer=..., or "
                "put its files beside the weights"
            )
        return self.tokenizer


def _place(device: str | torch.device | None, options: Mapping[str, Any]) -> torch.device | None:

    if device is not None and "device_map" in options:
        raise ShortGPTError("give device for one place or device_map for several, not both")
    return None if device is None else choose_device(device)
