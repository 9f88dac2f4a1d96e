"""Tables of the elements, from data that matminer and pymatgen ship; row Z of a table is element Z."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from matminer.utils.data import MagpieData
from numpy.typing import NDArray
from pymatgen.core import Element
from torch import Tensor

from ssl_matfeat._validation import MAX_ATOMIC_NUMBER

PROPERTIES = (
    "Number",
    "MendeleevNumber",
    "AtomicWeight",
    "MeltingT",
    "Column",
    "Row",
    "CovalentRadius",
    "Electronegativity",
    "NsValence",
    "NpValence",
    "NdValence",
    "NfValence",
    "NValence",
    "NsUnfilled",
    "NpUnfilled",
    "NdUnfilled",
    "NfUnfilled",
    "NUnfilled",
    "GSvolume_pa",
    "GSbandgap",
    "GSmagmom",
    "SpaceGroupNumber",
)
"""The 22 properties of Magpie's preset (Ward et al., npj Comput. Mater. 2, 16028, 2016), by matminer's names."""

N_CLASSES = MAX_ATOMIC_NUMBER + 1
"""Atomic numbers, with 0 for a hidden atom."""
N_INDICATORS = 92


@cache
def property_table() -> NDArray[np.float64]:
    """Return Magpie's element properties, (104, 22); row 0 is NaN.

    Where Magpie has no value, the mean over the elements stands, as in matminer's own default.
    """
    magpie = MagpieData(impute_nan=True)
    table = np.full((N_CLASSES, len(PROPERTIES)), np.nan)
    for z in range(1, N_CLASSES):
        table[z] = [magpie.get_elemental_property(Element.from_Z(z), name) for name in PROPERTIES]
    return table


@cache
def standard_properties() -> NDArray[np.float64]:
    """Return the properties of `property_table`, scaled to mean 0 and standard deviation 1 over the elements.

    (104, 22); row 0 is zero, the input of a hidden atom.
    """
    table = property_table()[1:]
    return np.pad((table - table.mean(0)) / table.std(0, ddof=1), ((1, 0), (0, 0)))


def properties_of(numbers: Tensor, like: Tensor, *names: str) -> tuple[Tensor, ...]:
    """Return the named properties of atoms, each (n_sites,), with the type and device of ``like``."""
    columns = [PROPERTIES.index(name) for name in names]
    return look_up(property_table()[:, columns], numbers, like).unbind(1)


def look_up(table: NDArray[np.float64], numbers: Tensor, like: Tensor) -> Tensor:
    """Return the row of each atom in a table of the elements, with the type and device of ``like``."""
    return torch.from_numpy(table).to(like)[numbers]


@cache
def radius_table() -> NDArray[np.float64]:
    """Return calculated atomic radii in Å, (104,); row 0 is NaN.

    pymatgen's ``atomic_radius_calculated``; where that is missing the empirical ``atomic_radius``, and
    where both are (At, Fr, and from Cm on), 1.75 Å as for the earlier actinides. The two scales
    differ by some 0.5 Å for La, Ce and Ho, whose radii are empirical among calculated ones.
    """
    radii = [np.nan]
    for z in range(1, N_CLASSES):
        data = Element.from_Z(z).data
        known = [data.get(key) for key in ("Atomic radius calculated", "Atomic radius")]
        radii.append(next((float(r) for r in known if r not in (None, "no data")), 1.75))
    return np.array(radii)


@cache
def indicator_table() -> NDArray[np.float64]:
    """Return CGCNN's 92 one-hot element indicators, (104, 92); row 0 is zero, the input of a hidden atom.

    Group, period, electronegativity, covalent radius, valence electrons, first ionization energy, electron
    affinity, block and atomic volume, each binned (Xie & Grossman, Phys. Rev. Lett. 120, 145301, 2018), as
    matminer ships them. They end at Fm (100); Md, No and Lr take its row, being actinides like it.
    """
    text = files("matminer.utils.data_files").joinpath("cgcnn_atom_feature.json").read_text()
    rows = json.loads(text)
    table = np.zeros((N_CLASSES, N_INDICATORS))
    for z in range(1, N_CLASSES):
        table[z] = rows[str(min(z, 100))]
    return table
