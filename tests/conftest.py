"""Structures, weights and checks that several test files share."""

import numpy as np
import pandas as pd
import pytest
import torch
from pymatgen.core import Element, Lattice, Structure

from ssl_matfeat import NEGNNRegressor
from ssl_matfeat._validation import MAX_ATOMIC_NUMBER
from ssl_matfeat.datasets import load_elastic
from ssl_matfeat.graph import CrystalBatch, CrystalGraphs
from ssl_matfeat.weights import Pretrained, save_weights
from ssl_matfeat.weights._registry import build_encoder

CENTERED = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def rock_salt(a: float = 5.64) -> Structure:  # from_spacegroup takes seconds for this group
    return Structure(
        Lattice.cubic(a), ["Na"] * 4 + ["Cl"] * 4, [*CENTERED, *((CENTERED + 0.5) % 1)]
    )


def fcc(a: float = 3.615, element: str = "Cu") -> Structure:
    half = a / 2
    return Structure([[0, half, half], [half, 0, half], [half, half, 0]], [element], [[0, 0, 0]])


def bcc(a: float = 2.87, element: str = "Fe") -> Structure:
    return Structure(Lattice.cubic(a), [element] * 2, [[0, 0, 0], [0.5, 0.5, 0.5]])


def cesium_chloride(a: float = 2.89) -> Structure:
    return Structure(Lattice.cubic(a), ["Ni", "Al"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def simple_cubic(a: float = 3.345, element: str = "Po") -> Structure:
    return Structure(Lattice.cubic(a), [element], [[0, 0, 0]])


def hcp(a: float = 3.209, c: float = 5.211, element: str = "Mg") -> Structure:
    sites = [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]
    return Structure(Lattice.hexagonal(a, c), [element] * 2, sites)


def perovskite(a: float = 3.905) -> Structure:
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(Lattice.cubic(a), ["Sr", "Ti", "O", "O", "O"], sites)


def diamond(a: float = 3.567, element: str = "C") -> Structure:
    return Structure(Lattice.cubic(a), [element] * 8, [*CENTERED, *(CENTERED + 0.25)])


def triclinic() -> Structure:
    sites = [[0.02, 0.05, 0.01], [0.48, 0.55, 0.46], [0.21, 0.74, 0.31], [0.77, 0.24, 0.71]]
    return Structure(
        Lattice.from_parameters(4.3, 5.1, 5.9, 77, 84, 101), ["Ca", "Ti", "O", "F"], sites
    )


def graphene(vacuum: float = 25.0) -> Structure:
    sites = [[1 / 3, 2 / 3, 0.5], [2 / 3, 1 / 3, 0.5]]
    return Structure(Lattice.hexagonal(2.46, vacuum), ["C", "C"], sites)


def rattled_salt(size: float = 0.1) -> Structure:
    """64 sites without symmetry, so that no two neighbours are equally far, and not all are mutual."""
    return rattled(rock_salt() * (2, 2, 2), size, np.random.default_rng(0))


def rattled(structure: Structure, size: float, rng: np.random.Generator) -> Structure:
    """Return a copy with every coordinate moved by ``size`` Å, in the root mean square."""
    moved = structure.cart_coords + rng.normal(0, size, (len(structure), 3))
    return Structure(structure.lattice, structure.species, moved, coords_are_cartesian=True)


def shake(structure: Structure, site: int, size: float) -> Structure:
    """Return a copy with one site moved by ``size`` Å."""
    moved = structure.copy()
    moved.translate_sites([site], [0.6 * size, 0.0, 0.8 * size], frac_coords=False)
    return moved


def substitute(structure: Structure, site: int, element: str) -> Structure:
    """Return a copy with another element on one site."""
    changed = structure.copy()
    changed.replace(site, element)
    return changed


SYMBOLS = [Element.from_Z(z).symbol for z in range(1, MAX_ATOMIC_NUMBER + 1)]
CRYSTALS = {
    "NaCl": rock_salt(),
    "SrTiO3": perovskite(),
    "Mg": hcp(),
    "triclinic": triclinic(),
    "Cu": fcc(),
    "As": simple_cubic(3.0, "As"),
}
"""Ties, two sites in a hexagonal cell, no symmetry at all, and one-atom cells."""


ALLOY = Structure(Lattice.cubic(2.9), [{"Fe": 0.5, "Co": 0.5}], [[0, 0, 0]])
"""Disordered, which is refused."""


def rotated(structure, rng):
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))  # of either handedness
    return Structure(
        Lattice(structure.lattice.matrix @ turn), structure.species, structure.frac_coords
    )


def translated(structure, rng):
    return _with_coordinates(structure, structure.frac_coords + rng.uniform(size=3))


def permuted(structure, rng):
    return Structure.from_sites([structure[i] for i in rng.permutation(len(structure))])


STRAINS = np.linspace(-0.004, 0.004, 17)


