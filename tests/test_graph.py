"""Neighbours against hand-made and brute-force references; batches and files of graphs."""

import itertools
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import (
    CRYSTALS,
    batch_of,
    bcc,
    fcc,
    graphene,
    hcp,
    perovskite,
    rattled_salt,
    rock_salt,
    simple_cubic,
    triclinic,
)
from pymatgen.core import Lattice, Structure
from torch_geometric.data import Batch
from torch_geometric.nn import CGConv

from ssl_matfeat import StructureError
from ssl_matfeat._validation import as_crystal
from ssl_matfeat.graph import FADE, SHELL_TOLERANCE, CrystalGraphs, find_edges


def edges_of(structure, cutoff=8.0, n_neighbors=12):
    return find_edges(as_crystal(structure), cutoff, n_neighbors)


def lengths(edges):
    return np.linalg.norm(edges.vector, axis=1)


def by_site(edges, site):
    """Return the distances from one site, in ascending order."""
    return lengths(edges)[edges.index[1] == site]


def full_shells(edges, site):
    """Return those of the neighbours that count fully, and of the whole shell of the last one."""
    distances = by_site(edges, site)
    return distances[distances <= edges.full_radius[site] + SHELL_TOLERANCE]


def brute_force(structure, reach=4):
    """Return for each site the sorted distances to every other atom of a block of cells."""
    images = np.array(list(itertools.product(range(-reach, reach + 1), repeat=3)))
    positions = structure.cart_coords
    everything = (positions[:, None] + images @ structure.lattice.matrix).reshape(-1, 3)
    distances = np.sort(np.linalg.norm(everything - positions[:, None], axis=-1), axis=1)
    return distances[:, 1:]  # but the atom itself


@pytest.mark.parametrize(
    ("structure", "n_neighbors", "expected"),
    [
        (rock_salt(5.64), 6, {2.82: 6}),
        (rock_salt(5.64), 12, {2.82: 6, 5.64 / 2**0.5: 12}),
        (fcc(3.6), 12, {3.6 / 2**0.5: 12}),
        (fcc(3.6), 13, {3.6 / 2**0.5: 12, 3.6: 6}),
        (bcc(2.8), 8, {2.8 * 3**0.5 / 2: 8}),
        (bcc(2.8), 12, {2.8 * 3**0.5 / 2: 8, 2.8: 6}),
        (simple_cubic(3.3), 12, {3.3: 6, 3.3 * 2**0.5: 12}),
        (hcp(3.0, 3.0 * (8 / 3) ** 0.5), 12, {3.0: 12}),
        (hcp(3.2, 5.1), 12, {(3.2**2 / 3 + 5.1**2 / 4) ** 0.5: 6, 3.2: 6}),
        (hcp(3.2, 5.1), 1, {(3.2**2 / 3 + 5.1**2 / 4) ** 0.5: 6}),
        (graphene(), 3, {2.46 / 3**0.5: 3}),
    ],
)
def test_shells_of_simple_crystals(structure, n_neighbors, expected):
    edges = edges_of(structure, n_neighbors=n_neighbors)
    shells = np.repeat(list(expected), list(expected.values()))
    for site in range(len(structure)):
        np.testing.assert_allclose(full_shells(edges, site), shells, rtol=1e-12)


def test_whole_last_shell_of_perovskite():
    n_edges = np.bincount(edges_of(perovskite()).index[1])
    # Ti: 6 O and 8 Sr; O: 2 Ti, and 4 Sr with 8 O, all at a / sqrt(2)
    assert n_edges.tolist() == [12, 14, 14, 14, 14]


@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.parametrize("n_neighbors", [1, 5, 12, 20])
def test_nearest_neighbors_against_brute_force(name, n_neighbors):
    structure = CRYSTALS[name]
    edges = edges_of(structure, n_neighbors=n_neighbors)
    for site, distances in enumerate(brute_force(structure)):
        last = distances[n_neighbors - 1]
        assert edges.full_radius[site] == pytest.approx(last, abs=1e-9)
        np.testing.assert_allclose(
            by_site(edges, site), distances[distances < last + FADE], atol=1e-9
        )
        np.testing.assert_allclose(
            full_shells(edges, site), distances[distances <= last + SHELL_TOLERANCE], atol=1e-9
        )


