"""Where tests lie: a folder a layer, what they share in tests/support, and no test module that another one imports."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))


def imported(path: Path) -> list[str]:
    """The names of the modules that a file imports, and of what it takes from them."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return found


def test_no_test_module_is_imported() -> None:
    modules = {path.stem for path in FILES if path.name.startswith("test_")}
    assert {
        f"{path.relative_to(TESTS)}: {name}"
        for path in FILES
        for name in imported(path)
        if modules & set(name.split(".")) and not name.startswith(("torch.", "bicm_"))
    } == set()


def test_every_test_has_a_folder() -> None:
    assert [path.name for path in TESTS.glob("*.py")] == ["conftest.py"]
