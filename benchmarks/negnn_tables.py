"""The tables of the graph networks, for render.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mp_magmom
import negnn
import numpy as np
from numpy.typing import NDArray
from tables import csv_table, earlier, number, with_spread

ABLATION = ("onehot", "element", "ssl", "ssl-fine-tuned", "raw", "default")
"""Variants that differ in their node inputs alone; those of the default are ``"ssl+raw"``."""
_MOMENT_ERRORS = ("mae", "mae_magnetic")


def load_networks(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results of NEGNN by task."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {report["task"]: report for report in reports}


def variant_maes(
    report: dict[str, Any] | None, variant: str, folds: Sequence[str]
) -> NDArray[np.float64] | None:
    """Return the error of each fold with all labels, or None if the variant has not been through all of them."""
    cells = _whole_cells(report) if report else []
    maes = {cell["fold"]: cell["mae"] for cell in cells if cell["variant"] == variant}
    return np.array([maes[fold] for fold in folds]) if set(folds) <= set(maes) else None


def variant_cell(
    report: dict[str, Any] | None, variant: str, folds: Sequence[str], unit: str
) -> str:
    """Return mean ± standard deviation over the folds, with the mark of earlier versions, or nothing."""
    maes = variant_maes(report, variant, folds)
    if report is None or maes is None:
        return ""
    cells = [c for c in _whole_cells(report) if c["variant"] == variant]
    return with_spread(maes, unit) + _marks(cells)


def _whole_cells(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of seed 0 with all labels."""
    return [c for c in report["cells"] if c["labels"] is None and c["seed"] == 0]


def _marks(cells: Sequence[dict[str, Any]]) -> str:
    return "".join(
        {
            earlier(
                c["version"], negnn.last_changes(c["variant"], c["parameters"]["node_features"])
            )
            for c in cells
        }
    )


def fold_table(reports: dict[str, dict[str, Any]], folds: Sequence[str]) -> str:
    """Return mean ± standard deviation over the folds of every variant that has been through all of them."""
    rows = []
    for task, report in reports.items():
        for variant in dict.fromkeys(cell["variant"] for cell in report["cells"]):
            cell = variant_cell(report, variant, folds, report["unit"])
            if cell:
                rows.append([task, variant, cell, report["rows"]])
    return csv_table(["task", "variant", "MAE", "rows"], rows)


def calibration_table(reports: dict[str, dict[str, Any]]) -> str:
    """Return, of each ensemble, how the spread of its members goes with its errors: means over the folds."""
    rows = []
    for task, report in reports.items():
        cells = [c for c in _whole_cells(report) if c.get("rank_correlation") is not None]
        for variant in dict.fromkeys(cell["variant"] for cell in cells):
            measures = [
                [c["rank_correlation"], c["within_two_spreads"]]
                for c in cells
                if c["variant"] == variant
            ]
            means = np.mean(measures, axis=0)
            mark = _marks([c for c in cells if c["variant"] == variant])
            shown = [f"{mean:.2f}" for mean in means]
            rows.append([task, variant + mark, str(len(measures)), *shown])
    header = ["task", "variant", "folds", "rank correlation with the error", "within 2 spreads"]
    return csv_table(header, rows)


def ablation_table(reports: dict[str, dict[str, Any]]) -> str:
    """Return the error on fold 0 against the number of labels, for each kind of node input.

    A row needs one-hot inputs, which the others are compared with.
    """
    rows = []
    for task, report in reports.items():
        cells = [c for c in report["cells"] if c["fold"] == "0" and c["variant"] in ABLATION]
        counts = {c["n_train"]: c["labels"] for c in cells if c["variant"] == "onehot"}
        for n_train, labels in sorted(counts.items()):
            row = [task, str(n_train) if labels else f"all {n_train}"]
            for variant in ABLATION:
                found = [c for c in cells if (c["variant"], c["labels"]) == (variant, labels)]
                maes = np.array([c["mae"] for c in found]) if found else None
                row.append(with_spread(maes, report["unit"]) + _marks(found))
            rows.append(row)
    inputs = ["ssl+raw" if variant == "default" else variant for variant in ABLATION]
    return csv_table(["task", "labels", *inputs], rows)


def moments_table(path: Path) -> str:
    """Return the errors of site moments."""
    if not path.exists():
        return ""
    report = json.loads(path.read_text())
    rows = [
        [
            c["model"] + earlier(c["version"], mp_magmom.last_changes(c["model"])),
            str(c["n_train"]),
            *(number(c[k], report["unit"]) for k in _MOMENT_ERRORS),
        ]
        for c in report["cells"]
    ]
    return csv_table(["model", "training crystals", "MAE, µB", "MAE of magnetic sites, µB"], rows)
