"""Structures, targets and weights of a fit, in flat arrays, and the batches that a network learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_array
from torch import Tensor
from torch.nn import functional as F

from ssl_matfeat.blocks import RAW_BLOCKS, CrystalFeatures, Layer, channel_names, resolve_layers
from ssl_matfeat.elements import N_CLASSES, indicator_table
from ssl_matfeat.graph import CrystalBatch, CrystalGraphs
from ssl_matfeat.pooling import INTENSIVE, pool
from ssl_matfeat.training import Batches
from ssl_matfeat.weights import Pretrained

NODE_FEATURES = ("onehot", "element", "raw", "ssl")
"""What ``node_features`` is a sum of; the columns stand in this order, the learned ones last."""


@dataclass
class Example:
    """A batch of crystals as a network sees it."""

    graph: CrystalBatch
    sites: Tensor
    """(n_sites, n_site_inputs)."""
    crystals: Tensor
    """(n_crystals, n_crystal_inputs)."""
    target: Tensor
    """(n_rows, n_targets), one row a crystal or one row a site; scaled values, or the index of the class."""
    weight: Tensor
    """(n_rows,), 0 where the target is unknown."""


class Inputs:
    """Batch → inputs of its sites and of its crystals.

    Parameters
    ----------
    node_features : str
        A sum of `NODE_FEATURES`, such as ``"ssl+raw"``.
    pretrained : Pretrained
        Where ``"ssl"`` comes from.
    layers : tuple of str and int, or None
        Of ``"ssl"``: ``"pretext"`` and integers, as in the featurizers; None is all that the weights have, but for
        ``"environment"``, which a network can make of the others.

    Raises
    ------
    ValueError
        If a name is unknown, or stands twice.
    """

    def __init__(
        self, node_features: str, pretrained: Pretrained, layers: tuple[Layer, ...] | None
    ) -> None:
        self.pretrained = pretrained
        self.parts = _parse(node_features)
        learned = _ssl_layers(layers, pretrained)
        self.layers = learned if "ssl" in self.parts else ()
        layers = (*(RAW_BLOCKS if "raw" in self.parts else ()), *self.layers)
        # Pooled as the featurizers pool: four statistics of raw channels, and the mean of learned ones.
        self._features = CrystalFeatures(pretrained, layers, "auto", torch.float32)

    def __call__(self, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
        """Return (n_sites, n_site_inputs) and (n_crystals, n_crystal_inputs), float32."""
        indicators = []
        if "onehot" in self.parts:
            indicators.append(F.one_hot(batch.numbers, N_CLASSES).double())
        if "element" in self.parts:
            indicators.append(torch.from_numpy(indicator_table()).double()[batch.numbers])
        sites, crystals = list(indicators), [pool(x, batch, INTENSIVE) for x in indicators]
        if self._features.layers:
            channels = self._features.sites.by_layer(batch)
            sites += channels
            crystals.append(self._features.of_sites(channels, batch))
        return (
            torch.cat([x.float() for x in sites], dim=1),
            torch.cat([x.float() for x in crystals], dim=1),
        )

    @property
    def n_learned(self) -> int:
        """Return how many inputs come from the encoder: the last ones of the sites, and as many of the crystals."""
        return sum(len(channel_names(layer, self.pretrained)) for layer in self.layers)


@dataclass
class Dataset:
    """Crystals, what a network is told about them and what it shall predict, in flat arrays."""

    graphs: CrystalGraphs
    sites: NDArray[np.float32]
    """(n_sites_total, n_site_inputs)."""
    crystals: NDArray[np.float32]
    """(n_crystals, n_crystal_inputs)."""
    target: NDArray[np.float32] | NDArray[np.int64]
    """(n_rows, n_targets), or (n_rows,) indices of classes."""
    weight: NDArray[np.float32]
    """(n_rows,)."""
    per_site: bool
    """Whether a row is a site or a crystal."""

    @classmethod
    def from_graphs(
        cls, graphs: CrystalGraphs, inputs: Inputs, max_edges: int, per_site: bool = False
    ) -> Dataset:
        """Compute the inputs, once for all epochs; nothing is known about the target yet."""
        if inputs.layers:
            inputs.pretrained.warn_of_unseen(graphs.numbers)
        with torch.no_grad():
            pieces = [inputs(graphs.batch(crystals)) for crystals in graphs.batches(max_edges)]
        sites, crystals = (torch.cat(list(x)).numpy() for x in zip(*pieces, strict=True))
        n_rows = len(sites) if per_site else len(crystals)
        # Channels need double precision; the networks do not.
        graphs = replace(graphs, vector=graphs.vector.astype(np.float32))
        blank = np.zeros((n_rows, 0), np.float32)
        return cls(graphs, sites, crystals, blank, np.ones(n_rows, np.float32), per_site)

    @property
    def crystal_of_row(self) -> NDArray[np.int64]:
        """Return the crystal that each row of the target belongs to, (n_rows,)."""
        everything = np.arange(len(self.graphs))
        return np.repeat(everything, self.graphs.n_sites) if self.per_site else everything

    def rows(self, crystals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of the target that belong to the named crystals."""
        return self.graphs.sites_of(crystals) if self.per_site else crystals

    def n_batches(self, crystals: NDArray[np.int64], max_edges: int) -> int:
        """Return how many batches the named crystals fill, in this order."""
        return sum(1 for _ in self.graphs.batches(max_edges, crystals))

    def batch(self, crystals: NDArray[np.int64], device: str) -> Example:
        """Return the named crystals, in this order, as tensors."""
        rows = self.rows(crystals)
        return Example(
            graph=self.graphs.batch(crystals).to(device),
            sites=torch.from_numpy(self.sites[self.graphs.sites_of(crystals)]).to(device),
            crystals=torch.from_numpy(self.crystals[crystals]).to(device),
            target=torch.from_numpy(self.target[rows]).to(device),
            weight=torch.from_numpy(self.weight[rows]).to(device),
        )

    def batches(self, chosen: NDArray[np.int64], max_edges: int, device: str) -> Batches[Example]:
        """Return what yields the batches of one epoch over the chosen crystals.

        A batch is bounded by its edges, and holds fewer large cells. So their weights are scaled: the mean over the
        batches of their weighted sums is the mean over the rows.
        """
        n_rows = len(self.rows(chosen))

        def epoch(generator: torch.Generator | None) -> Iterator[Example]:
            order = chosen
            if generator is not None:
                order = chosen[torch.randperm(len(chosen), generator=generator).numpy()]
            pieces = list(self.graphs.batches(max_edges, order))
            for crystals in pieces:
                example = self.batch(crystals, device)
                yield replace(example, weight=example.weight * (len(pieces) / n_rows))

        return epoch


