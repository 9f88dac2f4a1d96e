"""The matminer side: featurize one or many, data frames, and matminer's own featurizers around ours."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ALLOY, bcc, fcc, perovskite, rock_salt
from matminer.featurizers.base import BaseFeaturizer, MultipleFeaturizer
from matminer.featurizers.conversions import DictToObject
from matminer.featurizers.structure import DensityFeatures, SiteStatsFingerprint
from pymatgen.core import Structure
from sklearn.utils import get_tags

from ssl_matfeat import SSLAtomFeaturizer, SSLStructureFeaturizer, StructureError, list_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*have NaN for features:UserWarning")
LAYERS = ("element", "shell", 0, 1)


@pytest.fixture
def crystals(weight_files):
    return SSLStructureFeaturizer(weight_files["cgcnn"], LAYERS)


@pytest.fixture
def sites(weight_files):
    return SSLAtomFeaturizer(weight_files["cgcnn"], LAYERS)


@pytest.fixture
def frame():
    structures = [rock_salt(), perovskite(), fcc()]
    return pd.DataFrame({"structure": structures, "y": [1, 2, 3]}, index=["a", "b", "c"])


def assert_close(a, b):
    np.testing.assert_allclose(np.asarray(a, dtype=float), b, rtol=1e-4, atol=1e-4)


def test_one_row_a_crystal_and_one_a_site(crystals, sites):
    structures = [rock_salt(), fcc(), perovskite()]
    rows = crystals.fit_transform(structures)
    assert rows.shape == (3, len(crystals.feature_labels()))
    assert rows.dtype == np.float32
    of_sites = sites.fit_transform(structures)
    assert of_sites.shape == (14, len(sites.feature_labels()))
    assert sites.site_index_.tolist() == [
        *([0, i] for i in range(8)),
        [1, 0],
        *([2, i] for i in range(5)),
    ]
    labels = sites.feature_labels()
    numbers = of_sites[:, labels.index("Number")].tolist()
    assert numbers == [site.specie.Z for s in structures for site in s]


def test_crystals_are_pooled_sites(weight_files, sites):
    pooled = SSLStructureFeaturizer(
        weight_files["cgcnn"], LAYERS, pooling=("mean", "std", "min", "max", "sum")
    )
    row = pooled.featurize(perovskite())
    values = sites.fit_transform([perovskite()]).astype(float)
    expected = [values.mean(0), values.std(0), values.min(0), values.max(0), values.sum(0)]
    assert_close(row, np.stack(expected, axis=1).ravel())


def test_labels_name_layer_channel_and_statistic(crystals, sites):
    labels = crystals.feature_labels()
    assert len(set(labels)) == len(labels)
    for name in ("mean of Electronegativity", "std of bond length", "mean of NE0_0"):
        assert name in labels
    assert {"Electronegativity", "bond length", "NE1_15"} <= set(sites.feature_labels())


def test_featurize_one(crystals, sites):
    assert_close(crystals.featurize(perovskite()), crystals.transform([perovskite()])[0])
    assert isinstance(crystals.featurize(perovskite()), list)
    assert_close(sites.featurize(perovskite(), 1), sites.transform([perovskite()])[1])
    with pytest.raises(StructureError, match="disordered"):
        crystals.featurize(ALLOY)


def test_featurize_many(crystals, frame):
    structures = frame["structure"].tolist()
    expected = crystals.transform(structures)
    for entries in (structures, [(s,) for s in structures], frame[["structure"]]):
        assert_close(crystals.featurize_many(entries, pbar=False), expected)
    assert crystals.featurize_many([], pbar=False) == []


def test_featurize_many_with_errors(crystals):
    entries = [rock_salt(), ALLOY, fcc()]
    with pytest.raises(StructureError, match="disordered"):
        crystals.featurize_many(entries, pbar=False)
    with pytest.raises(ValueError, match="needs ignore_errors"):
        crystals.featurize_many(entries, return_errors=True, pbar=False)
    rows = crystals.featurize_many(entries, ignore_errors=True, pbar=False)
    assert np.isnan(rows[1]).all()
    assert_close([rows[0], rows[2]], crystals.transform([rock_salt(), fcc()]))
    full = crystals.featurize_many(entries, ignore_errors=True, return_errors=True, pbar=False)
    assert [row[:-1] for row in full[::2]] == rows[::2]
    assert "X[1] (Fe0.5Co0.5): site 0 is disordered" in full[1][-1]
    assert np.isnan([full[0][-1], full[2][-1]]).all()


def test_featurize_many_sites(sites):
    salt, metal = rock_salt(), fcc()
    entries = [(salt, 7), (metal, 0), (salt, 0), (ALLOY, 0)]
    rows = sites.featurize_many(entries, ignore_errors=True, return_errors=True, pbar=False)
    expected = sites.transform([salt, metal])
    assert_close([row[:-1] for row in rows[:3]], expected[[7, 8, 0]])
    assert np.isnan(rows[3][:-1]).all()
    assert "disordered" in rows[3][-1]


def test_featurize_dataframe(crystals, frame):
    result = crystals.featurize_dataframe(frame.copy(), "structure", pbar=False)
    assert list(result.columns) == ["structure", "y", *crystals.feature_labels()]
    assert list(result.index) == list(frame.index)
    assert_close(result[crystals.feature_labels()], crystals.transform(frame["structure"]))


@pytest.mark.parametrize("weights", list_weights())
def test_names_suit_libraries_of_boosted_trees(weights):
    """LightGBM refuses the special characters of JSON, and XGBoost brackets."""
    names = SSLStructureFeaturizer(weights).feature_labels()
    assert not set("".join(names)) & set('[]<>{}":,')


@pytest.mark.parametrize("featurizer", [SSLStructureFeaturizer, SSLAtomFeaturizer])
def test_device_that_is_not_there(featurizer):
    with pytest.raises(ValueError, match=r"device='gpu' cannot be used .* or 'cpu'"):
        featurizer(device="gpu").fit([fcc()])


@pytest.mark.parametrize("featurizer", [SSLStructureFeaturizer, SSLAtomFeaturizer])
def test_tags_are_those_of_a_transformer(featurizer):
    assert get_tags(featurizer()).transformer_tags.preserves_dtype == []


def test_site_features_of_a_frame_need_the_site(sites, frame):
    with pytest.raises(
        ValueError, match=r"a structure and the index of a site.*\['structure', 'site'\]"
    ):
        sites.featurize_dataframe(frame.copy(), "structure", pbar=False)
    frame["site"] = [0, 1, 0]
    result = sites.featurize_dataframe(frame, ["structure", "site"], pbar=False)
    assert_close(result[sites.feature_labels()].iloc[1], sites.transform([perovskite()])[1])


def test_on_error_holds_for_matminers_methods_too(crystals, frame):
    bad = pd.concat([frame, pd.DataFrame({"structure": [ALLOY], "y": [4]}, index=["d"])])
    with pytest.raises(StructureError, match="disordered"):
        crystals.featurize_dataframe(bad.copy(), "structure", pbar=False)
    result = crystals.set_params(on_error="nan").featurize_dataframe(bad, "structure", pbar=False)
    assert result[crystals.feature_labels()].isna().all(axis=1).tolist() == [False] * 3 + [True]


def test_bad_entry_is_named_by_its_row(sites, crystals):
    frame = pd.DataFrame({"structure": [rock_salt()] * 3 + [ALLOY], "site": [0, 1, 2, 0]})
    with pytest.raises(StructureError, match=r"^X\[3\] \(Fe0.5Co0.5\)"):
        sites.featurize_dataframe(frame, ["structure", "site"], pbar=False)
    with pytest.raises(StructureError, match=r"^structure \(Fe0.5Co0.5\)"):
        crystals.featurize(ALLOY)


def test_columns_of_sites_are_for_the_atom_featurizer_alone(sites, crystals):
    frame = pd.DataFrame({"structure": [rock_salt()] * 2, "site": [0, 1]})
    with pytest.raises(ValueError, match="SSLAtomFeaturizer"):
        crystals.featurize_dataframe(frame.copy(), ["structure", "site"], pbar=False)
    for numbers in (int, float):  # a column with a gap was one of floats
        numbered = frame.astype({"site": numbers})
        found = sites.fit_featurize_dataframe(numbered, ["structure", "site"], pbar=False)
        assert_close(found[sites.feature_labels()], sites.transform([rock_salt()])[:2])


def test_options_of_the_progress_bar(crystals, frame, capsys):
    crystals.featurize_dataframe(frame.copy(), "structure", pbar={"disable": True})
    assert capsys.readouterr().err == ""
    crystals.featurize_dataframe(frame.copy(), "structure", pbar={"unit": "salt"})
    assert "salt/s" in capsys.readouterr().err


@pytest.mark.parametrize(("verbose", "shown"), [(0, False), (False, False), (1, True)])
def test_verbose_may_be_a_number(frame, weight_files, verbose, shown, capsys):
    featurizer = SSLStructureFeaturizer(weight_files["cgcnn"], LAYERS, verbose=verbose)
    featurizer.fit_transform(frame["structure"])
    assert ("crystal/s" in capsys.readouterr().err) == shown


def test_citations_follow_layers_and_weights(crystals):
    def cited(featurizer):
        return {entry.split("{")[1].split(",")[0] for entry in featurizer.citations()}

    always, element = {"ssl_matfeat", "kong2024self"}, {"ward2016general"}
    gordy, convolution = {"gordy1946relation"}, {"xie2018crystal"}
    shapes, corpus = {"steinhardt1983bond"}, {"jain2013commentary"}
    shell = element | shapes | gordy | {"badger1934relation", "lindemann1910calculation"}
    cell = element | gordy | {"brown1985bond", "hill1952elastic"}
    default = always | shell | cell | corpus | {"williams2000using"}
    assert cited(SSLStructureFeaturizer()) == default
    assert cited(SSLStructureFeaturizer(layers=("cell",))) == always | cell
    assert cited(SSLStructureFeaturizer(layers=("element", "shell"))) == always | shell
    assert cited(SSLStructureFeaturizer(layers=(0,))) == always | element | corpus
    assert cited(SSLStructureFeaturizer(layers=(1,))) == always | element | shapes | corpus
    paper = SSLStructureFeaturizer("paper-predictive", (0, 1))
    assert cited(paper) == always | convolution | corpus
    assert cited(crystals) == always | shell | convolution  # weights of one's own


def test_featurize_dataframe_with_errors(crystals, frame):
    bad = pd.concat([frame, pd.DataFrame({"structure": [ALLOY], "y": [4]}, index=["d"])])
    result = crystals.featurize_dataframe(
        bad, "structure", ignore_errors=True, return_errors=True, pbar=False
    )
    labels = crystals.feature_labels()
    assert result.loc["d", labels].isna().all()
    assert result.loc[["a", "b", "c"], labels].notna().all(axis=None)
    column = next(name for name in result.columns if "Exceptions" in name)
    assert "disordered" in result.loc["d", column]


def test_inside_multiple_featurizer(crystals, frame):
    density = DensityFeatures()
    both = MultipleFeaturizer([density, crystals])
    both.set_n_jobs(1)
    result = both.fit_featurize_dataframe(frame.copy(), "structure", pbar=False)
    assert_close(result[crystals.feature_labels()], crystals.transform(frame["structure"]))
    assert result["density"].tolist() == [density.featurize(s)[0] for s in frame["structure"]]
    assert set(crystals.citations()) <= set(both.citations())


IN_A_POOL = """
from matminer.featurizers.base import MultipleFeaturizer
from matminer.featurizers.structure import DensityFeatures
from ssl_matfeat import SSLStructureFeaturizer, load_elastic

