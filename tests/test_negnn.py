"""NEGNN: it learns, repeats itself, ignores how a crystal is written down, and keeps scikit-learn's contracts."""

import pickle
import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CRYSTALS, batch_of, shake, untrained
from pymatgen.core import Structure, SymmOp
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.metrics import accuracy_score, mean_absolute_error
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

from ssl_matfeat import NEGNNClassifier, NEGNNRegressor, StructureError
from ssl_matfeat.backbones import BACKBONES
from ssl_matfeat.examples import Dataset, Inputs
from ssl_matfeat.negnn import _base
from ssl_matfeat.network import LEARNED_WEIGHT, Standardize

WEIGHTS = untrained("context")
QUICK = {
    "node_features": "ssl+raw",
    "weights": WEIGHTS,
    "n_channels": 8,
    "n_layers": 1,
    "max_epochs": 2,
    "lr": 0.02,
    "random_state": 0,
}


def quick(**parameters):
    return NEGNNRegressor(**{**QUICK, **parameters})


@pytest.fixture(scope="module")
def data(small_crystals):
    X, y = small_crystals
    return X[:24], y[:24]


@pytest.fixture(scope="module")
def fitted(data):
    return quick().fit(*data)


def nearest_distances(X):
    """A target of each site that its surroundings tell: the distance to its nearest neighbour, in Å."""
    return [
        np.array([min(n.nn_distance for n in s.get_neighbors(site, 6)) for site in s]) for s in X
    ]


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


@pytest.mark.parametrize("backbone", sorted(set(BACKBONES) - {"gcn"}))
def test_backbones_see_distances(backbone):
    """They fit what only distances tell: all crystals hold the same elements. GCN hardly sees any."""
    salt = [CRYSTALS["NaCl"].copy() for _ in range(16)]
    y = np.linspace(-1, 1, 16)
    for strain, crystal in zip(y, salt, strict=True):
        crystal.apply_strain(0.05 * strain)
    model = quick(node_features="onehot", backbone=backbone, max_epochs=200, dropout=0.0)
    assert np.abs(model.fit(salt, y).predict(salt) - y).mean() < 0.2


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


def test_learns_sites_and_skips_unknown_ones(data):
    X = [s for s in data[0] if len(s) > 1]
    known = nearest_distances(X)
    y = [values.copy() for values in known]
    for values in y:
        values[0] = np.nan  # never told
    model = quick(target="site", max_epochs=60, n_channels=16).fit(X, y)
    predicted = model.predict(X)
    assert [p.shape for p in predicted] == [v.shape for v in y]
    hidden, guessed = (np.array([v[0] for v in values]) for values in (known, predicted))
    told = np.concatenate([v[1:] for v in known])
    assert np.abs(guessed - hidden).mean() < 0.6 * np.abs(hidden - told.mean()).mean()
    assert model.score(X, y) > 0.5


def test_class_weight_moves_the_probabilities(data):
    X, y = data[0][:4] * 5, np.repeat([0, 0, 0, 0, 1], 4)  # each crystal is of both classes
    parameters = {**QUICK, "max_epochs": 40}
    plain, balanced = (
        NEGNNClassifier(**parameters, class_weight=weight).fit(X, y).predict_proba(X)[:, 1].mean()
        for weight in (None, "balanced")
    )
    assert abs(plain - 0.2) < 0.1
    assert abs(balanced - 0.5) < 0.1


def test_sample_weight_decides_between_contradictions(data):
    X = data[0][:8] * 2
    y = np.repeat([0.0, 1.0], 8)
    weight = np.repeat([9.0, 1.0], 8)
    model = quick(loss="mse", max_epochs=80, dropout=0.0).fit(X, y, sample_weight=weight)
    assert abs(model.predict(X).mean() - 0.1) < 0.1
    assert model.fit(X, y, sample_weight=weight[::-1]).predict(X).mean() > 0.8
    with pytest.raises(ValueError, match="at least one non-zero"):
        model.fit(X, y, sample_weight=np.zeros(16))
    with pytest.raises(ValueError, match="Negative values"):
        model.fit(X, y, sample_weight=-weight)


