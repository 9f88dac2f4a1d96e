"""What scikit-learn's own checks ask of a transformer, on Structures."""

import inspect
import pickle

import numpy as np
import pandas as pd
import pytest
from conftest import bcc, rock_salt
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import ExtraTreesRegressor, StackingRegressor, VotingRegressor
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ssl_matfeat import SSLAtomFeaturizer, SSLPretrainer, SSLStructureFeaturizer
from ssl_matfeat.weights import WeightsError

LAYERS = ("element", 1)
CLASSES = [SSLStructureFeaturizer, SSLAtomFeaturizer]


@pytest.fixture
def crystals(weight_files):
    return SSLStructureFeaturizer(weight_files["cgcnn"], LAYERS, pooling=("mean",))


@pytest.fixture
def sites(weight_files):
    return SSLAtomFeaturizer(weight_files["cgcnn"], LAYERS)


@pytest.fixture(params=["crystals", "sites"])
def featurizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def model(crystals):
    return make_pipeline(crystals, StandardScaler(), Ridge())


@pytest.fixture(scope="module")
def labelled(small_crystals):
    X, y = small_crystals
    return X[:24], y[:24]


@pytest.mark.parametrize("cls", [*CLASSES, SSLPretrainer])
def test_init_stores_its_parameters_and_does_nothing_else(cls):
    names = [name for name in inspect.signature(cls).parameters]
    values = {name: object() for name in names}  # which no check would let through
    made = cls(**values)
    assert {key: value for key, value in vars(made).items() if not key.startswith("_")} == values
    assert list(made.get_params(deep=False)) == sorted(names)


@pytest.mark.parametrize("cls", CLASSES)
def test_clone_and_set_params(cls, weight_files):
    changed = {
        "weights": str(weight_files["cgcnn"]),
        "layers": (0,),
        "batch_size": 99,
        "dtype": "float64",
        "n_jobs": 2,
        "on_error": "nan",
        "verbose": True,
    }
    featurizer = cls().set_params(**changed)
    copy = clone(featurizer)
    assert copy is not featurizer
    assert copy.get_params() == featurizer.get_params()
    assert {key: copy.get_params()[key] for key in changed} == changed
    with pytest.raises(ValueError, match="Invalid parameter 'cutoff'"):
        cls().set_params(cutoff=3)


def test_clone_forgets_what_was_fitted(featurizer, labelled):
    assert not [name for name in vars(clone(featurizer.fit(labelled[0]))) if name.endswith("_")]


def test_fit_changes_no_parameter_and_is_idempotent(featurizer, labelled):
    before = featurizer.get_params()
    first = featurizer.fit(labelled[0]).transform(labelled[0])
    assert featurizer.fit(labelled[0]) is featurizer
    second = featurizer.fit(labelled[0], labelled[1]).transform(labelled[0])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, clone(featurizer).fit_transform(labelled[0]))
    assert featurizer.get_params() == before


def test_transform_changes_neither_parameters_nor_input(featurizer, labelled):
    featurizer.fit(labelled[0])
    kept, structures = featurizer.get_params(), [s.copy() for s in labelled[0]]
    states = featurizer.pretrained_.encoder.state_dict()
    states = {key: value.clone() for key, value in states.items()}
    featurizer.transform(labelled[0])
    assert featurizer.get_params() == kept
    assert structures == labelled[0]
    after = featurizer.pretrained_.encoder.state_dict()
    assert all(bool((states[key] == after[key]).all()) for key in states)


def test_transform_needs_no_fit(featurizer, labelled):
    alone = clone(featurizer).transform(labelled[0])
    np.testing.assert_array_equal(alone, featurizer.fit(labelled[0]).transform(labelled[0]))
    assert not featurizer.__sklearn_tags__().requires_fit
    assert not featurizer.__sklearn_tags__().input_tags.two_d_array


def test_there_is_no_n_features_in(featurizer, labelled):
    assert not hasattr(featurizer.fit(labelled[0]), "n_features_in_")


