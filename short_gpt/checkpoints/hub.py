"""A model on the hub: its card, made from its record, and the upload of both.

The card is a ``README.md`` of Hugging Face's format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama.files import StrPath, write_json
from llama.sources import is_gguf
from short_gpt.checkpoints.provenance import BASE, LICENSE, PROVENANCE, Provenance
from short_gpt.data.texts import OWN
from short_gpt.evaluation.perplexity import SamplingError
from short_gpt.runtime.errors import ShortGPTError, one_line, without_password

# the names that transformers gives the files of a model's weights, and their index
WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
TEMPLATE = """---
{head}
---

# {name} without {count} of its {total} layers{healed}

Removed layers, in the original model's numbering from 0 and in the order of removal:

    {removed}

{scores}
{quality}
Made with ShortGPT ({versions}). {changed} `pruning.json` holds
this in numbers, with the original number of every layer that stayed.
"""


def write_provenance(directory: Path, record: Provenance, *, card: bool) -> None:
    """Writes ``pruning.json``, and with ``card`` the ``README.md`` of Hugging Face's format."""
    write_json(directory / PROVENANCE, record.to_dict())
    if card:
        (directory / "README.md").write_text(model_card(record), encoding="utf-8")


def model_card(record: Provenance) -> str:
    """The text of a ``README.md`` for a pruned or healed model, all of it from its record."""
    from huggingface_hub import ModelCardData

    removed = record.all_removed
    source = record.first_source or "a model"
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not Path(source).exists()
    tags = ["pruned", "depth-pruning", *(["healed"] if record.steps else []), "short-gpt"]
    licence: Any = {key: record.source_card.get(key) for key in (BASE, *LICENSE)}
    head = ModelCardData(
        **licence, library_name="transformers", pipeline_tag="text-generation", tags=tags
    )
    return TEMPLATE.format(
        head=head.to_yaml(),
        name=one_line(source if on_hub else Path(source).name),
        count=len(removed),
        total=len(removed) + len(record.kept_layers),
        healed=", healed" if record.steps else "",
        removed=removed,
        scores=_scores(record),
        quality=_table(record) + _own(record) + "\n",
        versions=", ".join(f"{package} {version}" for package, version in record.versions.items()),
        changed=_changed(record),
    )


def _scores(record: Provenance) -> str:
    method = record.evidence.get("method")
    if not record.scored:  # a search by loss keeps no scores
        return "They were chosen by hand." if method is None else f"Method: {method}."
    by = record.evidence.get("scored_by")
    # a healing's data need not be the scores'
    name = (by.get("data") if isinstance(by, Mapping) else None) or record.facts.get("data")
    data = f" of {one_line(str(name))}" if name else ""
    method = method or "Block Influence and angular distance"
    windows, tokens = record.scored["windows"], record.scored["tokens"]
    return f"Scores: {method}, on {tokens:,} tokens{data} in {windows:,} windows."


def _table(record: Provenance) -> str:
    if not record.perplexity:
        return "Its quality was not measured."
    rows = ["", "| model | perplexity | 95% | tokens |", "| --- | --- | --- | --- |"]
    samples: list[str] = []  # of the intervals, and what these do not cover
    for name, value in record.perplexity.items():
        error: Any = record.perplexity_error.get(name, {})
        interval = " to ".join(
            f"{math.inf if end is None else end:.3f}" for end in error.get("interval_95", ())
        )
        tokens = f"{count:,}" if (count := record.perplexity_tokens.get(name)) else ""
        rows.append(f"| {one_line(name)} | {value:.3f} | {interval} | {tokens} |")
        if error:
            samples.append(SamplingError(math.nan, error["windows"], error.get("texts")).over)
    over = ["", f"Over {'; '.join(dict.fromkeys(samples))}."] if samples else []
    return "\n".join([*rows, *over])


def _own(record: Provenance) -> str:
    """The remark where text that the model itself wrote was all that judged it."""
    data, judge = record.facts.get("data"), record.evidence.get("eval_data", "")
    if not record.perplexity or judge is not None or not isinstance(data, str):
        return ""
    if not {name.strip() for name in data.split(",")} <= {*OWN}:
        return ""
    return "\nThe model itself wrote the text that judged it: this perplexity is not quality."


def _changed(record: Provenance) -> str:
    """What was done to the weights of the layers that stayed, in order."""
    how = []
    for step in record.steps:
        tokens: Any = step.get("tokens")
        how.append(f"{step['method']} ({tokens:,} tokens)" if tokens else str(step["method"]))
    if how:
        return f"Weights of the kept layers were changed by {', then '.join(how)}."
    return "No weight of the kept layers was changed."


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
        directory: in Hugging Face's format, as `save_hf` and `prune_checkpoint` write it.
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
