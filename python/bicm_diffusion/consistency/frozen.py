"""A network evaluated with frozen parameters, with gradients to its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils import _pytree as pytree

from bicm_diffusion.described import described
from bicm_kernels import affine_step

# Where torch does not provide this, every graph may be needed again.
_graph_is_retained: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


_CASTS_LACK_GRADIENTS = torch.__version__ < "2.11"


def check_network(network: nn.Module, name: str = "network") -> None:
    """Raise TypeError for wrappers that cannot evaluate a network several times before one backward pass.

    name: the caller's name of the network.

    Replicas of `nn.DataParallel` do not share their dropout masks; FSDP1 frees parameters that are still needed; and a
    DistributedDataParallel that records which parameters a pass uses works only where it is the network itself, so
    that the frozen evaluation can bypass it.
    """
    wrapper = getattr(network, "_orig_mod", network)
    for module in _modules(network):
        if isinstance(module, DataParallel):
            raise TypeError(f"{name}: expected a plain module or one in DistributedDataParallel, got DataParallel")
        if type(module).__name__ == "FullyShardedDataParallel":  # importing the class takes seconds
            raise TypeError(
                f"{name}: expected a plain module or one in torch.distributed.fsdp.fully_shard, got "
                "FullyShardedDataParallel"
            )
        if isinstance(module, DistributedDataParallel) and module is not wrapper and _notes_what_is_used(module):
            raise TypeError(
                f"{name}: expected a DistributedDataParallel with static_graph or find_unused_parameters to be the "
                f"network itself, got one inside {type(wrapper).__name__}: wrap the whole network"
            )


def leaving_no_casts() -> AbstractContextManager[None]:
    """Keep what autocast casts of parameters where no gradients are recorded from a later call that records them.

    Since torch 2.11 autocast does so itself: before, the later call would get the casts, and no gradient.
    """
    needed = _CASTS_LACK_GRADIENTS and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return _without_cached_casts() if needed and torch.is_autocast_cache_enabled() else nullcontext()


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)


def asked(
    network: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    extra_args: Mapping[str, Any] | None = None,
    *,
    name: str = "network",
) -> Tensor:
    """Return network(*inputs, **extra_args); raises a TypeError with the expected call where the signature differs.

    extra_args: None where the caller cannot give any. name: the caller's name of the network.
    """
    try:
        with leaving_no_casts():
            return network(*inputs, **(extra_args or {}))
    except TypeError as error:
        if not torch.compiler.is_compiling() and (expected := _takes_otherwise(network, inputs, extra_args, name)):
            raise TypeError(expected) from error
        raise


def _takes_otherwise(
    network: Callable[..., Tensor], inputs: tuple[Tensor, ...], extra_args: Mapping[str, Any] | None, name: str
) -> str:
    """The error message where a network's signature does not match a call; empty where it does."""
    given = extra_args or {}
    network = getattr(network, "_orig_mod", network)
    network = network.module if isinstance(network, DistributedDataParallel) else network
    function = network.forward if isinstance(network, nn.Module) else network
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*inputs, **given)
    except TypeError as error:
        times = len(inputs) - 1
        called = ", ".join(["x", *"tu"[:times], *(f"{argument}=…" for argument in given)])
        hint = f"; pass its other arguments by {'extra_args={name: …} or ' * (extra_args is not None)}a lambda"
        if times == 2 and "too many positional" in str(error):
            hint = (
                "; f(x, t, u) goes from t to u: give the network a second time, or train it unchanged by ict_loss with "
                "parameterization='cm'; lambda x, t, u: network(x, t) ignores u"
            )
        return f"{name}: called as {name}({called}), but it takes {signature} ({error}){hint}"
    return ""


def _modules(network: object) -> Iterator[nn.Module]:
    """The modules of a network; none for a function, whose modules are unknown."""
    return network.modules() if isinstance(network, nn.Module) else iter(())


