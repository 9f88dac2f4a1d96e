"""Imports point one way: a module may import those above it in the list, never those below."""

import ast
from pathlib import Path

import pytest

import ssl_matfeat

PACKAGE = Path(ssl_matfeat.__file__).parent
ORDER = [
    "_random",
    "_warnings",
    "_versioned",
    "_validation",
    "elements",
    "graph",
    "pooling",
    "springs",
    "channels",
    "encoder",
    "environments",
    "context_encoder",
    "_compute",
    "weights",
    "blocks",
    "_citations",
    "_featurizer_base",
    "featurizers",
    "_kernel_search",
    "block_kernel",
    "devices",
    "training",
    "pretext",
    "corpus",
    "pretrain",
    "backbones",
    "examples",
    "network",
    "negnn",
    "inspection",
    "datasets",
    "demo",
    "cli",
]
"""docs/architecture.rst shows the same list; a subpackage counts as one module."""


def modules_imported_by(source):
    """Return the modules of the package that the source imports, at any depth of its code.

    ``import ssl_matfeat`` alone, for its version, imports none.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.module == "ssl_matfeat":
                names |= {f"ssl_matfeat.{alias.name}" for alias in node.names}
            else:
                names.add("." * node.level + (node.module or ""))
    return {name.split(".")[1] for name in names if name.startswith("ssl_matfeat.")}


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def wrong_imports(module, source):
    allowed = ORDER[: ORDER.index(module) + 1]
    return sorted(modules_imported_by(source) - set(allowed))


def has_relative_import(source):
    return any(
        isinstance(node, ast.ImportFrom) and node.level > 0 for node in ast.walk(ast.parse(source))
    )


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_from_above(path):
    source = path.read_text(encoding="utf-8")
    assert wrong_imports(module_of(path), source) == []
    assert not has_relative_import(source), "import by full name, so that this test can see it"


def test_every_name_of_the_list_is_a_module():
    assert {module_of(path) for path in SOURCES} == set(ORDER)


@pytest.mark.parametrize(
    "source",
    [
        "from ssl_matfeat.cli import app",
        "import ssl_matfeat.training",
        "def late():\n    from ssl_matfeat.featurizers import SSLAtomFeaturizer",
        "from ssl_matfeat import SSLPretrainer",
    ],
)
def test_an_import_from_below_is_seen(source):
    assert wrong_imports("graph", source) != []
