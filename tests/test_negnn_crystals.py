"""NEGNN: what its networks see of a crystal, and what they must not see: how it is written down, and its companions."""

import numpy as np
import pytest
import torch
from conftest import (
    CRYSTALS,
    QUICK_NETWORK,
    STRAINS,
    TRANSFORMATIONS,
    batch_of,
    cesium_chloride,
    nearest_distances,
    quick_network,
    shake,
    strained,
)
from pymatgen.core import Structure

from ssl_matfeat import StructureError
from ssl_matfeat.backbones import BACKBONES
from ssl_matfeat.examples import Dataset, Inputs
from ssl_matfeat.graph import CrystalBatch, CrystalGraphs
from ssl_matfeat.negnn import _base
from ssl_matfeat.network import LEARNED_WEIGHT, Standardize


@pytest.mark.parametrize("backbone", sorted(set(BACKBONES) - {"gcn"}))
def test_backbones_see_distances(backbone):
    """They fit what only distances tell: all crystals hold the same elements. GCN hardly sees any."""
    salt = [CRYSTALS["NaCl"].copy() for _ in range(16)]
    y = np.linspace(-1, 1, 16)
    for strain, crystal in zip(y, salt, strict=True):
        crystal.apply_strain(0.05 * strain)
    model = quick_network(node_features="onehot", backbone=backbone, max_epochs=200, dropout=0.0)
    assert np.abs(model.fit(salt, y).predict(salt) - y).mean() < 0.2


@pytest.mark.parametrize("backbone", BACKBONES)
def test_invariance(backbone, few_crystals):
    parameters = {"n_layers": 2, "n_channels": 16, "max_epochs": 20}
    model = quick_network(node_features="onehot", backbone=backbone, **parameters).fit(
        *few_crystals
    )
    for name, crystal in CRYSTALS.items():
        reference = model.predict([crystal])
        for change, transform in TRANSFORMATIONS.items():
            other = transform(crystal, np.random.default_rng(0))
            np.testing.assert_allclose(
                model.predict([other]), reference, atol=1e-5, err_msg=f"{name} {change}"
            )
    # The control: what is no symmetry does change the number.
    before = list(CRYSTALS.values())
    after = [shake(crystal, 0, 0.3) for crystal in before]
    assert np.abs(model.predict(after) - model.predict(before)).max() > 1e-3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_states_do_not_jump_where_a_shell_splits(backbone):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = BACKBONES[backbone](16, 2).double().eval()
        x = torch.randn(2, 16, dtype=torch.float64)
    batches = [batch_of(strained(cesium_chloride(), strain)) for strain in STRAINS]
    largest = {}
    for kind, seen in (
        ("fading", batches),
        ("sharp", [batch.cut_sharply() for batch in batches]),
    ):
        with torch.no_grad():
            path = torch.stack([network(x, batch) for batch in seen])
        largest[kind] = path.diff(dim=0).abs().max()
    # The control: a list cut after a shell jumps, which PyG's GATv2, without weights of edges, always has.
    assert (largest["fading"] < 0.1 * largest["sharp"]) == (backbone != "gatv2")


def test_painn_sees_angles_and_cgcnn_does_not():
    """Three atoms bent or straight, distances between neighbours equal: only directions differ."""
    batch = batch_of(CRYSTALS["triclinic"], dtype=torch.float32)
    bent = batch.to("cpu")
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(len(bent.vector), 3, generator=generator))
    bent.vector = unit * bent.distance[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(len(batch.numbers), 16)
        networks = {name: BACKBONES[name](16, 2).eval() for name in ("cgcnn", "painn")}
    with torch.no_grad():
        assert torch.equal(networks["cgcnn"](x, batch), networks["cgcnn"](x, bent))
        assert not torch.allclose(
            networks["painn"](x, batch), networks["painn"](x, bent), atol=1e-3
        )


def torsion(degrees):
    """Return the chain O-H-H-O with right angles, bonds of 1 Å alone, and this angle between its ends."""
    turned = np.deg2rad(degrees)
    first, middle, last = [1.0, 0, 0], [0, 0, 1.0], [np.cos(turned), np.sin(turned), 0]
    bonds = torch.tensor([first, middle, last])  # from sites 1 to 0, 1 to 2, 2 to 3
    neighbor, center = torch.tensor([[0, 2, 3], [1, 1, 2]])
    chain = CrystalBatch(
        numbers=torch.tensor([8, 1, 1, 8]),
        edge_index=torch.stack([torch.cat([neighbor, center]), torch.cat([center, neighbor])]),
        vector=torch.cat([bonds, -bonds]),
        distance=torch.ones(6),
        cell_shift=torch.zeros(6, 3, dtype=torch.int64),
        full_radius=torch.ones(4),
        batch=torch.zeros(4, dtype=torch.int64),
        volume=torch.tensor([100.0]),
    )
    return chain.to("cpu", torch.float64)


def test_painn_passes_directions_on():
    """How two bonds on either side of a third are turned shows in no distance and in no angle between neighbours."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(4, 16).double()
        two, one = (BACKBONES["painn"](16, n_layers).double().eval() for n_layers in (2, 1))
    with torch.no_grad():
        moved = (two(x, torsion(0)) - two(x, torsion(90))).abs().amax(dim=1)
        assert moved[[1, 2]].min() > 1e-5  # untrained, and of fourth order in its weights
        mirrored = two(x, torsion(-90))
        torch.testing.assert_close(two(x, torsion(90)), mirrored)  # an angle, not a hand
        torch.testing.assert_close(one(x, torsion(0)), one(x, torsion(90)))  # one layer passes none


def test_schnet_hears_nothing_from_beyond_its_cutoff():
    """Atoms without near neighbours have far ones, for which PyG's cosine rises again."""
    torch.manual_seed(0)
    backbone = BACKBONES["schnet"](8, 1).eval()
    for parameter in backbone.parameters():  # as after training: biases start from 0
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 8)
    near, far, further = (
        backbone(x, batch_of(Structure(np.diag([a] * 3), ["He"], [[0, 0, 0]]), dtype=torch.float32))
        for a in (6.0, 10.0, 15.0)
    )
    torch.testing.assert_close(far, further)
    assert not torch.allclose(near, far)


