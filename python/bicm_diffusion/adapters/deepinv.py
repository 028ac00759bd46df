"""Physics objects of deepinv as operators of inverse solvers; `pip install "bicm-kernels[deepinv]"` installs deepinv.

The module itself does not import deepinv.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.described import described


@dataclass(frozen=True, eq=False)
class PhysicsOperator:
    """The operator that `operator` returns: x0 -> physics.A(x0), its measurement and its adjoint."""

    physics: Any
    parameters: Mapping[str, Any] = field(default_factory=dict)
    minus_one_one: bool = False

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the measurement without noise, (B, …); of stacked physics the parts concatenated, (B, d)."""
        given = (x0 + 1.0) * 0.5 if self.minus_one_one else x0
        return self.measurement(self.physics.A(given, **self.parameters))

    def measurement(self, y: Any) -> Tensor:
        """Return a measurement of the physics as solvers take it: a tensor unchanged, parts of a stack concatenated."""
        if isinstance(y, Tensor):
            return y
        return torch.cat([part.flatten(1) for part in y], dim=1)

    def adjoint(self, y: Any) -> Tensor:
        """Return Aᵀy of linear physics, y as the physics measures it; half of it where x0 is in [-1, 1].

        Raises TypeError for physics without an adjoint.
        """
        found: Callable[..., Tensor] | None = getattr(self.physics, "A_adjoint", None)
        if found is None:
            raise TypeError(f"physics: expected linear physics, with A_adjoint, got {described(self.physics)}")
        back = found(y, **self.parameters)
        return back * 0.5 if self.minus_one_one else back


def operator(physics: Any, *, minus_one_one: bool = False, **parameters: Any) -> PhysicsOperator:
    """Return a deepinv physics object as an operator for inverse solvers.

    physics: a `deepinv.physics.Physics`, linear or not; `physics.A(x0, **parameters)` is measured, without its noise
    and sensor, as deepinv's own data fidelities do. x0: (B, …), float32 for most physics. minus_one_one: x0 is in
    [-1, 1] and the physics measures images in [0, 1]. parameters: of the physics, as its `update` takes them.
    A sample's solution is independent of its batch where the physics is: convolutions of torch may not be.
    Raises TypeError for an object without A.

    >>> class Half:
    ...     def A(self, x):
    ...         return x / 2
    >>> operator(Half(), minus_one_one=True)(torch.ones(1, 2))
    tensor([[0.5000, 0.5000]])
    """
    if not callable(getattr(physics, "A", None)):
        raise TypeError(f"physics: expected a deepinv.physics.Physics, got {described(physics)}")
    return PhysicsOperator(physics, parameters, bool(minus_one_one))
