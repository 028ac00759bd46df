"""Calls that no kernel takes: one warning, then the original's step on the same state, or the original's error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
)

from tests.support.diffusers_cases import CLASSES, made, model_input
from tests.support.diffusers_observed import SHAPE, accepts, both, label
from tests.support.diffusers_odd import CONFIGS, alike, outcome

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(Tensor):
    """A subclass that changes nothing."""


class Counting(Tensor):
    """A subclass that looks at every call."""

    calls = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(function, types, arguments, options or {})


def arguments_of(scheduler: Any) -> dict[str, Any]:
    return {"eta": 0.5} if accepts(scheduler.step, "eta") else {}


def two_steps(
    kind: Callable[[Tensor, Tensor], tuple[Any, Any]], odd_from: int = 0, scales: bool = True, **arguments: Any
) -> Callable[[Any], Any]:
    """A loop of three steps whose samples and outputs are odd ones from some step on."""

    def run(scheduler: Any) -> Any:
        results: list[Any] = []
        x: Any = torch.linspace(-2.0, 2.0, torch.Size(SHAPE).numel()).reshape(SHAPE)
        for k, t in enumerate(scheduler.timesteps[:3]):
            sample, output = kind(x.detach().clone(), torch.tanh(x.detach() + k)) if k >= odd_from else (x, 0.1 * x)
            if scales:
                results.append(model_input(scheduler, sample, t))
            step = scheduler.step(output, t, sample, return_dict=False, **arguments_of(scheduler), **arguments)
            results += step
            x = step[0]
            if not isinstance(x, Tensor) or x.shape != SHAPE or not (x.is_floating_point() and x.is_cpu):
                break
            if x.layout is not torch.strided:
                break
            x = x.detach().as_subclass(Tensor).float()
        return results

    return run


KINDS: dict[str, Callable[[Tensor, Tensor], tuple[Any, Any]]] = {
    "complex": lambda x, y: (x.to(torch.complex64), y.to(torch.complex64)),
    "complex sample": lambda x, y: (x.to(torch.complex64), y),
    "complex output": lambda x, y: (x, y.to(torch.complex128)),
    "conjugate": lambda x, y: ((x + 1j * y).conj(), (y + 1j * x).conj()),
    "integers": lambda x, y: ((10 * x).long(), (10 * y).long()),
    "integer sample": lambda x, y: ((10 * x).int(), y),
    "integer output": lambda x, y: (x, (10 * y).long()),
    "bytes": lambda x, y: (x.abs().to(torch.uint8), y.abs().to(torch.uint8)),
    "booleans": lambda x, y: (x > 0, y > 0),
    "boolean output": lambda x, y: (x, y > 0),
    "float8": lambda x, y: (x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)),
    "float8 output": lambda x, y: (x, y.to(torch.float8_e5m2)),
    "sparse": lambda x, y: (x.to_sparse(), y.to_sparse()),
    "sparse output": lambda x, y: (x, y.to_sparse()),
    "sparse rows": lambda x, y: (x.reshape(6, -1).to_sparse_csr(), y.reshape(6, -1).to_sparse_csr()),
    "no dimension": lambda x, y: (x.sum(), y.sum()),
    "one dimension": lambda x, y: (x.flatten(), y.flatten()),
    "a number": lambda x, y: (1.5, 0.5),
    "a number as output": lambda x, y: (x, 0.5),
    "NumPy": lambda x, y: (x.numpy(), y.numpy()),
    "NumPy output": lambda x, y: (x, y.numpy()),
    "lists": lambda x, y: (x.tolist(), y.tolist()),
    "a tuple as output": lambda x, y: (x, (y,)),
    "tuples": lambda x, y: ((x,), (y,)),
    "None as output": lambda x, y: (x, None),
    "None as sample": lambda x, y: (None, y),
    "one sample for many outputs": lambda x, y: (x[:1], y),
    "one output for many samples": lambda x, y: (x, y[:1]),
    "an output without a batch": lambda x, y: (x, y[0]),
    "an output of one channel": lambda x, y: (x, y[:, :1]),
    "an output of more channels": lambda x, y: (x, torch.cat([y, y], 1)),
    "an output of no dimension": lambda x, y: (x, y.mean()),
    "nothing": lambda x, y: (x[:0], y[:0]),
    "expanded": lambda x, y: (x[:1].expand(SHAPE), y[:1].expand(SHAPE)),
    "transposed": lambda x, y: (x.transpose(2, 3), y.transpose(2, 3)),
    "channels last": lambda x, y: (x.to(memory_format=torch.channels_last), y),
    "every second": lambda x, y: (x.repeat(1, 1, 1, 2)[..., ::2], y),
    "negated view": lambda x, y: ((x + 1j * y).conj().imag, y),
    "requires grad": lambda x, y: (x.requires_grad_(), y),
    "output requires grad": lambda x, y: (x, y.requires_grad_()),
    "a parameter": lambda x, y: (nn.Parameter(x), nn.Parameter(y)),
    "a subclass": lambda x, y: (x.as_subclass(Plain), y.as_subclass(Plain)),
    "a subclass as output": lambda x, y: (x, y.as_subclass(Plain)),
    "an overriding subclass": lambda x, y: (x.as_subclass(Counting), y.as_subclass(Counting)),
    "an overriding output": lambda x, y: (x, y.as_subclass(Counting)),
    "meta": lambda x, y: (x.to("meta"), y.to("meta")),
    "meta output": lambda x, y: (x, y.to("meta")),
    "double": lambda x, y: (x.double(), y.double()),
    "double sample": lambda x, y: (x.double(), y),
    "double output": lambda x, y: (x, y.double()),
    "half": lambda x, y: (x.half(), y.half()),
    "half output": lambda x, y: (x, y.bfloat16()),
    "two halves": lambda x, y: (x.half(), y.bfloat16()),
    "not a number": lambda x, y: (x, y * float("nan")),
    "one tensor": lambda x, y: (x, x),
}


#: What other options than the defaults read otherwise.
SOME = ("complex output", "integer output", "an output of more channels", "requires grad", "a subclass", "half output")


@pytest.mark.parametrize(
    ("cls", "config", "name"),
    [(cls, config, name) for cls, config in CONFIGS for name in (SOME if config else KINDS)],
    ids=label,
)
def test_odd_samples_and_outputs(cls: type[Any], config: dict[str, Any], name: str) -> None:
    for odd_from, scales in ((0, True), (2, False)):
        # Halves are rounded once here, and after every operation there.
        # So does DEIS's original what it predicts, a difference of terms as large as the sample.
        near = 0.05 if "hal" in name or (cls is DEISMultistepScheduler and "integer" in name) else 1e-4
        told = alike(both(cls, config), two_steps(KINDS[name], odd_from, scales), near)
        assert len(told) <= 2  # the input and the step are calls of their own


@pytest.mark.parametrize("name", ["complex", "integers", "requires grad", "half", "meta", "a tuple as output", "NumPy"])
@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, EDMEulerScheduler], ids=label)
def test_odd_samples_with_churn(cls: type[Any], name: str) -> None:
    alike(both(cls, {}), two_steps(KINDS[name], s_churn=2.0), 0.05 if name == "half" else 1e-4)


@pytest.mark.parametrize("name", ["complex", "integer sample", "one output for many samples"])
@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_what_runs_the_original_is_told_once(cls: type[Any], name: str) -> None:
    """In one loop, and in the next."""
    _, ours = both(cls, {})
    _, told = outcome(ours, two_steps(KINDS[name]))
    ours.set_timesteps(6)
    _, again = outcome(ours, two_steps(KINDS[name]))
    assert not again and all("the original step runs" in text for text in told)


# --- timesteps --------------------------------------------------------------------------------------------------------
TIMES: dict[str, Callable[[Any], Any]] = {
    "int": lambda t: int(t),
    "float": lambda t: float(t),
    "bool": lambda t: True,
    "str": lambda t: "one",
    "None": lambda t: None,
    "complex": lambda t: complex(t),
    "np.int64": lambda t: np.int64(t),
    "np.int16": lambda t: np.int16(t),
    "np.float64": lambda t: np.float64(t),
    "np.float32": lambda t: np.float32(t),
    "np.array": lambda t: np.array(t.item()),
    "np.array of one": lambda t: np.array([t.item()]),
    "copy": lambda t: t.clone(),
    "int32": lambda t: t.to(torch.int32),
    "int16": lambda t: t.to(torch.int16),
    "uint8": lambda t: t.to(torch.uint8),
    "bool tensor": lambda t: t.to(torch.bool),
    "float16": lambda t: t.to(torch.float16),
    "float32": lambda t: t.to(torch.float32),
    "float64": lambda t: t.to(torch.float64),
    "complex64": lambda t: t.to(torch.complex64),
    "one in a batch": lambda t: t.reshape(1),
    "a batch": lambda t: t.expand(SHAPE[0]),
    "as many as columns": lambda t: t.expand(SHAPE[-1]),
    "nothing": lambda t: torch.zeros(0, dtype=t.dtype),
    "a subclass": lambda t: t.clone().as_subclass(Plain),
    "meta": lambda t: t.to("meta"),
    "list": lambda t: [t.item()],
    "not a number": lambda t: float("nan"),
    "negative": lambda t: -abs(int(t)) - 1,
    "negative tensor": lambda t: -t - 1,
    "beyond": lambda t: 10**6,
    "another": lambda t: float(t) - 1.25,
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_odd_timesteps(cls: type[Any], name: str) -> None:
    def run(scheduler: Any, scaled: bool) -> Any:
        results: list[Any] = []
        x = torch.linspace(-2.0, 2.0, torch.Size(SHAPE).numel()).reshape(SHAPE)
        for k, t in enumerate(scheduler.timesteps[2:5]):
            at = TIMES[name](t)
            if k == 0 or scaled:
                results.append(model_input(scheduler, x, at if scaled else t))
            step = scheduler.step(torch.tanh(x), at, x, return_dict=False, **arguments_of(scheduler))
            results += step
            x = step[0] if tuple(step[0].shape) == SHAPE else x
        return results

    for scaled in (True, False):
        alike(both(cls, {}), partial(run, scaled=scaled))


def _as_list(x: Tensor) -> Any:
    return x.tolist()


SCHEDULES: dict[str, Callable[[Tensor], Any]] = {
    "list": _as_list,
    "tuple": lambda x: tuple(x.reshape(-1).tolist()),
    "several": lambda x: x.reshape(-1).repeat(2),
    "NumPy": lambda x: x.numpy(),
    "list of tensors": lambda x: list(x.reshape(-1)),
    "another dtype": lambda x: x.double() if x.is_floating_point() else x.int(),
    "half": lambda x: x.half(),
    "column": lambda x: x.reshape(-1, 1),
    "every second": lambda x: x.repeat_interleave(2)[::2],
    "reversed": lambda x: x.flip(0),
    "one": lambda x: x.reshape(-1)[:1],
    "none": lambda x: x.reshape(-1)[:0],
    "more": lambda x: torch.cat([x.reshape(-1)] * 2),
    "complex": lambda x: x.to(torch.complex64),
    "a parameter": lambda x: nn.Parameter(x.float()),
    "a subclass": lambda x: x.as_subclass(Plain),
    "meta": lambda x: x.to("meta"),
    "None": lambda x: None,
    "a number": lambda x: 3,
}


def _loop(given: Any, begins: bool, as_given: bool) -> Callable[[Any], Any]:
    def run(scheduler: Any) -> Any:
        results: list[Any] = []
        if begins and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        x = torch.linspace(-2.0, 2.0, torch.Size(SHAPE).numel()).reshape(SHAPE)
        for t in (scheduler.timesteps if as_given else given)[:4]:
            results.append(model_input(scheduler, x, t))
            step = scheduler.step(torch.tanh(x), t, x, return_dict=False, **arguments_of(scheduler))
            results += step
            x = step[0]
        return results

    return run


def _attributes() -> list[tuple[type[Any], str]]:
    names = ("timesteps", "sigmas", "alphas_cumprod", "final_alpha_cumprod")
    # Where sigmas count, nothing reads alpha-bar after `set_timesteps`.
    return [
        (cls, name)
        for cls in CLASSES
        for name in names
        if name in vars(both(cls, {})[0]) and not (name == "alphas_cumprod" and hasattr(made(cls), "sigmas"))
    ]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("cls", "name"), _attributes(), ids=label)
def test_odd_schedules(cls: type[Any], name: str, kind: str) -> None:
    for begins, as_given in ((True, False), (False, True)):
        schedulers = both(cls, {})
        given = schedulers[0].timesteps.clone()
        for scheduler in schedulers:
            setattr(scheduler, name, SCHEDULES[kind](getattr(scheduler, name)))
        told = alike(schedulers, _loop(given, begins, as_given))
        assert len(told) <= 1


def test_timesteps_of_numpy_and_lists_say_so() -> None:
    for cls in CLASSES:
        for kind in ("list", "NumPy"):
            original, ours = both(cls, {})
            given = original.timesteps.clone()
            for scheduler in (original, ours):
                scheduler.timesteps = SCHEDULES[kind](scheduler.timesteps)
            told = alike((original, ours), _loop(given, True, False))
            assert len(told) == 1 and "timesteps as" in told[0], told


# --- other arguments --------------------------------------------------------------------------------------------------
NUMBERS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.tensor(0.5),
    "double tensor": lambda: torch.tensor(0.5, dtype=torch.float64),
    "tensor of one": lambda: torch.tensor([0.5]),
    "parameter": lambda: nn.Parameter(torch.tensor(0.5)),
    "np.float64": lambda: np.float64(0.5),
    "np.float32": lambda: np.float32(0.5),
    "int": lambda: 1,
    "bool": lambda: True,
    "negative": lambda: -0.5,
    "large": lambda: 30.0,
    "not a number": lambda: float("nan"),
    "infinite": lambda: float("inf"),
    "None": lambda: None,
    "str": lambda: "0.5",
    "complex": lambda: 0.5j,
}
#: Arguments that are numbers, beside others that let them matter.
NUMERIC: list[tuple[type[Any], str, dict[str, Any]]] = [
    (DDIMScheduler, "eta", {}),
    *(
        (cls, name, {"s_churn": 2.0} if name != "s_churn" else {})
        for cls in (EulerDiscreteScheduler, EDMEulerScheduler)
        for name in ("s_churn", "s_tmin", "s_tmax", "s_noise")
    ),
]


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize(("cls", "name", "beside"), NUMERIC, ids=label)
def test_odd_numbers(cls: type[Any], name: str, beside: dict[str, Any], kind: str) -> None:
    def run(scheduler: Any) -> Any:
        x = torch.linspace(-2.0, 2.0, torch.Size(SHAPE).numel()).reshape(SHAPE)
        for t in scheduler.timesteps[:3]:
            model_input(scheduler, x, t)
            x, *rest = scheduler.step(0.1 * torch.tanh(x), t, x, return_dict=False, **{**beside, name: NUMBERS[kind]()})
            yield from (x, *rest)

    alike(both(cls, {}), run)


@pytest.mark.parametrize("name", ["s_tmin", "s_tmax"])
@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, EDMEulerScheduler], ids=label)
def test_bounds_of_churn_at_a_level(cls: type[Any], name: str) -> None:
    """A bound that is a level, written in decimal: PyTorch compares in the level's dtype."""
    for dtype in (torch.float32, torch.float64):
        schedulers = both(cls, {})
        for scheduler in schedulers:
            scheduler.sigmas = scheduler.sigmas.to(dtype)
            scheduler.sigmas[1:3] = torch.tensor([1.1, 0.7], dtype=torch.float64)
        for bound in (1.1, 0.7):

            def run(scheduler: Any, bound: float = bound) -> Any:
                x = torch.ones(SHAPE)
                scheduler._step_index = None
                for t in scheduler.timesteps[:4]:
                    model_input(scheduler, x, t)
                    x = scheduler.step(torch.tanh(x), t, x, s_churn=2.0, **{name: bound}).prev_sample
                    yield x

            alike(schedulers, run)


