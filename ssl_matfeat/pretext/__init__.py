"""Self-supervised tasks: each is handed an encoder, has heads of its own and gives the losses of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ssl_matfeat.encoder import CGCNNEncoder
from ssl_matfeat.graph import CrystalBatch
from ssl_matfeat.pretext.context import ContextTask
from ssl_matfeat.pretext.elements import PropertyTask, ReplacedTask
from ssl_matfeat.pretext.geometry import DenoisingTask, StrainTask
from ssl_matfeat.pretext.paper import ContrastiveTask, PredictiveTask
from ssl_matfeat.training import Losses

TASKS: dict[str, tuple[type[nn.Module], str]] = {
    "context": (ContextTask, "context"),
    "predictive": (PredictiveTask, "cgcnn"),
    "contrastive": (ContrastiveTask, "cgcnn"),
    "property": (PropertyTask, "cgcnn"),
    "replaced": (ReplacedTask, "cgcnn"),
    "denoising": (DenoisingTask, "cgcnn"),
    "strain": (StrainTask, "cgcnn"),
}
"""The tasks by name, and the encoder that each of them trains."""


class Pretext(nn.Module):
    """An encoder and the weighted tasks that train it.

    Parameters
    ----------
    encoder : torch.nn.Module
        To be trained.
    weights : dict of str to float
        Names of `TASKS` and what their losses are multiplied by.
    """

    def __init__(self, encoder: Any, weights: dict[str, float]) -> None:
        super().__init__()
        self.encoder = encoder
        self.weights = weights
        self.tasks = nn.ModuleDict({name: TASKS[name][0](encoder) for name in weights})

    def losses(self, batch: CrystalBatch, generator: torch.Generator) -> Losses:
        """Return the weighted losses of all tasks."""
        shown = self._shown(batch)
        return {
            name: weight * loss
            for task, weight in self.weights.items()
            for name, loss in self._task(task).losses(self.encoder, shown, generator).items()
        }

    def metrics(self, batch: CrystalBatch, generator: torch.Generator) -> Losses:
        """Return what says how well the tasks are solved, such as accuracies."""
        shown = self._shown(batch)
        return {
            name: value
            for task in self.weights
            for name, value in self._task(task).metrics(self.encoder, shown, generator).items()
        }

    def _shown(self, batch: CrystalBatch) -> CrystalBatch:
        """Return the edges that the encoder makes use of, before a task moves atoms or hides them."""
        return batch.cut_sharply() if isinstance(self.encoder, CGCNNEncoder) else batch

    def _task(self, name: str) -> Any:
        return self.tasks[name]
