"""The decorator of every sampler: no gradients, and options as named keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from bicm_diffusion.samplers.notices import warn
from bicm_diffusion.samplers.states import Pair

P = ParamSpec("P")
R = TypeVar("R")


def sampler(options: Callable[..., Any] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for samplers whose `**options`, if any, are the keyword arguments of `options`.

    Their signature names every option, a misspelt one raises a TypeError with a suggestion, and no gradients are
    recorded: if their second argument, the state, requires them, a warning is issued.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = _opened(function, options)
        names = frozenset(signature.parameters)
        state = [*signature.parameters][1]

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not set(kwargs) <= names:  # Dynamo does not compare keys before torch 2.11
                raise TypeError(_unknown(function.__name__, signature, kwargs))
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                _notice_gradients(function.__name__, args[1] if len(args) > 1 else kwargs.get(state))
            with torch.no_grad():
                return function(*args, **kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def _opened(function: Callable[..., Any], options: Callable[..., Any] | None) -> inspect.Signature:
    """A function's signature with the options in place of `**options`."""
    own = inspect.signature(function)
    kinds = inspect.Parameter
    parameters = [p for p in own.parameters.values() if p.kind is not kinds.VAR_KEYWORD]
    if options is not None:
        known = {p.name for p in parameters}
        every = inspect.signature(options).parameters.values()
        parameters += [p for p in every if p.kind is kinds.KEYWORD_ONLY and p.name not in known]
    return own.replace(parameters=parameters)


def _unknown(name: str, signature: inspect.Signature, given: dict[str, Any]) -> str:
    taken = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    wrong = next(x for x in given if x not in signature.parameters)
    # "guidance" is a prefix of guidance_scale, which takes precedence over its similarity to guide.
    near = [x for x in signature.parameters if x.startswith(wrong)] or get_close_matches(wrong, signature.parameters, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(taken)}"
    if not near and "extra_args" in taken:
        hint += f"; pass keyword arguments of the model by extra_args={{{wrong!r}: …}}"
    return f"{name}() got an unexpected keyword argument {wrong!r}; {hint}"


def _notice_gradients(name: str, start: object) -> None:
    """Warn where a state, or one of a pair's, requires gradients, which are not recorded."""
    if isinstance(start, Tensor):
        wanted = start.requires_grad
    else:
        wanted = isinstance(start, Pair) and any(getattr(x, "requires_grad", False) for x in vars(start).values())
    if wanted:
        warn(
            f"{name}: sampling runs under torch.no_grad(), and its result has no gradient, though its start requires "
            "one; pass .detach() if you need none, or write a loop of ops (affine_step, ddim_step, …) that records it",
            UserWarning,
        )
