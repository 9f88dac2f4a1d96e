"""The context encoder: what the surroundings of an atom say about it, for all atoms in one pass.

A masked model hides some atoms, runs, and asks for what was hidden; to ask for every atom takes many runs. Here no atom
is ever shown to its own context: site j passes on to site i what it gathered from all of its neighbours *but i*, so
that one pass gives, for every atom, a prediction from its surroundings alone (leave-one-out, as a pseudo-likelihood).
What is left out is one atom of the endless crystal. Its periodic images are other atoms, which its neighbours may tell
it of; were they left out too, the prediction would depend on the cell that the crystal is given in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_matfeat.channels import (
    GEOMETRIC_CHANNELS,
    SHELL_CHANNELS,
    geometric_channels,
    shell_channels,
    shell_weights,
)
from ssl_matfeat.elements import N_CLASSES, PROPERTIES, standard_properties
from ssl_matfeat.encoder import GaussianExpansion, envelope
from ssl_matfeat.environments import Environments
from ssl_matfeat.graph import CrystalBatch, CrystalGraphs
from ssl_matfeat.pooling import pool_mean

IMPLIED_PROPERTIES = (
    "Electronegativity",
    "CovalentRadius",
    "NValence",
    "Column",
    "MeltingT",
    "GSvolume_pa",
)
"""Properties whose mean over the elements that the context suggests is compared with the atom's own."""

N_ENVIRONMENTS = 192
_ENVIRONMENT_SHARES = (1.0, 0.5)
"""Of the element and of the shell in the likeness of environments, chosen on validation (benchmarks/LOG.md)."""
_CRYSTALS_OF_ENVIRONMENTS, _SITES_OF_ENVIRONMENTS = 8_000, 30_000
"""Prototypes are looked for among so many random sites of so many random crystals."""
_COORDINATION = GEOMETRIC_CHANNELS.index("soft coordination")


class Normal(NamedTuple):
    """A predicted normal distribution."""

    mean: Tensor
    log_std: Tensor

    def residual(self, actual: Tensor) -> Tensor:
        """Return how many standard deviations ``actual`` lies above the mean."""
        return (actual - self.mean) * torch.exp(-self.log_std)

    def negative_log_likelihood(self, actual: Tensor) -> Tensor:
        """Return it in nats, without the constant."""
        return 0.5 * self.residual(actual) ** 2 + self.log_std


class Context(NamedTuple):
    """Everything that one pass gives."""

    embeddings: list[Tensor]
    """NE0, NE1, NE2, each (n_sites, n_channels)."""
    element_logits: Tensor
    """(n_sites, 104): the element of each site, told by its surroundings and the geometry."""
    log_bond: Normal
    """(n_edges, 1): log of each distance in Å, told by the elements and coordination of both ends."""
    geometry: Normal
    """(n_sites, n_geometric): standardised shell geometry, told by the elements of the site and its shell."""
    log_volume: Normal
    """(n_sites, 1): log of the crystal's volume per atom in Å³, a site's share of it told by its shell."""
    formula_geometry: Normal
    """(n_sites, n_geometric): the same as ``geometry``, told by the element and the crystal's formula alone."""
    formula_volume: Normal
    """(n_crystals, 1): log volume per atom, told by the formula alone."""
    standard_geometry: Tensor
    """(n_sites, n_geometric): the actual shell geometry, standardised."""


