"""What the docs say of the default weights on textbook crystals, and of the corpus that they learned from.

    python benchmarks/accuracy/textbook.py

The last lines need the pretraining corpus; the others only what the package bundles.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import typer
from _runner import DataOption
from _tasks import DATA_HOME
from pymatgen.core import Element, Lattice, Structure

from ssl_matfeat.corpus import expansion, read_parquet
from ssl_matfeat.datasets import load_elastic
from ssl_matfeat.featurizers import SSLAtomFeaturizer, SSLStructureFeaturizer
from ssl_matfeat.weights import load_card

CRYSTALS = {
    "Cu": Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.615), ["Cu"], [[0, 0, 0]]),
    "Au": Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.078), ["Au"], [[0, 0, 0]]),
    "Fe": Structure.from_spacegroup("Im-3m", Lattice.cubic(2.866), ["Fe"], [[0, 0, 0]]),
    "diamond": Structure.from_spacegroup("Fd-3m", Lattice.cubic(3.567), ["C"], [[0, 0, 0]]),
    "corundum": Structure.from_spacegroup(
        "R-3c", Lattice.hexagonal(4.759, 12.991), ["Al", "O"], [[0, 0, 0.352], [0.306, 0, 0.25]]
    ),
}


def pretext(structures: list[Structure]) -> pd.DataFrame:
    """Return the pretext channels of crystals."""
    featurizer = SSLStructureFeaturizer(layers=("pretext",)).set_output(transform="pandas")
    return featurizer.fit_transform(structures)


def exchanged_pair() -> pd.Series:
    """Return the likelihoods of a Cl and a Na that have changed places in rock salt, of 64 sites."""
    salt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]
    )
    crystal = salt * (2, 2, 2)
    chlorine = [i for i, site in enumerate(crystal) if site.specie.symbol == "Cl"]
    nearest = min(chlorine, key=lambda i: crystal.get_distance(0, i))
    crystal.replace(0, "Cl")
    crystal.replace(nearest, "Na")
    sites = SSLAtomFeaturizer(layers=("pretext",)).set_output(transform="pandas")
    return sites.fit_transform([crystal])["site log-likelihood"].iloc[[0, nearest]]


def main(data: DataOption = DATA_HOME) -> None:
    """Print the figures."""
    turned = CRYSTALS["corundum"].copy()
    turned.replace_species({"Al": "O", "O": "Al"})
    found = pretext([*CRYSTALS.values(), turned])
    found.index = pd.Index([*CRYSTALS, "corundum, Al and O exchanged"])
    columns = ["mean of site log-likelihood", "mean of volume strain", "polymorph volume strain"]
    typer.echo(found[columns].round(2).to_string())
    pair = exchanged_pair().round(1).tolist()
    typer.echo(f"log-likelihood of Cl and Na in each other's place: {pair}")

    elastic = load_elastic()["structure"]
    metals = [all(e.is_metal for e in s.composition.elements) for s in elastic]
    of_metals = pretext(elastic[metals].tolist())
    polymorph = of_metals["polymorph volume strain"].mean()
    around = of_metals["mean of volume strain"].abs().mean()
    typer.echo(
        f"bundled crystals of metals alone: mean polymorph volume strain {polymorph:.2f}, "
        f"mean |volume strain| {around:.2f}"
    )
    sites = SSLAtomFeaturizer(layers=("environment",)).fit_transform(elastic[::8].tolist())
    products = np.square(sites.astype(np.float64)).sum(axis=1)
    typer.echo(
        f"environment of a site times itself: mean {products.mean():.2f}, least {products.min():.2f}"
    )

    graphs, validating, _ = read_parquet(Path(data) / "mp_structures.parquet")
    assert validating is not None  # the corpus has a split
    trained_on = load_card("default")["training_data"]
    max_sites, max_expansion = trained_on["max_sites"], trained_on["max_expansion"]
    small = ~validating & (graphs.n_sites <= max_sites)
    loose = expansion(graphs) > max_expansion
    is_metal = np.array([False, *(Element.from_Z(z).is_metal for z in range(1, 104))])
    of_metals_alone = np.logical_and.reduceat(is_metal[graphs.numbers], graphs.site_start[:-1])
    both = small & loose & of_metals_alone
    typer.echo(
        f"crystals of the corpus of at most {max_sites} sites: {small.sum()}, "
        f"of more than {max_expansion:g} times the volume of their elements {(small & loose).sum()} "
        f"({(small & loose).sum() / small.sum():.1%}), of these of metals alone {both.sum()}, "
        f"which are {both.sum() / (small & of_metals_alone).sum():.0%} of those of metals alone"
    )


if __name__ == "__main__":
    typer.run(main)
