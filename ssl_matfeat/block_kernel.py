"""Kernel ridge regression that learns how much each block of features counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.metrics.pairwise import euclidean_distances, manhattan_distances
from sklearn.model_selection import KFold
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted, validate_data

Matrix = NDArray[np.float64]


class Kernel(NamedTuple):
    """A distance that adds up over blocks, and the kernel as a function of their weighted sum."""

    distance: Callable[..., Matrix]
    """Between the rows of one matrix or of two."""
    of_distance: Callable[[Matrix], Matrix]
    """May overwrite what it is given."""
    scales: tuple[float, ...]
    alphas: tuple[float, ...]
    """The search starts from the best of these sums of all weights and penalties."""


def _exponential(distance: Matrix) -> Matrix:
    return np.exp(-distance, out=distance)


def _matern(distance: Matrix) -> Matrix:
    root = np.sqrt(np.multiply(3, distance, out=distance), out=distance)
    decay = np.exp(-root)
    root += 1
    return np.multiply(root, decay, out=root)


_squared = partial(euclidean_distances, squared=True)
_SCALES = (0.03, 0.1, 0.3, 1.0, 3.0)
_ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
KERNELS = {
    # Its tails are long, so that it may be wider, and then wants a smaller penalty.
    "matern": Kernel(_squared, _matern, (0.003, 0.01, *_SCALES), (1e-5, *_ALPHAS)),
    "rbf": Kernel(_squared, _exponential, _SCALES, _ALPHAS),
    "laplacian": Kernel(manhattan_distances, _exponential, _SCALES, _ALPHAS),
}
_LEAST_ALPHA = 1e-8
"""Below this, equal samples make a kernel singular in double precision."""
_MAX_ROUNDS = 4
_MAX_ENTRIES = 2**24
"""Of the kernel between training samples and those predicted at a time: 128 MB."""
_LEAST_GAIN = 2e-3
"""Part by which a step must lower the error: smaller gains are noise of the inner folds."""


class BlockKernelRidge(RegressorMixin, BaseEstimator):
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

    Parameters
    ----------
    block_sizes : sequence of int or None, default=None
        Numbers of columns of the blocks, which lie side by side: ``featurizer.block_sizes()`` of an
        `SSLStructureFeaturizer`. None is one block, a plain kernel ridge with cross-validated parameters.
    kernels : tuple of str, default=("matern",)
        Of ``"matern"``, ``"rbf"`` and ``"laplacian"``. Several are searched and fitted each by itself, and their
        predictions averaged. Matérn's does best with learned features; for hand-made ones try
        ``("laplacian", "rbf")``.
    n_inner_folds : int, default=3
        By which parameters are compared.
    max_search : int, default=1500
        Search on at most so many random samples.
    max_refine : int, default=4000
        More samples want a narrower kernel and a smaller penalty: if there are more than ``max_search``, these two are
        searched again on at most so many, with the weights in proportion; 0 leaves that out. The winner is fitted to
        all.
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
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.block_sizes = block_sizes
        self.kernels = kernels
        self.n_inner_folds = n_inner_folds
        self.max_search = max_search
        self.max_refine = max_refine
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
        """
        _refuse_classes(y)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        y = y.astype(np.float64)
        self._check_parameters()
        self._starts = self._block_starts(X.shape[1])
        # Distances stay the same, and are exact for columns that are far from 0.
        self._center = X.mean(axis=0)
        X = X - self._center
        blocks = np.split(X, self._starts, axis=1)
        sizes = np.array([block.shape[1] for block in blocks])
        rng = check_random_state(self.random_state)
        order = rng.permutation(len(X))
        rows = order[: self.max_search]
        n_folds = min(self.n_inner_folds, len(rows))
        folds = KFold(n_folds, shuffle=True, random_state=rng.randint(2**31))
        splits = list(folds.split(rows))

        thetas, alphas, rates = [], [], []
        self.kernels_ = tuple(self.kernels)
        for name in self.kernels_:
            kernel = KERNELS[name]
            scaled = np.empty((len(blocks), len(rows), len(rows)))
            for distance, block in zip(scaled, blocks, strict=True):
                distance[:] = kernel.distance(block[rows])
            medians = np.array([_median_of_pairs(distance) for distance in scaled])
            scaled /= medians[:, None, None]
            error = _inner_error(scaled, kernel, y[rows], splits)
            theta, alpha = _search(kernel, sizes / sizes.sum(), error)
            if min(len(X), self.max_refine) > self.max_search:
                some = order[: self.max_refine]
                distance = self._distance(kernel, theta / medians, X[some], X[some])
                error = _inner_error(distance[None], kernel, y[some], list(folds.split(some)))
                (factor,), alpha = _descend(np.ones(1), alpha, np.ones(1), error)
                theta = factor * theta
            thetas.append(theta)
            alphas.append(alpha)
            rates.append(theta / medians)
        self.theta_, self.alpha_ = np.array(thetas), np.array(alphas)

        self.X_fit_, self.y_mean_, self._rates = X, float(y.mean()), np.array(rates)
        inner, dual = [], []
        for k, alpha in enumerate(self.alpha_):
            kernel_matrix = self._kernel(k, X)
            inner.append(_inner_predictions(kernel_matrix, y, alpha, list(folds.split(X))))
            dual.append(_solve(kernel_matrix, y - self.y_mean_, alpha))
        self.inner_prediction_ = np.mean(inner, axis=0)
        self.dual_coef_ = np.array(dual)
        return self

    def predict(self, X: Any) -> Matrix:
        """Return the predictions, (n_samples,)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False) - self._center
        n_rows = max(1, _MAX_ENTRIES // len(self.X_fit_))
        pieces = []
        for start in range(0, len(X), n_rows):
            some = X[start : start + n_rows]
            each = [self._kernel(k, some) @ dual for k, dual in enumerate(self.dual_coef_)]
            pieces.append(np.mean(each, axis=0) + self.y_mean_)
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
            similar ones, and where none is similar it falls back to the mean of the training targets.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False) - self._center
        return np.mean([self._kernel(k, X) for k in range(len(self.kernels_))], axis=0)

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
        if not self.kernels or any(kernel not in KERNELS for kernel in self.kernels):
            raise ValueError(f"kernels must be of {list(KERNELS)}, got {self.kernels!r}")

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


def _refuse_classes(y: Any) -> None:
    """Labels would fail with a message about floats, and booleans would pass for numbers."""
    values = np.asarray(y)
    if values.size and isinstance(values.flat[0], bool | np.bool_ | str):
        raise ValueError(
            f"y holds classes (such as {values.flat[0]!r}), but BlockKernelRidge predicts numbers; take a classifier, "
            "such as sklearn.svm.SVC on the same columns or NEGNNClassifier"
        )


Error = Callable[[Matrix, float], float]
"""Weights and penalty → error over the inner folds."""
Splits = list[tuple[Matrix, Matrix]]


def _search(kernel: Kernel, shares: Matrix, error: Error) -> tuple[Matrix, float]:
    """Return weights and penalty; a plain kernel's weights are as the ``shares`` of the columns, (n_blocks,)."""
    best = min(
        ((scale * shares, alpha) for scale in kernel.scales for alpha in kernel.alphas),
        key=lambda point: error(*point),
    )
    return _descend(*best, shares, error)


