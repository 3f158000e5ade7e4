"""Docstrings as Markdown for the API pages: they are plain text, with shapes such as `[T, K, A]` and `<names>`."""

from __future__ import annotations

import re
from typing import Any

import griffe

_CODE = re.compile(r"(`[^`]*`)")
_MARKUP = {"][": r"]\[", "*": r"\*", "<": "&lt;"}
_ANY_MARKUP = re.compile("|".join(re.escape(mark) for mark in _MARKUP))


class PlainDocstrings(griffe.Extension):
    """Escapes what only looks like Markdown, and makes a list of lines that explain fields and arguments by name."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            names = {*obj.members, *(p.name for p in getattr(obj, "parameters", ()))}
            obj.docstring.value = markdown(obj.docstring.value, names)


def markdown(text: str, names: set[str]) -> str:
    """The Markdown that shows `text` as it is; lines that begin with `name: `, of these names, are a list."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        f"```pycon\n{one}\n```" if one.startswith(">>> ") else _paragraph(one, names) for one in paragraphs
    )


def _paragraph(text: str, names: set[str]) -> str:
    parts = _CODE.split(text)
    parts[::2] = [_ANY_MARKUP.sub(lambda found: _MARKUP[found[0]], part) for part in parts[::2]]
    shown: list[str] = []
    for line in "".join(parts).splitlines():
        name, colon, rest = line.partition(": ")
        listed = bool(colon) and name in names
        if listed and not any(one.startswith("- ") for one in shown):
            shown.append("")
        shown.append(f"- `{name}`: {rest}" if listed else line)
    return "\n".join(shown)
