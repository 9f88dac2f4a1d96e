"""torch's global generator, from which networks are built and dropout draws: seeded for a while, and left as it was."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_AT_A_TIME = threading.RLock()


def _renew_lock() -> None:
    global _ONE_AT_A_TIME
    _ONE_AT_A_TIME = threading.RLock()


if hasattr(os, "register_at_fork"):
    # The thread that holds it is not in a forked process, which would wait for it for ever.
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw the same numbers whenever it is entered, on the CPU and on ``device``, also while other threads wait to.

    Other devices, and whatever the caller draws afterwards, are as if nothing had been drawn.
    """
    on_gpu = device is not None and device.type == "cuda"
    with _ONE_AT_A_TIME, torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
