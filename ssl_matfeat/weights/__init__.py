"""Pretrained weights: names → safetensors files with a checksum and a model card; nothing is ever unpickled."""

from ssl_matfeat.weights._registry import (
    Pretrained,
    WeightsError,
    list_weights,
    load_card,
    load_weights,
    save_weights,
)

__all__ = [
    "Pretrained",
    "WeightsError",
    "list_weights",
    "load_card",
    "load_weights",
    "save_weights",
]
