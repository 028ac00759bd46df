"""Rollouts of a stochastic sampler, and the log-probabilities of recorded steps under a network in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.keys import POLICY
from bicm_diffusion.policy.tables import PolicyTable
from bicm_diffusion.policy.trajectory import Trajectory
from bicm_diffusion.samplers import checks
from bicm_diffusion.samplers.loop import Callback, Loop, Model
from bicm_diffusion.samplers.prediction import Number
from bicm_kernels import affine_step, fold_in, gaussian_kl, gaussian_log_prob, gaussian_step

Integer = int | Tensor


def check_table(table: object) -> None:
    """Raise TypeError unless a table is a `PolicyTable`."""
    if not isinstance(table, PolicyTable):
        made = "flow_grpo_table, cps_table and ddim_table make one of a schedule"
        raise TypeError(f"table: expected a PolicyTable, got {described(table)}; {made}")


@torch.no_grad()
def rollout(
    model: Model,
    z: Tensor,
    table: PolicyTable,
    *,
    seed: Integer = 0,
    sample_id: Integer = 0,
    guidance_scale: Number | None = None,
    extra_args: Mapping[str, Any] | None = None,
    reduction: str = "mean",
    callback: Callback | None = None,
    progress: bool = False,
) -> Trajectory:
    """Return the trajectory of a stochastic sampler from z = z_N: samples, intermediate states and log-probabilities.

    model: called as `model(z, times, **extra_args)`, as in samplers; z: (B, …), any floating dtype, in which
    states are recorded and their log-probabilities computed. table: the steps, from `flow_grpo_table`, `cps_table` or
    `ddim_table`; those with a standard deviation are recorded, the others are launches of the deterministic step.
    seed, sample_id: key of the noise, whose step is i, apart from that of `bicm_kernels.normal` with the same seed: a
    sample's rollout has the same bits in any batch, order or shard, if the model's output has. guidance_scale:
    the model returns a pair (uncond, cond). reduction: "mean" or "sum" of log-densities over a sample's elements.
    callback, progress: as for samplers. No gradients are recorded.
    Raises TypeError, ValueError for an argument of another type or range.

    >>> from bicm_diffusion import flow_schedule
    >>> from bicm_diffusion.policy import flow_grpo_table
    >>> table = flow_grpo_table(flow_schedule(4), stochastic=range(3, 5))
    >>> done = rollout(lambda z, times: -z, torch.ones(2, 3), table, seed=1)
    >>> done.steps, done.levels, done.log_probs.shape
    ((4, 3), (4, 3, 2), torch.Size([2, 2]))
    """
    check_table(table)
    loop = _loop("rollout", model, z, table, guidance_scale, extra_args, callback=callback, progress=progress)
    key, stochastic = fold_in(seed, POLICY), set(table.stochastic)
    ids = sample_id.cpu() if isinstance(sample_id, Tensor) else sample_id
    placed = sample_id.to(z.device) if isinstance(sample_id, Tensor) else sample_id
    levels = sorted({level for i in stochastic for level in (i, i - 1)}, reverse=True)
    states, log_probs = {}, []
    for i in loop.steps(range(table.schedule.steps, 0, -1)):
        output, weights = _answer(loop, i, z), table.weights(i)
        if i in stochastic:
            states[i] = z
            z, log_prob = gaussian_step(
                [z, output], weights, std=table.std[i], seed=key, step=i, sample_id=placed,
                guidance_scale=guidance_scale, reduction=reduction,
            )  # fmt: skip
            states[i - 1] = z
            log_probs.append(log_prob)
        else:
            z = affine_step([z, output], weights, guidance_scale=guidance_scale)
        loop.report(i - 1, z, output)
    ids = ids if isinstance(ids, Tensor) and ids.dim() else ids + torch.arange(len(z))
    empty = z.new_empty((0, *z.shape))
    return Trajectory(
        z,
        table.stochastic,
        torch.stack(log_probs) if log_probs else z.new_empty((0, len(z)), dtype=torch.float32),
        tuple(levels),
        torch.stack([states[level] for level in levels]) if levels else empty,
        torch.as_tensor(ids, dtype=torch.int64),
        None if isinstance(seed, Tensor) else int(seed),
    )


def recorded_log_prob(
    model: Model,
    trajectory: Trajectory,
    table: PolicyTable,
    i: int,
    *,
    guidance_scale: Number | None = None,
    extra_args: Mapping[str, Any] | None = None,
    reduction: str = "mean",
    gradient: str = "auto",
) -> tuple[Tensor, Any]:
    """Return the log-probability (B,) of a recorded step from i to i - 1 under a model, and its output at z_i.

    Where the model's output equals that of the rollout, so does the result, bit for bit: the ratio is exactly 1. It is
    differentiable in the model's parameters.

    model, table, guidance_scale, extra_args, reduction: as for `rollout`. trajectory: its result, or some rows of
    that. i: one of `trajectory.steps`. gradient: as for `bicm_kernels.gaussian_log_prob`.
    Raises TypeError, ValueError for an argument of another type or range.

    >>> from bicm_diffusion import flow_schedule
    >>> from bicm_diffusion.policy import flow_grpo_table
    >>> model, table = lambda z, times: -z, flow_grpo_table(flow_schedule(4), stochastic=range(3, 5))
    >>> done = rollout(model, torch.ones(2, 3), table, seed=1)
    >>> log_prob, _ = recorded_log_prob(model, done, table, 4)
    >>> torch.equal(log_prob, done.log_prob(4))
    True
    """
    check_table(table)
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"trajectory: expected a Trajectory, as rollout returns it, got {described(trajectory)}")
    trajectory.log_prob(i)  # raises if there is no such step
    state = trajectory.state(i)
    loop = _loop("recorded_log_prob", model, state, table, guidance_scale, extra_args)
    output = _answer(loop, i, state)
    log_prob = gaussian_log_prob(
        trajectory.state(i - 1), [state, output], table.weights(i), std=table.std[i],
        guidance_scale=guidance_scale, reduction=reduction, gradient=gradient,
    )  # fmt: skip
    return log_prob, output


def step_divergence(
    table: PolicyTable, i: int, state: Tensor, output: Any, reference: Any, *, reduction: str = "mean",
    guidance_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return the KL divergence (B,) between a step with a model's output and one with a reference's output.

    Both start at the same state: mean or sum over elements of (m - m_ref)²/(2 s²). Differentiable
    in output and reference.

    table, i: the step. state: z_i. output, reference: the two models' outputs there, like the state; with
    guidance_scale, a number, pairs (uncond, cond).
    Raises TypeError, ValueError for an argument of another type or range.

    >>> from bicm_diffusion import flow_schedule
    >>> from bicm_diffusion.policy import cps_table
    >>> x = torch.ones(1, 2)
    >>> float(step_divergence(cps_table(flow_schedule(2)), 2, x, x, x))
    0.0
    """
    check_table(table)
    if not (isinstance(i, int) and 1 <= i <= table.schedule.steps):
        raise ValueError(f"i: expected an index in [1, {table.schedule.steps}], got {i!r}")
    weight = table.weights(i)[1]
    # The state is the same in both means and cancels in their difference.
    ours, theirs, weights = [output], [reference], [weight]
    if guidance_scale is not None:
        checks.check_output(output, state, guidance_scale)
        checks.check_output(reference, state, guidance_scale)
        ours, theirs = [*output], [*reference]
        weights = [weight * (1.0 - guidance_scale), weight * guidance_scale]
    return gaussian_kl(ours, theirs, weights, std=table.std[i], reduction=reduction)


def _answer(loop: Loop, i: int, z: Tensor) -> Any:
    """The model's output, which no guide changes."""
    return loop.evaluate(i, z)


def _loop(
    name: str,
    model: Model,
    z: Tensor,
    table: PolicyTable,
    guidance_scale: Number | None,
    extra_args: Mapping[str, Any] | None,
    **more: Any,
) -> Loop:
    """The caller of the model, with the table's schedule."""
    options: Any = {"prediction": table.prediction, "guidance_scale": guidance_scale, "extra_args": extra_args}
    schedule = table.schedule
    if schedule.straight is not None:
        # The model is called at the same times; the table has its output's weights.
        schedule, options["prediction"] = schedule.straight, "noise"
    return Loop(name, model, z, schedule, **options, **more)
