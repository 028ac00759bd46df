"""An op as one row of a table: its schemas, what it returns without values, its checks, its reference and its call.

A row names the arguments; everything that an op needs beside its kernels is derived from it. A public function is a
signature, a docstring and a call of its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bicm_kernels import backend, reference
from bicm_kernels.ops import arguments, outputs
from bicm_kernels.ops.arguments import dynamo
from bicm_kernels.ops.library import define, library, without_lists
from bicm_kernels.torch_internals import bare, implementations

_KEY = ("seed", "step", "sample_id")
#: Every op comes with numbers, for eager calls, and with tensors: for traced graphs, where a number would be compiled
#: in, and for per-sample arguments. The types of a number, a list of numbers and a key's integers.
NUMBERS: Types = ("float", "float[]", ("SymInt?", "SymInt", "SymInt"))
TENSORS: Types = ("Tensor?", "Tensor[]", ("Tensor?",) * 3)

#: What an overload with numbers takes as it is.
PLAIN = frozenset((float, int, bool, type(None)))

Call = Sequence[Any]
Types = tuple[str, str, tuple[str, ...]]


#: How many implementations there were at the last look.
_implementations = -1
#: What the package itself registers from Python: shapes without values, Triton kernels.
_OURS = ("Meta", "CUDA", "XPU")


def _may_go_direct() -> bool:
    """Whether the native library declined a call for implementations that are new, none of which replaces ours."""
    global _implementations
    if len(implementations) == _implementations:
        return False
    _implementations = len(implementations)
    ours = (entry.split("/")[1:] for entry in implementations if entry.startswith("bicm_kernels/"))
    replaced = any(key not in _OURS and hasattr(backend.library, name.partition(".")[0]) for name, key in ours)
    backend.library.know_implementations(-1 if replaced else _implementations)
    return not replaced


@dataclass(eq=False)
class Op:
    """An op that makes tensors like its first one.

    A call holds its arguments in the schema's order: the tensors (of a guided op, in one sequence), coefficients in a
    sequence or the weights' sequences, guidance_scale of a guided op, numbers, flags, and the key of the noise.
    """

    name: str
    #: With "?", here and among the numbers: may be None.
    tensors: tuple[str, ...] = ()
    #: The last tensor may be a pair, and the op writes to tensors that the caller gives.
    guided: bool = False
    #: Numbers that a schema takes in one list.
    coefficients: tuple[str, ...] = ()
    #: After the tensors with names come 1 to 5 without, each with a weight of every kind.
    weights: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    #: The number that weighs keyed noise; only where there are weights may the key be left out.
    noise: str = ""
    outs: tuple[str, ...] = ("out",)
    #: How many of these are returned, where it is not all.
    results: int = 0
    #: A result is empty where the number is None that is named here.
    needs: dict[str, str] = field(default_factory=dict)
    #: Has a twin of tensors that records the derivative in the tensors; else the reference does.
    differentiable: bool = False
    #: The twin, where it is another op.
    tracked: Callable[..., Any] | None = None
    #: The reference, called with the arguments by name; by default the one of this name.
    plain: Callable[..., Any] | None = None
    #: The schemas' name: another op's, where this one is a form of it.
    schema: str = ""

    def __post_init__(self) -> None:
        self.results = self.results or len(self.outs)
        self.optional = {name[:-1] for name in (*self.tensors, *self.numbers) if name.endswith("?")}
        self.tensors = tuple(name.rstrip("?") for name in self.tensors)
        self.numbers = tuple(name.rstrip("?") for name in self.numbers)
        self.lists = self.weights or (("coefficients",) if self.coefficients else ())
        # Where the parts of a call begin and end.
        self.first_number = 1 if self.guided else len(self.tensors)
        self.first_flag = self.first_number + len(self.lists) + self.guided + len(self.numbers)
        self.first_key = self.first_flag + len(self.flags)
        self.guidance_at = self.first_number + len(self.lists)
        self.noise_at = self.guidance_at + self.guided + self.numbers.index(self.noise) if self.noise else -1
        if not self.schema:
            self.schema = self.name
            self.define()
        packet = getattr(torch.ops.bicm_kernels, self.schema)
        self.default: Any = packet.default
        self.tensor: Any = getattr(packet, "tensor", None)
        self.bare, self.bare_tensor = bare(self.default), bare(self.tensor)
        if self.guided:
            self.out: Any = getattr(packet, "out", None)
            self.tensor_out: Any = getattr(packet, "tensor_out", None)
        if self.differentiable:
            self.tracked = getattr(torch.ops.bicm_kernels, f"{self.name}_tracked").default

    # What torch is told.

    def parameters(self, types: Types) -> list[str]:
        """The schema's arguments, of one flavour."""
        number, numbers, key = types
        found = ["Tensor[] tensors"] if self.guided else [f"Tensor {name}" for name in self.tensors]
        found += [f"{numbers} {name}" for name in self.lists]
        found += [f"{number} guidance_scale"] if self.guided else []
        for name in self.numbers:
            found.append(f"{number}{'?' if name in self.optional and not number.endswith('?') else ''} {name}")
        found += [f"bool {name}" for name in self.flags]
        return found + [f"{kind} {name}" for kind, name in zip(key, _KEY, strict=True) if self.noise]

    def states(self) -> tuple[str, ...]:
        """The arguments that are tensors of one shape, (B, ...)."""
        return (*(("tensors",) if self.guided else self.tensors), *self.outs)

    def extra(self, types: Types) -> list[str]:
        """Arguments that only an op with outputs takes."""
        return []

    def define(self) -> None:
        """Define the schemas, with numbers and with tensors, that return and that write."""
        returns = "Tensor" if self.results == 1 else f"({', '.join(['Tensor'] * self.results)})"
        outs = ", ".join(f"Tensor({chr(ord('a') + k)}!) {name}" for k, name in enumerate(self.outs))
        for overload, types in (("", NUMBERS), ("tensor", TENSORS)):
            given = self.parameters(types)
            define(
                f"{self.name}{'.' * bool(overload)}{overload}({', '.join(given)}) -> {returns}",
                self.states(),
                self.fake,
            )
            if self.guided:
                writing = ".".join([self.name, "_".join([*overload.split(), "out"])])
                given += [*self.extra(types), "*", outs]
                define(f"{writing}({', '.join(given)}) -> ()", self.states(), write_nothing)
        if self.differentiable:
            twin = f"{self.name}_tracked"
            define(f"{twin}({', '.join(self.parameters(TENSORS))}) -> {returns}", self.states(), self.fake)
            library.impl(twin, lambda *call: self.tensor(*call), "CompositeExplicitAutograd")

    def differentiate(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        """Give the differentiable twin its derivative."""
        name = f"bicm_kernels::{self.name}_tracked"
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)

    def fake(self, *call: Any) -> Any:
        """What the op returns for tensors without values."""
        first = call[0][0] if self.guided else call[0]
        numbers = dict(zip(self.numbers, call[self.first_flag - len(self.numbers) :], strict=False))
        empty = {name for name, number in self.needs.items() if numbers[number] is None}
        results = tuple(first.new_empty((0,)) if name in empty else torch.empty_like(first) for name in self.outs)
        return results if len(results) > 1 else results[0]

    # How it is called.

    def call(self, *call: Any, outs: Any = None) -> Any:
        """Run the kernel, beside the dispatcher where it can be; a reference where something asks for it."""
        direct = backend.direct
        if direct is not None and outs is None and not dynamo():
            result = getattr(direct, self.schema)(*call)
            if result is None and _may_go_direct():
                result = getattr(direct, self.schema)(*call)
            if result is not None:
                return result
        return self.run(call, outs)

    def run(self, call: Call, outs: Sequence[Tensor] | None) -> Any:
        """The way through the dispatcher."""
        if self.weights:
            lists = map(arguments.weight_list, self.weights, call[1:])
            call = (call[0], *lists, *call[self.guidance_at :])
        if self.noise:
            arguments.check_noise(self.noise, call[self.noise_at], call[self.first_key], optional=bool(self.weights))
        try:
            tensors, full = self.spread(call)
            first = tensors[0]
            if outs is None and arguments.quiet(first, tensors):
                if self.simple(full):
                    return self.asked_for(call, self.bare(*full))
                numbers = arguments.numbers(full[self.first_number :])
                if not arguments.requires_grad(*numbers):
                    return self.asked_for(call, self.bare_tensor(*self.as_tensors(call, full)))
            tracked = arguments.requires_grad(*tensors, *(outs or ()))
            numbers = arguments.numbers(full[self.first_number :])
            untracked = arguments.requires_grad(*numbers) or (tracked and self.tracked is None)
            fallback = arguments.needs_reference(first, tracked=untracked)
            if fallback or arguments.unseen(first):
                self.check(call, outs)
            if fallback:
                results = self.reference(call)
                if outs is None:
                    return results
                outputs.write(outs, results, untracked)
                return self.given(outs)
            return self.asked_for(call, self.launch(*self.flavour(call, full, tracked, outs), outs))
        except arguments.FAILURES as error:
            arguments.explain(error, lambda: self.check(call, outs))

    def spread(self, call: Call) -> tuple[list[Tensor], list[Any]]:
        """The tensors of a call, and the arguments as the schema takes them; TypeError for what no kernel can tell."""
        full = [*call]
        if self.noise:
            full[self.first_key :] = map(arguments.counter, full[self.first_key :])
        if not self.guided:
            return full[: self.first_number], full
        operands, guidance = call[0], call[self.guidance_at]
        if isinstance(operands, Tensor):
            raise TypeError("one tensor for a sequence of them")
        last = operands[-1]
        paired = not isinstance(last, Tensor)
        if paired != (guidance is not None):
            raise TypeError("guidance_scale and a pair of predictions go together")
        if self.weights and len(full[1]) != len(operands) - len(self.tensors):  # a pair has one weight, and two tensors
            raise TypeError("as many weights as tensors")
        full[0] = tensors = [*operands[:-1], *last] if paired else [*operands]
        if not paired:
            full[self.guidance_at] = 0.0
        return tensors, full

    def simple(self, full: Call) -> bool:
        """Whether all that is no tensor is a plain Python number, the usual call."""
        numbers = self.first_number
        for values in full[numbers : self.guidance_at]:
            if not PLAIN.issuperset(map(type, values)):
                return False
        return PLAIN.issuperset(map(type, full[self.guidance_at :]))

    def flavour(self, call: Call, full: list[Any], tracked: bool, outs: Any) -> tuple[Any, Call]:
        """The overload that takes a call, and its arguments."""
        if not tracked and arguments.plain(full[self.first_number :]):
            function = self.default if outs is None else self.out
        else:
            full = self.as_tensors(call, full)
            if tracked:
                return self.tracked, full
            function = self.tensor if outs is None else self.tensor_out
        return without_lists(function) if self.guided and arguments.scripting() else function, full

    def as_tensors(self, call: Call, full: list[Any]) -> list[Any]:
        """The arguments of the overload with tensors."""
        values = arguments.coefficients(full[self.first_number : self.first_flag])
        if self.guided and call[self.guidance_at] is None:
            values[len(self.lists)] = None
        key: tuple[Any, ...] = ()
        if self.noise:
            seed, step, sample_id = full[self.first_key :]
            key = arguments.key(seed, step, sample_id, call[0][0] if self.guided else call[0])
        return [*full[: self.first_number], *values, *full[self.first_flag : self.first_key], *key]

    def asked_for(self, call: Call, results: Any) -> Any:
        """The results, None for one that its number did not ask for."""
        if not self.needs:
            return results
        numbers = dict(zip(self.numbers, call[self.first_flag - len(self.numbers) :], strict=False))
        wanted = [name not in self.needs or numbers[self.needs[name]] is not None for name in self.outs]
        return tuple(x if want else None for x, want in zip(results, wanted, strict=True))

    def launch(self, function: Callable[..., Any], full: Call, outs: Sequence[Tensor] | None) -> Any:
        """Call an overload; the results."""
        if outs is None:
            return function(*full)
        unused = [outs[0].new_empty((0,))] * (len(self.outs) - len(outs))
        function(*full, **dict(zip(self.outs, (*outs, *unused), strict=True)))
        return self.given(outs)

    def given(self, outs: Sequence[Tensor]) -> Any:
        """The results of a call that wrote them."""
        return (*outs, *[None] * (len(self.outs) - len(outs))) if len(self.outs) > 1 else outs[0]

    def reference(self, call: Call) -> Any:
        """The result of a call in plain PyTorch."""
        return (self.plain or getattr(reference, self.name))(**self.named(call))

    def named(self, call: Call) -> dict[str, Any]:
        """The arguments of a call by the names that the reference has for them."""
        named = dict(zip(self.tensors, call[0] if self.guided else call, strict=False))
        if self.weights:
            named["tensors"] = call[0][len(self.tensors) :]
        named |= dict(zip(self.coefficients, call[1], strict=True)) if self.coefficients else {}
        rest = (*self.weights, *["guidance_scale"][: self.guided], *self.numbers, *self.flags, *_KEY)
        at = self.first_number + bool(self.coefficients)
        return named | dict(zip(rest, call[at:], strict=False))

    # What was wrong with a call.

    def check(self, call: Call, outs: Any) -> None:
        """Raise what is wrong with the arguments, if anything is."""
        tensors = self.check_tensors(call)
        first = next(iter(tensors.values()))
        for name, value in self.labelled(call):
            if value is not None or name not in self.optional:
                arguments.check_number(name, value, first)
        if self.noise and call[self.first_key] is not None:
            seed, step, sample_id = call[self.first_key :]
            arguments.check_key(seed, step, sample_id, first.shape[0], first.device)
        empty = {name for name, number in self.needs.items() if dict(self.labelled(call))[number] is None}
        given = {name: out for name, out in zip(self.outs, outs or (), strict=False) if name not in empty}
        outputs.check_outs(given, tensors, first)

    def check_tensors(self, call: Call) -> dict[str, Any]:
        """The tensors by name, pairs opened, after a look at each."""
        operands = call[0] if self.guided else call[: self.first_number]
        arguments.check_sequence("tensors", operands)
        unnamed = len(operands) - len(self.tensors)
        names = (*self.tensors, *[f"tensors[{k}]" for k in range(unnamed)])
        if self.weights and not 1 <= unnamed <= 5:
            raise ValueError(f"tensors must hold 1 to 5 tensors, got {unnamed}")
        found: dict[str, Any] = {}
        for name, operand in zip(names, operands, strict=True):
            pair = self.guided and isinstance(operand, tuple | list) and name == names[-1]
            if pair and len(operand) == 1:
                expected = "a tensor, or a pair (eps_uncond, eps_cond) with guidance_scale"
                hint = arguments.tensor_in(operand)
                raise TypeError(f"{name} must be {expected}, got {arguments.describe(operand)}{hint}")
            if self.weights and not pair and isinstance(operand, tuple | list) and len(operand) == 2:
                given = arguments.describe(operand)
                raise TypeError(f"{name} must be a tensor, got {given}; a pair (eps_uncond, eps_cond) goes last")
            for k, x in enumerate(operand if pair else [operand]):
                self.check_tensor(name, x, next(iter(found.values()), None), names[0])
                found[f"{name}[{k}]" if pair else name] = x
        self.check_guidance(call, names[-1], operands[-1], len(found) - len(operands))
        return found

    def check_tensor(self, name: str, x: object, first: Tensor | None, first_name: str) -> None:
        """Raise unless a tensor is what the op takes in its place."""
        arguments.check_state(name, x, first, first_name)

    def check_guidance(self, call: Call, name: str, last: object, pairs: int) -> None:
        """Raise unless a pair and its scale come together."""
        guidance = call[self.guidance_at] if self.guided else None
        if pairs not in (0, 1) or bool(pairs) != (guidance is not None):
            raise ValueError(
                f"guidance_scale goes with a pair (eps_uncond, eps_cond) as {name}, "
                f"got guidance_scale={guidance!r} and {arguments.describe(last)}"
            )

    def labelled(self, call: Call) -> list[tuple[str, Any]]:
        """Every number of a call and its name."""
        values = iter(call[self.first_number : self.first_flag])
        found: list[tuple[str, Any]] = []
        if self.coefficients:
            found += zip(self.coefficients, next(values), strict=True)
        for name in self.weights:
            weights = next(values)
            unnamed = len(call[0]) - len(self.tensors)
            if len(weights) != unnamed:
                raise ValueError(f"{name} must be as many as the tensors, {unnamed}, got {len(weights)}")
            found += [(f"{name}[{k}]", weight) for k, weight in enumerate(weights)]
        if self.guided:
            guidance = next(values)
            found += [("guidance_scale", guidance)] if guidance is not None else []
        return [*found, *zip(self.numbers, values, strict=True)]


def write_nothing(*_: Any, **outs: Tensor) -> None:
    """What an op does that writes, for tensors without values: the outputs are there."""