def test_weights_fade_out_beyond_the_last_full_neighbor():
    batch = batch_of(rattled_salt(), n_neighbors=12)
    _, center = batch.edge_index
    for site in range(len(batch.numbers)):
        distance, weight = batch.distance[center == site], batch.weight[center == site]
        assert (weight[:12] == 1).all()
        assert (weight.diff() <= 0).all()
        x = (distance[11] + FADE - distance[12:]) / FADE
        torch.testing.assert_close(weight[12:], 3 * x**2 - 2 * x**3)
    assert ((batch.weight > 0.2) & (batch.weight < 0.8)).sum() > 20


def test_list_cut_sharply_holds_whole_shells_and_nothing_else():
    batch = batch_of(rattled_salt(), perovskite(), simple_cubic(7.0))
    sharp = batch.cut_sharply()
    n_edges = torch.bincount(sharp.edge_index[1])
    assert n_edges[:64].min() == 12
    assert n_edges[:64].max() == 13  # two that are equally far, to 0.001 Å
    assert n_edges[64:].tolist() == [12, 14, 14, 14, 14, 6]
    assert len(sharp.distance) < len(batch.distance)
    torch.testing.assert_close(sharp.vector.norm(dim=1), sharp.distance)
    again = sharp.cut_sharply()
    assert all(torch.equal(getattr(again, key), value) for key, value in asdict(sharp).items())


@pytest.mark.parametrize("cutoff", [3.0, 6.3])
def test_radius_against_pymatgen(real_crystals, cutoff):
    for structure in [*real_crystals[:20], *CRYSTALS.values()]:
        # Images are counted from where the sites are, which is inside the cell for us.
        structure = Structure(
            structure.lattice, structure.species, as_crystal(structure).frac_coords
        )
        expected = {
            (center, n.index, *(int(i) for i in n.image))
            for center, found in enumerate(structure.get_all_neighbors(cutoff))
            for n in found
        }
        if {center for center, *_ in expected} != set(range(len(structure))):
            continue  # lonely sites look farther, which has a test of its own
        edges = edges_of(structure, cutoff=cutoff, n_neighbors=None)
        neighbor, center = edges.index
        found = set(zip(center, neighbor, *edges.cell_shift.T, strict=True))
        assert expected <= found
        assert len(found) == len(center)
        keys = zip(center, neighbor, *edges.cell_shift.T, strict=True)
        margin = lengths(edges)[[key not in expected for key in keys]]
        assert np.all(margin >= cutoff - 1e-8)
        assert np.all(margin < cutoff + FADE)


@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.parametrize("n_neighbors", [12, None])
def test_vectors_are_positions_and_shifts(name, n_neighbors):
    structure = CRYSTALS[name]
    edges = edges_of(structure, 6.0, n_neighbors)
    neighbor, center = edges.index
    frac = as_crystal(structure).frac_coords
    assert ((frac >= 0) & (frac <= 1)).all()
    moved = frac - structure.frac_coords
    np.testing.assert_allclose(moved, moved.round(), atol=1e-12)
    expected = (frac[neighbor] + edges.cell_shift - frac[center]) @ structure.lattice.matrix
    np.testing.assert_allclose(edges.vector, expected, atol=1e-12)


def test_edges_are_ordered_by_center_then_distance():
    edges = edges_of(triclinic())
    order = np.lexsort((lengths(edges), edges.index[1]))
    assert order.tolist() == list(range(len(order)))


