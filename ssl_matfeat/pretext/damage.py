"""Ways to damage a batch, shared by the pretext tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_matfeat.encoder import CGCNNEncoder
from ssl_matfeat.graph import CrystalBatch


class Hidden(NamedTuple):
    """What is left to see of a batch with hidden atoms."""

    sites: Tensor
    """(n_sites,) bool, the hidden atoms."""
    edges: Tensor
    """(n_edges,) bool, the edges that touch one."""
    node_input: Tensor
    """(n_sites, 92), element indicators, 0 for hidden atoms."""
    edge_input: Tensor
    """(n_edges, 41), Gaussians of the distance, 0 for hidden edges."""


def choose_sites(batch: CrystalBatch, ratio: float, generator: torch.Generator) -> Tensor:
    """Choose ``int(ratio * n + 1)`` sites of each crystal at random, (n_sites,) bool."""
    crystal = batch.batch
    n_sites = torch.bincount(crystal, minlength=batch.num_graphs)
    key = torch.rand(len(crystal), generator=generator).to(crystal.device)
    order = torch.argsort(crystal + key.double())  # sorted by crystal, at random within it
    first = n_sites.cumsum(0) - n_sites
    rank = torch.arange(len(crystal), device=crystal.device) - first[crystal[order]]
    n_chosen = (ratio * n_sites + 1).long()
    chosen = torch.zeros_like(crystal, dtype=torch.bool)
    chosen[order] = rank < n_chosen[crystal[order]]
    return chosen


def hide_atoms(
    encoder: CGCNNEncoder, batch: CrystalBatch, ratio: float, generator: torch.Generator
) -> Hidden:
    """Hide ``int(ratio * n + 1)`` atoms of each crystal, and the lengths of the edges that touch one."""
    sites = choose_sites(batch, ratio, generator)
    neighbor, center = batch.edge_index
    edges = sites[neighbor] | sites[center]
    return Hidden(
        sites=sites,
        edges=edges,
        node_input=encoder.indicators[batch.numbers].masked_fill(sites[:, None], 0),
        edge_input=encoder.expand(batch.distance).masked_fill(edges[:, None], 0),
    )


def replace_elements(batch: CrystalBatch, ratio: float, generator: torch.Generator) -> CrystalBatch:
    """Give each atom, with probability ``ratio``, the element of a random atom of the batch."""
    n_sites = len(batch.numbers)
    chosen = torch.rand(n_sites, generator=generator) < ratio
    donor = torch.randint(n_sites, (n_sites,), generator=generator).to(batch.numbers.device)
    chosen = chosen.to(batch.numbers.device)
    return replace(batch, numbers=torch.where(chosen, batch.numbers[donor], batch.numbers))


def displace(batch: CrystalBatch, displacement: Tensor) -> CrystalBatch:
    """Move the sites by ``displacement``, (n_sites, 3) Å; the edges stay, with new vectors and lengths."""
    neighbor, center = batch.edge_index
    vector = batch.vector + displacement[neighbor] - displacement[center]  # (n_edges, 3)
    return replace(batch, vector=vector, distance=vector.norm(dim=1))


def strain_cells(batch: CrystalBatch, strain: Tensor) -> CrystalBatch:
    """Strain every crystal by its own tensor, (n_crystals, 3, 3): v → v(1 + ε); the edges stay."""
    of_edge = strain[batch.batch[batch.edge_index[1]]]  # (n_edges, 3, 3)
    # A matrix product would be rounded to bfloat16 where that is the precision of the training.
    vector = batch.vector + (batch.vector[:, :, None] * of_edge).sum(1)  # (n_edges, 3)
    identity = torch.eye(3, dtype=strain.dtype, device=strain.device)
    volume = batch.volume * torch.linalg.det(identity + strain).abs()
    return replace(batch, vector=vector, distance=vector.norm(dim=1), volume=volume)


def supercell(batch: CrystalBatch, repeats: NDArray[np.int64]) -> CrystalBatch:
    """Return the graph of the supercell ``repeats`` of every crystal, without searching neighbours again.

    Copy c of site i, in cell (a, b, c), is site ``i * n_cells + cell``; an edge with cell shift s leads to the
    copy in the cell that s away wraps to.
    """
    cells = torch.from_numpy(np.indices(tuple(repeats)).reshape(3, -1).T).to(
        batch.numbers
    )  # (n_cells, 3)
    shape = torch.as_tensor(repeats, device=cells.device)
    stride = torch.stack([shape[1] * shape[2], shape[2], torch.ones_like(shape[2])])
    n_cells = len(cells)
    neighbor, center = batch.edge_index
    target = cells[None] + batch.cell_shift[:, None]  # (n_edges, n_cells, 3)
    wrapped = target.remainder(shape)
    copy = torch.arange(n_cells, device=cells.device)
    return CrystalBatch(
        numbers=batch.numbers.repeat_interleave(n_cells),
        edge_index=torch.stack(
            [
                (neighbor[:, None] * n_cells + (wrapped * stride).sum(-1)).flatten(),
                (center[:, None] * n_cells + copy).flatten(),
            ]
        ),
        vector=batch.vector.repeat_interleave(n_cells, 0),
        distance=batch.distance.repeat_interleave(n_cells),
        cell_shift=torch.div(target, shape, rounding_mode="floor").flatten(0, 1),
        full_radius=batch.full_radius.repeat_interleave(n_cells),
        batch=batch.batch.repeat_interleave(n_cells),
        volume=batch.volume * n_cells,
    )
