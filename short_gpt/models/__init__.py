"""Models of either kind as layers over token ids: Meta's Llama and those of transformers."""

from typing import TYPE_CHECKING

from llama import lazy

if TYPE_CHECKING:
    from short_gpt.models.decoder import (
        Decoder,
        MetaDecoder,
        Parameter,
        WeightChange,
        pad,
        parameters_of,
        remove_layers,
        restored_on_error,
        without_layers,
    )
    from short_gpt.models.families import FAMILIES, Family, family_of
    from short_gpt.models.hf import HFDecoder, find_layers
    from short_gpt.models.numbering import check_count, check_exist, check_layers, span
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["FAMILIES", "Decoder", "Family", "HFDecoder", "MetaDecoder", "Parameter", "WeightChange"]
__all__ += ["check_count", "check_exist", "check_layers", "family_of", "find_layers", "pad"]
__all__ += ["parameters_of", "remove_layers", "restored_on_error", "span", "without_layers"]
