"""Gaussian policies: steps with their log-probability, densities and divergences, and the derivatives of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicm_kernels.triton_kernels import checks
from bicm_kernels.triton_kernels.checks import Integer, Number
from bicm_kernels.triton_kernels.counter import counted
from bicm_kernels.triton_kernels.gaussian_kernels import density_gradients, density_sums
from bicm_kernels.triton_kernels.keys import NO_KEY, make_key, number_argument
from bicm_kernels.triton_kernels.operands import TILE, WARPS, Layout, device_of, lay_out
from bicm_kernels.triton_kernels.pseudo_huber import CHUNK

#: Samples that are finished together.
FINISH_BLOCK = 128


class Policy:
    """A call's checked arguments, in the form that the kernels take.

    tensors: of a step the mean's; of a density the next state first; of a divergence the reference's first.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[Number],
        guidance_scale: Number | None,
        std: Number | None,
        adds_up: bool,
        kind: str,
    ) -> None:
        self.tensors, self.terms, self.adds_up, self.kind = list(tensors), len(weights), adds_up, kind
        self.given = {"step": 0, "density": 1, "divergence": self.terms}[kind]
        count = len(tensors) - self.given
        pairs = (self.terms,) if kind == "divergence" else (self.terms, self.terms + 1)
        checks.require(count in pairs, "wrong number of tensors or weights")
        checks.check_states(self.tensors[self.given :], self.terms)
        first = self.tensors[0]
        for x in self.tensors:
            fits = x.dtype in checks.FLOATING and x.shape == first.shape and x.device == first.device
            checks.require(fits, "tensors differ in shape or device")
        self.guided = count > self.terms
        checks.require(not self.guided or guidance_scale is not None, "a pair of predictions needs a guidance scale")
        std = 0.0 if std is None else std
        checks.require(isinstance(std, Tensor) or std >= 0, "std must not be negative")
        self.float64 = any(x.dtype == torch.float64 for x in tensors)
        self.compute = torch.float64 if self.float64 else torch.float32
        self.batch, self.elements = first.shape[0], math.prod(first.shape[1:])
        self.weights = tuple([self.number(weight) for weight in weights])
        self.std = self.number(std)
        self.guidance_scale = self.number(guidance_scale) if self.guided and guidance_scale is not None else None

    def number(self, value: Number) -> Any:
        """A number in the compute type."""
        return number_argument(value, self.compute, self.tensors[0])

    def operands(self, layout: Layout, first: int) -> dict[str, Any]:
        """The tensors' pointers and strides from an index on, and the arguments shared by every kernel."""
        given, mean = layout.operands[first : first + self.given], layout.operands[first + self.given :]
        return {
            "inputs": tuple(mean[: self.terms]),
            "conditional": mean[self.terms] if self.guided else None,
            "recorded": given[0] if self.kind == "density" else None,
            "references": tuple(given) if self.kind == "divergence" else None,
            "coefficients": self.weights,
            "guidance_scale": self.guidance_scale,
            "std": self.std,
            "TERMS": self.terms,
            "ADDS_UP": self.adds_up,
            "COMPUTE": tl.float64 if self.float64 else tl.float32,
        }

    def value(self, out: Tensor | None = None, key: tuple[Integer, Integer, Integer] | None = None) -> Tensor:
        """The number of every sample; a step's next state goes to `out`."""
        first, outs = self.tensors[0], [] if out is None else [out]
        results = first.new_empty((self.batch,), dtype=self.compute)
        if not self.batch:
            return results
        noise = NO_KEY if key is None else make_key(*key, first)
        layout = lay_out([*outs, *self.tensors], per_sample=True, in_order=True)
        chunks = max(1, -(-self.elements // CHUNK))
        columns = min(TILE, max(8, triton.next_power_of_2(self.elements)))
        alone, programs = chunks == 1, self.batch * chunks
        with device_of(first), counted(first.device, None if alone else programs) as count:
            density_sums[(programs,)](
                **count,
                results=results,
                partial=results if alone else first.new_empty((programs,), dtype=torch.float64),
                out=layout.operands[0] if outs else None,
                sizes=layout.plan.sizes,
                batch=self.batch,
                elements=self.elements,
                chunks=chunks,
                seed=noise.seed,
                step=noise.step,
                sample_id=noise.sample_id,
                key_tensors=noise.tensors,
                DRAWS=key is not None,
                COUNTS=noise.counts,
                COLUMNS=columns,
                STEPS=-(-min(self.elements, CHUNK) // columns),
                GROUP=layout.plan.group,
                BLOCK=FINISH_BLOCK,
                INDEX=layout.index,
                num_warps=WARPS,
                enable_fp_fusion=False,
                **self.operands(layout, len(outs)),
            )
        return results

    def gradients(self, upstream: Number, needs: int) -> list[Tensor]:
        """The derivatives of the tensors whose bit is set."""
        found = {k: torch.empty_like(x) for k, x in enumerate(self.tensors) if needs >> k & 1}
        layout = lay_out([*found.values(), *self.tensors], per_sample=True, in_order=True)
        places = dict(zip(found, layout.operands, strict=False))
        if found and self.batch and self.elements:
            layout.launch(
                density_gradients,
                outs=tuple([places.get(k) for k in range(len(self.tensors))]),
                upstream=self.number(upstream),
                **self.operands(layout, len(found)),
            )
        return list(found.values())


def gaussian_step(
    tensors: list[Tensor],
    weights: list[Number],
    guidance_scale: Number | None,
    std: Number | None,
    adds_up: bool,
    seed: Integer | None,
    step: Integer | None,
    sample_id: Integer | None,
) -> tuple[Tensor, Tensor]:
    """The next state and its log-probability."""
    checks.require(seed is None or (step is not None and sample_id is not None), "incomplete noise key")
    key: Any = None if seed is None else (seed, step, sample_id)
    policy, out = Policy(tensors, weights, guidance_scale, std, adds_up, "step"), torch.empty_like(tensors[0])
    return out, policy.value(out, key)


def passes(kind: str) -> tuple[Callable[..., Any], ...]:
    """A density's op, its derivative and both at once, for numbers and for tensors alike."""

    def make(*call: Any) -> Policy:
        tensors, weights, guidance_scale, std, adds_up = call
        return Policy(tensors, weights, guidance_scale, std, adds_up, kind)

    def value(*call: Any) -> Tensor:
        return make(*call).value()

    def derivative(upstream: Tensor, needs: int, *call: Any) -> list[Tensor]:
        policy = make(*call)
        checks.require(upstream.shape == (policy.batch,), "the gradient must have the shape of the result")
        return policy.gradients(upstream, needs)

    def both(needs: int, *call: Any) -> tuple[Tensor, list[Tensor]]:
        policy = make(*call)
        return policy.value(), policy.gradients(1.0, needs)

    return value, derivative, both


def implementations() -> dict[str, Callable[..., Any]]:
    """Every overload of the family by the name of its schema."""
    found: dict[str, Callable[..., Any]] = {"gaussian_step": gaussian_step, "gaussian_step.tensor": gaussian_step}
    for name, kind in (("gaussian_log_prob", "density"), ("gaussian_kl", "divergence")):
        for suffix, function in zip(("", "_backward", "_with_gradients"), passes(kind), strict=True):
            found |= {f"{name}{suffix}": function, f"{name}{suffix}.tensor": function}
    return found
