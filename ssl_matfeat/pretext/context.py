"""The pretext task of the default weights: predict every atom, bond and shell from its surroundings."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ssl_matfeat.channels import shell_weights
from ssl_matfeat.context_encoder import ContextEncoder, log_volume_per_atom
from ssl_matfeat.graph import CrystalBatch
from ssl_matfeat.training import Losses


class ContextTask(nn.Module):
    """Maximise the likelihood of each atom, bond length, shell geometry and volume, given what is around.

    Nothing is hidden at random: the encoder never shows an atom to its own context (its periodic images are other
    atoms), nor a distance to what predicts distances, so that every atom and bond of every crystal teaches in every
    epoch. The heads belong to the encoder, since their predictions are features.

    Parameters
    ----------
    encoder : ContextEncoder
        To be trained; the task itself learns nothing.
    """

    def __init__(self, encoder: ContextEncoder) -> None:
        super().__init__()

    def losses(
        self, encoder: ContextEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return the losses in nats.

        ``element`` is a cross-entropy; ``bond``, ``geometry``, ``volume`` and the latter two from the formula alone,
        ``formula geometry`` and ``formula volume``, are negative log-likelihoods of normal distributions.
        """
        context = encoder(batch)
        weight, _ = shell_weights(batch)
        bond = context.log_bond.negative_log_likelihood(batch.distance.log()[:, None])
        geometry = context.geometry.negative_log_likelihood(context.standard_geometry)
        log_volume = log_volume_per_atom(batch)[:, None]  # (n_crystals, 1)
        volume = context.log_volume.negative_log_likelihood(log_volume[batch.batch])
        by_formula = context.formula_geometry.negative_log_likelihood(context.standard_geometry)
        return {
            "element": F.cross_entropy(context.element_logits, batch.numbers),
            "bond": (weight * bond.squeeze(1)).sum() / weight.sum(),
            "geometry": geometry.mean(),
            "volume": volume.mean(),
            "formula geometry": by_formula.mean(),
            "formula volume": context.formula_volume.negative_log_likelihood(log_volume).mean(),
        }

    def metrics(
        self, encoder: ContextEncoder, batch: CrystalBatch, generator: torch.Generator
    ) -> Losses:
        """Return the accuracy of elements and the mean absolute errors of log bond length and log volumes."""
        context = encoder(batch)
        weight, _ = shell_weights(batch)
        bond = (batch.distance.log() - context.log_bond.mean.squeeze(1)).abs()
        log_volume = log_volume_per_atom(batch)[:, None]  # (n_crystals, 1)
        return {
            "element accuracy": (context.element_logits.argmax(1) == batch.numbers).float().mean(),
            "log bond error": (weight * bond).sum() / weight.sum(),
            "log volume error": (log_volume[batch.batch] - context.log_volume.mean).abs().mean(),
            "formula log volume error": (log_volume - context.formula_volume.mean).abs().mean(),
        }