def _notes_what_is_used(wrapper: DistributedDataParallel) -> bool:
    return bool(wrapper.static_graph or wrapper.find_unused_parameters)


def evaluate_frozen(network: nn.Module, inputs: tuple[Tensor, ...], extra_args: Mapping[str, Any]) -> Tensor:
    """Return network(*inputs, **extra_args), differentiable in the inputs and extra_args, not in the parameters.

    The gradient is taken with respect to the inputs only, so that it is correct for any use of the network's
    parameters. They are detached meanwhile, where nothing else manages them, which saves the work of their gradients;
    gradient checkpoints recomputed in the backward pass use detached parameters too.
    Raises RuntimeError in the backward pass of a network with reentrant checkpoints.

    >>> network, x = nn.Linear(1, 1), torch.ones(1, 1, requires_grad=True)
    >>> evaluate_frozen(network, (x,), {}).backward(); network.weight.grad is None, bool(x.grad == network.weight)
    (True, True)
    """
    network = _without_reducer(network)
    if torch.compiler.is_compiling():
        if not isinstance(network, nn.Module):
            raise TypeError(f"network: expected an nn.Module in torch.compile, got {described(network)}")
        with _swapped(_parameters(network)):
            return network(*inputs, **extra_args)
    # Without other arguments there is nothing to look for inside of.
    values, structure = pytree.tree_flatten((inputs, dict(extra_args))) if extra_args else ([*inputs], None)
    places = [k for k, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    if not (places and torch.is_grad_enabled()):
        with torch.no_grad(), leaving_no_casts():
            return network(*inputs, **extra_args)
    sources = [values[k] for k in places]
    leaves = [source.detach().requires_grad_() for source in sources]
    for k, leaf in zip(places, leaves, strict=True):
        values[k] = leaf
    positional, named = (values, {}) if structure is None else pytree.tree_unflatten(values, structure)
    with detached_parameters(network):
        output = network(*positional, **named)
    if not output.requires_grad:
        return output
    (result,) = _Isolated.apply(_Graph(network, (output,), tuple(leaves)), *sources)
    return result


def distance_to_frozen(
    network: nn.Module, x: Tensor, extra_args: Mapping[str, Any], distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return distance(x, network(x)), the network evaluated as by `evaluate_frozen`; differentiable in both arguments.

    distance: an even function of the difference of its arguments, which may be exchanged, and whose derivatives in them
    are opposite. So only that in the network's output is formed, and x gets in one pass what comes through the
    network less it.

    >>> network, x = nn.Linear(1, 1), torch.ones(1, 1, requires_grad=True)
    >>> distance_to_frozen(network, x, {}, torch.nn.functional.l1_loss).backward(); network.weight.grad is None
    True
    """
    others = pytree.tree_flatten(dict(extra_args))[0] if extra_args else []
    alone = x.requires_grad and not any(isinstance(value, Tensor) and value.requires_grad for value in others)
    if torch.compiler.is_compiling() or not (alone and torch.is_grad_enabled()):
        return distance(x, evaluate_frozen(network, (x,), extra_args))
    network, leaf = _without_reducer(network), x.detach().requires_grad_()
    with detached_parameters(network):
        output = network(leaf, **extra_args)
    if not output.requires_grad:
        return distance(x, output)
    if output.dtype != x.dtype:  # the derivative in the output is rounded to its dtype
        return distance(x, *_Isolated.apply(_Graph(network, (output,), (leaf,)), x))
    value = distance(output, x.detach())
    result: Tensor = _Opposite.apply(_Graph(network, (value,), (leaf, output)), distance, x)
    return result


def _without_reducer(network: nn.Module) -> nn.Module:
    """The module in DistributedDataParallel, whose reducer may wait for gradients of an evaluation that has none."""
    wrapper = getattr(network, "_orig_mod", network)
    if not isinstance(wrapper, DistributedDataParallel):
        return network
    return wrapper.module if wrapper is network or _notes_what_is_used(wrapper) else network


@contextmanager
def detached_parameters(network: nn.Module) -> Iterator[None]:
    """Replace a network's parameters by detached tensors, except those that something else manages."""
    # FSDP exchanges the parameters itself, before and after a module's forward and backward pass.
    sharded = any(map(_is_sharded, {type(module) for module in _modules(network)}))
    with _swapped([] if sharded else [slot for slot in _parameters(network) if _is_ordinary(*slot)]):
        yield


def _is_sharded(kind: type) -> bool:
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


# A module's table of parameters and a name in it.
_Slot = tuple[dict[str, Any], str]


def _parameters(network: nn.Module) -> list[_Slot]:
    """The places of the trained parameters; a shared one appears at each of its places."""
    tables = [module._parameters for module in _modules(network)]
    return [(table, name) for table in tables for name, x in table.items() if x is not None and x.requires_grad]


def _is_ordinary(table: dict[str, Any], name: str) -> bool:
    return type(table) is dict and type(table[name]) is nn.Parameter


@contextmanager
def _swapped(slots: Sequence[_Slot]) -> Iterator[None]:
    before = [table[name] for table, name in slots]
    for table, name in slots:
        table[name] = table[name].detach()
    try:
        yield
    finally:
        for (table, name), x in zip(slots, before, strict=True):
            table[name] = x


@dataclass
class _Graph:
    """Tensors computed from leaves by a separate graph of the network, whose parameters are not in the outer graph."""

    network: nn.Module
    outputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    #: Whether its gradients are recorded, so that a later pass can differentiate through it.
    shared: bool = False

    def differentiate(self, upstream: Sequence[Tensor], *, again: bool) -> tuple[Tensor | None, ...]:
        """Return the leaves' gradients; `again` records them, too."""
        self.shared |= again
        options: dict[str, Any] = {"retain_graph": self.shared or _graph_is_retained(), "create_graph": again}
        try:
            with detached_parameters(self.network):
                return torch.autograd.grad(self.outputs, self.leaves, upstream, allow_unused=True, **options)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
        raise RuntimeError(
            "network: expected gradient checkpoints with use_reentrant=False, got use_reentrant=True: a reentrant one "
            "would add gradients to parameters that are frozen"
        )


class _Isolated(torch.autograd.Function):
    """The outputs of a separate graph, as functions of the tensors that its leaves represent."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        ctx.save_for_backward(*sources)
        return tuple(output.detach() for output in graph.outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        graph, sources = ctx.graph, ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, *graph.differentiate(upstream, again=False)
        # The gradients depend on the frozen parameters too, and must not propagate to them either.
        starts = tuple(x.detach().requires_grad_() for x in upstream)
        found = list(graph.differentiate(starts, again=True))
        places = [k for k, x in enumerate(found) if x is not None and x.requires_grad]
        inner = _Graph(graph.network, tuple(found[k] for k in places), (*graph.leaves, *starts), shared=True)
        for k, x in zip(places, _Isolated.apply(inner, *sources, *upstream) if places else (), strict=True):
            found[k] = x
        return None, *found


class _Opposite(torch.autograd.Function):
    """A distance of x from a network's output, computed in a separate graph from the leaf that represents x."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, distance: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.graph, ctx.distance = graph, distance
        ctx.save_for_backward(x)
        return graph.outputs[0].detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        graph, (x,) = ctx.graph, ctx.saved_tensors
        if torch.is_grad_enabled():
            leaf, output = graph.leaves
            (same,) = _Isolated.apply(_Graph(graph.network, (output,), (leaf,), shared=True), x)
            return None, None, *torch.autograd.grad(ctx.distance(x, same), (x,), upstream, create_graph=True)
        through, direct = graph.differentiate(upstream, again=False)
        return None, None, -direct if through is None else affine_step([through, direct], [1.0, -1.0])
