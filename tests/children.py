"""What tests have other processes do: functions that `processes` calls there.

Nothing of a test is imported here, whose own imports would take each process a while.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups

from llama import Llama, ModelArgs, Transformer
from llama.checkpoint.meta import Checkpoint
from llama.formats import gguf as gguf_format
from llama.formats.gguf import to_meta
from llama.formats.hf import meta_to_hf
from llama.generation import load_model
from llama.parallel import initialize
from short_gpt import ShortGPTError, ShortHFModel, ShortLlama
from short_gpt.checkpoints import meta as meta_format
from short_gpt.checkpoints import prune_checkpoint
from short_gpt.cli import app
from short_gpt.data.windows import Window, batches
from short_gpt.runtime import replicas
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.hooks import score_batch
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import RunState, sums_of_all
from short_gpt.wrappers.streamed_llama import StreamedLlama

CPU = torch.device("cpu")


def peak() -> int:
    """The most memory in bytes that this process ever held."""
    # not ru_maxrss, which a process takes over from the one that started it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


# Every division of the work, for `test_replicas`


def divisions(folder: Path, world: int) -> None:
    """Saves what this rank finds in all divisions of ``world`` ranks into models and replicas."""
    found: dict[object, object] = {}
    given = torch.load(folder / "given.pt")
    if world == 2:
        assert replicas.current(CPU) == replicas.Replicas(dist.get_rank(), 2)  # made by this call
    for mp in [1, 2, 4][: world // 2 + 1]:
        if groups.model_parallel_is_initialized():
            groups.destroy_model_parallel()
        initialize(mp, device=CPU)
        found[mp] = of_division(mp, folder, given)
    if world == 2:
        groups.destroy_model_parallel()
        try:
            initialize(3, device=CPU)
        except ValueError as error:
            found["error"] = str(error)
    torch.save(found, folder / f"world{world}-rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def of_division(mp: int, folder: Path, given: dict) -> dict[object, object]:
    """What a rank finds where ``mp`` ranks share a model."""
    found: dict[object, object] = {}
    for name in given["directories"]:
        checkpoint = Checkpoint(folder / name, max_seq_len=64, max_batch_size=4)
        model = load_model(checkpoint, device=CPU, dtype=torch.float32)
        with torch.no_grad():
            found[name] = model(given["tokens"])
        found[name, "tied"] = model.output.weight is model.tok_embeddings.weight
    llama = Llama(model, SimpleNamespace(eos_id=96, bos_id=1))
    found["sampled"], _ = llama.generate(given["tokens"].tolist(), 6, temperature=0.8)
    for size in (1, 2, 3):
        short = ShortLlama(llama)
        found["shared", size] = shared(short.decoder, given["windows"], size)
        short.measure(given["windows"], batch_size=size, progress=False)
        found["measured", size] = short.importance.to_dict()
    found["texts"] = of_texts(ShortLlama(llama), given["windows"])
    found["digest"] = short.weights_digest()
    found["perplexity"] = short.perplexity(given["windows"], progress=False).value
    given_twice = given["windows"][:4], given["windows"]
    found["saves"] = saves(llama, given_twice, folder / f"state{dist.get_world_size()}-{mp}")
    team = replicas.current()
    assert team.count * mp == dist.get_world_size()
    if team.count == dist.get_world_size() == 2:
        found["resumed"] = resumed(llama, given["many"], folder / "state")
    found["few"] = shared(short.decoder, given["windows"][:1], 1)
    last = dist.get_rank() == dist.get_world_size() - 1
    found["any"] = [team.any_rank(last), team.any_rank(False)]
    return found


def of_texts(short: ShortLlama, windows: list[list[int]]) -> dict[str, object]:
    """Scores of windows that come from three texts in turn, then of three other texts."""
    for part in (windows[:5], windows * 4):  # the sums of the latter are put together twice
        short.measure([Window(w, i % 3) for i, w in enumerate(part)], progress=False)
    return short.importance.to_dict()


def shared(decoder, windows: list[list[int]], size: int) -> dict[str, object]:
    """The sums of all replicas; this one's own stay as they are."""
    team, own = replicas.current(), Importance.empty(range(len(decoder.layers)))
    for step in batches(windows, team.step(size)):
        for batch in team.share(step, size):
            if batch:
                own.add(score_batch(decoder, batch, layers=own.layers))
    before = own.to_dict()
    total = sums_of_all(team, own)
    assert own.to_dict() == before
    return total.to_dict()