GENERATORS: dict[str, Callable[[], Any]] = {
    "list": lambda: [torch.Generator().manual_seed(k) for k in range(SHAPE[0])],
    "list of one": lambda: [torch.Generator().manual_seed(1)],
    "long list": lambda: [torch.Generator().manual_seed(k) for k in range(5)],
    "tuple": lambda: tuple(torch.Generator().manual_seed(k) for k in range(SHAPE[0])),
    "list of None": lambda: [None] * SHAPE[0],
    "seed": lambda: 5,
    "str": lambda: "five",
}
DRAWING = [cls for cls in CLASSES if accepts(cls.step, "generator")]


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("cls", DRAWING, ids=label)
def test_odd_generators(cls: type[Any], kind: str) -> None:
    solver = cls in (DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler, DPMSolverSinglestepScheduler)
    churn = {"s_churn": 2.0} if accepts(cls.step, "s_churn") else {}

    def run(scheduler: Any) -> Any:
        x = torch.linspace(-2.0, 2.0, torch.Size(SHAPE).numel()).reshape(SHAPE)
        generator = GENERATORS[kind]()
        for t in scheduler.timesteps[:3]:
            model_input(scheduler, x, t)
            arguments = {**arguments_of(scheduler), **churn}
            x = scheduler.step(torch.tanh(x), t, x, generator=generator, **arguments).prev_sample
            yield x
        if isinstance(generator, list):
            for each in generator:
                yield each.get_state()

    alike(both(cls, {"algorithm_type": "sde-dpmsolver++"} if solver else {}), run)


