"""Instructions in the innermost loops of compiled functions, counted in the library's disassembly.

Callgrind does not support AVX-512, and a machine may lack it: the length of those kernels' loops can be counted
everywhere. A longer loop does more work per element, or spills registers.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

#: A function's first line, an instruction, and a jump's target in the same function.
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(\S+)(.*)$")
_JUMP = re.compile(r"^\s+([0-9a-f]+) <")

Instruction = tuple[int, str, str]


def plain_name(demangled: str) -> str:
    """A function's name without its result, namespaces, template's arguments and parameters.

    >>> plain_name("long bicm::avx512::(anonymous namespace)::fold<1, (Way)0>(bicm::Unit const&, Buffers<float>&)")
    'fold'
    """
    depth, kept = 0, ""
    for character in demangled.replace("(anonymous namespace)::", ""):
        depth -= character in ">)"
        if depth == 0 and character not in "<>()":
            kept += character
        elif depth == 0 and character == "(" and kept:
            break
        depth += character in "<("
    return kept.rpartition(" ")[2].rpartition("::")[2]


def functions(lines: Iterable[str]) -> Iterator[tuple[str, list[Instruction]]]:
    """The functions of a disassembly: name and instructions, each with its address and operands."""
    name = ""
    body: list[Instruction] = []
    for line in lines:
        if found := _FUNCTION.match(line):
            if body:
                yield name, body
            name, body = found[1], []
        elif found := _INSTRUCTION.match(line):
            body.append((int(found[1], 16), found[2], found[3]))
    if body:
        yield name, body


def innermost_loops(body: list[Instruction]) -> Iterator[list[Instruction]]:
    """The ranges between a backward jump and its target that contain no other such range."""
    places = {address: place for place, (address, _, _) in enumerate(body)}
    loops: dict[int, int] = {}
    for place, (_, operation, operands) in enumerate(body):
        target = places.get(int(found[1], 16)) if operation[0] == "j" and (found := _JUMP.match(operands)) else None
        if target is not None and target <= place:
            loops[target] = max(place, loops.get(target, 0))
    for first, last in loops.items():
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops.items()):
            yield body[first : last + 1]


def loop_lengths(lines: Iterable[str], namespace: str, registers: str) -> Counter[str]:
    """Instructions in the innermost loops over a kind of registers, by the plain names of a namespace's functions."""
    lengths: Counter[str] = Counter()
    for name, body in functions(lines):
        if f"::{namespace}::" not in name:
            continue
        loops = [loop for loop in innermost_loops(body) if any(registers in operands for _, _, operands in loop)]
        lengths[plain_name(name)] += sum(map(len, loops))
    return +lengths


def of_library(path: Path, namespace: str, registers: str) -> Counter[str]:
    """`loop_lengths` of a shared library."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        lengths = loop_lengths(listing.stdout, namespace, registers)
    if listing.returncode:
        raise subprocess.CalledProcessError(listing.returncode, command)
    return lengths


def compiler_of(path: Path) -> str:
    """The compiler named in a library's comment section."""
    dump = subprocess.run(["readelf", "-p", ".comment", str(path)], capture_output=True, text=True, check=True).stdout
    return ", ".join(sorted(set(re.findall(r"^\s*\[\s*[0-9a-f]+\]\s+(.+)$", dump, re.MULTILINE))))
