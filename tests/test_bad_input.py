"""Bad structures give an error that says which, what, the limit and the way out, and cost no other row."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import ALLOY, bcc, fcc, graphene, perovskite, rock_salt, simple_cubic
from pymatgen.core import DummySpecies, Element, Lattice, Molecule, Species, Structure
from pymatgen.transformations.standard_transformations import (
    OrderDisorderedStructureTransformation,
)
from sklearn.base import clone
from sklearn.pipeline import make_pipeline

from ssl_matfeat import SSLAtomFeaturizer, SSLStructureFeaturizer, StructureError
from ssl_matfeat._validation import crystal_from_arrays
from ssl_matfeat.graph import CrystalGraphs

pytestmark = pytest.mark.filterwarnings("ignore:.*have NaN for features:UserWarning")
SITE_LAYERS = ("element", "shell", 0, 1)
LAYERS = ("cell", *SITE_LAYERS)


def one(species, coords=(0, 0, 0), a=3.0):
    return Structure(Lattice.cubic(a), [species], [coords])


def two(coords, a=3.0, **options):
    return Structure(Lattice.cubic(a), ["Fe", "O"], [[0, 0, 0], coords], **options)


SKEWED = Lattice([[3, 0, 0], [30000, 3, 0], [0, 0, 3]])
PARALLEL = Lattice([[3, 0, 0], [6, 0, 0], [0, 0, 3]])
NOT_A_NUMBER = Lattice([[np.nan, 0, 0], [0, 3, 0], [0, 0, 3]])
BAD = {
    "formula": ("NaCl", TypeError, "X[1] is a str, not a pymatgen Structure; convert it"),
    "site": (bcc()[0], TypeError, "X[1] is a PeriodicSite, not a pymatgen Structure"),
    "missing": (None, TypeError, "X[1] is None: the structure is missing; drop the row"),
    "missing in a table": (np.nan, TypeError, "X[1] is nan: the structure is missing"),
    "list": ([bcc()], TypeError, "X[1] is a list, not a pymatgen Structure"),
    "molecule": (
        Molecule(["C", "O"], [[0, 0, 0], [0, 0, 1.1]]),
        TypeError,
        "X[1] (CO) is a Molecule, which has no lattice; put it in a box with get_boxed_structure",
    ),
    "no sites": (
        Structure(Lattice.cubic(3), [], []),
        StructureError,
        "X[1] has no sites; drop it",
    ),
    "disordered": (
        ALLOY,
        StructureError,
        "X[1] (Fe0.5Co0.5): site 0 is disordered (Fe:0.5, Co:0.5); order it first, e.g. in a supercell",
    ),
    "vacancies": (one({"Fe": 0.5}), StructureError, "X[1] (Fe0.5): site 0 is disordered (Fe:0.5)"),
    "dummy": (
        Structure(Lattice.cubic(3), ["Fe", DummySpecies("X")], [[0, 0, 0], [0.5] * 3]),
        StructureError,
        "site 1 is X0+, which is no element; replace or remove it (structure.remove_species)",
    ),
    "deuterium": (
        one("D"),
        StructureError,
        "site 0 is D, and isotopes are not told apart; use structure.replace(i, 'H')",
    ),
    "tritium": (one(Species("T", 1)), StructureError, "use structure.replace(i, 'H')"),
    "too heavy": (
        Structure(Lattice.cubic(3), ["O", Element("Og")], [[0, 0, 0], [0.5] * 3]),
        StructureError,
        "site 1 is Og (Z = 118), beyond Z = 103; drop the structure",
    ),
    "NaN": (
        one("Fe", (np.nan, 0, 0)),
        StructureError,
        "X[1] (Fe): site 0 has non-finite coordinates [nan, 0.0, 0.0]; repair or drop",
    ),
    "infinite": (
        two([0, np.inf, 0]),
        StructureError,
        "X[1] (FeO): site 1 has non-finite coordinates [0.0, inf, 0.0]; repair or drop",
    ),
    "NaN lattice": (
        Structure(NOT_A_NUMBER, ["Fe"], [[0, 0, 0]]),
        StructureError,
        "X[1] (Fe): the lattice has NaN or infinite entries; repair or drop the structure",
    ),
    "flat": (
        Structure(PARALLEL, ["Fe"], [[0, 0, 0]]),
        StructureError,
        "X[1] (Fe): the cell has a volume of 0 Å³ a site, less than 0.1 Å³; check the lattice",
    ),
    "skewed": (
        Structure(SKEWED, ["Fe"], [[0, 0, 0]]),
        StructureError,
        "X[1] (Fe): the cell is so skewed that 1.8e+07 of its images are within 16 Å, more than 1e+06; reduce it",
    ),
    "too close": (
        two([0.05, 0, 0]),
        StructureError,
        "X[1] (FeO): sites 0 and 1 are 0.150 Å apart, closer than 0.3 Å; if they are one atom, keep one",
    ),
    "on top": (
        two([1, 0, 0]),
        StructureError,
        "sites 0 and 1 are 0.000 Å apart, closer than 0.3 Å",
    ),
    "too close to its image": (
        Structure(Lattice([[3, 0, 0], [3, 0.25, 0], [0, 0, 9]]), ["Fe"], [[0, 0, 0]]),
        StructureError,
        "X[1] (Fe): sites 0 and 0 are 0.250 Å apart, closer than 0.3 Å",
    ),
    "short": (
        Structure(Lattice.orthorhombic(1e-6, 1e4, 1e4), ["Fe"], [[0, 0, 0]]),
        StructureError,
        "X[1] (Fe): a lattice vector is 1e-06 Å long, less than 0.3 Å; check its unit",
    ),
    "alone": (
        two([0.5] * 3, a=40.0),
        StructureError,
        "X[1] (FeO): site 0 has no neighbour within 16 Å; remove the atom, shrink the empty space",
    ),
}


@pytest.fixture(scope="module")
def featurizer(weight_files):
    return SSLStructureFeaturizer(weight_files["cgcnn"], LAYERS, on_error="nan")


@pytest.fixture(scope="module")
def sites(weight_files):
    return SSLAtomFeaturizer(weight_files["cgcnn"], SITE_LAYERS, on_error="nan")


@pytest.mark.parametrize("name", BAD)
def test_bad_structure_raises_an_error_that_names_it(featurizer, sites, name):
    bad, kind, message = BAD[name]
    for strict in (featurizer, sites):
        raising = type(strict)(**{**strict.get_params(), "on_error": "raise"})
        with pytest.raises(kind, match=re.escape(message)) as caught:
            raising.fit_transform([rock_salt(), bad, bcc()])
        assert "X[1]" in str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_structure_becomes_a_row_of_nan(featurizer, name):
    bad, kind, message = BAD[name]
    alone = featurizer.fit_transform([rock_salt(), bcc()])
    assert featurizer.errors_ == {}
    rows = featurizer.fit_transform([rock_salt(), bad, bcc()])
    assert np.isnan(rows[1]).all()
    np.testing.assert_array_equal(rows[[0, 2]], alone)  # to the last bit
    assert list(featurizer.errors_) == [1]
    assert featurizer.errors_[1].startswith(kind.__name__)
    assert message in featurizer.errors_[1]


@pytest.mark.parametrize("name", BAD)
def test_bad_structure_leaves_nan_for_its_sites(sites, name):
    bad, _, message = BAD[name]
    rows = sites.fit_transform([rock_salt(), bad, bcc()])
    n_bad = len(bad) if isinstance(bad, Structure | Molecule) else 1
    assert sites.site_index_[:, 0].tolist() == [0] * 8 + [1] * n_bad + [2] * 2
    of_bad = sites.site_index_[:, 0] == 1
    assert np.isnan(rows[of_bad]).all()
    np.testing.assert_array_equal(rows[~of_bad], sites.fit_transform([rock_salt(), bcc()]))
    sites.transform([bad])
    assert message.replace("X[1]", "X[0]") in sites.errors_[0]


@pytest.mark.filterwarnings("error")
def test_rows_of_nan_are_not_silent(featurizer, sites):
    crystals = [rock_salt(), ALLOY, None]
    with pytest.warns(
        UserWarning, match=r"2 of 3 structures .* NaN .*X\[1\].* is disordered"
    ) as caught:
        featurizer.transform(crystals)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="2 of 3 structures"):
        sites.fit_transform(crystals)
    featurizer.transform([rock_salt()])  # no warning
    with pytest.raises(TypeError, match=r"X is a generator.* pass a list"):
        featurizer.fit(structure for structure in crystals)


def test_all_bad(featurizer, sites):
    bad = [structure for structure, _, _ in BAD.values()]
    rows = featurizer.fit_transform(bad)
    assert rows.shape == (len(bad), len(featurizer.get_feature_names_out()))
    assert np.isnan(rows).all()
    assert list(featurizer.errors_) == list(range(len(bad)))
    assert np.isnan(sites.fit_transform(bad)).all()


def test_errors_name_the_label_of_a_row_beside_its_position():
    X = pd.Series([bcc(), ALLOY], index=["mp-13", "mp-7"])
    for kind in (SSLStructureFeaturizer, SSLAtomFeaturizer):
        for rows in (X, X.to_frame()):
            with pytest.raises(StructureError, match=r"^X\[1\] at index 'mp-7' \(Fe0.5Co0.5\)"):
                kind().fit_transform(rows)
        with pytest.raises(StructureError, match=r"^X\[1\] \(Fe0.5Co0.5\)"):
            kind().fit_transform(X.reset_index(drop=True))


def test_an_element_with_mixed_oxidation_states_is_that_element(featurizer):
    mixed = one({"Fe2+": 0.5, "Fe3+": 0.5})
    assert np.array_equal(featurizer.fit_transform([mixed]), featurizer.fit_transform([one("Fe")]))


def test_errors_are_of_the_last_call(featurizer):
    featurizer.fit_transform([ALLOY, bcc()])
    assert list(featurizer.errors_) == [0]
    featurizer.transform([bcc()])
    assert featurizer.errors_ == {}


@pytest.mark.parametrize(
    ("X", "kind", "message"),
    [
        (rock_salt(), TypeError, "X is one Structure (NaCl), but a list of structures is expected"),
        (bcc()[0], TypeError, "pass [structure]"),
        (Molecule(["H"], [[0, 0, 0]]), TypeError, "X (H2) is a Molecule, which has no lattice"),
        ("NaCl.cif", TypeError, "X must be a list of pymatgen Structures, got str"),
        (None, TypeError, "got NoneType"),
        (3, TypeError, "got int"),
        ({"a": rock_salt()}, TypeError, "got dict"),
        ([], ValueError, "X is empty: 0 structures given, at least 1 is needed"),
        (pd.Series([], dtype=object), ValueError, "X is empty"),
        (pd.DataFrame({"a": [bcc()], "b": ["iron"]}), ValueError, "X has shape (1, 2)"),
        (np.zeros((3, 4)), ValueError, "one column of structures is expected; select the column"),
        (np.asarray([bcc(), bcc()]), TypeError, "of sites: numpy takes structures apart; pass the"),
    ],
    ids=lambda x: None if isinstance(x, str) and " " in x else type(x).__name__,
)
def test_what_is_no_list_of_structures_is_refused(featurizer, sites, X, kind, message):
    for transformer in (featurizer, sites):
        for method in (transformer.fit, transformer.transform, transformer.fit_transform):
            with pytest.raises(kind, match=re.escape(message)):
                method(X)


def test_column_of_sites_is_refused_where_it_is_not_read(featurizer, sites):
    both = pd.DataFrame({"structure": [bcc()], "site": [1]})
    for method in (featurizer.fit, featurizer.transform, sites.transform, sites.fit_transform):
        with pytest.raises(ValueError, match=r"X has shape \(1, 2\)"):
            method(both)


@pytest.mark.parametrize("n_atoms", [1, 2])
def test_very_large_and_empty_cell_is_refused_before_memory_runs_out(featurizer, n_atoms):
    huge = Structure(Lattice.cubic(1e6), ["Fe", "O"][:n_atoms], [[0, 0, 0], [0.5] * 3][:n_atoms])
    rows = featurizer.fit_transform([bcc(), huge])
    assert np.isfinite(rows[0]).all()
    assert np.isnan(rows[1]).all()
    assert "Å" in featurizer.errors_[1]


def test_noble_gas_in_an_error_does_not_warn(featurizer):
    featurizer.fit_transform([simple_cubic(30.0, "Ar")])
    assert "X[0] (Ar): site 0 has no neighbour" in featurizer.errors_[0]


def test_coordinates_of_far_images(featurizer):
    shifts = np.array([[1e5, -1e5, 0], [0, 0, 1e5]])
    far = Structure(bcc().lattice, bcc().species, bcc().frac_coords + shifts)
    near, away = featurizer.fit_transform([bcc(), far])
    np.testing.assert_allclose(away, near, rtol=1e-4, atol=1e-4)


def test_oxidation_states_are_ignored(featurizer):
    plain, charged = perovskite(), perovskite()
    charged.add_oxidation_state_by_element({"Sr": 2, "Ti": 4, "O": -2})
    rows = featurizer.fit_transform([plain, charged])
    # Equal up to rounding, which depends on a row's place in the batch.
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5, atol=1e-6)


def test_unseen_element_warns_once_and_is_finite(elastic):
    featurizer = SSLStructureFeaturizer()
    strange = [simple_cubic(3.345, "Po"), bcc(4.0, "Ra"), rock_salt()]
    with pytest.warns(UserWarning, match="the weights never saw Po, Ra") as caught:
        rows = featurizer.fit_transform(strange)
    assert len(caught) == 1
    assert np.isfinite(rows).all()
    with warnings.catch_warnings(record=True) as quiet:
        warnings.simplefilter("always")
        featurizer.transform([rock_salt()])
    assert not quiet


@pytest.mark.filterwarnings("ignore:the weights never saw Lr")
@pytest.mark.parametrize(
    "structure",
    [
        rock_salt() * (10, 5, 5),
        graphene(60.0),
        fcc(),
        simple_cubic(15.0, "Fe"),
        Structure(Lattice.orthorhombic(30, 30, 1.1), ["H"], [[0, 0, 0]]),
        two([0.1, 0, 0], a=12.0),
        two([0.5, 0.5, 0.5], a=3.0, charge=1),
        one("Lr"),
    ],
    ids=["2000 sites", "slab", "one atom", "sparse", "chain", "molecule in a box", "charged", "Lr"],
)
def test_good_odd_structures_pass(featurizer, structure):
    rows = featurizer.fit_transform([structure, bcc()])
    assert featurizer.errors_ == {}
    assert np.isfinite(rows).all()
    rows = SSLStructureFeaturizer().fit_transform([structure, bcc()])
    assert np.isfinite(rows).all()
    # Nor do they change what is beside them.
    alone = SSLStructureFeaturizer().fit_transform([bcc()])
    np.testing.assert_allclose(rows[1], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"layers": "shell"}, "layers must be a tuple"),
        ({"layers": ()}, "must name at least one layer"),
        ({"layers": (0, 0)}, "none twice"),
        ({"layers": (0, 9)}, "there is no layer 9 here; choose from ['element', 'shell'"),
        ({"layers": (True,)}, "there is no layer True"),
        ({"layers": (0, "pretext")}, "there is no layer 'pretext'"),
        ({"pooling": "mean"}, "pooling must be a tuple"),
        ({"pooling": ("mean", "median")}, "('mean', 'median')"),
        ({"pooling": ()}, "pooling must be a tuple"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'float64', got 'float16'"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'nan', got 'ignore'"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1 (edges), got 0"),
    ],
    ids=lambda x: None if isinstance(x, str) else str(x),
)
def test_bad_parameters_are_quoted(featurizer, parameters, message):
    bad = SSLStructureFeaturizer(**{**featurizer.get_params(), **parameters})  # which is no error
    for call in (bad.fit_transform, SSLStructureFeaturizer(**bad.get_params()).transform):
        with pytest.raises(ValueError, match=re.escape(message)):
            call([bcc()])


@pytest.mark.parametrize("numbers", [26, 0, []])
def test_arrays_that_are_no_list_of_sites(numbers):
    with pytest.raises(StructureError, match=r"row 3: \d atomic numbers and 1 coordinates"):
        crystal_from_arrays(numbers, 4 * np.eye(3), [0, 0, 0], "row 3")


def test_atoms_have_no_cell_channels(sites):
    bad = SSLAtomFeaturizer(**{**sites.get_params(), "layers": ("cell",)})
    with pytest.raises(ValueError, match="there is no layer 'cell' here"):
        bad.fit([bcc()])


def test_ways_out_that_the_messages_name_lead_out(featurizer):
    close = two([0.05, 0, 0])
    close.merge_sites(0.3, mode="delete")
    tritium = one(Species("T", 1))
    tritium.replace(0, "H")
    alloy = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Co": 0.5}] * 2, [[0, 0, 0], [0.5] * 3])
    ordered = OrderDisorderedStructureTransformation(no_oxi_states=True).apply_transformation(alloy)
    assert np.isfinite(featurizer.fit_transform([close, tritium, ordered])).all()


def test_occupancies_that_a_file_has_rounded(featurizer):
    exact, rounded = (Structure(Lattice.cubic(2.9), [{"Fe": n}], [[0] * 3]) for n in (1, 0.9999))
    assert np.array_equal(*featurizer.transform([exact, rounded]))


def test_warnings_point_at_the_line_of_the_caller(featurizer):
    bad = [one("Fe"), one({"Fe": 0.5})]
    lenient = clone(featurizer).set_params(on_error="nan")
    for call in (
        lambda: lenient.transform(bad),
        lambda: lenient.fit_transform(bad),
        lambda: make_pipeline(lenient).fit_transform(bad),
        lambda: lenient.featurize_many(bad, ignore_errors=True, pbar=False),
    ):
        with pytest.warns(UserWarning, match="1 of 2 structures") as caught:
            call()
        assert caught[0].filename == __file__


def test_graphs_of_nothing():
    with pytest.raises(ValueError, match="structures is empty"):
        CrystalGraphs.from_structures([])
    with pytest.raises(ValueError, match="n_neighbors must be at least 1"):
        CrystalGraphs.from_structures([one("Fe")], n_neighbors=0)
