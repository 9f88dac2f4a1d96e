"""Batch → raw channels of each site, element properties and smooth statistics of its shell, and of each crystal.

Every statistic of a shell is a weighted mean over the edges of a site, ``<q> = Σ w q / Σ w`` with
``w = f exp(-(d - d_min) / width)``: the first shell counts fully, and farther neighbours fade out smoothly, the sooner
since f, the weight of the edge in the graph, falls to 0 at the end of the list of neighbours. The width is 0.3 Å, and
1 Å for the ``wide`` channels, which see past the first shell (the gap between layers, for one).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ssl_matfeat.elements import (
    PROPERTIES,
    look_up,
    properties_of,
    property_table,
    radius_table,
)
from ssl_matfeat.graph import CrystalBatch
from ssl_matfeat.pooling import sum_by_crystal
from ssl_matfeat.springs import SPRING_CHANNELS, gordy_force_constant, spring_channels

SHELL_WIDTH, WIDE_WIDTH = 0.3, 1.0
"""Decay lengths of the shell weight, in Å."""

_BOND_ORDERS = (3, 4, 6)
_MAX_MATRICES = 16384
"""Whose eigenvalues are computed at a time: cuSOLVER is reported to refuse more than some 32 000."""

ELEMENT_CHANNELS = PROPERTIES
BOND_CHANNELS = (
    "bond length",
    "relative bond length",
    "electronegativity difference",
    "signed electronegativity difference",
    "like bonds",
    "neighbour mass",
    "neighbour valence",
    "inverse root reduced mass",
    "Badger frequency",
    "Lindemann frequency",
    "Gordy force constant",
    "Gordy frequency",
    "overlap",
    "nearest distance",
    "wide bond length",
)
"""What needs elements and distances: means over the bonds of the shell, but for the nearest distance."""
GEOMETRIC_CHANNELS = (
    "soft coordination",
    "bond length spread",
    "one-sidedness",
    "shell anisotropy",
    "shell flatness",
    *(f"bond order Q{degree}" for degree in _BOND_ORDERS),
    "wide coordination",
    "wide one-sidedness",
    "wide anisotropy",
    "wide flatness",
)
"""The shape of the shell: what needs positions only, and hardly changes when all distances are scaled."""
SHELL_CHANNELS = (*BOND_CHANNELS, *GEOMETRIC_CHANNELS)
CELL_CHANNELS = (
    "mass density",
    "volume per atom",
    "sphere volume fraction",
    "elemental packing",
    "valence electron density",
    "crystal flatness",
    "crystal elongation",
    "wide crystal flatness",
    "wide crystal elongation",
    *SPRING_CHANNELS,
)


class _Shell:
    """The weights of the edges of a batch, and means with them."""

    def __init__(self, batch: CrystalBatch, width: float) -> None:
        self.center = batch.edge_index[1]
        self.n_sites = len(batch.numbers)
        d = batch.distance
        self.nearest = d.new_full((self.n_sites,), math.inf).scatter_reduce(
            0, self.center, d, "amin"
        )
        decay = torch.exp((self.nearest.index_select(0, self.center) - d) / width)
        self.weight = batch.weight * decay  # (n_edges,)
        self.total = d.new_zeros(self.n_sites).index_add_(0, self.center, self.weight)  # (n_sites,)

    def mean(self, q: Tensor) -> Tensor:
        """Average ``q``, (n_edges, k), over the edges of each site, (n_sites, k)."""
        summed = q.new_zeros(self.n_sites, q.shape[1]).index_add_(
            0, self.center, self.weight[:, None] * q
        )
        return summed / self.total[:, None]


def shell_weights(batch: CrystalBatch) -> tuple[Tensor, Tensor]:
    """Return w of each edge, (n_edges,), and Σ w of each site, (n_sites,)."""
    shell = _Shell(batch, SHELL_WIDTH)
    return shell.weight, shell.total


def element_channels(batch: CrystalBatch) -> Tensor:
    """Return the properties of each site's element, (n_sites, 22), see `ssl_matfeat.elements.PROPERTIES`."""
    return look_up(property_table(), batch.numbers, batch.distance)


def shell_channels(batch: CrystalBatch) -> Tensor:
    """Return the statistics of each site's shell, (n_sites, 27), in the order of `SHELL_CHANNELS`."""
    return torch.cat([bond_channels(batch), batch.once(geometric_channels)], dim=1)


