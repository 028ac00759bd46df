"""Optional dependencies: an import that fails says which extra of the package brings what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, instead: str = "") -> Iterator[None]:
    """Let an ImportError inside say what to install: `pip install "bicm-kernels[name]"`.

    instead: what does without, added to the message. An error keeps its type, ImportError or ModuleNotFoundError.

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
