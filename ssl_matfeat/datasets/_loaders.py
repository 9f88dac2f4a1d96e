"""Parquet files and DataFrames in, DataFrames with a column of pymatgen structures out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
from pymatgen.core import Element, IStructure, Structure

from ssl_matfeat._validation import ARRAY_COLUMNS

DATA_HOME_VARIABLE = "SSL_MATFEAT_DATA"
BUNDLED_FILE = Path(__file__).parent / "elastic_2015.parquet"
MAX_Z = max(element.Z for element in Element)


@overload
def load_elastic(*, return_X_y: Literal[False] = False) -> pd.DataFrame: ...


@overload
def load_elastic(*, return_X_y: Literal[True]) -> tuple[list[Structure], np.ndarray]: ...


def load_elastic(*, return_X_y: bool = False) -> pd.DataFrame | tuple[list[Structure], np.ndarray]:
    """Load the bundled elastic moduli of 1 181 inorganic crystals.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return the structures and the logarithm of the bulk modulus instead of the whole table.

    Returns
    -------
    frame : pandas.DataFrame
        One row a crystal: ``id`` (Materials Project), ``formula``, ``structure``, ``K_VRH`` and
        ``G_VRH`` (Voigt-Reuss-Hill bulk and shear modulus, GPa) and ``poisson_ratio``.
    (X, y) : tuple of list and numpy.ndarray
        With ``return_X_y=True``: the structures, and log10 of ``K_VRH`` in GPa, shape (1181,).

    Notes
    -----
    Elastic tensors from density functional theory by de Jong et al. [1]_, as matminer 0.3.9
    shipped them (BSD licence, Lawrence Berkeley National Laboratory).

    References
    ----------
    .. [1] M. de Jong et al., "Charting the complete elastic properties of inorganic crystalline
       compounds", Scientific Data 2, 150009 (2015), doi:10.1038/sdata.2015.9

    Examples
    --------
    >>> from ssl_matfeat import load_elastic
    >>> X, y = load_elastic(return_X_y=True)
    >>> len(X), y.shape
    (1181, (1181,))
    >>> X[0].composition.reduced_formula
    'Nb4CoSi'
    """
    frame = load_dataset(BUNDLED_FILE)
    if return_X_y:
        return frame["structure"].tolist(), np.log10(frame["K_VRH"].to_numpy())
    return frame[["id", "formula", "structure", "K_VRH", "G_VRH", "poisson_ratio"]]


def load_dataset(
    path_or_name: str | os.PathLike[str] | pd.DataFrame,
    *,
    data_home: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Load crystals from a parquet file, or take them from a DataFrame.

    Parameters
    ----------
    path_or_name : str, path-like or pandas.DataFrame
        A path that ends in ``.parquet``; a bare name such as ``"matbench_phonons"``, looked up as
        ``<data_home>/<name>.parquet``; or a frame, for instance one of matminer's
        ``load_dataset``.
    data_home : str or path-like, optional
        Folder of the named data sets, by default the environment variable ``SSL_MATFEAT_DATA``.

    Returns
    -------
    pandas.DataFrame
        A new frame with the column ``structure`` (pymatgen Structure) in place of the arrays that
        :func:`structures_from_frame` describes, and every other column and the index as they
        were; array-valued targets, such as the moments of each site, stay arrays.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or no folder to look up the name in.
    TypeError
        If ``path_or_name`` is neither a path, a name nor a frame, or an item in the ``structure``
        column is no Structure.
    ValueError
        If the structure columns are missing, or a row of them is malformed.

    Examples
    --------
    A frame in the layout of the parquet files, here rock salt with one array-valued target:

    >>> import pandas as pd
    >>> from ssl_matfeat import load_dataset
    >>> frame = pd.DataFrame(
    ...     {
    ...         "numbers": [[11, 17]],
    ...         "lattice": [[0, 2.82, 2.82, 2.82, 0, 2.82, 2.82, 2.82, 0]],
    ...         "frac_coords": [[0, 0, 0, 0.5, 0.5, 0.5]],
    ...         "charge": [[1, -1]],
    ...     }
    ... )
    >>> load_dataset(frame)["structure"][0].composition.reduced_formula
    'NaCl'
    """
    if isinstance(path_or_name, pd.DataFrame):
        frame, source = path_or_name, "the frame"
    elif isinstance(path_or_name, str | os.PathLike):
        path = _find(os.fspath(path_or_name), data_home)
        frame, source = pd.read_parquet(path), str(path)
    else:
        raise TypeError(
            "path_or_name must be a path, a name or a pandas DataFrame, "
            f"got {type(path_or_name).__name__}"
        )
    structures = pd.Series(_structures(frame, source), index=frame.index, dtype=object)
    read = ["structure"] if "structure" in frame else list(ARRAY_COLUMNS)
    return frame.drop(columns=read).assign(structure=structures)


