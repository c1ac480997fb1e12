"""Checkpoints: pruned in their files, written from memory, verified, with a record of all that.

`prune_checkpoint` prunes any format without loading a weight; a model in memory has ``save``.
"""

from short_gpt.checkpoints.gguf import write_gguf
from short_gpt.checkpoints.hf import save_as_meta, save_hf
from short_gpt.checkpoints.hub import model_card, write_provenance
from short_gpt.checkpoints.meta import save_meta
from short_gpt.checkpoints.provenance import PROVENANCE, Provenance
from short_gpt.checkpoints.prune import prune_checkpoint
from short_gpt.checkpoints.target import Target, format_of
from short_gpt.checkpoints.verify import (
    ROUNDING,
    Fingerprint,
    check_same,
    copy_weights,
    fingerprint,
)

__all__ = ["PROVENANCE", "ROUNDING", "Fingerprint", "Provenance", "Target", "check_same"]
__all__ += ["copy_weights", "fingerprint", "format_of", "model_card"]
__all__ += ["prune_checkpoint"]
__all__ += ["save_as_meta", "save_hf", "save_meta", "write_gguf", "write_provenance"]
