"""Sentences of README and the docs that print what was measured, made from the JSON files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pages import flowing, result

from benchmarks.tables.evidence_tables import adapter, lost_in_lambada, share, swept, swept_beside
from benchmarks.tables.healing_tables import above, group, minutes, novels, passes
from benchmarks.tables.made_tables import (
    default_cut,
    greedy,
    healed,
    least,
    refit_passes,
    rows,
    searched,
    served_sets,
    slower,
    solved,
    spread,
)
from short_gpt.healing.choosing import CANDIDATES


def distilled() -> str:
    """A distilled model's perplexity on chapters, as a part of a sentence."""
    rows = result("distillation")["rows"]
    chapters, alone = (
        f"{next(iter(rows[name].values()))['perplexity']:.2f}" for name in ("distill", "refit")
    )
    return f"comes to {chapters} on the chapters, from {alone} refitted"


def own_or_real() -> str:
    """What own text restores on novels, beside two other texts, as a part of a sentence."""
    rows = result("own_samples")["rows"]
    own, real = (rows[name] for name in ("own-24", "book+wikitext-24"))
    assert all(real[kind]["restored"] > own[kind]["restored"] for kind in ("book", "wikitext"))
    on_novels = [f"{row['novels']['restored']:.0%}" for row in (own, real)]
    return "gets back {} of the lost nats by its own text and {} by two other texts".format(
        *on_novels
    )


def restored(kind: int, windows: str = "16 + 0") -> str:
    """What a refit, on chapters alone, restores of a kind of text, as a page prints it."""
    return f"{[*group('windows')[windows]['healed'].values()][kind]['restored']:.0%}"


def misled() -> float:
    """The largest share of runs that ended early and wrong on windows made to mislead."""
    return max(1 - case["misled"]["agreement"] for case in result("stopping")["cases"].values())


def last_words(state: str) -> str:
    """The share of passages whose last word a model predicts, as a page prints it."""
    return f"{result('tasks')['rows'][state]['tasks']['lambada_openai acc']['value']:.0%}"


def kept_share(name: str) -> str:
    """Of a row of kept.json, with its interval."""
    return share(result("kept")["rows"][name]["mean"])


def kept_in_readme() -> str:
    rows = result("kept")["rows"]
    gain = of(rows["auto pruned"]["refit against it"]["without boolq"])
    fair = [f"{rows[f'auto {how}']['without boolq']['share']:.1%}" for how in HEALED]
    assert beyond(result("kept")["pairs"]["auto distilled less auto pruned"]["without boolq"])
    return (
        "keeps {} of its mean over eight tasks as pruned, {} refitted and {} distilled. The "
        "refit's gain, {}, is just beyond twice its error".format(*fair, gain)
    )


HEALED = ("pruned", "refit", "distilled")
CHOSEN = ("auto", "greedy", "bi")
CLOSED = ("pruned", "linearpatch", "ghosted", "replaceme", "layerwise")  # beside the refit


def guessed() -> list[str]:
    """Of what the original has above guessing, what auto's set keeps by how it was healed."""
    rows = result("kept")["rows"]
    shares = [rows[f"auto {how}"]["above guessing"] for how in HEALED]
    return ["{:.0%} ({:.0%} to {:.0%})".format(s["share"], *s["interval_95"]) for s in shares]


def of(change: Mapping[str, Any]) -> str:
    """A change of the mean, by its size, and its error."""
    return f"{abs(change['change']):.3f} ({change['standard_error']:.3f})"


def beyond(change: Mapping[str, float], key: str = "change") -> bool:
    return abs(change[key]) > 2 * change["standard_error"]