def test_several_targets_at_once(data):
    X, y = data
    both = np.stack([y, -100 * y], axis=1)
    predicted = quick(max_epochs=30).fit(X, both).predict(X)
    assert predicted.shape == both.shape
    assert np.corrcoef(predicted[:, 0], predicted[:, 1])[0, 1] < -0.9


def test_ensemble_gives_mean_and_spread(data, fitted):
    X, y = data
    model = quick(n_ensemble=3).fit(X, y)
    mean, std = model.predict(X, return_std=True)
    assert mean.shape == std.shape == y.shape
    assert (std > 0).all()
    assert {record["member"] for record in model.history_} == {0, 1, 2}
    with pytest.raises(ValueError, match="n_ensemble was 1"):
        fitted.predict(X, return_std=True)


def test_fine_tuning_moves_a_copy_of_the_encoder(data):
    X, y = data
    before = {name: t.clone() for name, t in WEIGHTS.encoder.state_dict().items()}
    frozen, tuned = quick().fit(X, y), quick(fine_tune=True, fine_tune_lr=1e-3).fit(X, y)
    encoder = tuned.networks_[0].learned.encoder
    assert any(not torch.equal(before[n], t) for n, t in encoder.state_dict().items())
    assert all(torch.equal(before[n], t) for n, t in WEIGHTS.encoder.state_dict().items())
    assert not np.allclose(frozen.predict(X), tuned.predict(X))
    with pytest.raises(ValueError, match="no such part"):
        quick(node_features="raw", fine_tune=True).fit(X, y)


def test_warm_start_goes_on(data):
    X, y = data
    model = quick(max_epochs=20, warm_start=True).fit(X, y)
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
def test_warm_start_refuses_another_network(change, data, fitted):
    (name,) = change
    model = pickle.loads(pickle.dumps(fitted)).set_params(warm_start=True, **change)
    with pytest.raises(ValueError, match=rf"were fitted with {name}=.*set warm_start=False"):
        model.fit(*data)


def test_sample_of_no_weight_is_as_good_as_absent(data, fitted):
    X, y = data
    weight = np.ones(len(y))
    weight[3] = 0
    spoilt = np.where(weight > 0, y, 1e6)
    model = quick().fit(X, spoilt, sample_weight=weight)
    without = quick().fit([x for x, w in zip(X, weight, strict=True) if w], y[weight > 0])
    assert np.array_equal(model.predict(X), without.predict(X))
    assert not np.array_equal(model.predict(X), fitted.predict(X))


def test_early_stopping_validates_on_what_is_known(data):
    X, y = data
    sites = [np.full(len(x), np.nan) for x in X]
    for i in (0, 5, 9, 20):
        sites[i][:] = y[i]
    model = quick(target="site", early_stopping=True, validation_fraction=0.25).fit(X, sites)
    assert all(record["validation_loss"] > 0 for record in model.history_)


def test_weights_that_leave_nothing(data):
    X, y = data
    with pytest.raises(ValueError, match="non-zero"):
        quick().fit(X, y, sample_weight=np.zeros(len(y)))
    sites = [np.full(len(x), np.nan) for x in X]
    sites[0][:] = 1.0
    weight = np.ones(len(y))
    weight[0] = 0
    with pytest.raises(ValueError, match="wherever y is known"):
        quick(target="site").fit(X, sites, sample_weight=weight)
    classes = (y > np.median(y)).astype(int)
    for class_weight, message in (({0: 0, 1: 0}, "weight of 0"), ({0: -1, 1: 1}, "negative")):
        model = NEGNNClassifier(**QUICK, class_weight=class_weight)
        with pytest.raises(ValueError, match=message):
            model.fit(X, classes)


def test_unseen_elements_are_warned_of(data):
    X, y = data
    neon = Structure(np.diag([4.4] * 3), ["Ne"], [[0, 0, 0]])
    model = quick(node_features="ssl", weights="default").fit(X, y)
    with pytest.warns(UserWarning, match="never saw Ne"):
        model.predict([neon])


