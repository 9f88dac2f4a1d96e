"""Moduli of networks of springs against those that can be worked out by hand, and against finite differences."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    CRYSTALS,
    batch_of,
    diamond,
    fcc,
    graphene,
    rattled_salt,
    rock_salt,
    rotated,
    shake,
    simple_cubic,
)
from pymatgen.analysis.elasticity import ElasticTensor
from pymatgen.core import Lattice, Structure
from sklearn.exceptions import ConvergenceWarning

from ssl_matfeat import springs
from ssl_matfeat.elements import PROPERTIES, property_table
from ssl_matfeat.springs import SPRING_CHANNELS, spring_channels

MOVABLE = {
    "triclinic": CRYSTALS["triclinic"],
    "diamond": diamond(),
    "graphene": graphene(),
    "rattled": shake(CRYSTALS["SrTiO3"], 1, 0.2),
}
"""Crystals whose atoms move against each other under a strain: in those of higher symmetry they need not."""


def moduli(structure, n_neighbors=12):
    """Return the spring channels by name, the stiffnesses as moduli in GPa."""
    values = spring_channels(batch_of(structure, n_neighbors=n_neighbors))[0].tolist()
    named = dict(zip(SPRING_CHANNELS, values, strict=True))
    return {
        name: np.exp(value) - 1 if name.endswith("stiffness") else value
        for name, value in named.items()
    }


def stiffness(chi, radii, d):
    """Return what the module's text says, in N/m."""
    return 167 * math.exp((radii - d) / 0.37) * (chi / d**2) ** 0.75


def test_moduli_of_copper_are_those_of_its_first_shell():
    """12 springs a site: C_abcd = Σ_e k_e [...] / 2V, of which Voigt's means need no direction."""
    a = 3.615
    d = a / 2**0.5
    k, t = stiffness(1.9**2, 2 * 1.32, d), springs.TURN
    per_volume = 10 * 12 * k * d**2 / 2 / (a**3 / 4)  # GPa
    found = moduli(fcc(a))
    bulk = per_volume / 9  # expansion only stretches
    # trace of C: over the six strains of norm 1, Σ (n·ε r)² = r² and Σ |ε r|² = 2 r²
    trace = per_volume * ((1 - t) + 2 * t)
    assert found["log affine bulk stiffness"] == pytest.approx(bulk, rel=1e-3)
    assert found["log affine shear stiffness"] == pytest.approx((trace - 3 * bulk) / 10, rel=1e-3)
    for name in ("bulk", "shear"):  # one atom in the cell has nowhere to go
        assert found[f"log {name} relaxation"] == pytest.approx(0, abs=1e-9)
    assert found["log least bulk stiffness"] == pytest.approx(bulk, rel=1e-3)
    assert found["log shear anisotropy"] < -0.01  # C44 is not (C11 - C12) / 2


@pytest.mark.parametrize("name", ["NaCl", "SrTiO3", "triclinic"])
def test_affine_moduli_obey_cauchys_relations_but_for_turning(name):
    """Central springs have G = 3/5 K whatever the crystal; t Σ k r² / 10 V of turning adds 9/10 t K."""
    found = moduli(CRYSTALS[name])
    expected = (0.6 + 0.9 * springs.TURN) * found["log affine bulk stiffness"]
    assert found["log affine shear stiffness"] == pytest.approx(expected, rel=1e-3)


def test_simple_cubic_resists_shear_by_turning_alone():
    """Six springs along the axes: C11 = k/a, C44 = t k/2a by symmetrised strain, C12 = 0."""
    a = 3.345
    batch = batch_of(simple_cubic(a), n_neighbors=6)
    network = springs._Springs(batch)
    C = (network.affine() / batch.volume[0] * 10)[0]
    k = stiffness(2.0**2, 2 * 1.40, a)
    expected = np.diag([10 * k / a] * 3 + [springs.TURN * 10 * k / a] * 3)
    shares = np.eye(6) * expected
    np.testing.assert_allclose(C, shares, rtol=1e-6, atol=1e-6 * 10 * k / a)


