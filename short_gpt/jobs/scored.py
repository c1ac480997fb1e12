"""What scores are of: weights, configuration, and the tokenizer that their texts were read with."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llama.args import ModelArgs
from llama.checkpoint.meta import read_params
from llama.io.json_files import read_json
from llama.io.sources import Source, find_source, resolve
from llama.tokenizer import find_tokenizer
from short_gpt.models.config_file import config_digest, params_entries
from short_gpt.models.loading import TOKENIZER
from short_gpt.runtime.digest import files_digest, json_digest
from short_gpt.wrappers.opening import weights_of

TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Scored:
    """Digests by which saved scores are told to be a model's.

    Attributes:
        weights: of `weights_of`; None where nothing is known, as with the others.
        tokenizer: of `tokenizer_of`.
        configuration: of `configuration_of`.
    """

    weights: str | None = None
    tokenizer: str | None = None
    configuration: str | None = None

    @classmethod
    def of(cls, model: str, tokenizer_path: str | None = None) -> Scored:
        """Those of a model as its files are now; arguments as for `tokenizer_of`."""
        source = find_source(model)
        tokenizer = tokenizer_of(source, tokenizer_path)
        return cls(weights_of(source), tokenizer, configuration_of(source))


UNKNOWN = Scored()  # of files that say nothing, and of ranks that do not speak


def tokenizer_of(source: str | Source, path: str | None = None) -> str | None:
    """A digest of the tokenizer that a checkpoint's texts are read with, without chat templates.

    Args:
        source: as for `weights_of`.
        path: of a tokenizer file that is read in place of the checkpoint's; None looks beside it.

    Returns:
        None where there are no files of one, as with GGUF, whose weights' digest covers it.
    """
    kind, files = find_source(source).kind, []
    if kind == "meta" or path is not None:
        with suppress(FileNotFoundError):
            file = Path(path or find_tokenizer(source))
            files = [file, *file.parent.glob(TOKENIZER_CONFIG)]
    elif kind != "gguf":
        files = [p for p in resolve(source).iterdir() if TOKENIZER.fullmatch(p.name)]
    parts = [_tokenizer_part(path) for path in sorted(files) if path.is_file()]
    return json_digest(parts) if parts else None


def configuration_of(source: str | Source) -> str | None:
    """A digest of what counts of a checkpoint's configuration, by `models.config_file`.

    Args:
        source: as for `weights_of`.

    Returns:
        None where no file holds one alone, as with GGUF, whose weights' digest covers it.
    """
    kind = find_source(source).kind
    if kind == "meta":
        return config_digest(params_entries(ModelArgs.from_params(read_params(Path(source)))))
    path = None if kind == "gguf" else resolve(source) / "config.json"
    return config_digest(read_json(path)) if path is not None and path.is_file() else None


def _tokenizer_part(path: Path) -> str:
    if path.name != TOKENIZER_CONFIG:
        return files_digest([path])
    config = read_json(path)
    return json_digest({name: config[name] for name in sorted(config) if name != "chat_template"})
