"""Layers that are skipped while a prompt is read, but run while text is generated.

As the ShortGPT authors' ShortGPT-gen: prompts are read faster, every decoding step uses all
layers. Skipped layers still cache the prompt's keys and values, turned like all others; the
authors' code caches keys without their rotary position. Shapes: B sequences, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from llama.model import TransformerBlock, apply_rotary_emb
from short_gpt.models.decoder import Decoder
from short_gpt.models.families import attention_with_norm
from short_gpt.models.layer_hooks import output_form, patched_forward, state_in
from short_gpt.models.numbering import check_layers
from short_gpt.runtime.errors import ShortGPTError


class _Skip(partial[object]):
    """A layer's forward that skips it in prompts."""


def skips_prompts(decoder: Decoder) -> bool:
    """Whether layers are skipped: then prompts of unequal length must be read one by one.

    A batch of them is read only up to the end of the shortest; what is left of the longer ones
    passes all layers, token by token, as what is generated.
    """
    return any(isinstance(vars(layer).get("forward"), _Skip) for layer in decoder.layers)


@contextmanager
def skipped_in_prefill(decoder: Decoder, layers: Sequence[int]) -> Iterator[None]:
    """The model that skips layers (by position) when it reads several tokens with the cache.

    Calls of one token, and calls without a cache, use all layers. `Llama.generate` itself must be
    given prompts of equal length: see `skips_prompts`. ShortGPTError: a layer does not exist, all
    would be skipped, or the family's attention cannot be called to fill the cache.
    """
    if layers:
        check_layers(layers, range(len(decoder.layers)))
    with ExitStack() as stack:
        for layer in [decoder.layers[i] for i in layers]:
            if isinstance(layer, TransformerBlock):  # ours: Meta's own code has no such forward
                skip: Callable[..., object] = _meta(layer)
            else:
                skip = _hugging_face(layer, decoder)
            stack.enter_context(patched_forward(layer, _Skip(skip)))
        yield


def _meta(layer: TransformerBlock) -> Callable[..., Tensor]:
    plain, attention = layer.forward, layer.attention

    def forward(
        x: Tensor, start_pos: int | None, freqs_cis: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        B, S, _ = x.shape
        if start_pos is None or S == 1:  # no cache, or a token that is generated
            return plain(x, start_pos, freqs_cis, mask)
        h = layer.attention_norm(x)  # (B, S, D)
        k, v = (
            project(h).view(B, S, attention.n_local_kv_heads, attention.head_dim)
            for project in (attention.wk, attention.wv)
        )
        # later tokens attend to the prompt in this layer, too
        attention.update_cache(apply_rotary_emb(k, freqs_cis), v, start_pos)
        return x

    return forward


def _hugging_face(layer: nn.Module, decoder: Decoder) -> Callable[..., object]:
    _, form = output_form(decoder)
    if (parts := attention_with_norm(layer, decoder.family)) is None:
        raise ShortGPTError(
            f"{type(layer).__name__} has no attention after a norm that can be called by its "
            "layer's arguments, as input_layernorm and self_attn in Llama, to fill its cache: this "
            "family cannot skip layers in the prompt alone"
        )
    norm, attention = parts
    from transformers.cache_utils import Cache

    plain = layer.forward  # before it is patched

    def forward(*args: object, **kwargs: object) -> object:
        x = state_in(args, kwargs)
        kwargs.pop("hidden_states", None)  # x is handed on by position, or normed
        # past_key_value or past_key_values, by the version of transformers
        cached = any(isinstance(value, Cache) for value in kwargs.values())
        if not cached or x.shape[1] == 1:
            return plain(x, *args[1:], **kwargs)
        # the family's own attention puts keys and values into the cache; its output is not used
        attention(hidden_states=norm(x), **kwargs)
        return form(x)

    return forward
