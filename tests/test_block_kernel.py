"""The kernel head: finds which blocks matter, equals scikit-learn's for one block, and keeps its rules."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import CRYSTALS
from scipy.optimize import minimize
from sklearn.gaussian_process.kernels import Matern
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import euclidean_distances, laplacian_kernel, rbf_kernel
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ssl_matfeat import BlockKernelRidge, SSLStructureFeaturizer, block_kernel
from ssl_matfeat._kernel_search import KERNELS, Point, inner_error, solve

LOSSES = ("huber", "squared")


@pytest.fixture
def telling_and_noise():
    """Two columns that tell everything, beside 40 of noise."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 42))
    return X, np.sin(2 * X[:, 0]) + X[:, 1] ** 2


@parametrize_with_checks([BlockKernelRidge()])
def test_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    ("name", "plain_kernel"),
    [
        ("laplacian", lambda rate: partial(laplacian_kernel, gamma=rate)),
        ("rbf", lambda rate: partial(rbf_kernel, gamma=rate)),
        ("matern", lambda rate: Matern(rate**-0.5, nu=1.5)),
    ],
)
def test_one_block_is_plain_kernel_ridge(telling_and_noise, name, plain_kernel):
    X, y = telling_and_noise
    X = X[:, :2]
    ours = BlockKernelRidge(kernels=(name,)).fit(X[:200], y[:200])
    kernel = plain_kernel(ours._rates[0, 0])
    plain = KernelRidge(kernel="precomputed", alpha=ours.alpha_[0])
    plain.fit(kernel(X[:200], X[:200]), y[:200] - y[:200].mean())
    expected = plain.predict(kernel(X[200:], X[:200])) + y[:200].mean()
    np.testing.assert_allclose(ours.predict(X[200:]), expected, rtol=1e-6)


def test_several_kernels_are_averaged(telling_and_noise):
    X, y = telling_and_noise
    one, other, both = (
        BlockKernelRidge((2, 40), kernels=kernels).fit(X[:200], y[:200])
        for kernels in (("laplacian",), ("matern",), ("laplacian", "matern"))
    )
    mean = (one.predict(X[200:]) + other.predict(X[200:])) / 2
    np.testing.assert_allclose(both.predict(X[200:]), mean)
    assert both.theta_.shape == (2, 2)


def test_blocks_find_what_tells(telling_and_noise):
    X, y = telling_and_noise
    by_block = BlockKernelRidge((2, 40)).fit(X[:200], y[:200])
    all_alike = BlockKernelRidge().fit(X[:200], y[:200])
    assert (by_block.theta_[:, 1] < by_block.theta_[:, 0] / 10).all()
    assert r2_score(y[200:], by_block.predict(X[200:])) > 0.9
    assert r2_score(y[200:], all_alike.predict(X[200:])) < 0.5


def test_order_of_the_blocks_does_not_matter(telling_and_noise):
    X, y = telling_and_noise
    turned = np.hstack([X[:, 2:], X[:, :2]])
    one = BlockKernelRidge((2, 40)).fit(X[:200], y[:200]).predict(X[200:])
    other = BlockKernelRidge((40, 2)).fit(turned[:200], y[:200]).predict(turned[200:])
    np.testing.assert_allclose(one, other, atol=0.05 * y.std())


def test_search_on_fewer_rows_still_fits_all(telling_and_noise):
    X, y = telling_and_noise
    few = BlockKernelRidge((2, 40), max_search=60).fit(X[:200], y[:200])
    assert few.dual_coef_.shape == (1, 200)
    assert r2_score(y[200:], few.predict(X[200:])) > 0.8


def test_refined_on_more_rows_than_were_searched():
    X = np.random.default_rng(0).uniform(size=(700, 2))
    # Too wiggly and noisy for 40 rows.
    y = np.sin(10 * X[:, 0]) * np.cos(10 * X[:, 1])
    y += 0.3 * np.random.default_rng(1).normal(size=len(X))
    searched, refined = (
        BlockKernelRidge(max_search=40, max_refine=n).fit(X[:500], y[:500]) for n in (0, 500)
    )
    assert r2_score(y[500:], searched.predict(X[500:])) < 0.4
    assert r2_score(y[500:], refined.predict(X[500:])) > 0.5


def test_duplicates_without_noise():
    X = np.repeat(np.linspace(0, 1, 30), 4)[:, None]
    model = BlockKernelRidge().fit(X, np.sin(6 * X[:, 0]))
    assert (model.alpha_ >= 1e-8).all()
    assert np.isfinite(model.predict(X)).all()


