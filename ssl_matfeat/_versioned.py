"""What tells a saved model of another version, whose features or networks may not be today's."""

from __future__ import annotations

from typing import Any

from sklearn.base import BaseEstimator

import ssl_matfeat
from ssl_matfeat._warnings import warn


class VersionedEstimator(BaseEstimator):
    """An estimator whose saved state holds the version of the package, as scikit-learn's own do of theirs."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ssl_matfeat_version": ssl_matfeat.__version__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        saved = state.pop("_ssl_matfeat_version", "0.3 or earlier")
        if saved.split(".")[:2] != ssl_matfeat.__version__.split(".")[:2]:
            warn(
                f"this {type(self).__name__} was saved by ssl_matfeat {saved}, but {ssl_matfeat.__version__} is "
                "installed, whose features and networks may differ; fit it again, or install that version"
            )
        super().__setstate__(state)
