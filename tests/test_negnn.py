"""NEGNN: it learns what its options say, and repeats itself."""

import copy
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    QUICK_NETWORK,
    nearest_distances,
    quick_network,
    rock_salt,
    substitute,
    untrained,
)
from pymatgen.core import Structure
from sklearn.base import clone
from sklearn.metrics import accuracy_score, mean_absolute_error

from ssl_matfeat import NEGNNClassifier, NEGNNRegressor
from ssl_matfeat.weights import save_weights

# It learns


@pytest.mark.parametrize("node_features", ["raw", "ssl"])
def test_learns_bulk_moduli(node_features, elastic):
    small = elastic[[len(s) <= 8 for s in elastic["structure"]]].sample(200, random_state=0)
    X, y = small["structure"].tolist(), np.log10(small["K_VRH"].to_numpy())
    small = {"n_channels": 32, "max_epochs": 15, "batch_size": 512}
    model = NEGNNRegressor(node_features, **small, random_state=0)
    model.fit(X[:150], y[:150])
    error = mean_absolute_error(y[150:], model.predict(X[150:]))
    assert error < 0.4 * np.abs(y[150:] - y[:150].mean()).mean()
    assert model.loss_curve_[-1] < 0.5 * model.loss_curve_[0]
    assert model.n_iter_ == 15
    assert model.score(X[150:], y[150:]) > 0.7


