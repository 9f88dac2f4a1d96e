"""One training loop for everything that is trained here; it knows nothing of the model, nor of what a batch holds."""

from __future__ import annotations

import copy
import hashlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ssl_matfeat._random import seeded
from ssl_matfeat.devices import average_gradients, mean_of_processes

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Batch = TypeVar("Batch")
Losses = dict[str, Tensor]
"""Named scalar losses of one batch; what is minimised is their sum."""
LossFunction = Callable[[Batch, torch.Generator], Losses]
Batches = Callable[[torch.Generator | None], Iterator[Batch]]
"""Yields the batches of one epoch: in an order drawn from the generator, or as stored for None."""
History = list[dict[str, Any]]
_CLIP_NORM = 10.0
"""Largest norm of a step's gradient."""


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast to train."""

    max_epochs: int = 30
    lr: float = 1e-3
    weight_decay: float = 0.0
    ema_decay: float | None = None
    """Decay of the moving average of the parameters a step; None keeps the last parameters."""
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
        If the checkpoint is damaged or of another training, an epoch has no batch, or a loss or its gradient is not
        finite.
    """
    identity = _identity(options, model, n_batches, objective)
    run = _Run(model, losses_of, n_batches, options, parameter_groups, fabric)
    if checkpoint is not None and checkpoint.exists():
        run.resume(checkpoint, identity)
    with tqdm(
        total=options.max_epochs * n_batches,
        initial=len(run.history) * n_batches,
        disable=not options.verbose or run.rank > 0,
        unit="batch",
    ) as progress:
        for epoch in range(len(run.history), options.max_epochs):
            if options.patience is not None and _epochs_since_best(run.history) >= options.patience:
                break
            trained = run.train_epoch(epoch, batches, progress)
            scores = run.validate(validation_batches)
            run.check_finite(epoch, scores)
            run.record(epoch, trained, scores)
            progress.set_postfix(total=sum((scores or trained).values()))
            if checkpoint is not None and run.rank == 0:
                run.save(checkpoint, identity)
    model.load_state_dict(run.best or run.kept.state_dict())
    model.eval()
    return run.history