def shares() -> list[str]:
    """Sentences on the shares of a mean over tasks that are kept."""
    found = result("kept")
    rows, pairs, ranked = found["rows"], found["pairs"], found["kendall"]
    shown = {name: f"{row['mean']['share']:.1%}" for name, row in rows.items()}
    without = {name: f"{row['without boolq']['share']:.1%}" for name, row in rows.items()}

    def gained(name: str, *, fairly: bool = True) -> str:
        added = rows[name]["refit against it"]
        return of(added["without boolq"] if fairly else added)

    def apart(name: str, *, fairly: bool = True) -> str:
        return of(pairs[name]["without boolq"] if fairly else pairs[name])

    others = {
        f"{chosen} {how}": rows[f"{chosen} {how}"]["refit against it"]
        for chosen in CHOSEN
        for how in CLOSED
    }
    assert all(
        text["nats"] < 0 and beyond(text, "nats")
        for one in others.values()
        for text in one["texts"].values()
    )
    half = {
        (name, kind): text
        for name, one in others.items()
        for kind, text in one["texts, second half"].items()
    }
    (near,) = [text for text in half.values() if not beyond(text, "nats")]
    assert near is half["auto ghosted", "held-out chapters"]
    ahead = [name for name, one in others.items() if beyond(one["without boolq"])]
    assert ahead == ["auto pruned", "auto replaceme", "bi ghosted", "bi replaceme"]
    assert all(others[name]["without boolq"]["change"] > 0 for name in ahead)
    gains = [pair["without boolq"] for name, pair in pairs.items() if name.startswith("gain of")]
    assert len(gains) == 3 and not any(map(beyond, gains))
    between = apart("gain of auto refit less that of bi refit")
    boolq = {name: row["tasks"]["boolq acc"]["value"] for name, row in rows.items()}
    right = boolq.pop("original")
    low, *_, high = sorted(boolq[f"{c} pruned"] for c in CHOSEN)
    trained = {chosen: rows[f"{chosen} distilled"]["refit against it"] for chosen in CHOSEN}
    for one in trained.values():
        assert not beyond(one["without boolq"])
        assert all(text["nats"] > 0 and beyond(text, "nats") for text in one["texts"].values())
    seconds = {how: rows[f"auto {how}"]["healing"] for how in ("distilled", "refit")}
    spent = {how: f"{own['processor_seconds']:.0f}" for how, own in seconds.items()}
    lost = [f"{lost_in_lambada(rows[f'auto {how}'], rows['original']):.0%}" for how in HEALED]
    in_bfloat16 = {how: rows[f"auto {how}-mixed"] for how in ("refit", "distilled")}
    beside = [pairs[f"auto {how}-mixed less auto {how}"] for how in in_bfloat16]
    assert not any(beyond(pair) or beyond(pair["without boolq"]) for pair in beside)
    nats = [
        max(
            abs(own["texts"][k]["nats"] - rows[f"auto {how}"]["texts"][k]["nats"])
            for k in own["texts"]
        )
        for how, own in in_bfloat16.items()
    ]
    last = [
        rows[name]["tasks"]["lambada_openai acc"]["value"]
        for name in ("original", "auto pruned", "auto refit")
    ]
    return [
        "of auto's set, {:.3f} ({:.3f})".format(abs(near["nats"]), near["standard_error"]),
        "Without boolq it is {} on auto's set, {} on greedy search's and {} on Block "
        "Influence's".format(*(gained(f"{c} pruned") for c in CHOSEN)),
        "better than auto's by {} and than greedy search's by {}".format(
            apart("bi pruned less auto pruned"), apart("bi pruned less greedy pruned")
        ),
        f"(auto's less Block Influence's: {between})",
        "with auto's set refitted, {} apart, and distilled, {} apart; with boolq the distilled one "
        "is better, by {}.".format(
            apart("bi pruned less auto refit"),
            apart("bi pruned less auto distilled"),
            apart("bi pruned less auto distilled", fairly=False),
        ),
        "{} (auto), {} (greedy search) and {} (Block Influence), "
        "without boolq {}, {} and {}".format(
            *(shown[f"{c} refit"] for c in CHOSEN), *(without[f"{c} refit"] for c in CHOSEN)
        ),
        "{} of the mean of auto's set, {} of greedy search's and {} of Block Influence's".format(
            *(shown[f"{c} distilled"] for c in CHOSEN)
        ),
        "{}, {} and {} above the refit's".format(
            *(gained(f"{c} distilled", fairly=False) for c in CHOSEN)
        ),
        "Without boolq the shares are {}, {} and {}, and {}, {} and {} above".format(
            *(without[f"{c} distilled"] for c in CHOSEN),
            *(gained(f"{c} distilled") for c in CHOSEN),
        ),
        "by {}, {} and {} without boolq".format(
            *(apart(f"{c} distilled less {c} pruned") for c in CHOSEN)
        ),
        f"Training takes {spent['distilled']} core-seconds with its refit",
        f"where the refit alone takes {spent['refit']}.",
        f"Over the {ranked['healed']['models']} healed models",
        f"and the mean is {ranked['healed']['tau without boolq']:.2f} without boolq, and "
        f"{ranked['healed']['tau']:.2f} with it;",
        f"The original model has {right:.3f} right",
        f"The pruned models have {low:.3f} to {high:.3f}, and all changed models "
        f"{min(boolq.values()):.3f} to {max(boolq.values()):.3f}.",
        "auto's set keeps {} as pruned, {} refitted and {} distilled".format(*guessed()),
        "accounts for a third to a half of this loss ({}, {} and {})".format(*lost),
        "the original has {:.3f} right, the pruned model {:.3f} and the refitted one {:.3f}".format(
            *last
        ),
        "{} of auto's mean refitted and {} distilled, {} and {} from the same healings in "
        "float32".format(*(shown[f"auto {how}-mixed"] for how in in_bfloat16), *map(of, beside)),
        "differ by at most {:.4f} and {:.4f} nats".format(
            *(math.ceil(n * 1e4) / 1e4 for n in nats)
        ),
        *(
            "real text keeps {}, own samples {} and the mix {} of {}'s".format(
                *(without[f"{c} {how}"] for how in ("refit-text", "refit-own", "refit")), name
            )
            for c, name in zip(CHOSEN, ("auto", "greedy search", "Block Influence"), strict=True)
        ),
    ]


