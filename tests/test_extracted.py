"""Bits that a keyed function reads from one weight: the same in NumPy and torch, and read as it is trained."""

import math

import numpy as np
import pytest
import torch
from embedding import batch, embedder, network, unproven
from judged import KEY, white_box
from torch import nn

import wmengine
from wmengine.marks.watermark import Watermark
from wmengine.ops import reference
from wmengine.ops.torch_reference import link_loss
from wmengine.parts.sources.extracted import ROUNDS, extractor_of, filtered_places
from wmengine.suspects import open_suspect

pytestmark = pytest.mark.usefixtures("one_thread")

BITS, SHAPE = 16, (8, 40)
COUNT = math.prod(SHAPE)
MARKS = {
    "riga": white_box([SHAPE], preset="riga", bits=BITS, width=64),
    "neuralmark": white_box([(64, 40)], preset="neuralmark", bits=BITS, width=32),
    "greedy_residuals": white_box([SHAPE], preset="greedy_residuals", bits=BITS, width=5),
}
SMALL = {
    "riga": {"bits": 64, "width": 128},
    "neuralmark": {"bits": 64, "width": 64},
    "greedy_residuals": {"bits": 64, "width": 8},
    "deepmarks": {"bits": 64},
    "stdm": {"bits": 64},
}


def values(mark, seed=0):
    return np.random.default_rng(seed).normal(size=math.prod(mark.parameters["carriers"][0]))


# --- what is read ---


def test_riga_reads_two_layers():
    mark, w = MARKS["riga"], values(MARKS["riga"])
    first, second = (int(key) for key in mark.arrays["layer_keys"])
    hidden = np.maximum(reference.sketch(w / np.sqrt((w**2).mean()), first, 64), 0.0)
    expected = math.sqrt(2.0) * reference.project(hidden, second, BITS, "gaussian")
    np.testing.assert_allclose(extractor_of(mark, BITS)(w), expected, rtol=1e-5)


def test_what_riga_reads_of_an_unmarked_weight_has_standard_deviation_one_at_any_scale():
    mark = white_box([(64, 400)], preset="riga", bits=512)
    for scale in (0.1, 1.0, 100.0):
        assert np.std(extractor_of(mark, 512)(scale * values(mark))) == pytest.approx(1.0, rel=0.1)


