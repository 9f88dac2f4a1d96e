"""The node embedding graph network: inputs of sites and crystals → predictions."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl_matfeat.backbones import BACKBONES
from ssl_matfeat.blocks import Layer
from ssl_matfeat.examples import Example
from ssl_matfeat.graph import CrystalBatch
from ssl_matfeat.pooling import pool
from ssl_matfeat.weights import Pretrained
from ssl_matfeat.weights._registry import copy_encoder

LEARNED_WEIGHT = 0.3
"""Learned channels are many and say little each; at full size they drown the few that were given (LOG_negnn.md)."""

STATE_STATISTICS = ("mean", "max")
"""Of the states of a crystal's sites: an energy is an average over them, a highest frequency belongs to one."""


class Standardize(nn.Module):
    """Scale channels to mean 0 and standard deviation 1 of the training data, cut at ±5, and weigh the learned ones.

    A channel that never varied there, but for rounding, says nothing and is 0: what an untrained weight would make of
    another value is noise. The last ``n_learned`` channels, those of the encoder, are multiplied by `LEARNED_WEIGHT`.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor

    def __init__(self, training: NDArray[np.float32], n_learned: int) -> None:
        super().__init__()
        weight = torch.ones(training.shape[1])
        weight[training.shape[1] - n_learned :] = LEARNED_WEIGHT
        self.register_buffer("weight", weight)
        mean = training.mean(0, dtype=np.float64)
        # In pieces, so that there is no copy of all in double precision.
        pieces = np.array_split(training, 1 + len(training) // 10_000)
        std = np.sqrt(sum(((rows - mean) ** 2).sum(0) for rows in pieces) / len(training))
        varies = std > 1e-5 * np.maximum(1, np.maximum(training.max(0), -training.min(0)))
        scale = np.divide(1, std, out=np.zeros_like(std), where=varies)
        self.register_buffer("mean", torch.from_numpy(mean).float())
        self.register_buffer("scale", torch.from_numpy(scale).float())

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled channels, of the shape of ``x``."""
        return ((x - self.mean) * self.scale).clamp(-5, 5) * self.weight


class LearnedInputs(nn.Module):
    """A copy of a pretrained encoder, to be trained on: batch → the channels of its layers side by side.

    It stays in evaluation mode, so that it starts from the numbers that the frozen one gives, to single precision.
    """

    def __init__(self, pretrained: Pretrained, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        self.encoder = copy_encoder(pretrained).requires_grad_(True)
        self.layers = layers

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return the channels, (n_sites, n_learned)."""
        return torch.cat(self.encoder.describe(batch, self.layers), dim=1)

    def train(self, mode: bool = True) -> Self:
        """Keep the encoder in evaluation mode."""
        return super().train(False)


class NodeEmbeddingNetwork(nn.Module):
    """Site inputs → backbone → mean and maximum over the sites, beside the pooled inputs → head.

    Parameters
    ----------
    standardize_sites, standardize_crystals : Standardize
        Fitted on the training data.
    backbone : str
        Of `BACKBONES`.
    n_channels, n_layers : int
        Of the backbone.
    n_outputs : int
        Targets or classes.
    per_site : bool
        One row a site instead of one a crystal.
    dropout : float
        Before every linear layer outside of the backbone.
    learned : LearnedInputs or None
        Gives the last columns of the site inputs, if these are trained too.
    """

    def __init__(
        self,
        standardize_sites: Standardize,
        standardize_crystals: Standardize,
        *,
        backbone: str,
        n_channels: int,
        n_layers: int,
        n_outputs: int,
        per_site: bool,
        dropout: float,
        learned: LearnedInputs | None = None,
    ) -> None:
        super().__init__()
        self.standardize_sites, self.standardize_crystals = standardize_sites, standardize_crystals
        self.per_site, self.n_outputs = per_site, n_outputs
        self.learned = learned
        n_site_inputs, n_crystal_inputs = (
            len(standardize_sites.mean),
            len(standardize_crystals.mean),
        )
        self.embed = nn.Sequential(nn.Dropout(dropout), nn.Linear(n_site_inputs, n_channels))
        self.backbone = BACKBONES[backbone](n_channels, n_layers)
        self.wide = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(n_site_inputs if per_site else n_crystal_inputs, n_channels),
        )
        n_described = n_channels * (2 if per_site else 1 + len(STATE_STATISTICS))
        self.head = nn.Sequential(
            nn.LayerNorm(n_described),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(n_described, n_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(n_channels, n_outputs),
        )

    def forward(self, example: Example) -> Tensor:
        """Return the predictions, (n_rows, n_outputs)."""
        inputs = example.sites
        if self.learned is not None:
            learned = self.learned(example.graph)
            inputs = torch.cat([inputs[:, : -learned.shape[1]], learned], dim=1)
        sites = self.standardize_sites(inputs)  # (n_sites, n_site_inputs)
        # Also where a layer gives bfloat16, the sums over neighbours stay in single precision.
        embedded = self.embed(sites).to(sites.dtype)  # (n_sites, n_channels)
        state = self.backbone(embedded, example.graph)  # (n_sites, n_channels)
        if self.per_site:
            return self.head(torch.cat([state, self.wide(sites)], dim=1))
        crystals = self.standardize_crystals(example.crystals)  # (n_crystals, n_crystal_inputs)
        pooled = pool(state, example.graph, STATE_STATISTICS)  # (n_crystals, 2 n_channels)
        return self.head(torch.cat([pooled, self.wide(crystals)], dim=1))
