"""How numbers and tables are written in the docs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from _features import is_outdated
from numpy.typing import NDArray


def number(value: float, unit: str) -> str:
    """Return an error with the digits that matter."""
    return f"{value:.1f}" if unit in ("1/cm", "meV/atom") else f"{value:.4f}"


EARLIER = "†"
"""Stands behind what was measured before the last change of our features, weights or networks."""


def earlier(version: str, last_changes: Sequence[str]) -> str:
    """Return the mark of numbers that stem from a version before one of the last changes."""
    return EARLIER if is_outdated(version, last_changes) else ""


def with_spread(maes: NDArray[np.float64] | None, unit: str) -> str:
    """Return mean ± standard deviation, one number alone if it is one, or nothing."""
    if maes is None:
        return ""
    if len(maes) == 1:
        return number(maes[0], unit)
    return f"{number(maes.mean(), unit)} ± {number(maes.std(), unit)}"


def csv_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a reStructuredText table without columns that are empty in all rows, or nothing if it has no rows."""
    if not rows:
        return ""
    filled = [i for i, column in enumerate(zip(*rows, strict=True)) if any(column)]
    lines = [", ".join(f'"{row[i]}"' for i in filled) for row in [header, *rows]]
    body = "\n".join(f"   {line}" for line in lines)
    return f".. csv-table::\n   :header-rows: 1\n\n{body}"
