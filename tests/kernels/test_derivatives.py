"""Contract 5: every derivative exists and is right, or its absence raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import bicm_kernels as bk
from bicm_kernels import reference

F32, F64 = torch.float32, torch.float64
Bits = Callable[[Tensor, Tensor], None]
SHAPE = (3, 2, 5)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=F64).clone().requires_grad_()


def row(value: float) -> Tensor:
    return leaf(value * torch.linspace(0.9, 1.1, 3, dtype=F64))


# --- add_noise ----------------------------------------------------------------------------------------------

KEY = {"seed": 3, "step": 1, "sample_id": 2}
LEVELS: dict[str, Callable[[float], Any]] = {"float": lambda x: x, "0-d": leaf, "per sample": row}


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("scale", LEVELS)
def test_add_noise(each_backend: str, sigma: str, scale: str) -> None:
    inputs = (leaf(random(*SHAPE)), LEVELS[sigma](0.7), LEVELS[scale](1.3))

    def op(x: Tensor, s: Any, c: Any) -> Tensor:
        return bk.add_noise(x, s, scale=c, **KEY)

    assert gradcheck(op, inputs, check_forward_ad=True, check_batched_grad=each_backend == "native")
    assert gradgradcheck(op, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64])
@pytest.mark.parametrize("scale", [0.3, torch.tensor([0.3, 1.0, -2.0])])
def test_add_noise_gradient_is_the_scaled_gradient(dtype: torch.dtype, scale: Any, same_bits: Bits) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = random(3, 2, 5, 4).to(dtype).contiguous(memory_format=layout).requires_grad_()
        incoming = random(3, 2, 5, 4, seed=1).to(dtype).contiguous(memory_format=layout)
        y = bk.add_noise(x, 0.5, scale=scale, **KEY)
        (gradient,) = torch.autograd.grad(y, x, incoming)
        same_bits(gradient, reference.affine_step([incoming], [scale]))
        same_bits(y.detach(), bk.add_noise(x.detach(), 0.5, scale=scale, **KEY))
        assert gradient.stride() == x.stride()


def test_add_noise_saves_numbers_per_sample_only() -> None:
    saved: list[int] = []
    x = random(3, 1000).requires_grad_()
    for scale in (0.5, torch.tensor(0.5), torch.full((3,), 0.5)):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            bk.add_noise(x, torch.full((3,), 0.7), scale=scale, **KEY)
    assert saved
    assert max(saved) <= 3


# --- renoise ----------------------------------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [{}, {"parameterization": "cm", "sigma_min": 0.01}, {"parameterization": "edm"}]
RESULTS: list[Callable[[tuple[Tensor, Tensor]], Tensor]] = [
    lambda both: both[0],
    lambda both: both[1],
    lambda both: both[0] + 2 * both[1],
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("level", LEVELS)
def test_renoise(each_backend: str, level: str, result: Callable[..., Tensor], form: dict[str, Any]) -> None:
    """In x and F from either result and from both; in the levels, and twice, through the reference."""
    x, F, *levels = leaf(random(*SHAPE)), leaf(random(*SHAPE, seed=1)), *map(LEVELS[level], (2.0, 0.7, 0.4))
    u = LEVELS[level](0.9) if not form else None

    def op(x: Tensor, F: Tensor, t: Any, sigma: Any, following: Any, u: Any = u) -> Tensor:
        return result(bk.renoise(x, F, t, u, sigma, next_sigma=following, **KEY, **form))

    fixed = [y.detach() if isinstance(y, Tensor) else y for y in (*levels, u)]
    assert gradcheck(lambda x, F: op(x, F, *fixed), (x, F), check_batched_grad=each_backend == "native")
    assert gradcheck(lambda F: op(x.detach(), F, *fixed), (F,))
    assert gradcheck(op, (x, F, *levels))
    assert gradgradcheck(lambda x, F: op(x, F, *fixed), (x, F))


@pytest.mark.parametrize("network", [torch.float16, torch.bfloat16, F32, F64])
@pytest.mark.parametrize("state", [torch.float16, torch.bfloat16, F32, F64])
def test_renoise_gradients_as_the_reference(state: torch.dtype, network: torch.dtype) -> None:
    """Within two roundings of the derivative in float64; the dtypes and layouts of x and F."""
    t, u, sigma = (torch.tensor(v) for v in ([2.0, 0.3, 80.0], [0.9, 0.3, 1.0], [0.2, 0.0, 3.0]))
    x, F, *incoming = (random(3, 2, 5, 4, seed=k) for k in range(4))
    x, F = x.to(state).contiguous(memory_format=torch.channels_last).requires_grad_(), F.to(network).requires_grad_()
    given = [g.to(state) for g in incoming]
    found = torch.autograd.grad(bk.renoise(x, F, t, u, sigma, **KEY), [x, F], given)
    wide = [y.detach().double().requires_grad_() for y in (x, F)]
    exact = torch.autograd.grad(reference.renoise(*wide, t, u, sigma, **KEY), wide, [g.double() for g in given])
    for ours, wanted, like in zip(found, exact, (x, F), strict=True):
        assert ours.dtype == like.dtype
        rounding = torch.finfo(ours.dtype).eps + (torch.finfo(state).eps if state != F64 else 0) + 1e-6 * (state != F64)
        assert (ours.double() - wanted).abs().max() <= rounding * wanted.abs().max() + 1e-12


def test_renoise_rounds_a_gradient_in_its_own_dtype_alone() -> None:
    """In float16, x's, it would be 0."""
    x, F = torch.ones(2, 3, dtype=torch.float16), torch.ones(2, 3, requires_grad=True)
    x_s, _ = bk.renoise(x, F, 0.01, 0.002, 0.0, seed=0)
    (found,) = torch.autograd.grad(x_s, F, torch.full_like(x_s, 1e-6))
    wanted = bk.denoise(x.float(), F, 0.01, 0.002)
    (expected,) = torch.autograd.grad(wanted, F, torch.full((2, 3), torch.tensor(1e-6).half().item()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def test_renoise_differentiates_in_one_launch() -> None:
    """Nothing but the gradients is made of the size of a sample, and the reference is not asked."""
    x, F = leaf(random(*SHAPE)), leaf(random(*SHAPE, seed=1))
    x_s, scaled = bk.renoise(x, F, 2.0, 0.9, 0.4, **KEY)
    with torch.profiler.profile() as profile:
        torch.autograd.grad([x_s, scaled], [x, F], [torch.ones(SHAPE, dtype=F64)] * 2)
    names = [event.name for event in profile.events() if "bicm" in event.name]
    assert [name for name in names if "Backward" not in name] == ["bicm_kernels::denoised_step"]


def test_renoise_gradients_compile() -> None:
    torch._dynamo.reset()
    x, F = leaf(random(*SHAPE)), leaf(random(*SHAPE, seed=1))

    def loss(x: Tensor, F: Tensor, t: float, step: int) -> Tensor:
        x_s, scaled = bk.renoise(x, F, t, None, 0.3, seed=1, step=step)
        return x_s.square().sum() + scaled.sum()

    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for k in range(3):
        actual = torch.autograd.grad(fast(x, F, 2.0 + k, k), [x, F])
        expected = torch.autograd.grad(loss(x, F, 2.0 + k, k), [x, F])
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_add_noise_gradients_compile() -> None:
    torch._dynamo.reset()
    x, sigma = leaf(random(*SHAPE)), row(0.7)

    def loss(x: Tensor, sigma: Any, seed: int) -> Tensor:
        return bk.add_noise(x, sigma, scale=0.3, seed=seed).square().sum()

    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed, level in ((1, 0.5), (2, 0.25), (3, sigma)):
        inputs = [x, level] if isinstance(level, Tensor) else [x]
        actual = torch.autograd.grad(fast(x, level, seed), inputs)
        expected = torch.autograd.grad(loss(x, level, seed), inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


# --- step ops: every argument, every transform --------------------------------------------------------------

BDIA = {"a": 1.1, "b": -0.3, "a_last": 0.9, "b_last": 0.2, "gamma": 0.8}


def bdia(op: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda x, y, e, *v: op(x, y, e, **dict(zip(BDIA, v, strict=True)))


def denoised(x: Tensor, e: Tensor, p: Any, q: Any, v: Any, w: Any, x0: Any, n: Any, clip: Any, scale: Any) -> Any:
    results = bk.denoised_step([x, e], [p, q], [v, w], x0_weight=x0, clip=clip, noise_weight=n, next_scale=scale, **KEY)
    return tuple(result for result in results if result is not None)


# Name -> a function of tensors and numbers, how many tensors, and the numbers.
STEPS: dict[str, tuple[Callable[..., Any], int, list[float]]] = {
    "ddim_step": (lambda z, e, a, b: bk.ddim_step(z, e, a=a, b=b), 2, [1.1, -0.3]),
    "ddim_step guided": (
        lambda z, u, c, a, b, s: bk.ddim_step(z, (u, c), a=a, b=b, guidance_scale=s),
        3,
        [1.1, -0.3, 7.5],
    ),
    "bdia_step": (bdia(bk.bdia_step), 3, list(BDIA.values())),
    "bdia_inverse_step": (bdia(bk.bdia_inverse_step), 3, list(BDIA.values())),
    "affine_step": (
        lambda x, y, v, w, n: bk.affine_step([x, y], [v, w], noise_weight=n, **KEY),
        2,
        [0.7, -1.2, 0.4],
    ),
    "affine_step without noise": (
        lambda x, y, v, w, n: bk.affine_step([x, y], [v, w], noise_weight=n, **KEY),
        2,
        [0.7, -1.2, 0.0],
    ),
    "denoised_step": (denoised, 2, [1.2, -1.5, 0.4, 0.1, 0.8, 0.3, 0.9, 0.6]),
    "denoised_step without noise": (denoised, 2, [1.2, -1.5, 0.4, 0.1, 0.8, 0.0, 0.9, 0.6]),
}
FORMS: dict[str, Callable[[float], Tensor]] = {"0-d": leaf, "per sample": row}


def inputs_of(name: str, form: Callable[[float], Tensor] = leaf) -> tuple[Tensor, ...]:
    _, count, numbers = STEPS[name]
    return (*[leaf(random(*SHAPE, seed=k)) for k in range(count)], *map(form, numbers))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_every_argument(name: str, form: str) -> None:
    inputs = inputs_of(name, FORMS[form])
    assert gradcheck(STEPS[name][0], inputs)
    for k in range(len(inputs)):
        rest = [x.detach() for x in inputs]

        def op(x: Tensor, k: int = k, rest: Sequence[Tensor] = rest) -> Any:
            return STEPS[name][0](*rest[:k], x, *rest[k + 1 :])

        assert gradcheck(op, (inputs[k],))


@pytest.mark.parametrize("name", STEPS)
def test_double_backward(name: str) -> None:
    assert gradgradcheck(STEPS[name][0], inputs_of(name, row))


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_the_references(name: str, same_bits: Bits) -> None:
    inputs = inputs_of(name)
    outputs = STEPS[name][0](*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [random(*SHAPE, seed=20 + k) for k in range(len(outputs))]
    ours = torch.autograd.grad(outputs, inputs, weights)
    with bk.backend.use("reference"):
        outputs = STEPS[name][0](*inputs)
        plain = torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), inputs, weights)
    for actual, expected in zip(ours, plain, strict=True):
        same_bits(actual, expected)


def flat(result: Any) -> Tensor:
    return torch.stack(result) if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", STEPS)
def test_forward_mode(name: str) -> None:
    """jvp and dual numbers against central differences, along every argument at once and alone."""
    op, primals = STEPS[name][0], [x.detach() for x in inputs_of(name, row)]
    directions = [random(*x.shape, seed=40 + k) for k, x in enumerate(primals)]
    only = [[d if k == j else 0 * d for j, d in enumerate(directions)] for k in range(len(directions))]
    for tangents in (directions, *only):
        h = 1e-6
        ends = [flat(op(*[x + s * h * t for x, t in zip(primals, tangents, strict=True)])) for s in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * h)
        _, tangent = jvp(lambda *x: flat(op(*x)), tuple(primals), tuple(tangents))
        torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-7)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
            dual = forward_ad.unpack_dual(flat(op(*duals))).tangent
            torch.testing.assert_close(dual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", STEPS)
def test_func_transforms(name: str) -> None:
    op, primals = STEPS[name][0], tuple(x.detach() for x in inputs_of(name))
    everything = tuple(range(len(primals)))

    def loss(*x: Tensor) -> Tensor:
        return flat(op(*x)).square().sum()

    tracked = inputs_of(name)
    expected = torch.autograd.grad(loss(*tracked), tracked, create_graph=True)
    torch.testing.assert_close(grad(loss, argnums=everything)(*primals), expected)
    columns = torch.autograd.functional.jacobian(lambda *x: flat(op(*x)), primals)
    torch.testing.assert_close(jacrev(lambda *x: flat(op(*x)), argnums=everything)(*primals), columns)
    if "seed" not in op.__code__.co_names and "KEY" not in op.__code__.co_names:
        torch.testing.assert_close(jacfwd(lambda *x: flat(op(*x)), argnums=everything)(*primals), columns)
        exact = torch.autograd.functional.hessian(loss, primals)[0][0]
        torch.testing.assert_close(hessian(loss)(*primals), exact)


def test_weight_zero_still_has_its_derivative(same_bits: Bits) -> None:
    """The noise is not added, yet the derivative with respect to its weight is the noise, in both modes."""
    x, n = random(*SHAPE), bk.normal(SHAPE, dtype=F64, **KEY)
    zero = torch.zeros((), dtype=F64)
    ops: dict[str, Callable[[Tensor], Tensor]] = {
        "add_noise": lambda w: bk.add_noise(x, w, **KEY),
        "affine_step": lambda w: bk.affine_step([x], [1.0], noise_weight=w, **KEY),
        "denoised_step": lambda w: bk.denoised_step([x], [0.0], [1.0], x0_weight=0.0, noise_weight=w, **KEY)[0],
    }
    for op in ops.values():
        for tangent in (jvp(op, (zero,), (torch.ones_like(zero),))[1], jacrev(op)(zero), grad_of(op, zero)):
            torch.testing.assert_close(tangent, n, rtol=0, atol=0)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(op(forward_ad.make_dual(zero, torch.ones_like(zero)))).tangent
            torch.testing.assert_close(dual, n, rtol=0, atol=0)
        same_bits(op(leaf(0.0)).detach(), op(zero))


def grad_of(op: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(y, x, retain_graph=True)[0] for y in op(x).flatten()]).view(SHAPE)


def test_derivatives_reach_through_mixed_dtypes(same_bits: Bits) -> None:
    z, eps = random(3, 40, dtype=F32).requires_grad_(), random(3, 40, seed=1).bfloat16().requires_grad_()
    gradients = torch.autograd.grad(bk.ddim_step(z, eps, a=1.5, b=-0.25).sum(), [z, eps])
    same_bits(gradients[0], torch.full((3, 40), 1.5))
    same_bits(gradients[1], torch.full((3, 40), -0.25, dtype=torch.bfloat16))


# --- vmap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim_step", "ddim_step guided", "bdia_step", "bdia_inverse_step"])
def test_vmap_is_a_loop(each_backend: str, name: str, same_bits: Bits) -> None:
    op, count, numbers = STEPS[name]
    tensors = [random(4, 3, 7, seed=k, dtype=F32) for k in range(count)]
    rows = [value * torch.linspace(0.9, 1.1, 4) for value in numbers]
    loop = torch.stack([op(*[x[i] for x in tensors], *[v[i] for v in rows]) for i in range(4)])
    same_bits(vmap(op)(*tensors, *rows), loop)
    loop = torch.stack([op(*[x[:, i] for x in tensors], *numbers) for i in range(3)], dim=1)
    same_bits(vmap(op, in_dims=(1,) * count + (None,) * len(numbers), out_dims=1)(*tensors, *numbers), loop)
    tables = [v.outer(torch.linspace(1, 2, 3)) for v in rows]
    loop = torch.stack([op(*[x[i] for x in tensors], *[v[i] for v in tables]) for i in range(4)])
    same_bits(vmap(op)(*tensors, *tables), loop)


NOISY: dict[str, Callable[[Tensor, Any], Any]] = {
    "normal": lambda x, seed: bk.normal(x.shape, seed=seed),
    "uniform": lambda x, seed: bk.uniform(x.shape, seed=seed),
    "add_noise": lambda x, seed: bk.add_noise(x, 0.5, scale=0.3, seed=seed),
    "affine_step": lambda x, seed: bk.affine_step([x, x], [0.5, 0.2], noise_weight=0.3, seed=seed),
    "denoised_step": lambda x, seed: bk.denoised_step([x], [0.5], [0.2], x0_weight=1.0, noise_weight=0.3, seed=seed)[0],
}


@pytest.mark.parametrize("name", NOISY)
def test_vmap_of_keyed_noise_needs_seeds(each_backend: str, name: str, same_bits: Bits) -> None:
    op, x = NOISY[name], random(4, 3, 5, dtype=F32)
    for seed in (1, torch.tensor(1)):
        with pytest.raises(ValueError, match="seed must hold one seed per sample"):
            vmap(lambda y, seed=seed: op(y, seed))(x)
    for seeds in (torch.arange(4), torch.arange(12).view(4, 3)):
        loop = torch.stack([op(y, seed) for y, seed in zip(x, seeds, strict=True)])
        same_bits(vmap(op)(x, seeds), loop)


def test_vmap_of_fold_in() -> None:
    seeds = torch.arange(-3, 4)
    assert vmap(lambda seed: bk.fold_in(seed, 5))(seeds).tolist() == bk.fold_in(seeds, 5).tolist()
    table = vmap(lambda seed: vmap(lambda data: bk.fold_in(seed, data))(seeds))(seeds)
    assert table.tolist() == [[bk.fold_in(seed, data) for data in seeds.tolist()] for seed in seeds.tolist()]


def test_per_sample_gradients() -> None:
    x, seeds = random(4, 1, 6), torch.arange(4)

    def loss(x: Tensor, seed: Tensor) -> Tensor:
        return bk.add_noise(x, 0.5, scale=0.3, seed=seed).square().sum()

    together = vmap(grad(loss))(x, seeds)
    alone = torch.stack([grad(loss)(y, seed) for y, seed in zip(x, seeds, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


# --- what has no derivative says so -------------------------------------------------------------------------


def test_out_has_no_derivative(each_backend: str) -> None:
    x, out = random(*SHAPE), torch.empty(SHAPE, dtype=F64)
    tracked = leaf(x)
    calls: list[Callable[[], Any]] = [
        lambda: bk.ddim_step(tracked, x, a=1.0, b=1.0, out=out),
        lambda: bk.ddim_step(x, x, a=leaf(1.0), b=1.0, out=out),
        lambda: bk.ddim_step(x, (x, x), a=1.0, b=1.0, guidance_scale=leaf(2.0), out=out),
        lambda: bk.affine_step([x], [1.0], noise_weight=leaf(0.0), seed=1, out=out),
        lambda: bk.denoised_step([x], [row(1.0)], [1.0], x0_weight=1.0, out=(out, out.clone())),
        lambda: bk.ddim_step(x, x, a=1.0, b=1.0, out=tracked.clone()),
        lambda: bk.ddim_step(x, x, a=1.0, b=1.0, out=leaf(x)),
        lambda: grad(lambda y: bk.ddim_step(y, y, a=1.0, b=1.0, out=out).sum())(x),
        lambda: jvp(lambda y: bk.ddim_step(y, y, a=1.0, b=1.0, out=out), (x,), (x,)),
        lambda: vmap(lambda y: bk.ddim_step(y, y, a=1.0, b=1.0, out=out))(x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="out must not"):
            call()
    with torch.no_grad():
        bk.ddim_step(tracked, x, a=1.0, b=leaf(1.0), out=out)
    torch.testing.assert_close(out, 2 * x)


def test_nothing_is_recorded_without_need() -> None:
    x = random(*SHAPE)
    assert not bk.ddim_step(x, x, a=1.0, b=1.0).requires_grad
    with torch.no_grad():
        assert not bk.add_noise(leaf(x), 1.0, seed=1).requires_grad
    assert bk.add_noise(leaf(x), 1.0, seed=1).requires_grad
    assert bk.add_noise(x, leaf(0.0), seed=1).requires_grad
    with torch.inference_mode():
        y = bk.bdia_step(x, x, x, **BDIA)
        assert not y.requires_grad
        assert math.isfinite(bk.add_noise(y, 1.0, seed=1).sum().item())
