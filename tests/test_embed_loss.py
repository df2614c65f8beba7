"""What `loss`, `regulariser` and `metrics` promise in a training loop, whatever wraps the model or splits a batch."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from embedding import CLASSES, batch, embedder, network, train, unproven
from torch import nn
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

import wmengine
from wmengine.parts.statistics.tails import binomial_log10_tail

pytestmark = pytest.mark.usefixtures("one_thread")

SKETCH = [wmengine.scheme("sketch", bits=64)]
ADI = [wmengine.scheme("adi", count=40)]


def test_the_loss_is_cross_entropy_over_all_rows_plus_the_regulariser():
    model = network()
    emb = embedder(model)
    x, y = emb.mix(*batch(32))
    logits = model(x)
    expected = functional.cross_entropy(logits, y % CLASSES) + emb.regulariser()
    torch.testing.assert_close(emb.loss(logits, y), expected, rtol=1e-5, atol=1e-6)
    smoothed = functional.cross_entropy(logits, y % CLASSES, label_smoothing=0.1) + emb.regulariser()
    torch.testing.assert_close(emb.loss(logits, y, label_smoothing=0.1), smoothed, rtol=1e-5, atol=1e-6)


def test_a_black_box_mark_alone_adds_nothing_but_its_rows():
    model = network().eval()
    emb = embedder(model, ADI)
    x, y = emb.mix(*batch(16))
    torch.testing.assert_close(emb.loss(model(x), y), functional.cross_entropy(model(x), y % CLASSES))
    assert emb.regulariser().item() == 0.0


def test_a_mark_of_rows_that_is_more_than_rows_has_its_term_in_the_loss():
    chosen = [wmengine.scheme("exponential_weighting", count=40)]
    model = network()
    emb = embedder(model, chosen, samples=batch(200, seed=3))
    _, y = emb.mix(*batch(16))
    emb.loss(torch.zeros(len(y), CLASSES), y).backward()
    assert model[8].weight.grad.abs().sum() > 0


def test_the_regulariser_follows_the_live_weights():
    """Unit filters keep nothing of a factor but its sign, and the sign moves every bit."""
    model = network()
    emb = embedder(model, SKETCH)
    before, matched = emb.regulariser().item(), emb.metrics["sketch"]["matched"]
    with torch.no_grad():
        for layer in (model[0], model[3], model[8], model[10]):
            layer.weight.mul_(-5.0)
    after = emb.regulariser().item()
    assert after != pytest.approx(before, rel=1e-3)
    assert emb.metrics["sketch"]["matched"] == 64 - matched
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.mul_(-5.0)  # and undone where a normalisation stands behind
        for layer in (model[8], model[10]):
            layer.weight.mul_(-0.2)
    assert emb.regulariser().item() == pytest.approx(before, rel=1e-5)


def test_an_unmarked_models_projections_have_standard_deviation_one():
    """So that the margin is in those units: a hinge at 0 loses the mean of the half normal distribution, 1/√(2π)."""
    strength = 0.001
    model = network(seed=3)
    emb = embedder(model, [wmengine.scheme("sketch", bits=512, margin=1e-6, strength=strength)])
    assert emb.regulariser().item() / strength / 512 == pytest.approx(1 / math.sqrt(2 * math.pi), rel=0.15)


@pytest.mark.parametrize("name", ["sketch", "uchida"])
def test_a_normalisation_that_starts_at_zero_costs_no_number(name):
    """Residual networks begin so: gamma = 0 makes a filter of nothing."""
    model = network()
    nn.init.zeros_(model[4].weight)
    emb = embedder(model, [wmengine.scheme(name, bits=64)])
    loss = emb.regulariser()
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(bool(torch.isfinite(each.grad).all()) for each in model.parameters() if each.grad is not None)


def test_a_parameter_that_is_replaced_is_read_anew():
    model = network()
    emb = embedder(model, SKETCH)
    before = emb.regulariser().item()
    model[8].weight = nn.Parameter(torch.randn_like(model[8].weight))
    loss = emb.regulariser()
    loss.backward()
    assert loss.item() != pytest.approx(before, rel=1e-4)
    assert model[8].weight.grad is not None


def test_the_loss_does_not_depend_on_the_order_of_the_rows():
    model = network().eval()
    emb = embedder(model)
    x, y = emb.mix(*batch(32))
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(emb.loss(model(x[shuffled]), y[shuffled]), emb.loss(model(x), y), rtol=1e-5, atol=1e-6)


def test_gradients_accumulated_over_micro_batches_are_those_of_the_whole_batch():
    model = network().eval()
    emb = embedder(model)
    x, y = emb.mix(*batch(32))
    emb.loss(model(x), y).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for half in (slice(0, 18), slice(18, 36)):
        (emb.loss(model(x[half]), y[half]) / 2).backward()
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_rows_with_the_ignored_label_do_not_count():
    model = network().eval()
    emb = embedder(model)
    x, y = batch(32)
    y[:8] = -100
    x, y = emb.mix(x, y)
    kept = y != -100
    torch.testing.assert_close(emb.loss(model(x), y), emb.loss(model(x[kept]), y[kept]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_of_autocast_give_a_float32_loss(dtype):
    model = network()
    emb = embedder(model)
    x, y = emb.mix(*batch(32))
    with torch.autocast("cpu", dtype=dtype):
        logits = model(x)
        loss = emb.loss(logits, y)
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(loss, emb.loss(logits.float(), y), rtol=1e-3, atol=1e-3)
    loss.backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())


def test_a_model_of_half_precision_trains():
    model = network().to(torch.bfloat16)
    emb = embedder(model, sample=batch(64)[0].to(torch.bfloat16))
    x, y = batch(16)
    x, y = emb.mix(x.to(torch.bfloat16), y)
    assert x.dtype == torch.bfloat16
    emb.loss(model(x), y).backward()
    assert model[8].weight.grad.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_loss_compiles_into_one_graph():
    model = network().eval()
    emb = embedder(model)
    x, y = emb.mix(*batch(32))
    logits = model(x).detach()
    step = torch.compile(lambda logits, labels: emb.loss(logits, labels), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(logits, y), emb.loss(logits, y), rtol=1e-5, atol=1e-6)
    step(logits, y).backward()
    assert model[8].weight.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiled_loss_is_compiled_once_and_counts_as_the_other(backend):
    emb = embedder(network())
    graphs = []

    def compiles(graph, inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(emb.loss, fullgraph=True, backend=compiles if backend == "eager" else backend)
    for _ in range(20):
        _, y = emb.mix(*batch(64))
        step(functional.one_hot(y % CLASSES, CLASSES).float(), y)
    assert len(graphs) == (backend == "eager")
    assert (emb.metrics["adi"]["matched"], emb.metrics["adi"]["total"]) == (40, 40)


# Wrappers


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_looked_through(wrap):
    model = network()
    plain, wrapped = embedder(model), embedder(wrap(model))
    torch.testing.assert_close(wrapped.regulariser(), plain.regulariser())
    assert [mark.commitment for mark in unproven(wrapped)] == [mark.commitment for mark in unproven(plain)]


def test_measuring_marks_does_not_compile_a_compiled_model():
    def backend(graph, inputs):
        raise AssertionError("compiled")

    inside, in_place = network(), network()
    inside[0] = torch.compile(inside[0], backend=backend)
    in_place.compile(backend=backend)
    for model in (torch.compile(network(), backend=backend), inside, in_place):
        unproven(embedder(model))


def _nothing_to_add(_, bucket):
    """One process' gradients are everybody's."""
    sums = torch.futures.Future()
    sums.set_result(bucket.buffer())
    return sums


def test_distributed_data_parallel_gets_the_same_gradients():
    # One process needs no messages; gloo's threads and sockets only bring ways to hang.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model = network().eval()
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.register_comm_hook(None, _nothing_to_add)
        emb = embedder(parallel)
        x, y = emb.mix(*batch(16))
        emb.loss(parallel(x), y).backward()
        wrapped = [parameter.grad.clone() for parameter in model.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    model.zero_grad()
    emb.loss(model(x), y).backward()
    for parameter, expected in zip(model.parameters(), wrapped, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


# The model and the process stay what they were


def test_the_users_random_numbers_are_untouched():
    model = network()
    model.insert(8, nn.Dropout(0.5))
    before = torch.get_rng_state()
    emb = embedder(model)
    _, y = emb.mix(*batch(16))
    emb.loss(torch.zeros(len(y), CLASSES), y)
    unproven(emb)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_stays_a_plain_module_in_its_own_mode():
    model = network()
    model[1].eval()  # a frozen BatchNorm
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    emb = embedder(model)
    _, y = emb.mix(*batch(16))
    emb.loss(torch.zeros(len(y), CLASSES), y)
    unproven(emb)
    assert [module.training for module in model.modules()] == modes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.save(model, io.BytesIO())
    copy.deepcopy(model)


# Metrics


def answer(emb, y, wrong=0):
    """A loss whose logits name every row's label, but for the last `wrong` ones."""
    answers = y % CLASSES
    if wrong:
        answers[-wrong:] = (answers[-wrong:] + 1) % CLASSES
    emb.loss(functional.one_hot(answers, CLASSES).float(), y)


