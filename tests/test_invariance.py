"""Features belong to the crystal: not to its orientation, cell, order of sites or companions.

Every check is a function that also has negative controls, for which it must fail.
"""

import re

import numpy as np
import pytest
import torch
from conftest import (
    CRYSTALS,
    STRAINS,
    TRANSFORMATIONS,
    batch_of,
    bcc,
    cesium_chloride,
    fcc,
    other_images,
    permuted,
    rattled,
    rock_salt,
    rotated,
    shake,
    simple_cubic,
    strained,
    substitute,
    supercell,
    translated,
)
from pymatgen.core import Structure
from sklearn.preprocessing import StandardScaler

from ssl_matfeat import SSLAtomFeaturizer, SSLStructureFeaturizer
from ssl_matfeat._validation import as_crystal
from ssl_matfeat.channels import CELL_CHANNELS, ELEMENT_CHANNELS, SHELL_CHANNELS, shell_channels
from ssl_matfeat.examples import Dataset, Inputs
from ssl_matfeat.graph import CrystalGraphs, Edges, find_edges
from ssl_matfeat.network import Standardize
from ssl_matfeat.pooling import INTENSIVE
from ssl_matfeat.weights import load_weights

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
WEIGHTS = ("default", "paper-predictive", "cgcnn", "context")
"""Bundled ones, and encoders before training."""
FLOOR = 1e-3
"""Least scale of a column, for features that are zero by symmetry in most crystals."""
FLOOR_OF_STRAINS = 0.1
"""Of differences of logarithms near 2, of which single precision rounds off 2e-7 in each step."""


def all_layers(weights):
    encoder = load_weights(weights).encoder
    return ("element", "shell", *encoder.named_layers, *range(encoder.n_layers + 1))


class Features:
    """Features of one kind, and what a column of them measures in real crystals."""

    def __init__(self, weights, dtype, crystals):
        options = {"weights": weights, "dtype": dtype}
        layers = all_layers(weights)
        self.crystal = SSLStructureFeaturizer(
            layers=("cell", *layers), pooling=INTENSIVE, **options
        )
        self.site = SSLAtomFeaturizer(layers=layers, **options)
        self.tolerance = TOLERANCE[dtype]
        self.floor_of_strains = FLOOR_OF_STRAINS if dtype == "float32" else FLOOR
        self.site_scale = self._scale(self.site, crystals)
        self.crystal_scale = self._scale(self.crystal, crystals)
        # A statistic can be no more exact than what it is of, though it be zero in most crystals.
        channels = [name.split(" of ", 1)[-1] for name in self.crystal.get_feature_names_out()]
        largest = dict.fromkeys(channels, 0.0)
        for channel, scale in zip(channels, self.crystal_scale, strict=True):
            largest[channel] = max(largest[channel], scale)
        self.crystal_scale = np.array([largest[channel] for channel in channels])

    def _scale(self, featurizer, crystals):
        rows = featurizer.fit_transform(crystals).astype(float)
        assert np.isfinite(rows).all()
        names = featurizer.get_feature_names_out()
        floor = [self.floor_of_strains if name.endswith("strain") else FLOOR for name in names]
        return np.maximum(np.sqrt(np.mean(rows**2, axis=0)), floor)

    def differing(self, one, other):
        """Return the columns in which two crystals differ, with how much."""
        rows = self.crystal.transform([one]), self.crystal.transform([other])
        names = self.crystal.get_feature_names_out()
        return self.columns(rows[0], rows[1], self.crystal_scale, names)

    def differing_sites(self, one, other, same):
        """Do the same with sites: ``same[i]`` of ``one`` is site i of ``other``."""
        rows = self.site.transform([one])[same], self.site.transform([other])
        return self.columns(*rows, self.site_scale, self.site.get_feature_names_out())

    def columns(self, a, b, scale, names):
        deviation = np.abs(a.astype(float) - b).max(axis=0) / scale
        return {n: float(d) for n, d in zip(names, deviation, strict=True) if d > self.tolerance}


@pytest.fixture(scope="session")
def features(real_crystals, weight_files):
    made = {}

    def make(weights, dtype):
        if (weights, dtype) not in made:
            path = weight_files.get(weights, weights)
            made[weights, dtype] = Features(path, dtype, real_crystals)
        return made[weights, dtype]

    return make


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    return request.param


