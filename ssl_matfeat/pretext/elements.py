"""Pretext tasks that ask for elements: of hidden atoms, and of atoms that may not belong where they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_matfeat.elements import N_CLASSES, PROPERTIES, standard_properties
from ssl_matfeat.encoder import CGCNNEncoder
from ssl_matfeat.graph import CrystalBatch
from ssl_matfeat.pretext.damage import hide_atoms, replace_elements
from ssl_matfeat.training import Losses


class PropertyTask(nn.Module):
    """Hide atoms; predict their element, and its 22 properties.

    Atoms are hidden as in `PredictiveTask`. Properties are standardised over the elements; their loss is a mean
    squared error, so 1 is about what the mean element gets. The element is one of 104 classes, 0 being unused.

    Parameters
    ----------
    encoder : CGCNNEncoder
        Whose width the heads take.
    mask_ratio : float, default=0.15
        Part of the atoms to hide.
    """

    properties: Tensor

    def __init__(self, encoder: CGCNNEncoder, mask_ratio: float = 0.15) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.predict_properties = nn.Linear(encoder.n_channels, len(PROPERTIES))
        self.predict_element = nn.Linear(encoder.n_channels, N_CLASSES)
        properties = torch.from_numpy(standard_properties()).float()  # (104, 22)
        self.register_buffer("properties", properties, persistent=False)

    def losses(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return ``properties``, a mean squared error, and ``element``, a cross-entropy in nats."""
        properties, logits, numbers = self.predict(encoder, batch, generator)
        return {
            "properties": F.mse_loss(properties, self.properties[numbers]),
            "element": F.cross_entropy(logits, numbers),
        }

    def metrics(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return the mean absolute error of properties in standard deviations, and the accuracy of elements."""
        properties, logits, numbers = self.predict(encoder, batch, generator)
        return {
            "property error": (properties - self.properties[numbers]).abs().mean(),
            "element accuracy": (logits.argmax(1) == numbers).float().mean(),
        }

    def predict(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return properties, (n_hidden, 22), logits, (n_hidden, 104), and true atomic numbers, (n_hidden,)."""
        hidden = hide_atoms(encoder, batch, self.mask_ratio, generator)
        x = encoder.embed(batch, hidden.node_input, hidden.edge_input)[-1][hidden.sites]
        return self.predict_properties(x), self.predict_element(x), batch.numbers[hidden.sites]


class ReplacedTask(nn.Module):
    """Replace atoms by other elements, and tell for every atom whether it is the right one there.

    As ELECTRA does for words (Clark et al., arXiv 2003.10555). A wrong element is that of a random atom of the
    batch, so that it is as frequent as a right one, and no element gives itself away. An atom that drew its own
    element counts as not replaced. Each atom is drawn by itself: some crystals stay whole. In the binary
    cross-entropy both classes weigh the same, so guessing costs ln 2.

    Parameters
    ----------
    encoder : CGCNNEncoder
        Whose width the head takes.
    replaced_ratio : float, default=0.15
        Probability of each atom to be replaced.
    """

    def __init__(self, encoder: CGCNNEncoder, replaced_ratio: float = 0.15) -> None:
        super().__init__()
        self.replaced_ratio = replaced_ratio
        width = encoder.n_channels
        self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def losses(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return ``replaced``, the balanced binary cross-entropy in nats."""
        logits, replaced = self.predict(encoder, batch, generator)
        loss = F.binary_cross_entropy_with_logits(logits, replaced.to(logits), reduction="none")
        return {"replaced": _balanced_mean(loss, replaced)}

    def metrics(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return the mean of the accuracies of both classes; guessing gets 0.5."""
        logits, replaced = self.predict(encoder, batch, generator)
        right = ((logits > 0) == replaced).float()
        return {"replaced balanced accuracy": _balanced_mean(right, replaced)}

    def predict(
        self, encoder: CGCNNEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return a logit for every atom, and whether it was replaced, both (n_sites,)."""
        damaged = replace_elements(batch, self.replaced_ratio, generator)
        x = encoder(damaged)[-1]
        return self.head(x).squeeze(1), damaged.numbers != batch.numbers


def _balanced_mean(values: Tensor, positive: Tensor) -> Tensor:
    """Return the mean of the two classes' means, or that of the only class there is."""
    classes = [values[kind] for kind in (positive, ~positive) if kind.any()]
    return torch.stack([values.mean() for values in classes]).mean()