def energy(batch, strain, moved):
    """Return the energy of a batch of one crystal from its definition, each spring as a small matrix."""
    neighbor, center = batch.edge_index
    total = 0.5 * (springs._Springs(batch).ground[:, 0] * moved.square()).sum()
    chi, radius = (
        torch.from_numpy(property_table()[:, PROPERTIES.index(name)])[batch.numbers]
        for name in ("Electronegativity", "CovalentRadius")
    )
    for e, (j, i) in enumerate(zip(neighbor, center, strict=True)):
        r, d = batch.vector[e], batch.distance[e]
        k = stiffness(chi[i] * chi[j], 0.01 * (radius[i] + radius[j]), d) * batch.weight[e]
        along = torch.outer(r, r) / d**2
        K = k * ((1 - springs.TURN) * along + springs.TURN * torch.eye(3))
        delta = strain @ r + moved[j] - moved[i]
        total = total + 0.25 * delta @ K @ delta  # each bond stands twice
    return total


@pytest.mark.parametrize("name", ["triclinic", "diamond", "graphene", "rattled"])
def test_relaxed_moduli_are_the_curvature_of_the_least_energy(name):
    """For random strains the energy, minimised over the atoms by a general solver, is ½ ε C ε."""
    batch = batch_of(MOVABLE[name])
    network = springs._Springs(batch)
    C = (network.affine() - network.relaxation())[0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        v = torch.randn(6, generator=generator, dtype=torch.float64)
        strain = torch.einsum("v,vab->ab", v, network.strains)
        n = len(batch.numbers)
        start = torch.zeros(n, 3, dtype=torch.float64)
        gradient = torch.func.grad(lambda u, strain=strain: energy(batch, strain, u))(start)
        hessian = torch.func.hessian(lambda u, strain=strain: energy(batch, strain, u))(start)
        moved = -torch.linalg.solve(hessian.reshape(3 * n, 3 * n), gradient.reshape(3 * n))
        least = energy(batch, strain, moved.view(n, 3))
        torch.testing.assert_close(least, 0.5 * v @ C @ v, rtol=1e-8, atol=1e-8)
        assert least < 0.999 * energy(batch, strain, start)


@pytest.mark.parametrize("name", ["triclinic", "rattled"])
def test_averages_are_those_of_pymatgen(name):
    batch = batch_of(MOVABLE[name])
    network = springs._Springs(batch)
    C = ((network.affine() - network.relaxation()) * 10 / batch.volume[0])[0].numpy()
    mandel = np.sqrt([1, 1, 1, 2, 2, 2])
    tensor = ElasticTensor.from_voigt(C / np.outer(mandel, mandel))
    found = moduli(MOVABLE[name])
    assert found["log bulk stiffness"] == pytest.approx(tensor.k_voigt, rel=1e-3)
    assert found["log shear stiffness"] == pytest.approx(tensor.g_voigt, rel=1e-3)
    assert found["log least bulk stiffness"] == pytest.approx(tensor.k_reuss, rel=1e-3)
    assert found["log least shear stiffness"] == pytest.approx(tensor.g_reuss, rel=1e-3)


def test_crystals_of_a_batch_do_not_pull_at_each_other(monkeypatch):
    """Of equal and of different sizes, solved directly or by conjugate gradients."""
    crystals = [
        *MOVABLE.values(),
        shake(CRYSTALS["SrTiO3"], 2, 0.3),
        shake(CRYSTALS["NaCl"], 0, 0.2),
    ]
    alone = torch.cat([spring_channels(batch_of(crystal)) for crystal in crystals])
    assert (alone[:, 7] < -1e-4).all()  # they do relax
    all_at_once = springs._LARGEST_SYSTEM
    for dense, largest in ((1000, all_at_once), (1000, 1), (4, all_at_once), (0, all_at_once)):
        monkeypatch.setattr(springs, "_DENSE", dense)
        monkeypatch.setattr(springs, "_LARGEST_SYSTEM", largest)
        together = spring_channels(batch_of(*crystals))
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_who_does_not_come_to_rest_is_told(monkeypatch):
    monkeypatch.setattr(springs, "_DENSE", 0)
    monkeypatch.setattr(springs, "_MAX_STEPS", 3)
    with pytest.warns(ConvergenceWarning, match="did not come to rest in 3 steps"):
        spring_channels(batch_of(rattled_salt()))


def test_atoms_that_need_not_move_take_no_step(monkeypatch):
    """What rounding leaves of forces that cancel is not solved for."""
    salt = rotated(CRYSTALS["NaCl"], np.random.default_rng(0))
    expected = spring_channels(batch_of(salt))
    monkeypatch.setattr(springs, "_DENSE", 0)
    monkeypatch.setattr(springs, "_MAX_STEPS", 1)  # more would warn
    torch.testing.assert_close(spring_channels(batch_of(salt)), expected)


def test_atom_without_bonds_leaves_the_others_alone():
    """A helium atom 10 Å away from a slab has hardly a bond, and gets in nobody's way."""
    slab = graphene(20.0)
    with_helium = slab.copy()
    with_helium.append("He", [0.1, 0.1, 0.9])
    found, expected = moduli(with_helium), moduli(slab)
    assert np.isfinite(list(found.values())).all()
    for name in ("log bulk stiffness", "log shear stiffness"):
        assert found[name] == pytest.approx(expected[name], rel=0.05)


def test_hinged_tetrahedra_give_way_where_packed_spheres_do_not():
    """β-cristobalite's SiO2 bends at its oxygens, however large the cell; close packing has nowhere to go."""
    silicon = diamond(7.16, "Si")
    hinged = silicon.copy()
    for atom in silicon[:4]:  # one of the two sublattices
        for other in silicon.get_neighbors(atom, 3.2):
            hinged.append("O", (atom.coords + other.coords) / 2, coords_are_cartesian=True)
    assert hinged.composition.reduced_formula == "SiO2"
    one, many = moduli(hinged, 4), moduli(hinged * (2, 1, 2), 4)
    assert one["log shear relaxation"] < -0.3
    assert many == pytest.approx(one, rel=1e-8, abs=1e-8)
    assert moduli(fcc() * (2, 2, 2))["log shear relaxation"] == pytest.approx(0, abs=1e-9)


def test_layers_that_hardly_bind_have_soft_directions():
    """Where the list of neighbours reaches the next layer; the twelve nearest of graphite are all in its own."""
    near = Structure(
        Lattice.hexagonal(2.46, 6.7),
        ["C"] * 4,
        [[0, 0, 0], [1 / 3, 2 / 3, 0], [0, 0, 0.5], [2 / 3, 1 / 3, 0.5]],
    )
    far = Structure(Lattice.hexagonal(2.46, 9.0), ["C"] * 4, near.frac_coords)
    found = [moduli(s, n_neighbors=30) for s in (near, far)]
    for name in ("log least bulk stiffness", "log least shear stiffness"):
        assert found[1][name] < 0.1 * found[0][name]
    assert found[1]["log shear anisotropy"] < found[0]["log shear anisotropy"] < -1
    for structure in (near, far):
        assert moduli(structure)["log least shear stiffness"] < 0.01


def test_salt_is_softer_than_copper_and_a_gas_has_no_stiffness():
    copper, salt = moduli(fcc()), moduli(rock_salt())
    gas = moduli(fcc(12.0, "Ar"))
    assert copper["log least bulk stiffness"] > 3 * salt["log least bulk stiffness"] > 30
    assert 0 <= gas["log affine bulk stiffness"] < 1e-3
    assert np.isfinite(list(gas.values())).all()


def test_stiffness_goes_with_the_moduli_of_real_crystals(elastic):
    """docs/features.rst has the correlation of the whole set, 0.90; every tenth crystal will do here."""
    frame = elastic.iloc[::10]
    values = spring_channels(batch_of(*frame["structure"])).numpy()
    bulk = np.corrcoef(
        values[:, SPRING_CHANNELS.index("log bulk stiffness")], np.log(frame["K_VRH"])
    )
    volumes = [s.volume / len(s) for s in frame["structure"]]
    by_volume = np.corrcoef(volumes, np.log(frame["K_VRH"]))
    assert bulk[0, 1] > 0.85 > -by_volume[0, 1]
