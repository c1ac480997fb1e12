"""Other formats of a Llama: Hugging Face directories and GGUF files, to Meta's and back."""

from typing import TYPE_CHECKING

from llama.lazy import lazy

if TYPE_CHECKING:
    from llama.formats.gguf import GGUFFile, gguf_to_meta, llama_to_gguf
    from llama.formats.gguf_read import GGUFParts
    from llama.formats.hf import (
        HFCheckpoint,
        args_of,
        config_of,
        hf_to_meta,
        meta_infos,
        meta_to_hf,
    )
    from llama.formats.names import name_in, params_json, permute
    from llama.formats.safetensors import SafetensorsFile, open_weights, write_weights
    from llama.formats.tokenizers import tokenizer_json, with_bos, write_tokenizer
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["GGUFFile", "GGUFParts", "HFCheckpoint", "SafetensorsFile", "args_of", "config_of"]
__all__ += ["gguf_to_meta", "hf_to_meta", "llama_to_gguf", "meta_infos", "meta_to_hf", "name_in"]
__all__ += ["open_weights", "params_json", "permute", "tokenizer_json", "with_bos"]
__all__ += ["write_tokenizer", "write_weights"]
