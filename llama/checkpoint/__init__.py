"""A Meta checkpoint directory as data: read, checked, cut among ranks, written; never executed."""

from typing import TYPE_CHECKING

from llama.lazy import lazy

if TYPE_CHECKING:
    from llama.checkpoint.meta import (
        CONVERSION,
        Checkpoint,
        check_shards,
        copy_tokenizer,
        read_params,
        reshard,
        write_model,
    )
    from llama.checkpoint.pth import Shard, TensorInfo, write_shard, write_shards
    from llama.checkpoint.sharding import full_shapes, part_of, shapes_of_rank, split_dim
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["CONVERSION", "Checkpoint", "Shard", "TensorInfo", "check_shards", "copy_tokenizer"]
__all__ += ["full_shapes", "part_of", "read_params", "reshard", "shapes_of_rank", "split_dim"]
__all__ += ["write_model", "write_shard", "write_shards"]
