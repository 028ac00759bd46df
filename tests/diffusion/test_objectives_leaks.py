"""Nothing of a training step lives on after it: no graph refers to itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bicm_diffusion import (
    LevelTable,
    bct_loss,
    cd_loss,
    denoising_loss,
    draw_denoising_levels,
    draw_levels,
    ect_loss,
    gc_loss,
    ict_loss,
    ign_loss,
    karras_levels,
    sign_loss,
)

KEY: dict[str, Any] = {"seed": 0, "step": 0}
LOW, HIGH = torch.full((4,), 0.5), torch.full((4,), 1.0)
GRADIENTS = ("auto", "backward", "forward")


class Watched(nn.Module):
    """A network of any number of times whose outputs are known by weak references."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outputs: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        output = self.inner(x).tanh()
        self.outputs.append(weakref.ref(output))
        return output


def sign(f: Any, x: Tensor, teacher: Any, learned: Any, **options: Any) -> Any:
    more = {"teacher": teacher, "learned": learned, "pairs": (x, x), "dmd": 1.0, "reg": 1.0, "denoise": 1.0}
    return sign_loss(f, x, **KEY, prediction="x0", **more, **options)


def table() -> Any:
    return draw_levels(LevelTable(karras_levels(11)), 4, **KEY)


LOSSES: dict[str, Callable[..., Any]] = {
    "ign": lambda f, x, t, s, **o: ign_loss(f, x, **KEY, **o),
    "ign, unbounded": lambda f, x, t, s, **o: ign_loss(f, x, **KEY, bound=None, **o),
    "ign, tight alone": lambda f, x, t, s, **o: ign_loss(f, x, **KEY, recon=0.0, idem=0.0, tight=1.0, **o),
    "sign": lambda f, x, t, s, **o: sign(f, x, t, s, **o),
    "bct": lambda f, x, t, s, **o: bct_loss(f, x, table(), **KEY, **o),
    "ict": lambda f, x, t, s, **o: ict_loss(f, x, (LOW, HIGH), t_min=0.5, **KEY, **o),
    "gc": lambda f, x, t, s, **o: gc_loss(f, x, (LOW, HIGH), t_min=0.5, **KEY, **o),
    "ect": lambda f, x, t, s, **o: ect_loss(f, x, (HIGH, LOW), mu=0.5, **KEY, **o),
    "cd": lambda f, x, t, s, **o: cd_loss(f, x, (LOW, HIGH), denoiser=t, t_min=0.5, **KEY, **o),
    "denoising": lambda f, x, t, s, **o: denoising_loss(f, x, draw_denoising_levels(4, **KEY), **KEY),
}


@pytest.mark.parametrize("differentiated", [True, False], ids=["step", "value"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_leaves_nothing(name: str, gradient: str, differentiated: bool) -> None:
    models, x = [Watched() for _ in range(3)], torch.randn(4, 6)
    for _ in range(2):
        loss = LOSSES[name](*[models[0], x, *models[1:]], gradient=gradient)
        total = getattr(loss, "total", loss)
        if differentiated:
            total.backward()
        del loss, total
    gc.collect()
    outputs = [ref for model in models for ref in model.outputs]
    assert outputs and not [ref for ref in outputs if ref() is not None]


@pytest.mark.parametrize(
    ("weights", "recorded"),
    [
        ({}, [True, True, True, True]),
        ({"recon": 0.0}, [False, True, True, True]),
        ({"idem": 0.0}, [True, False, True]),
        ({"recon": 0.0, "idem": 0.0}, [False, False, True]),
    ],
)
def test_ign_records_only_what_is_differentiated(weights: dict[str, float], recorded: list[bool]) -> None:
    network, found = nn.Linear(6, 6), []
    network.register_forward_hook(lambda _, inputs, output: found.append(output.requires_grad))
    ign_loss(network, torch.randn(4, 6), **KEY, **weights).total.backward()
    assert found == recorded
