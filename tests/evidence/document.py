"""docs/evidence.md: its tables stand between marks, and `make evidence` writes them."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "evidence.md"


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by `make evidence` -->\n", f"<!-- {name}: end -->\n"


def written(name: str) -> str:
    """The table of that name, as the document has it."""
    begin, end = marks(name)
    return DOCUMENT.read_text().partition(begin)[2].partition(end)[0]


def write(name: str, table: str) -> None:
    begin, end = marks(name)
    before, mark, rest = DOCUMENT.read_text().partition(begin)
    assert mark, f"docs/evidence.md has no place for {name}"
    DOCUMENT.write_text(before + begin + table + end + rest.partition(end)[2])


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
