"""The training loop, without any crystal, and which checkpoints pretraining goes on from."""

import pytest
import torch
from conftest import SMALL_PRETRAINING, rock_salt, write_parquet

from ssl_matfeat import SSLPretrainer
from ssl_matfeat.training import TrainingOptions, train


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
