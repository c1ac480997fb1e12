"""A model in memory: scored and pruned as any, and searched, tried and generated with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from short_gpt.data.texts import Conversation
from short_gpt.data.windows import common_start
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile
from short_gpt.selection.search import Search, SearchOptions, by_loss
from short_gpt.wrappers.scored_model import ScoredModel

Prompts = Sequence[str]


def check_texts(texts: Prompts) -> None:
    """Raises ShortGPTError for one text where a list of texts is expected."""
    if isinstance(texts, str):
        raise ShortGPTError("expected a list of texts, got one string: pass [text]")


class ShortModel(ScoredModel):
    """A model in memory whose layers can be scored, searched, tried without and removed.

    Example:
        >>> removed = open_model("llama-2-7b").search(windows, n=9)  # doctest: +SKIP
    """

    @abstractmethod
    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]:
        """Up to ``count`` likeliest next tokens after ``ids``."""

    def greedy_many(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """`greedy` for several prompts, at once where the model can."""
        return [self.greedy([*ids], count) for ids in prompts]

    @abstractmethod
    def continued(
        self, ids: Sequence[Sequence[int]], count: int, choose: Callable[[Tensor], Tensor]
    ) -> None:
        """Writes ``count`` tokens after B sequences of one length; none of them ends a text.

        ``choose`` takes the logits of the next tokens, (B, V) float32, and returns the tokens (B,).
        """

    @abstractmethod
    def opening(self, *, chat: bool = False) -> list[int]:
        """What a text of the model's own begins with: bos, or the chat template's opening.

        That is the system prompt, if the template has one, and a user's turn that is still open.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of token ids, with special tokens' names unless these are to be left out."""

    @property
    def chats(self) -> bool:
        """Whether it has a chat template that takes only a user's turn."""
        return False

    @abstractmethod
    def dialog(self, messages: Sequence[dict[str, str]], *, answer: bool = False) -> list[int]:
        """Token ids of a chat; with ``answer``, up to where the model begins to answer.

        Args:
            messages: The role and the content of each turn.

        Raises:
            ShortGPTError: there is no chat template, or it fails or refuses, by whatever error.
        """

    @property
    @abstractmethod
    def answer_ends(self) -> frozenset[int]:
        """Tokens that end an answer in a dialog."""

    def turn(self, prompt: str, *, ends: frozenset[int] = frozenset()) -> list[int]:
        """Token ids of a user's turn, up to where the model begins to answer.

        With `answer_ends` as ``ends`` it follows one of these, and has no system prompt. A
        `Conversation` is a dialog of its own, and follows nothing.
        """
        if isinstance(prompt, Conversation):
            return self.dialog(prompt.messages, answer=True)
        after = self._after_answer(prompt) if ends else []
        between = common_start(after, self._after_answer("?")) if ends else []
        end = next((i for i, token in enumerate(between, 1) if token in ends), 0)
        return after[end:] or self.dialog([{"role": "user", "content": prompt}], answer=True)

    def _after_answer(self, prompt: str) -> list[int]:
        """What follows an answer in a dialog: its end, and another turn; nothing if that fails."""

        def dialog(answer: str) -> list[int]:
            said = {"user": "A", "assistant": answer}
            turns = [{"role": role, "content": text} for role, text in said.items()]
            return self.dialog([*turns, {"role": "user", "content": prompt}], answer=True)

        with suppress(ShortGPTError):  # the template may take one turn alone
            return common_start(dialog("B")[::-1], dialog("C")[::-1])[::-1]
        return []

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a user's turn that the model is to answer; without `chats`, of the text.

        Raises:
            ShortGPTError: they fill the model's context.
        """
        ids = self._prompt_ids(prompt)
        if len(ids) >= (most := self.decoder.max_seq_len):
            raise ShortGPTError(
                f"`prompt` has {len(ids):,} tokens, but the model's context is {most:,}; shorten it"
            )
        return ids

    def _prompt_ids(self, prompt: str) -> list[int]:
        return self.encode(prompt)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text, where `greedy` writes on after them; none where it stops."""
        return frozenset()

    def generate(
        self,
        prompts: Prompts,
        max_gen_len: int = 50,
        temperature: float = 0.6,
        top_p: float = 0.9,
        *,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Continuations of texts; ``temperature`` 0 takes the likeliest token.

        ``max_new_tokens`` is transformers' name of ``max_gen_len``.
        """
        check_texts(prompts)
        count = max_gen_len if max_new_tokens is None else max_new_tokens
        return self._continuations(prompts, count, temperature, top_p)

    @abstractmethod
    def _continuations(
        self, prompts: Prompts, count: int, temperature: float, top_p: float
    ) -> list[str]:
        """What `generate` returns, of at most ``count`` tokens each."""

    @abstractmethod
    def harness_model(self, *, batch_size: int = 1) -> object:
        """The model as the lm-evaluation-harness knows models; see `evaluation.tasks`."""

    def search(
        self,
        windows: Sequence[Sequence[int]],
        n: int,
        *,
        method: str = "sleb",
        batch_size: int = 1,
        state: StateFile | None = None,
        progress: bool = True,
        start: Search | None = None,
    ) -> Search:
        """The layers to remove by the loss without them; see `search.by_loss`.

        Args:
            windows: Token ids, all read for every candidate.
            method: Name of `methods.SEARCHED`. Default: "sleb".
            start: The same search of fewer layers, which it goes on with.
        """
        self.check_whole()
        self.check_weights()
        # a search counts positions in the model as it is now; a user sees original numbers
        start = None if start is None else _renumbered(start, self.kept.index)
        options = SearchOptions(batch_size, state=state, progress=progress, start=start)
        result = by_loss(self.decoder, windows, n, options, method=method)
        return _renumbered(result, self.kept.__getitem__)


def _renumbered(search: Search, number: Callable[[int], int]) -> Search:
    losses = [{number(i): value for i, value in loss.items()} for loss in search.losses]
    return Search([number(i) for i in search.removed], losses)
