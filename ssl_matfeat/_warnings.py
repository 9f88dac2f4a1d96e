"""Warnings that point at the caller's line, however many of our own and of scikit-learn's lie between."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping

_INNER = {"ssl_matfeat", "sklearn", "joblib", "matminer", "contextlib", "copy", "pickle"}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that belongs to none of the packages between."""
    frame, level = inspect.currentframe(), 0
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in _INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)


def warn_of_unusable(errors: Mapping[int, str], n_structures: int, have: str) -> None:
    """Warn that structures with ``errors`` have something in place of numbers."""
    if errors:
        warn(
            f"{len(errors)} of {n_structures} structures could not be used and have {have}; drop them, or find out "
            f"why, e.g. {next(iter(errors.values()))}"
        )
