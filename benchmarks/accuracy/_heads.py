"""The heads: what is fitted on the features, the same for every feature set and every task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor, VotingRegressor
from sklearn.feature_selection import SelectFromModel
from sklearn.impute import SimpleImputer
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ssl_matfeat._kernel_search import KERNELS
from ssl_matfeat.block_kernel import BlockKernelRidge

N_INNER_FOLDS = 3
Matrix = NDArray[np.float64]


class KernelRidgeCV(RegressorMixin, BaseEstimator):
    """Kernel ridge with an intercept, its kernel, gamma and alpha chosen by cross-validation on the training data.

    Every kernel matrix is computed once, and solved by Cholesky for each alpha: five of those cost less than the
    eigendecomposition that would serve all alphas.

    Parameters
    ----------
    kernels : tuple of str
        Of ``"rbf"``, exp(-gamma |a - b|²), and ``"laplacian"``, exp(-gamma |a - b|₁).
    gammas : tuple of float
        In multiples of one over the median distance, so that one grid suits any number of columns.
    alphas : tuple of float
        Ridge penalties.
    max_search : int
        Search the grid on at most so many random rows; the winner is fitted to all.
    random_state : int
        Of the inner folds and of those rows.

    Attributes
    ----------
    best_ : tuple of (str, float, float)
        Kernel, gamma and alpha.
    inner_prediction_ : ndarray of shape (n_samples,)
        For each training row the prediction of the inner fold that did not see it.
    """

    def __init__(
        self,
        kernels: tuple[str, ...] = ("rbf", "laplacian"),
        gammas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0),
        alphas: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        max_search: int = 1500,
        random_state: int = 0,
    ) -> None:
        self.kernels = kernels
        self.gammas = gammas
        self.alphas = alphas
        self.max_search = max_search
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Choose and fit.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
            Scaled, without NaN.
        y : array of shape (n_samples,)
            Targets.

        Returns
        -------
        self
        """
        X, y = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
        rows = np.random.default_rng(self.random_state).permutation(len(X))[: self.max_search]
        errors: dict[tuple[str, float, float], float] = {}
        for kernel in self.kernels:
            distance = KERNELS[kernel].distance(X[rows])
            # Half of the pairs are closer than this; identical rows alone would make it zero.
            median = np.median(distance[np.triu_indices(len(rows), 1)]) or 1.0
            for factor in self.gammas:
                gamma = float(factor / median)
                predicted = self._inner(np.exp(-gamma * distance), y[rows], self.alphas)
                maes = np.abs(predicted - y[rows]).mean(axis=1)
                errors |= {(kernel, gamma, a): m for a, m in zip(self.alphas, maes, strict=True)}
        self.best_ = min(errors, key=errors.__getitem__)

        kernel, self.gamma_, alpha = self.best_
        K = np.exp(-self.gamma_ * KERNELS[kernel].distance(X))
        (self.inner_prediction_,) = self._inner(K, y, (alpha,))
        self.X_fit_, self.y_mean_ = X, float(y.mean())
        self.dual_coef_ = _solve(K, y - self.y_mean_, alpha)
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Return the predictions, (n_samples,)."""
        distance = KERNELS[self.best_[0]].distance(np.asarray(X, dtype=np.float64), self.X_fit_)
        return np.exp(-self.gamma_ * distance) @ self.dual_coef_ + self.y_mean_

    def _inner(self, K: Matrix, y: Matrix, alphas: tuple[float, ...]) -> Matrix:
        """Return the predictions of the inner folds for each alpha, (n_alphas, n_samples)."""
        predicted = np.zeros((len(alphas), len(y)))
        for train, test in _inner_folds(self.random_state).split(K):
            K_train, K_test, mean = K[np.ix_(train, train)], K[np.ix_(test, train)], y[train].mean()
            for i, alpha in enumerate(alphas):
                predicted[i, test] = K_test @ _solve(K_train, y[train] - mean, alpha) + mean
        return predicted


def _solve(K: Matrix, y: Matrix, alpha: float) -> Matrix:
    damped = K.copy()
    damped.flat[:: len(K) + 1] += alpha
    return cho_solve(cho_factor(damped, lower=True, overwrite_a=True), y)


def _inner_folds(random_state: int) -> KFold:
    return KFold(N_INNER_FOLDS, shuffle=True, random_state=random_state)


def _imputer() -> SimpleImputer:
    # A matminer featurizer that fails leaves NaN.
    return SimpleImputer(strategy="median", keep_empty_features=True)


def _trees(seed: int, n_trees: int = 500, min_samples_leaf: int = 1) -> ExtraTreesRegressor:
    return ExtraTreesRegressor(
        n_trees,
        max_features=1 / 3,
        min_samples_leaf=min_samples_leaf,
        n_jobs=-1,
        random_state=seed,
    )


def _at_most_75(X: Matrix) -> int:
    return min(75, X.shape[1])


def _selected_trees(seed: int) -> Pipeline:
    """Trees choose among less and less telling columns the more there are, so quick ones choose columns first."""
    quick = _trees(seed, 100, min_samples_leaf=5)
    select = SelectFromModel(quick, max_features=_at_most_75, threshold=-np.inf)
    return make_pipeline(_imputer(), select, _trees(seed))


class VotingKernels(VotingRegressor):
    """The mean of several `BlockKernelRidge`, with the mean of what their inner folds predict.

    Attributes
    ----------
    inner_prediction_ : ndarray of shape (n_samples,)
        For each training row: of each member the prediction of the inner fold that did not see it.
    """

    @property
    def inner_prediction_(self) -> Matrix:
        return np.mean([kernel.inner_prediction_ for kernel in self.estimators_], axis=0)


def _block_kernel(
    kernels: tuple[str, ...], loss: str, seed: int, block_sizes: tuple[int, ...]
) -> Pipeline:
    head = BlockKernelRidge(block_sizes, kernels=kernels, loss=loss, random_state=seed)
    return make_pipeline(_imputer(), StandardScaler(), head)


def _four_kernels(seed: int, block_sizes: tuple[int, ...]) -> Pipeline:
    # What the search for the weights of blocks finds depends on its inner folds, which are drawn anew for each.
    members = [
        (f"random_state={s}", BlockKernelRidge(block_sizes, random_state=s))
        for s in range(seed, seed + 4)
    ]
    return make_pipeline(_imputer(), StandardScaler(), VotingKernels(members))


HEADS: dict[str, Callable[[int, tuple[int, ...]], BaseEstimator]] = {
    "ET": lambda seed, _: make_pipeline(_imputer(), _trees(seed)),
    "SET": lambda seed, _: _selected_trees(seed),
    # With all features at each split, as the leaderboard's reference has it.
    "RF": lambda seed, _: make_pipeline(
        _imputer(), RandomForestRegressor(500, n_jobs=-1, random_state=seed)
    ),
    "KRR": lambda seed, _: make_pipeline(
        _imputer(), StandardScaler(), KernelRidgeCV(random_state=seed)
    ),
    # Hand-made features do better with the first, learned ones with the others.
    "BKR": partial(_block_kernel, ("laplacian", "rbf"), "squared"),
    "MKR": partial(_block_kernel, ("matern",), "squared"),
    "HKR": partial(_block_kernel, ("matern",), "huber"),
    "ridge": lambda *_: make_pipeline(
        _imputer(), StandardScaler(), RidgeCV(alphas=np.logspace(-2, 5, 15))
    ),
}
"""Name → unfitted pipeline, of a seed and the sizes of the feature set's blocks."""

ENSEMBLES: dict[str, Callable[[int, tuple[int, ...]], BaseEstimator]] = {"4HKR": _four_kernels}
"""Heads of four times the cost, which are not among those to choose from."""

AVERAGES = {
    f"{trees}+{kernel}": (trees, kernel)
    for kernel in ("BKR", "MKR", "HKR")
    for trees in ("ET", "SET")
}
"""Heads whose predictions are the mean of other heads'."""


def inner_predictions(model: Pipeline, X: NDArray, y: NDArray, seed: int) -> Matrix:
    """Return for each training row what a fitted head says of it when it has not seen it, from inner folds.

    The head with the least error there is the one that somebody without the test data would have taken.
    """
    if hasattr(model[-1], "inner_prediction_"):
        return model[-1].inner_prediction_
    again = clone(model)
    if "n_estimators" in again[-1].get_params():
        again[-1].set_params(n_estimators=100)  # enough to rank the heads
    return cross_val_predict(again, X, y, cv=_inner_folds(seed))
