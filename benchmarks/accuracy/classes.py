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
from _features import MAGPIE, Features, changes, compute_features, is_current
from _runner import (
    FOLDS,
    DataOption,
    FeaturesOption,
    FoldsOption,
    HeadOption,
    results_folder,
    versions,
    write_report,
)
from _tasks import DATA_HOME, Split, hash_inputs
from mp_magmom import MAGNETIC, MAX_SITES, load_part
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

RESULT = Path(__file__).parents[1] / "results" / "classes.json"
STABLE = 0.03
"""eV/atom above the hull, up to which a crystal counts as stable."""
N_CRYSTALS = 2500
"""Of either part of mp_magmom."""
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
    data: str
    """Hash of structures and classes."""

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

    @property
    def key(self) -> str:
        """Return a hash of structures and classes."""
        return hash_inputs(self.X, self.y.tobytes())


def load_stable(data: str) -> Data:
    """Return the crystals of flla_2015, those on the hull or near it positive, in five folds."""
    frame = load_dataset("flla_2015", data_home=data)
    y = frame["e_above_hull"].to_numpy() <= STABLE
    return Data(frame["structure"].tolist(), y, dict(zip(FOLDS, _stratified(y), strict=True)))


def load_magnetic(data: str) -> Data:
    """Return random crystals of both parts of mp_magmom, those with a magnetic site positive.

    Fold k learns from four fifths of the training part and is scored on the fifth k of the test part.
    """
    parts = [load_part(data, split, N_CRYSTALS, seed=0) for split in ("train", "test")]
    loaded = pd.concat(parts, ignore_index=True)
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
        return self.predict(X) - 0.5


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
TASK_NAMES, HEAD_NAMES = ["stable", "magnetic"], list(HEADS)


def main(
    task: Annotated[list[str], typer.Option("--task")] = TASK_NAMES,
    features: FeaturesOption = ROWS,
    head: HeadOption = HEAD_NAMES,
    folds: FoldsOption = FOLDS,
    data: DataOption = DATA_HOME,
    result: Annotated[Path, typer.Option(help="The JSON file.")] = RESULT,
) -> None:
    """Score the cells that are missing."""
    result = results_folder(result.parent, data, None, committed=RESULT.parent) / result.name
    done = _read(result)
    for name in task:
        loaded = TASKS[name](data)
        for row in features:
            wanted = [(name, row, h, fold) for h in head for fold in folds]
            missing = [
                key for key in wanted if not is_current(done.get(key), loaded.key, changes(row))
            ]
            if not missing:
                continue
            found = compute_features(row, loaded.X, loaded.key)
            for key in tqdm(missing, desc=f"{name}, {row}", unit="cell"):
                done[key] = _score(key, found, loaded)
                _write(result, list(done.values()))


def _score(key: tuple[str, str, str, str], features: Features, data: Data) -> Cell:
    start = time.perf_counter()
    _, _, head, fold = key
    X, y = features.values, data.y
    train, test = data.splits[fold]
    model: Any = HEADS[head](features.block_sizes)
    target = y.astype(np.float64) if head == "MKR" else y
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
        data=data.key,
    )


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
