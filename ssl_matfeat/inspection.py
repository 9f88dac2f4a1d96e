"""Looking into what was trained; matplotlib is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_losses(history: Sequence[dict[str, Any]]) -> Figure:
    """Plot the training and validation losses of every epoch.

    Parameters
    ----------
    history : list of dict
        ``SSLPretrainer.history_``, or ``history`` of a model card.

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
    from matplotlib.figure import Figure

    names = [key.removeprefix("train_") for key in history[0] if key.startswith("train_")]
    figure = Figure(figsize=(3.2 * len(names), 3), layout="constrained")
    epochs = [record["epoch"] for record in history]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for part in ("train", "validation"):
            axes.plot(epochs, [record[f"{part}_{name}"] for record in history], label=part)
        axes.set(title=name, xlabel="epoch", ylabel="loss (nats)")
        axes.legend()
    return figure
