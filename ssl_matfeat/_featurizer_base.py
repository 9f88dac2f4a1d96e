"""What the two featurizers share: parameters, weights, matminer's and scikit-learn's conventions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from matminer.featurizers.base import BaseFeaturizer
from numpy.typing import NDArray
from sklearn.utils import Tags, TransformerTags

from ssl_matfeat._citations import cite
from ssl_matfeat._compute import BatchFunction, check_device, compute_rows
from ssl_matfeat._validation import as_structure_list
from ssl_matfeat._versioned import VersionedEstimator
from ssl_matfeat._warnings import warn_of_unusable
from ssl_matfeat.blocks import RAW_BLOCKS, Layer, Layers, resolve_layers
from ssl_matfeat.weights import Pretrained, load_weights

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class SSLFeaturizer(VersionedEstimator, BaseFeaturizer):
    """What both featurizers share; a subclass says what a row is."""

    # matminer keeps n_jobs outside __init__, where clone loses it; here it is a parameter as in scikit-learn.
    n_jobs: int | None = None
    _takes_cell = False

    weights: str | Path | Pretrained
    layers: Layers
    batch_size: int
    device: str
    dtype: str
    on_error: str
    verbose: bool

    def fit(self, X: Any, y: Any = None) -> Self:
        """Check the parameters and the kind of ``X``, and load the weights; no label is used.

        Parameters
        ----------
        X : list, tuple, Series, object array or one-column DataFrame of Structure
            Not looked into.
        y : None
            Ignored.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If a parameter is off, ``X`` is one Structure or ``X`` is empty.
        WeightsError
            If the weights do not exist or are damaged.
        """
        self._check_kind(X)
        self._check_parameters()
        check_device(self.device)
        self.pretrained_, self._weights_of_fit = load_weights(self.weights), self.weights
        return self

    def feature_labels(self) -> list[str]:
        """Return the names of the columns: statistic and channel, such as ``mean of bond length``."""
        self._check_parameters()
        pretrained = self._pretrained()
        return [label for layer in self._layers() for label in self._labels(layer, pretrained)]

    def block_sizes(self) -> tuple[int, ...]:
        """Return how many columns each of the layers gives, in their order, for `BlockKernelRidge`."""
        self._check_parameters()
        pretrained = self._pretrained()
        return tuple(len(self._labels(layer, pretrained)) for layer in self._layers())

    def block_names(self) -> tuple[str, ...]:
        """Return the names of the layers that ``block_sizes()`` counts the columns of: ``element``, ..., ``NE1``."""
        self._check_parameters()
        return tuple(layer if isinstance(layer, str) else f"NE{layer}" for layer in self._layers())

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Return the names of the columns as scikit-learn wants them; ``input_features`` is ignored."""
        return np.array(self.feature_labels(), dtype=object)

    def citations(self) -> list[str]:
        """Return BibTeX of the package and the method, and of what the chosen layers and weights rest on."""
        return cite(self._layers(), self._pretrained())

    def implementors(self) -> list[str]:
        """Return who wrote this."""
        return ["The ssl_matfeat developers"]

    def set_n_jobs(self, n_jobs: int | None) -> None:
        """Set the parameter ``n_jobs``, by matminer's name."""
        self.n_jobs = n_jobs

    def _pretrained(self) -> Pretrained:
        # Parameters hold at once, without another fit: `feature_labels` and `transform` must agree.
        fitted = hasattr(self, "pretrained_") and self.weights == self._weights_of_fit
        return self.pretrained_ if fitted else load_weights(self.weights)

    def _layers(self) -> tuple[Layer, ...]:
        return resolve_layers(self.layers, self._pretrained(), self._takes_cell)

    def _check_kind(self, X: Any) -> None:
        """Raise an error if ``X`` can be no list of structures."""
        as_structure_list(X)

    def _check_parameters(self) -> None:
        self._layers()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be 'float32' or 'float64', got {self.dtype!r}")
        if self.on_error not in ("raise", "nan"):
            raise ValueError(f"on_error must be 'raise' or 'nan', got {self.on_error!r}")
        if not isinstance(self.batch_size, Integral) or self.batch_size < 1:
            raise ValueError(
                f"batch_size must be an int of at least 1 (edges), got {self.batch_size!r}"
            )

    def _rows(
        self,
        structures: Sequence[Any],
        on_error: str,
        progress: bool | dict[str, Any],
        names: Sequence[str],
    ) -> tuple[list[NDArray | None], dict[int, str]]:
        """Return the rows of each structure and the errors; messages call the structures by ``names``."""
        self._check_parameters()
        check_device(self.device)
        rows, elements, errors = compute_rows(
            structures,
            names,
            self._function(),
            per_site=not self._takes_cell,
            max_edges=self.batch_size,
            device=self.device,
            n_jobs=self.n_jobs,
            raise_errors=on_error == "raise",
            progress=progress,
        )
        if not set(self._layers()) <= set(RAW_BLOCKS):
            self._pretrained().warn_of_unseen(elements)
        # Trees take NaN for a value and predict from it.
        warn_of_unusable(errors, len(structures), "NaN for features")
        return rows, errors

    def _rows_for_matminer(
        self,
        structures: list[Any],
        ignore_errors: bool,
        return_errors: bool,
        pbar: bool | dict[str, Any],
        names: list[str],
    ) -> tuple[list[NDArray | None], dict[int, str]]:
        if return_errors and not self._ignores(ignore_errors):
            raise ValueError("return_errors=True needs ignore_errors=True")
        on_error = "nan" if self._ignores(ignore_errors) else "raise"
        return self._rows(structures, on_error, pbar, names)

    def _ignores(self, ignore_errors: bool) -> bool:
        """Say whether matminer's parameter or our own lets bad structures pass."""
        return ignore_errors or self.on_error == "nan"

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        # matminer has scikit-learn's mixin behind BaseEstimator, which hides its tags.
        tags.transformer_tags = TransformerTags(preserves_dtype=[])
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        return tags

    @abstractmethod
    def _function(self) -> BatchFunction: ...

    @abstractmethod
    def _labels(self, layer: Layer, pretrained: Pretrained) -> list[str]: ...
