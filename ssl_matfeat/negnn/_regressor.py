"""Numbers of crystals, or of their sites, from a graph network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.random import RandomState
from numpy.typing import ArrayLike, NDArray
from pymatgen.core import IStructure
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils import Tags, check_array
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted
from torch import Tensor
from torch.nn import functional as F

from ssl_matfeat._validation import as_crystal, refuse_classes
from ssl_matfeat._warnings import warn
from ssl_matfeat.blocks import Layer
from ssl_matfeat.devices import Precision
from ssl_matfeat.examples import Dataset, flatten_sites
from ssl_matfeat.negnn._base import NEGNNBase
from ssl_matfeat.weights import Pretrained

_FEWEST_FOR_OUTLIERS = 10
"""Of fewer values one may well make up most of the variance."""
_LOSSES: dict[str, Any] = {"mae": F.l1_loss, "mse": F.mse_loss, "huber": F.huber_loss}


class NEGNNRegressor(RegressorMixin, NEGNNBase):
    """Predict numbers of crystals, or of their sites, with graph networks.

    Every site starts from raw channels and self-supervised embeddings, or from plain elements; a graph network (the
    backbone) passes messages between neighbours; mean and maximum of its states over the sites, beside the pooled
    inputs, give the prediction (after Kong et al., Mach. Learn.: Sci. Technol. 5, 035018, 2024).

    Parameters
    ----------
    node_features : str, default="ssl+raw"
        What a site starts from: ``"ssl"`` (channels of the pretrained encoder), ``"raw"`` (element properties and
        statistics of the shell, and for the crystal its cell channels), ``"element"`` (CGCNN's 92 indicators),
        ``"onehot"`` (the atomic number), or a sum of these such as ``"ssl+raw"``.
    weights : str, Path or Pretrained, default="default"
        Of the encoder: a name of `list_weights`, a file of `save_weights` or ``SSLPretrainer.weights_``.
    layers : tuple of str and int, or None, default=None
        Of ``"ssl"``: ``"pretext"`` and integers as in `SSLAtomFeaturizer`; None is all that the weights have, but for
        ``"environment"``, which a network can make of the others.
    backbone : {"painn", "cgcnn", "schnet", "megnet", "gatv2", "gcn"}, default="painn"
        The graph network, see `ssl_matfeat.backbones`.
    n_channels : int, default=64
        Width of the network.
    n_layers : int, default=3
        Message-passing layers; with 0 sites are told nothing of one another.
    dropout : float, default=0.0
        Of the inputs and in the head; it harmed every regression that it was tried on.
    fine_tune : bool, default=False
        Train a copy of the pretrained encoder along with the network, instead of keeping the inputs of the sites as
        they are; the pooled inputs stay as the frozen encoder gave them.
    fine_tune_lr : float, default=1e-4
        Learning rate of that copy.
    target : {"crystal", "site"}, default="crystal"
        ``y`` has a number (or several) a crystal, or is a list of arrays with a number a site, NaN where unknown.
    loss : {"mae", "mse", "huber"}, default="mae"
        On targets scaled to mean 0 and standard deviation 1.
    max_epochs : int, default=50
        Passes over the crystals.
    batch_size : int, default=2048
        Largest number of edges in a batch; a crystal has about 15 edges a site.
    lr : float, default=1e-3
        Learning rate of AdamW, annealed to zero along a cosine.
    weight_decay : float, default=0.3
        Of AdamW.
    early_stopping : bool, default=False
        Set ``validation_fraction`` of the crystals aside, stop once the loss on them has not fallen for
        ``n_iter_no_change`` epochs, and keep the best epoch.
    validation_fraction : float, default=0.1
        Of the crystals; each member of an ensemble draws its own.
    n_iter_no_change : int, default=20
        Epochs.
    n_ensemble : int, default=1
        Networks to train from different random numbers; predictions are their mean.
    warm_start : bool, default=False
        Go on from the networks of the previous fit, whose scaling of inputs and targets is kept. If the crystals are
        the same, each network validates on the same ones of them.
    random_state : int, RandomState or None, default=None
        An int makes fits on one machine's CPU, with the same number of threads, equal bit by bit.
    device : str, default="cpu"
        Of torch.
    precision : {"32-true", "bf16-mixed"}, default="32-true"
        Of the training; bfloat16 saves time and memory on GPUs, and needs Lightning Fabric.
    on_error : {"raise", "nan"}, default="raise"
        What `predict` does at a structure that cannot be used: raise an error, or warn, predict NaN and put the reason
        into ``errors_``. `fit` always raises.
    verbose : bool, default=False
        Show progress bars.

    Attributes
    ----------
    y_mean_, y_scale_ : ndarray of shape (n_targets,)
        What the targets were scaled with: their mean and standard deviation, weighted as the samples are.
    networks_ : list of NodeEmbeddingNetwork
        The members.
    history_ : list of dict
        Keys ``member``, ``epoch``, ``train_loss`` and, with early stopping, ``validation_loss``.
    loss_curve_ : list of float
        Training loss of each epoch of the first member.
    n_iter_ : int
        Its number of epochs.
    errors_ : dict
        Of the last prediction: position in X → why this structure could not be used.

    Examples
    --------
    >>> from ssl_matfeat import NEGNNRegressor, load_elastic
    >>> X, y = load_elastic(return_X_y=True)
    >>> model = NEGNNRegressor(n_channels=16, max_epochs=5, random_state=0).fit(X[:40], y[:40])
    >>> model.predict(X[40:43]).shape
    (3,)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **NEGNNBase._parameter_constraints,
        "target": [StrOptions({"crystal", "site"})],
        "loss": [StrOptions(set(_LOSSES))],
    }

    def __init__(
        self,
        node_features: str = "ssl+raw",
        *,
        weights: str | Path | Pretrained = "default",
        layers: tuple[Layer, ...] | None = None,
        backbone: str = "painn",
        n_channels: int = 64,
        n_layers: int = 3,
        dropout: float = 0.0,
        fine_tune: bool = False,
        fine_tune_lr: float = 1e-4,
        target: Literal["crystal", "site"] = "crystal",
        loss: Literal["mae", "mse", "huber"] = "mae",
        max_epochs: int = 50,
        batch_size: int = 2048,
        lr: float = 1e-3,
        weight_decay: float = 0.3,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 20,
        n_ensemble: int = 1,
        warm_start: bool = False,
        random_state: int | RandomState | None = None,
        device: str = "cpu",
        precision: Precision = "32-true",
        on_error: Literal["raise", "nan"] = "raise",
        verbose: bool = False,
    ) -> None:
        self.node_features = node_features
        self.weights = weights
        self.layers = layers
        self.backbone = backbone
        self.n_channels = n_channels
        self.n_layers = n_layers
        self.dropout = dropout
        self.fine_tune = fine_tune
        self.fine_tune_lr = fine_tune_lr
        self.target = target
        self.loss = loss
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.n_ensemble = n_ensemble
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.precision = precision
        self.on_error = on_error
        self.verbose = verbose

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predict.

        Parameters
        ----------
        X : list, tuple, Series, object array or one-column DataFrame of Structure
            Ordered structures.
        return_std : bool, default=False
            Return the standard deviation over the members of the ensemble too.

        Returns
        -------
        y : ndarray of shape (n_crystals,) or (n_crystals, n_targets), or list of ndarray of shape (n_sites,)
            In the form of the ``y`` that `fit` got, in its unit; NaN for what ``on_error="nan"`` lets pass.
        std : like y
            Only with ``return_std=True``.

        Raises
        ------
        StructureError, TypeError
            For the first bad structure, with ``on_error="raise"``.
        ValueError
            If ``return_std=True`` and there is only one member.
        """
        check_is_fitted(self, "networks_")
        if return_std and len(self.networks_) == 1:
            raise ValueError(
                "return_std=True needs several members, but n_ensemble was 1; fit with n_ensemble=5, say"
            )
        outputs, n_sites = self._outputs(X)
        values = outputs * self.y_scale_ + self.y_mean_  # (n_members, n_rows, n_targets)
        mean = self._in_form(values.mean(axis=0), n_sites)
        if not return_std:
            return mean
        return mean, self._in_form(values.std(axis=0, ddof=1), n_sites)

    def score(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> float:
        """Return the coefficient of determination R², over all known sites for ``target="site"``."""
        predicted = self.predict(X)
        if not self._predicts_sites:
            return r2_score(y, predicted, sample_weight=sample_weight)
        n_sites = [len(values) for values in predicted]
        actual = flatten_sites(y, n_sites)
        known = ~np.isnan(actual)
        weight = _check_sample_weight(sample_weight, np.empty((len(n_sites), 1)))
        return r2_score(
            actual[known],
            np.concatenate(predicted)[known],
            sample_weight=np.repeat(weight, n_sites)[known],
        )

    @property
    def _per_site(self) -> bool:
        return self.target == "site"

    def _check_target(
        self, y: Any, structures: list[Any], names: list[str], weight: NDArray[np.float32]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        if not self._per_site:
            if len({np.size(values) for values in y}) > 1:
                raise ValueError(
                    "y has different numbers of values for different crystals; give each the same targets, or set "
                    "target='site' if these are values of its sites"
                )
            refuse_classes(y, "NEGNNRegressor", "NEGNNClassifier")
            values = check_array(
                y, ensure_2d=False, dtype=np.float64, ensure_all_finite="allow-nan", input_name="y"
            )
            missing = np.flatnonzero(np.isnan(values.reshape(len(values), -1)).any(axis=1))
            if len(missing):
                raise ValueError(
                    f"Input y contains NaN for {len(missing)} crystals, the first {names[missing[0]]}; leave these out"
                )
            if values.ndim == 2 and _look_like_sites(y, structures):
                warn(
                    f"each of the {values.shape[1]} values that y has for a crystal is learned as a target of its own; "
                    "if these are values of its sites, set target='site'"
                )
            return values, weight > 0
        n_sites = [
            len(as_crystal(s, name).numbers) for s, name in zip(structures, names, strict=True)
        ]
        values = flatten_sites(y, n_sites)
        known = ~np.isnan(values)
        if not known.any():
            raise ValueError(f"all {len(values)} values of y are NaN; at least one must be known")
        n_known = np.bincount(np.repeat(np.arange(len(n_sites)), n_sites), known)
        counts = (weight > 0) & (n_known > 0)  # (n_crystals,)
        if not counts.any():
            raise ValueError("sample_weight is 0 wherever y is known; one of these must count")
        return values, counts

    def _fit_target(
        self, dataset: Dataset, y: NDArray[Any], continued: bool
    ) -> tuple[int, dict[str, Any]]:
        shape = y.shape[1:]
        values = y.reshape(len(y), -1)  # (n_rows, n_targets)
        known = ~np.isnan(values).any(axis=1)
        weight = np.where(known, dataset.weight, 0)
        if not continued:
            largest = np.abs(values[known]).max(axis=0)
            unit = np.where(largest > 0, largest, 1.0)  # squares of y itself may overflow or vanish
            relative = values[known] / unit  # (n_known, n_targets)
            mean = np.average(relative, axis=0, weights=weight[known])
            squares = weight[known, None] * (relative - mean) ** 2
            std = np.sqrt(squares.sum(axis=0) / weight[known].sum(dtype=np.float64))
            mean, scale = unit * mean, np.where(std > 1e-12 * np.abs(mean), unit * std, 1.0)
            _warn_of_outliers(values[known], squares, dataset.crystal_of_row[known])
        elif shape == self.y_shape_:
            mean, scale = self.y_mean_, self.y_scale_
        else:
            raise ValueError(
                f"y has {shape or (1,)} targets, but the fit that warm_start=True continues had "
                f"{self.y_shape_ or (1,)}; give the same targets or set warm_start=False"
            )
        dataset.target = np.nan_to_num((values - mean) / scale).astype(np.float32)
        dataset.weight = weight.astype(np.float32)
        return values.shape[1], {"y_mean_": mean, "y_scale_": scale, "y_shape_": shape}

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return _LOSSES[self.loss](output, target, reduction="none").mean(dim=1)

    def _in_form(self, rows: NDArray[np.float64], n_sites: list[int]) -> Any:
        """Give rows, (n_rows, n_targets), the form of the ``y`` that `fit` got."""
        rows = rows.reshape(len(rows), *self.y_shape_)
        return np.split(rows, np.cumsum(n_sites)[:-1]) if self._predicts_sites else rows

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = not self._per_site
        return tags


def _look_like_sites(y: Any, structures: list[Any]) -> bool:
    """Return whether ``y`` is a list of arrays that are as long as the structures, which have several sites."""
    return all(
        isinstance(values, np.ndarray) and 1 < len(values) == len(structure)
        for values, structure in zip(y, structures, strict=True)
        if isinstance(structure, IStructure)
    ) and not isinstance(y, np.ndarray)


def _warn_of_outliers(
    values: NDArray[np.float64], squares: NDArray[np.float64], crystals: NDArray[np.int64]
) -> None:
    """Tell if one row of ``values`` makes up most of the variance, of which ``squares`` are the shares.

    Parameters
    ----------
    values, squares : ndarray of shape (n_known, n_targets)
        Of the known rows.
    crystals : ndarray of shape (n_known,)
        That these rows belong to.
    """
    shares = squares / np.maximum(squares.sum(axis=0), np.finfo(float).tiny)
    row, target = np.unravel_index(shares.argmax(), shares.shape)
    if len(values) >= _FEWEST_FOR_OUTLIERS and shares[row, target] > 0.5:
        of_target = f" of target {target}" if values.shape[1] > 1 else ""
        or_log = ", or fit its logarithm" if (values[:, target] > 0).all() else ""
        warn(
            f"the value {values[row, target]:g}{of_target} in y[{crystals[row]}] alone makes up more than half of the "
            "variance; y is scaled by its standard deviation, so that all others look alike to the network; check "
            f"it{or_log}"
        )
