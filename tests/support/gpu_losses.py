"""Checks of losses on GPUs that are not there, as those of `gpu_checks`, to which they are added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from benchmarks.fake_gpu import FakeGpus
from bicm_kernels import backend
from tests.support.gpu_checks import check, same, switched_on
from tests.support.ways import long_way


@check
def losses(gpus: FakeGpus) -> None:
    """With their derivatives. What they return is allocated by torch's C++, which takes all tensors for the CPU's."""
    switched_on(gpus)
    x, y = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).unbind()
    launched = {
        "backward": ["pseudo_huber", "pseudo_huber_gradient"],
        "forward": ["pseudo_huber_with_gradient"],
        "auto": ["pseudo_huber_with_gradient"],
    }
    for way, names in launched.items():

        def run(pred: Tensor, target: Tensor, way: str = way) -> tuple[Tensor, ...]:
            loss = bk.pseudo_huber(pred, target, c=0.1, gradient=way)
            return (loss.detach(), *torch.autograd.grad(loss, (pred, target)))

        expected = long_way(run, x.clone().requires_grad_(), y.clone().requires_grad_())
        gpus.clear()
        found = run(gpus.put(x).requires_grad_(), gpus.put(y).requires_grad_())
        assert [name for name, _ in gpus.launched] == names
        assert all(map(same, found, expected))


@check
def kept_gradients(gpus: FakeGpus) -> None:
    """The upstream gradient on a GPU is read by the kernel alone; one on the CPU, here."""
    switched_on(gpus)
    for factor in (torch.tensor(1.0), torch.tensor(0.5), torch.tensor([1.0, 0.5])):
        for put in (gpus.put, torch.clone):
            if put is torch.clone and factor.dim():
                continue
            gpus.clear()
            gradients = (gpus.put(torch.ones(2, 3)), gpus.put(torch.ones(2, 3).double()))
            assert backend.library.scale_gradients_(put(factor), gradients) is True
            read_here = put is torch.clone and factor.item() == 1.0
            assert [name for name, _ in gpus.launched] == ["scale_gradient"] * (0 if read_here else 2)
            for gradient in gradients:
                assert torch.equal(gradient, factor.reshape(-1, 1).expand(2, 3).to(gradient.dtype))


@check
def gradients_scaled_in_part(gpus: FakeGpus) -> None:
    """An error: the dispatcher would scale the first ones again."""
    switched_on(gpus)
    gradients = (gpus.put(torch.ones(2, 3)), gpus.put(torch.ones(2, 3)))
    factor = gpus.put(torch.tensor(2.0))
    gpus.fails = {"scale_gradient"}
    assert backend.library.scale_gradients_(factor, gradients) is None
    assert gradients[0].eq(1.0).all()
    gpus.fails = {"scale_gradient, second"}
    gpus.launched.clear()
    with pytest.raises(RuntimeError, match="some gradients had been scaled"):
        backend.library.scale_gradients_(factor, gradients)
    assert gradients[0].eq(2.0).all()
