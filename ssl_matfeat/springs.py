"""Batch → moduli of each crystal, were its bonds springs: whether the whole is rigid, which no mean over sites knows.

The bond i-j is a spring of stiffness k = 167 N/m · s (χ_i χ_j / d²)^(3/4): Gordy's rule (J. Chem. Phys. 14, 305, 1946)
without its constant, so that a bond of no order has no stiffness. χ are electronegativities (Pauling), d is in Å, and
s = exp((r_i + r_j - d) / 0.37 Å) is a bond order with the decay of Brown's bond valence (Acta Cryst. B 41, 244, 1985),
1 where d is the sum of covalent radii. A tenth of k resists the turning of the bond (Born's model), which stands for
angles but, unlike them, also resists the rotation of a rigid unit. The atoms relax under a strain.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import cg
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ssl_matfeat._warnings import warn
from ssl_matfeat.elements import properties_of
from ssl_matfeat.graph import CrystalBatch
from ssl_matfeat.pooling import sum_by_crystal

DECAY = 0.37
"""Over this length, in Å, the order of a bond falls to 1/e."""
TURN = 0.1
"""Stiffness of a spring against being turned, over that against being stretched."""
FLOOR = 1.0
"""GPa, added before the logarithm: below, a modulus tells nothing."""
SPRING_CHANNELS = (
    "log affine bulk stiffness",
    "log affine shear stiffness",
    "log bulk stiffness",
    "log shear stiffness",
    "log least bulk stiffness",
    "log least shear stiffness",
    "log bulk relaxation",
    "log shear relaxation",
    "log shear anisotropy",
    "log shear to bulk ratio",
)

_GORDY = 167.0  # N/m
_GPA = 10.0  # from N/m/Å
_GROUND = 1e-4
"""Stiffness of each atom against its place, over the mean one of an atom: keeps atoms without bonds where they are."""
_DENSE = 1000
"""Sites up to which the equations of a crystal are solved directly, in some 200 MB."""
_LARGEST_SYSTEM = 20_000_000
"""Entries in the matrices of the crystals that are solved together."""
_STEP = 8
"""Crystals that differ by fewer sites are solved together."""
_TOLERANCE, _NOISE, _MAX_STEPS = 1e-6, 1e-12, 10_000
"""Of conjugate gradients: largest residual over right-hand side, or over the forces of the bonds, which cancel where
atoms need not move but for rounding."""


def spring_channels(batch: CrystalBatch) -> Tensor:
    """Return the moduli of the network of springs, (n_crystals, 10), in the order of `SPRING_CHANNELS`.

    Natural logarithms of moduli in GPa plus 1 (``stiffness``): of the bulk and the shear modulus if all atoms followed
    the strain (``affine``; the latter is 0.69 of the former in every crystal: 0.6 is Cauchy's relation for central
    springs, the rest their resistance to turning); if they relax, as Voigt's mean over directions, and as Reuss's
    (``least``). And differences of these logarithms: relaxed less affine (``relaxation``), Reuss's less Voigt's shear
    modulus (``shear anisotropy``), shear less bulk modulus, both Reuss's.
    """
    springs = _Springs(batch)
    affine = springs.affine()  # (n_crystals, 6, 6)
    relaxed = affine - springs.relaxation()
    per_volume = _GPA / batch.volume[:, None, None]
    bulk_affine, shear_affine, *_ = _moduli(affine * per_volume)
    bulk, shear, least_bulk, least_shear = _moduli(relaxed * per_volume)
    return torch.stack(
        [
            bulk_affine,
            shear_affine,
            bulk,
            shear,
            least_bulk,
            least_shear,
            bulk - bulk_affine,
            shear - shear_affine,
            least_shear - shear,
            least_shear - least_bulk,
        ],
        dim=1,
    )


class _Springs:
    """The springs of a batch, of energy ½ Σ_e δᵀ K_e δ + ½ Σ_i g u_i², with δ = ε r + u_neighbour - u_centre.

    Strains ε are written in six symmetric matrices of norm 1 (Mandel's notation), so that the elasticity tensor is a
    matrix whose trace and eigenvalues do not depend on the orientation of the crystal.
    """

    def __init__(self, batch: CrystalBatch) -> None:
        self.batch = batch
        self.neighbor, self.center = batch.edge_index
        self.unit = batch.vector / batch.distance[:, None]  # (n_edges, 3)
        # A bond stands in the lists of both ends, and counts half if one of them does not reach as far.
        self.k = 0.5 * batch.weight * _stiffness(batch)  # (n_edges,)
        self.strains = _strains().to(self.k)  # (6, 3, 3)
        self.stretch = torch.einsum("vab,eb->eav", self.strains, batch.vector)  # (n_edges, 3, 6)
        along = self.unit[:, :, None] * self.unit[:, None, :]
        turning = TURN * torch.eye(3).to(along)
        self.K = self.k[:, None, None] * ((1 - TURN) * along + turning)  # (n_edges, 3, 3)
        self.gradient = self._on_atoms(self.K @ self.stretch)  # (n_sites, 3, 6), ∂²E/∂u∂ε
        self.crystal = batch.batch[self.center]  # (n_edges,)
        self.n_sites = torch.bincount(batch.batch, minlength=batch.num_graphs)  # (n_crystals,)
        first = torch.cumsum(self.n_sites, 0) - self.n_sites  # (n_crystals,), site of each
        sites = torch.arange(len(batch.numbers), device=first.device)
        self.place = sites - first[batch.batch]  # (n_sites,), in the crystal
        mean = sum_by_crystal(self.k, batch, self.crystal) / self.n_sites  # (n_crystals,)
        self.ground = (_GROUND * mean + 1e-9)[batch.batch, None, None]  # (n_sites, 1, 1)

    def affine(self) -> Tensor:
        """Return the second derivative of the energy by strain with all atoms in their places, (n_crystals, 6, 6)."""
        # By how much each strain stretches each spring.
        along = (self.unit[:, :, None] * self.stretch).sum(1)  # (n_edges, 6)
        k = self.k[:, None, None]
        r = self.batch.vector
        # (n_crystals, 3, 3)
        rr = sum_by_crystal(k * r[:, :, None] * r[:, None, :], self.batch, self.crystal)
        turned = torch.einsum("vab,wac,nbc->nvw", self.strains, self.strains, rr)
        squared = k * along[:, :, None] * along[:, None, :]  # (n_edges, 6, 6)
        stretched = sum_by_crystal(squared, self.batch, self.crystal)
        return (1 - TURN) * stretched + TURN * turned

    def relaxation(self) -> Tensor:
        """Return by how much relaxing atoms lower that derivative, (n_crystals, 6, 6)."""
        moved = torch.zeros_like(self.gradient)  # (n_sites, 3, 6), -∂u/∂ε
        large = self.n_sites > _DENSE
        room = _STEP * torch.ceil(self.n_sites / _STEP).long()  # (n_crystals,) sites
        for n in torch.unique(room[~large]).tolist():
            fitting = torch.nonzero((room == n) & ~large)[:, 0]
            for some in fitting.split(max(1, _LARGEST_SYSTEM // (3 * n) ** 2)):
                chosen = torch.zeros_like(large)
                chosen[some] = True
                self._solve_directly(moved, chosen, n)
        for crystal in torch.nonzero(large)[:, 0].tolist():
            self._solve_by_gradients(moved, crystal)
        return sum_by_crystal(self.gradient.mT @ moved, self.batch)

    def _solve_directly(self, moved: Tensor, chosen: Tensor, n: int) -> None:
        """Write (∂²E/∂u²)⁻¹ gradient of the chosen crystals, of at most ``n`` sites each, into ``moved``."""
        n_crystals = int(chosen.sum())
        sites = chosen[self.batch.batch]  # (n_sites,)
        place = n * (torch.cumsum(chosen, 0) - 1)[self.batch.batch] + self.place  # (n_sites,)
        edges = sites[self.center]
        i, j, K = self.neighbor[edges], self.center[edges], self.K[edges]
        identity = torch.eye(3).to(K)
        H = K.new_zeros(n_crystals * n, n, 3, 3)
        # Stays where there is no site, so that the matrix has an inverse.
        diagonal = torch.arange(n_crystals * n, device=place.device)
        H[diagonal, diagonal % n] = identity
        H[place[sites], self.place[sites]] = self.ground[sites] * identity
        for row, column, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
            H.index_put_((place[row], self.place[column]), sign * K, accumulate=True)
        H = H.view(n_crystals, n, n, 3, 3).transpose(2, 3).reshape(n_crystals, 3 * n, 3 * n)
        gradient = self.gradient.new_zeros(n_crystals * n, 3, 6)
        gradient[place[sites]] = self.gradient[sites]
        factor = torch.linalg.cholesky(H)
        solved = torch.cholesky_solve(gradient.view(n_crystals, 3 * n, 6), factor)
        moved[sites] = solved.reshape(n_crystals * n, 3, 6)[place[sites]]

    def _solve_by_gradients(self, moved: Tensor, crystal: int) -> None:
        """Write the same of one crystal into ``moved``, by conjugate gradients, sites scaled by their own stiffness."""
        sites, edges = self.batch.batch == crystal, self.crystal == crystal
        i, j = self.place[self.neighbor[edges]].cpu(), self.place[self.center[edges]].cpu()
        K = self.K[edges].cpu()
        diagonal = self.ground[sites].cpu() * torch.eye(3).to(K)  # (n, 3, 3) for n sites
        diagonal = diagonal.index_add(0, i, K).index_add(0, j, K)
        n = len(diagonal)
        own = torch.arange(n)
        H = _sparse(torch.cat([i, j, own]), torch.cat([j, i, own]), torch.cat([-K, -K, diagonal]))
        scaling = _sparse(own, own, torch.linalg.inv(diagonal))
        gradient = self.gradient[sites].cpu().reshape(3 * n, 6).numpy()
        force = float((self.k[edges] * self.batch.distance[edges]).norm())
        stop = {"rtol": _TOLERANCE, "atol": _NOISE * force, "maxiter": _MAX_STEPS, "M": scaling}
        solved, unfinished = zip(*(cg(H, column, **stop) for column in gradient.T), strict=True)
        moved[sites] = torch.from_numpy(np.stack(solved, axis=1)).to(moved).view(n, 3, 6)
        if any(unfinished):
            warn(
                f"the network of springs of a crystal of {n} sites did not come to rest in {_MAX_STEPS} steps; its "
                "stiffness channels are too large. Are most of its atoms without bonds?",
                ConvergenceWarning,
            )

    def _on_atoms(self, tension: Tensor) -> Tensor:
        """Sum the tension of the edges, (n_edges, 3, 6), over both of their ends, (n_sites, 3, 6)."""
        total = tension.new_zeros(len(self.batch.numbers), 3, 6)
        return total.index_add_(0, self.neighbor, tension).index_add_(0, self.center, -tension)


def _sparse(rows: Tensor, columns: Tensor, blocks: Tensor) -> csr_array:
    """Return the matrix of blocks, (n_blocks, 3, 3), whose places count in blocks; those of one place add up."""
    axis = torch.arange(3)
    row = (3 * rows[:, None, None] + axis[:, None]).expand_as(blocks)
    column = (3 * columns[:, None, None] + axis).expand_as(blocks)
    places = row.flatten().numpy(), column.flatten().numpy()
    return csr_array((blocks.flatten().numpy(), places))


def gordy_force_constant(batch: CrystalBatch, chi: Tensor) -> Tensor:
    """Return (χ_i χ_j / d²)^(3/4) of each edge, (n_edges,), for the electronegativities of the sites."""
    neighbor, center = batch.edge_index
    return (chi[center] * chi[neighbor] / batch.distance**2) ** 0.75


def _stiffness(batch: CrystalBatch) -> Tensor:
    """Return that of each edge in N/m, (n_edges,)."""
    chi, radius = properties_of(
        batch.numbers, batch.distance, "Electronegativity", "CovalentRadius"
    )
    neighbor, center = batch.edge_index
    excess = batch.distance - 0.01 * (radius[neighbor] + radius[center])  # radii come in pm
    return _GORDY * torch.exp(-excess / DECAY) * gordy_force_constant(batch, chi)


def _strains() -> Tensor:
    """Return six symmetric matrices of norm 1, (6, 3, 3), the diagonal ones first."""
    basis = torch.zeros(6, 3, 3, dtype=torch.float64)
    for v, (a, b) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        basis[v, a, b] = basis[v, b, a] = 1 if a == b else math.sqrt(0.5)
    return basis


def _moduli(C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log(modulus + `FLOOR`) of Voigt's bulk and shear, and of Reuss's bulk and shear modulus.

    Hill, Proc. Phys. Soc. A 65, 349 (1952). An isotropic matrix is 3 K on uniform expansion and 2 G on the five shears.
    """
    # So that it has an inverse where nothing holds the crystal together.
    C = C + 1e-3 * FLOOR * torch.eye(6).to(C)
    S = torch.linalg.inv(C)
    expansion = C.new_tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]) / math.sqrt(3)
    stiff, compliant = expansion @ C @ expansion, expansion @ S @ expansion  # (n_crystals,)
    trace, trace_of_inverse = (M.diagonal(dim1=1, dim2=2).sum(1) for M in (C, S))
    return (
        torch.log(stiff / 3 + FLOOR),
        torch.log((trace - stiff) / 10 + FLOOR),
        torch.log(1 / (3 * compliant) + FLOOR),
        torch.log(5 / (2 * (trace_of_inverse - compliant)) + FLOOR),
    )