def test_pickled_one_gives_the_same(featurizer, labelled):
    expected = featurizer.fit(labelled[0]).transform(labelled[0])
    loaded = pickle.loads(pickle.dumps(featurizer))
    np.testing.assert_array_equal(loaded.transform(labelled[0]), expected)
    assert loaded.get_params() == featurizer.get_params()


def test_parameters_set_after_the_fit_hold_at_once(weight_files, labelled):
    X = labelled[0]
    featurizer = SSLStructureFeaturizer("default", (0,)).fit(X)
    changed = featurizer.set_params(weights="paper-predictive").transform(X)
    assert np.array_equal(changed, SSLStructureFeaturizer("paper-predictive", (0,)).transform(X))
    with pytest.raises(WeightsError):
        featurizer.set_params(weights="nonsense").transform(X)


def test_repr_shows_what_was_changed():
    assert repr(SSLStructureFeaturizer()) == "SSLStructureFeaturizer()"
    shown = repr(SSLAtomFeaturizer(layers=(0,), dtype="float64"))
    assert shown == "SSLAtomFeaturizer(dtype='float64', layers=(0,))"


def test_feature_names_follow_set_params(crystals, labelled):
    crystals.fit(labelled[0])
    names = list(crystals.get_feature_names_out())
    assert names[:2] == ["mean of Number", "mean of MendeleevNumber"]
    crystals.set_params(layers=("cell",))
    assert crystals.get_feature_names_out()[0] == "mass density"
    assert crystals.transform(labelled[0]).shape[1] == len(crystals.get_feature_names_out())
    crystals.set_params(layers=(0,), pooling=("min", "sum"))
    assert list(crystals.get_feature_names_out()[:2]) == ["min of NE0_0", "sum of NE0_0"]
    assert crystals.transform(labelled[0]).shape[1] == len(crystals.get_feature_names_out()) == 32


def test_every_container_of_structures_gives_the_same(featurizer, labelled):
    X = labelled[0]
    array = np.empty(len(X), dtype=object)
    for i, structure in enumerate(X):
        array[i] = structure
    series = pd.Series(X, index=[f"x{i}" for i in range(len(X))])
    expected = featurizer.fit_transform(X)
    for other in (tuple(X), array, array[:, None], series, series.to_frame("s")):
        np.testing.assert_array_equal(featurizer.transform(other), expected)
    one_site = [s for s in X if len(s) == 1] or [bcc().get_primitive_structure()]
    assert featurizer.transform(one_site).shape[0] == len(one_site)


def test_one_structure_is_refused_by_name(featurizer):
    with pytest.raises(TypeError, match=r"X is one Structure \(NaCl\).*pass \[structure\]"):
        featurizer.fit_transform(rock_salt())


@pytest.mark.parametrize("as_frame", [False, True])
def test_pandas_output_keeps_the_index(crystals, labelled, as_frame):
    crystals.set_output(transform="pandas")
    X = pd.Series(labelled[0], index=np.arange(100, 124))
    result = crystals.fit_transform(X.to_frame("s") if as_frame else X)
    assert list(result.index) == list(X.index)
    assert list(result.columns) == list(crystals.get_feature_names_out())
    assert list(crystals.transform(labelled[0]).index) == list(range(24))


def test_pandas_output_of_sites_has_two_levels(sites):
    values = sites.fit_transform([rock_salt(), bcc()])
    sites.set_output(transform="pandas")
    result = sites.fit_transform(pd.Series([rock_salt(), bcc()], index=["salt", "iron"]))
    assert result.index.names == ["structure", "site"]
    assert result.index[[0, 7, 8, 9]].tolist() == [
        ("salt", 0),
        ("salt", 7),
        ("iron", 0),
        ("iron", 1),
    ]
    np.testing.assert_array_equal(result.loc["iron"], values[8:])
    assert sites.transform([bcc()]).index.tolist() == [(0, 0), (0, 1)]
    assert list(result.columns) == list(sites.get_feature_names_out())


def test_pipeline_fits_and_predicts(model, labelled):
    X, y = labelled
    assert model.fit(X, y).score(X, y) > 0.9
    assert model[:-1].get_feature_names_out()[0] == "mean of Number"