class _Run:
    """The state of one training, that a checkpoint holds, and its steps."""

    def __init__(
        self,
        model: nn.Module,
        losses_of: LossFunction[Any],
        n_batches: int,
        options: TrainingOptions,
        parameter_groups: list[dict[str, Any]] | None,
        fabric: Fabric | None,
    ) -> None:
        self.model, self.losses_of, self.n_batches = model, losses_of, n_batches
        self.options, self.fabric = options, fabric
        self.others = fabric if fabric is not None and fabric.world_size > 1 else None
        """Where other processes train too, the way to them."""
        self.optimizer = torch.optim.AdamW(
            parameter_groups or model.parameters(),
            lr=options.lr,
            weight_decay=options.weight_decay,
            # Small networks have many small tensors: one by one these take a fifth of the time of a step.
            fused=next(model.parameters()).device.type in ("cpu", "cuda"),
        )
        self.highest_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.average = copy.deepcopy(model) if options.ema_decay is not None else None
        self.best: dict[str, Any] | None = None
        self.history: History = []
        self.rank = 0 if fabric is None else fabric.global_rank

    @property
    def kept(self) -> nn.Module:
        """Return what holds the parameters that the training is for."""
        return self.model if self.average is None else self.average

    def train_epoch(
        self, epoch: int, batches: Batches[Any], progress: tqdm[Any]
    ) -> dict[str, float]:
        """Return the mean losses, over all processes."""
        generator = torch.Generator().manual_seed(_seed(self.options.random_state, epoch))
        # All processes draw the same order of batches, but each its own damage.
        seed = _seed(self.options.random_state, epoch, self.rank)
        own = generator if self.rank == 0 else torch.Generator().manual_seed(seed)
        device = next(self.model.parameters()).device
        self.model.train()
        record = _Mean()
        # Dropout draws from the global generator; where there is none, other threads need not wait.
        drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules())
        with seeded(seed, device) if drops else nullcontext():
            for step, batch in enumerate(batches(generator)):
                record.add(self._step(epoch, step, batch, own))
                progress.update()
        trained = record.means()
        if not trained:
            raise ValueError(
                f"epoch {epoch + 1} had no batch to learn from; train on more, in smaller batches or in fewer processes"
            )
        self.check_finite(epoch, trained)
        if self.others is not None:
            trained = mean_of_processes(trained, self.others)
        return trained

    def _step(self, epoch: int, step: int, batch: Any, generator: torch.Generator) -> Losses:
        for group, lr in zip(self.optimizer.param_groups, self.highest_lr, strict=True):
            group["lr"] = lr * _schedule(self.options, epoch + step / self.n_batches)
        with nullcontext() if self.fabric is None else self.fabric.autocast():
            losses = self.losses_of(batch, generator)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.others is not None:
            average_gradients(self.model, self.others)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        self.check_finite(epoch, {"norm of the gradient": float(norm)})
        self.optimizer.step()
        if self.average is not None and self.options.ema_decay is not None:
            n_steps = epoch * self.n_batches + step
            # First the average of a tenth of the steps, so that it forgets where they began.
            decay = min(self.options.ema_decay, (1 + n_steps) / (10 + n_steps))
            _update_average(self.average, self.model, decay)
        return losses

    def check_finite(self, epoch: int, values: dict[str, float]) -> None:
        """Raise a ValueError if one of the values of an epoch is not finite."""
        if not all(map(math.isfinite, values.values())):
            raise ValueError(
                f"training diverged in epoch {epoch + 1}: {values}; lower lr={self.options.lr} or look for outliers"
            )

    def validate(self, batches: Batches[Any] | None) -> dict[str, float]:
        """Return the mean losses that the kept parameters have on the validation batches, if there are any."""
        scores: dict[str, float] = {}
        if batches is not None and self.rank == 0:
            # The loss function holds `model`, so the kept parameters visit it for the length of the validation.
            current = copy.deepcopy(self.model.state_dict())
            self.model.load_state_dict(self.kept.state_dict())
            scores = evaluate(self.model, self.losses_of, batches, self.options.random_state)
            self.model.load_state_dict(current)
        if self.others is not None:
            scores = self.others.broadcast(scores)
        return scores

    def record(self, epoch: int, trained: dict[str, float], scores: dict[str, float]) -> None:
        """Note the losses of an epoch, and keep its parameters if none was better."""
        self.history.append(
            {
                "epoch": epoch + 1,
                **{f"train_{name}": value for name, value in trained.items()},
                **{f"validation_{name}": value for name, value in scores.items()},
            }
        )
        if self.options.patience is not None and _epochs_since_best(self.history) == 0:
            self.best = copy.deepcopy(self.kept.state_dict())

    def resume(self, checkpoint: Path, identity: dict[str, Any]) -> None:
        """Go on from where `save` was called, by the same training."""
        data = io.BytesIO(checkpoint.read_bytes())  # a file that cannot be read is not damaged
        try:
            state = torch.load(data, weights_only=True, map_location="cpu")
            written = dict(state["options"])
        except Exception as error:  # of bytes that it did not write, torch raises all kinds
            raise ValueError(
                f"{checkpoint} is damaged or no checkpoint; remove it to start anew"
            ) from error
        changed = {
            name: (written.get(name), now)
            for name, now in identity.items()
            if written.get(name) != now
        }
        if changed:
            said = "; ".join(f"{name}: {then}, now {now}" for name, (then, now) in changed.items())
            raise ValueError(
                f"{checkpoint} was written by another training ({said}); train with the same parameters and "
                "structures, or remove the file"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best, self.history = state["best"], state["history"]

    def save(self, checkpoint: Path, identity: dict[str, Any]) -> None:
        """Write what `resume` reads, all of it or nothing."""
        state = {
            "options": identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "best": self.best,
            "history": self.history,
        }
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        unfinished = checkpoint.with_name(f"{checkpoint.name}.part")
        torch.save(state, unfinished)
        unfinished.replace(checkpoint)


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
    return (1_000_003 * random_state + 10_007 * rank + epoch + 1) % 2**63


def _identity(
    options: TrainingOptions, model: nn.Module, n_batches: int, objective: str
) -> dict[str, Any]:
    """Return what must be the same for a training to go on from a checkpoint."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
    chosen = {name: value for name, value in asdict(options).items() if name != "verbose"}
    return {**chosen, "n_batches": n_batches, "model": digest, "objective": objective}


def _schedule(options: TrainingOptions, done: float) -> float:
    """Return the part of the highest learning rate after so many epochs: a warm-up in the first, a cosine to zero."""
    warm_up = min(1.0, 0.05 + done)
    # An epoch may take more batches than foreseen, when shuffling packs them worse.
    passed = min(1.0, done / options.max_epochs)
    return warm_up * 0.5 * (1 + math.cos(math.pi * passed))


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(current, 1 - decay)  # statistics of a BatchNorm belong to the parameters
        else:
            kept.copy_(current)
