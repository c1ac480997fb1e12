"""Models of either kind as layers over token ids: Meta's Llama and those of transformers."""

from short_gpt.models.decoder import Decoder, pad, remove_layers, without_layers
from short_gpt.models.families import FAMILIES, Family, family_of
from short_gpt.models.hf import HFDecoder, find_layers
from short_gpt.models.meta import MetaDecoder
from short_gpt.models.numbering import check_count, check_exist, check_layers, span
from short_gpt.models.weight_changes import (
    Parameter,
    WeightChange,
    parameters_of,
    restored_on_error,
)

__all__ = ["FAMILIES", "Decoder", "Family", "HFDecoder", "MetaDecoder", "Parameter", "WeightChange"]
__all__ += ["check_count", "check_exist", "check_layers", "family_of", "find_layers", "pad"]
__all__ += ["parameters_of", "remove_layers", "restored_on_error", "span"]
__all__ += ["without_layers"]
