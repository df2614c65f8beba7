"""What overwriting promises: the thief's own marks prove themselves, of every scheme that he can embed."""

import numpy as np
import pytest
import torch
from embedding import CLASSES, batch, network, unproven

import wmengine
from wmengine import attacks
from wmengine.attacks import overwriting

MARK = wmengine.scheme("sketch", bits=64)
pytestmark = pytest.mark.usefixtures("one_thread")


def marks_of_thief(seed, times, sample):
    """The marks that `overwrite` embeds, made again from its seed."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(times):
        key = wmengine.Key(overwriting.THIEF, random.bytes(32))
        name = overwriting.STOLEN
        made = wmengine.Embedder(network(seed=9), key, [MARK], num_classes=CLASSES, sample=sample, name=name)
        found += unproven(made)
    return found


def test_the_marks_of_the_thief_prove_themselves_each_time():
    x, y = batch(256)
    first, second = marks_of_thief(3, 2, x[:64])
    once, twice = (
        attacks.run("overwrite", network(), (x, y), seed=3, times=times, epochs=6, batch=16, scheme=MARK)
        for times in (1, 2)
    )
    assert wmengine.verify(once, first).owned
    assert not wmengine.verify(once, second).owned
    assert wmengine.verify(twice, second).owned


@pytest.mark.slow
def test_a_thief_puts_his_own_bits_into_answers_to_his_own_inputs():
    x, y = batch(600)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)
    stolen = attacks.run("ftal", network(), loader, epochs=4)
    scheme = wmengine.scheme("response", bits=256, probes=256, mixtures=64, strength=1.5)
    attacked = attacks.run("overwrite", stolen, loader, scheme=scheme, seed=3, epochs=4)
    key = wmengine.Key(overwriting.THIEF, np.random.default_rng(3).bytes(32))
    settings = {"num_classes": CLASSES, "sample": x[:64], "name": overwriting.STOLEN, "samples": (x, y)}
    (mark,) = unproven(wmengine.Embedder(stolen, key, [scheme], **settings))
    before, after = (wmengine.verify(each, mark).log10_p for each in (stolen, attacked))
    assert after < -3 < before


def test_a_thief_cannot_embed_what_needs_networks_that_he_has_not():
    with pytest.raises(ValueError, match=r"a thief has no controls, .* which 'multi_view' needs"):
        attacks.run("overwrite", network(), batch(40), scheme="multi_view")
