"""Other formats of a Llama: Hugging Face directories and GGUF files, to Meta's and back."""

from llama.formats.convert import gguf_to_meta, hf_to_meta, meta_to_hf
from llama.formats.gguf import GGUFFile, llama_to_gguf
from llama.formats.gguf_read import GGUFParts
from llama.formats.hf import HFCheckpoint, args_of, config_of, meta_infos
from llama.formats.names import GGUF, HF, META, name_in, params_json, permute
from llama.formats.safetensors import SafetensorsFile, open_weights, write_weights
from llama.formats.tokenizers import tokenizer_json, with_bos, write_tokenizer

__all__ = ["GGUF", "HF", "META", "GGUFFile", "GGUFParts", "HFCheckpoint", "SafetensorsFile"]
__all__ += ["args_of", "config_of", "gguf_to_meta", "hf_to_meta", "llama_to_gguf"]
__all__ += ["meta_infos", "meta_to_hf", "name_in", "open_weights", "params_json", "permute"]
__all__ += ["tokenizer_json", "with_bos", "write_tokenizer", "write_weights"]
