"""Supervised graph networks: states of sites and the graph → new states of sites.

Every backbone maps (n_sites, n_channels) to (n_sites, n_channels) and sees distances in Å; PaiNN sees directions too.
None of them depends on orientation, origin, cell or order of the atoms, and all but GATv2 are continuous in positions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_matfeat.encoder import FactoredCGConv, GaussianExpansion, envelope
from ssl_matfeat.graph import CrystalBatch
from ssl_matfeat.pooling import pool_mean

_CUTOFF = 8.0
_STEP = 0.2
_N_GAUSSIANS = round(_CUTOFF / _STEP) + 1


def _seen(batch: CrystalBatch) -> Tensor:
    """Return a factor of each edge, (n_edges,), that is 0 at the cutoff and where the list of neighbours ends."""
    return envelope(batch.distance, _CUTOFF) * batch.weight


class CGCNN(nn.Module):
    """Crystal graph convolutions, factored (Xie & Grossman, Phys. Rev. Lett. 120, 145301, 2018)."""

    def __init__(self, n_channels: int, n_layers: int) -> None:
        super().__init__()
        self.expand = GaussianExpansion(_CUTOFF, _STEP)
        self.convolutions = nn.ModuleList(
            FactoredCGConv(n_channels, _N_GAUSSIANS) for _ in range(n_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(n_channels) for _ in range(n_layers))

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Return the states after all layers, (n_sites, n_channels)."""
        gaussians = self.expand(batch.distance)  # (n_edges, n_gaussians)
        for convolve, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolve(norm(x), batch.edge_index, gaussians, batch.weight)
        return x


class PaiNN(nn.Module):
    """Equivariant messages: each site has scalars and vectors (Schütt et al., arXiv 2102.03150, 2021).

    Vectors are sums of edge directions and of the neighbours' vectors, and speak to the scalars through their lengths
    and scalar products alone, so that the network knows angles and yet gives the same number in any orientation.
    """

    def __init__(self, n_channels: int, n_layers: int) -> None:
        super().__init__()
        self.expand = GaussianExpansion(_CUTOFF, _STEP)
        self.messages = nn.ModuleList(_PaiNNMessage(n_channels) for _ in range(n_layers))
        self.updates = nn.ModuleList(_PaiNNUpdate(n_channels) for _ in range(n_layers))

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Return the scalars after all layers, (n_sites, n_channels)."""
        gaussians = self.expand(batch.distance) * _seen(batch)[:, None]
        direction = batch.vector / batch.distance[:, None]  # (n_edges, 3)
        vectors: Tensor | None = None  # (n_sites, 3, n_channels) from the first message on
        for message, update in zip(self.messages, self.updates, strict=True):
            x, vectors = message(x, vectors, batch.edge_index, gaussians, direction)
            x, vectors = update(x, vectors)
        return x


class _PaiNNMessage(nn.Module):
    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_channels)
        self.sender = nn.Sequential(
            nn.Linear(n_channels, n_channels), nn.SiLU(), nn.Linear(n_channels, 3 * n_channels)
        )
        self.filter = nn.Linear(_N_GAUSSIANS, 3 * n_channels, bias=False)

    def forward(
        self,
        x: Tensor,
        vectors: Tensor | None,
        edge_index: Tensor,
        gaussians: Tensor,
        direction: Tensor,
    ) -> tuple[Tensor, Tensor]:
        neighbor, center = edge_index
        sent = self.sender(self.norm(x)).index_select(0, neighbor) * self.filter(gaussians)
        scalar, along, passed_on = sent.chunk(3, dim=1)  # (n_edges, n_channels) each
        vector = direction[:, :, None] * along[:, None, :]  # (n_edges, 3, n_channels)
        if vectors is None:
            vectors = x.new_zeros(len(x), 3, x.shape[1])  # (n_sites, 3, n_channels)
        else:
            vector = vector + vectors.index_select(0, neighbor) * passed_on[:, None, :]
        return (
            x.index_add(0, center, scalar.to(x.dtype)),
            vectors.index_add(0, center, vector.to(x.dtype)),
        )


class _PaiNNUpdate(nn.Module):
    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.left = nn.Linear(
            n_channels, n_channels, bias=False
        )  # no bias: it would be a direction
        self.right = nn.Linear(n_channels, n_channels, bias=False)
        self.mix = nn.Sequential(
            nn.LayerNorm(2 * n_channels),
            nn.Linear(2 * n_channels, n_channels),
            nn.SiLU(),
            nn.Linear(n_channels, 3 * n_channels),
        )

    def forward(self, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.left(vectors), self.right(vectors)  # (n_sites, 3, n_channels)
        length = (right.square().sum(1) + 1e-8).sqrt()  # (n_sites, n_channels)
        add, scale, product = self.mix(torch.cat([x, length], 1)).chunk(3, dim=1)
        return x + add + product * (left * right).sum(1), vectors + scale[:, None, :] * left


class _PyGLayers(nn.Module, ABC):
    """Residual layers of PyG: x + silu(layer(norm(x))).

    The layers must not add loops of their own: to do so PyG first removes the loops that there are, and in a periodic
    graph these are bonds between an atom and its own images.
    """

    def __init__(self, n_channels: int, n_layers: int) -> None:
        super().__init__()
        self.expand = GaussianExpansion(_CUTOFF, _STEP)
        self.layers = nn.ModuleList(self.layer(n_channels) for _ in range(n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(n_channels) for _ in range(n_layers))

    @abstractmethod
    def layer(self, n_channels: int) -> nn.Module:
        """Return one new layer."""

    @abstractmethod
    def update(self, layer: nn.Module, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Return what a layer makes of the states, (n_sites, n_channels)."""

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Return the states after all layers, (n_sites, n_channels)."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.silu(self.update(layer, norm(x), batch))
        return x


