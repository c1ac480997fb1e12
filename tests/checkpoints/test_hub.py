"""Uploads, to a hub that stands in for the real one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import fails, run
from huggingface_hub import RepoUrl, errors
from safetensors.torch import load_file

from short_gpt import ShortGPTError, shrink
from short_gpt.checkpoints.hub import push
from short_gpt.jobs import heal
from short_gpt.wrappers.short_hf import ShortHFModel

TEXTS = [" ".join(f"{(n + 3) * (i + 7) % 997} {n}" for i in range(40)) for n in range(8)]
FEW = {"layers": [1], "size": 16, "max_windows": 4, "eval_windows": 2, "device": "cpu"}


class Hub:
    """Stands in for `huggingface_hub.HfApi`, to which both files and errors go."""

    url = "https://hub.example"

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}  # by repository and path
        self.private: dict[str, bool] = {}  # by repository
        self.error: Exception | None = None  # of every upload

    def whoami(self) -> None:
        if not os.environ["HF_TOKEN"]:
            raise errors.LocalTokenNotFoundError("no token")

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> RepoUrl:
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.private.setdefault(name, private)
        assert exist_ok
        return RepoUrl(f"{self.url}/{name}", endpoint=self.url)

    def list_repo_files(self, repo_id: str) -> list[str]:
        return [path for name, path in self.files if name == repo_id]

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, delete_patterns: list[str]
    ) -> None:
        if self.error:
            raise self.error
        for name in delete_patterns:
            del self.files[repo_id, name]
        for path in Path(folder_path).rglob("*"):
            self.files[repo_id, str(path.relative_to(folder_path))] = path.read_bytes()


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    return hub


@pytest.fixture(scope="module")
def made(llama_folders) -> Path:
    """A random Llama in both formats, with a card of its own."""
    card = "---\nlicense: mit\nbase_model: them/big\n---\n\nTheirs.\n"
    (llama_folders / "hf/README.md").write_text(card)
    return llama_folders


def check_uploaded(hub, repo: str, folder: str) -> str:
    """That the hub has all files of a folder, byte for byte; returns the card."""
    ours = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*")}
    theirs = {path: content for (name, path), content in hub.files.items() if name == repo}
    assert theirs == ours
    return theirs["README.md"].decode()


def test_what_prune_wrote_is_what_the_hub_gets(here, hub, capsys):
    run("prune", "hf", "small", "--layers", 1, "--push_to_hub", "me/small")
    assert f"uploaded: {hub.url}/me/small\n" in capsys.readouterr().out
    card = check_uploaded(hub, "me/small", "small")
    assert hub.private == {"me/small": False}
    head = card.split("---")[1]
    assert "license: mit" in head and "base_model: them/big" in head
    assert "- depth-pruning\n- short-gpt" in head and "    [1]\n" in card
    run("prune", "hf", "other", "--layers", 2, "--push-to-hub", "me/small")  # it is there already
    assert "    [2]\n" in check_uploaded(hub, "me/small", "other")


@pytest.mark.parametrize("command", ["prune", "shrink"])
def test_no_absolute_path_is_uploaded(here, hub, command):
    """Folders may name a user: of the model, of the texts and of the output."""
    (here / "books").mkdir()
    for number, text in enumerate(TEXTS):
        (here / f"books/{number}.txt").write_text(text)
    line = [command, here / "hf", here / "small", "--push_to_hub", "me/small"]
    if command == "prune":
        line += ["--layers", 1]
    else:
        line += ["--data", here / "books", "--size", 16, "--max_windows", 4, "--eval_windows", 2]
        line += ["--n", 1, "--method", "bi"]
    run(*line)
    check_uploaded(hub, "me/small", "small")
    texts = {path: text for (_, path), text in hub.files.items() if path[-3:] not in ("bin", "ors")}
    assert [path for path, text in texts.items() if bytes(here.parent) in text] == []
    assert json.loads(texts["pruning.json"])["source"] == "hf"


def test_a_hub_with_a_password_in_its_address_is_named_without_it(here, hub):
    hub.error = OSError("no answer from https://ada:s3cret@hub.example/api")
    with pytest.raises(ConnectionError, match="small cannot be .* from https://hub.example/api"):
        push("hf", "me/small")


def test_weights_in_other_files_go(here, hub):
    """transformers would read the one file in place of several."""
    run("prune", "hf", "small", "--layers", 1, "--push_to_hub", "me/small")
    assert ("me/small", "model.safetensors") in hub.files
    for theirs in ("notes.txt", "lora/adapter_model.safetensors", "model.fp16.safetensors"):
        hub.files["me/small", theirs] = b"theirs"
    parts = Path("small/model.safetensors").rename("small/model-00001-of-00001.safetensors")
    names = {name: parts.name for name in load_file(parts)}
    Path("small/model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    push("small", "me/small")
    names = {path for repo, path in hub.files if repo == "me/small"}
    assert "model.safetensors" not in names
    assert {"notes.txt", "lora/adapter_model.safetensors", "model.fp16.safetensors"} <= names
    assert {parts.name, "model.safetensors.index.json"} <= names


def test_a_shrunk_model_goes_there_with_its_page(here, hub):
    how = {"size": 16, "max_windows": 4, "eval_windows": 2, "device": "cpu", "method": "bi"}
    done = shrink("hf", "out", n=1, data=TEXTS, push_to_hub="me/shrunk", **how)
    assert done.address == f"{hub.url}/me/shrunk"
    assert "changed by refit" in check_uploaded(hub, "me/shrunk", "out")
    assert ("me/shrunk", "report.html") in hub.files
    hub.error = OSError("Storage is full")
    with pytest.raises(ConnectionError, match="it is written: hf upload me/shrunk again"):
        shrink("hf", "again", n=1, data=TEXTS, push_to_hub="me/shrunk", **how)
    assert Path("again/report.html").is_file() and not Path("again.shrinking").exists()


def test_an_upload_that_fails_takes_no_result_away(here, hub, capsys):
    hub.error = OSError("Storage is full")
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    Path("texts.jsonl").write_text("".join(rows))
    cut = ("--data", "texts.jsonl", "--size", 16, "--max_windows", 4, "--eval_windows", 2)
    where = ("--device", "cpu", "--push_to_hub", "me/out", "--json", "r.json")
    with pytest.raises(SystemExit):
        run("heal", "hf", "out", "--layers", 1, *cut, *where)
    told = capsys.readouterr()
    assert "it is written: hf upload me/out out" in told.err and "written: out" in told.out
    assert json.loads(Path("r.json").read_text())["result"]


def test_a_model_in_memory_is_uploaded_as_it_would_be_saved(here, hub):
    short = ShortHFModel("hf", device="cpu")
    short.remove_layers([3])
    assert short.push_to_hub("small", private=True) == f"{hub.url}/me/small"
    assert hub.private == {"me/small": True}
    short.save_pretrained("saved")
    assert "license: mit" in check_uploaded(hub, "me/small", "saved")


def test_what_keeps_it_from_the_hub_is_said_before_the_work(here, hub, capsys, monkeypatch):
    def refused(*more: object) -> str:
        line = fails(capsys, "prune", "hf", "x", "--layers", 1, *more)
        assert not Path("x").exists()
        return line

    with pytest.raises(ShortGPTError, match="uploads a directory in Hugging Face's format"):
        heal("meta", "x", data=TEXTS, push_to_hub="me/small", **FEW)
    line = refused("--push_to_hub", "a/b/c")
    assert "--push_to_hub a/b/c: expected a name as in USER/MODEL" in line
    monkeypatch.setenv("HF_TOKEN", "")
    assert "log in with hf auth login, or set HF_TOKEN" in refused("--push_to_hub", "me/small")
    assert hub.private == {}
