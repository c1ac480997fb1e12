"""A Llama that runs straight from its checkpoint directory, one layer in memory at a time.

All windows of a round go through layer i, which is then dropped, while a thread reads layer i + 1.
Shapes: B windows of a batch, S tokens, D width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from llama.checkpoint.meta import EMBEDDING, LAYER_SPLITS, OUTPUT, Checkpoint, split_dim
from llama.formats.hf import HF, HFCheckpoint, name_in, permute
from llama.model import RMSNorm, TransformerBlock, precompute_freqs_cis
from llama.parallel import initialize
from short_gpt.runtime.digest import check_unchanged, stamps
from short_gpt.runtime.errors import NotFiniteError
from short_gpt.runtime.memory import Plan, block_rows, plan, resident
from short_gpt.scoring.hooks import LayerHooks

LAYER_NAMES = tuple(LAYER_SPLITS)


class MetaSource(Checkpoint):
    """A directory in Meta's format, of any number of shards; tensors by Meta's names."""

    @property
    def files(self) -> list[Path]:
        """The files of the weights."""
        return [shard.path for shard in self.shards]

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the files."""
        return name

    def as_stored(self, name: str, weight: Tensor) -> Tensor:
        """A tensor in the order of rows that the files have."""
        return weight

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Some rows of a (V, D) tensor, (count, D) or fewer at its end."""
        parts: list[Tensor] = []
        dim = split_dim(name, vocab_parallel=self.vocab_parallel)
        for shard in self.shards:
            weight = shard.read(name)
            if dim == 1:  # split by width: each file has a part of every row
                parts.append(weight[start : start + count])
            else:  # split by rows: they may begin in one file and end in the next
                if count and start < len(weight):
                    parts.append(weight[start : start + count])
                    count -= len(parts[-1])
                start = max(start - len(weight), 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim or 0)


class HFSource(HFCheckpoint):
    """A Llama's Hugging Face directory in safetensors, as `MetaSource`."""

    def __init__(self, ckpt_dir: str | os.PathLike[str], *, max_seq_len: int) -> None:
        super().__init__(Path(str(ckpt_dir)))
        self.args.max_seq_len = max_seq_len
        self.args.check()
        self.files = sorted({file.path for file in self._files.values()})

    def stored_name(self, name: str) -> str:
        return name_in(HF, name)

    def as_stored(self, name: str, weight: Tensor) -> Tensor:
        return permute(name, weight, self.args, to=HF)

    def rows(self, name: str, start: int, count: int) -> Tensor:
        stored = str(self.infos[name].storage)  # tied weights are stored once
        with safe_open(self._files[stored].path, framework="pt") as file:
            return file.get_slice(stored)[start : start + count]


class Batch:
    """Windows on their way through the layers; ``mask`` (B, S) is True for real tokens."""

    def __init__(self, tokens: Tensor, mask: Tensor, *, watched: bool = False) -> None:
        self.tokens, self.mask = tokens.cpu(), mask.cpu()  # (B, S) each
        self.seen = LayerHooks(mask) if watched else None  # the scores of the layers so far
        self.state = torch.empty(0)  # entering the next layer, (B, S, D) in the machine's memory

    def embed(self, start: int, rows: Tensor) -> None:
        """Fills in the tokens of a block of the embedding's rows."""
        inside = (self.tokens >= start) & (self.tokens < start + len(rows))  # (B, S)
        self.state[inside] = rows[self.tokens[inside] - start].to(self.state.dtype)

    def through(self, layer: nn.Module, freqs_cis: Tensor) -> Tensor:
        """Runs the layer; returns the sum of all hidden states leaving it."""
        pinned = self.state.is_pinned()
        state = self.state.to(freqs_cis.device, non_blocking=pinned)
        result = layer(state, None, freqs_cis[: state.shape[1]], None)
        if self.seen is not None:
            self.seen.after(layer, (state,), {}, result)
            self.seen.reduce()  # of many batches, the products of all layers would take too much
        if state is self.state:
            self.state = result
        else:  # another device computes, and keeps nothing
            self.state.copy_(result, non_blocking=pinned)
        return result.sum(dtype=torch.promote_types(result.dtype, torch.float32))


