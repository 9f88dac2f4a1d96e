"""How much of fold 0, which was left alone, is in folds 1 to 4 of the moduli of the other source.

    python benchmarks/accuracy/overlap.py

Crystals are told apart by their identifiers of the Materials Project.
"""

from __future__ import annotations

import typer
from _runner import DataOption
from _tasks import DATA_HOME, TASKS, load_task

from ssl_matfeat.datasets import load_dataset

MATBENCH, PAPER = ("log_kvrh", "log_gvrh"), ("paper_bulk_modulus", "paper_shear_modulus")


def parts(task: str, data: str) -> tuple[set[str], set[str]]:
    """Return the identifiers of fold 0 and of the other folds."""
    frame = load_dataset(TASKS[task].dataset, data_home=data)
    ids = frame["material_id" if "material_id" in frame else "id"].astype(str).to_numpy()
    training, test = load_task(task, data).splits["0"]
    return set(ids[test]), set(ids[training])


def main(data: DataOption = DATA_HOME) -> None:
    """Print the share of each task's fold 0."""
    found = {task: parts(task, data) for task in (*MATBENCH, *PAPER)}
    for tasks, others in ((MATBENCH, PAPER), (PAPER, MATBENCH)):
        served = set().union(*(found[other][1] for other in others))
        for task in tasks:
            untouched = found[task][0]
            typer.echo(f"{task}: {len(untouched & served) / len(untouched):.0%} of fold 0")


if __name__ == "__main__":
    typer.run(main)
