"""Scripts that measure what the library promises; no part of what is installed."""
