"""Networks whose answers depend on their inputs, and a service that holds `response`, for tests without training."""

from functools import cache

import numpy as np
import torch

from wmengine import Key, response, scheme
from wmengine.marking.serving import Served
from wmengine.parts.responses.bases import base_of, tensors
from wmengine.parts.responses.gathering import Whitening
from wmengine.parts.responses.pattern import pattern_of
from wmengine.testing import small_network

KEY = Key("ACME Vision", bytes(range(32)))
PROBES = np.random.default_rng(1).random((600, 1, 8, 8)).astype(np.float32)


def network(seed: int = 4) -> torch.nn.Module:
    """As sure of its answers as trained networks are."""
    model = small_network(seed).eval()
    with torch.no_grad():
        model[-1].weight *= 20.0
    return model


def service(predict=None, **options) -> Served:
    given = {"num_classes": 10, "sample": PROBES[:8], "name": "detector-v3", "probes": PROBES, "value_range": (0, 1)}
    given["scheme"] = scheme("response", probes=1024, views=1)
    return response(network() if predict is None else predict, KEY, **{**given, **options})


@cache
def served() -> Served:
    return service()


def size_of(mark) -> int:
    return mark.preset.source.size(mark)


def labels_of(predict):
    """The same, of which only the best class is known."""
    return lambda rows: np.asarray(predict(rows)).argmax(axis=1)


def answers(model):
    """A module as a function of arrays."""

    def run(rows):
        with torch.no_grad():
            return model(torch.from_numpy(rows)).numpy()

    return run


def bent_network(mark, strength=0.5):
    """What an ideal copy answers: the base's logits and the pattern on top, decisions not spared."""
    base = base_of(network(), tensors({"input": PROBES[:1]}))
    whitening = Whitening(mark.arrays["centre"], mark.arrays["whitening"])
    scale = strength / pattern_of(mark.arrays["features"], mark.arrays, mark.symbols).std()

    def run(rows):
        raw, answered = base.both(tensors({"input": rows}))
        return answered.numpy() + scale * pattern_of(whitening(raw.numpy()), mark.arrays, mark.symbols)

    return run
