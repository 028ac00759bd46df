"""Idempotent networks, f(f(z)) = f(z): the losses of IGN and SIGN, sums of terms with shared evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bicm_diffusion.consistency.frozen import asked, check_network, distance_to_frozen
from bicm_diffusion.consistency.shared_draws import draws_alike, dropout_key
from bicm_diffusion.keys import LATENTS, LEARNING, MATCHING
from bicm_diffusion.objectives.evaluation import Loss, Network, noise_key
from bicm_diffusion.objectives.score_models import (
    ScoreModel,
    draw_indices,
    learning_loss,
    levels_at,
    matching_loss,
    ode_step,
)
from bicm_diffusion.objectives.terms import Terms
from bicm_diffusion.samplers.checks import (
    check_arguments,
    check_model,
    check_number,
    check_output,
    check_schedule,
    check_state,
)
from bicm_diffusion.samplers.prediction import Prediction, known_prediction
from bicm_diffusion.schedules import Schedule, vp_schedule
from bicm_kernels import affine_step, fold_in

SOLVERS = ("empirical", "euler", "heun")
DMD_WEIGHTS = ("variance", "normalised")
#: The default schedule. Made at import, because tracing does not reach its numbers; on the host, whatever the default.
with torch.device("cpu"):
    STANDARD = vp_schedule(50)


def ign_loss(
    network: Network,
    x: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor = 0,
    extra_args: Mapping[str, Any] | None = None,
    recon: float = 20.0,
    idem: float = 20.0,
    tight: float = 2.5,
    bound: float | None = 1.5,
    latent_std: float = 1.0,
    gradient: str = "auto",
) -> Loss:
    """Return the loss of an idempotent generative network (SIGN eq. 3 to 6), a weighted sum of means over the batch:

    recon: D(x, f(x)); idem: D(f(z), f'(f(z))); tight: -D(f(sg f(z)), sg f(z)), with D(a, b) = ‖a - b‖².

    f' has frozen parameters but is differentiated in its input; idem is differentiated in both of its arguments.
    tight is bounded by the sample's own recon r, a·r·tanh(tight/(a·r)) with r detached, as in public ports;
    so are the default weights. All evaluations share their dropout mask, keyed by (seed, step, first sample) with
    another purpose than the noise. This is a baseline: it tends to collapse; use `sign_loss` instead.

    network: called as network(x, **extra_args) -> (B, …), without a time. x: clean samples (B, …), floating.
    recon, idem, tight: weights >= 0; a term of weight 0 is not evaluated, except recon where it bounds tight.
    bound: a >= 0, or None for the paper's unbounded tight. latent_std: z ~ N(0, latent_std²), with a separate key.
    gradient: see `bicm_kernels.pseudo_huber`. seed, step, sample_id: the key, see `bicm_kernels.normal`.
    Returns a `Loss`, whose terms are not weighted. Raises ValueError for a weight or bound below 0 or weights that are
    all 0, and TypeError for arguments of another kind and networks that `bct_loss` refuses.

    >>> x = torch.tensor([[1.0], [-1.0]])
    >>> ign_loss(torch.sign, x, seed=0, step=0).total
    tensor(0.)
    """
    weights = _weights(recon=recon, idem=idem, tight=tight)
    f = _applied(network, x, seed=seed, step=step, sample_id=sample_id, extra_args=extra_args)
    if bound is not None:
        check_number("bound", bound)
        if not bound >= 0:
            raise ValueError(f"bound: expected a number of at least 0, or None, got {bound}")
    found = Terms(weights, {"gradient": gradient})
    bounded = bound is not None and weights["tight"] > 0
    errors = away = None
    if weights["recon"]:
        again = f(x)
        errors = found.each("recon", len(x), lambda distance: distance(again, x))
    elif bounded:
        with torch.no_grad():
            errors = found.values(f(x), x)
        found.terms["recon"] = errors.mean()
    if weights["idem"] or weights["tight"]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and weights["idem"] > 0):
            sample = f(_latents(x, latent_std, seed=seed, step=step, sample_id=sample_id))
        if weights["idem"]:
            away = found.each("idem", len(x), lambda distance: f.again(sample, distance))
    if weights["tight"]:
        start = sample.detach()
        again = f(start)
        if errors is None or bound is None:
            found.add_weighted("tight", found.weighted("tight", -1)(again, start))
        else:
            # f' is f: what idem has measured is the distance.
            away = found.values(again, start) if away is None else away
            found.bounded("tight", again, start, bound * errors, away)
    return found.loss()


def sign_loss(
    network: Network,
    x: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor = 0,
    extra_args: Mapping[str, Any] | None = None,
    schedule: Schedule | None = None,
    teacher: Callable[[Tensor, Tensor], Tensor] | None = None,
    learned: nn.Module | None = None,
    prediction: Prediction = "noise",
    pairs: Sequence[Any] | None = None,
    recon: float = 1.0,
    idem: float = 1.0,
    flow: float = 1.0,
    dmd: float = 0.0,
    reg: float = 0.0,
    denoise: float = 0.0,
    solver: str | None = None,
    dmd_weight: str = "variance",
    alpha_power: int = 1,
    kind: str = "squared",
    c: float | None = None,
    gradient: str = "auto",
) -> Loss:
    """Return the score-based loss of an idempotent network (SIGN eq. 9), a weighted sum of means over the batch.

    recon: D(x, f(x)); idem: D(f(z), f'(f(z))); flow: D(f(x_n), sg f(x_s)), s = n - 1; denoise: D(f(x_n), x);
    reg: D(f(noise), image) of stored pairs; dmd: ½‖g‖² with gradient g = s_learned(y) - s_teacher(y) in f(z), at
    y = α_n·f(z) + σ_n·n' (eq. 7). x_n = α_n·x + σ_n·n of the schedule, n uniform in 1 … N; D(a, b) = ‖a - b‖².

    f' has frozen parameters but is differentiated in its input; idem is differentiated in both of its arguments.
    f(z) and f(x_n) are evaluated once for the terms that have them, and all evaluations share their dropout mask.

    network: called as network(x, **extra_args) -> (B, …), without a time; x_n is passed without scaling.
    x: clean samples (B, …), floating. recon … denoise: weights >= 0; a term of weight 0 is not evaluated. The paper
        chooses values in [0, 1] that give terms of one magnitude; on the digits, idem needs .01 with flow only.
    schedule: alpha, sigma and the models' times; None for `vp_schedule(50)`. z ~ N(0, σ_N²), with a separate key:
        N(0, I) where variance is preserved, N(0, T²) on EDM's levels. Draw samples from the same distribution.
    teacher: a diffusion model, called as teacher(z, times) -> (B, …), with the given `prediction`, as for samplers;
        it is not trained. It gives x_s, and dmd needs it. learned: a module of the same kind, which starts
        as a copy of the teacher; dmd evaluates it at f(z). Its own denoising loss on sg f(z) is the term "learned",
        with weight 1 in `total`: its parameters get gradients from this term only.
    pairs: (noise, image), each (M, …) like x, or (noise, image, extra_args); noise as z. reg needs them.
    solver: how x_s is computed: "empirical" from x itself, α_s·x + σ_s·n with the same n; "euler" or "heun", a step of
        the ODE by the teacher. None is "euler" where there is a teacher.
    dmd_weight, alpha_power: g = α^p·(D_learned - D_teacher)/w. "variance" has w = σ², with p = 1 SIGN eq. 7; p = 2 is
        the gradient of the divergence itself, since dy/df = α. "normalised" has w = mean |f(z) - D_teacher| (Yin et
        al.).
    kind, c, gradient: of the distances D, see `bicm_kernels.pseudo_huber`; dmd and learned have their own.
    seed, step, sample_id: the key, see `bicm_kernels.normal`; n of x_n is drawn from it as in every objective.
    Returns a `Loss`, whose terms are not weighted. Values of flow and dmd do not measure progress.
    Raises ValueError for a weight below 0, weights that are all 0, an unknown choice, and a term whose inputs are
    missing; TypeError for arguments of another kind and networks that `bct_loss` refuses.

    >>> x = torch.tensor([[1.0], [-1.0]])
    >>> sorted(sign_loss(torch.sign, x, seed=0, step=0, denoise=0.5).terms)
    ['denoise', 'flow', 'idem', 'recon']
    """
    weights = _weights(recon=recon, idem=idem, flow=flow, dmd=dmd, reg=reg, denoise=denoise)
    f = _applied(network, x, seed=seed, step=step, sample_id=sample_id, extra_args=extra_args)
    schedule = STANDARD if schedule is None else schedule
    check_schedule(schedule)
    prediction = known_prediction(prediction)
    solver = ("empirical" if teacher is None else "euler") if solver is None else solver
    for name, given, known in (("solver", solver, SOLVERS), ("dmd_weight", dmd_weight, DMD_WEIGHTS)):
        if given not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {given!r}")
    by_teacher = bool(weights["flow"]) and solver != "empirical"
    _check_needs(weights, teacher, learned, pairs, by_teacher=by_teacher)
    if (by_teacher or weights["dmd"]) and not schedule.alpha[-1] and prediction != "flow":
        raise ValueError("schedule: expected alpha > 0 for a teacher whose prediction is not 'flow', got alpha_N = 0")
    key: dict[str, Any] = {"seed": seed, "step": step, "sample_id": sample_id}
    guide = ScoreModel(teacher, prediction, f.alike, "teacher") if teacher is not None else None
    index = draw_indices(len(x), schedule, **key) if any(weights[name] for name in ("flow", "dmd", "denoise")) else None
    level = levels_at(schedule, index, x.device) if index is not None else None
    found = Terms(weights, {"kind": kind, "c": c, "gradient": gradient})

    if weights["recon"]:
        found.distance("recon", f(x), x)
    if weights["idem"] or weights["dmd"]:
        sample = f(_latents(x, schedule.sigma[-1], **key))
        if weights["idem"]:
            found.add_weighted("idem", f.again(sample, found.weighted("idem")))
    if index is not None and level is not None and (weights["flow"] or weights["denoise"]):
        x_n = affine_step([x], [level.alpha], noise_weight=level.sigma, **noise_key(x, **key))
        answer = f(x_n)
        if weights["flow"]:
            with torch.no_grad():
                if guide is not None and by_teacher:
                    x_s = ode_step(guide, schedule, x_n, index, heun=solver == "heun")
                else:
                    below = levels_at(schedule, index - 1, x.device)
                    kept = below.sigma / level.sigma
                    x_s = affine_step([x_n, x], [kept, below.alpha - kept * level.alpha])
                goal = f(x_s)
            found.distance("flow", answer, goal)
        if weights["denoise"]:
            found.distance("denoise", answer, x)
    if weights["reg"]:
        noise, image, named = _checked_pairs(pairs, x, extra_args)
        found.distance("reg", f(noise, named), image)
    if weights["dmd"] and learned is not None and guide is not None and level is not None:
        follower = ScoreModel(learned, prediction, f.alike, "learned")
        with torch.no_grad():
            start = sample.detach().to(x.dtype)
            around = noise_key(x, fold_in(seed, MATCHING), step, sample_id)
            y = affine_step([start], [level.alpha], noise_weight=level.sigma, **around)
            answers = follower(y, level), guide(y, level)
        values = matching_loss(sample, *answers, follower, weight=dmd_weight, alpha_power=alpha_power)
        found.add("dmd", values.mean())
        own = fold_in(seed, LEARNING)
        found.add("learned", learning_loss(follower, start, schedule, seed=own, step=step, ids=sample_id), weight=1.0)
    return found.loss()


@dataclass(frozen=True, eq=False)
class _Applied:
    """f; all calls share the dropout mask of one key."""

    network: Network
    alike: Callable[[], Any]
    extra_args: Mapping[str, Any]

    def __call__(self, x: Tensor, extra_args: Mapping[str, Any] | None = None) -> Tensor:
        with self.alike():
            output = asked(self.network, (x,), self.extra_args if extra_args is None else extra_args)
        check_output(output, x, name="network")
        return output

    def again(self, sample: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return distance(sample, f'(sample)), differentiable in the sample and in no parameter of f'."""
        with self.alike():
            return distance_to_frozen(self.network, sample, self.extra_args, distance)  # type: ignore[arg-type]


def _applied(network: Network, x: Tensor, *, seed: Any, step: Any, sample_id: Any, extra_args: Any) -> _Applied:
    check_model(network, "network(x)", "network")
    if isinstance(network, nn.Module):
        check_network(network)
    check_state("x", x)
    check_arguments("extra_args", extra_args)
    return _Applied(network, draws_alike(dropout_key(seed, step, sample_id), x.device), extra_args or {})


def _latents(x: Tensor, std: float, *, seed: Any, step: Any, sample_id: Any) -> Tensor:
    # 0·x + std·noise in one pass, instead of a normal and a product.
    return affine_step([x.detach()], [0.0], noise_weight=std, **noise_key(x, fold_in(seed, LATENTS), step, sample_id))


def _weights(**weights: float) -> dict[str, float]:
    for name, weight in weights.items():
        check_number(name, weight)
        if not weight >= 0:
            raise ValueError(f"{name}: expected a weight of at least 0, got {weight}")
    if not any(weights.values()):
        raise ValueError(f"{', '.join(weights)}: expected a weight above 0, got none")
    return weights


def _check_needs(weights: Mapping[str, float], teacher: Any, learned: Any, pairs: Any, *, by_teacher: bool) -> None:
    for name, model in (("teacher", teacher), ("learned", learned)):
        if model is not None:
            check_model(model, f"{name}(z, times)", name)
    if weights["reg"] and pairs is None:
        raise ValueError("pairs: expected (noise, image) for reg, got None")
    if by_teacher and teacher is None:
        raise ValueError("teacher: expected one for a step of the ODE, got None; solver='empirical' needs none")
    if weights["dmd"] and (teacher is None or learned is None):
        missing = "teacher" if teacher is None else "learned"
        raise ValueError(f"{missing}: expected a diffusion model for dmd, got None")


def _checked_pairs(pairs: Any, x: Tensor, extra_args: Any) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
    if not isinstance(pairs, tuple | list) or len(pairs) not in (2, 3):
        raise TypeError(f"pairs: expected (noise, image) or (noise, image, extra_args), got {type(pairs).__name__}")
    noise, image, named = (*pairs, extra_args or {}) if len(pairs) == 2 else pairs
    check_arguments("pairs[2]", named)
    for name, part in (("noise", noise), ("image", image)):
        check_state(f"pairs: {name}", part)
        if part.shape[1:] != x.shape[1:] or part.shape != noise.shape:
            raise ValueError(f"pairs: expected {name} (M, …) like x, {tuple(x.shape)}, got {tuple(part.shape)}")
    return noise, image, named
