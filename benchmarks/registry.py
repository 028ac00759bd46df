"""The families that have benchmarks; a new one adds its module and a line here."""

from benchmarks import (
    bench_consistency,
    bench_multistep,
    bench_noise,
    bench_preconditioning,
    bench_pseudo_huber,
    bench_reversible,
    bench_samplers,
)
from benchmarks.cases import Case

FAMILIES: dict[str, tuple[Case, ...]] = {
    "consistency": bench_consistency.CASES,
    "multistep": bench_multistep.CASES,
    "noise": bench_noise.CASES,
    "preconditioning": bench_preconditioning.CASES,
    "pseudo_huber": bench_pseudo_huber.CASES,
    "reversible": bench_reversible.CASES,
    "samplers": bench_samplers.CASES,
}
