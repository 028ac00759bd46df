"""Docstrings on the site: doctests are code blocks, and lines that begin with the names of arguments are lists.

The docstrings of `bicm_kernels` have sections in Google's style. Those of `bicm_diffusion` describe an argument in a
line `name: text`, which Markdown would join with the lines around it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
ARGUMENT = re.compile(r"((?:[a-z]\w*(?:, | … )?)+): (.*)")
SECTION = re.compile(r"^(Args|Returns|Raises):$", re.MULTILINE)
CODE = re.compile(r"(`[^`]*`)")


def escaped(line: str) -> str:
    """Keep asterisks from becoming emphasis, except in code."""
    return "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in CODE.split(line))


def listed(text: str) -> str:
    """Make a list item of every line that describes arguments, with the lines that continue it."""
    lines: list[str] = []
    inside = ended = False
    for line in text.split("\n"):
        described = ARGUMENT.fullmatch(line)
        if described and (ended or not lines or not lines[-1]):
            lines += [] if inside else [""]
            lines.append(f"- `{described[1]}`: {escaped(described[2])}")
            inside = True
        elif inside and (line.startswith(" ") or not lines[-1].endswith(".")):
            lines.append("  " + escaped(line.strip()))
        else:
            lines += [""] if inside and line else []
            lines.append(escaped(line))
            inside = False
        ended = line.rstrip().endswith((".", ":", ";"))
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrite docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        before, mark, after = obj.docstring.value.partition("\n>>> ")
        if not SECTION.search(before):
            before = listed(before)
        value = before + mark + after
        value = value.replace("  # doctest: +SKIP", "")
        obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", value)
