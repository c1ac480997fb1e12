"""Published layer lists, and comparisons with them."""

from __future__ import annotations

import pytest

from short_gpt.jobs import PaperComparison, compare_with_paper, identify
from short_gpt.jobs.reproduction import published

LLAMA = [27, 26, 25, 28, 24, 29, 23, 21, 22]
RUNS = published()["reimplementation"]["models"]


def test_the_paper_and_the_authors_repository_remove_the_same_layers() -> None:
    paper = published()["paper"]["models"]
    for name, (first, last) in published()["authors_repository"]["models"].items():
        assert sorted(paper[name]["removed"]) == [*range(first, last + 1)]
    assert {name: len(model["removed"]) for name, model in paper.items()} == {
        "Llama-2-7B": 9,
        "Llama-2-13B": 10,
        "Baichuan-2-7B": 9,
        "Baichuan-2-13B": 10,
    }


def test_the_reimplementation_removes_the_papers_layers_in_another_order() -> None:
    found = compare_with_paper("Llama-2-7B", RUNS["Llama-2-7B"]["removed"])
    assert found == PaperComparison(
        model="Llama-2-7B",
        paper=LLAMA,
        ours=[25, 27, 24, 26, 28, 29, 23, 22, 21],
        same_set=True,
        overlap=9,
        same_order=False,
        same_places=2,  # 29 and 23
        kendall_tau=pytest.approx(26 / 36),  # 5 pairs of 36 the other way round
    )


def test_the_papers_own_list() -> None:
    found = compare_with_paper("Llama-2-7B", LLAMA)
    assert (found.same_set, found.same_order, found.overlap) == (True, True, 9)
    assert (found.same_places, found.kendall_tau) == (9, 1.0)
    assert compare_with_paper("Llama-2-7B", LLAMA[::-1]).kendall_tau == -1.0


def test_lists_that_share_a_part() -> None:
    found = compare_with_paper("Llama-2-7B", [0, 22, 27, 1, 26])
    assert (found.same_set, found.same_order, found.overlap) == (False, False, 3)
    assert found.same_places == 0 and found.kendall_tau == pytest.approx(-1 / 3)


@pytest.mark.parametrize(("ours", "overlap"), [([0, 1, 2], 0), ([0, 27], 1), ([], 0)])
def test_fewer_than_two_shared_layers_have_no_correlation(ours: list[int], overlap: int) -> None:
    found = compare_with_paper("Llama-2-7B", ours)
    assert found.overlap == overlap
    assert found.kendall_tau is None and "Kendall's tau -)" in found.table()


def test_the_table_sets_both_lists_one_above_the_other() -> None:
    assert compare_with_paper("Llama-2-7B", [25, 27, 24, 26, 28, 29, 23, 20]).table() == "\n".join(
        [
            "Llama-2-7B, layers in order of removal",
            "removed   1.  2.  3.  4.  5.  6.  7.  8.  9.",
            "paper     27  26  25  28  24  29  23  21  22",
            "ours      25  27  24  26  28  29  23  20",
            "same layers: no (7 of 9)",
            "same places: 2 of 9",
            "same order: no (Kendall's tau 0.62)",
            "only the paper removes [21, 22]",
            "only we remove [20]",
        ]
    )


@pytest.mark.parametrize(
    ("model", "ours", "message"),
    [
        ("Llama-3-8B", [1], "no list for 'Llama-3-8B', only for Llama-2-7B, Llama-2-13B, Baich"),
        ("Llama-2-7B", [31, 32], r"layers \[32\] do not exist; the model has 0\.\.31"),
        ("Llama-2-13B", [-1], r"layers \[-1\] do not exist; the model has 0\.\.39"),
        ("Llama-2-7B", [5, 7, 5], r"layers \[5, 7, 5\] name a layer twice"),
    ],
)
def test_what_cannot_be_compared(model: str, ours: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_with_paper(model, ours)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((4096, 32, 32000), "Llama-2-7B"),
        ((5120, 40, 32000), "Llama-2-13B"),
        ((4096, 32, 125696), "Baichuan-2-7B"),
        ((5120, 40, 125696), "Baichuan-2-13B"),
    ],
)
def test_a_shape_names_its_model(shape: tuple[int, int, int], name: str) -> None:
    assert identify(*shape) == name
    assert compare_with_paper(name, [0]).model == name