def test_learns_classes(elastic):
    small = elastic[[len(s) <= 8 for s in elastic["structure"]]].sample(150, random_state=0)
    X = small["structure"].tolist()
    stiffness = pd.cut(small["K_VRH"], [0, 60, 150, 1000], labels=["soft", "middle", "hard"])
    y = stiffness.astype(str).to_numpy()
    model = NEGNNClassifier(n_channels=32, max_epochs=15, random_state=0).fit(X[:110], y[:110])
    assert sorted(model.classes_) == ["hard", "middle", "soft"]
    assert accuracy_score(y[110:], model.predict(X[110:])) > 0.6
    probabilities = model.predict_proba(X[110:])
    assert probabilities.shape == (40, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (model.classes_[probabilities.argmax(axis=1)] == model.predict(X[110:])).all()


def test_learns_sites_and_skips_unknown_ones(few_crystals):
    X = [s for s in few_crystals[0] if len(s) > 1]
    known = nearest_distances(X)
    y = [values.copy() for values in known]
    for values in y:
        values[0] = np.nan  # never told
    model = quick_network(target="site", max_epochs=60, n_channels=16).fit(X, y)
    predicted = model.predict(X)
    assert [p.shape for p in predicted] == [v.shape for v in y]
    hidden, guessed = (np.array([v[0] for v in values]) for values in (known, predicted))
    told = np.concatenate([v[1:] for v in known])
    assert np.abs(guessed - hidden).mean() < 0.6 * np.abs(hidden - told.mean()).mean()
    assert model.score(X, y) > 0.5


def test_class_weight_moves_the_probabilities(few_crystals):
    X, y = few_crystals[0][:4] * 5, np.repeat([0, 0, 0, 0, 1], 4)  # each crystal is of both classes
    parameters = {**QUICK_NETWORK, "max_epochs": 40}
    plain, balanced = (
        NEGNNClassifier(**parameters, class_weight=weight).fit(X, y).predict_proba(X)[:, 1].mean()
        for weight in (None, "balanced")
    )
    assert abs(plain - 0.2) < 0.1
    assert abs(balanced - 0.5) < 0.1


def test_sample_weight_decides_between_contradictions(few_crystals):
    X = few_crystals[0][:8] * 2
    y = np.repeat([0.0, 1.0], 8)
    weight = np.repeat([9.0, 1.0], 8)
    model = quick_network(loss="mse", max_epochs=80, dropout=0.0).fit(X, y, sample_weight=weight)
    assert abs(model.predict(X).mean() - 0.1) < 0.1
    assert model.fit(X, y, sample_weight=weight[::-1]).predict(X).mean() > 0.8
    with pytest.raises(ValueError, match="at least one non-zero"):
        model.fit(X, y, sample_weight=np.zeros(16))
    with pytest.raises(ValueError, match="Negative values"):
        model.fit(X, y, sample_weight=-weight)


def test_several_targets_at_once(few_crystals):
    X, y = few_crystals
    both = np.stack([y, -100 * y], axis=1)
    predicted = quick_network(max_epochs=30).fit(X, both).predict(X)
    assert predicted.shape == both.shape
    assert np.corrcoef(predicted[:, 0], predicted[:, 1])[0, 1] < -0.9


def test_ensemble_gives_mean_and_spread(few_crystals, fitted_network):
    X, y = few_crystals
    model = quick_network(n_ensemble=3).fit(X, y)
    mean, std = model.predict(X, return_std=True)
    assert mean.shape == std.shape == y.shape
    assert (std > 0).all()
    assert {record["member"] for record in model.history_} == {0, 1, 2}
    with pytest.raises(ValueError, match="n_ensemble was 1"):
        fitted_network.predict(X, return_std=True)


def test_fine_tuning_moves_a_copy_of_the_encoder(few_crystals):
    X, y = few_crystals
    original = QUICK_NETWORK["weights"].encoder
    before = {name: t.clone() for name, t in original.state_dict().items()}
    frozen, tuned = (
        quick_network().fit(X, y),
        quick_network(fine_tune=True, fine_tune_lr=1e-3).fit(X, y),
    )
    encoder = tuned.networks_[0].learned.encoder
    assert any(not torch.equal(before[n], t) for n, t in encoder.state_dict().items())
    assert all(torch.equal(before[n], t) for n, t in original.state_dict().items())
    assert not np.allclose(frozen.predict(X), tuned.predict(X))
    with pytest.raises(ValueError, match="no such part"):
        quick_network(node_features="raw", fine_tune=True).fit(X, y)


def test_warm_start_goes_on(few_crystals):
    X, y = few_crystals
    model = quick_network(max_epochs=20, warm_start=True).fit(X, y)
    first = model.loss_curve_[0]
    assert model.fit(X, y).loss_curve_[0] < 0.8 * first
    with pytest.raises(ValueError, match="warm_start"):
        model.fit(X, np.stack([y, y], axis=1))


@pytest.mark.parametrize(
    "change",
    [
        {"node_features": "onehot"},
        {"backbone": "cgcnn"},
        {"n_channels": 16},
        {"n_layers": 2},
        {"dropout": 0.1},
        {"fine_tune": True},
        {"target": "site"},
        {"layers": (0,)},
        {"weights": "default"},
    ],
    ids=str,
)
def test_warm_start_refuses_another_network(change, few_crystals, fitted_network):
    (name,) = change
    model = pickle.loads(pickle.dumps(fitted_network)).set_params(warm_start=True, **change)
    with pytest.raises(ValueError, match=rf"were fitted with {name}=.*set warm_start=False"):
        model.fit(*few_crystals)


def test_warm_start_refuses_other_weights_of_the_same_file(tmp_path, few_crystals):
    path = tmp_path / "own.safetensors"
    save_weights(path, untrained("context"))
    model = quick_network(weights=path, warm_start=True).fit(*few_crystals)
    save_weights(path, untrained("context", n_channels=8))
    with pytest.raises(ValueError, match="weights="):
        model.fit(*few_crystals)
    onehot = quick_network(weights=path, warm_start=True, node_features="onehot").fit(*few_crystals)
    save_weights(path, untrained("context"))
    onehot.fit(*few_crystals)  # which reads none


def test_loss_of_an_epoch_is_the_mean_over_crystals(few_crystals):
    """However shuffling packs them into batches: nothing is learned here, so all epochs have the same loss."""
    X, y = few_crystals
    model = quick_network(dropout=0.0, lr=1e-12, batch_size=300, max_epochs=4).fit(X, y)
    scaled = np.abs(model.predict(X) - y) / np.std(y)
    np.testing.assert_allclose(model.loss_curve_, scaled.mean(), rtol=1e-4)


def test_sample_of_no_weight_is_as_good_as_absent(few_crystals, fitted_network):
    X, y = few_crystals
    weight = np.ones(len(y))
    weight[3] = 0
    spoilt = np.where(weight > 0, y, 1e6)
    model = quick_network().fit(X, spoilt, sample_weight=weight)
    without = quick_network().fit([x for x, w in zip(X, weight, strict=True) if w], y[weight > 0])
    assert np.array_equal(model.predict(X), without.predict(X))
    assert not np.array_equal(model.predict(X), fitted_network.predict(X))


def test_sample_of_no_weight_is_not_counted_for_balance(few_crystals):
    X = few_crystals[0]
    classes = np.arange(len(X)) % 2
    weight = np.where((np.arange(len(X)) < len(X) // 2) & (classes == 0), 0, 1)
    model = NEGNNClassifier(**QUICK_NETWORK, class_weight="balanced")
    weighted = clone(model).fit(X, classes, sample_weight=weight).predict_proba(X)
    few = [x for x, w in zip(X, weight, strict=True) if w]
    without = clone(model).fit(few, classes[weight > 0]).predict_proba(X)
    np.testing.assert_allclose(weighted, without, atol=1e-6)


def test_class_of_no_weight_is_as_good_as_absent(few_crystals):
    X = few_crystals[0]
    classes = np.arange(len(X)) % 3
    weight = (classes != 1).astype(float)
    weighted = NEGNNClassifier(**QUICK_NETWORK).fit(X, classes, sample_weight=weight)
    few = [x for x, w in zip(X, weight, strict=True) if w]
    without = NEGNNClassifier(**QUICK_NETWORK).fit(few, classes[weight > 0])
    assert weighted.classes_.tolist() == [0, 2]
    np.testing.assert_allclose(weighted.predict_proba(X), without.predict_proba(X), atol=1e-6)
    with pytest.raises(ValueError, match="at least 2 classes"):
        NEGNNClassifier(**QUICK_NETWORK).fit(X, classes, sample_weight=classes == 1)


@pytest.mark.parametrize("size", [1, 4])
def test_a_crystal_counts_alike_in_any_cell(size):
    """Twenty say 0 and one says 1, so that the least squares are at 1/21, be that one given as a large cell or not."""
    salt = rock_salt().get_primitive_structure()
    oxide = substitute(substitute(salt, 0, "Mg"), 1, "O")
    X = [salt] * 20 + [salt * (size, size, size)] + [oxide] * 2
    y = [0.0] * 20 + [1.0] + [5.0] * 2
    model = quick_network(
        node_features="onehot", max_epochs=200, lr=5e-3, loss="mse", weight_decay=0, batch_size=1800
    ).fit(X, y)
    assert model.predict([salt])[0] == pytest.approx(1 / 21, abs=0.03)


def test_early_stopping_validates_on_what_is_known(few_crystals):
    X, y = few_crystals
    sites = [np.full(len(x), np.nan) for x in X]
    for i in (0, 5, 9, 20):
        sites[i][:] = y[i]
    model = quick_network(target="site", early_stopping=True, validation_fraction=0.25).fit(
        X, sites
    )
    assert all(record["validation_loss"] > 0 for record in model.history_)


def test_weights_that_leave_nothing(few_crystals):
    X, y = few_crystals
    sites = [np.full(len(x), np.nan) for x in X]
    sites[0][:] = 1.0
    weight = np.ones(len(y))
    weight[0] = 0
    with pytest.raises(ValueError, match="wherever y is known"):
        quick_network(target="site").fit(X, sites, sample_weight=weight)
    classes = (y > np.median(y)).astype(int)
    for class_weight, message in (({0: 0, 1: 0}, "weight of 0"), ({0: -1, 1: 1}, "negative")):
        model = NEGNNClassifier(**QUICK_NETWORK, class_weight=class_weight)
        with pytest.raises(ValueError, match=message):
            model.fit(X, classes)


def test_unseen_elements_are_warned_of(few_crystals):
    X, y = few_crystals
    neon = Structure(np.diag([4.4] * 3), ["Ne"], [[0, 0, 0]])
    model = quick_network(node_features="ssl", weights="default").fit(X, y)
    with pytest.warns(UserWarning, match="never saw Ne"):
        model.predict([neon])


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_fit_that_fails_leaves_the_model_as_it_was(warm_start, few_crystals):
    X, y = few_crystals
    model = quick_network(warm_start=warm_start).fit(X, y)
    before = model.predict(X)
    model.set_params(lr=1e30)
    with pytest.raises(ValueError, match="diverged"):
        model.fit(X, 1000 * y + 1e4)
    assert np.array_equal(model.predict(X), before)


def test_what_was_fitted_decides_what_is_predicted(few_crystals, fitted_network):
    X, y = few_crystals
    model = copy.deepcopy(fitted_network).set_params(target="site")
    assert np.array_equal(model.predict(X), fitted_network.predict(X))
    assert model.score(X, y) == fitted_network.score(X, y)


def test_diverging_training_says_so(few_crystals):
    X, y = few_crystals
    with pytest.raises(ValueError, match="diverged in epoch"):
        quick_network(lr=1e30, max_epochs=20).fit(X, y)


def test_early_stopping_keeps_the_best_epoch(few_crystals):
    X, noise = (
        few_crystals[0],
        np.random.default_rng(0).normal(size=len(few_crystals[0])),
    )  # nothing to learn
    model = quick_network(
        early_stopping=True, validation_fraction=0.25, n_iter_no_change=3, max_epochs=200
    ).fit(X, noise)
    validation = [record["validation_loss"] for record in model.history_]
    assert model.n_iter_ < 200
    assert model.n_iter_ == int(np.argmin(validation)) + 4


# It repeats itself


def test_repeats_bit_by_bit_and_leaves_the_global_generator_alone(few_crystals, fitted_network):
    X, y = few_crystals
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = clone(fitted_network).fit(X, y)
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(again.predict(X), fitted_network.predict(X))
    assert again.history_ == fitted_network.history_
    assert not np.array_equal(
        quick_network(random_state=1).fit(X, y).predict(X), fitted_network.predict(X)
    )


def test_pickles_into_a_fresh_process(few_crystals, fitted_network, tmp_path):
    X, _ = few_crystals
    expected = fitted_network.predict(X)
    assert np.array_equal(pickle.loads(pickle.dumps(fitted_network)).predict(X), expected)
    joblib.dump((fitted_network, X), tmp_path / "model.joblib")
    code = (
        "import joblib, numpy, sys; model, X = joblib.load(sys.argv[1]); "
        "numpy.save(sys.argv[2], model.predict(X))"
    )
    files = [str(tmp_path / "model.joblib"), str(tmp_path / "predicted.npy")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    # Other processes may split sums over threads differently.
    np.testing.assert_allclose(np.load(tmp_path / "predicted.npy"), expected, rtol=1e-5)


BASE = {"max_epochs": 3}


@pytest.fixture(scope="module")
def of_base(few_crystals):
    X, y = few_crystals
    return quick_network(**BASE).fit(X, y).predict(X)


@pytest.mark.parametrize(
    "changed",
    [
        {"node_features": "raw"},
        {"layers": ("pretext",)},
        {"backbone": "cgcnn"},
        {"n_channels": 9},
        {"n_layers": 2},
        {"dropout": 0.3},
        {"fine_tune": True},
        {"fine_tune": True, "fine_tune_lr": 1e-2},
        {"loss": "mse"},
        {"loss": "huber"},
        {"max_epochs": 2},
        {"batch_size": 300},
        {"lr": 1e-2},
        {"weight_decay": 5.0},
        {"early_stopping": True, "validation_fraction": 0.5},
        {"n_ensemble": 2},
        {"random_state": 1},
    ],
    ids=str,
)
def test_no_option_is_ignored(changed, few_crystals, of_base):
    X, y = few_crystals
    predicted = quick_network(**{**BASE, **changed}).fit(X, y).predict(X)
    assert np.abs(predicted - of_base).max() > 1e-4 * y.std()


def test_losses_and_learning_rates_are_not_each_others(few_crystals):
    X, y = few_crystals
    pairs = [
        ({"loss": "mse"}, {"loss": "huber"}),
        ({"fine_tune": True}, {"fine_tune": True, "fine_tune_lr": 1e-2}),
    ]
    for one, other in pairs:
        a, b = (quick_network(**BASE, **p).fit(X, y).predict(X) for p in (one, other))
        assert np.abs(a - b).max() > 1e-4 * y.std()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fits_in_threads_are_those_of_one_after_another(dropout, few_crystals):
    X, y = few_crystals
    before = torch.get_rng_state()

    def fit(seed):
        model = quick_network(node_features="raw", dropout=dropout, random_state=seed)
        return model.fit(X, y).predict(X)

    alone = [fit(seed) for seed in range(4)]
    with joblib.parallel_config("threading", n_jobs=4):
        together = joblib.Parallel()(joblib.delayed(fit)(seed) for seed in range(4))
    assert np.array_equal(alone, together)
    assert torch.equal(torch.get_rng_state(), before)
