"""Scores of layers from one forward pass: equations, hooks, sums, and when to stop."""
