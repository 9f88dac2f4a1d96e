"""The JSON that the speed scripts write."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def write_report(path: Path, structures: str, tables: Sequence[dict[str, Any]]) -> None:
    """Write tables, of ``header`` and ``rows``, with what was measured and on what machine."""
    report = {
        "structures": structures,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        "tables": tables,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
