"""Optional dependencies: a failed import names the extra of the package that installs the missing module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, instead: str = "") -> Iterator[None]:
    """Add the command that installs the missing module to an ImportError inside: `pip install "bicm-kernels[name]"`.

    instead: an alternative that needs no extra, added to the message. The error keeps its type, ImportError or
    ModuleNotFoundError.

    >>> with extra("diffusion"):
    ...     import a_module_that_is_missing
    Traceback (most recent call last):
    ModuleNotFoundError: No module named 'a_module_that_is_missing': pip install "bicm-kernels[diffusion]"
    """
    try:
        yield
    except ImportError as error:
        kind = ModuleNotFoundError if isinstance(error, ModuleNotFoundError) else ImportError
        advice = f'pip install "bicm-kernels[{name}]"' + (f", {instead}" if instead else "")
        raise kind(f"{error}: {advice}", name=error.name, path=error.path) from error
