"""Pairs travel: to other devices and dtypes, through pickles, files and processes, and go on with every bit."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_diffusion
from bicm_diffusion import (
    ExactPair,
    ExactTwins,
    Preconditioned,
    RetraceWarning,
    StatePair,
    TwinPair,
    bdia_invert,
    bdia_sample,
    edict_invert,
    edict_sample,
    load_pair,
    obelm_invert,
    obelm_sample,
    save_pair,
    vp_schedule,
)
from tests.support.closed_forms import network, noise

MODEL = network(6)
SCHEDULE = vp_schedule(10, final_time=0.01)
Z = noise(4, 6, dtype=torch.float32)
WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bdia": (bdia_sample, bdia_invert, {"gamma": 0.9}),
    "bdia, per sample": (bdia_sample, bdia_invert, {"gamma": torch.tensor([0.9, 0.8, 1.0, 0.96])}),
    "bdia, fractions per sample": (
        bdia_sample,
        bdia_invert,
        {"gamma": (torch.tensor([9, 1, 1, 1]), torch.tensor([10, 1, 2, 1])), "increments": "heun"},
    ),
    "obelm": (obelm_sample, obelm_invert, {"prediction": Preconditioned("bcm", sigma_data=0.6)}),
    "edict": (edict_sample, edict_invert, {"leapfrog": True, "prediction": "v"}),
}
CASES = [(name, exact) for name in WAYS for exact in (True, False) if exact or "fractions" not in name]
each_case = pytest.mark.parametrize(("name", "exact"), CASES)
pytestmark = pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")


def through_torch(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_a_state_dict(pair: Any) -> Any:
    state = pair.state_dict()
    assert all(isinstance(x, Tensor) for x in state.values())
    return StatePair.from_state_dict(through_torch(dict(state)))


def through_a_file(pair: Any) -> Any:
    pytest.importorskip("safetensors")
    with tempfile.TemporaryDirectory() as directory:
        save_pair(pair, Path(directory) / "pair.safetensors")
        return load_pair(Path(directory) / "pair.safetensors")


TRAVELS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.load(weights_only=True)": through_torch,
    "state_dict": through_a_state_dict,
    "safetensors": through_a_file,
    "to(device)": lambda pair: pair.to("cpu"),
    "detach": lambda pair: pair.detach(),
}


@each_case
@pytest.mark.parametrize("travel", TRAVELS)
def test_a_pair_that_travelled_goes_on_with_the_same_bits(name: str, exact: bool, travel: str) -> None:
    sample, invert, options = WAYS[name]
    pair = sample(MODEL, Z, SCHEDULE, exact=exact, **options)
    arrived = TRAVELS[travel](pair)
    assert type(arrived) is type(pair)
    for one, other in zip(arrived, pair, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
    there, here = (invert(MODEL, x, SCHEDULE, exact=exact, **options) for x in (arrived, pair))
    assert torch.equal(there.z, here.z)
    if exact:
        assert torch.equal(there.info, here.info) and not there.info.any()
    with pytest.raises(ValueError, match="schedule: expected 10 steps"):
        invert(MODEL, arrived, vp_schedule(20), exact=exact, **options)


@each_case
def test_another_dtype_is_one_of_the_states(name: str, exact: bool) -> None:
    sample, invert, options = WAYS[name]
    pair = sample(MODEL, Z, SCHEDULE, exact=exact, **options)
    for half in (pair.to(torch.float16), pair.to("cpu", torch.float16), pair.to(device="cpu", dtype=torch.float16)):
        assert half.z.dtype == torch.float16 and all(x.dtype == torch.float16 for x in half)
        assert torch.equal(half.z, pair.z.half())
        if exact:
            assert torch.equal(half.q, pair.q)
    with pytest.raises(TypeError, match=r"dtype: expected a floating dtype, got torch\.int32"):
        pair.to(torch.int32)
    if exact:
        assert invert(MODEL, half.to(torch.float32), SCHEDULE, **options).q.dtype == torch.int64


def test_a_meta_device_takes_every_tensor_along() -> None:
    for exact in (True, False):
        pair = bdia_sample(MODEL, Z, SCHEDULE, exact=exact).to("meta")
        assert all(x.is_meta for x in vars(pair).values() if isinstance(x, Tensor))
        assert pair.record.origin is None or pair.record.origin.is_meta


@pytest.mark.parametrize("travel", ["pickle", "safetensors", "torch.load(weights_only=True)"])
def test_conditions_travel_as_a_digest(travel: str) -> None:
    def model(z: Tensor, times: Tensor, label: Tensor, word: str) -> Tensor:
        return torch.nn.functional.dropout(MODEL(z, times) + label, 0.1)

    one: dict[str, Any] = {"label": torch.tensor(0.5), "word": "a"}
    pair = TRAVELS[travel](bdia_sample(model, Z, SCHEDULE, extra_args=one))
    assert isinstance(pair.record.conditions, str)
    with pytest.warns(RetraceWarning, match="did not return"):
        bdia_invert(model, pair, SCHEDULE, extra_args={"word": "a", "label": torch.tensor(0.5)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bdia_invert(model, pair, SCHEDULE, extra_args={"label": torch.tensor(0.6), "word": "a"})


PROGRAM = """
import sys
sys.path.insert(0, "tests")
import torch
from tests.support.closed_forms import network, noise
from bicm_diffusion import bdia_invert, load_pair, vp_schedule

