"""The guide of every sampler's loop: a function that changes the denoised sample, with gradients if needed.

The change is affine in a step's terms, so that the step's own launch applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.samplers.checks import FLOATING, check_per_sample
from bicm_diffusion.samplers.prediction import Number
from bicm_kernels import affine_step

#: Tensors that one step takes.
MOST = 5


class Shift(NamedTuple):
    """weight·direction, added to the denoised sample by a guide; it costs no launch.

    direction: (B, …), of the state's shape, any floating dtype. weight: a number, a 0-d or a (B,) tensor.

    >>> Shift(torch.ones(1, 2), -0.5).weight
    -0.5
    """

    direction: Tensor
    weight: Number = 1.0


class Tracked(NamedTuple):
    """The result of `Evaluation.tracked`: a state with gradients, and the denoised sample computed from it."""

    z: Tensor
    x0: Tensor


class Plain(NamedTuple):
    """An evaluation without a guide: the model's input and output for a state, and the denoised sample."""

    ask: Callable[[Tensor, bool], Any]
    denoised: Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The argument of a guide: the state and level of an evaluation, and the model's output, computed on first access.

    index: of the level; consistency samplers count their evaluations from 0. time: the model's time argument; alpha,
    sigma: of the level, z = alpha·x + sigma·n, alpha = 0 where a flow begins; 0-d tensors in a traced loop. z: the
    state (B, …), without a gradient.
    """

    index: int
    time: Number
    alpha: Number
    sigma: Number
    z: Tensor
    _plain: Plain = field(repr=False)
    _known: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def output(self) -> Any:
        """The model's output at z, a pair under guidance; no gradient is recorded."""
        if "output" not in self._known:
            with torch.no_grad():
                self._known["output"] = self._plain.ask(self.z, False)
        return self._known["output"]

    @property
    def x0(self) -> Tensor:
        """The denoised sample at z, (B, …); no gradient is recorded.

        For a consistency sampler's leap to a level above t_min, the state there.
        """
        if "x0" not in self._known:
            output = self.output
            with torch.no_grad():
                self._known["x0"] = self._plain.denoised(self.z, output)
        return self._known["x0"]

    def tracked(self) -> Tracked:
        """Return z as a leaf that requires a gradient, and the denoised sample x0, differentiable in it.

        The model is called with gradients; access `x0` or `output` only afterwards, or the model is
        called twice.
        """
        with torch.enable_grad():
            z = self.z.detach().requires_grad_()
            output = self._plain.ask(z, True)
            x0 = self._plain.denoised(z, output)
        # x0 is not kept, to free its memory: it is computed again from the output on the next access.
        self._known.update(output=_detached(output), tracked=True)
        self._known.pop("x0", None)
        return Tracked(z, x0)

    @property
    def was_tracked(self) -> bool:
        """Whether the model was called with gradients."""
        return "tracked" in self._known


Guide: TypeAlias = Callable[[Evaluation], "Tensor | Shift | None"]


@dataclass(frozen=True, eq=False)
class Changed:
    """An output changed by a guide, Σ w_k·x_k, to be summed by the next step; a pair is last.

    answer: the model's output.
    """

    tensors: tuple[Any, ...]
    weights: tuple[Number, ...]
    answer: Any


def check_guide(guide: object) -> None:
    """Raise TypeError unless a guide can be called."""
    if guide is not None and not callable(guide):
        raise TypeError(f"guide: expected a function or None, got {described(guide)}")


def asked(guide: Guide, at: Evaluation) -> Tensor | Shift | None:
    """Return a guide's result, detached; raises unless it is a valid change of the denoised sample."""
    with torch.enable_grad():
        change = guide(at)
    if change is None:
        return None
    if isinstance(change, Shift):
        check_per_sample("guide's weight", change.weight, len(at.z))
        _check_like("Shift's direction", change.direction, at.z)
        weight = change.weight.detach() if isinstance(change.weight, Tensor) else change.weight
        return Shift(change.direction.detach(), weight)
    _check_like("result", change, at.z)
    return change.detach()


def _check_like(name: str, x: object, z: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"guide: expected None, a Shift, or the denoised sample, got {described(x)} as its {name}")
    if x.dtype not in FLOATING:
        raise TypeError(f"guide: expected a floating dtype of its {name}, got {x.dtype}")
    if x.shape != z.shape or x.device != z.device:
        given = f"{tuple(x.shape)} on {x.device}"
        raise ValueError(f"guide: expected its {name} like z, {tuple(z.shape)} on {z.device}, got {given}")


def changed(change: Tensor | Shift, at: Evaluation, of_z: Number, of_output: Number) -> Changed:
    """Return the output equivalent to a changed denoised sample, which is of_z·z + of_output·output."""
    if isinstance(of_output, float) and of_output == 0.0:
        raise ValueError(
            "guide: expected levels where the denoised sample depends on the model's output, got one where c_out = 0, "
            "the prediction's t_min: end the schedule above it, or return None there"
        )
    if isinstance(change, Shift):
        weights = (change.weight / of_output, 1.0)
        return Changed((change.direction, at.output), weights, at.output)
    if isinstance(of_z, float) and of_z == 0.0:
        return Changed((change,), (1.0 / of_output,), at.output)
    return Changed((at.z, change), (-of_z / of_output, 1.0 / of_output), at.output)


def opened(
    tensors: Sequence[Any], rows: Sequence[Sequence[Number]], guidance: Number | None
) -> tuple[Sequence[Any], Sequence[Sequence[Number]], Number | None]:
    """Return sums Σ w_k·x_k, one row of weights each, where the last term may be an output changed by a guide.

    guidance: the scale of a last pair; returns None where no pair is left.
    """
    *found, last = tensors
    if not isinstance(last, Changed):
        return tensors, rows, guidance
    parts, shares = last.tensors, last.weights
    if len({id(x) for x in (*found, *parts)}) > MOST:
        parts, shares, guidance = (whole(last, guidance),), (1.0,), None
    wider = [list(row[:-1]) for row in rows]
    for x, share in zip(parts, shares, strict=True):
        place = next((k for k, y in enumerate(found) if y is x), len(found))
        if place == len(found):
            found.append(x)
            wider = [[*row, 0.0] for row in wider]
        for row, given in zip(wider, rows, strict=True):
            row[place] = row[place] + given[-1] * share
    return found, wider, guidance if _is_pair(found[-1]) else None


class Sum(torch.autograd.Function):
    """of_z·z + of_output·output in one launch, whose derivative saves no tensors."""

    @staticmethod
    def forward(ctx: Any, of_z: Number, of_output: Number, z: Tensor, output: Tensor) -> Tensor:
        """Return the sum in z's dtype."""
        ctx.weights = of_z, of_output
        return affine_step([z, output], [of_z, of_output])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, Tensor]:
        """Return the gradients in z and in the output."""
        (g,) = gradients
        of_z, of_output = (g if isinstance(w, float) and w == 1.0 else affine_step([g], [w]) for w in ctx.weights)
        return None, None, of_z, of_output


def whole(output: Any, guidance: Number | None) -> Tensor:
    """Return an output of a model as one tensor; it may be a pair or changed by a guide."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Changed):
        pair = guidance if _is_pair(output.tensors[-1]) else None
        return affine_step(output.tensors, output.weights, guidance_scale=pair)
    return affine_step([output], [1.0], guidance_scale=guidance)


def _is_pair(x: Any) -> bool:
    return not isinstance(x, Tensor)


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else tuple(x.detach() for x in output)
