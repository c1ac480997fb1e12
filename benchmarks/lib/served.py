"""One model read by one program, in an environment of its own: it imports nothing else of ours.

`servers.py` starts it with a JSON object on standard input: ``way`` (a name of `WAYS`), ``path``,
``windows`` (lists of token ids), ``folder`` (for what a program converts first), and ``packages``,
whose versions it tells. The last line that it prints is a JSON object, with the log probability of
each token of a window after the first, and the likeliest token at that place (-1: not told).

Shapes: S tokens of a window, V vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Ids = Sequence[int]
Read = dict[str, list[Any]]


def predicted(windows: Iterable[Ids], logits: Iterable[Any]) -> Read:
    """What logits say of each window, (S, V) each; also of log probabilities."""
    import numpy as np

    found: Read = {"logprobs": [], "top": []}
    for ids, own in zip(windows, logits, strict=True):
        x = np.asarray(own, dtype=np.float64)[: len(ids) - 1]  # (S - 1, V)
        x = x - x.max(-1, keepdims=True)
        x -= np.log(np.exp(x).sum(-1, keepdims=True))
        found["logprobs"].append(x[np.arange(len(x)), ids[1:]].tolist())
        found["top"].append(x.argmax(-1).tolist())
    return found


def transformers(path: str, windows: Sequence[Ids], folder: str, **how: Any) -> Read:
    """The reference, in float32; ``how`` goes to ``from_pretrained``."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **how}).eval()
    with torch.no_grad():
        return predicted(windows, [model(torch.tensor([ids])).logits[0] for ids in windows])


def torchao(path: str, windows: Sequence[Ids], folder: str, *, bits: int) -> Read:
    """Weights in 8 bits, one scale a row; or in 4 bits, one scale for 32 weights."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup
    from transformers import TorchAoConfig

    scales = PerAxis(0) if bits == 8 else PerGroup(32)
    config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), scales)
    return transformers(path, windows, folder, quantization_config=TorchAoConfig(config))


def vllm(path: str, windows: Sequence[Ids], folder: str) -> Read:
    """Log probabilities of a prompt, which vLLM tells with an answer."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # gigabytes
    from vllm import LLM, SamplingParams

    size = 2 * max(map(len, windows))
    model = LLM(path, dtype="float32", max_model_len=size, enforce_eager=True)
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    found: Read = {"logprobs": [], "top": []}
    for done in model.generate([{"prompt_token_ids": [*ids]} for ids in windows], asked):
        places = [*zip(done.prompt_logprobs[1:], done.prompt_token_ids[1:], strict=True)]
        found["logprobs"].append([place[token].logprob for place, token in places])
        tops = [min(place, key=lambda token: place[token].rank) for place, _ in places]
        found["top"].append(tops)
    return found


def llama_cpp(path: str, windows: Sequence[Ids], folder: str) -> Read:
    """A bias makes it choose the window's next token, whose probability it tells without that."""
    import xllamacpp as client

    params = client.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity = 2 * max(map(len, windows)), 1, -1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = client.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = client.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = client.Server(params)
    asked = {"n_predict": 1, "n_probs": 1, "temperature": 0, "cache_prompt": True}
    found: Read = {"logprobs": [], "top": []}
    for ids in windows:
        rows = []
        for end in range(1, len(ids)):
            bias = {"logit_bias": [[ids[end], 1e6]], "prompt": [*ids[:end]]}
            done = server.handle_completions({**asked, **bias})
            rows.append(done["choices"][0]["logprobs"]["content"][0])
        found["logprobs"].append([row["logprob"] for row in rows])
        found["top"].append([row["top_logprobs"][0]["id"] for row in rows])
    return found


def mlx(path: str, windows: Sequence[Ids], folder: str) -> Read:
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(path)
    return predicted(windows, [model(mx.array([[*ids]]))[0] for ids in windows])