def test_diverging_training_says_so(data):
    X, y = data
    with pytest.raises(ValueError, match="diverged in epoch"):
        quick(lr=1e30, max_epochs=20).fit(X, y)


def test_early_stopping_keeps_the_best_epoch(data):
    X, noise = data[0], np.random.default_rng(0).normal(size=len(data[0]))  # nothing to learn
    model = quick(
        early_stopping=True, validation_fraction=0.25, n_iter_no_change=3, max_epochs=200
    ).fit(X, noise)
    validation = [record["validation_loss"] for record in model.history_]
    assert model.n_iter_ < 200
    assert model.n_iter_ == int(np.argmin(validation)) + 4


# It repeats itself


def test_repeats_bit_by_bit_and_leaves_the_global_generator_alone(data, fitted):
    X, y = data
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = clone(fitted).fit(X, y)
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(again.predict(X), fitted.predict(X))
    assert again.history_ == fitted.history_
    assert not np.array_equal(quick(random_state=1).fit(X, y).predict(X), fitted.predict(X))


def test_pickles_into_a_fresh_process(data, fitted, tmp_path):
    X, _ = data
    expected = fitted.predict(X)
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).predict(X), expected)
    joblib.dump((fitted, X), tmp_path / "model.joblib")
    code = (
        "import joblib, numpy, sys; model, X = joblib.load(sys.argv[1]); "
        "numpy.save(sys.argv[2], model.predict(X))"
    )
    files = [str(tmp_path / "model.joblib"), str(tmp_path / "predicted.npy")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    # Other processes may split sums over threads differently.
    np.testing.assert_allclose(np.load(tmp_path / "predicted.npy"), expected, rtol=1e-5)


# It does not matter how a crystal is written down


def rewritten(structure):
    rotation = SymmOp.from_axis_angle_and_translation([1, 2, 3], 40)
    rotated = structure.copy()
    rotated.apply_operation(rotation)
    moved = structure.copy()
    moved.translate_sites(range(len(moved)), [0.13, 0.27, 0.41])
    return {
        "rotated": rotated,
        "moved": moved,
        "reversed": Structure.from_sites(list(structure)[::-1]),
        "supercell": structure * (2, 1, 1),
        "skewed": structure * [[1, 1, 0], [0, 1, 0], [0, 0, 1]],
    }


@pytest.mark.parametrize("backbone", BACKBONES)
def test_invariance(backbone, data):
    parameters = {"n_layers": 2, "n_channels": 16, "max_epochs": 20}
    model = quick(node_features="onehot", backbone=backbone, **parameters).fit(*data)
    for name, crystal in CRYSTALS.items():
        reference = model.predict([crystal])
        for change, other in rewritten(crystal).items():
            np.testing.assert_allclose(
                model.predict([other]), reference, atol=2e-4, err_msg=f"{name} {change}"
            )
    # The control: what is no symmetry does change the number.
    triclinic = CRYSTALS["triclinic"]
    assert abs(model.predict([shake(triclinic, 0, 0.3)]) - model.predict([triclinic]))[0] > 1e-3


def test_painn_sees_angles_and_cgcnn_does_not():
    """Three atoms bent or straight, distances between neighbours equal: only directions differ."""
    from conftest import batch_of

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


def test_predictions_do_not_depend_on_companions(data, fitted):
    X, _ = data
    together = fitted.predict(X)
    alone = np.concatenate([fitted.predict([s]) for s in X])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_predicting_in_pieces_changes_nothing(data, monkeypatch):
    X = data[0][:8]
    model = quick(target="site", max_epochs=1).fit(X, nearest_distances(X))
    whole = model.predict(X)
    monkeypatch.setattr(_base, "_CHUNK", 3)
    pieces = model.predict(X)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    broken = X[5].copy()
    broken.replace(0, {"Fe": 0.5, "Co": 0.5})
    with pytest.raises(StructureError, match=r"X\[5\]"):
        model.predict([*X[:5], broken])


def test_learned_inputs_are_pooled_by_their_mean_and_weighed_less(data):
    inputs = Inputs("ssl+raw", WEIGHTS, None)
    dataset = Dataset.from_structures(data[0], inputs, 2048)
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


# scikit-learn's contracts


def test_init_stores_and_clone_keeps(fitted):
    for model in (NEGNNRegressor(), NEGNNClassifier()):
        assert set(vars(model)) == set(model.get_params())
    assert clone(fitted).get_params()["n_channels"] == 8
    assert not hasattr(fitted, "n_features_in_")
    assert is_regressor(fitted)
    assert is_classifier(NEGNNClassifier())
    with pytest.raises(NotFittedError):
        quick().predict([CRYSTALS["Cu"]])


def test_grid_search_pipeline_and_cross_validation(data):
    X, y = data
    search = GridSearchCV(
        make_pipeline(quick()), {"negnnregressor__node_features": ["ssl", "onehot"]}, cv=2
    ).fit(X, y)
    assert set(search.best_params_) == {"negnnregressor__node_features"}
    assert np.isfinite(cross_val_score(quick(), X, y, cv=2, n_jobs=2)).all()
    sites = nearest_distances(X)
    assert np.isfinite(cross_val_score(quick(target="site"), X, sites, cv=2)).all()
    classes = (y > np.median(y)).astype(int)
    scores = cross_val_score(NEGNNClassifier(**QUICK), X, classes, cv=2, scoring="roc_auc")
    assert np.isfinite(scores).all()


def test_takes_a_series_and_a_frame(data, fitted):
    X, y = data
    expected = fitted.predict(X)
    series = pd.Series(X, index=[f"id-{i}" for i in range(len(X))])
    assert np.array_equal(clone(fitted).fit(series, pd.Series(y)).predict(series), expected)
    assert np.array_equal(fitted.predict(series.to_frame()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y[:-1], "inconsistent numbers of samples"),
        (lambda y: np.where(np.arange(len(y)) == 3, np.nan, y), "y contains NaN"),
        (lambda y: np.where(np.arange(len(y)) == 3, np.inf, y), "y contains infinity"),
        (lambda y: np.stack([y[:, None]] * 2, axis=2), "dim 3"),
    ],
)
def test_bad_y(change, message, data):
    X, y = data
    with pytest.raises(ValueError, match=message):
        quick().fit(X, change(y))


