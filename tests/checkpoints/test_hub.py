"""Uploads, to a hub of this process."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import fails, run
from huggingface_hub import constants
from safetensors.torch import load_file

from short_gpt import ShortGPTError, prune, shrink
from short_gpt.checkpoints.hub import push
from short_gpt.jobs import heal
from short_gpt.wrappers.short_hf import ShortHFModel

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
TEXTS = [" ".join(f"{(n + 3) * (i + 7) % 997} {n}" for i in range(40)) for n in range(8)]
FEW = {"layers": [1], "size": 16, "max_windows": 4, "eval_windows": 2, "device": "cpu"}


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API by which `huggingface_hub` uploads a folder."""

    def do_GET(self) -> None:
        if match := re.fullmatch(r"/api/models/(.+)/tree/main.*", self.path):
            names = [path for name, path in self.server.files if name == match[1]]
            entry = {"type": "file", "size": 1, "oid": "1"}
            return self.answer([{**entry, "path": path} for path in names])
        known = self.headers.get("Authorization") == "Bearer hf_ours"
        self.answer({"type": "user", "name": "me", "orgs": []}, 200 if known else 401)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self.chunk, b""))
        hub = self.server
        if self.headers.get("Authorization") != "Bearer hf_ours":
            self.answer({"error": "Invalid user token"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in hub.private
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.private.setdefault(name, bool(private))
            self.answer({"url": f"{hub.url}/{name}"}, 409 if known else 200)
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main.*", self.path):
            if hub.refuses:
                return self.answer({"error": "Storage is full"}, 403)
            lines = [json.loads(line) for line in body.splitlines()]
            for gone in (line["value"] for line in lines if line["key"] == "deletedFile"):
                del hub.files[match[1], gone["path"]]
            for value in (line["value"] for line in lines if line["key"] == "file"):
                hub.files[match[1], value["path"]] = base64.b64decode(value["content"])
            page = f"{hub.url}/{match[1]}/commit/1"
            self.answer({"commitUrl": page, "commitOid": "1", "success": True})
        else:
            self.answer({"errors": [], "warnings": []})

    def chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        return self.rfile.read(size + 2)[:size]

    def answer(self, content: dict | list, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.private = f"http://127.0.0.1:{server.server_port}", {}, {}
    server.refuses = False
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, value in {"HF_TOKEN": "hf_ours", "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def made(llama_folders) -> Path:
    """A random Llama in both formats, with a card of its own."""
    card = "---\nlicense: mit\nbase_model: them/big\n---\n\nTheirs.\n"
    (llama_folders / "hf/README.md").write_text(card)
    return llama_folders


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def check_uploaded(hub, repo: str, folder: str) -> str:
    """That the hub has all files of a folder, byte for byte; returns the card."""
    ours = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*")}
    theirs = {path: content for (name, path), content in hub.files.items() if name == repo}
    assert theirs == ours
    return theirs["README.md"].decode()


def test_what_prune_wrote_is_what_the_hub_gets(here, hub, capsys):
    run("prune", "hf", "small", "--layers", 1, "--push_to_hub", "me/small", "--private")
    assert f"uploaded: {hub.url}/me/small\n" in capsys.readouterr().out
    card = check_uploaded(hub, "me/small", "small")
    assert hub.private == {"me/small": True}
    head = card.split("---")[1]
    assert "license: mit" in head and "base_model: them/big" in head
    assert "- depth-pruning\n- short-gpt" in head and "    [1]\n" in card
    run("prune", "hf", "other", "--layers", 2, "--push-to-hub", "me/small")  # it is there already
    assert "    [2]\n" in check_uploaded(hub, "me/small", "other")


@pytest.mark.parametrize("command", ["prune", "heal", "shrink"])
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
        line += ["--layers", 1] if command == "heal" else ["--n", 1, "--method", "bi"]
    run(*line)
    check_uploaded(hub, "me/small", "small")
    texts = {path: text for (_, path), text in hub.files.items() if path[-3:] not in ("bin", "ors")}
    assert [path for path, text in texts.items() if bytes(here.parent) in text] == []
    assert json.loads(texts["pruning.json"])["source"] == "hf"


def test_a_hub_with_a_password_in_its_address_is_named_without_it(here, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://ada:s3cret@127.0.0.1:{hub.server_port}")
    with pytest.raises(ConnectionError, match=f"http://127.0.0.1:{hub.server_port}/api/") as told:
        push("hf", "me/small")  # the password takes the token's place, which this hub asks for
    assert "s3cret" not in str(told.value)


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


def test_a_healed_model_goes_there_too(here, hub):
    done = heal("hf", "out", data=TEXTS, push_to_hub="me/healed", **FEW)
    assert done.address == f"{hub.url}/me/healed" and hub.private == {"me/healed": False}
    assert "# hf without 1 of its 5 layers, healed" in check_uploaded(hub, "me/healed", "out")


def test_a_shrunk_model_goes_there_with_its_page(here, hub):
    how = {"size": 16, "max_windows": 4, "eval_windows": 2, "device": "cpu", "method": "bi"}
    done = shrink("hf", "out", n=1, data=TEXTS, push_to_hub="me/shrunk", **how)
    assert done.address == f"{hub.url}/me/shrunk"
    assert "changed by refit" in check_uploaded(hub, "me/shrunk", "out")
    assert ("me/shrunk", "report.html") in hub.files
    hub.refuses = True
    with pytest.raises(ConnectionError, match="it is written: hf upload me/shrunk again"):
        shrink("hf", "again", n=1, data=TEXTS, push_to_hub="me/shrunk", **how)
    assert Path("again/report.html").is_file() and not Path("again.shrinking").exists()


@pytest.mark.parametrize("command", ["heal", "shrink"])
def test_an_upload_that_fails_takes_no_result_away(here, hub, capsys, command):
    hub.refuses = True
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    Path("texts.jsonl").write_text("".join(rows))
    cut = ("--data", "texts.jsonl", "--size", 16, "--max_windows", 4, "--eval_windows", 2)
    choice = ("--layers", 1) if command == "heal" else ("--n", 1, "--method", "bi")
    where = ("--device", "cpu", "--push_to_hub", "me/out", "--json", "r.json")
    with pytest.raises(SystemExit):
        run(command, "hf", "out", *choice, *cut, *where)
    told = capsys.readouterr()
    assert "it is written: hf upload me/out out" in told.err and "written: out" in told.out
    assert json.loads(Path("r.json").read_text())["result"]


def test_a_model_in_memory_is_uploaded_as_it_would_be_saved(here, hub):
    short = ShortHFModel("hf", device="cpu")
    short.remove_layers([3])
    assert short.push_to_hub("small", private=True) == f"{hub.url}/me/small"
    short.save_pretrained("saved")
    assert "license: mit" in check_uploaded(hub, "me/small", "saved")


def test_what_keeps_it_from_the_hub_is_said_before_the_work(here, hub, capsys, monkeypatch):
    def refused(*more: object) -> str:
        line = fails(capsys, "prune", "hf", "x", "--layers", 1, *more)
        assert not Path("x").exists()
        return line

    assert "--private has no effect without --push_to_hub" in refused("--private")
    line = refused("--to", "meta", "--push_to_hub", "me/small")
    assert "--push_to_hub uploads a directory in Hugging Face's format" in line
    assert "hf upload me/small x" in line
    with pytest.raises(ShortGPTError, match="uploads a directory in Hugging Face's format"):
        heal("meta", "x", data=TEXTS, push_to_hub="me/small", **FEW)
    line = refused("--push_to_hub", "a/b/c")
    assert "--push_to_hub a/b/c: expected a name as in USER/MODEL" in line
    monkeypatch.setenv("HF_TOKEN", "hf_theirs")
    assert "me/small cannot be uploaded: " in refused("--push_to_hub", "me/small")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    assert "log in with hf auth login, or set HF_TOKEN" in refused("--push_to_hub", "me/small")
    assert hub.private == {}


def test_a_model_that_the_hub_refuses_is_still_written(here, hub):
    hub.refuses = True
    with pytest.raises(ConnectionError, match="Storage is full.*; it is written: hf upload me/s s"):
        prune("hf", "s", layers=[1], push_to_hub="me/s")
    assert Path("s/config.json").is_file()
