"""What the loops of the CUDA kernels cost, in the library as it was built for sm_90, and the counting itself."""

from __future__ import annotations

import re

import pytest

from tests.evidence import loops
from tests.evidence.document import written
from tests.evidence.instructions import Instruction, functions, round_of
from tests.evidence.resources import LIBRARY, compiler, output, tool

#: A loop over groups of two tensors with a way round a call, inside a loop over samples; the addresses are bytes.
LISTING = """
\t\tFunction : _ZN4bicm6kernelE
        /*0000*/                   S2R R0, SR_TID.X ;                   /* 0x0 */
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;              /* 0x0 */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;     /* 0x0 */
        /*0030*/               @P0 BRA 0x60 ;                           /* 0x0 */
        /*0040*/                   CALL.REL.NOINC 0x100 ;               /* 0x0 */
        /*0050*/                   BRA 0x70 ;                           /* 0x0 */
        /*0060*/                   I2FP.F32.U32 R8, R9 ;                /* 0x0 */
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;     /* 0x0 */
        /*0080*/              @!P1 BRA 0x20 ;                           /* 0x0 */
        /*0090*/                   IADD3 R1, R1, 0x1, RZ ;              /* 0x0 */
        /*00a0*/              @!P2 BRA 0x10 ;                           /* 0x0 */
        /*00b0*/                   EXIT ;                               /* 0x0 */
        /*00c0*/                   BRA 0xc0;                            /* 0x0 */
        /*00d0*/                   NOP;                                 /* 0x0 */
"""


def test_instructions_of_a_loop() -> None:
    ((name, code),) = functions(LISTING)
    assert name == "_ZN4bicm6kernelE"
    assert len(code) == 12
    assert round_of(code, 2, 1) == (5, 1)  # neither the call nor the branch behind it
    assert round_of(code, 2, 1, nested=True) == (8, 1)
    assert round_of(code, 2) is None
    assert round_of(code, 1, 1) is None


@pytest.mark.parametrize(
    ("name", "rest", "computes"),
    [
        ("FMUL", "R15, R23.reuse, R15", True),
        ("IMAD.U32", "R5, R2, 0x10000, RZ", True),  # a bfloat16, widened
        ("HADD2.F32", "R5, -RZ, R2.H0_H0", True),
        ("IMAD.WIDE.U32", "R4, R3, -0x326172a9, RZ", True),  # Philox
        ("IMAD.WIDE.U32", "R28, R3, 0x10, R28", False),  # an address from the number of an access
        ("IMAD.U32", "R29, RZ, RZ, UR15", False),  # a move
        ("HFMA2.MMA", "R27, -RZ, RZ, 0, 0", False),
        ("IADD3", "R8, P0, R21, UR12, RZ", False),
    ],
)
def test_arithmetic_is_of_elements(name: str, rest: str, computes: bool) -> None:
    assert Instruction(0, "", name, rest).computes is computes


needs_library = pytest.mark.skipif(
    not LIBRARY.exists() or tool("cuobjdump") is None, reason="no CUDA library was built, or there is no cuobjdump"
)


@pytest.fixture(scope="module")
def measured() -> dict[str, loops.Measured]:
    if "sm_90" not in output(str(tool("cuobjdump")), "--list-elf", LIBRARY):
        pytest.skip("the library was built for other architectures")
    return {f"{form.title}, {dtype}": found for (form, dtype), found in loops.measured().items()}


#: Instructions over arithmetic.
MOST = 1.6
#: Steps with so few registers and instructions.
SHORT = ("`scale", "`ddim", "`bdia_step`, float32", "`bdia_step`, bfloat16")


@needs_library
def test_steps_and_noise_take_few_registers_and_instructions(measured: dict[str, loops.Measured]) -> None:
    for name, m in measured.items():
        assert m.registers <= (48 if name.startswith(SHORT) else 64), name
        assert m.instructions <= MOST * m.arithmetic, name
        if name.startswith(SHORT):
            assert m.instructions <= 10, name
        if name.startswith("`normal"):
            assert m.instructions <= 56, name
        if name.startswith("`add_noise"):
            assert m.small is not None
            assert m.small <= 1.1 * m.instructions, name


@needs_library
def test_the_document_says_what_loops_cost(measured: dict[str, loops.Measured]) -> None:
    if compiler() not in written("compilers"):
        pytest.skip("the table was made by another compiler")
    assert written("loops") == loops.loops(), "run `make evidence`"


def bursts(code: list[loops.Instruction]) -> int:
    """Most wide loads one after another, with at most four other instructions between two."""
    most = count = gap = 0
    for x in code:
        if x.wide and x.name.startswith("LDG"):
            count, gap = (count + 1 if gap <= 4 else 1), 0
            most = max(most, count)
        else:
            gap += 1
    return most


@needs_library
def test_a_chunk_on_chip_is_loaded_at_once() -> None:
    """Sixteen accesses of two inputs, which wait for one another nowhere; a chunk of float64 is half as long."""
    checked = 0
    for name, code in functions(output(str(tool("cuobjdump")), "-sass", "-arch", "sm_90", LIBRARY)):
        if code and re.search(r"(resident|cluster)_kernelINS0_6PackedI[fd]EELb0", name) and any(x.wide for x in code):
            assert bursts(code) >= 16, name
            checked += 1
    assert checked >= 2


@needs_library
def test_the_library_is_small() -> None:
    assert LIBRARY.stat().st_size < 15e6
