"""Speed and memory of the features over the project's history: ``asv run`` in benchmarks/speed."""

from __future__ import annotations

import numpy as np
from pymatgen.core import Structure

from ssl_matfeat.datasets import load_elastic
from ssl_matfeat.featurizers import SSLAtomFeaturizer, SSLStructureFeaturizer
from ssl_matfeat.graph import CrystalGraphs


class Crystals:
    """100 crystals of the bundled set."""

    timeout = 300

    def setup(self) -> None:
        """Load crystals, and whatever a first call loads."""
        self.X: list[Structure] = load_elastic()["structure"].tolist()[:100]
        SSLStructureFeaturizer().fit_transform(self.X[:2])

    def time_graphs(self) -> None:
        """Find the neighbours."""
        CrystalGraphs.from_structures(self.X)

    def time_raw(self) -> None:
        """Compute the channels that need no network."""
        SSLStructureFeaturizer(layers=("element", "shell", "cell")).fit_transform(self.X)

    def time_default(self) -> None:
        """Compute the default features."""
        SSLStructureFeaturizer().fit_transform(self.X)

    def time_sites(self) -> None:
        """Compute the embeddings of sites."""
        SSLAtomFeaturizer().fit_transform(self.X)

    def peakmem_default(self) -> None:
        """Compute the default features."""
        SSLStructureFeaturizer().fit_transform(self.X)


class Supercell:
    """One crystal of so many sites."""

    params = (1, 8, 64, 512, 2000)
    param_names = ("n_sites",)

    def setup(self, n_sites: int) -> None:
        """Repeat a crystal of one site."""
        atom = Structure(1.8 * (1 - np.eye(3)), ["Cu"], [[0, 0, 0]])
        repeats = round(n_sites ** (1 / 3))
        self.X = [atom.make_supercell((repeats, repeats, repeats), in_place=False)]
        SSLStructureFeaturizer().fit_transform([atom])

    def time_default(self, n_sites: int) -> None:
        """Compute the default features."""
        SSLStructureFeaturizer().fit_transform(self.X)
