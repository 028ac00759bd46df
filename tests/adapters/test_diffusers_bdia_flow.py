"""BDIA on rectified flows as a diffusers scheduler: its equations, and SD3's and Flux's pipelines both ways."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from bicm_diffusion import (
    RetraceWarning,
    Schedule,
    bdia_invert,
    bdia_sample,
    load_pair,
    save_pair,
)
from bicm_diffusion.adapters.diffusers import (
    BDIADDIMScheduler,
    BDIAFlowMatchScheduler,
    accelerate_scheduler,
    from_diffusers,
    is_accelerated,
)
from tests.support.diffusers_observed import label

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(256).round() / 256  # on the grid


def model(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(0.7 * x.double() + 0.001 * float(t)).to(x.dtype)


def run(scheduler: Any, x: Tensor, model: Callable[[Tensor, Any], Tensor] = model) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
    return x


def loop(scheduler: Any, x: Tensor, **timesteps: Any) -> Tensor:
    """As a pipeline runs a scheduler, which copies what a loop starts from."""
    scheduler.set_timesteps(**(timesteps or {"num_inference_steps": 8}))
    return run(scheduler, x * 1.0)


def schedule_of(scheduler: Any) -> Schedule:
    sigmas, times = scheduler.sigmas.tolist()[::-1], scheduler.timesteps.tolist()[::-1]
    return Schedule((times[0], *times), [1.0 - s for s in sigmas], sigmas, flow=True)


#: Configurations, and arguments of `set_timesteps`.
LEVELS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"num_inference_steps": 8}),
    ({"shift": 3.0}, {"num_inference_steps": 8}),
    ({"use_dynamic_shifting": True}, {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 1.15}),
    ({"shift": 3.0, "use_karras_sigmas": True}, {"num_inference_steps": 8}),
    ({"shift_terminal": 0.1, "time_shift_type": "linear", "use_dynamic_shifting": True}, {"sigmas": [1, 0.5], "mu": 2}),
    ({}, {"timesteps": [900.0, 400.0, 100.0], "sigmas": [1.0, 0.6, 0.2]}),
    ({"num_train_timesteps": 500, "use_exponential_sigmas": True}, {"num_inference_steps": 8}),
]
levels = pytest.mark.parametrize(("config", "timesteps"), LEVELS, ids=label)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
@levels
def test_equals_the_library_s_sampler_both_ways(config: Any, timesteps: Any, gamma: float) -> None:
    x = X.double()
    scheduler = BDIAFlowMatchScheduler(gamma=gamma, exact=False, **config)
    scheduler.set_timesteps(**timesteps)
    schedule = schedule_of(scheduler)
    options: Any = {"gamma": gamma, "exact": False, "prediction": "flow"}
    expected = bdia_sample(lambda z, t: model(z, t[0]), x, schedule, **options)
    z = run(scheduler, x)
    torch.testing.assert_close(z, expected.z, rtol=0, atol=1e-11)
    torch.testing.assert_close(scheduler.last_sample, expected.previous, rtol=0, atol=1e-11)
    scheduler.set_timesteps(**timesteps, inverse=True)
    expected = bdia_invert(lambda z, t: model(z, t[0]), x, schedule, **options)
    torch.testing.assert_close(run(scheduler, x), expected.z, rtol=0, atol=1e-11 * expected.z.abs().max().item())


@levels
def test_gamma_zero_is_euler_s_method(config: Any, timesteps: Any) -> None:
    ends = []
    for scheduler in (BDIAFlowMatchScheduler(gamma=0.0, **config), FlowMatchEulerDiscreteScheduler(**config)):
        ends.append(loop(scheduler, X, **timesteps))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gamma", [1.0, 0.96, 0.5])
@pytest.mark.parametrize(("config", "timesteps"), [*LEVELS, ({"invert_sigmas": True}, {"num_inference_steps": 8})])
def test_integers_retrace_a_trajectory_to_the_bit(config: Any, timesteps: Any, gamma: float, dtype: Any) -> None:
    x = X.to(dtype)
    scheduler = BDIAFlowMatchScheduler(gamma=gamma, **config)
    z = loop(scheduler, x, **timesteps)
    assert z.dtype == dtype and (z - x).abs().max() > 0.1
    for end in (x, z, x):
        assert torch.equal(loop(scheduler, scheduler.turn_round(), **timesteps), end)
    # And from the data first.
    scheduler = BDIAFlowMatchScheduler(gamma=gamma, **config)
    assert scheduler.turn_round() is None
    z = loop(scheduler, x, **timesteps)
    assert torch.equal(loop(scheduler, scheduler.turn_round(), **timesteps), x)


def test_the_two_ways_pass_the_same_levels() -> None:
    scheduler = BDIAFlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    down, times = scheduler.sigmas.tolist(), scheduler.timesteps.tolist()
    scheduler.set_timesteps(5, inverse=True)
    assert scheduler.sigmas.tolist() == down[::-1] and scheduler.timesteps.tolist() == [times[-1], *times[:0:-1]]
    z = run(scheduler, X)
    scheduler.set_timesteps(5, last_sample=z)
    assert scheduler.sigmas.tolist() == down[1:] and scheduler.timesteps.tolist() == times[1:]
    x, noise, t = torch.ones(2, 3), torch.zeros(2, 3), scheduler.timesteps[:2]
    for begin in (None, 1):
        euler, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), BDIAFlowMatchScheduler(shift=3.0)
        for s in (euler, ours):
            s.set_timesteps(5)
            if begin is not None:
                s.set_begin_index(begin)
        assert torch.equal(ours.scale_noise(x, t, noise), euler.scale_noise(x, t, noise))


# --- what is retraced, and what is refused ----------------------------------------------------------------------------
each_kind = pytest.mark.parametrize("exact", [True, False])


@each_kind
def test_a_stored_pair_is_retraced_by_another_scheduler(exact: bool, tmp_path: Path) -> None:
    scheduler = BDIAFlowMatchScheduler(gamma=0.75, exact=exact, shift=3.0)
    loop(scheduler, X)
    save_pair(scheduler.pair, tmp_path / "pair.safetensors")
    buffer = io.BytesIO()
    torch.save(scheduler.pair, buffer)
    buffer.seek(0)
    for pair in (load_pair(tmp_path / "pair.safetensors"), torch.load(buffer, weights_only=True), scheduler.pair):
        other = BDIAFlowMatchScheduler(gamma=0.75, exact=exact, shift=3.0)
        back = loop(other, other.turn_round(pair))
        assert torch.equal(back, X) if exact else (back - X).abs().max() < 1e-2


@each_kind
def test_another_configuration_is_refused(exact: bool) -> None:
    scheduler = BDIAFlowMatchScheduler(gamma=0.75, exact=exact, use_dynamic_shifting=True)
    loop(scheduler, X, num_inference_steps=8, mu=0.5)
    pair = scheduler.pair
    with pytest.raises(ValueError, match=r"gamma: expected (3/4 = )?0.75, which the pair pair was made with"):
        BDIAFlowMatchScheduler(gamma=0.5, exact=exact).turn_round(pair)
    with pytest.raises(ValueError, match="pair: turn_round expected a pair of BDIADDIMScheduler, got one of BDIAFlow"):
        BDIADDIMScheduler(gamma=0.75, exact=exact).turn_round(pair)
    for config, timesteps in (({"shift": 3.0}, {}), ({"use_dynamic_shifting": True}, {"mu": 0.6})):
        other = BDIAFlowMatchScheduler(gamma=0.75, exact=exact, **config)
        other.turn_round(pair)
        with pytest.raises(ValueError, match=r"scheduler: expected sigmas\[\d+\] = "):
            other.set_timesteps(8, **timesteps)
    scheduler.turn_round()
    for timesteps in ({"num_inference_steps": 9}, {"sigmas": [1.0, 0.5]}):
        with pytest.raises(ValueError, match=r"num_inference_steps: expected 8, as the pair was made in, got [92]"):
            scheduler.set_timesteps(**timesteps, mu=0.5)
    assert torch.equal(loop(scheduler, scheduler.turn_round(), num_inference_steps=8, mu=0.5), X) == exact
    theirs = BDIADDIMScheduler(gamma=0.75, exact=exact)
    theirs.set_timesteps(4)
    run(theirs, X)
    with pytest.raises(ValueError, match="pair: turn_round expected a pair of BDIAFlowMatchScheduler, got one of BDIA"):
        BDIAFlowMatchScheduler(gamma=0.75, exact=exact).turn_round(theirs.pair)


def test_what_is_out_of_range_is_named() -> None:
    for gamma in (1.5, -0.1, 1e-4):
        with pytest.raises(ValueError, match="gamma: "):
            BDIAFlowMatchScheduler(gamma=gamma)
    with pytest.raises(ValueError, match="timesteps: expected a call of set_timesteps"):
        BDIAFlowMatchScheduler().step(X, 0.0, X)
    scheduler = BDIAFlowMatchScheduler(gamma=0.0)
    with pytest.raises(ValueError, match="inverse: expected gamma > 0"):
        scheduler.set_timesteps(4, inverse=True)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep: expected one of"):
        scheduler.step(X, 749.0, X)
    with pytest.raises(ValueError, match="per_token_timesteps: expected None"):
        scheduler.step(X, scheduler.timesteps[0], X, per_token_timesteps=torch.ones(2, 3))
    with pytest.raises(ValueError, match="`mu` must be passed"):
        BDIAFlowMatchScheduler(use_dynamic_shifting=True).set_timesteps(4)


def test_what_was_changed_since_set_timesteps_is_refused() -> None:
    changes: dict[str, Callable[[Any], object]] = {
        "timesteps": lambda s: s.timesteps.mul_(0.5),
        "sigmas": lambda s: s.sigmas.mul_(0.99),
        "config": lambda s: s.register_to_config(gamma=0.5),
    }
    for name, change in changes.items():
        scheduler = BDIAFlowMatchScheduler()
        scheduler.set_timesteps(8)
        change(scheduler)
        with pytest.raises(ValueError, match=f"{name}: expected .* changed since"):
            run(scheduler, X)
        loop(scheduler, X)


def test_what_does_not_come_back_is_reported() -> None:
    scheduler = BDIAFlowMatchScheduler()
    loop(scheduler, X)
    inner = scheduler.turn_round()
    scheduler.set_timesteps(8)
    with pytest.warns(RetraceWarning, match="BDIAFlowMatchScheduler: 2 of 2 samples .* did not return") as caught:
        run(scheduler, inner, lambda x, t: 1.01 * model(x, t))
    assert caught[0].filename == __file__


def test_configurations_of_other_schedulers(tmp_path: Path) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=2.0)
    ours = BDIAFlowMatchScheduler.from_config(theirs.config, gamma=0.5)
    assert ours.config.gamma == 0.5 and ours.config.exact and ours.config.max_shift == 2.0
    assert torch.equal(ours.sigmas, theirs.sigmas)
    heun = BDIAFlowMatchScheduler.from_config(FlowMatchHeunDiscreteScheduler(shift=5.0).config)
    assert heun.config.shift == 5.0
    ours.save_config(tmp_path)
    assert dict(BDIAFlowMatchScheduler.from_pretrained(tmp_path).config) == {**ours.config}
    with pytest.raises(ValueError, match="config: expected one of flow matching, with a shift, got one with num_train"):
        BDIAFlowMatchScheduler.from_config(DDIMScheduler().config)
    with pytest.raises(TypeError, match=r"config: expected a scheduler's configuration, got .*; pass its .config"):
        BDIAFlowMatchScheduler.from_config(theirs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        BDIAFlowMatchScheduler.from_config(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config)
    (told,) = [one for one in caught if "ignores" in str(one.message)]
    assert "BDIAFlowMatchScheduler ignores stochastic_sampling" in str(told.message) and told.filename == __file__
    assert not is_accelerated(ours) and isinstance(ours, FlowMatchEulerDiscreteScheduler)
    with pytest.raises(TypeError, match="its steps are fused already"):
        accelerate_scheduler(ours)


# --- networks and pipelines -------------------------------------------------------------------------------------------
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
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip


MISSING = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
SHAPES = {StableDiffusion3Pipeline: (2, 4, 8, 8), FluxPipeline: (2, 16, 4)}


def pipeline(cls: type[Any], scheduler: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline of real classes, the smallest that there are; no tokenizers, for prompts come as embeddings."""
    pytest.importorskip("transformers", reason="pipelines with text encoders need it")
    more = {} if cls is FluxPipeline else dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    network = (flux() if cls is FluxPipeline else sd3()).to(dtype)
    made = cls(transformer=network, scheduler=scheduler, **MISSING, **more)
    made.set_progress_bar_config(disable=True)
    return made