def mixed() -> list[str]:
    """What products in bfloat16 gain and cost."""
    found = result("mixed")
    assert found["layers"]["mixed"] == found["layers"]["float32"]
    apart = max(abs(row["change"]) for row in found["rows"].values())
    ratios = " and ".join(f"{ratio:.2f}" for ratio in found["ratios"])
    return [
        f"The whole of `shrink` takes {ratios} of the time in float32",
        f"are equal within {math.ceil(apart * 1e4) / 1e4:.4f} nats",
    ]


def scored_mixed() -> str:
    """What products in bfloat16 gain and change of scoring."""
    found = result("scoring")
    other = found["mixed against float32"]
    assert other["the lowest 12 layers in the same order"]
    differs = (
        f"{math.ceil(1e4 * other['largest relative difference of Block Influence']) / 1e4:.2%}"
    )
    assert f"over {len(found['seconds']['mixed'])} windows differs by at most {differs}" in flowing(
        "docs/scaling.md"
    )
    time = spread(found["ratios"]["mixed / bare"], 2)
    return f"takes {time} of the time of a bare pass in float32"


def apart(pair: str, kind: str, *, error: bool = False) -> str:
    """Nats per token between two refits on other text, or their error, as a page prints it."""
    found = result("own_samples")["differences"][pair][kind]
    return f"{abs(found['standard_error' if error else 'nats']):.2f}"


def spanned(pair: str, kinds: Sequence[str] = ("book", "novels", "wikitext")) -> str:
    """The least and the greatest of these differences."""
    low, high = (pick(apart(pair, kind) for kind in kinds) for pick in (min, max))
    return f"{low} to {high}"


