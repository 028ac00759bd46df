"""The noise of accelerated schedulers: from torch's generators, or keyed."""

from __future__ import annotations

import warnings
from functools import lru_cache
from numbers import Integral
from typing import Any, Literal

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from bicm_diffusion.adapters.diffusers.tables import version_of
from bicm_diffusion.keys import SCHEDULER
from bicm_kernels import fold_in, torch_randn
from bicm_kernels.inputs import ALIKE

Integer = int | Tensor
Generators = Generator | list[Generator] | None
Noise = Literal["generator", "keyed"]

traced = torch.compiler.is_compiling

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def _draw_from(timestep: Tensor, least: int, like: Tensor, generator: Generator | None) -> Tensor:
    draws = int(timestep) >= least
    return (
        randn_tensor(like.shape, generator=generator, dtype=like.dtype)
        if draws
        else torch.zeros(like.shape, dtype=like.dtype)
    )


_library = torch.library.Library("bicm_diffusion", "FRAGMENT")
# No compiler may leave a draw out, or take two for one.
_library.define(
    "drawn_from(Tensor timestep, int least, Tensor like, Generator? generator) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
_library.impl("drawn_from", _draw_from, "CompositeExplicitAutograd")


@torch.library.register_fake("bicm_diffusion::drawn_from", lib=_library)
def _fake_draw(timestep: Tensor, least: int, like: Tensor, generator: Generator | None) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


class WrongKeyError(ValueError):
    """A seed, sample id or list of generators that does not fit the batch: the original raises for it too."""


class KeyedConfig(FrozenDict):
    """The configuration of a scheduler with keyed noise; warns that it does not include the noise's key."""

    def get(self, key: Any, default: Any = None) -> Any:
        """Like a dictionary's; only `from_config` begins by requesting this key."""
        if key == "_use_default_values" and not self.__dict__.get("_warned", False):
            self.__dict__["_warned"] = True
            warnings.warn(self.lost("a configuration holds"), UserWarning, stacklevel=2)
        return super().get(key, default)

    @staticmethod
    def lost(holder: str) -> str:
        """The warning for a scheduler made from a configuration."""
        return (
            f"{holder} neither noise='keyed' nor seed and sample_id: a scheduler that is made from it draws from "
            "torch's generators; accelerate_scheduler(scheduler, noise='keyed', ...) gives it keyed noise again"
        )


def own_config(config: Any, keyed: bool) -> Any:
    """A copy of a configuration, with the attributes that were set on it."""
    copied = (KeyedConfig if keyed else FrozenDict)(config)
    copied.__dict__.update((name, value) for name, value in vars(config).items() if name != "_warned")
    return copied


class Drawing:
    """The noise of a scheduler's steps."""

    _noise: Noise = "generator"
    #: The seed that was given; None draws a new one for every run.
    _seed: Integer | None = None
    _sample_id: Integer = 0
    #: The key of a seed that is a number.
    _folded: int = 0
    #: The steps whose noise was drawn from that key, and the state of seeds that are tensors.
    _drew: set[Any] = set()  # noqa: RUF012 (replaced before it is written to)
    _drew_at: tuple[int | None, ...] = ()
    _seeds: tuple[Any, Tensor] | None = None
    _told: tuple[str, ...] = ()

    def _set_key(self, seed: Integer | None, sample_id: Integer | None) -> None:
        """Set a seed and a sample id, or keep the present ones."""
        given = [name for name, value in (("seed", seed), ("sample_id", sample_id)) if value is not None]
        if self._noise != "keyed":
            if given:
                text = f"{' and '.join(given)}: ignored with noise='generator'; they need noise='keyed'"
                warnings.warn(text, UserWarning, stacklevel=3)
            return
        if sample_id is not None:
            self._sample_id = checked("sample_id", sample_id)
        if seed is not None:
            self._seed = seed
            self._take_seed(seed)
        elif "_folded" not in self.__dict__:
            self._new_run()
        if given:
            self._drew = set()

    def _new_run(self) -> None:
        """Draw a new seed where none was given, from torch's default generator, which `torch.manual_seed` controls."""
        if self._noise == "keyed" and self._seed is None:
            self._take_seed(int(torch.randint(2**63 - 1, (), device="cpu")))

    def _take_seed(self, seed: Integer) -> None:
        key = fold_in(seed, SCHEDULER)  # checks it too
        self._drew, self._drew_at = set(), ()
        self._folded = key if isinstance(key, int) else 0

    # --- torch's ------------------------------------------------------------------------------------------------------
    def _drawn(self, like: Tensor, sample: Tensor, generator: Generators, dtype: torch.dtype | None = None) -> Tensor:
        """The noise that the original would draw. Invalid arguments raise before anything is drawn."""
        if traced():
            return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype or like.dtype)
        if like.dtype not in FLOATING or sample.dtype not in FLOATING:
            raise TypeError(f"sample of {sample.dtype}, model output of {like.dtype}")
        shape, dtype = like.shape, dtype or like.dtype
        if not shape or shape != sample.shape or like.device != sample.device:
            raise ValueError("a sample and a model output of different shapes, or none")
        if like.layout is not torch.strided or sample.layout is not torch.strided:
            raise TypeError(f"sample of {sample.layout}, model output of {like.layout}")
        several = isinstance(generator, list) and len(generator) != 1
        if several and len(generator) < shape[0]:  # type: ignore[arg-type]
            raise ValueError(f"{len(generator)} generators for {shape[0]} samples")  # type: ignore[arg-type]
        if not like.is_cpu or not all_on_host(generator):
            return randn_tensor(shape, generator=generator, device=like.device, dtype=dtype)
        if isinstance(generator, list):
            generator = generator[: shape[0]] if several else generator[0]
        return torch_randn(shape, generator=generator, dtype=dtype)

    def _drawn_alike(self, known: int, like: Tensor, sample: Tensor, generator: Generators) -> Tensor:
        """`_drawn` of float32 tensors, with what `ready` found of them."""
        on_host = generator is None or (type(generator) is Generator and generator.device.type == "cpu")
        # Tensors with dimensions are alike; an argument may be none, and has to be refused before anything is drawn.
        both = type(like) is type(sample) is Tensor and like.dim() > 0 < sample.dim()
        if known & ALIKE and on_host and both:
            return torch_randn(like.shape, generator=generator, dtype=torch.float32)
        return self._drawn(like, sample, generator)

    def _drawn_from(self, timestep: Tensor, least: int, like: Tensor, generator: Generators) -> Tensor:
        """Noise of a graph's step that the original draws from a timestep on; below it, nothing is drawn on the CPU.

        Elsewhere a graph draws always: whether to could only be read from the device.
        """
        if not like.is_cpu or isinstance(generator, list):
            return self._drawn(like, like, generator)
        return torch.ops.bicm_diffusion.drawn_from(timestep, least, like.detach(), generator)

    # --- keyed --------------------------------------------------------------------------------------------------------
    def _key(self, generator: Generators, sample: Tensor, step: Any) -> tuple[Integer, Integer]:
        """The seed and sample id of keyed noise: those given, or the generators' own seeds without a draw."""
        if generator is None:
            return self._own_key(sample, step)
        if isinstance(generator, Generator):
            return folded(generator.initial_seed()), self._sample_id
        _check_count(generator, len(sample))
        if len(generator) == 1 < len(sample):
            return folded(generator[0].initial_seed()), self._sample_id
        given = tuple(g.initial_seed() for g in generator[: len(sample)]), sample.device
        kept = self._seeds
        if kept is None or kept[0] != given:
            # Another thread may replace the attribute: return this call's value.
            seeds = torch.tensor([folded(seed) for seed in given[0]], dtype=torch.int64, device=sample.device)
            kept = self._seeds = given, seeds
        return kept[1], 0

    def _own_key(self, sample: Tensor, step: Any) -> tuple[Integer, Integer]:
        seed, sample_id = self._seed, self._sample_id
        if not traced():
            self._note(step)
        if not isinstance(seed, Tensor) and not isinstance(sample_id, Tensor):
            return self._folded, sample_id
        for name, value in (("seed", seed), ("sample_id", sample_id)):
            if isinstance(value, Tensor) and value.dim() and value.shape != sample.shape[:1]:
                expected = f"a 0-d or a ({sample.shape[0]},) tensor"
                raise WrongKeyError(f"{name}: expected {expected}, got shape {tuple(value.shape)}")
        return fold_in(seed, SCHEDULER) if isinstance(seed, Tensor) else self._folded, sample_id

    def _note(self, step: Any) -> None:
        """Warn once where a step's noise is drawn again."""
        tensors = [x for x in (self._seed, self._sample_id) if isinstance(x, Tensor)]
        if tensors:
            at = tuple(version_of(x) for x in tensors)
            if at != self._drew_at or None in at:  # changed by the caller, or not known
                self._drew, self._drew_at = set(), at
        if step not in self._drew:
            self._drew.add(step)
            return
        self._warn_once(
            f"{type(self).__name__}: the keyed noise of step {step} is drawn again, and repeats; for other noise pass "
            "generator= to step, give accelerate_scheduler another seed or sample_id, or leave its seed None and call "
            "set_timesteps before every run",
            "noise drawn again",
        )

    def _warn_once(self, message: str, matter: str = "") -> None:
        """Warn, unless this scheduler has issued a warning of this kind."""
        if (matter or message) not in self._told:
            self._told = (*self._told, matter or message)
            warnings.warn(message, UserWarning, stacklevel=4)


