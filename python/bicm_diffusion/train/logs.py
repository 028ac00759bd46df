"""Logging of a run: a progress bar, and TensorBoard, an extra that is imported only where a directory is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from bicm_diffusion.extras import extra

#: Called with (name, value, step).
Log: TypeAlias = Callable[[str, float, int], object]


@contextmanager
def scalar_log(directory: str | Path | None) -> Iterator[Log | None]:
    """Yield a function of (name, value, step) that writes to `directory`, or None where there is none.

    Raises ImportError with the command to install it where TensorBoard is missing.

    >>> with scalar_log(None) as log:  # scalar_log("runs/1") writes there; train(…, log=log)
    ...     log is None
    True
    """
    if directory is None:
        yield None
        return
    with extra("tensorboard", "or give no directory for TensorBoard"):
        from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(str(directory)) as writer:
        yield writer.add_scalar


def listed(figures: Mapping[str, float]) -> str:
    """Return named figures on one line.

    >>> listed({"loss": 0.5})
    'loss 0.5000'
    """
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
