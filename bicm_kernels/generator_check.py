"""A comparison, made once, of the native library's draws from torch's generator with torch's own.

How torch.randn turns a generator's words into numbers is an implementation detail of torch (polynomials, roundings).
Another build or processor may differ, so the native library draws only where the bits agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

Draw = Callable[[Sequence[int], Generator], Tensor | None]

#: Sizes that end on and off block boundaries, within the generator's 624 words and beyond them.
SIZES = (16, 17, 31, 100, 600, 625, 2048, 5000)

#: State words that yield hard cases: numbers that reveal the last bit of any coefficient, or a single product
#: that is rounded before it is added; includes the ends of the range.
HARD = (
    *(0xE9D193D5, 0x21473856, 0xC74E43B4, 0xF62D7A6F, 0x809B1C78, 0x21473856, 0x809B1C78, 0xE9D193D5),
    *(0xBEE89E1A, 0x3438F708, 0x00000000, 0x4FC029DA, 0xBEE89E1A, 0x7F3C2FCD, 0x102600C8, 0x4FC029DA),
    *(0x21473856, 0x00000000, 0xE9D193D5, 0x809B1C78, 0xE9D193D5, 0xC74E43B4, 0xC74E43B4, 0x21473856),
    *(0xD42356ED, 0xE64B72B6, 0xA50AA3B1, 0x3438F708, 0x04C88921, 0xE64B72B6, 0x102600C8, 0xF62D7A6F),
)

#: A state's size in 64-bit integers, and where its words begin.
STATE, WORDS = 632, 3


def hard_generator() -> Generator | None:
    """A generator whose next draws are the hard cases; None where the state has another layout."""
    generator = Generator()
    state = generator.get_state()
    if state.shape != (8 * STATE,):
        return None
    fields = state.view(torch.int64)
    fields[1], fields[2] = 1 << 32 | 624, 1  # a seeded one, with 624 - 1 words left behind the first
    fields[WORDS + 1 : WORDS + 1 + len(HARD)] = torch.tensor(HARD)
    generator.set_state(state)
    return generator


def agree(draw: Draw) -> bool | None:
    """Whether draws and the state after them equal torch's, bit by bit; None where this cannot be checked now."""
    plain = Generator().manual_seed(0)
    if draw((16,), plain) is None:
        return None
    hard = hard_generator()
    if hard is None:
        return False
    for generator, sizes in ((hard, (len(HARD),)), (Generator().manual_seed(0), SIZES)):
        twin = generator.clone_state()
        for size in sizes:
            ours, theirs = draw((size,), generator), torch.randn(size, generator=twin, dtype=torch.float32)
            if ours is None or not torch.equal(ours.view(torch.int32), theirs.view(torch.int32)):
                return False
            if not torch.equal(generator.get_state(), twin.get_state()):
                return False
    return True
