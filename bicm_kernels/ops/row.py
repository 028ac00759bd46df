"""An op's registration with torch: schemas and fake implementations, derived from the names of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bicm_kernels.ops.library import define, library
from bicm_kernels.torch_internals import bare

KEY = ("seed", "step", "sample_id")
#: Every op comes with numbers, for eager calls, and with tensors: for traced graphs, where a number would be compiled
#: in, and for per-sample arguments. The types of a number, a list of numbers and a key's integers.
NUMBERS: Types = ("float", "float[]", ("SymInt?", "SymInt", "SymInt"))
TENSORS: Types = ("Tensor?", "Tensor[]", ("Tensor?",) * 3)

Call = Sequence[Any]
Types = tuple[str, str, tuple[str, ...]]


@dataclass(eq=False)
class Row:
    """An op whose results are like its first tensor.

    A call holds its arguments in the schema's order: the tensors (of a guided op, in one sequence, then the others),
    coefficients in a sequence or the weights' sequences, guidance_scale of a guided op, numbers, integers, flags, and
    the key of the noise.
    """

    name: str
    #: "?", here and among the numbers: may be None. "!": is written to, and returned where nothing else is.
    tensors: tuple[str, ...] = ()
    #: The last tensor may be a pair, and the op writes to tensors that the caller gives.
    guided: bool = False
    #: Tensors after the sequence of a guided op.
    others: tuple[str, ...] = ()
    #: Numbers that a schema takes in one list.
    coefficients: tuple[str, ...] = ()
    #: After the tensors with names come 1 to 5 without, each with a weight of every kind.
    weights: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    #: Arguments that every overload takes unchanged, with their type: "bool cm". "ScalarType dtype" is the results'.
    flags: tuple[str, ...] = ()
    #: The name of the noise weight; the key is optional only with one.
    noise: str = ""
    #: Noise is always drawn.
    keyed: bool = False
    outs: tuple[str, ...] = ("out",)
    #: How many of these are returned, where it is not all.
    results: int = 0
    #: A result is empty where the number is None that is named here.
    needs: dict[str, str] = field(default_factory=dict)
    #: Has a second overload that records the derivative; otherwise the reference records it.
    differentiable: bool = False
    #: The reference, called with the arguments by name; by default the one of this name.
    plain: Callable[..., Any] | None = None

    #: Whether calls are spelled as exact steps' are, which the native library reads itself.
    exact: ClassVar[bool] = False

    # Attribute access is fastest on objects of at most 30 attributes: what plain calls do not need is a property.
    def __post_init__(self) -> None:
        self.results = self.results or len(self.outs)
        self.optional = {name[:-1] for name in (*self.tensors, *self.numbers) if name.endswith("?")}
        self.written = {name[:-1] for name in self.tensors if name.endswith("!")}
        self.tensors = tuple(name.rstrip("?!") for name in self.tensors)
        self.numbers = tuple(name.rstrip("?") for name in self.numbers)
        self.flag_names = tuple(flag.split()[1] for flag in self.flags)
        self.keyed = self.keyed or bool(self.noise)
        # The indices at which the parts of a call begin and end.
        self.first_number = 1 + len(self.others) if self.guided else len(self.tensors)
        self.guidance_at = self.first_number + len(self.lists)
        self.first_integer = self.guidance_at + self.guided + len(self.numbers)
        self.first_key = self.first_integer + len(self.integers) + len(self.flags)
        first = self.guidance_at + self.guided
        #: For each result, the place of the number that asks for it, or -1.
        self.asked_at = [
            first + self.numbers.index(self.needs[name]) if name in self.needs else -1 for name in self.outs
        ]
        self.define()
        #: Its overloads, by their names, and "tracked".
        self.overloads: dict[str, Any] = {}
        packet = getattr(torch.ops.bicm_kernels, self.name)
        for overload in packet.overloads():
            self.overloads[overload] = getattr(packet, overload)
        # Where no argument may be a number or a tensor, there is one overload.
        self.overloads.setdefault("tensor", packet.default)
        if self.differentiable:
            self.overloads["tracked"] = getattr(torch.ops.bicm_kernels, f"{self.name}_tracked").default
        self.bare_tensor = bare(self.overloads["tensor"])

    def plainly(self, library: Any) -> Any:
        """What the native library has to know of a plain call: see `PlainOp` in csrc/torch/dispatcher.cpp."""
        noise_at = self.guidance_at + self.guided + self.numbers.index(self.noise) if self.noise else -1
        shape = (
            self.guided,
            self.first_number,
            self.guidance_at if self.guided else -1,
            len(self.tensors) if self.weights else -1,
            noise_at,
            self.first_key if self.noise else -1,
            self.exact,
        )
        asked = tuple(self.asked_at[: self.results])
        types = tuple(argument.split()[0] for argument in self.parameters(NUMBERS))
        return library.plain_op(shape, asked, f"bicm_kernels::{self.name}", types, bare(self.overloads["default"]))

    @property
    def lists(self) -> tuple[str, ...]:
        """The arguments that a schema takes as lists of numbers."""
        return self.weights or (("coefficients",) if self.coefficients else ())

    @property
    def first_flag(self) -> int:
        """The index of the first flag in a call."""
        return self.first_integer + len(self.integers)

    @property
    def writes(self) -> bool:
        """Whether there are overloads that write to tensors that the caller gives."""
        return self.guided or len(self.outs) > self.results > 0

    def parameters(self, types: Types) -> list[str]:
        """The schema's arguments, of one flavour."""
        number, numbers, key = types

        def maybe(kind: str, name: str) -> str:
            return f"{kind}{'?' if name in self.optional and not kind.endswith('?') else ''} {name}"

        found = [maybe("Tensor(a!)" if name in self.written else "Tensor", name) for name in self.tensors]
        if self.guided:
            found = ["Tensor[] tensors", *[f"Tensor {name}" for name in self.others]]
        found += [f"{numbers} {name}" for name in self.lists]
        found += [f"{number} guidance_scale"] if self.guided else []
        found += [maybe(number, name) for name in self.numbers]
        found += [f"{key[1]} {name}" for name in self.integers]
        return [*found, *self.flags, *[f"{kind} {name}" for kind, name in zip(key, KEY, strict=True) if self.keyed]]

    def states(self) -> tuple[str, ...]:
        """The arguments that are tensors of one shape, (B, ...)."""
        return (*(("tensors", *self.others) if self.guided else self.tensors), *self.outs)

    def extra(self, types: Types) -> list[str]:
        """Arguments that only an op with outputs takes."""
        return []

    def define(self) -> None:
        """Define the schemas, with numbers and with tensors, that return and that write."""
        returns = "Tensor" if self.results == 1 else f"({', '.join(['Tensor'] * self.results)})"
        outs = ", ".join(f"Tensor({chr(ord('a') + k)}!) {name}" for k, name in enumerate(self.outs))
        known: list[str] = []
        for overload, types in (("", NUMBERS), ("tensor", TENSORS)):
            given = self.parameters(types)
            if given != known:
                name = f"{self.name}{'.' * bool(overload)}{overload}"
                define(f"{name}({', '.join(given)}) -> {returns}", self.states(), self.fake)
            if self.writes:
                name = ".".join([self.name, "_".join([*overload.split(), "out"])])
                writing = [*given, *self.extra(types), "*", outs]
                define(f"{name}({', '.join(writing)}) -> ()", self.states(), write_nothing)
            known = given
        if self.differentiable:
            twin = f"{self.name}_tracked"
            define(f"{twin}({', '.join(self.parameters(TENSORS))}) -> {returns}", self.states(), self.fake)
            library.impl(twin, lambda *call: self.overloads["tensor"](*call), "CompositeExplicitAutograd")

    def differentiate(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        """Register the derivative of the differentiable overload."""
        name = f"bicm_kernels::{self.name}_tracked"
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)

    def fake(self, *call: Any) -> Any:
        """What the op returns for tensors without values."""
        first = call[0][0] if self.guided else call[0]
        dtype = call[self.first_key - 1] if "dtype" in self.flag_names else first.dtype
        wanted = self.wanted(call)[: self.results]
        results = [torch.empty_like(first, dtype=dtype) if want else first.new_empty((0,)) for want in wanted]
        return tuple(results) if len(results) > 1 else next(iter(results), None)

    def wanted(self, call: Call) -> list[bool]:
        """Which results a call asks for."""
        return [at < 0 or call[at] is not None for at in self.asked_at]


def write_nothing(*_: Any, **outs: Tensor) -> None:
    """The fake implementation of an op with outputs: they exist already."""
