"""Every op as a call on a device: what the GPU's tests run, compare with the CPU, capture and repeat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bicm_kernels as bk

Results = tuple[Tensor, ...]
Call = Callable[[list[Tensor]], Results]

BDIA = {"a": 1.02, "b": -0.13, "a_last": 1.01, "b_last": -0.11}
KEY = {"seed": 2**40 + 5, "step": 3, "sample_id": 7}
SHAPES = ((1, 1), (3, 67), (5, 1025), (4, 3, 32, 32), (2, 40_003))
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),
}


def states(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], device: str) -> list[Tensor]:
    """Two states and two network outputs: the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    kinds = (dtypes[0], dtypes[0], dtypes[1], dtypes[1])
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for dtype in kinds]


def levels(x: Tensor, low: float) -> Tensor:
    """A noise level for each sample: one product and one sum, which no device rounds otherwise."""
    return torch.arange(x.shape[0], device=x.device, dtype=torch.float32) * 0.5 + low


def opened(results: object) -> Results:
    """The tensors among the results of an op."""
    return (results,) if isinstance(results, Tensor) else tuple(x for x in results if x is not None)  # type: ignore[attr-defined]


def step(function: Callable[..., object], count: int, **options: object) -> Call:
    """An op on a few of the states."""
    return lambda x: opened(function(*x[2 - count + 1 : 3], **options))


def gradients(function: Callable[..., Tensor | Results], wanted: tuple[int, ...]) -> Call:
    """The results of a function and its derivatives in some of the states."""

    def call(x: list[Tensor]) -> Results:
        inputs = [y.clone().requires_grad_(k in wanted) for k, y in enumerate(x)]
        results = opened(function(inputs))
        total = sum((y.double() * k).sum() for k, y in enumerate(results, start=1))
        return (*(y.detach() for y in results), *torch.autograd.grad(total, [inputs[k] for k in wanted]))

    return call


def exact_steps(x: list[Tensor], gamma: tuple[object, int], guided: dict[str, Tensor]) -> Results:
    """BDIA on integers there and back, the buffers on the way, and what was noted: half of the samples overflow."""
    q_last, q = (bk.fixed_point_encode(y) for y in x[:2])
    eps = (
        (x[2], x[3])
        if guided
        else torch.where(levels(x[0], 0.0).reshape(-1, *[1] * (x[2].dim() - 1)) > 0.7, x[2], 1e12)
    )
    info, overflow = q >> 20, torch.zeros(len(q), dtype=torch.int64, device=q.device)
    there, kept = bk.bdia_exact_step(q_last, q, eps, info, **BDIA, gamma=gamma, overflow=overflow, mark=3, **guided)
    back, left = bk.bdia_exact_inverse_step(there, q, eps, kept, **BDIA, gamma=gamma, **guided)
    return there, kept, back, left, overflow, bk.fixed_point_decode(there, dtype=x[0].dtype)


def exact_int32(x: list[Tensor]) -> Results:
    """A state in 32 bits, most of whose sums leave the range."""
    q, overflow = bk.fixed_point_encode(x[0], fraction_bits=20, dtype=torch.int32), levels(x[0], 0.0).long() * 0
    info, weights = torch.zeros(q.shape, dtype=torch.int64, device=q.device), [1e3, levels(x[0], 0.5)]
    out, _ = bk.exact_affine_step(q, [q, x[2]], weights, info, fraction_bits=20, overflow=overflow)
    return out, overflow


