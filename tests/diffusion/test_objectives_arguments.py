"""What the objectives and their draws take as keys, levels and settings, and how they refuse the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bicm_diffusion import LevelTable, bct_loss, draw_levels, karras_levels
from bicm_diffusion.consistency.shared_draws import dropout_key
from bicm_diffusion.objectives import (
    cd_loss,
    denoising_loss,
    draw_denoising_levels,
    draw_ect_times,
    ect_loss,
    gc_loss,
    ict_loss,
    ign_loss,
    sign_loss,
)

X = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
TABLE = LevelTable(karras_levels(11))
KEY: dict[str, Any] = {"seed": 1, "step": 2, "sample_id": torch.tensor([4, 9, 2])}
TIMES = draw_ect_times(3, stage=2, **KEY)


def one(x: Tensor, *times: Tensor) -> Tensor:
    return 0.5 * x


CM: dict[str, Any] = {"parameterization": "cm"}
LOSSES: dict[str, Callable[..., Any]] = {
    "ict": lambda x=X, **key: ict_loss(one, x, draw_levels(TABLE, len(x), **KEY), **{**CM, **key}),
    "cd": lambda x=X, **key: cd_loss(one, x, draw_levels(TABLE, len(x), **KEY), denoiser=one, **{**CM, **key}),
    "gc": lambda x=X, **key: gc_loss(one, x, draw_levels(TABLE, len(x), **KEY), mu=0.5, **{**CM, **key}),
    "bct": lambda x=X, **key: bct_loss(one, x, draw_levels(TABLE, len(x), **KEY), **key),  # type: ignore[arg-type]
    "ect": lambda x=X, **key: ect_loss(one, x, TIMES, **key),
    "denoising": lambda x=X, **key: denoising_loss(one, x, torch.ones(len(x)), **key),
    "ign": lambda x=X, **key: ign_loss(one, x, **key),
    "sign": lambda x=X, **key: sign_loss(one, x, **key),
}
losses = pytest.mark.parametrize("name", LOSSES)


@losses
def test_one_seed_or_step_for_each_sample(name: str) -> None:
    """As every op takes them; masks are keyed by the first."""
    seeds, steps = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])
    for key in ({"seed": seeds, "step": 0}, {"seed": 3, "step": steps, "sample_id": KEY["sample_id"]}):
        assert LOSSES[name](**key).total.isfinite()


@losses
@pytest.mark.parametrize("argument", ["seed", "step", "sample_id"])
@pytest.mark.parametrize(
    "value", [torch.tensor(3, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int64), [1, 2], 1.5]
)
def test_keys_of_another_kind_are_named(name: str, argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument}: expected an int"):
        LOSSES[name](**{**KEY, argument: value})


@losses
@pytest.mark.parametrize("value", ["a", torch.ones(2)])
def test_extra_args_are_a_mapping(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match="extra_args: expected a mapping"):
        LOSSES[name](**KEY, extra_args=value)


LEVELS = [(name, level) for name in ("ict", "cd", "gc", "bct", "ect") for level in ("sigma_data", "t_min")]


@pytest.mark.parametrize(("name", "argument"), [*LEVELS, ("denoising", "sigma_data")])
def test_levels_are_numbers_above_0(name: str, argument: str) -> None:
    for value, error in (("a", TypeError), (None, TypeError), (-1.0, ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match=f"{argument}: expected a number"):
            LOSSES[name](**KEY, **{argument: value})


def test_settings_may_be_tensors_of_no_dimensions() -> None:
    for name in ("ict", "bct", "denoising"):
        found = LOSSES[name](**KEY, sigma_data=torch.tensor(0.5)).total
        torch.testing.assert_close(found, LOSSES[name](**KEY, sigma_data=0.5).total)
    found = denoising_loss(one, X, torch.tensor(1.0), **KEY).total
    torch.testing.assert_close(found, denoising_loss(one, X, torch.ones(3), **KEY).total)


def test_traced_draws_and_losses() -> None:
    times = make_fx(lambda x: draw_ect_times(x.shape[0], stage=0, seed=0, step=0)[0], tracing_mode="symbolic")(X)
    assert torch.equal(times(X), draw_ect_times(3, stage=0, seed=0, step=0)[0])  # type: ignore[operator]

    def loss(x: Tensor, ids: Tensor) -> Tensor:
        return denoising_loss(one, x, torch.ones(3), seed=0, step=0, sample_id=ids).total

    assert torch.equal(make_fx(loss)(X, KEY["sample_id"])(X, KEY["sample_id"]), loss(X, KEY["sample_id"]))
    torch._dynamo.reset()
    drawn = torch.compile(lambda q: draw_ect_times(4, stage=1, seed=0, step=0, q=q)[1], backend="eager", fullgraph=True)
    for q in (2.0, 3.0, 4.5):
        torch.testing.assert_close(drawn(q), draw_ect_times(4, stage=1, seed=0, step=0, q=q)[1])


def test_what_is_no_batch_is_named() -> None:
    levels = draw_levels(TABLE, 3, **KEY)
    with pytest.raises(ValueError, match=r"times: expected \(t, r\), as draw_ect_times returns, got a Dr"):
        ect_loss(one, X, levels, **KEY)
    with pytest.raises(TypeError, match=r"x: expected a tensor"):
        denoising_loss(one, "a", torch.ones(3), **KEY)  # type: ignore[arg-type]
    for t in ("a", torch.ones(2)):
        with pytest.raises(TypeError, match=r"t: expected levels \(3,\), as draw_denoising_levels gives"):
            denoising_loss(one, X, t, **KEY)  # type: ignore[arg-type]


def test_draws_out_of_range_are_named() -> None:
    key: dict[str, Any] = {"seed": 0, "step": 0}
    for value in (float("nan"), 1.5, "a"):
        with pytest.raises(TypeError, match="stage: expected an integer"):
            draw_ect_times(3, stage=value, **key)  # type: ignore[arg-type]
    for name in ("q", "k", "b"):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number, got nan"):
            draw_ect_times(3, stage=0, **key, **{name: float("nan")})  # type: ignore[arg-type]
    draws: tuple[Callable[[], Any], ...] = (
        lambda: draw_ect_times(-1, stage=0, **key),
        lambda: draw_levels(TABLE, -1, **key),
        lambda: draw_denoising_levels(-1, **key),
    )
    for draw in draws:
        with pytest.raises(ValueError, match="batch: expected at least 0 samples, got -1"):
            draw()


def test_levels_are_drawn_where_the_ids_are() -> None:
    ids = torch.tensor([4, 9, 2], device="meta")
    key: dict[str, Any] = {"seed": 0, "step": 0, "sample_id": ids}
    found = [*draw_levels(TABLE, 3, **key), draw_denoising_levels(3, **key), *draw_ect_times(3, stage=0, **key)]
    assert {(x.device.type, *x.shape) for x in found} == {("meta", 3)}
    assert draw_levels(TABLE, 3, **KEY).low.is_cpu


def test_two_levels_have_no_partner() -> None:
    levels = draw_levels(LevelTable(karras_levels(2)), 3, **KEY)
    assert torch.equal(levels.partner, levels.low)
    assert ict_loss(one, X, levels, **KEY, **CM).total.isfinite()
    with pytest.raises(ValueError, match="levels: expected a table of at least 3 levels, of which one is a partner"):
        bct_loss(one, X, levels, **KEY)  # type: ignore[arg-type]


def test_masks_are_keyed_by_the_first_sample() -> None:
    key = dropout_key(1, 2, 4)
    assert key == dropout_key(torch.tensor(1), torch.tensor(2), torch.tensor([4, 9]))
    assert key == dropout_key(torch.tensor([1, 5]), torch.tensor([2, 7]), torch.tensor([4, 9]))
    assert len({int(dropout_key(*other)) for other in ((1, 2, 4), (1, 2, 5), (1, 3, 4), (2, 2, 4))}) == 4
    on_device = dropout_key(1, 2, torch.tensor([4, 9], device="meta"))
    assert on_device == dropout_key(1, 2, 0)
    assert dropout_key(1, 2, torch.zeros(0, dtype=torch.int64)) == dropout_key(1, 2, 0)
