"""Kernel ridge regression that learns how much each block of features counts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import RegressorMixin
from sklearn.model_selection import KFold
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted, validate_data

from ssl_matfeat._kernel_search import (
    KERNELS,
    Kernel,
    Matrix,
    Point,
    center_of,
    descend,
    inner_error,
    inner_predictions,
    median_of_pairs,
    search_delta,
    search_weights,
    solve,
)
from ssl_matfeat._validation import refuse_classes, refuse_structures
from ssl_matfeat._versioned import VersionedEstimator

_LOSSES = ("huber", "squared")
_MAX_ENTRIES = 2**24
"""Of the kernel between training samples and those predicted at a time: 128 MB."""


class BlockKernelRidge(RegressorMixin, VersionedEstimator):
    """Kernel ridge regression with a weight of its own for each block of columns.

    The kernel is a function of ``s(a, b) = Σ_B θ_B d_B(a, b) / m_B``, with d_B the sum of squared differences in the
    columns of block B (for the Laplacian kernel, of absolute ones) and m_B its median over pairs of training samples:
    ``(1 + √(3 s)) exp(-√(3 s))`` for Matérn's of order 3/2, ``exp(-s)`` for the others. In a plain kernel a block
    counts by its number of columns, so that a few telling ones drown in many; here θ_B and the penalty are found by a
    search along one coordinate after the other, starting from the best plain kernel, for the least mean absolute
    error over inner folds of the training data. A block that does not help gets θ_B = 0 (automatic relevance
    determination, by block; Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, sections 4.2 and
    5.1). Scale columns first. A fit takes up to 32 n² bytes of memory, 3 GB for 10 000 samples, and time with n³; its
    search on m samples takes some 8 (n_blocks + 4) m² bytes.

    Copies of a sample among the training samples tell an inner fold what it should predict, so that the penalty comes
    out too small: drop duplicates first, or keep one of the crystals that differ in nothing but noise. The inner folds
    are random, and know nothing of groups such as the sites of one crystal. There is one target, and samples have no
    weights; NaN is refused.

    Parameters
    ----------
    block_sizes : sequence of int or None, default=None
        Numbers of columns of the blocks, which lie side by side: ``featurizer.block_sizes()`` of an
        `SSLStructureFeaturizer`. None is one block; with ``loss="squared"`` that is a plain kernel ridge
        with cross-validated parameters.
    kernels : tuple of str, default=("matern",)
        Of ``"matern"``, ``"rbf"`` and ``"laplacian"``. Several are searched and fitted each by itself, and their
        predictions averaged. Matérn's does best with learned features; for hand-made ones, and for
        raw layers alone, try ``("laplacian", "rbf")``.
    n_inner_folds : int, default=3
        By which parameters are compared; fewer if there are not as many samples, or ``max_search`` is less.
    max_search : int, default=1500
        Search on at most so many random samples.
    max_refine : int, default=4000
        More samples want a narrower kernel and a smaller penalty: with more than ``max_search``, width, penalty and
        ``delta_`` are searched again on at most so many, the ratios of the weights kept; 0 leaves that out. The winner
        is fitted to all samples.
    loss : {"huber", "squared"}, default="huber"
        ``"huber"`` squares residuals up to ``delta_`` and counts larger ones in proportion, so that a few samples that
        nothing explains, such as failed calculations, do not bend the fit for all others (Huber, Ann. Math. Stat. 35,
        73, 1964). ``delta_`` is searched too, and is infinite, which is ``"squared"``, unless less lowers the error.
    random_state : int, RandomState or None, default=0
        Of the inner folds and of those samples.

    Attributes
    ----------
    kernels_ : tuple of str
        Those that were fitted.
    theta_ : ndarray of shape (n_kernels, n_blocks)
        The weights of the blocks.
    alpha_ : ndarray of shape (n_kernels,)
        The penalties.
    delta_ : ndarray of shape (n_kernels,)
        Up to where residuals are squared, in units of the target.
    center_ : ndarray of shape (n_kernels,)
        What is predicted far from all training samples: the mean of their targets, or under Huber's loss the median.
    inner_prediction_ : ndarray of shape (n_samples,)
        For each training sample the prediction of the inner fold that did not see it.
    n_features_in_ : int
        Number of columns.

    Examples
    --------
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from ssl_matfeat import BlockKernelRidge, SSLStructureFeaturizer, load_elastic
    >>> data = load_elastic()[:120]
    >>> featurizer = SSLStructureFeaturizer()
    >>> head = BlockKernelRidge(featurizer.block_sizes())
    >>> model = make_pipeline(featurizer, StandardScaler(), head).fit(data.structure[:100], data.K_VRH[:100])
    >>> bool(model.score(data.structure[100:], data.K_VRH[100:]) > 0.6)
    True
    """

    def __init__(
        self,
        block_sizes: Sequence[int] | None = None,
        *,
        kernels: tuple[str, ...] = ("matern",),
        n_inner_folds: int = 3,
        max_search: int = 1500,
        max_refine: int = 4000,
        loss: str = "huber",
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.block_sizes = block_sizes
        self.kernels = kernels
        self.n_inner_folds = n_inner_folds
        self.max_search = max_search
        self.max_refine = max_refine
        self.loss = loss
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Choose weights, kernel and penalty, and fit.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
            Scaled, finite.
        y : array of shape (n_samples,)
            Targets.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If the block sizes do not add up to the number of columns, ``y`` holds classes, or a parameter is off.
        TypeError
            If ``X`` holds structures.
        """
        fitted = copy.copy(self)  # a fit that fails or is interrupted leaves this one as it was
        fitted._fit(X, y)
        self.__dict__ = fitted.__dict__
        return self

    def _fit(self, X: Any, y: Any) -> None:
        refuse_structures(X, "BlockKernelRidge")
        refuse_classes(
            y,
            "BlockKernelRidge",
            "a classifier, such as sklearn.svm.SVC on the same columns or NEGNNClassifier",
        )
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        y = y.astype(np.float64)
        self._check_parameters()
        self._starts = self._block_starts(X.shape[1])
        # Distances stay the same, and are exact for columns that are far from 0.
        self._center = X.mean(axis=0)
        X = X - self._center
        rng = check_random_state(self.random_state)
        order = rng.permutation(len(X))
        n_folds = min(self.n_inner_folds, self.max_search, len(X))
        folds = KFold(n_folds, shuffle=True, random_state=rng.randint(2**31))

        self.kernels_ = tuple(self.kernels)
        found = [self._search(KERNELS[name], X, y, order, folds) for name in self.kernels_]
        points = [point for point, _ in found]
        rates = [rate for _, rate in found]
        self.theta_ = np.array([point.theta for point in points])
        self.alpha_ = np.array([point.alpha for point in points])
        self.delta_ = np.array([point.delta for point in points])

        self.X_fit_, self._rates = X, np.array(rates)
        self.center_ = np.array([center_of(y, point.delta) for point in points])
        inner, dual = [], []
        for k, (point, center) in enumerate(zip(points, self.center_, strict=True)):
            kernel_matrix = self._kernel(k, X)
            inner.append(inner_predictions(kernel_matrix, y, point, list(folds.split(X))))
            dual.append(solve(kernel_matrix, y - center, point.alpha, point.delta))
        self.inner_prediction_ = np.mean(inner, axis=0)
        self.dual_coef_ = np.array(dual)

    def predict(self, X: Any) -> Matrix:
        """Return the predictions, (n_samples,)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False) - self._center
        n_rows = max(1, _MAX_ENTRIES // len(self.X_fit_))
        pieces = []
        for start in range(0, len(X), n_rows):
            some = X[start : start + n_rows]
            each = [self._kernel(k, some) @ dual for k, dual in enumerate(self.dual_coef_)]
            pieces.append(np.mean(each, axis=0) + self.center_.mean())
        return np.concatenate(pieces)

    def similarity(self, X: Any) -> Matrix:
        """Return how similar each sample is to each of the training samples, in the kernel that was learned.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
            Scaled as the training samples were.

        Returns
        -------
        ndarray of shape (n_samples, n_training)
            From 0 to 1, the mean over the kernels; 1 for a training sample itself. A prediction rests on the most
            similar ones, and where none is similar it falls back to ``center_``. A wide kernel gives most pairs values
            near 1: compare similarities with each other.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False) - self._center
        return np.mean([self._kernel(k, X) for k in range(len(self.kernels_))], axis=0)

    def _search(
        self, kernel: Kernel, X: Matrix, y: Matrix, order: NDArray[np.int64], folds: KFold
    ) -> tuple[Point, Matrix]:
        """Return the best parameters, and the factor of each block's distance, (n_blocks,)."""
        rows = order[: self.max_search]
        splits = list(folds.split(rows))
        blocks = np.split(X[rows], self._starts, axis=1)
        sizes = np.array([block.shape[1] for block in blocks])
        scaled = np.empty((len(blocks), len(rows), len(rows)))
        for distance, block in zip(scaled, blocks, strict=True):
            distance[:] = kernel.distance(block)
        medians = np.array([median_of_pairs(distance) for distance in scaled])
        scaled /= medians[:, None, None]
        error = inner_error(scaled, kernel, y[rows], splits)
        best = search_weights(kernel, sizes / sizes.sum(), error)
        theta, best = best.theta, best._replace(theta=np.ones(1))

        # From here on the weights stay in proportion, and are one.
        whole = np.tensordot(theta, scaled, axes=1)
        if self.loss == "huber":
            predicted = inner_predictions(kernel.of_distance(whole.copy()), y[rows], best, splits)
            # Errors of a fit that outliers have bent may be larger than the targets of the others differ; but half of
            # the targets may be the same, such as the gaps of metals.
            typical = _typical(predicted - y[rows]), _typical(y[rows] - np.median(y[rows]))
            if max(typical) > 0:
                error = inner_error(whole[None], kernel, y[rows], splits)
                best = search_delta(best, kernel, min(t for t in typical if t > 0), error)
        if min(len(X), self.max_refine) > self.max_search:
            some = order[: self.max_refine]
            whole = self._distance(kernel, theta / medians, X[some], X[some])
            error = inner_error(whole[None], kernel, y[some], list(folds.split(some)))
            best = descend(best, np.ones(1), error)
        best = best._replace(theta=best.theta * theta)
        return best, best.theta / medians

    def _kernel(self, k: int, X: Matrix) -> Matrix:
        """Return kernel number ``k`` between ``X`` and the training samples, (n, n_training)."""
        kernel = KERNELS[self.kernels_[k]]
        return kernel.of_distance(self._distance(kernel, self._rates[k], X, self.X_fit_))

    def _distance(self, kernel: Kernel, rates: Matrix, A: Matrix, B: Matrix) -> Matrix:
        """Return the sum of the blocks' distances times their rates, (n_A, n_B)."""
        total = np.zeros((len(A), len(B)))
        pairs = zip(np.split(A, self._starts, 1), np.split(B, self._starts, 1), strict=True)
        for rate, (a, b) in zip(rates, pairs, strict=True):
            if rate > 0:
                total += rate * kernel.distance(a, b)
        return total

    def _check_parameters(self) -> None:
        check_scalar(self.n_inner_folds, "n_inner_folds", Integral, min_val=2)
        check_scalar(self.max_search, "max_search", Integral, min_val=2)
        check_scalar(self.max_refine, "max_refine", Integral, min_val=0)
        is_tuple = isinstance(self.kernels, tuple | list)
        if (
            not is_tuple
            or not self.kernels
            or any(name not in list(KERNELS) for name in self.kernels)
        ):
            raise ValueError(f"kernels must be a tuple of {list(KERNELS)}, got {self.kernels!r}")
        if self.loss not in _LOSSES:
            raise ValueError(f"loss must be one of {_LOSSES}, got {self.loss!r}")

    def _block_starts(self, n_columns: int) -> NDArray[np.int64]:
        """Return where each block but the first begins."""
        given = [n_columns] if self.block_sizes is None else self.block_sizes
        sizes = np.asarray(given, dtype=object)  # as they are: 2.5 stays no integer
        integers = sizes.ndim == 1 and all(isinstance(n, Integral) and int(n) > 0 for n in sizes)
        if not integers or sizes.sum() != n_columns:
            raise ValueError(
                f"block_sizes={self.block_sizes!r} must be positive integers that add up to the {n_columns} columns of "
                "X; give featurizer.block_sizes() of the featurizer as it is now, the sizes of all further columns "
                "after them, and leave out steps before that drop columns"
            )
        return np.cumsum(sizes.astype(np.int64))[:-1]


def _typical(deviation: Matrix) -> float:
    return float(np.median(np.abs(deviation)))
