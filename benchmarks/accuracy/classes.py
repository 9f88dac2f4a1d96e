"""Classes of crystals: which are magnetic (mp_magmom), which are stable (flla_2015); finished cells are skipped.

    python benchmarks/accuracy/classes.py --task stable --features default --head SVC

Scores are areas under the receiver operating characteristic (AUC) and balanced accuracies over five folds. Those of
mp_magmom learn from random crystals of its training part and are scored on its test part, whose formulas the weights
have never seen.
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
from _features import FEATURES_VERSION, MAGPIE, NETWORKS_VERSION, compute_features, is_outdated
from _runner import DataOption, FeaturesOption, FoldsOption, HeadOption, versions, write_report
from _tasks import DATA_HOME, Split, hash_inputs
from mp_magmom import MAGNETIC, MAX_SITES
from numpy.typing import NDArray
from pymatgen.core import Structure
from sklearn.base import BaseEstimator
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from tqdm import tqdm

from ssl_matfeat import __version__
from ssl_matfeat.block_kernel import BlockKernelRidge
from ssl_matfeat.datasets import load_dataset, load_elastic
from ssl_matfeat.negnn import NEGNNClassifier

RESULT = Path(__file__).parents[1] / "results" / "classes.json"
STABLE = 0.03
"""eV/atom above the hull, up to which a crystal counts as stable."""
N_CRYSTALS = 2500
"""Of either part of mp_magmom."""
STRUCTURES = "structures"
"""In place of features, for heads that take crystals as they are."""
FOLDS = ["0", "1", "2", "3", "4"]
ROWS = [MAGPIE, "raw", "default"]
Labels = NDArray[np.bool_]


@dataclass(frozen=True)
class Cell:
    """The scores of one head on one fold."""

    task: str
    features: str
    head: str
    fold: str
    n_train: int
    n_test: int
    share: float
    """Of the positive class among the test rows."""
    auc: float
    balanced_accuracy: float
    seconds: float
    version: str
    """Of ssl_matfeat."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return what tells this cell from the others."""
        return self.task, self.features, self.head, self.fold


@dataclass(frozen=True)
class Data:
    """One task, loaded."""

    X: list[Structure]
    y: Labels
    splits: dict[str, Split]


def load_stable(data: str) -> Data:
    """Return the crystals of flla_2015, those on the hull or near it positive, in five folds."""
    frame = load_dataset("flla_2015", data_home=data)
    y = frame["e_above_hull"].to_numpy() <= STABLE
    return Data(frame["structure"].tolist(), y, dict(zip(FOLDS, _stratified(y), strict=True)))


def load_magnetic(data: str) -> Data:
    """Return random crystals of both parts of mp_magmom, those with a magnetic site positive.

    Fold k learns from four fifths of the training part and is scored on the fifth k of the test part.
    """
    frame = pd.read_parquet(Path(data) / "mp_magmom.parquet")
    frame = frame[frame["magmom"].map(len) <= MAX_SITES]
    parts = [
        frame[frame["split"] == s].sample(N_CRYSTALS, random_state=0) for s in ("train", "test")
    ]
    loaded = load_dataset(pd.concat(parts, ignore_index=True))
    y = np.array([np.abs(moments).max() >= MAGNETIC for moments in loaded["magmom"]])
    train, test = (_stratified(part) for part in np.split(y, [N_CRYSTALS]))
    splits = {fold: (train[k][0], N_CRYSTALS + test[k][1]) for k, fold in enumerate(FOLDS)}
    return Data(loaded["structure"].tolist(), y, splits)


def load_stiff(data: str) -> Data:
    """Return the bundled crystals, those with a bulk modulus above the median positive: for a trial without data."""
    frame = load_elastic()
    y = (frame["K_VRH"] > frame["K_VRH"].median()).to_numpy()
    return Data(frame["structure"].tolist(), y, dict(zip(FOLDS, _stratified(y), strict=True)))


def _stratified(y: Labels) -> list[Split]:
    return list(StratifiedKFold(len(FOLDS), shuffle=True, random_state=0).split(y, y))


TASKS: dict[str, Callable[[str], Data]] = {
    "stable": load_stable,
    "magnetic": load_magnetic,
    "stiff": load_stiff,
}


