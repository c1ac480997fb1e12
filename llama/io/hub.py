"""Models of the Hugging Face hub: fetched into its cache, failures told in one line."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from llama.errors import InputError, MissingPackageError
from llama.io.sources import is_hub_id

FETCHED = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt", "LICENSE*"]
FETCHED += ["README.md"]


def resolve(source: str | PathLike[str]) -> Path:
    """The directory of a model: an existing one, or the hub's, fetched into the hub's cache.

    Raises:
        FileNotFoundError: neither a directory nor a name that the hub could know.
        InputError: the hub has no such model, or none for this user.
        ConnectionError: the hub cannot be reached.
        MissingPackageError: the package huggingface_hub is missing.
    """
    path, name = Path(str(source)), str(source)
    if path.is_dir():
        return path
    if not is_hub_id(name):
        raise FileNotFoundError(f"{path} is neither a directory nor a hub id like 'owner/name'")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPackageError("fetching a model needs: pip install huggingface_hub") from None
    try:
        skipped = ["original/*", "consolidated*"]
        return Path(snapshot_download(name, allow_patterns=FETCHED, ignore_patterns=skipped))
    except Exception as error:
        raise hub_failure(name, error) or error from None


def hub_failure(name: str, error: BaseException) -> Exception | None:
    """What a failure to fetch a model from the hub means and what to do; None if it is another.

    Args:
        name: the hub id.
        error: what huggingface_hub raised, or something raised because of that.
    """
    from huggingface_hub import errors

    missing = (errors.RepositoryNotFoundError, errors.HFValidationError)
    offline = (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.GatedRepoError):
            return InputError(
                f"{name} is gated: accept its terms on https://huggingface.co/{name}, then log in "
                "with: hf auth login"
            )
        if isinstance(cause, missing):
            return InputError(
                f"{name} is neither a directory here nor a model on the hub; check the name or, "
                "if it is private, log in with: hf auth login"
            )
        if isinstance(cause, offline):
            return ConnectionError(
                f"{name} is no directory here, and the hub cannot be reached to fetch it; connect "
                "(and unset HF_HUB_OFFLINE), or give the directory of a downloaded model"
            )
        cause = cause.__cause__ or cause.__context__
    return None
