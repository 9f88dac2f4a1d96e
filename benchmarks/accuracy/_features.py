"""The feature sets: names → one row a crystal. ``a+b`` puts the columns of two sets side by side."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _tasks import Inputs, hash_inputs
from numpy.typing import NDArray
from pymatgen.core import Element, Structure
from tqdm import tqdm

from ssl_matfeat.blocks import RAW_BLOCKS, resolve_layers
from ssl_matfeat.context_encoder import ContextEncoder
from ssl_matfeat.datasets import load_elastic
from ssl_matfeat.featurizers import SSLAtomFeaturizer, SSLStructureFeaturizer
from ssl_matfeat.graph import CrystalGraphs
from ssl_matfeat.weights import Pretrained, list_weights, load_weights

CACHE = Path(os.environ.get("SSL_MATFEAT_CACHE", Path(__file__).parents[1] / ".cache"))
MAGPIE = "magpie+density+symmetry+lattice"
STRUCTURAL = "structural"
REFERENCE = "sine-matrix+magpie"
"""What the leaderboard's random forest reads."""
FEATURES_VERSION = "0.3"
"""The version that last changed raw channels and the context encoder; results of earlier ones are not of today's.

0.4 made raw channels below 1e-4 zero, which moved errors by less than other seeds do, and is not counted."""
WEIGHTS_VERSION = "0.5"
"""The version that last changed the default weights, which feature sets with learned blocks and networks read."""
NETWORKS_VERSION = "0.4"
"""The version that last changed NEGNN, or what it is told."""
ALIASES = {STRUCTURAL: "crystal-nn+density+symmetry+packing"}
OWN_WEIGHTS: dict[str, Path] = {}
"""Further feature sets: the default layers of weights that a script has trained."""
Compute = Callable[[Any], NDArray[np.floating]]
_PIECE = 100
"""Crystals whose slow columns are computed and kept at a time."""


def changes(features: str) -> tuple[str, ...]:
    """Return the versions that changed a feature set last: none if it is not ours, or the paper's alone."""
    parts = set(features.split("+"))
    if parts & {"default", "site-default"}:
        return FEATURES_VERSION, WEIGHTS_VERSION
    if parts & {"raw", "untrained", "site-shell", "seen", "unseen"}:
        return (FEATURES_VERSION,)
    return ()


def network_changes(node_features: str) -> tuple[str, ...]:
    """Return the versions that changed last what a NEGNN of these node inputs gives."""
    return (NETWORKS_VERSION, WEIGHTS_VERSION) if "ssl" in node_features else (NETWORKS_VERSION,)


def is_outdated(version: str, last_changes: Sequence[str]) -> bool:
    """Return whether what this version of ssl_matfeat gave is no longer what today's gives."""
    then, *later = (tuple(map(int, v.split(".")[:2])) for v in (version, *last_changes))
    return any(then < change for change in later)


def is_current(cell: Any | None, data_key: str, last_changes: Sequence[str]) -> bool:
    """Return whether there is a cell, of this data, whose version gave what today's gives."""
    if cell is None or cell.data != data_key:
        return False
    return not is_outdated(cell.version, last_changes)


@dataclass(frozen=True)
class Block:
    """How to compute some columns."""

    compute: Compute
    settings: str
    """All that the columns depend on, but the structures."""
    weights: dict[str, str]
    """Name → sha256 of the weights."""
    cached: bool
    """Slow, so kept on disk. SSL blocks are quick, and made anew: a change of code can leave no stale column."""
    block_sizes: tuple[int, ...] = ()
    """Of its own blocks; empty if it is one."""


@dataclass(frozen=True)
class Features:
    """The matrix of one feature set on one task."""

    values: NDArray[np.float64]
    """(n_crystals, n_features); NaN where a featurizer failed."""
    block_sizes: tuple[int, ...]
    """Columns of each of its blocks, which lie side by side."""
    key: str
    """Hash of structures, settings and weights."""
    weights: dict[str, str]

    @property
    def checksum(self) -> float:
        """Return the mean of the magnitudes, which tells a change of the code that made them."""
        return float(np.nanmean(np.abs(self.values)))


