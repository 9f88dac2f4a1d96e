"""Structure → periodic graph → batch: the only code that turns structures into tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pymatgen.optimization.neighbors import find_points_in_spheres
from torch import Tensor

from ssl_matfeat._validation import MIN_DISTANCE, Crystal, as_crystal, no_neighbor, too_close

if TYPE_CHECKING:
    from pymatgen.core import Structure
    from torch_geometric.data import Data

FADE = 0.3
"""Over this length, in Å, the weight of neighbours beyond the last full one falls from 1 to 0."""
SHELL_TOLERANCE = 1e-3
"""Neighbours whose distances differ by less than this, in Å, belong to one shell, where the list is cut sharply."""
SPARSE_FACTOR = 2
"""How many cutoffs away a site without neighbours looks for its nearest."""


@dataclass(frozen=True)
class Edges:
    """The directed edges of one crystal, ordered by centre, then by distance."""

    index: NDArray[np.int32]
    """(2, n_edges): row 0 the neighbour (source), row 1 the centre (target), as in PyG."""
    vector: NDArray[np.float64]
    """(n_edges, 3): from the centre to the neighbour's image, in Å."""
    cell_shift: NDArray[np.int16]
    """(n_edges, 3): the lattice translation of the neighbour's image."""
    full_radius: NDArray[np.float64]
    """(n_sites,) Å: neighbours up to here count fully, those up to `FADE` beyond less and less."""


def find_edges(
    crystal: Crystal, cutoff: float = 8.0, n_neighbors: int | None = 12, name: str = "structure"
) -> Edges:
    """Find the neighbours of every site.

    The ``n_neighbors`` nearest ones of a site count fully, and what lies beyond fades out within `FADE` of the last of
    them. A list that is cut off, at a number or at a shell, makes whatever is computed from it jump when atoms move
    by less than can be measured, and exactly ``n_neighbors`` would even pick some of several equal atoms by their
    order. The distance of the last one is continuous, and so are the weights.

    Parameters
    ----------
    crystal : Crystal
        From `as_crystal`.
    cutoff : float, default=8.0
        Largest distance of a neighbour that counts fully, in Å. A site with none, as in a sparse or badly relaxed
        crystal, takes its nearest one instead, up to twice as far away, and what fades out beyond.
    n_neighbors : int or None, default=12
        How many nearest neighbours of a site count fully. None is all within ``cutoff``.
    name : str
        How to call the structure in messages.

    Returns
    -------
    Edges

    Raises
    ------
    StructureError
        If a site has no neighbour within ``2 * cutoff`` or two sites are closer than 0.3 Å.
    """
    if n_neighbors is not None and n_neighbors < 1:
        raise ValueError(f"n_neighbors must be at least 1, or None for no limit, got {n_neighbors}")
    positions = np.ascontiguousarray(crystal.frac_coords @ crystal.lattice)
    radius = cutoff if n_neighbors is None else min(cutoff, _first_radius(crystal, n_neighbors))
    while True:
        center, neighbor, shift, vector, distance = _within(crystal, positions, radius)
        inside = np.bincount(center[distance <= radius], minlength=len(positions))
        if radius == cutoff or inside.min() >= n_neighbors:
            break
        radius = min(cutoff, 1.4 * radius)
    if inside.min() == 0:
        near = center, neighbor, shift, vector, distance
        far = _nearest_of_sparse(crystal, positions, np.flatnonzero(inside == 0), cutoff, name)
        center, neighbor, shift, vector, distance = map(np.concatenate, zip(near, far, strict=True))
    if distance.min() < MIN_DISTANCE:
        e = int(distance.argmin())
        raise too_close(
            crystal.describe(name), int(center[e]), int(neighbor[e]), float(distance[e])
        )

    order = np.lexsort((distance, center))
    n_found = np.bincount(center, minlength=len(positions))
    first = np.cumsum(n_found) - n_found
    full_radius = np.full(len(positions), cutoff)
    if n_neighbors is not None:
        enough = n_found >= n_neighbors
        last = distance[order[first[enough] + n_neighbors - 1]]
        full_radius[enough] = np.minimum(last, cutoff)
    full_radius = np.maximum(full_radius, distance[order[first]])
    order = order[distance[order] < full_radius[center[order]] + FADE]
    index = np.stack([neighbor[order], center[order]])
    return Edges(index.astype(np.int32), vector[order], shift[order].astype(np.int16), full_radius)


