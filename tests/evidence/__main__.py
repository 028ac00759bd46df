"""`make evidence`: every table of docs/evidence.md, from the last run of the tests, the emulator and the compilers."""

from __future__ import annotations

import sys

from tests.emulator import evidence as emulated

from . import ladder, pipelines, resources, steps, triton_resources
from .document import write


def main() -> None:
    reports = sorted(ladder.RESULTS.glob("*.xml"))
    if not reports:
        sys.exit("there are no results of tests: run `make test` first")
    write("ladder", ladder.ladder(ladder.outcomes(reports)))
    write("counted", emulated.table())
    write("steps", steps.steps())
    write("pipelines", pipelines.pipelines())
    if resources.LIBRARY.exists() and resources.tool("cuobjdump"):
        write("cuda", resources.of_cuda())
    else:
        print("no CUDA library was built: its table stays as it is", file=sys.stderr)
    write("triton", triton_resources.of_triton())
    write("compilers", f"Compilers: {resources.compiler()}; {triton_resources.compiler()}.\n")


if __name__ == "__main__":
    main()