def test_metrics_say_the_same_of_bits_and_of_triggers():
    """matched of total, and what that is worth; of triggers over the last pass through all of them."""
    model = network()
    emb = embedder(model)
    assert emb.metrics == {}
    for step in range(5):
        assert "adi" not in emb.metrics, "no pass is over"
        _, y = emb.mix(*batch(64, seed=step))
        answer(emb, y, wrong=3 if step == 2 else 0)
    verdict = wmengine.verify(model, unproven(emb)[0])
    assert emb.metrics == {
        "sketch": {
            "matched": verdict.matched,
            "total": 64,
            "log10_p": pytest.approx(binomial_log10_tail(verdict.matched, 64, 0.5)),
        },
        "adi": {"matched": 37, "total": 40, "log10_p": pytest.approx(binomial_log10_tail(37, 40, 1 / CLASSES))},
    }


def test_metrics_are_of_the_last_full_pass_and_not_of_the_one_under_way():
    emb = embedder(network(), ADI)
    for step in range(13):
        _, y = emb.mix(*batch(64, seed=step))
        answer(emb, y, wrong=8 * (step < 5))
    assert (emb.metrics["adi"]["matched"], emb.metrics["adi"]["total"]) == (40, 40)
    for step in range(2):
        _, y = emb.mix(*batch(64, seed=step))
        answer(emb, y, wrong=8)
    assert emb.metrics["adi"]["matched"] == 24


