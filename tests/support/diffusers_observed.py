"""What a loop over a diffusers scheduler lets its caller see, and whether two schedulers let the same be seen."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from tests.support.diffusers_cases import first_level, made, model_input, network

SHAPE = (2, 3, 6, 6)
#: Steps are chaotic where x0 is a hundredfold of a difference: the errors of each are held by `test_diffusers.py`.
NEAR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}

#: Called with the scheduler, the step and what comes next, "input" or "step".
Edit = Callable[[Any, int, str], None]


class Heard(logging.Handler):
    """What diffusers logs meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def __enter__(self) -> Heard:
        logging.getLogger("diffusers").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("diffusers").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def accepts(function: Any, *names: str) -> bool:
    return {*names} <= {*inspect.signature(function).parameters}


def observed(
    scheduler: Any,
    *,
    start: int = 0,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    return_dict: bool = True,
    scales: bool = True,
    as_number: bool = False,
    edit: Edit | None = None,
    wide: bool = False,
    **arguments: Any,
) -> Iterator[Any]:
    """All that a loop lets its caller see; an error is seen by its type.

    With wide, states begin with the values that the given dtypes hold, and are float64.
    """
    generator, drawn = (torch.Generator().manual_seed(seed) for seed in (0, 4))
    old: Any = None
    back: Any = None

    def held(tensor: Tensor) -> Tensor:
        rounded = tensor.to(dtypes[0])
        return rounded.double() if wide else rounded

    with Heard() as heard:
        try:
            x = held(torch.randn(SHAPE, generator=generator)) * first_level(scheduler)
            yield scheduler.timesteps
            if start:
                noise = held(torch.randn(SHAPE, generator=generator))
                at = scheduler.timesteps[start].expand(len(x))
                if hasattr(scheduler, "scale_noise"):
                    x = scheduler.scale_noise(x / 9, at, noise)
                else:
                    x = scheduler.add_noise(x / 9, noise, at)
            if accepts(scheduler.step, "generator"):
                arguments = {"generator": drawn, **arguments}
            takes_old = accepts(scheduler.step, "old_pred_original_sample")
            for k, t in enumerate(scheduler.timesteps[start:]):
                at = t.item() if as_number else t
                if edit is not None:
                    edit(scheduler, k, "input")
                inputs = model_input(scheduler, x, at) if scales else x
                output = network(inputs, k).to(torch.float64 if wide else dtypes[1])
                if edit is not None:
                    edit(scheduler, k, "step")
                states = (output, old, at, back, x) if takes_old else (output, at, x)
                result = scheduler.step(*states, return_dict=return_dict, **arguments)
                yield inputs
                yield type(result)
                yield from result if isinstance(result, tuple) else result.values()
                yield [getattr(scheduler, name, None) for name in ("step_index", "begin_index", "lower_order_nums")]
                x, back = result[0], at
                old = result[1] if takes_old else None
        except Exception as error:
            yield type(error)
    yield drawn.get_state().numpy().tobytes()
    yield heard.messages


def in_float64(scheduler: Any) -> Any:
    """A copy of a scheduler, before its first step, with its tables in float64."""
    wide = copy.deepcopy(scheduler)
    for name, table in vars(wide).items():
        if isinstance(table, Tensor) and table.is_floating_point():
            setattr(wide, name, table.double())
    return wide


def no_further_from_float64(seen: Tensor, expected: Tensor, exact: Any) -> bool:
    """Whether our error is at most twice the original's; false where the original doesn't compute in float64."""
    if not isinstance(exact, Tensor) or exact.dtype is not torch.float64 or not exact.isfinite().all():
        return False
    held = expected.isfinite()
    ours, theirs = ((x.double() - exact)[held].abs().max() for x in (seen, expected))
    return bool(ours <= 2 * theirs)


def agree(original: Any, ours: Any, **how: Any) -> None:
    """Both schedulers' loops let the same be seen, for as long as float16 holds what the original computes.

    Where they differ by more than rounding, as with levels that float32 holds with a few bits alone, ours has to be as
    near to the original in float64 as the original is.
    """
    largest, half = 1.0, torch.float16 in how.get("dtypes", ())
    near = max(NEAR[dtype] for dtype in how.get("dtypes", (torch.float32,)))
    before = copy.deepcopy(original)
    # In float64 the original has no wider form to compare with: what its sums of states of the first level round away.
    lost = (
        4 * torch.finfo(torch.float64).eps * float(first_level(original))
        if torch.float64 in how.get("dtypes", ())
        else 0.0
    )
    exact: list[Any] = []
    for place, (expected, seen) in enumerate(zip(observed(original, **how), observed(ours, **how), strict=True)):
        if not isinstance(expected, Tensor):
            assert seen == expected, (seen, expected)
            continue
        assert isinstance(seen, Tensor), (seen, expected)
        assert (seen.dtype, seen.shape) == (expected.dtype, expected.shape), (seen.dtype, expected.dtype)
        finite = expected.isfinite()
        # A launch computes in float32, and stays finite where the original leaves float16's range on the way.
        if half and not torch.equal(seen.isfinite(), finite) and seen[finite].isfinite().all():
            return
        assert torch.equal(seen.isfinite(), finite), (seen, expected)
        largest = max(largest, expected[finite].abs().max().item() if finite.any() else 0.0)
        atol = max(near * largest, lost)
        if not torch.allclose(seen[finite].double(), expected[finite].double(), rtol=0.0, atol=atol):
            exact = exact or [*observed(in_float64(before), **how, wide=True)]
            if no_further_from_float64(seen, expected, exact[place] if place < len(exact) else None):
                continue
        torch.testing.assert_close(seen[finite].double(), expected[finite].double(), rtol=0.0, atol=atol)


def both(cls: type[Any], config: Mapping[str, Any], steps: int | None = 6, **timesteps: Any) -> tuple[Any, Any]:
    """An original and its accelerated form."""
    if config.get("use_dynamic_shifting") and accepts(cls.set_timesteps, "mu"):
        timesteps = {"mu": 0.8, **timesteps}
    pair = made(cls, **config), accelerate_scheduler(made(cls, **config))
    for scheduler in pair:
        if steps is not None or timesteps:
            scheduler.set_timesteps(steps, **timesteps)
    return pair


def label(x: Any) -> str:
    if isinstance(x, dict):
        return "-".join(f"{name}={value}" for name, value in x.items())[:60]
    return x.__name__.removesuffix("Scheduler") if isinstance(x, type) else str(x)
