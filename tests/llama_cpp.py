"""llama.cpp as a client of files that were written here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest


def ggml_bytes(rows: np.ndarray, kind: int) -> np.ndarray:
    """What ggml's own code, inside llama.cpp, makes of rows (N, K) of float32, in bytes."""
    ggml = ctypes.PyDLL(pytest.importorskip("xllamacpp").xllamacpp.__file__)
    kinds = (ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p)
    ggml.ggml_quantize_chunk.argtypes, ggml.ggml_quantize_chunk.restype = kinds, ctypes.c_size_t
    rows = np.ascontiguousarray(rows)
    shape = gguf.quants.quant_shape_to_byte_shape(rows.shape, gguf.GGMLQuantizationType(kind))
    out = np.zeros(shape, np.uint8)
    size = ggml.ggml_quantize_chunk(kind, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
    assert size == out.nbytes
    return out


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, with states in float32.

    Raises:
        RuntimeError: llama.cpp does not load the file.
    """

    def __init__(self, path: Path, *, context: int = 512, embedding: bool = False) -> None:
        client = pytest.importorskip("xllamacpp")
        params = client.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.verbosity = context, 1, -1
        params.warmup = params.fit_params = False
        params.embedding, params.n_batch, params.n_ubatch = embedding, context, context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = client.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = client.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = client.Server(params)

    def _complete(self, prompt: str | Sequence[int], count: int, **more: object) -> dict:
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, **more}
        return self._server.handle_completions(asked)

    def greedy(self, prompt: str | Sequence[int], count: int) -> list[int]:
        """The likeliest next tokens."""
        found = self._complete(prompt, count, n_probs=1)["choices"][0]["logprobs"]["content"]
        return [entry["id"] for entry in found]

    def logprobs(
        self, prompt: str | Sequence[int], top: int = 50, *, chosen: int | None = None
    ) -> dict[int, float]:
        """Log probabilities of the likeliest tokens after a text or token ids.

        ``chosen`` is the token that is taken then, which changes none of them: llama.cpp tells
        nothing of a token that is half a character.
        """
        more = {} if chosen is None else {"logit_bias": [[chosen, 1e6]]}
        asked = self._complete(prompt, 1, n_probs=top, **more)
        found = asked["choices"][0]["logprobs"]["content"]
        return {entry["id"]: entry["logprob"] for entry in found[0]["top_logprobs"]}

    def embed(self, ids: Sequence[int]) -> list[float]:
        """What an encoder makes of token ids."""
        return self._server.handle_embeddings({"input": list(ids)})["data"][0]["embedding"]

    def count(self, text: str) -> int:
        """How many tokens llama.cpp makes of a text."""
        return self._complete(text, 1)["usage"]["prompt_tokens"]
