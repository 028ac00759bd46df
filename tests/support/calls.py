"""Every public op called with a tensor wherever one may stand: what tests of devices and of tracing share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves, tree_map_with_path

import bicm_kernels as bk

B, SHAPE = 3, (3, 4)
ROW = torch.linspace(0.5, 1.5, B)
ONE = torch.tensor(0.75)
IDS = torch.tensor([4, 0, 9])
MASK = torch.tensor([True, False, True])
KEY = {"seed": torch.tensor(5), "step": torch.tensor(2), "sample_id": IDS}
SEEDS = {"seed": IDS, "step": torch.tensor([1, 2, 3])}


def state(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def whole(seed: int = 0) -> Tensor:
    """A fixed-point state."""
    return (state(seed) * 2**20).long()


X, Y, PAIR = state(), state(1), (state(2), state(3))
BDIA = {"a": ROW, "b": ONE, "a_last": ROW.double(), "b_last": ROW.half()}
NOTES = {"overflow": torch.zeros(B, dtype=torch.int64), "mark": torch.tensor(2)}
GUIDED = {"guidance_scale": ROW}
LOSS = {"c": ROW, "weight": ROW}
RATIO = (torch.tensor([9, 1, 3]), torch.tensor(10))
EXACT = {"info": whole(5) * 0, **GUIDED, **NOTES}
EXACT_OUT = (whole(6), whole(7))
AFFINE = {"tensors": [X, Y, PAIR], "weights": [ROW, ONE, ROW], **GUIDED}
DENOISED: dict[str, Any] = {
    **AFFINE,
    "x0_weights": [ONE, ROW, ONE],
    "x0_weight": ROW,
    "clip": ROW,
    "noise_weight": ROW,
    "next_scale": ROW,
    **KEY,
}

#: By op, calls that together have a tensor in every place that takes one.
CALLS: dict[str, list[dict[str, Any]]] = {
    "normal": [{"shape": SHAPE, **KEY}, {"shape": SHAPE, **SEEDS}],
    "uniform": [{"shape": SHAPE, **KEY}, {"shape": SHAPE, **SEEDS}],
    "fold_in": [{"seed": IDS, "data": IDS}, {"seed": torch.tensor(3), "data": IDS}, {"seed": IDS, "data": ONE.long()}],
    "add_noise": [{"x": X, "sigma": ROW, "scale": ROW, **KEY}, {"x": X, "sigma": ONE, "scale": ROW, **SEEDS}],
    "noisy_pair": [
        {"x": X, "sigma_low": ROW, "sigma_high": ROW, "x_hat": Y, "mask": MASK, "sigma_data": ROW, **KEY},
        {"x": X, "sigma_low": ONE, "sigma_high": ROW, **SEEDS},
        {"x": X, "sigma_low": ROW, "sigma_high": ROW, "F": Y, "mask": MASK, "sigma_data": ROW, "sigma_min": ONE, **KEY},
    ],
    "ddim_step": [
        {"z": X, "eps": PAIR, "a": ROW, "b": ROW, **GUIDED, "out": state(4)},
        {"z": X, "eps": Y, "a": ONE, "b": ROW},
    ],
    "bdia_step": [
        {"z_last": X, "z": Y, "eps": PAIR, **BDIA, "gamma": ROW, **GUIDED, "out": state(4)},
        {"z_last": X, "z": Y, "eps": X, **BDIA, "gamma": ONE},
    ],
    "bdia_inverse_step": [
        {"z_next": X, "z": Y, "eps": PAIR, **BDIA, "gamma": ROW, **GUIDED, "out": state(4)},
        {"z_next": X, "z": Y, "eps": X, **BDIA, "gamma": ONE},
    ],
    "affine_step": [
        {**AFFINE, "noise_weight": ROW, **KEY, "out": state(4)},
        {"tensors": [X, Y], "weights": [ROW, ONE], "noise_weight": ONE, **SEEDS},
        {"tensors": [X], "weights": [ROW]},
    ],
    "denoised_step": [
        {**DENOISED, "out": (state(4), state(5), state(6))},
        {"tensors": [X, Y], "x0_weights": [ONE, ROW], "weights": [ROW, ROW], "x0_weight": ONE},
    ],
    "gaussian_step": [
        {**AFFINE, "std": ROW, **KEY},
        {"tensors": [X, Y], "weights": [ROW, ONE], "std": ONE, **SEEDS, "reduction": "sum"},
    ],
    "gaussian_log_prob": [
        {"next": state(5), **AFFINE, "std": ROW},
        {"next": state(5), "tensors": [X, Y], "weights": [ROW, ONE], "std": ONE, "reduction": "sum"},
    ],
    "gaussian_kl": [
        {"tensors": [X, Y], "reference": [X, state(2)], "weights": [ROW, ONE], "std": ROW},
        {"tensors": [X], "reference": [Y], "weights": [ONE], "std": ONE, "reduction": "sum"},
    ],
    "scale_input": [{"x": X, "t": ROW}],
    "denoise": [{"x": X, "F": Y, "t": ROW, "u": ROW}, {"x": X, "F": Y, "t": ONE, "parameterization": "cm"}],
    "renoise": [
        {"x": X, "F": Y, "t": ROW, "u": ROW, "sigma": ROW, "next_sigma": ROW, **KEY},
        {"x": X, "F": Y, "t": ONE, "u": None, "sigma": ROW, **SEEDS},
    ],
    "pseudo_huber": [
        {"pred": X, "target": Y, **LOSS},
        {"pred": X, "target": Y},
        {"pred": X, "target": Y, "c": 0.1, "kind": "elementwise", "reduction": "none"},
        {"pred": X, "target": Y, "weight": ROW, "kind": "squared"},
        {"pred": X, "target": Y, "weight": state(2).abs()},
    ],
    "consistency_loss": [
        {"x": X, "F": Y, "t": ROW, "u": ROW, "target": state(2), **LOSS, "sigma_data": ROW, "sigma_min": ONE},
        {"x": X, "F": Y, "t": ROW, "u": None, "target": state(2), "sigma_min": ROW},
        {"x": X, "F": Y, "t": ONE, "u": None, "target": state(2), "reduction": "none"},
    ],
    "fixed_point_encode": [{"x": X, **NOTES}, {"x": X}],
    "fixed_point_decode": [{"q": whole()}],
}
for _name, _first in (("exact_affine_step", "q_last"), ("exact_affine_inverse_step", "q_next")):
    _call = {_first: whole(), "tensors": [whole(1), PAIR], "weights": [ROW, ROW], **EXACT, "ratio": RATIO}
    CALLS[_name] = [{**_call, "out": EXACT_OUT}, {_first: whole(), "tensors": [Y], "weights": [ROW], "info": whole(5)}]
for _name, _first in (("bdia_exact_step", "q_last"), ("bdia_exact_inverse_step", "q_next")):
    _call = {_first: whole(), "q": whole(1), "eps": PAIR, **BDIA, **EXACT, "gamma": RATIO}
    CALLS[_name] = [{**_call, "out": EXACT_OUT}, {_first: whole(), "q": whole(1), "eps": Y, **BDIA, "info": whole(5)}]

#: Ops that take no tensor.
WITHOUT = ("torch_randn",)

EVERY = [(name, k) for name, calls in CALLS.items() for k in range(len(calls))]


def op_of(name: str) -> Callable[..., Any]:
    return getattr(bk, name)  # type: ignore[no-any-return]


def opened(results: Any) -> list[Tensor]:
    """The tensors among an op's results."""
    return [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]