pair = load_pair(sys.argv[1])
torch.save(bdia_invert(network(6), pair, vp_schedule(10, final_time=0.01), gamma=0.9).z, sys.argv[2])
"""


@pytest.mark.slow
def test_a_pair_goes_on_in_another_process(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    x = (Z * 2**20).round() / 2**20
    save_pair(bdia_sample(MODEL, x, SCHEDULE, gamma=0.9), tmp_path / "pair")
    paths = [str(tmp_path / "pair"), str(tmp_path / "z")]
    root = Path(__file__).resolve().parents[2]
    environment = {"PYTHONPATH": f"{root}:{root / 'python'}", "PATH": ""}
    subprocess.run([sys.executable, "-c", PROGRAM, *paths], check=True, cwd=root, env=environment)
    assert torch.equal(torch.load(paths[1], weights_only=True), x)


def test_pairs_made_by_hand_travel_too() -> None:
    for pair in (StatePair(Z, Z), TwinPair(Z, Z)):
        for travel in TRAVELS.values():
            arrived = travel(pair)
            assert arrived.record is None and torch.equal(arrived.z, Z)
    exact = bdia_sample(MODEL, Z, SCHEDULE)
    plain = ExactPair(exact.q, exact.previous_q, exact.info, exact.overflow, 1.0, 1.0, torch.float32)
    for travel in TRAVELS.values():
        assert torch.equal(bdia_invert(MODEL, travel(plain), SCHEDULE).z, bdia_invert(MODEL, exact, SCHEDULE).z)


@pytest.mark.slow
def test_pairs_of_traced_loops_travel() -> None:
    fast: Callable[..., Any] = torch.compile(
        lambda z: edict_sample(MODEL, z, SCHEDULE), fullgraph=True, backend="eager"
    )
    pair = fast(Z)
    assert isinstance(pair, ExactTwins)
    expected = edict_invert(MODEL, pair, SCHEDULE).z
    for travel in TRAVELS.values():
        assert torch.equal(edict_invert(MODEL, travel(pair), SCHEDULE).z, expected)
    torch._dynamo.reset()


def test_what_is_no_pair_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state: expected the state_dict of a pair, .* got the names \['z'\]"):
        StatePair.from_state_dict({"z": Z})
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    pair = bdia_sample(MODEL, Z, SCHEDULE)
    with pytest.raises(ImportError, match=r"bicm-kernels\[diffusion\]"):
        save_pair(pair, tmp_path / "pair")


def test_what_is_no_pair_s_file_is_named(tmp_path: Path) -> None:
    torch_s = pytest.importorskip("safetensors.torch")
    pair = bdia_sample(MODEL, Z, SCHEDULE)
    torch.save(pair, tmp_path / "a.pt")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no tensors at all, but a text that is long enough to have a header")
    torch_s.save_file({"weight": Z}, tmp_path / "network")
    save_pair(pair, tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-100])
    for name, message in (
        ("a.pt", r"a\.pt; torch\.load\(path, weights_only=True\) reads"),
        ("empty", r"empty$"),
        ("text", r"text$"),
        ("cut", r"cut$"),
        ("network", "network, a safetensors file of other tensors"),
        (".", "the folder "),
    ):
        with pytest.raises(ValueError, match=rf"path: expected .* as save_pair writes it, got .*{message}"):
            load_pair(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_pair(tmp_path / "missing")
    with pytest.raises(TypeError, match="path: expected the path of a file that save_pair wrote, got an ExactPair"):
        load_pair(pair)  # type: ignore[arg-type]


def test_a_state_dict_that_lost_something_is_named() -> None:
    state = bdia_sample(MODEL, Z, SCHEDULE).state_dict()
    for wrong, message in (
        ({**state, "about": torch.zeros(3, dtype=torch.uint8)}, "got another 'about'"),
        ({**state, "about": torch.tensor(list(b"[]"))}, "got another 'about'"),
        ({**state, "about": "words"}, "with 'about' in it"),
        ({k: x for k, x in state.items() if k != "info"}, "expected the state_dict of an ExactPair, got the names"),
        ({**state, "z": Z}, "expected the state_dict of an ExactPair, got the names"),
        ({f"layer{k}.weight": Z for k in range(99)}, r"'layer7.weight', …\]$"),
    ):
        with pytest.raises(ValueError, match=f"state: .*{message}"):
            StatePair.from_state_dict(wrong)
    with pytest.raises(TypeError, match="state: expected the state_dict of a pair, got 3"):
        StatePair.from_state_dict(3)


SOME: dict[str, tuple[Any, list[int]]] = {
    "a slice": (slice(1, 3), [1, 2]),
    "a list": ([3, 0], [3, 0]),
    "a tensor": (torch.tensor([2, -4, 2]), [2, 0, 2]),
    "a mask": (torch.tensor([True, False, False, True]), [0, 3]),
    "none": ([], []),
}


@each_case
@pytest.mark.parametrize("some", SOME)
def test_some_samples_of_a_pair_retrace_to_the_same_bits(name: str, exact: bool, some: str) -> None:
    def model(z: Tensor, times: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return MODEL(z, times), MODEL(z, times) + shift

    (sample, invert, options), (index, numbers) = WAYS[name], SOME[some]
    scale, shift = torch.tensor([0.5, 1.0, 1.5, 2.0]), torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    chosen = {k: picked(value, numbers) for k, value in options.items()}
    pair = sample(model, Z, SCHEDULE, exact=exact, guidance_scale=scale, extra_args={"shift": shift}, **options)
    whole = invert(model, pair, SCHEDULE, exact=exact, guidance_scale=scale, extra_args={"shift": shift}, **options)
    part = pair[index]
    assert type(part) is type(pair) and torch.equal(part.z, pair.z[numbers])
    for arrived in (part, through_torch(part)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RetraceWarning)
            kept: dict[str, Any] = {"guidance_scale": scale[numbers], "extra_args": {"shift": shift[numbers]}}
            back = invert(model, arrived, SCHEDULE, exact=exact, **kept, **chosen)
        for one, other in zip(back, whole, strict=True):
            assert torch.equal(one, other[numbers])
        if exact:
            assert torch.equal(back.info, whole.info[numbers])
    if exact and numbers:
        with pytest.warns(RetraceWarning, match="did not return"):
            invert(lambda *a, **k: [1.01 * x for x in model(*a, **k)], part, SCHEDULE, **kept, **chosen)


def picked(value: Any, numbers: list[int]) -> Any:
    """A factor of some samples."""
    if isinstance(value, tuple):
        return tuple(picked(x, numbers) for x in value)
    return value[numbers] if isinstance(value, Tensor) else value


@each_case
def test_pairs_are_joined_and_retrace_to_the_same_bits(name: str, exact: bool) -> None:
    sample, invert, options = WAYS[name]
    pair = sample(MODEL, Z, SCHEDULE, exact=exact, **options)
    joined = StatePair.cat([pair[3:], pair[:1], pair[1:3]])
    order = [3, 0, 1, 2]
    chosen = {k: picked(value, order) for k, value in options.items()}
    back, whole = (
        invert(MODEL, joined, SCHEDULE, exact=exact, **chosen),
        invert(MODEL, pair, SCHEDULE, exact=exact, **options),
    )
    for one, other in zip(back, whole, strict=True):
        assert torch.equal(one, other[order])
    if exact:
        assert torch.equal(joined.record.origin, pair.record.origin[order])


def test_pairs_that_do_not_go_together_are_named() -> None:
    pair = bdia_sample(MODEL, Z, SCHEDULE, gamma=0.9)
    for other, error, message in (
        (bdia_sample(MODEL, Z, SCHEDULE), ValueError, r"pairs: expected one gamma, got 9 and 1"),
        (bdia_invert(MODEL, Z, SCHEDULE, gamma=0.9), ValueError, r"pairs: expected one index, got 0 and 10"),
        (bdia_sample(MODEL, Z, vp_schedule(12), gamma=0.9), ValueError, r"pairs: expected one steps, got 10 and 12"),
        (bdia_sample(MODEL, Z, vp_schedule(10), gamma=0.9), ValueError, r"pairs: expected one schedule, got several"),
        (obelm_sample(MODEL, Z, SCHEDULE), ValueError, r"pairs: expected one method, got 'BDIA' and 'O-BELM'"),
        (pair.to(torch.float64), ValueError, r"pairs: expected one dtype, got torch.float32, torch.float64"),
        (StatePair(Z, Z), TypeError, r"pairs: expected pairs of one kind, got a list of 2 \(ExactPair, StatePair\)"),
        (Z, TypeError, r"pairs: expected pairs of one kind"),
    ):
        with pytest.raises(error, match=message):
            StatePair.cat([pair, other])
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        StatePair.cat([])


def test_one_number_is_no_index_of_a_pair() -> None:
    pair = bdia_sample(MODEL, Z, SCHEDULE)
    with pytest.raises(TypeError, match=r"index: .* got 2: pair\[2:3\] is a pair of one sample, pair.z the state"):
        pair[2]
    for index in ("z", None, (slice(0, 1), 2), [0.5], torch.zeros(1, 2).long()):
        with pytest.raises(TypeError, match="index: expected"):
            pair[index]
    with pytest.raises(IndexError):
        pair[[4]]


@each_case
def test_a_pair_s_repr_is_short(name: str, exact: bool) -> None:
    pair = WAYS[name][0](MODEL, Z, SCHEDULE, exact=exact, **WAYS[name][2])
    method = {"o": "O-BELM", "b": "BDIA", "e": "EDICT"}[name[0]]
    assert repr(pair) == f"{type(pair).__name__}({method}, 10 steps, at index 0; (4, 6) torch.float32 on cpu)"
    assert repr(StatePair(Z, Z)) == "StatePair(no record; (4, 6) torch.float32 on cpu)"


@pytest.mark.parametrize("name", WAYS)
def test_a_pair_of_integers_and_floats_do_not_mix(name: str) -> None:
    for function, other in (WAYS[name][:2], WAYS[name][1::-1]):
        options = {k: value for k, value in WAYS[name][2].items() if not isinstance(value, tuple)}
        floats, integers = ("TwinPair", "ExactTwins") if name == "edict" else ("StatePair", "ExactPair")
        with pytest.raises(
            TypeError, match=rf"z: exact=False takes .* {integers}: pass exact=True, .* {floats}\(\*z\)"
        ):
            other(MODEL, function(MODEL, Z, SCHEDULE, **options), SCHEDULE, exact=False, **options)
        pair = function(MODEL, Z, SCHEDULE, exact=False, **options)
        with pytest.raises(TypeError, match=rf"z: exact=True, .* {floats}: pass exact=False, .* {floats}\(\*z\)"):
            other(MODEL, pair, SCHEDULE, **options)
        assert other(MODEL, type(pair)(*pair), SCHEDULE, **options).q.dtype == torch.int64


def test_pairs_unpack_and_are_told_by_identity() -> None:
    pair = bdia_sample(MODEL, Z, SCHEDULE, exact=False)
    z, previous = pair
    assert z is pair.z and previous is pair.previous
    assert pair == pair and pair != copy.copy(pair) and len({pair, copy.copy(pair)}) == 2
    assert {"load_pair", "save_pair"} <= set(bicm_diffusion.__all__)


def test_a_state_of_one_number_a_sample_is_inverted() -> None:
    def model(z: Tensor, times: Tensor) -> Tensor:
        return 0.1 * z

    z, schedule = torch.linspace(-1, 1, 8), vp_schedule(4)
    pair = bdia_sample(model, z, schedule)
    inverted = bdia_invert(model, pair, schedule)
    assert torch.equal(bdia_sample(model, inverted, schedule).z, pair.z)
    assert (inverted.z - z).abs().max() < 1e-6
