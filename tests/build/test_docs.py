"""The documentation: navigation, links, public names in the reference, and code blocks, which all run."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

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


def documented() -> dict[str, set[str]]:
    """What the reference takes from docstrings, by full path, with the inherited members that it lists."""
    texts = [path.read_text() for path in PAGES]
    blocks = [block for text in texts for block in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.MULTILINE)]
    return {name: set(re.findall(r"\w+", options.partition("inherited_members:")[2])) for name, options in blocks}


def found(name: str) -> Any:
    """The object of a full path, a class's method too."""
    path, _, attribute = name.rpartition(".")
    owner = found(path) if path.rpartition(".")[2][0].isupper() else importlib.import_module(path)
    return getattr(owner, attribute)


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


def test_the_reference_has_the_methods_that_a_class_takes_from_another_of_ours() -> None:
    known = {name: found(name) for name in documented()}
    missing = []
    for name, listed in documented().items():
        if not inspect.isclass(known[name]):
            continue
        missing += [f"{name}.{key}" for key in inherited(known[name], [*known.values()]) - listed]
    assert missing == []


def inherited(cls: type, known: list[Any]) -> set[str]:
    """The public methods and properties from bases of ours that are not documented, which no other library defines."""
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("bicm_") and base not in known]
    others = {name for base in cls.__mro__ if not base.__module__.startswith("bicm_") for name in vars(base)}
    methods = {n for base in bases for n, x in vars(base).items() if isinstance(x, property) or inspect.isfunction(x)}
    return {name for name in methods - others - set(vars(cls)) if not name.startswith("_")}


def test_the_readme_names_every_extra() -> None:
    extras = re.search(
        r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert extras is not None
    names = set(re.findall(r"^(\w+) = ", extras[1], re.MULTILINE)) - {"dev", "docs"}
    listed = (ROOT / "README.md").read_text().partition("Extras: ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`\[(\w+)\]`", listed)) == names


def test_methods_of_classes_made_at_run_time_are_in_the_reference() -> None:
    pytest.importorskip("diffusers", reason="needs the extra [dev]")
    from bicm_diffusion.adapters.diffusers.accelerate import COVERED, accelerated_class

    ours = {"step_with_log_prob"}
    classes = [accelerated_class(original) for original in COVERED]
    methods = {getattr(made, name) for made in classes for name in ours if hasattr(made, name)}
    assert len(methods) == 3
    assert methods <= {value for value in map(found, documented()) if inspect.isfunction(value)}


def test_the_reference_lists_every_preset() -> None:
    from bicm_diffusion import PRESETS

    text = (ROOT / "docs/reference/consistency.md").read_text()
    rows = {
        name: (levels, zigzags) for name, levels, zigzags in re.findall(r"^\| `(.+)` \| (.+) \| (.+) \|$", text, re.M)
    }
    assert rows == {
        name: (", ".join(f"{t:g}" for t in made.levels), ", ".join(f"({e:g}, {t:g})" for e, t in made.zigzags) or "–")
        for name, made in PRESETS.items()
    }


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
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a reader would get one that the page does not announce
            exec(compile(block, name, "exec"), names)
    assert not given, "names for a block that is gone"
