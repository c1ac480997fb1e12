"""A Meta checkpoint directory as data: read, checked, cut among ranks, written; never executed."""