def _first_radius(crystal: Crystal, n_neighbors: int) -> float:
    """Return the radius of a sphere that would hold twice the wanted neighbours if they were spread evenly."""
    volume_per_site = abs(np.linalg.det(crystal.lattice)) / len(crystal.numbers)
    return float((3 * 2 * n_neighbors * volume_per_site / (4 * np.pi)) ** (1 / 3))


def _within(
    crystal: Crystal,
    positions: NDArray[np.float64],
    radius: float,
    centers: NDArray[np.int64] | None = None,
) -> tuple[NDArray, ...]:
    """Return what there is within ``radius + FADE`` of the given centres, or of all sites."""
    center, neighbor, shift, _ = find_points_in_spheres(
        positions,
        positions if centers is None else positions[centers],
        radius + FADE,
        np.array(crystal.pbc, dtype=np.int64),
        np.ascontiguousarray(crystal.lattice),
        1e-8,
    )
    if centers is not None:
        center = centers[center]
    shift = shift.astype(np.int64)
    other = (center != neighbor) | shift.any(axis=1)
    center, neighbor, shift = center[other], neighbor[other], shift[other]
    vector = positions[neighbor] - positions[center] + shift @ crystal.lattice
    return center, neighbor, shift, vector, np.sqrt(np.einsum("ij,ij->i", vector, vector))


def _nearest_of_sparse(
    crystal: Crystal,
    positions: NDArray[np.float64],
    sparse: NDArray[np.int64],
    cutoff: float,
    name: str,
) -> tuple[NDArray, ...]:
    """Return the neighbours of sites with none within ``cutoff`` that those lack: from there to the nearest."""
    found = _within(crystal, positions, SPARSE_FACTOR * cutoff, sparse)
    center, distance = found[0], found[-1]
    nearest = np.full(len(positions), np.inf)
    np.minimum.at(nearest, center, distance)
    lonely = sparse[nearest[sparse] > SPARSE_FACTOR * cutoff]
    if len(lonely):
        raise no_neighbor(crystal.describe(name), int(lonely[0]), SPARSE_FACTOR * cutoff)
    new = (distance > cutoff + FADE) & (distance <= nearest[center] + FADE)
    return tuple(array[new] for array in found)


@dataclass
class CrystalBatch:
    """Some crystals as one disconnected graph; field names are PyG's, so that its layers read it too."""

    numbers: Tensor
    """(n_sites,) int64, atomic numbers."""
    edge_index: Tensor
    """(2, n_edges) int64, row 0 the neighbour, row 1 the centre."""
    vector: Tensor
    """(n_edges, 3) Å, from centre to neighbour."""
    distance: Tensor
    """(n_edges,) Å."""
    cell_shift: Tensor
    """(n_edges, 3) int64, the lattice translation of the neighbour's image."""
    full_radius: Tensor
    """(n_sites,) Å, how far the neighbours of each site count fully."""
    batch: Tensor
    """(n_sites,) int64, the crystal of each site."""
    volume: Tensor
    """(n_crystals,) Å³."""

    def __post_init__(self) -> None:
        self._computed: dict[Callable[[CrystalBatch], Tensor], Tensor] = {}

    @property
    def num_graphs(self) -> int:
        """Return the number of crystals."""
        return len(self.volume)

    def once(self, function: Callable[[CrystalBatch], Tensor]) -> Tensor:
        """Return ``function(self)``, which is computed at the first call: several blocks read the same channels."""
        if function not in self._computed:
            self._computed[function] = function(self)
        return self._computed[function]

    @property
    def weight(self) -> Tensor:
        """Return how much each edge counts, (n_edges,): 1, and at the end of the list of neighbours less, down to 0."""
        return self.once(_edge_weights)

    def cut_sharply(self) -> CrystalBatch:
        """Return the full neighbours alone, each with the whole shell of the last one, for what knows no weights."""
        _, center = self.edge_index
        kept = self.distance <= self.full_radius[center] + SHELL_TOLERANCE
        return replace(
            self,
            edge_index=self.edge_index[:, kept],
            vector=self.vector[kept],
            distance=self.distance[kept],
            cell_shift=self.cell_shift[kept],
        )

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> CrystalBatch:
        """Move all tensors to ``device`` and the floating ones to ``dtype``."""
        moved = {
            f.name: value.to(device, dtype if value.is_floating_point() else None)
            for f in fields(self)
            for value in [getattr(self, f.name)]
        }
        return CrystalBatch(**moved)


