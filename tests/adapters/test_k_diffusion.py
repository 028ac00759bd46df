"""Functions with the signatures of k-diffusion, EDM and consistency models, against those methods written plainly."""

from __future__ import annotations

import inspect
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bicm_diffusion import StatePair
from bicm_diffusion.adapters.consistency_models import (
    ConsistencyDenoiser,
    sample_onestep,
    stochastic_iterative_sampler,
)
from bicm_diffusion.adapters.edm import edm_sampler
from bicm_diffusion.adapters.k_diffusion import (
    Denoiser,
    EDMDenoiser,
    keyed_noise_sampler,
    sample_dpmpp_2m,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
)
from bicm_diffusion.keys import K_DIFFUSION
from bicm_kernels import fold_in, normal

DATA = 0.5


def column(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def denoiser(x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
    """The exact denoiser of Gaussian data, bent so that nothing is linear."""
    level = column(sigma, x)
    return torch.tanh(x * DATA**2 / (DATA**2 + level**2)) + shift


def grid(steps: int = 10, dtype: torch.dtype = torch.float64) -> Tensor:
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (80 ** (1 / 7) + ramp * (0.02 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return torch.cat([levels, levels.new_zeros(1)]).to(dtype)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return 80 * torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def plain(
    method: str, x: Tensor, sigmas: Tensor, churn: float = 0.0, noise: Any = None, written: float = 0.0
) -> Tensor:
    """The three methods as their papers write them; k-diffusion's callbacks may add to the state they are shown."""
    before = None
    for i in range(len(sigmas) - 1):
        level, below = sigmas[i], sigmas[i + 1]
        if churn:
            raised = level * (1 + min(churn / (len(sigmas) - 1), math.sqrt(2) - 1))
            x = x + noise(level, below) * torch.sqrt(raised**2 - level**2)
            level = raised
        denoised = denoiser(x, level.expand(len(x)))
        slope = (x - denoised) / level
        x = x + written
        if method == "euler" or (method == "heun" and below == 0):
            x = x + (below - level) * slope
        elif method == "heun":
            predicted = x + (below - level) * slope
            other = (predicted - denoiser(predicted, below.expand(len(x)))) / below
            x = x + (below - level) * (slope + other) / 2
        else:
            h = torch.log(level / below)
            blend = denoised
            if before is not None and below > 0:
                r = torch.log(sigmas[i - 1] / level) / h
                blend = (1 + 1 / (2 * r)) * denoised - before / (2 * r)
            x = below / level * x - torch.expm1(-h) * blend
            before = denoised
    return x


METHODS = pytest.mark.parametrize(
    ("method", "sampler"), [("euler", sample_euler), ("heun", sample_heun), ("dpmpp_2m", sample_dpmpp_2m)]
)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_each_method_is_the_paper_s(method: str, sampler: Any, dtype: torch.dtype) -> None:
    truth = plain(method, start(), grid())
    mine = sampler(denoiser, start(dtype), grid(dtype=torch.float32 if dtype != torch.float64 else dtype), disable=True)
    assert mine.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-12)
        return
    theirs = plain(method, start(dtype), grid(dtype=dtype))
    assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max()


@METHODS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_a_callback_writes_to_the_state_is_added_to_it(method: str, sampler: Any, dtype: torch.dtype) -> None:
    sigmas, shown = grid(4, torch.float64 if dtype == torch.float64 else torch.float32), []

    def write(info: dict[str, Any]) -> None:
        shown.append(info["x"].add_(0.5))

    truth = plain(method, start(), grid(4), written=0.5)
    theirs = plain(method, start(dtype), grid(4, dtype), written=0.5)
    mine = sampler(denoiser, start(dtype), sigmas, callback=write, disable=True)
    assert len(shown) == 4
    if dtype == torch.float64:
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-12)
        return
    assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max()


def test_a_whole_state_becomes_a_float() -> None:
    x, sigmas = start().round().long(), grid(4)
    mine = sample_dpmpp_2m(denoiser, x, sigmas, disable=True)
    assert mine.dtype == torch.float32
    assert torch.equal(mine, sample_dpmpp_2m(denoiser, x.float(), sigmas, disable=True))


@METHODS
def test_a_complex_denoised_sample_makes_a_half_complex(method: str, sampler: Any) -> None:
    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x.to(torch.complex64), sigma, 0.5j)

    x, sigmas = start(torch.float16), torch.tensor([8.0, 4.0, 2.0, 0.0])
    mine = sampler(network, x, sigmas, disable=True)
    assert mine.dtype == torch.complex64
    assert torch.equal(mine, sampler(network, x.to(torch.complex64), sigmas, disable=True))


@pytest.mark.parametrize(("method", "sampler"), [("euler", sample_euler), ("heun", sample_heun)])
def test_churn_draws_from_the_noise_sampler_that_is_given(method: str, sampler: Any) -> None:
    x, sigmas = start(), grid()
    noise = keyed_noise_sampler(x, sigmas, seed=3)
    mine = sampler(denoiser, x, sigmas, disable=True, s_churn=4.0, noise_sampler=noise)
    torch.testing.assert_close(mine, plain(method, x, sigmas, 4.0, noise), rtol=0, atol=1e-11)
    torch.testing.assert_close(
        noise(sigmas[2], sigmas[3]), normal(x.shape, seed=fold_in(3, K_DIFFUSION), step=2, dtype=x.dtype)
    )
    torch.manual_seed(0)
    first = sampler(denoiser, x, sigmas, disable=True, s_churn=4.0)
    torch.manual_seed(0)
    assert torch.equal(first, sampler(denoiser, x, sigmas, disable=True, s_churn=4.0)) and not torch.equal(first, mine)
    quiet = sampler(denoiser, x, sigmas, disable=True, s_churn=4.0, s_tmin=90.0)
    assert torch.equal(quiet, sampler(denoiser, x, sigmas, disable=True))


def test_keyed_noise_asks_no_device_for_a_level() -> None:
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reads.append(func is torch.ops.aten._local_scalar_dense.default)
            return func(*args, **(kwargs or {}))

    reads: list[bool] = []
    x, sigmas = start(), grid()
    for levels in (sigmas, sigmas.repeat_interleave(2)[::2], sigmas.flip(0).flip(0)[3:]):
        noise = keyed_noise_sampler(x, levels, seed=3)
        for i in range(len(levels)):
            expected = normal(x.shape, seed=fold_in(3, K_DIFFUSION), step=i, dtype=x.dtype)
            with Reads():
                assert torch.equal(noise(levels[i], levels[i]), expected)
            assert reads and not any(reads)
            fresh = keyed_noise_sampler(x, levels, seed=3)
            assert torch.equal(fresh(levels[i].clone(), levels[i]), expected)
        with pytest.raises(
            ValueError, match="sigma: expected a level of the grid that the sampler was made for, got 7"
        ):
            noise(torch.tensor(7.0), levels[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_noise_that_nobody_gave_is_torch_s(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """The same numbers from the same generator, and the same ones after them."""
    x = torch.zeros(3, 2, 4, 8, dtype=dtype).to(memory_format=layout)
    sigmas = grid(4, dtype)
    ends, following = [], []
    for noise in ({}, {"noise_sampler": lambda *_: torch.randn_like(x)}):
        torch.manual_seed(0)
        ends.append(sample_euler(denoiser, x, sigmas, disable=True, s_churn=4.0, **noise))
        following.append(torch.randn(3))
    for given in ({}, {"randn_like": lambda z: torch.randn_like(z)}):
        torch.manual_seed(0)
        latents = x if layout is torch.contiguous_format else x[:, :, ::2]
        options = {"num_steps": 4, "S_churn": 4.0, "dtype": torch.float32}
        ends.append(edm_sampler(lambda z, sigma, labels: denoiser(z, sigma), latents, **options, **given))
        following.append(torch.randn(3))
    for i in (0, 2):
        assert torch.equal(ends[i], ends[i + 1]) and ends[i].any() and torch.equal(following[i], following[i + 1])


def test_noise_is_drawn_in_the_dtype_that_float64_levels_give_the_state() -> None:
    """k-diffusion divides by its level, so that a float32 state beside float64 sigmas is float64 from step one on."""
    x, sigmas = torch.zeros(3, 2, 4, 8), grid(4)
    dtypes = iter([torch.float32] + [torch.float64] * 3)

    def noise(*_: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=next(dtypes))

    ends = []
    for given in ({}, {"noise_sampler": noise}):
        torch.manual_seed(0)
        ends.append(sample_euler(denoiser, x, sigmas, disable=True, s_churn=4.0, **given))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)
    assert ends[0].any()


@METHODS
def test_what_is_given_wrongly_is_named(method: str, sampler: Any) -> None:
    x, sigmas = start(), grid(4)
    for arguments, message in (
        (("unet", x, sigmas), r"model: expected a function or module, called as model\(x, sigma\), got 'unet'"),
        ((denoiser, StatePair(x, x), sigmas), "x: expected a tensor, got a StatePair"),
        ((denoiser, x, 50), r"sigmas: expected a tensor, got 50 \(int\)"),
        ((denoiser, x, [1.0, 0.0]), "sigmas: expected a tensor, got a list of 2"),
        ((lambda x, sigma: SimpleNamespace(sample=x), x, sigmas), "model: expected a tensor, .*; return its .sample"),
        ((lambda x, sigma: (x,), x, sigmas), "model: expected a tensor, got a tuple of 1 .*return its first element"),
        ((lambda x, sigma: None, x, sigmas), "model: expected a tensor, got None"),
    ):
        with pytest.raises(TypeError, match=f"^{message}") as caught:
            sampler(*arguments, disable=True)
        assert "tensor([" not in str(caught.value)
    with pytest.raises(ValueError, match=r"sigmas: expected the levels \(N \+ 1,\), got shape \(1, 5\)"):
        sampler(denoiser, x, sigmas[None], disable=True)


def test_a_network_that_returns_no_tensor_is_named() -> None:
    x, sigma = start(), torch.tensor([0.1, 2.0, 70.0])
    for wrap in (Denoiser, lambda f: partial(ConsistencyDenoiser().denoise, f)):
        with pytest.raises(TypeError, match=r"^model: expected a tensor, got a SimpleNamespace; return its \.sample"):
            wrap(lambda z, level: SimpleNamespace(sample=z))(x, sigma)


def test_what_edm_sampler_is_given_wrongly_is_named() -> None:
    for net, latents, message in (
        ("net", start(), "net: expected a function or module, called as net"),
        (denoiser, StatePair(start(), start()), "latents: expected a tensor, got a StatePair"),
        (lambda x, sigma, labels: SimpleNamespace(sample=x), start(), "model: expected a tensor, .*return its .sample"),
        (lambda x, sigma, labels: (x,), start(), "model: expected a tensor, got a tuple of 1"),
    ):
        with pytest.raises(TypeError, match=f"^{message}"):
            edm_sampler(net, latents, num_steps=4)


ETAS = pytest.mark.parametrize("eta", [1.0, 0.5, 0.0, 1.5])


def plain_ancestral(
    x: Tensor, sigmas: Tensor, eta: float, noises: Any, s_noise: float = 1.0, written: float = 0.0
) -> Tensor:
    """k-diffusion's Euler-ancestral as it is written, levels in the dtype of sigmas."""
    for i in range(len(sigmas) - 1):
        level, below = sigmas[i], sigmas[i + 1]
        denoised = denoiser(x, level.expand(len(x)))
        x = x + written
        down, up = below, 0.0
        if eta:
            up = min(below, eta * (below**2 * (level**2 - below**2) / level**2) ** 0.5)
            down = (below**2 - up**2) ** 0.5
        x = x + (x - denoised) / level * (down - level)
        if below > 0:
            x = x + noises(i).to(x.dtype) * s_noise * up
    return x


@ETAS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_euler_ancestral_is_the_formula(dtype: torch.dtype, eta: float) -> None:
    noises = [torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(i)).double() for i in range(10)]
    sigmas = grid(dtype=torch.float32 if dtype != torch.float64 else dtype)
    asked: list[tuple[float, float]] = []

    def noise(sigma: Tensor, below: Tensor) -> Tensor:
        asked.append((float(sigma), float(below)))
        return noises[len(asked) - 1].to(dtype)

    truth = plain_ancestral(start(), grid(), eta, lambda i: noises[i].to(dtype).double(), 0.9)
    mine = sample_euler_ancestral(
        denoiser, start(dtype), sigmas, disable=True, eta=eta, s_noise=0.9, noise_sampler=noise
    )
    assert mine.dtype == dtype
    assert asked == list(zip(sigmas[:-2].tolist(), sigmas[1:-1].tolist(), strict=True))
    if dtype == torch.float64:
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-12)
        return
    theirs = plain_ancestral(start(dtype), grid(dtype=dtype), eta, lambda i: noises[i], 0.9)
    assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max()


@ETAS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_euler_ancestral_draws_torch_s_noise(layout: torch.memory_format, eta: float) -> None:
    """The same numbers, and the same ones after them, where eta leaves no noise too."""
    x = torch.ones(3, 2, 4, 8).to(memory_format=layout)
    torch.manual_seed(0)
    mine = sample_euler_ancestral(denoiser, x, grid(4, torch.float32), disable=True, eta=eta)
    mine_after = torch.randn(3)
    torch.manual_seed(0)
    theirs = plain_ancestral(x, grid(4, torch.float32), eta, lambda i: torch.randn_like(x))
    assert torch.equal(mine_after, torch.randn(3))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert mine.any()


def test_euler_ancestral_takes_what_a_callback_writes_and_a_tensor_of_deviations() -> None:
    noises = [torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(i)).double() for i in range(4)]
    seen: list[int] = []

    def write(info: dict[str, Any]) -> None:
        seen.append(info["i"])
        info["x"].add_(0.5)

    def noise(sigma: Tensor, _: Tensor) -> Tensor:
        return noises[len(seen) - 1]

    deviations = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    options: dict[str, Any] = {"callback": write, "disable": True, "noise_sampler": noise, "s_noise": deviations}
    mine = sample_euler_ancestral(denoiser, start(), grid(4), **options)
    truth = plain_ancestral(start(), grid(4), 1.0, lambda i: noises[i], deviations, written=0.5)
    torch.testing.assert_close(mine, truth, rtol=0, atol=1e-12)
    assert seen == [0, 1, 2, 3]


