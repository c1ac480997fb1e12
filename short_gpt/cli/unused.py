"""Flags that count only with another: one given without it would be passed over in silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from short_gpt.data.texts import has_columns, has_split
from short_gpt.evaluation.protocols import PROTOCOLS
from short_gpt.jobs.inputs import listed
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.selection.methods import BY_LOSS, METHODS
from short_gpt.wrappers.opening import reads_tokenizer

Values = Mapping[str, object]  # of all flags of a command, defaults included


@dataclass(frozen=True)
class Rule:
    """What flags need.

    Attributes:
        commands: in which it holds.
        flags: none of which does anything without what is needed.
        needs: that, in words.
        met: whether it is there.
    """

    commands: tuple[str, ...]
    flags: tuple[str, ...]
    needs: str
    met: Callable[[Values], bool]


def _given(*names: str) -> Callable[[Values], bool]:
    return lambda values: any(values.get(name) is not None for name in names)


def _sources(values: Values) -> list[str]:
    """The texts that a command reads, by their names."""
    names = str(values["data"])
    return [names] if Path(names).exists() else listed(names)


def _splits(values: Values) -> bool:
    return any(has_split(name, str(values["split"])) for name in _sources(values))


def _columns(values: Values) -> bool:
    held_out = values.get("eval_data")
    return any(map(has_columns, [*_sources(values), *([str(held_out)] if held_out else [])]))


def _tokenizer_is_read(values: Values) -> bool:
    """Whether a model's tokenizer is looked for; a path that does not exist is refused later."""
    stream = bool(values.get("stream") or values.get("stream_teacher"))
    models = [values.get(name) for name in ("model", "pruned", "teacher")]
    try:
        return any(reads_tokenizer(str(m), stream=stream) for m in models if m is not None)
    except FileNotFoundError:
        return True


SCORING = {*METHODS} - {*BY_LOSS}

READ_TEXTS = ("rank", "heal", "calibrate", "compare", "perplexity", "reproduce")
RULES = (
    Rule(
        (*READ_TEXTS, "prune", "generate", "evaluate", "convert"),
        ("tokenizer_path",),
        "a model in Meta's format (others bring their own tokenizer) or --stream",
        _tokenizer_is_read,
    ),
    Rule(
        READ_TEXTS,
        ("split",),
        "data with splits (pg19, a data set of the hub, a folder with files of that name)",
        _splits,
    ),
    Rule(
        READ_TEXTS,
        ("column",),
        "data with columns (.jsonl, .parquet or a data set of the hub)",
        _columns,
    ),
    Rule(
        ("prune",),
        ("eval_data", "eval_windows", "size", "confidence", "bos", "device", "dtype"),
        "--max_perplexity_ratio",
        _given("max_perplexity_ratio"),
    ),
    Rule(("rank",), ("candidates",), "--method sleb", lambda v: v["method"] == "sleb"),
    Rule(("heal",), ("max_memory",), "--stream", lambda v: bool(v["stream"])),
    Rule(
        ("rank",),
        ("confidence", "rare"),
        "--n, a --seed and --method bi or angular",
        lambda v: None not in (v["n"], v["seed"]) and v["method"] in ("bi", "angular"),
    ),
    Rule(("reproduce",), ("confidence", "rare"), "a --seed", _given("seed")),
    Rule(("rank", "reproduce"), ("rare",), "a --confidence", _given("confidence")),
    Rule(
        ("rank",),
        ("sublayers", "plots"),
        f"a --method that scores (not {' or '.join(BY_LOSS)})",
        lambda v: v["method"] not in BY_LOSS,
    ),
    Rule(("rank", "reproduce"), ("save_every",), "--state or --json", _given("state", "json")),
    Rule(
        ("compare",),
        ("steps", "rank", "learning_rate", "batch", "lora_size"),
        "lora or distill in --healing",
        lambda v: bool({"lora", "distill"} & {*listed(str(v["healing"]))}),
    ),
    Rule(
        ("compare",),
        ("seeds",),
        "random in --methods",
        lambda v: "random" in listed(str(v["methods"])),
    ),
    Rule(
        ("compare",),
        ("search_windows",),
        f"{' or '.join(BY_LOSS)} in --methods",
        lambda v: any(name not in SCORING for name in listed(str(v["methods"]))),
    ),
    Rule(
        ("compare", "evaluate"),
        ("limit", "include_path", "num_fewshot"),
        "--tasks",
        _given("tasks"),
    ),
    Rule(
        ("evaluate",),
        ("size", "max_windows", "bos"),
        f"--data (a text, or {', '.join(PROTOCOLS)})",
        lambda v: v["data"] != "none",
    ),
    Rule(
        ("generate",),
        ("top_p", "seed"),
        "a --temperature above 0",
        lambda v: v["temperature"] != 0,
    ),
    Rule(
        ("rank", "perplexity", "evaluate", "calibrate", "compare", "reproduce"),
        ("overwrite",),
        "--json or --plots",
        _given("json", "plots"),
    ),
)


def refuse_unused(command: str, given: Values, defaults: Values) -> None:
    """Raises ShortGPTError for a flag that does nothing without another.

    Args:
        command: its name.
        given: values of the flags that were given; None and False ask for nothing.
        defaults: of all flags of the command.
    """
    values = {**defaults, **given}
    asked = [name for name, value in given.items() if value is not None and value is not False]
    for rule in RULES:
        unused = [name for name in rule.flags if name in asked]
        if command in rule.commands and unused and not rule.met(values):
            raise ShortGPTError(
                f"--{unused[0]} has no effect without {rule.needs}: add that, or leave "
                f"--{unused[0]} out"
            )
