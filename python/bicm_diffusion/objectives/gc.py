"""Generator-augmented coupling (GC): a model's own samples replace some of the data in the iCT loss of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.keys import MASKS
from bicm_diffusion.objectives.evaluation import (
    Evaluator,
    Form,
    Loss,
    Network,
    check_pair,
    check_parameterization,
    evaluator,
    level_dtype,
    noise_key,
    weighted_distance,
)
from bicm_diffusion.samplers.checks import check_number
from bicm_diffusion.schedules.karras import T_MIN
from bicm_kernels import affine_step, fold_in, noisy_pair, uniform


def gc_loss(
    network: Network,
    x: Tensor,
    levels: Sequence[Tensor],
    *,
    mu: float = 0.5,
    predictor: Network | None = None,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor = 0,
    extra_args: Mapping[str, Any] | None = None,
    parameterization: str = "bcm",
    c: float | None = None,
    sigma_data: float = 0.5,
    t_min: float = T_MIN,
    gradient: str = "auto",
) -> Loss:
    """Return the GC loss of a batch (GC eq. 13 to 15 and 21, Alg. 1): iCT's, with x̂ for a fraction mu of x.

    x̂ = sg f̊(x + t_n·z, t_n), and the pair is x̂ + t_n·z and x̂ + t_{n+1}·z with the same z. A mask selects them, with
    a separate key, so that the selection does not depend on the batch.

    mu: the probability of x̂, in [0, 1]: 0 is iCT, 1 is GC only; the paper uses 0.5. predictor: f̊'s network, called as
        `network` is: None for the network itself (Alg. 1), its moving average (the paper's best runs), or a frozen one.
    network, x, levels, parameterization, sigma_data, t_min, c, gradient, seed, step, sample_id: see `ict_loss`.
    extra_args: tensors whose first dimension is the batch's are assumed to have a row for every sample.

    The predictor is called on the rows that it replaces, and at least one, because processes that exchange parameters
    wait for one another. In a traced graph, or with a key on a GPU, the rows are not known without a sync:
    it is called on all rows there, and most outputs are not used. It shares the dropout key of the other two
    evaluations, and their masks where it is called on all rows; GC is best without dropout.
    Raises ValueError for mu out of range and another parameterization or gradient, and TypeError for networks that
    `bct_loss` refuses.

    >>> from bicm_diffusion import LevelTable, draw_levels, karras_levels
    >>> x, levels = torch.zeros(4, 2), draw_levels(LevelTable(karras_levels(11)), 4, seed=0, step=0)
    >>> sorted(gc_loss(lambda x, t: x, x, levels, mu=0.3, seed=0, step=0, parameterization="cm").terms)
    ['consistency']
    """
    check_parameterization(parameterization)
    form = Form(parameterization, sigma_data, t_min)
    check_pair(network, x, levels, t_min)
    key: dict[str, Any] = {"seed": seed, "step": step}
    asked: dict[str, Any] = {"extra_args": extra_args, "end": form.end, "sample_id": sample_id, **key}
    evaluate = evaluator(network, x, **asked)
    predict = evaluate if predictor is None else evaluator(predictor, x, name="predictor", **asked)
    low, high = (level.to(x.device, level_dtype(x)) for level in levels[:2])
    replaced = augmented(x, low, mu, predict, form, sample_id=sample_id, **key)
    pair = [*noisy_pair(x, low, high, **noise_key(x, seed, step, sample_id), **replaced, sigma_data=sigma_data)]
    del replaced  # as large as x
    return weighted_distance(evaluate, form, pair, levels, c=c, gradient=gradient)


def generated(
    batch: int, mu: float, *, seed: int | Tensor, step: int | Tensor, sample_id: int | Tensor = 0, device: Any = None
) -> Tensor:
    """Return which samples of a batch GC replaces, (B,) bool with probability mu, keyed by (seed, sample, step).

    >>> generated(4, 1.0, seed=0, step=0)
    tensor([True, True, True, True])
    """
    purpose = fold_in(seed, MASKS)
    u = uniform((batch, 1), seed=purpose, step=step, sample_id=sample_id, dtype=torch.float64, device=device)
    return u[:, 0] <= mu


def augmented(
    x: Tensor,
    t: Tensor,
    mu: float,
    predict: Evaluator,
    form: Form,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor,
    allowed: Tensor | None = None,
) -> dict[str, Any]:
    """Return the arguments of `noisy_pair` for x̂ = sg f̊(x + t·z, t), and the mask of the samples that it replaces.

    The mask is `generated` and `allowed`; F is not used for other samples.
    t: (B,) on x's device, in the precision of a network's levels. allowed: (B,) bool on any device; None for all.
    """
    check_number("mu", mu)
    if not 0.0 <= mu <= 1.0:
        raise ValueError(f"mu: expected a value in [0, 1], got {mu}")
    if mu == 0:
        return {}
    sources = [value for value in (seed, step, sample_id, allowed) if isinstance(value, Tensor)]
    on_host = not torch.compiler.is_compiling() and all(value.device.type == "cpu" for value in sources)
    key = noise_key(x, seed, step, sample_id)
    mask = generated(len(x), mu, **(key | {"sample_id": sample_id} if on_host else key | {"device": x.device}))
    if allowed is not None:
        mask = mask & allowed.to(mask.device)
    rows = mask.nonzero()[:, 0] if on_host else None

    def named(answer: Tensor, mask: Tensor) -> dict[str, Any]:
        if x.requires_grad:  # x̂ must be a constant; computed from F inside the op it would depend on x
            return {"x_hat": answer, "mask": mask}
        return {"F": answer, "mask": mask, "parameterization": form.parameterization, "sigma_min": form.t_min}

    if rows is None or len(rows) == len(x):
        return named(_answer(x, t, predict, form, key, None), mask.to(x.device))
    first = torch.zeros(1, dtype=torch.int64)
    asked = (rows if len(rows) else first).to(x.device, non_blocking=True)
    answer = _answer(_rows_of(x, asked), t[asked], predict, form, _key_of(key, asked), asked)
    if not len(rows):
        return {}
    places = torch.where(mask, mask.cumsum(0) - 1, -1).to(x.device, non_blocking=True)
    if x.requires_grad:
        return named(answer.index_select(0, places.clamp(min=0)), places >= 0)
    return named(answer, places)


@torch.no_grad()
def _answer(x: Tensor, t: Tensor, predict: Evaluator, form: Form, key: dict[str, Any], rows: Tensor | None) -> Tensor:
    c_in = 1 / (form.sigma_data**2 + t * t).sqrt()
    scaled = affine_step([x], [c_in], noise_weight=c_in * t, **key)
    # Networks take the logarithm of the level: at level 0, where f(x, 0) = x, they get another one.
    output = predict(scaled, torch.where(t > 0, t, 1.0), rows)
    return form.sample(scaled, output, t) if x.requires_grad else output


def _rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Return x[rows]; of contiguous samples index_select copies whole rows, in half the time."""
    return x.index_select(0, rows) if x.is_contiguous() else x[rows]


def _key_of(key: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return the key of some samples of a batch."""
    on_device = {name: x.to(rows.device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in key.items()}
    found = {name: x[rows] if isinstance(x, Tensor) and x.dim() else x for name, x in on_device.items()}
    named = any(isinstance(found[name], Tensor) and found[name].dim() for name in ("seed", "sample_id"))
    return found if named else found | {"sample_id": rows + found["sample_id"]}
