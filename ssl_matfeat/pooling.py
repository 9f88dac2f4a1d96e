"""Channels and embeddings of sites → one vector a crystal."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_matfeat.graph import CrystalBatch

INTENSIVE = ("mean", "std", "min", "max")
"""What does not change with the cell chosen for a crystal."""
STATISTICS = (*INTENSIVE, "sum")


def pool(x: Tensor, batch: CrystalBatch, statistics: tuple[str, ...]) -> Tensor:
    """Pool ``x``, (n_sites, n_channels), over the sites of each crystal.

    Parameters
    ----------
    x : Tensor of shape (n_sites, n_channels)
        Channels or embeddings.
    batch : CrystalBatch
        Says which site belongs to which crystal.
    statistics : tuple of str
        Of `STATISTICS`. ``"std"`` is the population's; ``"sum"`` is extensive: it doubles with the cell.

    Returns
    -------
    Tensor of shape (n_crystals, n_channels * n_statistics)
        For each channel in turn its statistics, in the order given.
    """
    return torch.stack([_POOL[name](x, batch) for name in statistics], dim=2).flatten(1)


def pool_mean(x: Tensor, batch: CrystalBatch) -> Tensor:
    """Return the mean over the sites of each crystal, (n_crystals, n_channels)."""
    n_sites = torch.bincount(batch.batch, minlength=batch.num_graphs)
    return sum_by_crystal(x, batch) / n_sites[:, None]


def sum_by_crystal(x: Tensor, batch: CrystalBatch, crystal: Tensor | None = None) -> Tensor:
    """Sum rows by the ``crystal`` that each belongs to, (n_crystals, ...); None is a row a site."""
    index = batch.batch if crystal is None else crystal
    if x.dtype == torch.bfloat16:
        x = x.float()  # on a GPU a sum of ones in bfloat16 ends at 256
    return x.new_zeros(batch.num_graphs, *x.shape[1:]).index_add_(0, index, x)


def _std(x: Tensor, batch: CrystalBatch) -> Tensor:
    # From the least: equal sites then deviate by exactly 0, and not by rounding, which depends on the cell and which a
    # scaler blows up. Centred: <x²> - <x>² would lose half of the digits.
    x = x - _min(x, batch)[batch.batch]
    deviation = x - pool_mean(x, batch)[batch.batch]
    return pool_mean(deviation**2, batch).sqrt()


def _extremum(x: Tensor, batch: CrystalBatch, reduce: str) -> Tensor:
    index = batch.batch[:, None].expand_as(x)
    start = x.new_zeros(batch.num_graphs, x.shape[1])
    return start.scatter_reduce(0, index, x, reduce, include_self=False)


def _min(x: Tensor, batch: CrystalBatch) -> Tensor:
    return _extremum(x, batch, "amin")


def _max(x: Tensor, batch: CrystalBatch) -> Tensor:
    return _extremum(x, batch, "amax")


_POOL = {"mean": pool_mean, "std": _std, "min": _min, "max": _max, "sum": sum_by_crystal}
