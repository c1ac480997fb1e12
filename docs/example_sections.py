"""Griffe reads examples under "Examples:" only, and no comments; the site shows both."""

from __future__ import annotations

import re

import griffe


class ExampleSections(griffe.Extension):
    """Makes "Example:" the section shown as code, and a field's comment what describes it."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", value, flags=re.MULTILINE)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        if attr.docstring is not None or not (attr.parent and attr.parent.is_class and attr.lineno):
            return
        lines = attr.filepath.read_text(encoding="utf-8").splitlines()
        _, mark, text = lines[attr.lineno - 1].partition("  # ")
        if not mark:  # a comment too long for the line stands above it
            above = []
            for line in reversed(lines[: attr.lineno - 1]):
                if not (comment := re.match(r" +# (.*)", line)):
                    break
                above.insert(0, comment[1])
            text = " ".join(above)
        if text:
            attr.docstring = griffe.Docstring(text[0].upper() + text[1:] + ".", parent=attr)
