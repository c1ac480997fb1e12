"""The commands as a user types them: right once, and wrong in every way."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from commands import DATA, TEXT, fails, run
from conftest import save_byte_llama
from processes import ranks
from transformers import AutoConfig

from short_gpt import cli
from short_gpt.cli.app import in_shell, main
from short_gpt.cli.flags import flags_of
from short_gpt.healing import Recipe
from short_gpt.runtime.settings import HEADINGS
from short_gpt.selection.methods import METHODS


def test_rank_prune_plot_and_perplexity(ckpt, capsys):
    numbers = ("--n", 2)
    run("rank", "ckpt", *DATA, *numbers, "--json", "r.json", "--plots", "pictures")
    out = capsys.readouterr().out
    record = json.loads(Path("r.json").read_text())
    tokens = len(TEXT) + 1  # bytes and bos
    windows = (tokens - 32) // 16 + 1
    assert f"{windows} windows, {windows * 32:,} tokens" in out
    assert record["arguments"]["size"] == 32 and record["seed"] == 0
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert {p.name for p in Path("pictures").iterdir()} == {"block_influence.png", "angular.png"}

    run("prune", "ckpt", "small", "--scores", "r.json", "--n", 2)
    removed = json.loads(Path("small/pruning.json").read_text())["removed_layers"]
    assert f"lowest Block Influence:    {removed}" in out
    run("prune", "ckpt", "block", "--scores", "r.json", "--n", 2, "--method", "angular")
    block = json.loads(Path("block/pruning.json").read_text())["removed_layers"]
    assert f"best block by angle:       {block}" in out
    run("prune", "ckpt", "named", "--layers", ",".join(map(str, removed)))
    for name in ("small", "named"):
        state = torch.load(f"{name}/consolidated.00.pth")
        assert len(state) == 3 + 3 * 9
    run("prune", "ckpt", "spaced", "--layers", "3 1")
    assert json.loads(Path("spaced/pruning.json").read_text())["removed_layers"] == [3, 1]
    run("prune", "ckpt", "one", "--layers", 3)
    capsys.readouterr()

    run("evaluate", "small", *DATA[:4], "--json", "p.json")
    value = json.loads(Path("p.json").read_text())["result"]["small"]["book.txt perplexity"]
    assert f"{value:.6g}" in capsys.readouterr().out
    assert 1 < value < math.inf


@pytest.mark.parametrize("method", ["bi", "angular"])
def test_rank_ends_when_its_answer_is_settled(ckpt, capsys, method):
    numbers = ("--n", 1, "--method", method)
    run("rank", "ckpt", *DATA, *numbers, "--json", "settled.json")
    out = capsys.readouterr().out
    run("rank", "ckpt", *DATA, "--method", method, "--json", "all.json")  # no answer is asked for
    assert "settled" not in capsys.readouterr().out
    some, full = (json.loads(Path(f"{n}.json").read_text()) for n in ("settled", "all"))
    read, of = (int(sum(r["importance"]["windows"])) for r in (some, full))
    assert some["settled"]["settled"] and full["settled"] is None
    what = "set of the 1 lowest" if method == "bi" else "best block"
    if read < of:
        assert f"{what} settled at 0.99 after {read} of {of} windows; closest" in out
    else:
        assert f"{what} settled: all {of} windows were read" in out


def test_rank_that_reads_too_little_says_so(ckpt, capsys):
    run("rank", "ckpt", *DATA, "--n", 2, "--max_windows", 10)
    text = "NOT settled at 0.99 by 10 of 38 windows (tested from 38 on); closest layers"
    out, err = capsys.readouterr()
    assert "it ends as soon" not in err
    assert text in out and "more windows (--max_windows) may settle it" in out


def test_one_window_alone_has_no_errors_and_prints_none(ckpt, capsys):
    run("rank", "ckpt", *DATA, "--max_windows", 1)
    out = capsys.readouterr().out
    assert "one window: no standard errors" in out and "nan" not in out
    assert "\n1 window, " in out
    assert [line.split()[2] for line in out.splitlines()[1:6]] == ["-"] * 5


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("bi", "angular", "auto")])
def test_rank_by_every_method(ckpt, capsys, method):
    numbers = ("--n", 2, "--max_windows", 6, "--stride", 32)
    run("rank", "ckpt", *DATA[:4], *numbers, "--method", method, "--json", "m.json")
    (line,) = (r for r in capsys.readouterr().out.splitlines() if r.startswith(METHODS[method]))
    layers = json.loads(line.partition(": ")[2])
    assert len(set(layers)) == 2 and set(layers) <= set(range(5))
    expected = {"deepest": [2, 3], "sequential": [0, 1], "reverse": [4, 3]}
    assert layers == expected.get(method, layers)


def test_prune_takes_what_a_search_chose(ckpt, capsys):
    run("rank", "ckpt", *DATA, "--n", 2, "--max_windows", 3, "--method", "sleb",
        "--json", "s.json")  # fmt: skip
    layers = json.loads(Path("s.json").read_text())["chosen"]["layers"]
    run("prune", "ckpt", "two", "--scores", "s.json", "--n", 2)
    run("prune", "ckpt", "one", "--scores", "s.json", "--n", 1)
    for name, count in (("two", 2), ("one", 1)):
        record = json.loads(Path(name, "pruning.json").read_text())
        assert record["removed_layers"] == layers[:count]
        assert record["method"] == METHODS["sleb"]


def test_prune_takes_what_auto_chose_together(ckpt, capsys):
    Path("numbers.txt").write_text(" ".join(str(i * i) for i in range(120)))
    auto = ("rank", "ckpt", "--data", "numbers.txt", "--size", 32, "--stride", 16)
    run(*auto, "--method", "auto", "--n", 2, "--max_windows", 8, "--json", "a.json")
    out = capsys.readouterr().out
    record = json.loads(Path("a.json").read_text())
    layers, choice = record["chosen"]["layers"], record["choice"]
    assert f"{METHODS['auto']}: {layers}" in out and " of 60 bare passes" in out
    assert choice["layers"] == layers
    # a stride below the size is not taken: no window shares text with another
    assert (choice["fitted"], choice["judged"]) == (4, 4)
    assert not [note for note in choice["notes"] if "share text" in note]
    assert all({"methods", "kld", "difference", "told_apart"} < {*c} for c in choice["candidates"])
    assert not Path("a.json.state").exists()
    run("prune", "ckpt", "two", "--scores", "a.json", "--n", 2)
    pruned = json.loads(Path("two", "pruning.json").read_text())
    assert pruned["removed_layers"] == layers and pruned["method"] == METHODS["auto"]
    capsys.readouterr()
    one = ("ckpt", "x", "--scores", "a.json", "--n", 1)
    for command in (("prune", *one), ("heal", *one, "--data", "book.txt")):
        assert "2 layers that auto chose together: rank again" in fails(capsys, *command)


def test_the_same_seed_gives_the_same_scores(ckpt):
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", "none")):
        run("rank", "ckpt", *DATA, "--max_windows", 5, "--seed", seed, "--json", f"{name}.json")
    a, b, c, d = (json.loads(Path(f"{n}.json").read_text())["importance"] for n in "abcd")
    assert a == b
    assert a["influence"] != c["influence"] != d["influence"]


@pytest.mark.parametrize("text", ["1984", "Hello, world", "hello # there", '"quoted"', "[a, b]"])
def test_texts_and_paths_are_taken_as_they_are(ckpt, capsys, text):
    Path("ckpt").rename("2048")
    run("generate", "2048", text, "--max_new_tokens", 2)
    assert capsys.readouterr().out.startswith(text)


def test_help_behind_complete_arguments_runs_nothing(ckpt, capsys):
    run_help = ["rank", "ckpt", *DATA, "--json", "h.json", "--help"]
    run(*run_help)  # returns: exit status 0
    assert not Path("h.json").exists() and "Usage: short-gpt rank" in capsys.readouterr().out


def test_a_bare_flag_may_stand_in_front(ckpt):
    run("rank", "--overwrite", "ckpt", *DATA, "--max_windows", 2, "--json", "a.json")
    run("prune", "--overwrite", "ckpt", "x", "--scores=a.json", "-n", 2, "--verify", "no")
    assert Path("x/params.json").is_file()


def test_version(capsys):
    run("--version")
    assert capsys.readouterr().out.startswith("short-gpt ")


def test_two_replicas_of_two_ranks_stop_together(ckpt):
    Path("long.txt").write_text(" ".join(f"{i * i % 977} and {i * 7 % 89}" for i in range(900)))
    save_byte_llama(Path("two"), shards=2)  # which two ranks share
    data = ["--data", "long.txt", "--size", "32", "--stride", "32", "--device", "cpu"]
    command = ["rank", "two", *data, "--n", "1", "--batch_size", "4", "--json", "four.json"]
    done = ranks(4, Path("printed"), main, command).end()
    assert not any(done.codes), done.err
    assert done.out.count("set of the 1 lowest settled at 0.99 after") == 1
    four = json.loads(Path("four.json").read_text())
    read = four["settled"]["windows"]
    assert four["settled"]["settled"] and read < four["settled"]["population"]
    run("rank", "ckpt", *data, "--max_windows", read, "--json", "one.json")
    one, four = (json.loads(Path(f"{n}.json").read_text())["importance"] for n in ("one", "four"))
    for name in ("windows", "tokens", "influence", "products", "angles"):
        expected = torch.tensor(one[name])
        assert torch.allclose(torch.tensor(four[name]), expected, rtol=1e-5, atol=1e-5), name


def test_of_two_ranks_one_prints_and_writes(ckpt, capsys, monkeypatch):
    save_byte_llama(Path("two"), shards=2)
    rank = ["rank", "two", *map(str, DATA), "--n", "2", "--json", "two.json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "--", "short_gpt", *rank]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Block Influence") == 2  # the heading and the list, once
    assert done.stdout.count("written") == 1
    run("rank", "ckpt", *DATA, "--json", "one.json")
    one, two = (json.loads(Path(f"{n}.json").read_text())["importance"] for n in ("one", "two"))
    assert two["influence"][0] == pytest.approx(one["influence"][0], rel=1e-4)

    for number in "10":  # as a launcher would start them: only the first of two does this work
        with monkeypatch.context() as patch:
            patch.setenv("RANK", number)
            patch.setenv("WORLD_SIZE", "2")
            patch.setenv("MASTER_ADDR", "localhost")
            assert not Path("small").exists()
            run("prune", "two", "small", "--scores", "two.json", "--n", "2")
    look = ["evaluate", "small", *map(str, DATA[:4])]
    both = ranks(2, Path("printed"), main, look).end()
    assert both.codes == [0, 0], both.err
    # the first waits for no other where it opens a model in transformers
    shrunk = ["shrink", "ckpt", "shrunk", "--size", "32", "--method", "bi", "--n", "2"]
    alone = ranks(2, Path("alone"), main, [*shrunk, "--max_windows", "8"]).end()
    assert alone.codes == [0, 0], alone.err
    assert AutoConfig.from_pretrained("shrunk").num_hidden_layers == 3
    removed = json.loads(Path("small/pruning.json").read_text())["removed_layers"]
    run("prune", "ckpt", "whole", "--layers", ",".join(map(str, removed)))
    capsys.readouterr()
    run("evaluate", "whole", *DATA[:4])
    assert both.out.split()[5:] == capsys.readouterr().out.split()[5:]  # behind the name


READ = "--data book.txt --size 32 --stride 16"
MISTAKES = [
    ("rnk", "no command 'rnk'; did you mean rank?"),
    ("help rnk", "no command 'rnk'; did you mean rank?"),
    ("rank ckpt --quiet=no", "--quiet takes no value, got --quiet=no"),
    ("rank", "rank needs MODEL; see rank --help"),
    ("rank ckpt more", "rank takes MODEL; what is 'more'?"),
    ("rank ckpt --sed 1", "rank has no flag --sed; did you mean --seed?"),
    ("shrink ckpt x --n_layers 4", "no flag --n_layers; did you mean --n?"),
    ("shrink ckpt x --scores 4", "no flag --scores; heal, prune have it"),
    ("rank ckpt -q 1", "rank has no flag -q"),
    ("rank ckpt --zzz 1", "rank has no flag --zzz; see rank --help"),
    ("rank ckpt --json", "--json needs a value"),
    ("rank ckpt --plots ''", "--plots is empty"),
    ("rank ckpt --size big", "--size expects a whole number or none, got 'big'"),
    ("rank ckpt --overwrite=3", "--overwrite expects True or False, got 3"),
    ("prune ckpt x --verify maybe", "--verify takes yes or no, got 'maybe'"),
    ("prune ckpt x --layers 4 5", "'5'? Quote texts with spaces, and write lists"),
    (f"rank ckpt {READ} --size={10**20}", f"size = {10**20}: expected at most"),
    (f"rank ckpt {READ} --max_windows 0", "--max_windows = 0: expected"),
    (f"rank ckpt {READ} --seed -1", "--seed = -1: expected a whole number of at least 0"),
    (f"rank ckpt {READ} --batch_size 0", "--batch_size = 0: expected a whole number"),
    ("heal ckpt x --heal_by lora --recipe top_k=5,kl_share=0.5", "top_k, kl_share of"),
    ("prune ckpt x", "expected either --layers, as in 21,22,23, or --scores and --n"),
    ("prune ckpt x --layers 3-4", "as in --layers 21,22,23, got '3-4'"),
    (f"prune ckpt x --layers {'1' * 5000}", "as in --layers 21,22,23, got '1111"),
    ("prune ckpt x --layers 1 --method bi", "chooses from --scores"),
    (f"rank ckpt {READ} --n 5", "expected 1 to 4"),
    ("rank .", "has no params.json (Meta's format) and no config.json"),
    ("shrink gpt2 x", "not exist; a hub id has an owner, as in openai-community/gpt2"),
    ("rank ckpt --data book.txt", "use longer texts or a smaller --size"),
    (f"rank ckpt {READ} --device tpu9", ": expected one of cpu"),
    (f"rank ckpt {READ} --json book.txt/r.json", "is not a writable directory"),
    (f"rank ckpt {READ} --json {'é' * 120}.json", "expected a name of at most 200 bytes"),
    ("prune ckpt book.txt --layers 1", "book.txt exists and is not a directory; choose another"),
    ("prune ckpt ckpt --layers 1", "ckpt exists"),
    ("demo --out ckpt --overwrite", "ckpt exists and holds no pruning.json"),
    ("evaluate ckpt ckpt", "ckpt is named twice: name it once, or another beside it"),
    ("reproduce ckpt", "the paper has no list for a model of dim 32, 5 layers"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=lambda part: part[:60])
def test_mistakes_cost_one_line(ckpt, capsys, line, message):
    before = sorted(p.name for p in Path().iterdir())
    told = fails(capsys, *shlex.split(line))
    assert message in told and "?;" not in told
    assert sorted(p.name for p in Path().iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (["rank", "a\nmodel"], r"checkpoint directory a\nmodel does not exist"),
        (
            ["prune", "x\r\n/y\x1b[31m/z", "out", "--layers", "1"],
            r"\r\n/y\x1b[31m/z does not exist",
        ),
        (["rank", "m" * 1500], "File name too long: 'mmm"),
        (["rank", "ckpt", "--data", "a/" * 750], "no such file or folder: 'a"),
        (["rank", "ckpt", "--method", "x" * 1500], ""),
        (["rank", "ckpt", "--" + "x" * 1500, "1"], "rank has no flag --xxx"),
        (["x" * 1500], "no command 'xxx"),
        (["prune", "ckpt", "x", "--layers", "a, " * 500], ""),
    ],
)
def test_names_with_line_breaks_and_long_ones_take_one_short_line(ckpt, capsys, argv, start):
    line = fails(capsys, *argv)
    assert start in line and len(line) <= 1000 and line.isprintable()


# what only a shell is told, or whole command lines of short-gpt and pip
SHELL = ("cli/", "jobs/shrink_result.py", "runtime/errors.py", "checkpoints/meta.py")
SHELL += ("data/demo.py",)


def test_messages_speak_python_and_name_settings_in_backticks():
    every = {flag for command in cli.COMMANDS.values() for flag in flags_of(command)}
    every |= {field.name for field in fields(Recipe)}
    root, documented = Path(cli.__file__).parents[1], (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text())
        firsts = [n.body[0] for n in ast.walk(tree) if isinstance(n, documented) and n.body]
        docs = {id(first.value) for first in firsts if isinstance(first, ast.Expr)}
        texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs]
        for text in [n.value for n in texts if isinstance(n.value, str)]:
            flags = re.findall(r"(?<!\S)--[a-z]\w*", text.partition("on the command line")[0])
            shell = str(path.relative_to(root)).startswith(SHELL) or "--data FOLDER" in text
            assert shell or not flags, (path, text)
            assert {*re.findall(r"`(\w+)`", text)} <= every, (path, text)


def test_the_shell_is_told_of_the_commands_own_flags():
    said = "`n` chooses from `scores`, not from `lr` or `rope`d `x y`"
    shell = "--n chooses from --scores, not from `lr` or `rope`d `x y`"
    assert in_shell(said, ["prune", "m"]) == shell
    assert in_shell(said, []) == said == in_shell(said, ["no_command"])
    assert in_shell("`scores`", ["rank"]) == "`scores`"  # no flag of that command


def test_scores_of_another_model_are_refused(ckpt, capsys):
    run("rank", "ckpt", *DATA, "--max_windows", 2, "--json", "r.json")
    run("prune", "ckpt", "small", "--layers", 1)
    capsys.readouterr()
    line = fails(capsys, "prune", "small", "x", "--scores", "r.json", "--n", 1)
    assert "r.json holds scores of the weights" in line
    line = fails(capsys, "prune", "ckpt", "x", "--scores", "r.json")
    assert line.endswith("with --scores, say how many layers to remove: --n")


@pytest.mark.parametrize(
    "argv", [("rank", "ckpt"), ("heal", "ckpt", "x", "--layers", 1), ("evaluate", "ckpt")]
)
def test_a_default_text_that_cannot_be_reached_says_what_to_name(ckpt, capsys, argv):
    assert re.search(
        r"the hub cannot be reached .*; name a local copy, .* or demo", fails(capsys, *argv)
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("rank", "ckpt", "--data", "pg19"), "'emozilla/pg19', and the hub cannot be reached"),
        (("generate", "owner/none", "a"), "owner/none is not a directory here, and the hub cannot"),
    ],
)
def test_no_network_is_told_within_seconds_and_in_a_line(ckpt, argv, message):
    """In a process of its own, as the hub's packages read whether to go online when imported."""
    online = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    words = [sys.executable, "-m", "short_gpt", *argv]
    start = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, env=online)
    assert time.monotonic() - start < 20  # retries alone took 23
    assert message in done.stderr and done.stderr.count("\n") == 1 and done.returncode == 1