def own_sentences() -> list[str]:
    """Sentences on refits on own samples, and on layers chosen on them."""
    few, many, third, half = (
        f"{one} less book+wikitext-{windows}"
        for one, windows in (
            ("own-24", 24),
            ("own-96", 96),
            ("a third each-24", 24),
            ("book+wikitext+own-96", 96),
        )
    )
    more, last, chats = "own-192 less own-12", "own-192 less own-96", "chats-24 less own-24"
    every = ("book", "novels", "wikitext", "chats")
    alone, many_alone, mix = (
        f"{name} (greedy search's layers) less {name}"
        for name in ("own-24", "own-96", "book+wikitext+own-96")
    )

    def searched(kind: str) -> str:
        return " to ".join(sorted(apart(pair, kind) for pair in (alone, many_alone)))

    found = result("own_samples")["choices"]
    agreed = {(a["first"], a["second"]): a["correlation"] for a in found["agreement"]}
    worse = found["novels less own-24"]["novels"]
    apart_by = result("own_samples")["differences"]
    lower = [few, many, more, last, alone, many_alone, mix, third]
    assert all(apart_by[pair]["novels"]["nats"] < 0 for pair in lower) and worse["nats"] > 0
    assert all(apart_by[pair]["book"]["nats"] < 0 for pair in lower[2:-1])
    assert all(apart_by[half][kind]["nats"] > 0 for kind in ("book", "wikitext"))
    assert apart_by[third]["book"]["nats"] > 0
    assert [kind for kind, own in apart_by[chats].items() if own["nats"] < 0] == ["chats"]
    return [
        f"With 24 windows it has {apart(few, 'novels')} nats less than the book and WikiText-2 "
        f"together (paired standard error {apart(few, 'novels', error=True)}), with 96 windows "
        f"{apart(many, 'novels')} nats less ({apart(many, 'novels', error=True)})",
        f"the mix has {apart(third, 'novels')} nats less on novels "
        f"({apart(third, 'novels', error=True)}) than the two real texts alone, and "
        f"{apart(third, 'book')} more on the book",
        f"{apart(half, 'book')} nats more on the book than without it, and "
        f"{apart(half, 'wikitext')} ({apart(half, 'wikitext', error=True)}) more on WikiText-2",
        f"the loss falls by {apart(more, 'novels')} nats on novels, {apart(more, 'wikitext')} on "
        f"WikiText-2 and {apart(more, 'book')} on the book, and by {apart(more, 'chats')} on own "
        f"dialogs. The last doubling, from 96 to 192, still gains {spanned(last, every)}",
        f"At 0.7 the loss is {spanned('own-24-at-0.7 less own-24', every)} nats higher on each "
        f"kind. At 1.2 it is {spanned('own-24-at-1.2 less own-24', ('book', 'novels', 'chats'))} "
        "higher",
        f"by {apart(chats, 'chats')} nats ({apart(chats, 'chats', error=True)}) better on other "
        f"own dialogs, and by {spanned(chats)} nats worse",
        f"own text has {searched('novels')} nats less on novels and {searched('book')} less on "
        f"the book, and the same loss on WikiText-2. The mix of 96 windows has "
        f"{apart(mix, 'novels')} less on novels, {apart(mix, 'book')} less on the book "
        f"({apart(mix, 'book', error=True)}) and {apart(mix, 'wikitext')} less on WikiText-2 "
        f"({apart(mix, 'wikitext', error=True)})",
        f"on novels by {worse['nats']:.2f} nats (paired standard error "
        f"{worse['standard_error']:.2f})",
        "Its scores have a rank correlation of "
        f"{agreed['book', 'own-24']:.2f} with those on the book, and of "
        f"{agreed['own-24', 'novels']:.2f} with those on novels",
    ]


def text_sentences() -> list[str]:
    """Sentences on layers chosen on one text, and refitted on it, and judged on others."""
    found = result("calibration")["calibration"]
    prose, other = ("bible", "wikitext", "novels"), ("questions", "code")
    excess = {(c["healing"], c["choice"], c["text"]): c["excess"] for c in found["cells"]}
    asked = [excess["raw", "questions", text] for text in prose]
    coded = [f"{excess['raw', 'code', text]:.2f}" for text in ("bible", "novels", "wikitext")]
    alone = [excess["refit", a, b] for a in (*prose, *other) for b in (*prose, *other) if a != b]
    mix = max(excess["refit", "mix", text] for text in (*prose, *other))
    pairs = [(a["first"] == a["second"], a["correlation"]) for a in found["agreement"]]
    two, halves = (min(c for same, c in pairs if same is one) for one in (False, True))
    return [
        f"correlate at {two:.2f} and more, those of two halves of one text at {halves:.2f}",
        f"on questions cost prose {min(asked):.2f} to {max(asked):.2f} nats more",
        "cost the Bible {} and novels {} nats more, and WikiText-2 {}, within twice".format(*coded),
        f"Together they cost the other texts {min(alone):.2f} to {max(alone):.2f} nats more",
        f"it is within {mix:.2f} nats of every text's own refit",
    ]