def flatten_sites(y: Any, n_sites: Any) -> NDArray[np.float64]:
    """Return the values of all sites one after another, (n_sites_total,), NaN where unknown."""
    flat = []
    for i, (values, n) in enumerate(zip(y, n_sites, strict=True)):
        if np.ndim(values) == 0:
            raise ValueError(
                f"y[{i}] is {values!r}, but target='site' learns one value for each of the {n} sites of X[{i}]; give a "
                "list of arrays, or set target='crystal'"
            )
        array = check_array(
            values,
            ensure_2d=False,
            dtype=np.float64,
            ensure_all_finite="allow-nan",
            input_name=f"y[{i}]",
        )
        if array.shape != (n,):
            raise ValueError(
                f"y[{i}] has shape {array.shape}, but X[{i}] has {n} sites; give one value a site, NaN if unknown"
            )
        flat.append(array)
    return np.concatenate(flat)


def _parse(node_features: str) -> tuple[str, ...]:
    parts = node_features.split("+") if isinstance(node_features, str) else []
    if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(NODE_FEATURES):
        raise ValueError(
            f"node_features must be one of {', '.join(NODE_FEATURES)} or a sum of them such as 'ssl+raw', got "
            f"{node_features!r}"
        )
    return tuple(part for part in NODE_FEATURES if part in parts)


def _ssl_layers(layers: tuple[Layer, ...] | None, pretrained: Pretrained) -> tuple[Layer, ...]:
    encoder = pretrained.encoder
    learned = [*encoder.named_layers, *range(encoder.n_layers + 1)]
    if layers is None:
        return tuple(layer for layer in learned if layer != "environment")
    layers = resolve_layers(layers, pretrained, with_cell=False)
    raw = [layer for layer in layers if layer not in learned]
    if raw:
        raise ValueError(
            f"layers={layers!r} name the learned inputs, of {learned}; for {raw[0]!r} add 'raw' to node_features"
        )
    return layers
