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
from _features import MAGPIE, REFERENCE, changes
from _published import PUBLISHED, SOURCES
from _runner import FOLDS
from _tasks import HOLDOUT, TASKS
from numpy.typing import NDArray
from scipy.stats import t as student_t
from tables import csv_table, earlier, number, with_spread

CHOSEN = "chosen"
"""For each fold the head that did best on inner folds of its training data."""

Report = dict[str, Any]
Reports = dict[tuple[str, str], Report]
"""(task, feature set) → report."""
_PARTS = ("fold 0", "folds 1 to 4")
_FIRST, _OTHERS = slice(0, 1), slice(1, None)


def load_reports(folder: Path) -> Reports:
    """Return all results of the accuracy benchmarks."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
    return {(report["task"], report["features"]): report for report in reports}


def finished_heads(
    report: Report | None,
    heads: Iterable[str] = representation.HEADS,
    labels: int | None = None,
    folds: Sequence[str] = FOLDS,
) -> list[str]:
    """Return those heads that have been run on all folds."""
    scored = set(_cells(report, labels)) if report else set()
    return [head for head in heads if all((head, fold) in scored for fold in folds)]


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
    finished = finished_heads(report, heads if head == CHOSEN else [head], labels, folds)
    if report is None or not finished:
        return None
    cells = _cells(report, labels)
    best = [min((cells[h, f] for h in finished), key=lambda cell: cell["inner_mae"]) for f in folds]
    return np.array([cell["mae"] for cell in best])


def _cells(report: Report, labels: int | None) -> dict[tuple[str, str], Report]:
    """Return the scores of each head and fold."""
    return {
        (cell["head"], cell["fold"]): cell
        for cell in report["cells"]
        if cell["seed"] == 0 and cell["labels"] == labels
    }


def coverage_table(reports: Reports) -> str:
    """Return a list of the tasks: unit, rows."""
    found = {task: report for (task, _), report in reports.items()}
    return csv_table(
        ["task", "unit of the error", "rows"],
        [[task, report["unit"], report["rows"]] for task, report in sorted(found.items())],
    )


def is_earlier(report: Report | None) -> str:
    """Return the mark of a feature set that holds features of ours as they were before they changed."""
    if report is None:
        return ""
    return earlier(report["versions"]["ssl-matfeat"], changes(report["features"]))


def error_cell(reports: Reports, task: str, name: str, head: str) -> str:
    """Return mean ± standard deviation over the folds; a star if fewer heads could be chosen than for the default."""
    report = reports.get((task, name))
    cell = with_spread(fold_maes(report, head), TASKS[task].unit)
    cell = cell and cell + is_earlier(report)
    behind = set(finished_heads(reports.get((task, "default")))) - set(finished_heads(report))
    return f"{cell} \\*" if cell and head == CHOSEN and behind else cell


def representation_table(reports: Reports, head: str) -> str:
    """Return the errors, feature sets down and tasks across."""
    tasks = [t for t in representation.TASKS if any(task == t for task, _ in reports)]
    rows = []
    for name in representation.ROWS:
        cells = [error_cell(reports, task, name, head) for task in tasks]
        if any(cells):
            rows.append([name, *cells])
    return csv_table(["features", *tasks], rows)


def differences_table(
    reports: Reports,
    tasks: Sequence[str],
    heads: Sequence[str],
    row: str = "default",
    base: str = "raw",
) -> str:
    """Return the error of ``row`` minus that of ``base``, paired over the folds, and a verdict.

    `CHOSEN` is for each from all heads that it has been run with. Features of different versions are not compared.
    """
    rows = []
    for task in tasks:
        pair = reports.get((task, row)), reports.get((task, base))
        cells = []
        for head in heads:
            ours, theirs = (fold_maes(report, head) for report in pair)
            unlike = is_earlier(pair[0]) != is_earlier(pair[1])
            if ours is None or theirs is None or unlike:
                cells.append("")
            else:
                cells.append(_verdict(ours - theirs, TASKS[task].unit))
        if any(cells):
            rows.append([task + is_earlier(pair[0]), *cells])
    return csv_table(["task", *heads], rows)


def standard_error(change: NDArray[np.float64]) -> tuple[float, bool]:
    """Return the corrected standard error of a mean difference, and whether a t-test at 5 % tells it from none.

    Folds share their training data, so that differences vary less than those of independent samples would, by the
    factor that Nadeau and Bengio (Machine Learning 52, 239, 2003) correct: 1/k + 1/(k - 1) in place of 1/k.
    """
    k = len(change)
    error = change.std(ddof=1) * np.sqrt(1 / k + 1 / (k - 1))
    return float(error), bool(abs(change.mean()) > student_t.ppf(0.975, k - 1) * error)


def _verdict(change: NDArray[np.float64], unit: str) -> str:
    """Return mean ± standard error of a difference, and what to think of it."""
    error, is_real = standard_error(change)
    verdict = ("better" if change.mean() < 0 else "worse") if is_real else "within the noise"
    sign = "-" if change.mean() < 0 else "+"
    return f"{sign}{number(abs(change.mean()), unit)} ± {number(error, unit)}, {verdict}"


def untouched_table(reports: Reports) -> str:
    """Return what was gained on the fold whose labels served no choice, beside the other four."""
    rows = []
    for task in representation.TASKS:
        maes = {
            name: fold_maes(reports.get((task, name)), CHOSEN)
            for name in ("default", "raw", MAGPIE)
        }
        ours = maes["default"]
        cells = [task]
        for base in (MAGPIE, "raw"):
            theirs = maes[base]
            alike = is_earlier(reports.get((task, "default"))) == is_earlier(
                reports.get((task, "raw"))
            )
            if ours is not None and theirs is not None and alike:
                gains = [1 - ours[part].mean() / theirs[part].mean() for part in (_FIRST, _OTHERS)]
                cells += [f"{100 * gain:.1f} %" for gain in gains]
        if len(cells) == 5:
            rows.append(cells)
    header = [
        f"less error than {base}, {part}" for base in ("Magpie's", "raw's") for part in _PARTS
    ]
    return csv_table(["task", *header], rows)


def losses_table(reports: Reports) -> str:
    """Say on which tasks another feature set or a published model has a smaller error than the default."""
    lines = []
    for task in representation.TASKS:
        ours = fold_maes(reports.get((task, "default")), CHOSEN)
        if ours is None:
            continue
        unit = reports[task, "default"]["unit"]
        others = {
            f"``{name}``{is_earlier(report)}": maes.mean()
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
            f"- {task}: default {number(ours.mean(), unit)}{is_earlier(reports[task, 'default'])}; "
            f"better: {said or 'none here'}."
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
            cells = [with_spread(column, report["unit"]) for column in columns]
            rows.append([name + is_earlier(report), *cells])
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
        marks = "".join({is_earlier(reports.get((task, name))) for task in tasks})
        if any(cells):
            rows.append([name + marks, *cells])
    header = [f"{t}, {h}, {s[0] if len(s) == 1 else '5 folds'}" for t, h, s in columns]
    return csv_table(["features", *header], rows)


def learning_table(reports: Reports) -> str:
    """Return the error at each number of labels, with the head chosen on inner folds."""
    rows = []
    for task, name in sorted(reports):
        curve = learning_curve(reports, task, name)
        if curve is not None:
            unit = reports[task, name]["unit"]
            mark = is_earlier(reports[task, name])
            rows.append([task, name + mark, *(with_spread(maes, unit) for maes in curve)])
    return csv_table(["task", "features", *(f"{n} labels" for n in learning_curves.LABELS)], rows)


def learning_curve(reports: Reports, task: str, name: str) -> NDArray[np.float64] | None:
    """Return the error of each number of labels and fold, or None if the table is not finished."""
    report = reports.get((task, name))
    curve = [fold_maes(report, CHOSEN, labels=n) for n in learning_curves.LABELS]
    finished = [maes for maes in curve if maes is not None]
    return np.array(finished) if len(finished) == len(curve) else None


def classes_table(path: Path) -> str:
    """Return the scores of classifiers, the area under the curve and in brackets the balanced accuracy."""
    if not path.exists():
        return ""
    cells = json.loads(path.read_text())["cells"]
    heads = list(dict.fromkeys(cell["head"] for cell in cells))
    scores: dict[tuple[str, str, str], list[list[float]]] = {}
    for cell in cells:
        key = cell["task"], cell["features"], cell["head"]
        scores.setdefault(key, []).append([cell["auc"], cell["balanced_accuracy"]])
    rows = []
    for task, features in dict.fromkeys((c["task"], c["features"]) for c in cells):
        found = [np.array(scores.get((task, features, head), [])) for head in heads]
        shown = [
            f"{s[:, 0].mean():.3f} ± {s[:, 0].std():.3f} ({s[:, 1].mean():.3f})"
            if len(s) == len(FOLDS)
            else ""
            for s in found
        ]
        of_row = [c for c in cells if (c["task"], c["features"]) == (task, features)]
        marks = {earlier(cell["version"], changes(features)) for cell in of_row}
        rows.append([task, features + "".join(marks), *shown])
    return csv_table(["task", "features", *heads], rows)