def test_euler_ancestral_over_levels_that_repeat_or_rise() -> None:
    x, sigmas = start(), torch.tensor([8.0, 4.0, 4.0, 0.0], dtype=torch.float64)
    once = sample_euler_ancestral(denoiser, x, sigmas[[0, 1, 3]], disable=True, noise_sampler=lambda *_: x.flip(0))
    twice = sample_euler_ancestral(denoiser, x, sigmas, disable=True, noise_sampler=lambda *_: x.flip(0))
    assert torch.equal(once, twice)
    with pytest.raises(ValueError, match=r"sigmas: expected levels that do not rise, got 4.0 and then 5.0"):
        sample_euler_ancestral(denoiser, x, torch.tensor([8.0, 4.0, 5.0, 0.0]), disable=True)


def test_a_step_may_ask_for_noise_twice() -> None:
    """As k-diffusion's dpmpp_sde does, with levels that went through a logarithm and one between two of the grid."""
    x, sigmas = start(), grid(6, torch.float32)
    noise = keyed_noise_sampler(x, sigmas, seed=3)
    key, draws = fold_in(3, K_DIFFUSION), []
    for i in range(5):
        level, middle = sigmas[i].log().exp(), (sigmas[i] + sigmas[i + 1]) / 2
        for again, asked in enumerate((noise(level, middle), noise(level, sigmas[i + 1]), noise(sigmas[i], middle))):
            own = fold_in(key, again) if again else key
            assert torch.equal(asked, normal(x.shape, seed=own, step=i, dtype=x.dtype))
            draws.append(asked)
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 15
    alone = keyed_noise_sampler(x[1:2], sigmas, seed=3, sample_id=1)
    for _ in range(2):
        again = alone(sigmas[2], sigmas[3])
    assert torch.equal(again[0], draws[7][1])


