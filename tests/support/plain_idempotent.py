"""IGN and SIGN written plainly in float64, with every stop-gradient where the papers have it, or moved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bicm_diffusion import Schedule
from bicm_diffusion.keys import LATENTS, LEARNING, LEVELS, MATCHING
from bicm_kernels import fold_in, normal, uniform

SHAPE = (6, 2, 3)
SIZE = 6


class Plain(nn.Module):
    """f of samples of SHAPE, with dropout; counts its calls."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, 16), nn.Linear(16, SIZE)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        self.calls += 1
        self.inputs.append(x.detach())
        h = self.dropout(self.first(x.flatten(1)).tanh() + 0.5)
        return 0.5 * x + self.second(h).reshape(x.shape) + shift


class Score(nn.Module):
    """A diffusion model of samples of SHAPE, which tells every time apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE + 1, 16), nn.Linear(16, SIZE)
        self.calls = 0

    def forward(self, z: Tensor, times: Tensor) -> Tensor:
        self.calls += 1
        h = torch.cat([z.flatten(1), times[:, None].to(z.dtype)], dim=1)
        return self.second(self.first(h).tanh()).reshape(z.shape)


def made(kind: type[nn.Module], seed: int, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**options).double()


def samples(seed: int = 7) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(x: Tensor) -> Tensor:
    return x[:, None, None]


def draws(x: Tensor, schedule: Schedule, *, seed: int, step: int, std: float) -> dict[str, Tensor]:
    """Everything that a loss draws, from its documented keys."""
    key: dict[str, Any] = {"step": step, "dtype": torch.float64}

    def index(seed: Any) -> Tensor:
        u = uniform((len(x), 1), seed=fold_in(seed, LEVELS), **key)[:, 0]
        return (u * schedule.steps).ceil().long()

    own = fold_in(seed, LEARNING)
    return {
        "n": index(seed),
        "noise": normal(x.shape, seed=seed, **key),
        "z": std * normal(x.shape, seed=fold_in(seed, LATENTS), **key),
        "around": normal(x.shape, seed=fold_in(seed, MATCHING), **key),
        "m": index(own),
        "own": normal(x.shape, seed=own, **key),
    }


def squared(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).square().sum(1)


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def plain_ign(model: nn.Module, x: Tensor, z: Tensor, *, bound: float | None, moved: str = "") -> dict[str, Tensor]:
    """SIGN eq. 3 to 5; `moved` names a stop-gradient that is not where it belongs."""
    recon, y = squared(x, model(x)), model(z)
    idem = squared(y.detach() if moved == "inner" else y, (model if moved == "outer" else frozen(model))(y))
    start = y if moved == "start" else y.detach()
    tight = -squared((frozen(model) if moved == "live" else model)(start), start)
    if bound is not None:
        reach = bound * (recon if moved == "bound" else recon.detach())
        tight = reach * (tight / reach).tanh()
    return {"recon": recon.mean(), "idem": idem.mean(), "tight": tight.mean()}


def denoised(kind: str, z: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a prediction says of the clean sample."""
    return {
        "noise": lambda: (z - sigma * output) / alpha,
        "x0": lambda: output,
        "v": lambda: (alpha * z - sigma * output) / (alpha.square() + sigma.square()),
        "flow": lambda: (z - sigma * output) / (alpha + sigma),
    }[kind]()


def plain_step(
    model: nn.Module, kind: str, schedule: Schedule, x_n: Tensor, n: Tensor, *, heun: bool = False
) -> Tensor:
    """One step of the ODE, d(z/α)/d(σ/α) = ε, or dz/dσ = v of a flow's velocity."""
    straight = kind == "flow" and schedule.flow

    def level(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time, alpha, sigma = schedule.table[:, index]
        return time, column(alpha), column(sigma)

    def slope(z: Tensor, index: Tensor) -> Tensor:
        time, alpha, sigma = level(index)
        output = model(z, time)
        if straight:
            return output
        return (z - alpha * denoised(kind, z, output, alpha, sigma)) / sigma

    (_, a, s), (_, a_low, s_low) = level(n), level(n - 1)
    if straight:
        a, a_low = torch.ones_like(a), torch.ones_like(a)
    width, first = s_low / a_low - s / a, slope(x_n, n)
    euler = a_low * (x_n / a + width * first)
    if not heun:
        return euler
    second = slope(euler, (n - 1).clamp_min(schedule.lowest))
    both = a_low * (x_n / a + width * (first + second) / 2)
    return torch.where(column(n - 1 >= schedule.lowest), both, euler)


def plain_sign(
    model: nn.Module,
    x: Tensor,
    schedule: Schedule,
    drawn: Mapping[str, Tensor],
    *,
    teacher: nn.Module | None = None,
    learned: nn.Module | None = None,
    prediction: str = "noise",
    pairs: tuple[Tensor, Tensor] | None = None,
    solver: str = "empirical",
    dmd_weight: str = "variance",
    alpha_power: int = 1,
    moved: str = "",
) -> dict[str, Tensor]:
    """SIGN eq. 3, 4, 7 and 8, every term that there is something for; `moved` as in `plain_ign`."""
    n, z = drawn["n"], drawn["z"]
    (_, a, s), (_, a_low, s_low) = schedule.table[:, n], schedule.table[:, n - 1]
    a, s, a_low, s_low = (column(t) for t in (a, s, a_low, s_low))
    y = model(z)
    idem = squared(y.detach() if moved == "inner" else y, (model if moved == "outer" else frozen(model))(y))
    x_n = a * x + s * drawn["noise"]
    if solver == "empirical":
        x_s = a_low * x + s_low * drawn["noise"]
    else:
        assert teacher is not None
        x_s = plain_step(frozen(teacher), prediction, schedule, x_n, n, heun=solver == "heun")
    goal = model(x_s) if moved == "target" else model(x_s).detach()
    found = {
        "recon": squared(x, model(x)),
        "idem": idem,
        "flow": squared(model(x_n), goal),
        "denoise": squared(x, model(x_n)),
    }
    if pairs is not None:
        found["reg"] = squared(model(pairs[0]), pairs[1])
    if learned is not None and teacher is not None:
        around = a * (y if moved == "around" else y.detach()) + s * drawn["around"]
        time = schedule.table[0, n]
        clean = [denoised(prediction, around, of(around, time), a, s) for of in (learned, teacher)]
        weight = s.square() if dmd_weight == "variance" else (y - clean[1]).abs().mean((1, 2), keepdim=True)
        g = a**alpha_power * (clean[0] - clean[1]) / weight
        if moved not in ("around", "g"):
            g = g.detach()
        found["dmd"] = 0.5 * squared(y, y.detach() - g)
        m = drawn["m"]
        time, a, s = schedule.table[0, m], *(column(t) for t in schedule.table[1:, m])
        start, noise = (y if moved == "sample" else y.detach()), drawn["own"]
        noisy = a * start + s * noise
        aims = {"noise": noise, "x0": start, "v": a * noise - s * start, "flow": noise - start}
        found["learned"] = squared(learned(noisy, time), aims[prediction]) / SIZE
    return {name: term.mean() for name, term in found.items()}