#: The same bits everywhere.
EXACT: dict[str, Call] = {
    "normal": lambda x: (bk.normal(x[0].shape, dtype=x[0].dtype, device=x[0].device, **KEY),),
    "uniform": lambda x: (bk.uniform(x[0].shape, dtype=x[0].dtype, device=x[0].device, **KEY),),
    "fold_in": lambda x: (bk.fold_in(torch.arange(300, device=x[0].device), 7),),
    "add_noise": lambda x: (bk.add_noise(x[0], levels(x[0], 0.0), scale=0.9, **KEY),),
    "noisy_pair": lambda x: opened(
        bk.noisy_pair(x[0], 0.3, levels(x[0], 0.0), x_hat=x[1], mask=levels(x[0], 0.0) > 1, **KEY)
    ),
    "ddim_step": step(bk.ddim_step, 2, a=1.02, b=-0.13),
    "bdia_step": step(bk.bdia_step, 3, gamma=0.96, **BDIA),
    "bdia_inverse_step": step(bk.bdia_inverse_step, 3, gamma=0.96, **BDIA),
    "guided": lambda x: (bk.bdia_step(x[0], x[1], (x[2], x[3]), guidance_scale=7.5, gamma=0.5, **BDIA),),
    "affine_step": lambda x: (bk.affine_step(x, [0.3, -0.2, 1.7, 0.1], noise_weight=levels(x[0], 0.0), **KEY),),
    "denoised_step": lambda x: opened(
        bk.denoised_step(
            x[1:3], [1.5, -2.0], [0.1, 0.2], x0_weight=0.7, clip=1.0, next_scale=0.3, noise_weight=0.1, **KEY
        )
    ),
    "scale_input": lambda x: (bk.scale_input(x[0], levels(x[0], 0.0)),),
    "denoise": lambda x: (bk.denoise(x[1], x[2], levels(x[0], 0.5), levels(x[0], 0.1)),),
    "denoise cm": lambda x: (bk.denoise(x[1], x[2], 2.0, parameterization="cm"),),
    "denoise backward": gradients(lambda x: bk.denoise(x[1], x[2], levels(x[0], 0.5), 0.1), (1, 2)),
    "renoise": lambda x: opened(
        bk.renoise(x[1], x[2], levels(x[0], 0.5), 0.1, levels(x[0], 0.0), next_sigma=0.7, **KEY)
    ),
    "exact steps": lambda x: exact_steps(x, (9, 10), {}),
    "exact steps, ratio 1": lambda x: exact_steps(x, (1, 1), {"guidance_scale": levels(x[0], 0.5)}),
    "exact steps per sample": lambda x: exact_steps(x, (torch.arange(x[0].shape[0], device=x[0].device) + 1, 3), {}),
    "exact int32": lambda x: exact_int32(x),
    "channels last": lambda x: opened(bk.bdia_step(*[y.transpose(-1, 1) for y in x[:3]], gamma=0.96, **BDIA)),
    "every second": lambda x: (bk.affine_step([y[..., ::2] for y in x[1:3]], [0.3, 0.4], noise_weight=1.0, **KEY),),
}

#: Within 1e-6 of one another, and always the same bits on one backend.
LOSSES: dict[str, Call] = {
    f"{name} {reduction}{', kept' if route == 'forward' else ''}": gradients(function(reduction, route), wanted)
    for reduction in ("mean", "sum", "none")
    for route in ("backward", "forward")
    for name, function, wanted in (
        (
            "vector",
            lambda reduction, route: (
                lambda x: bk.pseudo_huber(x[2], x[1], weight=levels(x[0], 0.1), reduction=reduction, gradient=route)
            ),
            (1, 2),
        ),
        (
            "elementwise",
            lambda reduction, route: (
                lambda x: bk.pseudo_huber(x[2], x[1], c=0.1, kind="elementwise", reduction=reduction, gradient=route)
            ),
            (2,),
        ),
        (
            "consistency",
            lambda reduction, route: (
                lambda x: bk.consistency_loss(
                    x[0], x[2], levels(x[0], 0.5), levels(x[0], 0.1), x[1], reduction=reduction, gradient=route
                )
            ),
            (2,),
        ),
    )
}

LOSSES |= {
    "gaussian_step": lambda x: opened(
        bk.gaussian_step([x[1], (x[2], x[3])], [0.9, -0.2], std=levels(x[0], 0.1), guidance_scale=2.5, **KEY)
    ),
    "gaussian_log_prob": gradients(
        lambda x: bk.gaussian_log_prob(x[0], [x[1], x[2]], [0.9, -0.2], std=levels(x[0], 0.1)), (2,)
    ),
    "gaussian_log_prob, all": gradients(
        lambda x: bk.gaussian_log_prob(
            x[0], [x[1], (x[2], x[3])], [0.9, -0.2], std=0.3, guidance_scale=2.5, reduction="sum", gradient="forward"
        ),
        (0, 1, 2, 3),
    ),
    "gaussian_kl": gradients(lambda x: bk.gaussian_kl([x[1], x[2]], [x[1], x[3]], [0.9, -0.2], std=0.3), (2, 3)),
}

CALLS = EXACT | LOSSES

#: What is never direct: one op has no such function, others are derivatives of what has none.
NOT_DIRECT = ("fold_in", "denoise backward", "gaussian_log_prob", "gaussian_log_prob, all", "gaussian_kl")


def some_op_took(taken: list[tuple[str, bool]]) -> bool:
    """Whether a direct function took an op's call: the one that scales kept gradients takes those of every op."""
    return any(took for name, took in taken if name != "scale_gradients_")


def on_another_stream(call: Call, inputs: list[Tensor]) -> Results:
    """The results of a call on a stream where its inputs come late: a launch elsewhere would read them too early."""
    late = [torch.full_like(x, 9.0) for x in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y)
        results = call(late)
    stream.synchronize()
    return results
