"""The table that opens the page: one line a task, for render.py."""

from __future__ import annotations

from typing import Any

import representation
from _features import MAGPIE
from _published import PUBLISHED
from _runner import FOLDS
from _tasks import TASKS
from feature_tables import CHOSEN, Reports, error_cell
from negnn_tables import variant_cell
from tables import csv_table, number

FEATURES = {
    MAGPIE: "Magpie, density, symmetry, lattice",
    "magpie+structural": "Magpie, CrystalNN, density, symmetry, packing",
    "raw": "raw channels",
    "default": "default features",
}
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