@pytest.fixture(params=WEIGHTS)
def kind(request, dtype, features):
    return features(request.param, dtype)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("name", CRYSTALS)
def test_crystal_keeps_its_features(kind, name, transformation, rng):
    structure = CRYSTALS[name]
    same = TRANSFORMATIONS[transformation](structure, rng)
    assert kind.differing(structure, same) == {}


@pytest.mark.parametrize("transformation", ["rotated", "supercell", "other_images"])
def test_real_crystals_keep_their_features(kind, real_crystals, transformation, rng):
    small = [s for s in real_crystals if len(s) < 12][:10]
    for structure in small:
        same = TRANSFORMATIONS[transformation](structure, rng)
        assert kind.differing(structure, same) == {}, structure.formula


def test_companions_in_the_batch_do_not_matter(kind, real_crystals):
    crystals = [*CRYSTALS.values(), *real_crystals[:20]]
    together = kind.crystal.transform(crystals)
    alone = np.concatenate([kind.crystal.transform([s]) for s in crystals])
    names = kind.crystal.get_feature_names_out()
    assert kind.columns(together, alone, kind.crystal_scale, names) == {}
    others = kind.crystal.transform([*crystals[:-1], rock_salt()])
    assert kind.columns(others, alone, kind.crystal_scale, names) != {}  # negative control


@pytest.mark.parametrize("name", CRYSTALS)
def test_sites_keep_their_features(kind, name, rng):
    structure = CRYSTALS[name]
    order = rng.permutation(len(structure))
    shuffled = Structure.from_sites([structure[i] for i in order])
    assert kind.differing_sites(structure, shuffled, order) == {}
    unchanged = np.arange(len(structure))
    for transformation in (rotated, translated, other_images):
        assert kind.differing_sites(structure, transformation(structure, rng), unchanged) == {}
    copies = np.repeat(unchanged, 6)  # as pymatgen orders the sites of a supercell
    assert kind.differing_sites(structure, supercell(structure, rng), copies) == {}


def test_sites_in_the_wrong_order_are_noticed(kind):
    structure = CRYSTALS["SrTiO3"]
    assert kind.differing_sites(structure, structure, [1, 0, 2, 3, 4]) != {}


@pytest.mark.parametrize("name", ["NaCl", "SrTiO3", "triclinic"])
def test_small_displacement_is_noticed_in_every_block(kind, name):
    structure = CRYSTALS[name]
    blocks = blocks_of(kind.differing(structure, shake(structure, 1, 0.01)))
    layers = {str(layer) for layer in kind.crystal.layers} - {"element", "0"}
    assert layers <= blocks | {"cell"}
    assert not {"element", "0"} & blocks
    assert {"element", "0"} <= {str(layer) for layer in kind.crystal.layers}


@pytest.mark.parametrize("name", ["NaCl", "SrTiO3", "triclinic"])
def test_other_element_is_noticed_in_every_block(kind, name):
    structure = CRYSTALS[name]
    blocks = blocks_of(kind.differing(structure, substitute(structure, 0, "Rb")))
    assert blocks == {str(layer) for layer in kind.crystal.layers}


def blocks_of(columns):
    """Return the layers that named columns belong to."""
    raw = {"element": ELEMENT_CHANNELS, "shell": SHELL_CHANNELS, "cell": CELL_CHANNELS}
    found = set()
    for column in columns:
        channel = column.split(" of ", 1)[-1]
        known = [block for block, names in raw.items() if channel in names]
        learned = re.match(r"NE(\d)|(environment)_", channel)
        found.add(
            known[0] if known else next(filter(None, learned.groups())) if learned else "pretext"
        )
    return found


def test_sum_pooling_changes_with_the_cell(weight_files):
    options = {"weights": weight_files["cgcnn"], "layers": ("element", 0, 1), "dtype": "float64"}
    summed = SSLStructureFeaturizer(pooling=("sum",), **options)
    one, six = summed.fit_transform([rock_salt(), rock_salt() * (1, 2, 3)])
    np.testing.assert_allclose(six, 6 * one, rtol=1e-9, atol=1e-9)
    assert not np.allclose(six, one, rtol=1e-5)


