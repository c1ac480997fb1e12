"""Flags that would be passed over in silence are refused by the flag that makes them count."""

from __future__ import annotations

import pytest
from commands import fails

from short_gpt.cli import COMMANDS
from short_gpt.cli.flags import flags_of
from short_gpt.cli.unused import RULES, refuse_unused

TWO = ("model", "out")
UNUSED = [
    (("prune", *TWO, "--layers", "1", "--eval_data", "a.txt"), "--max_perplexity_ratio"),
    (("prune", *TWO, "--layers", "1", "--device", "cpu"), "--max_perplexity_ratio"),
    (("prune", *TWO, "--layers", "1", "--dtype", "float32"), "--max_perplexity_ratio"),
    (("prune", *TWO, "--layers", "1", "--confidence", 0.9), "--max_perplexity_ratio"),
    (("prune", *TWO, "--layers", "1", "--bos", "every"), "--max_perplexity_ratio"),
    (("rank", "model", "--n", 2, "--candidates", 3), "--method sleb"),
    (("rank", "model", "--n", 2, "--healed"), "--method sleb"),
    (("rank", "model", "--n", 2, "--method", "sleb", "--budget", 2), "--method evolution"),
    (("rank", "model", "--confidence", 0.9), "--n, a --seed"),
    (("rank", "model", "--rare", 0.1), "--n, a --seed"),
    (("rank", "model", "--n", 2, "--confidence", "none", "--rare", 0.1), "a --confidence"),
    (("rank", "model", "--n", 2, "--seed", "none", "--confidence", 0.9), "--n, a --seed"),
    (("rank", "model", "--n", 2, "--method", "norm", "--confidence", 0.9), "--method bi or"),
    (("rank", "model", "--n", 2, "--method", "sleb", "--plots", "p"), "a --method that scores"),
    (("rank", "model", "--n", 2, "--method", "sleb", "--sublayers"), "a --method that scores"),
    (("rank", "model", "--save_every", 5), "--state or --json"),
    (("rank", "model", "--overwrite"), "--json or --plots"),
    (("reproduce", "model", "--seed", "none", "--rare", 0.1), "a --seed"),
    (("reproduce", "model", "--confidence", "none", "--rare", 0.1), "a --confidence"),
    (("compare", "model", "--steps", 5), "lora or distill in --healing"),
    (("compare", "model", "--seeds", 5, "--methods", "bi"), "random in --methods"),
    (("compare", "model", "--search_windows", 5, "--methods", "bi"), "evolution in --methods"),
    (("compare", "model", "--limit", 5), "--tasks"),
    (("evaluate", "model", "--num_fewshot", 5), "--tasks"),
    (("evaluate", "model", "--data", "none", "--tasks", "piqa", "--size", 5), "--data"),
    (("evaluate", "model", "--data", "none", "--tasks", "piqa", "--bos", "first"), "--data"),
    (("draft", *TWO, "--prompts", "p.txt", "--size", 5), "(no --prompts)"),
    (("generate", "model", "text", "--temperature", 0, "--top_p", 0.5), "--temperature above 0"),
]


@pytest.mark.parametrize(("argv", "needs"), UNUSED, ids=lambda part: str(part)[:60])
def test_what_has_no_effect_is_refused_by_what_it_needs(argv, needs, capsys):
    line = fails(capsys, *argv)
    assert " has no effect without " in line and needs in line


def test_every_rule_speaks_of_flags_that_there_are():
    for rule in RULES:
        for command in rule.commands:
            flags = flags_of(COMMANDS[command])
            rule.met({name: flag.default for name, flag in flags.items()})
            assert {*rule.flags} & {*flags}, (rule, command)


def test_what_counts_or_asks_for_nothing_passes():
    defaults = {name: flag.default for name, flag in flags_of(COMMANDS["rank"]).items()}
    for given in (
        {"n": 2, "confidence": 0.9},
        {"confidence": None},
        {"sublayers": False, "method": "sleb", "n": 2},
        {"candidates": 3, "method": "sleb", "n": 2},
        {"candidates": 3, "method": "evolution", "budget": 2.0, "n": 2},
        {"healed": True, "method": "sleb", "n": 2},
    ):
        refuse_unused("rank", given, defaults)
