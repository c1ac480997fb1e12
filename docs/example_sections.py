"""What griffe does not read by itself: "Example:" sections, and comments on fields."""

from __future__ import annotations

import re

import griffe


class ExampleSections(griffe.Extension):
    """Makes "Example:" the section that is shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", value, flags=re.MULTILINE)


class FieldComments(griffe.Extension):
    """Makes the comment on a field, after it or on the lines before it, its docstring."""

    def on_attribute(self, *, attr: griffe.Attribute, **_: object) -> None:
        if attr.docstring is not None or not attr.parent.is_class:
            return
        *before, line = attr.lines_collection[attr.filepath][: attr.lineno]
        texts = re.findall(r"  # (.+)$", line)
        while not re.search(r"  # ", line) and before and before[-1].startswith("    # "):
            texts.insert(0, before.pop().strip("# "))
        if texts:
            text = " ".join(texts)
            attr.docstring = griffe.Docstring(f"{text[0].upper()}{text[1:]}.", parent=attr)
