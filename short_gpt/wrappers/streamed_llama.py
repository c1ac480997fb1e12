"""ShortGPT for a Llama larger than the memory; B windows, S tokens, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from llama.checkpoint.meta import EMBEDDING, Checkpoint, check_vocabulary
from llama.parallel import choose_device, choose_dtype
from llama.sources import find_source, resolve
from llama.tokenizer import Tokenizer, check_text, find_tokenizer
from short_gpt.checkpoints.hf import write_hf
from short_gpt.checkpoints.meta import write_meta
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.target import StrPath, Target
from short_gpt.checkpoints.verify import check_same_logits
from short_gpt.data.texts import check_plain
from short_gpt.data.windows import batches, evaluated, text_number
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import Perplexity, Sample, check_loss, check_predicted
from short_gpt.models.decoder import MetaDecoder, Parameter, WeightChange, mixed_precision, pad
from short_gpt.models.families import META
from short_gpt.models.layer_calls import Call, LayerCalls
from short_gpt.models.loading import load_tokenizer, params_entries
from short_gpt.runtime.digest import files_digest
from short_gpt.runtime.errors import ShortGPTError, check
from short_gpt.runtime.memory import BLOCK_BYTES, Plan
from short_gpt.runtime.progress import bar, check_alone
from short_gpt.scoring.hooks import Scores
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.streamed_transformer import Batch, HFSource, MetaSource, StreamedTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_stream(
    ckpt_dir: StrPath,
    *,
    max_seq_len: int = 2048,
    device: str | None = None,
    dtype: str | None = None,
) -> StreamedTransformer:
    """A Llama whose layers are read from their files one at a time.

    ``ckpt_dir`` is in Meta's format, of any number of shards, or a Llama of Hugging Face's in
    safetensors, or a hub id with its owner; ``device`` and ``dtype`` are as in `OpenOptions`.
    """
    source = find_source(ckpt_dir)
    expected = "a Llama in Meta's format, or Hugging Face's in safetensors"
    check(source.kind != "gguf", "model to be streamed", str(source), expected)
    path, on = resolve(source), choose_device(device)
    kind = HFSource if find_source(path).kind == "hf" else MetaSource
    weights = kind(path, max_seq_len=max_seq_len)
    return StreamedTransformer(weights, device=on, dtype=choose_dtype(dtype, on))


class StreamedCalls(LayerCalls):
    """`LayerCalls` whose layers have weights inside `loaded` alone, one at a time."""

    def __init__(self, model: StreamedTransformer, *, mixed: bool = False) -> None:
        self._model, self.mixed = model, mixed
        model.release()
        self.family, self.count = META, len(model.layers)
        self._ready: nn.Module | None = None

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        layer = self.layer(index)
        complete = not any(p.is_meta for p in layer.parameters())
        # the last one stays until another is asked for
        if self._ready is not layer or not complete:
            self.close()
            self._model.load(layer)
            self._ready = layer
        yield layer

    def keep_only(self, index: int, modules: Sequence[nn.Module]) -> None:
        kept = {p for module in modules for p in module.parameters()}
        layer = self.layer(index)
        self._model.release(name for name, p in layer.named_parameters() if p not in kept)
        for module in layer.modules():
            if not kept.intersection(module.parameters()):
                module.to("meta")

    def close(self) -> None:
        if self._ready is not None:
            self._ready.to("meta")
            self._ready = None

    def layer(self, index: int) -> nn.Module:
        return self._model.layers[index]

    def call(self, index: int, state: Tensor) -> Call:
        return (state, None, self._model.freqs_cis[: state.shape[1]], None), {}

    def embed(self, tokens: Tensor) -> Tensor:
        batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        self._model.embed([batch], pin=False)  # it is kept, or goes into a file
        return batch.state

    def widths(self) -> tuple[int, int, int]:
        width, inputs, _ = super().widths()
        return width, inputs, self._model.dtype.itemsize  # layers without weights do not tell

    def memory(self) -> dict[str, int]:
        args, model = self._model.params, self._model
        sizes = [p.numel() for p in model.layers[0].parameters()]
        # a matrix of a Hugging Face file is there twice while its rows are put in order
        stored = 2 * max(sizes) * model.source.infos[EMBEDDING].dtype.itemsize
        embedding = args.max_seq_len * args.dim * model.dtype.itemsize + BLOCK_BYTES
        layer = sum(sizes) * model.dtype.itemsize
        return {"layer": layer, "weights as stored": max(stored, embedding - layer)}


class StreamedLlama(ScoredModel):
    """A Llama of whose checkpoint one layer at a time is in memory, as `open_stream` reads it.

    It gives the scores and perplexities of the model in memory. It does not generate, and is not
    searched by its loss, which would read the checkpoint for every token or candidate.
    `remove_layers` only skips layers; `save` writes the source's format without them.

    Windows pass the layers in rounds, as many as the memory holds; within a round ``batch_size``
    of them pass a layer together. ``stop`` and ``state`` act after a round; Ctrl-C loses it.

    Args:
        ckpt_dir: Llama in Meta's format, or in safetensors of Hugging Face's.
        n_prune_layers: Layers that `remove_layers` takes out. Default: it must be told.
        tokenizer_path: Tokenizer file. Default: the one beside the checkpoint.
        max_seq_len: Tokens of the longest window. Default: 2048.
        batch_size: Windows that pass a layer together; the memory must hold as many. Default: 1.
        max_memory: Bytes, or a text such as "3GB". Default: half of the free memory.

    Raises:
        ShortGPTError: ``max_memory`` holds no such batch, or several ranks run (torchrun).
    """

    streamed: ClassVar[bool] = True

    def __init__(
        self,
        ckpt_dir: StrPath,
        n_prune_layers: int | None = None,
        *,
        tokenizer_path: StrPath | None = None,
        max_seq_len: int = 2048,
        batch_size: int = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_memory: str | int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_alone("a streamed model")
        self.stream = open_stream(ckpt_dir, max_seq_len=max_seq_len, device=device, dtype=dtype)
        self.max_memory, directory = max_memory, self.stream.source.directory
        self.source = str(ckpt_dir)
        self.tokenizer_path = Path(str(tokenizer_path or find_tokenizer(directory)))
        self.tokenizer = Tokenizer(self.tokenizer_path)
        from_hf = isinstance(self.stream.source, HFSource)
        ids = self.stream.vocab_size
        check_vocabulary(self.tokenizer, self.tokenizer_path, ids, directory, spare=from_hf)
        own = tokenizer_path is None and from_hf
        self._hf_tokenizer = _hf_tokenizer(directory, trust_remote_code) if own else None
        self.plan(batch_size)
        self._together, self._progress = 1, False  # of a round: batch size, and a bar
        super().__init__(MetaDecoder(self.stream), n_prune_layers)

    @property
    def configuration(self) -> Mapping[str, object]:
        return params_entries(self.stream.params)

    def encode(self, text: str) -> list[int]:
        check_plain(text)
        if self._hf_tokenizer is None:
            return self.tokenizer.encode(text, bos=self.tokenizer.add_bos, eos=False)
        check_text(text)
        return self._hf_tokenizer(text, verbose=False)["input_ids"]

    def plan(self, batch_size: int = 1, *, logits: bool = False) -> Plan:
        """The memory that a run takes, and the windows of a round; see `runtime.memory.plan`."""
        return self.stream.plan(batch_size=batch_size, max_memory=self.max_memory, logits=logits)

    def _perplexity(
        self,
        windows: Iterable[Sequence[int]],
        batch_size: int,
        total: int | None,
        progress: bool,
        reference: Reference | None = None,
    ) -> Perplexity:
        assert reference is None  # of a streamed model there is none
        samples: list[Sample] = []
        size = self.windows_at_once(batch_size, progress)
        with bar("perplexity", total=total, unit="window", show=progress) as shown:
            for part in batches(windows, size):
                group = self._pass("perplexity", part)
                with mixed_precision(self.decoder.mixed, self.decoder.device):
                    rows = self.stream.losses(group)  # (B, S - 1) nats of each batch
                pairs = zip(rows, group, strict=True)
                losses = torch.cat([row.cpu()[batch.mask[:, 1:]] for row, batch in pairs]).double()
                each = losses.split([len(window) - 1 for window in part])
                for window, values in zip(part, each, strict=True):
                    own = values[torch.tensor([*evaluated(window)[1:]], dtype=torch.bool)]
                    samples.append(Sample(text_number(window), float(own.sum()), len(own)))
                check_loss(float(losses.sum()))
                shown.update(len(part))
        check_predicted(sum(s.tokens for s in samples))
        return Perplexity.of(samples)

    def window_perplexities(
        self,
        windows: Sequence[Sequence[int]],
        *,
        progress: bool = True,
        reference: Reference | None = None,
    ) -> list[Perplexity]:
        assert reference is None  # `reference` gives none
        samples = self._perplexity(windows, 1, len(windows), progress).samples
        return [replace(Perplexity.of([s]), precision=self.precision) for s in samples]

    def window_logits(
        self, windows: Sequence[Sequence[int]], *, batch_size: int = 1
    ) -> Iterator[Tensor]:
        self._together, self._progress = batch_size, False
        for part in batches(windows, self.plan(batch_size, logits=True).windows):
            for batch in self._pass("logits", part):
                with mixed_precision(self.decoder.mixed, self.decoder.device):
                    logits = self.stream.logits(batch)  # (B, S, V)
                # real tokens come first: views, as copies would take as much again
                yield from (row[:real] for row, real in zip(logits, batch.mask.sum(1), strict=True))
                del logits  # before the next ones, which take as much

    def score_batch(self, windows: Sequence[Sequence[int]]) -> Scores:
        scores = []
        for batch in self._pass("scoring", windows, watched=True):
            assert batch.seen is not None
            scores.append(batch.seen.scores())
            scores[-1].check_finite(self.kept)
        return Scores.cat(scores)

    def _pass(self, name: str, windows: Sequence[Sequence[int]], **how: bool) -> list[Batch]:
        """Takes the windows of one round through the layers, so many of them together."""
        parts = [pad(part, self.decoder) for part in batches(windows, self._together)]
        group = [Batch(ids, mask, **how) for ids, mask in parts]
        text, steps = f"{name} {len(windows)} windows", len(windows) * len(self.decoder.layers)
        shown_bar = bar(text, total=steps, unit="layer", show=self._progress)
        with shown_bar as shown, mixed_precision(self.decoder.mixed, self.decoder.device):
            self.stream.run(group, step=lambda batch: shown.update(len(batch.mask)))
        return group

    def plan_text(self, batch_size: int = 1) -> str:
        return self.plan(batch_size).describe()

    def save(
        self,
        out_dir: StrPath,
        *,
        facts: Mapping[str, object] | None = None,
        measured: Mapping[str, Perplexity] | None = None,
        overwrite: bool = False,
    ) -> Path:
        source, changed = self.stream.source, sorted(self.changed)
        if not self.removed and not changed:
            raise ShortGPTError("nothing was removed yet; call remove_layers first")
        self.check_whole()
        self.stream.check_files()
        directory = source.directory
        record = Provenance.of(
            self, self.source, directory=directory, facts=facts, measured=measured
        )

        def as_stored(number: int, name: str) -> Tensor:
            return source.as_stored(f"layers.{number}.{name}", self.stream.weight(number, name))

        # read when it is written, in the file's layout
        new = {source.stored_name(f"layers.{i}.{n}"): partial(as_stored, i, n) for i, n in changed}
        target = Target(out_dir, overwrite, verify=self._check_saved if changed else None)
        if isinstance(source, HFSource):
            return write_hf(directory, target, self.kept, record, new)
        target.check(source=directory)
        path, checkpoint = self.tokenizer_path, Checkpoint(directory)
        return write_meta(checkpoint, target, self.kept, record, replaced=new, tokenizer_path=path)

    def _check_saved(self, directory: Path) -> None:
        stream = self.stream
        device, dtype = str(stream.device), str(stream.dtype).removeprefix("torch.")
        size = min(8, stream.params.max_seq_len)
        tokens = torch.arange(size).remainder(stream.vocab_size)[None]  # (1, S)
        ours = stream(tokens)
        stream.release()  # before another model takes as much
        saved = open_stream(directory, max_seq_len=size, device=device, dtype=dtype)
        check_same_logits(ours, saved(tokens))

    def runs_in(self) -> tuple[torch.dtype, torch.device]:
        return self.stream.dtype, self.stream.device  # the layers' own weights come and go

    def windows_at_once(self, batch_size: int, progress: bool = False) -> int:
        # all windows of a round, of which ``batch_size`` pass a layer together
        self._together, self._progress = batch_size, progress
        return self.plan(batch_size).windows

    def weights_digest(self) -> str:
        if self.changes:
            raise ShortGPTError(
                "a streamed model whose weights were changed has no files yet that identify it: "
                "save it, and open that"
            )
        return files_digest(self.stream.source.files)

    def layer_calls(self) -> LayerCalls:
        return StreamedCalls(self.stream, mixed=self.decoder.mixed)

    def change_weights(
        self, how: Mapping[str, object], values: Mapping[Parameter, Tensor]
    ) -> Callable[[], None]:
        # values are asked for whenever their layer is read
        change = WeightChange(how, frozenset(values))
        self.stream.replaced = [*self.stream.replaced, values]
        self.note_change(change)

        def undo() -> None:
            self.stream.replaced = [v for v in self.stream.replaced if v is not values]
            self.forget_change(change)

        return undo


def _hf_tokenizer(directory: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(str(directory), {"trust_remote_code": trust_remote_code})
    except ShortGPTError as error:
        raise ShortGPTError(f"{directory} cannot be loaded: {error}") from error
