"""Pretext tasks beyond the paper's: they can be learned, turn with the crystal, and do not leak their answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    CRYSTALS,
    batch_of,
    fcc,
    perovskite,
    rattled_salt,
    rock_salt,
    simple_cubic,
    triclinic,
    untrained,
)
from pymatgen.core import Lattice, Structure
from scipy.spatial.transform import Rotation

from ssl_matfeat import SSLPretrainer, load_elastic
from ssl_matfeat.elements import property_table
from ssl_matfeat.graph import CrystalGraphs
from ssl_matfeat.pretext.context import ContextTask
from ssl_matfeat.pretext.damage import choose_sites, displace, replace_elements, strain_cells
from ssl_matfeat.pretext.elements import PropertyTask, ReplacedTask
from ssl_matfeat.pretext.geometry import DenoisingTask, StrainTask
from ssl_matfeat.pretext.paper import PredictiveTask
from ssl_matfeat.weights import load_weights

ROTATION = torch.from_numpy(Rotation.from_euler("xyz", [0.3, 1.1, -0.7]).as_matrix())
STRAIN = torch.tensor([[3.0, 1, 2], [1, -2, 1], [2, 1, 4]], dtype=torch.float64) * 1e-4
ALL_OF_CGCNN = {
    "predictive": 1.0,
    "contrastive": 0.5,
    "property": 0.3,
    "replaced": 0.5,
    "denoising": 0.2,
    "strain": 0.1,
}


def generator():
    return torch.Generator().manual_seed(0)


def costs_of_constants(structures):
    """What the best constant predictor of each loss gets; one atom of each small crystal is hidden."""
    numbers = np.concatenate([s.atomic_numbers for s in structures])
    weight = np.concatenate([np.full(len(s), 1 / len(s)) for s in structures]) / len(structures)
    table = property_table()[1:]
    standardised = (property_table() - table.mean(0)) / table.std(0, ddof=1)
    mean = weight @ standardised[numbers]
    frequency = np.bincount(numbers, weights=weight)
    frequency = frequency[frequency > 0]
    return {
        "properties": (weight @ (standardised[numbers] - mean) ** 2).mean(),
        "element": -(frequency * np.log(frequency)).sum(),
        "replaced": np.log(2),
        "displacement": 1.0,
        "strain": 1.0,
    }


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("property", ["properties", "element"]),
        ("replaced", ["replaced"]),
        ("denoising", ["displacement"]),
        ("strain", ["strain"]),
    ],
)
def test_training_beats_a_constant(small_crystals, task, names):
    X = small_crystals[0]
    pretrainer = SSLPretrainer(task, n_channels=16, batch_size=1000, max_epochs=60, lr=1e-2).fit(X)
    constant = costs_of_constants(X)
    for name in names:
        losses = [record[f"train_{name}"] for record in pretrainer.history_]
        assert np.mean(losses[-5:]) < 0.95 * constant[name]
        assert np.mean(losses[:1]) > 0.95 * constant[name]  # it was learned, not given away


def test_all_tasks_of_one_encoder_train_together(small_crystals):
    pretrainer = SSLPretrainer(ALL_OF_CGCNN, n_channels=8, max_epochs=1, batch_size=1000)
    record = pretrainer.fit(small_crystals[0]).history_[0]
    names = ["group", "period", "edge", "contrastive", "properties", "element", "replaced"]
    names += ["displacement", "strain"]
    assert list(record) == ["epoch"] + [f"{w}_{n}" for w in ("train", "validation") for n in names]
    assert np.isfinite(list(record.values())).all()
    assert np.isfinite(list(pretrainer.metrics_.values())).all()
    assert pretrainer.weights_.card["task"] == ALL_OF_CGCNN
    # Before anything is learned, guessing costs ln 2: the weights reached the losses.
    assert record["train_replaced"] == pytest.approx(0.5 * np.log(2), rel=0.1)
    assert record["train_strain"] == pytest.approx(0.1, rel=0.3)


def test_combining_tasks_of_two_encoders_names_those_that_fit_together(small_crystals):
    with pytest.raises(ValueError, match=r"\['predictive', .*'strain'\] or \['context'\]"):
        SSLPretrainer({"strain": 1.0, "context": 1.0}).fit(small_crystals[0])


def with_random_head(task_type):
    """An untrained encoder and a task whose head, which starts at zero, says something."""
    torch.manual_seed(0)
    encoder = untrained("cgcnn").encoder.double()
    task = task_type(encoder).double()
    torch.nn.init.normal_(task.scalars.scalar.weight)
    return encoder, task


def test_predicted_displacements_turn_with_the_crystal():
    encoder, task = with_random_head(DenoisingTask)
    batch = batch_of(triclinic(), rattled_salt())
    turned = replace(batch, vector=batch.vector @ ROTATION.T)
    before, after = task.predict(encoder, batch), task.predict(encoder, turned)
    torch.testing.assert_close(after, before @ ROTATION.T)
    assert (after - before).norm() > 0.1 * before.norm()  # negative control: they do turn


def test_predicted_strain_turns_with_the_crystal():
    encoder, task = with_random_head(StrainTask)
    batch = batch_of(triclinic(), rattled_salt())
    turned = replace(batch, vector=batch.vector @ ROTATION.T)
    before, after = task.predict(encoder, batch), task.predict(encoder, turned)
    torch.testing.assert_close(after, ROTATION @ before @ ROTATION.T)
    torch.testing.assert_close(before, before.transpose(1, 2))
    assert (after - before).norm() > 0.01 * before.norm()  # negative control: they do turn


def test_class_of_a_hidden_edge_is_its_nearest_gaussian():
    encoder = untrained("cgcnn").encoder.double()
    task = PredictiveTask(encoder).double()
    for a, expected in ((3.0, 15), (7.25, 36), (10.0, 40)):  # centres are 0.2 Å apart, up to 8 Å
        batch = batch_of(simple_cubic(a, "Ar")).cut_sharply()
        _, targets = task.predict(encoder, batch, generator())
        nearest = targets["edge"][batch.distance.argmin()]
        assert nearest == expected, a


def test_rigid_shift_is_neither_seen_nor_asked_for():
    encoder, task = with_random_head(DenoisingTask)
    batch = batch_of(triclinic(), perovskite())
    shift = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64).expand(len(batch.numbers), 3)
    shifted, predicted = displace(batch, shift), task.predict(encoder, batch)
    torch.testing.assert_close(task.predict(encoder, shifted), predicted)
    assert predicted.norm() > 0.01
    for crystal in range(2):
        mean = predicted[batch.batch == crystal].mean(0)
        torch.testing.assert_close(mean, torch.zeros_like(mean))
    alone = batch_of(fcc(), fcc(element="Al"))  # cells of one atom have nothing to denoise
    assert task.losses(encoder, alone, generator())["displacement"] < 1e-20


def test_predicting_nothing_costs_one():
    encoder = untrained("cgcnn").encoder
    batch = batch_of(*[rattled_salt()] * 5, *[triclinic()] * 200, dtype=torch.float32)
    for task, name in ((DenoisingTask(encoder), "displacement"), (StrainTask(encoder), "strain")):
        loss = task.losses(encoder, batch, generator())[name].detach()
        assert float(loss) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("structure", [triclinic(), rattled_salt()], ids=["triclinic", "salt"])
def test_damaged_graph_is_the_graph_of_the_damaged_crystal(structure):
    batch = batch_of(structure)
    # Rows of the lattice are its vectors, so that a symmetric strain acts from the right here too.
    lattice = Lattice(structure.lattice.matrix @ (np.eye(3) + STRAIN.numpy()))
    strained = batch_of(Structure(lattice, structure.species, structure.frac_coords))
    shifts = np.random.default_rng(0).normal(0, 1e-4, (len(structure), 3))
    moved = Structure(
        structure.lattice,
        structure.species,
        structure.cart_coords + shifts,
        coords_are_cartesian=True,
    )
    pairs = [
        (strain_cells(batch, STRAIN[None]), strained),
        (displace(batch, torch.from_numpy(shifts)), batch_of(moved)),
    ]
    for ours, theirs in pairs:
        n_sites = len(ours.numbers)
        for site in range(n_sites):  # the order of edges within a shell may differ
            mine, other = (b.distance[b.edge_index[1] == site] for b in (ours, theirs))
            torch.testing.assert_close(mine.sort().values, other.sort().values)
        torch.testing.assert_close(ours.volume, theirs.volume)
        torch.testing.assert_close(ours.vector.norm(dim=1), ours.distance)
        assert (ours.distance - batch.distance).abs().max() > 1e-5  # negative control
    assert pairs[0][1].volume != batch.volume


def with_element(batch, site, number):
    """The same graph with another element on one site."""
    numbers = batch.numbers.clone()
    numbers[site] = number
    return replace(batch, numbers=numbers)


def test_hidden_element_does_not_reach_its_prediction():
    torch.manual_seed(0)
    encoder = untrained("cgcnn").encoder
    task = PropertyTask(encoder)
    batch = batch_of(triclinic(), perovskite(), rock_salt(), dtype=torch.float32)
    hidden = choose_sites(batch, task.mask_ratio, generator())
    properties, logits, numbers = task.predict(encoder, batch, generator())
    assert properties.shape == (int(hidden.sum()), 22)
    assert logits.shape == (int(hidden.sum()), 104)
    site, seen = int(torch.nonzero(hidden)[0]), int(torch.nonzero(~hidden)[0])
    found = task.predict(encoder, with_element(batch, site, 35), generator())
    assert torch.equal(found[0], properties)
    assert torch.equal(found[1], logits)
    assert found[2].tolist() == [35, *numbers[1:].tolist()]
    control, _, _ = task.predict(encoder, with_element(batch, seen, 35), generator())
    assert not torch.allclose(control, properties)


def test_replaced_element_does_not_reach_the_prediction():
    torch.manual_seed(0)
    encoder = untrained("cgcnn").encoder
    task = ReplacedTask(encoder)
    batch = batch_of(*CRYSTALS.values(), rattled_salt(), dtype=torch.float32)
    unique = replace(batch, numbers=torch.arange(len(batch.numbers)))  # tells who gave its element
    donors = replace_elements(unique, task.replaced_ratio, generator()).numbers
    gave = torch.isin(unique.numbers, donors[donors != unique.numbers])
    replaced = (donors != unique.numbers) & ~gave
    logits, answer = task.predict(encoder, batch, generator())
    site, kept = (
        int(torch.nonzero(replaced)[0]),
        int(torch.nonzero((donors == unique.numbers) & ~gave)[0]),
    )
    found, _ = task.predict(encoder, with_element(batch, site, 35), generator())
    assert torch.equal(found, logits)
    control, _ = task.predict(encoder, with_element(batch, kept, 35), generator())
    assert not torch.allclose(control, logits)
    assert 0 < answer.sum() < 0.4 * len(answer)


def test_replaced_elements_come_from_the_batch_and_some_crystals_stay_whole():
    batch = batch_of(*[triclinic()] * 200)
    damaged = replace_elements(batch, 0.15, generator())
    assert set(damaged.numbers.tolist()) <= set(batch.numbers.tolist())
    changed = damaged.numbers != batch.numbers
    assert float(changed.float().mean()) == pytest.approx(0.15 * 3 / 4, abs=0.03)
    whole = torch.bincount(batch.batch[changed], minlength=200) == 0
    assert 0.3 < whole.float().mean() < 0.9


def test_loss_of_replaced_atoms_is_balanced():
    encoder = untrained("cgcnn").encoder
    task = ReplacedTask(encoder)
    torch.nn.init.zeros_(task.head[-1].weight)
    batch = batch_of(*[triclinic()] * 50, dtype=torch.float32)
    for bias in (0.0, 2.0, -2.0):
        torch.nn.init.constant_(task.head[-1].bias, bias)
        loss = float(task.losses(encoder, batch, generator())["replaced"].detach())
        both = np.logaddexp(0, -bias) / 2 + np.logaddexp(0, bias) / 2
        assert loss == pytest.approx(both, rel=1e-4)
        accuracy = task.metrics(encoder, batch, generator())["replaced balanced accuracy"]
        assert float(accuracy) == pytest.approx(0.5)


def test_default_weights_solve_their_task_as_when_they_were_released():
    """Of the crystals of elastic_2015, which they never saw; a slip anywhere in the encoder shows here."""
    task = ContextTask(load_weights("default").encoder)
    graphs = CrystalGraphs.from_structures(load_elastic()["structure"].tolist()[::20])
    batch = graphs.batch(np.arange(len(graphs)))
    with torch.no_grad():
        found = task.metrics(load_weights("default").encoder, batch, generator())
    assert {name: float(value) for name, value in found.items()} == {
        "element accuracy": pytest.approx(0.964, abs=0.003),
        "log bond error": pytest.approx(0.0250, abs=0.0005),
        "log volume error": pytest.approx(0.0439, abs=0.001),
        "formula log volume error": pytest.approx(0.0344, abs=0.001),
    }
