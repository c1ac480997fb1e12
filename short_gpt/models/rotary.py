"""Where a model of transformers changes its rotary factors by the length of what it reads."""

from __future__ import annotations

from typing import Any


def longrope_limits(config: Any) -> list[int]:
    """Lengths beyond which LongRoPE (arXiv:2402.13753) takes its factors for long texts.

    Args:
        config: of the language model; its rotary settings may differ by kind of layer.

    Returns:
        No length for other rotary embeddings.
    """
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(settings, dict):
        return []
    kinds = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    name = "original_max_position_embeddings"
    outside = getattr(config, name, None) or config.max_position_embeddings
    found = {kind.get(name) or outside for kind in kinds if _kind(kind) == "longrope"}
    return sorted(found)


def _kind(settings: dict[str, Any]) -> object:
    return settings.get("rope_type", settings.get("type"))