def bond_channels(batch: CrystalBatch) -> Tensor:
    """Return the means over the bonds of each site, (n_sites, 15), in the order of `BOND_CHANNELS`.

    For the bonds i-j of length d (Å), with electronegativities χ (Pauling), masses m (u), reduced mass µ = m_i m_j /
    (m_i + m_j), calculated atomic radii r (Å) and melting points T (K) of the elements: ``bond length`` d,
    ``relative bond length`` d/(r_i + r_j), ``electronegativity difference`` |χ_i - χ_j| and ``signed`` χ_j - χ_i,
    ``like bonds`` (1 between equal elements, else 0), ``neighbour mass`` m_j, ``neighbour valence`` (valence
    electrons of j), ``inverse root reduced mass`` µ^-1/2, ``Badger frequency`` (µ d³)^-1/2 (J. Chem. Phys. 2, 128,
    1934), ``Lindemann frequency`` (sqrt(T_i T_j)/µ)^1/2 / d (Phys. Z. 11, 609, 1910), ``Gordy force constant`` k =
    (χ_i χ_j / d²)^3/4 (J. Chem. Phys. 14, 305, 1946), ``Gordy frequency`` (k/µ)^1/2, ``overlap`` exp(-3 d/(r_i +
    r_j)); ``nearest distance`` d_min; ``wide bond length``, d with a width of 1 Å.
    """
    shell, wide = _Shell(batch, SHELL_WIDTH), _Shell(batch, WIDE_WIDTH)
    wide_length = wide.mean(batch.distance[:, None])
    return torch.cat(
        [shell.mean(_bond_quantities(batch)), shell.nearest[:, None], wide_length], dim=1
    )


def geometric_channels(batch: CrystalBatch) -> Tensor:
    """Return the shape of the shell of each site, (n_sites, 12), in the order of `GEOMETRIC_CHANNELS`.

    ``soft coordination`` Σw, ``bond length spread`` (standard deviation of d, Å), ``one-sidedness`` |<u>| of the
    unit vectors u to the neighbours, ``shell anisotropy`` the largest minus the smallest and ``shell flatness`` the
    smallest eigenvalue of <u uᵀ>, and Steinhardt's bond-orientational order ``Q_l = sqrt(4π/(2l+1) Σ_m
    |<Y_lm(u)>|²)`` (Phys. Rev. B 28, 784, 1983) for l = 3, 4, 6. ``wide`` channels are the same with a width of 1 Å.
    """
    shell, wide = _Shell(batch, SHELL_WIDTH), _Shell(batch, WIDE_WIDTH)
    d = batch.distance[:, None]  # (n_edges, 1)
    unit = batch.vector / d  # (n_edges, 3)
    spread = shell.mean((d - shell.mean(d).index_select(0, shell.center)) ** 2).sqrt()
    harmonics = spherical_harmonics(unit, _BOND_ORDERS)
    return torch.cat(
        [
            shell.total[:, None],
            spread,
            *_directions(unit, shell.mean),
            *(shell.mean(y).norm(dim=1, keepdim=True) for y in harmonics),
            wide.total[:, None],
            *_directions(unit, wide.mean),
        ],
        dim=1,
    )


def cell_channels(batch: CrystalBatch) -> Tensor:
    """Return the channels that belong to a whole crystal, (n_crystals, 19), in the order of `CELL_CHANNELS`.

    ``mass density`` (g/cm³), ``volume per atom`` (Å³), ``sphere volume fraction`` (of spheres with the calculated
    atomic radii, which overlap, so that it may exceed 1), ``elemental packing`` (volumes per atom of the elements'
    ground states, summed, over the cell's), ``valence electron density`` (1/Å³), and the smallest and largest
    eigenvalue of <u uᵀ>, averaged over the sites: a layered crystal is flat, a chain elongated; and what
    `ssl_matfeat.springs` makes of bonds as springs.
    """
    mass, volume, valence = properties_of(
        batch.numbers, batch.distance, "AtomicWeight", "GSvolume_pa", "NValence"
    )
    sphere = 4 / 3 * math.pi * look_up(radius_table(), batch.numbers, batch.distance) ** 3
    d = batch.distance[:, None]
    outer = _outer(batch.vector / d)
    directions = [
        _Shell(batch, width).mean(outer) for width in (SHELL_WIDTH, WIDE_WIDTH)
    ]  # (n_sites, 9) each
    per_site = torch.cat(
        [torch.stack([torch.ones_like(mass), mass, sphere, volume, valence], dim=1), *directions],
        dim=1,
    )
    summed = sum_by_crystal(per_site, batch)
    n_sites, total_mass, spheres, elemental, electrons = summed[:, :5].unbind(1)
    tensors = summed[:, 5:] / n_sites[:, None]
    eigenvalues = [_eigenvalues(t)[:, [0, 2]] for t in tensors.split(9, dim=1)]
    grams_per_cm3 = 1.66053906660  # from u/Å³
    intensive = (
        torch.stack([grams_per_cm3 * total_mass, spheres, elemental, electrons], 1)
        / batch.volume[:, None]
    )
    return torch.cat(
        [
            intensive[:, :1],
            (batch.volume / n_sites)[:, None],
            intensive[:, 1:],
            *eigenvalues,
            spring_channels(batch),
        ],
        dim=1,
    )