class StreamedTransformer(nn.Module):
    """A `llama.Transformer` for scoring, whose layers have weights only while they run.

    Hooks on ``layers`` work, and layers may be removed. `hidden` and calls read a batch on its own;
    `run` takes many through the layers together. Weights and states are of ``dtype``.
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
        # new values of parameters, by the layer's number and the name in it; the last one counts
        self.replaced: list[Mapping[tuple[int, str], Tensor]] = []
        self._ready: dict[str, Tensor] = {}  # the weights of the layer that runs
        self._next: dict[tuple[str, torch.dtype], Tensor] = {}  # of the one that is read
        self._opened = stamps(source.files)

    @property
    def device(self) -> torch.device:
        return self.freqs_cis.device

    def plan(
        self, *, batch_size: int = 1, max_memory: str | int | None = None, logits: bool = False
    ) -> Plan:
        """Memory of a run; see `memory.plan`."""
        held = [*self._ready.values(), *self._next.values()]
        process = resident() - sum(t.nbytes for t in held if t.device.type == "cpu")
        return plan(
            self.params,
            dtype=self.dtype,
            stored=self.stored,
            batch_size=batch_size,
            max_memory=max_memory,
            logits=logits,
            on_host=self.device.type != "cuda",  # the memory of Apple's MPS is the machine's
            process=max(process, 0),
        )

    @torch.no_grad()
    def run(self, batches: Sequence[Batch], *, step: Callable[[Batch], object] = id) -> None:
        """Takes batches through every layer, and calls ``step`` with each of them after each."""
        self.embed(batches)
        with closing(self._loaded()) as layers:
            for layer in layers:
                sums = []
                for batch in batches:
                    sums.append(batch.through(layer, self.freqs_cis))
                    step(batch)
                # one look a layer: a look at every state would wait for the device every time
                if torch.stack(sums).isfinite().all():
                    continue
                # sums may pass the largest number, and padding does not count: look again
                if not all(batch.state[batch.mask].isfinite().all() for batch in batches):
                    raise NotFiniteError(
                        f"layer {self._numbers[layer]} gave a NaN or infinite state; nothing of "
                        "this round was counted. Check the weights, or try another dtype"
                    )

    def embed(self, batches: Sequence[Batch], *, pin: bool = True) -> None:
        """Gives batches the hidden states entering the first layer, pinned where CUDA runs."""
        pin = pin and self.device.type == "cuda"
        for batch in batches:
            shape = (*batch.tokens.shape, self.params.dim)
            batch.state = torch.empty(shape, dtype=self.dtype, pin_memory=pin)  # (B, S, D)
        # by blocks: pages of a mapped file that are read count as this process's memory
        for start, rows in self._blocks(EMBEDDING):
            for batch in batches:
                batch.embed(start, rows)

    def _blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        # so many rows of a (V, D) tensor at a time, after the number of the first
        self.check_files()
        info = self.source.infos[name]
        size = block_rows(self.params, info.dtype)
        for start in range(0, info.shape[0], size):
            yield start, self.source.rows(name, start, size)

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

    def check_files(self) -> None:
        """Raises ShortGPTError for files that are others than when the model was opened."""
        check_unchanged(self._opened)

    def load(self, layer: nn.Module) -> None:
        """Gives one layer its weights, read one after the other; ``layer.to("meta")`` ends it."""
        number = self._numbers[layer]
        self.check_files()
        for name in LAYER_NAMES:
            self._make_ready(number, {name: self.weight(number, name)})
        layer.load_state_dict(self._ready, assign=True)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Frees the buffers of these parameters of a layer; None: all, and what was read ahead."""
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
        self.check_files()
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
    def losses(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Negative log-likelihood in nats of all tokens except the first, (B, S - 1) float32 each.

        The output head is read in blocks of rows: neither it nor all logits are ever in memory as a
        whole. The batches have passed the layers, and lose their states.
        """
        # by blocks: the logarithm of the sum over the vocabulary so far, and the target's logit
        sums = [torch.full(b.tokens[:, 1:].shape, -torch.inf, device=self.device) for b in batches]
        targets = [torch.zeros_like(total) for total in sums]  # (B, S - 1) each, like the sums
        for batch in batches:
            state = batch.state[:, :-1]  # (B, S - 1, D): the last state predicts nothing
            normed = self.norm(state.to(self.device))
            # what is pinned is written into: torch would keep it beside a copy
            pinned = state.is_pinned()
            batch.state = state.copy_(normed) if pinned else normed.to(state.device)
            del state, normed  # the states before the norm, and those on the device
        for start, weight in self._head():
            for i, batch in enumerate(batches):
                # (B, S - 1, rows): the part of the vocabulary that begins at `start`
                logits = F.linear(batch.state.to(self.device), weight).float()
                sums[i] = torch.logaddexp(sums[i], logits.logsumexp(-1))
                row = batch.tokens[:, 1:, None].to(self.device) - start  # (B, S - 1, 1)
                # a target of another block reads any row here, which is thrown away
                target = logits.gather(-1, row.clamp(0, len(weight) - 1))  # (B, S - 1, 1)
                inside = (row >= 0) & (row < len(weight))
                targets[i] = torch.where(inside, target, targets[i][..., None])[..., 0]
        for batch in batches:
            batch.state = torch.empty(0)
        return [total - target for total, target in zip(sums, targets, strict=True)]

    def _head(self) -> Iterator[tuple[int, Tensor]]:
        for start, rows in self._blocks(OUTPUT):
            yield start, rows.to(self.device, self.dtype)

    def hidden(self, tokens: Tensor) -> Tensor:
        """The hidden states entering the final norm, (B, S, D), of one batch read on its own."""
        return self._passed(tokens).state.to(self.device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position, (B, S, V) float32."""
        return self.logits(self._passed(tokens))

    def _passed(self, tokens: Tensor) -> Batch:
        batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        self.run([batch])
        return batch

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The same of a batch that has passed the layers; it loses its state."""
        state, batch.state = batch.state, torch.empty(0)
        normed = self.norm(state.to(self.device))  # (B, S, D)
        shape = (*state.shape[:2], self.vocab_size)
        logits = torch.empty(shape, dtype=torch.float32, device=self.device)  # (B, S, V)
        for start, weight in self._head():
            logits[..., start : start + len(weight)] = F.linear(normed, weight)
        return logits
