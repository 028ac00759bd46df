"""Scalars of a run for TensorBoard, which is an extra: nothing is imported until a directory is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bicm_diffusion.extras import extra


@contextmanager
def scalar_log(directory: Path | None) -> Iterator[Callable[[str, float, int], object] | None]:
    """Yield a function of (name, value, step) that writes to `directory`, or None where there is none.

    Raises ImportError, which says what to install, where TensorBoard is missing.
    """
    if directory is None:
        yield None
        return
    with extra("tensorboard", "or leave --tensorboard out"):
        from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(str(directory)) as writer:
        yield writer.add_scalar
