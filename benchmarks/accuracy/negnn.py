r"""NEGNN on Matbench's folds, and what its node inputs are worth; finished cells are skipped.

    python benchmarks/accuracy/negnn.py --task phonons --variant default
    python benchmarks/accuracy/negnn.py --task phonons --variant ssl --variant element --variant onehot \
        --labels 100 --labels 300 --labels 1000 --seed 0 --seed 1 --seed 2 --folds 0

Variants differ in what `VARIANTS` says and in nothing else; ``+features`` is the mean with what one of `FROZEN`,
chosen by inner folds, makes of the default features, as a ``VotingRegressor`` would have it.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from _features import (
    CACHE,
    NETWORKS_VERSION,
    changes,
    compute_features,
    is_outdated,
    network_changes,
)
from _published import PUBLISHED
from _runner import (
    FOLDS,
    DataOption,
    FoldsOption,
    LimitOption,
    TaskOption,
    predict,
    results_folder,
    split_rows,
    versions,
    write_report,
)
from _tasks import DATA_HOME, Data, load_task
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from tqdm import tqdm

from ssl_matfeat import __version__
from ssl_matfeat.negnn import NEGNNRegressor
from ssl_matfeat.weights import load_weights

RESULTS = Path(__file__).parents[1] / "results" / "negnn"
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "ensemble": {"n_ensemble": 5},
    "raw": {"node_features": "raw"},
    "raw-ensemble": {"node_features": "raw", "n_ensemble": 5},
    "ssl": {"node_features": "ssl"},
    "element": {"node_features": "element"},
    "onehot": {"node_features": "onehot"},
    "ssl-fine-tuned": {"node_features": "ssl", "fine_tune": True},
    "cgcnn": {"backbone": "cgcnn"},
}
"""Parameters that a variant changes."""
WITH_FEATURES = "+features"
FROZEN = ("HKR", "ET+HKR")
"""The heads of the runner for ``+features``."""
TASKS = ["jdft2d", "phonons"]
ROWS = ["default"]
SEEDS = [0]


@dataclass(frozen=True)
class Cell:
    """The scores of one variant on one test fold."""

    variant: str
    fold: str
    seed: int
    labels: int | None
    """How many training labels were used, if not all."""
    n_train: int
    n_test: int
    mae: float
    rmse: float
    r2: float
    parameters: dict[str, Any]
    """All of the estimator's."""
    seconds: float
    threads: int
    version: str
    """Of ssl_matfeat."""
    rank_correlation: float | None = None
    """Spearman's, of the error with the spread of an ensemble's members."""
    within_two_spreads: float | None = None
    """Part of the test rows whose error is below twice that spread: 0.95 if it were all of a normal error."""

    @property
    def key(self) -> tuple[str, str, int, int | None]:
        """Return what tells this cell from the others of its file."""
        return self.variant, self.fold, self.seed, self.labels


def main(
    task: TaskOption = TASKS,
    variant: Annotated[
        list[str], typer.Option("--variant", help=f"Of VARIANTS, also with {WITH_FEATURES}.")
    ] = ROWS,
    folds: FoldsOption = FOLDS,
    seed: Annotated[list[int], typer.Option("--seed")] = SEEDS,
    labels: Annotated[list[int] | None, typer.Option("--labels")] = None,
    limit: LimitOption = None,
    data: DataOption = DATA_HOME,
    results: Annotated[Path, typer.Option()] = RESULTS,
) -> None:
    """Score the cells that are missing, and print the means over folds and seeds."""
    folder = results_folder(results, data, limit, committed=RESULTS)
    for name in task:
        loaded = load_task(name, data, limit)
        counts: list[int | None] = list(labels) if labels else [None]
        path = folder / f"{name}.json"
        done = _read(path, loaded)
        wanted = [(v, f, s, n) for n in counts for f in folds for s in seed for v in variant]
        missing = [key for key in wanted if key not in done or _is_outdated(done[key])]
        for key in tqdm(missing, desc=name, unit="cell"):
            cell = _score(loaded, *key)
            done = {**_read(path, loaded), key: cell}  # others may have written meanwhile
            _write(path, loaded, list(done.values()))
        for v in variant:
            for n in counts:
                maes = [done[v, f, s, n].mae for f in folds for s in seed]
                typer.echo(
                    f"{name:22} {v:10} labels {n or 'all':>5}: MAE {np.mean(maes):.4g} ± {np.std(maes):.2g} "
                    f"{loaded.unit} over {len(maes)} cells"
                )
        typer.echo(f"{name:22} published: {PUBLISHED.get(name, {})}")