def exactly(k, structure):
    """Return the mean shell channels with exactly k neighbours, the first of equal ones."""
    crystal = as_crystal(structure)
    edges = find_edges(crystal, n_neighbors=k)
    n_found = np.bincount(edges.index[1])
    first = np.cumsum(n_found) - n_found
    keep = np.concatenate([np.arange(start, start + k) for start in first])
    cut = Edges(edges.index[:, keep], edges.vector[keep], edges.cell_shift[keep], edges.full_radius)
    return shell_channels(CrystalGraphs.from_edges([crystal], [cut]).batch([0])).mean(0).numpy()


def shells_of(structure, sharply=False):
    """Return the mean shell channels, with neighbours that fade out or with a list cut after a shell."""
    batch = batch_of(structure)
    return shell_channels(batch.cut_sharply() if sharply else batch).mean(0).numpy()


@pytest.mark.parametrize("transformation", ["rotated", "permuted", "skewed"])
@pytest.mark.parametrize("name", ["NaCl", "SrTiO3"])
def test_exactly_twelve_neighbors_would_fail_on_ties(name, transformation):
    structure = CRYSTALS[name]
    same = [TRANSFORMATIONS[transformation](structure, np.random.default_rng(i)) for i in range(5)]
    kept, cut = shells_of(structure), exactly(12, structure)
    assert all(np.abs(shells_of(s) - kept).max() < 1e-9 for s in same)
    if transformation == "rotated":  # equal distances differ in the last digit, which now decides
        same += [
            rotated(permuted(structure, np.random.default_rng(i)), np.random.default_rng(i))
            for i in range(5)
        ]
    assert max(np.abs(exactly(12, s) - cut).max() for s in same) > 1e-3


JUMP = 0.1
"""Of a standard deviation over real crystals, for a step of 0.05 % in strain."""
PATHS = {
    "Fe": bcc(),
    "NiAl": cesium_chloride(),
    "Cu": fcc(),
    "NaCl": rock_salt(),
    "SrTiO3": CRYSTALS["SrTiO3"],
}


@pytest.mark.parametrize("name", PATHS)
def test_features_do_not_jump_where_shells_split(name, elastic):
    featurizer = SSLStructureFeaturizer(dtype="float64")
    scale = featurizer.fit_transform(elastic["structure"][::10].tolist()).std(axis=0)
    scale = np.maximum(scale, FLOOR)
    path = featurizer.transform([strained(PATHS[name], strain) for strain in STRAINS])
    steps = np.abs(np.diff(path, axis=0)).max(axis=0) / scale
    names = featurizer.get_feature_names_out()
    assert {n: s for n, s in zip(names, steps, strict=True) if s > JUMP} == {}
    assert steps.max() > JUMP / 1000  # the path leads somewhere


def test_features_are_steep_but_continuous_in_a_sparse_crystal(elastic):
    """Six neighbours, and the next twelve at the cutoff of 8 Å: a step four times finer makes changes finer too."""
    featurizer = SSLStructureFeaturizer(dtype="float64")
    scale = featurizer.fit_transform(elastic["structure"][::10].tolist()).std(axis=0)
    xenon, largest = simple_cubic(5.65, "Xe"), []
    for n_steps in (16, 64):
        strains = np.linspace(-0.004, 0.004, n_steps + 1)
        path = featurizer.transform([strained(xenon, strain) for strain in strains])
        steps = np.abs(np.diff(path, axis=0)).max(axis=0) / np.maximum(scale, FLOOR)
        largest.append(steps.max())
    assert 0.05 < largest[0] < 0.3
    assert largest[1] < 0.4 * largest[0]


@pytest.mark.parametrize("name", ["Fe", "NiAl"])
def test_features_of_a_list_cut_sharply_would_jump(name):
    crystals = [strained(PATHS[name], strain) for strain in STRAINS]
    for sharply, jumps in ((False, False), (True, True)):
        path = np.array([shells_of(s, sharply) for s in crystals])
        steps = np.abs(np.diff(path, axis=0)).max(axis=0)
        assert (steps[SHELL_CHANNELS.index("wide coordination")] > 0.5) == jumps


