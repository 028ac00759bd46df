"""``python -m benchmarks.triton_overhead``: microseconds of Python before a Triton kernel is launched.

The kernels are replaced by no-ops, so that it runs without a GPU: checks, plan, arguments and outputs remain. Triton's
own launcher is not included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measurement import threads
from benchmarks.timing import Call, Effort, Timing, interleave

SHAPE = (4, 3, 32, 32)
KERNELS = (
    ("multistep", "multistep"),
    ("noise", "noise"),
    ("pseudo_huber", "sums"),
    ("pseudo_huber", "gradients"),
    ("reversible", "exact_step"),
)


class Nothing:
    """Replaces a kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def without_kernels() -> Iterator[dict[str, Callable[..., Any]]]:
    """The ops by their schemas' names, none of which launches."""
    from bicm_kernels import triton_kernels

    with ExitStack() as replaced:
        for module, kernel in KERNELS:
            replaced.enter_context(mock.patch.object(getattr(triton_kernels, module), kernel, Nothing()))
        yield triton_kernels.OPS


def calls(ops: dict[str, Callable[..., Any]]) -> dict[str, Call]:
    """Eager calls with numbers, as in samplers and training."""
    x, y, z = (torch.zeros(SHAPE) for _ in range(3))
    q, info = (torch.zeros(SHAPE, dtype=torch.int64) for _ in range(2))
    levels, upstream, sums = torch.ones(SHAPE[0]), torch.ones(()), torch.ones(SHAPE[0], dtype=torch.float64)
    return {
        "ddim_step": lambda: ops["ddim_step"]([x, y], [0.9, 0.1], 0.0),
        "bdia_step": lambda: ops["bdia_step"]([x, y, z], [0.9, 0.1, 0.8, 0.2, 0.96], 0.0),
        "bdia_exact_step": lambda: ops["bdia_exact_step"]([q, q, x], info, [0.9, 0.1, 0.8, 0.2], 0.0, 9, 10, 32),
        "normal": lambda: ops["normal"](x, 7, 1, 2),
        "denoise": lambda: ops["denoise"](x, y, 2.0, 0.5, 0.5, False, False),
        "pseudo_huber": lambda: ops["pseudo_huber"](x, y, None, None, 0, 0),
        "pseudo_huber, backward": lambda: ops["pseudo_huber_backward"](upstream, sums, 1, x, y, None, None, 0, 0),
        "consistency_loss": lambda: ops["consistency_loss"](
            x, y, z, levels, levels, None, None, 0.5, 0.002, 0, 0, 0, 0
        ),
    }


def measure(effort: Effort) -> dict[str, Timing]:
    """Every call, in turns, on one thread."""
    with without_kernels() as ops, torch.no_grad(), threads(1):
        return interleave(calls(ops), effort)


def main() -> None:
    """Print the table."""
    result = Table(title="Python before a Triton launch, µs", title_justify="left")
    result.add_column("op")
    result.add_column("median", justify="right")
    for name, timing in measure(Effort()).items():
        result.add_row(name, f"{timing.median * 1e6:.1f}")
    Console().print(result)


if __name__ == "__main__":
    main()
