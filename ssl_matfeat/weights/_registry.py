"""Where weights are found, checked and written."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from pymatgen.core import Element
from safetensors import SafetensorError

from ssl_matfeat._random import seeded
from ssl_matfeat._warnings import warn
from ssl_matfeat.context_encoder import ContextEncoder
from ssl_matfeat.encoder import CGCNNEncoder

Encoder = CGCNNEncoder | ContextEncoder
ENCODERS: dict[str, type[Encoder]] = {"cgcnn": CGCNNEncoder, "context": ContextEncoder}
"""The encoders by the name that model cards give them."""

FORMAT = 1
"""Of the file: one more whenever the meaning of a tensor or of the configuration changes."""
_FOLDER = Path(__file__).parent


class WeightsError(ValueError):
    """Weights that are missing, damaged or made for something else; the message says what to do."""


@dataclass(eq=False)
class Pretrained:
    """A trained encoder, and what is known about it; equal if the files would be.

    Bundled weights pickle as their name and checksum, so that a saved pipeline stays small; your own weights
    pickle as the bytes of their safetensors file, which skops can write too.
    """

    encoder: Encoder = field(repr=False)
    """In evaluation mode, float32, on the CPU; to be copied before it is changed."""
    card: dict[str, Any] = field(repr=False)
    """The model card: task, training data, config, elements seen, licence, metrics and so on."""
    sha256: str = ""
    """Of the safetensors file; for weights that were never saved, of the one that would be written."""
    name: str | None = None
    """In the registry; None for weights of your own."""

    def __post_init__(self) -> None:
        if not self.sha256:
            self.sha256 = hashlib.sha256(_to_bytes(self)).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pretrained) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def warn_of_unseen(self, numbers: NDArray[np.integer]) -> None:
        """Warn if some of the atomic numbers were not in the structures of the pretraining."""
        symbols = [Element.from_Z(int(z)).symbol for z in np.unique(numbers)]
        unseen = [symbol for symbol in symbols if symbol not in self.card["elements_seen"]]
        if unseen:
            warn(
                f"the weights never saw {', '.join(unseen)}: features of crystals that hold them are defined, but "
                "rest on element properties alone"
            )

    def __getstate__(self) -> dict[str, Any]:
        if self.name is None:
            return {"safetensors": _to_bytes(self), "sha256": self.sha256}
        return {"name": self.name, "sha256": self.sha256}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "safetensors" in state:
            encoder, card = _from_bytes(state["safetensors"], "the saved object")
            self.__dict__.update(Pretrained(encoder, card, state["sha256"]).__dict__)
            return
        if state["name"] not in list_weights():
            raise WeightsError(
                f"this object was saved with the weights {state['name']!r}, which the installed ssl_matfeat does not "
                f"have (it has {', '.join(list_weights())}); install the version that saved it, or fit again"
            )
        found = load_weights(state["name"])
        if found.sha256 != state["sha256"]:
            raise WeightsError(
                f"this object was saved with the weights {state['name']!r} of sha256 {state['sha256'][:12]}…, but the "
                f"installed ssl_matfeat has {found.sha256[:12]}…; install the version that saved it, or fit again"
            )
        self.__dict__.update(found.__dict__)


def list_weights() -> list[str]:
    """Return the names of the bundled weights.

    Examples
    --------
    >>> "default" in list_weights()
    True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load_card(name: str) -> dict[str, Any]:
    """Return the model card of bundled weights.

    Parameters
    ----------
    name : str
        One of `list_weights`.

    Returns
    -------
    dict
        Keys name, task, date, training_data, config, parameters, elements_seen, n_parameters, versions, metrics,
        history, licence, attribution and sha256.

    Raises
    ------
    WeightsError
        If there are no weights of that name.
    """
    path = _FOLDER / f"{name}.json"
    if not path.is_file():
        raise WeightsError(
            f"no weights named {name!r}; there are {', '.join(list_weights())}, or give a file's path"
        )
    return json.loads(path.read_text())


