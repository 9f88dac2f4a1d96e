"""Self-supervised pretraining on your own structures."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pymatgen.core import Element
from sklearn.utils import Tags, check_scalar
from sklearn.utils.validation import check_is_fitted

import ssl_matfeat
from ssl_matfeat._random import seeded
from ssl_matfeat._validation import as_structure_list
from ssl_matfeat._versioned import VersionedEstimator
from ssl_matfeat._warnings import warn
from ssl_matfeat.context_encoder import N_ENVIRONMENTS, ContextEncoder
from ssl_matfeat.corpus import expansion, read_list, read_parquet
from ssl_matfeat.devices import launch, make_fabric
from ssl_matfeat.graph import CrystalBatch, CrystalGraphs
from ssl_matfeat.pretext import TASKS, Pretext
from ssl_matfeat.training import Batches, History, TrainingOptions, evaluate, train
from ssl_matfeat.weights import Pretrained, save_weights
from ssl_matfeat.weights._registry import build_encoder

if TYPE_CHECKING:
    from lightning_fabric import Fabric

FEWEST_TO_VALIDATE = 50  # of fewer, each is more than 2 % of what is measured


class SSLPretrainer(VersionedEstimator):
    """Train an encoder on structures alone, without labels.

    Parameters
    ----------
    tasks : str or dict of str to float, default="context"
        ``"context"`` trains an encoder like that of the default weights: every atom, bond length, shell and volume is
        predicted from its surroundings. All others train the paper's encoder, and a dict such as ``{"predictive": 1.0,
        "contrastive": 0.5}`` weighs and adds their losses: ``"predictive"`` and ``"contrastive"`` are the paper's
        (Kong et al., Mach. Learn.: Sci. Technol. 5, 035018, 2024); ``"property"`` asks for the element and the
        element properties of hidden atoms, ``"replaced"`` for atoms of a wrong element, ``"denoising"`` for random
        displacements of the sites, ``"strain"`` for a random strain of the cell.
    n_channels : int, default=64
        Width of every embedding.
    max_epochs : int, default=15
        Passes over the structures.
    batch_size : int, default=8192
        Largest number of edges in a batch of one process.
    lr : float, default=2e-3
        Of AdamW, annealed to zero along a cosine.
    weight_decay : float, default=1e-4
        Of AdamW.
    ema_decay : float or None, default=0.999
        Decay a step of the moving average of the parameters that is kept in the end, which is at most that of the last
        tenth of the steps; None keeps the last ones.
    max_sites : int, default=40
        Larger crystals are left out of training, since they cost most and teach no more; prototypes of environments
        are looked for in them too.
    max_expansion : float, default=5.0
        Crystals of more than so many times the volume that their atoms have in the ground states of the elements are
        left out: they are clusters in empty space. Set ``numpy.inf`` to learn from molecules in boxes.
    validation_fraction : float, default=0.02
        Held out to measure the losses, unless a parquet file says itself which rows are for validation.
    random_state : int, default=0
        Seeds initial parameters, order and damage.
    device : str, default="cpu"
        Where to train: ``"cpu"``, ``"cuda"`` or one of several, such as ``"cuda:1"``. The trained weights are on the
        CPU in any case.
    precision : {"32-true", "bf16-mixed"}, default="32-true"
        Of the training: the second does matrix products in bfloat16. Parameters, validation and metrics are in single
        precision always.
    n_devices : int, default=1
        Processes on this machine, one for each GPU, or all on the CPU. Each takes its share of the batches of every
        epoch, and their gradients are averaged: a step sees ``n_devices`` batches. A script must guard its main part
        with ``if __name__ == "__main__":``; in a notebook, where processes cannot be started so, use the command
        ``ssl-matfeat pretrain``. Other values than the defaults of these three need Lightning Fabric:
        ``pip install lightning-fabric``.
    verbose : bool, default=False
        Show a progress bar.

    Attributes
    ----------
    weights_ : Pretrained
        To be given to a featurizer as ``weights=``.
    history_ : list of dict
        Mean losses of every epoch, ``train_…`` and ``validation_…``.
    metrics_ : dict
        Accuracies or errors of the tasks on the validation crystals, the means over their batches.
    errors_ : dict
        Position in X → message, of structures that could not be used.

    Examples
    --------
    >>> from ssl_matfeat import SSLPretrainer, SSLStructureFeaturizer, load_elastic
    >>> structures = load_elastic().structure[:40]
    >>> pretrainer = SSLPretrainer(n_channels=8, max_epochs=1, validation_fraction=0.1).fit(structures)
    >>> featurizer = SSLStructureFeaturizer(weights=pretrainer.weights_, layers=(0, 1), pooling=("mean",))
    >>> featurizer.fit_transform(structures[:2]).shape
    (2, 16)
    """

    def __init__(
        self,
        tasks: str | Mapping[str, float] = "context",
        *,
        n_channels: int = 64,
        max_epochs: int = 15,
        batch_size: int = 8192,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
        ema_decay: float | None = 0.999,
        max_sites: int = 40,
        max_expansion: float = 5.0,
        validation_fraction: float = 0.02,
        random_state: int = 0,
        device: str = "cpu",
        precision: str = "32-true",
        n_devices: int = 1,
        verbose: bool = False,
    ) -> None:
        self.tasks = tasks
        self.n_channels = n_channels
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.ema_decay = ema_decay
        self.max_sites = max_sites
        self.max_expansion = max_expansion
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.device = device
        self.precision = precision
        self.n_devices = n_devices
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, *, checkpoint: str | Path | None = None) -> Self:
        """Train.

        Parameters
        ----------
        X : list-like of Structure, or path to a parquet file
            A file has the columns ``numbers`` (n,), ``lattice`` (9,) in Å and ``frac_coords`` (3n,); if it has a column
            ``split``, rows ``"pretrain"`` and ``"validation"`` are used, and no others.
        y : None
            Ignored.
        checkpoint : str, Path or None
            Written after every epoch; if it exists, training goes on from there, on the same device with the same
            numbers as without a stop. It stays when the training is done.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter is off, the device is missing, no structure is left to train or to validate on, or the
            checkpoint is of other parameters or structures, or damaged.
        ImportError
            If ``device``, ``precision`` or ``n_devices`` need Lightning Fabric and it is not installed.

        Warns
        -----
        UserWarning
            If fewer than 50 crystals are left to validate on.
        """
        weights, encoder_name = self._check_parameters()
        said = self.get_params()
        given = {name: value for name, value in said.items() if name not in ("tasks", "verbose")}
        # As Python's own numbers: torch's generators and checkpoints, and the JSON of the card, take no others.
        parameters = {k: v.item() if isinstance(v, np.generic) else v for k, v in given.items()}
        ours = ("max_epochs", "lr", "weight_decay", "ema_decay", "random_state")
        options = TrainingOptions(
            **{name: parameters[name] for name in ours}, verbose=bool(self.verbose)
        )
        fabric = make_fabric(*(parameters[name] for name in ("device", "precision", "n_devices")))
        graphs, validating, errors = self._read(X)
        dense = expansion(graphs) <= self.max_expansion
        small = dense & (graphs.n_sites <= self.max_sites)
        roles = small * (1 + validating)  # 0: left out, 1: training, 2: validation
        training, held_out = np.flatnonzero(roles == 1), np.flatnonzero(roles == 2)
        if graphs.n_sites[training].sum() < 2 or len(held_out) == 0:
            raise ValueError(
                f"of {len(graphs)} usable structures {len(training)} are left for training and {len(held_out)} for "
                f"validation after max_sites={self.max_sites}, max_expansion={self.max_expansion} and "
                f"validation_fraction={self.validation_fraction}, or the column split if there is one; at least one "
                "of each is needed, and two sites to train on"
            )
        if len(held_out) < FEWEST_TO_VALIDATE:
            warn(
                f"only {len(held_out)} of {small.sum()} crystals (max_sites={self.max_sites}, max_expansion="
                f"{self.max_expansion}) are for validation, so its losses and metrics_ say little; for "
                f"{FEWEST_TO_VALIDATE} or more, raise validation_fraction={self.validation_fraction}, or mark more "
                "rows 'validation' in the column split if there is one"
            )
        n_edges = int(np.minimum(graphs.n_edges[training], self.batch_size).sum())
        if self.n_devices > 1 and n_edges < self.n_devices * self.batch_size:
            raise ValueError(
                f"n_devices={self.n_devices} processes share batches of batch_size={self.batch_size} edges, but there "
                f"are only {n_edges} for training (a crystal counts as a batch at most); lower batch_size or n_devices"
            )

        config = {"encoder": encoder_name, "n_channels": parameters["n_channels"]}
        if encoder_name == "context":
            config["n_environments"] = N_ENVIRONMENTS
        with seeded(options.random_state):
            pretext = Pretext(build_encoder(config), weights).float()
        learn = partial(
            _train_share,
            graphs=graphs,
            training=training,
            held_out=held_out,
            batch_size=self.batch_size,
            options=options,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            objective=f"ssl_matfeat={ssl_matfeat.__version__}, tasks={weights}, structures={graphs.digest()}, "
            f"batch_size={self.batch_size}, "
            f"rows={hashlib.sha256(roles.data).hexdigest()[:12]}, precision={self.precision}",
        )
        history = learn(None, pretext) if fabric is None else launch(fabric, learn, pretext)
        metrics = evaluate(
            pretext,
            pretext.metrics,
            _shuffled(graphs, held_out, self.batch_size, "cpu"),
            options.random_state,
        )
        if isinstance(pretext.encoder, ContextEncoder):
            everything = np.flatnonzero(
                dense & ~validating
            )  # crystals of any size: here they cost little
            pretext.encoder.learn_environments(graphs, everything, options.random_state)
        seen = np.unique(graphs.numbers[np.repeat(roles == 1, graphs.n_sites)])
        card = {
            "name": None,
            "task": weights,
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "training_data": {
                "n_training": len(training),
                "n_validation": len(held_out),
                "max_sites": parameters["max_sites"],
                "max_expansion": parameters["max_expansion"],
            },
            "config": config,
            "parameters": parameters,
            "elements_seen": [Element.from_Z(int(z)).symbol for z in seen],
            "n_parameters": sum(p.numel() for p in pretext.encoder.parameters()),
            "versions": {
                "ssl_matfeat": ssl_matfeat.__version__,
                **{name: version(name) for name in ("torch", "pymatgen", "matminer", "numpy")},
            },
            "metrics": metrics,
            "history": history,
        }
        # All at once: a fit that fails or is interrupted leaves this as it was.
        self.errors_, self.history_, self.metrics_ = errors, history, metrics
        self.weights_ = Pretrained(pretext.encoder.requires_grad_(False).eval(), card)
        return self

    def save(self, path: str | Path) -> None:
        """Write the trained encoder and its model card to one safetensors file, which ``weights=`` takes."""
        check_is_fitted(self, "weights_")
        save_weights(path, self.weights_)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        return tags

    def _check_parameters(self) -> tuple[dict[str, float], str]:
        """Return the weights of the tasks, and the encoder that they train."""
        for name in ("n_channels", "max_epochs", "batch_size", "max_sites", "n_devices"):
            check_scalar(getattr(self, name), name, Integral, min_val=1)
        check_scalar(self.random_state, "random_state", Integral, min_val=0, max_val=2**63 - 1)
        check_scalar(self.lr, "lr", Real, min_val=0, include_boundaries="neither")
        check_scalar(self.weight_decay, "weight_decay", Real, min_val=0)
        check_scalar(
            self.max_expansion, "max_expansion", Real, min_val=0, include_boundaries="neither"
        )
        fraction = partial(check_scalar, target_type=Real, min_val=0, max_val=1)
        fraction(self.validation_fraction, "validation_fraction", include_boundaries="neither")
        if self.ema_decay is not None:
            fraction(self.ema_decay, "ema_decay", include_boundaries="left")
        tasks = {self.tasks: 1.0} if isinstance(self.tasks, str) else self.tasks
        if not isinstance(tasks, Mapping):
            raise TypeError(
                "tasks must be a name, or a dict of names and weights such as {'predictive': 1.0, 'contrastive': 0.5}, "
                f"got {tasks!r}"
            )
        weights = {name: float(weight) for name, weight in tasks.items()}
        if not weights or any(name not in TASKS for name in weights):
            raise ValueError(f"tasks must be of {list(TASKS)}, got {self.tasks!r}")
        off = {name: weight for name, weight in weights.items() if not 0 < weight < np.inf}
        if off:
            raise ValueError(f"the weights of tasks must be positive and finite, got {off}")
        encoders = {TASKS[name][1] for name in weights}
        if len(encoders) > 1:
            together = [[n for n in TASKS if TASKS[n][1] == name] for name in sorted(encoders)]
            raise ValueError(
                f"tasks={self.tasks!r} train different encoders; combine those of one encoder only: "
                + " or ".join(map(str, together))
            )
        return weights, encoders.pop()

    def _read(self, X: Any) -> tuple[CrystalGraphs, NDArray[np.bool_], dict[int, str]]:
        """Return graphs, which of them are for validation, and the errors of the others."""
        if isinstance(X, str | Path):
            graphs, validating, errors = read_parquet(Path(X))
        else:
            validating = None
            graphs, errors = read_list(as_structure_list(X))
        if validating is None:
            order = np.random.default_rng(self.random_state).permutation(len(graphs))
            validating = np.zeros(len(graphs), dtype=bool)
            validating[order[: max(1, round(self.validation_fraction * len(graphs)))]] = True
        return graphs, validating, errors


def _train_share(
    fabric: Fabric | None,
    pretext: Pretext,
    *,
    graphs: CrystalGraphs,
    training: NDArray[np.int64],
    held_out: NDArray[np.int64],
    batch_size: int,
    options: TrainingOptions,
    checkpoint: Path | None,
    objective: str,
) -> History:
    """Train ``pretext`` in place, in one process of perhaps several, and return the history."""
    share, n_shares, device = 0, 1, torch.device("cpu")
    if fabric is not None:
        share, n_shares, device = fabric.global_rank, fabric.world_size, fabric.device
    pretext.to(device)
    return train(
        pretext,
        pretext.losses,
        _shuffled(graphs, training, batch_size, device, share, n_shares),
        _shuffled(graphs, held_out, batch_size, device),
        n_batches=sum(1 for _ in graphs.batches(batch_size, training)) // n_shares,
        options=options,
        checkpoint=checkpoint,
        objective=objective,
        fabric=fabric,
    )


def _shuffled(
    graphs: CrystalGraphs,
    chosen: NDArray[np.int64],
    max_edges: int,
    device: str | torch.device,
    share: int = 0,
    n_shares: int = 1,
) -> Batches:
    """Return what yields the batches of one epoch over the chosen crystals, in single precision.

    Of every ``n_shares`` batches only number ``share`` is made; if fewer are left at the end, none is.
    """

    def batches(generator: torch.Generator | None) -> Iterator[CrystalBatch]:
        order = chosen
        if generator is not None:
            order = chosen[torch.randperm(len(chosen), generator=generator).numpy()]
        waiting = order[:0]
        together: list[NDArray[np.int64]] = []
        for crystals in graphs.batches(max_edges, order):
            crystals = np.concatenate([waiting, crystals])
            waiting = order[:0]
            if generator is not None and graphs.n_sites[crystals].sum() == 1:
                waiting = crystals  # batch normalisation needs two sites
                continue
            together.append(crystals)
            if len(together) == n_shares:
                yield graphs.batch(together[share]).to(device, torch.float32)
                together = []

    return batches
