"""A streamed Llama as a `Decoder`: windows pass its layers in rounds.

Shapes: B windows of a batch, S tokens, L layers, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llama.parallel import choose_device, choose_dtype
from short_gpt.data.windows import batches
from short_gpt.models.decoder import pad
from short_gpt.models.meta import MetaDecoder
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar, set_rate
from short_gpt.scoring.hooks import Scores
from short_gpt.wrappers.streamed_batch import Batch
from short_gpt.wrappers.streamed_transformer import StreamedTransformer
from short_gpt.wrappers.streamed_weights import open_source


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
        ShortGPTError: a file is damaged, the model is not a Llama, or device or dtype are unknown.
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
        """Scores the windows of one round; arguments and errors as those of `hooks.score`."""
        if all_tokens:
            raise ShortGPTError(
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
        # (B, S - 1) losses of each batch; only those of real tokens count
        pairs = zip(self.model.losses(group), group, strict=True)
        return torch.cat([loss.cpu()[batch.mask[:, 1:]] for loss, batch in pairs])

    def window_logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Logits at all tokens of each window of one round, (S, V) float32 each."""
        for batch in self._pass("logits", windows):
            logits = self.model.logits(batch)  # (B, S, V)
            yield from (row[real] for row, real in zip(logits, batch.mask, strict=True))

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
