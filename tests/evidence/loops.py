"""What the loops of the CUDA kernels cost, from their machine code for sm_90, and the bandwidth they may reach.

The share is an estimate: the least of what loads in flight, instructions and memory allow. None of it was measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .document import table
from .instructions import Instruction, functions, round_of
from .resources import LIBRARY, output, tool

ARCHITECTURE = "sm_90"
#: Elements of a group, and what a kernel's name says of its memory.
DTYPES = {"float32": (4, "PackedIfE"), "bfloat16": (8, "BFloat16E")}
#: A round of a loop moves so many groups. Of a kernel's loops that counts which moves most: another has the rest.
GROUPS = (24, 16, 8, 4, 2, 1)
#: Groups of a round whose loads wait for no other.
AT_ONCE = 4
#: A sample of this many elements is small: 3 x 32 x 32.
SMALL = 3072


@dataclass(frozen=True)
class Form:
    """A call, the kernel that it takes, its tensors, and whether it draws."""

    title: str
    kernel: str
    loads: int
    stores: int
    draws: bool = False


FORMS = (
    Form("`scale_input`", "16multistep_kernel.*Li1ELi0E", 1, 1),
    Form("`ddim_step`, `denoise`", "16multistep_kernel.*Li2ELi0E", 2, 1),
    Form("`bdia_step`", "16multistep_kernel.*Li3ELi0E", 3, 1),
    Form("`bdia_step`, guided", "16multistep_kernel.*Li3ELi1E", 4, 1),
    Form("`affine_step` of five", "16multistep_kernel.*Li5ELi0E", 5, 1),
    Form("`add_noise`", "16multistep_kernel.*Li1ELi6E", 1, 1, True),
    Form("`renoise`", "16multistep_kernel.*Li2ELi6E", 2, 2, True),
    Form("`denoised_step`, with everything", "16multistep_kernel.*Li2ELi14E", 2, 3, True),
    Form("`denoised_step` of three, with everything", "16multistep_kernel.*Li3ELi14E", 3, 3, True),
    Form("`normal`", "12noise_kernel.*DistributionE0E", 0, 1, True),
    Form("`noisy_pair`", "17noisy_pair_kernel", 1, 2, True),
    Form("`pseudo_huber`, sums of squares", "19pseudo_huber_kernel.*Lb0E", 2, 0),
    Form("`pseudo_huber`, one gradient", "15gradient_kernel.*Lb0E", 2, 1),
)


@dataclass(frozen=True)
class Card:
    """Bytes a second that a copy moves, and that a processor must have in flight for it; an assumption."""

    bandwidth: float
    in_flight: float


CARDS = {"H100": Card(3.0e12, 20e3), "H200": Card(4.3e12, 28e3)}
#: Of 132 processors with 128 lanes at 1.98 GHz, of which 85 % are assumed to be reached.
INSTRUCTIONS = 0.85 * 132 * 128 * 1.98e9
#: Of a copy's bandwidth, where nothing else is in the way.
MOST = 0.92


@dataclass(frozen=True)
class Measured:
    """Of a form in a dtype; instructions, and the arithmetic among them, are those of an element."""

    registers: int
    static: int
    instructions: float
    arithmetic: float
    small: float | None
    bytes_moved: int
    loaded: int

    @property
    def blocks(self) -> int:
        """Of 256 threads on a processor: registers are given out by eight."""
        return min(8, 65536 // (256 * (-(-self.registers // 8) * 8)))

    @property
    def in_flight(self) -> int:
        """Bytes that a processor's threads load at a time: of a round, so many groups of every input."""
        return self.blocks * 256 * self.loaded

    def share(self, card: Card) -> float:
        compute = INSTRUCTIONS / self.instructions * self.bytes_moved / card.bandwidth
        loads = self.in_flight / card.in_flight if self.loaded else 1.0
        return min(MOST, compute, loads)


def small_samples(inner: int, outer: int, group: int) -> float:
    """Instructions an element of samples that a block takes whole: threads with some groups, and what a sample adds."""
    groups = SMALL // group // 256 if SMALL // group >= 512 else 2
    return (inner + (outer - inner) / groups) / group


def measure(form: Form, dtype: str, code: list[Instruction], registers: int) -> Measured:
    group, _ = DTYPES[dtype]
    size, accesses, drawn = 16 // group, form.loads + form.stores, group if form.draws else 0
    rounds = ((n, round_of(code, n * accesses, n * drawn)) for n in GROUPS)
    groups, inner = next(((n, found) for n, found in rounds if found), (0, None))
    assert inner is not None, f"{form.title} in {dtype}: the loop was not found"
    outer = round_of(code, accesses, drawn, nested=True) if form.draws else None
    return Measured(
        registers,
        len(code),
        inner.instructions / (groups * group),
        inner.arithmetic / (groups * group),
        small_samples(inner.instructions, outer.instructions, group) if outer else None,
        size * accesses,
        16 * form.loads * min(groups, AT_ONCE),
    )


def measured() -> dict[tuple[Form, str], Measured]:
    """Every form in both dtypes, from the library as it was built."""
    dump = str(tool("cuobjdump"))
    codes = dict(functions(output(dump, "-sass", "-arch", ARCHITECTURE, LIBRARY)))
    listing = output(dump, "--dump-resource-usage", "-arch", ARCHITECTURE, LIBRARY)
    registers = {name: int(count) for name, count in re.findall(r"Function (\w+):\s+REG:(\d+)", listing)}
    found = {}
    for form in FORMS:
        for dtype, (_, memory) in DTYPES.items():
            (name,) = (name for name in codes if memory in name and re.search(form.kernel, name))
            found[form, dtype] = measure(form, dtype, codes[name], registers[name])
    return found


def loops() -> str:
    header = [
        "call, tensors",
        "registers",
        "blocks of 256 threads",
        "bytes loaded at a time",
        "instructions an element",
        "arithmetic",
    ]
    header += ["small samples", "static instructions", *(f"estimate, {card}" for card in CARDS)]
    rows = [
        [
            f"{form.title}, {dtype}",
            str(m.registers),
            str(m.blocks),
            f"{m.in_flight:,}" if m.in_flight else "",
            f"{m.instructions:.1f}",
            f"{m.arithmetic:.1f}",
            f"{m.small:.1f}" if m.small else "",
            str(m.static),
            *(f"{m.share(card):.0%}".replace("%", " %") for card in CARDS.values()),
        ]
        for (form, dtype), m in measured().items()
    ]
    return table(header, rows)


def compressed_size() -> str:
    """Size of the library, by the architectures in it."""
    listing = output(str(tool("cuobjdump")), "--list-elf", LIBRARY)
    architectures = sorted(set(re.findall(r"sm_\d+", listing)), key=lambda x: int(x[3:]))
    return f"`_C_cuda.so` for {', '.join(architectures)}: {LIBRARY.stat().st_size / 1e6:.1f} MB.\n"
