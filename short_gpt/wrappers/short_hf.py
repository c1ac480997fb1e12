"""ShortGPT for causal language models of transformers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama.formats.hf import meta_to_hf
from llama.generation import COLDEST, check_logits, check_numbers
from llama.model import MASKED
from llama.parallel import choose_device, choose_dtype
from llama.sources import is_gguf
from llama.tokenizer import check_text, find_tokenizer
from short_gpt.checkpoints.gguf import save_gguf, types_in
from short_gpt.checkpoints.hf import save_as_meta, save_hf
from short_gpt.checkpoints.hub import check_push, push
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.target import StrPath, Target
from short_gpt.checkpoints.verify import (
    check_same,
    copy_weights,
    fingerprint,
    fingerprint_aligned,
    one_by_one,
)
from short_gpt.data.texts import Conversation, check_plain
from short_gpt.data.windows import Prefixed, common_start, starts_texts, windows
from short_gpt.evaluation.harness import hugging_face_lm
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.models.decoder import check_token_ids, evaluating
from short_gpt.models.hf import HFDecoder
from short_gpt.models.loading import (
    check_loaded,
    config_entries,
    load,
    restore_frequencies,
    weight_stamps,
)
from short_gpt.runtime.digest import check_unchanged
from short_gpt.runtime.errors import ShortGPTError, check, one_line
from short_gpt.wrappers.short_model import Prompts, ShortModel, check_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ShortHFModel(ShortModel):
    """Scores and removes layers of a ``transformers`` causal language model.

    On Apple's GPUs (MPS) PyTorch's own causal attention is wrong in half precision; there the model
    is set to eager attention.

    Args:
        model_name: Hub id, local directory, GGUF file, or a loaded model.
        layers_path: Name of the list of layers, as in ``"model.layers"``. Default: it is found.
        tokenizer: Tokenizer of a loaded model. Default: the one beside the model, if any.
        device: Device to move the model to. Default: it stays where it is loaded.
        options: Options of ``from_pretrained``: ``dtype`` (None is the files'), ``device_map``,
            ``revision`` and so on; ``trust_remote_code=True`` runs a model's Python files, and
            kernels of the hub, which may round otherwise, wait for ``use_kernels=True``.

    Example:
        >>> short = ShortHFModel("mistralai/Mistral-7B-v0.1", n_prune_layers=9)  # doctest: +SKIP
        >>> short.eval_importance([text], max_seq_len=1024)  # doctest: +SKIP
        >>> short.remove_layers()  # doctest: +SKIP
        >>> short.save_pretrained("mistral-5b")  # doctest: +SKIP
    """

    def __init__(
        self,
        model_name: StrPath | PreTrainedModel,
        layers_path: str | None = None,
        n_prune_layers: int | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        **options: object,
    ) -> None:
        one_place = device is None or "device_map" not in options
        check(one_place, "device", device, "None where a device_map says several")
        to_device = None if device is None else choose_device(device)
        model: Any = model_name
        is_model = isinstance(model, nn.Module) and hasattr(model, "config")
        if isinstance(model_name, str | os.PathLike):
            source = str(model_name)
            model, tokenizer = load(source, options, tokenizer)
        else:
            check(not options, "options", sorted(options), "none: the model is loaded")
            check(is_model, "model_name", model, "a path, a hub id or a loaded model")
            source = model.config.name_or_path or "a model"
            restore_frequencies(model)
        if adapted := [name for name, part in model.named_modules() if hasattr(part, "base_layer")]:
            raise ShortGPTError(
                f"{type(model).__name__} has an adapter at {adapted[0]}, expected a model of plain "
                "layers: merge it, as in model = peft_model.merge_and_unload()"
            )
        if is_model:
            check_loaded(model)
        tokenizes = tokenizer is None or callable(tokenizer)
        check(tokenizes, "tokenizer", tokenizer, "a tokenizer of transformers")
        decoder = HFDecoder(model.eval(), layers_path)
        if decoder.device.type == "meta":
            raise ShortGPTError(
                f"{type(model).__name__} is on the device meta, where tensors have no values: load "
                "it with its weights"
            )
        if to_device is not None and not getattr(model, "is_quantized", False):
            model.to(to_device)
        if decoder.device.type in MASKED and "sdpa" in attention_of(model.config).values():
            model.set_attn_implementation("eager")  # which takes a mask
        super().__init__(decoder, n_prune_layers)
        self._layers_path = decoder.layers_path
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self._opened = () if model is model_name else weight_stamps(source)
        self._openings: dict[str, list[int]] = {}  # of chat templates, by the template
        self._meta_tokenizer: Path | None = None  # of the Meta checkpoint that it came from

    @classmethod
    def from_meta(
        cls,
        ckpt_dir: StrPath,
        *,
        tokenizer_path: StrPath | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
    ) -> ShortHFModel:
        """Opens a Meta checkpoint through transformers, as LoRA needs it; `save` converts back."""
        tokenizer = Path(str(tokenizer_path)) if tokenizer_path else find_tokenizer(ckpt_dir)
        to_device = choose_device(device)
        with tempfile.TemporaryDirectory() as folder:
            converted = Path(folder) / "converted"
            meta_to_hf(ckpt_dir, converted, tokenizer_path=tokenizer)
            short = cls(converted, device=to_device, dtype=choose_dtype(dtype, to_device))
            copy_weights(short.model)  # mapped from files that are deleted now
        short.source, short._meta_tokenizer = str(ckpt_dir), tokenizer
        return short

    @property
    def configuration(self) -> Mapping[str, object]:
        return config_entries(self.model.config)

    def encode(self, text: str) -> list[int]:
        check_text(text)
        if isinstance(text, Conversation):
            return self._conversation(text)
        return self._tokenizer()(text, verbose=False)["input_ids"]

    def _to_continue(self, text: str) -> list[int]:
        """Token ids of a text, without what the tokenizer puts after it, such as EOS."""
        ids = self.encode(text)
        if isinstance(text, Conversation):
            return ids
        after = self.encode("")[len(starts_texts(self.encode)) :]
        return ids[: -len(after)] if after and ids[-len(after) :] == after else ids

    def dialog(self, messages: Sequence[dict[str, str]], *, answer: bool = False) -> list[int]:
        tokenizer = self._tokenizer()
        try:
            text = tokenizer.apply_chat_template(
                [*messages], tokenize=False, add_generation_prompt=answer
            )
            check_text(str(text))
        except Exception as error:  # a template is a program that comes with the model
            reason = one_line(str(error)) or type(error).__name__
            raise ShortGPTError(
                f"the chat template of {self.source} refuses {messages!r:.60}: {reason}; give "
                "plain text, or a model with another template"
            ) from None
        return tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"]

    def _conversation(self, conversation: Conversation) -> Prefixed:
        """Token ids, which know how many of them the template puts before every dialog."""
        if not (template := self._tokenizer().chat_template):
            check_plain(conversation)
        ids, key = self.dialog(conversation.messages), str(template)
        if key not in self._openings:
            self._openings[key] = []
            with suppress(ShortGPTError):  # the template may refuse a user alone
                self._openings[key] = self.opening(chat=True)
        return Prefixed(ids, len(common_start(ids, self._openings[key])))

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ShortGPTError(
                f"{self.source} came without a tokenizer, which texts need: pass tokenizer=..., or "
                "put its files beside the weights"
            )
        return self.tokenizer

    def eval_importance(
        self,
        prompts: Prompts,
        max_seq_len: int,
        stride: int = 256,
        max_gen_len: int = 0,
        temperature: float = 0.6,
        top_p: float = 0.9,
        angular: bool = False,
    ) -> None:
        """Scores texts of any length and adds them to the scores so far; ignores ``angular``.

        Args:
            max_seq_len: Tokens of a window.
            stride: Tokens from one window's start to the next. Default: 256.
            max_gen_len: New tokens to score after ``max_seq_len`` of each text. Default: 0, which
                scores all windows of the texts.
        """
        check_texts(prompts)
        if max_gen_len > 0:
            ids = (self._to_continue(p)[:max_seq_len] for p in prompts)
            self.measure([self._continue(i, max_gen_len, temperature, top_p) for i in ids])
        else:
            how: Any = {"stride": stride, "tail": "keep", "bos": self.bos}
            self.measure([*windows(prompts, self.encode, size=max_seq_len, **how)], progress=False)

    def _continuations(
        self, prompts: Prompts, count: int, temperature: float, top_p: float
    ) -> list[str]:
        check_numbers(count, temperature, top_p)
        if count == 0:  # which transformers refuses
            return ["" for _ in prompts]
        texts = []
        for ids in map(self._to_continue, prompts):
            new = self._continue(ids, count, temperature, top_p)[len(ids) :]
            texts.append(str(self._tokenizer().decode(new, skip_special_tokens=True)))
        return texts

    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]:
        # by the model's own generation config, which may end a text
        return self._generated([ids], count, do_sample=False, use_cache=use_cache)[0]

    def greedy_many(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        return self._generated(prompts, count, do_sample=False)

    @torch.no_grad()
    def continued(
        self, ids: Sequence[Sequence[int]], count: int, choose: Callable[[Tensor], Tensor]
    ) -> None:
        from transformers import GenerationConfig

        def chosen(_: Tensor, scores: Tensor) -> Tensor:  # (B, V): all other tokens are forbidden
            tokens = choose(scores.float())[:, None]  # (B, 1)
            return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)

        tokens = torch.tensor(ids, device=self.decoder.device)  # (B, S)
        check_token_ids(tokens, self.decoder)
        how = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": count}
        # the model's own settings end texts and change the distribution
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            with evaluating(self.model):
                self.model.generate(tokens, do_sample=False, logits_processor=[chosen], **how)
        finally:
            self.model.generation_config = own

    def opening(self, *, chat: bool = False) -> list[int]:
        tokenizer = self._tokenizer()

        def dialog(text: str) -> list[int]:
            return self.dialog([{"role": "user", "content": text}])

        config = self.model.config.get_text_config(decoder=True)
        ids = [tokenizer.bos_token_id, getattr(config, "bos_token_id", None)]
        known = [token for token in [*ids, tokenizer.eos_token_id] if token is not None][:1]
        lack = "bos and no eos"
        if chat:
            known = starts_texts(dialog) if tokenizer.chat_template else []
            lack = "chat template that begins all dialogs alike"
        if not known:
            raise ShortGPTError(
                f"{self.source} has no {lack}, for a text of its own to begin with: name a text"
            )
        return known

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        return str(self._tokenizer().decode(list(ids), skip_special_tokens=not special))

    @property
    def chats(self) -> bool:
        try:
            return bool(self.turn("Hello"))
        except ShortGPTError:
            return False

    @property
    def answer_ends(self) -> frozenset[int]:
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {self._tokenizer().eos_token_id, *(own if isinstance(own, list) else [own])}
        added = self._tokenizer().added_tokens_decoder
        # the template's own end of a turn is the first special token after an answer
        special = (i for i in self._after_answer("A") if i in added and added[i].special)
        return frozenset({*ends, next(special, None)} - {None})

    def _prompt_ids(self, prompt: str) -> list[int]:
        return self.turn(prompt) if self.chats else self._to_continue(prompt)

    def _continue(
        self, ids: list[int], max_gen_len: int, temperature: float, top_p: float
    ) -> list[int]:
        if not ids:
            raise ShortGPTError("a text has no tokens to continue; its tokenizer adds none")
        sampling: dict[str, object] = {"do_sample": False}
        if temperature >= COLDEST:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
            sampling["top_k"] = 0  # else the 50 likeliest alone
        return ids + self._generated([ids], max_gen_len, **sampling)[0]

    @torch.no_grad()
    def _generated(
        self, prompts: Sequence[Sequence[int]], count: int, **options: object
    ) -> list[list[int]]:
        """Up to ``count`` new ids after each of B prompts, which are padded on the left."""
        length = max(map(len, prompts))
        padded = [[0] * (length - len(ids)) + [*ids] for ids in prompts]
        mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
        tokens = torch.tensor(padded, device=self.decoder.device)  # (B, S)
        check_token_ids(tokens, self.decoder)
        with evaluating(self.model):
            written = self.model.generate(
                input_ids=tokens,
                # else transformers takes ids that equal the padding's for padding
                attention_mask=torch.tensor(mask, device=tokens.device),
                max_new_tokens=count,
                logits_processor=[_checked],
                return_dict_in_generate=False,  # whatever the model's own settings say
                **options,
            )
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else {*(ends or ())}
        return [_through(ends, row[length:].tolist()) for row in written]

    def harness_model(self, *, batch_size: int = 1) -> object:
        return hugging_face_lm(self.model, self.tokenizer, batch_size=batch_size)

    def trainable(self) -> PreTrainedModel:
        return self.model

    def save_pretrained(
        self,
        out_dir: StrPath,
        *,
        verify: bool = True,
        overwrite: bool = False,
        facts: Mapping[str, object] | None = None,
        measured: Mapping[str, Perplexity] | None = None,
        release: bool = False,
    ) -> Path:
        """As `save`, for plain ``from_pretrained``, with a model card.

        ``verify`` loads the result again and compares: the same logits, bit for bit, and the same
        greedy generation with and without the cache. With ``release`` this model's weights are
        gone before, as in `check_saved`.
        """
        self.check_whole()
        if self.decoder.device.type == "cpu":  # where weights are mapped from the files
            check_unchanged(self._opened, mapped=True)
        record = Provenance.of(self, self.source, facts=facts, measured=measured)
        proof = partial(self.check_saved, release=release) if verify else None
        target = Target(out_dir, overwrite, proof)
        return save_hf(self.trainable(), target, tokenizer=self.tokenizer, record=record)

    def push_to_hub(self, repo_id: str, *, private: bool = False, verify: bool = True) -> str:
        """Uploads what `save_pretrained` writes, its card included; returns the page's address.

        Args:
            repo_id: Repository, as in ``"user/model"``; made if the hub has none of that name.
            private: Create the repository as private.
            verify: Prove the result, as `save_pretrained` does. Default: yes.

        Raises:
            ConnectionError: nobody is logged in, or the hub refused.
        """
        check_push(repo_id, "model")
        with tempfile.TemporaryDirectory() as folder:
            saved = self.save_pretrained(Path(folder) / "model", verify=verify)
            return push(saved, repo_id, private=private)

    def save(
        self,
        out_dir: StrPath,
        *,
        facts: Mapping[str, object] | None = None,
        measured: Mapping[str, Perplexity] | None = None,
        overwrite: bool = False,
        release: bool = False,
    ) -> Path:
        """Saves as `save_pretrained`; as it came one from `from_meta`, or to a ``.gguf`` file."""
        about: dict[str, Any] = {"facts": facts, "measured": measured}
        if self._meta_tokenizer is None and not is_gguf(out_dir):
            return self.save_pretrained(out_dir, overwrite=overwrite, release=release, **about)
        record = Provenance.of(self, self.source, **about)
        if is_gguf(out_dir):
            check_unchanged(self._opened)  # kept tensors are copied from there
            target = Target(out_dir, overwrite)
            return save_gguf(self, target, self.source, self._layers_path, record=record)
        self.check_whole()
        assert self._meta_tokenizer is not None
        proof = partial(self.check_saved, release=release)
        target = Target(out_dir, overwrite, proof)
        return save_as_meta(self.model, target, record=record, tokenizer_path=self._meta_tokenizer)

    def types_in(self, kind: str) -> dict[int, dict[str, int]]:
        if not is_gguf(self.source):
            return super().types_in(kind)
        return types_in(self, self.source, self._layers_path, kind)

    def release(self) -> None:
        """Drops all weights, which makes room for others; this model computes nothing after it."""
        self.model.to("meta")

    def check_saved(self, directory: Path, *, release: bool = False) -> None:
        """Raises RuntimeError unless a directory holds this model, as transformers loads it.

        With ``release`` one copy of the weights is in memory at a time: this model's are dropped
        once its logits are there, and then the directory is opened.
        """
        device = self.decoder.device

        def saved() -> ShortHFModel:
            if release:  # its logits are kept by now
                self.release()
            kernels = getattr(self.model, "use_kernels", False)
            loader = partial(type(self.model).from_pretrained, directory, use_kernels=kernels)
            open_again = partial(loader, dtype=self.model.dtype)
            again, attention = open_again(), attention_of(self.model.config)
            if attention_of(again.config) != attention:  # which may round otherwise
                del again
                again = open_again(attn_implementation=attention)
            if not getattr(again, "is_quantized", False):  # those are where they belong
                again.to(device)
            return ShortHFModel(again, self._layers_path)

        if release and device.type == "cpu":  # mapped from a file they may round otherwise
            copy_weights(self.model)
        ours, theirs = one_by_one(lambda: fingerprint(self), lambda: fingerprint_aligned(saved()))
        try:
            check_same(ours, theirs)
        except RuntimeError:
            if release:
                raise
            copy_weights(self.model)  # only now, because a copy takes memory
            check_same(fingerprint(self), theirs)


def attention_of(config: Any) -> dict[str, object]:
    """The implementations of the attention, by the names of the model's parts; "" is the whole."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    each = {name: own._attn_implementation for name, own in parts.items() if own is not None}
    return {"": config._attn_implementation, **each}


def _through(ends: set[int], ids: list[int]) -> list[int]:
    """The ids up to the first that ends a text; `generate` pads those that end before others."""
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: first + 1]


def _checked(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """What `generate` chooses from, (B, V), unless it is NaN."""
    check_logits(scores)
    return scores