def test_similarity_is_the_kernel_of_the_predictions(telling_and_noise):
    X, y = telling_and_noise
    model = BlockKernelRidge((2, 40)).fit(X[:200], y[:200])
    similarity = model.similarity(X)
    assert similarity.shape == (300, 200)
    np.testing.assert_allclose(np.diag(similarity), 1)
    assert (similarity > 0).all()
    assert (similarity < 1 + 1e-12).all()
    np.testing.assert_allclose(
        similarity @ model.dual_coef_[0] + y[:200].mean(), model.predict(X), atol=1e-10
    )
    # Near in the telling columns, not in those of noise.
    nearest = similarity[200:].argmax(axis=1)
    rms = np.sqrt(np.mean((X[200:] - X[nearest]) ** 2, axis=0))
    assert rms[:2].max() < rms[2:].min()


@pytest.mark.parametrize("y", [["soft", "stiff"] * 5, np.array([True, False] * 5)])
def test_classes_are_refused(y):
    with pytest.raises(ValueError, match=r"y holds classes.*SVC"):
        BlockKernelRidge().fit(np.arange(10.0)[:, None], y)


@pytest.mark.parametrize("sizes", [(2, 39), (0, 42), (-1, 43), (20.5, 21.5), [[2, 40]], (), 42])
def test_sizes_that_do_not_fit(telling_and_noise, sizes):
    X, y = telling_and_noise
    with pytest.raises(ValueError, match=r"block_sizes.* 42 columns"):
        BlockKernelRidge(sizes).fit(X, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": ("cosine",)}, "kernels must be a tuple of"),
        ({"kernels": ()}, "kernels must be a tuple of"),
        ({"kernels": "matern"}, "kernels must be a tuple of"),
        ({"loss": "absolute"}, "loss must be one of"),
        ({"n_inner_folds": 1}, "n_inner_folds"),
        ({"max_search": 0}, "max_search"),
        ({"max_refine": -1}, "max_refine"),
    ],
)
def test_bad_parameters(telling_and_noise, options, message):
    X, y = telling_and_noise
    with pytest.raises(ValueError, match=message):
        BlockKernelRidge(**options).fit(X, y)


def test_sizes_come_from_the_featurizer():
    featurizer = SSLStructureFeaturizer(layers=("element", "cell", 1))
    assert featurizer.block_sizes() == (88, 19, 64)
    assert featurizer.block_names() == ("element", "cell", "NE1")
    assert sum(SSLStructureFeaturizer().block_sizes()) == len(
        SSLStructureFeaturizer().feature_labels()
    )


def test_predictions_in_pieces_are_the_same(telling_and_noise, monkeypatch):
    X, y = telling_and_noise
    model = BlockKernelRidge((2, 40)).fit(X[:200], y[:200])
    whole = model.predict(X)
    monkeypatch.setattr("ssl_matfeat.block_kernel._MAX_ENTRIES", 7 * 200)
    assert np.allclose(model.predict(X), whole, rtol=1e-12)


@pytest.mark.parametrize("kernel", ["matern", "rbf", "laplacian"])
def test_offset_of_the_columns_does_not_matter(telling_and_noise, kernel):
    X, y = telling_and_noise
    one, other = (
        BlockKernelRidge((2, 40), kernels=(kernel,)).fit(X[:200] + offset, y[:200])
        for offset in (0, 1e7)
    )
    assert np.allclose(one.predict(X[200:]), other.predict(X[200:] + 1e7), atol=1e-4)


def test_parameters_set_after_the_fit_change_no_prediction(telling_and_noise):
    X, y = telling_and_noise
    model = BlockKernelRidge((2, 40)).fit(X[:200], y[:200])
    before = model.predict(X[200:])
    assert np.array_equal(model.set_params(kernels=("laplacian",)).predict(X[200:]), before)


def test_huber_is_the_minimum_of_its_objective():
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(size=40))[:, None]
    y = np.sin(6 * x[:, 0]) + 0.1 * rng.normal(size=40)
    y[::8] += 3
    kernel, alpha, delta = rbf_kernel(x, gamma=10), 0.05, 0.2

    def objective(dual):
        r = np.abs(y - kernel @ dual)
        loss = np.where(r <= delta, r**2, 2 * delta * r - delta**2)
        return loss.sum() + alpha * dual @ kernel @ dual

    least = minimize(objective, np.zeros(40), method="L-BFGS-B", options={"maxfun": 10**6}).fun
    assert objective(solve(kernel, y, alpha, delta)) < 1.02 * least
    assert objective(solve(kernel, y, alpha, np.inf)) > 1.3 * least


