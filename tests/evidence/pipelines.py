"""How many of diffusers' pipelines load a scheduler that has an accelerated form, counted from its source.

``python -m tests.evidence.pipelines`` prints the table; `make evidence` writes it. A pipeline loads the scheduler that
its checkpoint names, which is of a class that its constructor is annotated with: these annotations are counted, one for
every argument whose name ends in "scheduler".
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import diffusers
from diffusers.schedulers import KarrasDiffusionSchedulers

from bicm_diffusion.adapters.diffusers.accelerate import COVERED

from .document import table

#: As many schedulers as an annotation of this name takes.
ANY_OF_MANY = KarrasDiffusionSchedulers.__name__


def annotations() -> Iterator[frozenset[str]]:
    """The classes that each scheduler argument of a pipeline's constructor is annotated with."""
    for path in sorted((Path(diffusers.__file__).parent / "pipelines").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = [*node.args.args, *node.args.kwonlyargs]
                yield from (_names(x.annotation) for x in arguments if x.arg.endswith("scheduler"))


def _names(annotation: ast.expr | None) -> frozenset[str]:
    nodes = [] if annotation is None else ast.walk(annotation)
    words = (x.id if isinstance(x, ast.Name) else x.value if isinstance(x, ast.Constant) else "" for x in nodes)
    return frozenset(word for word in words if isinstance(word, str) and "Scheduler" in word)


def counts() -> dict[str, int]:
    """Arguments by what their annotation takes."""
    covered, found = {cls.__name__ for cls in COVERED}, Counter[str]()
    members = {scheduler.name for scheduler in KarrasDiffusionSchedulers}
    several = f"any of {len(members)} (`{ANY_OF_MANY}`), {len(members & covered)} of them covered"
    for names in annotations():
        named = names - {ANY_OF_MANY}
        if not names:
            found["no scheduler's name"] += 1
        elif named and named <= covered:
            found["covered classes alone" if named == names else several] += 1
        elif named & covered:
            found["covered classes beside others"] += 1
        else:
            found[several if ANY_OF_MANY in names else "other classes alone"] += 1
    return dict(found.most_common())


def pipelines() -> str:
    found = counts()
    rows = [[name, str(count)] for name, count in found.items()]
    return table(
        [f"annotation, diffusers {diffusers.__version__}", "arguments"], [*rows, ["all", str(sum(found.values()))]]
    )


def by_class() -> list[tuple[str, int, bool]]:
    """Every class that is named, how often, and whether it is covered."""
    covered, found = {cls.__name__ for cls in COVERED}, Counter(name for names in annotations() for name in names)
    return [(name, count, name in covered) for name, count in found.most_common()]


if __name__ == "__main__":
    print(pipelines())
    for name, count, known in by_class():
        print(f"{count:4} {name}{'' if known else ', not covered'}")
