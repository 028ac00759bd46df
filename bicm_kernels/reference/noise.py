"""Keyed noise in PyTorch: Philox4x32-10, uniform and normal numbers, the forward diffusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bicm_kernels.reference.arithmetic import compute_dtype, per_sample, root

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

# The polynomials' coefficients, lowest first; the logarithm's are those of -2 log.
LOG = (
    "-0x1.555554p-1",
    "0x1.000226p-1",
    "-0x1.99a01cp-2",
    "0x1.54728ap-2",
    "-0x1.22d92ep-2",
    "0x1.0d8242p-2",
    "-0x1.055ec6p-2",
    "0x1.38c9dep-3",
)
ROOT_HALF = float.fromhex("0x1.6a09e6p-1")
MINUS_TWO_LN2 = ("-0x1.63p+0", "0x1.bd0106p-12")
SINE = ("0x1.921fb6p+0", "-0x1.4abc24p-1", "0x1.4680a0p-4", "-0x1.33183ap-8")
COSINE = ("0x1p+0", "-0x1.3bd3ccp+0", "0x1.03c1b0p-2", "-0x1.55b2b6p-6", "0x1.d4f7eep-11")


def horner(x: Tensor, coefficients: Sequence[str]) -> Tensor:
    """Evaluate a polynomial in float32, lowest coefficient first, one rounding per operation."""
    result = torch.full_like(x, float.fromhex(coefficients[-1]))
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + float.fromhex(coefficient)
    return result


def estrin(x: Tensor, coefficients: Sequence[str]) -> Tensor:
    """Evaluate a polynomial of 2^k float32 coefficients, lowest first: two halves, joined by a power of x."""
    if len(coefficients) == 2:
        return horner(x, coefficients)
    half = len(coefficients) // 2
    power = x * x
    for _ in range(half.bit_length() - 2):
        power = power * power
    return estrin(x, coefficients[half:]) * power + estrin(x, coefficients[:half])


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0 = ((second >> 32) & MASK) ^ x1 ^ k0
        x1 = second & MASK
        x2 = ((first >> 32) & MASK) ^ x3 ^ k1
        x3 = first & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return x0, x1, x2, x3


def words(value: int | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of a 64-bit integer, as int64 tensors."""
    if not isinstance(value, Tensor):
        value = value if torch.compiler.is_compiling() else int(value)  # NumPy's integers would overflow
        value = torch.full((), (value + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    value = value.to(device=device, dtype=torch.int64)
    return value & MASK, (value >> 32) & MASK


def random_bits(
    shape: Sequence[int],
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four lanes of every quad, each (B, ceil(d / 4)): contract 1's key and counter."""
    batch = shape[0]
    elements = 1
    for size in shape[1:]:
        elements *= size
    quad = torch.arange((elements + 3) // 4, dtype=torch.int64, device=device)
    if isinstance(seed, Tensor) and seed.dim() == 1:
        sample = torch.zeros(1, dtype=torch.int64, device=device)
    elif isinstance(sample_id, Tensor) and sample_id.dim() == 1:
        sample = sample_id.to(device)
    else:
        sample = words(sample_id, device)[0] + torch.arange(batch, dtype=torch.int64, device=device)
    column = (sample & MASK).unsqueeze(-1)
    key = [word.reshape(-1, 1) for word in words(seed, device)]
    counter = [quad & MASK, quad >> 32, column, words(step, device)[0].reshape(-1, 1)]
    counter = [word.expand(batch, quad.numel()) for word in counter]
    return philox4x32(counter, key)


def uniform_from_bits(bits: Tensor) -> Tensor:
    """u = fl32(fl32(r) + 0.5) 2^-32, so 0 < u <= 1."""
    return (bits.to(torch.float32) + 0.5) * 2.0**-32


def minus_two_log(u: Tensor) -> Tensor:
    """-2 log(u) of normal float32 numbers, exactly 0 at 1."""
    # u = (1 + f) 2^e with 1 + f >= sqrt(1/2). A view as integers would do too, but TorchScript cannot trace it.
    mantissa, exponent = torch.frexp(u)
    low = mantissa < ROOT_HALF
    f = torch.where(low, mantissa + mantissa, mantissa) - 1.0
    e = (exponent - low.to(torch.int32)).to(torch.float32)
    f2 = f * f
    tail = (f2 * (f * estrin(f, LOG)) + e * float.fromhex(MINUS_TWO_LN2[1])) + f2
    return (tail - (f + f)) + e * float.fromhex(MINUS_TWO_LN2[0])


def cos_sin_turns(u: Tensor) -> tuple[Tensor, Tensor]:
    """(cos 2 pi u, sin 2 pi u) for float32 u in [0, 1]."""
    turns = u * 4.0
    whole = torch.round(turns)
    r = turns - whole
    quadrant = whole.to(torch.int32)
    t = r * r
    s, c = horner(t, SINE) * r, horner(t, COSINE)
    odd = (quadrant & 1) == 1
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    return (
        torch.where(((quadrant + 1) & 2) == 2, -cosine, cosine),
        torch.where((quadrant & 2) == 2, -sine, sine),
    )


def normals_from_bits(bits: Sequence[Tensor]) -> list[Tensor]:
    """Box-Muller on lanes (0, 1) and (2, 3): radius from the first, angle from the second."""
    normals: list[Tensor] = []
    for first, second in ((bits[0], bits[1]), (bits[2], bits[3])):
        radius = root(minus_two_log(uniform_from_bits(first)))
        cosine, sine = cos_sin_turns(uniform_from_bits(second))
        normals += [radius * cosine, radius * sine]
    return normals


def interleave(lanes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Lanes (B, quads) back to the row-major elements of each sample."""
    flat = torch.stack(list(lanes), dim=-1).flatten(1)
    elements = 1
    for size in shape[1:]:
        elements *= size
    return flat[:, :elements].reshape(list(shape)).contiguous()


def uniform(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    sample_id: int | Tensor = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Keyed uniform numbers in (0, 1]."""
    bits = random_bits(shape, seed, step, sample_id, torch.device(device or "cpu"))
    lanes = [uniform_from_bits(lane) for lane in bits]
    return interleave(lanes, shape).to(dtype or torch.get_default_dtype())


def normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    sample_id: int | Tensor = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Keyed standard normal numbers."""
    bits = random_bits(shape, seed, step, sample_id, torch.device(device or "cpu"))
    return interleave(normals_from_bits(bits), shape).to(dtype or torch.get_default_dtype())


def fold_in(seed: int | Tensor, data: int | Tensor) -> int | Tensor:
    """A new seed: the first two words of Philox at the counter (data low, data high, all ones, all ones)."""
    if not isinstance(seed, Tensor) and not isinstance(data, Tensor):
        return fold_in_words(seed, data)
    devices = [x.device for x in (seed, data) if isinstance(x, Tensor)]
    device = next((device for device in devices if device.type != "cpu"), devices[0])
    ones = torch.full((), MASK, dtype=torch.int64, device=device)
    low, high, _, _ = philox4x32([*words(data, device), ones, ones], words(seed, device))
    return ((high & 0x7FFFFFFF) << 32) | low


def fold_in_words(seed: int, data: int) -> int:
    """``fold_in`` for ints, in ints."""
    x0, x1, x2, x3 = data & MASK, (data >> 32) & MASK, MASK, MASK
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        first, second = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (second >> 32) ^ x1 ^ k0, second & MASK, (first >> 32) ^ x3 ^ k1, first & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return ((x1 & 0x7FFFFFFF) << 32) | x0


def add_noise(
    x: Tensor,
    sigma: float | Tensor,
    *,
    scale: float | Tensor = 1.0,
    seed: int | Tensor,
    step: int | Tensor = 0,
    sample_id: int | Tensor = 0,
) -> Tensor:
    """scale x + sigma n."""
    compute = compute_dtype(x)
    result = per_sample(scale, x, compute) * x.to(compute)
    result = plus_noise(result, x, sigma, seed, step, sample_id)
    return result.to(x.dtype)


def plus_noise(
    result: Tensor,
    like: Tensor,
    weight: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor,
) -> Tensor:
    """result + weight n, where the weight is not zero: noise with weight zero is not drawn."""
    noise = normal(like.shape, seed=seed, step=step, sample_id=sample_id, dtype=result.dtype, device=like.device)
    w = per_sample(weight, like, result.dtype)
    # Where the weight is zero this adds -0.0, which changes no bit; its derivative is still the noise.
    still = w.detach()
    quiet = result + torch.where(noise.signbit(), (w - still) * noise, -((still - w) * noise))
    return torch.where(w != 0, result + w * noise, quiet)
