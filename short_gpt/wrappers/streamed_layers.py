"""The layers of a streamed Llama called one at a time, in any order.

Shapes: B windows of one length, S tokens, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llama.checkpoint.sharding import EMBEDDING
from short_gpt.models.families import META
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.layer_hooks import Call
from short_gpt.runtime.memory import BLOCK_BYTES
from short_gpt.wrappers.streamed_batch import Batch
from short_gpt.wrappers.streamed_transformer import StreamedTransformer

GROUP_BYTES = 2 * BLOCK_BYTES  # of states that are embedded in one reading of the embedding


class StreamedCalls(LayerCalls):
    """`LayerCalls` whose layers have weights inside `loaded` alone, one at a time.

    Args:
        model: whose weights are read from their files.
    """

    def __init__(self, model: StreamedTransformer) -> None:
        self._model = model
        model.release()
        self.family, self.count = META, len(model.layers)
        self._ready: nn.Module | None = None

    @contextmanager
    def loaded(self, place: int) -> Iterator[nn.Module]:
        layer = self.layer(place)
        whole = not any(p.is_meta for p in layer.parameters())
        if self._ready is not layer or not whole:  # the last one stays until another is asked for
            self.close()
            self._model.load(layer)
            self._ready = layer
        yield layer

    def keep_only(self, place: int, modules: Sequence[nn.Module]) -> None:
        kept = {p for module in modules for p in module.parameters()}
        layer = self.layer(place)
        self._model.release(name for name, p in layer.named_parameters() if p not in kept)
        for module in layer.modules():
            if not kept.intersection(module.parameters()):
                module.to("meta")

    def close(self) -> None:
        if self._ready is not None:
            self._ready.to("meta")
            self._ready = None

    def layer(self, place: int) -> nn.Module:
        return self._model.layers[place]

    def call(self, place: int, state: Tensor) -> Call:
        return (state, None, self._model.freqs_cis[: state.shape[1]], None), {}

    def embed(self, tokens: Tensor) -> Tensor:
        return next(self.embed_all([tokens]))

    def embed_all(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        width = self._model.params.dim * self._model.dtype.itemsize
        group: list[Batch] = []
        for tokens in batches:
            group.append(Batch(tokens, torch.ones_like(tokens, dtype=torch.bool)))
            if sum(batch.tokens.numel() for batch in group) * width >= GROUP_BYTES:
                yield from self._embedded(group)
                group = []
        yield from self._embedded(group)

    def _embedded(self, group: list[Batch]) -> Iterator[Tensor]:
        if group:
            self._model.embed(group)
        while group:
            yield group.pop(0).state

    def widths(self) -> tuple[int, int, int]:
        width, inputs, _ = super().widths()
        return width, inputs, self._model.dtype.itemsize  # layers without weights do not tell

    def memory(self) -> dict[str, int]:
        args, model = self._model.params, self._model
        sizes = [p.numel() for p in model.layers[0].parameters()]
        # a matrix of a Hugging Face file is there twice while its rows are put in order
        stored = 2 * max(sizes) * model.source.infos[EMBEDDING].dtype.itemsize
        embedding = GROUP_BYTES + args.max_seq_len * args.dim * model.dtype.itemsize + BLOCK_BYTES
        layer = sum(sizes) * model.dtype.itemsize
        return {"layer": layer, "weights as stored": max(stored, embedding - layer)}
