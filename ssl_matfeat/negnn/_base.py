"""What the graph networks in scikit-learn form share: parameters, data, training, ensembles."""

from __future__ import annotations

import copy
from abc import abstractmethod
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import ArrayLike, NDArray
from pymatgen.core import IStructure
from sklearn.model_selection import train_test_split
from sklearn.utils import (
    Tags,
    check_consistent_length,
    check_random_state,
)
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted
from torch import Tensor
from tqdm.auto import tqdm

from ssl_matfeat._compute import CHUNK, build_graphs, check_device
from ssl_matfeat._random import seeded
from ssl_matfeat._validation import as_structure_list, item_names
from ssl_matfeat._versioned import VersionedEstimator
from ssl_matfeat._warnings import warn_of_unusable
from ssl_matfeat.backbones import BACKBONES
from ssl_matfeat.blocks import Layer
from ssl_matfeat.devices import Precision, make_fabric
from ssl_matfeat.examples import Dataset, Example, Inputs
from ssl_matfeat.graph import CrystalGraphs
from ssl_matfeat.network import LearnedInputs, NodeEmbeddingNetwork, Standardize
from ssl_matfeat.training import Losses, TrainingOptions, train
from ssl_matfeat.weights import Pretrained, load_weights

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_EMA_DECAY = 0.99
_SHAPE_NETWORKS = (
    "node_features",
    "layers",
    "backbone",
    "n_channels",
    "n_layers",
    "dropout",
    "fine_tune",
    "target",
)
"""Parameters that a warm start can't change."""


