"""What a source of weights is, by its name and by what lies there; models of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from llama.errors import InputError, check

Kind = Literal["meta", "hf", "gguf", "hub"]
FETCHED = ["*.json", "*.safetensors", "*.jinja", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]
FETCHED += ["tokenizer*", "*.model", "*.tiktoken", "*.bpe", "*.txt"]  # of tokenizers
TEMPLATES = "additional_chat_templates"  # a folder of those with a name
# Models known by a name alone, where nothing of that name is here, and what fetches each.
NAMED: dict[str, Callable[[], str]] = {}


class BuiltinName(str):
    """A name of `NAMED`, whatever else has it here."""


@dataclass(frozen=True)
class Source(PathLike[str]):
    """A source of weights (a path or a hub id) of known format; it stands for its name as a path.

    ``kind`` is as in `find_source`.
    """

    name: str
    kind: Kind

    @property
    def path(self) -> Path:
        return Path(self.name)

    def __fspath__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name


def find_source(name: str | PathLike[str]) -> Source:
    """The source of this name, with its kind; a `Source` is returned as it is.

    Kinds are ``"meta"``: a directory with ``params.json`` and, if it also has ``config.json``,
    ``consolidated.*.pth``; ``"hf"``: another one with ``config.json``; ``"gguf"``: a GGUF file;
    ``"hub"``: nothing here, but a name like ``owner/name``.

    Raises:
        FileNotFoundError: it looks like a path and does not exist, or a directory is not a model.

    Example:
        >>> find_source("meta-llama/Llama-2-7b-hf")
        Source(name='meta-llama/Llama-2-7b-hf', kind='hub')
    """
    if isinstance(name, Source):
        return name
    expected = "the name of a directory, of a GGUF file or of a model on the hub"
    check(isinstance(name, str | PathLike), "source", type(name).__name__, expected)
    path = Path(name)
    if str(name) in NAMED and (isinstance(name, BuiltinName) or not path.exists()):
        return find_source(NAMED[str(name)]())
    name = str(name)
    if is_gguf(name) and path.is_file():
        return Source(name, "gguf")
    is_hf = (path / "config.json").is_file()
    # Mistral's directories have a params.json of its own beside transformers' files
    if (path / "params.json").is_file() and (not is_hf or any(path.glob("consolidated.*.pth"))):
        return Source(name, "meta")
    if is_hf:
        return Source(name, "hf")
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if is_hub_name and not is_gguf(name) and not path.exists():
        return Source(name, "hub")
    raise FileNotFoundError(_why_no_source(name))


def _why_no_source(name: str) -> str:
    path = Path(name)
    if is_gguf(name):
        return f"GGUF file {name} does not exist"
    if path.is_dir():
        return f"{path} has no params.json (Meta's format) and no config.json (Hugging Face's)"
    if path.exists():
        return f"{path} is a file; expected a checkpoint directory or .gguf"
    owner = "" if "/" in name else "; a hub id has an owner, as in openai-community/gpt2"
    return f"checkpoint directory {name} does not exist{owner}"


def public_name(source: object) -> str:
    """A source's or text's name for files that may be published: an absolute path's last part.

    Its folders may name a user. Of several names with commas between, each is looked at.

    Example:
        >>> public_name("/home/ada/models/7b"), public_name("models/7b")
        ('7b', 'models/7b')
        >>> public_name("self, /home/ada/books")
        'self,books'
    """
    parts = str(source).split(",")
    return ",".join(Path(p).name if os.path.isabs(p.strip()) else p for p in parts)


def is_gguf(source: str | PathLike[str]) -> bool:
    """Whether a name is that of a GGUF file, which need not be there."""
    if isinstance(source, Source):
        return source.kind == "gguf"
    return str(source).endswith(".gguf") and not Path(str(source)).is_dir()


def is_hub_id(name: str) -> bool:
    """Whether a name could be that of a model on the hub, with or without its owner."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).exists()


def resolve(source: str | PathLike[str]) -> Path:
    """The directory of a model: an existing one, or the hub's, fetched into the hub's cache.

    Raises:
        InputError: the hub has no such model, or none for this user.
        ConnectionError: the hub cannot be reached.
    """
    path, name = Path(str(source)), str(source)
    if path.is_dir():
        return path
    if not is_hub_id(name):
        raise FileNotFoundError(f"{path} is neither a directory nor a hub id like 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        skipped = ["original/*", "consolidated*"]
        return Path(snapshot_download(name, allow_patterns=FETCHED, ignore_patterns=skipped))
    except Exception as error:
        raise hub_failure(name, error) or error from None


def reach(name: str, options: Mapping[str, Any]) -> None:
    """Asks the hub for a model that is not in its cache: fetching it retries for 25 seconds.

    ``options`` are those of transformers; what it raises is for `hub_failure`.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    file = "/".join(filter(None, (options.get("subfolder"), "config.json")))
    revision = options.get("revision")
    cached = try_to_load_from_cache(name, file, options.get("cache_dir"), revision)
    if cached is None and not options.get("local_files_only"):
        HfApi().model_info(name, revision=revision, token=options.get("token"), timeout=4)


def check_links(folder: Path) -> None:
    """`check_inside` for what goes along with a model in Hugging Face's format, except weights."""
    named = folder / TEMPLATES
    patterns = {*FETCHED, TEMPLATES, "*.py"} - {"*.safetensors"}
    files = [path for path in folder.iterdir() if any(fnmatch(path.name, p) for p in patterns)]
    check_inside(folder, [*files, *named.rglob("*")])


def check_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Raises InputError where a link in a model's folder leads to a file elsewhere.

    Such a file, of whoever wrote the model's files, would be copied and uploaded with the model.
    The hub's cache has the files of its snapshots in folders ``blobs``.
    """
    home = folder.resolve()
    cached = home.parents[1:3] if home.parent.name == "snapshots" else ()
    homes = [home, *((around / "blobs").resolve() for around in cached)]
    for path in paths:
        target = Path(os.path.realpath(path))  # which takes a link to itself, too
        if not any(target.is_relative_to(allowed) for allowed in homes):
            raise InputError(f"{path} is a link to {target}, outside of {folder}: remove the link")


def hub_failure(name: str, error: BaseException) -> Exception | None:
    """What a failure to fetch the hub's model ``name`` means, as an error; None if another."""
    from huggingface_hub import errors

    missing = (errors.RepositoryNotFoundError, errors.HFValidationError)
    offline = (errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.GatedRepoError):
            terms = f"accept its terms on https://huggingface.co/{name}"
            return InputError(f"{name} is gated: {terms}, then log in with: hf auth login")
        if isinstance(cause, missing):
            problem = "neither a directory here nor a model on the hub"
            return InputError(f"{name} is {problem}; if it is private: hf auth login")
        if isinstance(cause, offline):
            problem = "not a directory here, and the hub cannot be reached to fetch it"
            return ConnectionError(f"{name} is {problem}; connect, and unset HF_HUB_OFFLINE")
        cause = cause.__cause__ or cause.__context__
    return None
