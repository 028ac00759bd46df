"""`from_diffusers`: this package's samplers on diffusers' networks go where diffusers' own loops go."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from bicm_diffusion import (
    Preconditioned,
    bdia_invert,
    bdia_sample,
    ddim_sample,
    ddpm_timesteps,
    edict_invert,
    edict_sample,
    edm_sample,
    flow_schedule,
)
from bicm_diffusion.adapters.diffusers import from_diffusers
from tests.support.diffusers_cases import first_level, model_input
from tests.support.diffusers_observed import label

STEPS = 8


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks).eval()


def sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4,
    ).eval()  # fmt: skip


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def loop(network: Any, scheduler: Any, x: Tensor, told: float = 1.0, **conditions: Any) -> Tensor:
    """A plain loop as pipelines write it."""
    scheduler.set_timesteps(STEPS)
    x = x * first_level(scheduler)
    with torch.no_grad():
        for t in scheduler.timesteps:
            times = (t * told).to(torch.float32).expand(len(x))
            output = network(model_input(scheduler, x, t), timestep=times, return_dict=False, **conditions)[0]
            x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


STABLE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FIRST_ORDER = [
    *((DDIMScheduler, {"clip_sample": False, "prediction_type": p}) for p in ("epsilon", "sample", "v_prediction")),
    (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **STABLE}),
    (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    (DPMSolverMultistepScheduler, {"solver_order": 1}),
    (
        DPMSolverMultistepScheduler,
        {"solver_order": 1, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    (FlowMatchEulerDiscreteScheduler, {}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "use_karras_sigmas": True}),
]


@pytest.mark.parametrize(("cls", "config"), FIRST_ORDER, ids=label)
def test_ddim_goes_where_first_order_loops_go(unet: UNet2DModel, cls: type[Any], config: dict[str, Any]) -> None:
    scheduler, x = cls(**config), noise(2, 3, 8, 8)
    expected = loop(unet, scheduler, x)
    model, schedule, prediction = from_diffusers(unet, cls(**config), steps=STEPS)
    got = ddim_sample(model, x, schedule, prediction=prediction)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("karras", [False, True])
def test_euler_s_states_are_these_over_alpha(unet: UNet2DModel, prediction_type: str, karras: bool) -> None:
    config = {"prediction_type": prediction_type, "use_karras_sigmas": karras}
    x = noise(2, 3, 8, 8)
    scheduler = EulerDiscreteScheduler(**config)
    expected = loop(unet, scheduler, x)
    model, schedule, prediction = from_diffusers(unet, EulerDiscreteScheduler(**config), steps=STEPS)
    z = x * first_level(scheduler) * schedule.alpha[-1]
    got = ddim_sample(model, z, schedule, prediction=prediction)  # sigma_0 = 0: the same at the end
    torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler], ids=label)
@pytest.mark.parametrize(
    "config", [{}, {"prediction_type": "v_prediction"}, {"sigma_data": 0.7, "final_sigmas_type": "sigma_min"}]
)
def test_edm(unet: UNet2DModel, cls: type[Any], config: dict[str, Any]) -> None:
    if cls is EDMDPMSolverMultistepScheduler:
        config = {**config, "solver_order": 1}
    x, scheduler = noise(2, 3, 8, 8), cls(**config)
    expected = loop(unet, scheduler, x)
    model, schedule, prediction = from_diffusers(unet, cls(**config), steps=STEPS)
    assert prediction == Preconditioned("edm", scheduler.config.sigma_data) and schedule.times == schedule.sigma
    z = x * first_level(scheduler)
    got = edm_sample(model, z, schedule, solver="euler", prediction=prediction)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=5e-5 * expected.abs().max().item())
    churned = edm_sample(model, z, schedule, prediction=prediction, churn=1.0, seed=0)
    assert churned.isfinite().all()


def test_consistency_models(unet: UNet2DModel) -> None:
    """The denoised sample that the scheduler forms is the one that the reading stands for."""
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(1)
    x, t = noise(2, 3, 8, 8), scheduler.timesteps[0]
    z = x * first_level(scheduler)
    with torch.no_grad():
        output = unet(scheduler.scale_model_input(z, t), timestep=t.float().expand(2), return_dict=False)[0]
        expected = scheduler.step(output, t, z).prev_sample
    model, schedule, prediction = from_diffusers(unet, CMStochasticIterativeScheduler(), steps=4)
    assert prediction == Preconditioned("cm", 0.5, 0.002) and schedule.sigma[-1] == pytest.approx(80.0)
    sigma = schedule.sigma[-1]
    scaled = z / math.sqrt(sigma**2 + 0.5**2)
    with torch.no_grad():
        F = model(scaled, torch.full((2,), sigma))
    denoised = 0.25 / ((sigma - 0.002) ** 2 + 0.25) * z + 0.5 * (sigma - 0.002) / math.sqrt(sigma**2 + 0.25) * F
    torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-4)
    assert ddim_sample(model, z, schedule, prediction=prediction).isfinite().all()


ALL = [
    (DDPMScheduler, {}), (PNDMScheduler, {}), (HeunDiscreteScheduler, {}), (KDPM2DiscreteScheduler, {}),
    (UniPCMultistepScheduler, {}), (DDIMScheduler, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing"}), (FlowMatchHeunDiscreteScheduler, {"shift": 3.0}), *FIRST_ORDER[3:],
    (EDMEulerScheduler, {}), (CMStochasticIterativeScheduler, {}), (UnCLIPScheduler, {}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "config"), ALL, ids=label)
@pytest.mark.parametrize("method", ["bdia", "edict"])
def test_exact_round_trips(unet: UNet2DModel, cls: type[Any], config: dict[str, Any], method: str) -> None:
    model, schedule, prediction = from_diffusers(unet, cls(**config), steps=STEPS)
    image = torch.randint(-255, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(2)) / 256
    invert, sample = (bdia_invert, bdia_sample) if method == "bdia" else (edict_invert, edict_sample)
    pair = invert(model, image, schedule, prediction=prediction)
    assert torch.equal(sample(model, pair, schedule, prediction=prediction).z, image)


@pytest.mark.parametrize(
    ("cls", "config", "steps"),
    [
        (HeunDiscreteScheduler, {}, STEPS),
        (KDPM2DiscreteScheduler, {}, STEPS),
        (PNDMScheduler, {"skip_prk_steps": True}, STEPS - 1),  # its end is the lowest level that it visits
    ],
    ids=label,
)
def test_levels_that_are_visited_twice_are_one(
    unet: UNet2DModel, cls: type[Any], config: dict[str, Any], steps: int
) -> None:
    scheduler = cls(**config)
    _, schedule, _ = from_diffusers(unet, scheduler, steps=STEPS)
    assert schedule.steps == steps
    for t, alpha in zip(schedule.times[1:], schedule.alpha[1:], strict=True):
        assert alpha**2 == pytest.approx(scheduler.alphas_cumprod[round(t)].item(), rel=0.02)


SPACINGS = ("leading", "linspace", "trailing")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("to_one", [False, True])
def test_middles_of_runge_kutta_steps_are_no_levels(unet: UNet2DModel, spacing: str, to_one: bool) -> None:
    config: dict[str, Any] = {"timestep_spacing": spacing, "set_alpha_to_one": to_one}
    for steps in (4, 5, 10, 50):
        by_rk, by_plms = (
            from_diffusers(unet, PNDMScheduler(**config, skip_prk_steps=skips), steps=steps)[1]
            for skips in (False, True)
        )
        assert by_rk == by_plms and by_rk.steps <= steps
        visited = ddpm_timesteps(steps, spacing).tolist()  # type: ignore[arg-type]
        assert [t for t in by_rk.times if t > 0] == [t for t in visited if t > 0]


TRAILING = (
    DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler,
    PNDMScheduler, UniPCMultistepScheduler,
)  # fmt: skip


@pytest.mark.parametrize("cls", TRAILING, ids=lambda cls: cls.__name__)
def test_a_trailing_range_with_one_number_too_many_has_no_level_of_it(unet: UNet2DModel, cls: type[Any]) -> None:
    """For 61 steps NumPy's range has -1 as well, whose level would be the noisiest one, or the first step's."""
    config = {"timestep_spacing": "trailing"}
    _, schedule, _ = from_diffusers(unet, cls(**config), steps=61)
    assert schedule.times[-61:] == tuple(map(float, ddpm_timesteps(61, "trailing").tolist()))
    assert schedule.steps == 61 and schedule.times[0] <= 0.0


def test_logarithms_of_levels_are_no_steps(unet: UNet2DModel) -> None:
    scheduler = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    _, schedule, _ = from_diffusers(unet, scheduler, steps=STEPS)
    scheduler.set_timesteps(STEPS)
    assert schedule.steps == STEPS and list(schedule.times[:0:-1]) == scheduler.timesteps.tolist()
    assert min(schedule.times[1:]) < 0.0


def test_sd3_and_flux_shaped_networks() -> None:
    """Their own conditions and units of time, and every bit back."""
    latent = torch.randint(-255, 256, (2, 4, 8, 8), generator=torch.Generator().manual_seed(2)) / 256
    tokens = latent.flatten(2).mT.contiguous()
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
    pooled, text = noise(2, 8), noise(2, 3, 8)
    shared = {"pooled_projections": pooled, "encoder_hidden_states": text}
    cases: list[tuple[Any, Tensor, dict[str, Any], float]] = [
        (sd3(), latent, shared, 1.0),
        (flux(), tokens, {**shared, "img_ids": ids, "txt_ids": torch.zeros(3, 3)}, 1e-3),
    ]
    for network, image, conditions, told in cases:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        model, schedule, prediction = from_diffusers(network, scheduler, steps=STEPS)
        x = noise(*image.shape)
        expected = loop(network, scheduler, x, told, **conditions)
        got = ddim_sample(model, x, schedule, prediction=prediction, extra_args=conditions)
        torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5)
        for levels in (schedule, flow_schedule(STEPS)):
            options: dict[str, Any] = {"prediction": prediction, "extra_args": conditions, "gamma": (3, 4)}
            pair = bdia_invert(model, image, levels, **options)
            assert torch.equal(bdia_sample(model, pair, levels, **options).z, image)


def test_a_half_precision_network_meets_a_float32_state() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=2,
        out_channels=8, mid_block_type=None,
    ).to(torch.bfloat16)  # fmt: skip
    model, schedule, prediction = from_diffusers(unet, DDIMScheduler(**STABLE), steps=4)
    conditions = {"encoder_hidden_states": noise(2, 3, 8).bfloat16()}
    out = ddim_sample(model, noise(2, 4, 8, 8), schedule, prediction=prediction, extra_args=conditions)
    assert out.dtype == torch.float32 and out.shape == (2, 4, 8, 8) and out.isfinite().all()


def test_what_cannot_be_bridged_says_so(unet: UNet2DModel) -> None:
    with pytest.raises(TypeError, match="network: expected a pipeline's unet"):
        from_diffusers(DDIMPipeline(unet, DDIMScheduler()), DDIMScheduler(), steps=4)
    with pytest.raises(TypeError, match="network: expected a U-Net"):
        from_diffusers(nn.Identity(), DDIMScheduler(), steps=4)
    with pytest.raises(TypeError, match="scheduler: expected one of diffusers"):
        from_diffusers(unet, 3, steps=4)
    with pytest.raises(ValueError, match=r"set_timesteps\(4, mu=\.\.\.\)"):
        from_diffusers(unet, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), steps=4)
    with pytest.raises(ValueError, match="invert_sigmas=True"):
        from_diffusers(unet, FlowMatchEulerDiscreteScheduler(invert_sigmas=True), steps=4)
    with pytest.raises(ValueError, match="got 'nonsense'"):
        from_diffusers(unet, DDIMScheduler(prediction_type="nonsense"), steps=4)


def test_timesteps_that_were_set_are_kept(unet: UNet2DModel) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(4, mu=1.15)
    before = scheduler.sigmas.clone()
    _, schedule, _ = from_diffusers(unet, scheduler, steps=4)
    assert schedule.sigma == tuple(reversed(before.tolist())) and torch.equal(scheduler.sigmas, before)
