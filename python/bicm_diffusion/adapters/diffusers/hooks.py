"""The methods that an original's step calls and a fused step replaces, and whether a user overrode one of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

#: What accelerated classes replace.
REPLACED = ("step", "scale_model_input")


@lru_cache
def hooks(original: type[Any], replacing: type[Any]) -> tuple[str, ...]:
    """Names of the methods that an original's step calls, directly or through others.

    replacing: the accelerated class of the original; what it defines itself is called by its own steps.
    """
    own = {name for cls in replacing.__mro__ if cls not in original.__mro__ for name in vars(cls)}
    found: set[str] = set()
    waiting = {name for name in REPLACED if name in own and _is_method(_held(original, name))}
    while waiting:
        name = waiting.pop()
        found.add(name)
        code = getattr(inspect.unwrap(_function(_held(original, name))), "__code__", None)
        named = () if code is None else _names(code)
        waiting |= {each for each in named if _is_method(_held(original, each))} - found
    return tuple(sorted(found - own))


def overridden(names: tuple[str, ...], instance: Any, plain: type[Any]) -> str | None:
    """The first of the names that an instance, or its class, defines otherwise than the class `plain` does."""
    cls, attributes = type(instance), vars(instance)
    for name in names:
        if name in attributes or (cls is not plain and _held(cls, name) is not _held(plain, name)):
            return name
    return None


def _held(cls: type[Any], name: str) -> Any:
    """An attribute as a class or one of its bases holds it, without binding; None where none does."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _is_method(held: Any) -> bool:
    return isinstance(held, FunctionType | classmethod | staticmethod)


def _function(held: Any) -> Any:
    return held.__func__ if isinstance(held, classmethod | staticmethod) else held


def _names(code: CodeType) -> Iterator[str]:
    """The attributes and globals that a function names, those of functions within it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
