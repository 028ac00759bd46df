"""`make evidence`: every table of docs/evidence.md, from the last run of the tests, the emulator and the compilers.

`python -m tests.evidence counted triton` writes these tables only, and needs what they are made from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from . import ladder, loops, pipelines, resources, steps, triton_resources
from .document import write


def _ladder() -> str:
    reports = sorted(ladder.RESULTS.glob("*.xml"))
    if not reports:
        sys.exit("there are no results of tests: run `make test` first")
    return ladder.ladder(ladder.outcomes(reports))


def _cuda() -> str | None:
    if resources.LIBRARY.exists() and resources.tool("cuobjdump"):
        return resources.of_cuda()
    print("no CUDA library was built: its table stays as it is", file=sys.stderr)
    return None


def _loops() -> str | None:
    return loops.loops() if resources.LIBRARY.exists() and resources.tool("cuobjdump") else None


def _size() -> str | None:
    return loops.compressed_size() if resources.LIBRARY.exists() and resources.tool("cuobjdump") else None


def _compilers() -> str:
    return f"Compilers: {resources.compiler()}; {triton_resources.compiler()}.\n"


def _counted() -> str:
    from tests.emulator import evidence as emulated  # needs the emulator

    return emulated.table()


TABLES: dict[str, Callable[[], str | None]] = {
    "ladder": _ladder,
    "counted": _counted,
    "steps": steps.steps,
    "pipelines": pipelines.pipelines,
    "cuda": _cuda,
    "loops": _loops,
    "size": _size,
    "triton": triton_resources.of_triton,
    "compilers": _compilers,
}


def main(names: Sequence[str]) -> None:
    """Write the tables of these names; all without any."""
    if unknown := set(names) - set(TABLES):
        sys.exit(f"no tables of these names: {', '.join(unknown)}; there are {', '.join(TABLES)}")
    for name in names or TABLES:
        table = TABLES[name]()
        if table is not None:
            write(name, table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.evidence", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"the tables to write, all by default: {', '.join(TABLES)}")
    main(parser.parse_args().names)
