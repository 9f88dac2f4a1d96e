"""The demo: cross-validated bulk moduli of the bundled crystals from hand-made, raw and learned features."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Structure
from sklearn.base import BaseEstimator, clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import RandomForestRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import mean_absolute_error
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from ssl_matfeat.blocks import RAW_BLOCKS
from ssl_matfeat.datasets import load_elastic
from ssl_matfeat.featurizers import SSLStructureFeaturizer

N_FOLDS = 5
MAGPIE = "Magpie + density + symmetry"
RAW = "SSL, raw channels alone"
SSL = "SSL"
BOTH = "SSL + Magpie"
RANDOM_FOREST = "random forest"
KERNEL_RIDGE = "kernel ridge"


@dataclass(frozen=True)
class Features:
    """A matrix of features and how long it took to compute."""

    values: np.ndarray
    """One row a crystal, (n_crystals, n_features)."""
    seconds: float

    def __add__(self, other: Features) -> Features:
        """Return the columns of both."""
        return Features(np.hstack([self.values, other.values]), self.seconds + other.seconds)


@dataclass(frozen=True)
class Score:
    """One row of the table."""

    features: str
    model: str
    mae: float
    """Mean over the folds of the mean absolute error, log10(GPa)."""
    mae_std: float
    """Standard deviation over the folds of the same."""
    n_features: int
    crystals_per_second: float | None
    """Speed of the featurization alone; None for the dummy, which has none."""


def run_demo(output: Path, *, n_crystals: int | None = None) -> str:
    """Score every set of features with every model, and write the table and a parity plot.

    Parameters
    ----------
    output : pathlib.Path
        Existing folder for ``demo.json`` (the table) and ``demo_parity.png``.
    n_crystals : int, optional
        Use only the first so many of the 1 181 crystals, for a quick look.

    Returns
    -------
    str
        The table in Markdown: mean absolute error of log10 of the bulk modulus in GPa over five
        folds, and crystals featurized a second.

    Examples
    --------
    >>> from pathlib import Path
    >>> from ssl_matfeat.demo import run_demo
    >>> print(run_demo(Path(".")))  # doctest: +SKIP
    """
    structures, y = load_elastic(return_X_y=True)
    structures, y = structures[:n_crystals], y[:n_crystals]
    features = _featurize(structures)
    scores, predictions = _cross_validate(features, y)
    rows = [asdict(score) for score in scores]
    report = {
        "data": f"elastic_2015, {len(y)} crystals",
        "target": "log10 of the bulk modulus K_VRH in GPa",
        "validation": f"KFold({N_FOLDS}, shuffle=True, random_state=0)",
        "rows": rows,
    }
    (output / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    _plot_parity(y, predictions, scores, output / "demo_parity.png")
    return markdown_table(rows)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of ``demo.json`` as a Markdown table.

    Parameters
    ----------
    rows : list of dict
        With the fields of :class:`Score`.

    Returns
    -------
    str

    Examples
    --------
    >>> from ssl_matfeat.demo import markdown_table
    >>> row = {"features": "SSL", "model": "kernel ridge", "n_features": 64, "mae": 0.0712,
    ...        "mae_std": 0.0051, "crystals_per_second": 812.3}
    >>> print(markdown_table([row]).splitlines()[-1])
    | SSL                         | kernel ridge  |         64 |  0.0712 ± 0.0051 |         812 |
    """
    lines = [
        f"| {'features':27} | {'model':13} | n_features | MAE, log10(GPa)  | crystals/s  |",
        f"| {'-' * 27} | {'-' * 13} | ---------: | ---------------: | ----------: |",
    ]
    for row in rows:
        error = f"{row['mae']:.4f} ± {row['mae_std']:.4f}"
        speed = row["crystals_per_second"]
        lines.append(
            f"| {row['features']:27} | {row['model']:13} | {row['n_features']:10} "
            f"| {error:>16} | {'' if speed is None else f'{speed:.0f}':>11} |"
        )
    return "\n".join(lines)


def _featurize(structures: list[Structure]) -> dict[str, Features]:
    magpie = _timed(_matminer_features, structures)
    raw = _timed(SSLStructureFeaturizer(layers=RAW_BLOCKS).fit_transform, structures)
    ssl = _timed(SSLStructureFeaturizer().fit_transform, structures)
    return {MAGPIE: magpie, RAW: raw, SSL: ssl, BOTH: ssl + magpie}


