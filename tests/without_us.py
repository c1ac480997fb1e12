"""What a user's process does with a checkpoint where this library is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

TEXT = "ab a<tool> 12\n1"


@torch.no_grad()
def difference(folder: Path) -> float:
    """The largest difference of a log probability from what ``expected.pt`` says; checks ids."""
    given, config = (
        torch.load(folder / "expected.pt"),
        json.loads((folder / "config.json").read_text()),
    )
    kind = "ImageTextToText" if "text_config" in config else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()
    found = model(given["tokens"]).logits.float().log_softmax(-1)
    if given["ids"] is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer(TEXT)["input_ids"] == given["ids"], folder
    return (found - given["expected"]).abs().max().item()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    every = {path.name: difference(path) for path in sorted(Path(sys.argv[1]).iterdir())}
    print(json.dumps({"version": transformers.__version__, **every}))
