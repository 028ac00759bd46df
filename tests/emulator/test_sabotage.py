"""The checks themselves: each of these faults, planted in a working kernel, must be seen."""

from __future__ import annotations

from collections.abc import Callable

import bicm_emulator
import numpy as np
import pytest

from .checks import check_known_answers, check_normal, check_step, check_uniform
from .losses import pseudo_huber
from .model import Problem
from .problems import affine, denoised, values
from .tensors import Tensor

KEY = {"seed": 2**33 + 5, "step": 2, "sample": 7}


def honest(out: object, **key: object) -> None:
    bicm_emulator.noise("scalar", out, **key)


def drawn(out: np.ndarray, **key: object) -> np.ndarray:
    result = np.empty_like(out)
    honest(result, **key)
    return result


def swapped_words(out: np.ndarray, **key: object) -> None:
    honest(out, **{**key, "step": key["sample"], "sample": key["step"]})


def short_seed(out: np.ndarray, **key: object) -> None:
    honest(out, **{**key, "seed": key["seed"] % 2**32})


def one_sample(out: np.ndarray, **key: object) -> None:
    honest(out, **key, counts=False)


def next_quad(out: np.ndarray, **key: object) -> None:
    longer = np.empty((out.shape[0], out.shape[1] + 4), out.dtype)
    honest(longer, **key)
    out[...] = longer[:, 4:]


def rotated_lanes(out: np.ndarray, **key: object) -> None:
    out[...] = np.roll(drawn(out, **key).reshape(-1, 4), 1, axis=1).reshape(out.shape)


def short_tail(out: np.ndarray, **key: object) -> None:
    out[:, :-1] = drawn(out, **key)[:, :-1]


def long_tail(out: np.ndarray, **key: object) -> None:
    honest(np.lib.stride_tricks.as_strided(out, (out.shape[0], out.shape[1] + 1), out.strides), **key)
    honest(out, **key)


DRAW_FAULTS = [swapped_words, short_seed, one_sample, next_quad, rotated_lanes, short_tail, long_tail]


@pytest.mark.parametrize("fault", DRAW_FAULTS)
@pytest.mark.parametrize("check", [check_uniform, check_normal])
def test_faults_of_noise(check: Callable[..., None], fault: Callable[..., None]) -> None:
    check(honest, Tensor.empty((2, 64), "float32"), **KEY)
    with pytest.raises(AssertionError):
        check(fault, Tensor.empty((2, 64), "float32"), **KEY)


def swapped_angle(out: np.ndarray, **key: object) -> None:
    out[...] = drawn(out, **key).reshape(-1, 2)[:, ::-1].reshape(out.shape)


def coarse_angle(out: np.ndarray, **key: object) -> None:
    out[...] = drawn(out, **key) * np.float32(1 + 3e-6)


@pytest.mark.parametrize("fault", [swapped_angle, coarse_angle])
def test_faults_of_box_muller(fault: Callable[..., None]) -> None:
    with pytest.raises(AssertionError):
        check_normal(fault, Tensor.empty((2, 64), "float32"), **KEY)


@pytest.mark.parametrize("word", range(4))
def test_a_wrong_counter_word(word: int) -> None:
    def fault(seed: int, counters: np.ndarray) -> np.ndarray:
        counters = counters.copy()
        counters[:, word] ^= 1
        return bicm_emulator.philox("scalar", seed, counters)

    with pytest.raises(AssertionError):
        check_known_answers(fault)


def contracted(problem: Problem) -> None:
    """w_0 x_0 rounded, then a fused multiply-add."""
    x = [tensor.values.astype(np.float64) for tensor in problem.inputs]
    a, b = (np.float64(np.float32(w)) for w in problem.coefficients)
    first = (a * x[0]).astype(np.float32).astype(np.float64)
    problem.out.bits.view(np.float32)[...] = first + b * x[1]


def last_one_missing(problem: Problem) -> None:
    kept = problem.out.bits[:, -1].copy()
    problem.run("scalar")
    problem.out.bits[:, -1] = kept