def test_bad_classes(data):
    X, y = data
    model = NEGNNClassifier(**QUICK)
    with pytest.raises(ValueError, match="at least 2 classes"):
        model.fit(X, np.ones(len(X)))
    with pytest.raises(ValueError, match="continuous"):
        model.fit(X, y)
    once = np.array([1] + [0] * (len(X) - 1))
    with pytest.raises(ValueError, match="only 1 member"):
        clone(model).set_params(early_stopping=True).fit(X, once)
    with pytest.warns(DataConversionWarning):
        model.fit(X, (y > np.median(y)).astype(int)[:, None])


def test_bad_site_targets(data):
    X = data[0]
    y = nearest_distances(X)
    with pytest.raises(ValueError, match=r"y\[1\] has shape .* sites"):
        quick(target="site").fit(X, [y[0], y[1][:-1], *y[2:]])
    with pytest.raises(ValueError, match="are NaN"):
        quick(target="site").fit(X, [np.full(len(s), np.nan) for s in X])
    with pytest.raises(ValueError, match=r"y\[0\] contains infinity"):
        quick(target="site").fit(X, [np.full(len(s), np.inf) for s in X])


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
        ({"layers": (0, "shell")}, "add 'raw'"),
        ({"lr": 1e6, "max_epochs": 30}, "diverged"),
    ],
)
def test_bad_parameters(parameters, message, data):
    with pytest.raises(ValueError, match=message):
        quick(**parameters).fit(*data)


def test_bad_structures(data, fitted):
    X, y = data
    with pytest.raises(TypeError, match="one Structure"):
        fitted.predict(X[0])
    broken = X[5].copy()
    broken.replace(0, {"Fe": 0.5, "Co": 0.5})
    with pytest.raises(StructureError, match=r"X\[5\]"):
        quick().fit([*X[:5], broken, *X[6:]], y)