def _bond_quantities(batch: CrystalBatch) -> Tensor:
    """Return what is averaged over the bonds, (n_edges, 13), as `BOND_CHANNELS` begins."""
    neighbor, center = batch.edge_index
    d = batch.distance
    chi, mass, valence, melting = properties_of(
        batch.numbers, batch.distance, "Electronegativity", "AtomicWeight", "NValence", "MeltingT"
    )
    radius = look_up(radius_table(), batch.numbers, batch.distance)
    inverse_mass = 1 / mass[center] + 1 / mass[neighbor]  # of the reduced mass, 1/u
    relative = d / (radius[center] + radius[neighbor])
    force_constant = gordy_force_constant(batch, chi)
    return torch.stack(
        [
            d,
            relative,
            (chi[center] - chi[neighbor]).abs(),
            chi[neighbor] - chi[center],
            (batch.numbers[center] == batch.numbers[neighbor]).to(d),
            mass[neighbor],
            valence[neighbor],
            inverse_mass.sqrt(),
            (inverse_mass / d**3).sqrt(),
            ((melting[center] * melting[neighbor]).sqrt() * inverse_mass).sqrt() / d,
            force_constant,
            (force_constant * inverse_mass).sqrt(),
            torch.exp(-3 * relative),
        ],
        dim=1,
    )


def _directions(unit: Tensor, mean: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return one-sidedness, anisotropy and flatness of the directions, each (n_sites, 1)."""
    eigenvalues = _eigenvalues(mean(_outer(unit)))
    return [
        mean(unit).norm(dim=1, keepdim=True),
        eigenvalues[:, 2:] - eigenvalues[:, :1],
        eigenvalues[:, :1],
    ]


def _eigenvalues(tensors: Tensor) -> Tensor:
    """Return those of symmetric 3 × 3 tensors in ascending order, (n, 9) → (n, 3)."""
    parts = [part.unflatten(1, (3, 3)) for part in tensors.split(_MAX_MATRICES)]
    return torch.cat([torch.linalg.eigvalsh(part) for part in parts])


def _outer(unit: Tensor) -> Tensor:
    return (unit[:, :, None] * unit[:, None, :]).flatten(1)  # (n_edges, 9)


def spherical_harmonics(unit: Tensor, degrees: tuple[int, ...]) -> list[Tensor]:
    """Return, for each degree l, the real harmonics of unit vectors up to a common factor, (n, 2l + 1).

    Scaled so that the squares over one l sum to 1 for any direction (Σ_m |Y_lm|² = (2l+1)/4π without it).
    Uses the recursions of the associated Legendre polynomials in z, with (x + iy)^m for the azimuth, so that the
    poles are no special case.
    """
    x, y, z = unit.unbind(1)
    top = max(degrees)
    cosine, sine = [torch.ones_like(x)], [torch.zeros_like(x)]
    for m in range(top):
        cosine.append(x * cosine[m] - y * sine[m])
        sine.append(x * sine[m] + y * cosine[m])
    legendre: dict[tuple[int, int], Tensor] = {}
    for m in range(top + 1):
        legendre[m, m] = torch.full_like(z, math.prod(range(1, 2 * m, 2)))
        if m < top:
            legendre[m + 1, m] = (2 * m + 1) * z * legendre[m, m]
        for degree in range(m + 2, top + 1):
            legendre[degree, m] = (
                (2 * degree - 1) * z * legendre[degree - 1, m]
                - (degree + m - 1) * legendre[degree - 2, m]
            ) / (degree - m)
    result = []
    for degree in degrees:
        columns = [legendre[degree, 0]]
        for m in range(1, degree + 1):
            scale = math.sqrt(2 * math.factorial(degree - m) / math.factorial(degree + m))
            columns += [
                scale * legendre[degree, m] * cosine[m],
                scale * legendre[degree, m] * sine[m],
            ]
        result.append(torch.stack(columns, dim=1))
    return result
