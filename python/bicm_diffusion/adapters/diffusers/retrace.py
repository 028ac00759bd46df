"""What tells a loop that retraces a pair from one that only seems to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.samplers.record import Record, is_inner, notice_alone, same_values
from bicm_diffusion.samplers.states import ExactPair, Pair, StatePair

#: As the record of a pair calls the method.
METHOD = "BDIADDIMScheduler"


def check_pair(pair: object, exact: bool, settings: Mapping[str, Any]) -> None:
    """Raise unless a pair is one that a configuration retraces, as far as can be told before its next loop."""
    kind = ExactPair if exact else StatePair
    if type(pair) is not kind:
        raise TypeError(f"pair: expected a scheduler's {kind.__name__} with exact={exact}, got {described(pair)}")
    made = pair.record
    if made is None:
        raise ValueError("pair: expected one from BDIADDIMScheduler.pair, got one that does not say what made it")
    turned = replace(made, method=METHOD, settings=settings, index=made.steps - made.index)
    turned.check(made, "turn_round", "", pair="pair")


def check_no_pair(name: str, value: object) -> None:
    """Raise TypeError for a pair where a tensor is meant."""
    if isinstance(value, Pair):
        raise TypeError(f"{name}: expected a tensor, got {described(value)}; turn_round(pair) takes a pair")


def check_start(sample: Tensor, last_sample: Tensor | None, run: Record) -> None:
    """Raise where a loop starts from a state of a pair that it cannot start from, warn where it need not.

    last_sample: the other state, where a pair is retraced.
    """
    if last_sample is not None:
        if sample is last_sample or same_values(sample, last_sample):
            raise ValueError("sample: expected the inner state of the pair, got the one that is its last_sample")
        return
    if is_inner(sample, METHOD):  # by its values: pipelines copy what a loop starts from
        raise ValueError(
            "sample: got the inner state of a pair, from which no trajectory begins; turn_round(pair) before "
            "set_timesteps retraces the one that it comes from"
        )
    notice_alone(sample, run, "step", name="sample", advice="turn_round() before set_timesteps")
