"""The tables that open the page: one line a task, for render.py."""

from __future__ import annotations

from typing import Any

import representation
from _features import MAGPIE
from _published import PUBLISHED
from _runner import FOLDS
from _tasks import TASKS
from feature_tables import CHOSEN, Reports, error_cell, fold_maes, is_earlier, standard_error
from negnn_tables import variant_cell
from tables import csv_table, number

FEATURES = {
    MAGPIE: "Magpie, density, symmetry, lattice",
    "magpie+structural": "Magpie, CrystalNN, density, symmetry, packing",
    "raw": "raw channels",
    "default": "default features",
}
COMPARISONS = {
    "raw channels, against Magpie's": (("raw", CHOSEN), (MAGPIE, CHOSEN)),
    "raw channels, against CrystalNN's": (("raw", CHOSEN), ("magpie+structural", CHOSEN)),
    "default, against raw channels": (("default", CHOSEN), ("raw", CHOSEN)),
    "default, against an untrained network": (("default", "HKR"), ("raw+untrained", "HKR")),
    "default: Huber's loss, against squares": (("default", "HKR"), ("default", "MKR")),
}
"""Column → features and head, of the one and of the other."""
NETWORKS = {"default": "NEGNN", "default+features": "NEGNN and default features"}


def summary_table(reports: Reports, networks: dict[str, dict[str, Any]]) -> str:
    """Return the errors of feature sets with their chosen heads, of networks and of the leaderboard's best model."""
    rows = []
    for task in representation.TASKS:
        unit = TASKS[task].unit
        cells = [error_cell(reports, task, name, CHOSEN) for name in FEATURES]
        for name in NETWORKS:
            cells.append(variant_cell(networks.get(task), name, FOLDS, unit))
        if not any(cells):
            continue
        published = PUBLISHED.get(task, {})
        best = min(published, key=lambda model: published[model], default=None)
        quoted = f"{best} {number(published[best], unit)}" if best else ""
        rows.append([f"{task}, {unit}", *cells, quoted])
    header = ["task", *FEATURES.values(), *NETWORKS.values(), "best of the leaderboard"]
    return csv_table(header, rows)


def gains_table(reports: Reports) -> str:
    """Return in % of an error by how much another is larger, in bold where that exceeds the noise."""
    rows = []
    for task in representation.TASKS:
        cells = [_gain(reports, task, *pair) for pair in COMPARISONS.values()]
        if any(cells):
            rows.append([task, *cells])
    return csv_table(["task", *COMPARISONS], rows)


def _gain(reports: Reports, task: str, ours: tuple[str, str], theirs: tuple[str, str]) -> str:
    pair = [(reports.get((task, features)), head) for features, head in (ours, theirs)]
    maes = [fold_maes(report, head) for report, head in pair]
    if maes[0] is None or maes[1] is None:
        return ""
    marks = [is_earlier(report) for report, _ in pair]
    if marks[0] != marks[1]:
        return ""
    change = 100 * (maes[0] - maes[1]) / maes[1].mean()
    error, is_real = standard_error(change)
    text = f"{change.mean():+.1f} ± {error:.1f}"
    is_bold = is_real and abs(change.mean()) >= 0.05  # what is not written as 0.0
    return (f"**{text}**" if is_bold else text) + marks[0]
