"""Models as lm-eval's own class for transformers, which also reads a Llama of Meta's format."""

from __future__ import annotations

import copy
import logging
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llama import Llama
from llama.checkpoint.meta import read_conversion
from llama.formats.hf import config_of
from llama.formats.names import HF, name_in, permute
from llama.formats.tokenizers import write_tokenizer
from llama.io.json_files import write_json
from llama.parallel import model_parallel_size
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    batch_size: int = 1,
    **options: Any,
) -> object:
    """A model of transformers as ``lm_eval.models.huggingface.HFLM``, its softmax in float32.

    Args:
        options: further arguments of ``HFLM``, such as ``max_length``.

    Raises:
        MissingPackageError: lm-eval is missing.
        ShortGPTError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ShortGPTError("pass tokenizer=... to ShortHFModel: tasks are texts")
    hflm = harness("models.huggingface").HFLM
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every model that is loaded already
    try:
        return hflm(
            model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it may get a padding token
            batch_size=batch_size,
            softmax_dtype=torch.float32,
            **options,
        )
    finally:
        logger.setLevel(level)


class LlamaLike(Protocol):
    """What `llama_lm` asks of a model of this library."""

    @property
    def llama(self) -> Llama: ...


def llama_lm(short: LlamaLike, *, batch_size: int = 1) -> object:
    """A Llama as ``HFLM``, with the layers that it has now.

    The model of transformers shares the Llama's weights, except those of the q and k projections,
    whose rows it has in another order.

    Raises:
        MissingPackageError: lm-eval is missing.
        ShortGPTError: several ranks share the model, or its tokenizer does not know its file.
    """
    harness("models.huggingface")  # before anything is built
    llama = short.llama
    path = getattr(llama.tokenizer, "path", None)
    if model_parallel_size() > 1 or path is None:
        what = "a tokenizer without a file" if path is None else "a model that several ranks share"
        raise ShortGPTError(
            f"tasks cannot be run on {what}; convert the checkpoint to Hugging Face's format "
            "(`short-gpt convert --to hf`) and evaluate that"
        )
    model, tokenizer = _hugging_face_llama(llama, path)
    return hugging_face_lm(
        model, tokenizer, batch_size=batch_size, max_length=llama.model.params.max_seq_len
    )


def _hugging_face_llama(
    llama: Llama, tokenizer_path: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The Llama as transformers' model, as `convert` would write it, and its tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    args, weights = llama.model.params, llama.model.state_dict()
    embedding = weights["tok_embeddings.weight"]
    record = read_conversion(llama.ckpt_dir) if llama.ckpt_dir else {}
    # an output head that is the embedding shares its storage: it needs not be tied
    content, _ = config_of(
        args, embedding.dtype, tied=False, tokenizer=llama.tokenizer, record=record
    )
    with TemporaryDirectory() as folder:
        write_json(Path(folder, "config.json"), content)
        write_tokenizer(tokenizer_path, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig.from_dict(content)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    renamed = {name_in(HF, n): permute(n, weight, args, to=HF) for n, weight in weights.items()}
    model.load_state_dict(renamed, assign=True)
    # its frequencies are no weights, and so they are still without values
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(embedding.device)
    return model.eval(), tokenizer
