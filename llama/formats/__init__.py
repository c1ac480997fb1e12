"""Other formats of a Llama: Hugging Face directories and GGUF files, to Meta's and back."""
