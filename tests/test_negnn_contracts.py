"""NEGNN: scikit-learn's contracts, and bad input."""

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ALLOY,
    CRYSTALS,
    QUICK_NETWORK,
    SMALL_PRETRAINING,
    nearest_distances,
    quick_network,
)
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

from ssl_matfeat import NEGNNClassifier, NEGNNRegressor, SSLPretrainer, StructureError
from ssl_matfeat.backbones import BACKBONES
from ssl_matfeat.examples import Dataset
from ssl_matfeat.negnn import _base
from ssl_matfeat.weights import load_weights


@pytest.fixture
def double_by_default():
    """As other packages set it for the whole process."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_init_stores_and_clone_keeps(fitted_network):
    for model in (NEGNNRegressor(), NEGNNClassifier()):
        assert set(vars(model)) == set(model.get_params())
    assert clone(fitted_network).get_params()["n_channels"] == 8
    assert not hasattr(fitted_network, "n_features_in_")
    assert is_regressor(fitted_network)
    assert is_classifier(NEGNNClassifier())


@pytest.mark.parametrize("kind", [NEGNNRegressor, NEGNNClassifier])
def test_nothing_is_predicted_before_a_fit(kind):
    for method in (kind.predict, getattr(kind, "predict_proba", kind.predict)):
        with pytest.raises(NotFittedError):
            method(kind(), [CRYSTALS["Cu"]])
    with pytest.raises(NotFittedError):
        kind().score([CRYSTALS["Cu"]], [1])


def test_a_parameter_that_is_off_is_refused_by_predict_too(few_crystals, fitted_network):
    model = copy.deepcopy(fitted_network).set_params(batch_size=0)
    with pytest.raises(ValueError, match="batch_size"):
        model.predict(few_crystals[0])


def test_grid_search_pipeline_and_cross_validation(few_crystals):
    X, y = few_crystals
    search = GridSearchCV(
        make_pipeline(quick_network()), {"negnnregressor__node_features": ["ssl", "onehot"]}, cv=2
    ).fit(X, y)
    assert set(search.best_params_) == {"negnnregressor__node_features"}
    assert np.isfinite(cross_val_score(quick_network(), X, y, cv=2, n_jobs=2)).all()
    sites = nearest_distances(X)
    assert np.isfinite(cross_val_score(quick_network(target="site"), X, sites, cv=2)).all()
    classes = (y > np.median(y)).astype(int)
    scores = cross_val_score(NEGNNClassifier(**QUICK_NETWORK), X, classes, cv=2, scoring="roc_auc")
    assert np.isfinite(scores).all()


def test_takes_a_series_and_a_frame(few_crystals, fitted_network):
    X, y = few_crystals
    expected = fitted_network.predict(X)
    series = pd.Series(X, index=[f"id-{i}" for i in range(len(X))])
    assert np.array_equal(clone(fitted_network).fit(series, pd.Series(y)).predict(series), expected)
    assert np.array_equal(fitted_network.predict(series.to_frame()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y[:-1], "inconsistent numbers of samples"),
        (lambda y: np.where(np.arange(len(y)) == 3, np.nan, y), "y contains NaN"),
        (lambda y: np.where(np.arange(len(y)) == 3, np.inf, y), "y contains infinity"),
        (lambda y: np.stack([y[:, None]] * 2, axis=2), "dim 3"),
    ],
)
def test_bad_y(change, message, few_crystals):
    X, y = few_crystals
    with pytest.raises(ValueError, match=message):
        quick_network().fit(X, change(y))


def test_targets_are_checked_before_the_long_work_on_structures(few_crystals):
    X, y = [*few_crystals[0][:-1], "no structure"], few_crystals[1]
    rare = np.where(np.arange(len(y)) == 0, "rare", "common")
    with pytest.raises(ValueError, match="y contains NaN"):
        quick_network().fit(X, np.full(len(y), np.nan))
    with pytest.raises(ValueError, match="only one: 'a'"):
        NEGNNClassifier(**QUICK_NETWORK).fit(X, ["a"] * len(y))
    with pytest.raises(ValueError, match="class"):
        NEGNNClassifier(**QUICK_NETWORK, early_stopping=True).fit(X, rare)
    for target in (y, [[1.0]] * len(y)):
        with pytest.raises(TypeError, match=rf"X\[{len(y) - 1}\] is a str"):
            quick_network(target="crystal" if target is y else "site").fit(X, target)


def test_bad_classes(few_crystals):
    X, y = few_crystals
    model = NEGNNClassifier(**QUICK_NETWORK)
    with pytest.raises(ValueError, match="at least 2 classes"):
        model.fit(X, np.ones(len(X)))
    with pytest.raises(ValueError, match="continuous"):
        model.fit(X, y)
    once = np.array([1] + [0] * (len(X) - 1))
    with pytest.raises(ValueError, match="only 1 member"):
        clone(model).set_params(early_stopping=True).fit(X, once)
    with pytest.warns(DataConversionWarning):
        model.fit(X, (y > np.median(y)).astype(int)[:, None])


def test_bad_site_targets(few_crystals):
    X = few_crystals[0]
    y = nearest_distances(X)
    with pytest.raises(ValueError, match=r"y\[1\] has shape .* sites"):
        quick_network(target="site").fit(X, [y[0], y[1][:-1], *y[2:]])
    with pytest.raises(ValueError, match=r"y\[0\] is .* set target='crystal'"):
        quick_network(target="site").fit(*few_crystals)
    with pytest.raises(ValueError, match=r"different numbers of values.* set target='site'"):
        quick_network().fit(X, y)
    with pytest.raises(ValueError, match="are NaN"):
        quick_network(target="site").fit(X, [np.full(len(s), np.nan) for s in X])
    with pytest.raises(ValueError, match=r"y\[0\] contains infinity"):
        quick_network(target="site").fit(X, [np.full(len(s), np.inf) for s in X])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"backbone": "cnn"}, "backbone"),
        ({"n_channels": 0}, "n_channels"),
        ({"lr": -1.0}, "lr"),
        ({"precision": "bf16"}, "precision"),
        ({"node_features": "ssl+ssl"}, "node_features"),
        ({"node_features": "magpie"}, "node_features"),
        ({"layers": (0, 7)}, "layers"),
        ({"layers": (0, 7), "node_features": "raw"}, "layers"),
        ({"device": "gpu"}, "device='gpu' cannot be used"),
        ({"layers": (0, "shell")}, "add 'raw'"),
    ],
)
def test_bad_parameters(parameters, message, few_crystals):
    with pytest.raises(ValueError, match=message):
        quick_network(**parameters).fit(*few_crystals)


def test_bad_structures(few_crystals, fitted_network):
    X, y = few_crystals
    with pytest.raises(TypeError, match="one Structure"):
        fitted_network.predict(X[0])
    broken = X[5].copy()
    broken.replace(0, {"Fe": 0.5, "Co": 0.5})
    with pytest.raises(StructureError, match=r"X\[5\]"):
        quick_network().fit([*X[:5], broken, *X[6:]], y)


def test_predicting_on_a_device_that_is_not_there(few_crystals, fitted_network):
    moved = copy.deepcopy(fitted_network).set_params(device="cuda:97")
    with pytest.raises(ValueError, match="device='cuda:97' cannot be used"):
        moved.predict(few_crystals[0][:1])


def test_a_label_that_hides_all_others_is_told(few_crystals):
    X, y = few_crystals
    wrong = y.copy()
    wrong[3] *= 1e4
    with pytest.warns(
        UserWarning, match=r"in y\[3\] alone makes up more than half of the variance"
    ):
        quick_network(max_epochs=1).fit(X, wrong)


def test_a_label_that_hides_all_others_is_told_by_its_target(few_crystals):
    X, y = few_crystals
    both = np.column_stack([y, y - 2])
    both[3, 1] = -1e4
    message = r"value -10000 of target 1 in y\[3\] .*; check it$"  # no logarithm of that
    with pytest.warns(UserWarning, match=message):
        quick_network(max_epochs=1).fit(X, both)


def test_targets_that_look_like_those_of_sites_are_told(real_crystals):
    X = [s for s in real_crystals if len(s) == 2][:2]
    with pytest.warns(UserWarning, match="set target='site'"):
        quick_network(max_epochs=1).fit(X, [np.ones(2), np.zeros(2)])
    with warnings.catch_warnings(action="error"):
        quick_network(max_epochs=1).fit(X, np.eye(2))


def test_an_unknown_target_is_told_by_its_crystal(few_crystals):
    X, y = few_crystals
    y = y.copy()
    y[7] = np.nan
    X = pd.Series(X, index=[f"mp-{i}" for i in range(len(X))])
    with pytest.raises(ValueError, match=r"NaN for 1 crystals, the first X\[7\] at index 'mp-7'"):
        quick_network().fit(X, y)


def test_weights_may_change_their_name_in_a_warm_start(few_crystals):
    model = quick_network(max_epochs=1, weights="default", warm_start=True).fit(*few_crystals)
    model.set_params(weights=load_weights("default")).fit(*few_crystals)


def test_warm_start_after_a_constant_target(few_crystals):
    """Whose standard deviation is rounding."""
    X, y = few_crystals
    model = quick_network(max_epochs=1, warm_start=True).fit(X, np.full(len(X), 0.1))
    assert np.ptp(model.set_params(max_epochs=20).fit(X, y).predict(X)) > 0.1 * np.ptp(y)


def test_weights_of_any_size_that_are_equal_change_nothing(few_crystals, fitted_network):
    X, y = few_crystals
    for weight in (1e38, 1e-60):
        model = quick_network().fit(X, y, sample_weight=np.full(len(X), weight))
        np.testing.assert_allclose(model.predict(X), fitted_network.predict(X), rtol=1e-4)


@pytest.mark.parametrize("unit", [1e200, 1e-200])
def test_a_target_whose_square_overflows_or_vanishes(few_crystals, fitted_network, unit):
    X, y = few_crystals
    predicted = quick_network().fit(X, unit * y).predict(X)
    np.testing.assert_allclose(predicted / unit, fitted_network.predict(X), rtol=1e-4)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_crystals_without_a_class_are_refused(few_crystals, missing):
    X = few_crystals[0]
    y = pd.Series(["a", "b"] * (len(X) // 2), dtype=object)
    y[5] = missing
    with pytest.raises(ValueError, match=r"1 classes in y are missing, the first in y\[5\]; leave"):
        NEGNNClassifier(**QUICK_NETWORK).fit(X, y)


def test_classes_are_no_numbers(few_crystals):
    X, y = few_crystals
    for classes in (y > 2, np.where(y > 2, "1", "2")):
        with pytest.raises(ValueError, match="NEGNNRegressor predicts numbers; take NEGNNClassi"):
            quick_network().fit(X, classes)


def test_a_part_to_validate_on_is_asked_of_the_crystals_that_count(few_crystals, monkeypatch):
    X = few_crystals[0]
    sites = [np.full(len(s), np.nan) for s in X]
    sites[0][0] = 1.0
    monkeypatch.setattr(Dataset, "from_graphs", None)  # so it is asked before inputs are made
    with pytest.raises(ValueError, match=r"validation_fraction=0\.1 of the 1 crystals that count"):
        quick_network(target="site", early_stopping=True).fit(X, sites)


def test_a_warm_start_validates_on_what_it_has_not_learned_from(few_crystals, monkeypatch):
    seen = []
    train = NEGNNRegressor._train

    def spy(self, network, dataset, training, validation, *others):
        seen.append((set(training), set(validation)))
        return train(self, network, dataset, training, validation, *others)

    monkeypatch.setattr(NEGNNRegressor, "_train", spy)
    model = quick_network(warm_start=True, early_stopping=True, random_state=None, n_ensemble=2)
    for _ in range(2):
        model.fit(*few_crystals)
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_networks_are_single_whatever_torchs_default(few_crystals, backbone, double_by_default):
    X, y = few_crystals
    fitted = quick_network(backbone=backbone, fine_tune=True).fit(X, y)
    assert all(p.dtype == torch.float32 for p in fitted.networks_[0].parameters())
    predicted = fitted.predict(X)
    torch.set_default_dtype(torch.float32)
    assert np.array_equal(fitted.predict(X), predicted)


def test_weights_read_in_double_precision_are_single(weight_files, double_by_default):
    weights = load_weights(weight_files["context"])
    assert {t.dtype for t in weights.encoder.state_dict().values()} <= {torch.float32, torch.int64}
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING)
    assert pretrainer.fit(list(CRYSTALS.values()) * 3).history_


def test_classes_of_sites_are_refused_with_a_way_out():
    X = [CRYSTALS["NaCl"]] * 4
    with pytest.raises(ValueError, match=r"one class each; for sites .* SSLAtomFeaturizer"):
        NEGNNClassifier().fit(X, [np.array([0, 1])] * 4)


def test_bad_structures_cost_no_other_prediction(few_crystals, fitted_network, monkeypatch):
    X, _ = few_crystals
    model = clone(fitted_network).set_params(on_error="nan", n_ensemble=2).fit(*few_crystals)
    mixed = [ALLOY, X[0], None, X[1], X[2], ALLOY]
    good = [1, 3, 4]
    monkeypatch.setattr(_base, "CHUNK", 2)  # the last piece has a bad one beside a good one
    with pytest.warns(
        UserWarning, match=r"3 of 6 structures .* no prediction.*X\[0\] .*disordered"
    ):
        predicted, std = model.predict(mixed, return_std=True)
    expected, expected_std = model.predict(X[:3], return_std=True)
    assert model.errors_ == {}
    np.testing.assert_allclose(predicted[good], expected, atol=1e-5)
    np.testing.assert_allclose(std[good], expected_std, atol=1e-5)
    assert np.isnan(predicted[[0, 2, 5]]).all()
    with pytest.warns(UserWarning, match="2 of 2 structures"):
        assert np.isnan(model.predict([None, ALLOY])).all()
    assert "TypeError: X[0] is None" in model.errors_[0]
    with pytest.raises(StructureError, match=r"X\[0\]"):
        model.set_params(on_error="raise").predict(mixed)
    with pytest.raises(StructureError, match=r"X\[0\]"):
        model.set_params(on_error="nan").fit(mixed, np.arange(6.0))


def test_sites_of_bad_structures_have_no_prediction(few_crystals):
    X = few_crystals[0]
    model = quick_network(target="site", on_error="nan").fit(X, nearest_distances(X))
    with pytest.warns(UserWarning, match="2 of 4 structures"):
        predicted = model.predict([X[0], ALLOY, X[1], None])
    assert [len(values) for values in predicted] == [len(X[0]), len(ALLOY), len(X[1]), 0]
    assert np.isnan(predicted[1]).all()
    expected = model.predict(X[:2])
    for one, other in zip(predicted[::2], expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_bad_structures_have_no_class(few_crystals):
    X, y = few_crystals
    model = NEGNNClassifier(**QUICK_NETWORK, on_error="nan").fit(X, y > 2)
    with pytest.warns(UserWarning, match="1 of 3 structures"):
        labels = model.predict([X[0], ALLOY, X[1]])
    assert labels[1] is None
    good = model.predict(X[:2])
    assert good.dtype == bool
    assert labels[::2].tolist() == good.tolist()
    with pytest.warns(UserWarning, match="1 of 3 structures"):
        probabilities = model.predict_proba([X[0], ALLOY, X[1]])
    assert np.isnan(probabilities).any(axis=1).tolist() == [False, True, False]
