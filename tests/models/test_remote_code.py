"""Python files that come with a model: run with trust_remote_code, and never otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import DATA, TEXT, fails, run
from conftest import refuses, save_byte_llama

from llama.formats.hf import meta_to_hf
from short_gpt import ShortHFModel
from short_gpt.checkpoints.prune import layers_of
from short_gpt.wrappers.opening import open_model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("run")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A Llama whose config names code of its own, which leaves a marker when it is run."""
    save_byte_llama(tmp_path / "meta")
    meta_to_hf(tmp_path / "meta", tmp_path / "own")
    (tmp_path / "own/own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    config = json.loads((tmp_path / "own/config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changed = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto}
    (tmp_path / "own/config.json").write_text(json.dumps(config | changed))
    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


SAID = (
    "own comes with Python code of its own|it comes with Python code of its own, which is not run"
)


@pytest.fixture
def words(here) -> Path:
    """A plain Llama whose tokenizer alone is code of its own, which leaves the same marker."""
    meta_to_hf(here / "meta", here / "words")
    code = "from transformers import PreTrainedTokenizerFast as Fast\nfrom pathlib import Path\n"
    code += f"Path({str(here / 'marker')!r}).write_text('run')\nclass Words(Fast): pass\n"
    (here / "words/words.py").write_text(code)
    path = here / "words/tokenizer_config.json"
    own = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "words.Words"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return here


ON_WORDS = [
    ("rank", "words", *DATA, "--max_windows", 2),
    ("rank", "words", *DATA, "--max_windows", 2, "--stream"),
    ("convert", "words", "out"),
    ("prune", "words", "out", "--layers", 1),
]


@pytest.mark.parametrize("argv", ON_WORDS, ids=lambda argv: f"{argv[0]} {argv[-1]}")
def test_a_tokenizers_code_runs_by_the_flag_that_the_message_names(words, capsys, argv):
    line = fails(capsys, *argv)
    assert "words cannot be loaded: it comes with Python code" in line
    assert line.endswith("look at that code, and pass --trust_remote_code to run it")
    assert not (words / "marker").exists() and not Path("out").exists()
    run(*argv, "--trust_remote_code")
    assert (words / "marker").read_text() == "run"
    if argv[0] == "prune":  # the code goes along, without which the tokenizer is none
        run("rank", "out", *DATA, "--max_windows", 2, "--trust_remote_code")


def test_it_is_refused_in_one_line_and_not_run(here, capfd):
    for opening in (
        lambda: ShortHFModel("own"),
        lambda: ShortHFModel("own", trust_remote_code=None),
        lambda: open_model("own"),
    ):
        refuses(SAID, opening)
    assert layers_of("own") == 5
    assert "pass --trust_remote_code to run it" in fails(capfd, "rank", "own", *DATA)
    for trust in ((), ("--trust_remote_code",)):  # which would not help
        line = fails(capfd, "prune", "own", "out", "--layers", "1", *trust)
        assert line.endswith("defined by Python code of its own; expected a family of transformers")
    assert not (here / "marker").exists() and not Path("out").exists()


def test_with_the_flag_it_runs(here, capsys):
    run("evaluate", "own", *DATA[:4], "--trust_remote_code")
    assert "perplexity" in capsys.readouterr().out
    assert (here / "marker").read_text() == "run"
    assert type(open_model("own", trust_remote_code=True).model).__name__ == "OwnModel"