def task_sentences() -> list[str]:
    """Sentences on what healings restore of losses and of LAMBADA's last word."""
    rows = result("tasks")["rows"]
    shares, words, errors = dict[str, list[float]](), list[list[str]](), list[float]()
    for count in (2, 4):
        pruned, *healed = (rows[f"{count} less{how}"] for how in ("", ", refitted", ", distilled"))
        for how, own in zip(("refit", "distilled"), healed, strict=True):
            for text in ("held-out chapters", "WikiText-2"):
                share = 1 - own["texts"][text]["nats"] / pruned["texts"][text]["nats"]
                shares.setdefault(how, []).append(share)
        lost = [own["tasks"]["lambada_openai perplexity"] for own in (pruned, *healed)]
        words.append([f"{-word['change']:.2f}" for word in lost])
        errors += [word["standard_error"] for word in lost]
    span = {how: f"{min(own):.0%} to {max(own):.0%}" for how, own in shares.items()}
    (a, b, c), (d, e, f) = words
    return [
        f"the refit restores {span['refit']} of what pruning costs, and refit plus distillation "
        f"restores {span['distilled']}",
        f"the last word is {a} nats worse when pruned, {b} refitted and {c} distilled with 2 "
        f"layers removed, and {d}, {e} and {f} nats worse with 4, each with an error of "
        f"{min(errors):.2f} to {max(errors):.2f} nats",
        f"in {last_words('4 less')} of the cases instead of {last_words('whole')}",
    ]


def problem_sentences() -> list[str]:
    """Sentences on how many word problems the Qwens solve, svamp's and gsm8k's."""

    def solve(file: str, name: str) -> str:
        own = result(file)["rows"][name]["from original"]
        cells = [cell for metric, cell in own.items() if metric.endswith("exact_match")]
        return " and ".join(f"{cell['value'] * cell['documents']:.0f}" for cell in cells)

    small, large = "reasoning", "reasoning_15b"
    return [
        f"The 0.5B solves {solve(small, 'original')} of 50 problems, "
        f"{solve(small, 'bi-3, pruned')} without 3 layers",
        f"Healed, it solves {solve(small, 'bi-3, healed')} of 50",
        f"Without 4 layers it solves {solve(small, 'bi-4, healed')}, "
        f"the pruned one {solve(small, 'bi-4, pruned')}",
        f"The 1.5B solves {solve(large, 'original')} of 25 problems, "
        f"{solve(large, 'bi-3, pruned')} without 3 layers, and "
        f"{solve(large, 'bi-3, healed')} once healed",
    ]


def choice_sentences() -> list[str]:
    """Sentences on the automatic choice and its candidates."""
    found = result("choices")
    four, eight = ({m["n"]: m for m in found["means"]}[n] for n in (4, 8))

    def above(of: Mapping[str, Any]) -> float:
        return of["all three kinds"]["nats"]

    def with_error(of: Mapping[str, Any]) -> str:
        return f"{above(of):.3f} nats ({of['all three kinds']['standard_error']:.3f})"

    others = [above(own) for name, own in eight["from auto"].items() if name in CANDIDATES]
    level, *worse = sorted(others)
    assert abs(level) < 2 * eight["from auto"]["angular"]["all three kinds"]["standard_error"]
    span = f"{worse[0]:.2f} to {worse[-1]:.2f} nats"
    assert f"better by {span}, over three kinds of text" in flowing("docs/methods.md")
    assert f"refitted sets of 8 layers are {worse[-1]:.2f} nats apart" in flowing("docs/choose.md")
    draws = [row["from auto"] for row in found["rows"]]
    rivals = [own for draw in draws for name, own in draw.items() if name in CANDIDATES]
    best = -min(map(above, rivals))
    at_most = -min(own[kind]["nats"] for own in rivals for kind in own)
    evidence = f"by more than {best:.3f} nats over the three kinds, and on a single kind by at most"
    assert f"{evidence} {at_most:.2f}" in flowing("docs/evidence.md")
    worst = [above(own) for name, own in four["from auto"].items() if name in CANDIDATES]
    nearest, *_, furthest = sorted(filter(None, worst))
    swaps = eight["from auto"]["auto without swaps"]["all three kinds"]
    low, high = (pick(row["passes"] for row in found["rows"]) for pick in (min, max))
    kept = sum(any(swap["kept"] for swap in row["swaps"]) for row in found["rows"])
    tried = [len(row["swaps"]) for row in found["rows"]]
    names = {3: "three", 4: "four", 5: "five", 6: "six", 10: "ten"}
    return [
        f"by {nearest:.2f} to {furthest:.2f} nats over the three kinds",
        f"`stepwise_bi` brings auto {with_error(four['without it']['stepwise_bi'])}",
        f"{swaps['nats']:.3f} nats ({swaps['standard_error']:.3f}) with 8 layers",
        f"changed {names[kept]} sets of {names[len(tried)]}",
        f"by {span} over the three kinds",
        f"The block brings auto {with_error(eight['without it']['angular'])}",
        f"greedy search {with_error(eight['without it']['sleb'])}",
        f"A choice took {low:.0f} to {high:.0f} of its 60 bare passes, and tried "
        f"{names[min(tried)]} to {names[max(tried)]} swaps",
    ]


