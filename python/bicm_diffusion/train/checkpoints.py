"""The state of a run as one safetensors file: a kill at any moment leaves the old file or the new one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bicm_diffusion.distributed.atomic import write_whole
from bicm_diffusion.extras import extra
from bicm_diffusion.train.processes import spread, whole

#: What a checkpoint's metadata hold besides what it is compared by.
OWN = frozenset(("step", "torch"))


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and their metadata atomically, and create the folders of the path."""
    with extra("diffusion"):
        from safetensors.torch import save_file
    path.parent.mkdir(parents=True, exist_ok=True)
    # Temporary files of a killed run: their names contain its process id.
    for left in path.parent.glob(f"{path.stem}.*.partial"):
        if left.name.removeprefix(f"{path.stem}.").removesuffix(".partial").isdigit():
            left.unlink(missing_ok=True)
    ready: dict[str, Tensor] = {}
    met: set[int] = set()
    for name, x in tensors.items():
        x = x.cpu().contiguous()
        # A file stores no tensor twice, but a network may share one.
        ready[name] = x.clone() if x.untyped_storage().data_ptr() in met else x
        met.add(x.untyped_storage().data_ptr())
    write_whole(path, lambda partial: save_file(ready, str(partial), dict(metadata)))


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file."""
    with extra("diffusion"):
        from safetensors import safe_open
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


def saved_step(path: str | Path) -> int:
    """Return the number of steps taken at a checkpoint.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder, "run.safetensors"), {"x": torch.ones(1)}, {"step": "3"})  # as `train` does
    ...     saved_step(f"{folder}/run.safetensors")
    3
    """
    return int(read_metadata(Path(path))["step"])


def checked_notes(notes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return notes that a checkpoint can hold; raises ValueError for others."""
    taken = sorted({*OWN, "options"} & {*(notes or {})})
    if taken:
        raise ValueError(f"notes: expected names other than {taken[0]!r}, which checkpoints have themselves")
    unnamed = [name for name in notes or {} if not isinstance(name, str)]
    if unnamed:
        raise ValueError(f"notes: expected names that are strings, got {unnamed[0]!r}")
    try:
        json.dumps(notes, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"notes: expected values that JSON can hold, got {notes!r} ({error})") from None
    return dict(notes or {})


def tensors_of(
    modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, *, kept: bool = True
) -> dict[str, Tensor]:
    """Return the state that a run's next step depends on, by name; collective over all processes.

    kept: False drops every tensor once it is gathered; True moves it to the host, so that no more than one is whole on
    a device.
    Raises TypeError for state that is not a tensor, which files cannot store.
    """
    found: dict[str, Tensor] = {}

    def take(name: str, x: Tensor) -> None:
        gathered = whole(x)  # by all processes
        if kept:
            found[name] = gathered.cpu()

    for prefix, module in modules.items():
        for name, x in module.state_dict().items():
            if not isinstance(x, Tensor):
                raise TypeError(f"network: expected tensors in its state, got {type(x).__name__} in {name}")
            take(f"{prefix}.{name}", x)
    for index, state in _states(optimizer).items():
        for name, x in state.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"optimizer: expected tensors in its state, got {type(x).__name__} in {name}")
            take(f"optimizer.{index}.{name}", x)
    return found


def _states(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return found


def load(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Load a file's state into modules and optimizer.

    Raises ValueError where its tensors are not those of the modules.
    """
    with extra("diffusion"):
        from safetensors import safe_open
    with safe_open(str(path), framework="pt") as file:
        for prefix, module in modules.items():
            _check_fits(path, prefix, module, file)
        with torch.no_grad():
            for prefix, module in modules.items():
                _fill(prefix, module, file)
        states: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name in sorted(name for name in file.keys() if name.startswith("optimizer.")):  # noqa: SIM118
            _, index, key = name.split(".", 2)
            x, parameter = file.get_tensor(name), parameters[int(index)]
            states.setdefault(int(index), {})[key] = _laid_out(x, parameter) if x.shape == parameter.shape else x
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _laid_out(x: Tensor, parameter: Tensor) -> Tensor:
    """A moment like its parameter: fused optimizers take both to have the same strides."""
    if hasattr(parameter, "full_tensor"):
        return spread(x, parameter)
    return torch.empty_like(parameter, dtype=x.dtype, requires_grad=False).copy_(x)


def _check_fits(path: Path, prefix: str, module: nn.Module, file: Any) -> None:
    """Raise ValueError unless a file has the tensors of a module, of the same shapes and dtypes."""
    state = module.state_dict()
    wanted = {f"{prefix}.{name}" for name in state}
    there = {name for name in file.keys() if name.startswith(f"{prefix}.")}  # noqa: SIM118
    if wanted != there:
        raise ValueError(f"checkpoint: {path} is of another network: {sorted(wanted ^ there)[:3]} differ")
    for name, x in state.items():
        if name.endswith("_extra_state"):
            continue
        part = file.get_slice(f"{prefix}.{name}")
        shape = tuple(part.get_shape())
        dtype = (part[:0] if shape else file.get_tensor(f"{prefix}.{name}")).dtype
        if (shape, dtype) != (tuple(x.shape), x.dtype):
            raise ValueError(
                f"checkpoint: {path} is of another network: {name} is {dtype} of shape {shape}, "
                f"expected {x.dtype} of shape {tuple(x.shape)}"
            )


def _fill(prefix: str, module: nn.Module, file: Any) -> None:
    for name, x in module.state_dict().items():
        saved = file.get_tensor(f"{prefix}.{name}")
        if name.endswith("_extra_state"):  # what a module makes of its state: the tensor is a copy
            module.load_state_dict({name: saved.to(x.device)}, strict=False)
        else:
            x.copy_(spread(saved, x))


def check_same(path: Path, metadata: Mapping[str, str], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where a checkpoint was made with other configurations."""
    for name in sorted({*wanted, *metadata} - OWN):
        made, asked = json.loads(metadata.get(name, "null")), json.loads(json.dumps(wanted.get(name)))
        if made != asked:
            if isinstance(made, dict) and isinstance(asked, dict):
                differ = {key for key in {*made, *asked} if made.get(key) != asked.get(key)}
                made, asked = ({key: of[key] for key in sorted(differ) if key in of} for of in (made, asked))
            raise ValueError(f"checkpoint: {path} was made with {name} {made}, expected {asked}")
