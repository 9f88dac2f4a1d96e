"""One training loop for everything that is trained here, and the devices and processes that it can run on.

It knows nothing of the model, nor of what a batch holds.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Batch = TypeVar("Batch")
Losses = dict[str, Tensor]
"""Named scalar losses of one batch; what is minimised is their sum."""
LossFunction = Callable[[Batch, torch.Generator], Losses]
Batches = Callable[[torch.Generator | None], Iterator[Batch]]
"""Yields the batches of one epoch: in an order drawn from the generator, or as stored for None."""
History = list[dict[str, Any]]
Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast to train."""

    max_epochs: int = 30
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    """``"cosine"`` (to zero, after one epoch of warm-up) or ``"constant"``."""
    ema_decay: float | None = None
    """Decay of the moving average of the parameters a step; None keeps the last parameters."""
    clip_norm: float = 10.0
    patience: int | None = None
    """Stop once the sum of the validation losses has not fallen for so many epochs, and keep the parameters
    of the best one; None trains to the end."""
    random_state: int = 0
    verbose: bool = False


def train(
    model: nn.Module,
    losses_of: LossFunction[Batch],
    batches: Batches[Batch],
    validation_batches: Batches[Batch] | None,
    n_batches: int,
    options: TrainingOptions,
    checkpoint: Path | None = None,
    objective: str = "",
    parameter_groups: list[dict[str, Any]] | None = None,
    fabric: Fabric | None = None,
) -> History:
    """Train ``model`` in place and return its history, one dict of mean losses an epoch.

    Parameters
    ----------
    model : torch.nn.Module
        Whose parameters ``losses_of`` uses; on the device of the batches.
    losses_of : callable
        (batch, generator) → named losses.
    batches, validation_batches : callable
        Called with a generator (training, to shuffle) or None (validation). Without validation batches there
        are no validation losses, and ``options.patience`` must be None.
    n_batches : int
        Batches in an epoch, for the schedule.
    options : TrainingOptions
    checkpoint : Path or None
        Written after every epoch. If it exists, training goes on from it, with the same numbers as if it had
        never stopped: every epoch draws from a generator seeded by (random_state, epoch).
    objective : str
        What ``losses_of`` asks for, in words; training does not go on from a checkpoint of another objective.
    parameter_groups : list of dict or None
        In torch's form, for parts with an ``lr`` of their own; None is all parameters of ``model``.
    fabric : lightning_fabric.Fabric or None
        Launched: gives the precision of training, and the other processes, which must start from the same
        parameters, and to which ``batches`` and ``n_batches`` give their own share of the batches. Process 0
        alone validates and writes. None is one process in the precision of the parameters.

    Returns
    -------
    list of dict
        Keys ``epoch`` and ``train_<name>``, ``validation_<name>`` for each loss.

    Raises
    ------
    ValueError
        If the checkpoint is of another training, or a loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups or model.parameters(), lr=options.lr, weight_decay=options.weight_decay
    )
    identity = _identity(options, model, n_batches, objective)
    highest_lr = [group["lr"] for group in optimizer.param_groups]
    average = copy.deepcopy(model) if options.ema_decay is not None else None
    rank = 0 if fabric is None else fabric.global_rank
    device = next(model.parameters()).device
    best: dict[str, Any] | None = None
    history: History = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        changed = {
            name: (state["options"].get(name), now)
            for name, now in identity.items()
            if state["options"].get(name) != now
        }
        if changed:
            said = "; ".join(f"{name}: {then}, now {now}" for name, (then, now) in changed.items())
            raise ValueError(
                f"{checkpoint} was written by another training ({said}); train with the same parameters and "
                "structures, or remove the file"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        best, history = state["best"], state["history"]

    progress = tqdm(
        total=options.max_epochs * n_batches,
        initial=len(history) * n_batches,
        disable=not options.verbose or rank > 0,
        unit="batch",
    )
    for epoch in range(len(history), options.max_epochs):
        if options.patience is not None and _epochs_since_best(history) >= options.patience:
            break
        generator = torch.Generator().manual_seed(_seed(options.random_state, epoch))
        # All processes draw the same order of batches, but each its own damage.
        seed = _seed(options.random_state, epoch, rank)
        own = generator if rank == 0 else torch.Generator().manual_seed(seed)
        model.train()
        record = _Mean()
        # Dropout draws from the global generator of the device.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for step, batch in enumerate(batches(generator)):
                done = epoch + step / n_batches
                for group, lr in zip(optimizer.param_groups, highest_lr, strict=True):
                    group["lr"] = lr * _schedule(options, done)
                with nullcontext() if fabric is None else fabric.autocast():
                    losses = losses_of(batch, own)
                total = torch.stack(list(losses.values())).sum()
                optimizer.zero_grad(set_to_none=True)
                total.backward()
                if fabric is not None and fabric.world_size > 1:
                    _average_gradients(model, fabric)
                nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
                optimizer.step()
                if average is not None and options.ema_decay is not None:
                    _update_average(
                        average,
                        model,
                        min(options.ema_decay, 1 - 1 / (2 + epoch * n_batches + step)),
                    )
                record.add(losses)
                progress.update()
        trained = record.means()
        if not all(map(math.isfinite, trained.values())):
            said = f"training diverged in epoch {epoch + 1}: {trained}"
            raise ValueError(f"{said}; lower lr={options.lr} or look for outliers")
        scores: dict[str, float] = {}
        kept = (average or model).state_dict()
        if validation_batches is not None and rank == 0:
            # The loss function holds `model`, so the kept parameters visit it for the length of the validation.
            current = copy.deepcopy(model.state_dict())
            model.load_state_dict(kept)
            scores = evaluate(model, losses_of, validation_batches, options.random_state)
            model.load_state_dict(current)
        if fabric is not None and fabric.world_size > 1:
            trained = _mean_of_processes(trained, fabric)
            scores = fabric.broadcast(scores)
        history.append(
            {
                "epoch": epoch + 1,
                **{f"train_{name}": value for name, value in trained.items()},
                **{f"validation_{name}": value for name, value in scores.items()},
            }
        )
        if options.patience is not None and _epochs_since_best(history) == 0:
            best = copy.deepcopy(kept)
        progress.set_postfix(total=sum((scores or trained).values()))
        if checkpoint is not None and rank == 0:
            _save(
                checkpoint,
                {
                    "options": identity,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.state_dict() if average is not None else None,
                    "best": best,
                    "history": history,
                },
            )
    progress.close()
    model.load_state_dict(best or (average or model).state_dict())
    model.eval()
    return history


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
    ValueError
        If a parameter is off, or there are fewer devices.
    ImportError
        If Lightning Fabric is needed and not installed.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
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
    except ImportError as error:
        raise ImportError(
            f"{device=}, {precision=} and {n_devices=} need Lightning Fabric; "
            "pip install lightning-fabric, or keep device='cpu', precision='32-true' and n_devices=1"
        ) from error
    return Fabric(
        accelerator=kind,
        devices=[int(index)] if kind == "cuda" and index else n_devices,
        strategy="ddp_spawn" if n_devices > 1 else "auto",
        precision=cast(Precision, precision),
    )


def launch(
    fabric: Fabric, learn: Callable[[Fabric, nn.Module], History], model: nn.Module
) -> History:
    """Let ``learn`` train ``model`` in all processes; afterwards ``model`` is as it is in process 0.

    Parameters
    ----------
    fabric : lightning_fabric.Fabric
        From `make_fabric`.
    learn : callable
        (fabric, model) → history; trains the model in place. For several processes it must be picklable.
    model : torch.nn.Module
        To be trained, on the CPU, where it stays.

    Returns
    -------
    list of dict
        What ``learn`` returned in process 0.
    """
    with TemporaryDirectory() as folder:
        # Fabric itself returns what fits into a pipe; more would block its processes for ever.
        result = Path(folder) / "result"
        fabric.launch(partial(_learn, learn=learn, model=model, result=result))
        written = torch.load(result, weights_only=True, map_location="cpu")
    model.load_state_dict(written["model"])
    return cast(History, written["history"])


def _learn(
    fabric: Fabric,
    learn: Callable[[Fabric, nn.Module], History],
    model: nn.Module,
    result: Path,
) -> None:
    own = copy.deepcopy(model)  # torch shares the memory of a spawned module among the processes
    history = learn(fabric, own)
    if fabric.is_global_zero:
        torch.save({"model": own.state_dict(), "history": history}, result)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    values_of: LossFunction[Batch],
    batches: Batches[Batch],
    random_state: int,
) -> dict[str, float]:
    """Return the means over all batches of what ``values_of`` gives, with the model in evaluation mode."""
    model.eval()
    generator = torch.Generator().manual_seed(_seed(random_state, -1))
    record = _Mean()
    for batch in batches(None):
        record.add(values_of(batch, generator))
    return record.means()


class _Mean:
    """Running means of named values."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, values: Losses) -> None:
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())

    def means(self) -> dict[str, float]:
        return {name: total / self._count for name, total in self._sums.items()}


