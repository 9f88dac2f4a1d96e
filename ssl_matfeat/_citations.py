"""Layers and weights → BibTeX of what they rest on."""

from __future__ import annotations

from collections.abc import Sequence

import ssl_matfeat
from ssl_matfeat.blocks import RAW_BLOCKS, Layer
from ssl_matfeat.encoder import CGCNNEncoder
from ssl_matfeat.weights import Pretrained, list_weights

_PACKAGE = (
    "@software{ssl_matfeat, title={ssl_matfeat: self-supervised graph features for crystals}, "
    "author={{The ssl_matfeat developers}}, version={%s}}"
)
_BIBTEX = {
    "method": (
        "@article{kong2024self, title={Self-supervised representations and node embedding graph neural networks for "
        "accurate and multi-scale analysis of materials}, author={Kong, Jian-Gang and others}, "
        "journal={Machine Learning: Science and Technology}, volume={5}, pages={035018}, year={2024}, "
        "doi={10.1088/2632-2153/ad612b}}"
    ),
    "properties": (
        "@article{ward2016general, title={A general-purpose machine learning framework for predicting properties of "
        "inorganic materials}, author={Ward, Logan and Agrawal, Ankit and Choudhary, Alok and Wolverton, Christopher}, "
        "journal={npj Computational Materials}, volume={2}, pages={16028}, year={2016}, "
        "doi={10.1038/npjcompumats.2016.28}}"
    ),
    "bond order": (
        "@article{steinhardt1983bond, title={Bond-orientational order in liquids and glasses}, "
        "author={Steinhardt, Paul J. and Nelson, David R. and Ronchetti, Marco}, journal={Physical Review B}, "
        "volume={28}, pages={784}, year={1983}, doi={10.1103/PhysRevB.28.784}}"
    ),
    "Badger": (
        "@article{badger1934relation, title={A Relation Between Internuclear Distances and Bond Force Constants}, "
        "author={Badger, Richard M.}, journal={Journal of Chemical Physics}, volume={2}, pages={128}, year={1934}, "
        "doi={10.1063/1.1749433}}"
    ),
    "Lindemann": (
        '@article{lindemann1910calculation, title={{\\"U}ber die Berechnung molekularer Eigenfrequenzen}, '
        "author={Lindemann, Frederick A.}, journal={Physikalische Zeitschrift}, volume={11}, pages={609}, year={1910}}"
    ),
    "Gordy": (
        "@article{gordy1946relation, title={A Relation Between Bond Force Constants, Bond Orders, Bond Lengths, and "
        "the Electronegativities of the Bonded Atoms}, author={Gordy, Walter}, journal={Journal of Chemical Physics}, "
        "volume={14}, pages={305}, year={1946}, doi={10.1063/1.1724138}}"
    ),
    "bond valence": (
        "@article{brown1985bond, title={Bond-valence parameters obtained from a systematic analysis of the Inorganic "
        "Crystal Structure Database}, author={Brown, I. D. and Altermatt, D.}, journal={Acta Crystallographica B}, "
        "volume={41}, pages={244}, year={1985}, doi={10.1107/S0108768185002063}}"
    ),
    "Hill": (
        "@article{hill1952elastic, title={The Elastic Behaviour of a Crystalline Aggregate}, author={Hill, R.}, "
        "journal={Proceedings of the Physical Society A}, volume={65}, pages={349}, year={1952}, "
        "doi={10.1088/0370-1298/65/5/307}}"
    ),
    "Nystrom": (
        '@inproceedings{williams2000using, title={Using the Nystr{\\"o}m Method to Speed Up Kernel Machines}, '
        "author={Williams, Christopher K. I. and Seeger, Matthias}, "
        "booktitle={Advances in Neural Information Processing Systems 13}, year={2000}}"
    ),
    "convolution": (
        "@article{xie2018crystal, title={Crystal Graph Convolutional Neural Networks for an Accurate and Interpretable "
        "Prediction of Material Properties}, author={Xie, Tian and Grossman, Jeffrey C.}, "
        "journal={Physical Review Letters}, volume={120}, pages={145301}, year={2018}, "
        "doi={10.1103/PhysRevLett.120.145301}}"
    ),
    "structures": (
        "@article{jain2013commentary, title={Commentary: The Materials Project: A materials genome approach to "
        "accelerating materials innovation}, author={Jain, Anubhav and others}, journal={APL Materials}, volume={1}, "
        "pages={011002}, year={2013}, doi={10.1063/1.4812323}}"
    ),
}
_SHELL = ("properties", "bond order", "Badger", "Lindemann", "Gordy")
_OF_LAYERS: dict[Layer, tuple[str, ...]] = {
    "element": ("properties",),
    "shell": _SHELL,
    "cell": ("properties", "Gordy", "bond valence", "Hill"),
    "environment": (*_SHELL, "Nystrom"),
    0: ("properties",),
}
_OF_OTHERS = ("properties", "bond order")
"""Of all else that the context encoder gives, which reads the shapes of shells."""


def cite(layers: Sequence[Layer], pretrained: Pretrained) -> list[str]:
    """Return BibTeX of the package and the method, and of what the layers and weights rest on."""
    learned = set(layers) - set(RAW_BLOCKS)
    rests_on = {"method"}
    if learned and pretrained.card["name"] in list_weights():
        rests_on.add("structures")
    if learned and isinstance(pretrained.encoder, CGCNNEncoder):
        rests_on.add("convolution")
        layers = [layer for layer in layers if layer not in learned]
    for layer in layers:
        rests_on.update(_OF_LAYERS.get(layer, _OF_OTHERS))
    entries = [text for name, text in _BIBTEX.items() if name in rests_on]
    return [_PACKAGE % ssl_matfeat.__version__, *entries]
