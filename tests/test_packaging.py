"""What is installed: quiet and light to import, with its data, and one version everywhere."""

import ast
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import ssl_matfeat

CHECKOUT = Path(__file__).parents[1]


def python(code, folder):
    """Run code in a new interpreter, in an empty folder, and return what it printed."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout + ran.stderr


def test_import_is_quiet_and_writes_nothing(tmp_path):
    assert python("import ssl_matfeat", tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_import_loads_nothing_heavy(tmp_path):
    code = (
        "import sys, ssl_matfeat; "
        "print(sorted({'torch', 'torch_geometric', 'pymatgen', 'pandas'} & set(sys.modules)))"
    )
    assert python(code, tmp_path) == "[]\n"


def test_help_of_the_command_loads_nothing_heavy(tmp_path):
    code = (
        "import sys, ssl_matfeat.cli; "
        "print(sorted({'torch', 'torch_geometric', 'pymatgen', 'pandas'} & set(sys.modules)))"
    )
    assert python(code, tmp_path) == "[]\n"


def test_every_public_name_is_there():
    for name in ssl_matfeat.__all__:
        assert getattr(ssl_matfeat, name) is not None


def test_type_checkers_are_told_every_public_name():
    source = ast.parse(Path(ssl_matfeat.__file__).read_text(encoding="utf-8"))
    told = {
        alias.asname
        for block in source.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert told | {"__version__"} == set(ssl_matfeat.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ssl_matfeat.nonsense


def test_version_is_the_installed_one():
    assert metadata.version("ssl-matfeat") == ssl_matfeat.__version__


def test_versions_in_the_texts_agree():
    citation = (CHECKOUT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {ssl_matfeat.__version__}\n" in citation


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Tracked and new files only: a build folder left in the checkout would slip into the wheel.
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((CHECKOUT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, folder / "source"]
    subprocess.run(build, capture_output=True, check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_weights_cards_data_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "ssl_matfeat/datasets/elastic_2015.parquet" in names
    assert "ssl_matfeat/py.typed" in names
    for name in ssl_matfeat.list_weights():
        assert f"ssl_matfeat/weights/{name}.safetensors" in names
        assert f"ssl_matfeat/weights/{name}.json" in names


@pytest.mark.slow
def test_wheel_holds_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    in_checkout = {
        str(path.relative_to(CHECKOUT))
        for path in (CHECKOUT / "ssl_matfeat").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == in_checkout
