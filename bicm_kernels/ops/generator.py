"""The numbers of a torch.Generator, drawn faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from bicm_kernels import backend, reference
from bicm_kernels.ops.arguments import dynamo


def torch_randn(
    shape: Sequence[int],
    *,
    generator: Generator | list[Generator] | tuple[Generator, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The numbers that ``torch.randn`` draws from a generator, which is left in the same state; faster on the CPU.

    Args:
        shape: the result's shape.
        generator: None is torch's default one; a list or tuple of shape[0] has one for each sample (1, *shape[1:]).
        dtype: torch's default, if None; only float32 is faster, from 16 numbers on.
        device: the result's device.

    Raises:
        RuntimeError, TypeError: what ``torch.randn`` raises.
        ValueError: if there are not as many generators as samples.

    MT19937 (Matsumoto & Nishimura 1998) and Box-Muller, rounded as in torch. The bits are compared with torch's once
    before the first draw; where they differ, and for unsupported arguments, ``torch.randn`` is called.

    >>> import torch, bicm_kernels as bk
    >>> noise = bk.torch_randn((4, 8), generator=torch.Generator().manual_seed(0))
    >>> torch.equal(noise, torch.randn((4, 8), generator=torch.Generator().manual_seed(0)))
    True
    """
    single = (torch.get_default_dtype() if dtype is None else dtype) is torch.float32
    on_host = device is None or getattr(device, "type", device) == "cpu"
    if single and on_host and not dynamo() and backend.draws_like_torch():
        noise = backend.library.generator_normal(shape, generator)
        if noise is not None:
            return noise
    return reference.torch_randn(shape, generator=generator, dtype=dtype, device=device)