class GCN(_PyGLayers):
    """PyG's ``GCNConv`` (Kipf & Welling, arXiv 1609.02907); a bond weighs what `_seen` says, not normalised."""

    def layer(self, n_channels: int) -> nn.Module:
        """Return one layer."""
        from torch_geometric.nn import GCNConv  # PyG takes seconds to import

        return GCNConv(n_channels, n_channels, add_self_loops=False, normalize=False)

    def update(self, layer: nn.Module, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Run one layer."""
        return layer(x, batch.edge_index, _seen(batch))


class GATv2(_PyGLayers):
    """PyG's ``GATv2Conv`` with four heads (Brody et al., arXiv 2105.14491).

    Distances decide how neighbours are weighed against each other, and nothing else. The layer takes no weights of
    edges, so that it sees a list of neighbours that is cut after a shell, and predictions jump where that shell splits.
    """

    def layer(self, n_channels: int) -> nn.Module:
        """Return one layer."""
        from torch_geometric.nn import GATv2Conv

        return GATv2Conv(
            n_channels,
            n_channels,
            heads=4,
            concat=False,
            edge_dim=_N_GAUSSIANS,
            add_self_loops=False,
        )

    def update(self, layer: nn.Module, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Run one layer."""
        sharp = batch.cut_sharply()
        return layer(x, sharp.edge_index, self.expand(sharp.distance))


class SchNet(_PyGLayers):
    """PyG's continuous-filter ``InteractionBlock`` of SchNet (Schütt et al., arXiv 1706.08566)."""

    def layer(self, n_channels: int) -> nn.Module:
        """Return one layer."""
        from torch_geometric.nn.models.schnet import InteractionBlock

        return InteractionBlock(n_channels, _N_GAUSSIANS, n_channels, _CUTOFF)

    def update(self, layer: nn.Module, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Run one layer."""
        # Of this distance PyG makes the factor 0.5 (1 + cos(π d / cutoff)), and nothing else.
        distance = _CUTOFF / math.pi * torch.arccos(2 * _seen(batch) - 1)
        return layer(x, batch.edge_index, distance, self.expand(batch.distance))


class MEGNet(nn.Module):
    """Bonds, sites and the crystal update each other in turn (Chen et al., Chem. Mater. 31, 3564, 2019)."""

    def __init__(self, n_channels: int, n_layers: int) -> None:
        super().__init__()
        self.expand = GaussianExpansion(_CUTOFF, _STEP)
        self.embed_edge = nn.Linear(_N_GAUSSIANS, n_channels)
        self.edges = nn.ModuleList(_update(4 * n_channels, n_channels) for _ in range(n_layers))
        self.sites = nn.ModuleList(_update(3 * n_channels, n_channels) for _ in range(n_layers))
        self.crystals = nn.ModuleList(_update(3 * n_channels, n_channels) for _ in range(n_layers))

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Return the states after all layers, (n_sites, n_channels)."""
        if not self.sites:
            return x
        neighbor, center = batch.edge_index
        weight = batch.weight.to(x.dtype)[:, None]  # (n_edges, 1)
        n_bonds = x.new_zeros(len(x), 1).index_add(0, center, weight)  # (n_sites, 1), at least 1
        bond = self.embed_edge(self.expand(batch.distance))  # (n_edges, n_channels)
        crystal = pool_mean(x, batch)  # (n_crystals, n_channels)
        for edges, sites, crystals in zip(self.edges, self.sites, self.crystals, strict=True):
            whole = crystal.index_select(0, batch.batch)  # (n_sites, n_channels)
            bond = bond + edges(torch.cat([x[center], x[neighbor], bond, whole[center]], 1))
            heard = weight * bond.to(x.dtype)
            around = torch.zeros_like(x).index_add(0, center, heard) / n_bonds
            x = x + sites(torch.cat([x, around, whole], 1))
            pooled = pool_mean(x, batch), pool_mean(around, batch)
            crystal = crystal + crystals(torch.cat([crystal, *pooled], 1))
        return x + crystal.index_select(0, batch.batch)


def _update(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(n_in), nn.Linear(n_in, n_out), nn.SiLU(), nn.Linear(n_out, n_out)
    )


BACKBONES: dict[str, type[nn.Module]] = {
    "cgcnn": CGCNN,
    "painn": PaiNN,
    "gcn": GCN,
    "gatv2": GATv2,
    "schnet": SchNet,
    "megnet": MEGNet,
}
"""The backbones by name; each is called with ``n_channels`` and ``n_layers``."""
