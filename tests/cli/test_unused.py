"""Flags that would be passed over in silence are refused by the flag that makes them count."""

from __future__ import annotations

import inspect

import pytest
from commands import fails

from short_gpt.cli import COMMANDS

UNUSED = [
    (("evaluate", "model", "--limit", 5), "--limit has no effect without --tasks"),
    (("evaluate", "model", "--num_fewshot", 5), "--num_fewshot has no effect without --tasks"),
    (("shrink", "model", "out", "--pick", 1), "--pick has no effect without --curve"),
]


@pytest.mark.parametrize(("argv", "message"), UNUSED, ids=lambda part: str(part)[:60])
def test_what_has_no_effect_is_refused_by_what_it_needs(argv, message, capsys):
    assert message in fails(capsys, *argv)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_setting_needs_is_a_setting_of_the_same_job(command):
    job = COMMANDS[command].job
    names = inspect.signature(job).parameters
    for group in job.settings.values():
        for one in group.taken():
            assert one.metadata["needs"] is None or one.metadata["needs"] in names, one.name