class ContextEncoder(nn.Module):
    """Predict atoms, bonds and shells from their surroundings; embeddings of zero, one and two shells.

    Parameters
    ----------
    n_channels : int, default=64
        Width of every embedding.
    n_environments : int, default=192
        Number of prototypes of site environments.
    """

    n_layers = 2
    pretext_names = (
        "site log-likelihood",
        "site entropy",
        *(f"excess {name}" for name in IMPLIED_PROPERTIES),
        "bond strain",
        "bond misfit",
        "log bond softness",
        "expected log bond length",
        *(f"excess {name}" for name in GEOMETRIC_CHANNELS),
        "geometry misfit",
        "volume strain",
        "expected log volume",
        "log volume softness",
        *(f"polymorph {name}" for name in GEOMETRIC_CHANNELS),
        "polymorph misfit",
        "polymorph volume strain",
        "polymorph log volume",
        "polymorph log volume softness",
    )
    n_crystal_channels = 3

    def __init__(self, n_channels: int = 64, n_environments: int = N_ENVIRONMENTS) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.named_layers = {
            "pretext": self.pretext_names,
            "environment": tuple(f"environment_{i}" for i in range(n_environments)),
        }
        scaled = torch.from_numpy(standard_properties()).float()
        # Stored with the weights: what was trained on one table must not run on a later matminer's.
        self.register_buffer("properties", scaled)  # (104, 22)
        implied = [PROPERTIES.index(name) for name in IMPLIED_PROPERTIES]
        self.register_buffer("implied", scaled[:, implied].clone())  # (104, 6)
        self.expand = GaussianExpansion(cutoff=8.0, step=0.25)
        self.scale_geometry = nn.BatchNorm1d(len(GEOMETRIC_CHANNELS), affine=False)

        n, n_gaussians, n_geometric = n_channels, len(self.expand.centers), len(GEOMETRIC_CHANNELS)
        self.embed = _mlp(len(PROPERTIES), n, n)
        # What sets an element apart from others of like properties; an element never seen keeps 0, so that its
        # properties alone speak.
        self.identity = nn.Embedding.from_pretrained(torch.zeros(N_CLASSES, n), freeze=False)
        self.first_message = _GatedMessage(n, n_gaussians)
        self.first_update = _mlp(n + n_geometric, n, n)
        self.second_message = _GatedMessage(n, n_gaussians)
        self.second_update = _mlp(n + n_geometric, n, n)
        self.norm_first, self.norm_second = nn.LayerNorm(n), nn.LayerNorm(n)
        self.predict_element = _mlp(n + n_geometric, n, N_CLASSES)
        self.shell = _mlp(2 * n, n, n)
        self.predict_bond_center = nn.Linear(n + 1, n)
        self.predict_bond_neighbor = nn.Linear(n + 1, n)
        self.predict_bond = nn.Linear(n, 2)
        self.predict_geometry = _mlp(n, n, 2 * n_geometric)
        self.predict_volume = _mlp(n + 1, n, 2)
        self.formula = _mlp(n, n, n)
        self.predict_formula_geometry = _mlp(2 * n, n, 2 * n_geometric)
        self.predict_formula_volume = _mlp(n, n, 2)
        self.environments = Environments(
            (n, len(SHELL_CHANNELS)), _ENVIRONMENT_SHARES, n_environments
        )

    properties: Tensor
    implied: Tensor

    def forward(self, batch: CrystalBatch) -> Context:
        """Run once; a batch in double precision gives shapes without rounding, which misfits would magnify."""
        dtype = self.properties.dtype
        neighbor, center = batch.edge_index
        geometry = batch.once(geometric_channels).to(dtype)  # (n_sites, n_geometric)
        geometry = self.scale_geometry(geometry)
        weight, total = (w.to(dtype) for w in shell_weights(batch))
        batch = batch.to(batch.numbers.device, dtype)
        atom = self._atom(batch)
        seen = envelope(batch.distance) * batch.weight  # (n_edges,)
        gaussians = self.expand(batch.distance) * seen[:, None]

        # Done once a site, and gathered after it.
        sender = self.first_message.sender(atom).index_select(0, neighbor)  # (n_edges, 2n)
        message = self.first_message(sender, gaussians)  # (n_edges, n)
        gathered = torch.zeros_like(atom).index_add(0, center, message)  # (n_sites, n)
        one_shell = atom + self.first_update(torch.cat([self.norm_first(gathered), geometry], 1))

        # What j passes on to i leaves out what j heard from i, if it listens to i at all.
        without = gathered.index_select(0, neighbor) - _reversed(message, batch)  # (n_edges, n)
        heard = torch.cat([self.norm_first(without), geometry.index_select(0, neighbor)], 1)
        passed_on = atom.index_select(0, neighbor) + self.first_update(heard)
        sender = self.second_message.sender(passed_on)  # (n_edges, 2n)
        context = torch.zeros_like(atom).index_add(
            0, center, self.second_message(sender, gaussians)
        )
        surroundings = torch.cat([self.norm_second(context), geometry], 1)
        two_shells = one_shell + self.second_update(surroundings)

        # From here on nothing is told how long a bond is, only how the lengths in a shell compare: lengths, shapes
        # and volumes are what is predicted.
        around = torch.zeros_like(atom).index_add(
            0, center, weight[:, None] * atom.index_select(0, neighbor)
        )
        shell_state = self.shell(torch.cat([atom, around / total[:, None]], 1))
        # In double precision, so that crystals of one formula are told the same, however many sites they have.
        formula = pool_mean(self.formula(atom).double(), batch).to(dtype)  # (n_crystals, n)
        in_formula = torch.cat([atom, formula.index_select(0, batch.batch)], 1)
        coordinated = torch.cat([shell_state, geometry[:, _COORDINATION, None]], 1)
        pair = self.predict_bond_center(coordinated).index_select(0, center)
        pair = pair + self.predict_bond_neighbor(coordinated).index_select(0, neighbor)
        return Context(
            embeddings=[atom, one_shell, two_shells],
            element_logits=self.predict_element(surroundings),
            log_bond=_normal(self.predict_bond(F.silu(pair))),
            geometry=_normal(self.predict_geometry(shell_state)),
            log_volume=_normal(self.predict_volume(coordinated)),
            formula_geometry=_normal(self.predict_formula_geometry(in_formula)),
            formula_volume=_normal(_in_double(self.predict_formula_volume, formula).to(dtype)),
            standard_geometry=geometry,
        )

    def describe(self, batch: CrystalBatch, layers: Sequence[str | int]) -> list[Tensor]:
        """Return the channels of the layers 0, 1, 2, ``"pretext"`` or ``"environment"``, (n_sites, n_channels) each."""
        channels: dict[str | int, Tensor] = {}
        if "environment" in layers:
            channels["environment"] = self._environment(batch)
        if set(layers) <= {0, "environment"}:
            channels[0] = self._atom(batch)
        else:
            context = self(batch)
            channels |= enumerate(context.embeddings)
            if "pretext" in layers:
                channels["pretext"] = self._pretext(context, batch)
        return [channels[layer] for layer in layers]

    @torch.no_grad()
    def learn_environments(
        self, graphs: CrystalGraphs, crystals: NDArray[np.int64], random_state: int
    ) -> None:
        """Find the prototypes of environments among random sites of random ones of the named crystals."""
        rng = np.random.default_rng(random_state)
        order = rng.permutation(crystals)[:_CRYSTALS_OF_ENVIRONMENTS]
        chosen = rng.permutation(graphs.n_sites[order].sum())[:_SITES_OF_ENVIRONMENTS]
        wanted, pieces, first = np.sort(chosen), [], 0
        for some in graphs.batches(16384, order):
            sites = self._surroundings(graphs.batch(some)).numpy()
            inside = (wanted >= first) & (wanted < first + len(sites))
            # The others are not kept: they may be millions.
            pieces.append(sites[wanted[inside] - first])
            first += len(sites)
        found = np.concatenate(pieces)[np.searchsorted(wanted, chosen)]
        self.environments.learn(found, random_state)

    @torch.no_grad()
    def prototypes(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the atomic number and the shell channels of each prototype found, (n_found,) and (n_found, 27).

        The number is that of the element whose embedding 0 is nearest.
        """
        found = self.environments.unscaled_prototypes()
        embedded, shells = found.split([self.n_channels, len(SHELL_CHANNELS)], dim=1)
        elements = (self.embed(self.properties) + self.identity.weight)[1:]  # (103, n)
        return torch.cdist(embedded, elements).argmin(1).numpy() + 1, shells.double().numpy()

    def _environment(self, batch: CrystalBatch) -> Tensor:
        return self.environments(self._surroundings(batch)).to(self.properties.dtype)

    def _surroundings(self, batch: CrystalBatch) -> Tensor:
        """Return what the likeness of sites is told by, (n_sites, n_inputs): embedding 0 and the shell channels."""
        return torch.cat([self._atom(batch).double(), batch.once(shell_channels).double()], dim=1)

    def _atom(self, batch: CrystalBatch) -> Tensor:
        return self.embed(self.properties[batch.numbers]) + self.identity(batch.numbers)

    def _pretext(self, context: Context, batch: CrystalBatch) -> Tensor:
        """Return the pretext channels, (n_sites, len(pretext_names)).

        With p the distribution over elements that the surroundings suggest: ``site log-likelihood`` log p(Z)
        and ``site entropy`` -Σ p log p, in nats; ``excess X`` of an element property, its own value minus Σ p
        X, in standard deviations over the elements. With log d ~ N(µ, σ²) predicted for each bond and <> the
        mean over the shell: ``bond strain`` <log d - µ>, ``bond misfit`` ``<|log d - µ|/σ>``, ``log bond
        softness`` <log σ>, ``expected log bond length`` <µ>, d in Å. ``excess X`` of a shell channel, its
        deviation from the prediction in predicted standard deviations, and ``geometry misfit``, their root mean
        square. ``volume strain``, ``expected log volume`` and ``log volume softness`` do for the log of the
        volume per atom, in Å³, what the bond channels do for log d. ``polymorph`` channels do the same for
        predictions that know no more than the element and the formula: how this crystal differs from what its
        formula would usually be.
        """
        batch = batch.to(batch.numbers.device, self.properties.dtype)
        numbers = batch.numbers
        log_p = F.log_softmax(context.element_logits, dim=1)
        p = log_p.exp()
        excess = self.implied[numbers] - p @ self.implied

        weight, total = shell_weights(batch)
        bond, log_distance = context.log_bond, batch.distance.log()[:, None]
        misfit = bond.residual(log_distance).abs()
        per_edge = torch.cat([log_distance - bond.mean, misfit, bond.log_std, bond.mean], dim=1)
        bonds = per_edge.new_zeros(len(numbers), 4)
        bonds = bonds.index_add(0, batch.edge_index[1], weight[:, None] * per_edge) / total[:, None]

        volume = log_volume_per_atom(batch)[:, None]
        by_formula = _strain(context.formula_volume, volume)  # (n_crystals, 3)
        return torch.cat(
            [
                log_p.gather(1, numbers[:, None]),
                -(p * log_p).sum(1, keepdim=True),
                excess,
                bonds,
                _misfit(context.geometry, context.standard_geometry),
                _strain(context.log_volume, volume[batch.batch]),
                _misfit(context.formula_geometry, context.standard_geometry),
                by_formula[batch.batch],
            ],
            dim=1,
        )


def _strain(predicted: Normal, actual: Tensor) -> Tensor:
    """Return deviation, expectation and softness side by side."""
    return torch.cat([actual - predicted.mean, predicted.mean, predicted.log_std], dim=1)


def _misfit(predicted: Normal, actual: Tensor) -> Tensor:
    """Return the deviations in predicted standard deviations, and their root mean square as last column."""
    residual = predicted.residual(actual).clamp(-10, 10)  # trees and kernels both dislike outliers
    return torch.cat([residual, residual.square().mean(1, keepdim=True).sqrt()], dim=1)


def log_volume_per_atom(batch: CrystalBatch) -> Tensor:
    """Return the log of the volume per atom in Å³, (n_crystals,)."""
    n_sites = torch.bincount(batch.batch, minlength=batch.num_graphs)
    return torch.log(batch.volume / n_sites)


class _GatedMessage(nn.Module):
    """sigmoid(gate) * silu(core), both linear in the sender and in the edge: → (n_edges, n)."""

    def __init__(self, n_channels: int, n_gaussians: int) -> None:
        super().__init__()
        self.sender = nn.Linear(n_channels, 2 * n_channels)
        self.edge = nn.Linear(n_gaussians, 2 * n_channels, bias=False)

    def forward(self, sender: Tensor, gaussians: Tensor) -> Tensor:
        """Return the messages of edges whose ``sender``, (n_edges, 2n), `self.sender` has already mapped."""
        gate, core = (sender + self.edge(gaussians)).chunk(2, dim=1)
        # Without the last factor a far neighbour would still speak through the biases.
        return torch.sigmoid(gate) * F.silu(core) * gaussians.sum(1, keepdim=True)


def _mlp(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_hidden), nn.SiLU(), nn.Linear(n_hidden, n_out))


def _in_double(mlp: nn.Sequential, x: Tensor) -> Tensor:
    """Apply in double precision: how a product in single is rounded depends on how many rows it has."""
    x = x.double()
    for layer in mlp:
        x = (
            F.linear(x, layer.weight.double(), layer.bias.double())
            if isinstance(layer, nn.Linear)
            else layer(x)
        )
    return x


def _normal(parameters: Tensor) -> Normal:
    """Split (n, 2k) into means and log widths; widths stay within exp(±4), so that no loss runs away."""
    mean, log_std = parameters.chunk(2, dim=1)
    return Normal(mean, 4 * torch.tanh(log_std / 4))


def _reversed(message: Tensor, batch: CrystalBatch) -> Tensor:
    """Return for each edge j → i the message i → j along the same bond, or 0 where j does not listen to i.

    The same bond means the same periodic image: other images of i are other atoms, and stay.
    """
    neighbor, center = batch.edge_index
    n_sites = len(batch.numbers)
    shift = batch.cell_shift
    span = int(shift.abs().max()) * 2 + 1 if len(shift) else 1
    digits = shift.new_tensor([span * span, span, 1])
    forward = (neighbor * n_sites + center) * span**3 + ((shift + span // 2) * digits).sum(1)
    backward = (center * n_sites + neighbor) * span**3 + ((span // 2 - shift) * digits).sum(1)
    ordered, order = forward.sort()
    place = torch.searchsorted(ordered, backward).clamp(max=len(ordered) - 1)
    found = ordered[place] == backward
    return message.index_select(0, order[place]) * found[:, None]
