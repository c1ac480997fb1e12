"""Quality of a model on held-out text and on tasks, and what a change costs, with its error."""
