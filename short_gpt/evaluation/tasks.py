"""Tasks of the lm-evaluation-harness on the models of both wrappers.

Shapes: B requests, S tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from short_gpt.data.windows import batches
from short_gpt.models.decoder import Decoder, pad
from short_gpt.runtime.errors import MissingPackageError, ShortGPTError
from short_gpt.runtime.progress import bar

# context and continuation as texts (None for a window of a longer text) and as token ids
Request = tuple[tuple[str, str] | None, list[int], list[int]]
MAX_GEN_TOKENS = 256  # lm-eval's value for a task that names none
FIRST_TOKENS = 32


def run_tasks(
    short: Evaluated,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, float]]:
    """Evaluates the model as it is now on tasks of the lm-evaluation-harness.

    The harness seeds the generators of random, numpy and torch, so that a second run agrees.

    Args:
        short: a `ShortLlama` or `ShortHFModel`.
        tasks: names of tasks, groups or tags, also with wildcards, as in ``"mmlu_*"``.
        limit: only the first so many documents of each task, for a trial.
        num_fewshot: examples in each prompt; None for the tasks' own numbers.
        include_path: a folder with YAML files of more tasks.
        batch_size: requests read at once.

    Returns:
        For every task and group, its metrics and their standard errors by name, as in
        ``{"piqa": {"acc": 0.78, "acc_stderr": 0.01}}``. A metric after a filter is named
        ``"exact_match,strict-match"``. Standard errors that the harness does not know are absent.

    Raises:
        MissingPackageError: lm-eval is missing.
        ShortGPTError: no tasks, or an unknown one; or as in the model's own ``harness_model``.

    Example:
        >>> run_tasks(short, ["piqa", "arc_easy"])  # doctest: +SKIP
    """
    names = task_names(tasks, include_path)
    done = _lm_eval("evaluator").simple_evaluate(
        short.harness_model(batch_size=batch_size),
        tasks=names,
        limit=limit,
        num_fewshot=num_fewshot,
        task_manager=_task_manager(include_path and str(include_path)),
        log_samples=False,
    )
    return {task: _metrics(found) for task, found in done["results"].items()}


class Evaluated(Protocol):
    """What tasks ask of a model."""

    def harness_model(self, *, batch_size: int = 1) -> object: ...


class LlamaLike(Protocol):
    """What `llama_lm` asks of a model of this library."""

    decoder: Decoder
    llama: Any

    def encode(self, text: str) -> list[int]: ...


def llama_lm(short: LlamaLike, *, batch_size: int = 1) -> object:
    """A Llama as the lm-evaluation-harness knows models, for ``lm_eval.simple_evaluate``.

    It gives the log-likelihoods that `hugging_face_lm` gives on the same weights: the softmax is in
    float32, and what is put in front of a text is for the tokenizer to say.

    Args:
        short: its model is not copied.
        batch_size: requests read at once.

    Raises:
        MissingPackageError: lm-eval is missing.
    """
    template = _lm_eval("api.model").TemplateLM
    return type("LlamaLM", (_LlamaLM, template), {})(short, batch_size)


def hugging_face_lm(model: Any, tokenizer: Any, *, batch_size: int = 1) -> object:
    """A model of transformers as ``lm_eval.models.huggingface.HFLM``, its softmax in float32.

    Raises:
        MissingPackageError: lm-eval is missing.
        ShortGPTError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ShortGPTError("pass tokenizer=... to ShortHFModel: tasks are texts")
    hflm = _lm_eval("models.huggingface").HFLM
    with _quiet("lm_eval.models.huggingface"):  # it warns of every model that is loaded already
        return hflm(
            model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it may get a padding token
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )


