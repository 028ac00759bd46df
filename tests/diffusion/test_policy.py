"""Policies: coefficients against the publications' formulas, rollouts, and what training makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_diffusion import (
    Preconditioned,
    Schedule,
    ancestral_sample,
    ddim_sample,
    ddpm_schedule,
    flow_schedule,
    karras_schedule,
    keys,
    vp_schedule,
)
from bicm_diffusion.policy import (
    PolicyTable,
    Trajectory,
    cps_table,
    ddim_table,
    flow_grpo_table,
    group_advantages,
    policy_loss,
    recorded_log_prob,
    rollout,
    step_divergence,
)
from bicm_diffusion.policy.trajectory import joined
from tests.support.tensors import BF16, F16, F32, F64, Bits

TABLES: dict[str, Callable[..., PolicyTable]] = {
    "flow_grpo": lambda **more: flow_grpo_table(flow_schedule(6, shift=3.0), **more),
    "cps": lambda **more: cps_table(flow_schedule(6), **more),
    "ddim": lambda **more: ddim_table(ddpm_schedule(6), **more),
}


def model(z: Tensor, times: Tensor, *, scale: Any = 1.0) -> Tensor:
    """Elementwise, so that a sample's output does not depend on its batch."""
    column = times.reshape(-1, *[1] * (z.dim() - 1))
    return (scale * torch.sin(z.float()) + 0.1 * column / column.abs().clamp(min=1)).to(z.dtype)


def latents(batch: int, dtype: torch.dtype = F32, first: int = 0) -> Tensor:
    return bk.normal((batch, 3, 8), seed=11, sample_id=first, dtype=dtype)


# --- coefficients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grpo_is_the_publications_step(shift: float, noise: float) -> None:
    """Flow-GRPO's update, as its equation has it: drift and diffusion of the SDE, with sigma from 1 to 0."""
    schedule = flow_schedule(7, shift=shift)
    table = flow_grpo_table(schedule, noise_level=noise)
    x, v = 1.3, -0.4
    for i in range(7, 0, -1):
        sigma, step = schedule.sigma[i], schedule.sigma[i - 1] - schedule.sigma[i]
        spread = noise * math.sqrt(sigma / (1 - (schedule.sigma[6] if sigma == 1 else sigma)))
        drift = v + spread**2 / (2 * sigma) * (x + (1 - sigma) * v)
        assert table.of_state[i] * x + table.of_output[i] * v == pytest.approx(x + drift * step, rel=1e-14)
        assert table.std[i] == pytest.approx(spread * math.sqrt(-step), rel=1e-14)


@pytest.mark.parametrize("noise", [0.0, 0.7, 1.0])
def test_cps_keeps_the_coefficients(noise: float) -> None:
    schedule = flow_schedule(7)
    table = cps_table(schedule, noise_level=noise)
    clean, drawn = 1.3, -0.4
    for i in range(7, 0, -1):
        sigma, lower = schedule.sigma[i], schedule.sigma[i - 1]
        x, v = (1 - sigma) * clean + sigma * drawn, drawn - clean
        mean, s = table.of_state[i] * x + table.of_output[i] * v, table.std[i]
        assert mean == pytest.approx((1 - lower) * clean + math.sqrt(lower**2 - s**2) * drawn, rel=1e-12, abs=1e-15)
        assert s == pytest.approx(lower * math.sin(noise * math.pi / 2), rel=1e-14)
        # The noise of the state has its level's variance again.
        assert (lower * math.cos(noise * math.pi / 2)) ** 2 + s**2 == pytest.approx(lower**2, abs=1e-15)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_publications_step(eta: float) -> None:
    schedule = ddpm_schedule(5)
    table = ddim_table(schedule, eta=eta)
    x, eps = 1.3, -0.4
    for i in range(5, 0, -1):
        here, below = schedule.alpha[i] ** 2, schedule.alpha[i - 1] ** 2
        s = eta * math.sqrt((1 - below) / (1 - here)) * math.sqrt(1 - here / below)
        x0 = (x - math.sqrt(1 - here) * eps) / math.sqrt(here)
        mean = math.sqrt(below) * x0 + math.sqrt(max(0.0, 1 - below - s * s)) * eps
        assert table.std[i] == pytest.approx(s, rel=1e-9, abs=1e-12)
        assert table.of_state[i] * x + table.of_output[i] * eps == pytest.approx(mean, rel=1e-9)


