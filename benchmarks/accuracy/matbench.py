"""Matbench's structure tasks with its own folds: every feature set with every head.

    python benchmarks/accuracy/matbench.py --task phonons --features default --head ET

``--submission FOLDER`` also writes what the leaderboard wants, of one feature set and one head.
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from _features import MAGPIE, REFERENCE, STRUCTURAL, Features
from _heads import AVERAGES, HEADS
from _runner import (
    FOLDS,
    RESULTS,
    DataOption,
    FeaturesOption,
    FoldsOption,
    HeadOption,
    LimitOption,
    ResultsOption,
    SeedOption,
    TaskOption,
    predict,
    results_folder,
    run_cells,
)
from _tasks import DATA_HOME, Data, load_task
from sklearn.metrics import max_error, mean_absolute_error, root_mean_squared_error

from ssl_matfeat import __version__
from ssl_matfeat.featurizers import SSLStructureFeaturizer

TASKS = ["jdft2d", "phonons", "log_kvrh", "log_gvrh"]
ALL_HEADS = [*HEADS, *AVERAGES]
ROWS = ["dummy", REFERENCE, MAGPIE, STRUCTURAL, "soap", "default", f"default+{MAGPIE}"]
FORMAT_VERSION = "0.6"
"""Of the matbench package whose layout the files have."""


def main(
    task: TaskOption = TASKS,
    features: FeaturesOption = ROWS,
    head: HeadOption = ALL_HEADS,
    folds: FoldsOption = FOLDS,
    seed: SeedOption = 0,
    limit: LimitOption = None,
    data: DataOption = DATA_HOME,
    results: ResultsOption = RESULTS,
    submission: Annotated[
        Path | None, typer.Option(help="Folder for results.json.gz and info.json.")
    ] = None,
) -> None:
    """Score feature sets on Matbench's folds."""
    if submission and (len(features) > 1 or len(head) > 1 or set(folds) != set(FOLDS)):
        raise typer.BadParameter("a submission is of one feature set, one head and all five folds")
    recorded: dict[str, object] = {}
    for name in task:
        loaded = load_task(name, data, limit)
        for row in features:
            computed = run_cells(
                loaded,
                row,
                head,
                folds=folds,
                seed=seed,
                results=results_folder(results, data, limit),
                need_predictions=submission is not None,
            )
        if submission:
            recorded[f"matbench_{name}"] = _record(loaded, computed, head[0], seed)
    if submission:
        _write_submission(submission, recorded, features[0], head[0])


def _record(data: Data, features: Features, head: str, seed: int) -> dict[str, object]:
    """Return one task of a submission."""
    if len(data.ids) != data.n_published:
        raise typer.BadParameter(
            f"{data.task}: the leaderboard wants all rows, there are {data.rows}; see --data matminer"
        )
    recorded = {}
    for fold in FOLDS:
        _, test = data.splits[fold]
        y, predicted = data.y[test], predict(data, features, head, fold, seed).test
        counted = np.abs(y) > 1e-5  # as Matbench has it, for relative errors
        recorded[f"fold_{fold}"] = {
            "data": dict(zip([data.ids[i] for i in test], predicted.tolist(), strict=True)),
            "uncertainty": None,
            "parameters": {"features": "+".join(features.weights) or "none learned", "head": head},
            "scores": {
                "mae": mean_absolute_error(y, predicted),
                "rmse": root_mean_squared_error(y, predicted),
                "mape": float(np.mean(np.abs((y - predicted) / y)[counted])),
                "max_error": max_error(y, predicted),
            },
        }
    return {
        "@module": "matbench.task",
        "@class": "MatbenchTask",
        "benchmark_name": "matbench_v0.1",
        "dataset_name": f"matbench_{data.task}",
        "results": recorded,
    }


def _write_submission(folder: Path, tasks: dict[str, object], features: str, head: str) -> None:
    algorithm = f"ssl_matfeat {__version__}, {features}, {head}"
    benchmark = {
        "@module": "matbench.bench",
        "@class": "MatbenchBenchmark",
        "version": FORMAT_VERSION,
        "benchmark_name": "matbench_v0.1",
        "tasks": tasks,
        "user_metadata": {"algorithm": algorithm},
        "datestamp": datetime.datetime.now(tz=datetime.UTC).strftime("%Y.%m.%d %H:%M.%S"),
    }
    # Matbench refuses a file whose hash is not that of its sorted JSON.
    text = json.dumps(benchmark, sort_keys=True)
    benchmark["hash"] = hashlib.sha256(text.encode()).hexdigest()
    info = {
        "authors": "The ssl_matfeat developers",
        "algorithm": algorithm,
        "algorithm_long": f"Feature set {features!r} with the head {head!r} of ssl_matfeat's benchmarks; "
        "the features are frozen, nothing is tuned on test folds.",
        "bibtex_refs": SSLStructureFeaturizer().citations(),
        "notes": "",
        "requirements": {"python": [f"ssl-matfeat=={__version__}"]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "results.json.gz", "wt") as file:
        json.dump(benchmark, file)
    (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
