"""Calls that are made by mistake, which are refused by name, and unusual ones, which work."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import bicm_kernels as bk
from bicm_kernels import backend

X, Y = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
GUIDED: dict[str, Any] = {"guidance_scale": 2.0}


@pytest.fixture(params=["direct", "dispatcher", "reference"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """How a call reaches its kernel."""
    if request.param == "reference":
        with backend.use("reference"):
            yield request.param
        return
    if request.param == "dispatcher":
        monkeypatch.setattr(backend, "direct", None)
    yield request.param


Q = torch.tensor([[10, 20, 30]])
ONES = torch.ones(1, 3)

NO_PAIRS: dict[str, Callable[[], Any]] = {
    "one": lambda: bk.ddim_step(X, (Y,), a=3.0, b=5.0, **GUIDED),  # type: ignore[arg-type]
    "one, given out": lambda: bk.ddim_step(X, (Y,), a=3.0, b=5.0, out=torch.empty(1, 2), **GUIDED),  # type: ignore[arg-type]
    "one, fewer weights": lambda: bk.affine_step([X, (Y,)], [3.0], **GUIDED),  # type: ignore[list-item]
    "three": lambda: bk.affine_step([X, (Y, X, Y)], [3.0, 5.0, 2.0], **GUIDED),  # type: ignore[list-item]
    "three, tensors": lambda: bk.affine_step([X, (Y, X, Y)], [torch.ones(1), 5.0, 2.0], **GUIDED),  # type: ignore[list-item]
    "three, alone": lambda: bk.affine_step([(X, Y, X)], [3.0, 5.0], **GUIDED),  # type: ignore[list-item]
    "none": lambda: bk.affine_step([X, X, ()], [3.0], **GUIDED),  # type: ignore[list-item]
    "denoised": lambda: bk.denoised_step([X, (Y, X, Y)], [1.0] * 3, [1.0] * 3, x0_weight=1.0, **GUIDED),  # type: ignore[list-item]
    "bdia": lambda: bk.bdia_step(X, X, (Y,), a=1.0, b=1.0, a_last=1.0, b_last=1.0, **GUIDED),  # type: ignore[arg-type]
    "gaussian": lambda: bk.gaussian_step([X, (Y, X, Y)], [1.0] * 3, std=0.5, seed=1, **GUIDED),  # type: ignore[list-item]
    "log_prob": lambda: bk.gaussian_log_prob(X, [X, (Y, X, Y)], [1.0] * 3, std=0.5, **GUIDED),  # type: ignore[list-item]
    "exact": lambda: bk.exact_affine_step(Q, [ONES, (ONES, ONES, ONES)], [1.0] * 3, 0 * Q, **GUIDED),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_a_pair_holds_two(name: str, way: str) -> None:
    with pytest.raises((TypeError, ValueError), match=r"a pair \(eps_uncond, eps_cond\)|as many as|must hold"):
        NO_PAIRS[name]()


@pytest.mark.parametrize("value", [np.float32(3.7), np.float16(3.5), np.array(3.7), Fraction(37, 10), 3.7], ids=str)
@pytest.mark.parametrize("name", ["seed", "step", "sample_id"])
def test_numbers_that_are_not_integers_are_not_truncated(name: str, value: Any, way: str) -> None:
    for call in (lambda **key: bk.normal((2, 3), **key), lambda **key: bk.add_noise(X, 1.0, **key)):
        with pytest.raises(TypeError, match=f"{name} must be an int or an int64 tensor"):
            call(**{"seed": 3, name: value})


def test_integers_of_numpy_are_integers(way: str) -> None:
    expected = bk.add_noise(X, 1.0, seed=7, step=3, sample_id=5)
    for kind in (np.int64, np.int32, np.array):
        found = bk.add_noise(X, 1.0, seed=kind(7), step=kind(3), sample_id=kind(5))  # type: ignore[arg-type]
        assert torch.equal(found, expected)
    encoded = bk.fixed_point_encode(X, fraction_bits=8)
    assert torch.equal(bk.fixed_point_encode(X, fraction_bits=np.int64(8)), encoded)  # type: ignore[arg-type]


def test_flags_may_be_0_and_1(way: str) -> None:
    expected = [bk.denoise(X, Y, 1.0, 0.5, scaled=flag) for flag in (False, True)]
    for flag in (0, 1, np.False_, np.True_):
        for level in (1.0, torch.ones(1, requires_grad=True)):
            found = bk.denoise(X, Y, level, 0.5, scaled=flag)  # type: ignore[arg-type]
            assert torch.equal(found, expected[int(flag)])


def test_grids_and_ratios_are_integers(way: str) -> None:
    for given in ({"fraction_bits": np.float32(8.9)}, {"ratio": (np.float32(2.5), 3)}):
        with pytest.raises(TypeError, match=r"fraction_bits must be an int|n of ratio must be an int"):
            bk.exact_affine_step(Q, [ONES], [1.0], 0 * Q, **given)  # type: ignore[arg-type]
    expected = bk.exact_affine_step(Q, [ONES], [1.0], 0 * Q, ratio=(2, 3))
    found = bk.exact_affine_step(Q, [ONES], [1.0], 0 * Q, ratio=(np.int64(2), np.int64(3)))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "sizes": (lambda: bk.normal((-1, 2), seed=0), ValueError, r"shape must hold sizes of at least 0, got \(-1, 2\)"),
    "uniform": (lambda: bk.uniform((2, -1), seed=0), ValueError, r"shape must hold sizes of at least 0"),
    "clip": (
        lambda: bk.denoised_step([X], [1.0], [0.0], x0_weight=1.0, clip=-1.0),
        ValueError,
        "clip must be at least 0, or None, got -1.0",
    ),
    "whole clip": (
        lambda: bk.denoised_step([X], [1.0], [0.0], x0_weight=1.0, clip=-1),
        ValueError,
        "clip must be at least 0, or None, got -1",
    ),
    "no buffer": (
        lambda: bk.exact_affine_step(Q, [ONES], [1.0], None, out=(None, None)),  # type: ignore[arg-type]
        TypeError,
        "info must be a tensor, got None",
    ),
    "sparse": (
        lambda: bk.add_noise(X.to_sparse(), 1.0, seed=0),
        TypeError,
        r"x must be a dense tensor, got layout torch.sparse_coo; x.to_dense\(\) makes one",
    ),
    "size": (lambda: bk.add_noise(X, 10**400, seed=0), ValueError, "sigma must fit into a float, got an int of 1329"),
    "scaled": (
        lambda: bk.denoise(X, Y, 1.0, 0.5, scaled="no"),  # type: ignore[arg-type]
        TypeError,
        r"scaled must be a bool, got 'no' \(str\)",
    ),
    "negative": (
        lambda: bk.ddim_step(X, Y, a=1.0, b=1.0, out=torch.zeros(1, 2, dtype=torch.complex64).conj().imag),
        ValueError,
        "out must not have torch's negative bit",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str, way: str) -> None:
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        call()


def test_a_missing_instruction_set_is_named(python: Callable[..., Any]) -> None:
    done = python("import bicm_kernels", check=False, BICM_KERNELS_ISA="sse9", BICM_KERNELS_BACKEND="native")
    assert "ValueError: BICM_KERNELS_ISA=sse9: this processor" in done.stderr


# --- exact steps ---


def exact(**given: Any) -> tuple[Tensor, Tensor]:
    return bk.exact_affine_step(Q.clone(), [ONES], [1.0], torch.tensor([[7, 8, 9]]), fraction_bits=0, **given)


@pytest.mark.parametrize("ratio", [(1, 1), (2, 3)])
def test_what_cannot_take_both_results_is_refused_before_it_is_written(ratio: tuple[int, int], way: str) -> None:
    one, wide = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)
    for outs in (
        (one, one),
        (wide[:, :3], wide[:, 1:]),
        (one, torch.zeros(1, 3, dtype=torch.int32)),
        (one, torch.zeros(4, 1, 3)),
        (one, torch.zeros(1, 2, dtype=torch.int64)),
        (one, torch.zeros(1, 1, dtype=torch.int64).expand(1, 3)),
        (one, None),
    ):
        with pytest.raises((TypeError, ValueError), match="out"):
            exact(ratio=ratio, out=outs)
        assert not one.any() and not wide.any()


@pytest.mark.parametrize("ratio", [(1, 1), (2, 3)])
def test_results_may_take_each_other_s_place(ratio: tuple[int, int], way: str) -> None:
    expected = exact(ratio=ratio)
    for step in (bk.exact_affine_step, torch.compile(bk.exact_affine_step, backend="eager")):
        q, info = Q.clone(), torch.tensor([[7, 8, 9]])
        step(q, [ONES], [1.0], info, fraction_bits=0, ratio=ratio, out=(info, q))
        assert torch.equal(info, expected[0]) and torch.equal(q, expected[1])


@pytest.mark.parametrize(("fraction_bits", "value"), [(62, -1.0), (32, -(2.0**30))])
def test_the_smallest_sum_is_an_overflow(fraction_bits: int, value: float, way: str) -> None:
    x = torch.full((1, 70), value, dtype=torch.float64)
    q = bk.fixed_point_encode(x, fraction_bits=fraction_bits)
    overflow = torch.zeros(1, dtype=torch.int64)
    options: dict[str, Any] = {"fraction_bits": fraction_bits, "overflow": overflow, "mark": 7}
    result, _ = bk.exact_affine_step(q, [-x], [-1.0], 0 * q, **options)
    assert bk.fixed_point_decode(result, fraction_bits=fraction_bits).isnan().all()
    assert overflow.tolist() == [7]


# --- tensors of inference mode, modes and graphs ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gradient", ["auto", "forward", "backward"])
def test_inference_tensors_beside_a_prediction(dtype: torch.dtype, gradient: str) -> None:
    x, normal = torch.randn(3, 5), torch.randn(3, 5)
    with torch.inference_mode():
        other, weight, level = normal.clone(), torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    losses: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "distance": lambda p, y, w, t: bk.pseudo_huber(p, y, weight=w, gradient=gradient),
        "consistency": lambda p, y, w, t: bk.consistency_loss(x, p, t, 0.5, y, gradient=gradient),
        "log_prob": lambda p, y, w, t: bk.gaussian_log_prob(y, [x, p], [1.0, w], std=0.4, gradient=gradient).sum(),
        "kl": lambda p, y, w, t: bk.gaussian_kl([x, p], [x, y], [1.0, 1.0], std=0.4).sum(),
        "denoise": lambda p, y, w, t: bk.denoise(y, p, t, 0.5).sum(),
        "renoise": lambda p, y, w, t: bk.renoise(y, p, t, 0.5, 1.0, seed=0)[0].sum(),
        "scale": lambda p, y, w, t: bk.scale_input(p, t).sum(),
        "pair": lambda p, y, w, t: bk.noisy_pair(p, t, 2 * t, seed=0, step=0)[0].sum(),
    }
    for name, loss in losses.items():
        p = normal.to(dtype).requires_grad_()
        plain = (other.clone(), weight.clone(), level.clone())
        assert not any(y.is_inference() for y in plain)
        (expected,) = torch.autograd.grad(loss(p, *plain), p)
        (found,) = torch.autograd.grad(loss(p, other, weight, level), p)
        torch.testing.assert_close(found, expected, msg=name)


def test_inference_tensors_where_the_reference_is_differentiated(way: str) -> None:
    normal, x = torch.randn(3, 5), torch.randn(3, 5)
    with torch.inference_mode():
        other, one, each = normal.clone(), torch.tensor(2.0), torch.tensor([1.0, 2.0, 3.0])
        places = torch.tensor([True, False, True])
    steps: dict[str, Callable[..., Tensor]] = {
        "affine_step": lambda p, y, a, b, m: bk.affine_step([p, y], [a, b]),
        "ddim_step": lambda p, y, a, b, m: bk.ddim_step(p, (y, x), a=a, b=b, guidance_scale=2.0),
        "denoised_step": lambda p, y, a, b, m: bk.denoised_step([p, y], [a, 1.0], [b, 1.0], x0_weight=a)[0],
        "gaussian_step": lambda p, y, a, b, m: bk.gaussian_step([p, y], [a, b], std=a, seed=1)[0],
        "noisy_pair": lambda p, y, a, b, m: bk.noisy_pair(x, a, b + 2, seed=0, step=0, F=p, mask=m)[0],
        "gaussian_kl": lambda p, y, a, b, m: bk.gaussian_kl([x, p], [x, y], [1.0, a], std=0.4),
    }
    for name, step in steps.items():
        p = normal.clone().requires_grad_()
        plain = [y.clone() for y in (other, one, each, places)]
        (expected,) = torch.autograd.grad(step(p, *plain).sum(), p)
        (found,) = torch.autograd.grad(step(p, other, one, each, places).sum(), p)
        torch.testing.assert_close(found, expected, msg=name)
    with torch.inference_mode(), torch.enable_grad():
        assert bk.pseudo_huber(normal.clone().requires_grad_(), other).isfinite()


def test_modes_and_subclasses_see_losses() -> None:
    class Seen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    class Named(Tensor):
        pass

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "pseudo_huber": lambda x: bk.pseudo_huber(x, y, reduction="none"),
        "consistency_loss": lambda x: bk.consistency_loss(y, x, 1.0, 0.5, y, reduction="none"),
        "gaussian_log_prob": lambda x: bk.gaussian_log_prob(x, [y], [1.0], std=0.5),
        "gaussian_kl": lambda x: bk.gaussian_kl([x], [y], [1.0], std=0.5),
    }
    for name, loss in losses.items():
        with Seen() as seen:
            loss(x)
        assert any(name in found for found in seen.names), name
        assert type(loss(x.as_subclass(Named))) is Named, name


def test_places_in_outputs_are_not_read_while_traced() -> None:
    x, F, places = torch.randn(3, 5), torch.randn(2, 5), torch.tensor([0, -1, 1])

    def pair(x: Tensor, F: Tensor, places: Tensor) -> Tensor:
        return bk.noisy_pair(x, 1.0, 2.0, seed=0, step=0, F=F, mask=places)[0]

    expected = pair(x, F, places)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert pair(*map(mode.from_tensor, (x, F, places))).shape == x.shape
    for kind in ("real", "fake", "symbolic"):
        assert torch.equal(make_fx(pair, tracing_mode=kind)(x, F, places)(x, F, places), expected)  # type: ignore[arg-type]


def test_places_are_named_under_a_default_device() -> None:
    x, F, places = torch.randn(4, 5), torch.randn(2, 5), torch.tensor([0, -1, 5, 1])
    for output in (F, F.clone().requires_grad_()):
        with torch.device("cpu"), pytest.raises(ValueError, match=r"mask must hold places below 2, .*got 5"):
            bk.noisy_pair(x, 1.0, 2.0, seed=0, step=0, F=output, mask=places)


def test_compiled_ids_do_not_wrap() -> None:
    torch._dynamo.reset()
    noised = torch.compile(lambda x: bk.add_noise(x, 1.0, seed=1, sample_id=2**32 - 2), backend="eager")
    assert noised(torch.zeros(2, 3)).isfinite().all()
    with pytest.raises(Exception, match=r"sample_id \+ B must be at most 2\*\*32"):
        noised(torch.zeros(4, 3))


@pytest.mark.parametrize("number", [2, True, np.float64(2.0), 2.0], ids=str)
def test_numbers_of_any_kind_go_direct(number: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.direct is None:
        pytest.skip("no call goes direct")
    monkeypatch.setattr("bicm_kernels.ops.reduction.Reduction.reduced", None)
    x = torch.randn(2, 3)
    assert bk.consistency_loss(x, x, number, 0.5, x).isfinite()
    assert bk.pseudo_huber(x, x + 1, weight=number).isfinite()


STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ddim_step": lambda x, y, t: bk.ddim_step(x, y, a=t, b=2.0),
    "affine_step": lambda x, y, t: bk.affine_step([x, y], [t, 2.0]),
    "bdia_step": lambda x, y, t: bk.bdia_step(x, y, x, a=t, b=1.0, a_last=1.0, b_last=1.0),
    "denoised_step": lambda x, y, t: bk.denoised_step([x, y], [1.0, 2.0], [t, 1.0], x0_weight=1.0)[0],
    "gaussian_log_prob": lambda x, y, t: bk.gaussian_log_prob(x, [y], [1.0], std=0.5),
    "noisy_pair": lambda x, y, t: bk.noisy_pair(x, t, 2 * t, seed=0, step=0)[0],
}


@pytest.mark.parametrize("name", STEPS)
def test_batches_whose_size_is_known_at_run_time(name: str) -> None:
    step, kept = STEPS[name], torch.tensor([True, False, True, True])
    x, y, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4) + 0.5

    def chosen(kept: Tensor, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        i = kept.nonzero().squeeze(1)
        return step(x[i], y[i], t[i])

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(chosen, fullgraph=True, backend="eager")(kept, x, y, t)
    assert torch.equal(found, chosen(kept, x, y, t))


def test_an_exported_batch_is_unbounded() -> None:
    class Noised(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bk.add_noise(x, 1.0, seed=1) + bk.noisy_pair(x, 1.0, 2.0, seed=1, step=0)[0]

    x = torch.randn(4, 3)
    exported = torch.export.export(Noised(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    wide = torch.randn(7, 3)
    assert torch.equal(exported.module()(wide), Noised()(wide))
