"""What it is worth to have seen the crystals of a benchmark in pretraining, without their labels.

    python benchmarks/accuracy/leakage.py ../shared/data/mp_structures.parquet --task phonons

Two encoders are trained alike on as many crystals: ``unseen`` on a part of the ``pretrain`` split, ``seen`` on the same
part with some of it exchanged for the crystals of all tasks. The difference of their features is the leak.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer
from _features import CACHE, OWN_WEIGHTS
from _runner import (
    FOLDS,
    RESULTS,
    DataOption,
    FoldsOption,
    HeadOption,
    LimitOption,
    ResultsOption,
    SeedOption,
    TaskOption,
    results_folder,
    run_cells,
)
from _tasks import DATA_HOME, hash_inputs, load_task
from pymatgen.core import Structure
from representation import HEADS

from ssl_matfeat import SSLPretrainer

TASKS = ["phonons", "paper_bulk_modulus", "paper_formation_energy"]
ROWS = ["unseen", "seen"]
MAX_SITES = 16
SETTINGS = SSLPretrainer("context", max_sites=MAX_SITES, max_epochs=8, verbose=True)


def main(
    corpus: Annotated[Path, typer.Argument(help="mp_structures.parquet.")],
    n_crystals: Annotated[int, typer.Option(help="To train on.")] = 20_000,
    task: TaskOption = TASKS,
    head: HeadOption = HEADS,
    folds: FoldsOption = FOLDS,
    seed: SeedOption = 0,
    limit: LimitOption = None,
    data: DataOption = DATA_HOME,
    results: ResultsOption = RESULTS,
) -> None:
    """Train both encoders, unless they are in the cache, and score their default features."""
    loaded = [load_task(name, data, limit) for name in task]
    benchmark = [
        item
        for of_task in loaded
        for item in of_task.X
        if isinstance(item, Structure) and len(item) <= MAX_SITES
    ]
    if len(benchmark) > n_crystals / 2:
        raise typer.BadParameter(
            f"{len(benchmark)} benchmark crystals need --n-crystals of at least {2 * len(benchmark)}"
        )
    others = _read(corpus, n_crystals, seed)
    training = {"unseen": others, "seen": [*benchmark, *others[len(benchmark) :]]}
    for name, structures in training.items():
        OWN_WEIGHTS[name] = path = (
            CACHE / "leakage" / f"{name}-{hash_inputs(structures)}.safetensors"
        )
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint = path.with_suffix(".ckpt")
            SETTINGS.fit(structures, checkpoint=checkpoint).save(path)
            checkpoint.unlink()
    for of_task in loaded:
        for row in ROWS:
            run_cells(
                of_task,
                row,
                head,
                folds=folds,
                seed=seed,
                results=results_folder(results, data, limit),
            )


def _read(corpus: Path, n_crystals: int, seed: int) -> list[Structure]:
    """Return random small crystals of the ``pretrain`` split."""
    table = pq.read_table(corpus)
    small = pc.less_equal(pc.list_value_length(table["numbers"]), MAX_SITES)
    table = table.filter(pc.and_(small, pc.equal(table["split"], "pretrain")))
    chosen = np.random.default_rng(seed).permutation(len(table))[:n_crystals]
    rows = table.take(chosen).to_pylist()
    return [
        Structure(
            np.reshape(row["lattice"], (3, 3)),
            row["numbers"],
            np.reshape(row["frac_coords"], (-1, 3)),
        )
        for row in rows
    ]


if __name__ == "__main__":
    typer.run(main)
