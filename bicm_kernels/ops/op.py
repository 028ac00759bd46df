"""An op as one row of a table: how it is called, its reference, and the checks that explain invalid calls.

A row names the arguments; everything that an op needs apart from its kernels is derived from it. A public function is a
signature, a docstring and a call of its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from bicm_kernels import backend, reference
from bicm_kernels.ops import arguments, checks, outputs
from bicm_kernels.ops.arguments import dynamo
from bicm_kernels.ops.library import without_lists
from bicm_kernels.ops.row import KEY, Call, Row
from bicm_kernels.torch_internals import implementations

#: At the last check: how many implementations were registered, and the number of the hand-over of launchers.
_known = (-1, 0)
#: What the package itself registers from Python: shapes without values; Triton kernels, which run on no device that is
#: called past the dispatcher.
_OURS = ("Meta", "CUDA", "XPU")
_OURS_ON_GPUS = ("Meta", "XPU")
#: And the entries of the derivatives that it registers for traced graphs.
derivatives: set[str] = set()


def _is_direct(name: str) -> bool:
    """Whether the native library has a function for an op; a loss has one for its value and gradients at once."""
    return hasattr(backend.library, name) or hasattr(backend.library, name.removesuffix("_with_gradients"))


def may_go_direct() -> bool:
    """Whether the native library declined a call for implementations that are new, none of which replaces ours."""
    global _known
    known = len(implementations), backend.hand_overs
    if known == _known:
        return False
    _known, ours = known, _OURS_ON_GPUS if backend.cuda_is_direct else _OURS
    found = (entry.split("/")[1:] for entry in implementations - derivatives if entry.startswith("bicm_kernels/"))
    replaced = any(key not in ours and _is_direct(name.partition(".")[0]) for name, key in found)
    backend.library.know_implementations(-1 if replaced else len(implementations))
    return not replaced


def _check_not_stacked(name: str, x: Any, first: Tensor | None, first_name: str) -> None:
    """Raise for a batch of unconditional and conditional predictions: kernels take a pair."""
    if arguments.compiling():
        return  # a traced batch may have no size yet
    if first is None or first.dim() == 0 or first.shape[0] == 0 or not isinstance(x, Tensor):
        return
    if x.shape == (2 * first.shape[0], *first.shape[1:]):
        shapes = f"the shape of {first_name}, {tuple(first.shape)}, got {tuple(x.shape)}"
        raise ValueError(f"{name} must have {shapes}; pass a pair, {name}.chunk(2), with guidance_scale")


def direct_call(name: str, *call: Any) -> Any:
    """The result of a function of the native library, where there is one; None for a call that it does not support."""
    if backend.direct is None:
        return None
    function = getattr(backend.direct, name)
    found = function(*call)
    return function(*call) if found is None and may_go_direct() else found


@dataclass(eq=False)
class Op(Row):
    """A row that can be called."""

    #: What the native library knows of it, from the first plain call on.
    native: Any = None
    #: Whether a call differs from the arguments of the schema.
    respells: ClassVar[bool] = False

    def call(self, *call: Any, outs: Any = None, refused: bool = False) -> Any:
        """Run the kernel, bypassing the dispatcher where possible; the reference where it is needed.

        refused: whether the library's direct function returned None for this call already.
        """
        if dynamo():
            return self.run(call, outs)
        direct = backend.direct
        if direct is not None and outs is None:
            function = getattr(direct, self.name, None)
            if function is not None:
                result = None if refused else function(*call)
                if result is None and may_go_direct():
                    result = function(*call)
                if result is not None:
                    return result
        library = backend.library
        if library is None or ((outs is not None or self.respells) and not self.is_writable(call, outs)):
            return self.run(call, outs)
        try:
            # Plain tensors and numbers, which nobody traces, transforms or differentiates.
            step = self.step(call) if self.respells else call
            native = self.native or self.prepare()
            found = library.call_through_dispatcher(native, step, backend.kernel_devices, outs)
            if type(found) is list:
                step = self.step(call) if self.exact else step
                return self.asked_for(call, self.bare_tensor(*self.as_tensors(step, found)))
        except arguments.FAILURES as error:
            # Not a lambda: variables that a function inside refers to are slower in every call.
            arguments.explain(error, partial(self.check, call, outs))
        if found is NotImplemented:
            return self.run(call, outs)
        if outs is not None:
            increment_version(outs)
        return found  # with None for a result that was not asked for

    def run(self, call: Call, outs: Any) -> Any:
        """The call through the dispatcher, of any kind."""
        try:
            if self.weights:
                call = self.listed(call)
            if self.keyed:
                self.check_noise(call)
            tensors, full = self.spread(self.step(call))
            tracked, by_reference = self.tracking(tensors, full, outs)
            fallback = arguments.needs_reference(tensors[0], tracked=by_reference)
            if fallback or arguments.unseen(tensors[0]):
                self.check(call, outs)
            if fallback:
                recorded = torch.is_grad_enabled() and not arguments.compiling()
                results = self.reference(arguments.saveables(call) if recorded else call)
            else:
                results = self.launch(call, full, tracked, outs)
            if outs is None:
                return results
            outputs.write(outs, results, by_reference)
            return (*outs, *[None] * (self.results - len(outs))) if self.results > 1 else outs[0]
        except arguments.FAILURES as error:
            arguments.explain(error, lambda: self.check(call, outs))

    def is_writable(self, call: Call, outs: Any) -> bool:
        """Whether an overload of tensors and numbers makes all results, or writes them all."""
        return outs is None or (self.guided and len(outs) == len(self.outs))

    def prepare(self) -> Any:
        """Tell the native library of the op, once."""
        self.native = self.plainly(backend.library)
        return self.native

    def listed(self, call: Call) -> Call:
        """A call whose weights can be counted."""
        at, after = self.first_number, self.first_number + len(self.weights)
        weights = [arguments.weight_list(name, x) for name, x in zip(self.weights, call[at:after], strict=True)]
        return (*call[:at], *weights, *call[after:])

    def returns(self, call: Call, outs: Any) -> bool:
        """Whether the op allocates its results itself."""
        return outs is None

    def step(self, call: Call) -> Call:
        """The arguments of a call that the schema takes."""
        return call

    def spread(self, step: Call) -> tuple[list[Tensor], list[Any]]:
        """The tensors of a call, and the arguments as the schema takes them; TypeError where kernels cannot check."""
        full = [*step]
        if self.keyed:
            full[self.first_key :] = map(arguments.counter, full[self.first_key :])
        for at in range(self.first_integer, self.first_key):
            if at < self.first_flag or self.flags[at - self.first_flag].startswith("SymInt"):
                full[at] = arguments.counter(full[at])
        if not self.guided:
            return [x for x in full[: self.first_number] if x is not None], full
        operands, guidance = step[0], step[self.guidance_at]
        if isinstance(operands, Tensor):
            raise TypeError("one tensor for a sequence of them")
        last = operands[-1]
        paired = not isinstance(last, Tensor)
        if paired != (guidance is not None) or (paired and len(last) != 2):
            raise TypeError("guidance_scale and a pair of predictions go together")
        # A pair has one weight, and two tensors.
        if self.weights and len(step[self.first_number]) != len(operands) - len(self.tensors):
            raise TypeError("as many weights as tensors")
        full[0] = tensors = [*operands[:-1], *last] if paired else [*operands]
        if not paired:
            full[self.guidance_at] = 0.0
        return tensors, full

    def tracking(self, tensors: list[Tensor], full: Call, outs: Any) -> tuple[bool, bool]:
        """Whether a derivative is recorded, and whether the reference has to record it."""
        tracked = arguments.requires_grad(*tensors, *(outs or ()))
        numbers = arguments.numbers(full[self.first_number :])
        return tracked, arguments.requires_grad(*numbers) or (tracked and not self.differentiable)

    def loose(self, call: Call, full: Call) -> Sequence[Any]:
        """The arguments that may be numbers or tensors."""
        return full[self.first_number :]

    def as_tensors(self, step: Call, full: Call) -> list[Any]:
        """The arguments of the overload with tensors."""
        values = arguments.coefficients(full[self.first_number : self.first_integer])
        if self.guided and step[self.guidance_at] is None:
            values[len(self.lists)] = None
        integers = map(arguments.integer, full[self.first_integer : self.first_flag])
        key: tuple[Any, ...] = ()
        if self.keyed:
            seed, at, sample_id = full[self.first_key :]
            key = arguments.key(seed, at, sample_id, full[0][0] if self.guided else full[0])
        flags = full[self.first_flag : self.first_key]
        return [*full[: self.first_number], *values, *integers, *flags, *key]

    def asked_for(self, call: Call, results: Any) -> Any:
        """The results; None for one that was not requested."""
        if self.needs:
            results = tuple(x if want else None for x, want in zip(results, self.wanted(call), strict=True))
        return self.with_given(call, results) if self.results else call[0]

    def with_given(self, call: Call, results: Any) -> Any:
        """The results, and what was given where it stands for one."""
        return results

    def launch(self, call: Call, full: Call, tracked: bool, outs: Any) -> Any:
        """The results of the overload that takes a call."""
        plain = not tracked and arguments.plain(self.loose(call, full))
        if not plain:
            full = self.as_tensors(self.step(call), full)
        if tracked and not arguments.compiling():
            # Only numbers and masks are saved.
            full = [arguments.saveable(x) if isinstance(x, Tensor) and x.dim() <= 1 else x for x in full]
        if self.returns(call, outs):
            name = "default" if plain else "tracked" if tracked else "tensor"
            return self.asked_for(call, self.traceable(self.overloads[name])(*full))
        places = self.places(call, outs)
        if not plain and not arguments.compiling():
            outputs.check_apart(places, arguments.numbers(self.loose(call, full)))
        function = self.traceable(self.overloads["out" if plain else "tensor_out"])
        function(*full, *self.extras(call, plain), **dict(zip(self.outs, places, strict=True)))
        if not arguments.compiling():
            increment_version(places)
        return self.asked_for(call, places[: self.results] if self.results > 1 else places[0])

    def traceable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """An overload as TorchScript can trace it."""
        return without_lists(function) if self.guided and arguments.scripting() else function

    def places(self, call: Call, outs: Any) -> Sequence[Tensor]:
        """The outputs of an overload that writes to given tensors."""
        return (*outs, *[outs[0].new_empty((0,))] * (len(self.outs) - len(outs)))

    def extras(self, call: Call, plain: bool) -> Sequence[Any]:
        """The arguments that only an overload with outputs takes."""
        return ()

    def reference(self, call: Call) -> Any:
        """The result of a call in plain PyTorch."""
        return (self.plain or getattr(reference, self.name))(**self.named(call))

    def named(self, call: Call) -> dict[str, Any]:
        """The arguments of a call by the reference's parameter names."""
        named = dict(zip(self.tensors, call[0] if self.guided else call, strict=False))
        if self.weights:
            named["tensors"] = call[0][len(self.tensors) :]
        rest = list(call[1 if self.guided else self.first_number :])
        if self.coefficients:
            named |= zip(self.coefficients, rest.pop(len(self.others)), strict=True)
        names = (*self.others, *self.weights, *["guidance_scale"][: self.guided], *self.numbers, *self.integers)
        named |= zip((*names, *self.flag_names, *KEY), rest, strict=False)
        return {name: arguments.whole(value) for name, value in named.items()}

    # Checks of a call's arguments.

    def check(self, call: Call, outs: Any) -> None:
        """Raise if an argument is invalid."""
        tensors = self.check_tensors(call)
        first = next(iter(tensors.values()))
        for name, value in self.labelled(call):
            if value is not None or name not in self.optional:
                checks.check_number(name, value, first)
        if self.keyed and (call[self.first_key] is not None or not self.noise):
            seed, step, sample_id = call[self.first_key :]
            checks.check_key(seed, step, sample_id, first.shape[0], first.device)
        given = zip(self.outs, self.wanted(call), outs or (), strict=False)
        first_name = next(iter(tensors))
        outputs.check_outs(
            {name: out for name, want, out in given if want},
            tensors,
            lambda name, out: outputs.check_out(name, out, first, first_name),
        )

    def check_noise(self, call: Call) -> None:
        """Raise where noise has a weight but no key, or would repeat under ``torch.vmap``."""
        seed = call[self.first_key]
        if seed is not None:
            arguments.check_vmap(seed)
        elif self.noise:
            weight = call[self.guidance_at + self.guided + self.numbers.index(self.noise)]
            if not self.weights or isinstance(weight, Tensor) or weight != 0:
                raise ValueError(f"seed must be given where noise is drawn, got None and {self.noise}={weight!r}")

    def check_tensors(self, call: Call) -> dict[str, Any]:
        """The tensors by name, each checked, with pairs flattened."""
        operands = call[0] if self.guided else call[: self.first_number]
        checks.check_sequence("tensors", operands)
        unnamed = len(operands) - len(self.tensors)
        names = (*self.tensors, *[f"tensors[{k}]" for k in range(unnamed)])
        if self.weights and not 1 <= unnamed <= 5:
            raise ValueError(f"tensors must hold 1 to 5 tensors, got {unnamed}")
        found: dict[str, Any] = {}
        for name, operand in zip(names, operands, strict=True):
            pair = self.guided and isinstance(operand, tuple | list) and name == names[-1]
            if pair and len(operand) == 1:
                expected = "a tensor, or a pair (eps_uncond, eps_cond) with guidance_scale"
                hint = checks.tensor_in(operand)
                raise TypeError(f"{name} must be {expected}, got {checks.describe(operand)}{hint}")
            if self.weights and not pair and isinstance(operand, tuple | list) and len(operand) == 2:
                given = checks.describe(operand)
                raise TypeError(f"{name} must be a tensor, got {given}; a pair (eps_uncond, eps_cond) goes last")
            for k, x in enumerate(operand if pair else [operand]):
                if x is None and name in self.optional:
                    continue
                first, label = next(iter(found.values()), None), f"{name}[{k}]" if pair else name
                if self.guided and not pair and name == names[-1]:
                    _check_not_stacked(name, x, first, names[0])
                self.check_tensor(label, x, first, names[0])
                found[label] = x
        if self.guided:
            self.check_guidance(call, names[-1], operands[-1], len(found) - len(operands))
        return found

    def check_tensor(self, name: str, x: object, first: Tensor | None, first_name: str) -> None:
        """Raise unless a tensor is valid for its argument."""
        checks.check_state(name, x, first, first_name)

    def check_guidance(self, call: Call, name: str, last: object, pairs: int) -> None:
        """Raise unless a pair and its guidance scale are given together."""
        guidance = call[self.guidance_at]
        if pairs not in (0, 1) or bool(pairs) != (guidance is not None):
            raise ValueError(
                f"guidance_scale goes with a pair (eps_uncond, eps_cond) as {name}, "
                f"got guidance_scale={guidance!r} and {checks.describe(last)}"
            )

    def labelled(self, call: Call) -> list[tuple[str, Any]]:
        """Every number of a call and its name."""
        values = iter(call[self.first_number : self.first_integer])
        found: list[tuple[str, Any]] = []
        if self.coefficients:
            found += zip(self.coefficients, next(values), strict=True)
        for name in self.weights:
            weights = arguments.weight_list(name, next(values))
            unnamed = len(call[0]) - len(self.tensors)
            if len(weights) != unnamed:
                raise ValueError(f"{name} must be as many as the tensors, {unnamed}, got {len(weights)}")
            found += [(f"{name}[{k}]", weight) for k, weight in enumerate(weights)]
        if self.guided:
            guidance = next(values)
            found += [("guidance_scale", guidance)] if guidance is not None else []
        return [*found, *zip(self.numbers, values, strict=True)]
