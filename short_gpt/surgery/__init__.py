"""Taking layers, or halves of them, out of a live model, for good or for a trial.

`layers` removes whole ones, `sublayers` attentions and MLPs; `prefill` skips layers while a prompt
is read; `changes` is the record of what was done to weights.
"""

from short_gpt.surgery.changes import (
    Parameter,
    WeightChange,
    parameters_of,
    restored_on_error,
)
from short_gpt.surgery.layers import remove_layers, without_layers
from short_gpt.surgery.prefill import skipped_in_prefill
from short_gpt.surgery.sublayers import remove_sublayers, sublayer_parameters

__all__ = [
    "Parameter",
    "WeightChange",
    "parameters_of",
    "remove_layers",
    "remove_sublayers",
    "restored_on_error",
    "skipped_in_prefill",
    "sublayer_parameters",
    "without_layers",
]
