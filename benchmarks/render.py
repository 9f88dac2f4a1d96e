"""Write the tables of docs/benchmarks.rst from the JSON under results/; no number there is typed by hand.

python benchmarks/render.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

sys.path.insert(
    0, str(Path(__file__).parent / "accuracy")
)  # whose scripts say what stands in each table
import leakage
import learning_curves
import matbench
import paper
import representation
import site_moments
from _features import REFERENCE
from _published import PUBLISHED, SOURCES
from _runner import FOLDS, RESULTS
from _tasks import HOLDOUT, TASKS
from negnn_tables import ablation_table, calibration_table, fold_table, load_networks, moments_table
from tables import csv_table, number, with_spread

from ssl_matfeat.weights import list_weights, load_weights

BENCHMARKS = Path(__file__).parent
PAGE = BENCHMARKS.parent / "docs" / "benchmarks.rst"
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


def weights_table() -> str:
    """Return how well the released weights do their own tasks on validation crystals, from their model cards."""
    rows = []
    for name in list_weights():
        card = load_weights(name).card
        scores = ", ".join(f"{key} {value:.3g}" for key, value in card["metrics"].items())
        data = card["training_data"]
        crystals = f"{data['n_training']} of at most {data['max_sites']} sites"
        rows.append([name, crystals, str(len(card["history"])), scores])
    return csv_table(["weights", "crystals", "epochs", "on validation crystals"], rows)


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


def plot_learning(reports: Reports, path: Path) -> None:
    """Draw the learning curves, one panel a task that has any."""
    import matplotlib
    from matplotlib.figure import Figure

    curves = {
        (task, name): curve
        for task in learning_curves.TASKS
        for name in learning_curves.ROWS
        if (curve := learning_curve(reports, task, name)) is not None
    }
    tasks = list(dict.fromkeys(task for task, _ in curves))
    if not tasks:
        return
    matplotlib.rcParams["svg.hashsalt"] = path.name  # else every file has other ids
    figure = Figure(figsize=(4.5 * len(tasks), 3.5), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for task, panel in zip(tasks, panels, strict=True):
        panel.set(title=task, xlabel="training labels", xscale="log", yscale="log")
        for (of_task, name), curve in curves.items():
            if of_task == task:
                means, spreads = curve.mean(axis=1), curve.std(axis=1)
                panel.errorbar(
                    learning_curves.LABELS, means, yerr=spreads, marker="o", capsize=3, label=name
                )
        panel.legend()
    panels[0].set_ylabel("mean absolute error")
    figure.savefig(path, metadata={"Date": None})


def speed_table(path: Path) -> str:
    """Return the tables of a script of benchmarks/speed."""
    if not path.exists():
        return ""
    report = json.loads(path.read_text())
    parts = [
        f"{report['structures']}; {report['machine']}.",
        *(
            csv_table(table["header"], [[_significant(x) for x in row] for row in table["rows"]])
            for table in report["tables"]
        ),
    ]
    return "\n\n".join(parts)


def _significant(value: str | float) -> str:
    """Return three digits of a measurement, all of a count, and names as they are."""
    return f"{float(f'{value:.3g}'):g}" if isinstance(value, float) else str(value)


def render(page: str, results: Path) -> str:
    """Return the page with every table between its markers made anew.

    Parameters
    ----------
    page : str
        With pairs of the comments ``.. table NAME`` and ``.. end of table``.
    results : Path
        Folder of the JSON.

    Returns
    -------
    str
    """
    reports = load_reports(results / RESULTS.name)
    networks = load_networks(results / "negnn")
    tables: dict[str, Callable[[], str]] = {
        "coverage": partial(coverage_table, reports),
        "reference": partial(reference_table, reports),
        "losses": partial(losses_table, reports),
        "differences": partial(differences_table, reports, representation.TASKS),
        "differences untrained": partial(
            differences_table, reports, representation.TASKS, base="raw+untrained"
        ),
        "leakage": partial(differences_table, reports, leakage.TASKS, *leakage.ROWS[::-1]),
        "weights": weights_table,
        "paper": partial(paper_table, reports, paper.TASKS, paper.ROWS, ["KRR"]),
        "site moments": partial(
            paper_table, reports, site_moments.TASKS, site_moments.ROWS, ["ET", "MKR", CHOSEN]
        ),
        "negnn folds": partial(fold_table, networks, FOLDS),
        "negnn inputs": partial(ablation_table, networks),
        "negnn calibration": partial(calibration_table, networks),
        "negnn moments": partial(moments_table, results / "mp_magmom.json"),
        "learning curves": partial(learning_table, reports),
        "speed": partial(speed_table, results / "speed.json"),
        "epoch": partial(speed_table, results / "epoch.json"),
    }
    for head in (*representation.HEADS, CHOSEN):
        tables[f"representation {head}"] = partial(representation_table, reports, head)
    for task in PUBLISHED:
        tables[f"matbench {task}"] = partial(matbench_table, reports, task)
    return re.sub(
        r"^\.\. table (.+)$(?s:.*?)^\.\. end of table$",
        lambda found: (
            f".. table {found[1]}\n\n{tables[found[1]]() or 'Not run yet.'}\n\n.. end of table"
        ),
        page,
        flags=re.MULTILINE,
    )


def main(
    page: Annotated[Path, typer.Option(help="File with the markers, changed in place.")] = PAGE,
    results: Annotated[Path, typer.Option(help="Folder of the JSON.")] = BENCHMARKS / "results",
) -> None:
    """Render all tables, and the plot of the learning curves."""
    page.write_text(render(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    plot_learning(load_reports(results / RESULTS.name), page.with_name("learning_curves.svg"))


if __name__ == "__main__":
    typer.run(main)