def test_metrics_are_never_of_more_triggers_than_there_are():
    """30 triggers, 8 of a batch: the fourth batch of a pass begins with the first ones again."""
    emb = embedder(network(), [wmengine.scheme("adi", count=30)])
    for step in range(4):
        _, y = emb.mix(*batch(64, seed=step))
        answer(emb, y)
    assert (emb.metrics["adi"]["matched"], emb.metrics["adi"]["total"]) == (30, 30)


def test_validation_batches_do_not_disturb_the_metrics():
    emb = embedder(network(), ADI)
    _, mixed = emb.mix(*batch(320))
    answer(emb, mixed)
    before = emb.metrics
    answer(emb, torch.zeros(16, dtype=torch.int64))
    with torch.no_grad():
        answer(emb, mixed, wrong=40)
    assert emb.metrics == before
    assert before["adi"]["matched"] == 40


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_not_finite_show_no_bit(value):
    model = network()
    emb = embedder(model, SKETCH)
    (mark,) = unproven(emb)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    emb.regulariser()
    assert emb.metrics["sketch"]["matched"] == wmengine.verify(model, mark).matched == 0


# A mark in activations


@pytest.mark.slow
def test_deepsigns_trains_beside_a_model_that_writes_into_its_input():
    """Its keyed inputs are the mark's at every step, also for a model whose first layer works in place."""
    chosen = [wmengine.scheme("deepsigns", bits=64, groups=4, strength=0.1)]
    finals = []
    for first in (nn.ReLU(inplace=True), nn.ReLU()):
        model = nn.Sequential(first, *network())
        emb = embedder(model, chosen, num_classes=None)
        train(model, emb, 60)
        finals.append(emb.regulariser().item())
        (mark,) = emb.watermarks()
        assert wmengine.verify(model, mark).matched == 64
        assert emb.metrics["deepsigns"]["matched"] == 64
    assert finals[0] == finals[1]
