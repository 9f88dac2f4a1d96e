"""Small data: the error at 50 to 1 000 labels, on the whole test folds.

python benchmarks/accuracy/learning_curves.py --task phonons
"""

from __future__ import annotations

import typer
from _features import MAGPIE
from _runner import table_command
from representation import HEADS

TASKS = ["phonons", "paper_bulk_modulus", "paper_formation_energy"]
ROWS = ["raw", "default", MAGPIE]
LABELS = [50, 100, 200, 500, 1000]

if __name__ == "__main__":
    typer.run(table_command(TASKS, ROWS, heads=HEADS, labels=LABELS))
