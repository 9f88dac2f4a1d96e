"""Models and weights that are saved and loaded, some of them in another process."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import safetensors.torch
import skops.io
import torch
from conftest import rock_salt, untrained
from sklearn.ensemble import RandomForestRegressor
from sklearn.pipeline import Pipeline

import ssl_matfeat
from ssl_matfeat import (
    BlockKernelRidge,
    NEGNNClassifier,
    NEGNNRegressor,
    SSLAtomFeaturizer,
    SSLPretrainer,
    SSLStructureFeaturizer,
    list_weights,
)
from ssl_matfeat.weights import (
    Pretrained,
    WeightsError,
    load_card,
    load_weights,
    save_weights,
)

PREDICT = """
import sys, joblib, numpy as np
model, X = joblib.load(sys.argv[1]), joblib.load(sys.argv[2])
np.save(sys.argv[3], model.predict(X))
"""


def pipeline(**parameters):
    forest = RandomForestRegressor(10, random_state=0)
    return Pipeline([("features", SSLStructureFeaturizer(**parameters)), ("forest", forest)])


def predict_elsewhere(model, X, folder):
    """Return what the dumped model predicts in a new process."""
    for name, value in [("model", model), ("X", X)]:
        joblib.dump(value, folder / name)
    files = [str(folder / name) for name in ("model", "X", "y.npy")]
    ran = subprocess.run([sys.executable, "-c", PREDICT, *files], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return np.load(folder / "y.npy")


def test_pipeline_predicts_the_same_bits_in_another_process(small_crystals, tmp_path):
    X, y = small_crystals
    model = pipeline().fit(X[:40], y[:40])
    predicted = predict_elsewhere(model, X, tmp_path)
    np.testing.assert_array_equal(predicted, model.predict(X))


@pytest.mark.parametrize(
    "kind",
    [
        *(SSLStructureFeaturizer, SSLAtomFeaturizer, SSLPretrainer),
        *(BlockKernelRidge, NEGNNRegressor, NEGNNClassifier),
    ],
)
def test_models_of_another_version_are_told(kind, monkeypatch):
    saved = pickle.dumps(kind())
    assert repr(pickle.loads(saved)) == repr(kind())  # warnings are errors here
    monkeypatch.setattr(ssl_matfeat, "__version__", "9.9.0")
    message = f"this {kind.__name__} was saved by ssl_matfeat .*, but 9.9.0 is installed"
    with pytest.warns(UserWarning, match=message):
        pickle.loads(saved)


def test_models_of_a_version_that_did_not_say_it_are_told():
    estimator = BlockKernelRidge()
    state = estimator.__getstate__()
    del state["_ssl_matfeat_version"]
    with pytest.warns(UserWarning, match="saved by ssl_matfeat 0.3 or earlier"):
        estimator.__setstate__(state)


def test_bundled_weights_are_stored_by_name(small_crystals, tmp_path):
    featurizer = SSLStructureFeaturizer().fit(small_crystals[0])
    joblib.dump(featurizer, tmp_path / "small")
    assert (tmp_path / "small").stat().st_size < 50_000
    loaded = joblib.load(tmp_path / "small")
    assert loaded.pretrained_.name == "default"
    assert loaded.pretrained_.sha256 == load_card("default")["sha256"]


def test_own_weights_are_stored_inside(small_crystals, tmp_path):
    X, y = small_crystals
    own = pipeline(weights=untrained("cgcnn"), layers=(0, 1)).fit(X[:40], y[:40])
    np.testing.assert_array_equal(predict_elsewhere(own, X, tmp_path), own.predict(X))


def test_a_file_of_weights_is_needed_no_more_once_fitted(small_crystals, tmp_path):
    X, y = small_crystals
    save_weights(tmp_path / "own.safetensors", untrained("context"))
    model = pipeline(weights=tmp_path / "own.safetensors", layers=(0, "pretext")).fit(
        X[:40], y[:40]
    )
    expected = model.predict(X)
    (tmp_path / "own.safetensors").unlink()
    np.testing.assert_array_equal(predict_elsewhere(model, X, tmp_path), expected)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"name": "default", "sha256": "0" * 64}, "sha256 000000000000…, but the installed"),
        (
            {"name": "of-another-version", "sha256": "0" * 64},
            "of-another-version.*install the version",
        ),
    ],
)
def test_other_weights_than_those_saved_are_an_error(state, message):
    with pytest.raises(WeightsError, match=message):
        Pretrained.__new__(Pretrained).__setstate__(state)


@pytest.mark.parametrize("name", ["default", "paper-predictive"])
def test_bundled_weights_and_their_cards(name):
    assert name in list_weights()
    pretrained, card = load_weights(name), load_card(name)
    assert pretrained.name == card["name"] == name
    for key in ("task", "date", "training_data", "config", "licence", "attribution", "versions"):
        assert card[key], key
    assert {"Na", "Cl", "Fe", "O"} <= set(card["elements_seen"])
    assert card["n_parameters"] == sum(p.numel() for p in pretrained.encoder.parameters())
    assert not pretrained.encoder.training
    json.dumps(card)


@pytest.mark.parametrize("encoder", ["cgcnn", "context"])
def test_saved_weights_come_back(encoder, tmp_path):
    own = untrained(encoder)
    save_weights(tmp_path / "own.safetensors", own)
    loaded = load_weights(str(tmp_path / "own.safetensors"))
    assert loaded.name is None
    assert loaded == own
    assert hash(loaded) == hash(own)
    assert loaded != untrained(encoder, n_channels=8)
    assert copy.deepcopy(own) == own
    assert loaded.card["config"] == own.card["config"]
    state, expected = loaded.encoder.state_dict(), own.encoder.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert load_weights(loaded) is loaded


def test_damaged_files_are_named(tmp_path):
    good = tmp_path / "good.safetensors"
    save_weights(good, untrained("cgcnn"))
    content = good.read_bytes()
    for name, damaged in {
        "cut": content[:-100],
        "header": b"\xff" * 16 + content[16:],
        "empty": b"",
        "text": b"no weights at all",
    }.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(WeightsError, match=f"{name} is no weights file of ssl_matfeat"):
            load_weights(tmp_path / name)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"card": "no json"},
        {"card": "[]"},
        {"card": json.dumps({"format": 1})},
        {"card": json.dumps({"format": 1, "config": {"encoder": "nonsense"}})},
        {"card": json.dumps({"format": 1, "config": {"encoder": "cgcnn", "depth": 3}})},
        {"card": json.dumps({"format": 1, "config": {"encoder": "cgcnn", "n_channels": 3}})},
        {"card": json.dumps({"format": 99, "config": {"encoder": "cgcnn"}})},
    ],
)
def test_files_of_something_else_are_refused(metadata, tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(WeightsError, match=r"other\.safetensors"):
        load_weights(path)


@pytest.mark.parametrize("weights", ["nonsense", "no/such/file.safetensors", ".", ""])
def test_what_is_neither_a_name_nor_a_file_is_refused(weights):
    with pytest.raises(WeightsError, match=r"neither one of default, .* nor an existing file"):
        SSLStructureFeaturizer(weights).fit([rock_salt()])
    with pytest.raises(WeightsError, match="no weights named"):
        load_card(weights)


def test_a_pretrainer_is_not_its_weights():
    with pytest.raises(TypeError, match="got SSLPretrainer; of a fitted SSLPretrainer pass its"):
        SSLStructureFeaturizer(weights=SSLPretrainer()).fit([rock_salt()])


@pytest.mark.parametrize("weights", ["default", untrained("context"), untrained("cgcnn")])
def test_skops_with_a_list_of_trusted_types(small_crystals, weights):
    X, y = small_crystals
    model = pipeline(weights=weights).fit(X[:40], y[:40])
    saved = skops.io.dumps(model)
    trusted = [  # as docs/persistence.rst has it
        "sklearn.tree._tree.Tree",
        "ssl_matfeat.featurizers.SSLStructureFeaturizer",
        "ssl_matfeat.weights._registry.Pretrained",
    ]
    assert skops.io.get_untrusted_types(data=saved) == trusted
    np.testing.assert_array_equal(
        skops.io.loads(saved, trusted=trusted).predict(X), model.predict(X)
    )


def test_files_of_one_name_and_time_in_two_folders(weight_files, tmp_path, monkeypatch):
    for kind in ("cgcnn", "context"):
        (tmp_path / kind).mkdir()
        copy = tmp_path / kind / "own.safetensors"
        copy.write_bytes(Path(weight_files[kind]).read_bytes())
        os.utime(copy, (1e9, 1e9))
        monkeypatch.chdir(tmp_path / kind)
        assert load_weights("own.safetensors").card["config"]["encoder"] == kind
