"""What an epoch of NEGNN costs, against plain PyG with the same layers on the same crystals.

    python benchmarks/speed/epoch.py

Plain PyG is the usual loop: ``Data`` objects with inputs and expanded distances in them, a ``DataLoader`` that joins
them anew in every epoch, ``CGConv``, ``global_mean_pool``, AdamW as torch has it by default, where ours is the fused
one, as in training.py. Run it on an idle machine; epochs of the two alternate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _report import RESULTS, write_report
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import CGConv, global_mean_pool

from ssl_matfeat.datasets import load_elastic
from ssl_matfeat.encoder import GaussianExpansion
from ssl_matfeat.examples import Dataset, Inputs
from ssl_matfeat.graph import CrystalGraphs
from ssl_matfeat.network import NodeEmbeddingNetwork, Standardize
from ssl_matfeat.weights import load_weights

N_CHANNELS, N_LAYERS, BATCH_EDGES = 64, 3, 2048
"""NEGNN's defaults, but for its backbone."""


class PyGNetwork(nn.Module):
    """The layers of a `NodeEmbeddingNetwork` with backbone ``"cgcnn"``, its convolutions those of PyG."""

    def __init__(self, network: NodeEmbeddingNetwork, n_gaussians: int) -> None:
        super().__init__()
        self.embed, self.wide, self.head = network.embed, network.wide, network.head
        self.convolutions = nn.ModuleList(
            CGConv(N_CHANNELS, dim=n_gaussians, aggr="add") for _ in range(N_LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(N_CHANNELS) for _ in range(N_LAYERS))

    def forward(self, batch: Data) -> Tensor:
        """Return the predictions, (n_crystals, 1)."""
        x = self.embed(batch.x)  # (n_sites, n_channels)
        for convolve, norm in zip(self.convolutions, self.norms, strict=True):
            # CGConv adds its input to its messages; NEGNN's input of a layer is normalised, and so is this one.
            x = convolve(norm(x), batch.edge_index, batch.edge_attr)
        pooled = global_mean_pool(x, batch.batch, size=batch.num_graphs)
        return self.head(torch.cat([pooled, self.wide(batch.crystal)], dim=1))


def epoch_of_negnn(network: NodeEmbeddingNetwork, dataset: Dataset) -> Callable[[], None]:
    """Return what trains our network for an epoch."""
    batches = dataset.batches(np.arange(len(dataset.graphs)), BATCH_EDGES, "cpu")
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    generator = torch.Generator().manual_seed(0)

    def losses() -> Iterator[Tensor]:
        for example in batches(generator):
            yield F.l1_loss(network(example), example.target)

    return lambda: _descend(losses(), optimizer)


def epoch_of_pyg(
    like: NodeEmbeddingNetwork, dataset: Dataset, batch_size: int
) -> Callable[[], None]:
    """Return what trains PyG's counterpart of our network for an epoch, on inputs that are scaled already."""
    expand = GaussianExpansion()
    network = PyGNetwork(like, len(expand.centers))
    sites = like.standardize_sites(torch.from_numpy(dataset.sites))
    pooled = like.standardize_crystals(torch.from_numpy(dataset.crystals))
    crystals = []
    for i in range(len(dataset.graphs)):
        graph = dataset.graphs.batch([i])
        crystals.append(
            Data(
                x=sites[dataset.graphs.sites_of(np.array([i]))],
                edge_index=graph.edge_index,
                edge_attr=expand(graph.distance),
                crystal=pooled[[i]],
                y=torch.from_numpy(dataset.target[[i]]),
            )
        )
    loader = DataLoader(crystals, batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters())

    def losses() -> Iterator[Tensor]:
        for batch in loader:
            yield F.l1_loss(network(batch), batch.y)

    return lambda: _descend(losses(), optimizer)


def _descend(losses: Iterator[Tensor], optimizer: torch.optim.Optimizer) -> None:
    for loss in losses:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def main(
    n_structures: Annotated[int, typer.Option(help="Crystals in an epoch.")] = 1181,
    n_epochs: Annotated[int, typer.Option(help="Of each, after one to warm up.")] = 5,
    results: Annotated[Path, typer.Option(help="Folder of the JSON.")] = RESULTS,
) -> None:
    """Measure, and write epoch.json."""
    structures, y = load_elastic(return_X_y=True)
    structures, y = structures[:n_structures], y[:n_structures]
    inputs = Inputs("raw", load_weights("default"), None)
    dataset = Dataset.from_graphs(CrystalGraphs.from_structures(structures), inputs, BATCH_EDGES)
    dataset.target = ((y - y.mean()) / y.std()).astype(np.float32)[:, None]

    torch.manual_seed(0)
    network = NodeEmbeddingNetwork(
        Standardize(dataset.sites, inputs.n_learned),
        Standardize(dataset.crystals, inputs.n_learned),
        backbone="cgcnn",
        n_channels=N_CHANNELS,
        n_layers=N_LAYERS,
        n_outputs=1,
        per_site=False,
        dropout=0.0,
    )
    n_batches = sum(1 for _ in dataset.graphs.batches(BATCH_EDGES))
    batch_size = round(len(structures) / n_batches)
    epochs = {
        "NEGNN, cgcnn": epoch_of_negnn(network, dataset),
        "plain PyG, CGConv": epoch_of_pyg(network, dataset, batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for _ in range(n_epochs + 1):
        for name, epoch in epochs.items():
            start = time.perf_counter()
            epoch()
            seconds[name].append(time.perf_counter() - start)
    least = {name: min(several[1:]) for name, several in seconds.items()}
    ours = least["NEGNN, cgcnn"]
    rows: list[list[Any]] = [
        [name, len(structures) / value, value / ours] for name, value in least.items()
    ]
    table = {"header": ["training", "crystals/s", "time of an epoch over NEGNN's"], "rows": rows}
    write_report(
        results / "epoch.json",
        f"{len(structures)} crystals of elastic_2015, {n_batches} batches of about {batch_size}",
        [table],
    )


if __name__ == "__main__":
    typer.run(main)
