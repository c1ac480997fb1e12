"""The lm-evaluation-harness as far as it is here, and models of transformers as it knows them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from short_gpt.runtime.errors import MissingPackageError, ShortGPTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def harness(module: str) -> ModuleType:
    """A module of lm-eval, as in ``harness("api.model")``; the package gives no types.

    Raises:
        MissingPackageError: lm-eval is missing.
    """
    try:
        return import_module(f"lm_eval.{module}")
    except ImportError:
        raise MissingPackageError(
            'evaluation on tasks needs: pip install "short-gpt[eval]"'
        ) from None


def hugging_face_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, batch_size: int = 1
) -> object:
    """A model of transformers as ``lm_eval.models.huggingface.HFLM``, its softmax in float32.

    Raises:
        MissingPackageError: lm-eval is missing.
        ShortGPTError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ShortGPTError("pass tokenizer=... to ShortHFModel: tasks are texts")
    hflm = harness("models.huggingface").HFLM
    with _quiet("lm_eval.models.huggingface"):  # it warns of every model that is loaded already
        return hflm(
            model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it may get a padding token
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
