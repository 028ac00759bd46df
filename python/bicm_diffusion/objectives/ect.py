"""Easy consistency tuning (ECT, Geng et al. 2024): pairs of times that converge by stages, and one batch's loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.consistency.levels import check_levels
from bicm_diffusion.described import described
from bicm_diffusion.keys import TIMES, device_of
from bicm_diffusion.objectives.evaluation import (
    Form,
    Loss,
    Network,
    evaluator,
    level_dtype,
    noise_key,
    weighted_distance,
)
from bicm_diffusion.objectives.gc import augmented
from bicm_diffusion.samplers.checks import check_batch, check_integer, check_model, check_number, check_state
from bicm_diffusion.schedules.karras import T_MIN
from bicm_kernels import fold_in, noisy_pair, normal

P_MEAN, P_STD = -1.1, 2.0


def ect_partner(t: Tensor, *, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """Return r = max(0, t·(1 - q^-(stage+1)·(1 + k·sigmoid(-b·t)))), like t, which approaches t stage by stage.

    Raises TypeError unless stage is an integer and the others are numbers, ValueError unless stage >= 0 and q > 1.

    >>> ect_partner(torch.tensor([0.1, 10.0]), stage=0)
    tensor([0.0000, 4.9982])
    """
    check_integer("stage", stage)
    for name, number in (("q", q), ("k", k), ("b", b)):
        check_number(name, number)
        if not (torch.compiler.is_compiling() or math.isfinite(number)):
            raise ValueError(f"{name}: expected a finite number, got {number}")
    if stage < 0 or not q > 1:
        raise ValueError(f"stage, q: expected stage >= 0 and q > 1, got {stage} and {q}")
    return (t * (1 - q ** -(stage + 1) * (1 + k * torch.sigmoid(-b * t)))).clamp_min(0)


def draw_ect_times(
    batch: int,
    *,
    stage: int,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor = 0,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return t and r of a batch, each (B,) float64: ln t ~ N(-1.1, 2²), keyed by (seed, sample, step), and r from t.

    stage: see `ect_partner`; seed, step, sample_id: see `bicm_kernels.normal`.
    Raises ValueError unless stage >= 0 and q > 1.

    >>> t, r = draw_ect_times(4, stage=0, seed=0, step=0)
    >>> bool((r < t).all())
    True
    """
    check_batch(batch)
    key: dict[str, Any] = {"seed": fold_in(seed, TIMES), "step": step, "sample_id": sample_id}
    z = normal((batch, 1), **key, dtype=torch.float64, device=device_of(*key.values()))[:, 0]
    t = (P_MEAN + P_STD * z).exp()
    return t, ect_partner(t, stage=stage, q=q, k=k, b=b)


def ect_loss(
    network: Network,
    x: Tensor,
    times: Sequence[Tensor],
    *,
    mu: float = 0.0,
    predictor: Network | None = None,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor = 0,
    extra_args: Mapping[str, Any] | None = None,
    parameterization: str = "edm",
    c: float = 0.0,
    sigma_data: float = 0.5,
    t_min: float = T_MIN,
    gradient: str = "auto",
) -> Loss:
    """Return the ECT loss of a batch, d(f(x + tz, t), sg f(x + rz, r)) / (t - r), a mean; the target is x where r = 0.

    Two evaluations, with one noise and one dropout mask, keyed by (seed, step, first sample) with another purpose than
    the noise.

    network: called as network(c_in(t)·x, t, **extra_args) -> F (B, …), and with u = t_min after t for "bcm"; t is (B,),
        in x's precision, and never 0: where r is 0, the network gets t, and its output is not used.
    x: clean samples (B, …), floating. times: (t, r), each (B,) float64, as from `draw_ect_times`.
    mu: the probability that x̂ = sg f̊(x + rz, r) replaces x, as in `gc_loss`; never where r = 0, which at
        stage 0 is most of the batch. predictor: f̊'s network, None for the network itself. The GC paper uses mu = 0.3.
    parameterization: see `bicm_kernels.denoise`; ECT trains the denoiser's "edm".
    sigma_data: σ_d, the standard deviation of the data. t_min: the lowest level of "bcm" and "cm", at which f is the
        sample itself.
    c: the distance's constant, 0 for the plain norm. gradient: see `bicm_kernels.pseudo_huber`.
    seed, step, sample_id: the key, see `bicm_kernels.normal`.
    Raises ValueError for mu out of range and another parameterization or gradient, and TypeError for a network that
    `bct_loss` refuses.

    >>> times = draw_ect_times(4, stage=0, seed=0, step=0)
    >>> sorted(ect_loss(lambda x, t: x, torch.zeros(4, 2), times, seed=0, step=0).terms)
    ['consistency']
    """
    check_model(network, "network(c_in(t)·x, t, …)", "network")
    check_state("x", x)
    check_levels(times, x, ("t", "r"), name="times", made="(t, r), as draw_ect_times returns")
    if len(times) != 2:
        raise ValueError(f"times: expected (t, r), as draw_ect_times returns, got {described(times)}")
    form = Form(parameterization, sigma_data, t_min)
    key: dict[str, Any] = {"seed": seed, "step": step}
    asked: dict[str, Any] = {"extra_args": extra_args, "end": form.end, "sample_id": sample_id, **key}
    evaluate = evaluator(network, x, **asked)
    predict = evaluate if predictor is None else evaluator(predictor, x, name="predictor", **asked)
    t, r = (time.to(x.device, level_dtype(x)) for time in times)
    replaced = augmented(x, r, mu, predict, form, sample_id=sample_id, allowed=times[1] > 0, **key)
    pair = [*noisy_pair(x, r, t, **noise_key(x, seed, step, sample_id), **replaced, sigma_data=sigma_data)]
    del replaced  # as large as x
    return weighted_distance(evaluate, form, pair, (times[1], times[0]), c=c, gradient=gradient, clean=x)
