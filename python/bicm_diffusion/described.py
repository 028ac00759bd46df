"""Descriptions of values for error messages."""

from __future__ import annotations

from numbers import Real

from torch import Tensor


def described(value: object) -> str:
    """A short description of a value, for error messages.

    >>> described([1, "a"])
    'a list of 2 (int, str)'
    """
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    name = type(value).__name__
    if isinstance(value, tuple | list):
        kinds = sorted({type(x).__name__ for x in value})
        return f"a {name} of {len(value)} ({', '.join(kinds)})" if kinds else f"an empty {name}"
    if hasattr(value, "shape"):
        return f"a {type(value).__module__}.{name} of shape {tuple(value.shape)}"
    if value is None or isinstance(value, str | Real):
        return f"{value!r} ({name})"
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