def openvino(path: str, windows: Sequence[Ids], folder: str) -> Read:
    """It tells the log probabilities of a prompt that it echoes, not which token is likeliest."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", options)
    asked = genai.GenerationConfig(max_new_tokens=1, echo=True, logprobs=1, do_sample=False)
    found: Read = {"logprobs": [], "top": []}
    for number, ids in enumerate(windows):
        prompt = ov.Tensor(np.array([ids], dtype=np.int64))
        handle = pipeline.add_request(number, prompt, asked)
        while pipeline.has_non_finished_requests():
            pipeline.step()
        (done,) = handle.read_all()
        found["logprobs"].append(list(done.generated_log_probs)[1 : len(ids)])
        found["top"].append([-1] * (len(ids) - 1))
    return found


def onnx(path: str, windows: Sequence[Ids], folder: str) -> Read:
    """Converted by the package's own builder; the tokens are given one by one."""
    import numpy as np
    import onnxruntime_genai as genai

    out = str(Path(folder, "onnx"))
    build = ["onnxruntime_genai.models.builder", "-i", path, "-o", out, "-p", "fp32", "-e", "cpu"]
    subprocess.run([sys.executable, "-m", *build, "-c", folder], check=True, stdout=sys.stderr)
    model, logits = genai.Model(out), []
    for ids in windows:
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + 1)
        generator, rows = genai.Generator(model, params), []
        for token in ids[:-1]:
            generator.append_tokens(np.array([token], dtype=np.int32))
            rows.append(generator.get_logits().reshape(-1))
        logits.append(np.stack(rows))
    return predicted(windows, logits)


def ctranslate2(path: str, windows: Sequence[Ids], folder: str) -> Read:
    import ctranslate2 as client
    import numpy as np

    out = str(Path(folder, "ctranslate2"))
    client.converters.TransformersConverter(path).convert(out, quantization="float32", force=True)
    model, logits = client.Generator(out, compute_type="float32"), []
    for ids in windows:
        logits.append(np.array(model.forward_batch([[*ids]]))[0])
    return predicted(windows, logits)


def lm_eval(path: str, windows: Sequence[Ids], folder: str) -> Read:
    """Every token is the only one of a continuation."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(path, dtype="float32", device="cpu", batch_size=16, max_length=4096)
    found: Read = {"logprobs": [], "top": []}
    for ids in windows:
        asked = [(("", ""), [*ids[:end]], [ids[end]]) for end in range(1, len(ids))]
        done = model._loglikelihood_tokens(asked, disable_tqdm=True)
        found["logprobs"].append([value for value, _ in done])
        same = zip(done, ids[1:], strict=True)
        found["top"].append([token if greedy else -1 for (_, greedy), token in same])
    return found


def trl(path: str, windows: Sequence[Ids], folder: str) -> Read:
    """The merged model after a few steps of LoRA; the first loss is that of the opened model."""
    import datasets
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    how = SFTConfig(
        output_dir=folder,
        max_steps=5,
        per_device_train_batch_size=len(windows),
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    read = datasets.Dataset.from_dict({"input_ids": [[*ids] for ids in windows]})
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, how, train_dataset=read, peft_config=lora)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    out = str(Path(folder, "merged"))
    trainer.model.merge_and_unload().save_pretrained(out)
    return {**transformers(out, windows, folder), "losses": losses}


WAYS = {
    "transformers": transformers,
    "vllm": vllm,
    "llama_cpp": llama_cpp,
    "mlx": mlx,
    "openvino": openvino,
    "onnx": onnx,
    "ctranslate2": ctranslate2,
    "torchao8": lambda *args: torchao(*args, bits=8),
    "torchao4": lambda *args: torchao(*args, bits=4),
    "lm_eval": lm_eval,
    "trl": trl,
}


def main() -> None:
    """Reads what is asked, and prints what the program predicts."""
    asked = json.load(sys.stdin)
    found: dict[str, Any] = {"versions": {name: version(name) for name in asked["packages"]}}
    found |= WAYS[asked["way"]](asked["path"], asked["windows"], asked["folder"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