NOISES: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda n: n.double(),
    "float16": lambda n: n.half(),
    "integers": lambda n: n.long(),
    "complex": lambda n: n.to(torch.complex64),
    "one for the batch": lambda n: n[:1],
    "without a batch": lambda n: n[0],
    "no dimension": lambda n: n.mean(),
    "wrong shape": lambda n: n[:, :, :2],
    "NumPy": lambda n: n.numpy(),
    "a number": lambda n: 0.5,
    "requires grad": lambda n: n.clone().requires_grad_(),
    "a subclass": lambda n: n.as_subclass(Plain),
    "sparse": lambda n: n.to_sparse(),
}


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize(
    ("cls", "config"),
    [(DDIMScheduler, {}), (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"})],
    ids=label,
)
def test_odd_noise_of_the_caller(cls: type[Any], config: dict[str, Any], kind: str) -> None:
    noise = torch.linspace(-1.0, 1.0, torch.Size(SHAPE).numel()).reshape(SHAPE).flip(2)

    def run(scheduler: Any) -> Any:
        x = torch.linspace(-2.0, 2.0, torch.Size(SHAPE).numel()).reshape(SHAPE)
        for t in scheduler.timesteps[:2]:
            step = scheduler.step(
                torch.tanh(x),
                t,
                x,
                variance_noise=NOISES[kind](noise),
                return_dict=False,
                **arguments_of(scheduler),
            )
            yield from step
            x = step[0].detach()

    alike(both(cls, config), run)


def test_a_given_x0_with_odd_tensors() -> None:
    x = torch.ones(SHAPE)

    def run(scheduler: Any) -> Any:
        t = scheduler.timesteps[0]
        model_input(scheduler, x, t)
        return scheduler.step(x, t, x, pred_original_sample=x.to(torch.complex64), return_dict=False)

    assert len(alike(both(EDMEulerScheduler, {}), run)) == 1


# --- past the end, and arguments that do not fit ----------------------------------------------------------------------
def _error(call: Callable[[], Any]) -> tuple[type[Exception], str] | None:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(("cls", "config"), CONFIGS, ids=label)
def test_errors_past_the_end_read_as_the_original_s(cls: type[Any], config: dict[str, Any]) -> None:
    x = torch.ones(SHAPE)
    said: list[list[Any]] = []
    for scheduler in both(cls, config):
        times = scheduler.timesteps
        said.append([])
        for k in range(len(times) + 3):
            t = times[min(k, len(times) - 1)]
            said[-1] += [
                _error(partial(model_input, scheduler, x, t)),
                _error(partial(scheduler.step, 0.1 * x, t, x)),
                getattr(scheduler, "step_index", None),
            ]
    assert said[0] == said[1]


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_errors_of_calls_read_as_the_original_s(cls: type[Any]) -> None:
    x = torch.ones(SHAPE)
    calls: list[Callable[[Any], Any]] = [
        lambda s: s.step(),
        lambda s: s.step(x),
        lambda s: s.step(x, s.timesteps[0], x, nonsense=1),
        lambda s: s.step(x, s.timesteps[0], x[:, :, :2]),
        lambda s: s.step((x,), s.timesteps[0], x),
        lambda s: s.step(x, 5, x),
        lambda s: s.step(x, 10**6, x),
        lambda s: model_input(s),
        lambda s: model_input(s, x, 123456.5),
    ]
    for call in calls:
        theirs, ours = (_error(lambda s=s, call=call: call(s)) for s in both(cls, {}))
        assert theirs == ours


@pytest.mark.parametrize("name", ["a tuple as output", "None as sample"])
def test_no_warning_goes_with_the_original_s_error(name: str) -> None:
    for cls in CLASSES:
        _, ours = both(cls, {})
        results, told = outcome(ours, two_steps(KINDS[name], scales=False))
        assert isinstance(results[0][0], type) and not told
