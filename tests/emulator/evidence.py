"""What the emulator counts of CUDA kernels, for docs/evidence.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import bicm_emulator
import numpy as np

from .exact import Exact
from .gaussian import Policy, density
from .gaussian import step as gaussian_step
from .losses import Loss, consistency, pseudo_huber
from .model import Problem
from .problems import NOISE, Shape, affine, denoised, states, values
from .tensors import Tensor

SHAPE: Shape = (4, 3, 64, 64)
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8}
#: Dtypes of states and of network outputs.
KINDS = {"float32": ("float32", "float32"), "bfloat16": ("bfloat16", "bfloat16"), "mixed": ("float32", "bfloat16")}


@dataclass(frozen=True)
class Count:
    """Bytes per element of one tensor, counted and at least; of numbers beside them; launches and memsets."""

    counted: float
    least: int
    numbers: float
    launches: int


def count(run: Callable[[], object], dtypes: list[str]) -> Count:
    """Run a kernel that has to read or write a tensor of each of these dtypes once."""
    traffic, device = bicm_emulator.traffic, bicm_emulator.device
    for _ in range(2):
        traffic.read = traffic.written = traffic.numbers = 0
        launches, memsets = device.launches, device.memsets
        run()
        if device.memsets == memsets:  # a stream's counter is cleared once
            break
    moved, elements = traffic.read + traffic.written, float(np.prod(SHAPE))
    least = sum(SIZES[dtype] for dtype in dtypes)
    return Count(
        moved / elements, least, traffic.numbers / elements, device.launches + device.memsets - launches - memsets
    )


def each(value: float) -> Tensor:
    """A number for every sample."""
    return Tensor.of(np.full(SHAPE[:1], value), "float32")


KEY = {name: np.full(SHAPE[:1], value) for name, value in NOISE.items()}


def step(problem: Problem) -> Count:
    problem.coefficients = [each(x) for x in problem.coefficients]
    problem.x0_coefficients = [each(x) for x in problem.x0_coefficients]
    for name in ("guidance_scale", "noise_weight", "x0_weight", "clip", "next_scale"):
        if getattr(problem, name) is not None:
            setattr(problem, name, each(getattr(problem, name)))
    tensors = [*problem.operands, *problem.outputs]
    return count(lambda: problem.run("cuda"), [x.dtype for x in tensors])


def noise(state: str, _: str) -> Count:
    out = Tensor.empty(SHAPE, state)
    return count(lambda: bicm_emulator.noise("cuda", out.argument, **KEY), [state])


def noisy_pair(state: str, _: str) -> Count:
    x, x_hat = states(SHAPE, 2, state, state)
    outs = [Tensor.empty(SHAPE, state) for _ in range(2)]
    mask = np.array([True, False, False, True])
    given = [*(out.argument for out in outs), x.argument, each(0.3).argument, each(1.7).argument]
    return count(lambda: bicm_emulator.noisy_pair("cuda", *given, x_hat=x_hat.argument, mask=mask, **KEY), [state] * 3)


def guided(state: str, network: str) -> Count:
    problem = affine(SHAPE, state, network, 3, "bdia")
    problem.conditional, problem.guidance_scale = Tensor.of(values(9, SHAPE), network), 7.5
    return step(problem)


def add_noise(state: str, _: str) -> Count:
    problem = affine(SHAPE, state, state, 1)
    problem.noise_weight, problem.key = 0.7, KEY
    return step(problem)


def renoise(state: str, network: str) -> Count:
    problem = affine(SHAPE, state, network, 2, "bcm")
    problem.noise_weight, problem.key = 0.7, KEY
    problem.next, problem.next_scale, problem.next_scale_is_sigma = Tensor.empty(SHAPE, state), 0.7, True
    return step(problem)


def integers(seed: int, dtype: str = "int64") -> Tensor:
    return Tensor.of(np.random.default_rng(seed).integers(-(2**24), 2**24, SHAPE), dtype)


def exact_bdia(n: int, m: int, state: str = "int64") -> Callable[[str, str], Count]:
    """BDIA on integers: the state's dtype is its own, the network's output has the column's."""

    def run(_: str, network: str) -> Count:
        inputs = [integers(0, state), Tensor.of(values(1, SHAPE), network)]
        problem = Exact(
            inputs, [each(x) for x in (0.9, 0.3, 1.1, -0.2)], Tensor.empty(SHAPE, state), last=integers(2, state)
        )
        problem.form, problem.n, problem.m, problem.fraction_bits = "bdia", n, m, 20
        problem.overflow = np.zeros(SHAPE[0], np.int64)
        if n != m:
            problem.info, problem.info_out = integers(3), Tensor.empty(SHAPE, "int64")
            problem.n, problem.m = np.full(SHAPE[:1], n), np.full(SHAPE[:1], m)
        tensors = [*problem.operands, *problem.outputs]
        return count(lambda: problem.run("cuda"), [x.dtype for x in tensors])

    return run


def encode(state: str, _: str) -> Count:
    x, out = Tensor.of(values(0, SHAPE), state), Tensor.empty(SHAPE, "int64")
    return count(lambda: Exact([x], [1.0], out).run("cuda"), [state, "int64"])


def decode(state: str, _: str) -> Count:
    q, out = integers(0), Tensor.empty(SHAPE, state)
    return count(lambda: bicm_emulator.fixed_point_decode("cuda", out.argument, q.argument), ["int64", state])


