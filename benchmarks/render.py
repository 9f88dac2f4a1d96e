"""Write the tables of the benchmark pages of docs/ from the JSON under results/; no number there is typed by hand.

python benchmarks/render.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(
    0, str(Path(__file__).parent / "accuracy")
)  # whose scripts say what stands in each table
import leakage
import learning_curves
import paper
import representation
import site_moments
from _heads import ENSEMBLES
from _published import PUBLISHED
from _runner import FOLDS, RESULTS
from feature_tables import (
    CHOSEN,
    Reports,
    classes_table,
    coverage_table,
    differences_table,
    learning_curve,
    learning_table,
    load_reports,
    losses_table,
    matbench_table,
    paper_table,
    reference_table,
    representation_table,
    untouched_table,
)
from negnn_tables import ablation_table, calibration_table, fold_table, load_networks, moments_table
from summary_table import gains_table, summary_table
from tables import csv_table

from ssl_matfeat.weights import list_weights, load_weights

BENCHMARKS = Path(__file__).parent
DOCS = BENCHMARKS.parent / "docs"
PAGES = [DOCS / "benchmarks.rst", DOCS / "benchmarks_heads.rst", DOCS / "features.rst"]


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


def continuity_table(path: Path) -> str:
    """Return how far features move when atoms do, over all trials."""
    if not path.exists():
        return ""
    report = json.loads(path.read_text())
    rows = []
    for name in dict.fromkeys(cell["list"] for cell in report["cells"]):
        trials = [cell for cell in report["cells"] if cell["list"] == name]
        parts = [
            " to ".join(
                f"{100 * extreme(cell[key] for cell in trials):.1f}" for extreme in (min, max)
            )
            for key in ("over_half", "over_tenth")
        ]
        rows.append([name, str(len(trials)), f"{max(c['largest'] for c in trials):.2f}", *parts])
    header = ["", "trials", "largest change", "crystals over 0.5, %", "crystals over 0.1, %"]
    return csv_table(header, rows)


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
    heads = [*representation.HEADS, CHOSEN]
    tables: dict[str, Callable[[], str]] = {
        "summary": partial(summary_table, reports, networks),
        "gains": partial(gains_table, reports),
        "coverage": partial(coverage_table, reports),
        "reference": partial(reference_table, reports),
        "losses": partial(losses_table, reports),
        "untouched": partial(untouched_table, reports),
        "leakage": partial(
            differences_table, reports, leakage.TASKS, representation.HEADS, *leakage.ROWS[::-1]
        ),
        "weights": weights_table,
        "paper": partial(paper_table, reports, paper.TASKS, paper.ROWS, ["KRR"]),
        "site moments": partial(
            paper_table, reports, site_moments.TASKS, site_moments.ROWS, ["ET", "MKR", CHOSEN]
        ),
        "negnn folds": partial(fold_table, networks, FOLDS),
        "negnn inputs": partial(ablation_table, networks),
        "negnn calibration": partial(calibration_table, networks),
        "negnn moments": partial(moments_table, results / "mp_magmom.json"),
        "classes": partial(classes_table, results / "classes.json"),
        "learning curves": partial(learning_table, reports),
        "continuity": partial(continuity_table, results / "continuity.json"),
        "speed": partial(speed_table, results / "speed.json"),
        "epoch": partial(speed_table, results / "epoch.json"),
    }
    short = ["ET", "KRR", "MKR", "HKR", CHOSEN]
    for part, shown in {"": heads, " in short": short}.items():
        for base in ("raw", "raw+untrained"):
            tables[f"default minus {base}{part}"] = partial(
                differences_table, reports, representation.TASKS, shown, base=base
            )
    for head in [*heads, "KRR", *ENSEMBLES]:
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
    page: Annotated[
        list[Path], typer.Option(help="Files with the markers, changed in place.")
    ] = PAGES,
    results: Annotated[Path, typer.Option(help="Folder of the JSON.")] = BENCHMARKS / "results",
) -> None:
    """Render all tables, and the plot of the learning curves."""
    for path in page:
        path.write_text(render(path.read_text(encoding="utf-8"), results), encoding="utf-8")
    plot_learning(load_reports(results / RESULTS.name), page[0].with_name("learning_curves.svg"))


if __name__ == "__main__":
    typer.run(main)