def test_neuralmark_filters_four_times_and_averages_in_turn():
    mark, w = MARKS["neuralmark"], values(MARKS["neuralmark"])
    mask = mark.arrays["filter"]
    assert mask.sum() == BITS // 2
    left = w
    for _ in range(ROUNDS):
        left = [value for place, value in enumerate(left[: len(left) // BITS * BITS]) if mask[place % BITS]]
    assert len(left) == 64 * 40 // 2**ROUNDS
    pools = np.array([np.mean(left[pool : len(left) // 32 * 32 : 32]) for pool in range(32)])
    (key,) = (int(each) for each in mark.arrays["layer_keys"])
    expected = reference.projection_sums(pools, key, BITS, "gaussian")
    np.testing.assert_allclose(extractor_of(mark, BITS)(w), expected, rtol=1e-9)


def test_greedy_residuals_are_the_means_of_the_larger_halves():
    mark, w = MARKS["greedy_residuals"], values(MARKS["greedy_residuals"])
    stretch = COUNT // (BITS * 5)
    expected = []
    for bit in range(BITS):
        means = [
            w[start : start + stretch].mean() for start in range(bit * 5 * stretch, (bit + 1) * 5 * stretch, stretch)
        ]
        expected.append(sum(sorted(means, key=abs)[3:]) / 5)
    np.testing.assert_allclose(extractor_of(mark, BITS)(w), expected, rtol=1e-12)


@pytest.mark.parametrize("name", MARKS)
def test_torch_and_numpy_read_the_same_in_float64_and_torch_knows_the_slope(name):
    mark, w = MARKS[name], values(MARKS[name])
    read, tensor = extractor_of(mark, BITS), torch.tensor(w, requires_grad=True)
    y = read(tensor)
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.detach().numpy(), read(w), rtol=1e-9)
    direction = np.random.default_rng(1).normal(size=len(w))
    (slope,) = torch.autograd.grad(y.sum(), tensor)
    step = 1e-6
    measured = (read(w + step * direction) - read(w - step * direction)).sum() / (2 * step)
    assert float(slope.numpy() @ direction) == pytest.approx(measured, rel=1e-5)
    for each in (tensor.detach().float(), w.astype(np.float32)):
        np.testing.assert_allclose(read(each), read(w), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MARKS)
def test_what_is_not_finite_or_all_zero_shows_no_bit(name):
    mark = MARKS[name]
    shape = mark.parameters["carriers"][0]
    for filled in (0.0, math.nan, math.inf):
        model = nn.Sequential(nn.Flatten(), nn.Linear(shape[1], shape[0], bias=False))
        nn.init.constant_(model[1].weight, filled)
        verdict = wmengine.verify(model, mark)
        assert (verdict.matched, verdict.log10_p) == (0, 0.0)


def test_the_filter_keeps_as_many_whatever_the_key():
    for key in (KEY, wmengine.Key("ACME", bytes(32))):
        mark = Watermark.create(key, MARKS["neuralmark"].preset, MARKS["neuralmark"].parameters)
        assert filtered_places(mark.arrays["filter"], 64 * 40, 32).shape == (5, 32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("riga", {"bits": 64, "width": 321}, "64 bits at a width of 321 need 321 values, and 320 are left"),
        ("riga", {"bits": 64, "width": 63}, "width must be at least the number of bits, 64, and it is 63"),
        ("neuralmark", {"bits": 16, "width": 24}, "16 bits at a width of 24 need 24 values, and 16 are left"),
        ("neuralmark", {"bits": 1, "width": 2}, "1 bits at a width of 2 need 2 values, and 0 are left"),
        ("greedy_residuals", {"bits": 16, "width": 21}, "16 bits at a width of 21 need 336 values, and 320 are left"),
    ],
)
def test_a_weight_too_small_is_said_to_be_with_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        white_box([SHAPE], preset=name, **options)


# --- how it is trained ---


@pytest.mark.parametrize("link", reference.LINKS)
def test_the_links_in_torch_are_those_of_the_reference(link):
    y = np.random.default_rng(0).normal(size=BITS)
    bits = MARKS["riga"].symbols
    tensor = torch.tensor(y, requires_grad=True)
    loss = link_loss(tensor, torch.from_numpy(bits.copy()), link, 0.7)
    loss.backward()
    expected, slope = reference.link_loss(y, bits, link, 0.7)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(tensor.grad.numpy(), slope, rtol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_is_of_the_live_weights(name):
    model = network()
    emb = embedder(model, [wmengine.scheme(name, **SMALL[name])])
    before, matched = emb.regulariser().item(), emb.metrics[name]["matched"]
    with torch.no_grad():
        for layer in (model[0], model[3], model[8], model[10]):
            layer.weight.mul_(-5.0)
    assert emb.regulariser().item() != pytest.approx(before, rel=1e-3)
    if name in ("deepmarks", "neuralmark", "greedy_residuals"):  # of -w these read -y
        assert emb.metrics[name]["matched"] == 64 - matched


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_moves_the_marked_weight_and_the_bits_that_are_read(name):
    model = network(seed=2)
    emb = embedder(model, [wmengine.scheme(name, **SMALL[name])])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(120):
        optimizer.zero_grad()
        emb.regulariser().backward()
        optimizer.step()
    (mark,) = emb.watermarks()
    emb.regulariser()
    assert emb.metrics[name]["matched"] == 64
    assert wmengine.verify(model.eval(), mark, key=KEY).matched == 64


@pytest.mark.parametrize("name", SMALL)
def test_a_normalisation_that_starts_at_zero_costs_no_number(name):
    model = network()
    nn.init.zeros_(model[4].weight)
    loss = embedder(model, [wmengine.scheme(name, **{**SMALL[name], "marked": 1})]).regulariser()
    loss.backward()
    assert math.isfinite(loss.item())
    for parameter in model.parameters():
        assert parameter.grad is None or float(parameter.grad.abs().max()) < 1e6


def test_folding_a_normalisation_changes_nothing_that_is_read(tmp_path):
    model = network().eval()
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    path = wmengine.export_onnx(model, batch(1)[0], tmp_path / "folded.onnx")
    for name in SMALL:
        (mark,) = unproven(embedder(model, [wmengine.scheme(name, **{**SMALL[name], "marked": 1})]))
        read = [mark.preset.source.observe(mark, open_suspect(each), mark.total).found[0].y for each in (model, path)]
        np.testing.assert_allclose(read[0], read[1], rtol=1e-2, atol=1e-3)


def test_a_mark_does_not_go_on_in_another_model():
    marks = unproven(embedder(network(), [wmengine.scheme("riga", **SMALL["riga"])]))
    with pytest.raises(ValueError, match="'riga' is of a model with other weights"):
        wmengine.Embedder(network()[:8], sample=batch(64)[0], marks=marks)


# --- stdm: where y stands in its period ---


@pytest.mark.parametrize("beta", [3, 10])
def test_stdm_reads_the_sine_and_trains_it(beta):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1, bias=False))
    emb = embedder(model, [wmengine.scheme("stdm", bits=BITS, beta=beta, strength=2.0)], num_classes=None)
    (mark,) = unproven(emb)
    assert mark.parameters["beta"] == beta
    (key,) = (int(each) for each in mark.arrays["carrier_keys"])
    y = reference.projection_sums(model[1].weight.detach().numpy(), key, BITS, "gaussian")
    found = mark.preset.source.observe(mark, open_suspect(model), BITS).found[0].y
    np.testing.assert_allclose(found, np.sin(beta * y), atol=1e-4)
    signs = 2.0 * mark.symbols - 1.0
    expected = 2.0 * np.logaddexp(0.0, -signs * 10.0 * np.sin(beta * y)).sum()
    assert emb.regulariser().item() == pytest.approx(expected, rel=1e-4)
    matched = (np.sign(np.sin(beta * y)) == signs).sum()
    assert emb.metrics["stdm"]["matched"] == wmengine.verify(model, mark).matched == matched


@pytest.mark.parametrize(("name", "link"), [("uchida", "stdm"), ("stdm", "bce")])
def test_a_link_with_a_period_goes_with_a_reading_that_has_one(name, link):
    with pytest.raises(ValueError, match=f"scheme '{name}' cannot be trained with the link '{link}'"):
        embedder(network(), [wmengine.scheme(name, bits=64, link=link)])


@pytest.mark.parametrize("carrier", ["unit_filters", "unit_filter_mean"])
def test_a_period_is_of_weights_in_their_own_units(carrier):
    with pytest.raises(ValueError, match=r"^carrier must be one of flat, filter_mean"):
        wmengine.scheme("stdm", carrier=carrier)