def test_edges_within_a_radius_come_in_pairs():
    edges = edges_of(rattled_salt(), cutoff=4.5, n_neighbors=None)
    neighbor, center = edges.index
    forward = set(zip(center, neighbor, *edges.cell_shift.T, strict=True))
    backward = set(zip(neighbor, center, *-edges.cell_shift.T, strict=True))
    assert forward == backward
    nearest = edges_of(rattled_salt(), n_neighbors=12)  # negative control: k nearest do not
    assert set(map(tuple, nearest.index.T)) != set(map(tuple, nearest.index[::-1].T))


def test_no_more_than_the_cutoff_in_a_sparse_crystal():
    np.testing.assert_allclose(lengths(edges_of(simple_cubic(7.0))), [7.0] * 6)
    beyond = batch_of(simple_cubic(7.0, "Po"), cutoff=6.9)
    assert (beyond.weight == 1).all()  # of a lonely site the nearest ones count fully


def test_lonely_site_takes_its_nearest_shell():
    np.testing.assert_allclose(lengths(edges_of(simple_cubic(10.0))), [10.0] * 6)
    np.testing.assert_allclose(lengths(edges_of(simple_cubic(15.9))), [15.9] * 6)
    np.testing.assert_allclose(lengths(edges_of(simple_cubic(3.0), cutoff=2.0)), [3.0] * 6)
    assert (batch_of(simple_cubic(10.0)).weight == 1).all()


def test_lonely_site_leaves_the_others_as_they_are():
    slab = graphene(40.0)
    alone = edges_of(slab)
    slab.append("Ar", [0.1, 0.2, 0.5 + 10.5 / 40])
    slab.make_supercell([6, 6, 1])
    slab.remove_sites([i for i, s in enumerate(slab) if s.specie.symbol == "Ar"][1:])
    edges = edges_of(slab)
    argon = len(slab) - 1
    assert 8.0 < by_site(edges, argon).min() <= by_site(edges, argon).max() < 16.0
    far = next(i for i in range(argon) if slab.get_distance(i, argon) > 12)
    np.testing.assert_allclose(by_site(edges, far), by_site(alone, 0), atol=1e-9)


@pytest.mark.parametrize(("a", "cutoff"), [(16.1, 8.0), (4.1, 2.0)])
def test_site_alone_within_twice_the_cutoff_is_refused(a, cutoff):
    with pytest.raises(StructureError, match=rf"no neighbour within {2 * cutoff:g} Å"):
        edges_of(simple_cubic(a), cutoff=cutoff)


def test_two_thousand_sites():
    edges = edges_of(rock_salt() * (10, 5, 5))
    assert np.bincount(edges.index[1]).tolist() == [18] * 2000
    assert lengths(edges).max() == pytest.approx(5.64 / 2**0.5)


def test_thin_slab_sees_no_periodic_image_across_the_vacuum():
    edges = edges_of(graphene(60.0))
    assert np.abs(edges.vector[:, 2]).max() < 1e-9
    assert np.bincount(edges.index[1]).tolist() == [12, 12]  # 3 + 6 + 3


def test_structure_that_repeats_in_two_directions_only():
    lattice = Lattice(Lattice.cubic(3.0).matrix, pbc=(True, True, False))
    layer = Structure(lattice, ["Cu"], [[0, 0, 0]])
    np.testing.assert_allclose(lengths(edges_of(layer, n_neighbors=4)), [3.0] * 4)


def test_very_flat_cell():
    cell = Structure(Lattice.orthorhombic(30.0, 30.0, 1.0), ["H", "H"], [[0, 0, 0], [0.5, 0.5, 0]])
    assert np.all(by_site(edges_of(cell), 0) <= 8.0)


@pytest.fixture(scope="module")
def graphs(real_crystals):
    return CrystalGraphs.from_structures([*real_crystals[:12], *CRYSTALS.values()])