def strained(structure: Structure, strain: float) -> Structure:
    """Return the structure stretched along z and sheared: equal distances part."""
    deformation = np.eye(3) + strain * np.array([[-0.3, 0.5, 0], [0.5, 0.1, 0], [0, 0, 1.0]])
    lattice = Lattice(structure.lattice.matrix @ deformation)
    return Structure(lattice, structure.species, structure.frac_coords)


def supercell(structure, rng):
    return structure * (1, 2, 3)


def niggli(structure, rng):
    return structure.get_reduced_structure("niggli")


def skewed(structure, rng):
    change = np.array([[1, 2, 0], [0, 1, -1], [1, 2, 1]])
    assert round(np.linalg.det(change)) == 1
    return structure.copy().make_supercell(change, to_unit_cell=False)


def other_images(structure, rng):
    return _with_coordinates(
        structure, structure.frac_coords + rng.integers(-3, 4, size=(len(structure), 3))
    )


def _with_coordinates(structure, frac_coords):
    return Structure(structure.lattice, structure.species, frac_coords)


TRANSFORMATIONS = {
    f.__name__: f for f in (rotated, translated, permuted, supercell, niggli, skewed, other_images)
}
"""Other ways to write the same crystal down: (structure, generator) → structure."""


def batch_of(
    *structures: Structure,
    cutoff: float = 8.0,
    n_neighbors: int | None = 12,
    dtype: torch.dtype = torch.float64,
) -> CrystalBatch:
    """Return the structures as one batch."""
    graphs = CrystalGraphs.from_structures(structures, cutoff, n_neighbors)
    return graphs.batch(range(len(structures))).to("cpu", dtype)


def untrained(encoder: str, n_channels: int = 16) -> Pretrained:
    """Return an encoder as it is before training, but for normalisations, which fit some crystals."""
    config = {"encoder": encoder, "n_channels": n_channels}
    if encoder == "context":
        config["n_environments"] = 24
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_encoder(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 1.0  # remember the last batch only
    with torch.no_grad():
        model.train()(batch_of(*CRYSTALS.values(), rattled_salt(), dtype=torch.float32))
    if encoder == "context":
        graphs = CrystalGraphs.from_structures([*CRYSTALS.values(), rattled_salt()])
        model.learn_environments(graphs, np.arange(len(graphs)), random_state=0)
    card = {"name": None, "config": config, "elements_seen": SYMBOLS}
    return Pretrained(model.eval().requires_grad_(False), card)


@pytest.fixture(scope="session")
def elastic():
    return load_elastic()


@pytest.fixture(scope="session")
def real_crystals(elastic):
    """60 bundled crystals, spread over the whole set."""
    return elastic["structure"].iloc[::20].tolist()[:60]


@pytest.fixture(scope="session")
def small_crystals(elastic):
    """60 bundled crystals of at most six sites, and their log10 bulk moduli."""
    small = elastic[[len(s) <= 6 for s in elastic["structure"]]].iloc[::5].head(60)
    return small["structure"].tolist(), np.log10(small["K_VRH"].to_numpy())


QUICK_NETWORK = {
    "node_features": "ssl+raw",
    "weights": untrained("context"),
    "n_channels": 8,
    "n_layers": 1,
    "max_epochs": 2,
    "lr": 0.02,
    "random_state": 0,
}


def quick_network(**parameters):
    return NEGNNRegressor(**{**QUICK_NETWORK, **parameters})


@pytest.fixture(scope="session")
def few_crystals(small_crystals):
    X, y = small_crystals
    return X[:24], y[:24]


@pytest.fixture(scope="session")
def fitted_network(few_crystals):
    return quick_network().fit(*few_crystals)


def nearest_distances(X):
    """A target of each site that its surroundings tell: the distance to its nearest neighbour, in Å."""
    return [
        np.array([min(n.nn_distance for n in s.get_neighbors(site, 6)) for site in s]) for s in X
    ]


@pytest.fixture(scope="session")
def weight_files(tmp_path_factory):
    """Files of untrained weights, by the name of their encoder."""
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for encoder in ("cgcnn", "context"):
        files[encoder] = folder / f"{encoder}.safetensors"
        save_weights(files[encoder], untrained(encoder))
    return files


SMALL_PRETRAINING = {
    "n_channels": 8,
    "batch_size": 1000,
    "validation_fraction": 0.2,
    "ema_decay": 0.9,
}


def state_of(pretrainer):
    return pretrainer.weights_.encoder.state_dict()


def same_numbers(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def total_loss(record, which):
    return sum(value for name, value in record.items() if name.startswith(which))


def write_parquet(structures, path, index=None, **columns):
    frame = pd.DataFrame(
        {
            "numbers": [[site.specie.Z for site in s] for s in structures],
            "lattice": [s.lattice.matrix.ravel() for s in structures],
            "frac_coords": [s.frac_coords.ravel() for s in structures],
            **columns,
        },
        index=index,
    )
    frame.to_parquet(path)
    return path
