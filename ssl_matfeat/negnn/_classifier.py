"""Classes of crystals from a graph network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils import column_or_1d, compute_sample_weight
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor
from torch.nn import functional as F

from ssl_matfeat.blocks import Layer
from ssl_matfeat.devices import Precision
from ssl_matfeat.examples import Dataset
from ssl_matfeat.negnn._base import NEGNNBase
from ssl_matfeat.weights import Pretrained


class NEGNNClassifier(ClassifierMixin, NEGNNBase):
    """Predict classes of crystals with graph networks.

    Every site starts from raw channels and self-supervised embeddings, or from plain elements; a graph network (the
    backbone) passes messages between neighbours; mean and maximum of its states over the sites, beside the pooled
    inputs, give the probabilities. The loss is the cross-entropy.

    Parameters
    ----------
    node_features : str, default="ssl+raw"
        What a site starts from, as in `NEGNNRegressor`.
    weights, layers, backbone, n_channels, n_layers, dropout, fine_tune, fine_tune_lr
        Of the network, as there.
    class_weight : dict, "balanced" or None, default=None
        What the losses of each class are multiplied by; "balanced" makes up for their numbers, and ``sample_weight``
        counts on top of that.
    max_epochs, batch_size, lr, weight_decay, early_stopping, validation_fraction, n_iter_no_change
        Of the training, as there; the part set aside for early stopping holds the classes in proportion.
    n_ensemble, warm_start, random_state, device, precision, verbose
        As there.
    on_error : {"raise", "nan"}, default="raise"
        As there; a structure that cannot be used has the probabilities NaN and the class None.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    networks_, history_, loss_curve_, n_iter_, errors_
        As in `NEGNNRegressor`.

    Examples
    --------
    >>> from ssl_matfeat import NEGNNClassifier, load_elastic
    >>> X, y = load_elastic(return_X_y=True)
    >>> model = NEGNNClassifier(n_channels=16, max_epochs=5, random_state=0).fit(X[:40], y[:40] > 2)
    >>> model.predict_proba(X[40:43]).shape
    (3, 2)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **NEGNNBase._parameter_constraints,
        "class_weight": [dict, StrOptions({"balanced"}), None],
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
        class_weight: Mapping[Any, float] | Literal["balanced"] | None = None,
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
        self.class_weight = class_weight
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

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probability of each class, the mean over the members of the ensemble.

        Parameters
        ----------
        X : list, tuple, Series, object array or one-column DataFrame of Structure
            Ordered structures.

        Returns
        -------
        ndarray of shape (n_crystals, n_classes)
            Columns in the order of ``classes_``.
        """
        outputs, _ = self._outputs(X)
        return torch.from_numpy(outputs).softmax(dim=2).mean(dim=0).numpy()

    def predict(self, X: Any) -> NDArray:
        """Return the most probable class of each crystal.

        Parameters
        ----------
        X : list, tuple, Series, object array or one-column DataFrame of Structure
            Ordered structures.

        Returns
        -------
        ndarray of shape (n_crystals,)
            Of the type of ``classes_``, or of objects if any is None.
        """
        probabilities = self.predict_proba(X)  # which tells if there are classes
        labels = self.classes_[probabilities.argmax(axis=1)]
        if self.errors_:
            labels = labels.astype(object)
            labels[list(self.errors_)] = None
        return labels

    def _strata(self, y: Any, crystals: NDArray[np.int64]) -> Any:
        return np.asarray(y)[crystals]

    def _check_target(
        self, y: Any, structures: list[Any], names: list[str], weight: NDArray[np.float32]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        missing = np.flatnonzero(pd.isna(np.asarray(y, dtype=object)))
        if len(missing):
            raise ValueError(
                f"{len(missing)} classes in y are missing, the first in y[{missing[0]}]; leave these crystals out"
            )
        if any(np.size(classes) != 1 for classes in y):
            raise ValueError(
                "y has several values for a crystal, but NEGNNClassifier tells one class each; for sites or several "
                "targets fit columns of SSLAtomFeaturizer or SSLStructureFeaturizer with a classifier of scikit-learn"
            )
        check_classification_targets(y)
        labels = column_or_1d(y, warn=True)
        # A sample of weight 0 is as good as absent, and so is a class of such samples.
        classes = np.unique(labels[weight > 0]).tolist()
        if len(classes) < 2:
            raise ValueError(
                f"NEGNNClassifier needs at least 2 classes in y, but there is only one: {classes[0]!r}"
            )
        return labels, weight > 0

    def _fit_target(
        self, dataset: Dataset, y: NDArray[Any], continued: bool
    ) -> tuple[int, dict[str, Any]]:
        counted = np.flatnonzero(dataset.weight)
        classes = np.unique(y[counted])
        if continued and not np.array_equal(classes, self.classes_):
            raise ValueError(
                f"y has the classes {classes.tolist()}, but the fit that warm_start=True continues had "
                f"{self.classes_.tolist()}; give the same classes or set warm_start=False"
            )
        dataset.target = np.minimum(np.searchsorted(classes, y), len(classes) - 1)
        among = counted if self.class_weight == "balanced" else None
        class_weight = compute_sample_weight(self.class_weight, y, indices=among)
        if (class_weight < 0).any():
            raise ValueError(f"class_weight must not be negative, got {self.class_weight!r}")
        dataset.weight = (dataset.weight * class_weight).astype(np.float32)
        if not dataset.weight.any():
            raise ValueError(
                f"class_weight={self.class_weight!r} and sample_weight leave every crystal a weight of 0"
            )
        return len(classes), {"classes_": classes}

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none")
