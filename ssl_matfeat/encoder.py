"""Batch → node embeddings of every layer; knows torch, but no pymatgen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_matfeat.elements import N_INDICATORS, indicator_table
from ssl_matfeat.graph import CrystalBatch


class GaussianExpansion(nn.Module):
    """Expand distances in Gaussians: (n_edges,) Å → (n_edges, n_gaussians)."""

    centers: Tensor

    def __init__(self, cutoff: float = 8.0, step: float = 0.2) -> None:
        super().__init__()
        self.width = step
        n_gaussians = round(cutoff / step) + 1
        self.register_buffer("centers", torch.linspace(0, cutoff, n_gaussians), persistent=False)

    def forward(self, distance: Tensor) -> Tensor:
        """Return exp(-((d - center) / width)²) for each center, in the precision of the distances."""
        centers = self.centers.to(distance.dtype)
        x = (distance[:, None] - centers) / self.width
        # e^-40 for all that is less: denormal numbers would make what reads them several times slower.
        return torch.exp(-(x**2).clamp(max=40))


def envelope(distance: Tensor, cutoff: float = 8.0) -> Tensor:
    """Return a factor of each edge that falls smoothly from 1 to 0 at the cutoff (Å), (n_edges,)."""
    return 0.5 * (1 + torch.cos(math.pi * (distance / cutoff).clamp(max=1)))


class FactoredCGConv(nn.Module):
    """Crystal graph convolution: the numbers of PyG's ``CGConv``, 1.5 to 2 times faster.

    ``x_i + Σ_j sigmoid(z W_f + b_f) softplus(z W_s + b_s)`` with ``z = [x_i, x_j, e_ij]`` (Xie & Grossman,
    Phys. Rev. Lett. 120, 145301, 2018). The products with x_i and x_j are done once a site, not once an edge.

    Parameters
    ----------
    n_channels : int
        Of the sites.
    n_edge_channels : int
        Of the edges.
    """

    def __init__(self, n_channels: int, n_edge_channels: int) -> None:
        super().__init__()
        self.center = nn.Linear(n_channels, 2 * n_channels)
        self.neighbor = nn.Linear(n_channels, 2 * n_channels, bias=False)
        self.edge = nn.Linear(n_edge_channels, 2 * n_channels, bias=False)

    def forward(
        self, x: Tensor, edge_index: Tensor, edge: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Return the updated sites, (n_sites, n_channels); messages are multiplied by ``weight``, (n_edges,)."""
        neighbor, center = edge_index
        z = self.edge(edge)  # (n_edges, 2 * n_channels)
        z += self.center(x).index_select(0, center)
        z += self.neighbor(x).index_select(0, neighbor)
        gate, core = z.chunk(2, dim=1)
        message = torch.sigmoid(gate) * F.softplus(core)  # (n_edges, n_channels)
        if weight is not None:
            message = message * weight[:, None]
        # Summed in double: the order of the edges would show in the last digits, and later layers magnify it.
        return x.double().index_add(0, center, message.double()).to(x.dtype)


class CGCNNEncoder(nn.Module):
    """The paper's encoder: element indicators → Linear; Gaussians → Linear; convolutions with batch norm.

    Kong et al., Mach. Learn.: Sci. Technol. 5, 035018 (2024). Embedding 0 is the bare atom, embedding l has
    seen l shells. There is no ReLU after the last convolution. As in the paper all neighbours count alike, so that
    embeddings jump where an atom enters or leaves the list of neighbours.

    Parameters
    ----------
    n_channels : int, default=64
        Width of every embedding.
    n_layers : int, default=5
        Number of convolutions.

    Examples
    --------
    >>> from ssl_matfeat.graph import CrystalGraphs
    >>> from pymatgen.core import Lattice, Structure
    >>> fe = Structure(Lattice.cubic(2.87), ["Fe", "Fe"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> batch = CrystalGraphs.from_structures([fe]).batch([0]).to("cpu", torch.float32)
    >>> [tuple(x.shape) for x in CGCNNEncoder().eval()(batch)]
    [(2, 64), (2, 64), (2, 64), (2, 64), (2, 64), (2, 64)]
    """

    indicators: Tensor
    named_layers: Mapping[str, tuple[str, ...]] = {}
    """Further layers that `describe` gives, and their channels: none, in the paper."""
    n_crystal_channels = 0
    """How many of the pretext channels, the last ones, are the same for all sites of a crystal."""

    def __init__(self, n_channels: int = 64, n_layers: int = 5) -> None:
        super().__init__()
        self.n_channels, self.n_layers = n_channels, n_layers
        # Stored with the weights: what was trained on one table must not run on a later matminer's.
        self.register_buffer("indicators", torch.from_numpy(indicator_table()).float())  # (104, 92)
        self.expand = GaussianExpansion()
        self.embed_node = nn.Linear(N_INDICATORS, n_channels)
        self.embed_edge = nn.Linear(len(self.expand.centers), n_channels)
        self.convolutions = nn.ModuleList(
            FactoredCGConv(n_channels, n_channels) for _ in range(n_layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(n_channels) for _ in range(n_layers))

    def forward(self, batch: CrystalBatch) -> list[Tensor]:
        """Return the embeddings of layers 0 to ``n_layers``, each (n_sites, n_channels)."""
        batch = batch.cut_sharply()
        # Distances in double, where a batch has them: five layers magnify what their rounding does to Gaussians.
        gaussians = self.expand(batch.distance).to(self.indicators.dtype)
        return self.embed(batch, self.indicators[batch.numbers], gaussians)

    def embed(self, batch: CrystalBatch, node_input: Tensor, edge_input: Tensor) -> list[Tensor]:
        """Do the same from given inputs, (n_sites, 92) and (n_edges, 41): pretext tasks hide parts of them.

        All edges of the batch count alike, so that it must have been cut sharply.
        """
        x = self.embed_node(node_input)
        edge = self.embed_edge(edge_input)
        embeddings = [x]
        for i, (convolve, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True), start=1
        ):
            x = norm(convolve(x, batch.edge_index, edge))
            x = x if i == self.n_layers else F.relu(x)
            embeddings.append(x)
        return embeddings

    def describe(self, batch: CrystalBatch, layers: Sequence[str | int]) -> list[Tensor]:
        """Return the channels of the layers, (n_sites, n_channels) each."""
        embeddings = self(batch)
        return [embeddings[int(layer)] for layer in layers]
