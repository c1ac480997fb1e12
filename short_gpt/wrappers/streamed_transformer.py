"""A Llama that runs straight from its checkpoint directory, one layer in memory at a time.

Windows pass the layers in rounds: all windows of a round go through layer i, which is then
dropped, while a thread reads layer i + 1.

Shapes: B windows of a batch, S tokens, D width, L layers, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.checkpoint.sharding import EMBEDDING, OUTPUT
from llama.model import RMSNorm, TransformerBlock
from llama.parallel import initialize
from llama.rope import precompute_freqs_cis
from short_gpt.models.families import META
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.layer_hooks import Call
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.memory import BLOCK_BYTES, Plan, block_rows, plan, resident
from short_gpt.scoring.hooks import LayerHooks
from short_gpt.wrappers.streamed_weights import LAYER_NAMES, HFSource, MetaSource


class Batch:
    """Windows on their way through the layers.

    Args:
        tokens: (B, S) int64.
        mask: (B, S) bool, True for real tokens.
        watched: whether the layers are scored.
        sublayers: whether their attention and MLP are, too.

    Attributes:
        state: hidden states entering the next layer, (B, S, D) in the machine's memory.
        seen: what the layers so far did to the states, if watched.
    """

    def __init__(
        self, tokens: Tensor, mask: Tensor, *, watched: bool = False, sublayers: bool = False
    ) -> None:
        self.tokens, self.mask = tokens.cpu(), mask.cpu()
        self.sublayers = sublayers
        self.seen = LayerHooks(mask) if watched else None
        self.state = torch.empty(0)

    def embed(self, start: int, rows: Tensor) -> None:
        """Fills in the tokens whose rows of the embedding these are."""
        inside = (self.tokens >= start) & (self.tokens < start + len(rows))  # (B, S)
        self.state[inside] = rows[self.tokens[inside] - start].to(self.state.dtype)

    def through(self, layer: nn.Module, freqs_cis: Tensor) -> Tensor:
        """Runs the layer; returns the sum of all hidden states leaving it."""
        pinned = self.state.is_pinned()
        state = self.state.to(freqs_cis.device, non_blocking=pinned)
        hooks = self.seen.on_sublayers(layer, META) if self.seen and self.sublayers else []
        try:
            result = layer(state, None, freqs_cis[: state.shape[1]], None)
        finally:
            for hook in hooks:
                hook.remove()
        if self.seen is not None:
            self.seen.after(layer, (state,), {}, result)
        if state is self.state:
            self.state = result
        else:  # another device computes, and keeps nothing
            self.state.copy_(result, non_blocking=pinned)
            if self.seen is not None:
                self.seen.forget_state()
        return result.sum(dtype=torch.promote_types(result.dtype, torch.float32))


class StreamedTransformer(nn.Module):
    """What `llama.Transformer` is to the scoring core, with weights that come and go.

    ``layers`` have no weights but while they run; hooks on them work as ever, and layers may be
    taken out. `hidden` and calls read a batch on its own; `run` takes many through together.

    Args:
        source: the weights.
        device: where layers run.
        dtype: of weights and states there.

    Attributes:
        replaced: new values of parameters in the place of the source's, by the layer's number and
            the parameter's name in it; the last of them counts. They run as they would be stored.
    """

    def __init__(
        self, source: MetaSource | HFSource, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        initialize(1, device=device)
        self.source, self.params, self.dtype = source, source.args, dtype
        self.vocab_size, self.n_layers = self.params.vocab_size, self.params.n_layers
        self.norm = RMSNorm(self.params.dim, eps=self.params.norm_eps).to(device, dtype)
        self.norm.weight.data.copy_(source.read("norm.weight"))
        self.layers = nn.ModuleList(
            TransformerBlock(i, self.params).to("meta") for i in range(self.n_layers)
        )
        self._numbers = {layer: i for i, layer in enumerate(self.layers)}
        self.freqs_cis = precompute_freqs_cis(self.params, self.params.max_seq_len).to(device)
        stored = {source.infos[f"layers.0.{name}"].dtype for name in LAYER_NAMES}
        self.stored = max(stored, key=lambda kind: kind.itemsize)
        self.replaced: list[Mapping[tuple[int, str], Tensor]] = []
        self._ready: dict[str, Tensor] = {}  # the weights of the layer that runs
        self._next: dict[tuple[str, torch.dtype], Tensor] = {}  # of the one that is read

    @property
    def device(self) -> torch.device:
        return self.freqs_cis.device

    def plan(self, *, batch_size: int = 1, max_memory: str | int | None = None) -> Plan:
        """Memory of a run from here; see `memory.plan`."""
        held = [*self._ready.values(), *self._next.values()]
        process = resident() - sum(t.nbytes for t in held if t.device.type == "cpu")
        return plan(
            self.params,
            dtype=self.dtype,
            stored=self.stored,
            batch_size=batch_size,
            max_memory=max_memory,
            on_host=self.device.type == "cpu",
            process=max(process, 0),
        )

    @torch.no_grad()
    def run(self, batches: Sequence[Batch], *, step: Callable[[Batch], object] = id) -> None:
        """Embeds batches and takes all of them through every layer.

        Args:
            batches: keep their states.
            step: called for every batch after every layer.

        Raises:
            NotFiniteError: a weight or a state is NaN or infinite; the message names the layer.
        """
        self.embed(batches)
        with closing(self._loaded()) as layers:
            for layer in layers:
                sums = []
                for batch in batches:
                    sums.append(batch.through(layer, self.freqs_cis))
                    step(batch)
                # one look a layer: a look at every state would wait for the device every time
                if not torch.stack(sums).isfinite().all():
                    self._check_states(layer, batches)

    def embed(self, batches: Sequence[Batch]) -> None:
        """Gives batches the hidden states entering the first layer."""
        pin = self.device.type == "cuda"
        for batch in batches:
            shape = (*batch.tokens.shape, self.params.dim)
            batch.state = torch.empty(shape, dtype=self.dtype, pin_memory=pin)
        kind = self.source.infos[EMBEDDING].dtype
        for start, rows in self.source.blocks(EMBEDDING, block_rows(self.params, kind)):
            for batch in batches:
                batch.embed(start, rows)

    def _loaded(self) -> Generator[nn.Module, None, None]:
        """The layers in order, each with its weights until the next is asked for."""
        numbers = [self._numbers[layer] for layer in self.layers]
        with ThreadPoolExecutor(1, thread_name_prefix="layer") as pool:
            ahead: Future[dict[str, Tensor]] = pool.submit(self._read, numbers[0])
            for layer, number, after in zip(
                self.layers, numbers, [*numbers[1:], None], strict=True
            ):
                self._make_ready(number, ahead.result())
                if after is not None:
                    ahead = pool.submit(self._read, after)
                layer.load_state_dict(self._ready, assign=True)
                try:
                    yield layer
                finally:
                    layer.to("meta")

    def load(self, layer: nn.Module) -> None:
        """Gives one layer its weights, read one after the other; ``layer.to("meta")`` ends it."""
        number = self._numbers[layer]
        for name in LAYER_NAMES:
            self._make_ready(number, {name: self.weight(number, name)})
        layer.load_state_dict(self._ready, assign=True)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Lets go of the memory that weights of one layer after the other use.

        Args:
            names: of parameters in a layer; None is all, and what was read ahead.
        """
        if names is None:
            self._next.clear()
        for name in [*self._ready] if names is None else names:
            self._ready.pop(name, None)

    def weight(self, number: int, name: str) -> Tensor:
        """A parameter of a layer as it is stored, or would be."""
        for values in reversed(self.replaced):
            if (number, name) in values:
                stored = self.source.infos[f"layers.{number}.{name}"].dtype
                return values[number, name].to(stored)
        return self.source.read(f"layers.{number}.{name}")

    def _read(self, number: int) -> dict[str, Tensor]:
        """A layer's weights as stored, in memory that is used again for the next."""
        weights = {}
        for name in LAYER_NAMES:
            weight = self.weight(number, name)
            buffer = self._next.get((name, weight.dtype))
            if buffer is None:
                buffer = torch.empty_like(weight, pin_memory=self.device.type == "cuda")
                self._next[name, weight.dtype] = buffer
            # numpy's copy is a single thread's: torch's would compete with the layer that runs
            np.copyto(buffer.view(torch.uint8).numpy(), weight.view(torch.uint8).numpy())
            weights[name] = buffer
            del weight  # and with it what it held or mapped, before the next is read
        return weights

    def _make_ready(self, number: int, stored: dict[str, Tensor]) -> None:
        """Converts and moves a layer's weights to where they run."""
        for name, weight in stored.items():
            if name not in self._ready:
                self._ready[name] = torch.empty_like(weight, dtype=self.dtype, device=self.device)
            ready = self._ready[name].copy_(weight.to(self.device))
            # attention kernels may turn NaN weights into finite states that look harmless
            total = ready.sum(dtype=torch.promote_types(self.dtype, torch.float32))
            if not total.isfinite() and not ready.isfinite().all():
                raise NotFiniteError(f"layer {number} has NaN or infinite weights in {name}")

    @torch.no_grad()
    def layer_seconds(self, batch: Batch) -> tuple[float, float, float]:
        """Seconds to read a layer, to make its weights ready, and to take a batch through it.

        They are the second layer's: at the first, memory is taken and libraries warm up.

        Args:
            batch: keeps a state that is of no use.

        Raises:
            NotFiniteError: a weight is NaN or infinite.
        """
        self.embed([batch])
        for layer in [*self.layers][:2]:
            times = [time.perf_counter()]
            stored = self._read(self._numbers[layer])
            times.append(time.perf_counter())
            self._make_ready(self._numbers[layer], stored)
            layer.load_state_dict(self._ready, assign=True)
            times.append(time.perf_counter())
            try:
                float(batch.through(layer, self.freqs_cis))  # waits for the device
            finally:
                layer.to("meta")
            times.append(time.perf_counter())
        read, ready, run = (b - a for a, b in pairwise(times))
        return read, ready, run

    def _check_states(self, layer: nn.Module, batches: Sequence[Batch]) -> None:
        """Sums may pass the largest number, and padding does not count: looks again."""
        for batch in batches:
            if not batch.state[batch.mask].isfinite().all():
                raise NotFiniteError(
                    f"layer {self._numbers[layer]} gave a NaN or infinite state; nothing of this "
                    "round was counted. Check the weights, or try another dtype"
                )

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Negative log-likelihood in nats of all tokens but the first, (B, S - 1) float32 each.

        The output head is read in blocks of rows, so that neither it nor the logits are ever
        held whole. The batches have passed the layers, and lose their states.
        """
        # by blocks: the logarithm of the sum over the vocabulary so far, and the target's logit
        every = [torch.full(b.tokens[:, 1:].shape, -torch.inf, device=self.device) for b in batches]
        chosen = [torch.zeros_like(total) for total in every]
        for batch in batches:
            batch.state = self._normed(batch.state[:, :-1])  # the last state predicts nothing
        for start, weight in self._head():
            for i, batch in enumerate(batches):
                # (B, S - 1, rows): the part of the vocabulary that begins at `start`
                logits = F.linear(batch.state.to(self.device), weight).float()
                every[i] = torch.logaddexp(every[i], logits.logsumexp(-1))
                row = batch.tokens[:, 1:, None].to(self.device) - start  # (B, S - 1, 1)
                # a target of another block reads any row here, which is thrown away
                target = logits.gather(-1, row.clamp(0, len(weight) - 1))  # (B, S - 1, 1)
                inside = (row >= 0) & (row < len(weight))
                chosen[i] = torch.where(inside, target, chosen[i][..., None])[..., 0]
        for batch in batches:
            batch.state = torch.empty(0)
        return [total - one for total, one in zip(every, chosen, strict=True)]

    def _normed(self, state: Tensor) -> Tensor:
        return self.norm(state.to(self.device)).to(state.device)

    def _head(self) -> Iterator[tuple[int, Tensor]]:
        kind = self.source.infos[OUTPUT].dtype
        for start, rows in self.source.blocks(OUTPUT, block_rows(self.params, kind)):
            yield start, rows.to(self.device, self.dtype)

    def hidden(self, tokens: Tensor, start_pos: int | None = None) -> Tensor:
        """The hidden states entering the final norm, (B, S, D), of one batch read on its own."""
        if start_pos is not None:
            raise ShortGPTError("a streamed model has no cache; it reads whole windows only")
        batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        self.run([batch])
        return batch.state.to(self.device)

    def forward(self, tokens: Tensor, start_pos: int | None = None) -> Tensor:
        """Logits of every position, (B, S, V) float32."""
        return self._logits(self.hidden(tokens, start_pos))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The same of a batch that has passed the layers, and loses its state."""
        state, batch.state = batch.state, torch.empty(0)
        return self._logits(state.to(self.device))

    def _logits(self, state: Tensor) -> Tensor:
        normed = self.norm(state)  # (B, S, D)
        return torch.cat([F.linear(normed, weight).float() for _, weight in self._head()], dim=-1)


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
