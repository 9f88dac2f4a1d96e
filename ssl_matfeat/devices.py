"""The devices and processes that training can run on, by Lightning Fabric."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal["32-true", "bf16-mixed"]
Learn = Callable[["Fabric", nn.Module], Any]
"""Trains the module in place, and returns numbers and words that torch can save."""


def make_fabric(device: str, precision: str, n_devices: int) -> Fabric | None:
    """Return what trains on other devices, in other precisions and in several processes.

    Parameters
    ----------
    device : str
        ``"cpu"``, ``"cuda"`` or one of several, such as ``"cuda:1"``.
    precision : {"32-true", "bf16-mixed"}
        Of the training.
    n_devices : int
        Processes, one for each GPU, or all on the CPU.

    Returns
    -------
    lightning_fabric.Fabric or None
        None where a plain loop does: one process on the CPU in single precision.

    Raises
    ------
    ValueError, TypeError
        If a parameter is off, or there are fewer devices.
    ImportError
        If Lightning Fabric is needed and not installed.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
    if not isinstance(device, str):
        raise TypeError(f"device must be a string such as 'cpu' or 'cuda:0', got {device!r}")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:0', ..., got {device!r}")
    if index and n_devices > 1:
        raise ValueError(f"{device=} is one device, but {n_devices=}; set device={kind!r}")
    available = torch.cuda.device_count()
    if kind == "cuda" and available < max(n_devices, int(index or 0) + 1):
        raise ValueError(
            f"{device=} and {n_devices=}, but torch sees {available} CUDA devices; choose fewer, or set device='cpu'"
        )
    if (kind, precision, n_devices) == ("cpu", "32-true", 1):
        return None
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    except ImportError as error:
        raise ImportError(
            f"{device=}, {precision=} and {n_devices=} need Lightning Fabric; "
            f"pip install lightning-fabric, or keep device='cpu', precision='32-true' and n_devices=1 ({error})"
        ) from error
    return Fabric(
        accelerator=kind,
        devices=[int(index)] if kind == "cuda" and index else n_devices,
        strategy="ddp_spawn" if n_devices > 1 else "auto",
        precision=cast(Precision, precision),
        # Processes are started here, also within a job of a cluster whose scheduler could start some.
        plugins=[LightningEnvironment()],
    )


def launch(fabric: Fabric, learn: Learn, model: nn.Module) -> Any:
    """Let ``learn`` train ``model`` in all processes; afterwards ``model`` is as it is in process 0.

    Parameters
    ----------
    fabric : lightning_fabric.Fabric
        From `make_fabric`.
    learn : callable
        (fabric, model) → result; trains the model in place. For several processes it must be picklable.
    model : torch.nn.Module
        To be trained, on the CPU, where it stays.

    Returns
    -------
    object
        What ``learn`` returned in process 0.
    """
    with TemporaryDirectory() as folder:
        # Fabric itself returns what fits into a pipe; more would block its processes for ever.
        path = Path(folder) / "result"
        fabric.launch(partial(_learn, learn=learn, model=model, path=path))
        written = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(written["model"])
    return written["result"]


def _learn(fabric: Fabric, learn: Learn, model: nn.Module, path: Path) -> None:
    own = copy.deepcopy(model)  # torch shares the memory of a spawned module among the processes
    result = learn(fabric, own)
    if fabric.is_global_zero:
        torch.save({"model": own.state_dict(), "result": result}, path)


def average_gradients(model: nn.Module, fabric: Fabric) -> None:
    """Set the gradients of all processes to their mean; the same parameters have one in each."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    mean = cast(Tensor, fabric.all_reduce(joined, reduce_op="mean"))
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def mean_of_processes(values: dict[str, float], fabric: Fabric) -> dict[str, float]:
    """Return the mean of each value over all processes."""
    joined = torch.tensor(list(values.values()), dtype=torch.float64, device=fabric.device)
    mean = cast(Tensor, fabric.all_reduce(joined, reduce_op="mean"))
    return dict(zip(values, mean.tolist(), strict=True))