def _edge_weights(batch: CrystalBatch) -> Tensor:
    beyond = (batch.distance - batch.full_radius[batch.edge_index[1]]) / FADE  # (n_edges,)
    x = 1 - beyond.clamp(0, 1)
    return x * x * (3 - 2 * x)


@dataclass
class CrystalGraphs:
    """The graphs of many crystals in flat arrays: small, quick to batch, and saved as plain .npy files."""

    numbers: NDArray[np.uint8]
    """(n_sites,) of all crystals, one after another."""
    edge_index: NDArray[np.int32]
    """(2, n_edges), counted from each crystal's first site."""
    vector: NDArray[np.floating]
    """(n_edges, 3) Å."""
    cell_shift: NDArray[np.int16]
    """(n_edges, 3)."""
    full_radius: NDArray[np.float64]
    """(n_sites,) Å."""
    lattice: NDArray[np.float64]
    """(n_crystals, 3, 3) Å."""
    site_start: NDArray[np.int64]
    """(n_crystals + 1,), where the sites of each crystal begin."""
    edge_start: NDArray[np.int64]
    """(n_crystals + 1,), where the edges of each crystal begin."""

    @classmethod
    def from_edges(
        cls, crystals: Sequence[Crystal], edges: Sequence[Edges], dtype: type = np.float64
    ) -> CrystalGraphs:
        """Join the crystals and their edges; ``dtype`` is that of the edge vectors."""
        return cls(
            numbers=np.concatenate([c.numbers for c in crystals]).astype(np.uint8),
            edge_index=np.concatenate([e.index for e in edges], axis=1),
            vector=np.concatenate([e.vector for e in edges], dtype=dtype, casting="same_kind"),
            cell_shift=np.concatenate([e.cell_shift for e in edges]),
            full_radius=np.concatenate([e.full_radius for e in edges]),
            lattice=np.stack([c.lattice for c in crystals]),
            site_start=_starts([len(c.numbers) for c in crystals]),
            edge_start=_starts([len(e.vector) for e in edges]),
        )

    @classmethod
    def from_structures(
        cls, structures: Sequence[Structure], cutoff: float = 8.0, n_neighbors: int | None = 12
    ) -> CrystalGraphs:
        """Build the graphs of good structures; the first bad one raises, see `find_edges`.

        Examples
        --------
        >>> from pymatgen.core import Lattice, Structure
        >>> nacl = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
        >>> graphs = CrystalGraphs.from_structures([nacl])
        >>> graphs.n_edges, graphs.data(0).num_nodes
        (array([144]), 8)
        """
        if len(structures) == 0:
            raise ValueError("structures is empty; at least 1 is needed")
        crystals = [as_crystal(s, f"X[{i}]") for i, s in enumerate(structures)]
        edges = [find_edges(c, cutoff, n_neighbors, f"X[{i}]") for i, c in enumerate(crystals)]
        return cls.from_edges(crystals, edges)

    def __len__(self) -> int:
        return len(self.lattice)

    @property
    def n_sites(self) -> NDArray[np.int64]:
        """Return the number of sites of each crystal, (n_crystals,)."""
        return np.diff(self.site_start)

    @property
    def n_edges(self) -> NDArray[np.int64]:
        """Return the number of edges of each crystal, (n_crystals,)."""
        return np.diff(self.edge_start)

    def sites_of(self, crystals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the sites of the named crystals stand among all sites, crystal after crystal."""
        return _ranges(self.site_start[crystals], self.n_sites[crystals])

    def batch(self, crystals: NDArray[np.int64] | Sequence[int]) -> CrystalBatch:
        """Return the named crystals, in this order, as tensors."""
        crystals = np.asarray(crystals, dtype=np.int64)
        n_sites, n_edges = self.n_sites[crystals], self.n_edges[crystals]
        sites = self.sites_of(crystals)
        edges = _ranges(self.edge_start[crystals], n_edges)
        offset = np.repeat(np.cumsum(n_sites) - n_sites, n_edges)  # (n_edges,)
        vector = torch.from_numpy(self.vector[edges])
        return CrystalBatch(
            numbers=torch.from_numpy(self.numbers[sites].astype(np.int64)),
            edge_index=torch.from_numpy(self.edge_index[:, edges] + offset),
            vector=vector,
            distance=vector.norm(dim=1),
            cell_shift=torch.from_numpy(self.cell_shift[edges].astype(np.int64)),
            full_radius=torch.from_numpy(self.full_radius[sites]).to(vector.dtype),
            batch=torch.from_numpy(np.repeat(np.arange(len(crystals)), n_sites)),
            volume=torch.from_numpy(abs(np.linalg.det(self.lattice[crystals]))).to(vector.dtype),
        )

    def batches(
        self, max_edges: int, order: NDArray[np.int64] | None = None
    ) -> Iterator[NDArray[np.int64]]:
        """Cut ``order`` (default: as stored) into runs of at most ``max_edges`` edges.

        Edges bound the memory and the time of a batch, the number of crystals does not. A crystal with
        more edges than that is a batch of its own.
        """
        order = np.arange(len(self)) if order is None else order
        n_edges = self.n_edges[order]
        start, total = 0, 0
        for i, n in enumerate(n_edges):
            if i > start and total + n > max_edges:
                yield order[start:i]
                start, total = i, 0
            total += int(n)
        if start < len(order):
            yield order[start:]

    def data(self, crystal: int) -> Data:
        """Return one crystal as a PyG ``Data``; ``Batch.from_data_list`` joins several.

        Its ``edge_weight`` is to be multiplied with messages, as PyG's ``GCNConv`` does.
        """
        from torch_geometric.data import Data  # takes seconds to import, and only this needs it

        one = self.batch([crystal])
        return Data(
            num_nodes=len(one.numbers),
            numbers=one.numbers,
            edge_index=one.edge_index,
            vector=one.vector,
            distance=one.distance,
            cell_shift=one.cell_shift,
            edge_weight=one.weight,
            full_radius=one.full_radius,
            lattice=torch.from_numpy(self.lattice[[crystal]]),  # a copy: the file may be read-only
            volume=one.volume,
        )

    def digest(self) -> str:
        """Return a hash that tells these graphs from others."""
        digest = hashlib.sha256()
        for f in fields(self):
            digest.update(np.ascontiguousarray(getattr(self, f.name)).data)
        return digest.hexdigest()[:12]

    def save(self, folder: str | Path) -> None:
        """Write one .npy file a field into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for f in fields(self):
            np.save(folder / f"{f.name}.npy", getattr(self, f.name))

    @classmethod
    def load(cls, folder: str | Path) -> CrystalGraphs:
        """Map the files that `save` wrote into memory; nothing is unpickled."""
        return cls(
            **{f.name: np.load(Path(folder) / f"{f.name}.npy", mmap_mode="r") for f in fields(cls)}
        )


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join ``arange(start, start + length)`` of every pair."""
    offsets = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return np.arange(lengths.sum()) + offsets
