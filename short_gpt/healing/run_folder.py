"""The folder of a training's checkpoints, and what they belong to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from llama.io.json_files import write_json
from short_gpt.runtime.digest import files_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.lock import hold
from short_gpt.runtime.results import CHECKED, content_digest, read_record, write_record
from short_gpt.runtime.state import check_saved, damaged

RECIPE = "recipe.json"  # what the checkpoints belong to
LAST = "trainer_state.json"  # what the Trainer writes last into a checkpoint
DIGESTS = "digests.json"  # of a checkpoint's files, written behind them


@contextmanager
def run_folder(
    work_dir: str | Path | None, run: dict[str, object], *, resume: bool
) -> Iterator[Path]:
    """Where checkpoints go; with ``resume`` it must hold some of the same run."""
    if work_dir is None:
        if resume:
            raise ShortGPTError("to resume, name the work_dir that holds the checkpoints")
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    folder = Path(str(work_dir))
    with hold(folder):
        found = whole_checkpoints(folder) if resume else any(folder.glob("checkpoint-*"))
        if not resume:
            if found or (folder.exists() and {p.name for p in folder.iterdir()} - {RECIPE}):
                raise FileExistsError(f"{folder} holds an earlier run; resume it, or remove it")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RECIPE, run)
        elif not found or not (folder / RECIPE).is_file():
            raise ShortGPTError(
                f"{folder} holds no checkpoint to resume from; start without resume"
            )
        else:
            _check_run(folder, run)
            _check_files(folder)
        try:
            yield folder
        except BaseException:
            if not whole_checkpoints(folder):  # there is nothing to go on from
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _check_run(folder: Path, run: dict[str, object]) -> None:
    """Raises ShortGPTError unless the checkpoints in a folder are of the same run."""
    pairs = zip(_parts(read_record(folder / RECIPE)), _parts(run), strict=True)
    for earlier, now in pairs:
        for name in [*now, *(earlier.keys() - now.keys())]:
            if earlier.get(name) != now.get(name):
                raise ShortGPTError(
                    f"{folder} holds a run of another {name}: {earlier.get(name)!r}, now "
                    f"{now.get(name)!r}; go on with the former {name}, or delete {folder} to "
                    "begin anew"
                )


def _parts(run: Mapping[str, object]) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """What a run depends on: the recipe's settings, and all else."""
    recipe = own if isinstance(own := run.get("recipe"), dict) else {}
    return recipe, {name: value for name, value in run.items() if name != "recipe"}


def begun(folder: Path) -> bool:
    """Whether a folder holds a run of training that can be continued."""
    return (folder / RECIPE).is_file() and whole_checkpoints(folder)


def whole_checkpoints(folder: Path) -> bool:
    """Deletes checkpoints whose writing, or removal, a kill cut short; whether others are left."""
    left = False
    for path in folder.glob("checkpoint-*"):
        if _is_whole(path):
            left = True
        else:
            shutil.rmtree(path)
    return left


def _is_whole(checkpoint: Path) -> bool:
    """Whether all files are there; damage is no kill's doing, and raises ShortGPTError."""
    try:
        read_record(checkpoint / LAST)
    except (OSError, ValueError):
        return False
    return all((checkpoint / name).is_file() for name in _digests(checkpoint))


def note_files(checkpoint: Path) -> None:
    """Writes digests of all files of a checkpoint that is there as a whole."""
    digests = {path.name: files_digest([path]) for path in sorted(checkpoint.iterdir())}
    write_record(checkpoint / DIGESTS, {"run": "checkpoint", "files": digests})


def _digests(checkpoint: Path) -> dict[str, str]:
    """Digests of a checkpoint's files by their names; none where a kill came before them."""
    path = checkpoint / DIGESTS
    if not path.is_file():
        return {}
    try:
        record = read_record(path)
    except ValueError:
        raise damaged(path, checkpoint.parent) from None
    if record.get(CHECKED) != content_digest(record):
        raise damaged(path, checkpoint.parent)
    return cast("dict[str, str]", record["files"])


def _check_files(folder: Path) -> None:
    """Raises ShortGPTError for a checkpoint that does not hold what was saved there."""
    for path in sorted(folder.glob("checkpoint-*")):
        for name, digest in _digests(path).items():
            check_saved(path / name, digest, whole=folder)