def optimal_sentences() -> list[str]:
    """Sentences on how near the best of all sets the choices come."""
    found = result("optimality")
    names = {1: "first", 2: "second"}
    best = {how: ", ".join(map(str, found["best"][how]["layers"])) for how in ("raw", "healed")}
    greedy = {how: found["choices"]["sleb"][how]["rank"] for how in ("raw", "healed")}
    after, both = found["checked"]["rank_correlation"], found["rank_correlation_of_raw_with_healed"]
    return [
        f"ranks {names[greedy['raw']]} of {found['sets']} when pruned, where the best set is "
        f"{best['raw']}, and {greedy['healed']}th when refitted, where the best is "
        f"{best['healed']}",
        f"a rank correlation of {after['healed']:.2f} with the loss after the cheap refit, and of "
        f"{after['raw']:.2f} with the pruned loss",
        f"the pruned and the refitted losses correlate by {both:.2f}",
    ]


REFITTED = ("Block Influence", "greedy search")  # whose sets `refit_choices.py` refits
FIRST = REFITTED[0]
STEPS = ("0.2", "0.35", "0.7", "1")


def cost(name: str, group: str, case: str, file: str = "refit_choices") -> str:
    """What a case of the refit's settings is from the usual one by, over three kinds of text."""
    kinds = result(file)["sets"][name][group][case]["kinds"]["all three kinds"]
    return f"{abs(kinds['nats']):.3f} ({kinds['standard_error']:.3f})"


def on_novels(name: str, file: str) -> str:
    """By what a step of 0.35 is better on novels, beyond twice the error."""
    found = result(file)["sets"][name]["usual"]["step 0.35, ridge 2 F / N"]["kinds"]["novels"]
    assert found["nats"] < 0 and beyond(found, "nats")
    return f"{-found['nats']:.3f} ({found['standard_error']:.3f})"


def settings() -> list[str]:
    """Sentences on the refit's step size and ridge."""
    steps = {
        step: [cost(name, "usual", f"step {step}, ridge 2 F / N") for name in REFITTED]
        for step in STEPS
    }
    realigned = "step 0.5, ridge 2 F / N, inputs realigned (ridge 0.1)"
    ridges = {
        ridge: [cost(name, "ridges", f"step 0.5, ridge {ridge}") for name in REFITTED]
        for ridge in ("local", "0.03", "1", "F / N", "4 F / N")
    }
    for file, name in (*(("refit_choices", name) for name in REFITTED), ("refit_usual", FIRST)):
        cases = result(file)["sets"][name]  # none is better beyond twice the error
        every = cases.get("ridges", {}) | cases["usual"]
        changes = {case: found["kinds"]["all three kinds"] for case, found in every.items()}
        assert not any(
            change["nats"] < 0 and beyond(change, "nats")
            for case, change in changes.items()
            if "inputs" not in case
        )
        assert all(changes[case]["nats"] >= 0 for case in cases.get("ridges", {}))
    longer = [cost(FIRST, "usual", f"step {s}, ridge 2 F / N", "refit_usual") for s in STEPS]
    moved = [cost(name, "usual", realigned) for name in REFITTED]
    return [
        "0.2 is worse by {} nats without Block Influence's layers and {} without greedy".format(
            *steps["0.2"]
        ),
        "0.7 by {} and {}, and the whole step by {} and {}.".format(*steps["0.7"], *steps["1"]),
        "0.35 differs by {} and {}: within twice the error.".format(*steps["0.35"]),
        "by {} without Block Influence's layers and by {} without greedy".format(*moved),
        "0.03 is worse by {} and {}, 1 by {} and {}, and the local one by {} and {}.".format(
            *(ridges[r][i] for r in ("0.03", "1", "local") for i in (0, 1))
        ),
        "Half of it, F / N, costs {} and {}, twice of it {} and {}.".format(
            *ridges["F / N"], *ridges["4 F / N"]
        ),
        "0.2 is worse by {}, 0.35 by {}, 0.7 by {} and the whole step by {}.".format(*longer),
        f"lower the loss by {cost(FIRST, 'usual', realigned, 'refit_usual')}, at the cost",
        f"0.35 is better by {on_novels('greedy search', 'refit_choices')} without greedy",
        f"On novels, 0.35 is better by {on_novels(FIRST, 'refit_usual')}.",
    ]


