"""Scores of layers from one forward pass: equations, hooks, sums, order, and when to stop."""
