"""The accelerated CogVideoX DPM, whose step takes the last x0 and the timestep before, beside the original."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import CogVideoXDPMScheduler

import bicm_kernels as bk
from bicm_diffusion.adapters.diffusers import accelerate_scheduler, is_accelerated
from bicm_diffusion.keys import SCHEDULER
from tests.support.diffusers_cases import STEPS, exactly, generator, in_float64, network
from tests.support.diffusers_observed import NEAR, SHAPE, agree, both, label
from tests.support.diffusers_options import OPTIONS

SHIPPED = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
CONFIGS: list[dict[str, Any]] = [
    {},
    SHIPPED,
    *({"prediction_type": prediction} for prediction in ("sample", "v_prediction")),
    {"set_alpha_to_one": False, "snr_shift_scale": 1.0, "timestep_spacing": "linspace"},
]


def begin(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=generator(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_no_further_from_float64_than_twice_the_original(config: dict[str, Any], dtype: torch.dtype) -> None:
    original, ours = both(CogVideoXDPMScheduler, config, STEPS)
    exact = in_float64(original)
    generators = [generator() for _ in range(3)]
    x, old, times = begin(dtype), None, original.timesteps
    errors, scale = [[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0]
    for k, t in enumerate(times):
        predicted, back = network(x, k), times[k - 1] if k else None
        results = [
            s.step(predicted, old, t, back, x, generator=g) for s, g in zip((original, ours), generators, strict=False)
        ]
        with exactly(exact, dtype):
            wide = None if old is None else old.double()
            truth = exact.step(predicted.double(), wide, t, back, x.double(), generator=generators[2])
        for j, expected in enumerate(truth):
            for error, result in zip(errors, results, strict=True):
                error[j] += (result[j].double() - expected).abs().max().item()
            scale[j] = max(scale[j], expected.abs().max().item())
        x, old = results[0]
    for theirs, mine, largest in zip(*errors, scale, strict=True):
        assert mine <= 2 * theirs + STEPS * 1e-15 * largest


@pytest.mark.filterwarnings("ignore")
def test_options_together() -> None:
    options, source = OPTIONS[CogVideoXDPMScheduler], random.Random(0)
    dtypes = sorted(NEAR, key=str)
    for _ in range(60):
        names = source.sample(sorted(options), source.randint(0, 4))
        config = {name: source.choice(options[name]) for name in names}
        how = {"return_dict": source.random() < 0.5, "dtypes": (source.choice(dtypes), source.choice(dtypes))}
        agree(*both(CogVideoXDPMScheduler, config, source.choice((3, 4, 6))), **how)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=label)
def test_keyed_noise(config: dict[str, Any]) -> None:
    """A function of seed, timestep and sample: in any batch the same, and the library's."""
    ours = accelerate_scheduler(CogVideoXDPMScheduler(**config), noise="keyed", seed=5, sample_id=2)
    ours.set_timesteps(6)
    assert is_accelerated(ours)
    zero, t = torch.zeros(2, 4, 16, 16), ours.timesteps[1]
    noise = ours.step(zero, None, t, None, zero)[0]
    expected = bk.normal(zero.shape, seed=bk.fold_in(5, SCHEDULER), step=int(t), sample_id=2)
    assert torch.corrcoef(torch.stack([noise.flatten(), expected.flatten()]))[0, 1] > 0.999
    ours = accelerate_scheduler(ours, sample_id=0)
    generators = [generator(k) for k in range(2)]
    together = ours.step(zero, None, t, None, zero, generator=generators)[0]
    assert torch.equal(ours.step(zero[1:], None, t, None, zero[1:], generator=generators[1:])[0], together[1:])


@pytest.mark.parametrize(
    "call",
    [
        lambda s, x, t: s.step(x, None, 5000, None, x),
        lambda s, x, t: s.step(x, x, t, None, x),
        lambda s, x, t: s.step(x, x, t, 5000, x),
        lambda s, x, t: s.step(x[:, :1], x, t, t + 1, x),
        lambda s, x, t: s.step(x, x[:1], t, t + 1, x),
        lambda s, x, t: s.step(x, x, t, t, x),
        lambda s, x, t: s.step(x, x, t - 5000, t, x),
        lambda s, x, t: s.step(x.long(), None, t, None, x),
        lambda s, x, t: s.step(x, x.long(), t, t + 1, x),
        lambda s, x, t: s.step(x, None, float(t), None, x),
        lambda s, x, t: s.step(x, x, s.timesteps[-1], t, x, return_dict=True),
        lambda s, x, t: s.step((x,), None, t, None, x),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_odd_calls_do_what_the_original_does(call: Callable[..., Any]) -> None:
    """Results, errors and how much is drawn."""
    ends: list[list[Any]] = []
    for scheduler in both(CogVideoXDPMScheduler, {}):
        torch.manual_seed(0)
        try:
            ends.append([*call(scheduler, begin(), scheduler.timesteps[2]), torch.get_rng_state()])
        except Exception as error:
            ends.append([type(error), str(error), torch.get_rng_state()])
    for expected, got in zip(*ends, strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(got, expected, equal_nan=True)
        else:
            assert got == expected


@pytest.mark.slow
def test_a_loop_in_one_graph() -> None:
    eager, compiled = (accelerate_scheduler(CogVideoXDPMScheduler(**SHIPPED), noise="keyed", seed=3) for _ in range(2))
    for scheduler in (eager, compiled):
        scheduler.set_timesteps(6)
    torch.compiler.reset()

    def loop(scheduler: Any, x: Tensor) -> Tensor:
        old, times = None, scheduler.timesteps
        for k in range(6):
            x, old = scheduler.step(torch.tanh(x), old, times[k], times[k - 1] if k else None, x)
        return x

    x = begin()
    whole = torch.compile(lambda z: loop(compiled, z), fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x), loop(eager, x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("config", [SHIPPED, {"set_alpha_to_one": False}], ids=label)
def test_a_graph_draws_as_the_original_does(config: dict[str, Any], backend: str) -> None:
    """The last step is of the first order, and draws once."""
    original, compiled = both(CogVideoXDPMScheduler, config)
    ends = []
    for scheduler in (original, compiled):
        torch.compiler.reset()
        torch.manual_seed(0)

        def loop(x: Tensor, scheduler: Any = scheduler) -> Tensor:
            old, times = None, scheduler.timesteps
            for k in range(6):
                x, old = scheduler.step(torch.tanh(x), old, times[k], times[k - 1] if k else None, x)
            return x

        run = loop if scheduler is original else torch.compile(loop, fullgraph=True, backend=backend)
        ends.append((run(begin()), torch.get_rng_state()))
    torch.testing.assert_close(ends[1][0], ends[0][0])
    assert torch.equal(ends[1][1], ends[0][1])


def test_what_is_not_covered_runs_the_original_and_says_so_once() -> None:
    original, ours = both(CogVideoXDPMScheduler, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for scheduler in (original, ours):
            scheduler.config.prediction_type = "nonsense"
            for _ in range(2):
                with pytest.raises(ValueError, match="prediction_type given as nonsense"):
                    scheduler.step(begin(), None, scheduler.timesteps[0], None, begin())
    assert len([w for w in caught if "is not accelerated" in str(w.message)]) == 1