def resumed(llama: Llama, windows: list[list[int]], path: Path) -> dict[str, object]:
    """All of 120 windows, in one go and over two interruptions."""
    whole = ShortLlama(llama)
    whole.measure(windows, batch_size=2, progress=False)
    for calls in (11, 6, None):  # behind the looks at 32 and 54 windows, within the next steps
        short = ShortLlama(llama)
        plain, left = short.score_batch, [calls]

        def fails(*args, plain=plain, left=left, **kwargs):
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            return plain(*args, **kwargs)

        short.score_batch = fails
        state = RunState(StateFile(path, {"seed": 0}))
        dist.barrier()  # both have read the file before one of them writes it
        try:
            short.measure(windows, batch_size=2, progress=False, state=state)
        except KeyboardInterrupt:
            assert 0 < short.n_windows < 120
        dist.barrier()
    return {"whole": whole.importance.to_dict(), "continued": short.importance.to_dict()}


def saves(llama: Llama, parts: tuple[list[list[int]], ...], path: Path) -> list[object]:
    """How often this rank saves a run that goes on, and the sums of each part."""
    file, found = StateFile(path, {"seed": 0}, every=0), list[object]()
    plain, state = file.save, RunState(file)
    file.save = lambda content: (found.append("saved"), plain(content))[1]
    dist.barrier()  # all have read the file before one of them writes it
    for windows in parts:
        short = ShortLlama(llama)
        short.measure(windows, progress=False, state=state)
        found.append(sum(short.importance.to_dict()["windows"]))
    return found


def failing(case: str) -> None:
    """A command that fails on all ranks alike, or on rank 1 while the others wait for it."""

    def run(argv: list[str]) -> None:
        if case == "alike":
            raise FileNotFoundError("nothing here")
        dist.init_process_group("gloo")
        if int(os.environ["RANK"]) == 1:
            if case == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"alone": ShortGPTError, "defect": AssertionError}[case]("rank 1 alone")
        dist.all_reduce(torch.ones(1))  # waits for a rank that never comes

    app.run = run
    app.main([])


# What a process sets up first of all, for `test_parallel`


def without_setting_up() -> None:
    """A model, made first of all."""
    Transformer(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=8))


def set_up() -> None:
    """Groups of one rank, which change nothing that others see."""
    out, before = sys.stdout, dict(os.environ)
    initialize(device=CPU)
    assert dict(os.environ) == before
    assert sys.stdout is out and torch.get_default_dtype() == torch.float32


# What only a process of its own can tell: its peak of memory


def streaming(folder: str, max_memory: str, windows: list[list[int]]) -> None:
    """Prints what a plan of streaming says, and the peak of memory of what follows it."""
    short = StreamedLlama(folder, max_seq_len=64, device="cpu", max_memory=max_memory)
    # what torch sets up at its first use is no part of the plan
    short.measure(windows[:1], progress=False)
    plan = short.plan(2)
    short.measure(windows, batch_size=2, progress=False)
    short.perplexity(windows, batch_size=2, progress=False)
    print(json.dumps([plan.total, plan.host["the process itself"], plan.windows, peak()]))


