"""Which layers go: by scores, or by the loss without them."""
