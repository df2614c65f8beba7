"""A mark without training (tattooed): added to finished weights, sized by them, and read back from what is left."""

import math

import numpy as np
import pytest
import torch
from embedding import KEY, batch, embedder, network, train
from torch import nn

import wmengine
from wmengine.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")
BITS = 48


def tattooed(model, **options):
    return embedder(model, [wmengine.scheme("tattooed", bits=BITS, **options)], num_classes=None)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.ndim > 1}


def normalised(seed=0):
    """A network with factors of normalisation of both signs and many sizes."""
    model = network(seed)
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
        nn.init.uniform_(norm.running_var, 0.5, 20.0)
    return model


def test_the_weights_change_when_the_watermarks_are_asked_for_and_only_once():
    model = normalised()
    before = weights(model)
    emb = tattooed(model)
    assert emb.regulariser() == 0.0
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    (mark,) = emb.watermarks()
    marked = weights(model)
    assert not any(torch.equal(before[name], value) for name, value in marked.items())
    emb.watermarks()
    wmengine.Embedder(model, sample=batch(4)[0], marks=[mark]).watermarks()
    assert all(torch.equal(marked[name], value) for name, value in weights(model).items())


def test_the_network_and_its_folded_file_hold_all_bits_and_a_stranger_none(tmp_path):
    model = normalised()
    (mark,) = tattooed(model).watermarks()
    path = wmengine.export_onnx(model, batch(1)[0], tmp_path / "folded.onnx")
    for suspect in (model, path):
        verdict = wmengine.verify(suspect, mark, key=KEY)
        assert (verdict.decision, verdict.matched) == ("owned", BITS)
    assert wmengine.verify(normalised(seed=5), mark).decision == "not_proven"


def test_what_is_added_is_the_paper_s_sum_of_codes_sized_by_each_filter():
    """In float64, from the reference's own signs; every filter changes by the same share of its deviation."""
    model = normalised()
    before = weights(model)
    emb = tattooed(model, margin=3.0)
    (mark,) = emb.watermarks()
    signs = 2.0 * mark.symbols - 1.0
    norms = {"0.weight": model[1], "3.weight": model[4]}
    energy = gain = 0.0
    expected = {}
    for (name, value), key in zip(before.items(), mark.arrays["carrier_keys"], strict=True):
        rows = value.double().numpy().reshape(len(value), -1)
        factors = np.ones(len(value))
        if name in norms:
            norm = norms[name]
            factors = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double().numpy()
        deviation = np.sqrt((rows**2).mean(1, keepdims=True))
        codes = sum(sign * reference.signs(int(key), rows.size, row) for row, sign in enumerate(signs))
        expected[name] = np.sign(factors)[:, None] * deviation * codes.reshape(rows.shape)
        energy += ((factors[:, None] * rows) ** 2).sum()
        gain += (np.abs(factors[:, None]) * deviation).sum() * rows.shape[1]
    size = 3.0 * math.sqrt(energy) / gain
    for name, value in weights(model).items():
        added = (value - before[name]).double().numpy().reshape(len(value), -1)
        np.testing.assert_allclose(added, size * expected[name], rtol=1e-3, atol=1e-6)


def test_the_margin_is_how_far_bits_are_moved_in_deviations_of_an_unmarked_network():
    model = network()
    (mark,) = tattooed(model, margin=5.0).watermarks()
    tensors = [value.numpy() for value in weights(model).values()]
    y = sum(
        reference.carrier_projection(values, int(key), BITS, "flat", "rademacher")
        for values, key in zip(tensors, mark.arrays["carrier_keys"], strict=True)
    )
    clear = (2.0 * mark.symbols - 1.0) * y / math.sqrt(sum((values**2).sum() for values in tensors))
    assert clear.mean() == pytest.approx(5.0, abs=0.6)
    assert clear.std() == pytest.approx(1.0, abs=0.35)


def test_layers_that_are_stored_otherwise_are_marked_where_they_are_read():
    torch.manual_seed(3)
    model = nn.Sequential(
        *(nn.ConvTranspose2d(1, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 32, 3, padding=1, groups=4)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(2048, 4)),
    )
    (mark,) = tattooed(model).watermarks()
    assert wmengine.verify(model, mark).matched == BITS


def test_bits_outlive_fine_tuning_and_pruning():
    model = network()
    (mark,) = tattooed(model).watermarks()
    tuned = train(model, embedder(network(seed=9), ["sketch"]), 40)
    assert wmengine.verify(tuned, mark).decision == "owned"
    with torch.no_grad():
        for value in tuned.parameters():
            if value.ndim > 1:
                value[value.abs() < value.abs().quantile(0.8)] = 0.0
    assert wmengine.verify(tuned, mark).decision == "owned"


def test_a_model_that_cannot_hold_the_bits_is_refused_before_it_is_trained():
    with pytest.raises(ValueError, match=r"needs at least 76800 weights for 48 bits, and the model has 37776"):
        tattooed(network(), margin=20.0)
    computed = network()
    nn.utils.parametrizations.weight_norm(computed[8])
    with pytest.raises(ValueError, match="computed from others: remove its parametrisation first"):
        tattooed(computed)
