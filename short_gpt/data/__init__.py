"""Texts, the windows of tokens cut from them, and held-out texts.

`texts` reads files and data sets, `windows` cuts, `disjoint` keeps what a model learns from apart
from what it is evaluated on; `demo` fetches a small model and a book.
"""

from short_gpt.data.disjoint import check_disjoint, hold_out, overlapping, without_overlap
from short_gpt.data.texts import pg19, read_texts, texts
from short_gpt.data.windows import Window, Windows, batches, windows

__all__ = ["Window", "Windows", "batches", "check_disjoint", "hold_out", "overlapping", "pg19"]
__all__ += ["read_texts", "texts", "windows", "without_overlap"]
