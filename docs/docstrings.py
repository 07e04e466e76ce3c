"""Docstrings of the package as Markdown: what Google's style does not know.

Knows how this package writes its own sections (`Guarantee:`, `Source:`, `Privacy:`), tables of edge
cases and examples; griffe, which reads docstrings for the reference, calls `on_instance`. Changes
no file.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# `Guarantee: words`, with the lines that go on further in.
_WORDS = re.compile(
    r"^(Guarantee|Source|Privacy|Args|How tight|Shapes?|Distributed): +(.*(?:\n {4}.*\S)*)", re.M
)
# `Edge cases (first match wins):`, and rows whose columns are made of spaces.
_ROWS = re.compile(r"^((?:Edge cases|Columns|Methods)\b.*):\n((?: {4}.*\S(?:\n|$))+)", re.M)
_IS_ROW = re.compile(r"\S {3,}\S|^ {8}")
_EXAMPLE = re.compile(r"^>>> (?:.*\S(?:\n|$))+", re.M)
# `a, b: what both are` under Args or Attributes; the names may fill more than a line.
_SEVERAL = re.compile(r"^( {4})(\w+(?:,\s+\w+)+):( .*(?:\n {8}.*)*)", re.M)

# Code is kept; a star between two factors is no emphasis: Markdown would swallow the power in
# `sum(s)**2 / (2 * z**2)`, and show another formula.
_STAR = re.compile(r"(```.*?```|`[^`]*`)|(?<=[\w)\]])(\*{1,2})(?=[\w(])", re.S)


def as_markdown(docstring: str) -> str:
    """Return a docstring whose own sections are paragraphs, and whose tables keep their columns."""
    text = _EXAMPLE.sub(lambda found: _block("pycon", found[0]), docstring)
    text = _ROWS.sub(lambda found: f"\n**{found[1]}:**\n\n{_block('text', found[2])}", text)
    text = _WORDS.sub(lambda found: f"\n**{found[1]}.** {_paragraphs(found[2])}\n", text)
    text = _SEVERAL.sub(_one_by_one, text)
    return _STAR.sub(lambda found: found[1] or "\\*" * len(found[2]), text)


def _block(language: str, lines: str) -> str:
    indent = min(len(line) - len(line.lstrip()) for line in lines.splitlines())
    kept = "\n".join(line[indent:] for line in lines.splitlines())
    return f"```{language}\n{kept}\n```\n"


def _paragraphs(words: str) -> str:
    """Return words as one paragraph, or around the rows of a table that stands among them."""
    lines = words.splitlines()
    rows = [number for number, line in enumerate(lines) if number and _IS_ROW.search(line)]
    if not rows:
        return " ".join(line.strip() for line in lines)
    first, last = rows[0], rows[-1] + 1
    before = " ".join(line.strip() for line in lines[:first])
    after = " ".join(line.strip() for line in lines[last:])
    return f"{before}\n\n{_block('text', chr(10).join(lines[first:last]))}\n{after}"


def _one_by_one(found: re.Match[str]) -> str:
    return "\n".join(f"{found[1]}{name}:{found[3]}" for name in re.split(r",\s+", found[2]))


class PackageDocstrings(griffe.Extension):
    """Rewrites each docstring before griffe parses it."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
