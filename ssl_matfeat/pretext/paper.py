"""The two pretext tasks of Kong et al., Mach. Learn.: Sci. Technol. 5, 035018 (2024)."""

from __future__ import annotations

import numpy as np
import torch
from pymatgen.core import Element
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_matfeat._validation import MAX_ATOMIC_NUMBER
from ssl_matfeat.encoder import CGCNNEncoder
from ssl_matfeat.graph import CrystalBatch
from ssl_matfeat.pooling import pool_mean
from ssl_matfeat.pretext.damage import hide_atoms, supercell
from ssl_matfeat.training import Losses

N_GROUPS, N_PERIODS = 19, 9


def group_and_period() -> tuple[Tensor, Tensor]:
    """Return the class of every element, (104,) each: group - 1, or 18 for the f block; period - 1."""
    elements = [Element.from_Z(z) for z in range(1, MAX_ATOMIC_NUMBER + 1)]
    f_block = [e.is_lanthanoid or e.is_actinoid for e in elements]
    group = [0] + [18 if f else e.group - 1 for e, f in zip(elements, f_block, strict=True)]
    period = [0] + [e.row - 1 if e.row <= 7 else e.row - 3 for e in elements]
    return torch.tensor(group), torch.tensor(period)


class PredictiveTask(nn.Module):
    """Hide atoms, predict their group and period; hide their edges, predict the distance bin.

    ``int(mask_ratio * n + 1)`` atoms of each crystal lose their indicators, and the edges that touch one lose
    their Gaussians too (in the authors' scripts these stayed visible, and the edge task read off its answer).
    An edge is the sum of its two node embeddings; its class is the index of the largest Gaussian. Three
    cross-entropies, added.

    Parameters
    ----------
    encoder : CGCNNEncoder
        Whose width the heads take.
    mask_ratio : float, default=0.15
        Part of the atoms to hide.
    """

    group: Tensor
    period: Tensor

    def __init__(self, encoder: CGCNNEncoder, mask_ratio: float = 0.15) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        width = encoder.n_channels
        self.predict_group = nn.Linear(width, N_GROUPS)
        self.predict_period = nn.Linear(width, N_PERIODS)
        self.predict_distance = nn.Linear(width, len(encoder.expand.centers))
        group, period = group_and_period()
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("period", period, persistent=False)

    def losses(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return the cross-entropies ``group``, ``period`` and ``edge`` in nats."""
        logits, targets = self.predict(encoder, batch, generator)
        return {name: F.cross_entropy(logits[name], targets[name]) for name in logits}

    def metrics(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return the accuracies of ``group``, ``period`` and ``edge``."""
        logits, targets = self.predict(encoder, batch, generator)
        return {
            f"{name} accuracy": (logits[name].argmax(1) == targets[name]).float().mean()
            for name in logits
        }

    def predict(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return logits and classes of what was hidden, by the name of the task."""
        hidden = hide_atoms(encoder, batch, self.mask_ratio, generator)
        x = encoder.embed(batch, hidden.node_input, hidden.edge_input)[-1]
        neighbor, center = batch.edge_index[:, hidden.edges]
        edge = x[neighbor] + x[center]
        numbers = batch.numbers[hidden.sites]
        logits = {
            "group": self.predict_group(x[hidden.sites]),
            "period": self.predict_period(x[hidden.sites]),
            "edge": self.predict_distance(edge),
        }
        targets = {
            "group": self.group[numbers],
            "period": self.period[numbers],
            # The nearest Gaussian; far from all of them they are equal, and the largest would be the first.
            "edge": (batch.distance[hidden.edges, None] - encoder.expand.centers).abs().argmin(1),
        }
        return logits, targets


class ContrastiveTask(nn.Module):
    """Pull two damaged supercells of a crystal together, push other crystals away.

    Each view is a supercell of random shape with a part of its sites and edges replaced by the mean token of
    the batch; its mean-pooled last embedding passes a projection head, and InfoNCE compares all views (Oord et
    al., arXiv 1807.03748).

    Parameters
    ----------
    encoder : CGCNNEncoder
        Whose width the projection head takes.
    mask_ratio : float, default=0.2
        Part of the sites, and of the edges, to replace.
    temperature : float, default=0.1
        Of the softmax over cosine similarities.
    max_repeat : int, default=2
        Largest number of cells along one direction.
    """

    def __init__(
        self,
        encoder: CGCNNEncoder,
        mask_ratio: float = 0.2,
        temperature: float = 0.1,
        max_repeat: int = 2,
    ) -> None:
        super().__init__()
        self.mask_ratio, self.temperature, self.max_repeat = mask_ratio, temperature, max_repeat
        width = encoder.n_channels
        self.projection_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def losses(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return ``contrastive``, the InfoNCE loss in nats."""
        similarity = self.similarity(encoder, batch, generator)
        same = torch.arange(len(similarity), device=similarity.device)
        both_ways = F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)
        return {"contrastive": both_ways / 2}

    def metrics(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return the part of first views whose own second view is the nearest in the batch."""
        similarity = self.similarity(encoder, batch, generator)
        same = torch.arange(len(similarity), device=similarity.device)
        return {"retrieval accuracy": (similarity.argmax(1) == same).float().mean()}

    def similarity(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Tensor:
        """Return cosine similarities over temperature of all first with all second views, (n, n)."""
        first, second = (self._view(encoder, batch, generator) for _ in range(2))
        return first @ second.T / self.temperature

    def _view(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Tensor:
        repeats = torch.randint(1, self.max_repeat + 1, (3,), generator=generator).tolist()
        view = supercell(batch, np.array(repeats))
        nodes = self._damage(encoder.indicators[view.numbers], generator)
        edges = self._damage(encoder.expand(view.distance), generator)
        pooled = pool_mean(encoder.embed(view, nodes, edges)[-1], view)  # (n_crystals, width)
        return F.normalize(self.projection_head(pooled), dim=1)

    def _damage(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        replaced = torch.rand(len(tokens), generator=generator) < self.mask_ratio
        return torch.where(replaced.to(tokens.device)[:, None], tokens.mean(dim=0), tokens)
