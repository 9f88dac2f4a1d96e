"""Self-supervised features and graph networks for crystals, in scikit-learn form.

Names are imported on first use, so that ``import ssl_matfeat`` itself costs nothing: it neither loads torch
nor prints, downloads or writes anything.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that type checkers and editors know the names too
    from ssl_matfeat._validation import StructureError as StructureError
    from ssl_matfeat.block_kernel import BlockKernelRidge as BlockKernelRidge
    from ssl_matfeat.datasets import load_dataset as load_dataset
    from ssl_matfeat.datasets import load_elastic as load_elastic
    from ssl_matfeat.featurizers import SSLAtomFeaturizer as SSLAtomFeaturizer
    from ssl_matfeat.featurizers import SSLStructureFeaturizer as SSLStructureFeaturizer
    from ssl_matfeat.negnn import NEGNNClassifier as NEGNNClassifier
    from ssl_matfeat.negnn import NEGNNRegressor as NEGNNRegressor
    from ssl_matfeat.pretrain import SSLPretrainer as SSLPretrainer
    from ssl_matfeat.weights import list_weights as list_weights

__version__ = "0.5.0"

_MODULE_OF = {
    "BlockKernelRidge": "block_kernel",
    "NEGNNClassifier": "negnn",
    "NEGNNRegressor": "negnn",
    "SSLAtomFeaturizer": "featurizers",
    "SSLStructureFeaturizer": "featurizers",
    "SSLPretrainer": "pretrain",
    "StructureError": "_validation",
    "list_weights": "weights",
    "load_dataset": "datasets",
    "load_elastic": "datasets",
}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ssl_matfeat' has no attribute {name!r}")
    return getattr(import_module(f"ssl_matfeat.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