class _LlamaLM:
    """A Llama under the methods that lm-eval's ``TemplateLM``, mixed in, asks for.

    It does what lm-eval's own class for transformers does: the same tokens in front, the same cuts.
    Special tokens are never read from the text.
    """

    def __init__(self, short: LlamaLike, batch_size: int) -> None:
        super().__init__()
        self.short, self.batch_size = short, batch_size
        self.max_length = short.decoder.max_seq_len
        self._words = short.llama.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token in front of what has no context: bos, or eos where there is none."""
        return self._words.bos_id if self._words.bos_id >= 0 else self._words.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            return self.short.encode(string)
        return self._words.encode(string, bos=add_special_tokens, eos=False)

    def tok_decode(self, tokens: Iterable[int]) -> str:
        return self._words.decode(list(tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Nats of each continuation, and whether greedy decoding gives it.

        Requests that differ only in the last token, such as the answers A to D, share one pass.
        """
        places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length or not context:
                raise ShortGPTError(
                    f"a request has {len(context)} tokens of context and {len(continuation)} to "
                    f"predict; this model takes 1 or more and 1 to {self.max_length} (max_seq_len)"
                )
            places[tuple((context + continuation)[-self.max_length - 1 : -1])].append(i)
        done: dict[int, tuple[float, bool]] = {}
        with _progress(len(requests), "loglikelihood", disable_tqdm) as shown:
            for batch in batches(sorted(places, key=len, reverse=True), self.batch_size):
                tokens, _ = pad(batch, self.short.decoder)
                for read, row in zip(batch, self.short.decoder.logits(tokens), strict=True):
                    for i in places[read]:
                        done[i] = _score(row[: len(read)], requests[i][2])
                    shown.update(len(places[read]))
        return [done[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of whole texts, each token predicted once, after as much context as fits."""
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            for context, continuation in self._rolling(request.args[0]):
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (nats, _) in zip(owners, found, strict=True):
            totals[i] += nats
        return totals

    def _rolling(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        utils = _lm_eval("utils")
        cut = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(utils.make_disjoint_window, cut)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts up to a stop string, greedy unless the task says otherwise."""
        done = []
        with _progress(len(requests), "generate_until", disable_tqdm) as shown:
            for request in requests:
                done.append(self._generate(*request.args))
                shown.update(1)
        return done

    def _generate(self, text: str, settings: Mapping[str, Any]) -> str:
        chosen = _generation(settings)
        room = self.max_length - chosen["max_gen_toks"]
        if room < 1:
            raise ShortGPTError(
                f"{chosen['max_gen_toks']} tokens to generate leave no room for a prompt: the "
                f"model takes {self.max_length} (max_seq_len)"
            )
        prompt = self.tok_encode(text)[-room:] or [self.prefix_token_id]
        made: list[int] = []
        count = FIRST_TOKENS  # stop strings mostly come early: look, and go on if there is none
        while True:
            count = min(count, chosen["max_gen_toks"] - len(made))
            (new,), _ = self.short.llama.generate(
                [prompt + made], count, chosen["temperature"], chosen["top_p"]
            )
            made += new
            whole = self.tok_decode(made)
            cut = min((whole.find(s) for s in chosen["until"] if s in whole), default=len(whole))
            if cut < len(whole) or len(new) < count or len(made) >= chosen["max_gen_toks"]:
                return whole[:cut]
            count *= 2


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's settings in lm-eval's normal form; ShortGPTError if one would be without effect."""
    found = _lm_eval("models.utils").normalize_gen_kwargs(dict(settings), MAX_GEN_TOKENS)
    greedy = not found.pop("do_sample", False)
    chosen = {
        "until": [stop for stop in found.pop("until") if stop],
        "max_gen_toks": found.pop("max_gen_toks"),
        "temperature": 0.0 if greedy else found.get("temperature", 1.0),
        "top_p": found.pop("top_p", 1.0),
    }
    found.pop("temperature", None)
    if greedy:
        found.pop("top_k", None)
    if found.get("num_beams") == 1:
        del found["num_beams"]
    if found:
        raise ShortGPTError(
            f"generation settings {found} have no meaning for a Llama in Meta's format; it knows "
            "do_sample, temperature, top_p, until and max_gen_toks"
        )
    return chosen


def _score(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Nats of the tokens behind the last rows of (S, V) logits, and whether all are the likeliest.

    The logits are those of all that was read: of context and continuation, without the last token.
    """
    targets = torch.tensor(continuation, device=logits.device)
    logits = logits[-len(targets) :]
    nats = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == targets).all())


def task_names(tasks: str | Sequence[str], include_path: str | Path | None = None) -> list[str]:
    """The tasks that are meant, wildcards resolved; arguments and errors as for `run_tasks`."""
    asked = [tasks] if isinstance(tasks, str) else tasks
    if not asked:
        raise ShortGPTError("expected at least one task, got none; `lm-eval ls tasks` lists them")
    _lm_eval("tasks")  # a manager of an earlier call may be there without the package
    manager = _task_manager(include_path and str(include_path))
    found = {task: manager.match_tasks([task]) for task in asked}
    if unknown := [task for task, names in found.items() if not names]:
        raise ShortGPTError(
            f"lm-eval has no tasks {unknown}; `lm-eval ls tasks` lists those it has, and "
            "include_path names a folder with more as YAML files"
        )
    return list(dict.fromkeys(name for names in found.values() for name in names))


@cache  # reading all of lm-eval's own tasks takes seconds
def _task_manager(include_path: str | None) -> Any:
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path {include_path} is no folder of YAML files")
    return _lm_eval("tasks").TaskManager(include_path=include_path)


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a task's results: keys are "metric,filter"; unknown ones are "N/A"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in found.items()
        if "," in name and not isinstance(value, str)
    }


def _progress(total: int, what: str, hidden: bool) -> Any:
    return bar(what, total=total, unit="request", show=not hidden)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _lm_eval(module: str) -> Any:
    try:
        return import_module(f"lm_eval.{module}")
    except ImportError:
        raise MissingPackageError(
            'evaluation on tasks needs: pip install "short-gpt[eval]"'
        ) from None
