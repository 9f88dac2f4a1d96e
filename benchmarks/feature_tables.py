"""The tables of feature sets and heads, for render.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import leakage
import learning_curves
import matbench
import numpy as np
import representation
from _features import REFERENCE
from _published import PUBLISHED, SOURCES
from _runner import FOLDS
from _tasks import HOLDOUT, TASKS
from numpy.typing import NDArray
from tables import csv_table, number, with_spread

CHOSEN = "chosen"
"""For each fold the head that did best on inner folds of its training data."""

Report = dict[str, Any]
Reports = dict[tuple[str, str], Report]
"""(task, feature set) → report."""


def load_reports(folder: Path) -> Reports:
    """Return all results of the accuracy benchmarks."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
    return {(report["task"], report["features"]): report for report in reports}


def fold_maes(
    report: Report | None,
    head: str,
    heads: Iterable[str] = representation.HEADS,
    labels: int | None = None,
    folds: Sequence[str] = FOLDS,
) -> NDArray[np.float64] | None:
    """Return the mean absolute error of each fold, or None if the table is not finished.

    Parameters
    ----------
    report : dict or None
        Of one task and feature set.
    head : str
        A head, or `CHOSEN`.
    heads : iterable of str
        Those that `CHOSEN` chooses from, as far as they have been run on all folds.
    labels : int or None
        Training labels; None is all.
    folds : sequence of str
        The paper's split instead of the five folds, for instance.
    """
    if report is None:
        return None
    cells = {
        (cell["head"], cell["fold"]): cell
        for cell in report["cells"]
        if cell["seed"] == 0 and cell["labels"] == labels
    }
    wanted = list(heads) if head == CHOSEN else [head]
    finished = [h for h in wanted if all((h, fold) in cells for fold in folds)]
    if not finished:
        return None
    found = [[cells[h, fold] for h in finished] for fold in folds]
    best = [min(row, key=lambda cell: cell["inner_mae"]) for row in found]
    return np.array([cell["mae"] for cell in best])


def coverage_table(reports: Reports) -> str:
    """Return a list of the tasks: unit, rows."""
    found = {task: report for (task, _), report in reports.items()}
    return csv_table(
        ["task", "unit of the error", "rows"],
        [[task, report["unit"], report["rows"]] for task, report in sorted(found.items())],
    )


def representation_table(reports: Reports, head: str) -> str:
    """Return mean ± standard deviation over the folds, feature sets down and tasks across."""
    tasks = [t for t in representation.TASKS if any(task == t for task, _ in reports)]
    rows = []
    for name in representation.ROWS:
        found = [reports.get((task, name)) for task in tasks]
        cells = [with_spread(fold_maes(r, head), r["unit"]) if r else "" for r in found]
        if any(cells):
            rows.append([name, *cells])
    return csv_table(["features", *tasks], rows)


def differences_table(
    reports: Reports, tasks: Sequence[str], row: str = "default", base: str = "raw"
) -> str:
    """Return the error of ``row`` minus that of ``base``, paired over the folds, and a verdict."""
    rows = []
    for task in tasks:
        cells = []
        for head in (*representation.HEADS, CHOSEN):
            ours = fold_maes(reports.get((task, row)), head)
            theirs = fold_maes(reports.get((task, base)), head)
            if ours is None or theirs is None:
                cells.append("")
                continue
            change = ours - theirs
            error = change.std(ddof=1) / np.sqrt(len(change))
            verdict = "better" if change.mean() < 0 else "worse"
            if abs(change.mean()) < 2 * error:
                verdict = "within the noise"
            sign, unit = "-" if change.mean() < 0 else "+", TASKS[task].unit
            size = f"{sign}{number(abs(change.mean()), unit)} ± {number(error, unit)}"
            cells.append(f"{size}, {verdict}")
        if any(cells):
            rows.append([task, *cells])
    return csv_table(["task", *representation.HEADS, CHOSEN], rows)


