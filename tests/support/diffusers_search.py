"""Random configurations of every accelerated scheduler beside the original.

Run as `python -m tests.support.diffusers_search 2000`, with names of schedulers after it for these alone.
"""

from __future__ import annotations

import random
import sys
import warnings
from typing import Any

from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
)

from bicm_diffusion.adapters.diffusers.accelerate import COVERED
from tests.support.diffusers_cases import made
from tests.support.diffusers_observed import NEAR, agree, both
from tests.support.diffusers_options import OPTIONS


def drawn(cls: type[Any], source: random.Random) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A configuration, how the loop is run, and its number of steps."""
    options, floats = OPTIONS[cls], sorted(NEAR, key=str)
    names = source.sample(sorted(options), source.randint(0, min(5, len(options))))
    config = {name: source.choice(options[name]) for name in names}
    how: dict[str, Any] = {
        "dtypes": (source.choice(floats), source.choice(floats)),
        "start": source.randint(0, 2) if cls is not DDIMInverseScheduler else 0,
        **{name: source.random() < 0.5 for name in ("return_dict", "scales", "as_number")},
    }
    if cls is DDIMScheduler:
        how["eta"] = source.choice((0.0, 0.5, 1.0))
        how["use_clipped_model_output"] = source.random() < 0.5
    if cls is TCDScheduler:
        how["eta"] = source.choice((0.0, 0.3, 1.0))
    if cls is LMSDiscreteScheduler:
        how["order"] = source.choice((1, 2, 3, 4, 5))
    if cls in (EulerDiscreteScheduler, EDMEulerScheduler, FlowMatchHeunDiscreteScheduler):
        how["s_churn"] = source.choice((0.0, 2.0))
    # PNDM begins with four steps of its own.
    return config, how, source.choice((3, 4, 6)) if cls is not PNDMScheduler else source.choice((4, 6))


def search(cls: type[Any], count: int) -> int:
    """Print what disagrees among so many configurations; how many did."""
    source, wrong, refused = random.Random(cls.__name__), 0, 0
    for _ in range(count):
        config, how, steps = drawn(cls, source)
        try:
            made(cls, **config)
        except (ValueError, NotImplementedError):
            refused += 1  # by the original
            continue
        try:
            agree(*both(cls, config, steps), **how)
        except Exception as error:
            wrong += 1
            print(
                f"{cls.__name__}(**{config}) {how} steps={steps}: {type(error).__name__} {str(error)[:300]}", flush=True
            )
    print(f"{cls.__name__}: {count} drawn, {refused} refused by the original, {wrong} disagree", flush=True)
    return wrong


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    number, *names = sys.argv[1:]
    chosen = [cls for cls in COVERED if not names or cls.__name__ in names]
    raise SystemExit(bool(sum([search(cls, int(number)) for cls in chosen])))
