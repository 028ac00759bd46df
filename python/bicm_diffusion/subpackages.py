"""Subpackages that are imported when their name is first used: some need an extra, and `import` needs none of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def on_first_use(package: str, names: Sequence[str]) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package (PEP 562) whose submodules of these names are imported so.

    >>> import bicm_diffusion
    >>> "policy" in dir(bicm_diffusion), bicm_diffusion.policy.__name__
    (True, 'bicm_diffusion.policy')
    """

    def found(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return importlib.import_module(f"{package}.{name}")
        except ImportError as error:  # hasattr and help() expect no other error; `from package import name` raises it
            raise AttributeError(f"module {package!r} has no attribute {name!r}: {error}") from error

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return found, listed
