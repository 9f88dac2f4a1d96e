"""Pretext tasks that ask for vectors and tensors: how sites were displaced, how cells were strained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_matfeat.encoder import CGCNNEncoder
from ssl_matfeat.graph import CrystalBatch
from ssl_matfeat.pooling import pool_mean
from ssl_matfeat.pretext.damage import displace, strain_cells
from ssl_matfeat.training import Losses


class EdgeScalars(nn.Module):
    """One number s(x_i, x_j, e_ij) of each edge; times its direction it makes an equivariant prediction.

    Parameters
    ----------
    encoder : CGCNNEncoder
        Whose width and Gaussians it takes.
    """

    def __init__(self, encoder: CGCNNEncoder) -> None:
        super().__init__()
        width = encoder.n_channels
        self.center = nn.Linear(width, width)
        self.neighbor = nn.Linear(width, width, bias=False)
        self.edge = nn.Linear(len(encoder.expand.centers), width, bias=False)
        self.scalar = nn.Linear(width, 1, bias=False)
        # Sums over a shell of random numbers would start far worse than predicting nothing.
        nn.init.zeros_(self.scalar.weight)

    def forward(self, encoder: CGCNNEncoder, batch: CrystalBatch) -> Tensor:
        """Return the scalars of all edges, (n_edges,), in the precision of the edge vectors."""
        gaussians = encoder.expand(batch.distance)
        x = encoder.embed(batch, encoder.indicators[batch.numbers], gaussians)[-1]
        neighbor, center = batch.edge_index
        z = self.edge(gaussians)  # (n_edges, width)
        z = z + self.center(x).index_select(0, center) + self.neighbor(x).index_select(0, neighbor)
        return self.scalar(F.silu(z)).squeeze(1).to(batch.vector.dtype)


class DenoisingTask(nn.Module):
    """Displace all sites at random, and predict each displacement as a vector.

    Denoising of positions (Zaidi et al., arXiv 2206.00133) with an equivariant head: û_ij the direction from site
    i to its neighbour j, the displacement of i is Σ_j s(x_i, x_j, e_ij) û_ij. A shift of the whole crystal cannot
    be seen, so displacements are taken relative to the crystal's mean. The squared error is divided by the
    variance of the noise: predicting nothing costs 1.

    Parameters
    ----------
    encoder : CGCNNEncoder
        Whose width the head takes.
    noise : float, default=0.1
        Standard deviation of each coordinate of a displacement, in Å.
    """

    def __init__(self, encoder: CGCNNEncoder, noise: float = 0.1) -> None:
        super().__init__()
        self.noise = noise
        self.scalars = EdgeScalars(encoder)

    def losses(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return ``displacement``, the mean squared error over the variance of the noise."""
        predicted, actual = self._damage_and_predict(encoder, batch, generator)
        # A crystal's mean takes three degrees of freedom; a one-atom cell has none left, and teaches nothing.
        freedom = max(3 * (len(actual) - batch.num_graphs), 1)
        return {"displacement": ((predicted - actual) / self.noise).square().sum() / freedom}

    def metrics(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return the cosine between all predicted and all actual displacements."""
        predicted, actual = self._damage_and_predict(encoder, batch, generator)
        return {
            "displacement cosine": F.cosine_similarity(predicted.flatten(), actual.flatten(), 0)
        }

    def predict(self, encoder: CGCNNEncoder, damaged: CrystalBatch) -> Tensor:
        """Return the displacements in Å that a damaged batch seems to have, relative to the crystals' means."""
        moves = self.scalars(encoder, damaged)[:, None] * _directions(damaged)  # (n_edges, 3)
        return _without_mean(self.noise * _sum_over_shells(moves, damaged), damaged)  # (n_sites, 3)

    def _damage_and_predict(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        normal = torch.randn((len(batch.numbers), 3), generator=generator)
        displacement = self.noise * normal.to(batch.vector)
        predicted = self.predict(encoder, displace(batch, displacement))
        return predicted, _without_mean(displacement, batch)


class StrainTask(nn.Module):
    """Strain every cell at random, and predict the strain as a symmetric tensor.

    With û_ij the direction from site i to its neighbour j, the strain is the mean over the sites of
    Σ_j s(x_i, x_j, e_ij) û_ij ⊗ û_ij. The squared error is divided by the variance of the strain: predicting
    nothing costs 1.

    Parameters
    ----------
    encoder : CGCNNEncoder
        Whose width the head takes.
    largest : float, default=0.04
        Each of the six components is uniform between plus and minus this.
    """

    def __init__(self, encoder: CGCNNEncoder, largest: float = 0.04) -> None:
        super().__init__()
        self.largest = largest
        self.deviation = largest / math.sqrt(3)
        self.scalars = EdgeScalars(encoder)

    def losses(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return ``strain``, the mean squared error over the variance of the strain."""
        predicted, actual = self._damage_and_predict(encoder, batch, generator)
        return {"strain": F.mse_loss(predicted / self.deviation, actual / self.deviation)}

    def metrics(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return R², the part of the sum of squares that is explained."""
        predicted, actual = self._damage_and_predict(encoder, batch, generator)
        return {"strain R2": 1 - (predicted - actual).square().sum() / actual.square().sum()}

    def predict(self, encoder: CGCNNEncoder, damaged: CrystalBatch) -> Tensor:
        """Return the strain that each crystal of a damaged batch seems to have, (n_crystals, 3, 3)."""
        u = _directions(damaged)
        stretches = (u[:, :, None] * u[:, None, :]).flatten(1)  # (n_edges, 9)
        of_edges = self.scalars(encoder, damaged)[:, None] * stretches
        of_crystals = pool_mean(_sum_over_shells(of_edges, damaged), damaged)  # (n_crystals, 9)
        return self.deviation * of_crystals.unflatten(1, (3, 3))

    def _damage_and_predict(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        uniform = 2 * torch.rand((batch.num_graphs, 3, 3), generator=generator) - 1
        upper = (self.largest * uniform.to(batch.vector)).triu()
        strain = upper + upper.triu(1).transpose(1, 2)
        return self.predict(encoder, strain_cells(batch, strain)), strain


def _directions(batch: CrystalBatch) -> Tensor:
    """Return unit vectors from centre to neighbour, (n_edges, 3)."""
    return batch.vector / batch.distance[:, None]


def _sum_over_shells(of_edges: Tensor, batch: CrystalBatch) -> Tensor:
    """Sum over the edges of each site: (n_edges, k) → (n_sites, k)."""
    zeros = of_edges.new_zeros(len(batch.numbers), of_edges.shape[1])
    return zeros.index_add(0, batch.edge_index[1], of_edges)


def _without_mean(vectors: Tensor, batch: CrystalBatch) -> Tensor:
    """Return vectors of sites relative to the mean of their crystal, (n_sites, 3)."""
    return vectors - pool_mean(vectors, batch)[batch.batch]
