"""Accelerated diffusers schedulers beside the originals, and both beside the originals in float64."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    IPNDMScheduler,
    LCMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

import bicm_kernels as bk
from bicm_diffusion.adapters.diffusers import accelerate_scheduler, accelerated_class
from bicm_diffusion.adapters.diffusers.scheduler import Accelerated
from bicm_diffusion.keys import SCHEDULER
from tests.support.diffusers_cases import (
    CASES,
    DEFAULTS,
    STEPS,
    Case,
    assert_near_float64,
    generator,
    model_input,
    name_of,
    network,
    pair,
    signature,
    start,
    trajectory,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_no_further_from_float64_than_twice_the_original(case: Case, dtype: torch.dtype) -> None:
    assert_near_float64(case, dtype, "cpu")


def public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize("case", DEFAULTS, ids=name_of)
def test_same_class_configuration_and_signatures(case: Case, tmp_path: Path) -> None:
    original, ours = pair(case)
    cls = case[0]
    assert isinstance(ours, cls) and isinstance(ours, Accelerated)
    assert dict(ours.config) == dict(original.config) and ours.order == original.order
    for name in ("step", "set_timesteps", "scale_model_input", "scale_noise", "add_noise"):
        assert hasattr(ours, name) == hasattr(original, name)
        if not hasattr(original, name):
            continue
        theirs, mine = (inspect.signature(getattr(s, name)).parameters.values() for s in (original, ours))
        assert [(p.name, p.default, p.kind) for p in mine] == [(p.name, p.default, p.kind) for p in theirs]
    ours.save_pretrained(tmp_path)
    assert public(cls.from_pretrained(tmp_path).config) == public(original.config)
    again = type(ours).from_pretrained(tmp_path)
    assert isinstance(again, Accelerated) and public(again.config) == public(original.config)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        x = start(ours, torch.float32)
        options = {"generator": generator()} if "generator" in signature(original) else {}
        expected = {"generator": generator()} if options else {}
        assert torch.equal(trajectory(twin, x, **options), trajectory(copy.deepcopy(ours), x, **expected))


def test_the_given_scheduler_is_left_as_it_is_and_its_state_goes_on() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(STEPS)
    x = start(scheduler, torch.float32)
    half = scheduler.timesteps[: STEPS // 2]
    for k, t in enumerate(half):
        x = scheduler.step(network(x, k), t, x).prev_sample
    ours = accelerate_scheduler(scheduler)
    assert type(scheduler) is DPMSolverMultistepScheduler and ours.step_index == STEPS // 2
    y = x
    for k, t in enumerate(scheduler.timesteps[STEPS // 2 :]):
        x, y = (s.step(network(z, k), t, z).prev_sample for s, z in ((scheduler, x), (ours, y)))
    torch.testing.assert_close(y, x)


@pytest.mark.parametrize("case", DEFAULTS, ids=name_of)
def test_generators_draw_as_they_would_for_the_original(case: Case) -> None:
    original, ours = pair(case)
    if "generator" not in signature(original):
        pytest.skip("draws nothing")
    generators = [[generator(7), generator(8)], [generator(7), generator(8)]]
    arguments = {"eta": 1.0} if case[0] is DDIMScheduler else {}
    x = start(original, torch.float32)
    theirs, mine = (
        trajectory(s, x, generator=g, **arguments) for s, g in zip((original, ours), generators, strict=True)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert all(torch.equal(g.get_state(), h.get_state()) for g, h in zip(*generators, strict=True))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_another_number_of_generators_does_what_the_original_does(count: int) -> None:
    case: Case = (LCMScheduler, {}, {})
    ends: list[tuple[str, list[bytes]]] = []
    for scheduler in pair(case):
        generators, x = [generator(i) for i in range(count)], start(scheduler, torch.float32, (4, 4, 8, 8))
        said = ""
        try:
            scheduler.step(x, scheduler.timesteps[0], x, generator=generators)
        except IndexError as error:
            said = str(error)
        ends.append((said, [g.get_state().numpy().tobytes() for g in generators]))
    assert ends[0] == ends[1] and bool(ends[0][0]) == (count == 3)


@pytest.mark.parametrize("case", DEFAULTS, ids=name_of)
def test_keyed_noise_of_a_sample_depends_on_its_own_generator_alone(case: Case) -> None:
    original, _ = pair(case)
    if "generator" not in signature(original):
        pytest.skip("draws nothing")
    arguments = {"eta": 1.0} if case[0] is DDIMScheduler else {}
    x = start(original, torch.float32, (5, 4, 16, 16))
    seeds = [3, 1, 4, 15, 9]
    together = trajectory(pair(case, noise="keyed")[1], x, generator=[generator(s) for s in seeds], **arguments)
    alone = trajectory(pair(case, noise="keyed")[1], x[3:4], generator=[generator(15)], **arguments)
    assert torch.equal(together[3:4], alone)


def test_keyed_noise_is_the_library_s_noise() -> None:
    ours = accelerate_scheduler(DDIMScheduler(), noise="keyed", seed=11, sample_id=6)
    ours.set_timesteps(STEPS)
    x = start(ours, torch.float32)
    t = ours.timesteps[3]
    quiet, noisy = (ours.step(x, t, x, eta=eta).prev_sample for eta in (0.0, 1e-3))
    expected = bk.normal(x.shape, seed=bk.fold_in(11, SCHEDULER), step=int(t), sample_id=6)
    assert torch.corrcoef(torch.stack([(noisy - quiet).flatten(), expected.flatten()]))[0, 1] > 0.999
    seeded = ours.step(x, t, x, eta=1e-3, generator=generator(2)).prev_sample
    expected = bk.normal(x.shape, seed=bk.fold_in(2, SCHEDULER), step=int(t), sample_id=6)
    assert torch.corrcoef(torch.stack([(seeded - quiet).flatten(), expected.flatten()]))[0, 1] > 0.999


@pytest.mark.parametrize("case", DEFAULTS, ids=name_of)
@pytest.mark.parametrize("announced", [True, False])
def test_a_loop_may_start_half_way(case: Case, announced: bool) -> None:
    original, ours = pair(case, noise="generator")
    arguments = {"generator": None} if "generator" in signature(original) else {}
    x = start(original, torch.float32)
    ends = []
    for s in (original, ours):
        if announced and hasattr(s, "set_begin_index"):
            s.set_begin_index(4)
        z = x
        torch.manual_seed(0)
        for k, t in enumerate(s.timesteps[4:]):
            z = s.step(network(model_input(s, z, t), k), t, z, **arguments).prev_sample
        ends.append(z)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4 * ends[0].abs().max().item())


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (DDIMScheduler, {"thresholding": True}),
        (LCMScheduler, {"thresholding": True}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ],
)
def test_what_is_not_covered_runs_the_original_and_says_so_once(cls: type[Any], config: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        original, ours = pair((cls, config, {}))
        x = start(original, torch.float32)
        torch.manual_seed(0)
        expected = trajectory(original, x)
        torch.manual_seed(0)
        assert torch.equal(trajectory(ours, x), expected)
    assert len([w for w in caught if "is not accelerated" in str(w.message)]) == 1


def test_a_sample_that_was_changed_is_scaled_again() -> None:
    _, ours = pair((EulerDiscreteScheduler, {}, {}))
    x = start(ours, torch.float32)
    for k, t in enumerate(ours.timesteps[:3]):
        x = ours.step(network(model_input(ours, x, t), k), t, x).prev_sample
        x.mul_(0.5)
    t = ours.timesteps[3]
    expected = x / (float(ours.sigmas[3]) ** 2 + 1) ** 0.5
    torch.testing.assert_close(model_input(ours, x, t), expected)


@pytest.mark.parametrize("case", DEFAULTS, ids=name_of)
def test_in_inference_mode(case: Case) -> None:
    original, ours = pair(case)
    x = start(original, torch.float32)
    ends = []
    for s in (original, ours):
        torch.manual_seed(0)
        with torch.inference_mode():
            ends.append(trajectory(s, x))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4 * ends[0].abs().max().item())


def test_levels_of_zero_give_the_original_s_infinities() -> None:
    ends = []
    for s in (EulerDiscreteScheduler(), accelerate_scheduler(EulerDiscreteScheduler())):
        s.set_timesteps(sigmas=[1.0, 0.0, 0.0])
        x = torch.ones(1, 2, 4, 4)
        for t in s.timesteps:
            s.set_begin_index(0 if s.step_index is None else s.step_index)
            x = s.step(0.5 * model_input(s, x, t), t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], equal_nan=True)


def test_a_schedule_that_was_written_to_is_read_again() -> None:
    original, ours = pair((EulerDiscreteScheduler, {}, {}))
    for s in (original, ours):
        s.sigmas[:-1] *= 0.9
    x = start(original, torch.float32)
    torch.testing.assert_close(trajectory(ours, x), trajectory(original, x), rtol=1e-4, atol=1e-4)


def test_zero_signal_gives_the_original_s_infinities() -> None:
    case = (DDIMScheduler, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}, {})
    original, ours = pair(case)
    x = start(original, torch.float32)
    t = original.timesteps[0]
    theirs, mine = (s.step(network(x, 0), t, x).prev_sample for s in (original, ours))
    assert not theirs.isfinite().all()
    torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("cls", [DDIMScheduler, CogVideoXDDIMScheduler])
def test_a_step_from_zero_signal_is_fused_where_x0_needs_none(cls: Any, prediction: str) -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    original, ours = pair((cls, {**config, "prediction_type": prediction}, {}))
    x = start(original, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [trajectory(scheduler, x) for scheduler in (original, ours)]
    assert original.alphas_cumprod[original.timesteps[0]] == 0 and results[0].isfinite().all()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    if cls is DDIMScheduler:
        t, m = int(original.timesteps[0]), network(x, 0)
        assert ours.step_with_log_prob(m, t, x, eta=0.5)[0].isfinite().all()
        ours = accelerate_scheduler(DDIMScheduler(**config))
        ours.set_timesteps(5)
        with pytest.raises(ValueError, match="timestep: expected levels where x0 can be read"):
            ours.step_with_log_prob(m, 999, x, eta=0.5)


def test_a_scheduler_in_another_is_no_longer_the_given_one() -> None:
    given = UniPCMultistepScheduler(solver_p=DDIMScheduler())
    ours = accelerate_scheduler(given)
    before = given.solver_p.timesteps
    ours.set_timesteps(7)
    assert given.solver_p.timesteps is before and len(ours.solver_p.timesteps) == 7


class NothingRead(TorchDispatchMode):
    """Raises where a value or a shape would have to come from the device."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("case", DEFAULTS, ids=name_of)
