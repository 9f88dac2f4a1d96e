"""Structures to pretrain on → graphs: from a list, or from a parquet file too large for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import ArrowInvalid

from ssl_matfeat._compute import build_graphs
from ssl_matfeat._validation import (
    ARRAY_COLUMNS,
    Crystal,
    crystal_from_arrays,
    item_names,
)
from ssl_matfeat.elements import PROPERTIES, property_table
from ssl_matfeat.graph import CrystalGraphs


def read_list(structures: list[Any]) -> tuple[CrystalGraphs, dict[int, str]]:
    """Return the graphs of the usable structures, and position → message of the others."""
    graphs, _, errors = build_graphs(structures, item_names(structures), raise_errors=False)
    if graphs is None:
        raise ValueError(f"none of {len(structures)} structures is usable; the first: {errors[0]}")
    return graphs, errors


def read_parquet(path: Path) -> tuple[CrystalGraphs, NDArray[np.bool_] | None, dict[int, str]]:
    """Return the graphs of a file's usable rows, and row → message of the others.

    In between stands which graphs are for validation, or None if the file does not say.
    """
    try:
        present = pq.ParquetDataset(path).schema.names
    except ArrowInvalid as error:
        raise ValueError(
            f"{path} is no parquet file with columns {', '.join(ARRAY_COLUMNS)}; the guide to pretraining shows how to "
            f"write one from structures ({error})"
        ) from error
    columns = [name for name in (*ARRAY_COLUMNS, "split") if name in present]
    frame = pq.read_table(path, columns=columns).to_pandas(ignore_metadata=True)  # rows from 0
    missing = [name for name in ARRAY_COLUMNS if name not in frame]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; needed are {', '.join(ARRAY_COLUMNS)}, see load_dataset"
        )
    has_split = "split" in frame
    if has_split:
        known = frame["split"].isin(["pretrain", "validation"])
        if not known.any():
            found = ", ".join(map(repr, frame["split"].unique()[:5]))
            raise ValueError(
                f"{path}: its column split holds {found}, but rows to use are marked 'pretrain' or 'validation'; "
                "rename them, or drop the column for a random part to validate on"
            )
        frame = frame[known]
    rows = list(zip(*(frame[name] for name in ARRAY_COLUMNS), strict=True))
    names = [f"row {row}" for row in frame.index]
    graphs, good, errors = build_graphs(rows, names, False, _read_row, np.float32)
    if graphs is None:
        raise ValueError(
            f"{path}: none of {len(frame)} structures is usable; the first: {errors[0]}"
        )
    validating = (frame["split"].iloc[good] == "validation").to_numpy() if has_split else None
    return graphs, validating, {int(frame.index[i]): text for i, text in errors.items()}


def expansion(graphs: CrystalGraphs) -> NDArray[np.float64]:
    """Return the volume of each crystal, over that of its atoms in the ground states of the elements, (n_crystals,).

    That is 1 over the channel ``elemental packing``, which needs a batch of few.
    """
    of_element = property_table()[:, PROPERTIES.index("GSvolume_pa")]
    of_atoms = np.add.reduceat(of_element[graphs.numbers], graphs.site_start[:-1])
    return np.abs(np.linalg.det(graphs.lattice)) / of_atoms


def _read_row(row: tuple[Any, Any, Any], name: str) -> Crystal:
    return crystal_from_arrays(*row, name)
