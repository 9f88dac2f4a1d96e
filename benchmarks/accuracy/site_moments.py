"""The paper's magnetic moments of sites: the same heads on site features.

    python benchmarks/accuracy/site_moments.py

The 80/20 split is the paper's, over sites; the five folds keep the sites of one crystal together.
"""

from __future__ import annotations

import typer
from _runner import FOLDS, table_command
from _tasks import HOLDOUT
from representation import HEADS

TASKS = ["paper_site_moments"]
ROWS = [
    "dummy",
    "site-element",
    "site-element+site-shell",
    *(f"site-{'NE012345'[:length]}" for length in range(3, 9)),
    "site-default",
    "site-element+site-crystal-nn",
]

if __name__ == "__main__":
    typer.run(table_command(TASKS, ROWS, heads=HEADS, splits=[HOLDOUT, *FOLDS]))