def test_an_interruption_is_no_traceback(ckpt, capsys, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("short_gpt.jobs.ranking.rank", interrupt)
    with pytest.raises(SystemExit) as stop:
        run("rank", "ckpt")
    assert stop.value.code == 130
    assert capsys.readouterr().err == "short-gpt: interrupted\n"


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_describes_every_command_and_flag(command, capsys):
    run(*([command] if command else []), "--help")
    out = capsys.readouterr().out
    run("help", *([command] if command else []))
    assert capsys.readouterr().out == out
    if command is None:
        for words in ((), ("help", "help")):
            run(*words)
            assert capsys.readouterr().out == out
    assert all(len(line) <= 80 for line in out.splitlines())
    if command is None:
        places = [out.index(f"\n  {name} ") for name in cli.COMMANDS]
        assert places == sorted(places)
        return
    assert out.startswith(f"Example:\n  short-gpt {command}")
    flags = flags_of(cli.COMMANDS[command])
    shown = [flag for flag in flags.values() if not (flag.rare or flag.positional)]
    assert len(shown) <= 14 and all(f"\n  --{flag.name}" in out for flag in shown)
    assert out.endswith(f" more flags: short-gpt {command} --help all\n")
    run(command, "--help", "all")
    out = capsys.readouterr().out
    for flag in flags.values():
        assert len(flag.text) > 8, f"{flag.name} is not described"
        shown = flag.name.upper() if flag.positional else f"--{flag.name}"
        assert f"\n  {shown}" in out
        # a job's own default stands alone; none and no are no defaults to print
        if flag.default is not None and flag.default is not False:
            assert "Default: " not in flag.text, flag.name
        if isinstance(flag.default, str | int | float) and flag.default is not False:
            written = f"(default: {flag.default})".replace(" ", "")
            assert written in "".join(out.split()), flag.name
    headings = [h.capitalize() for h in HEADINGS if f"\n{h.capitalize()}:\n" in out]
    assert headings[0] == "What to read" and len(headings) >= 2
