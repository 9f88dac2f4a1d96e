"""Self-supervised training: it learns, goes on where it stopped, and does not leak its answers."""

import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    CRYSTALS,
    batch_of,
    bcc,
    fcc,
    rock_salt,
    shake,
    substitute,
    triclinic,
    untrained,
)
from pymatgen.core import Lattice, Structure
from typer.testing import CliRunner

from ssl_matfeat import SSLPretrainer, SSLStructureFeaturizer
from ssl_matfeat.cli import app
from ssl_matfeat.pretext import Pretext
from ssl_matfeat.pretext.damage import choose_sites, supercell
from ssl_matfeat.pretext.paper import ContrastiveTask, PredictiveTask, group_and_period
from ssl_matfeat.training import TrainingOptions, launch, make_fabric, train
from ssl_matfeat.weights import load_weights

ALLOY = Structure(Lattice.cubic(2.9), [{"Fe": 0.5, "Co": 0.5}], [[0, 0, 0]])
SMALL = {"n_channels": 8, "batch_size": 1000, "validation_fraction": 0.2, "ema_decay": 0.9}
TASKS = ["context", "predictive", "contrastive", {"predictive": 1.0, "contrastive": 0.5}]


def state(pretrainer):
    return pretrainer.weights_.encoder.state_dict()


