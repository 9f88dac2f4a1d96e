"""Moments of all sites of random crystals of mp_magmom, |m| in µB: a mean per element, trees on site features, NEGNN.

    python benchmarks/accuracy/mp_magmom.py --model "element mean" --model "site features, ET"

Learned from crystals of the file's training part and scored on its test part; finished models are skipped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from _features import changes, is_current, network_changes
from _runner import DataOption, SeedOption, results_folder, versions, write_report
from _tasks import DATA_HOME, hash_inputs
from numpy.typing import NDArray
from pymatgen.core import Structure
from sklearn.ensemble import ExtraTreesRegressor
from tqdm import tqdm

from ssl_matfeat import __version__
from ssl_matfeat._validation import MAX_ATOMIC_NUMBER
from ssl_matfeat.datasets import load_dataset
from ssl_matfeat.featurizers import SSLAtomFeaturizer
from ssl_matfeat.negnn import NEGNNRegressor

RESULT = Path(__file__).parents[1] / "results" / "mp_magmom.json"
MAX_SITES = 60
"""Of a crystal: the largest cost most."""
MAGNETIC = 0.5
"""µB, from which on a site counts as magnetic: most sites are not, and a model that says 0 is right on these."""
Moments = list[NDArray[np.float64]]
"""One array a crystal."""


@dataclass(frozen=True)
class Cell:
    """The scores of one model on the sites of the test crystals."""

    model: str
    seed: int
    n_train: int
    """Crystals."""
    n_test: int
    n_test_sites: int
    mae: float
    """µB."""
    mae_magnetic: float
    """On sites of at least `MAGNETIC`."""
    seconds: float
    version: str
    """Of ssl_matfeat."""
    data: str
    """Hash of structures and moments."""

    @property
    def key(self) -> tuple[str, int, int, int]:
        """Return what tells this cell from the others."""
        return self.model, self.seed, self.n_train, self.n_test


def element_mean(
    X: list[Structure], y: Moments, X_test: list[Structure], seed: int
) -> NDArray[np.float64]:
    """Predict the mean moment of the element over the training sites."""
    numbers = np.concatenate([s.atomic_numbers for s in X])
    known = np.concatenate(y)
    means = np.full(MAX_ATOMIC_NUMBER + 1, known.mean())  # of elements that were not seen
    for z in np.unique(numbers):
        means[z] = known[numbers == z].mean()
    return means[np.concatenate([s.atomic_numbers for s in X_test])]


def site_trees(
    X: list[Structure], y: Moments, X_test: list[Structure], seed: int
) -> NDArray[np.float64]:
    """Fit extra trees to the default features of the sites."""
    trees = ExtraTreesRegressor(200, max_features=1 / 3, n_jobs=-1, random_state=seed)
    featurizer = SSLAtomFeaturizer().fit(X)
    return trees.fit(featurizer.transform(X), np.concatenate(y)).predict(
        featurizer.transform(X_test)
    )


def network(node_features: str) -> Callable[..., NDArray[np.float64]]:
    """Return what fits a network with these inputs."""

    def fit_predict(
        X: list[Structure], y: Moments, X_test: list[Structure], seed: int
    ) -> NDArray[np.float64]:
        model = NEGNNRegressor(node_features, target="site", random_state=seed)
        return np.concatenate(model.fit(X, y).predict(X_test))

    return fit_predict


MODELS: dict[str, Callable[..., NDArray[np.float64]]] = {
    "element mean": element_mean,
    "site features, ET": site_trees,
    "NEGNN, raw": network("raw"),
    "NEGNN, ssl+raw": network("ssl+raw"),
    "NEGNN, element": network("element"),
}
ROWS = list(MODELS)


def last_changes(model: str) -> tuple[str, ...]:
    """Return the versions of ssl_matfeat that changed a model last."""
    name, _, node_features = model.partition(", ")
    if name == "NEGNN":
        return network_changes(node_features)
    return changes("site-default") if name == "site features" else ()


def load_part(data: str, split: str, n: int, seed: int) -> pd.DataFrame:
    """Return random crystals of the training or test part, of at most `MAX_SITES` sites."""
    frame = pd.read_parquet(Path(data) / "mp_magmom.parquet")
    frame = frame[(frame["split"] == split) & (frame["magmom"].map(len) <= MAX_SITES)]
    return load_dataset(frame.sample(n, random_state=seed))


def main(
    model: Annotated[list[str], typer.Option("--model")] = ROWS,
    n_train: Annotated[int, typer.Option(help="Random crystals of the training part.")] = 1000,
    n_test: Annotated[int, typer.Option(help="Random crystals of the test part.")] = 1000,
    seed: SeedOption = 0,
    data: DataOption = DATA_HOME,
    result: Annotated[Path, typer.Option(help="The JSON file.")] = RESULT,
) -> None:
    """Score the models that are missing."""
    result = results_folder(result.parent, data, None, committed=RESULT.parent) / result.name
    done: dict[tuple[str, int, int, int], Cell] = {}
    if result.exists():
        cells = [Cell(**cell) for cell in json.loads(result.read_text())["cells"]]
        done = {cell.key: cell for cell in cells}
    parts = []
    for split, n in (("train", n_train), ("test", n_test)):
        part = load_part(data, split, n, seed)
        parts += [part["structure"].tolist(), [np.abs(m) for m in part["magmom"]]]
    X, y, X_test, y_test = parts
    actual = np.concatenate(y_test)
    data_key = hash_inputs([*X, *X_test], np.concatenate([*y, actual]).tobytes())
    for name in tqdm(model, unit="model"):
        key = name, seed, n_train, n_test
        if is_current(done.get(key), data_key, last_changes(name)):
            continue
        start = time.perf_counter()
        error = np.abs(MODELS[name](X, y, X_test, seed) - actual)
        cell = Cell(
            model=name,
            seed=seed,
            n_train=n_train,
            n_test=n_test,
            n_test_sites=len(actual),
            mae=float(error.mean()),
            mae_magnetic=float(error[actual >= MAGNETIC].mean()),
            seconds=round(time.perf_counter() - start, 1),
            version=__version__,
            data=data_key,
        )
        done[cell.key] = cell
        head: dict[str, Any] = {
            "task": "mp_magmom",
            "unit": "µB",
            "rows": f"crystals of at most {MAX_SITES} sites",
            "versions": versions(),
        }
        write_report(result, head, [asdict(cell) for cell in done.values()])
    for cell in done.values():
        typer.echo(
            f"{cell.model:20} {cell.n_train} crystals: {cell.mae:.3f} µB, magnetic {cell.mae_magnetic:.3f} µB"
        )


if __name__ == "__main__":
    typer.run(main)
