"""Accelerated steps inside transforms of torch.func: the original's values, derivatives and state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from tests.support.diffusers_cases import model_input
from tests.support.diffusers_observed import SHAPE, both, label
from tests.support.diffusers_odd import CONFIGS, alike

pytestmark = pytest.mark.filterwarnings("ignore")

TRANSFORMS: dict[str, Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Any]] = {
    "vmap over samples": lambda f, x, y: torch.vmap(f)(x[:, None], y[:, None]),
    "vmap over channels": lambda f, x, y: torch.vmap(f, in_dims=1, out_dims=1)(x, y),
    "vmap of one output": lambda f, x, y: torch.vmap(f, in_dims=(0, None))(x[None], y),
    "vmap, noise of its own": lambda f, x, y: torch.vmap(f, randomness="same")(x[:, None], y[:, None]),
    "jvp": lambda f, x, y: torch.func.jvp(f, (x, y), (torch.ones_like(x), y)),
    "vjp": lambda f, x, y: torch.func.vjp(f, x, y)[1](torch.ones_like(x)),
    "grad": lambda f, x, y: torch.func.grad(lambda z: f(z, y).sum())(x),
    "jacrev": lambda f, x, y: torch.func.jacrev(f)(x[:1, :1, :1], y[:1, :1, :1]),
    "hessian": lambda f, x, y: torch.func.hessian(lambda z: f(z, y[:1, :1, :1]).square().sum())(x[:1, :1, :1]),
    "functionalize": lambda f, x, y: torch.func.functionalize(f)(x, y),
}


#: For other options than the defaults.
SOME = ("vmap over channels", "vjp", "jvp")


@pytest.mark.parametrize(
    ("cls", "config", "name"),
    [(cls, config, name) for cls, config in CONFIGS for name in (SOME if config else TRANSFORMS)],
    ids=label,
)
def test_transforms_of_torch_func(cls: type[Any], config: dict[str, Any], name: str) -> None:
    """Two steps, and the input between them."""
    # The second step of DEIS's original takes logarithms of tensors by NumPy, which no transform supports.
    steps = 1 if cls.__name__ == "DEISMultistepScheduler" else 2
    x = torch.linspace(-2.0, 2.0, torch.Size(SHAPE).numel()).reshape(SHAPE)

    def run(scheduler: Any) -> Any:
        # A transform may call the function again, on the state as it was.
        def two(sample: Tensor, output: Tensor) -> Tensor:
            fresh = copy.copy(scheduler)
            if hasattr(fresh, "model_outputs"):
                fresh.model_outputs = [*scheduler.model_outputs]
            for t in fresh.timesteps[:steps]:
                scaled = model_input(fresh, sample, t)
                sample = fresh.step(0.5 * output + 0.1 * scaled, t, sample, return_dict=False)[0]
            return model_input(fresh, sample, fresh.timesteps[steps])

        result = TRANSFORMS[name](two, x, torch.tanh(x))
        return result if isinstance(result, tuple) else (result,)

    alike(both(cls, config), run)