def test_column_transformer_beside_a_column_of_numbers(crystals, labelled):
    frame = pd.DataFrame({"structure": labelled[0], "pressure": np.arange(24.0)})
    for column in ("structure", ["structure"]):
        columns = ColumnTransformer(
            [("ssl", crystals, column), ("number", "passthrough", ["pressure"])]
        )
        result = columns.set_output(transform="pandas").fit_transform(frame)
        assert result["number__pressure"].tolist() == list(range(24))
        np.testing.assert_array_equal(result.iloc[:, :-1], crystals.fit_transform(labelled[0]))
        assert result.columns[0] == "ssl__mean of Number"


def test_feature_union(weight_files, labelled):
    parts = [
        (name, SSLStructureFeaturizer(weight_files[name], (1,), pooling=("mean",)))
        for name in ("cgcnn", "context")
    ]
    union = FeatureUnion(parts).fit(labelled[0])
    separate = np.hstack([part.transform(labelled[0]) for _, part in parts])
    np.testing.assert_array_equal(union.transform(labelled[0]), separate)
    assert union.get_feature_names_out()[0] == "cgcnn__mean of NE1_0"


def test_grid_search_over_layers_and_weights(model, weight_files, labelled):
    grid = {
        "sslstructurefeaturizer__layers": [("element",), (0, 1)],
        "sslstructurefeaturizer__weights": list(weight_files.values()),
    }
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(*labelled)
    scores = dict(
        zip(
            map(str, search.cv_results_["params"]),
            search.cv_results_["mean_test_score"],
            strict=True,
        )
    )
    assert len(scores) == 4
    learned = [score for name, score in scores.items() if "(0, 1)" in name]
    raw = [score for name, score in scores.items() if "element" in name]
    assert raw[0] == raw[1]
    assert learned[0] != learned[1]
    assert search.predict(labelled[0]).shape == (24,)


def test_grid_search_over_bundled_weights(labelled):
    model = Pipeline([("ssl", SSLStructureFeaturizer(layers=(0, 1, 2))), ("ridge", Ridge())])
    grid = {"ssl__weights": ["default", "paper-predictive"]}
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(*labelled)
    assert len(set(search.cv_results_["mean_test_score"])) == 2


def test_cross_validation_in_two_processes(model, labelled):
    alone = cross_val_score(model, *labelled, cv=3, error_score="raise")
    np.testing.assert_allclose(
        cross_val_score(model, *labelled, cv=3, n_jobs=2, error_score="raise"),
        alone,
        rtol=1e-3,
        atol=1e-3,
    )


def test_two_processes_give_what_one_gives(crystals, elastic):
    X = elastic["structure"].tolist()[:300]  # more than one piece of work
    alone = crystals.fit_transform(X)
    together = clone(crystals).set_params(n_jobs=2).fit_transform(X)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    assert len(together) == 300


@pytest.mark.filterwarnings("ignore:.*have NaN for features:UserWarning")
def test_errors_of_two_processes_name_the_right_item(crystals, elastic):
    X = [*elastic["structure"].tolist()[:270], None, bcc()]
    nan = clone(crystals).set_params(n_jobs=2, on_error="nan")
    assert np.flatnonzero(np.isnan(nan.fit_transform(X)).any(axis=1)).tolist() == [270]
    assert list(nan.errors_) == [270]
    with pytest.raises(TypeError, match=r"X\[270\] is None"):
        clone(crystals).set_params(n_jobs=2).fit_transform(X)


@pytest.mark.parametrize("ensemble", [VotingRegressor, StackingRegressor])
def test_ensembles_of_pipelines(ensemble, crystals, model, labelled):
    trees = make_pipeline(clone(crystals), ExtraTreesRegressor(20, random_state=0))
    both = ensemble([("linear", model), ("trees", trees)]).fit(*labelled)
    predicted = both.predict(labelled[0])
    assert predicted.shape == (24,)
    assert np.corrcoef(predicted, labelled[1])[0, 1] > 0.8
