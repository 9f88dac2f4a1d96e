"""Runs cells, one a task, feature set, head, fold and seed, and keeps them as JSON; finished ones are skipped."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from _features import CACHE, Features, compute_features
from _heads import AVERAGES, ENSEMBLES, HEADS, inner_predictions
from _tasks import DATA_HOME, Data, Split, load_task
from numpy.typing import NDArray
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from tqdm import tqdm

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"
FOLDS = ["0", "1", "2", "3", "4"]
PACKAGES = ("ssl-matfeat", "matminer", "pymatgen", "scikit-learn", "numpy", "torch", "dscribe")

TaskOption = Annotated[list[str], typer.Option("--task", help="A task of _tasks.py; repeatable.")]
FeaturesOption = Annotated[
    list[str], typer.Option("--features", help="A feature set of _features.py; repeatable.")
]
HeadOption = Annotated[list[str], typer.Option("--head", help="A head of _heads.py; repeatable.")]
FoldsOption = Annotated[list[str], typer.Option("--folds", help="A fold, or 80/20; repeatable.")]
SeedOption = Annotated[int, typer.Option(help="Of trees and inner folds.")]
LimitOption = Annotated[
    int | None, typer.Option(help="Use only the first crystals, to test the script.")
]
DataOption = Annotated[
    str, typer.Option(help="Folder of the data sets, or 'matminer' to fetch Matbench's with it.")
]
ResultsOption = Annotated[Path, typer.Option(help="Folder of the JSON files.")]


@dataclass(frozen=True)
class Cell:
    """The scores of one head on one test fold."""

    head: str
    fold: str
    seed: int
    labels: int | None
    """How many training labels were used, if not all."""
    n_train: int
    n_test: int
    mae: float
    rmse: float
    r2: float
    inner_mae: float
    """On inner folds of the training data: what a head may be chosen by."""
    seconds: float
    """To fit, predict and score the inner folds."""

    @property
    def key(self) -> tuple[str, str, int, int | None]:
        """Return what tells this cell from the others of its file."""
        return self.head, self.fold, self.seed, self.labels


def run_cells(
    data: Data,
    name: str,
    heads: Sequence[str],
    *,
    folds: Sequence[str] = FOLDS,
    seed: int = 0,
    results: Path = RESULTS,
    labels: Sequence[int | None] = (None,),
    need_predictions: bool = False,
) -> Features:
    """Score heads on a feature set, but for cells that the results hold already.

    Parameters
    ----------
    data : Data
        The task.
    name : str
        Of the feature set.
    heads : sequence of str
        Of `HEADS`, `AVERAGES` and `ENSEMBLES`.
    folds : sequence of str
        Of ``data.splits``.
    seed : int
        Of trees, inner folds and the choice of fewer labels.
    results : Path
        Folder of the JSON files, one a task and feature set.
    labels : sequence of int or None
        How many labels of each training fold to use; None is all.
    need_predictions : bool
        Run a cell again if its predictions are no longer in the cache.

    Returns
    -------
    Features
    """
    features = compute_features(name, data.X, data.key)
    path = results / data.task / f"{name}.json"
    done = _read_cells(path, features)
    wanted = [(head, fold, seed, n) for n in labels for head in heads for fold in folds]
    missing = [
        key
        for key in wanted
        if key not in done or (need_predictions and not _predictions_path(features, *key).exists())
    ]
    for key in tqdm(missing, desc=f"{data.task}, {name}", unit="cell"):
        done[key] = _score(data, features, *key)
        _write_cells(path, data, name, features, list(done.values()))
    return features


def _score(
    data: Data, features: Features, head: str, fold: str, seed: int, labels: int | None
) -> Cell:
    train, test = split_rows(data, fold, seed, labels)
    found = predict(data, features, head, fold, seed, labels)
    return Cell(
        head=head,
        fold=fold,
        seed=seed,
        labels=labels,
        n_train=len(train),
        n_test=len(test),
        mae=mean_absolute_error(data.y[test], found.test),
        rmse=root_mean_squared_error(data.y[test], found.test),
        r2=r2_score(data.y[test], found.test),
        inner_mae=mean_absolute_error(data.y[train], found.inner),
        seconds=round(found.seconds, 2),
    )


class Predictions(NamedTuple):
    """What one head predicts on one fold."""

    test: NDArray[np.float64]
    """Of the test rows."""
    inner: NDArray[np.float64]
    """Of the training rows, from inner folds."""
    seconds: float
    """To fit, predict and score the inner folds."""


def predict(
    data: Data, features: Features, head: str, fold: str, seed: int, labels: int | None = None
) -> Predictions:
    """Fit a head, or several for an average, unless their predictions are in the cache."""
    path = _predictions_path(features, head, fold, seed, labels)
    if path.exists():
        stored = np.load(path)
        return Predictions(stored["test"], stored["inner"], float(stored["seconds"]))
    if head in AVERAGES:
        parts = [predict(data, features, part, fold, seed, labels) for part in AVERAGES[head]]
        found = Predictions(
            np.mean([part.test for part in parts], axis=0),
            np.mean([part.inner for part in parts], axis=0),
            sum(part.seconds for part in parts),
        )
    else:
        start = time.perf_counter()
        train, test = split_rows(data, fold, seed, labels)
        X, y = features.values[train], data.y[train]
        make = (HEADS | ENSEMBLES)[head]
        model = make(seed, features.block_sizes).fit(X, y)
        predicted = model.predict(features.values[test])
        inner = inner_predictions(model, X, y, seed)
        found = Predictions(predicted, inner, time.perf_counter() - start)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **found._asdict())
    return found


def split_rows(data: Data, fold: str, seed: int, labels: int | None) -> Split:
    """Return training and test rows of a fold, of the former only ``labels`` random ones if that is given."""
    train, test = data.splits[fold]
    return np.random.default_rng(seed).permutation(train)[:labels] if labels else train, test


def _predictions_path(
    features: Features, head: str, fold: str, seed: int, labels: int | None
) -> Path:
    key = f"{features.key}-{features.checksum:.5e}"  # other features of the same key are others' predictions
    name = f"{key}-{head}-{fold.replace('/', '-')}-{seed}-{labels or 'all'}.npz"
    return CACHE / "predictions" / name


def _read_cells(path: Path, features: Features) -> dict[tuple[str, str, int, int | None], Cell]:
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    same = report["key"] == features.key and np.isclose(
        report["checksum"], features.checksum, rtol=1e-6
    )
    if not same:
        typer.echo(f"{path.name}: data, weights or features changed; scoring anew")
        return {}
    cells = [Cell(**cell) for cell in report["cells"]]
    return {cell.key: cell for cell in cells}


def _write_cells(path: Path, data: Data, name: str, features: Features, cells: list[Cell]) -> None:
    head: dict[str, Any] = {
        "task": data.task,
        "unit": data.unit,
        "rows": data.rows,
        "features": name,
        "n_features": features.values.shape[1],
        "rows_with_nan": int(np.isnan(features.values).any(axis=1).sum()),
        "weights": features.weights,
        "key": features.key,
        "checksum": features.checksum,
        "versions": versions(),
    }
    write_report(path, head, [asdict(cell) for cell in cells])


def write_report(path: Path, head: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Write JSON with one line a cell, so that a diff shows which were added."""
    lines = ",\n".join(f"  {json.dumps(cell)}" for cell in cells)
    text = f'{json.dumps(head, indent=1)[:-2]},\n "cells": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)  # an interrupted run leaves no half file


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def results_folder(results: Path, data: str, limit: int | None, committed: Path = RESULTS) -> Path:
    """Return the folder for the JSON files: cut-down or other data never mix with the committed ones."""
    at_home = Path(data).resolve() == Path(DATA_HOME).resolve()
    if results != committed or (limit is None and at_home):
        return results
    return CACHE / "results" / committed.name / f"{Path(data).name}-{limit or 'all'}"


def table_command(
    tasks: list[str],
    rows: list[str],
    heads: list[str],
    splits: list[str] = FOLDS,
    labels: Sequence[int | None] = (None,),
) -> Callable[..., None]:
    """Return the command that scores a table, whose options cut it down.

    Parameters
    ----------
    tasks, rows, heads, splits : list of str
        What the whole table has.
    labels : sequence of int or None
        Numbers of training labels; None is all.

    Returns
    -------
    callable
        For ``typer.run``.
    """

    def command(
        task: TaskOption = tasks,
        features: FeaturesOption = rows,
        head: HeadOption = heads,
        folds: FoldsOption = splits,
        seed: SeedOption = 0,
        limit: LimitOption = None,
        data: DataOption = DATA_HOME,
        results: ResultsOption = RESULTS,
    ) -> None:
        folder = results_folder(results, data, limit)
        for name in task:
            loaded = load_task(name, data, limit)
            for row in features:
                run_cells(loaded, row, head, folds=folds, seed=seed, results=folder, labels=labels)

    return command