def images(made: Any, **arguments: Any) -> Tensor:
    """Latents of two prompts, with guidance."""
    generator = torch.Generator().manual_seed(1)
    dtype = made.transformer.dtype
    prompts, pooled = (torch.randn(2, *shape, generator=generator).to(dtype) for shape in ((5, 8), (8,)))
    embeddings = {"prompt_embeds": prompts, "pooled_prompt_embeds": pooled}
    negative = {"negative_prompt_embeds": 0 * prompts, "negative_pooled_prompt_embeds": 0 * pooled}
    if isinstance(made, FluxPipeline):
        negative["true_cfg_scale"] = 2.0
    defaults = {"num_inference_steps": 6, "height": 64, "width": 64, "output_type": "latent"}
    return made(**embeddings, **negative, **{**defaults, **arguments}).images


@pytest.mark.parametrize("cls", [StableDiffusion3Pipeline, FluxPipeline], ids=label)
@pytest.mark.parametrize("gamma", [1.0, 0.96, 0.75])
@pytest.mark.parametrize("config", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latents_go_to_noise_and_back_to_the_bit(cls: type[Any], gamma: float, config: Any, dtype: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    image = (torch.randint(-255, 256, SHAPES[cls], generator=generator) / 256).to(dtype)
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    made = pipeline(cls, BDIAFlowMatchScheduler.from_config(theirs.config, gamma=gamma), dtype)
    assert made.scheduler.turn_round() is None
    noise = images(made, latents=image)
    assert noise.isfinite().all() and (noise - image).abs().max() > 0.1
    assert torch.equal(images(made, latents=made.scheduler.turn_round()), image)
    # From noise to an image and back.
    made = pipeline(cls, BDIAFlowMatchScheduler.from_config(theirs.config, gamma=gamma), dtype)
    sample = images(made, latents=image)
    assert sample.isfinite().all() and torch.equal(images(made, latents=made.scheduler.turn_round()), image)


@pytest.mark.parametrize("cls", [StableDiffusion3Pipeline, FluxPipeline], ids=label)
def test_gamma_zero_makes_the_images_of_euler_s_method(cls: type[Any], tmp_path: Path) -> None:
    latents = torch.randn(SHAPES[cls], generator=torch.Generator().manual_seed(2))
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = images(pipeline(cls, theirs), latents=latents)
    made = pipeline(cls, BDIAFlowMatchScheduler.from_config(theirs.config, gamma=0.0))
    torch.testing.assert_close(images(made, latents=latents), expected, rtol=1e-4, atol=1e-4)
    made.save_pretrained(tmp_path)
    more = dict.fromkeys(("image_encoder", "feature_extractor"))
    more |= {} if cls is FluxPipeline else dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    loaded = cls.from_pretrained(tmp_path, local_files_only=True, **MISSING, **more)
    assert type(loaded.scheduler) is BDIAFlowMatchScheduler and loaded.scheduler.config.gamma == 0.0


@pytest.mark.parametrize("network", ["sd3", "flux"])
def test_networks_go_the_way_of_the_library_s_sampler(network: str) -> None:
    """`from_diffusers` reads the same levels, and asks the network what the pipelines ask."""
    conditions = {"encoder_hidden_states": torch.ones(2, 5, 8), "pooled_projections": torch.ones(2, 8)}
    if network == "flux":
        ids = {"txt_ids": torch.zeros(5, 3), "img_ids": torch.cartesian_prod(*[torch.arange(4.0)] * 2)}
        ids["img_ids"] = torch.nn.functional.pad(ids["img_ids"], (1, 0))
        conditions |= {**ids, "guidance": torch.full((2,), 3.5)}
    transformer, x = (sd3(), X[:, :1].expand(2, 4, 8, 8)) if network == "sd3" else (flux(), X.reshape(2, -1, 4)[:, :16])
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    net, schedule, prediction = from_diffusers(transformer, theirs, steps=6)
    expected = bdia_sample(net, x, schedule, prediction=prediction, extra_args=conditions, exact=False)
    scheduler = BDIAFlowMatchScheduler.from_config(theirs.config, exact=False)
    scheduler.set_timesteps(6)
    told = 1.0 if network == "sd3" else 1e-3
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = transformer(x, timestep=(told * t).expand(2), return_dict=False, **conditions)[0]
            x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(x, expected.z, rtol=1e-4, atol=1e-4)


def test_a_loop_may_start_half_way() -> None:
    ends = []
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), BDIAFlowMatchScheduler(shift=3.0, gamma=0.0)):
        generator = torch.Generator().manual_seed(4)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        scheduler.set_timesteps(6)
        begun = scheduler.timesteps[2:]
        x = scheduler.scale_noise(X[:, :1].expand(2, 4, 8, 8), begun[:1].repeat(2), latents)
        scheduler.set_begin_index(2)
        for t in begun:
            x = scheduler.step(model(x, t), t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
