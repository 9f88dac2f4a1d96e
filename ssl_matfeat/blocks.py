"""The blocks that features are made of, by name: which channels each has, and how a batch gives them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from ssl_matfeat.channels import (
    CELL_CHANNELS,
    ELEMENT_CHANNELS,
    SHELL_CHANNELS,
    cell_channels,
    element_channels,
    shell_channels,
)
from ssl_matfeat.graph import CrystalBatch
from ssl_matfeat.pooling import INTENSIVE, pool, pool_mean
from ssl_matfeat.weights import Pretrained
from ssl_matfeat.weights._registry import Encoder, copy_encoder

RAW_BLOCKS = ("element", "shell", "cell")
VANISHING = 1e-4
"""Raw channels, and statistics of them, below this count as 0. Symmetry makes many 0, but for what rounding of the
coordinates leaves, and a scaler would blow that up where all crystals are of one prototype."""
Layer = str | int
Layers = tuple[Layer, ...] | Literal["auto"]
Pooling = tuple[str, ...] | Literal["auto"]


def resolve_layers(layers: Any, pretrained: Pretrained, with_cell: bool) -> tuple[Layer, ...]:
    """Return ``layers`` as a tuple of names and ints.

    ``"auto"`` is the raw blocks, ``"pretext"`` and ``"environment"`` where the weights have them, embeddings 0 and 1.

    Raises
    ------
    ValueError
        If it is empty, has duplicates, or names a block that there is not, or not with these weights.
    """
    raw: list[Layer] = [block for block in RAW_BLOCKS if with_cell or block != "cell"]
    learned: list[Layer] = list(range(pretrained.encoder.n_layers + 1))
    named = pretrained.encoder.named_layers
    if isinstance(layers, str) and layers == "auto":
        return (*raw, *named, *learned[:2])
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(
            f"layers must be a tuple such as ('element', 0, 1), or 'auto', got {layers!r}"
        )
    known = [*raw, *named, *learned]
    chosen: list[Layer] = []
    for layer in layers:
        is_index = isinstance(layer, Integral) and not isinstance(layer, bool)
        plain = int(layer) if is_index else layer
        if not isinstance(plain, str | int) or isinstance(plain, bool) or plain not in known:
            raise ValueError(
                f"layers={layers!r}: there is no layer {layer!r} here; choose from {known}"
            )
        chosen.append(plain)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers={layers!r} must name at least one layer, and none twice")
    return tuple(chosen)


def channel_names(layer: Layer, pretrained: Pretrained) -> tuple[str, ...]:
    """Return the names of the channels of one layer."""
    if isinstance(layer, int):
        return tuple(f"NE{layer}_{i}" for i in range(pretrained.encoder.n_channels))
    return {
        "element": ELEMENT_CHANNELS,
        "shell": SHELL_CHANNELS,
        "cell": CELL_CHANNELS,
        **pretrained.encoder.named_layers,
    }[layer]


def feature_names(layer: Layer, pretrained: Pretrained, pooling: Pooling) -> list[str]:
    """Return the names of the columns that one layer gives a crystal."""
    channels = channel_names(layer, pretrained)
    n_of_site = len(channels) - _n_crystal_channels(layer, pretrained)
    statistics = statistics_of(layer, pooling)
    pooled = [f"{name} of {channel}" for channel in channels[:n_of_site] for name in statistics]
    return [*pooled, *channels[n_of_site:]]


def statistics_of(layer: Layer, pooling: Pooling) -> tuple[str, ...]:
    """Return the statistics of a layer.

    ``"auto"`` is mean, std, min and max of raw channels, and the mean of learned ones: extremes and spread of these
    are many columns that tell a kernel little (benchmarks/LOG.md).
    """
    if pooling != "auto":
        return tuple(pooling)
    return INTENSIVE if layer in RAW_BLOCKS else ("mean",)


def _n_crystal_channels(layer: Layer, pretrained: Pretrained) -> int:
    """Return how many channels of a layer, its last ones, belong to the crystal, so that pooling leaves them."""
    if layer == "cell":
        return len(CELL_CHANNELS)
    return pretrained.encoder.n_crystal_channels if layer == "pretext" else 0


class SiteFeatures:
    """Batch → the channels of the chosen layers side by side, (n_sites, n_channels).

    Raw channels are computed in double precision and the encoder in ``dtype``, which all have in the end.
    """

    def __init__(
        self, pretrained: Pretrained, layers: tuple[Layer, ...], dtype: torch.dtype
    ) -> None:
        self.pretrained, self.layers, self.dtype = pretrained, layers, dtype
        self._encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}

    def __call__(self, batch: CrystalBatch) -> Tensor:
        """Return all channels, (n_sites, n_channels)."""
        return torch.cat([x.to(self.dtype) for x in self.by_layer(batch)], dim=1)

    def by_layer(self, batch: CrystalBatch) -> list[Tensor]:
        """Return the channels of each layer, as they were computed."""
        channels: dict[Layer, Tensor] = {}
        if "element" in self.layers:
            channels["element"] = _vanish(element_channels(batch))
        if "shell" in self.layers:
            channels["shell"] = _vanish(batch.once(shell_channels))
        learned = [layer for layer in self.layers if layer not in RAW_BLOCKS]
        if learned:
            described = self._on(batch).describe(batch, learned)
            channels.update(zip(learned, described, strict=True))
        return [channels[layer] for layer in self.layers]

    def _on(self, batch: CrystalBatch) -> Encoder:
        if self._encoder is None:
            self._encoder = (
                copy_encoder(self.pretrained).to(batch.numbers.device, self.dtype).eval()
            )
        return self._encoder


class CrystalFeatures:
    """Batch → the pooled channels of the chosen layers, (n_crystals, n_features)."""

    def __init__(
        self,
        pretrained: Pretrained,
        layers: tuple[Layer, ...],
        pooling: Pooling,
        dtype: torch.dtype,
    ) -> None:
        of_sites = tuple(layer for layer in layers if layer != "cell")
        self.sites = SiteFeatures(pretrained, of_sites, dtype)
        self.layers, self.pooling = layers, pooling

    def __call__(self, batch: CrystalBatch) -> Tensor:
        """Return all features, (n_crystals, n_features)."""
        return self.of_sites(self.sites.by_layer(batch), batch)

    def of_sites(self, channels: list[Tensor], batch: CrystalBatch) -> Tensor:
        """Return all features, (n_crystals, n_features), given what ``sites.by_layer`` returned."""
        by_layer = dict(zip(self.sites.layers, channels, strict=True))
        pooled = {layer: self._pool(layer, x, batch) for layer, x in by_layer.items()}
        if "cell" in self.layers:
            pooled["cell"] = cell_channels(batch)
        pooled |= {layer: _vanish(pooled[layer]) for layer in RAW_BLOCKS if layer in pooled}
        return torch.cat([pooled[layer].to(self.sites.dtype) for layer in self.layers], dim=1)

    def _pool(self, layer: Layer, x: Tensor, batch: CrystalBatch) -> Tensor:
        n_of_crystal = _n_crystal_channels(layer, self.sites.pretrained)
        # In double precision, so that equal sites have the mean that one of them has, however many they are.
        of_site, of_crystal = x.double().split([x.shape[1] - n_of_crystal, n_of_crystal], dim=1)
        statistics = statistics_of(layer, self.pooling)
        return torch.cat([pool(of_site, batch, statistics), pool_mean(of_crystal, batch)], dim=1)


def _vanish(x: Tensor) -> Tensor:
    return x.where(x.abs() >= VANISHING, 0.0)
