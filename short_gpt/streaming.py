"""ShortGPT for a Llama larger than the memory: scored straight from its checkpoint directory.

Shapes: B windows of a batch, L layers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from llama.parallel import choose_device, choose_dtype, several_ranks
from llama.tokenizer import Tokenizer, find_tokenizer
from short_gpt.data import batches
from short_gpt.decoder import MetaDecoder, pad
from short_gpt.evaluate import Perplexity
from short_gpt.layer_source import HFSource, digest, open_source
from short_gpt.memory_plan import Plan
from short_gpt.progress import bar, set_rate
from short_gpt.short_llama import ShortLlama
from short_gpt.short_model import _count
from short_gpt.stopping import Verdict
from short_gpt.streamed_transformer import Batch, StreamedTransformer
from short_gpt.watch import Scores


def open_stream(
    ckpt_dir: str | os.PathLike[str],
    *,
    max_seq_len: int = 2048,
    device: str | None = None,
    dtype: str | None = None,
) -> StreamedTransformer:
    """A Llama whose layers are read from their files one at a time.

    Args:
        ckpt_dir: a directory in Meta's format, of any number of shards, or a Llama of Hugging
            Face's in safetensors.
        max_seq_len: longest window to come, in tokens.
        device: where layers run; None takes CUDA, MPS or CPU, the first there is.
        dtype: of weights and states there; None is float32 on CPU, bfloat16 on CUDA, else float16.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the model is not a Llama, or device or dtype are unknown.
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    source = open_source(ckpt_dir, max_seq_len=max_seq_len)
    return StreamedTransformer(source, device=place, dtype=kind)