frame = load_elastic().head(12)[["structure"]].copy()
ours = SSLStructureFeaturizer()
expected = ours.fit_transform(frame["structure"])
both = MultipleFeaturizer([DensityFeatures(), ours])
both.set_n_jobs(2)
found = both.featurize_dataframe(frame, "structure", pbar=False)[ours.feature_labels()]
print(abs(found.to_numpy() - expected).max() < 1e-3)
"""


def test_pool_of_forked_processes_does_not_wait_for_ever():
    """The threads of torch that ran before the fork are not there after it."""
    free = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-W", "ignore", "-c", IN_A_POOL]
    ran = subprocess.run(command, env=free, capture_output=True, text=True, timeout=200, check=True)
    assert ran.stdout == "True\n"


def test_site_statistics_over_our_sites(sites):
    statistics = SiteStatsFingerprint(sites, stats=("mean", "maximum"))
    salt = Structure(
        rock_salt().get_primitive_structure().lattice, ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]
    )
    found = dict(
        zip(statistics.feature_labels(), statistics.fit([salt]).featurize(salt), strict=True)
    )
    values = sites.transform([salt])
    for i, label in enumerate(sites.feature_labels()):
        assert found[f"mean {label}"] == pytest.approx(values[:, i].mean(), rel=1e-4, abs=1e-4)
        assert found[f"maximum {label}"] == pytest.approx(values[:, i].max(), rel=1e-4, abs=1e-4)


def test_after_a_conversion_of_matminer(crystals, frame):
    stored = pd.DataFrame({"text": [s.as_dict() for s in frame["structure"]]}, index=frame.index)
    read = DictToObject(target_col_id="structure")
    read.set_n_jobs(1)
    read = read.featurize_dataframe(stored, "text", pbar=False)
    result = crystals.featurize_dataframe(read, "structure", pbar=False)
    assert_close(result[crystals.feature_labels()], crystals.transform(frame["structure"]))


def test_credits(crystals, sites):
    for featurizer in (crystals, sites):
        assert isinstance(featurizer, BaseFeaturizer)
        assert all(
            entry.startswith(("@software{", "@article{")) for entry in featurizer.citations()
        )
        assert any("10.1088/2632-2153/ad612b" in entry for entry in featurizer.citations())
        assert featurizer.implementors()


def test_number_of_jobs_is_one_unless_asked(crystals):
    assert crystals.n_jobs is None
    crystals.set_n_jobs(2)
    assert crystals.get_params()["n_jobs"] == 2


@pytest.mark.parametrize("batch_size", [1, 100, 10**6])
def test_batch_size_does_not_matter(crystals, batch_size, real_crystals):
    expected = crystals.transform(real_crystals[:20])
    found = crystals.set_params(batch_size=batch_size).transform(real_crystals[:20])
    assert_close(found, expected)


def test_bundled_weights_are_used_by_name(real_crystals):
    rows = {}
    for weights in ("default", "paper-predictive"):
        featurizer = SSLStructureFeaturizer(weights, (0, 1, 2), pooling=("mean",))
        rows[weights] = featurizer.fit_transform(real_crystals[:5])
        assert featurizer.pretrained_.name == weights
    assert not np.allclose(rows["default"], rows["paper-predictive"])


def test_double_precision_is_more_exact(weight_files):
    single, double = (
        SSLStructureFeaturizer(weight_files["context"], ("pretext", 2), dtype=dtype)
        for dtype in ("float32", "float64")
    )
    a, b = single.fit_transform([perovskite()]), double.fit_transform([perovskite()])
    assert b.dtype == np.float64
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert (a != b.astype(np.float32)).any()


def test_default_layers_give_finite_features(elastic):
    rows = SSLStructureFeaturizer().fit_transform(elastic["structure"][:50])
    assert np.isfinite(rows).all()
    assert np.isfinite(SSLAtomFeaturizer().fit_transform([bcc()])).all()


def test_a_site_that_is_not_there_loses_only_its_row(sites):
    entries = [(fcc(), 0), (rock_salt(), 99), (fcc(), -1)]
    rows = sites.featurize_many(entries, ignore_errors=True, return_errors=True, pbar=False)
    assert np.isfinite(rows[0][:-1]).all()
    assert np.isnan(rows[1][:-1]).all()
    assert "site 99 of 8" in rows[1][-1]
    assert "site -1 of 1" in rows[2][-1]
    with pytest.raises(IndexError, match="site 99 of 8"):
        sites.featurize_many(entries, pbar=False)
    for site in (-1, 99, 1.5):
        with pytest.raises(IndexError, match=f"idx: site {site} of 8"):
            sites.featurize(rock_salt(), site)


def test_sites_of_a_column_of_floats(sites):
    """What pandas makes of integers beside a missing one."""
    frame = pd.DataFrame({"structure": [rock_salt()] * 3, "site": [2, None, 3]})
    result = sites.featurize_dataframe(
        frame, ["structure", "site"], ignore_errors=True, return_errors=True, pbar=False
    )
    rows = result[sites.feature_labels()].to_numpy()
    assert_close(rows[[0, 2]], sites.transform([rock_salt()])[[2, 3]])
    assert np.isnan(rows[1]).all()
    assert_close(sites.featurize(rock_salt(), np.float32(2)), rows[0])


@pytest.mark.parametrize("weights", list_weights())
def test_default_layers_suit_all_bundled_weights(weights):
    featurizer = SSLStructureFeaturizer(weights)
    assert np.isfinite(featurizer.fit_transform([rock_salt()])).all()
    assert len(featurizer.feature_labels()) <= 600


def test_layers_may_be_numpy_ints(weight_files):
    X = [rock_salt()]
    plain = SSLStructureFeaturizer(weight_files["cgcnn"], (1,)).fit_transform(X)
    numpy = SSLStructureFeaturizer(weight_files["cgcnn"], (np.int64(1),)).fit_transform(X)
    np.testing.assert_array_equal(plain, numpy)
    with pytest.raises(ValueError, match=r"no layer 1\.0"):
        SSLStructureFeaturizer(weight_files["cgcnn"], (1.0,)).fit(X)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_sites", [1, 3, 5, 7])
def test_spread_of_equal_sites_is_exactly_zero(n_sites, dtype):
    """Not its rounding, which depends on the cell, and which a scaler would blow up."""
    structure = fcc(element="Cu") * (n_sites, 1, 1)
    featurizer = SSLStructureFeaturizer(layers=("element",), pooling=("std",), dtype=dtype)
    assert not featurizer.fit_transform([structure]).any()