def training(make: Callable[..., Loss], **options: object) -> Callable[[str, str], Count]:
    """Forward and backward, for the gradient of the first input."""

    def run(state: str, network: str) -> Count:
        loss = make(SHAPE, network, state, **options) if make is pseudo_huber else make(SHAPE, state, network)
        inputs = [x.dtype for x in loss.inputs]
        loss.c, loss.weight = each(0.1), each(2.0)
        loss.times = {name: each(value).argument for name, value in loss.times.items()}

        def both() -> None:
            _, sums = loss.run("cuda")
            loss.differentiate("cuda", sums, 1.0, [True] + [False] * (len(inputs) - 1))

        return count(both, [*inputs, *inputs, inputs[0]])

    return run


def at_once(make: Callable[..., Loss], **options: object) -> Callable[[str, str], Count]:
    """The loss with the gradient of the first input, which is then scaled by an upstream of 1."""

    def run(state: str, network: str) -> Count:
        network = "float32" if network == "bfloat16" else network  # a half would take the two passes
        loss = make(SHAPE, network, state, **options) if make is pseudo_huber else make(SHAPE, state, network)
        inputs = [x.dtype for x in loss.inputs]
        loss.c, loss.weight = each(0.1), each(2.0)
        loss.times = {name: each(value).argument for name, value in loss.times.items()}

        def both() -> None:
            *_, (gradient,) = loss.run_with_gradients("cuda", [True] + [False] * (len(inputs) - 1))
            bicm_emulator.scale_gradient("cuda", gradient.argument, np.ones((), np.float32))

        return count(both, [*inputs, inputs[0]])

    return run


def policy(make: Callable[..., Policy], *, at_once: bool = False) -> Callable[[str, str], Count]:
    """A step; or a density and the gradient of the network's output, in one pass or by reading the tensors again."""

    def run(state: str, network: str) -> Count:
        problem = make(SHAPE, state, network, std=each(0.4), weights=[each(0.9), each(-0.3)])
        given = [x.dtype for x in problem.operands]
        if problem.steps:
            return count(lambda: problem.run("cuda"), given)
        problem.upstream, wanted = each(1.0).argument, [False] * (len(given) - 1) + [True]
        if at_once:
            return count(lambda: problem.run("cuda", wanted), [*given, network])

        def both() -> None:
            problem.run("cuda")
            problem.differentiate("cuda", wanted)

        return count(both, [*given, *given, network])

    return run


def plain(terms: int, form: str = "affine") -> Callable[[str, str], Count]:
    return lambda state, network: step(affine(SHAPE, state, network if terms > 1 else state, terms, form))


#: Every argument that may be a number for each sample is one.
ROWS: dict[str, Callable[[str, str], Count]] = {
    "`normal`, `uniform`": noise,
    "`add_noise`": add_noise,
    "`noisy_pair`": noisy_pair,
    "`ddim_step`": plain(2),
    "`bdia_step`": plain(3, "bdia"),
    "`bdia_step`, guided": guided,
    "`bdia_inverse_step`": plain(3, "bdia_inverse"),
    "`affine_step` of five": plain(5),
    "`denoised_step`, with everything": lambda s, n: step(denoised(SHAPE, s, n)),
    "`scale_input`": plain(1, "input"),
    "`denoise`": plain(2, "bcm"),
    "`renoise`": renoise,
    "`bdia_exact_step`, ratio 1": exact_bdia(1, 1),
    "`bdia_exact_step`, ratio 9/10": exact_bdia(9, 10),
    "`bdia_exact_step`, int32": exact_bdia(1, 1, "int32"),
    "`fixed_point_encode`": encode,
    "`fixed_point_decode`": decode,
    "`pseudo_huber`, forward and backward": training(pseudo_huber),
    "`pseudo_huber`, elementwise": training(pseudo_huber, kind="elementwise", c=0.1),
    "`pseudo_huber`, squared": training(pseudo_huber, kind="squared"),
    "`consistency_loss`, forward and backward": training(consistency),
    '`pseudo_huber`, `gradient="forward"`': at_once(pseudo_huber),
    '`pseudo_huber`, elementwise, `gradient="forward"`': at_once(pseudo_huber, kind="elementwise", c=0.1),
    '`pseudo_huber`, squared, `gradient="forward"`': at_once(pseudo_huber, kind="squared"),
    '`consistency_loss`, `gradient="forward"`': at_once(consistency),
    "`gaussian_step`": policy(gaussian_step),
    "`gaussian_log_prob`, forward and backward": policy(density),
    '`gaussian_log_prob`, `gradient="forward"`': policy(density, at_once=True),
}


def table() -> str:
    kinds = "float32 / bfloat16 / float32 state with bfloat16 network"
    lines = [
        f"| op | least, bytes per element: {kinds} | counted | numbers of samples | launches |",
        "|---|---|---|---|---|",
    ]
    for name, measure in ROWS.items():
        counts = [measure(*dtypes) for dtypes in KINDS.values()]
        least = " / ".join(str(c.least) for c in counts)
        counted = " / ".join(f"{c.counted:.2f}".removesuffix(".00") for c in counts)
        (launches,) = {c.launches for c in counts}
        lines.append(f"| {name} | {least} | {counted} | {max(c.numbers for c in counts):.3f} | {launches} |")
    return "\n".join(lines) + "\n"