def _check_count(generator: Generators, batch: int) -> None:
    """Raise where a list has generators for some samples only; one serves all, and surplus ones are ignored."""
    if isinstance(generator, list) and len(generator) != 1 and (len(generator) < batch or not generator):
        raise WrongKeyError(f"generator: expected one, or one for each of the {batch} samples, got {len(generator)}")


def checked(name: str, value: Integer) -> Integer:
    """A sample id in the range of a key."""
    whole = value.dtype == torch.int64 if isinstance(value, Tensor) else isinstance(value, Integral)
    if not whole:
        got = value.dtype if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name}: expected an int or an int64 tensor, got {got}")
    if not isinstance(value, Tensor) and not 0 <= value < 2**32:
        raise ValueError(f"{name}: expected a number in [0, 2**32), got {value}")
    return value


@lru_cache(1024)
def _folded(seed: int) -> int:
    result = fold_in(seed, SCHEDULER)
    assert isinstance(result, int)
    return result


def folded(seed: int) -> Any:
    """The key of a generator's seed."""
    return fold_in(seed, SCHEDULER) if traced() else _folded(seed)


def all_on_host(generator: Generators) -> bool:
    """Whether torch would draw on the CPU."""
    if isinstance(generator, list):
        return all(g.device.type == "cpu" for g in generator) and bool(generator)
    return generator is None or generator.device.type == "cpu"
