"""`response` in networks that are trained: strangers of every kind, and a network that holds it."""

import math

import numpy as np
import pytest
import torch
from responding import KEY, PROBES, network

from wmengine import Embedder, attacks, controls, scheme, verify
from wmengine.judging.looks import looks_of_bits
from wmengine.marking.export import export_onnx
from wmengine.parts.responses.reading import told, told_by_labels
from wmengine.suspects import open_suspect

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

KEYS = 20_000
INPUTS = torch.from_numpy(np.random.default_rng(7).random((512, 1, 8, 8)).astype(np.float32))


@pytest.fixture(scope="module")
def base():
    return network(4)


@pytest.fixture(scope="module")
def marked(base):
    """The base's copy after some epochs more, its controls, and the mark."""
    known = controls(base, INPUTS, students=[None, network(11)], epochs=3)
    model, labels = network(4), base(INPUTS).argmax(1)
    preset = scheme("response", probes=2048, mixtures=64, strength=1.5)
    emb = Embedder(
        model,
        KEY,
        [preset],
        num_classes=10,
        sample=INPUTS[:8],
        name="d",
        value_range=(0, 1),
        samples=PROBES,
        controls=known,
    )
    emb.fit([(x, y) for x, y in zip(INPUTS.split(64), labels.split(64), strict=True)], epochs=40, label_smoothing=0.1)
    return model, known, emb.watermarks()[0]


def test_a_network_that_was_tuned_holds_it_and_its_file_too(marked, tmp_path):
    model, known, mark = marked
    export_onnx(model, INPUTS[:1], tmp_path / "model.onnx", fold_batchnorm=True)
    for suspect in (model, tmp_path / "model.onnx"):
        assert verify(suspect, mark, key=KEY).owned
    assert all(verify(control, mark, key=KEY).log10_p > -3 for control in known)
    assert mark.parameters["controls"] == 3


@pytest.mark.parametrize("read", ["scores", "labels"])
def test_p_is_exact_on_networks_that_learned_from_unmarked_ones(marked, base, read):
    """Students of the base, which is among the controls, are strangers: they were made without the key."""
    _, _, mark = marked
    rows = mark.preset.source.examples(mark)["input"]
    bits = np.random.default_rng(0).integers(0, 2, (KEYS, mark.total)).astype(np.uint8)
    for suspect in (attacks.run("extract", base, INPUTS, seed=99, epochs=3), network(21)):
        scores = open_suspect(suspect).answer({"input": rows}, 10).values
        said = told(scores) if read == "scores" else told_by_labels(scores.argmax(axis=1), 10)
        found = []
        for look in looks_of_bits(mark.preset.source.observed(mark, np.arange(len(rows)), said), list(bits)):
            test = mark.preset.test(mark, mark.total, sequential=False)
            test.add(look)
            found.append(test.log10_p)
        for level in (0.1, 0.01, 0.001):
            assert (np.array(found) <= math.log10(level)).mean() <= level + 4.0 * math.sqrt(level / KEYS)
