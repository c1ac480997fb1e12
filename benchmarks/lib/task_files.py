"""lm-eval's own tasks over documents from local files: same prompts, answers and metrics, no hub.

Each YAML file includes lm-eval's own and changes nothing but where the documents come from. They
are taken back into the fields of lm-eval's data sets from the files of MosaicML's evaluation
(``scripts/eval/local_data`` of llm-foundry), and what cannot be taken back exactly is refused.
Prompts are lm-eval's, also where the files' own differ: boolq without the word Passage, copa
without its comma, and two spaces before the answers of copa and of winograd_wsc (wsc273 there).

    python benchmarks/lib/task_files.py tasks/lambada_openai.jsonl lambada_passages.txt

writes the passages of LAMBADA, which are from novels, as a text file that benchmarks judge by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import fire

from llama.files import new_file

Document = dict[str, object]
OWN = {  # lm-eval's files, below its folder of tasks
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "winogrande": "winogrande/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}
MORE = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbook_qa": "openbookqa/openbookqa.yaml",
    "copa": "super_glue/copa/default.yaml",
    "winograd_wsc": "wsc273/default.yaml",
}
LETTERS = "ABCDE"
LINKS = {" because": "cause", " therefore": "effect"}  # of copa's sentences, and their questions
# words that lm-eval's wsc273 writes small inside a sentence
PRONOUNS = ["A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their"]


def piqa(row: Document) -> Document:
    goal = _between(str(row["query"]), "Question: ", "\n")
    first, second = row["choices"]
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def arc_easy(row: Document) -> Document:
    question = _between(str(row["query"]), "Question: ", "")
    return {"question": question, **_lettered(row)}


def arc_challenge(row: Document) -> Document:
    return arc_easy(row)


def openbook_qa(row: Document) -> Document:
    return {"question_stem": row["query"], **_lettered(row)}


def boolq(row: Document) -> Document:
    """A "Question: " inside a passage stays with it; lm-eval joins both again."""
    if row["choices"] != ["no", "yes"]:
        raise ValueError(f"{row['choices']} are not no and yes")
    text = _between(str(row["query"]), "Passage: ", "?")
    passage, found, question = text.rpartition("\nQuestion: ")
    if not found:
        raise ValueError(f"{text!r} has no question")
    return {"passage": passage, "question": question, "label": row["gold"]}


def copa(row: Document) -> Document:
    """The file's comma goes, and the premise's full stop comes back, which lm-eval takes away."""
    first, second = row["choices"]
    premise, found, link = str(row["query"]).rpartition(",")
    if not found or link not in LINKS or premise != premise.strip():
        raise ValueError(f"{row['query']!r} does not end with {', or '.join(LINKS)}")
    if odd := [choice for choice in (first, second) if choice[:1] != choice[:1].lower()]:
        raise ValueError(f"{odd[0]!r} begins with a capital, which lm-eval would write small")
    return {
        "premise": f"{premise}.",
        "choice1": first,
        "choice2": second,
        "question": LINKS[link],
        "label": row["gold"],
    }


def winograd_wsc(row: Document) -> Document:
    """The sentence with a pronoun's gap after the last whole word that both contexts share."""
    first, second = row["context_options"]
    same = [a == b for a, b in zip(first, second, strict=False)]
    common = first[: first.rfind(" ", 0, [*same, False].index(False)) + 1]
    options = [first[len(common) :], second[len(common) :]]
    end = str(row["continuation"])
    text = f"{common}_{end if end[0] in '.,;?!' else ' ' + end}"
    small = [option for option in options if option.split(" ")[0] in PRONOUNS]
    if "  " in text or len(common) < 2 or (small and common[-2] != "."):
        raise ValueError(f"{row['context_options']} would be read as other text")
    own = {"text": text, "pronoun": "_", "pronoun_loc": len(common)}
    return {**own, "options": options, "label": row["gold"]}


def winogrande(row: Document) -> Document:
    """The sentence with its gap, whose contexts and target lm-eval then makes as the file has."""
    first, second = row["context_options"]
    same = [a == b for a, b in zip(first, second, strict=False)]
    common = first[: [*same, False].index(False)]
    if "_" in common:
        raise ValueError(f"{common!r} has a gap already")
    return {
        "sentence": f"{common}_ {row['continuation']}",
        "option1": first[len(common) :],
        "option2": second[len(common) :],
        "answer": str(row["gold"] + 1),
    }


def lambada_openai(row: Document) -> Document:
    if " " in str(row["continuation"]):
        raise ValueError(f"{row['continuation']!r} is more than a word")
    return {"text": f"{row['context']} {row['continuation']}"}


MAKERS: dict[str, Callable[[Document], Document]] = {
    f.__name__: f
    for f in (
        *(piqa, arc_easy, winogrande, lambada_openai),
        *(arc_challenge, boolq, openbook_qa, copa, winograd_wsc),
    )
}


def _lettered(row: Document) -> Document:
    texts, labels = row["choices"], list(LETTERS[: len(row["choices"])])
    return {"choices": {"text": texts, "label": labels}, "answerKey": labels[row["gold"]]}


def _between(text: str, start: str, end: str) -> str:
    if not (text.startswith(start) and text.endswith(end)):
        raise ValueError(f"{text!r} does not begin with {start!r} and end with {end!r}")
    return text[len(start) : len(text) - len(end)]


def write(
    source: str | Path, folder: str | Path, tasks: Sequence[str] = tuple(OWN), start: int = 0
) -> list[str]:
    """Writes documents and YAML files; returns the names of the tasks, as in "local_piqa".

    Args:
        source: holds piqa.jsonl and the others.
        folder: exists.
        tasks: of `OWN` and `MORE`; those that have so many documents are written.
        start: documents of each that are left out, the first ones.
    """
    import lm_eval  # not needed for the passages

    own, written = Path(lm_eval.__file__).parent / "tasks", []
    for task in tasks:
        lines = Path(source, f"{task}.jsonl").read_text(encoding="utf-8").splitlines()[start:]
        if not lines:
            continue
        written.append(f"local_{task}")
        data = Path(folder, f"{task}.jsonl")
        documents = [MAKERS[task](json.loads(line)) for line in lines]
        data.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
        fields = {
            "include": str(own / {**OWN, **MORE}[task]),
            "task": f"local_{task}",
            "tag": [],
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
        }
        # JSON is YAML
        Path(folder, f"local_{task}.yaml").write_text(json.dumps(fields), encoding="utf-8")
    return written


def paths(folder: str, names: Sequence[str]) -> list[str]:
    """The YAML files of tasks that `write` has named."""
    return [str(Path(folder, f"{name}.yaml")) for name in names]


def main(source: str, out: str) -> None:
    """Writes the passages in their order, with an empty line between two.

    Args:
        source: a JSON document a line, with context and continuation.
        out: the text file; it must not exist.
    """
    with new_file(Path(out), overwrite=False, replaces=lambda _: False) as path:
        path.write_text("\n\n".join(passages(Path(source))), encoding="utf-8", newline="\n")


def passages(source: Path) -> list[str]:
    """Every passage with its last word, which is the continuation."""
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [f"{row['context']} {row['continuation']}" for row in rows]


if __name__ == "__main__":
    fire.Fire(main)