def test_head_is_told_mean_and_maximum_of_the_states(few_crystals, fitted_network):
    network = fitted_network.networks_[0]
    graphs = CrystalGraphs.from_structures(few_crystals[0][:6])
    dataset = Dataset.from_graphs(graphs, fitted_network.inputs_, 2048)
    example = dataset.batch(np.arange(6), "cpu")
    states, told = [], []
    hooks = [
        network.backbone.register_forward_hook(lambda module, given, state: states.append(state)),
        network.head.register_forward_pre_hook(lambda module, given: told.append(given[0])),
    ]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    n_channels = states[0].shape[1]
    for crystal, row in enumerate(told[0]):
        state = states[0][example.graph.batch == crystal]
        expected = torch.stack([state.mean(0), state.amax(0)], dim=1).flatten()
        torch.testing.assert_close(row[: 2 * n_channels], expected)


def test_predictions_do_not_depend_on_companions(few_crystals, fitted_network):
    X, _ = few_crystals
    together = fitted_network.predict(X)
    alone = np.concatenate([fitted_network.predict([s]) for s in X])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_predicting_in_pieces_changes_nothing(few_crystals, monkeypatch):
    X = few_crystals[0][:8]
    model = quick_network(target="site", max_epochs=1).fit(X, nearest_distances(X))
    whole = model.predict(X)
    monkeypatch.setattr(_base, "CHUNK", 3)
    pieces = model.predict(X)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    broken = X[5].copy()
    broken.replace(0, {"Fe": 0.5, "Co": 0.5})
    with pytest.raises(StructureError, match=r"X\[5\]"):
        model.predict([*X[:5], broken])


def test_learned_inputs_are_pooled_by_their_mean_and_weighed_less(few_crystals):
    inputs = Inputs("ssl+raw", QUICK_NETWORK["weights"], None)
    dataset = Dataset.from_graphs(CrystalGraphs.from_structures(few_crystals[0]), inputs, 2048)
    for columns in (dataset.sites, dataset.crystals):
        x = torch.from_numpy(columns)
        plain, weighed = Standardize(columns, 0)(x), Standardize(columns, inputs.n_learned)(x)
        given = columns.shape[1] - inputs.n_learned
        assert torch.equal(plain[:, :given], weighed[:, :given])
        torch.testing.assert_close(LEARNED_WEIGHT * plain[:, given:], weighed[:, given:])
    alone = np.flatnonzero(dataset.graphs.n_sites == 1)
    np.testing.assert_array_equal(
        dataset.crystals[alone, -inputs.n_learned :],
        dataset.sites[dataset.graphs.sites_of(alone), -inputs.n_learned :],
    )


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_without_layers_sites_are_told_nothing_of_one_another(backbone):
    torch.manual_seed(0)
    x = torch.randn(5, 16)
    changed = x.clone()
    changed[0] = 1.0
    batch = batch_of(CRYSTALS["SrTiO3"], dtype=torch.float32)
    for n_layers in (0, 1):
        network = BACKBONES[backbone](16, n_layers).eval()
        same = (network(x, batch) == network(changed, batch)).all(dim=1)
        assert same[1:].all() == (n_layers == 0)
        assert not same[0]
