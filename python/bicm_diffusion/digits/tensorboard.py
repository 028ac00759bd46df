"""Scalars of a run for TensorBoard, which is an extra: nothing is imported until a directory is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scalar_log(directory: Path | None) -> Iterator[Callable[[str, float, int], object] | None]:
    """Yield a function of (name, value, step) that writes to `directory`, or None where there is none.

    Raises ImportError, which says what to install, where TensorBoard is missing.
    """
    if directory is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = "tensorboard is not installed: pip install 'bicm-kernels[tensorboard]', or leave --tensorboard out"
        raise ImportError(message) from error
    with SummaryWriter(str(directory)) as writer:
        yield writer.add_scalar
