"""The page of attacks: one entry each."""

from __future__ import annotations

from wmengine.attacks.attack import Attack
from wmengine.attacks.extraction import distil, extract
from wmengine.attacks.fine_tuning import ftal, ftll, rtal, rtll
from wmengine.attacks.overwriting import overwrite
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
        defaults={"scheme": "sketch", "times": 1, "num_classes": None} | _FINE_TUNING,
        promise="all layers are trained and carry marks of another key",
        paper="Uchida, Nagai, Sakazawa, Satoh: Embedding watermarks into deep neural networks, ICMR 2017",
    ),
)