class StreamedDecoder(MetaDecoder):
    """A streamed model as the scoring core sees it: windows pass the layers in rounds.

    Attributes:
        batch_size: windows of a round that pass a layer together.
        progress: whether to show a bar for every round.
    """

    def __init__(self, model: StreamedTransformer) -> None:
        super().__init__(model)
        self.batch_size, self.progress = 1, False

    def score(
        self,
        windows: Sequence[Sequence[int]],
        *,
        layers: Sequence[int],
        sublayers: bool = False,
        all_tokens: bool = False,
    ) -> Scores:
        """Scores the windows of one round; arguments and errors as those of `watch.score`."""
        if all_tokens:
            raise ValueError(
                "angles at all tokens need the states of all layers at once; open the model "
                "without stream"
            )
        found = []
        for batch in self._pass("scoring", windows, watched=True, sublayers=sublayers):
            assert batch.seen is not None
            found.append(batch.seen.scores())
            found[-1].check_finite(layers)
        return Scores.cat(found)

    def losses(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """Negative log-likelihoods in nats of all predicted tokens of one round, (N,)."""
        group = self._pass("perplexity", windows)
        pairs = zip(self.model.losses(group), group, strict=True)
        return torch.cat([loss.cpu()[batch.mask[:, 1:]] for loss, batch in pairs])

    def _pass(
        self,
        name: str,
        windows: Sequence[Sequence[int]],
        *,
        watched: bool = False,
        sublayers: bool = False,
    ) -> list[Batch]:
        """Takes windows through all layers, in batches."""
        group = [
            Batch(*pad(part, self), watched=watched, sublayers=sublayers)
            for part in batches(windows, self.batch_size)
        ]
        tokens, steps = 0, len(windows) * len(self.layers)

        def step(batch: Batch) -> None:
            nonlocal tokens
            tokens += int(batch.mask.sum())
            set_rate(shown, tokens // len(self.layers))
            shown.update(len(batch.mask))

        with bar(
            f"{name} {len(windows)} windows", total=steps, unit="layer", show=self.progress
        ) as shown:
            self.model.run(group, step=step)
        return group


class Streamed:
    """What stands for a ``Llama`` in `StreamedLlama`: model, tokenizer, and where they are from."""

    def __init__(self, model: StreamedTransformer, tokenizer: Any, tokenizer_path: Path) -> None:
        self.model, self.tokenizer, self.tokenizer_path = model, tokenizer, tokenizer_path
        self.ckpt_dir = model.source.directory

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "a model that is streamed cannot generate: every token would read all of the "
            "checkpoint; open it without stream"
        )

    text_completion = chat_completion = generate


def _hf_tokenizer(directory: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError(
            'Hugging Face directories need: pip install "short-gpt[hf]"; or pass tokenizer_path'
        ) from None
    return AutoTokenizer.from_pretrained(directory)


class StreamedLlama(ShortLlama):
    """`ShortLlama` over a checkpoint of which one layer at a time is in memory.

    Scores and perplexities are those of the model in memory. Layers can be removed, which only
    skips them, and `save` writes a checkpoint in Meta's format without them.

    Args:
        ckpt_dir: as for `open_stream`.
        n_prune_layers: how many layers `remove_layers` takes out; may be set later.
        tokenizer_path: tokenizer file; None looks beside the checkpoint, and reads texts by
            transformers where that is the checkpoint's format.
        max_seq_len, device, dtype: as for `open_stream`.
        batch_size: of the runs to come; checked here against ``max_memory``.
        max_memory: of this process in the machine's memory, in bytes or like "3GB"; None takes
            half of what is free. It decides how many windows go through the layers together.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the model is not a Llama, the tokenizer is another model's,
            ``max_memory`` is too little, or this is one of several ranks.
    """

    def __init__(
        self,
        ckpt_dir: str | os.PathLike[str],
        n_prune_layers: int | None = None,
        *,
        tokenizer_path: str | os.PathLike[str] | None = None,
        max_seq_len: int = 2048,
        batch_size: int = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_memory: str | int | None = None,
    ) -> None:
        if several_ranks():
            raise ValueError("a streamed model runs on one rank; start it alone, not by torchrun")
        self.stream = open_stream(ckpt_dir, max_seq_len=max_seq_len, device=device, dtype=dtype)
        directory, self.max_memory = self.stream.source.directory, max_memory
        path = Path(str(tokenizer_path)) if tokenizer_path else find_tokenizer(directory)
        tokenizer = Tokenizer(path)
        padded = isinstance(self.stream.source, HFSource)  # the embedding may have rows to spare
        most = self.stream.vocab_size
        if tokenizer.n_words > most or (tokenizer.n_words < most and not padded):
            raise ValueError(
                f"the tokenizer {path} has {tokenizer.n_words} words, the checkpoint {directory} "
                f"{most}; they do not belong together"
            )
        theirs = padded and tokenizer_path is None
        self._hf_tokenizer = _hf_tokenizer(directory) if theirs else None
        self.plan(batch_size)
        super().__init__(Streamed(self.stream, tokenizer, path), n_prune_layers)
        self.decoder = self._streamed = StreamedDecoder(self.stream)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, as in memory: by transformers where the checkpoint is its format."""
        if self._hf_tokenizer is None:
            return super().encode(text)
        return self._hf_tokenizer(text, verbose=False)["input_ids"]

    def plan(self, batch_size: int = 1) -> Plan:
        """The memory that a run will take, and the windows of a round.

        Raises:
            ValueError: ``max_memory`` is too little; the message says the least.
        """
        return self.stream.plan(batch_size=batch_size, max_memory=self.max_memory)

    def measure(
        self,
        windows: Iterable[Sequence[int]],
        *,
        batch_size: int = 1,
        progress: bool = True,
        **options: Any,
    ) -> Verdict | None:
        """Scores windows as `ShortModel.measure` does, in rounds.

        Args:
            windows, options: as there; angles at all tokens are not possible here. Whether the
                answer is settled is looked at, and the state saved, after a round.
            batch_size: windows of a round that pass a layer together.
            progress: whether to show bars.

        Raises:
            ValueError: a window does not fit the model, or a batch not into ``max_memory``.
            FloatingPointError: a weight or a state is NaN or infinite; nothing of that round
                counts, the rounds before it do.
        """
        self._streamed.batch_size, self._streamed.progress = batch_size, progress
        size = self.plan(batch_size).windows
        return super().measure(windows, batch_size=size, progress=progress, **options)

    def perplexity(
        self,
        windows: Iterable[Sequence[int]],
        *,
        batch_size: int = 1,
        total: int | None = None,
        progress: bool = True,
    ) -> Perplexity:
        """Perplexity of the model as it is now; arguments and errors as in `measure`."""
        nats, predicted, count = 0.0, 0, 0
        for part in self._rounds("perplexity", windows, batch_size, total, progress):
            losses = self._streamed.losses(part)
            nats += float(losses.double().sum())
            predicted += len(losses)
            count += len(part)
            if not math.isfinite(nats):
                raise FloatingPointError(
                    "the model gave a NaN or infinite loss; check the weights, or another dtype"
                )
        if not predicted:
            raise ValueError("expected windows of at least 2 tokens; nothing was predicted")
        found = Perplexity(nats, predicted, count)
        if len(self._present) == len(self.decoder.layers):
            self.quality[tuple(self._present)] = found
        return found

    def search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a search would read all of the checkpoint for every candidate."""
        raise ValueError(
            "a model that is streamed is not searched by its loss, which would read all of the "
            "checkpoint for every candidate; open it without stream"
        )

    def weights_digest(self) -> str:
        """A digest of the checkpoint's files, by which another one is told."""
        return digest(self.stream.source.files)

    def _rounds(
        self,
        name: str,
        windows: Iterable[Sequence[int]],
        batch_size: int,
        total: int | None,
        progress: bool,
    ) -> Iterator[list[Sequence[int]]]:
        """The windows of each round."""
        self._streamed.batch_size, self._streamed.progress = batch_size, progress
        total = _count(windows) if total is None else total
        with bar(name, total=total, unit="window", show=progress) as shown:
            for part in batches(windows, self.plan(batch_size).windows):
                yield part
                shown.update(len(part))

    def _check_weights(self) -> None:
        """Weights are checked as they are read."""