def test_signatures() -> None:
    churn = ["s_churn", "s_tmin", "s_tmax", "s_noise", "noise_sampler"]
    for sampler, more in ((sample_euler, churn), (sample_heun, churn), (sample_dpmpp_2m, [])):
        names = ["model", "x", "sigmas", "extra_args", "callback", "disable", *more]
        assert list(inspect.signature(sampler).parameters) == names
    names = ["model", "x", "sigmas", "extra_args", "callback", "disable", "eta", "s_noise", "noise_sampler"]
    assert list(inspect.signature(sample_euler_ancestral).parameters) == names
    assert [f.__name__ for f in (sample_euler, sample_heun)] == ["sample_euler", "sample_heun"]


def test_callback_and_extra_arguments() -> None:
    seen: list[dict[str, Any]] = []
    sample_dpmpp_2m(denoiser, start(), grid(4), {"shift": 0.5}, seen.append)
    assert [info["i"] for info in seen] == [0, 1, 2, 3]
    assert {"x", "i", "sigma", "sigma_hat", "denoised"} == set(seen[0])
    torch.testing.assert_close(seen[0]["denoised"], denoiser(start(), grid(4)[:1].expand(3), 0.5))


def test_k_diffusion_s_preconditioning() -> None:
    x, sigma = start(), torch.tensor([0.1, 2.0, 70.0], dtype=torch.float64)
    denoiser = Denoiser(lambda z, level, label: torch.tanh(z) + column(level, z) * label)
    c_skip, c_out, c_in = (column(c, x) for c in denoiser.get_scalings(sigma))
    expected = c_skip * x + c_out * (torch.tanh(c_in * x) + column(sigma, x) * 0.5)
    torch.testing.assert_close(denoiser(x, sigma, label=0.5), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(c_skip, 1 / (1 + column(sigma, x) ** 2))


def test_the_denoiser_takes_whole_levels_and_complex_networks() -> None:
    x, whole = start(), torch.tensor([1, 2, 70])
    shift = torch.tensor(0.5j)
    for network in (lambda z, level: torch.tanh(z), lambda z, level: torch.tanh(z) + shift):
        one = Denoiser(network)
        for sigma in (whole, whole.double()):
            c_skip, c_out, c_in = (column(c, x) for c in one.get_scalings(whole.double()))
            F = network(c_in * x, sigma)
            torch.testing.assert_close(one(x, sigma), c_skip * x + c_out * F, rtol=0, atol=1e-5)
            noisy = x + column(whole, x) * x.flip(0)
            error = network(c_in * noisy, sigma) - (x - c_skip * noisy) / c_out
            torch.testing.assert_close(
                one.loss(x, x.flip(0), sigma), (error**2).flatten(1).mean(1), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edm_preconditioning(dtype: torch.dtype) -> None:
    x, sigma = start(dtype), torch.tensor([0.1, 2.0, 70.0], dtype=dtype)
    asked: list[tuple[torch.dtype, torch.dtype]] = []

    def network(z: Tensor, c_noise: Tensor) -> Tensor:
        asked.append((z.dtype, c_noise.dtype))
        return torch.tanh(z) + column(c_noise, z)

    mine = EDMDenoiser(network, inner_dtype=torch.float32)(x, sigma)
    level, total = column(sigma, x), column(sigma, x) ** 2 + DATA**2
    F = network((x / total.sqrt()).float(), sigma.log().float() / 4)
    expected = DATA**2 / total * x + level * DATA / total.sqrt() * F
    assert mine.dtype == dtype and asked[0] == (torch.float32, torch.float32)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("churn", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edm_sampler(dtype: torch.dtype, churn: float) -> None:
    latents = start() / 80
    levels = grid(10)
    noises = [torch.randn(latents.shape, generator=torch.Generator().manual_seed(i)).double() for i in range(10)]
    pending = [iter(noises), iter(noises)]
    # EDM divides churn by the number of levels above zero; the plain loop divides by all of them.
    truth = plain("heun", latents * levels[0], levels, churn * 11 / 10, lambda *_: next(pending[0]))
    options = {"num_steps": 10, "sigma_min": 0.02, "S_churn": churn, "randn_like": lambda x: next(pending[1]).to(x)}
    mine = edm_sampler(lambda x, sigma, labels: denoiser(x, sigma), latents, dtype=dtype, **options)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine.double(), truth, rtol=0, atol=1e-11 if dtype == torch.float64 else 1e-3)
    with pytest.raises(ValueError, match="dtype: expected"):
        edm_sampler(denoiser, latents, dtype=torch.float16)


def test_edm_sampler_takes_a_number_for_noise() -> None:
    def network(x: Tensor, sigma: Tensor, labels: Any) -> Tensor:
        return denoiser(x, sigma)

    ends = [
        edm_sampler(network, start() / 80, num_steps=6, S_churn=20, randn_like=noise)
        for noise in (lambda x: 0.25, lambda x: torch.full_like(x, 0.25))
    ]
    assert torch.equal(*ends)


def test_edm_networks_may_write_to_the_second_input_of_a_step_without_length() -> None:
    class Coarse:
        sigma_min, sigma_max = 0.0, math.inf

        def __init__(self, writes: bool) -> None:
            self.writes, self.levels = writes, [0.0]

        def round_sigma(self, sigma: Tensor) -> Tensor:
            return (sigma / 20).ceil() * 20  # neighbouring levels become equal

        def __call__(self, x: Tensor, sigma: Tensor, labels: Any) -> Tensor:
            denoised, second = denoiser(x, sigma), len(self.levels) % 2 == 0
            if self.writes and second and self.levels[-1] == sigma:
                x.zero_()
            self.levels.append(float(sigma))
            return denoised

    ends = [edm_sampler(Coarse(writes), start() / 80, num_steps=4) for writes in (False, True)]
    assert torch.equal(*ends) and ends[0].any()


@pytest.mark.parametrize("distillation", [True, False])
def test_consistency_denoise(distillation: bool) -> None:
    x, sigma = start(), torch.tensor([0.002, 2.0, 70.0], dtype=torch.float64)
    asked: list[Tensor] = []

    def network(z: Tensor, t: Tensor, label: float) -> Tensor:
        asked.append(t)
        return torch.tanh(z) + label

    F, denoised = ConsistencyDenoiser(distillation=distillation).denoise(network, x, sigma, label=0.25)
    level, low = column(sigma, x), 0.002 if distillation else 0.0
    total = (level - low) ** 2 + DATA**2
    expected = DATA**2 / total * x + (level - low) * DATA / (level**2 + DATA**2).sqrt() * F
    torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(asked[0], 250 * sigma.log())
    if distillation:
        torch.testing.assert_close(denoised[0], x[0], rtol=0, atol=1e-12)


def test_consistency_sampling() -> None:
    x, noises = start(), [start() / 80, start().flip(0) / 80]
    drawn = iter(noises)
    generator = SimpleNamespace(randn_like=lambda z: next(drawn))
    seen: list[dict[str, Any]] = []
    mine = stochastic_iterative_sampler(denoiser, x, None, generator, ts=[0, 22, 39], callback=seen.append)
    levels = [(80 ** (1 / 7) + i / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in (0, 22, 39)]
    middle = denoiser(x, torch.tensor(levels[0])) + noises[0] * math.sqrt(levels[1] ** 2 - 0.002**2)
    torch.testing.assert_close(mine, denoiser(middle, torch.tensor(levels[1])), rtol=0, atol=1e-7)
    assert [info["i"] for info in seen] == [0, 1]
    one = sample_onestep(denoiser, x, grid())
    torch.testing.assert_close(one, denoiser(x, grid()[:1].expand(3)))
