"""The page of attacks: one entry each."""

from __future__ import annotations

from wmengine.attacks.adversarial import adversarial
from wmengine.attacks.attack import Attack
from wmengine.attacks.extraction import distil, extract
from wmengine.attacks.fine_tuning import ftal, ftll, rtal, rtll
from wmengine.attacks.overwriting import overwrite
from wmengine.attacks.precision import fp16, int8
from wmengine.attacks.pruning import prune, prune_filters
from wmengine.attacks.renaming import rename
from wmengine.attacks.repainting import noise
from wmengine.attacks.symmetry import flip, permute, rescale
from wmengine.attacks.wrk import wrk

_FINE_TUNING = {"epochs": 5, "rate": 1e-3, "batch": 64}
_EXTRACTION = {"epochs": 60, "rate": 1e-3, "batch": 64, "student": None}
_ADI = "Adi, Baum, Cisse, Pinkas, Keshet: Turning your weakness into a strength, USENIX Security 2018"
_HINTON = "Hinton, Vinyals, Dean: Distilling the knowledge in a neural network, NIPS workshop on deep learning 2014"

PAGE: tuple[Attack, ...] = (
    Attack(
        name="ftll",
        family="fine-tuning",
        run=ftll,
        takes="module",
        needs="labels",
        defaults=_FINE_TUNING,
        promise="the last layer alone is trained; nothing else changes",
        paper=_ADI,
    ),
    Attack(
        name="ftal",
        family="fine-tuning",
        run=ftal,
        takes="module",
        needs="labels",
        defaults=_FINE_TUNING,
        promise="all layers are trained",
        paper=_ADI,
    ),
    Attack(
        name="rtll",
        family="fine-tuning",
        run=rtll,
        takes="module",
        needs="labels",
        defaults=_FINE_TUNING | {"epochs": 10},
        promise="the last layer is drawn anew and alone is trained; nothing else changes",
        paper=_ADI,
    ),
    Attack(
        name="rtal",
        family="fine-tuning",
        run=rtal,
        takes="module",
        needs="labels",
        defaults=_FINE_TUNING,
        promise="the last layer is drawn anew, and all layers are trained",
        paper=_ADI,
    ),
    Attack(
        name="adversarial",
        family="fine-tuning",
        run=adversarial,
        takes="module",
        needs="labels",
        defaults={"eps": 0.01, "steps": 40} | _FINE_TUNING,
        promise="all layers are trained, on inputs within eps of the thief's own where the loss is greatest",
        paper="Madry, Makelov, Schmidt, Tsipras, Vladu: Towards deep learning models resistant to adversarial attacks, "
        "ICLR 2018",
    ),
    Attack(
        name="distil",
        family="extraction",
        run=distil,
        takes="module",
        needs="inputs",
        defaults={"temperature": 3.0} | _EXTRACTION,
        promise="another network that learned from the model's scores; no weight is shared",
        paper=_HINTON,
    ),
    Attack(
        name="extract",
        family="extraction",
        run=extract,
        takes="module",
        needs="inputs",
        defaults=_EXTRACTION,
        promise="another network that learned from the model's labels; no weight is shared",
        paper="Tramèr, Zhang, Juels, Reiter, Ristenpart: Stealing ML models via prediction APIs, USENIX Security 2016",
    ),
    Attack(
        name="wrk",
        family="after extraction",
        run=wrk,
        takes="module",
        needs="labels",
        defaults={"share": 0.05, "step": 0.5, "shift": 0.01, "epochs": 10, "rate": 1e-3, "batch": 32},
        promise="all layers are trained, the last one from a new start, beside perturbed inputs with wrong labels",
        paper="Xiao, Ye, Liang, Li, Li, Zheng, Hu: Class-feature watermark, arXiv 2511.07947, 2025",
    ),
    Attack(
        name="overwrite",
        family="overwriting",
        run=overwrite,
        takes="module",
        needs="labels",
        defaults={"scheme": "sketch", "times": 1} | _FINE_TUNING,
        promise="all layers are trained and carry marks of another key",
        paper="Uchida, Nagai, Sakazawa, Satoh: Embedding watermarks into deep neural networks, ICMR 2017",
    ),
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