def compute_features(name: str, X: Inputs, data_key: str) -> Features:
    """Compute a feature set, or take its slow columns from the disk.

    Parameters
    ----------
    name : str
        Names of blocks, joined by ``+``.
    X : sequence of Structure, or of (Structure, int)
        Crystals or sites.
    data_key : str
        Their hash.

    Returns
    -------
    Features
    """
    blocks = [
        block(part) for whole in name.split("+") for part in ALIASES.get(whole, whole).split("+")
    ]
    weights = {k: v for b in blocks for k, v in b.weights.items()}
    values = [_values(b, X) for b in blocks]
    sizes = [b.block_sizes or (v.shape[1],) for b, v in zip(blocks, values, strict=True)]
    return Features(
        values=np.hstack(values),
        block_sizes=tuple(size for of_block in sizes for size in of_block),
        key=_hash(data_key, *(b.settings for b in blocks), *weights.values()),
        weights=weights,
    )


def _values(found: Block, X: Inputs) -> NDArray[np.float64]:
    if not found.cached:
        return found.compute(X).astype(np.float64)
    starts = range(0, len(X), _PIECE)
    pieces = [_piece(found, X[i : i + _PIECE]) for i in tqdm(starts, desc=found.settings)]
    return np.vstack(pieces)


def _piece(found: Block, X: Inputs) -> NDArray[np.float64]:
    """Return some rows, from the disk if they are there: an interrupted run goes on where it stopped."""
    path = CACHE / "features" / f"{found.settings}-{hash_inputs(X)}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        np.save(part, found.compute(X).astype(np.float64))
        part.rename(path)
    return np.load(path)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def block(name: str) -> Block:
    """Return the block of a name: matminer's, DScribe's, or ours; see the functions below."""
    if name in _PEERS:
        # The length of a sine matrix is that of the largest crystal, so that it can't be made in pieces.
        return Block(_PEERS[name], name, {}, cached=name not in ("dummy", "sine-matrix"))
    if name == "raw":
        return _ssl(SSLStructureFeaturizer(layers=RAW_BLOCKS))
    if name == "default":
        return _ssl(SSLStructureFeaturizer(layers=_default_layers()))
    if name == "untrained":
        return _ssl(SSLStructureFeaturizer(_untrained("default"), _learned(_default_layers())))
    if name in list_weights():
        return _ssl(SSLStructureFeaturizer(name, (0, 1, 2)))
    if name in OWN_WEIGHTS:
        return _ssl(SSLStructureFeaturizer(OWN_WEIGHTS[name]))
    if name == "site-crystal-nn":
        return Block(partial(_matminer, _site_crystal_nn, n_jobs=2), name, {}, cached=True)
    if name == "site-default":
        return _ssl(SSLAtomFeaturizer())
    if name in ("site-element", "site-shell"):
        return _ssl(SSLAtomFeaturizer(layers=(name.removeprefix("site-"),)))
    if found := re.fullmatch(r"site-NE(\d+)", name):
        return _ssl(SSLAtomFeaturizer("paper-predictive", tuple(map(int, found[1]))))
    if found := re.fullmatch(r"NE(\d+)(-sum|-untrained|-contrastive)?", name):
        digits, variant = found.groups()
        weights: str | Pretrained = "paper-predictive"
        if variant == "-untrained":
            weights = _untrained(weights)
        elif variant == "-contrastive":
            weights = "paper-contrastive"
        pooling = ("sum",) if variant == "-sum" else ("mean",)
        return _ssl(SSLStructureFeaturizer(weights, tuple(map(int, digits)), pooling=pooling))
    raise ValueError(
        f"there is no feature set {name!r}; choose from {', '.join([*_PEERS, *ALIASES])}, raw, default, "
        f"untrained, {', '.join(list_weights())} and NE0, NE01, ..., NE012345, each also with -sum, -untrained or "
        "-contrastive; sites: site-element, site-shell, site-default, site-crystal-nn and site-NE0, ...; + joins them"
    )


def _ssl(featurizer: SSLStructureFeaturizer | SSLAtomFeaturizer) -> Block:
    def compute(X: Inputs) -> NDArray[np.floating]:
        return np.array(featurizer.featurize_many(X, ignore_errors=True))

    pretrained = load_weights(featurizer.weights)
    learned = bool(_learned(resolve_layers(featurizer.layers, pretrained, with_cell=True)))
    weights = {pretrained.card["name"] or "own": pretrained.sha256} if learned else {}
    settings = f"{type(featurizer).__name__} layers={featurizer.layers}"
    if isinstance(featurizer, SSLStructureFeaturizer):
        settings += f" pooling={featurizer.pooling}"
    if not learned or isinstance(pretrained.encoder, ContextEncoder):
        settings += f" as of {FEATURES_VERSION}"  # the paper's encoder has not changed
    return Block(compute, settings, weights, cached=False, block_sizes=featurizer.block_sizes())