def same_numbers(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def total(record, which):
    return sum(value for name, value in record.items() if name.startswith(which))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tasks", TASKS, ids=str)
def test_fit_reduces_the_loss(small_crystals, tasks):
    pretrainer = SSLPretrainer(tasks, max_epochs=4, lr=1e-2, **SMALL).fit(small_crystals[0])
    first, *_, last = pretrainer.history_
    assert total(last, "train_") < total(first, "train_") - 0.05
    assert [record["epoch"] for record in pretrainer.history_] == [1, 2, 3, 4]
    assert all(np.isfinite(list(record.values())).all() for record in pretrainer.history_)
    assert pretrainer.metrics_
    card = pretrainer.weights_.card
    assert card["training_data"] == {"n_training": 48, "n_validation": 12, "max_sites": 40}
    assert not pretrainer.weights_.encoder.training


def test_same_seed_gives_the_same_weights(small_crystals):
    X = small_crystals[0][:20]
    one, two = (SSLPretrainer("predictive", max_epochs=1, **SMALL).fit(X) for _ in range(2))
    other = SSLPretrainer("predictive", max_epochs=1, random_state=1, **SMALL).fit(X)
    assert same_numbers(state(one), state(two))
    assert not same_numbers(state(one), state(other))


def test_trained_weights_serve_a_featurizer_and_survive_a_file(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL).fit(X)
    pretrainer.save(tmp_path / "own.safetensors")
    options = {"layers": (0, 5), "pooling": ("mean",)}
    seen = set(pretrainer.weights_.card["elements_seen"])
    X = [s for s in X if {e.symbol for e in s.elements} <= seen]
    rows = SSLStructureFeaturizer(pretrainer.weights_, **options).fit_transform(X)
    again = SSLStructureFeaturizer(tmp_path / "own.safetensors", **options).fit_transform(X)
    np.testing.assert_array_equal(rows, again)
    assert rows.shape == (len(X), 16)
    assert len(X) > 5


@pytest.mark.parametrize("tasks", ["context", "predictive"])
def test_interrupted_training_goes_on_to_the_same_bits(
    small_crystals, tmp_path, tasks, monkeypatch
):
    X = small_crystals[0][:30]
    options = {"max_epochs": 3, **SMALL}
    through = SSLPretrainer(tasks, **options).fit(X)
    losses_of, calls = Pretext.losses, []

    def interrupted(self, batch, generator):
        calls.append(1)
        if self.training and (tmp_path / "checkpoint").exists():
            raise KeyboardInterrupt
        return losses_of(self, batch, generator)

    with monkeypatch.context() as patch:
        patch.setattr(Pretext, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            SSLPretrainer(tasks, **options).fit(X, checkpoint=tmp_path / "checkpoint")
    assert calls
    resumed = SSLPretrainer(tasks, **options).fit(X, checkpoint=tmp_path / "checkpoint")
    assert resumed.history_ == through.history_
    assert same_numbers(state(resumed), state(through))
    fresh = SSLPretrainer(tasks, **{**options, "max_epochs": 1}).fit(X)  # negative control
    assert not same_numbers(state(fresh), state(through))


def parquet(structures, path, index=None, **columns):
    frame = pd.DataFrame(
        {
            "numbers": [[site.specie.Z for site in s] for s in structures],
            "lattice": [s.lattice.matrix.ravel() for s in structures],
            "frac_coords": [s.frac_coords.ravel() for s in structures],
            **columns,
        },
        index=index,
    )
    frame.to_parquet(path)
    return path


def test_parquet_without_split_is_like_the_list(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    options = {"max_epochs": 1, "tasks": "predictive", **SMALL}
    path = parquet(X, tmp_path / "all.parquet")
    of_file, of_list = SSLPretrainer(**options).fit(path), SSLPretrainer(**options).fit(X)
    assert of_file.weights_.card["training_data"] == of_list.weights_.card["training_data"]
    for key, value in of_list.history_[0].items():
        assert of_file.history_[0][key] == pytest.approx(value, rel=1e-3)


def test_parquet_with_split_trains_on_its_rows_alone(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    split = ["pretrain"] * 10 + ["test"] * 5 + ["validation"] * 4 + ["pretrain"]
    path = parquet(X, tmp_path / "split.parquet", split=split)
    card = SSLPretrainer("predictive", max_epochs=1, **SMALL).fit(str(path)).weights_.card
    assert card["training_data"]["n_training"] == 11
    assert card["training_data"]["n_validation"] == 4
    trained = {site.specie.symbol for s in [*X[:10], X[19]] for site in s}
    assert set(card["elements_seen"]) == trained


@pytest.mark.parametrize("index", [None, [f"mp-{i}" for i in range(20)], [0] * 20])
def test_bad_row_of_a_parquet_is_skipped_and_reported(small_crystals, tmp_path, index):
    X = list(small_crystals[0][:20])
    X[3] = Structure(X[3].lattice, ["Fe", "O"], [[0, 0, 0], [0, 0, 0]])
    split = ["pretrain"] * 15 + ["validation"] * 5
    path = parquet(X, tmp_path / "bad.parquet", index=index, split=split)
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL).fit(path)
    assert pretrainer.weights_.card["training_data"]["n_training"] == 14
    assert list(pretrainer.errors_) == [3]
    assert "closer than 0.3 Å" in pretrainer.errors_[3]


def test_bad_structure_is_skipped_and_reported(small_crystals):
    X = [*small_crystals[0][:20], ALLOY, None]
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL).fit(X)
    assert list(pretrainer.errors_) == [20, 21]
    assert "disordered" in pretrainer.errors_[20]
    training = pretrainer.weights_.card["training_data"]
    assert training["n_training"] + training["n_validation"] == 20


def test_no_usable_structure_is_an_error(small_crystals):
    with pytest.raises(
        ValueError, match=r"none of 2 structures is usable; the first: .*disordered"
    ):
        SSLPretrainer().fit([ALLOY, ALLOY])
    with pytest.raises(ValueError, match="max_sites=1 and validation_fraction"):
        SSLPretrainer(max_sites=1).fit(small_crystals[0][:5])
    with pytest.raises(TypeError, match="X is one Structure"):
        SSLPretrainer().fit(rock_salt())


def test_one_atom_cells_alone_in_a_batch_can_be_trained_on():
    metals = [fcc(element=e) for e in ("Cu", "Ag", "Au", "Al", "Ni", "Pd")]
    for tasks in ("context", "predictive"):
        pretrainer = SSLPretrainer(tasks, n_channels=8, max_epochs=1, batch_size=1)
        assert np.isfinite(list(pretrainer.fit(metals).history_[0].values())).all()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("nonsense", "tasks must be of .*'context'.*'nonsense'"),
        ({}, "tasks must be of"),
        ({"context": 1.0, "nonsense": 1.0}, "tasks must be of"),
        ({"context": 1.0, "predictive": 1.0}, "train different encoders"),
    ],
)
def test_wrong_tasks_are_refused(tasks, message, small_crystals):
    with pytest.raises(ValueError, match=message):
        SSLPretrainer(tasks).fit(small_crystals[0])


