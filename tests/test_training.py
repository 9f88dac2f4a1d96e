"""The training loop, without any crystal, and which checkpoints pretraining goes on from."""

import pytest
import torch
from conftest import SMALL_PRETRAINING, rock_salt, write_parquet

import ssl_matfeat
from ssl_matfeat import SSLPretrainer
from ssl_matfeat.training import TrainingOptions, _schedule, train


@pytest.mark.parametrize("patience", [None, 3])
def test_training_resumes_with_dropout_bit_by_bit(patience, tmp_path):
    x = torch.linspace(-1, 1, 32)[:, None]

    def run(checkpoint, interrupted_in=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(1, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1)
        )
        epochs = iter(range(12))

        def batches(generator):
            if next(epochs) == interrupted_in:
                raise KeyboardInterrupt
            return iter(x.split(8))

        history = train(
            model,
            lambda batch, generator: {"loss": (model(batch) - batch.square()).abs().mean()},
            batches,
            lambda generator: iter([x]),
            n_batches=4,
            options=TrainingOptions(max_epochs=12, patience=patience, lr=0.05),
            checkpoint=checkpoint,
        )
        return history, model(x)

    history, predicted = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", interrupted_in=3)
    resumed, after = run(tmp_path / "parts")
    assert history == resumed
    assert torch.equal(predicted, after)


def test_epoch_without_a_batch_is_an_error():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="epoch 1 had no batch to learn from; train on more"):
        train(model, lambda *_: {}, lambda _: iter([]), None, 1, TrainingOptions())


def test_a_gradient_that_is_not_finite_is_an_error():
    """Though the loss itself is 0: the slope of a root is not."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match=r"diverged in epoch 1: .*norm of the gradient.*nan"):
        train(
            model,
            lambda x, _: {"loss": model(x).abs().sum().sqrt()},
            lambda _: iter([torch.ones(1, 1)]),
            None,
            1,
            TrainingOptions(max_epochs=1),
        )


def test_a_validation_loss_that_is_not_finite_is_an_error():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"diverged in epoch 1: \{'loss': nan\}"):
        train(
            model,
            lambda x, _: {"loss": model(x).square().sum()},
            lambda _: iter([torch.ones(1, 1)]),
            lambda _: iter([torch.full((1, 1), torch.nan)]),
            1,
            TrainingOptions(max_epochs=1, patience=2),
        )


@pytest.mark.parametrize(
    "change", [{"lr": 1e-4}, {"tasks": {"predictive": 2.0}}, {"batch_size": 1501}], ids=str
)
def test_checkpoint_of_another_training_is_refused(change, small_crystals, tmp_path):
    X = small_crystals[0][:20]
    options = {"tasks": "predictive", "max_epochs": 1, **SMALL_PRETRAINING}
    SSLPretrainer(**options).fit(X, checkpoint=tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="written by another training"):
        SSLPretrainer(**(options | change)).fit(X, checkpoint=tmp_path / "checkpoint")


def test_checkpoint_with_other_rows_for_validation_is_refused(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING)
    split = ["validation", *["pretrain"] * 19]
    path = write_parquet(X, tmp_path / "corpus.parquet", split=split)
    pretrainer.fit(path, checkpoint=tmp_path / "checkpoint")
    write_parquet(X, path, split=split[::-1])
    with pytest.raises(ValueError, match="written by another training"):
        pretrainer.fit(path, checkpoint=tmp_path / "checkpoint")


def test_checkpoint_with_larger_crystals_for_validation_is_refused(small_crystals, tmp_path):
    X = [*small_crystals[0][:10], rock_salt() * (2, 2, 1)]
    path = write_parquet(X, tmp_path / "a.parquet", split=[*["pretrain"] * 9, *["validation"] * 2])
    pretrainer = SSLPretrainer("predictive", max_epochs=1, max_sites=31, **SMALL_PRETRAINING)
    pretrainer.fit(path, checkpoint=tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="written by another training"):
        pretrainer.set_params(max_sites=32).fit(path, checkpoint=tmp_path / "checkpoint")


def test_checkpoint_of_another_precision_is_refused(small_crystals, tmp_path):
    pytest.importorskip("lightning_fabric")
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING)
    pretrainer.fit(small_crystals[0][:20], checkpoint=tmp_path / "checkpoint")
    pretrainer.precision = "bf16-mixed"
    with pytest.raises(ValueError, match=r"precision=32-true, now .* precision=bf16-mixed"):
        pretrainer.fit(small_crystals[0][:20], checkpoint=tmp_path / "checkpoint")


def test_checkpoint_of_another_version_is_refused(small_crystals, tmp_path, monkeypatch):
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING)
    pretrainer.fit(small_crystals[0][:20], checkpoint=tmp_path / "checkpoint")
    monkeypatch.setattr(ssl_matfeat, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"ssl_matfeat=9\.9\.9"):
        pretrainer.fit(small_crystals[0][:20], checkpoint=tmp_path / "checkpoint")


def test_damaged_checkpoint(small_crystals, tmp_path):
    X, path = small_crystals[0][:20], tmp_path / "checkpoint"
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING)
    whole = pretrainer.fit(X, checkpoint=path).weights_
    written = path.read_bytes()
    torch.save(whole.encoder.state_dict(), tmp_path / "other")
    other = (tmp_path / "other").read_bytes()
    for damaged in (b"", b"no checkpoint", written[:-10], written[:-1000], other):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint is damaged .*; remove it"):
            pretrainer.fit(X, checkpoint=path)


def test_checkpoint_of_other_structures_is_refused(small_crystals, tmp_path):
    X = small_crystals[0][:20]
    pretrainer = SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING)
    pretrainer.fit(X, checkpoint=tmp_path / "checkpoint")
    strained = [s.copy() for s in X]
    strained[3].scale_lattice(1.001 * strained[3].volume)
    with pytest.raises(ValueError, match="structures"):
        pretrainer.fit(strained, checkpoint=tmp_path / "checkpoint")


def trained_line(**changed):
    """Learn y = 3 x from noisy steps; return the weight, and the validation loss of every epoch."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1, bias=False)
    x = torch.randn(400, 1)
    noise = 5 * torch.randn(400, 1)
    options = TrainingOptions(**{"max_epochs": 4, "lr": 0.3, **changed})
    history = train(
        model,
        lambda batch, _: {"loss": (model(batch[0]) - batch[1]).square().mean()},
        lambda _: zip(x.split(4), (3 * x + noise).split(4), strict=True),
        lambda _: iter([(x, 3 * x)]),
        n_batches=100,
        options=options,
    )
    return float(model.weight.detach()), [record["validation_loss"] for record in history]