def takes_tensors(name: str) -> set[str]:
    """The parameters of an op that a tensor may be given for."""
    words = re.compile("Tensor|Number|Integer|TensorOrPair|Ratio|Pair")
    parameters = inspect.signature(op_of(name)).parameters.items()
    return {parameter for parameter, kind in parameters if words.search(str(kind.annotation))}


def given(name: str) -> set[str]:
    """The parameters of an op that the table gives tensors for."""
    return {
        parameter
        for call in CALLS[name]
        for parameter, value in call.items()
        if any(isinstance(x, Tensor) for x in tree_leaves(value))
    }


def changed(call: Any, move: Callable[[str, Tensor], Tensor]) -> Any:
    """A call with other tensors; ``move`` is told where each one stands."""
    return tree_map_with_path(lambda path, x: move(keystr(path), x) if isinstance(x, Tensor) else x, call)


def with_host_numbers(call: Any, dtype: torch.dtype, move: Callable[[Tensor], Tensor]) -> Any:
    """A call whose numbers are 0-d tensors on the CPU, floating ones of a dtype, and whose other tensors are moved."""

    def place(at: str, x: Tensor) -> Tensor:
        if x.dim() > 1 or "overflow" in at or "mask" in at:
            return move(x)
        number = x.flatten()[0].clone()
        return number.to(dtype) if x.is_floating_point() else number

    return changed(call, place)