def test_outliers_do_not_bend_the_fit_for_others(telling_and_noise):
    X, y = telling_and_noise
    X, clean = X[:, :2], y.copy()
    y[:200:10] += 1e5
    huber, squared = (BlockKernelRidge(loss=loss).fit(X[:200], y[:200]) for loss in LOSSES)
    errors = [np.abs(m.predict(X[200:]) - clean[200:]).mean() for m in (huber, squared)]
    assert errors[0] < errors[1] / 2
    assert huber.delta_[0] < 1
    assert huber.center_[0] < clean.max()
    assert np.isinf(squared.delta_[0])


def test_without_outliers_huber_is_squared(telling_and_noise):
    X, y = telling_and_noise
    huber, squared = (BlockKernelRidge((2, 40), loss=loss).fit(X[:200], y[:200]) for loss in LOSSES)
    assert np.isinf(huber.delta_[0])
    assert np.array_equal(huber.predict(X[200:]), squared.predict(X[200:]))


def test_small_weights_are_told_apart():
    """Of a thousand blocks each weighs next to nothing."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3))
    y = X.sum(axis=1)
    distance = euclidean_distances(X, squared=True)[None]
    splits = list(KFold(3).split(X))
    error = inner_error(distance, KERNELS["matern"], y, splits)
    assert error(Point(np.array([1e-7]), 1e-6)) != error(Point(np.array([4e-7]), 1e-6))


def test_outliers_where_half_of_the_targets_are_equal(telling_and_noise):
    """As gaps are, most of them 0."""
    X, y = telling_and_noise
    X, clean = X[:, :2], np.maximum(0, y - np.quantile(y, 0.6))
    y = clean.copy()
    y[:200:10] += 1e5
    huber, squared = (BlockKernelRidge(loss=loss).fit(X[:200], y[:200]) for loss in LOSSES)
    errors = [np.abs(m.predict(X[200:]) - clean[200:]).mean() for m in (huber, squared)]
    assert np.median(clean) == 0
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("stage", ["search_weights", "solve"])
def test_interrupted_fit_leaves_the_model_as_it_was(telling_and_noise, monkeypatch, stage):
    X, y = telling_and_noise
    model = BlockKernelRidge(loss="squared").fit(X[:50], y[:50])
    before = model.predict(X)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(block_kernel, stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.fit(1 + X[50:90], -y[50:90])
    assert np.array_equal(model.predict(X), before)


def test_most_samples_are_equal_in_a_block():
    """The median of their distances is rounding, which is no scale."""
    rng = np.random.default_rng(11)
    same = rng.random(150) < 0.8
    A = rng.normal(size=(150, 20)).astype(np.float32).astype(float)
    A[same] = rng.normal(size=20)
    B, weight = rng.normal(size=(150, 10)), rng.normal(size=20) / 20**0.5
    y = np.where(same, 0, A @ weight) + B[:, 0] + 0.5 * B[:, 1]
    X = np.hstack([A, B])
    X = StandardScaler().fit(X[:100]).transform(X)
    model = BlockKernelRidge((20, 10)).fit(X[:100], y[:100])
    assert model.theta_[0, 0] > 0
    error = np.abs(model.predict(X[100:]) - y[100:])[same[100:]].mean()
    assert error < 0.02


@pytest.mark.parametrize("option", [{"n_inner_folds": 5}, {"random_state": 1}], ids=str)
def test_inner_folds_are_as_asked_for(telling_and_noise, option):
    X, y = telling_and_noise
    first, second = BlockKernelRidge().fit(X, y), BlockKernelRidge(**option).fit(X, y)
    assert not np.allclose(first.inner_prediction_, second.inner_prediction_)


@pytest.mark.parametrize("kind", [list, pd.Series, lambda X: pd.Series(X).to_numpy()])
def test_structures_without_a_featurizer_are_refused_by_name(kind):
    X = kind([CRYSTALS["NaCl"], CRYSTALS["Cu"]])
    with pytest.raises(TypeError, match=r"X holds structures, .* put SSLStructureFeaturizer"):
        BlockKernelRidge().fit(X, [1.0, 2.0])
