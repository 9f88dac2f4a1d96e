"""Looking into what was trained and what a model reads; matplotlib is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pymatgen.core import Element
from sklearn.metrics import check_scoring
from sklearn.utils import check_random_state

from ssl_matfeat.channels import SHELL_CHANNELS
from ssl_matfeat.context_encoder import ContextEncoder
from ssl_matfeat.weights import Pretrained, load_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_losses(history: Sequence[dict[str, Any]]) -> Figure:
    """Plot the training and validation losses of every epoch.

    Parameters
    ----------
    history : list of dict
        ``SSLPretrainer.history_``, ``history`` of a model card, or ``history_`` of a network in scikit-learn form,
        whose members are drawn one over the other.

    Returns
    -------
    matplotlib.figure.Figure
        One panel a loss; save it with ``figure.savefig(path)``.

    Examples
    --------
    >>> from ssl_matfeat.inspection import plot_losses
    >>> from ssl_matfeat.weights import load_card
    >>> figure = plot_losses(load_card("default")["history"])
    >>> figure.axes[0].get_xlabel()
    'epoch'
    """
    if not history:
        raise ValueError("history is empty; nothing has been trained")
    from matplotlib.figure import Figure

    names = [key.removeprefix("train_") for key in history[0] if key.startswith("train_")]
    figure = Figure(figsize=(3.2 * len(names), 3), layout="constrained")
    records = pd.DataFrame(history)
    members = [records] if "member" not in records else [m for _, m in records.groupby("member")]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for part, color in (("train", "C0"), ("validation", "C1")):
            for i, member in enumerate(members):
                if f"{part}_{name}" in member:
                    label = None if i else part
                    axes.plot(member["epoch"], member[f"{part}_{name}"], color=color, label=label)
        axes.set(title=name, xlabel="epoch", ylabel="loss")
        axes.legend()
    return figure


def environment_prototypes(weights: str | Path | Pretrained = "default") -> pd.DataFrame:
    """Say what the prototypes of the ``environment`` layer are like.

    Parameters
    ----------
    weights : str, Path or Pretrained, default="default"
        A name of `list_weights`, a file of `save_weights` or ``SSLPretrainer.weights_``, with that layer.

    Returns
    -------
    DataFrame
        One row a prototype, indexed by the name of its channel: ``element``, that whose NE0 is nearest, and its 27
        shell channels, in the units of these. If the pretraining crystals had fewer different sites than there are
        channels, those left over, which are 0 for all sites, have no row.

    Raises
    ------
    ValueError
        If the weights have no such layer.

    Examples
    --------
    >>> from ssl_matfeat.inspection import environment_prototypes
    >>> prototypes = environment_prototypes()
    >>> prototypes.shape
    (192, 28)
    """
    pretrained = load_weights(weights)
    encoder = pretrained.encoder
    if not isinstance(encoder, ContextEncoder):
        raise ValueError(f"weights={weights!r} have no layer 'environment'; take 'default'")
    elements, shells = encoder.prototypes()
    names = encoder.named_layers["environment"][: len(elements)]
    table = pd.DataFrame(shells, index=list(names), columns=list(SHELL_CHANNELS))
    table.insert(0, "element", [Element.from_Z(int(z)).symbol for z in elements])
    return table


def block_importance(
    model: Any,
    X: Any,
    y: ArrayLike,
    block_of_column: ArrayLike,
    *,
    scoring: Any = None,
    n_repeats: int = 5,
    random_state: int | np.random.RandomState | None = 0,
) -> pd.DataFrame:
    """Measure what a fitted model loses when a whole block of columns is permuted among samples.

    Columns that tell the same stand in for each other, so that permuting one at a time finds each of them worth little
    (``sklearn.inspection.permutation_importance`` does that); a block that is permuted at once has no such stand-in
    but in other blocks (Breiman, Machine Learning 45, 5, 2001, for groups).

    Parameters
    ----------
    model : estimator
        Fitted on columns; of a pipeline that begins with a featurizer, ``pipeline[1:]``.
    X : array or DataFrame of shape (n_samples, n_features)
        Samples that the model has not seen.
    y : array-like of shape (n_samples,)
        Their targets.
    block_of_column : array-like of shape (n_features,)
        The block that each column belongs to, by name.
    scoring : str, callable or None, default=None
        In scikit-learn's words; None is the model's own ``score``.
    n_repeats : int, default=5
        Permutations of each block.
    random_state : int, RandomState or None, default=0
        Of the permutations.

    Returns
    -------
    DataFrame
        By block, in the order of the columns, ``mean`` and ``std`` of the loss of score over the permutations.

    Raises
    ------
    ValueError
        If ``X`` holds no columns, or there is not one block for each.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LinearRegression
    >>> from ssl_matfeat.inspection import block_importance
    >>> X = np.random.default_rng(0).normal(size=(50, 3))
    >>> model = LinearRegression().fit(X, X[:, 0] + X[:, 1])
    >>> importance = block_importance(model, X, X[:, 0] + X[:, 1], ["telling", "telling", "noise"])
    >>> bool(importance["mean"]["telling"] > 1), round(float(importance["mean"]["noise"]), 6)
    (True, 0.0)
    """
    if not hasattr(X, "shape") or len(X.shape) != 2:
        raise ValueError(
            "X must hold the columns that the model reads, as an array or a data frame; of a fitted pipeline that "
            "begins with a featurizer, pass pipeline[1:] as model and pipeline[0].transform(structures) as X"
        )
    block_of_column = np.asarray(block_of_column)
    if block_of_column.shape != (X.shape[1],):
        raise ValueError(
            f"block_of_column has shape {block_of_column.shape}, but X has {X.shape[1]} columns; "
            "name the block of each"
        )
    scorer, random = check_scoring(model, scoring), check_random_state(random_state)
    score = scorer(model, X, y)
    losses = {}
    for block in dict.fromkeys(block_of_column.tolist()):
        columns = np.flatnonzero(block_of_column == block)
        losses[block] = [
            score - scorer(model, _permuted(X, columns, random), y) for _ in range(n_repeats)
        ]
    table = pd.DataFrame(losses)
    return pd.DataFrame({"mean": table.mean(), "std": table.std(ddof=0)})


def _permuted(X: Any, columns: NDArray[np.intp], random: np.random.RandomState) -> Any:
    """Return a copy of ``X`` with the rows of some columns in another order, the same for all of these."""
    order, changed = random.permutation(len(X)), X.copy()
    if isinstance(X, pd.DataFrame):
        changed.iloc[:, columns] = X.iloc[order, columns].to_numpy()
    else:
        changed[:, columns] = X[np.ix_(order, columns)]
    return changed
