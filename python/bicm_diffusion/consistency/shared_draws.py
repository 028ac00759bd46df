"""Evaluations that draw the same numbers from torch's generators, such as dropout masks, eager and in a graph.

Eager code seeds the device's generator before each evaluation and restores its state. A traced graph has no
defined order of its random ops, so there each of them takes the generator's state and returns the next one: the
numbers equal the eager ones under any compiler.
"""

# Arguments are named as torch.nn.functional names them.
# ruff: noqa: A002, A006

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from bicm_diffusion.keys import DROPOUT
from bicm_diffusion.samplers.checks import check_key
from bicm_kernels import fold_in

_STATE_BYTES = {"cpu": torch.Generator().get_state().numel(), "cuda": 16}


def draws_alike(key: int | Tensor, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return a factory of contexts in which torch's own generator draws the same numbers, a function of the key only.

    key: int or 0-d int64 tensor. The caller's random state is not changed.
    Raises RuntimeError in a traced graph for an unsupported random function.

    >>> alike = draws_alike(0, torch.device("cpu"))
    >>> with alike(): first = torch.rand(2)
    >>> with alike(): second = torch.rand(2)
    >>> torch.equal(first, second)
    True
    """
    if torch.compiler.is_compiling():
        _show_to_modes()
        return lambda: _Draws(_seeded_state(key, device))
    seed = int(key)
    return lambda: _Seeded(seed, device)


def dropout_key(seed: int | Tensor, step: int | Tensor, sample_id: int | Tensor = 0) -> int | Tensor:
    """Return the key of a batch's dropout masks: that of its first sample, with another purpose than its noise's.

    So the micro-batches of a step, and its processes, draw different masks. Ids on a device count as 0, and so do those
    that `make_fx` traces: they are not read, which would wait for the device.
    """
    if type(seed) is type(step) is type(sample_id) is int and not torch.compiler.is_compiling():
        return fold_in(fold_in(_dropout_seed(seed), step), sample_id)
    check_key(seed=seed, step=step, sample_id=sample_id)
    seed, step, sample_id = (_first(x) for x in (seed, step, sample_id))
    folded = isinstance(seed, Tensor) or torch.compiler.is_compiling()
    key = fold_in(fold_in(seed, DROPOUT) if folded else _dropout_seed(seed), step)
    return fold_in(key, sample_id if not isinstance(sample_id, Tensor) or _may_be_read(sample_id) else 0)


def _may_be_read(x: Tensor) -> bool:
    proxies: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")
    traced = not torch.compiler.is_compiling() and proxies is not None and proxies.get_proxy_mode() is not None
    return x.is_cpu and not traced


def _first(x: int | Tensor) -> int | Tensor:
    """The first sample's number; 0 of an empty batch."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    return x[0] if len(x) else 0


@lru_cache
def _dropout_seed(seed: int) -> int:
    return int(fold_in(seed, DROPOUT))


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


class _Seeded:
    """Run with torch's own generator seeded, and restore its state; torch.manual_seed would format a stack trace."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.generator = seed, _default_generator(device)

    def __enter__(self) -> None:
        self.state = self.generator.get_state()
        self.generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        self.generator.set_state(self.state)


# --- in traced graphs -----------------------------------------------------------------------------------------------

_library = torch.library.Library("bicm_diffusion", "DEF")
_library.define("seeded_state(Tensor seed, Device device) -> Tensor")
_library.define("draw(Tensor state, Tensor like, str method, float[] numbers) -> (Tensor, Tensor)")
_seeded_state = torch.ops.bicm_diffusion.seeded_state
_FUSED_DROPOUT = "native_dropout"


def _make_state(seed: Tensor, device: torch.device) -> Tensor:
    """The state of a freshly seeded generator, uint8 on the CPU."""
    return torch.Generator(device).manual_seed(int(seed)).get_state()


def _draw(state: Tensor, like: Tensor, method: str, numbers: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The numbers that `method` draws from a generator in `state`, like another tensor, and the next state."""
    if method != _FUSED_DROPOUT:
        generator = torch.Generator(like.device)
        generator.set_state(state)
        return getattr(torch.empty_like(like), method)(*numbers, generator=generator), generator.get_state()
    generator = _default_generator(like.device)
    before = generator.get_state()
    generator.set_state(state)
    try:
        return torch.native_dropout(like, numbers[0], True)[1], generator.get_state()
    finally:
        generator.set_state(before)


for _name, _function in {"seeded_state": _make_state, "draw": _draw}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("bicm_diffusion::seeded_state", lib=_library)
def _fake_state(seed: Tensor, device: torch.device) -> Tensor:
    return torch.empty(_STATE_BYTES[device.type], dtype=torch.uint8, device="cpu")


@torch.library.register_fake("bicm_diffusion::draw", lib=_library)
def _fake_draw(state: Tensor, like: Tensor, method: str, numbers: Sequence[float]) -> tuple[Tensor, Tensor]:
    dtype = torch.bool if method == _FUSED_DROPOUT else like.dtype
    return torch.empty_like(like, dtype=dtype), torch.empty_like(state)


def _show_to_modes() -> None:
    """Make dynamo call modes for every function that is handled here; called while it traces.

    torch.compile in 2.13 takes `rand_like` and some others straight into the graph, where their numbers would not be
    shared. Its list of functions for modes is private: where it is missing, nothing is added, and a test fails.
    """
    listed: set[Any] = getattr(sys.modules.get("torch._dynamo.variables.torch"), "get_overridable_functions", set)()
    listed.update(_STAND_INS, _REFUSED)


_show_to_modes._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Draws(TorchFunctionMode):
    """Torch's random functions, drawing from a generator whose state is a tensor of the graph."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stand_in = _STAND_INS.get(func)
        if stand_in is not None and kwargs.get("generator") is None:
            return stand_in(self, *args, **kwargs)
        if func in _REFUSED and _REFUSED[func](*args, **kwargs):
            raise RuntimeError(
                f"{func.__name__} draws random numbers that evaluations in one graph do not share: compile the network "
                "instead of the loss, or let it draw by dropout, rand, randn, bernoulli_, uniform_ or normal_"
            )
        return func(*args, **kwargs)

    def draw(self, like: Tensor, method: str, *numbers: float) -> Tensor:
        drawn, self.state = torch.ops.bicm_diffusion.draw(self.state, like.detach(), method, numbers)
        return drawn


def _checkpoint(draws: _Draws, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A checkpoint's body is a separate graph: the state is an input and an output of it."""

    def body(state: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        inside = _Draws(state)
        with inside:
            result = function(*args, **kwargs)
        return result, inside.state

    result, draws.state = checkpoint(body, draws.state, *args, **kwargs)
    return result


def _dropout(draws: _Draws, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not (training and 0 < p < 1):
        return _without_draws(input, p, training, inplace)
    if input.is_cuda and not inplace:
        return input * draws.draw(input, _FUSED_DROPOUT, p) * (1 / (1 - p))
    return _masked(draws, input, input, p, inplace)


def _torch_dropout(inplace: bool) -> Callable[..., Tensor]:
    return lambda draws, input, p, train: _dropout(draws, input, p, train, inplace)


def _feature_dropout(unbatched: int) -> Callable[..., Tensor]:
    """Dropout of whole channels; inputs of this number of dimensions have no batch dimension."""

    def drop(draws: _Draws, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not (training and 0 < p < 1):
            return _without_draws(input, p, training, inplace)
        rows = 1 if input.dim() == unbatched else 2
        channels = input.new_empty([*input.shape[:rows], *[1] * (input.dim() - rows)])
        return _masked(draws, input, channels, p, inplace)

    return drop


def _without_draws(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    """Dropout with probability 0 or 1, which draws nothing in eager code: a graph's would draw."""
    if not (training and p == 1):
        return functional.dropout(input, p, training, inplace)
    zero = input.new_zeros(())
    return input.mul_(zero) if inplace else input * zero


def _masked(draws: _Draws, input: Tensor, like: Tensor, p: float, inplace: bool) -> Tensor:
    mask = draws.draw(like, "bernoulli_", 1 - p).div(1 - p)
    return input.mul_(mask) if inplace else input * mask


def _filled(method: str, empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fill(draws: _Draws, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("generator", None)
        like = empty(*args, **kwargs)
        return draws.draw(like, method, *_NUMBERS[method].values()).requires_grad_(like.requires_grad)

    return fill


def _in_place(method: str) -> Callable[..., Tensor]:
    def fill(draws: _Draws, self: Tensor, *numbers: float, generator: None = None, **named: float) -> Tensor:
        defaults = _NUMBERS[method]
        given = defaults | dict(zip(defaults, numbers, strict=False)) | named
        return self.copy_(draws.draw(self, method, *given.values()))

    return fill


#: Methods that fill a tensor with random numbers, and their arguments.
_NUMBERS = {
    "bernoulli_": {"p": 0.5},
    "uniform_": {"from": 0.0, "to": 1.0},
    "normal_": {"mean": 0.0, "std": 1.0},
}
_STAND_INS: dict[Any, Callable[..., Any]] = {
    checkpoint: _checkpoint,
    functional.dropout: _dropout,
    torch.dropout: _torch_dropout(False),
    torch.dropout_: _torch_dropout(True),
    functional.dropout1d: _feature_dropout(2),
    functional.dropout2d: _feature_dropout(-1),
    functional.dropout3d: _feature_dropout(4),
    torch.rand: _filled("uniform_", torch.empty),
    torch.randn: _filled("normal_", torch.empty),
    torch.rand_like: _filled("uniform_", torch.empty_like),
    torch.randn_like: _filled("normal_", torch.empty_like),
} | {getattr(Tensor, method): _in_place(method) for method in _NUMBERS}
if torch.__version__ < "2.13":  # Dynamo shows modes the higher-order op that it makes of a checkpoint
    _STAND_INS[torch.ops.higher_order.tag_activation_checkpoint] = _checkpoint


def _when_training(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> bool:
    return training and p > 0


def _in_training(input: Tensor, p: float, train: bool) -> bool:
    return train and p > 0


def _rrelu(input: Tensor, lower: float = 0.0, upper: float = 0.0, training: bool = False, *_: Any, **__: Any) -> bool:
    return training


_DRAW_IN_TRAINING: tuple[Any, ...] = (
    torch.alpha_dropout,
    torch.alpha_dropout_,
    torch.feature_alpha_dropout,
    torch.feature_alpha_dropout_,
    torch.feature_dropout,
    torch.feature_dropout_,
    torch.native_dropout,
)
_ALWAYS_DRAW: tuple[Any, ...] = (
    functional.gumbel_softmax,
    functional.fractional_max_pool2d,
    functional.fractional_max_pool3d,
    torch.bernoulli,
    torch.binomial,
    torch.multinomial,
    torch.normal,
    torch.poisson,
    torch.randint,
    torch.randint_like,
    torch.randperm,
    Tensor.bernoulli,
    Tensor.cauchy_,
    Tensor.exponential_,
    Tensor.geometric_,
    Tensor.log_normal_,
    Tensor.multinomial,
    Tensor.random_,
)
# Whether a call of them draws.
_REFUSED: dict[Any, Callable[..., bool]] = (
    {
        functional.alpha_dropout: _when_training,
        functional.feature_alpha_dropout: _when_training,
        functional.rrelu: _rrelu,
        torch.rrelu: _rrelu,
        torch.rrelu_: _rrelu,
        functional.scaled_dot_product_attention: lambda q, k, v, mask=None, dropout_p=0.0, *_, **__: dropout_p > 0,
        functional.multi_head_attention_forward: lambda *args, training=True, **_: training and args[10] > 0,
    }
    | dict.fromkeys(_DRAW_IN_TRAINING, _in_training)
    | dict.fromkeys(_ALWAYS_DRAW, lambda *args, **kwargs: True)
)