PREDICTIONS = ["x0", "noise", "v", "flow", Preconditioned()]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", TABLES)
def test_every_prediction_takes_the_same_step(name: str, prediction: Any) -> None:
    """Outputs that say the same of x0 and the noise lead to the same mean."""
    levels = (0.1, 0.4, 0.9)
    if name == "ddim":
        schedule = Schedule(levels, (1.0,) * 3, levels)
    else:
        schedule = Schedule(levels, tuple(1 - t for t in levels), levels, flow=True)
    make: Any = {"flow_grpo": flow_grpo_table, "cps": cps_table, "ddim": ddim_table}[name]
    clean, noise = 0.8, -0.3
    plain, table = make(schedule, prediction="flow"), make(schedule, prediction=prediction)
    for i in (2, 1):
        alpha, sigma = schedule.alpha[i], schedule.sigma[i]
        z = alpha * clean + sigma * noise
        t = sigma / alpha
        raw = (clean - 0.25 / (0.25 + t * t) * (z / alpha)) / (0.5 * t / math.sqrt(0.25 + t * t))
        outputs = {"x0": clean, "noise": noise, "v": alpha * noise - sigma * clean, "flow": noise - clean}
        output = raw if isinstance(prediction, Preconditioned) else outputs[prediction]
        mean = table.of_state[i] * z + table.of_output[i] * output
        assert mean == pytest.approx(plain.of_state[i] * z + plain.of_output[i] * outputs["flow"], rel=1e-12)
        assert table.std[i] == plain.std[i]


@pytest.mark.parametrize("name", TABLES)
def test_windows(name: str) -> None:
    """Steps outside of a window are those without noise."""
    noise = {"noise_level": 0.0} if name != "ddim" else {"eta": 0.0}
    whole, still, some = TABLES[name](), TABLES[name](**noise), TABLES[name](stochastic=range(4, 6))
    assert some.stochastic == (5, 4) and still.stochastic == ()
    for i in range(1, 7):
        chosen = whole if i in (4, 5) else still
        assert (some.weights(i), some.std[i]) == (chosen.weights(i), chosen.std[i])


def test_the_marginals_of_flow_grpo_stay_those_of_the_flow() -> None:
    """For data that are normal, whose velocity is known, many small steps end with the data's variance."""
    steps, deviation = 400, 0.5
    schedule = flow_schedule(steps)

    def velocity(z: Tensor, times: Tensor) -> Tensor:
        t = times[:, None]
        variance = ((1 - t) * deviation) ** 2 + t**2
        return z * (t - (1 - t) * deviation**2) / variance

    z = bk.normal((4000, 1), seed=3)
    for table in (flow_grpo_table(schedule, noise_level=0.3), cps_table(schedule, noise_level=0.3)):
        sample = rollout(velocity, z, table, seed=1).sample
        assert sample.std() == pytest.approx(deviation, rel=0.08)


# --- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("name", TABLES)
def test_a_rollout_does_not_depend_on_batch_order_or_shard(name: str, dtype: torch.dtype, same_bits: Bits) -> None:
    table, z = TABLES[name](), latents(7, dtype)
    whole = rollout(model, z, table, seed=5)
    shards = joined([rollout(model, z[k : k + 3], table, seed=5, sample_id=k) for k in (0, 3, 6)])
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    mixed = rollout(model, z[order], table, seed=5, sample_id=order).rows(order.argsort())
    alone = [rollout(model, z[k : k + 1], table, seed=5, sample_id=k) for k in range(7)]
    for other in (shards, mixed, joined(alone)):
        assert (other.steps, other.levels) == (whole.steps, whole.levels)
        for field in ("sample", "log_probs", "states", "sample_ids"):
            same_bits(getattr(other, field), getattr(whole, field))