def last_changes(variant: str, node_features: str) -> tuple[str, ...]:
    """Return the versions of ssl_matfeat that changed a variant last."""
    beside = changes("default") if variant.endswith(WITH_FEATURES) else ()
    return (*network_changes(node_features), *beside)


def _is_outdated(cell: Cell) -> bool:
    return is_outdated(cell.version, last_changes(cell.variant, cell.parameters["node_features"]))


def _score(data: Data, variant: str, fold: str, seed: int, labels: int | None) -> Cell:
    train, test = split_rows(data, fold, seed, labels)
    found = _predict(data, variant.removesuffix(WITH_FEATURES), fold, seed, labels)
    predicted, seconds, calibration = found.mean, found.seconds, {}
    if variant.endswith(WITH_FEATURES):
        features = compute_features("default", data.X, data.key)
        heads = [predict(data, features, head, fold, seed, labels) for head in FROZEN]
        frozen = min(heads, key=lambda head: mean_absolute_error(data.y[train], head.inner))
        predicted, seconds = (predicted + frozen.test) / 2, seconds + frozen.seconds
    elif found.spread.any():
        error = np.abs(predicted - data.y[test])
        calibration["rank_correlation"] = float(spearmanr(error, found.spread).statistic)
        calibration["within_two_spreads"] = float(np.mean(error < 2 * found.spread))
    return Cell(
        variant=variant,
        fold=fold,
        seed=seed,
        labels=labels,
        n_train=len(train),
        n_test=len(test),
        mae=mean_absolute_error(data.y[test], predicted),
        rmse=root_mean_squared_error(data.y[test], predicted),
        r2=r2_score(data.y[test], predicted),
        parameters=_network(variant, seed).get_params(),
        seconds=round(seconds, 1),
        threads=torch.get_num_threads(),
        version=__version__,
        **calibration,
    )


class Predictions(NamedTuple):
    """What a network, or the members of an ensemble, predict of the test rows."""

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    """0 of a single network."""
    seconds: float


def _network(variant: str, seed: int) -> NEGNNRegressor:
    return NEGNNRegressor(random_state=seed, **VARIANTS[variant.removesuffix(WITH_FEATURES)])


def _predict(data: Data, variant: str, fold: str, seed: int, labels: int | None) -> Predictions:
    """Fit a variant, unless its predictions are in the cache."""
    model = _network(variant, seed)
    weights = load_weights(model.weights).sha256 if "ssl" in model.node_features else ""
    depends_on = (model.get_params(), weights, NETWORKS_VERSION)
    parameters = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
    name = f"negnn-{data.key}-{parameters}-{fold}-{labels or 'all'}.npz"
    path = CACHE / "predictions" / name
    if path.exists():
        stored = np.load(path)
        return Predictions(stored["mean"], stored["spread"], float(stored["seconds"]))
    start = time.perf_counter()
    train, test = split_rows(data, fold, seed, labels)
    model.fit([data.X[i] for i in train], data.y[train])
    test_X = [data.X[i] for i in test]
    if model.n_ensemble > 1:
        mean, spread = model.predict(test_X, return_std=True)
    else:
        mean = model.predict(test_X)
        spread = np.zeros_like(mean)
    found = Predictions(mean, spread, time.perf_counter() - start)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **found._asdict())
    return found


def _read(path: Path, data: Data) -> dict[tuple[str, str, int, int | None], Cell]:
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    if report["key"] != data.key:
        typer.echo(f"{path.name}: the data changed; scoring anew")
        return {}
    cells = [Cell(**cell) for cell in report["cells"]]
    return {cell.key: cell for cell in cells}


def _write(path: Path, data: Data, cells: list[Cell]) -> None:
    head = {
        "task": data.task,
        "unit": data.unit,
        "rows": data.rows,
        "key": data.key,
        "versions": versions(),
    }
    write_report(path, head, [asdict(cell) for cell in cells])


if __name__ == "__main__":
    typer.run(main)