def _inner_error(distances: Matrix, kernel: Kernel, y: Matrix, splits: Splits) -> Error:
    """Return the error as a function of weights and penalty, for scaled distances of each block, (n_blocks, n, n)."""
    errors: dict[tuple[bytes, float], float] = {}

    def error(theta: Matrix, alpha: float) -> float:
        key = theta.tobytes(), alpha
        if key not in errors:
            similarity = kernel.of_distance(np.tensordot(theta, distances, axes=1))
            try:
                predicted = _inner_predictions(similarity, y, alpha, splits)
            except np.linalg.LinAlgError:  # singular, for so small a penalty
                errors[key] = np.inf
            else:
                errors[key] = np.abs(predicted - y).mean()
        return errors[key]

    return error


def _descend(theta: Matrix, alpha: float, shares: Matrix, error: Error) -> tuple[Matrix, float]:
    """Step along one coordinate after the other while that lowers the error."""
    best, least = (theta, alpha), error(theta, alpha)
    for _ in range(_MAX_ROUNDS):
        before = least
        for step in range(len(shares) + 2):
            for point in _steps(*best, step, shares):
                if error(*point) < (1 - _LEAST_GAIN) * least:
                    best, least = point, error(*point)
        if least == before:
            break
    return best


def _steps(
    theta: Matrix, alpha: float, step: int, shares: Matrix
) -> Iterator[tuple[Matrix, float]]:
    """Yield the neighbours of a point along one coordinate: a block's weight, all weights, or the penalty."""
    n_blocks = len(theta)
    if step < n_blocks:
        present = theta[step] > 0
        fresh = shares[step] * theta.sum() / 3
        for weight in (0.0, theta[step] / 3, theta[step] * 3) if present else (fresh,):
            changed = theta.copy()
            changed[step] = weight
            if changed.any():
                yield changed, alpha
    elif step == n_blocks:
        yield from ((theta * factor, alpha) for factor in (0.5, 2.0))
    else:
        yield from ((theta, max(alpha * factor, _LEAST_ALPHA)) for factor in (0.1, 10.0))


def _inner_predictions(kernel: Matrix, y: Matrix, alpha: float, splits: Splits) -> Matrix:
    """Return for each sample the prediction of the inner fold that did not see it."""
    predicted = np.empty_like(y)
    for train, test in splits:
        mean = y[train].mean()
        dual = _solve(kernel[np.ix_(train, train)], y[train] - mean, alpha)
        predicted[test] = kernel[np.ix_(test, train)] @ dual + mean
    return predicted


def _solve(kernel: Matrix, y: Matrix, alpha: float) -> Matrix:
    """Return the dual coefficients; overwrites ``kernel``."""
    kernel.flat[:: len(kernel) + 1] += alpha
    return cho_solve(cho_factor(kernel, lower=True, overwrite_a=True), y)


def _median_of_pairs(distance: Matrix) -> float:
    """Return the median over pairs, or 1 where it is 0: most samples may be the same in a block."""
    return float(np.median(distance[np.triu_indices(len(distance), 1)])) or 1.0