def test_batch_counts_sites_on(graphs):
    order = [5, 14, 0, 14]
    batch = graphs.batch(order)
    n_sites = 0
    sites, edges = [], []
    for crystal in order:
        one = graphs.batch([crystal])
        sites.append(one.numbers)
        edges.append(one.edge_index + n_sites)
        n_sites += len(one.numbers)
    assert torch.equal(batch.numbers, torch.cat(sites))
    assert torch.equal(batch.edge_index, torch.cat(edges, dim=1))
    assert torch.bincount(batch.batch).tolist() == graphs.n_sites[order].tolist()
    assert torch.equal(batch.batch[batch.edge_index[0]], batch.batch[batch.edge_index[1]])
    assert batch.num_graphs == 4


def test_batch_holds_the_structures(graphs, real_crystals):
    batch = graphs.batch([3, 1])
    atoms = [*real_crystals[3], *real_crystals[1]]
    assert batch.numbers.tolist() == [site.specie.Z for site in atoms]
    volumes = [real_crystals[3].volume, real_crystals[1].volume]
    np.testing.assert_allclose(batch.volume, volumes)
    np.testing.assert_allclose(batch.distance, batch.vector.norm(dim=1))


@pytest.mark.parametrize("max_edges", [1, 200, 700, 10**9])
def test_batches_cover_each_crystal_once_and_are_bound_by_edges(graphs, max_edges):
    order = np.random.default_rng(0).permutation(len(graphs))
    runs = list(graphs.batches(max_edges, order))
    assert np.concatenate(runs).tolist() == order.tolist()
    assert all(len(run) == 1 or graphs.n_edges[run].sum() <= max_edges for run in runs)
    for run, following in itertools.pairwise(runs):  # and no batch is smaller than it must be
        assert graphs.n_edges[run].sum() + graphs.n_edges[following[0]] > max_edges


def test_batches_default_to_the_stored_order(graphs):
    assert np.concatenate(list(graphs.batches(500))).tolist() == list(range(len(graphs)))


def test_saved_graphs_come_back_mapped_into_memory(graphs, tmp_path):
    graphs.save(tmp_path / "graphs")
    loaded = CrystalGraphs.load(tmp_path / "graphs")
    assert isinstance(loaded.vector, np.memmap)
    for name, array in vars(graphs).items():
        found = getattr(loaded, name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    saved, kept = loaded.batch([2, 0]), graphs.batch([2, 0])
    assert all(torch.equal(getattr(saved, key), value) for key, value in asdict(kept).items())
    assert loaded.data(1).num_nodes == graphs.n_sites[1]


def test_a_batch_computes_a_function_once_and_its_copy_anew(graphs):
    def mean_distance(batch):
        return batch.distance.mean()

    batch = graphs.batch([0])
    mean = batch.once(mean_distance)
    assert batch.once(mean_distance) is mean
    assert batch.to("cpu", torch.float32).once(mean_distance).dtype == torch.float32


def test_files_of_graphs_are_never_unpickled(graphs, tmp_path):
    graphs.save(tmp_path)
    np.save(tmp_path / "numbers.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        CrystalGraphs.load(tmp_path)


def test_pyg_data_batches_and_convolves(graphs):
    order = [4, 13, 2]
    joined = Batch.from_data_list([graphs.data(i) for i in order])
    ours = graphs.batch(order)
    for name in ("numbers", "edge_index", "vector", "cell_shift", "full_radius", "batch", "volume"):
        assert torch.equal(getattr(joined, name), getattr(ours, name)), name
    torch.manual_seed(0)
    convolution = CGConv(8, dim=1).double()
    x = torch.randn(len(ours.numbers), 8, dtype=torch.float64)
    out = convolution(x, joined.edge_index, joined.distance[:, None])
    assert torch.equal(out, convolution(x, ours.edge_index, ours.distance[:, None]))
    assert not torch.equal(out, x)
    assert torch.equal(joined.edge_weight, ours.weight)
    assert (ours.weight < 1).any()


def test_batch_moves_floats_to_a_precision_and_leaves_integers():
    batch = batch_of(rock_salt(), dtype=torch.float32)
    assert batch.vector.dtype == batch.distance.dtype == batch.volume.dtype == torch.float32
    assert batch.numbers.dtype == batch.edge_index.dtype == batch.cell_shift.dtype == torch.int64
