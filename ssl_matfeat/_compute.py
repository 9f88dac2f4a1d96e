"""Structures → rows of features, in bounded batches and several processes; one bad structure loses only its row."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ssl_matfeat._validation import Crystal, StructureError, as_crystal
from ssl_matfeat.graph import CrystalBatch, CrystalGraphs, find_edges

if hasattr(os, "register_at_fork"):
    # A forked process, of matminer's pools for one, lacks the threads that torch would wait for, for ever.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

BatchFunction = Callable[[CrystalBatch], torch.Tensor]
"""Turns a batch into rows: one a site, or one a crystal."""

CHUNK = 256
"""Structures a piece of work: large enough to fill batches, small enough to show progress."""


def check_device(device: str, dtype: torch.dtype = torch.float64) -> None:
    """Raise a ValueError if torch cannot compute on ``device``, in the precision of raw channels or another."""
    try:
        torch.zeros(1, device=device, dtype=dtype).item()
    # What torch raises depends on its build and on the device.
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        reason = str(error).split(".")[0].splitlines()[0]
        raise ValueError(
            f"device={device!r} cannot be used ({reason}), and torch sees {torch.cuda.device_count()} CUDA devices; "
            "choose another, or 'cpu'"
        ) from error


def build_graphs(
    structures: Sequence[Any],
    names: Sequence[str],
    raise_errors: bool = True,
    read: Callable[[Any, str], Crystal] = as_crystal,
    dtype: type = np.float64,
) -> tuple[CrystalGraphs | None, NDArray[np.int64], dict[int, str]]:
    """Build the graphs of the good structures.

    Parameters
    ----------
    structures : sequence
        Items of X.
    names : sequence of str
        What messages call them.
    raise_errors : bool
        Raise the first error, instead of collecting them.
    read : callable
        Makes an item, by its name, a crystal.
    dtype : type
        Of the edge vectors.

    Returns
    -------
    graphs : CrystalGraphs or None
        Of the good structures; None if there is none.
    good : ndarray
        Their positions.
    errors : dict
        Position → message.
    """
    crystals, edges, good, errors = [], [], [], {}
    for position, (structure, name) in enumerate(zip(structures, names, strict=True)):
        try:
            crystal = read(structure, name)
            edges.append(find_edges(crystal, name=name))
        except (StructureError, TypeError) as error:
            if raise_errors:
                raise
            errors[position] = f"{type(error).__name__}: {error}"
        else:
            crystals.append(crystal)
            good.append(position)
    graphs = CrystalGraphs.from_edges(crystals, edges, dtype) if crystals else None
    return graphs, np.array(good, dtype=np.int64), errors


def compute_rows(
    structures: Sequence[Any],
    names: Sequence[str],
    function: BatchFunction,
    *,
    per_site: bool,
    max_edges: int,
    device: str,
    n_jobs: int | None,
    raise_errors: bool,
    progress: bool | dict[str, Any] = False,
) -> tuple[list[NDArray | None], NDArray[np.int64], dict[int, str]]:
    """Apply ``function`` to all structures.

    Parameters
    ----------
    structures : sequence
        Items of X.
    names : sequence of str
        What messages call them.
    function : callable
        Picklable, if ``n_jobs`` asks for other processes.
    per_site : bool
        Whether ``function`` gives a row a site, or a row a crystal.
    max_edges : int
        In a batch.
    device : str
        Of torch.
    n_jobs : int or None
        Processes, in joblib's words.
    raise_errors : bool
        Raise the first error, instead of collecting them.
    progress : bool or dict
        Show a bar; a dict holds options of tqdm.

    Returns
    -------
    rows : list
        One array a structure: its rows; None for a bad one.
    elements : ndarray
        The atomic numbers that occurred.
    errors : dict
        Position in X → message.
    """
    starts = range(0, len(structures), CHUNK)
    work = (
        joblib.delayed(_compute_chunk)(
            structures[start : start + CHUNK],
            names[start : start + CHUNK],
            function,
            per_site,
            max_edges,
            device,
            raise_errors,
        )
        for start in starts
    )
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator")
    rows: list[NDArray | None] = []
    elements: set[int] = set()
    errors: dict[int, str] = {}
    options = {
        "total": len(structures),
        "unit": "crystal",
        "disable": not (progress or isinstance(progress, dict)),
    }
    with tqdm(**options | (progress if isinstance(progress, dict) else {})) as bar:
        for chunk_rows, chunk_elements, chunk_errors in parallel(work):
            errors |= {len(rows) + i: text for i, text in chunk_errors.items()}
            rows += chunk_rows
            elements |= chunk_elements
            bar.update(len(chunk_rows))
    return rows, np.array(sorted(elements), dtype=np.int64), errors


def _compute_chunk(
    structures: Sequence[Any],
    names: Sequence[str],
    function: BatchFunction,
    per_site: bool,
    max_edges: int,
    device: str,
    raise_errors: bool,
) -> tuple[list[NDArray | None], set[int], dict[int, str]]:
    graphs, good, errors = build_graphs(structures, names, raise_errors)
    rows: list[NDArray | None] = [None] * len(structures)
    if graphs is None:
        return rows, set(), errors
    for crystals in graphs.batches(max_edges):
        with torch.inference_mode():
            output = function(graphs.batch(crystals).to(device)).cpu().numpy()
        n_rows = graphs.n_sites[crystals] if per_site else np.ones_like(crystals)
        for crystal, piece in zip(crystals, np.split(output, np.cumsum(n_rows)[:-1]), strict=True):
            rows[good[crystal]] = piece
    return rows, set(graphs.numbers.tolist()), errors
