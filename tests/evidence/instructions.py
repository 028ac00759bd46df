"""Instructions of the loops of the CUDA kernels, counted in the machine code of one architecture.

A loop's count is that of the shortest way through it which has the 128-bit accesses of whole, aligned groups, one or
several: the way that nearly every iteration takes. What is called (square drawn_ of subnormal numbers) is not on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

#: What is computed of elements rather than of addresses and rounds: floating point and its conversions, the widening of
#: halves, and Philox's products and exclusive ors.
ARITHMETIC = re.compile(
    r"[FD](ADD|MUL|FMA|SEL|MNMX|SETP?|CHK)|H(ADD|MUL|FMA)2|MUFU|I2FP|F2FP?|PRMT|LOP3|IMAD\.(WIDE|HI)\.U32|IMAD\.U32"
)
#: An address from the number of an access, and a move from a uniform register.
OF_ADDRESSES = re.compile(r", 0x10, R|^R\d+, -?RZ, RZ, ")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    name: str
    rest: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\b0x([0-9a-f]+)\s*$", self.rest)
        return int(found[1], 16) if found and self.name.split(".")[0] == "BRA" else None

    @property
    def wide(self) -> bool:
        return re.fullmatch(r"(LDG|STG)\.E(\.\w+)*\.128(\.\w+)*", self.name) is not None

    @property
    def computes(self) -> bool:
        return ARITHMETIC.match(self.name) is not None and not OF_ADDRESSES.search(self.rest)


LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)


def functions(disassembly: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Name and instructions of every kernel, without the filling behind the last."""
    for part in disassembly.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        code = [Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in LINE.finditer(body)]
        while code and code[-1].name in ("NOP", "BRA"):
            code.pop()
        yield name.strip(), code


@dataclass
class Block:
    """Instructions that run one after another, and where it goes on."""

    instructions: list[Instruction] = field(default_factory=list)
    following: list[int] = field(default_factory=list)

    @property
    def avoided(self) -> bool:
        return any(x.name.startswith(("CALL", "EXIT", "RET")) and not x.predicate for x in self.instructions)


def blocks_of(code: list[Instruction]) -> dict[int, Block]:
    targets = {x.target for x in code if x.target is not None}
    blocks: dict[int, Block] = {}
    current: Block | None = None
    for i, x in enumerate(code):
        if current is None or x.address in targets:
            if current is not None:
                current.following.append(x.address)
            current = blocks[x.address] = Block()
        current.instructions.append(x)
        following = code[i + 1].address if i + 1 < len(code) else None
        if x.target is not None:
            current.following.append(x.target)
            # "!UPT" and "!PT" never hold; a branch without a condition has neither predicate nor operand.
            conditional = x.predicate or re.match(r"!?U?P\d", x.rest)
            if conditional and following is not None:
                current.following.append(following)
            current = None
        elif x.name.startswith(("EXIT", "RET")) and not x.predicate:
            current = None
    return blocks


#: Wide accesses of a way through a loop, and numbers that are drawn: one conversion of random bits each.
Work = tuple[int, int]


class Cost(NamedTuple):
    """Instructions, and the arithmetic among them."""

    instructions: int
    arithmetic: int


def ways_of(blocks: dict[int, Block], head: int, tail: int) -> dict[Work, Cost]:
    """The fewest instructions of a round of the loop between two addresses, by the work on the way."""

    @cache
    def ways(address: int) -> dict[Work, Cost]:
        block = blocks[address]
        found: dict[Work, Cost] = {}
        if block.avoided:
            return found
        count, wide = len(block.instructions), sum(x.wide for x in block.instructions)
        computed = sum(x.computes for x in block.instructions)
        drawn_ = sum(x.name == "I2FP.F32.U32" for x in block.instructions)
        for following in block.following:
            rest = {(0, 0): Cost(0, 0)} if following == head else {}
            if address < following <= tail:
                rest = ways(following)
            for (accesses, drawn), after in rest.items():
                work = wide + accesses, drawn_ + drawn
                cost = Cost(count + after.instructions, computed + after.arithmetic)
                found[work] = min(found.get(work, cost), cost)
        return found

    return ways(head)


def loops(code: list[Instruction], nested: bool = False) -> Iterator[dict[Work, Cost]]:
    """Of every loop without one inside, or with one: the fewest instructions of a round, by its work."""
    blocks = blocks_of(code)
    backward = [(x.target, x.address) for x in code if x.target is not None and x.target <= x.address]
    for head, tail in backward:
        inside = any(head <= h and t <= tail and (h, t) != (head, tail) for h, t in backward)
        if inside == nested:
            yield ways_of(blocks, head, tail)


def round_of(code: list[Instruction], accesses: int, drawn_: int = 0, *, nested: bool = False) -> Cost | None:
    """The cost of a round with so many wide accesses, or, of an outer loop, of a sample that has one group."""
    return min((found[accesses, drawn_] for found in loops(code, nested) if (accesses, drawn_) in found), default=None)
