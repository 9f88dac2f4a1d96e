"""How far features move when atoms do, with neighbours that fade out and with a list cut after a shell.

    python benchmarks/accuracy/continuity.py

Every atom of the bundled crystals moves by the same length in a random direction of its own; changes are counted in
standard deviations of each feature over the crystals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from _runner import versions, write_report
from pymatgen.core import Structure

from ssl_matfeat import graph
from ssl_matfeat.datasets import load_elastic
from ssl_matfeat.featurizers import SSLStructureFeaturizer

RESULT = Path(__file__).parents[1] / "results" / "continuity.json"
LENGTH = 0.001
"""Of each displacement, Å."""
LISTS = {"neighbours that fade out": graph.FADE, "list cut after a shell": 1e-9}
"""What `graph.FADE` is."""


def rattled(structure: Structure, rng: np.random.Generator) -> Structure:
    """Return a copy with every site moved by `LENGTH`."""
    direction = rng.normal(size=(len(structure), 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    moved = structure.cart_coords + LENGTH * direction
    return Structure(structure.lattice, structure.species, moved, coords_are_cartesian=True)


def main(
    trials: Annotated[int, typer.Option(help="Random displacements.")] = 3,
    limit: Annotated[int | None, typer.Option(help="Use only the first crystals.")] = None,
    result: Annotated[Path, typer.Option(help="The JSON file.")] = RESULT,
) -> None:
    """Measure, and write continuity.json."""
    if limit is not None and result == RESULT:
        raise typer.BadParameter(
            "the committed file is of all crystals; give --result with --limit"
        )
    X = load_elastic()["structure"].tolist()[:limit]
    featurizer = SSLStructureFeaturizer(dtype="float64").fit(X)
    cells = []
    for name, fade in LISTS.items():
        graph.FADE = fade
        features = featurizer.transform(X)
        scale = np.maximum(features.std(axis=0), 1e-9)
        for seed in range(trials):
            rng = np.random.default_rng(seed)
            moved = featurizer.transform([rattled(structure, rng) for structure in X])
            largest = (np.abs(moved - features) / scale).max(axis=1)  # (n_crystals,)
            cells.append(
                {
                    "list": name,
                    "seed": seed,
                    "largest": float(largest.max()),
                    "over_half": float((largest > 0.5).mean()),
                    "over_tenth": float((largest > 0.1).mean()),
                }
            )
            typer.echo(cells[-1])
    head = {"task": "continuity", "length": LENGTH, "rows": len(X), "versions": versions()}
    write_report(result, head, cells)


if __name__ == "__main__":
    typer.run(main)
