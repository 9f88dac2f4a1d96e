"""What each kind of feature is worth: raw channels, learned ones on top, and matminer's.

    python benchmarks/accuracy/representation.py --task phonons
    python benchmarks/accuracy/representation.py --task phonons --features raw --features default --head 4HKR

The figure of the package is the row ``default`` minus the row ``raw``; benchmarks/render.py writes it, with the
corrected standard error of the paired differences over the folds.
"""

from __future__ import annotations

import typer
from _features import MAGPIE
from _runner import table_command

from ssl_matfeat.weights import list_weights

# Cheapest first, so that a stopped run has most of its table; elastic is the bundled set, for those without the others.
TASKS = [
    "elastic",
    "phonons",
    "jdft2d",
    "paper_bulk_modulus",
    "paper_shear_modulus",
    "paper_formation_energy",
    "log_kvrh",
    "log_gvrh",
]
ROWS = [
    "raw",
    "default",
    MAGPIE,
    "raw+untrained",
    *(f"raw+{name}" for name in list_weights() if name != "default"),
    "magpie+structural",
]
HEADS = [
    *("ET", "SET", "BKR", "MKR", "HKR"),
    *("ET+BKR", "SET+BKR", "ET+MKR", "SET+MKR", "ET+HKR"),
]

if __name__ == "__main__":
    typer.run(table_command(TASKS, ROWS, HEADS))
