"""What a block is worth to a model."""

import numpy as np
import pandas as pd
import pytest
from conftest import quick_network
from sklearn.inspection import permutation_importance
from sklearn.linear_model import Ridge

from ssl_matfeat.inspection import block_importance, plot_losses

BLOCKS = ["twins", "twins", "noise", "weak"]


@pytest.fixture
def fitted():
    """Two columns that tell the same, one of noise, one that tells a little."""
    rng = np.random.default_rng(0)
    telling, noise, weak = rng.normal(size=(3, 400))
    X = np.column_stack([telling, telling, noise, weak])
    y = telling + 0.3 * weak
    return Ridge().fit(X[:200], y[:200]), X[200:], y[200:]


def test_twins_cannot_stand_in_for_each_other(fitted):
    model, X, y = fitted
    before = X.copy()
    found = block_importance(model, X, y, BLOCKS, n_repeats=20)
    assert list(found.index) == ["twins", "noise", "weak"]
    # Permuting a column of variance v and weight w costs 2 w² v / var(y) of R².
    np.testing.assert_allclose(found["mean"], [2 / 1.09, 0, 2 * 0.09 / 1.09], atol=0.15)
    assert found.loc["noise", "mean"] < found.loc["weak", "mean"] / 10
    assert found.loc["twins", "std"] > 0
    one_by_one = permutation_importance(model, X, y, n_repeats=20, random_state=0).importances_mean
    assert one_by_one[:2].sum() < 0.7 * found.loc["twins", "mean"]  # what the function is for
    np.testing.assert_array_equal(X, before)


def test_frames_and_scorers(fitted):
    model, X, y = fitted
    names = ["a", "b", "c", "d"]
    of_frame = Ridge().fit(pd.DataFrame(X, columns=names), y)
    of_array = Ridge().fit(X, y)
    options = {"scoring": "neg_mean_absolute_error", "n_repeats": 2}
    expected = block_importance(of_array, X, y, BLOCKS, **options)
    found = block_importance(of_frame, pd.DataFrame(X, columns=names), y, BLOCKS, **options)
    pd.testing.assert_frame_equal(found, expected)
    by_score = block_importance(model, X, y, BLOCKS, n_repeats=2)
    assert not np.allclose(found, by_score)


def test_structures_in_place_of_columns_are_refused(fitted):
    model, _, y = fitted
    with pytest.raises(ValueError, match=r"pass pipeline\[1:\] as model"):
        block_importance(model, [object()] * len(y), y, BLOCKS)


def test_a_block_for_each_column(fitted):
    with pytest.raises(
        ValueError, match=r"shape \(2,\), but X has 4 columns; name the block of each"
    ):
        block_importance(*fitted, ["twins", "noise"])


def test_losses_are_drawn_of_each_member(few_crystals):
    network = quick_network(n_ensemble=2, early_stopping=True).fit(*few_crystals)
    (axes,) = plot_losses(network.history_).axes
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 2, 2, 2]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "validation"]
    without = quick_network().fit(*few_crystals)
    assert len(plot_losses(without.history_).axes[0].lines) == 1
    with pytest.raises(ValueError, match="nothing has been trained"):
        plot_losses([])