def test_a_scaler_finds_no_rounding_in_crystals_of_one_prototype():
    """What symmetry makes 0 in all of them is 0, however they are written down."""
    rng = np.random.default_rng(0)
    salts = [rotated(translated(rock_salt(a), rng), rng) for a in np.linspace(4.5, 6.5, 12)]
    written = [Structure(s.lattice, s.species, s.frac_coords.round(6)) for s in salts]
    featurizer = SSLStructureFeaturizer().set_output(transform="pandas")
    scaler = StandardScaler().fit(featurizer.fit_transform(written))
    moved = [shake(written[5], 0, 0.001)]
    assert np.abs(scaler.transform(featurizer.transform(moved))).max() < 50
    # The control: what does break the symmetry is seen.
    distorted = featurizer.transform([shake(written[5], 0, 0.1)])
    assert distorted.loc[0, "max of one-sidedness"] > 0.01


def network_inputs(structures):
    """Return what a network is told of crystals, beside their sites."""
    inputs = Inputs("ssl+raw", load_weights("default"), None)
    return Dataset.from_graphs(CrystalGraphs.from_structures(structures), inputs, 2048).crystals


def test_a_network_is_told_no_rounding_in_crystals_of_one_prototype():
    rng = np.random.default_rng(0)
    salts = [rotated(translated(rock_salt(a), rng), rng) for a in np.linspace(4.5, 6.5, 12)]
    exact, written = network_inputs(salts), network_inputs([rattled(s, 1e-6, rng) for s in salts])
    scale = Standardize(written, 0)
    scaled = [scale(torch.from_numpy(inputs)) for inputs in (exact, written)]
    assert (scaled[0] - scaled[1]).abs().max() < 0.1
    assert scaled[0].abs().max() > 1  # the control: cells do differ


def test_a_network_is_told_the_same_of_one_formula_in_any_cell():
    """Were means over the sites rounded by their number, the composition would vary, and be blown up."""
    sizes = [(1, 1, 1), (2, 1, 1), (1, 3, 1), (3, 3, 3), (5, 1, 1), (1, 1, 7)]
    lattice = np.linspace(3.8, 4.2, len(sizes))
    cells = [CRYSTALS["SrTiO3"] * size for size in sizes]
    for cell, a in zip(cells, lattice, strict=True):
        cell.scale_lattice(len(cell) / 5 * a**3)
    scaled = Standardize(network_inputs(cells), 0)(torch.from_numpy(network_inputs(cells)))
    n_of_element = 4 * len(ELEMENT_CHANNELS)
    assert scaled[:, :n_of_element].abs().max() == 0
    assert scaled.abs().max() > 1


@pytest.mark.parametrize("crystal", ["SrTiO3", "Cu"])
def test_scaled_features_of_one_formula_do_not_depend_on_the_cell(crystal):
    """Where composition never varies its columns are equal, and a scaler has no rounding to blow up."""
    rng = np.random.default_rng(0)
    sizes = [(1, 1, 1), (2, 1, 1), (1, 3, 1), (2, 2, 1), (5, 1, 1), (1, 1, 7)]
    polymorphs = [rattled(CRYSTALS[crystal] * size, 0.05, rng) for size in sizes]
    for structure in polymorphs:
        structure.scale_lattice(rng.uniform(0.9, 1.1) * structure.volume)
    featurizer = SSLStructureFeaturizer()
    scaler = StandardScaler().fit(featurizer.fit_transform(polymorphs))
    larger = [structure * (3, 1, 1) for structure in polymorphs]
    scaled = [scaler.transform(featurizer.transform(X)) for X in (polymorphs, larger)]
    np.testing.assert_allclose(*scaled, atol=1e-3)
    assert np.abs(scaled[0]).max() > 1  # the control: the others do vary


def test_scaled_features_of_one_formula_do_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    shaken = [rattled(rock_salt() * (2, 1, 1), 0.05, rng) for _ in range(12)]
    featurizer = SSLStructureFeaturizer()
    together = featurizer.fit_transform(shaken)
    scaler = StandardScaler().fit(together)
    alone = np.concatenate([featurizer.transform([structure]) for structure in shaken])
    np.testing.assert_allclose(scaler.transform(alone), scaler.transform(together), atol=1e-2)
