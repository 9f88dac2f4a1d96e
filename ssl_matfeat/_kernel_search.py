"""Kernels over blocks of columns, the fit for given parameters, and the search for those that predict best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from sklearn.metrics.pairwise import euclidean_distances, manhattan_distances

Matrix = NDArray[np.float64]
Splits = list[tuple[NDArray[np.int64], NDArray[np.int64]]]


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
_LEAST_GAIN = 2e-3
"""Part by which a step must lower the error: smaller gains are noise of the inner folds."""
_LEAST_GAIN_OF_HUBER = 5e-3
"""The same for the step from squares to Huber's loss, which is the best of several."""
_REWEIGHTINGS = 3
"""Of Huber's loss; more gain nothing outside the noise (benchmarks/LOG.md)."""
_DELTAS = (1.0, 1 / 9)
"""Where the search for Huber's delta starts, in medians of the absolute errors that squares leave."""


class Point(NamedTuple):
    """The parameters of a fit."""

    theta: Matrix
    """(n_blocks,), the weight of each block's distance."""
    alpha: float
    """The penalty."""
    delta: float = np.inf
    """Residuals beyond this count linearly; infinity is the squared loss."""


Error = Callable[[Point], float]
"""Error of a point over the inner folds."""


def solve(kernel: Matrix, y: Matrix, alpha: float, delta: float) -> Matrix:
    """Return the dual coefficients c of ``f = K c`` with the least ``Σ ρ(y - f) + α cᵀ K c``, (n,).

    Huber's ρ(r) is r² up to ``delta`` and ``2 δ |r| - δ²`` beyond (Ann. Math. Stat. 35, 73, 1964), by iteratively
    reweighted least squares: a sample beyond has the penalty of all, divided by its weight δ/|r|.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the kernel is singular for so small a penalty.
    """
    penalty = np.full(len(y), alpha)
    for left in reversed(range(1 if np.isinf(delta) else 1 + _REWEIGHTINGS)):
        damped = kernel.copy()
        damped.flat[:: len(kernel) + 1] += penalty
        dual = cho_solve(cho_factor(damped, lower=True, overwrite_a=True), y)
        if left:
            residual = np.abs(penalty * dual)
            penalty = alpha * np.maximum(1, residual / delta)
    return dual


def inner_predictions(kernel: Matrix, y: Matrix, point: Point, splits: Splits) -> Matrix:
    """Return for each sample the prediction of the inner fold that did not see it, (n,)."""
    predicted = np.empty_like(y)
    for train, test in splits:
        center = center_of(y[train], point.delta)
        dual = solve(kernel[np.ix_(train, train)], y[train] - center, point.alpha, point.delta)
        predicted[test] = kernel[np.ix_(test, train)] @ dual + center
    return predicted


def center_of(y: Matrix, delta: float) -> float:
    """Return what is predicted far from all samples: the mean, and the median where outliers shall count little."""
    return float(y.mean() if np.isinf(delta) else np.median(y))


def inner_error(distances: Matrix, kernel: Kernel, y: Matrix, splits: Splits) -> Error:
    """Return the mean absolute error of a point, for scaled distances of each block, (n_blocks, n, n)."""
    errors: dict[tuple[bytes, float, float], float] = {}

    def error(point: Point) -> float:
        key = point.theta.tobytes(), point.alpha, point.delta
        if key not in errors:
            similarity = kernel.of_distance(np.tensordot(point.theta, distances, axes=1))
            try:
                predicted = inner_predictions(similarity, y, point, splits)
            except np.linalg.LinAlgError:  # singular, for so small a penalty
                errors[key] = np.inf
            else:
                errors[key] = np.abs(predicted - y).mean()
        return errors[key]

    return error


def search_weights(kernel: Kernel, shares: Matrix, error: Error) -> Point:
    """Return weights and penalty; a plain kernel's weights are as the ``shares`` of the columns, (n_blocks,)."""
    plain = (Point(scale * shares, alpha) for scale in kernel.scales for alpha in kernel.alphas)
    return descend(min(plain, key=error), shares, error)


def search_delta(point: Point, kernel: Kernel, typical: float, error: Error) -> Point:
    """Return the point with Huber's loss, if that predicts better than squares do.

    ``typical`` is the size of an error that is none of an outlier. Penalties go with delta, as the loss does.
    """
    starts = [
        Point(point.theta, alpha * share, typical * share)
        for share in _DELTAS
        for alpha in kernel.alphas
    ]
    start = min(starts, key=error)
    if error(start) > (1 - _LEAST_GAIN_OF_HUBER) * error(point):
        return point
    return descend(start, np.ones(len(point.theta)), error)


def descend(point: Point, shares: Matrix, error: Error) -> Point:
    """Step along one coordinate after the other while that lowers the error."""
    best, least = point, error(point)
    for _ in range(_MAX_ROUNDS):
        before = least
        for step in range(len(shares) + 3):
            for there in _steps(best, step, shares):
                if error(there) < (1 - _LEAST_GAIN) * least:
                    best, least = there, error(there)
        if least == before:
            break
    return best


def _steps(point: Point, step: int, shares: Matrix) -> Iterator[Point]:
    """Yield the neighbours of a point along one coordinate: a block's weight, all weights, the penalty, or delta."""
    theta, alpha, delta = point
    n_blocks = len(theta)
    if step < n_blocks:
        present = theta[step] > 0
        fresh = shares[step] * theta.sum() / 3
        for weight in (0.0, theta[step] / 3, theta[step] * 3) if present else (fresh,):
            changed = theta.copy()
            changed[step] = weight
            if changed.any():
                yield Point(changed, alpha, delta)
    elif step == n_blocks:
        yield from (Point(theta * factor, alpha, delta) for factor in (0.5, 2.0))
    elif step == n_blocks + 1:
        yield from (Point(theta, max(alpha * f, _LEAST_ALPHA), delta) for f in (0.1, 10.0))
    elif np.isfinite(delta):
        # The loss beyond delta is proportional to it, and so the penalty stays in proportion.
        yield from (Point(theta, max(alpha * f, _LEAST_ALPHA), delta * f) for f in (1 / 3, 3.0))


def median_of_pairs(distance: Matrix) -> float:
    """Return the median over pairs, or 1 where it is 0 but for rounding: most samples may be the same in a block."""
    median = float(np.median(distance[np.triu_indices(len(distance), 1)]))
    return median if median > 1e-12 * distance.max() else 1.0
