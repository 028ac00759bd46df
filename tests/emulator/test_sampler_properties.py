"""Sampler updates drawn at random from everything that an update can be, on every target."""

from __future__ import annotations

import bicm_emulator
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from .checks import check_step, targets
from .model import Problem
from .tensors import DTYPES, INPUT_LAYOUTS, LAYOUTS, Tensor

EXAMPLES = 300 if bicm_emulator.SANITIZED else 800

shapes = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple) | st.integers(1, 2200).map(lambda d: (d,))
numbers = st.floats(-4, 4, width=32).map(lambda x: x or 0.5)


class Maker:
    """Draws the parts of a problem; the values of tensors come from one seed, to keep examples small."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.shape = (data.draw(st.integers(1, 4), "batch"), *data.draw(shapes, "sample"))
        self.state = data.draw(st.sampled_from(DTYPES), "state dtype")
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "values"))

    def tensor(self, dtype: str, layouts: dict[str, object] = INPUT_LAYOUTS) -> Tensor:
        layout = self.data.draw(st.just("contiguous") | st.sampled_from(sorted(layouts)), "layout")
        offset = self.data.draw(st.integers(0, 8), "offset")
        return Tensor.of(self.rng.standard_normal(self.shape), dtype, layout, offset)

    def output(self) -> Tensor:
        return self.tensor(self.state, LAYOUTS)

    def number(self) -> float | Tensor:
        value = self.data.draw(numbers, "number")
        kind = self.data.draw(st.sampled_from(["float", "0-d", "per sample"]), "kind")
        if kind == "float":
            return value
        dtype = self.data.draw(st.sampled_from(DTYPES), "number's dtype")
        shape = () if kind == "0-d" else self.shape[:1]
        return Tensor.of(value + 0.1 * self.rng.standard_normal(shape), dtype)

    def maybe(self) -> bool:
        return self.data.draw(st.booleans())

    def key(self) -> dict[str, object]:
        if self.maybe():
            return {"seed": self.data.draw(st.integers(-(2**63), 2**63 - 1)), "step": 3, "sample": 2**31}
        draw = self.rng.integers(0, 2**32, (3, self.shape[0]), dtype=np.int64)
        return {"seed": draw[0] << 20, "step": draw[1], "sample": draw[2], "counts": False}

    def problem(self) -> Problem:
        form = self.data.draw(st.sampled_from(["affine", "affine", "bdia", "bdia_inverse"]), "form")
        terms = 3 if form != "affine" else self.data.draw(st.integers(1, 5), "terms")
        network = st.sampled_from([self.state, *DTYPES])
        inputs = [self.tensor(self.state)]
        inputs += [self.tensor(self.data.draw(network, "dtype")) for _ in range(terms - 1)]
        coefficients = [self.number() for _ in range(5 if form != "affine" else terms)]
        problem = Problem(inputs, coefficients, self.output(), form=form)
        if self.maybe():
            problem.conditional = self.tensor(inputs[-1].dtype)
            problem.guidance_scale = self.number()
        if self.maybe():
            problem.noise_weight = self.data.draw(st.just(0.0)) if self.maybe() else self.number()
            problem.key = self.key()
        if self.maybe():
            self.denoise(problem)
        problem.merge, problem.streams = self.maybe(), self.maybe()
        self.alias(problem)
        return problem

    def denoise(self, problem: Problem) -> None:
        problem.x0 = self.output()
        problem.x0_coefficients = [self.number() for _ in problem.inputs]
        problem.x0_weight = self.number()
        if self.maybe():
            bound = self.number()
            problem.clip = abs(bound) if isinstance(bound, float) else bound
        if self.maybe():
            problem.next, problem.next_scale = self.output(), self.number()

    def alias(self, problem: Problem) -> None:
        """Outputs may take the place of inputs that do not fold onto themselves."""
        for name in ("out", "x0", "next"):
            free = [
                x
                for x in problem.operands
                if x.dtype == self.state
                and x.touched.sum() == x.bits.size
                and all(x is not out for out in problem.outputs)
            ]
            if free and getattr(problem, name) is not None and self.maybe():
                setattr(problem, name, self.data.draw(st.sampled_from(free), name))


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_every_target_has_the_bits_of_the_model(data: st.DataObject) -> None:
    problem = Maker(data).problem()
    initial = [x.memory.copy() for x in (*problem.operands, *problem.outputs)]
    for target in targets():
        for tensor, memory in zip((*problem.operands, *problem.outputs), initial, strict=True):
            tensor.memory[...] = memory
        check_step(lambda p, target=target: p.run(target), problem)
