"""Prototypes of environments: the kernel that their columns stand for, few or equal sites, what a card can say."""

import numpy as np
import pytest
import torch
from conftest import (
    CRYSTALS,
    SMALL_PRETRAINING,
    batch_of,
    rattled_salt,
    same_numbers,
    untrained,
)

from ssl_matfeat import SSLAtomFeaturizer, SSLPretrainer
from ssl_matfeat.channels import SHELL_CHANNELS
from ssl_matfeat.environments import Environments
from ssl_matfeat.inspection import environment_prototypes


def learned(sites, n_prototypes=6, n_inputs=(2, 3), shares=(1.0, 0.5)):
    environments = Environments(n_inputs, shares, n_prototypes).double()
    environments.learn(sites, random_state=0)
    return environments


@pytest.fixture
def sites():
    return np.random.default_rng(0).normal([0, 5, -1, 0, 100], [1, 2, 3, 0.1, 10], size=(500, 5))


def kernel_of_blocks(a, b, std):
    """exp(-(2/3 of the mean square over two channels + 1/3 of that over three) / 2), channels in their std."""
    square = ((a - b) / std) ** 2
    return np.exp(-(2 / 3 * square[..., :2].mean(-1) + 1 / 3 * square[..., 2:].mean(-1)) / 2)


def test_scalar_products_of_prototypes_are_their_kernel(sites):
    environments = learned(sites)
    prototypes = environments.unscaled_prototypes()
    columns = environments(prototypes).numpy()
    at = prototypes.numpy()
    expected = kernel_of_blocks(at[:, None], at[None], sites.std(axis=0))
    np.testing.assert_allclose(columns @ columns.T, expected, atol=1e-6)
    assert expected[0, 1] < 0.9


def test_distance_of_means_is_the_discrepancy_of_two_crystals(sites):
    environments = learned(sites)
    prototypes = environments.unscaled_prototypes()
    one, other = [0, 0, 1], [2, 3, 4, 4]
    columns = environments(prototypes).numpy()
    distance = np.square(columns[one].mean(0) - columns[other].mean(0)).sum()
    at = prototypes.numpy()
    k = kernel_of_blocks(at[:, None], at[None], sites.std(axis=0))
    expected = k[np.ix_(one, one)].mean() + k[np.ix_(other, other)].mean()
    assert distance == pytest.approx(expected - 2 * k[np.ix_(one, other)].mean(), abs=1e-6)


def test_more_prototypes_come_closer_to_the_kernel(sites):
    expected = kernel_of_blocks(sites[:100, None], sites[None, :100], sites.std(axis=0))
    errors = []
    for n_prototypes in (3, 30, 200):
        columns = learned(sites, n_prototypes)(torch.from_numpy(sites[:100])).numpy()
        errors.append(np.abs(columns @ columns.T - expected).mean())
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_fewer_different_sites_than_prototypes_leave_columns_of_zeros(sites):
    few = np.repeat(sites[:4], 25, axis=0)
    environments = learned(few)
    columns = environments(torch.from_numpy(few)).numpy()
    assert (columns[:, 4:] == 0).all()
    np.testing.assert_allclose(np.square(columns).sum(1), 1, atol=1e-6)


def test_a_channel_that_never_varied_says_nothing(sites):
    sites[:, 3] = 0.7
    environments = learned(sites)
    moved = torch.from_numpy(sites[:5].copy())
    before = environments(moved)
    moved[:, 3] = 1e3
    assert torch.equal(environments(moved), before)
    moved[:, 2] += 1.0  # negative control
    assert not torch.equal(environments(moved), before)


def test_a_channel_counts_no_more_than_five_deviations(sites):
    environments = learned(sites)
    far = torch.from_numpy(sites[:5].copy())
    far[:, 1] = sites[:, 1].mean() + 5 * sites[:, 1].std()
    at_the_limit = environments(far)
    far[:, 1] = 1e6
    torch.testing.assert_close(environments(far), at_the_limit, rtol=1e-5, atol=1e-7)
    far[:, 1] = sites[:, 1].mean() + 4 * sites[:, 1].std()  # negative control
    assert (environments(far) - at_the_limit).abs().max() > 1e-4


def test_learning_again_finds_the_same(sites):
    one, other = learned(sites), learned(sites)
    assert torch.equal(one.prototypes, other.prototypes)
    assert torch.equal(one.mixing, other.mixing)


def test_layer_tells_environments_of_one_element_apart():
    encoder = untrained("context").encoder.double()
    batch = batch_of(rattled_salt(), CRYSTALS["NaCl"])
    (columns,) = encoder.describe(batch, ["environment"])
    sodium = columns[batch.numbers == 11]
    assert torch.pdist(sodium[-4:]).max() < 1e-10  # those of the perfect crystal are all alike
    assert torch.pdist(sodium[:32]).min() > 1e-4


def test_pretraining_finds_prototypes(small_crystals):
    X, _ = small_crystals
    options = {**SMALL_PRETRAINING, "max_epochs": 1, "max_sites": 4, "random_state": 2**40}
    one, other = (SSLPretrainer(**options).fit(X).weights_ for _ in range(2))
    buffers = one.encoder.environments.state_dict(), other.encoder.environments.state_dict()
    assert same_numbers(*buffers)
    table = environment_prototypes(one)
    assert 50 < len(table) <= 192
    # There are fewer different sites than prototypes, so that each is one: also in crystals too large to be trained on.
    small, large = (
        {site.specie.symbol for s in X if (len(s) > 4) == is_large for site in s}
        for is_large in (False, True)
    )
    assert len(set(table["element"]) & (large - small)) > 0.5 * len(large - small) > 0


def test_prototypes_are_told_in_words():
    prototypes = environment_prototypes()
    assert list(prototypes.columns) == ["element", *SHELL_CHANNELS]
    names = SSLAtomFeaturizer(layers=("environment",)).get_feature_names_out()
    assert prototypes.index.tolist() == names.tolist()
    oxygen = prototypes[prototypes["element"] == "O"]
    assert len(oxygen) > 5
    assert oxygen["bond length"].between(1.0, 3.5).all()
    assert prototypes["element"].nunique() > 30


def test_prototypes_of_weights_without_them_are_refused():
    with pytest.raises(ValueError, match="no layer 'environment'"):
        environment_prototypes("paper-predictive")
