"""The tasks: crystals, target and the splits that every feature set and every head is scored on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pymatgen.core import Structure
from sklearn.model_selection import GroupKFold, KFold, train_test_split

from ssl_matfeat.datasets import load_dataset, load_elastic

Inputs = Sequence[Structure] | Sequence[tuple[Structure, int]]
"""Crystals, or sites of crystals."""
Split = tuple[NDArray[np.int64], NDArray[np.int64]]
HOLDOUT = "80/20"
"""Name of the paper's split: 80 % for training and tuning, 20 % for the test."""
DATA_HOME = os.environ.get("SSL_MATFEAT_DATA") or str(Path(__file__).parents[3] / "shared" / "data")


@dataclass(frozen=True)
class Task:
    """Where a target stands, and how it was published."""

    dataset: str
    target: str
    unit: str
    n_published: int
    structures: str = ""
    """Said wherever the numbers stand, if the structures are not the published ones."""
    matminer: tuple[str, str] | None = None
    """Name and target of the full set in matminer's ``load_dataset``."""
    of_sites: bool = False
    """The target belongs to some sites of each crystal, which the column ``site_index`` names."""


_LATER = "structures of 2025"
TASKS = {
    "elastic": Task("elastic_2015", "K_VRH", "log10 GPa", 1181),
    "flla": Task("flla_2015", "formation_energy_per_atom", "eV/atom", 3938),
    "phonons": Task(
        "matbench_phonons",
        "last_phdos_peak",
        "1/cm",
        1265,
        matminer=("matbench_phonons", "last phdos peak"),
    ),
    "jdft2d": Task(
        "matbench_jdft2d",
        "exfoliation_en",
        "meV/atom",
        636,
        matminer=("matbench_jdft2d", "exfoliation_en"),
    ),
    "log_kvrh": Task(
        "matbench_log_kvrh_mp2025",
        "log10_k_vrh",
        "log10 GPa",
        10987,
        _LATER,
        ("matbench_log_kvrh", "log10(K_VRH)"),
    ),
    "log_gvrh": Task(
        "matbench_log_gvrh_mp2025",
        "log10_g_vrh",
        "log10 GPa",
        10987,
        _LATER,
        ("matbench_log_gvrh", "log10(G_VRH)"),
    ),
    "paper_bulk_modulus": Task("paper_bulk_modulus", "log10_k_vrh", "log10 GPa", 3203, _LATER),
    "paper_shear_modulus": Task("paper_shear_modulus", "log10_g_vrh", "log10 GPa", 3203, _LATER),
    "paper_formation_energy": Task(
        "paper_formation_energy", "e_form_per_atom", "eV/atom", 4000, _LATER
    ),
    "paper_site_moments": Task("paper_site_moments", "moment", "µB", 1775, of_sites=True),
}


@dataclass(frozen=True)
class Data:
    """One task, loaded."""

    task: str
    unit: str
    rows: str
    """How many of the published rows, and of what year the structures are."""
    n_published: int
    ids: list[str]
    X: Inputs
    y: NDArray[np.float64]
    splits: dict[str, Split]
    """Five folds "0" to "4", and `HOLDOUT`."""
    key: str
    """Hash of structures and target."""


def load_task(name: str, data: str = DATA_HOME, limit: int | None = None) -> Data:
    """Load a task and its splits.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    data : str
        Folder of the parquet files, or ``"matminer"`` to fetch the full Matbench set through matminer.
    limit : int, optional
        Use only the first so many crystals, for a test of the script.

    Returns
    -------
    Data
    """
    task = TASKS[name]
    frame = _load_frame(task, data).iloc[:limit]
    X: Inputs = frame["structure"].tolist()
    if task.of_sites:
        X = list(zip(frame["structure"], frame["site_index"], strict=True))
    y = frame["target"].to_numpy(dtype=np.float64)
    rows = f"{len(frame)} of {task.n_published}"
    return Data(
        task=name,
        unit=task.unit,
        rows=f"{rows}, {task.structures}" if task.structures and data != "matminer" else rows,
        n_published=task.n_published,
        ids=frame["id"].astype(str).tolist(),
        X=X,
        y=y,
        splits=_splits(frame),
        key=hash_inputs(X, y.tobytes()),
    )


def _load_frame(task: Task, data: str) -> pd.DataFrame:
    if task.dataset == "elastic_2015":
        frame = load_elastic()
        return frame.assign(target=np.log10(frame["K_VRH"]))
    if data == "matminer":
        return _load_matminer(task)
    frame = load_dataset(task.dataset, data_home=data)
    frame = frame.rename(columns={task.target: "target"})
    if task.of_sites:
        frame = frame.explode(["site_index", "target"], ignore_index=True)
    return frame


def _load_matminer(task: Task) -> pd.DataFrame:
    from matminer.datasets import load_dataset as fetch

    if task.matminer is None:
        raise ValueError(f"{task.dataset} is not one of matminer's data sets")
    name, target = task.matminer
    frame = fetch(name).rename(columns={target: "target"})
    width = len(str(len(frame)))
    prefix = name.replace("matbench_", "mb-").replace("_", "-")
    frame["id"] = [f"{prefix}-{i:0{width}}" for i in range(1, len(frame) + 1)]
    frame["test_fold"] = -1
    # How Matbench v0.1 defines its folds.
    for fold, (_, test) in enumerate(KFold(5, shuffle=True, random_state=18012019).split(frame)):
        frame.loc[test, "test_fold"] = fold
    return frame


def _splits(frame: pd.DataFrame) -> dict[str, Split]:
    rows = np.arange(len(frame))
    if "test_fold" in frame:
        fold_of = frame["test_fold"].to_numpy()
        folds = [(rows[fold_of != k], rows[fold_of == k]) for k in range(5)]
    elif "site_index" in frame:
        # Sites of one crystal stay together: they are too much alike.
        grouped = GroupKFold(5, shuffle=True, random_state=0)
        folds = list(grouped.split(rows, groups=frame["id"]))
    else:
        folds = list(KFold(5, shuffle=True, random_state=0).split(rows))
    splits = {str(k): fold for k, fold in enumerate(folds)}
    train, test = train_test_split(rows, test_size=0.2, random_state=0)
    return {**splits, HOLDOUT: (train, test)}


def hash_inputs(X: Inputs, start: bytes = b"") -> str:
    """Return a hash of crystals, or of sites of crystals, that goes on from ``start``."""
    digest = hashlib.sha256(start)
    for item in X:
        structure, site = item if isinstance(item, tuple) else (item, None)
        if site is not None:
            digest.update(np.int64(site).tobytes())
        digest.update(np.array(structure.atomic_numbers).tobytes())
        digest.update(np.ascontiguousarray(structure.lattice.matrix).tobytes())
        digest.update(np.ascontiguousarray(structure.frac_coords).tobytes())
    return digest.hexdigest()[:16]
