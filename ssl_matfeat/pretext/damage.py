"""Ways to damage a batch, shared by the pretext tasks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_matfeat.graph import CrystalBatch


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
        batch=batch.batch.repeat_interleave(n_cells),
        volume=batch.volume * n_cells,
    )
