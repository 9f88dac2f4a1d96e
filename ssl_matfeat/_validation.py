"""What a usable structure is, and every error text about one."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pymatgen.core import Composition, Element, IMolecule, IStructure
from pymatgen.core.sites import Site

ARRAY_COLUMNS = ("numbers", "lattice", "frac_coords")
"""What a structure is in a table without objects: (n,), (9,) in Å and (3n,)."""
MAX_ATOMIC_NUMBER = 103
MIN_DISTANCE = 0.3
"""Two atoms closer than this, in Å, are taken for a mistake in the structure."""
MIN_VOLUME_PER_SITE = 0.1
"""A cell with less volume a site than this, in Å³, is taken for flat."""
MAX_VOLUME_PER_SITE = 1e6
"""A cell with more, in Å³, is taken for a mistake too: memory and time of the neighbour search grow with the volume."""
MAX_IMAGES = 10**6
"""A cell with more images than this within `_REACH` is refused, since the neighbour search visits them all."""
_OCCUPANCY_TOLERANCE = 1e-3
"""How far from 1 the occupancy of an ordered site may be: files round."""
_REACH = 16.0
"""How far away neighbours are looked for at most, in Å."""


class StructureError(ValueError):
    """A structure that cannot be turned into features; the message says why and what to do."""


class Crystal(NamedTuple):
    """The plain arrays of one validated structure."""

    numbers: np.ndarray
    """Atomic numbers, (n_sites,) int64."""
    lattice: np.ndarray
    """Row vectors of the cell in Å, (3, 3) float64."""
    frac_coords: np.ndarray
    """Fractional coordinates, (n_sites, 3) float64; `as_crystal` wraps them into the cell."""
    pbc: tuple[bool, bool, bool] = (True, True, True)
    """Which of the three directions repeat."""

    def describe(self, name: str) -> str:
        """Return ``name`` with the reduced formula, as messages call it."""
        counts = Counter(Element.from_Z(int(z)).symbol for z in self.numbers)
        return f"{name} ({_reduced(Composition(counts))})"


def item_names(X: Any) -> list[str]:
    """Return what messages call the items of X: by position, and in pandas by label too where that differs."""
    index = X.index if isinstance(X, pd.Series | pd.DataFrame) else range(len(X))
    return [
        f"X[{i}]" if label == i else f"X[{i}] at index {label!r}" for i, label in enumerate(index)
    ]


def as_structure_list(X: Any) -> list[Any]:
    """Return the items of ``X`` as a list without looking into them.

    Parameters
    ----------
    X : list, tuple, Series, object array or one-column DataFrame of Structure
        A Structure is itself a sequence of sites, so numpy must never see the list.

    Returns
    -------
    list

    Raises
    ------
    TypeError
        If ``X`` is one structure, an array that numpy made of their sites, a generator, or no collection.
    ValueError
        If ``X`` is empty or has several columns.
    """
    if isinstance(X, IMolecule):
        as_crystal(X, "X")  # which says why not
    if isinstance(X, IStructure | Site):
        raise TypeError(
            f"X is one {type(X).__name__} ({_formula(X)}), but a list of structures is expected; pass [structure]"
        )
    if isinstance(X, np.ndarray) and X.size and isinstance(X.flat[0], Site):
        raise TypeError(
            f"X is an array of shape {X.shape} of sites: numpy takes structures apart; pass the list itself"
        )
    if isinstance(X, str | bytes | dict) or not isinstance(X, Iterable):
        raise TypeError(f"X must be a list of pymatgen Structures, got {type(X).__name__}")
    if isinstance(X, Iterator):
        raise TypeError(
            f"X is a {type(X).__name__}, which can be read only once; pass a list, e.g. list(X)"
        )
    column: Any = X
    shape: tuple[int, ...] = getattr(X, "shape", ())
    if len(shape) > 1:
        if len(shape) != 2 or shape[-1] != 1:
            raise ValueError(
                f"X has shape {shape}, but one column of structures is expected; "
                "select the column, e.g. X['structure']"
            )
        column = column.iloc[:, 0] if hasattr(column, "iloc") else column[:, 0]
    items = list(column)
    if not items:
        raise ValueError("X is empty: 0 structures given, at least 1 is needed")
    return items


def as_crystal(structure: Any, name: str = "structure") -> Crystal:
    """Check one structure and return its arrays.

    Parameters
    ----------
    structure : pymatgen.core.Structure
        Ordered; oxidation states are ignored (Fe3+ is Fe).
    name : str
        How to call it in messages, such as ``"X[17]"``.

    Returns
    -------
    Crystal

    Raises
    ------
    TypeError
        If it is not a periodic pymatgen structure.
    StructureError
        If it is disordered, has unknown species, non-finite coordinates or no volume.
    """
    if isinstance(structure, IMolecule):
        raise TypeError(
            f"{name} ({_formula(structure)}) is a Molecule, which has no lattice; "
            "put it in a box with get_boxed_structure(a, b, c)"
        )
    if structure is None or structure is pd.NA or isinstance(structure, float):
        raise TypeError(f"{name} is {structure}: the structure is missing; drop the row")
    if not isinstance(structure, IStructure):
        raise TypeError(
            f"{name} is a {type(structure).__name__}, not a pymatgen Structure; "
            "convert it first, e.g. with Structure.from_file(path), from_str(text, fmt='cif'), from_dict(d) or "
            "AseAtomsAdaptor.get_structure(atoms)"
        )
    if len(structure) == 0:
        raise StructureError(f"{name} has no sites; drop it")
    numbers = []
    for index, site in enumerate(structure):
        try:
            numbers.append(_atomic_number(site))
        except ValueError as problem:
            raise StructureError(
                f"{name} ({_formula(structure)}): site {index} {problem}"
            ) from None
    return crystal_from_arrays(
        numbers,
        structure.lattice.matrix,
        structure.frac_coords,
        name,
        structure.lattice.pbc,
    )


def crystal_from_arrays(
    numbers: Any,
    lattice: Any,
    frac_coords: Any,
    name: str,
    pbc: tuple[bool, bool, bool] = (True, True, True),
) -> Crystal:
    """Check plain arrays and return them as a crystal, its coordinates wrapped into the cell.

    Parameters
    ----------
    numbers : array-like of shape (n_sites,)
        Atomic numbers.
    lattice : array-like of shape (3, 3) or (9,)
        Row vectors of the cell in Å.
    frac_coords : array-like of shape (n_sites, 3) or (3 n_sites,)
        Fractional coordinates.
    name : str
        How to call it in messages.
    pbc : tuple of bool
        Which of the three directions repeat.

    Returns
    -------
    Crystal

    Raises
    ------
    StructureError
        If shapes do not fit, the cell is flat, or a number is not finite.
    """
    try:
        read = np.asarray(numbers, dtype=np.float64)
        if (read != np.floor(read)).any():
            raise ValueError(f"atomic numbers are integers, not {read.tolist()}")
        crystal = Crystal(
            read.astype(np.int64),
            np.array(lattice, dtype=np.float64).reshape(3, 3),
            np.array(frac_coords, dtype=np.float64).reshape(-1, 3),
            pbc,
        )
    except (TypeError, ValueError) as error:
        raise StructureError(
            f"{name} needs atomic numbers, 9 numbers of the lattice and 3 coordinates a site: {error}"
        ) from error
    _check_crystal(crystal, name)
    # Into the cell: lattice translations of far images would not fit the integers that hold them.
    wrapped = crystal.frac_coords - np.floor(crystal.frac_coords) * crystal.pbc
    return crystal._replace(frac_coords=wrapped)


def _check_crystal(crystal: Crystal, name: str) -> None:
    if crystal.numbers.shape != (len(crystal.frac_coords),) or len(crystal.numbers) == 0:
        raise StructureError(
            f"{name}: {crystal.numbers.size} atomic numbers and {len(crystal.frac_coords)} coordinates; "
            "at least one site is needed, and as many of one as of the other"
        )
    unknown = (crystal.numbers < 1) | (crystal.numbers > MAX_ATOMIC_NUMBER)
    if unknown.any():
        site = int(np.flatnonzero(unknown)[0])
        raise StructureError(
            f"{name}: site {site} has atomic number {crystal.numbers[site]}, not 1 to {MAX_ATOMIC_NUMBER}; "
            "repair or drop the structure"
        )
    problem = _geometry_problem(crystal)
    if problem:
        raise StructureError(f"{crystal.describe(name)}: {problem}")


def _geometry_problem(crystal: Crystal) -> str | None:
    if not np.isfinite(crystal.lattice).all():
        return "the lattice has NaN or infinite entries; repair or drop the structure"
    finite = np.isfinite(crystal.frac_coords).all(axis=1)
    if not finite.all():
        site = int(np.flatnonzero(~finite)[0])
        coords = crystal.frac_coords[site].tolist()
        return f"site {site} has non-finite coordinates {coords}; repair or drop the structure"
    shortest = np.linalg.norm(crystal.lattice, axis=1)[list(crystal.pbc)].min(initial=np.inf)
    if shortest < MIN_DISTANCE:
        return f"a lattice vector is {shortest:.3g} Å long, less than {MIN_DISTANCE} Å; check its unit (Å)"
    volume = abs(np.linalg.det(crystal.lattice)) / len(crystal.numbers)
    if volume < MIN_VOLUME_PER_SITE:
        return (
            f"the cell has a volume of {volume:.3g} Å³ a site, less than {MIN_VOLUME_PER_SITE} Å³; "
            "check the lattice vectors (are two of them parallel?) and their unit (Å)"
        )
    if volume > MAX_VOLUME_PER_SITE:
        return (
            f"the cell has a volume of {volume:.3g} Å³ a site, more than {MAX_VOLUME_PER_SITE:g} Å³; "
            "shrink the empty space, or check the unit of the lattice (Å)"
        )
    heights = 1 / np.linalg.norm(np.linalg.inv(crystal.lattice), axis=0)[list(crystal.pbc)]
    n_images = np.prod(2 * np.ceil(_REACH / heights) + 1)
    if n_images > MAX_IMAGES:
        return (
            f"the cell is so skewed that {n_images:.2g} of its images are within {_REACH:g} Å, more than "
            f"{MAX_IMAGES:.0g}; reduce it with structure.get_reduced_structure()"
        )
    return None


def too_close(label: str, i: int, j: int, distance: float) -> StructureError:
    """Return the error for two atoms on top of each other."""
    return StructureError(
        f"{label}: sites {i} and {j} are {distance:.3f} Å apart, closer than {MIN_DISTANCE} Å; if they are one atom, "
        f"keep one of them (structure.merge_sites({MIN_DISTANCE}, mode='delete')), else repair or drop the structure"
    )


def no_neighbor(label: str, site: int, radius: float) -> StructureError:
    """Return the error for an atom alone within the largest search radius, in Å."""
    return StructureError(
        f"{label}: site {site} has no neighbour within {radius:g} Å; "
        "remove the atom, shrink the empty space or drop the structure"
    )


def _atomic_number(site: Any) -> int:
    """Return Z of a site, or raise a ValueError that says what else it holds."""
    elements = {getattr(specie, "element", specie) for specie in site.species}
    if len(elements) != 1 or abs(site.species.num_atoms - 1) > _OCCUPANCY_TOLERANCE:
        raise ValueError(
            f"is disordered ({site.species_string}); order it first, e.g. in a supercell in which all occupancies are "
            "whole numbers, with pymatgen's OrderDisorderedStructureTransformation(no_oxi_states=True)"
        )
    element = elements.pop()
    if not isinstance(element, Element):
        raise ValueError(
            f"is {element}, which is no element; replace or remove it (structure.remove_species)"
        )
    if element.name in ("D", "T"):
        raise ValueError(
            f"is {element.name}, and isotopes are not told apart; "
            "use structure.replace(i, 'H') for each such site i"
        )
    if element.Z > MAX_ATOMIC_NUMBER:
        raise ValueError(
            f"is {element.name} (Z = {element.Z}), beyond Z = {MAX_ATOMIC_NUMBER}; drop the structure"
        )
    return int(element.Z)


def _formula(structure: Any) -> str:
    composition = getattr(structure, "composition", None)
    return _reduced(composition) if composition is not None else ""


def _reduced(composition: Composition) -> str:
    with warnings.catch_warnings():  # pymatgen warns that noble gases have no electronegativity
        warnings.simplefilter("ignore")
        return composition.reduced_formula


def refuse_structures(X: Any, name: str) -> None:
    """Raise a TypeError if ``X`` holds structures, of which numpy would make an array of sites."""
    if isinstance(X, list | tuple | pd.Series | np.ndarray) and len(X):
        first = X.iloc[0] if isinstance(X, pd.Series) else X[0]
        if isinstance(first, IStructure | Site):
            raise TypeError(
                f"X holds structures, but {name} takes columns of numbers; put SSLStructureFeaturizer and "
                "StandardScaler before it in a pipeline"
            )


def refuse_classes(y: Any, name: str, instead: str) -> None:
    """Raise a ValueError if ``y`` holds strings, which fail with a message about floats, or booleans, which pass."""
    values = np.asarray(y)
    if values.size and isinstance(values.flat[0], bool | np.bool_ | str):
        raise ValueError(
            f"y holds classes (such as {values.flat[0]!r}), but {name} predicts numbers; take {instead}"
        )
