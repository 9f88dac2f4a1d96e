"""Raw channels against values that can be worked out by hand or are found in textbooks."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    CRYSTALS,
    batch_of,
    bcc,
    diamond,
    fcc,
    graphene,
    hcp,
    perovskite,
    rattled_salt,
    rock_salt,
    simple_cubic,
)
from pymatgen.core import Element, Lattice, Structure
from scipy.special import sph_harm_y

from ssl_matfeat import channels
from ssl_matfeat.channels import (
    CELL_CHANNELS,
    ELEMENT_CHANNELS,
    SHELL_CHANNELS,
    cell_channels,
    element_channels,
    shell_channels,
    spherical_harmonics,
)
from ssl_matfeat.elements import indicator_table, property_table, radius_table

U = 1.66053906660  # g/cm³ of one u/Å³


def shell(structure, n_neighbors=12):
    """Return the shell channels of the first site by name."""
    values = shell_channels(batch_of(structure, n_neighbors=n_neighbors))
    return dict(zip(SHELL_CHANNELS, values[0].tolist(), strict=True))


def cell(structure, n_neighbors=12):
    values = cell_channels(batch_of(structure, n_neighbors=n_neighbors))
    return dict(zip(CELL_CHANNELS, values[0].tolist(), strict=True))


def chain(*gaps, elements=None, width=20.0):
    """Return atoms on a line with the given distances between them, far from other lines."""
    length = sum(gaps)
    x = np.cumsum([0, *gaps[:-1]]) / length
    lattice = Lattice.orthorhombic(length, width, width)
    return Structure(lattice, elements or ["C"] * len(gaps), [[xi, 0, 0] for xi in x])


IDEAL_HCP = hcp(3.0, 3.0 * (8 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("structure", "n_neighbors", "expected"),
    [
        (fcc(), 12, {"Q3": 0, "Q4": 0.19094, "Q6": 0.57452}),
        (IDEAL_HCP, 12, {"Q3": 0.07607, "Q4": 0.09722, "Q6": 0.48476}),
        (bcc(), 8, {"Q3": 0, "Q4": 0.50918, "Q6": 0.62854}),
        (simple_cubic(), 6, {"Q3": 0, "Q4": 0.76376, "Q6": 0.35355}),
        (diamond(), 4, {"Q3": 0.74536, "Q4": 0.50918, "Q6": 0.62854}),
    ],
    ids=["fcc", "hcp", "bcc", "sc", "diamond"],
)
def test_steinhardt_order_of_perfect_shells(structure, n_neighbors, expected):
    found = shell(structure, n_neighbors)
    for name, value in expected.items():
        assert found[f"bond order {name}"] == pytest.approx(value, abs=2e-5)
    assert found["soft coordination"] == pytest.approx(n_neighbors, abs=1e-9)
    assert found["bond length spread"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("structure", [fcc(), bcc(), simple_cubic(), rock_salt(), diamond()])
def test_cubic_sites_have_no_direction(structure):
    found = shell(structure)
    for width in ("shell", "wide"):
        assert found[f"{width} anisotropy"] == pytest.approx(0, abs=1e-9)
        assert found[f"{width} flatness"] == pytest.approx(1 / 3)
    crystal = cell(structure)
    for name in CELL_CHANNELS[5:9]:
        assert "crystal" in name
        assert crystal[name] == pytest.approx(1 / 3)


def test_first_shell_of_rock_salt():
    sodium, chlorine = (Element(e) for e in ("Na", "Cl"))
    found = shell(rock_salt(5.64), n_neighbors=6)
    d, radii = 2.82, 1.90 + 0.79  # calculated radii of Na and Cl (Clementi, Å)
    inverse_mass = 1 / sodium.atomic_mass + 1 / chlorine.atomic_mass
    force_constant = (0.93 * 3.16 / d**2) ** 0.75
    melting = (370.87 * 171.6) ** 0.5
    expected = {
        "bond length": d,
        "nearest distance": d,
        "wide bond length": d,
        "relative bond length": d / radii,
        "electronegativity difference": 3.16 - 0.93,
        "signed electronegativity difference": 3.16 - 0.93,
        "like bonds": 0,
        "neighbour mass": 35.453,
        "neighbour valence": 7,
        "inverse root reduced mass": inverse_mass**0.5,
        "Badger frequency": (inverse_mass / d**3) ** 0.5,
        "Lindemann frequency": (melting * inverse_mass) ** 0.5 / d,
        "Gordy force constant": force_constant,
        "Gordy frequency": (force_constant * inverse_mass) ** 0.5,
        "overlap": math.exp(-3 * d / radii),
        "soft coordination": 6,
        "wide coordination": 6,
        "one-sidedness": 0,
        "wide one-sidedness": 0,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-9), name
    back = shell_channels(batch_of(rock_salt(5.64), n_neighbors=6))[-1]  # of a Cl
    assert back[SHELL_CHANNELS.index("signed electronegativity difference")] == pytest.approx(-2.23)


def test_farther_shells_fade_out():
    near, far = 2.82, 5.64 / 2**0.5
    found = shell(rock_salt(5.64), n_neighbors=12)
    weight = 12 * math.exp((near - far) / 0.3)
    assert found["soft coordination"] == pytest.approx(6 + weight)
    assert found["wide coordination"] == pytest.approx(6 + 12 * math.exp(near - far))
    assert found["like bonds"] == pytest.approx(weight / (6 + weight))
    assert found["bond length"] == pytest.approx((6 * near + weight * far) / (6 + weight))
    assert found["nearest distance"] == pytest.approx(near)


def test_uneven_chain():
    found = shell(chain(1.4, 1.6), n_neighbors=2)
    w, wide = math.exp(-0.2 / 0.3), math.exp(-0.2)
    mean = (1.4 + 1.6 * w) / (1 + w)
    variance = ((1.4 - mean) ** 2 + w * (1.6 - mean) ** 2) / (1 + w)
    expected = {
        "bond length": mean,
        "bond length spread": variance**0.5,
        "soft coordination": 1 + w,
        "wide coordination": 1 + wide,
        "one-sidedness": (1 - w) / (1 + w),
        "wide one-sidedness": (1 - wide) / (1 + wide),
        "shell anisotropy": 1,
        "shell flatness": 0,
        "bond order Q3": (1 - w) / (1 + w),
        "bond order Q4": 1,
        "bond order Q6": 1,
        "wide anisotropy": 1,
        "like bonds": 1,
        "electronegativity difference": 0,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


def test_chains_are_elongated_and_layers_flat():
    line = cell(chain(1.4, 1.6), n_neighbors=2)
    assert line["crystal elongation"] == pytest.approx(1)
    assert line["crystal flatness"] == pytest.approx(0, abs=1e-9)
    layer = cell(graphene(), n_neighbors=3)
    assert layer["crystal elongation"] == pytest.approx(1 / 2)
    assert layer["crystal flatness"] == pytest.approx(0, abs=1e-9)
    # Anisotropic sites of a crystal may cancel: O in SrTiO3, bound along x, y and z in turn
    assert cell(perovskite())["crystal flatness"] == pytest.approx(1 / 3)
    assert shell(perovskite().copy(), 2)["shell flatness"] == pytest.approx(1 / 3)
    oxygen = shell_channels(batch_of(perovskite(), n_neighbors=2))[2]
    assert oxygen[SHELL_CHANNELS.index("shell anisotropy")] == pytest.approx(1)


@pytest.mark.parametrize(
    ("structure", "density", "per_atom"),
    [
        (rock_salt(5.64), 4 * 58.443 * U / 5.64**3, 5.64**3 / 8),
        (bcc(2.866), 7.874, 2.866**3 / 2),
        (diamond(3.567), 3.515, 3.567**3 / 8),
        (fcc(3.615), 8.93, 3.615**3 / 4),
    ],
    ids=["NaCl", "Fe", "C", "Cu"],
)
def test_density(structure, density, per_atom):
    found = cell(structure)
    assert found["mass density"] == pytest.approx(density, rel=2e-3)
    assert found["mass density"] == pytest.approx(structure.density, rel=1e-3)
    assert found["volume per atom"] == pytest.approx(per_atom)


def test_packing_and_electrons():
    found = cell(fcc(3.615))
    assert found["sphere volume fraction"] == pytest.approx(
        4 / 3 * math.pi * 1.45**3 / (3.615**3 / 4)
    )
    assert found["elemental packing"] == pytest.approx(1, abs=0.1)  # it is the ground state
    assert found["valence electron density"] == pytest.approx(11 / (3.615**3 / 4))


def test_cell_channels_of_a_batch_are_those_of_each_crystal():
    together = cell_channels(batch_of(*CRYSTALS.values()))
    alone = torch.cat([cell_channels(batch_of(s)) for s in CRYSTALS.values()])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_eigenvalues_in_pieces_are_the_same(monkeypatch):
    batch = batch_of(*CRYSTALS.values())
    whole = shell_channels(batch), cell_channels(batch)
    monkeypatch.setattr(channels, "_MAX_MATRICES", 3)
    for piecewise, expected in zip(
        (shell_channels(batch), cell_channels(batch)), whole, strict=True
    ):
        torch.testing.assert_close(piecewise, expected, rtol=0, atol=1e-12)


def test_scaled_crystal_changes_lengths_and_not_shapes():
    small, large = shell(rock_salt(5.4), 6), shell(rock_salt(5.8), 6)
    for name in ("bond length", "relative bond length", "nearest distance"):
        assert large[name] / small[name] == pytest.approx(5.8 / 5.4)
    for name in ("overlap", "Badger frequency", "Lindemann frequency", "Gordy force constant"):
        assert large[name] < small[name]
    for name in ("electronegativity difference", "neighbour mass", "bond order Q4"):
        assert large[name] == pytest.approx(small[name])
    small, large = cell(rock_salt(5.4)), cell(rock_salt(5.8))
    for name in ("mass density", *CELL_CHANNELS[2:5]):
        assert large[name] / small[name] == pytest.approx((5.4 / 5.8) ** 3)


def test_disorder_shows():
    calm = shell_channels(batch_of(rattled_salt(0.01), n_neighbors=6)).mean(0)
    wild = shell_channels(batch_of(rattled_salt(0.1), n_neighbors=6)).mean(0)
    for name in ("bond length spread", "one-sidedness", "shell anisotropy", "bond order Q3"):
        i = SHELL_CHANNELS.index(name)
        assert wild[i] > 3 * calm[i], name


def test_channels_of_real_crystals_are_finite_and_alive(real_crystals):
    batch = batch_of(*real_crystals)
    for values, names in [
        (element_channels(batch), ELEMENT_CHANNELS),
        (shell_channels(batch), SHELL_CHANNELS),
        (cell_channels(batch), CELL_CHANNELS),
    ]:
        assert values.shape[1] == len(names) == len(set(names))
        assert values.isfinite().all()
        if names != ELEMENT_CHANNELS:  # some of which are zero for most elements
            assert (values.std(0) > 0).all()


def random_directions(n=50):
    unit = np.random.default_rng(0).normal(size=(n, 3))
    poles = [[0, 0, 1], [0, 0, -1], [1, 0, 0], [0, -1, 0]]
    return np.concatenate([unit / np.linalg.norm(unit, axis=1, keepdims=True), poles])


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4, 6, 8])
def test_spherical_harmonics_against_scipy(degree):
    unit = random_directions()
    theta, phi = np.arccos(unit[:, 2]), np.arctan2(unit[:, 1], unit[:, 0])
    columns = [sph_harm_y(degree, 0, theta, phi).real]
    for m in range(1, degree + 1):
        y = (-1) ** m * math.sqrt(2) * sph_harm_y(degree, m, theta, phi)
        columns += [y.real, y.imag]
    expected = np.stack(columns, axis=1) * math.sqrt(4 * math.pi / (2 * degree + 1))
    (found,) = spherical_harmonics(torch.from_numpy(unit), (degree,))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_spherical_harmonics_of_several_degrees_sum_to_one():
    found = spherical_harmonics(torch.from_numpy(random_directions()), (3, 4, 6))
    assert [y.shape[1] for y in found] == [7, 9, 13]
    for y in found:
        np.testing.assert_allclose((y**2).sum(1), 1, atol=1e-12)


def test_element_tables_cover_every_element():
    for table, width in [(property_table(), 22), (indicator_table(), 92)]:
        assert table.shape == (104, width)
        assert np.isfinite(table[1:]).all()
    assert radius_table().shape == (104,)
    assert np.all((radius_table()[1:] > 0.2) & (radius_table()[1:] < 3.1))
    assert np.isnan(property_table()[0]).all()
    assert (np.ptp(property_table()[1:], axis=0) > 0).all()  # no column is the same for all
    assert not indicator_table()[0].any()


def test_element_tables_hold_known_values():
    table = property_table()
    known = {"Number": 26, "Column": 8, "Row": 4, "Electronegativity": 1.83, "NdValence": 6}
    for name, value in known.items():
        assert table[26, ELEMENT_CHANNELS.index(name)] == value
    assert table[:, ELEMENT_CHANNELS.index("Number")][1:].tolist() == list(range(1, 104))
    assert table[8, ELEMENT_CHANNELS.index("AtomicWeight")] == pytest.approx(15.999, abs=1e-3)
    assert radius_table()[[11, 17, 29]].tolist() == [1.90, 0.79, 1.45]
    assert radius_table()[103] == 1.75


def test_indicators_are_one_hot_for_nine_properties():
    table = indicator_table()[1:]
    assert set(np.unique(table)) == {0, 1}
    assert set(table.sum(axis=1)) <= set(range(6, 10))  # a value may be missing
    assert table[[2, 10, 18]][:, :19].argmax(1).tolist() == [1, 1, 1]  # the group of Li, Na, K
    assert len(np.unique(table[:100], axis=0)) > 90  # some lanthanides look the same


def test_element_channels_look_up_the_table():
    batch = batch_of(perovskite())
    np.testing.assert_array_equal(element_channels(batch), property_table()[[38, 22, 8, 8, 8]])