def one_too_many(problem: Problem) -> None:
    problem.run("scalar")
    outside = np.flatnonzero(~problem.out.touched)
    problem.out.memory[outside[outside > np.flatnonzero(problem.out.touched)[-1]][0]] = 0


def input_overwritten(problem: Problem) -> None:
    problem.run("scalar")
    problem.inputs[0].bits[0, 0] ^= 1


@pytest.mark.parametrize("fault", [contracted, last_one_missing, one_too_many, input_overwritten])
def test_faults_of_updates(fault: Callable[[Problem], None]) -> None:
    check_step(lambda p: p.run("scalar"), affine((2, 65)))
    with pytest.raises(AssertionError):
        check_step(fault, affine((2, 65)))


def guidance_in_the_weights(problem: Problem) -> None:
    a, b = problem.coefficients
    s = problem.guidance_scale
    inputs = [*problem.inputs, problem.conditional]
    Problem(inputs, [a, b * (1 - s), b * s], problem.out).run("scalar")


def test_folding_guidance_into_the_weights_is_seen() -> None:
    problem = affine((2, 65))
    problem.conditional, problem.guidance_scale = Tensor.of(values(9, (2, 65)), "float32"), 7.5
    with pytest.raises(AssertionError):
        check_step(guidance_in_the_weights, problem)


def written_too_early(problem: Problem) -> None:
    """x0 is stored before the last input, which it replaces, is read for `out`."""
    x0, out = problem.x0, problem.out
    spare = Problem(problem.inputs, problem.x0_coefficients, x0)
    spare.run("scalar")
    Problem(problem.inputs, problem.coefficients, out).run("scalar")


def test_an_output_written_too_early_is_seen() -> None:
    problem = denoised((2, 65))
    problem.clip = problem.next = problem.noise_weight = None
    problem.x0_weight = 0.0
    problem.x0 = problem.inputs[1]
    with pytest.raises(AssertionError):
        check_step(written_too_early, problem)


def test_a_misaligned_wide_access_would_trap() -> None:
    """Tensors at odd offsets really are misaligned, so the emulator's check of wide accesses has work."""
    at = {Tensor.empty((2, 8), "float32", offset=k).bits.ctypes.data % 16 for k in range(4)}
    assert at == {0, 4, 8, 12}


@pytest.mark.parametrize("backwards", [False, True])
def test_missing_barriers_in_the_losses(device: bicm_emulator.Device, backwards: bool) -> None:
    problem = pseudo_huber((2, 3000))
    _, sums = problem.run("cuda")
    device.skips_barriers, device.backwards = True, backwards
    fault = "race: |read before it is written"
    with pytest.raises(RuntimeError, match=fault):
        problem.run("cuda")
    with pytest.raises(RuntimeError, match=fault):
        problem.differentiate("cuda", sums, 1.0, [True, False])
    with pytest.raises(RuntimeError, match=fault):
        problem.run_with_gradients("cuda", [True, False])


@pytest.mark.parametrize("backwards", [False, True])
def test_missing_barriers_and_wrong_peers_in_clusters(device: bicm_emulator.Device, backwards: bool) -> None:
    problem, wanted = pseudo_huber((2, 20_000)), [True, False]
    loss, *_ = problem.run_with_gradients("cuda", wanted)
    assert loss == problem.run("cuda")[0]
    device.backwards, device.skips_cluster_barriers = backwards, True
    with pytest.raises(RuntimeError, match=r"race: .* another block|read before it is written|a block that has ended"):
        problem.run_with_gradients("cuda", wanted)
    device.skips_cluster_barriers, device.mistakes_peer = False, True
    with pytest.raises(IndexError, match="a block that the cluster does not have"):
        problem.run_with_gradients("cuda", wanted)


def test_a_block_too_few(device: bicm_emulator.Device) -> None:
    """The last block's elements are missing from the real kernel's results."""
    problem = affine((2, 4000))
    check_step(lambda p: p.run("cuda"), problem)
    device.until_block = 3
    with pytest.raises(AssertionError):
        check_step(lambda p: p.run("cuda"), affine((2, 4000)))