def _epochs_since_best(history: History) -> int:
    """Return how long ago the sum of the validation losses was lowest, in epochs; 0 before the first."""
    if not history:
        return 0
    totals = [
        sum(value for name, value in record.items() if name.startswith("validation_"))
        for record in history
    ]
    return len(totals) - 1 - totals.index(min(totals))


def _seed(random_state: int, epoch: int, rank: int = 0) -> int:
    return 1_000_003 * random_state + 10_007 * rank + epoch + 1


def _identity(
    options: TrainingOptions, model: nn.Module, n_batches: int, objective: str
) -> dict[str, Any]:
    """Return what must be the same for a training to go on from a checkpoint."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
    chosen = {name: value for name, value in asdict(options).items() if name != "verbose"}
    return {**chosen, "n_batches": n_batches, "model": digest, "objective": objective}


def _schedule(options: TrainingOptions, done: float) -> float:
    if options.schedule == "constant":
        return 1.0
    warm_up = min(1.0, 0.05 + done)
    return float(
        warm_up * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done / options.max_epochs)))
    )


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)


def _average_gradients(model: nn.Module, fabric: Fabric) -> None:
    """Set the gradients of all processes to their mean; the same parameters have one in each."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    mean = cast(Tensor, fabric.all_reduce(joined, reduce_op="mean"))
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _mean_of_processes(values: dict[str, float], fabric: Fabric) -> dict[str, float]:
    joined = torch.tensor(list(values.values()), dtype=torch.float64, device=fabric.device)
    mean = cast(Tensor, fabric.all_reduce(joined, reduce_op="mean"))
    return dict(zip(values, mean.tolist(), strict=True))


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    unfinished.replace(path)
