"""What features cost: crystals a second, peak memory, and where the time of ours goes.

    python benchmarks/speed/table.py

Run it on an idle machine. Every featurizer gets the same crystals in a fresh process, one after another.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _report import RESULTS, write_report
from joblib.externals.loky import get_reusable_executor
from pymatgen.core import Structure
from tqdm import tqdm

from ssl_matfeat.blocks import CrystalFeatures, SiteFeatures, resolve_layers
from ssl_matfeat.datasets import load_elastic
from ssl_matfeat.featurizers import SSLStructureFeaturizer
from ssl_matfeat.graph import CrystalBatch, CrystalGraphs
from ssl_matfeat.weights import load_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "accuracy"))  # which has the peers' featurizers
from _features import MAGPIE, block

PEERS = ["magpie", MAGPIE, "sine-matrix", "soap", "crystal-nn", "orbital-field-matrix"]
N_SITES = [1, 8, 64, 512, 2000]
N_CRYSTALS = [100, 1000, 10_000, 100_000]
REPEATS = 3
COPPER = Structure(1.8 * (1 - np.eye(3)), ["Cu"], [[0, 0, 0]])
"""One site, face-centred cubic."""


def featurize_ssl(X: Sequence[Structure], **options: Any) -> None:
    """Compute the default features."""
    SSLStructureFeaturizer(**options).fit_transform(X)


def featurize_peer(X: Sequence[Structure], name: str) -> None:
    """Compute a feature set of the accuracy benchmarks, without its cache."""
    for part in name.split("+"):
        block(part).compute(X)


def best_seconds(featurize: Callable[[Sequence[Structure]], None], X: Sequence[Structure]) -> float:
    """Return the least of some timings; a first short call has loaded tables and weights."""
    featurize(X[:2])
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        featurize(X)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 60:  # slow enough to be told from noise
            break
    return min(seconds)


def measure(
    featurize: Callable[[Sequence[Structure]], None], X: Sequence[Structure]
) -> tuple[float, float]:
    """Return crystals a second and the memory it took, in MB, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_here, args=(featurize, X, sender))
    process.start()
    seconds, megabytes = receiver.recv()
    process.join()
    return len(X) / seconds, megabytes


def _measure_here(featurize: Callable[..., None], X: Sequence[Structure], sender: Any) -> None:
    before = _peak_megabytes()
    seconds = best_seconds(featurize, X)
    sender.send((seconds, _peak_megabytes() - before))
    # A process of multiprocessing waits for its children in the end, and joblib's would wait for more work.
    get_reusable_executor().shutdown()


def _peak_megabytes() -> float:
    """Return the peak resident memory of this process (Linux); getrusage's would start from its parent's."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def compare(X: Sequence[Structure], peers: Sequence[str]) -> dict[str, Any]:
    """Return the table of all featurizers on the same crystals."""
    jobs: dict[str, Callable[..., None]] = {
        "SSL default": featurize_ssl,
        "SSL raw": partial(featurize_ssl, layers=("element", "shell", "cell")),
        **{name: partial(featurize_peer, name=name) for name in peers},
    }
    rows = [[name, *measure(job, X)] for name, job in tqdm(jobs.items(), desc="featurizers")]
    return {"header": ["features", "crystals/s", "memory beyond imports, MB"], "rows": rows}


def shares(X: Sequence[Structure]) -> dict[str, Any]:
    """Return where the time of the default features goes, in one process."""
    pretrained = load_weights("default")
    layers = resolve_layers("auto", pretrained, with_cell=True)
    of_sites = tuple(layer for layer in layers if layer != "cell")
    sites_of = SiteFeatures(pretrained, of_sites, torch.float32)
    crystals_of = CrystalFeatures(pretrained, layers, "auto", torch.float32)
    raw_of = SiteFeatures(pretrained, ("element", "shell"), torch.float32)

    def timed(work: Callable[[], Any]) -> float:
        work()
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    graphs = CrystalGraphs.from_structures(X)
    batches = [graphs.batch(crystals) for crystals in graphs.batches(16384)]

    def timed_on_batches(work: Callable[[CrystalBatch], Any]) -> float:
        # Copies, since a batch remembers its shells.
        return timed(lambda: [work(replace(batch)) for batch in batches])

    with torch.inference_mode():
        raw = timed_on_batches(raw_of)
        sites = timed_on_batches(sites_of)
        crystals = timed_on_batches(crystals_of)
    parts = {
        "graphs": timed(lambda: CrystalGraphs.from_structures(X)),
        "batches": timed(lambda: [graphs.batch(found) for found in graphs.batches(16384)]),
        "raw channels": raw,
        "encoder, beside these": sites - raw,
        "cell channels and pooling": crystals - sites,
    }
    total = sum(parts.values())
    rows = [[name, 100 * seconds / total] for name, seconds in parts.items()]
    return {"header": ["part of SSL default", "share of the time, %"], "rows": rows}


def scaling(structure: Structure, n_sites: Sequence[int]) -> dict[str, Any]:
    """Return the cost of one crystal against its number of sites."""
    rows = []
    for n in tqdm(n_sites, desc="sites"):
        repeats = round((n / len(structure)) ** (1 / 3)) or 1
        X = [structure.make_supercell((repeats, repeats, repeats), in_place=False)]
        rows.append([len(X[0]), 1000 * best_seconds(featurize_ssl, X)])
    return {"header": ["sites of one crystal", "SSL default, ms"], "rows": rows}


def many(X: Sequence[Structure], n_crystals: Sequence[int]) -> dict[str, Any]:
    """Return crystals a second against how many there are, with one process and with two."""
    rows = []
    for n in tqdm(n_crystals, desc="crystals"):
        several = [X[i % len(X)] for i in range(n)]
        jobs = [partial(featurize_ssl, n_jobs=n_jobs) for n_jobs in (1, 2)]
        rows.append([n, *(measure(job, several)[0] for job in jobs)])
    return {"header": ["crystals", "n_jobs=1, crystals/s", "n_jobs=2, crystals/s"], "rows": rows}


def main(
    n_structures: Annotated[int, typer.Option(help="Crystals for the comparison.")] = 200,
    peer: Annotated[list[str], typer.Option(help="A feature set to compare with.")] = PEERS,
    sites: Annotated[list[int], typer.Option(help="Sizes, in about so many sites.")] = N_SITES,
    crystals: Annotated[list[int], typer.Option(help="Numbers of crystals.")] = N_CRYSTALS,
    results: Annotated[Path, typer.Option(help="Folder of the JSON.")] = RESULTS,
) -> None:
    """Measure, and write speed.json."""
    structures = load_elastic()["structure"].tolist()
    chosen = np.random.default_rng(0).choice(len(structures), n_structures, replace=False)
    X = [structures[i] for i in chosen]
    tables = [compare(X, peer), shares(X), scaling(COPPER, sites), many(structures, crystals)]
    write_report(
        results / "speed.json",
        f"{n_structures} random crystals of elastic_2015, {np.mean([len(s) for s in X]):.1f} sites on average",
        tables,
    )


if __name__ == "__main__":
    typer.run(main)