class NEGNNBase(VersionedEstimator):
    """What both estimators share; a subclass says what the target is and how far a prediction is off."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "node_features": [str],
        "weights": [str, Path, Pretrained],
        "layers": [tuple, list, None],
        "backbone": [StrOptions(set(BACKBONES))],
        "n_channels": [Interval(Integral, 1, None, closed="left")],
        "n_layers": [Interval(Integral, 0, None, closed="left")],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "fine_tune": ["boolean"],
        "fine_tune_lr": [Interval(Real, 0, None, closed="neither")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "n_ensemble": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "device": [str],
        "precision": [StrOptions(set(get_args(Precision)))],
        "on_error": [StrOptions({"raise", "nan"})],
        "verbose": ["verbose"],
    }

    # Declared for type checkers; each __init__ stores them.
    node_features: str
    weights: str | Path | Pretrained
    layers: tuple[Layer, ...] | None
    backbone: str
    n_channels: int
    n_layers: int
    dropout: float
    fine_tune: bool
    fine_tune_lr: float
    max_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    early_stopping: bool
    validation_fraction: float
    n_iter_no_change: int
    n_ensemble: int
    warm_start: bool
    random_state: int | RandomState | None
    device: str
    precision: Precision
    on_error: Literal["raise", "nan"]
    verbose: bool
    networks_: list[NodeEmbeddingNetwork]
    errors_: dict[int, str]
    _shape: dict[str, Any]
    _split_seeds: list[int]
    _predicts_sites: bool

    @abstractmethod
    def _check_target(
        self, y: Any, structures: list[Any], names: list[str], weight: NDArray[np.float32]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return ``y`` as an array, one row a crystal or site, and which crystals count, (n_crystals,).

        This comes before the inputs are computed, which takes longer.
        """

    @abstractmethod
    def _fit_target(
        self, dataset: Dataset, y: NDArray[Any], continued: bool
    ) -> tuple[int, dict[str, Any]]:
        """Put the checked ``y`` into the data set, with no weight for rows without a target.

        Return how many outputs the networks need, and what was learned of ``y``, to be set when the fit is done.
        """

    @abstractmethod
    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of every row, (n_rows,), not yet weighted."""

    def _strata(self, y: Any, crystals: NDArray[np.int64]) -> Any:
        """Return what the validation part shall hold in the same proportions."""
        return None

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Train the networks.

        Parameters
        ----------
        X : list, tuple, Series, object array or one-column DataFrame of Structure
            Ordered structures; their oxidation states are ignored.
        y : array-like
            Targets, see the class.
        sample_weight : array-like of shape (n_crystals,), optional
            What the losses of each crystal are multiplied by, and its part in the scaling of the targets, not of the
            inputs; one with 0 is as good as absent.

        Returns
        -------
        self

        Raises
        ------
        StructureError, TypeError
            For the first bad structure.
        ValueError
            If a parameter or ``y`` is off, or training diverges.
        WeightsError
            If the weights do not exist or are damaged.
        ImportError
            If ``precision`` needs Lightning Fabric and it is not installed.
        """
        self._validate_params()
        check_device(self.device, torch.float32)
        # In single precision a GPU needs no Fabric either.
        fabric = (
            None if self.precision == "32-true" else make_fabric(self.device, self.precision, 1)
        )
        structures = as_structure_list(X)
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None"
            )
        check_consistent_length(structures, y)
        weight = _check_sample_weight(
            sample_weight,
            np.empty((len(structures), 1)),
            dtype=np.float64,
            ensure_non_negative=True,
        )
        if not weight.any():  # scikit-learn before 1.9 lets that pass
            raise ValueError("sample_weight must have at least one non-zero value")
        weight = (weight / weight.mean()).astype(np.float32)
        pretrained = load_weights(self.weights)
        inputs = Inputs(self.node_features, pretrained, self.layers)
        # Copies, so that a fit that fails leaves the model as it was.
        go_on = self.warm_start and hasattr(self, "networks_")
        kept = copy.deepcopy(self.networks_) if go_on else []
        split_seeds = self._split_seeds[:] if go_on else []
        shape = {name: getattr(self, name, None) for name in _SHAPE_NETWORKS}
        shape["layers"] = inputs.layers
        shape["weights"] = pretrained if inputs.layers else None
        if kept and (changed := [name for name in shape if shape[name] != self._shape[name]]):
            raise ValueError(
                f"warm_start=True goes on with networks that were fitted with "
                f"{', '.join(f'{name}={self._shape[name]!r}' for name in changed)}; keep that, or set warm_start=False"
            )
        if self.fine_tune and not inputs.layers:
            raise ValueError(
                f"fine_tune=True trains the encoder of 'ssl', but node_features={self.node_features!r} has no such "
                "part; add it ('ssl+…') or set fine_tune=False"
            )
        names = item_names(X)
        target, counts = self._check_target(y, structures, names, weight)
        self._split(np.flatnonzero(counts), y, seed=0)  # which a class may be too rare for
        graphs, _, _ = build_graphs(structures, names)
        assert graphs is not None  # a bad structure has raised
        dataset = Dataset.from_graphs(graphs, inputs, self.batch_size, self._per_site)
        dataset.weight = weight[dataset.crystal_of_row]
        n_outputs, learned = self._fit_target(dataset, target, continued=bool(kept))
        weighted = np.unique(dataset.crystal_of_row[dataset.weight > 0])
        dataset.weight /= dataset.weight[dataset.rows(weighted)].mean(dtype=np.float64)

        random = check_random_state(self.random_state)
        networks, history = [], []
        for member in range(self.n_ensemble):
            seed = int(random.randint(2**31 - 1))
            if member == len(split_seeds):
                split_seeds.append(seed)
            # Of the same crystals a warm start validates on those that it has not learned from before.
            training, validation = self._split(weighted, y, split_seeds[member])
            if member < len(kept):
                network = kept[member]
            else:
                network = self._new_network(dataset, training, n_outputs, inputs, seed)
            records = self._train(network, dataset, training, validation, seed, fabric)
            networks.append(network)
            history += [{"member": member, **record} for record in records]
        self.inputs_, self.networks_, self.history_ = inputs, networks, history
        self._shape, self._predicts_sites = shape, self._per_site
        self._split_seeds = split_seeds
        for name, value in learned.items():
            setattr(self, name, value)
        self.loss_curve_ = [r["train_loss"] for r in history if r["member"] == 0]
        self.n_iter_ = len(self.loss_curve_)
        return self

    def _split(
        self, crystals: NDArray[np.int64], y: Any, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the crystals to learn from, and those that tell when to stop."""
        if not self.early_stopping:
            return crystals, crystals[:0]
        try:
            training, validation = train_test_split(
                crystals,
                test_size=self.validation_fraction,
                random_state=seed,
                stratify=self._strata(y, crystals),
            )
        except ValueError as error:
            raise ValueError(
                f"early_stopping=True sets validation_fraction={self.validation_fraction} of the {len(crystals)} "
                f"crystals that count aside, which fails; change it, or set early_stopping=False: {error}"
            ) from error
        return training, validation

    def _new_network(
        self,
        dataset: Dataset,
        training: NDArray[np.int64],
        n_outputs: int,
        inputs: Inputs,
        seed: int,
    ) -> NodeEmbeddingNetwork:
        with seeded(seed):
            return NodeEmbeddingNetwork(
                Standardize(dataset.sites[dataset.graphs.sites_of(training)], inputs.n_learned),
                Standardize(dataset.crystals[training], inputs.n_learned),
                backbone=self.backbone,
                n_channels=self.n_channels,
                n_layers=self.n_layers,
                n_outputs=n_outputs,
                per_site=self._per_site,
                dropout=self.dropout,
                learned=LearnedInputs(inputs.pretrained, inputs.layers) if self.fine_tune else None,
            ).float()

    def _train(
        self,
        network: NodeEmbeddingNetwork,
        dataset: Dataset,
        training: NDArray[np.int64],
        validation: NDArray[np.int64],
        seed: int,
        fabric: Fabric | None,
    ) -> list[dict[str, Any]]:
        def losses(example: Example, generator: torch.Generator) -> Losses:
            per_row = self._loss(network(example), example.target)  # (n_rows,)
            return {"loss": (example.weight * per_row).sum()}

        learned = [] if network.learned is None else list(network.learned.parameters())
        others = [p for p in network.parameters() if not any(p is q for q in learned)]
        network.to(self.device)
        history = train(
            network,
            losses,
            dataset.batches(training, self.batch_size, self.device),
            dataset.batches(validation, self.batch_size, self.device) if len(validation) else None,
            n_batches=dataset.n_batches(training, self.batch_size),
            options=TrainingOptions(
                max_epochs=self.max_epochs,
                lr=self.lr,
                weight_decay=self.weight_decay,
                ema_decay=_EMA_DECAY,
                patience=self.n_iter_no_change if self.early_stopping else None,
                random_state=seed,
                verbose=bool(self.verbose),
            ),
            parameter_groups=[{"params": others}, {"params": learned, "lr": self.fine_tune_lr}],
            fabric=fabric,
        )
        network.cpu()
        return history

    def _outputs(self, X: Any) -> tuple[NDArray[np.float64], list[int]]:
        """Return what every member gives, (n_members, n_rows, n_outputs), and the number of sites of each crystal.

        Rows of structures that cannot be used are NaN with ``on_error="nan"``.
        """
        check_is_fitted(self, "networks_")
        self._validate_params()
        check_device(self.device, torch.float32)
        structures, names = as_structure_list(X), item_names(X)
        networks = [copy.deepcopy(network).to(self.device) for network in self.networks_]
        pieces = [torch.empty(len(networks), 0, networks[0].n_outputs)]
        errors: dict[int, str] = {}
        with tqdm(total=len(structures), unit="crystal", disable=not self.verbose) as bar:
            for first in range(0, len(structures), CHUNK):
                of_chunk = slice(first, first + CHUNK)
                graphs, _, of_bad = build_graphs(
                    structures[of_chunk], names[of_chunk], raise_errors=self.on_error == "raise"
                )
                errors |= {first + i: text for i, text in of_bad.items()}
                if graphs is not None:
                    pieces += self._member_outputs(networks, graphs)
                bar.update(len(structures[of_chunk]))
        self.errors_ = errors
        warn_of_unusable(errors, len(structures), "no prediction")
        found = torch.cat(pieces, dim=1).double().numpy()  # (n_members, n_good_rows, n_outputs)
        n_sites = [len(s) if isinstance(s, IStructure) else 0 for s in structures]
        is_good = ~np.isin(np.arange(len(structures)), list(errors))
        good_rows = np.repeat(is_good, n_sites) if self._predicts_sites else is_good
        outputs = np.full((len(networks), len(good_rows), networks[0].n_outputs), np.nan)
        outputs[:, good_rows] = found
        return outputs, n_sites

    def _member_outputs(
        self, networks: list[NodeEmbeddingNetwork], graphs: CrystalGraphs
    ) -> list[Tensor]:
        """Return what every network gives for each batch, (n_members, n_rows_of_batch, n_outputs)."""
        dataset = Dataset.from_graphs(graphs, self.inputs_, self.batch_size, self._predicts_sites)
        batches = dataset.batches(np.arange(len(graphs)), self.batch_size, self.device)(None)
        with torch.inference_mode():
            return [torch.stack([network(b) for network in networks]).cpu() for b in batches]

    @property
    def _per_site(self) -> bool:
        return False

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        tags.target_tags.required = True
        tags.non_deterministic = self.random_state is None
        return tags
