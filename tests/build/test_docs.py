"""The documentation: navigation, links, public names in the reference, and code blocks, which all run."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from tests.support.pages import GIVEN, SMALLER

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SOURCES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
FENCE = re.compile(r"```(?:python)\n(.*?)```", re.DOTALL)
WITH_CODE = [str(path.relative_to(ROOT)) for path in SOURCES if FENCE.search(path.read_text())]
NEEDS = {"README.md": "diffusers", "docs/start-pipelines.md": "transformers", "docs/adapters.md": "transformers"}


def navigation() -> list[str]:
    """The pages that mkdocs.yml lists, read without MkDocs."""
    _, _, entries = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    return re.findall(r"(\S+\.md)$", entries, re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The ids that a page's headings have."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def documented() -> set[str]:
    """What the reference takes from docstrings, by full path."""
    return {name for path in PAGES for name in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE)}


def found(name: str) -> object:
    """The object of a full path."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_page_is_in_the_navigation_once_and_exists() -> None:
    listed = navigation()
    assert len(listed) > 30
    assert sorted(listed) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in PAGES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_link_is_dead(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_the_reference_documents_every_public_name() -> None:
    objects = {id(found(name)) for name in documented()}
    packages = [
        "bicm_kernels",
        *(f"bicm_diffusion{part}" for part in ("", ".inverse", ".policy", ".objectives", ".train")),
    ]
    missing = []
    for module in map(importlib.import_module, packages):
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isfunction(value) or inspect.isclass(value)) and id(value) not in objects:
                missing.append(f"{module.__name__}.{name}")
    assert missing == []


@pytest.mark.parametrize("name", WITH_CODE)
def test_code_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="needs the extra [dev]")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    given = dict(GIVEN.get(name, {}))
    names: dict[str, object] = given.pop("")() if "" in given else {}
    for block in FENCE.findall((ROOT / name).read_text()):
        for line in [line for line in given if line in block]:
            names.update(given.pop(line)())
        for number, smaller in SMALLER.items() if name in NEEDS else ():
            block = block.replace(number, smaller)
        exec(compile(block, name, "exec"), names)
    assert not given, "names for a block that is gone"
