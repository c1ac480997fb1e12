"""Models of either kind as layers over token ids: Meta's Llama and those of transformers."""