@pytest.mark.parametrize("gradient", ["backward", "forward"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("name", TABLES)
def test_the_ratio_of_the_first_update_is_exactly_one(name: str, dtype: torch.dtype, gradient: str) -> None:
    table = TABLES[name](stochastic=(6, 5, 2))
    done = rollout(model, latents(5, dtype), table, seed=5, guidance_scale=None)
    weight = torch.ones(())
    for i in done.steps:
        weight.requires_grad_().grad = None
        log_prob, _ = recorded_log_prob(
            lambda z, times: model(z, times, scale=weight), done, table, i, gradient=gradient
        )
        assert torch.equal((log_prob - done.log_prob(i)).exp(), torch.ones_like(log_prob))
        advantages = torch.tensor([1.0, -0.5, 2.0, 0.0, -1.0])
        loss = policy_loss(log_prob, done.log_prob(i), advantages)
        assert loss.terms["ratio"] == 1 and loss.terms["clipped"] == 0
        loss.total.backward()
        assert weight.grad is not None and weight.grad.isfinite()


def test_guidance_and_arguments(same_bits: Bits) -> None:
    table = TABLES["flow_grpo"]()

    def pair(z: Tensor, times: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return model(z, times), model(z, times, scale=scale)

    asked: dict[str, Any] = {"guidance_scale": 2.5, "extra_args": {"scale": 0.5}}
    done = rollout(pair, latents(3), table, seed=5, **asked)
    for i in done.steps:
        log_prob, output = recorded_log_prob(pair, done, table, i, **asked)
        same_bits(log_prob, done.log_prob(i))
        assert isinstance(output, tuple)
    merged = rollout(lambda z, t: model(z, t) + 2.5 * (model(z, t, scale=0.5) - model(z, t)), latents(3), table, seed=5)
    torch.testing.assert_close(done.sample, merged.sample, rtol=1e-4, atol=1e-5)


def test_deterministic_rollouts_are_the_samplers(same_bits: Bits) -> None:
    z = latents(3)
    schedule = vp_schedule(6)
    still = rollout(model, z, ddim_table(schedule, eta=0.0), seed=5)
    torch.testing.assert_close(still.sample, ddim_sample(model, z, schedule), rtol=1e-6, atol=1e-6)
    assert still.steps == () and still.log_probs.shape == (0, 3) and still.states.shape == (0, 3, 3, 8)
    flow = flow_schedule(6)
    for table in (flow_grpo_table(flow, stochastic=()), cps_table(flow, stochastic=())):
        sample = rollout(model, z, table).sample
        torch.testing.assert_close(sample, ddim_sample(model, z, flow, prediction="flow"), rtol=1e-5, atol=1e-5)
    same_bits(still.sample, rollout(model, z, ddim_table(schedule, eta=0.0), seed=6).sample)


def test_the_noise_is_apart_from_every_other(same_bits: Bits) -> None:
    """A rollout's states have the noise of its own purpose, and never the latents'."""
    table = TABLES["flow_grpo"](stochastic=(6,))
    done = rollout(model, latents(2), table, seed=5, sample_id=3)
    noise = bk.normal((2, 3, 8), seed=bk.fold_in(5, keys.POLICY), step=6, sample_id=3)
    output = model(done.state(6), torch.ones(2))
    mean = table.of_state[6] * done.state(6).double() + table.of_output[6] * output.double()
    torch.testing.assert_close((done.state(5) - mean) / table.std[6], noise.double(), rtol=1e-5, atol=1e-5)
    other = ancestral_sample(model, latents(2), vp_schedule(6), seed=5, sample_id=3)
    assert not torch.allclose(rollout(model, latents(2), ddim_table(vp_schedule(6)), seed=5, sample_id=3).sample, other)


def test_trajectories_are_saved_and_sliced(tmp_path: Path, same_bits: Bits) -> None:
    table = TABLES["cps"](stochastic=(6, 5, 2))
    done = rollout(model, latents(4, BF16), table, seed=5, sample_id=7)
    assert done.levels == (6, 5, 4, 2, 1) and done.steps == (6, 5, 2)
    assert done.sample_ids.tolist() == [7, 8, 9, 10]
    done.save(tmp_path / "rollout.safetensors")
    again = Trajectory.load(tmp_path / "rollout.safetensors")
    assert (again.steps, again.levels, again.seed) == (done.steps, done.levels, 5)
    for field in ("sample", "log_probs", "states", "sample_ids"):
        same_bits(getattr(again, field), getattr(done, field))
    part = done.rows(slice(1, 3))
    same_bits(part.state(2), done.state(2)[1:3])
    same_bits(part.log_prob(5), done.log_prob(5)[1:3])
    with pytest.raises(ValueError, match=r"one of the levels that were kept, \(6, 5, 4, 2, 1\), got 3"):
        done.state(3)
    with pytest.raises(ValueError, match=r"one of the stochastic steps, \(6, 5, 2\), got 4"):
        done.log_prob(4)
    import safetensors.torch

    safetensors.torch.save_file({"samples": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"a file that Trajectory\.save wrote"):
        Trajectory.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="at least one Trajectory"):
        joined([])
    with pytest.raises(ValueError, match="expected the steps"):
        joined([done, rollout(model, latents(1, BF16), TABLES["cps"]())])


def test_callbacks_see_every_step() -> None:
    seen: list[int] = []
    rollout(model, latents(2), TABLES["ddim"](), callback=lambda info: seen.append(info.index))
    assert seen == [5, 4, 3, 2, 1, 0]


def test_preconditioned_networks() -> None:
    """They are asked about the scaled state, in rollout and training alike."""
    schedule, form = karras_schedule(5, t_max=10.0), Preconditioned()
    table = ddim_table(schedule, prediction=form)
    done = rollout(lambda z, times: torch.tanh(z), 10 * latents(3), table, seed=2)
    for i in done.steps:
        log_prob, _ = recorded_log_prob(lambda z, times: torch.tanh(z), done, table, i)
        assert torch.equal(log_prob, done.log_prob(i))


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_loss_is_ppos() -> None:
    new, old = torch.randn(2, 50, dtype=F64, generator=torch.Generator().manual_seed(1)).mul(0.1).unbind()
    advantages = torch.linspace(-8, 8, 50, dtype=F64)
    leaf = new.clone().requires_grad_()
    loss = policy_loss(leaf, old, advantages, clip=0.05, most=5.0)
    ratio, clamped = (new - old).exp(), advantages.clamp(-5, 5)
    plain = torch.maximum(-clamped * ratio, -clamped * ratio.clamp(0.95, 1.05)).mean()
    torch.testing.assert_close(loss.total, plain)
    (gradient,) = torch.autograd.grad(loss.total, leaf)
    # A ratio that the clip holds has no gradient where its advantage would lead further.
    held = ((ratio > 1.05) & (clamped > 0)) | ((ratio < 0.95) & (clamped < 0))
    torch.testing.assert_close(gradient, torch.where(held, 0.0, -clamped * ratio / 50))
    assert loss.terms["clipped"] == ((ratio - 1).abs() > 0.05).double().mean()


def test_the_divergence_joins_the_loss() -> None:
    zero = torch.zeros(3)
    loss = policy_loss(zero, zero, zero, divergence=torch.tensor([1.0, 2.0, 3.0]), divergence_weight=0.5)
    assert loss.total == 1.0 and loss.terms["divergence"] == 2.0


def test_step_divergences() -> None:
    table = TABLES["flow_grpo"]()
    x, ours, theirs, other = (
        torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(k)) for k in range(4)
    )
    weight, s = table.weights(4)[1], table.std[4]
    expected = (weight * (ours - theirs)).square().mean(1) / (2 * s * s)
    torch.testing.assert_close(step_divergence(table, 4, x, ours, theirs), expected)
    guided = step_divergence(table, 4, x, (ours, other), (theirs, other), guidance_scale=2.5)
    torch.testing.assert_close(guided, (1 - 2.5) ** 2 * expected)
    assert torch.equal(step_divergence(table, 4, x, ours, ours), torch.zeros(3, dtype=F64))


def test_group_advantages(same_bits: Bits) -> None:
    rewards = torch.tensor([0.1, 0.7, 0.2, 5.0, 5.0, 5.0, -1.0, 2.0, 0.3])
    groups = torch.tensor([4, 4, 4, -7, -7, -7, 9, 9, 9])
    ours = group_advantages(rewards, groups)
    same_bits(ours, group_advantages(rewards, 3))
    for k in range(3):
        some = rewards[3 * k : 3 * k + 3].double()
        expected = (some - some.mean()) / (some.std(correction=0) + 1e-4)
        torch.testing.assert_close(ours[3 * k : 3 * k + 3].double(), expected, rtol=1e-6, atol=1e-9)
    assert not ours[3:6].any()
    whole = group_advantages(rewards, groups, scale="batch")
    spread = rewards.double().std(correction=0) + 1e-4
    torch.testing.assert_close(whole.double()[:3], (rewards[:3].double() - rewards[:3].double().mean()) / spread)
    order = torch.tensor([8, 1, 5, 0, 3, 7, 2, 6, 4])
    for scale in ("group", "none"):
        plain = group_advantages(rewards, groups, scale=scale)
        same_bits(group_advantages(rewards[order], groups[order], scale=scale), plain[order])
        same_bits(group_advantages(rewards[:3], 3, scale=scale), plain[:3])
    assert group_advantages(rewards[:0], 1).shape == (0,)
    assert not group_advantages(rewards, 1, floor=0.0).any()


# --- errors -----------------------------------------------------------------------------------------------------------

FLOW, VP, ROW = flow_schedule(4), vp_schedule(4), torch.zeros(4)
ERRORS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, "schedule: expected one of a flow", lambda: flow_grpo_table(VP)),
    (
        ValueError,
        "noise_level: expected a value of at least 0, got -1",
        lambda: flow_grpo_table(FLOW, noise_level=-1.0),
    ),
    (ValueError, r"noise_level: expected a value in \[0, 1\], got 2", lambda: cps_table(FLOW, noise_level=2.0)),
    (ValueError, r"eta: expected a value in \[0, 1\], got 1.5", lambda: ddim_table(VP, eta=1.5)),
    (ValueError, "schedule: expected alpha > 0, got alpha = 0 at index 4", lambda: ddim_table(FLOW)),
    (ValueError, "only prediction='flow' and 'x0'", lambda: cps_table(FLOW, prediction="noise")),
    (ValueError, r"stochastic: expected indices in \[1, 4\], got 5", lambda: cps_table(FLOW, stochastic=[5])),
    (TypeError, "stochastic: expected indices of steps, got 3", lambda: cps_table(FLOW, stochastic=3)),  # type: ignore[arg-type]
    (TypeError, "schedule: expected a Schedule", lambda: ddim_table(4)),  # type: ignore[arg-type]
    (TypeError, "table: expected a PolicyTable", lambda: rollout(model, latents(1), FLOW)),  # type: ignore[arg-type]
    (TypeError, "z: expected a tensor", lambda: rollout(model, [1.0], cps_table(FLOW))),  # type: ignore[arg-type]
    (
        TypeError,
        "trajectory: expected a Trajectory",
        lambda: recorded_log_prob(model, latents(1), cps_table(FLOW), 2),  # type: ignore[arg-type]
    ),
    (ValueError, r"i: expected an index in \[1, 4\]", lambda: step_divergence(cps_table(FLOW), 5, ROW, ROW, ROW)),
    (ValueError, r"old_log_prob: expected shape \(4,\), got \(3,\)", lambda: policy_loss(ROW, ROW[:3], ROW)),
    (TypeError, "advantages: expected a floating tensor", lambda: policy_loss(ROW, ROW, [1.0])),  # type: ignore[arg-type]
    (ValueError, "clip, most, divergence_weight: expected clip > 0", lambda: policy_loss(ROW, ROW, ROW, clip=0.0)),
    (ValueError, "groups: expected a size that divides the batch of 4, got 3", lambda: group_advantages(ROW, 3)),
    (ValueError, r"groups: expected a size, or a \(4,\) int64", lambda: group_advantages(ROW, ROW)),
    (ValueError, "scale: expected 'group', 'batch' or 'none'", lambda: group_advantages(ROW, 2, scale="std")),  # type: ignore[arg-type]
    (TypeError, "rewards: expected a floating tensor", lambda: group_advantages(ROW.long(), 2)),
]


@pytest.mark.parametrize(("error", "message", "call"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_errors(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()
