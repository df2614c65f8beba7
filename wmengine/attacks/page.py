"""The page of attacks: one entry each."""

from __future__ import annotations

from wmengine.attacks.attack import Attack
from wmengine.attacks.precision import fp16, int8
from wmengine.attacks.pruning import prune, prune_filters
from wmengine.attacks.renaming import rename
from wmengine.attacks.repainting import noise
from wmengine.attacks.symmetry import flip, permute, rescale

PAGE: tuple[Attack, ...] = (
    Attack(
        name="prune",
        family="pruning",
        run=prune,
        takes="weights",
        defaults={"share": 0.5, "per_layer": False},
        promise="exactly the share of the weights that are smallest is 0, of all layers together or of each",
        paper="Han, Pool, Tran, Dally, Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015",
    ),
    Attack(
        name="prune_filters",
        family="pruning",
        run=prune_filters,
        takes="graph",
        defaults={"share": 0.5},
        promise="exactly the share of each group of channels, smallest by L1 norm, is 0, with biases and factors",
        paper="Li, Kadav, Durdanovic, Samet, Graf, Pruning Filters for Efficient ConvNets, ICLR 2017",
    ),
    Attack(
        name="noise",
        family="repainting",
        run=noise,
        takes="weights",
        defaults={"sigma": 1 / 700},
        promise="every weight has Gaussian noise on it, sigma times its tensor's own standard deviation",
        paper="seen on weights that were published again under another name",
    ),
    Attack(
        name="permute",
        family="structure",
        run=permute,
        takes="graph",
        promise="the answers are the same, rounding aside, and the hidden channels stand in another order",
        paper="Hecht-Nielsen, On the algebraic structure of feedforward network weight spaces, 1990",
    ),
    Attack(
        name="rescale",
        family="structure",
        run=rescale,
        takes="graph",
        defaults={"low": 0.5, "high": 2.0},
        promise="the answers are the same, rounding aside, and the hidden channels have other scales",
        paper="Neyshabur, Salakhutdinov, Srebro, Path-SGD, NIPS 2015",
    ),
    Attack(
        name="flip",
        family="structure",
        run=flip,
        takes="graph",
        promise="the answers are the same, rounding aside, and about half of the hidden channels have another sign",
        paper="Chen, Lu, Hecht-Nielsen, On the geometry of feedforward neural network error surfaces, 1993",
    ),
    Attack(
        name="fp16",
        family="precision",
        run=fp16,
        takes="file",
        promise="the weights are float16",
        paper="ONNX Runtime's float16 tool",
    ),
    Attack(
        name="int8",
        family="precision",
        run=int8,
        takes="file",
        needs="inputs",
        unless={"kind": "dynamic"},
        defaults={"kind": "qdq", "calibration": 128},
        promise="the weights of convolutions and linear layers are 8 bits: kind is qdq, qoperator or dynamic",
        paper="ONNX Runtime's quantizer",
    ),
    Attack(
        name="rename",
        family="structure",
        run=rename,
        takes="file",
        promise="every tensor, node, input and output of the file has a new name, and the answers are the same",
        paper="what exporters and converters do",
    ),
)
