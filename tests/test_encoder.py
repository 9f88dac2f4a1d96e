"""Encoders: PyG's numbers, how far each layer sees, and that no atom is shown to its own context."""

import networkx as nx
import pytest
import torch
from conftest import (
    CRYSTALS,
    batch_of,
    fcc,
    perovskite,
    rattled_salt,
    rock_salt,
    shake,
    substitute,
    triclinic,
    untrained,
)
from torch_geometric.nn import CGConv

from ssl_matfeat.context_encoder import ContextEncoder, Normal, _misfit, _reversed
from ssl_matfeat.encoder import CGCNNEncoder, FactoredCGConv, GaussianExpansion


@pytest.fixture(scope="module", params=["cgcnn", "context"])
def encoder(request):
    return untrained(request.param).encoder.double()


@pytest.fixture(scope="module")
def context_encoder():
    return untrained("context").encoder.double()


def graph_distances(batch, site):
    """Return in how many edges the word of ``site`` reaches every site."""
    graph = nx.DiGraph(batch.edge_index.T.tolist())
    return nx.single_source_shortest_path_length(graph, site)


def change(a, b):
    """Return the largest change of every row."""
    return (a - b).abs().amax(dim=1)


@pytest.mark.parametrize(("n_channels", "n_edge_channels"), [(64, 64), (8, 5)])
def test_factored_convolution_is_that_of_pyg(n_channels, n_edge_channels):
    torch.manual_seed(0)
    batch = batch_of(*CRYSTALS.values(), dtype=torch.float32)
    ours = FactoredCGConv(n_channels, n_edge_channels)
    theirs = CGConv(n_channels, n_edge_channels)
    with torch.no_grad():
        for half, linear in enumerate([theirs.lin_f, theirs.lin_s]):
            rows = slice(half * n_channels, (half + 1) * n_channels)
            sizes = [n_channels, n_channels, n_edge_channels]
            center, neighbor, edge = linear.weight.split(sizes, dim=1)
            ours.center.weight[rows], ours.center.bias[rows] = center, linear.bias
            ours.neighbor.weight[rows], ours.edge.weight[rows] = neighbor, edge
    x = torch.randn(len(batch.numbers), n_channels)
    edge = torch.randn(len(batch.distance), n_edge_channels)
    found, expected = ours(x, batch.edge_index, edge), theirs(x, batch.edge_index, edge)
    assert (expected - x).abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other_way = theirs(x, batch.edge_index.flip(0), edge)  # source and target are not the same
    assert (found - other_way).abs().max() > 0.1


def test_gaussians_are_those_of_the_paper():
    distance = torch.tensor([2.0, 3.3])
    gaussians = GaussianExpansion()(distance)
    assert gaussians.shape == (2, 41)
    assert gaussians[0, 10] == 1
    torch.testing.assert_close(gaussians[0, [9, 11]], torch.exp(torch.tensor([-1.0, -1.0])))
    torch.testing.assert_close(gaussians[1, [16, 17]], torch.exp(torch.tensor([-0.25, -0.25])))
    assert gaussians.argmax(dim=1)[0] == 10
    assert gaussians.min() > torch.finfo(torch.float32).tiny  # with less, processors are slow


@pytest.mark.parametrize("n_channels", [4, 64])
def test_shapes_of_embeddings(n_channels):
    batch = batch_of(perovskite(), fcc(), dtype=torch.float32)
    paper = CGCNNEncoder(n_channels, n_layers=5).eval()
    assert [tuple(x.shape) for x in paper(batch)] == [(6, n_channels)] * 6
    assert [tuple(x.shape) for x in paper.describe(batch, [5, 0])] == [(6, n_channels)] * 2
    context = ContextEncoder(n_channels, n_environments=10).eval()
    *embeddings, pretext = context.describe(batch, [0, 1, 2, "pretext"])
    assert [tuple(x.shape) for x in embeddings] == [(6, n_channels)] * 3
    assert pretext.shape == (6, len(context.named_layers["pretext"]))
    assert pretext.isfinite().all()
    environment, one = context.describe(batch, ["environment", 1])
    assert environment.shape == (6, 10)
    assert torch.equal(one, embeddings[1])


def test_there_is_a_relu_after_every_convolution_but_the_last():
    encoder = untrained("cgcnn").encoder
    for norm in encoder.norms:
        torch.nn.init.constant_(norm.bias, -1e6)
    embeddings = encoder(batch_of(triclinic(), dtype=torch.float32))
    assert [bool((x == 0).all()) for x in embeddings[1:]] == [True, True, True, True, False]
    assert (embeddings[-1] < 0).all()


def test_embed_with_hidden_atoms_does_not_see_their_elements():
    encoder = untrained("cgcnn").encoder.double()
    batches = [batch_of(perovskite()), batch_of(substitute(perovskite(), 1, "Zr"))]
    hidden = torch.tensor([False, True, False, False, False])
    plain, blind = [], []
    for batch in batches:
        nodes, edges = encoder.indicators[batch.numbers], encoder.expand(batch.distance)
        blind.append(encoder.embed(batch, nodes.masked_fill(hidden[:, None], 0), edges))
        plain.append(encoder.embed(batch, nodes, edges))
        assert torch.equal(plain[-1][-1], encoder(batch)[-1])
    torch.testing.assert_close(blind[0][0][1], encoder.embed_node.bias)
    assert all(torch.equal(a, b) for a, b in zip(*blind, strict=True))
    assert all((change(a, b)[1] > 1e-3) for a, b in zip(*plain, strict=True))


