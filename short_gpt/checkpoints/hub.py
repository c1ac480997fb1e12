"""A written model uploaded to the hub, its card with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama.sources import is_gguf
from short_gpt.checkpoints.target import StrPath
from short_gpt.runtime.errors import ShortGPTError, without_password

# the names that transformers gives the files of a model's weights, and their index
WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def check_push(repo_id: str, out: StrPath, format: str | None = "hf") -> None:
    """Raises what would keep a model from being uploaded, before it is made.

    Raises:
        ShortGPTError: the name is none of a repository, or ``format`` is not Hugging Face's.
        ConnectionError: nobody is logged in, or the hub cannot be reached.
    """
    if format != "hf" or is_gguf(out):
        raise ShortGPTError(
            f"`push_to_hub` uploads a directory in Hugging Face's format, which has the card; "
            f"write {out} first, then: hf upload {repo_id} {out}"
        )
    with _explained(repo_id):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo_id)
        HfApi().whoami()


def push(directory: StrPath, repo_id: str, *, private: bool = False) -> str:
    """Uploads all files of a model's directory, the card included; returns the page's address.

    The model's weights that the repository has in other files are deleted.

    Args:
        directory: in Hugging Face's format, as `save_hf` and `prune_hf` write it.
        repo_id: as in ``"user/model"``; made if the hub has none of that name.
        private: whether a repository that is made is private.

    Raises:
        ShortGPTError: the name is none of a repository.
        ConnectionError: nobody is logged in, or the hub refused; the directory stays.
    """
    with _explained(repo_id):
        from huggingface_hub import HfApi

        hub = HfApi()
        url = hub.create_repo(repo_id, private=private, exist_ok=True)
        # weights of an earlier upload, in other files, would be read in place of these
        names = {path.name for path in Path(directory).iterdir()}
        stale = [n for n in hub.list_repo_files(url.repo_id) if WEIGHTS.fullmatch(n)]
        hub.upload_folder(
            repo_id=url.repo_id,
            folder_path=str(directory),
            commit_message="Upload a model pruned by ShortGPT",
            delete_patterns=[name for name in stale if name not in names],
        )
    return without_password(str(url))


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Failures of the hub inside the block as errors of one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError:
        raise ShortGPTError(f"`push_to_hub` {repo_id}: expected a name as in USER/MODEL") from None
    except errors.LocalTokenNotFoundError:
        raise ConnectionError(
            f"{repo_id} cannot be uploaded: log in with hf auth login, or set HF_TOKEN"
        ) from None
    except Exception as error:  # of the hub, or of the package that its version connects by
        why = " ".join(without_password(str(error)).split()) or type(error).__name__
        raise ConnectionError(f"{repo_id} cannot be uploaded: {why}") from error
