"""Prototypes of site environments, found in the pretraining structures, and how like each of them a site is.

A mean over sites keeps the averages of their channels and forgets which ones came together: a chain of A-B bonds with
free C looks like one of A-C bonds with free B. Here a site is first compared, all its channels at once, with some
prototypes; the mean of these likenesses is then an account of which environments a crystal is made of, and a linear or
smooth function of it can add up what each of them contributes, to an energy for one.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

_LEAST_EIGENVALUE = 1e-4
"""Directions in which the prototypes differ by less are noise."""
_LARGEST_DEVIATION = 5.0


class Environments(nn.Module):
    """Channels of sites → likeness to each prototype, orthonormalised, (n_sites, n_prototypes).

    With k(a, b) = exp(-|a - b|²) of scaled channels and prototypes p, the columns are ``[k(x, p_1) ... k(x, p_M)]
    K^(-1/2)``, K the kernel between the prototypes: the Nyström approximation of the map whose scalar product is k
    (Williams & Seeger, NeurIPS 2000), turned so that each column belongs to one prototype. Their mean over the sites
    of a crystal approximates its kernel mean embedding, and the distance of two crystals the maximum mean discrepancy
    of their sites (Gretton et al., J. Mach. Learn. Res. 13, 723, 2012).

    Parameters
    ----------
    n_inputs : sequence of int
        Sizes of the blocks that the channels of a site consist of, which lie side by side.
    shares : sequence of float
        What each block counts, however many channels it has. A block of share s has, between two random sites, a mean
        squared distance of s over the sum of all shares.
    n_prototypes : int
        Number of columns.
    """

    mean: Tensor
    rate: Tensor
    prototypes: Tensor
    mixing: Tensor

    def __init__(
        self, n_inputs: tuple[int, ...], shares: tuple[float, ...], n_prototypes: int
    ) -> None:
        super().__init__()
        # |a - b|² of standardised channels is 2 on average.
        weight = [s / (2 * n * sum(shares)) for s, n in zip(shares, n_inputs, strict=True)]
        self.root_weight = np.repeat(np.sqrt(weight), n_inputs)  # (n_inputs,)
        total = sum(n_inputs)
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("rate", torch.ones(total))
        self.register_buffer("prototypes", torch.zeros(n_prototypes, total))
        self.register_buffer("mixing", torch.zeros(n_prototypes, n_prototypes))

    def learn(self, sites: NDArray[np.floating], random_state: int) -> None:
        """Find the prototypes among the channels of many sites, (n, n_inputs), by k-means.

        Where there are fewer different sites than prototypes, each is one, and the columns left over are 0.
        """
        sites = sites.astype(np.float64)
        std = sites.std(axis=0)
        varies = std > 1e-6 * np.maximum(1, np.abs(sites).max(axis=0))
        rate = np.divide(self.root_weight, std, out=np.zeros_like(std), where=varies)
        self.mean.copy_(torch.from_numpy(sites.mean(axis=0)))
        self.rate.copy_(torch.from_numpy(rate))
        scaled = self._scale(torch.from_numpy(sites)).numpy()
        found = torch.from_numpy(_k_means(scaled, len(self.prototypes), random_state))
        eigenvalues, vectors = np.linalg.eigh(_kernel(found, found).numpy())
        inverse_root = vectors / np.sqrt(np.maximum(eigenvalues, _LEAST_EIGENVALUE)) @ vectors.T
        self.prototypes.zero_()[: len(found)] = found  # (n_found, n_inputs)
        self.mixing.zero_()[: len(found), : len(found)] = torch.from_numpy(inverse_root)

    def forward(self, sites: Tensor) -> Tensor:
        """Return the columns of each site, (n_sites, n_prototypes), in double precision.

        The orthonormalisation magnifies differences between likenesses, and with them their rounding.
        """
        likeness = _kernel(self._scale(sites.double()), self.prototypes.double())
        return likeness @ self.mixing.double()

    def unscaled_prototypes(self) -> Tensor:
        """Return the prototypes that were found, in the units of the channels, (n_found, n_inputs).

        A channel that never varied has its mean.
        """
        found = self.prototypes[self.mixing.diagonal() != 0]
        return self.mean + found / self.rate.where(self.rate > 0, torch.inf)

    def _scale(self, sites: Tensor) -> Tensor:
        deviation = (sites - self.mean) * self.rate
        # A channel far from all that was seen would make a site unlike everything; cut, it is only very unlike.
        limit = _LARGEST_DEVIATION * torch.from_numpy(self.root_weight).to(sites)
        return deviation.clamp(-limit, limit)


def _k_means(sites: NDArray[np.float64], n_clusters: int, random_state: int) -> NDArray[np.float64]:
    different = np.unique(sites.round(6), axis=0)
    if len(different) <= n_clusters:
        return different
    k_means = MiniBatchKMeans(
        n_clusters, n_init=1, batch_size=4096, random_state=random_state % 2**32
    )
    with warnings.catch_warnings():
        # Of rare environments, of which fewer are different than there may be clusters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return k_means.fit(sites).cluster_centers_


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return exp(-|a - b|²) of all rows of ``a`` with all of ``b``, (n_a, n_b)."""
    squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return torch.exp(-squared.clamp(min=0))
