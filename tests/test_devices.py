"""Training in other precisions, on other devices and in several processes."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SMALL_PRETRAINING, fcc, same_numbers, state_of, total_loss, write_parquet
from typer.testing import CliRunner

from ssl_matfeat import NEGNNRegressor, SSLPretrainer
from ssl_matfeat.backbones import BACKBONES
from ssl_matfeat.cli import app
from ssl_matfeat.devices import launch, make_fabric
from ssl_matfeat.graph import CrystalGraphs
from ssl_matfeat.pooling import pool_mean
from ssl_matfeat.training import TrainingOptions, train
from ssl_matfeat.weights import load_weights


@pytest.mark.parametrize("tasks", ["context", {"predictive": 1.0, "contrastive": 0.5}], ids=str)
def test_bfloat16_comes_close_to_single_precision(small_crystals, tasks):
    pytest.importorskip("lightning_fabric")
    options = {"max_epochs": 2, **SMALL_PRETRAINING}
    full = SSLPretrainer(tasks, **options).fit(small_crystals[0])
    half = SSLPretrainer(tasks, precision="bf16-mixed", **options).fit(small_crystals[0])
    for name, value in full.history_[0].items():
        if name.startswith("train_"):
            assert half.history_[0][name] == pytest.approx(value, rel=0.05)
    assert not same_numbers(state_of(half), state_of(full))
    assert {v.dtype for v in state_of(half).values() if v.is_floating_point()} == {torch.float32}


def test_processes_are_our_own_within_a_job_of_a_cluster(monkeypatch):
    pytest.importorskip("lightning_fabric")
    for name, value in {
        "NTASKS": "2", "NTASKS_PER_NODE": "2", "PROCID": "1", "LOCALID": "1", "JOB_ID": "7", "JOB_NAME": "job",
        "NNODES": "1", "NODEID": "0", "JOB_NODELIST": "node0",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    fabric = make_fabric("cpu", "bf16-mixed", 1)
    assert (fabric.world_size, fabric.global_rank) == (1, 0)
    assert make_fabric("cpu", "32-true", 2)._strategy.num_processes == 2


def test_states_in_bfloat16_are_summed_in_single_precision():
    batch = CrystalGraphs.from_structures([fcc() * (7, 7, 7)]).batch([0])
    mean = pool_mean(torch.full((343, 1), 1.0078125, dtype=torch.bfloat16), batch)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(1.0078125, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [*({"backbone": name} for name in BACKBONES), {"node_features": "ssl", "fine_tune": True}],
    ids=str,
)
def test_networks_in_bfloat16_come_close_to_single_precision(options, small_crystals):
    pytest.importorskip("lightning_fabric")
    X, y = small_crystals
    full, half = (
        NEGNNRegressor(
            **options, n_channels=8, max_epochs=5, lr=1e-2, random_state=0, precision=precision
        ).fit(X, y)
        for precision in ("32-true", "bf16-mixed")
    )
    assert half.loss_curve_ == pytest.approx(full.loss_curve_, rel=0.05)
    assert half.loss_curve_ != full.loss_curve_
    assert {p.dtype for p in half.networks_[0].parameters()} == {torch.float32}


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
    options = {"max_epochs": 1, **SMALL_PRETRAINING}
    with pytest.raises(ImportError, match=r"n_devices=2 need .*pip install lightning-fabric"):
        SSLPretrainer("predictive", n_devices=2, **options).fit(small_crystals[0])
    SSLPretrainer("predictive", **options).fit(small_crystals[0])


def test_command_takes_task_and_precision(small_crystals, tmp_path):
    pytest.importorskip("lightning_fabric")
    pytest.importorskip("matplotlib")
    path = write_parquet(small_crystals[0][:20], tmp_path / "own.parquet")
    output = tmp_path / "own.safetensors"
    arguments = ["pretrain", str(path), str(output), "--task", "denoising", "--epochs", "1"]
    result = CliRunner().invoke(app, [*arguments, "--precision", "bf16-mixed"])
    assert result.exit_code == 0, result.output
    card = load_weights(output).card
    assert card["task"] == {"denoising": 1.0}
    assert card["parameters"]["precision"] == "bf16-mixed"
    assert not output.with_suffix(".checkpoint").exists()
    refused = CliRunner().invoke(app, [*arguments, "--overwrite", "--device", "cuda:97"])
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
    options = {**SMALL_PRETRAINING, "lr": 1e-2, "n_devices": 2, "batch_size": 500}
    pretrainer = SSLPretrainer({"predictive": 1.0, "denoising": 1.0}, max_epochs=4, **options)
    first, *_, last = pretrainer.fit(small_crystals[0]).history_
    assert total_loss(last, "train_") < total_loss(first, "train_") - 0.05
    assert np.isfinite(list(last.values())).all()
    assert np.isfinite(list(pretrainer.metrics_.values())).all()
    assert pretrainer.weights_.encoder.embed_node.weight.device.type == "cpu"