def test_losses_of_tasks_are_weighed_and_added(small_crystals):
    encoder = untrained("cgcnn").encoder
    batch = batch_of(*small_crystals[0][:8], dtype=torch.float32)
    torch.manual_seed(0)
    pretext = Pretext(encoder, {"predictive": 1.0, "contrastive": 0.5})
    losses = pretext.losses(batch, generator())
    assert set(losses) == {"group", "period", "edge", "contrastive"}
    pretext.weights = {"predictive": 2.0, "contrastive": 0.5}
    double = pretext.losses(batch, generator())
    torch.testing.assert_close(double["group"], 2 * losses["group"])
    torch.testing.assert_close(double["contrastive"], losses["contrastive"])


def predict(task, encoder, structure):
    return task.predict(encoder, batch_of(structure, dtype=torch.float32), generator())


def test_hidden_atoms_and_edges_do_not_leak():
    torch.manual_seed(0)
    encoder = untrained("cgcnn").encoder
    task = PredictiveTask(encoder)
    salt = triclinic() * (2, 2, 2)
    batch = batch_of(salt, dtype=torch.float32)
    hidden = choose_sites(batch, 0.15, generator())
    site = int(torch.nonzero(hidden)[0])
    logits, targets = predict(task, encoder, salt)
    for damaged in (shake(salt, site, 2e-3), substitute(salt, site, "Br")):
        assert torch.equal(batch.edge_index, batch_of(damaged).edge_index)
        found, other = predict(task, encoder, damaged)
        for name in ("group", "period", "edge"):
            torch.testing.assert_close(found[name], logits[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(other["group"], targets["group"])
    seen = int(torch.nonzero(~hidden)[0])  # negative control: atoms and edges that are not hidden
    for damaged in (shake(salt, seen, 2e-3), substitute(salt, seen, "Br")):
        found, _ = predict(task, encoder, damaged)
        assert (found["edge"] - logits["edge"]).abs().max() > 1e-6


def test_targets_of_the_paper():
    group, period = group_and_period()
    assert group[[1, 3, 26, 17, 18, 57, 92]].tolist() == [0, 0, 7, 16, 17, 18, 18]
    assert period[[1, 3, 26, 55]].tolist() == [0, 1, 3, 5]
    assert group.max() == 18
    assert period.max() <= 8


def test_each_crystal_hides_its_share_of_sites():
    structures = [*CRYSTALS.values(), *(fcc() * (n, 1, 1) for n in (5, 20, 40, 60, 120))]
    batch = batch_of(*structures)
    chosen = choose_sites(batch, 0.15, generator())
    counts = torch.bincount(batch.batch[chosen], minlength=len(structures))
    assert counts.tolist() == [int(0.15 * len(s) + 1) for s in structures]
    assert not torch.equal(chosen, choose_sites(batch, 0.15, generator(1)))


@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 1, 1), (1, 2, 3), (2, 2, 2)])
def test_supercell_of_a_graph_is_the_graph_of_the_supercell(repeats):
    encoder = untrained("cgcnn").encoder.double()
    for structure in (rock_salt(), triclinic(), bcc(), fcc()):
        ours = supercell(batch_of(structure), np.array(repeats))
        theirs = batch_of(structure * repeats)
        assert torch.equal(ours.numbers, theirs.numbers)
        torch.testing.assert_close(ours.volume, theirs.volume)
        n_sites = len(ours.numbers)
        listed = [
            torch.bincount(batch.edge_index[1], minlength=n_sites) for batch in (ours, theirs)
        ]
        assert torch.equal(*listed)
        for a, b in zip(encoder(ours), encoder(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        between = zip(
            ours.edge_index.T.tolist(), ours.distance.round(decimals=6).tolist(), strict=True
        )
        expected = zip(
            theirs.edge_index.T.tolist(), theirs.distance.round(decimals=6).tolist(), strict=True
        )
        assert sorted(between) == sorted(expected)


def test_views_of_a_crystal_differ_and_know_each_other_best(small_crystals):
    torch.manual_seed(0)
    encoder = untrained("cgcnn").encoder
    task = ContrastiveTask(encoder)
    batch = batch_of(*small_crystals[0][:8], dtype=torch.float32)
    similarity = task.similarity(encoder, batch, generator())
    assert similarity.shape == (8, 8)
    assert similarity.abs().max() <= 10.001  # cosines over the temperature
    assert (similarity.diagonal() < 10 - 1e-4).all()  # damaged differently
    off = similarity[~torch.eye(8, dtype=torch.bool)]
    assert similarity.diagonal().mean() > off.mean()


def test_checkpoint_of_another_training_is_refused(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    options = {"tasks": "predictive", "max_epochs": 1, **SMALL}
    SSLPretrainer(**options).fit(X, checkpoint=tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="written by another training"):
        SSLPretrainer(**{**options, "lr": 1e-4}).fit(X, checkpoint=tmp_path / "checkpoint")


def test_impossible_atomic_number_in_a_parquet_is_reported(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    path = parquet(X, tmp_path / "numbers.parquet")
    frame = pd.read_parquet(path)
    frame.at[2, "numbers"] = np.zeros(len(X[2]), dtype=int)
    frame.at[5, "numbers"] = np.array([300] * len(X[5]))
    frame.at[7, "numbers"] = np.array([1] * (len(X[7]) + 1))
    frame.to_parquet(path)
    errors = SSLPretrainer("predictive", max_epochs=1, **SMALL).fit(path).errors_
    assert list(errors) == [2, 5, 7]
    assert "atomic number 0" in errors[2]
    assert "atomic number 300" in errors[5]
    assert "coordinates" in errors[7]


@pytest.mark.parametrize("tasks", ["context", {"predictive": 1.0, "contrastive": 0.5}], ids=str)
def test_bfloat16_comes_close_to_single_precision(small_crystals, tasks):
    pytest.importorskip("lightning_fabric")
    options = {"max_epochs": 2, **SMALL}
    full = SSLPretrainer(tasks, **options).fit(small_crystals[0])
    half = SSLPretrainer(tasks, precision="bf16-mixed", **options).fit(small_crystals[0])
    for name, value in full.history_[0].items():
        if name.startswith("train_"):
            assert half.history_[0][name] == pytest.approx(value, rel=0.05)
    assert not same_numbers(state(half), state(full))
    assert {v.dtype for v in state(half).values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be 'cpu', 'cuda' or 'cuda:0', ..., got 'tpu'"),
        ({"device": "cuda:x"}, "got 'cuda:x'"),
        ({"device": "cuda:97"}, "device='cuda:97' and n_devices=1, but torch sees . CUDA devices"),
        ({"device": "cuda:0", "n_devices": 2}, "is one device, but n_devices=2; set device='cuda'"),
        ({"precision": "bf16"}, "precision must be one of .*'bf16-mixed'.*, got 'bf16'"),
        ({"n_devices": 0}, "n_devices == 0"),
        ({"n_devices": 2, "batch_size": 10**6}, "n_devices=2 processes .* lower batch_size"),
    ],
    ids=str,
)
def test_impossible_devices_are_refused(options, message, small_crystals):
    pytest.importorskip("lightning_fabric")
    with pytest.raises(ValueError, match=message):
        SSLPretrainer("predictive", **options).fit(small_crystals[0][:20])


def test_missing_extra_is_named_and_not_needed_on_one_cpu(small_crystals, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)  # as if it were not installed
    options = {"max_epochs": 1, **SMALL}
    with pytest.raises(ImportError, match=r"n_devices=2 need .*ssl-matfeat\[distributed\]"):
        SSLPretrainer("predictive", n_devices=2, **options).fit(small_crystals[0])
    SSLPretrainer("predictive", **options).fit(small_crystals[0])


def test_command_takes_task_and_precision(small_crystals, tmp_path):
    pytest.importorskip("lightning_fabric")
    pytest.importorskip("matplotlib")
    path = parquet(small_crystals[0][:20], tmp_path / "own.parquet")
    output = tmp_path / "own.safetensors"
    arguments = ["pretrain", str(path), str(output), "--task", "denoising", "--epochs", "1"]
    result = CliRunner().invoke(app, [*arguments, "--precision", "bf16-mixed"])
    assert result.exit_code == 0, result.output
    card = load_weights(output).card
    assert card["task"] == {"denoising": 1.0}
    assert card["parameters"]["precision"] == "bf16-mixed"
    refused = CliRunner().invoke(app, [*arguments, "--device", "cuda:97"])
    assert refused.exit_code == 2
    assert "cuda:97" in refused.output


def learn_line(fabric, model, noise=0.0, checkpoint=None, fail_in=None):
    """Fit a line; a step of two processes sees the same 16 points as one of a single process."""
    rank, n_processes = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
    pieces = torch.linspace(-1, 1, 64)[:, None].split(16 // n_processes)
    epochs = iter(range(5))

    def losses(x, generator):
        y = 3 * x + 1 + noise * torch.randn(x.shape, generator=generator)
        return {"loss": (model(x) - y).square().mean()}

    def batches(generator):
        if next(epochs) == fail_in:
            raise RuntimeError("the machine went down")
        return iter(pieces[rank::n_processes])

    return train(
        model,
        losses,
        batches,
        lambda generator: iter(pieces),
        n_batches=4,
        options=TrainingOptions(max_epochs=5, lr=0.1),
        checkpoint=checkpoint,
        fabric=fabric,
    )


def line():
    torch.manual_seed(0)
    return torch.nn.Linear(1, 1)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_twice_the_batch():
    pytest.importorskip("lightning_fabric")
    alone, together = line(), line()
    expected = learn_line(None, alone)
    history = launch(make_fabric("cpu", "32-true", 2), learn_line, together)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(together.get_parameter(name), parameter)
        assert (parameter - line().get_parameter(name)).abs().max() > 0.1
    for record, other in zip(history, expected, strict=True):
        assert record == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_to_the_same_bits(tmp_path):
    pytest.importorskip("lightning_fabric")
    fabric = make_fabric("cpu", "32-true", 2)
    learn = partial(learn_line, noise=1.0)
    through, resumed = line(), line()
    history = launch(fabric, learn, through)
    interrupted = partial(learn, checkpoint=tmp_path / "checkpoint", fail_in=3)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="machine went down"):
        launch(fabric, interrupted, line())
    assert len(torch.load(tmp_path / "checkpoint", weights_only=True)["history"]) == 3
    again = launch(fabric, partial(learn, checkpoint=tmp_path / "checkpoint"), resumed)
    assert again == history
    assert same_numbers(resumed.state_dict(), through.state_dict())


@pytest.mark.slow
def test_two_processes_train_an_encoder(small_crystals):
    pytest.importorskip("lightning_fabric")
    options = {**SMALL, "lr": 1e-2, "n_devices": 2, "batch_size": 500}
    pretrainer = SSLPretrainer({"predictive": 1.0, "denoising": 1.0}, max_epochs=4, **options)
    first, *_, last = pretrainer.fit(small_crystals[0]).history_
    assert total(last, "train_") < total(first, "train_") - 0.05
    assert np.isfinite(list(last.values())).all()
    assert np.isfinite(list(pretrainer.metrics_.values())).all()
    assert pretrainer.weights_.encoder.embed_node.weight.device.type == "cpu"
