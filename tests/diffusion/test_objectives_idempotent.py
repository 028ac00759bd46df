"""IGN and SIGN against plain float64, stop-gradient by stop-gradient; how often f is asked; keys, batches, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bicm_diffusion import Schedule, flow_schedule, karras_schedule, vp_schedule
from bicm_diffusion.keys import DROPOUT
from bicm_diffusion.objectives import Loss, ign_loss, sign_loss
from bicm_diffusion.samplers.prediction import Preconditioned
from bicm_kernels import fold_in, normal
from tests.support.plain_bct import gradients
from tests.support.plain_idempotent import (
    Plain,
    Score,
    denoised,
    draws,
    made,
    plain_ign,
    plain_sign,
    samples,
    squared,
)

KEY: dict[str, Any] = {"seed": 5, "step": 3}
VP, VE, FLOW = vp_schedule(4), karras_schedule(4, t_max=20.0), flow_schedule(4)
#: A flow that ends before its signal is gone.
SIGNAL = Schedule((0.0, 0.25, 0.5, 0.75), (1.0, 0.75, 0.5, 0.25), (0.0, 0.25, 0.5, 0.75), flow=True)
ALL: dict[str, float] = {"recon": 0.7, "idem": 0.3, "flow": 1.0, "dmd": 0.5, "reg": 0.25, "denoise": 0.2}


def models() -> tuple[Any, Any, Any]:
    return made(Plain, 1), made(Score, 2), made(Score, 3)


def pairs() -> tuple[Tensor, Tensor]:
    return samples(8)[:4], samples(9)[:4]


def total(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return sum((weights.get(name, 1.0) * term for name, term in terms.items()), torch.zeros(()))


def close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item() or 1.0
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("bound", [1.5, None])
def test_ign_and_its_gradients_are_the_formulas(bound: float | None, gradient: str) -> None:
    model, x = made(Plain, 1), samples()
    weights = {"recon": 20.0, "idem": 20.0, "tight": 2.5}
    z = draws(x, VP, **KEY, std=0.8)["z"]
    loss, expected = (
        ign_loss(model, x, **KEY, bound=bound, latent_std=0.8, gradient=gradient),
        plain_ign(model, x, z, bound=bound),
    )
    assert loss.terms.keys() == expected.keys()
    for name, term in expected.items():
        close(loss.terms[name], term)
        # One term at a time: the gradient of a term of ours is not scaled by its weight.
        alone = ign_loss(model, x, **KEY, bound=bound, latent_std=0.8, **{k: float(k == name) for k in weights})
        close(gradients(alone.total, model), gradients(term, model))
    close(loss.total, total(expected, weights))
    close(gradients(loss.total, model), gradients(total(expected, weights), model))


@pytest.mark.parametrize("moved", ["inner", "outer", "start", "live", "bound"])
def test_every_stop_gradient_of_ign_matters(moved: str) -> None:
    model, x = made(Plain, 1), samples()
    z = draws(x, VP, **KEY, std=1.0)["z"]
    ours = gradients(ign_loss(model, x, **KEY, recon=1.0, idem=1.0, tight=1.0).total, model)
    right, wrong = (gradients(total(plain_ign(model, x, z, bound=1.5, moved=name), {}), model) for name in ("", moved))
    close(ours, right)
    assert (ours - wrong).abs().max() > 1e-3 * right.abs().max()


SCHEDULES = {"vp": VP, "ve": VE, "flow": FLOW, "flow with signal": SIGNAL}
#: Where alpha is 0 only a velocity is defined; on a schedule that is no flow it stands for its noise.
KINDS = {name: ("flow",) if schedule is FLOW else ("noise", "v", "x0", "flow") for name, schedule in SCHEDULES.items()}
READ = [(name, kind) for name, kinds in KINDS.items() for kind in kinds]


@pytest.mark.parametrize("solver", ["empirical", "euler", "heun"])
@pytest.mark.parametrize(("name", "prediction"), READ)
def test_sign_and_its_gradients_are_the_formulas(name: str, solver: str, prediction: str) -> None:
    schedule = SCHEDULES[name]
    (model, teacher, learned), x = models(), samples()
    drawn = draws(x, schedule, **KEY, std=schedule.sigma[-1])
    given: dict[str, Any] = {"teacher": teacher, "learned": learned, "prediction": prediction, "solver": solver}
    given["pairs"] = pairs()
    expected = plain_sign(model, x, schedule, drawn, **given)
    loss = sign_loss(model, x, **KEY, schedule=schedule, **given, **ALL)
    assert loss.terms.keys() == expected.keys() == {*ALL, "learned"}
    for name, term in expected.items():
        close(loss.terms[name], term)
    for name in ALL:
        alone = sign_loss(model, x, **KEY, schedule=schedule, **given, **{k: float(k == name) for k in ALL})
        close(gradients(alone.total, model), gradients(expected[name], model))
    close(loss.total, total(expected, ALL))
    close(gradients(loss.total, model), gradients(total(expected, ALL), model))
    # What learns of f(z) learns by its own loss, and the teacher by none.
    close(gradients(loss.total, learned), gradients(expected["learned"], learned))
    assert not gradients(loss.total, teacher).any()


@pytest.mark.parametrize("alpha_power", [0, 1, 2])
@pytest.mark.parametrize("dmd_weight", ["variance", "normalised"])
def test_weights_of_dmd(dmd_weight: str, alpha_power: int) -> None:
    (model, teacher, learned), x = models(), samples()
    given: dict[str, Any] = {
        "teacher": teacher,
        "learned": learned,
        "dmd_weight": dmd_weight,
        "alpha_power": alpha_power,
    }
    none = {"recon": 0.0, "idem": 0.0, "flow": 0.0}
    loss = sign_loss(model, x, **KEY, schedule=VP, dmd=0.5, **none, **given)
    expected = plain_sign(model, x, VP, draws(x, VP, **KEY, std=VP.sigma[-1]), **given)
    close(loss.terms["dmd"], expected["dmd"])
    close(gradients(loss.total, model), 0.5 * gradients(expected["dmd"], model))


def test_preconditioned_models_are_those_of_the_denoised_sample() -> None:
    """F of EDM, whose denoised sample a model of x0 gives: equal but for the learned model's units."""
    (model, teacher, learned), x = models(), samples()
    form = Preconditioned()

    def output(of: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        def denoise(z: Tensor, t: Tensor) -> Tensor:
            t_ = t[:, None, None]
            root = (0.25 + t_ * t_).sqrt()
            return 0.25 / (0.25 + t_ * t_) * z + 0.5 * t_ / root * of(z / root, t)

        return denoise

    raw = sign_loss(
        model, x, **KEY, schedule=VE, teacher=teacher, learned=learned, prediction=form, dmd=0.5, solver="heun"
    )
    clean = {"teacher": output(teacher), "learned": output(learned), "prediction": "x0"}
    plain = sign_loss(model, x, **KEY, schedule=VE, dmd=0.5, solver="heun", **clean)
    for name in ("recon", "idem", "flow", "dmd"):
        close(raw.terms[name], plain.terms[name])
    m = draws(x, VE, **KEY, std=1.0)
    t = VE.table[0, m["m"]][:, None, None]
    y = model(draws(x, VE, **KEY, std=VE.sigma[-1])["z"]).detach()
    root = (0.25 + t * t).sqrt()
    goal = (y - 0.25 / (0.25 + t * t) * (y + t * m["own"])) / (0.5 * t / root)
    close(raw.terms["learned"], (squared(learned((y + t * m["own"]) / root, t[:, 0, 0]), goal) / 6).mean())


@pytest.mark.parametrize("moved", ["inner", "outer", "target", "around", "g", "sample"])
def test_every_stop_gradient_of_sign_matters(moved: str) -> None:
    (model, teacher, learned), x = models(), samples()
    given = {"teacher": teacher, "learned": learned, "solver": "euler"}
    drawn = draws(x, VP, **KEY, std=VP.sigma[-1])
    loss = sign_loss(model, x, **KEY, schedule=VP, dmd=1.0, denoise=1.0, **given)
    right, wrong = (total(plain_sign(model, x, VP, drawn, moved=name, **given), {}) for name in ("", moved))
    everything = nn.ModuleList([model, learned])
    ours, right_gradient, wrong_gradient = (gradients(value, everything) for value in (loss.total, right, wrong))
    close(ours, right_gradient)
    assert (ours - wrong_gradient).abs().max() > 1e-3 * right_gradient.abs().max()


@pytest.mark.parametrize(
    ("weights", "calls", "teacher_calls", "learned_calls"),
    [
        ({"idem": 0.0, "flow": 0.0}, 1, 0, 0),
        ({"recon": 0.0, "flow": 0.0}, 2, 0, 0),
        ({"recon": 0.0, "idem": 0.0}, 2, 1, 0),
        ({"recon": 0.0, "idem": 0.0, "denoise": 1.0}, 2, 1, 0),
        ({"recon": 0.0, "idem": 0.0, "flow": 0.0, "denoise": 1.0}, 1, 0, 0),
        ({"recon": 0.0, "idem": 0.0, "flow": 0.0, "dmd": 1.0}, 1, 1, 2),
        ({"recon": 0.0, "flow": 0.0, "dmd": 1.0}, 2, 1, 2),
        ({"recon": 0.0, "idem": 0.0, "flow": 0.0, "reg": 1.0}, 1, 0, 0),
        (ALL, 6, 2, 2),
        ({**ALL, "solver": "heun"}, 6, 3, 2),
        ({**ALL, "solver": "empirical"}, 6, 1, 2),
    ],
)
def test_terms_share_their_evaluations(
    weights: dict[str, Any], calls: int, teacher_calls: int, learned_calls: int
) -> None:
    (model, teacher, learned), x = models(), samples()
    sign_loss(model, x, **KEY, schedule=VP, teacher=teacher, learned=learned, pairs=pairs(), **weights)
    assert (model.calls, teacher.calls, learned.calls) == (calls, teacher_calls, learned_calls)


@pytest.mark.parametrize(
    ("weights", "calls"), [({}, 4), ({"tight": 0.0}, 3), ({"idem": 0.0}, 3), ({"idem": 0.0, "tight": 0.0}, 1)]
)
def test_ign_asks_no_more_than_it_needs(weights: dict[str, float], calls: int) -> None:
    model = made(Plain, 1)
    ign_loss(model, samples(), **KEY, **weights)
    assert model.calls == calls


def test_dropout_is_shared_and_the_generator_left_alone() -> None:
    model, x = made(Plain, 1, dropout=0.5), samples()
    before = torch.get_rng_state()
    loss = sign_loss(model, x, **KEY, schedule=VP, denoise=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    key = int(fold_in(fold_in(fold_in(KEY["seed"], DROPOUT), KEY["step"]), 0))

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(key)
        return model(x)

    drawn = draws(x, VP, **KEY, std=VP.sigma[-1])
    level, noise = VP.table[1:, drawn["n"]], drawn["noise"]
    x_n = level[0][:, None, None] * x + level[1][:, None, None] * noise
    close(loss.terms["recon"], squared(x, f(x)).mean())
    close(loss.terms["denoise"], squared(x, f(x_n)).mean())
    close(loss.terms["idem"], squared(f(drawn["z"]), f(f(drawn["z"]))).mean())


def both(rows: slice, **key: Any) -> list[Loss]:
    (model, teacher, learned), x = models(), samples()
    given: dict[str, Any] = {
        "teacher": teacher,
        "learned": learned,
        "pairs": tuple(t[rows] for t in (samples(8), samples(9))),
    }
    sign = sign_loss(model, x[rows], **KEY, **key, schedule=VP, **given, **ALL, dmd_weight="normalised", solver="heun")
    return [ign_loss(model, x[rows], **KEY, **key), sign]


def test_a_batch_may_be_split_over_machines() -> None:
    ids = torch.tensor([4, 1, 3])
    for whole, first, second in zip(both(slice(6)), both(slice(3)), both(slice(3, 6), sample_id=3), strict=True):
        for name, term in whole.terms.items():
            close(term, (first.terms[name] + second.terms[name]) / 2)
        close(whole.total, (first.total + second.total) / 2)
    (model, _, _), x = models(), samples()
    alone = sign_loss(model, x[ids], **KEY, sample_id=ids, schedule=VP)
    each = [sign_loss(model, x[k : k + 1], **KEY, sample_id=int(k), schedule=VP).total for k in ids]
    close(alone.total, torch.stack(each).mean())


def test_labels_reach_the_network_and_those_of_pairs_are_their_own() -> None:
    (model, _, _), x = models(), samples()
    noise, image = pairs()
    only = {"recon": 0.0, "idem": 0.0, "flow": 0.0, "reg": 1.0}
    named = {"shift": 0.5}
    same = sign_loss(model, x, **KEY, pairs=(noise, image), extra_args=named, **only)
    other = sign_loss(model, x, **KEY, pairs=(noise, image, {"shift": -1.0}), extra_args=named, **only)
    close(same.total, squared(model(noise, 0.5), image).mean())
    close(other.total, squared(model(noise, -1.0), image).mean())


def test_other_distances() -> None:
    (model, _, _), x = models(), samples()
    loss = sign_loss(model, x, **KEY, kind="vector", c=0.1, idem=0.0, flow=0.0)
    close(loss.total, ((squared(x, model(x)) + 0.01).sqrt() - 0.1).mean())


def test_half_precision_networks_learn_under_autocast() -> None:
    model, teacher, learned = (part.float() for part in models())
    x = samples().float()
    given: dict[str, Any] = {"teacher": teacher, "learned": learned, "pairs": tuple(t.float() for t in pairs())}
    full = sign_loss(model, x, **KEY, schedule=VP, **given, **ALL)
    with torch.autocast("cpu", torch.bfloat16):
        half = sign_loss(model, x, **KEY, schedule=VP, **given, **ALL)
    for name, term in full.terms.items():
        assert half.terms[name].dtype == torch.float32
        torch.testing.assert_close(half.terms[name], term, rtol=0.05, atol=0.02)
    half.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*model.parameters(), *learned.parameters()))


