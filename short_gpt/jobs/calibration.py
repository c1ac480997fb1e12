"""Several texts by their names: which layers each would remove, and what that costs on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llama.io.files import check_writable
from llama.parallel import several_ranks
from short_gpt.data.disjoint import hold_out, without_overlap
from short_gpt.data.windows import at_least
from short_gpt.jobs.calibrating import Apart, Calibrated, calibrate
from short_gpt.jobs.inputs import Cut, Opening, TextSource, check_model, listed
from short_gpt.jobs.rows import Windows
from short_gpt.jobs.saving import Saving, interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.short_model import ShortModel

SPARE = 4  # windows cut for one that is judged, as some may share text with those that rank


@dataclass(frozen=True)
class Kinds(TextSource):
    """Texts of several kinds.

    Args:
        data: two texts or more with commas between, of different kinds, such as books, questions
            and code: local files or folders, data sets of the hub, or pg19.
    """

    def each(self) -> dict[str, TextSource]:
        """Every text's source by its name: that of the file or folder, without its ending.

        Raises:
            ShortGPTError: fewer than two, or two of one name.
        """
        names = listed(self.data)
        found: dict[str, TextSource] = {
            Path(name).stem or name: replace(self, data=name) for name in names
        }
        if len(names) < 2 or len(found) < len(names):
            raise ShortGPTError(
                f"`data` {self.data}: expected two texts or more with commas between, of different "
                "names"
            )
        return found


@dataclass(frozen=True)
class Readings:
    """How the texts are cut into windows.

    Args:
        sizes: tokens in a window; of several, as in 512,1024, the first chooses and judges, and
            the rankings at the others are compared with it.
        bos: first, every, or both with a comma: the first of them chooses and judges; if not
            given, every for Gemma, else first.
        max_windows: windows of each text to rank on, and to fit a refit on.
        eval_windows: windows of each text to judge by, which share nothing with those.
        seed: of the choice of texts and windows.
    """

    sizes: object = (1024,)
    bos: str | None = None
    max_windows: int = 12
    eval_windows: int = 12
    seed: int = 0

    @property
    def numbers(self) -> list[int]:
        """The sizes; raises ShortGPTError for what is none."""
        given = [self.sizes] if isinstance(self.sizes, int) else self.sizes
        if not isinstance(given, Sequence) or not given or not all(type(i) is int for i in given):
            raise ShortGPTError(f"expected whole numbers as in `sizes` 512,1024, got {given!r}")
        return list(given)

    def cuts(self, bos: str = "first") -> dict[str, Cut]:
        """Every way of cutting by its name, the one that chooses and judges first."""
        places = listed(self.bos) if self.bos is not None else [bos]
        return {
            f"{size} tokens, bos {place}": Cut(size, seed=self.seed, bos=place)
            for place in places
            for size in self.numbers
        }

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, before a text is read."""
        for cut in self.cuts().values():
            cut.check()
        for name in ("max_windows", "eval_windows"):
            at_least(2, name, getattr(self, name))


@dataclass(frozen=True)
class Ranked:
    """What is chosen on each text.

    Args:
        n: how many layers to remove.
        method: bi, relative_magnitude or angular.
        healing: raw, refit or both with a comma.
    """

    n: int | None = None
    method: str = "bi"
    healing: str = "raw,refit"


def calibrate_checkpoint(
    model: str,
    data: str | Kinds,
    *,
    ranked: Ranked,
    readings: Readings | None = None,
    opening: Opening | None = None,
    saving: Saving | None = None,
) -> Calibrated:
    """What `experiments.calibrate` does, for a checkpoint and texts by their names.

    A text of several documents is ranked on one half of them and judged by the other.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        data: texts of different kinds, by their names with commas between.
        ranked: what each text chooses.
        readings, opening: how texts are cut and the model opened.
        saving: where the run is saved, to be continued.

    Raises:
        OSError, ShortGPTError: the model, the texts or a setting.

    Example:
        >>> ranked = Ranked(8)
        >>> calibrate_checkpoint("llama-2-7b", "a.txt,b.txt", ranked=ranked)  # doctest: +SKIP
    """
    readings, opening = readings or Readings(), opening or Opening()
    kinds = Kinds(data) if isinstance(data, str) else data
    if several_ranks():
        raise ShortGPTError("calibrate runs on one rank; start it alone")
    if ranked.n is None:
        raise ShortGPTError("say how many layers to remove: `n`")
    readings.check()
    state = (saving or Saving()).state
    if state is not None:
        check_writable(Path(state))
    sources = kinds.each()
    check_model(model, ranked.n)
    found = {name: list(source.read()) for name, source in sources.items()}
    short = opening.whole(model, size=max(readings.numbers))
    texts, ways = windows_apart(short, found, readings)
    with interruptible():
        return calibrate(
            short,
            texts,
            ranked.n,
            method=ranked.method,
            healings=listed(ranked.healing),
            ways=ways,
            state=state,
        )


def windows_apart(
    short: ShortModel, found: Mapping[str, Sequence[str]], readings: Readings
) -> tuple[dict[str, Apart], dict[str, dict[str, Windows]]]:
    """Windows of each text to rank on and to judge by, and those that are cut other ways.

    Args:
        short: encodes the texts.
        found: documents of each text, by its name.
        readings: how they are cut.

    Raises:
        ShortGPTError: a text is too short for windows of both kinds.
    """
    halves = {name: _halves(texts, readings.seed) for name, texts in found.items()}
    (_, cut), *others = readings.cuts(short.bos).items()
    few, held = readings.max_windows, readings.eval_windows
    ranking = {name: _cut(short, half, cut, few) for name, (half, _) in halves.items()}
    taken = [window for own in ranking.values() for window in own]
    texts = {}
    for name, (half, other) in halves.items():
        limit = SPARE * held + (few if other is half else 0)
        judged, _ = without_overlap(_cut(short, other, cut, limit), taken)
        if not judged:
            raise ShortGPTError(
                f"{name}: nothing is left to judge by, of which nothing is ranked on; give more "
                "text, or a smaller size"
            )
        texts[name] = Apart(ranking[name], judged[:held])
    ways = {
        way: {
            name: _cut(short, half, other, max(2, few * cut.size // other.size))
            for name, (half, _) in halves.items()
        }
        for way, other in others
    }
    return texts, ways


def _halves(texts: Sequence[str], seed: int) -> tuple[Sequence[str], Sequence[str]]:
    """Documents to rank on and others to judge by; of one alone, that itself twice."""
    return (texts, texts) if len(texts) < 2 else hold_out(texts, share=0.5, seed=seed)


def _cut(short: ShortModel, texts: Sequence[str], cut: Cut, limit: int) -> Windows:
    return list(replace(cut, max_windows=limit).windows(texts, short.encode, short.bos))
