"""A checkpoint's weights in a `Transformer`, on any number of model-parallel ranks."""

from __future__ import annotations

import torch
from torch import nn

from llama.args import check_split
from llama.checkpoint.meta import LAYER_NAME, Checkpoint
from llama.checkpoint.sharding import split_dim
from llama.model import Transformer
from llama.parallel import model_parallel_rank, model_parallel_size


def load_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The checkpoint's Transformer on any number of ranks that divides the heads.

    Each rank reads its part from the shards that hold it, tensor by tensor: where there are as
    many shards as ranks it maps its own file, else it copies no more than its part. Tied weights
    stay tied.

    Args:
        checkpoint: opened, of any number of shards.
        device: where the weights go.
        dtype: of the weights.

    Raises:
        InputError: heads, widths or vocabulary do not divide among the ranks.
    """
    check_split(checkpoint.args, model_parallel_size())
    model = Transformer(checkpoint.args, vocab_parallel=checkpoint.vocab_parallel, device="meta")
    state = _parameters(checkpoint, _Part(checkpoint, device, dtype))
    # assign: the parameters on "meta" have no memory that values could be copied to
    model.load_state_dict(state, strict=True, assign=True)
    model.freqs_cis = model.freqs_cis.to(device)
    return model.eval()


def _parameters(checkpoint: Checkpoint, part: _Part) -> dict[str, nn.Parameter]:
    """This rank's part of every weight, by its name."""
    state: dict[str, nn.Parameter] = {}
    for names in _groups(checkpoint, whole=part.own):
        with checkpoint.mapped():
            state |= {name: part.parameter(name) for name in names}
    return state


def _groups(checkpoint: Checkpoint, *, whole: bool) -> list[list[str]]:
    """Names that are read while the files are mapped once: all of them, or those of a layer.

    Pages of a mapped file count as the process's memory until the mapping ends. Where a rank
    copies parts out of the files, one layer's pages at a time are enough.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(checkpoint.infos.keys() - checkpoint.ignored):
        layer = LAYER_NAME.fullmatch(name)
        groups.setdefault(layer[1] if layer and not whole else "", []).append(name)
    return list(groups.values())


class _Part:
    """What this rank holds of a checkpoint, as parameters; each is made once.

    Attributes:
        own: whether there is a file for every rank, so that this one can use its own as it is.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.rank, self.ranks = model_parallel_rank(), model_parallel_size()
        self.own = len(checkpoint.shards) == self.ranks
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        self._made: dict[object, nn.Parameter] = {}

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of this name; the same one for weights that are tied."""
        by = self._checkpoint.vocab_parallel
        # what shares its bytes in the files does so on a rank too, if it is cut alike
        dim = split_dim(name, vocab_parallel=by) if self.ranks > 1 else None
        source = (self._checkpoint.infos[name].storage, dim)
        if source not in self._made:
            part = self._checkpoint.read(name, rank=self.rank, ranks=self.ranks)
            # a copy where the part is not the file's: a view would keep other parts mapped
            layout = torch.contiguous_format
            part = part.to(self._device, self._dtype, copy=not self.own, memory_format=layout)
            self._made[source] = nn.Parameter(part)
        return self._made[source]