def evidence() -> list[str]:
    """What the page of evidence prints of other pages' results."""
    kept, distilled = result("kept")["rows"], result("distillation")["rows"]
    held = "held-out chapters"
    after, before = (f"{distilled[name][held]['perplexity']:.2f}" for name in ("distill", "refit"))
    kept_by = [kept_share(f"auto {how}") for how in HEALED]
    fair = [f"{kept[f'auto {how}']['without boolq']['share']:.1%}" for how in HEALED]
    beside = of(result("kept")["pairs"]["bi pruned less auto pruned"]["without boolq"])
    trained = kept["auto distilled"]["refit against it"]["without boolq"]
    pair = "own-24 less book+wikitext-24"
    ratios = result("scoring")["ratios"]
    return [
        "auto's set keeps {} as pruned, {} refitted and {} distilled; without boolq".format(
            *kept_by
        ),
        "which flatters damaged models, {}, {} and {}.".format(*fair),
        f"is better at tasks than auto's by {beside} without boolq",
        f"it keeps {kept_by[2]}, without boolq {fair[2]}, where its gain over the refit, "
        f"{of(trained)}",
        f"better than 24 real ones of two other texts by {apart(pair, 'novels')} nats "
        f"(standard error {apart(pair, 'novels', error=True)})",
        f"[{after} in place of {before}]",
        "the whole step is worse by {} and {} nats over three kinds of text".format(
            *(cost(name, "usual", "step 1, ridge 2 F / N") for name in REFITTED)
        ),
        f"{spread(ratios['scoring / bare'])} times a bare pass, in the same run",
        f"{spread(ratios['mixed / bare'], 2)} of the time of a bare pass in float32",
    ]


MADE: dict[str, Sequence[Callable[[], str | list[str]]]] = {
    "docs/tasks.md": (shares, task_sentences, problem_sentences),
    "docs/results.md": (
        optimal_sentences,
        choice_sentences,
        greedy,
        novels,
        default_cut,
        lambda: (
            f"`sleb_healed`, when pruned, by {above('raw')['sleb_healed']}. For all other choices"
        ),
    ),
    "docs/calibration.md": (own_sentences, text_sentences),
    "docs/healing-results.md": (
        lambda: healed().replace("8 layers removed", "8 of 30 layers removed"),
        lambda: f"took {passes()} times",
        lambda: f"On two CPU cores it took {minutes()}",
        settings,
        lambda: f"it restores {restored(0)} of the lost nats on held-out chapters",
        lambda: f"{restored(2)} on novels and {restored(1)} on WikiText-2",
    ),
    "docs/scaling.md": (
        least,
        mixed,
        scored_mixed,
        lambda: f"at most {misled():.2%} of the runs ended early and wrong",
    ),
    "docs/serve.md": (served_sets, slower),
    "docs/prune-8b.md": (solved, searched, refit_passes),
    "docs/choose.md": (
        lambda: f"in {last_words('4 less')} of the cases instead of {last_words('whole')}",
    ),
    "docs/limits.md": (swept, swept_beside, adapter),
    "docs/evidence.md": (evidence,),
    "README.md": (
        swept,
        lambda: f"original model: {rows()['dense', 0, 'raw']['perplexity']:.3f}",
        own_or_real,
        distilled,
        kept_in_readme,
        lambda: (
            f"restore {restored(0)} of the lost nats on its held-out chapters and {restored(2)} on "
            "novels; with as many of WikiText-2 beside them, it is "
            f"{restored(0, '16 + 16')} and {restored(2, '16 + 16')}"
        ),
        lambda: (
            f"{spread(result('scoring')['ratios']['scoring / bare'])} times, the median of 20 runs"
        ),
    ),
}


def sentences(page: str) -> list[str]:
    """All that stand in a page."""
    made = [make() for make in MADE[page]]
    return [one for own in made for one in ([own] if isinstance(own, str) else own)]