def load_weights(weights: str | Path | Pretrained) -> Pretrained:
    """Load an encoder by name, from a file, or pass one through.

    Parameters
    ----------
    weights : str, Path or Pretrained
        A name of `list_weights`, a path to a file of `save_weights`, or what `SSLPretrainer.weights_` holds.

    Returns
    -------
    Pretrained

    Raises
    ------
    WeightsError
        If the name or file does not exist, the file is damaged, or its format is of a later version.
    TypeError
        If ``weights`` is something else.
    """
    if isinstance(weights, Pretrained):
        return weights
    if not isinstance(weights, str | Path):
        raise TypeError(
            f"weights must be a name, a path or Pretrained, got {type(weights).__name__}; "
            "of a fitted SSLPretrainer pass its weights_"
        )
    if isinstance(weights, str) and weights in list_weights():
        return _load_bundled(weights)
    path = Path(weights)
    if not path.is_file():
        raise WeightsError(
            f"weights {str(weights)!r} are neither one of {', '.join(list_weights())} nor an existing file"
        )
    return _load_again(path.resolve(), path.stat().st_mtime_ns)


def save_weights(path: str | Path, pretrained: Pretrained) -> None:
    """Write an encoder and its card to one safetensors file."""
    Path(path).write_bytes(_to_bytes(pretrained))


def _to_bytes(pretrained: Pretrained) -> bytes:
    tensors = {
        name: tensor.contiguous() for name, tensor in pretrained.encoder.state_dict().items()
    }
    card = {**pretrained.card, "format": FORMAT}
    return safetensors.torch.save(tensors, metadata={"card": json.dumps(card)})


def copy_encoder(pretrained: Pretrained) -> Encoder:
    """Return a copy of the encoder that may be moved, cast or trained."""
    return copy.deepcopy(pretrained.encoder)


@lru_cache(maxsize=8)
def _load_bundled(name: str) -> Pretrained:
    card = load_card(name)
    found = _load_file(_FOLDER / f"{name}.safetensors")
    if found.sha256 != card["sha256"]:
        raise WeightsError(
            f"the file of weights {name!r} has sha256 {found.sha256[:12]}…, its card says {card['sha256'][:12]}…; "
            "reinstall ssl_matfeat"
        )
    return Pretrained(found.encoder, card, found.sha256, name)


@lru_cache(maxsize=8)
def _load_again(path: Path, modified: int) -> Pretrained:
    """Load a file once for as long as it stays as it is; ``modified`` is there to tell."""
    return _load_file(path)


def _load_file(path: Path) -> Pretrained:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error!r}") from error
    encoder, card = _from_bytes(data, str(path))
    return Pretrained(encoder, card, hashlib.sha256(data).hexdigest())


def _from_bytes(data: bytes, origin: str) -> tuple[Encoder, dict[str, Any]]:
    """Return the encoder and card of a safetensors file's bytes; ``origin`` is for messages."""
    try:
        tensors = safetensors.torch.load(data)
        # The header: its length in 8 bytes, then JSON.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        card = json.loads(header["__metadata__"]["card"])
        card_format = card.get("format")
    except (SafetensorError, KeyError, AttributeError, ValueError) as error:
        raise WeightsError(f"{origin} is no weights file of ssl_matfeat: {error!r}") from error
    if card_format != FORMAT:
        raise WeightsError(
            f"{origin} has format {card_format}, this ssl_matfeat reads {FORMAT}; use the version that wrote it"
        )
    try:
        with seeded(0):  # loading must not shift the caller's random numbers
            encoder = build_encoder(card["config"])
        encoder.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        writer = card.get("versions", {}).get("ssl_matfeat", "unknown")
        raise WeightsError(
            f"{origin} does not fit the encoder that its card names (it was written by ssl_matfeat {writer}; use that "
            f"version, or train anew): {error!r}"
        ) from error
    return encoder.eval(), card


def build_encoder(config: dict[str, Any]) -> Encoder:
    """Return an untrained encoder of ``config``: its class under ``"encoder"``, and the class's arguments."""
    arguments = {key: value for key, value in config.items() if key != "encoder"}
    # In single precision whatever torch's default, which others may have set for their own networks.
    return ENCODERS[config["encoder"]](**arguments).float()
