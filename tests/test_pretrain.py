"""Self-supervised training: it learns, goes on where it stopped, and does not leak its answers."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from conftest import (
    ALLOY,
    CRYSTALS,
    SMALL_PRETRAINING,
    batch_of,
    bcc,
    fcc,
    rock_salt,
    same_numbers,
    shake,
    state_of,
    substitute,
    total_loss,
    triclinic,
    untrained,
)
from pymatgen.core import Lattice, Structure
from sklearn.base import clone

from ssl_matfeat import SSLPretrainer, SSLStructureFeaturizer
from ssl_matfeat.pretext import Pretext
from ssl_matfeat.pretext.damage import choose_sites, supercell
from ssl_matfeat.pretext.paper import ContrastiveTask, PredictiveTask, group_and_period

TASKS = ["context", "predictive", "contrastive", {"predictive": 1.0, "contrastive": 0.5}]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tasks", TASKS, ids=str)
def test_fit_reduces_the_loss(small_crystals, tasks):
    pretrainer = SSLPretrainer(tasks, max_epochs=4, lr=1e-2, **SMALL_PRETRAINING).fit(
        small_crystals[0]
    )
    first, *_, last = pretrainer.history_
    assert total_loss(last, "train_") < total_loss(first, "train_") - 0.05
    assert [record["epoch"] for record in pretrainer.history_] == [1, 2, 3, 4]
    assert all(np.isfinite(list(record.values())).all() for record in pretrainer.history_)
    assert pretrainer.metrics_
    card = pretrainer.weights_.card
    assert card["training_data"] == {
        "n_training": 48,
        "n_validation": 12,
        "max_sites": 40,
        "max_expansion": 5.0,
    }
    assert not pretrainer.weights_.encoder.training


def test_same_seed_gives_the_same_weights(small_crystals):
    X = small_crystals[0][:20]
    one, two = (
        SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING).fit(X) for _ in range(2)
    )
    other = SSLPretrainer("predictive", max_epochs=1, random_state=1, **SMALL_PRETRAINING).fit(X)
    assert same_numbers(state_of(one), state_of(two))
    assert not same_numbers(state_of(one), state_of(other))


def test_trained_weights_serve_a_featurizer_and_survive_a_file(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING).fit(X)
    pretrainer.save(tmp_path / "own.safetensors")
    options = {"layers": (0, 5), "pooling": ("mean",)}
    seen = set(pretrainer.weights_.card["elements_seen"])
    X = [s for s in X if {e.symbol for e in s.elements} <= seen]
    rows = SSLStructureFeaturizer(pretrainer.weights_, **options).fit_transform(X)
    again = SSLStructureFeaturizer(tmp_path / "own.safetensors", **options).fit_transform(X)
    np.testing.assert_array_equal(rows, again)
    assert rows.shape == (len(X), 16)
    assert len(X) > 5


@pytest.mark.parametrize("tasks", ["context", "predictive"])
def test_interrupted_training_goes_on_to_the_same_bits(
    small_crystals, tmp_path, tasks, monkeypatch
):
    X = small_crystals[0][:30]
    options = {"max_epochs": 3, **SMALL_PRETRAINING}
    through = SSLPretrainer(tasks, **options).fit(X)
    losses_of, calls = Pretext.losses, []

    def interrupted(self, batch, generator):
        calls.append(1)
        if self.training and (tmp_path / "checkpoint").exists():
            raise KeyboardInterrupt
        return losses_of(self, batch, generator)

    with monkeypatch.context() as patch:
        patch.setattr(Pretext, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            SSLPretrainer(tasks, **options).fit(X, checkpoint=tmp_path / "checkpoint")
    assert calls
    resumed = SSLPretrainer(tasks, **options).fit(X, checkpoint=tmp_path / "checkpoint")
    assert resumed.history_ == through.history_
    assert same_numbers(state_of(resumed), state_of(through))
    fresh = SSLPretrainer(tasks, **{**options, "max_epochs": 1}).fit(X)  # negative control
    assert not same_numbers(state_of(fresh), state_of(through))


def test_a_fit_that_fails_changes_nothing(small_crystals):
    X = [*small_crystals[0][:20], Structure(Lattice.cubic(3), ["Fe", "O"], [[0, 0, 0]] * 2)]
    pretrainer = SSLPretrainer("strain", max_epochs=1, **SMALL_PRETRAINING).fit(X)
    fitted = dict(vars(pretrainer))
    with pytest.raises(ValueError, match="none of 1 structures is usable"):
        pretrainer.fit(X[-1:])
    with pytest.raises(ValueError, match="left for training"):
        pretrainer.fit(X[:1])
    assert vars(pretrainer) == fitted
    assert list(pretrainer.errors_) == [20]


def test_bad_structure_is_skipped_and_reported(small_crystals):
    X = [*small_crystals[0][:20], ALLOY, None]
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING).fit(X)
    assert list(pretrainer.errors_) == [20, 21]
    assert "disordered" in pretrainer.errors_[20]
    training = pretrainer.weights_.card["training_data"]
    assert training["n_training"] + training["n_validation"] == 20


def test_few_validation_crystals_are_warned_of(small_crystals):
    X = small_crystals[0]
    few, enough = (
        SSLPretrainer("strain", n_channels=8, max_epochs=1, validation_fraction=fraction)
        for fraction in (49 / 60, 50 / 60)
    )
    with pytest.warns(UserWarning, match=r"only 49 of 60 crystals .* raise validation_fraction"):
        few.fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough.fit(X)


def test_clusters_in_empty_space_are_left_out(small_crystals):
    X = [s.copy() for s in small_crystals[0][:21]]
    X[0].scale_lattice(10 * X[0].volume)

    def n_crystals(**options):
        fitted = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING, **options).fit(X)
        data = fitted.weights_.card["training_data"]
        return data["n_training"] + data["n_validation"]

    assert n_crystals() == 20
    assert n_crystals(max_expansion=np.inf) == 21
    with pytest.raises(ValueError, match=r"0 are left for training .* max_expansion=0.1"):
        n_crystals(max_expansion=0.1)


def test_no_usable_structure_is_an_error(small_crystals):
    with pytest.raises(
        ValueError, match=r"none of 2 structures is usable; the first: .*disordered"
    ):
        SSLPretrainer().fit([ALLOY, ALLOY])
    with pytest.raises(ValueError, match=r"max_sites=1, max_expansion=5.0 and validation_fraction"):
        SSLPretrainer(max_sites=1).fit(small_crystals[0][:5])
    with pytest.raises(ValueError, match="two sites to train on"):
        SSLPretrainer(validation_fraction=0.5).fit([fcc().get_primitive_structure()] * 2)
    with pytest.raises(TypeError, match="X is one Structure"):
        SSLPretrainer().fit(rock_salt())


def test_one_atom_cells_alone_in_a_batch_can_be_trained_on():
    metals = [fcc(element=e) for e in ("Cu", "Ag", "Au", "Al", "Ni", "Pd")]
    for tasks in ("context", "predictive"):
        pretrainer = SSLPretrainer(tasks, n_channels=8, max_epochs=1, batch_size=1)
        assert np.isfinite(list(pretrainer.fit(metals).history_[0].values())).all()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("nonsense", "tasks must be of .*'context'.*'nonsense'"),
        ({}, "tasks must be of"),
        ({"context": 1.0, "nonsense": 1.0}, "tasks must be of"),
        ({"context": 1.0, "predictive": 1.0}, "train different encoders"),
    ],
)
def test_wrong_tasks_are_refused(tasks, message, small_crystals):
    with pytest.raises(ValueError, match=message):
        SSLPretrainer(tasks).fit(small_crystals[0])


def test_tasks_in_a_list_are_refused(small_crystals):
    with pytest.raises(TypeError, match=r"dict of names and weights.*\['predictive'\]"):
        SSLPretrainer(["predictive"]).fit(small_crystals[0])


def test_losses_of_tasks_are_weighed_and_added(small_crystals):
    encoder = untrained("cgcnn").encoder
    batch = batch_of(*small_crystals[0][:8], dtype=torch.float32)
    torch.manual_seed(0)
    pretext = Pretext(encoder, {"predictive": 1.0, "contrastive": 0.5})
    losses = pretext.losses(batch, generator())
    assert set(losses) == {"group", "period", "edge", "contrastive"}
    pretext.weights = {"predictive": 2.0, "contrastive": 0.5}
    double = pretext.losses(batch, generator())
    torch.testing.assert_close(double["group"], 2 * losses["group"])
    torch.testing.assert_close(double["contrastive"], losses["contrastive"])


def predict(task, encoder, structure):
    batch = batch_of(structure, dtype=torch.float32).cut_sharply()
    return task.predict(encoder, batch, generator())


def test_hidden_atoms_and_edges_do_not_leak():
    torch.manual_seed(0)
    encoder = untrained("cgcnn").encoder
    task = PredictiveTask(encoder)
    salt = triclinic() * (2, 2, 2)
    batch = batch_of(salt, dtype=torch.float32)
    hidden = choose_sites(batch, 0.15, generator())
    site = int(torch.nonzero(hidden)[0])
    logits, targets = predict(task, encoder, salt)
    for damaged in (shake(salt, site, 2e-3), substitute(salt, site, "Br")):
        sharp = batch_of(damaged).cut_sharply()
        assert torch.equal(batch.cut_sharply().edge_index, sharp.edge_index)
        found, other = predict(task, encoder, damaged)
        for name in ("group", "period", "edge"):
            torch.testing.assert_close(found[name], logits[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(other["group"], targets["group"])
    seen = int(torch.nonzero(~hidden)[0])  # negative control: atoms and edges that are not hidden
    for damaged in (shake(salt, seen, 2e-3), substitute(salt, seen, "Br")):
        found, _ = predict(task, encoder, damaged)
        assert (found["edge"] - logits["edge"]).abs().max() > 1e-6


def test_targets_of_the_paper():
    group, period = group_and_period()
    assert group[[1, 3, 26, 17, 18, 57, 92]].tolist() == [0, 0, 7, 16, 17, 18, 18]
    assert period[[1, 3, 26, 55]].tolist() == [0, 1, 3, 5]
    assert group.max() == 18
    assert period.max() <= 8


def test_each_crystal_hides_its_share_of_sites():
    structures = [*CRYSTALS.values(), *(fcc() * (n, 1, 1) for n in (5, 20, 40, 60, 120))]
    batch = batch_of(*structures)
    chosen = choose_sites(batch, 0.15, generator())
    counts = torch.bincount(batch.batch[chosen], minlength=len(structures))
    assert counts.tolist() == [int(0.15 * len(s) + 1) for s in structures]
    assert not torch.equal(chosen, choose_sites(batch, 0.15, generator(1)))


@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 1, 1), (1, 2, 3), (2, 2, 2)])
def test_supercell_of_a_graph_is_the_graph_of_the_supercell(repeats):
    encoder = untrained("cgcnn").encoder.double()
    for structure in (rock_salt(), triclinic(), bcc(), fcc()):
        ours = supercell(batch_of(structure), np.array(repeats))
        theirs = batch_of(structure * repeats)
        assert torch.equal(ours.numbers, theirs.numbers)
        torch.testing.assert_close(ours.volume, theirs.volume)
        n_sites = len(ours.numbers)
        listed = [
            torch.bincount(batch.edge_index[1], minlength=n_sites) for batch in (ours, theirs)
        ]
        assert torch.equal(*listed)
        for a, b in zip(encoder(ours), encoder(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        between = zip(
            ours.edge_index.T.tolist(), ours.distance.round(decimals=6).tolist(), strict=True
        )
        expected = zip(
            theirs.edge_index.T.tolist(), theirs.distance.round(decimals=6).tolist(), strict=True
        )
        assert sorted(between) == sorted(expected)


def test_views_of_a_crystal_differ_and_know_each_other_best(small_crystals):
    torch.manual_seed(0)
    encoder = untrained("cgcnn").encoder
    task = ContrastiveTask(encoder)
    batch = batch_of(*small_crystals[0][:8], dtype=torch.float32)
    similarity = task.similarity(encoder, batch, generator())
    assert similarity.shape == (8, 8)
    assert similarity.abs().max() <= 10.001  # cosines over the temperature
    assert (similarity.diagonal() < 10 - 1e-4).all()  # damaged differently
    off = similarity[~torch.eye(8, dtype=torch.bool)]
    assert similarity.diagonal().mean() > off.mean()


def test_crystals_larger_than_a_batch_are_not_enough_for_two_processes(small_crystals):
    pytest.importorskip("lightning_fabric")
    pretrainer = SSLPretrainer("predictive", batch_size=10, n_devices=2, validation_fraction=0.5)
    with pytest.raises(ValueError, match=r"only 10 for training .*; lower batch_size or n_devices"):
        pretrainer.fit(small_crystals[0][:2])


def test_numbers_of_numpy_go_into_checkpoint_and_card(small_crystals, tmp_path):
    options = SMALL_PRETRAINING | {"n_channels": np.int64(8), "lr": np.float32(1e-3)}
    options |= {"max_epochs": np.int64(1), "random_state": np.int64(0)}
    pretrainer = SSLPretrainer({"context": np.float32(1)}, **options)
    for _ in range(2):  # the second reads the checkpoint of the first
        pretrainer.fit(small_crystals[0][:20], checkpoint=tmp_path / "checkpoint")
    pretrainer.save(tmp_path / "own.safetensors")
    again = pickle.loads(pickle.dumps(pretrainer))
    featurizer = clone(SSLStructureFeaturizer(again.weights_, layers=(0,)))
    assert featurizer.fit_transform(small_crystals[0][:1]).shape == (1, 8)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tasks": {"context": float("nan")}}, "positive and finite"),
        ({"tasks": {"context": -1.0}}, "positive and finite"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": -1.0}, "ema_decay"),
        ({"lr": 0.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
    ids=str,
)
def test_wrong_numbers_are_refused(parameters, message, small_crystals):
    with pytest.raises(ValueError, match=message):
        SSLPretrainer(**parameters).fit(small_crystals[0])


def test_diverging_pretraining_gives_no_weights(small_crystals):
    pretrainer = SSLPretrainer("predictive", max_epochs=20, lr=1e30, **SMALL_PRETRAINING)
    with pytest.raises(ValueError, match="diverged in epoch"):
        pretrainer.fit(small_crystals[0])
    assert not hasattr(pretrainer, "weights_")