def losses_table(reports: Reports) -> str:
    """Say on which tasks another feature set or a published model has a smaller error than the default."""
    lines = []
    for task in representation.TASKS:
        ours = fold_maes(reports.get((task, "default")), CHOSEN)
        if ours is None:
            continue
        unit = reports[task, "default"]["unit"]
        others = {
            f"``{name}``": maes.mean()
            for (found, name), report in reports.items()
            if found == task
            and "default" not in name
            and name not in leakage.ROWS
            and (maes := fold_maes(report, CHOSEN)) is not None
        }
        others |= PUBLISHED.get(task, {})
        better = {name: mae for name, mae in others.items() if mae < ours.mean()}
        said = ", ".join(
            f"{n} {number(v, unit)}" for n, v in sorted(better.items(), key=lambda i: i[1])
        )
        lines.append(
            f"- {task}: default {number(ours.mean(), unit)}; better: {said or 'none here'}."
        )
    return "\n".join(lines)


def matbench_table(reports: Reports, task: str) -> str:
    """Return every feature set with every head, and below them the published models."""
    rows = []
    for name in matbench.ROWS:
        report = reports.get((task, name))
        if report is None:
            continue
        columns = [fold_maes(report, head) for head in matbench.ALL_HEADS]
        columns.append(fold_maes(report, CHOSEN, matbench.ALL_HEADS))
        if any(column is not None for column in columns):
            rows.append([name, *(with_spread(column, report["unit"]) for column in columns)])
    for name, value in PUBLISHED[task].items():
        blank = [""] * len(matbench.ALL_HEADS)
        rows.append([f"published: {name}", *blank, number(value, TASKS[task].unit)])
    table = csv_table([task, *matbench.ALL_HEADS, CHOSEN], rows)
    return f"{table}\n\nPublished: {SOURCES[task]}."


def reference_table(reports: Reports) -> str:
    """Say how well the leaderboard's own reference is reproduced."""
    rows = []
    for task in PUBLISHED:
        report = reports.get((task, REFERENCE))
        maes = fold_maes(report, "RF")
        if report is not None and maes is not None:
            unit = report["unit"]
            published = number(PUBLISHED[task]["RF-SCM/Magpie"], unit)
            rows.append([task, with_spread(maes, unit), published, report["rows"]])
    return csv_table(["task", "RF here", "published", "rows"], rows)


def paper_table(
    reports: Reports, tasks: Sequence[str], features: Sequence[str], heads: Sequence[str]
) -> str:
    """Return feature sets down, and the paper's split and five folds of every task and head across."""
    columns = [(t, h, s) for t in tasks for h in heads for s in ([HOLDOUT], FOLDS)]
    rows = []
    for name in features:
        cells = [
            with_spread(fold_maes(reports.get((task, name)), head, folds=split), TASKS[task].unit)
            for task, head, split in columns
        ]
        if any(cells):
            rows.append([name, *cells])
    header = [f"{t}, {h}, {s[0] if len(s) == 1 else '5 folds'}" for t, h, s in columns]
    return csv_table(["features", *header], rows)


def learning_table(reports: Reports) -> str:
    """Return the error at each number of labels, with the head chosen on inner folds."""
    rows = []
    for task, name in sorted(reports):
        curve = learning_curve(reports, task, name)
        if curve is not None:
            unit = reports[task, name]["unit"]
            rows.append([task, name, *(with_spread(maes, unit) for maes in curve)])
    return csv_table(["task", "features", *(f"{n} labels" for n in learning_curves.LABELS)], rows)


def learning_curve(reports: Reports, task: str, name: str) -> NDArray[np.float64] | None:
    """Return the error of each number of labels and fold, or None if the table is not finished."""
    report = reports.get((task, name))
    curve = [fold_maes(report, CHOSEN, labels=n) for n in learning_curves.LABELS]
    finished = [maes for maes in curve if maes is not None]
    return np.array(finished) if len(finished) == len(curve) else None
