import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Composition, Lattice, Structure

from ssl_matfeat.datasets import load_dataset, load_elastic, structures_from_frame

ROCK_SALT = {
    "numbers": [11, 17],
    "lattice": [0.0, 2.82, 2.82, 2.82, 0.0, 2.82, 2.82, 2.82, 0.0],
    "frac_coords": [0.0, 0.0, 0.0, 0.5, 0.5, 0.5],
}


@pytest.fixture
def data_home(tmp_path):
    frame = pd.DataFrame([ROCK_SALT, ROCK_SALT])
    frame["magmom"] = [np.array([0.1, 0.2]), np.array([0.3, 0.4])]
    frame.to_parquet(tmp_path / "salts.parquet")
    return tmp_path


def test_elastic_has_every_crystal_and_its_moduli():
    frame = load_elastic()
    assert list(frame) == ["id", "formula", "structure", "K_VRH", "G_VRH", "poisson_ratio"]
    assert len(frame) == 1181
    assert frame["id"].is_unique
    assert frame.notna().all(axis=None)
    assert all(type(structure) is Structure for structure in frame["structure"])


def test_elastic_structures_belong_to_their_rows():
    frame = load_elastic()
    from_structure = [structure.composition.reduced_composition for structure in frame["structure"]]
    from_formula = [Composition(formula).reduced_composition for formula in frame["formula"]]
    assert from_structure == from_formula


def test_elastic_target_is_the_decimal_logarithm_in_gpa():
    X, y = load_elastic(return_X_y=True)
    diamond = [i for i, s in enumerate(X) if s.composition.reduced_formula == "C"]
    assert len(X) == len(y) == 1181
    # The stiffest crystal of the set is carbon; experiment gives 443 GPa for diamond.
    assert 10 ** y[diamond].max() == pytest.approx(443, rel=0.05)


def test_name_is_found_in_data_home_and_in_the_environment(data_home, monkeypatch):
    by_argument = load_dataset("salts", data_home=data_home)
    monkeypatch.setenv("SSL_MATFEAT_DATA", str(data_home))
    by_variable = load_dataset("salts")
    by_path = load_dataset(data_home / "salts.parquet")
    for frame in (by_argument, by_variable, by_path):
        assert [s.composition.reduced_formula for s in frame["structure"]] == ["NaCl", "NaCl"]


def test_data_home_wins_over_the_environment(data_home, monkeypatch):
    monkeypatch.setenv("SSL_MATFEAT_DATA", str(data_home / "elsewhere"))
    assert len(load_dataset("salts", data_home=data_home)) == 2


def test_array_targets_stay_arrays_and_structure_arrays_go(data_home):
    frame = load_dataset("salts", data_home=data_home)
    assert list(frame) == ["magmom", "structure"]
    np.testing.assert_array_equal(frame["magmom"][1], [0.3, 0.4])


def test_arrays_become_the_geometry_they_spell():
    (structure,) = structures_from_frame(pd.DataFrame([ROCK_SALT]))
    assert structure.lattice.volume == pytest.approx(2 * 2.82**3)
    assert structure.get_distance(0, 1) == pytest.approx(2.82)


def test_matminer_frame_keeps_structures_targets_and_index():
    iron = Structure(Lattice.cubic(2.8), ["Fe"], [[0, 0, 0]])
    frame = pd.DataFrame({"structure": [iron, iron.as_dict()], "y": [1.0, 2.0]}, index=["a", "b"])
    loaded = load_dataset(frame)
    assert loaded["structure"].tolist() == [iron, iron]
    assert loaded["y"].to_dict() == {"a": 1.0, "b": 2.0}
    assert frame["structure"].iloc[1] == iron.as_dict()


def test_other_columns_stay_whatever_their_names():
    frame = pd.DataFrame({"structure": [Structure(Lattice.cubic(2.9), ["Fe"], [[0, 0, 0]])]})
    frame = frame.assign(lattice="cubic", numbers=1)
    assert list(load_dataset(frame)) == ["lattice", "numbers", "structure"]


def test_damaged_dict_is_named_by_its_row():
    damaged = {"@module": "pymatgen.core.structure", "@class": "Structure", "sites": []}
    with pytest.raises(ValueError, match=r"row 0: column 'structure' holds the dict.*lattice"):
        load_dataset(pd.DataFrame({"structure": [damaged]}))


def test_unknown_name_lists_what_is_there(data_home):
    with pytest.raises(FileNotFoundError, match=r"'sugars': no file .*sugars\.parquet.* salts"):
        load_dataset("sugars", data_home=data_home)


def test_name_without_a_folder_says_how_to_give_one(monkeypatch):
    monkeypatch.delenv("SSL_MATFEAT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"'salts'.*data_home.*SSL_MATFEAT_DATA"):
        load_dataset("salts")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.parquet"):
        load_dataset(tmp_path / "nowhere.parquet")


def test_input_that_is_no_data_set_is_refused():
    with pytest.raises(TypeError, match="got list"):
        load_dataset([1, 2])


def test_frame_without_crystals_names_its_columns():
    with pytest.raises(ValueError, match=r"\['formula'\].*missing: numbers, lattice, frac_coords"):
        load_dataset(pd.DataFrame({"formula": ["NaCl"]}))


def test_item_that_is_no_structure_is_named_by_its_row():
    iron = Structure(Lattice.cubic(2.8), ["Fe"], [[0, 0, 0]])
    with pytest.raises(TypeError, match="row 1: column 'structure' holds a str"):
        load_dataset(pd.DataFrame({"structure": [iron, "Fe"]}))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("lattice", [1.0, 2.0, 3.0], "row 1: lattice has 3 numbers, not 9"),
        ("frac_coords", [0.0, 0.0, 0.0], r"row 1: frac_coords has 3 numbers.*2 sites \(6"),
        ("numbers", [11, 0], "row 1: numbers holds 0, no atomic number from 1 to 118"),
        ("numbers", [11.5, 17], "row 1: numbers holds 11.5, no atomic number"),
        ("numbers", ["Na", "Cl"], r"row 1: numbers holds \['Na', 'Cl'\], which are no numbers"),
        ("numbers", None, "row 1: numbers holds None, not a list of numbers"),
        ("lattice", None, "row 1: lattice holds None"),
        ("lattice", ["a"] * 9, "row 1: lattice holds .*, which are no numbers"),
        ("frac_coords", np.nan, "row 1: frac_coords holds nan, not a list"),
    ],
)
def test_malformed_row_is_named(column, value, message):
    frame = pd.DataFrame([ROCK_SALT, {**ROCK_SALT, column: value}])
    with pytest.raises(ValueError, match=message):
        structures_from_frame(frame)
