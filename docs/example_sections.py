"""Griffe reads examples under "Examples:" only; the docstrings say "Example:", as there is one."""

from __future__ import annotations

import re

import griffe


class ExampleSections(griffe.Extension):
    """Makes every docstring's "Example:" the section that is shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", value, flags=re.MULTILINE)
