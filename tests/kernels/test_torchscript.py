"""``torch.jit.trace``: every op in a graph, on other inputs than it was traced with, run after run."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import bicm_kernels as bk
from bicm_kernels import backend
from bicm_kernels.ops import library
from tests.support.calls import CALLS, EVERY, op_of, opened
from tests.support.exact_calls import Q

Bits = Callable[[Tensor, Tensor], None]

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")


class Call(torch.nn.Module):
    """An op as a function of the floating tensors of a call, whose other arguments the graph keeps."""

    def __init__(self, name: str, k: int) -> None:
        super().__init__()
        self.op = op_of(name)
        self.leaves, self.form = tree_flatten(CALLS[name][k])
        self.places = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.is_floating_point()]

    def inputs(self, factor: float) -> tuple[Tensor, ...]:
        return tuple(self.leaves[i] * factor for i in self.places)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in self.leaves]
        for i, x in zip(self.places, inputs, strict=True):
            leaves[i] = x
        return tuple(opened(self.op(**tree_unflatten(leaves, self.form))))


def saved(traced: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize(("name", "k"), EVERY)
def test_every_op(each_backend: str, same_bits: Bits, name: str, k: int) -> None:
    call = Call(name, k).eval()
    traced = torch.jit.trace(call, call.inputs(1.0), check_trace=False)
    for graph in (traced, saved(traced), torch.jit.freeze(traced)):
        for factor in (0.5, 1.5, 0.25, 1.25):  # from the second run on, the graph is optimised
            given = call.inputs(factor)
            for actual, expected in zip(graph(*given), call(*call.inputs(factor)), strict=True):
                same_bits(actual, expected)


# Numbers that the graph keeps, and lists that two ops of it share.
SHARING: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "constants": lambda x, y: (
        bk.add_noise(x, 0.3, seed=1),
        bk.affine_step([x, y], [0.5, 0.25], noise_weight=y[:, 0], seed=3),
    ),
    "constants of two lists": lambda x, y: bk.denoised_step([x, y], [1.1, x[:, 0]], [0.2, 0.1], x0_weight=0.3)[:2],
    "one list": lambda x, y: (bk.affine_step([x, y], [0.5, 0.25]) + bk.affine_step([x, y], [0.5, 0.75]),),
    "steps": lambda x, y: (bk.ddim_step(bk.ddim_step(x, y, a=y[:, 0], b=0.1), y, a=y[:, 0], b=0.1),),
    "integers": lambda x, y: (
        *bk.exact_affine_step(Q, [x, y], [0.5, y[:, 0]], Q * 0, ratio=(9, 10)),
        *bk.exact_affine_step(Q, [x, y], [0.5, 0.25], Q * 0),
    ),
}


@pytest.mark.parametrize("name", SHARING)
def test_lists_stay_whole(name: str, same_bits: Bits) -> None:
    inputs = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    traced = torch.jit.trace(lambda x, y: SHARING[name](x, y), inputs, check_trace=False)
    for k in range(4):
        x, y = inputs[k % 2] + k, inputs[0] - k
        for actual, expected in zip(traced(x, y), SHARING[name](x, y), strict=True):
            same_bits(actual, expected)


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
@pytest.mark.parametrize("gradient", ["backward", "forward"])
def test_gradients(gradient: str, same_bits: Bits) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        low, _ = bk.noisy_pair(x, 0.5, 1.0, seed=1, step=2)
        moved = bk.denoise(bk.scale_input(bk.add_noise(low, 0.1, seed=3), 0.4), y, 0.7, 0.2)
        density = bk.gaussian_log_prob(y, [x, low], [0.9, -0.1], std=0.3, gradient=gradient).sum()
        density = density + bk.pseudo_huber(moved, y, gradient=gradient)
        return density + bk.consistency_loss(x, y, 0.7, None, x, gradient=gradient)

    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(3, 4, generator=generator).requires_grad_() for _ in range(2)]

    traced = torch.jit.trace(loss, inputs(0), check_trace=False)
    for seed in (1, 2, 3):
        found = [
            (value.detach(), *torch.autograd.grad(value, given)) for value, given in both(traced, loss, inputs, seed)
        ]
        for actual, expected in zip(*found, strict=True):
            same_bits(actual, expected)


@pytest.mark.parametrize("gradient", ["backward", "forward"])
def test_other_tensors_may_be_tracked(gradient: str, same_bits: Bits) -> None:
    """Than those that were when a loss was traced."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return bk.pseudo_huber(x, y, gradient=gradient)

    def inputs(x_tracked: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(3, 4, generator=generator) for _ in range(2))
        return [x.requires_grad_(x_tracked), y.requires_grad_()]

    traced = torch.jit.trace(loss, inputs(True), check_trace=False)
    for x_tracked in (True, False):
        x, y = inputs(x_tracked)
        (found,), (expected,) = (torch.autograd.grad(function(x, y), [y]) for function in (traced, loss))
        same_bits(found, expected)


def both(traced: Any, plain: Any, inputs: Any, seed: int) -> list[tuple[Tensor, list[Tensor]]]:
    return [(function(*given), given) for function, given in ((traced, inputs(seed)), (plain, inputs(seed)))]


UNDEFINED = {
    "affine_step": (
        """graph(%x : Tensor, %w : Tensor, %k : Tensor):
  %none : Tensor = prim::AutogradZero()
  %tensors : Tensor[] = prim::ListConstruct(%x)
  %weights : Tensor[] = prim::ListConstruct(%w)
  %y : Tensor = bicm_kernels::affine_step(%tensors, %weights, %none, %none, %none, %none, %none)
  return (%y)""",
        lambda x, w, _: w * x,
    ),
    "noisy_pair": (
        """graph(%x : Tensor, %w : Tensor, %k : Tensor):
  %none : Tensor = prim::AutogradZero()
  %low : Tensor, %high : Tensor = bicm_kernels::noisy_pair(%x, %none, %none, %w, %w, %none, %k, %k, %k)
  return (%low)""",
        lambda x, w, k: bk.noisy_pair(x, w, w, seed=k, step=k, sample_id=k)[0],
    ),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_an_undefined_tensor_is_none(name: str, same_bits: Bits) -> None:
    text, expected = UNDEFINED[name]
    given = torch.randn(3, 4), torch.tensor(2.0), torch.tensor(3)
    function = torch._C._create_function_from_graph(name, torch._C.parse_ir(text))
    same_bits(function(*given), expected(*given))


def test_every_op_that_takes_a_list_has_a_twin_without() -> None:
    ops = torch.ops.bicm_kernels
    names = [name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "bicm_kernels::" in name]
    for name in names:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(ops, packet), overload or "default")
        lists = [x for x in op._schema.arguments if str(x.type) == "List[Tensor]" and not x.is_write]
        if not lists:
            continue
        assert callable(library.without_lists(op)), name


def test_the_reference_too(same_bits: Bits) -> None:
    x = torch.randn(2, 3)
    with backend.use("reference"):
        traced = torch.jit.trace(lambda x: bk.add_noise(x, 0.5, seed=1), (x,), check_trace=False)
        for k in range(3):
            same_bits(traced(x * k), bk.add_noise(x * k, 0.5, seed=1))
