"""Files that people edit: whatever stands there, it is read or refused in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_transformer, random_windows

from short_gpt.checkpoints import Provenance
from short_gpt.checkpoints.card import model_card
from short_gpt.evaluation.cells import ResultCache
from short_gpt.evaluation.perplexity import Perplexity, Sample
from short_gpt.models.decoder import MetaDecoder
from short_gpt.runtime.errors import USER_ERRORS
from short_gpt.runtime.state import ABOUT, StateFile
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import measure

GONE = object()
VALUES = (GONE, "x", -1, None, [], {}, True, 1e999, [[1]], {"a": 1}, 2**70, 1.5, [0, 0], [7])


def places(content: object, path: tuple = ()) -> Iterator[tuple]:
    """Where something stands in JSON, of lists their first entry."""
    if path:
        yield path
    keys = content if isinstance(content, dict) else range(len(content[:1])) if isinstance(
        content, list) else ()  # fmt: skip
    for key in list(keys):
        yield from places(content[key], (*path, key))


def edited(content: dict, path: tuple, value: object) -> dict:
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


@pytest.fixture(scope="module")
def scored(one_rank) -> Importance:
    decoder = MetaDecoder(make_transformer())
    return measure(decoder, [random_windows(3, 16)])


def edits(content: dict) -> Iterator[dict]:
    return (edited(content, place, value) for place in places(content) for value in VALUES)


def check(folder: Path, content: dict, use) -> int:
    """Puts every value into every place; returns how many files were refused."""
    path, refused = folder / "edited.json", 0
    for edit in edits(content):
        path.write_text(json.dumps(edit))
        try:
            use(path)
        except USER_ERRORS as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
    return refused


def test_an_edited_record_of_a_model_pruned_twice(tmp_path, scored):
    first = Provenance.of_scores(scored, facts={"data": "novels"})
    first = first.pruned("first", removed=[3], kept=[0, 1, 2, 4])
    (tmp_path / "once").mkdir()
    (tmp_path / "once/pruning.json").write_text(json.dumps(first.to_dict()))
    second = Provenance().pruned(tmp_path / "once", removed=[1], kept=[0, 2, 3])
    content = second.to_dict()
    assert content["original_layers"] == [0, 2, 4]

    def use(path: Path) -> None:
        record = Provenance.read(path)
        json.dumps(record.to_dict())
        model_card(record)

    assert check(tmp_path, content, use) > 100


def test_no_edit_of_a_state_is_taken_for_what_was_saved(tmp_path):
    """Any value of a search's or comparison's would run on, or fail far from the file."""
    path, identity = tmp_path / "edited.json", {"seed": 0, "windows": ["a", 1.5]}
    cells = ResultCache(StateFile(path, identity))
    cells.perplexities("bi raw", lambda: [Perplexity(1.5, 3, 1, (Sample(0, 1.5, 3),))])
    cells.value("sleb 2", lambda: {"removed": [3, 1], "losses": [{0: 1.25, 3: 2.5}]})
    written = json.loads(path.read_text())
    assert set(StateFile(path, identity).content["cells"]) == {"bi raw", "sleb 2"}
    saved = {name: value for name, value in written.items() if name not in ABOUT}
    refused = check(tmp_path, saved, lambda path: StateFile(path, identity))
    same = sum(edit == saved for edit in edits(saved))
    assert refused == len(VALUES) * len(list(places(saved))) - same
    assert written["cells"]["bi raw"] == [[1.5, 3, 1, 0, "float32"]]