class KernelClassifier(BlockKernelRidge):
    """`BlockKernelRidge` of 0 and 1, with a decision function whose sign is the class."""

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Return the prediction, less a half."""
        return super().predict(X) - 0.5


def _support_vectors(_: tuple[int, ...]) -> BaseEstimator:
    search = GridSearchCV(SVC(), {"C": [1.0, 10.0, 100.0]}, scoring="roc_auc", cv=3)
    return make_pipeline(SimpleImputer(), StandardScaler(), search)


HEADS: dict[str, Callable[[tuple[int, ...]], BaseEstimator]] = {
    "RF": lambda _: make_pipeline(SimpleImputer(), RandomForestClassifier(500, random_state=0)),
    "ET": lambda _: make_pipeline(SimpleImputer(), ExtraTreesClassifier(500, random_state=0)),
    "SVC": _support_vectors,
    "MKR": lambda sizes: make_pipeline(
        SimpleImputer(), StandardScaler(), KernelClassifier(sizes, loss="squared")
    ),
}
"""Name → unfitted model, of the sizes of the feature set's blocks."""
NETWORK = "NEGNN"
TASK_NAMES, HEAD_NAMES = ["stable", "magnetic"], list(HEADS)


def main(
    task: Annotated[list[str], typer.Option("--task")] = TASK_NAMES,
    features: FeaturesOption = ROWS,
    head: HeadOption = HEAD_NAMES,
    folds: FoldsOption = FOLDS,
    data: DataOption = DATA_HOME,
    result: Annotated[Path, typer.Option(help="The JSON file.")] = RESULT,
) -> None:
    """Score the cells that are missing; ``--features structures --head NEGNN`` is the graph network."""
    done = _read(result)
    for name in task:
        loaded = TASKS[name](data)
        for row in features:
            wanted = [(name, row, h, fold) for h in head for fold in folds]
            missing = [key for key in wanted if key not in done or _is_outdated(done[key])]
            if not missing:
                continue
            X, sizes = _inputs(loaded, row)
            for key in tqdm(missing, desc=f"{name}, {row}", unit="cell"):
                _, _, h, fold = key
                model = NEGNNClassifier(random_state=0) if h == NETWORK else HEADS[h](sizes)
                done[key] = _score(key, model, X, loaded.y, loaded.splits[fold])
                _write(result, list(done.values()))


def _inputs(data: Data, features: str) -> tuple[NDArray[Any], tuple[int, ...]]:
    if features == STRUCTURES:
        X = np.empty(len(data.X), dtype=object)
        X[:] = data.X
        return X, ()
    found = compute_features(features, data.X, hash_inputs(data.X))
    return found.values, found.block_sizes


def _score(
    key: tuple[str, str, str, str], model: Any, X: NDArray[Any], y: Labels, split: Split
) -> Cell:
    start = time.perf_counter()
    train, test = split
    target = y.astype(np.float64) if key[2] == "MKR" else y
    model.fit(X[train], target[train])
    if hasattr(model, "decision_function"):
        score, threshold = model.decision_function(X[test]), 0.0
    else:
        score, threshold = model.predict_proba(X[test])[:, 1], 0.5
    return Cell(
        *key,
        n_train=len(train),
        n_test=len(test),
        share=float(y[test].mean()),
        auc=float(roc_auc_score(y[test], score)),
        balanced_accuracy=float(balanced_accuracy_score(y[test], score > threshold)),
        seconds=round(time.perf_counter() - start, 1),
        version=__version__,
    )


def _is_outdated(cell: Cell) -> bool:
    change = NETWORKS_VERSION if cell.head == NETWORK else FEATURES_VERSION
    return is_outdated(cell.version, change)


def _read(path: Path) -> dict[tuple[str, str, str, str], Cell]:
    if not path.exists():
        return {}
    cells = [Cell(**cell) for cell in json.loads(path.read_text())["cells"]]
    return {cell.key: cell for cell in cells}


def _write(path: Path, cells: list[Cell]) -> None:
    head = {
        "stable": f"flla_2015, at most {STABLE} eV/atom above the hull",
        "magnetic": f"mp_magmom, at most {MAX_SITES} sites, one of them of at least {MAGNETIC} µB",
        "versions": versions(),
    }
    write_report(path, head, [asdict(cell) for cell in cells])


if __name__ == "__main__":
    typer.run(main)
