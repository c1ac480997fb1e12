"""A recipe by which mergekit makes the pruned model from the original."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from llama.io.sources import find_source, resolve
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import read_record


def mergekit_recipe(source: str, keep: Sequence[int], dtype: str = "bfloat16") -> str:
    """A passthrough recipe for mergekit that makes a model of these layers.

    Args:
        source: the original model, a directory or a hub id. A directory is named from the root: a
            relative name mergekit takes for a hub id, and looks for it where it runs.
        keep: numbers of the layers that stay, ascending.
        dtype: of the merged weights.

    Returns:
        YAML, one slice for every run of layers; the end of a range is not part of it.

    Raises:
        ShortGPTError: no layers, or not ascending.

    Example:
        >>> print(mergekit_recipe("llama-2-7b", [0, 1, 3]))
        slices:
          - sources:
              - model: "llama-2-7b"
                layer_range: [0, 2]
          - sources:
              - model: "llama-2-7b"
                layer_range: [3, 4]
        merge_method: passthrough
        dtype: bfloat16
        <BLANKLINE>
    """
    keep = list(keep)
    if not keep or keep[0] < 0 or keep != sorted(set(keep)):
        raise ShortGPTError(f"expected ascending numbers of the layers that stay, got {keep}")
    starts = [i for i in keep if i - 1 not in keep]
    ends = [i + 1 for i in keep if i + 1 not in keep]
    name = os.path.abspath(source) if Path(source).is_dir() else str(source)
    lines = ["slices:"]
    for start, end in zip(starts, ends, strict=True):
        lines += ["  - sources:", f"      - model: {json.dumps(name, ensure_ascii=False)}"]
        lines += [f"        layer_range: [{start}, {end}]"]
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {dtype}", ""])


def _lists_kinds(directory: Path) -> bool:
    """Whether the config, as transformers reads it for mergekit, lists its layers' kinds."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except ValueError:  # of no known family, which the cut itself will say
        return False
    return bool(getattr(config.get_text_config(decoder=True), "layer_types", None))


def recipe_dtype(source: str | PathLike[str]) -> str:
    """The dtype of the weights that a recipe of this model asks for: what its config says.

    Args:
        source: Hugging Face directory or hub id.

    Raises:
        ShortGPTError: a Meta checkpoint, which mergekit does not read; or a config that lists its
            layers' kinds, of which mergekit (0.1.5) changes the number of layers alone, so that
            transformers refuses to write it.
        FileNotFoundError: there is no such model.
    """
    if find_source(source).kind in ("meta", "gguf"):
        raise ShortGPTError("`recipe`: mergekit reads Hugging Face's format; convert it first")
    directory = resolve(source)
    config = read_record(directory / "config.json")
    if _lists_kinds(directory):
        raise ShortGPTError(
            "`recipe`: this model's config lists the kinds of its layers (layer_types), of which "
            "mergekit changes only the number: its result has no config.json. Leave `recipe` out "
            "and use the pruned checkpoint, which is complete"
        )
    config = {**config, **(config.get("text_config") or {})}
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def is_recipe(path: Path) -> bool:
    """Whether a file is a recipe that `mergekit_recipe` made."""
    content = path.read_bytes()
    return content.startswith(b"slices:") and b"\nmerge_method: passthrough\n" in content
