"""One model served once, in a process of its own that imports nothing else: speed and peak memory.

`serving.py` starts it, with a JSON object on standard input: ``way`` ("llama.cpp" or
"transformers"), ``path``, ``prompt`` (token ids), ``count`` (tokens to write), ``threads``, and
for llama.cpp ``draft`` (a GGUF file, or null) and ``length`` of its drafts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def llama_cpp(
    path: str, prompt: Sequence[int], count: int, threads: int, draft: str | None, length: int
) -> dict[str, object]:
    """What llama.cpp itself timed, behind a first short answer."""
    import xllamacpp as client

    params = client.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity = len(prompt) + count + 64, 1, -1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if draft is not None:
        kinds = client.common_speculative_type
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path = draft
        params.speculative.draft.n_max = length
        for own in (params.speculative.draft.cpuparams, params.speculative.draft.cpuparams_batch):
            own.n_threads = threads
    server = client.Server(params)

    def answer(ids: Sequence[int], tokens: int) -> dict[str, object]:
        asked = {"prompt": list(ids), "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        return server.handle_completions({**asked, "cache_prompt": False})

    answer(prompt[:32], 4)
    done = answer(prompt, count)
    times = done["timings"]
    names = {"prompt": "prompt_per_second", "generation": "predicted_per_second"}
    names |= {"drafted": "draft_n", "accepted": "draft_n_accepted"}
    return {name: times.get(key) for name, key in names.items()} | {
        "text": done["choices"][0]["text"]
    }


def transformers(path: str, prompt: Sequence[int], count: int, threads: int) -> dict[str, object]:
    """The prompt in one pass with the last token's logits, then one token a pass."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def answer(ids: Sequence[int], tokens: int) -> tuple[float, float]:
        start, step, cache = time.perf_counter(), torch.tensor([list(ids)]), None
        ends = []
        for _ in range(tokens):
            found = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            step, cache = found.logits[:, -1:].argmax(-1), found.past_key_values
            ends.append(time.perf_counter())
        return ends[0] - start, ends[-1] - ends[0]

    with torch.no_grad():
        answer(prompt[:32], 4)
        reading, writing = answer(prompt, count)
    return {"prompt": len(prompt) / reading, "generation": (count - 1) / writing}


def main() -> None:
    """Reads what is asked, serves, and prints the result as JSON."""
    asked = json.load(sys.stdin)
    serve = {"llama.cpp": llama_cpp, "transformers": transformers}[asked.pop("way")]
    found = serve(**asked)
    status = Path("/proc/self/status").read_text()
    found["peak_mb"] = int(status.split("VmHWM:")[1].split()[0]) * 1.024e-3
    print(json.dumps(found))


if __name__ == "__main__":
    main()
