"""The two featurizers: scikit-learn transformers over structures, and matminer featurizers at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pymatgen.core import SiteCollection, Structure
from sklearn.utils._set_output import _get_output_config

from ssl_matfeat._compute import BatchFunction
from ssl_matfeat._featurizer_base import DTYPES, SSLFeaturizer
from ssl_matfeat._validation import as_structure_list, item_names
from ssl_matfeat.blocks import (
    CrystalFeatures,
    Layer,
    Layers,
    Pooling,
    SiteFeatures,
    channel_names,
    feature_names,
)
from ssl_matfeat.pooling import STATISTICS
from ssl_matfeat.weights import Pretrained


class SSLStructureFeaturizer(SSLFeaturizer):
    """Turn crystals into rows of self-supervised and raw features.

    The sites of a crystal get channels from each of the chosen layers; pooled over the sites they are one row.
    A layer is a raw block or the embedding of a pretrained graph network that has seen so many shells of
    neighbours: choosing layers chooses the range of the physics. See the user guide for every formula.

    Parameters
    ----------
    weights : str, Path or Pretrained, default="default"
        A name of `list_weights`, a file of `save_weights` or ``SSLPretrainer.weights_``.
    layers : tuple of str and int, or "auto", default="auto"
        ``"element"`` (22 element properties), ``"shell"`` (27 statistics of the shell), ``"cell"`` (19 channels of the
        whole crystal: mass density in g/cm³, volume per atom in Å³, stiffness of a network of springs and so on),
        ``"pretext"`` (what the self-supervised heads predict) and ``"environment"`` (likeness to prototypes of sites),
        where the weights have them, and integers: l is the embedding NEl, 0 the bare atom, 1 its first shell and so
        on. "auto" is all of these up to 1.
    pooling : tuple of str or "auto", default="auto"
        Of "mean", "std" (population), "min", "max", "sum", for all layers. All but "sum" are intensive; "sum" is
        extensive and changes with the cell chosen for a crystal. "auto" is mean, std, min and max of "element"
        and "shell", and the mean of all that was learned. "cell" is not pooled.
    batch_size : int, default=16384
        Largest number of edges in a batch: bounds memory, does not change results.
    device : str, default="cpu"
        Of torch.
    dtype : {"float32", "float64"}, default="float32"
        Precision of the encoder and of the result.
    n_jobs : int or None, default=None
        Processes, in joblib's words; joblib divides the cores between them, and each takes 256 structures at a time.
        Its backend "multiprocessing" will not do.
    on_error : {"raise", "nan"}, default="raise"
        What a bad structure does: raise an error that names it, or leave a row of NaN and an entry in
        ``errors_`` and keep the other rows.
    verbose : bool, default=False
        Show a progress bar.

    Attributes
    ----------
    pretrained_ : Pretrained
        The weights that `fit` loaded.
    errors_ : dict
        Position in X → message, of the last `transform` of this object in this process.

    Examples
    --------
    >>> from pymatgen.core import Lattice, Structure
    >>> from ssl_matfeat import SSLStructureFeaturizer
    >>> nacl = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    >>> featurizer = SSLStructureFeaturizer(layers=("shell",), pooling=("mean",))
    >>> features = featurizer.set_output(transform="pandas").fit_transform([nacl])
    >>> round(float(features.loc[0, "mean of bond length"]), 2)
    2.87
    """

    _takes_cell = True

    def __init__(
        self,
        weights: str | Path | Pretrained = "default",
        layers: Layers = "auto",
        *,
        pooling: Pooling = "auto",
        batch_size: int = 16384,
        device: str = "cpu",
        dtype: Literal["float32", "float64"] = "float32",
        n_jobs: int | None = None,
        on_error: Literal["raise", "nan"] = "raise",
        verbose: bool = False,
    ) -> None:
        self.weights = weights
        self.layers = layers
        self.pooling = pooling
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self.n_jobs = n_jobs
        self.on_error = on_error
        self.verbose = verbose

    def transform(self, X: Any) -> NDArray[np.floating]:
        """Return one row of features a crystal.

        Parameters
        ----------
        X : list, tuple, Series, object array or one-column DataFrame of Structure
            Ordered structures; their oxidation states are ignored.

        Returns
        -------
        ndarray of shape (n_crystals, n_features)
            Or what `set_output` asks for; pandas output keeps the index of a Series.

        Raises
        ------
        StructureError, TypeError
            For the first bad structure, under ``on_error="raise"``; with several processes, for that of one of them.
        """
        structures = as_structure_list(X)
        rows, self.errors_ = self._rows(structures, self.on_error, self.verbose, item_names(X))
        return self._stack(rows)

    def featurize(self, structure: Structure) -> list[float]:
        """Return the features of one structure, as matminer wants them."""
        rows, _ = self._rows([structure], "raise", False, ["structure"])
        return self._stack(rows)[0].tolist()

    def featurize_many(
        self,
        entries: Any,
        ignore_errors: bool = False,
        return_errors: bool = False,
        pbar: bool | dict[str, Any] = True,
    ) -> list[list[Any]]:
        """Return the features of many structures, batched.

        Parameters
        ----------
        entries : list-like
            Structures, or one-tuples of them as `featurize_dataframe` makes them.
        ignore_errors : bool, default=False
            A bad structure gives a row of NaN instead of an error, as it does with ``on_error="nan"``.
        return_errors : bool, default=False
            End each row with the error's message, or NaN; needs one of these two.
        pbar : bool or dict, default=True
            Show a progress bar; a dict holds options of tqdm.

        Returns
        -------
        list of list
        """
        tuples = _as_tuples(entries)
        if any(len(entry) != 1 for entry in tuples):
            raise ValueError(
                "each entry must be one structure; give featurize_dataframe its column alone, or take "
                "SSLAtomFeaturizer for the columns of a structure and a site"
            )
        structures = [entry[0] for entry in tuples]
        names = item_names(structures)
        rows, errors = self._rows_for_matminer(
            structures, ignore_errors, return_errors, pbar, names
        )
        return _with_errors(self._stack(rows).tolist() if rows else [], errors, return_errors)

    def _stack(self, rows: list[NDArray | None]) -> NDArray[np.floating]:
        blank = np.full((1, len(self.feature_labels())), np.nan, dtype=self.dtype)
        return np.concatenate([blank if row is None else row for row in rows])

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if isinstance(self.pooling, str) and self.pooling == "auto":
            return
        known = isinstance(self.pooling, tuple | list) and set(self.pooling) <= set(STATISTICS)
        if not (known and 0 < len(self.pooling) == len(set(self.pooling))):
            raise ValueError(
                f"pooling must be a tuple of different ones of {STATISTICS}, or 'auto', got {self.pooling!r}"
            )

    def _function(self) -> BatchFunction:
        return CrystalFeatures(self._pretrained(), self._layers(), self.pooling, DTYPES[self.dtype])

    def _labels(self, layer: Layer, pretrained: Pretrained) -> list[str]:
        return feature_names(layer, pretrained, self.pooling)


class SSLAtomFeaturizer(SSLFeaturizer):
    """Turn the sites of crystals into rows of self-supervised and raw features.

    Parameters
    ----------
    weights : str, Path or Pretrained, default="default"
        A name of `list_weights`, a file of `save_weights` or ``SSLPretrainer.weights_``.
    layers : tuple of str and int, or "auto", default="auto"
        As in `SSLStructureFeaturizer`, but for ``"cell"``, which belongs to no site.
    batch_size : int, default=16384
        Largest number of edges in a batch: bounds memory, does not change results.
    device : str, default="cpu"
        Of torch.
    dtype : {"float32", "float64"}, default="float32"
        Precision of the encoder and of the result.
    n_jobs : int or None, default=None
        Processes, in joblib's words; joblib divides the cores between them, and each takes 256 structures at a time.
        Its backend "multiprocessing" will not do.
    on_error : {"raise", "nan"}, default="raise"
        What a bad structure does: raise an error that names it, or leave NaN in the rows of its sites and an
        entry in ``errors_``.
    verbose : bool, default=False
        Show a progress bar.

    Attributes
    ----------
    pretrained_ : Pretrained
        The weights that `fit` loaded.
    site_index_ : ndarray of shape (n_sites_total, 2)
        Position in X and site of every row of the last `transform` of this object in this process.
    errors_ : dict
        Position in X → message, of the last `transform` of this object in this process.

    Examples
    --------
    >>> from pymatgen.core import Lattice, Structure
    >>> from ssl_matfeat import SSLAtomFeaturizer
    >>> fe = Structure(Lattice.cubic(2.87), ["Fe", "Fe"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> featurizer = SSLAtomFeaturizer(layers=("element",))
    >>> featurizer.fit_transform([fe]).shape
    (2, 22)
    >>> featurizer.site_index_.tolist()
    [[0, 0], [0, 1]]
    """

    def __init__(
        self,
        weights: str | Path | Pretrained = "default",
        layers: Layers = "auto",
        *,
        batch_size: int = 16384,
        device: str = "cpu",
        dtype: Literal["float32", "float64"] = "float32",
        n_jobs: int | None = None,
        on_error: Literal["raise", "nan"] = "raise",
        verbose: bool = False,
    ) -> None:
        self.weights = weights
        self.layers = layers
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self.n_jobs = n_jobs
        self.on_error = on_error
        self.verbose = verbose

    def transform(self, X: Any) -> NDArray[np.floating] | pd.DataFrame:
        """Return one row of features a site.

        Parameters
        ----------
        X : list, tuple, Series, object array or one-column DataFrame of Structure
            Ordered structures; their oxidation states are ignored.

        Returns
        -------
        ndarray of shape (n_sites_total, n_features)
            With ``set_output(transform="pandas")`` a DataFrame whose index has the levels ``structure`` (position,
            or the index of a Series) and ``site``.

        Raises
        ------
        StructureError, TypeError
            For the first bad structure, under ``on_error="raise"``; with several processes, for that of one of them.
        """
        structures = as_structure_list(X)
        rows, self.errors_ = self._rows(structures, self.on_error, self.verbose, item_names(X))
        filled = self._fill(rows, structures)
        n_sites = [len(row) for row in filled]
        position = np.repeat(np.arange(len(filled)), n_sites)
        site = np.concatenate([np.arange(n) for n in n_sites])
        self.site_index_ = np.stack([position, site], axis=1)
        features = np.concatenate(filled)
        if _get_output_config("transform", self)["dense"] != "pandas":
            return features
        keys = X.index.to_numpy()[position] if isinstance(X, pd.Series | pd.DataFrame) else position
        index = pd.MultiIndex.from_arrays([keys, site], names=["structure", "site"])
        return pd.DataFrame(features, index=index)

    def featurize(self, structure: Structure, idx: int) -> list[float]:
        """Return the features of site ``idx`` of one structure, as matminer wants them."""
        rows, _ = self._rows([structure], "raise", False, ["structure"])
        sites = self._fill(rows, [structure])[0]
        return sites[_site_number(idx, len(sites), "idx")].tolist()

    def featurize_many(
        self,
        entries: Any,
        ignore_errors: bool = False,
        return_errors: bool = False,
        pbar: bool | dict[str, Any] = True,
    ) -> list[list[Any]]:
        """Return the features of many sites; a structure that several entries share is computed once.

        Parameters
        ----------
        entries : list-like of (Structure, int)
            Sites.
        ignore_errors, return_errors, pbar
            As in `SSLStructureFeaturizer.featurize_many`.

        Returns
        -------
        list of list
        """
        pairs = _as_tuples(entries)
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(
                "each entry must be a structure and the index of a site; give featurize_dataframe both columns, "
                "e.g. ['structure', 'site'], or take transform for all sites"
            )
        unique = {id(structure): structure for structure, _ in pairs}
        structures = list(unique.values())
        first = {id(pairs[i][0]): f"X[{i}]" for i in reversed(range(len(pairs)))}
        names = [first[key] for key in unique]
        rows, bad = self._rows_for_matminer(structures, ignore_errors, return_errors, pbar, names)
        sites_of = dict(zip(unique, rows, strict=True))
        error_of = {id(structures[i]): text for i, text in bad.items()}
        blank = [float("nan")] * len(self.feature_labels())
        values, errors = [], {}
        for entry, (structure, site) in enumerate(pairs):
            sites = sites_of[id(structure)]
            if sites is None:
                errors[entry] = error_of[id(structure)]
                values.append(blank)
                continue
            try:
                number = _site_number(site, len(sites), f"entry {entry}")
            except IndexError as error:
                if not self._ignores(ignore_errors):
                    raise
                errors[entry] = f"IndexError: {error}"
                values.append(blank)
            else:
                values.append(sites[number].tolist())
        return _with_errors(values, errors, return_errors)

    def _check_kind(self, X: Any) -> None:
        # matminer's fit_featurize_dataframe gives the column of the sites too.
        two = isinstance(X, pd.DataFrame) and X.shape[1] == 2
        pairs = two and pd.api.types.is_numeric_dtype(X.iloc[:, 1])
        super()._check_kind(X.iloc[:, 0] if pairs else X)

    def _fill(
        self, rows: list[NDArray | None], structures: Sequence[Any]
    ) -> list[NDArray[np.floating]]:
        """Put NaN for the sites of bad structures; what is no structure gets one row."""
        width = len(self.feature_labels())
        return [
            np.full((len(s) if isinstance(s, SiteCollection) else 1, width), np.nan, self.dtype)
            if row is None
            else row
            for row, s in zip(rows, structures, strict=True)
        ]

    def _function(self) -> BatchFunction:
        return SiteFeatures(self._pretrained(), self._layers(), DTYPES[self.dtype])

    def _labels(self, layer: Layer, pretrained: Pretrained) -> list[str]:
        return list(channel_names(layer, pretrained))


def _site_number(site: Any, n_sites: int, name: str) -> int:
    """Check the index of a site, which may come from a column of floats."""
    if not isinstance(site, Integral | float | np.floating) or site not in range(n_sites):
        raise IndexError(f"{name}: site {site} of {n_sites}, counted from 0")
    return int(site)


def _as_tuples(entries: Any) -> list[tuple[Any, ...]]:
    values = entries.to_numpy() if isinstance(entries, pd.DataFrame) else entries
    return [tuple(e) if isinstance(e, tuple | list | np.ndarray) else (e,) for e in values]


def _with_errors(
    rows: list[list[Any]], errors: dict[int, str], return_errors: bool
) -> list[list[Any]]:
    if not return_errors:
        return rows
    return [[*row, errors.get(i, float("nan"))] for i, row in enumerate(rows)]
