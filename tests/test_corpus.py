"""Pretraining from a parquet file: which rows are read, and what becomes of bad ones."""

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL_PRETRAINING, write_parquet
from pymatgen.core import Structure

from ssl_matfeat import SSLPretrainer


def test_parquet_without_split_is_like_the_list(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    options = {"max_epochs": 1, "tasks": "predictive", **SMALL_PRETRAINING}
    path = write_parquet(X, tmp_path / "all.parquet")
    of_file, of_list = SSLPretrainer(**options).fit(path), SSLPretrainer(**options).fit(X)
    assert of_file.weights_.card["training_data"] == of_list.weights_.card["training_data"]
    for key, value in of_list.history_[0].items():
        assert of_file.history_[0][key] == pytest.approx(value, rel=1e-3)


def test_parquet_with_split_trains_on_its_rows_alone(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    split = ["pretrain"] * 10 + ["test"] * 5 + ["validation"] * 4 + ["pretrain"]
    path = write_parquet(X, tmp_path / "split.parquet", split=split)
    card = (
        SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING).fit(str(path)).weights_.card
    )
    assert card["training_data"]["n_training"] == 11
    assert card["training_data"]["n_validation"] == 4
    trained = {site.specie.symbol for s in [*X[:10], X[19]] for site in s}
    assert set(card["elements_seen"]) == trained


@pytest.mark.parametrize("index", [None, [f"mp-{i}" for i in range(20)], [0] * 20])
def test_bad_row_of_a_parquet_is_skipped_and_reported(small_crystals, tmp_path, index):
    X = list(small_crystals[0][:20])
    X[3] = Structure(X[3].lattice, ["Fe", "O"], [[0, 0, 0], [0, 0, 0]])
    split = ["pretrain"] * 15 + ["validation"] * 5
    path = write_parquet(X, tmp_path / "bad.parquet", index=index, split=split)
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING).fit(path)
    assert pretrainer.weights_.card["training_data"]["n_training"] == 14
    assert list(pretrainer.errors_) == [3]
    assert "closer than 0.3 Å" in pretrainer.errors_[3]


def test_parquet_whose_split_has_other_names(small_crystals, tmp_path):
    path = write_parquet(small_crystals[0][:4], tmp_path / "named.parquet", split=["train"] * 4)
    with pytest.raises(ValueError, match=r"column split holds 'train'.*'pretrain' or 'validation'"):
        SSLPretrainer("predictive").fit(path)


def test_impossible_atomic_number_in_a_parquet_is_reported(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    path = write_parquet(X, tmp_path / "numbers.parquet")
    frame = pd.read_parquet(path)
    frame.at[2, "numbers"] = np.zeros(len(X[2]), dtype=int)
    frame.at[5, "numbers"] = np.array([300] * len(X[5]))
    frame.at[7, "numbers"] = np.array([1] * (len(X[7]) + 1))
    frame.to_parquet(path)
    errors = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING).fit(path).errors_
    assert list(errors) == [2, 5, 7]
    assert "atomic number 0" in errors[2]
    assert "atomic number 300" in errors[5]
    assert "coordinates" in errors[7]


def test_malformed_rows_of_a_parquet_lose_no_other(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    path = write_parquet(X, tmp_path / "malformed.parquet")
    frame = pd.read_parquet(path)
    frame.at[1, "lattice"] = frame.at[1, "lattice"][:3]
    frame.at[4, "lattice"] = None
    frame.at[6, "frac_coords"] = frame.at[6, "frac_coords"][:-1]
    frame.at[8, "numbers"] = frame.at[8, "numbers"] + 0.5
    frame.to_parquet(path)
    errors = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING).fit(path).errors_
    assert list(errors) == [1, 4, 6, 8]
    assert all("9 numbers of the lattice and 3 coordinates a site" in e for e in errors.values())
    assert "atomic numbers are integers" in errors[8]


def test_parquet_in_single_precision_and_out_of_the_cell(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    far = [s.copy() for s in X]
    for s in far:
        s.translate_sites(range(len(s)), [4096, -1024, 2048], to_unit_cell=False)
    paths = [write_parquet(some, tmp_path / f"{i}.parquet") for i, some in enumerate((X, far))]
    frame = pd.read_parquet(paths[0])
    for name in ("lattice", "frac_coords"):
        frame[name] = [values.astype(np.float32) for values in frame[name]]
    frame.to_parquet(tmp_path / "single.parquet")
    options = {"tasks": "predictive", "max_epochs": 1, **SMALL_PRETRAINING}
    losses = [
        SSLPretrainer(**options).fit(path).history_[0]["train_group"]
        for path in (*paths, tmp_path / "single.parquet")
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_parquet_without_the_columns(tmp_path):
    pd.DataFrame({"numbers": [[1]], "cell": [[1.0] * 9]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no column lattice, frac_coords"):
        SSLPretrainer().fit(tmp_path / "other.parquet")