def _timed(featurize: Callable[[list[Structure]], np.ndarray], X: list[Structure]) -> Features:
    # A first call loads element tables and weights, which is no speed of the featurization.
    featurize(X[:2])
    start = time.perf_counter()
    values = featurize(X)
    return Features(values, time.perf_counter() - start)


def _matminer_features(structures: list[Structure]) -> np.ndarray:
    from matminer.featurizers.composition import ElementProperty
    from matminer.featurizers.structure import DensityFeatures, GlobalSymmetryFeatures

    elements = ElementProperty.from_preset("magpie", impute_nan=True)
    density = DensityFeatures()
    symmetry = GlobalSymmetryFeatures(
        ["spacegroup_num", "crystal_system_int", "is_centrosymmetric", "n_symmetry_ops"]
    )
    rows = [
        elements.featurize(s.composition) + density.featurize(s) + symmetry.featurize(s)
        for s in tqdm(structures, desc="matminer", unit="crystal", leave=False)
    ]
    return np.array(rows, dtype=float)


def _models(n_features: int) -> Iterator[tuple[str, BaseEstimator]]:
    forest = RandomForestRegressor(max_features=1 / 3, n_jobs=-1, random_state=0)
    yield RANDOM_FOREST, forest
    # Kernel ridge has no intercept, and squared distances grow with the number of features.
    ridge = TransformedTargetRegressor(
        make_pipeline(StandardScaler(), KernelRidge(kernel="rbf")), transformer=StandardScaler()
    )
    grid = {
        "regressor__kernelridge__alpha": [1e-4, 1e-3, 1e-2, 1e-1],
        "regressor__kernelridge__gamma": [factor / n_features for factor in (0.03, 0.1, 0.3)],
    }
    yield KERNEL_RIDGE, GridSearchCV(ridge, grid, cv=3, scoring="neg_mean_absolute_error")


def _cross_validate(
    features: dict[str, Features], y: np.ndarray
) -> tuple[list[Score], dict[tuple[str, str], np.ndarray]]:
    jobs: list[tuple[str, str, BaseEstimator]] = [("none", "mean", DummyRegressor())]
    for name, matrix in features.items():
        jobs += [(name, model, estimator) for model, estimator in _models(matrix.values.shape[1])]

    # Every feature is computed from one crystal alone, so only the models are fitted in the folds.
    no_features = np.zeros((len(y), 0))
    folds = list(KFold(N_FOLDS, shuffle=True, random_state=0).split(y))
    scores, predictions = [], {}
    with tqdm(total=len(jobs) * N_FOLDS, desc="cross-validation", unit="fold") as progress:
        for name, model, estimator in jobs:
            X = features[name].values if name in features else no_features
            predicted = np.empty_like(y)
            for train, test in folds:
                predicted[test] = clone(estimator).fit(X[train], y[train]).predict(X[test])
                progress.update()
            errors = [mean_absolute_error(y[test], predicted[test]) for _, test in folds]
            speed = len(y) / features[name].seconds if name in features else None
            scores.append(
                Score(
                    features=name,
                    model=model,
                    mae=float(np.mean(errors)),
                    mae_std=float(np.std(errors)),
                    n_features=X.shape[1],
                    crystals_per_second=speed,
                )
            )
            predictions[name, model] = predicted
    return scores, predictions


def _plot_parity(
    y: np.ndarray,
    predictions: dict[tuple[str, str], np.ndarray],
    scores: list[Score],
    path: Path,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="compressed")
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    limits = [y.min(), y.max()]
    for panel, name in zip(axes, (MAGPIE, SSL, BOTH), strict=True):
        best = min((s for s in scores if s.features == name), key=lambda score: score.mae)
        panel.plot(limits, limits, color="0.6", linewidth=1)
        panel.scatter(y, predictions[name, best.model], s=6, alpha=0.5, linewidths=0)
        panel.set(
            title=f"{name}\n{best.model}, MAE {best.mae:.3f}",
            xlabel="log10 K_VRH (GPa), reference",
            aspect="equal",
        )
    axes[0].set_ylabel("log10 K_VRH (GPa), predicted")
    figure.savefig(path, dpi=150)
