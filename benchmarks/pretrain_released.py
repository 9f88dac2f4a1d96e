"""Train the released weights: ``python benchmarks/pretrain_released.py default corpus.parquet``.

The corpus is ``mp_structures.parquet`` of the data folder; only its ``pretrain`` split is learned from, which holds no
structure of a benchmark and no formula of the small ones. An interrupted run goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from ssl_matfeat import SSLPretrainer
from ssl_matfeat.weights import save_weights

SETTINGS: dict[str, SSLPretrainer] = {
    "default": SSLPretrainer("context", max_sites=16, max_epochs=20, batch_size=8192, lr=2e-3),
    "paper-predictive": SSLPretrainer(
        "predictive", max_sites=20, max_epochs=20, batch_size=16384, lr=1e-3, weight_decay=0.0
    ),
    "paper-contrastive": SSLPretrainer(
        "contrastive", max_sites=12, max_epochs=10, batch_size=8192, lr=1e-3, weight_decay=0.0
    ),
}

PROVENANCE = {
    "corpus": "Materials Project, database release 2025.02.12, without GNoME entries; split 'pretrain'",
    "left_out": "every structure whose id is in a benchmark file, and every reduced formula of matbench_jdft2d, "
    "matbench_phonons, elastic_2015, flla_2015, paper_site_moments and the test split of mp_magmom",
}
ATTRIBUTION = (
    "Structures: the Materials Project (Jain et al., APL Mater. 1, 011002, 2013), "
    "doi 10.1063/1.4812323, CC-BY 4.0"
)


def main() -> None:
    """Train one set of weights and write it with its model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("ssl_matfeat/weights"))
    parser.add_argument("--checkpoint", type=Path, default=None)
    arguments = parser.parse_args()

    checkpoint = arguments.checkpoint or Path(f"{arguments.name}.ckpt")
    pretrainer = SETTINGS[arguments.name].set_params(verbose=True)
    pretrainer.fit(arguments.corpus, checkpoint=checkpoint)
    card = pretrainer.weights_.card
    card["name"] = arguments.name
    card["training_data"] |= PROVENANCE
    card |= {"licence": "BSD-3-Clause", "attribution": ATTRIBUTION}

    path = arguments.folder / f"{arguments.name}.safetensors"
    save_weights(path, pretrainer.weights_)
    card["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    print(f"{path}: {pretrainer.metrics_}")


if __name__ == "__main__":
    main()