def conversions(small: Path, large: Path, drop: list[int]) -> None:
    """Prints by how much two prunings and two conversions of a model raise the peak of memory."""
    for module in (gguf_format, meta_format):  # the large one has few words
        module.check_vocabulary = lambda *_, **__: None
    for folder in (small, large):  # the small one has all the code loaded that there is to load
        base, peaks = peak(), []
        for work, source, out, given in (
            (prune_checkpoint, "hf", "cut", [drop]),
            (to_meta, "hf", "meta", []),
            (prune_checkpoint, "meta", "meta-cut", [drop]),
            (meta_to_hf, "meta", "back", []),
        ):
            work(folder / source, folder / out, *given)
            peaks.append(peak() - base)
    print(json.dumps(peaks))


# A state that another process holds, for `test_lock` and `test_refit_streamed`


def holding(path: Path, ready: Path) -> None:
    """Works on a state, and tells so by a file, until it is ended."""
    state = StateFile(path, {"data": "novels"})
    state.save({"sums": [1.5]})
    ready.touch()
    time.sleep(600)


# Healing that replicas share, for `test_ranks`


def shared_healing(folder: Path) -> None:
    """Saves what this rank gets of refits in memory, and of texts that a model writes."""
    from short_gpt import own_samples
    from short_gpt.healing.refit import fit

    given = torch.load(folder / "given.pt", weights_only=False)
    found: dict[object, object] = {}
    dist.init_process_group("gloo")  # as a caller's own script may, without groups of a model
    try:
        fit(ShortHFModel(given["cases"]["refit"][0]), [2, 3], given["windows"], progress=False)
    except ShortGPTError as error:
        found["ungrouped"] = str(error)
    initialize(1, device=CPU)
    for name, (model, changes) in given["cases"].items():
        refit = fit(ShortHFModel(model), [2, 3], given["windows"], **changes, progress=False)
        found[name] = (dict(refit.values), refit.fits)
    try:
        fit(ShortHFModel(model), [2, 3], given["windows"][:2], progress=False)
    except ShortGPTError as error:
        found["few"] = str(error)
    short, world = ShortLlama(given["llama"]), dist.get_world_size()
    for size in (2, None):
        beside = folder / f"own{world}-{size}" / "out"
        beside.parent.mkdir(exist_ok=True)
        options = {"batch_size": size, "beside": beside, "progress": False}
        found["own", size] = own_samples(short, 7, 12, **options)
    for name, (model, windows, options) in given["trained"].items():
        found[name] = trained(ShortHFModel(model), windows, options, folder / name)
    torch.save(found, folder / f"world{world}-rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def trained(short: ShortHFModel, windows: object, options: dict, work: Path) -> dict[str, object]:
    """What a healing that trains gives, where it was interrupted before its last evaluation."""
    from short_gpt.healing import HealingJob
    from short_gpt.healing.trainer import TrainingRun

    def run() -> HealingJob:
        job = HealingJob(short, windows, [4, 2], work_dir=work, **options)
        job.run()
        return job

    plain, left = TrainingRun.measure, [2]

    def measure(self: TrainingRun, adapted: object) -> dict[str, float]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return plain(self, adapted)

    TrainingRun.measure = measure
    try:
        run()
    except KeyboardInterrupt:
        TrainingRun.measure = plain
    assert [path.name for path in work.rglob("checkpoint-*")] == ["checkpoint-2"]
    evidence = run().evidence
    weights = [p.detach().clone() for p in short.decoder.module.parameters()]
    return {"evidence": evidence.to_dict(), "weights": weights}


def heals_and_fails(argv: list[str], line: list[str]) -> None:
    """Heals a model, and starts again with another output; in its second layer rank 1 fails."""
    from short_gpt.healing.refit_layer import LayerRefit

    app.run(["heal", "ckpt", *argv])
    plain, layers = LayerRefit.solve, []

    def solve(self: LayerRefit) -> object:
        layers.append(self)
        if len(layers) == 2 and os.environ["RANK"] == "1":
            raise ShortGPTError("rank 1 alone")
        return plain(self)

    LayerRefit.solve = solve
    app.main(line)
