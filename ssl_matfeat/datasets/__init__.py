"""Data sets of crystals: the bundled one, and loaders for files and frames of your own."""

from ssl_matfeat.datasets._loaders import load_dataset, load_elastic, structures_from_frame

__all__ = ["load_dataset", "load_elastic", "structures_from_frame"]