class Traced(nn.Module):
    """The network without its counters."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.first, self.second = inner.first, inner.second

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.second(self.first(x.flatten(1)).tanh()).reshape(x.shape)


class TracedScore(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.first, self.second = inner.first, inner.second

    def forward(self, z: Tensor, times: Tensor) -> Tensor:
        h = torch.cat([z.flatten(1), times[:, None].to(z.dtype)], dim=1)
        return self.second(self.first(h).tanh()).reshape(z.shape)


def test_the_default_schedule_is_fifty_steps_of_vp() -> None:
    (model, _, _), x = models(), samples()
    default, named = sign_loss(model, x, **KEY), sign_loss(model, x, **KEY, schedule=vp_schedule(50))
    assert torch.equal(default.total, named.total)


@pytest.mark.slow
def test_steps_are_one_graph() -> None:
    torch.compiler.reset()
    model, x = Traced(made(Plain, 1)), samples()
    teacher, learned = (TracedScore(made(Score, seed)) for seed in (2, 3))
    given: dict[str, Any] = {"teacher": teacher, "learned": learned, "pairs": pairs(), "solver": "heun"}
    everything = nn.ModuleList([model, learned])
    for loss in (
        lambda step: sign_loss(model, x, seed=5, step=step, schedule=VP, **given, **ALL).total,
        lambda step: sign_loss(model, x, seed=5, step=step).total,
        lambda step: ign_loss(model, x, seed=5, step=step).total,
    ):
        fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for step in (1, 2, 3):
            actual, expected = (f(step) for f in (fast, loss))
            close(actual, expected)
            close(gradients(actual, everything), gradients(expected, everything))


NONE = {"recon": 0.0, "idem": 0.0, "flow": 0.0}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda f, x: sign_loss(f, x, **KEY, **NONE),
            ValueError,
            "recon, .*denoise: expected a weight above 0, got none",
        ),
        (lambda f, x: sign_loss(f, x, **KEY, flow=-1.0), ValueError, "flow: expected a weight of at least 0, got -1"),
        (lambda f, x: sign_loss(f, x, **KEY, idem="some"), TypeError, "idem: expected a number, got 'some'"),
        (
            lambda f, x: sign_loss(f, x, **KEY, reg=1.0),
            ValueError,
            r"pairs: expected \(noise, image\) for reg, got None",
        ),
        (
            lambda f, x: sign_loss(f, x, **KEY, reg=1.0, pairs=(x, x[:2])),
            ValueError,
            r"pairs: expected image .* got \(2",
        ),
        (lambda f, x: sign_loss(f, x, **KEY, reg=1.0, pairs=x), TypeError, r"pairs: expected \(noise, image\)"),
        (
            lambda f, x: sign_loss(f, x, **KEY, dmd=1.0),
            ValueError,
            "teacher: expected a diffusion model for dmd, got None",
        ),
        (
            lambda f, x: sign_loss(f, x, **KEY, dmd=1.0, teacher=made(Score, 2)),
            ValueError,
            "learned: expected .* got None",
        ),
        (lambda f, x: sign_loss(f, x, **KEY, solver="heun"), ValueError, "teacher: expected one .* solver='empirical'"),
        (
            lambda f, x: sign_loss(f, x, **KEY, solver="rk4"),
            ValueError,
            "solver: expected one of empirical, euler, heun",
        ),
        (lambda f, x: sign_loss(f, x, **KEY, dmd_weight="none"), ValueError, "dmd_weight: expected one of variance"),
        (lambda f, x: sign_loss(f, x, **KEY, prediction="F"), ValueError, "prediction: expected"),
        (lambda f, x: sign_loss(f, x, **KEY, schedule=50), TypeError, "schedule: expected a Schedule"),
        (
            lambda f, x: sign_loss(f, x, **KEY, schedule=FLOW, teacher=made(Score, 2)),
            ValueError,
            "schedule: expected alpha > 0 for a teacher whose prediction is not 'flow'",
        ),
        (lambda f, x: sign_loss(lambda x, t: x, x, **KEY), TypeError, r"network: called as network\(x\), but it takes"),
        (lambda f, x: sign_loss(lambda x: x[:, 0], x, **KEY), ValueError, "network: expected a tensor of shape"),
        (lambda f, x: sign_loss(nn.DataParallel(f), x, **KEY), TypeError, "network: expected .* got DataParallel"),
        (lambda f, x: ign_loss(f, x, **KEY, tight=-1.0), ValueError, "tight: expected a weight of at least 0"),
        (lambda f, x: ign_loss(f, x, **KEY, bound="wide"), TypeError, "bound: expected a number, got 'wide'"),
        (lambda f, x: ign_loss(f, x, **KEY, bound=-1.5), ValueError, "bound: expected a number of at least 0, or None"),
        (lambda f, x: ign_loss(f, x, **KEY, bound=float("nan")), ValueError, "bound: expected a number of at least 0"),
        (
            lambda f, x: sign_loss(f, x, **KEY, schedule=VP, teacher=lambda z: z),
            TypeError,
            r"teacher: called as teacher\(x, t\), but it takes \(z\) .*; pass its other arguments by a lambda",
        ),
        (lambda f, x: ign_loss(f, x.long(), **KEY), TypeError, "x: expected float16"),
        (lambda f, x: ign_loss(f, x), TypeError, "seed"),
        # Or every iteration of a training loop would draw the same noise.
        (lambda f, x: ign_loss(f, x, seed=0), TypeError, "step"),
        (lambda f, x: sign_loss(f, x, seed=0), TypeError, "step"),
    ],
)
def test_wrong_calls(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(made(Plain, 1), samples())


def test_an_empty_batch_has_means_of_nothing() -> None:
    f, teacher, learned = models()
    nothing = samples()[:0]
    loss = sign_loss(f, nothing, **KEY, schedule=VP, teacher=teacher, learned=learned, dmd=1.0, prediction="x0")
    found = {**loss.terms, **ign_loss(f, nothing, **KEY).terms, **ign_loss(f, nothing, **KEY, recon=0.0).terms}
    assert sorted(found) == ["dmd", "flow", "idem", "learned", "recon", "tight"]
    assert all(term.isnan() for name, term in found.items() if name != "tight")


@pytest.mark.parametrize("sigma", [0.5, 1e-3])
def test_a_half_precision_score_model_gives_a_float32_gradient(sigma: float) -> None:
    """At a small level the gradient leaves a half's range."""
    schedule = Schedule((0.1, 0.2), (1.0, 0.9), (0.0, sigma))
    f, teacher, learned = (model.float() for model in models())
    found = []
    for output in (torch.float16, torch.float32):
        halves = [lambda z, t, m=m, d=output: m(z, t).half().to(d) for m in (teacher, learned)]
        options: dict[str, Any] = {"schedule": schedule, "recon": 0.0, "idem": 0.0, "flow": 0.0, "dmd": 1.0}
        loss = sign_loss(f, samples().float(), **KEY, **options, teacher=halves[0], learned=halves[1], prediction="x0")
        found.append(torch.autograd.grad(loss.terms["dmd"], list(f.parameters())))
    for half, full in zip(*found, strict=True):
        assert torch.isfinite(full).all()
        torch.testing.assert_close(half, full, rtol=1e-5, atol=0.0)


def test_latents_are_no_other_noise() -> None:
    model = made(Plain, 1)
    sign_loss(model, torch.zeros(4000, 2, 3, dtype=torch.float64), seed=5, step=0, recon=0.0, schedule=VE)
    z, x_n = (model.inputs[k].flatten() for k in (0, 2))
    noise = normal((4000, 2, 3), seed=5, dtype=torch.float64).flatten()
    assert z.std().item() == pytest.approx(20.0, rel=0.02)
    assert torch.corrcoef(torch.stack([z, noise, x_n]))[0, 1:].abs().max() < 0.04


def test_what_a_prediction_says_of_the_clean_sample_is_what_the_plain_loss_takes() -> None:
    z, alpha, sigma = torch.tensor(0.3), torch.tensor(0.8), torch.tensor(0.6)
    noise, x = torch.tensor(-0.5), (z - sigma * torch.tensor(-0.5)) / alpha
    for kind, output in (("noise", noise), ("x0", x), ("v", alpha * noise - sigma * x)):
        torch.testing.assert_close(denoised(kind, z, output, alpha, sigma), x)