def test_average_of_the_parameters_is_steadier_than_the_last_ones():
    assert trained_line(ema_decay=0.95)[1][1] < trained_line()[1][1] / 2


def test_average_of_few_steps_forgets_where_they_began():
    average, last = (trained_line(max_epochs=1, ema_decay=d)[0] for d in (0.999, None))
    assert average == pytest.approx(last, abs=0.1)
    assert abs(last) > 2  # from less than 1


@pytest.mark.parametrize(
    "changed",
    [{"weight_decay": 1.0}, {"ema_decay": 0.95}, {"lr": 0.1}, {"max_epochs": 10}],
    ids=str,
)
def test_no_option_of_training_is_ignored(changed):
    assert abs(trained_line(**changed)[0] - trained_line()[0]) > 1e-3


def test_learning_rate_rises_then_falls_along_a_cosine():
    options = TrainingOptions(max_epochs=10)
    rates = [_schedule(options, done) for done in (0, 0.5, 1, 5, 10)]
    assert rates == pytest.approx([0.05, 0.55 * 0.9938, 0.9755, 0.5, 0], abs=1e-3)


def test_long_steps_are_clipped():
    model = torch.nn.Linear(1, 1, bias=False)

    def losses(batch, _):
        return {"loss": 1e6 * model(batch).sum()}

    x = torch.ones(1, 1)
    train(model, losses, lambda _: iter([x, x]), None, 2, TrainingOptions(max_epochs=1))
    assert float(model.weight.grad.norm()) == pytest.approx(10)


def test_checkpoints_that_differ_in_their_suffix_keep_apart(small_crystals, tmp_path, monkeypatch):
    written = []
    save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda state, path: (written.append(path), save(state, path))
    )
    for name in ("run.a", "run.b"):
        SSLPretrainer("predictive", max_epochs=1, **SMALL_PRETRAINING).fit(
            small_crystals[0][:20], checkpoint=tmp_path / name
        )
    assert len(set(written)) == 2