def structures_from_frame(frame: pd.DataFrame) -> list[IStructure]:
    """Return the structure of every row of a frame.

    Parameters
    ----------
    frame : pandas.DataFrame
        With a column ``structure`` of pymatgen Structures (or their ``as_dict()``), or else with
        the columns ``numbers`` (n_sites atomic numbers), ``lattice`` (9 numbers, row vectors in
        Å) and ``frac_coords`` (3 n_sites numbers, flattened row by row).

    Returns
    -------
    list of pymatgen.core.Structure

    Raises
    ------
    TypeError
        If an item in the ``structure`` column is no Structure.
    ValueError
        If the structure columns are missing, or a row of them is malformed.

    Notes
    -----
    Only the layout is checked. Whether a structure is physically usable (ordered, finite, no atoms
    on top of each other) is for the featurizers to say, which can leave one bad row out.

    Examples
    --------
    >>> import pandas as pd
    >>> from ssl_matfeat.datasets import structures_from_frame
    >>> iron = {"numbers": [26], "lattice": [2.8, 0, 0, 0, 2.8, 0, 0, 0, 2.8],
    ...         "frac_coords": [0, 0, 0]}
    >>> len(structures_from_frame(pd.DataFrame([iron, iron])))
    2
    """
    return _structures(frame, "the frame")


def _find(path_or_name: str, data_home: str | os.PathLike[str] | None) -> Path:
    path = Path(path_or_name)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(
                f"no file {path} (current folder: {Path.cwd()}); check the path, or give a name "
                f"without .parquet to look it up in data_home"
            )
        return path
    home = data_home if data_home is not None else os.environ.get(DATA_HOME_VARIABLE)
    if home is None:
        raise FileNotFoundError(
            f"data set {path_or_name!r} is no .parquet path, and there is no folder to look it up "
            f"in; pass data_home=... or set the environment variable {DATA_HOME_VARIABLE}"
        )
    named = Path(home) / f"{path_or_name}.parquet"
    if not named.is_file():
        there = sorted(file.stem for file in Path(home).glob("*.parquet"))
        raise FileNotFoundError(
            f"data set {path_or_name!r}: no file {named}; "
            f"that folder has {', '.join(there) or 'no .parquet file'}"
        )
    return named


def _structures(frame: pd.DataFrame, source: str) -> list[IStructure]:
    if "structure" in frame:
        return [
            _as_structure(item, f"{source}, row {row}")
            for row, item in enumerate(frame["structure"])
        ]
    missing = [name for name in ARRAY_COLUMNS if name not in frame]
    if missing:
        raise ValueError(
            f"{source} has the columns {list(map(str, frame.columns))}, which name no crystals: "
            f"expected 'structure', or {', '.join(ARRAY_COLUMNS)} (missing: {', '.join(missing)}); "
            "rename the columns"
        )
    rows = zip(*(frame[name] for name in ARRAY_COLUMNS), strict=True)
    return [_from_arrays(*arrays, name=f"{source}, row {row}") for row, arrays in enumerate(rows)]


def _as_structure(item: object, name: str) -> IStructure:
    if isinstance(item, dict) and item.get("@class") == "Structure":
        try:
            return Structure.from_dict(item)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: column 'structure' holds the dict of a Structure that is damaged ({error!r}); repair or drop "
                "the row"
            ) from error
    if not isinstance(item, IStructure):
        raise TypeError(
            f"{name}: column 'structure' holds a {type(item).__name__}, not a pymatgen Structure; "
            "convert it first, e.g. with Structure.from_file(path), from_str(text, fmt='cif') or from_dict(d)"
        )
    return item


def _from_arrays(numbers: Any, lattice: Any, frac_coords: Any, *, name: str) -> Structure:
    given = {"numbers": numbers, "lattice": lattice, "frac_coords": frac_coords}
    arrays = {column: _as_numbers(value, f"{name}: {column}") for column, value in given.items()}
    n_sites = len(arrays["numbers"])
    if len(arrays["lattice"]) != 9:
        raise ValueError(f"{name}: lattice has {len(lattice)} numbers, not 9 (row vectors in Å)")
    if len(arrays["frac_coords"]) != 3 * n_sites:
        raise ValueError(
            f"{name}: frac_coords has {len(frac_coords)} numbers, not 3 for each of the "
            f"{n_sites} sites ({3 * n_sites}, flattened row by row)"
        )
    for z in arrays["numbers"]:
        if not (1 <= z <= MAX_Z and z == int(z)):
            raise ValueError(f"{name}: numbers holds {z:g}, no atomic number from 1 to {MAX_Z}")
    return Structure(
        arrays["lattice"].reshape(3, 3),
        arrays["numbers"].astype(int).tolist(),
        arrays["frac_coords"].reshape(n_sites, 3),
    )


def _as_numbers(value: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} holds {value!r}, which are no numbers: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"{name} holds {value!r}, not a list of numbers; repair or drop the row")
    return array
