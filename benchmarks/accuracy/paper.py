"""The paper's tables: kernel ridge on its embeddings, 80/20 and in five folds.

    python benchmarks/accuracy/paper.py --task paper_bulk_modulus

NE0 is the bare atom and NE012345 all layers side by side, of the predictive task, pooled with the mean;
``-contrastive`` is the paper's other task, ``-sum`` pools as the authors did, and ``-untrained`` is the same network
before training. Scaler and grid see training data alone.
"""

from __future__ import annotations

import typer
from _runner import FOLDS, table_command
from _tasks import HOLDOUT

TASKS = ["paper_bulk_modulus", "paper_shear_modulus", "paper_formation_energy"]
LAYERS = ["NE012345"[:length] for length in range(3, 9)]
ROWS = [
    *LAYERS,
    *(f"{layers}-contrastive" for layers in LAYERS),
    "NE012-sum",
    "NE012-untrained",
    "default",
    "magpie",
    "sine-matrix",
    "orbital-field-matrix",
]

if __name__ == "__main__":
    typer.run(table_command(TASKS, ROWS, heads=["KRR"], splits=[HOLDOUT, *FOLDS]))
