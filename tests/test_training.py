"""The training loop, without any crystal."""

import pytest
import torch

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
