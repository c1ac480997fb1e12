"""A model with its scores; `open_model` opens any source as one."""