def test_a_step_reads_nothing_from_the_device(case: Case) -> None:
    original, ours = pair(case, noise="keyed")
    x = start(ours, torch.float32)
    with NothingRead():
        mine = trajectory(ours, x)
    assert mine.isfinite().all()
    with pytest.raises(AssertionError), NothingRead():
        trajectory(original, x)


def test_in_a_pipeline() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    pipeline = DDIMPipeline(unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for scheduler in (pipeline.scheduler, accelerate_scheduler(pipeline.scheduler)):
        pipeline.scheduler = scheduler
        run = pipeline(batch_size=2, num_inference_steps=4, eta=0.5, generator=generator(), output_type="np")
        images.append(torch.from_numpy(run.images))
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-5)


def test_other_schedulers_and_noises_are_refused() -> None:
    with pytest.raises(TypeError, match=r"IPNDMScheduler has no accelerated form.*expected one of DDIMScheduler"):
        accelerate_scheduler(IPNDMScheduler())
    with pytest.raises(ValueError, match="noise: expected 'generator' or 'keyed', got 'philox'"):
        accelerate_scheduler(DDIMScheduler(), noise="philox")
    cls = accelerated_class(DDIMScheduler)
    assert type(accelerate_scheduler(accelerate_scheduler(DDIMScheduler()))) is cls