def _default_layers() -> tuple[str | int, ...]:
    return resolve_layers("auto", load_weights("default"), with_cell=True)


def _learned(layers: tuple[str | int, ...]) -> tuple[str | int, ...]:
    return tuple(layer for layer in layers if layer not in RAW_BLOCKS)


@lru_cache
def _untrained(name: str) -> Pretrained:
    """Return freshly initialised weights of the same class and size: the control."""
    trained = load_weights(name)
    config = {key: value for key, value in trained.card["config"].items() if key != "encoder"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = type(trained.encoder)(**config)
    # One pass in training mode, without a gradient, sets the scales of its batch norms and nothing else.
    graphs = CrystalGraphs.from_structures(load_elastic()["structure"].tolist())
    with torch.no_grad():
        for crystals in graphs.batches(16384):
            encoder(graphs.batch(crystals).to("cpu", torch.float32))
    if isinstance(encoder, ContextEncoder):
        encoder.learn_environments(graphs, np.arange(len(graphs)), random_state=0)
    card = {**trained.card, "name": f"{name}, untrained"}
    return Pretrained(encoder.eval(), card, sha256="untrained, seed 0")


def _constant(X: Sequence[Structure]) -> NDArray[np.floating]:
    return np.zeros((len(X), 1))  # every head then predicts a mean


def _lattice(X: Sequence[Structure]) -> NDArray[np.floating]:
    return np.array([s.lattice.parameters for s in X])


def _matminer(make: Callable[[], Any], X: Any, of: str = "", n_jobs: int = 1) -> NDArray:
    """Apply a matminer featurizer to the structures or to an attribute of them; failed rows are NaN."""
    inputs = [getattr(s, of) if of else s for s in X]
    featurizer = make().fit(inputs)
    featurizer.set_n_jobs(n_jobs)
    return np.array(featurizer.featurize_many(inputs, ignore_errors=True), dtype=float)


def _magpie() -> Any:
    from matminer.featurizers.composition import ElementProperty

    return ElementProperty.from_preset("magpie", impute_nan=True)


def _density() -> Any:
    from matminer.featurizers.structure import DensityFeatures

    return DensityFeatures()


def _symmetry() -> Any:
    from matminer.featurizers.structure import GlobalSymmetryFeatures

    return GlobalSymmetryFeatures(
        ["spacegroup_num", "crystal_system_int", "is_centrosymmetric", "n_symmetry_ops"]
    )


def _site_crystal_nn() -> Any:
    from matminer.featurizers.site import CrystalNNFingerprint

    return CrystalNNFingerprint.from_preset("ops")


def _packing() -> Any:
    from matminer.featurizers.structure import MaximumPackingEfficiency

    return MaximumPackingEfficiency()


def _crystal_nn() -> Any:
    from matminer.featurizers.structure import SiteStatsFingerprint

    return SiteStatsFingerprint.from_preset("CrystalNNFingerprint_ops")


def _sine_matrix() -> Any:
    from matminer.featurizers.structure import SineCoulombMatrix

    return SineCoulombMatrix(flatten=True)


def _orbital_field_matrix() -> Any:
    from matminer.featurizers.structure import OrbitalFieldMatrix

    return OrbitalFieldMatrix(flatten=True)


def _soap(X: Sequence[Structure]) -> NDArray[np.floating]:
    """SOAP with compression mu2: its length does not grow with the number of elements, which weigh by Z."""
    from dscribe.descriptors import SOAP
    from pymatgen.io.ase import AseAtomsAdaptor

    symbols = [Element.from_Z(z).symbol for z in range(1, 104)]
    soap = SOAP(
        r_cut=6.0,
        n_max=8,
        l_max=6,
        average="inner",
        compression={"mode": "mu2", "species_weighting": {s: Element(s).Z for s in symbols}},
        species=symbols,
        periodic=True,
    )
    return np.asarray(soap.create([AseAtomsAdaptor.get_atoms(s) for s in X], verbose=True))


_PEERS: dict[str, Compute] = {
    "dummy": _constant,
    "lattice": _lattice,
    "magpie": partial(_matminer, _magpie, of="composition"),
    "density": partial(_matminer, _density),
    "symmetry": partial(_matminer, _symmetry),
    "sine-matrix": partial(_matminer, _sine_matrix),
    "packing": partial(_matminer, _packing, n_jobs=2),
    "crystal-nn": partial(_matminer, _crystal_nn, n_jobs=2),
    "orbital-field-matrix": partial(_matminer, _orbital_field_matrix, n_jobs=2),
    "soap": _soap,
}