def test_layer_zero_is_the_element_alone(encoder):
    crystals = [rock_salt(), rattled_salt(), rock_salt(6.2)]
    batch = batch_of(*crystals)
    layers = encoder.describe(batch, [0, 1])
    for z in (11, 17):
        same = batch.numbers == z
        assert change(layers[0][same], layers[0][same][:1]).max() < 1e-12
        assert change(layers[1][same], layers[1][same][:1]).max() > 1e-3  # negative control
    assert (
        layers[0][batch.numbers == 11][0] - layers[0][batch.numbers == 17][0]
    ).abs().max() > 1e-3


@pytest.mark.parametrize(
    "damage",
    [lambda s, i: shake(s, i, 1e-3), lambda s, i: substitute(s, i, "K")],
    ids=["moved", "substituted"],
)
def test_layer_l_sees_exactly_l_shells(encoder, damage):
    before, after = batch_of(rattled_salt()), batch_of(damage(rattled_salt(), 20))
    if isinstance(encoder, CGCNNEncoder):
        before, after = before.cut_sharply(), after.cut_sharply()
    assert torch.equal(before.edge_index, after.edge_index)
    away = graph_distances(before, 20)
    assert {away[i] for i in range(64)} == {0, 1, 2, 3}
    layers = range(encoder.n_layers + 1)
    pairs = zip(encoder.describe(before, layers), encoder.describe(after, layers), strict=True)
    for layer, (a, b) in enumerate(pairs):
        changed = change(a, b)
        moved = torch.equal(before.numbers, after.numbers)
        for site, distance in away.items():
            if distance > layer:
                assert changed[site] < 1e-12, f"NE{layer} of site {site} sees {distance} edges far"
            elif not moved or layer > 0:
                assert changed[site] > 1e-9, f"NE{layer} of site {site} misses {distance} edges"


@pytest.mark.parametrize("site", [0, 7, 40])
def test_no_atom_is_shown_to_its_own_context(context_encoder, site):
    salt = rattled_salt()
    before, after = batch_of(salt), batch_of(substitute(salt, site, "K"))
    changed = change(context_encoder(before).element_logits, context_encoder(after).element_logits)
    assert changed[site] < 1e-6 * context_encoder(before).element_logits[site].abs().max()
    neighbors = before.edge_index[1][before.edge_index[0] == site]
    assert changed[neighbors].min() > 1e-4  # negative control: all who listen to it notice


def test_images_of_an_atom_are_other_atoms_to_its_context(context_encoder):
    a = context_encoder(batch_of(fcc(element="Cu"))).element_logits
    b = context_encoder(batch_of(fcc(element="Ag"))).element_logits
    assert change(a, b).max() > 1e-4


def test_lengths_are_predicted_without_lengths(context_encoder):
    """With one shell, elements and coordination are all that the heads are told."""
    before, after = context_encoder(batch_of(fcc(3.6))), context_encoder(batch_of(fcc(4.0)))
    for name in ("log_bond", "log_volume", "geometry"):
        for a, b in zip(getattr(before, name), getattr(after, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    other = context_encoder(batch_of(fcc(3.6, "Ag")))  # negative control
    assert (other.log_bond.mean - before.log_bond.mean).abs().max() > 1e-3
    assert change(before.embeddings[1], after.embeddings[1]).max() > 1e-3


@pytest.mark.parametrize(
    "structures",
    [[rattled_salt()], [triclinic()], [fcc()], list(CRYSTALS.values())],
    ids=["rattled", "triclinic", "one atom", "several"],
)
def test_reversed_edges_against_brute_force(structures):
    batch = batch_of(*structures)
    shifts = batch.cell_shift.tolist()
    pairs = batch.edge_index.T.tolist()
    place = {(*pair, *shift): e for e, (pair, shift) in enumerate(zip(pairs, shifts, strict=True))}
    message = torch.arange(1, len(pairs) + 1, dtype=torch.float64)[:, None]
    expected = [
        place.get((center, neighbor, *(-s for s in shift)), -1) + 1
        for (neighbor, center), shift in zip(pairs, shifts, strict=True)
    ]
    assert _reversed(message, batch)[:, 0].tolist() == expected
    assert sum(e > 0 for e in expected) > len(expected) / 2


def test_some_nearest_neighbors_do_not_listen_back():
    batch = batch_of(rattled_salt())
    ones = torch.ones(len(batch.distance), 1, dtype=torch.float64)
    assert 0 < _reversed(ones, batch).mean() < 1


def test_misfits_count_deviations_up_to_ten():
    predicted = Normal(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0]]).log())
    found = _misfit(predicted, torch.tensor([[5.0, -1e6]]))
    torch.testing.assert_close(found, torch.tensor([[2.0, -10.0, 52**0.5]]))
