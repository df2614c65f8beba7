"""What the Embedder promises: two changed lines mark a model, and all else about the training stays as it was."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from wmengine.embed import Embedder, _count_bits
from wmengine.judge import bit_matches
from wmengine.triggers import to_input

import wmengine
from wmengine import stats

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 4
KEY = wmengine.Key("ACME Vision", bytes(range(32)))


def network(seed=0, channels=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


def batch(rows, seed=0, channels=1):
    """Four classes, each a noisy prototype with values around [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(CLASSES, channels, 8, 8, generator=torch.Generator().manual_seed(99))
    y = torch.randint(0, CLASSES, (rows,), generator=generator)
    return prototypes[y] + 0.3 * torch.randn(rows, channels, 8, 8, generator=generator), y


def small(count=40, bits=64):
    return [wmengine.scheme("sketch", bits=bits), wmengine.scheme("adi", count=count)]


def embedder(model, chosen=None, **options):
    settings = {"num_classes": CLASSES, "sample": batch(64)[0], "name": "test-model", **options}
    return Embedder(model, KEY, small() if chosen is None else chosen, **settings)


def train(model, emb, steps, seed=1):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for step in range(steps):
        x, y = emb.mix(*batch(64, seed=seed * 1000 + step))
        loss = emb.loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def marked():
    """(model, embedder, base): one training with both marks, and the model before it."""
    model = network()
    base = copy.deepcopy(model)
    emb = embedder(model)
    return train(model, emb, 100), emb, base


# --- what it is for ---------------------------------------------------------------------------------------------------


def test_two_changed_lines_embed_both_marks_and_the_task_is_learned(marked):
    model, emb, base = marked
    for mark in emb.watermarks():
        verdict = wmengine.verify(model, mark, key=KEY)
        assert verdict.owned
        assert verdict.derivation == "checked"
        assert not wmengine.verify(base, mark).owned
    x, y = batch(200, seed=5)
    with torch.no_grad():
        assert (model.eval()(x).argmax(dim=1) == y).float().mean() > 0.97


def test_the_bits_reach_their_margin_so_that_all_of_them_match(marked):
    model, emb, _ = marked
    sketch, _ = emb.watermarks()
    assert wmengine.verify(model, sketch).matched == sketch.total == 64


def test_a_strangers_bits_and_another_keys_bits_stay_at_chance(marked):
    model, _, _ = marked
    other = Embedder(
        model, wmengine.Key("Other", bytes(32)), small(), num_classes=CLASSES, sample=batch(64)[0], name="theirs"
    )
    with pytest.warns(UserWarning, match="does not prove itself"):
        marks = other.watermarks()
    assert not any(wmengine.verify(model, mark).owned for mark in marks)


def test_an_unmarked_models_projections_have_standard_deviation_one():
    model = network(seed=3)
    emb = embedder(model, [wmengine.scheme("sketch", bits=256, margin=1.0)])
    emb.regulariser()
    (y,) = emb._projected
    assert abs(float(y.std()) - 1.0) < 0.12


def test_uchidas_scheme_embeds_its_bits_in_one_weight():
    model = network(seed=2)
    emb = embedder(model, [wmengine.scheme("uchida", bits=64)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        emb.regulariser().backward()
        optimizer.step()
    (mark,) = emb.watermarks()
    assert mark.parameters["carriers"] == [[64, 512]]
    assert wmengine.verify(model, mark).matched == 64


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_over_all_rows_plus_the_regulariser():
    model = network()
    emb = embedder(model)
    x, y = emb.mix(*batch(32))
    logits = model(x)
    expected = functional.cross_entropy(logits, y % CLASSES) + emb.regulariser()
    torch.testing.assert_close(emb.loss(logits, y), expected, rtol=1e-5, atol=1e-6)
    smoothed = functional.cross_entropy(logits, y % CLASSES, label_smoothing=0.1) + emb.regulariser()
    torch.testing.assert_close(emb.loss(logits, y, label_smoothing=0.1), smoothed, rtol=1e-5, atol=1e-6)


def test_the_regulariser_follows_the_live_weights():
    model = network()
    emb = embedder(model, [wmengine.scheme("sketch", bits=64)])
    before = emb.regulariser().item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-5.0)
    (y,) = emb._projected
    after = emb.regulariser().item()
    assert after != pytest.approx(before, rel=1e-3)
    # Unit filters keep nothing of the factor but its sign.
    torch.testing.assert_close(emb._projected[0], -y, rtol=1e-4, atol=1e-5)


def test_a_parameter_that_is_replaced_is_read_anew():
    model = network()
    emb = embedder(model, [wmengine.scheme("sketch", bits=64)])
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
    emb = embedder(network())
    x, y = emb.mix(*batch(32))
    with torch.autocast("cpu", dtype=dtype):
        logits = emb._model(x)
        loss = emb.loss(logits, y)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, emb.loss(logits.float(), y), rtol=1e-3, atol=1e-3)
    loss.backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in emb._model.parameters())


def test_a_float16_model_trains():
    model = network().to(torch.bfloat16)
    emb = embedder(model, sample=batch(64)[0].to(torch.bfloat16))
    x, y = batch(16)
    x, y = emb.mix(x.to(torch.bfloat16), y)
    assert x.dtype == torch.bfloat16
    emb.loss(model(x), y).backward()
    assert model[8].weight.grad.dtype == torch.bfloat16


def test_the_loss_compiles_into_one_graph():
    model = network().eval()
    emb = embedder(model)
    x, y = emb.mix(*batch(32))
    logits = model(x).detach()
    step = torch.compile(lambda logits, labels: emb.loss(logits, labels), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(logits, y), emb.loss(logits, y), rtol=1e-5, atol=1e-6)
    step(logits, y).backward()
    assert model[8].weight.grad is not None


def test_the_compiled_loss_is_compiled_for_the_first_steps_only():
    emb = embedder(network())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(emb.loss, fullgraph=True, backend=backend)
    for _ in range(20):
        _, y = emb.mix(*batch(64))
        step(functional.one_hot(y % CLASSES, CLASSES).float(), y)
    assert len(graphs) <= 2  # the second, because the first step had no projections before it
    assert emb.metrics["adi"] == {"matches": 8, "total": 8}
    step = torch.compile(emb.loss, fullgraph=True, backend="aot_eager")
    for _ in range(20):
        _, y = emb.mix(*batch(64))
        step(functional.one_hot(y % CLASSES, CLASSES).float(), y)
    assert emb.metrics["adi"] == {"matches": 8, "total": 8}


# --- the trigger rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "added"), [(4, 2), (16, 2), (64, 8), (400, 40), (1000, 40)])
def test_mix_appends_an_eighth_of_the_batch_at_least_two_and_at_most_all_triggers(rows, added):
    emb = embedder(network())
    x, y = batch(rows)
    mixed, labels = emb.mix(x, y)
    assert torch.equal(mixed[:rows], x)
    assert torch.equal(labels[:rows], y)
    assert len(mixed) == len(labels) == rows + added
    assert bool(((labels[rows:] >= CLASSES) & (labels[rows:] < 2 * CLASSES)).all())


def test_every_trigger_is_drawn_once_before_any_is_drawn_again():
    emb = embedder(network())
    _, adi = _unproven(emb)
    x, y = batch(64)
    seen = torch.cat([emb.mix(x, y)[0][64:] for _ in range(5)])
    assert len(torch.unique(seen.flatten(1), dim=0)) == adi.total == 40


def test_triggers_carry_the_labels_and_the_values_that_verification_asks_for():
    emb = embedder(network())
    _, adi = _unproven(emb)
    x, y = emb.mix(*batch(400))
    expected = to_input(adi.arrays["triggers"], adi.parameters["value_range"])
    order = [int(np.flatnonzero((expected == row).all(axis=(1, 2, 3)))[0]) for row in x[400:].numpy()]
    assert sorted(order) == list(range(40))
    assert np.array_equal(y[400:].numpy() - CLASSES, adi.arrays["labels"][order])


def test_the_samples_range_per_channel_is_the_triggers_unless_it_is_given():
    sample = torch.stack([torch.linspace(-1, 3, 64), torch.linspace(0, 0.1, 64)]).reshape(1, 2, 8, 8)
    adi = [wmengine.scheme("adi", count=10)]
    (mark,) = _unproven(embedder(network(channels=2), adi, sample=sample))
    ends = [[float.fromhex(end) for end in pair] for pair in mark.parameters["value_range"]]
    assert ends == [[-1.0, 3.0], [0.0, float(np.float32(0.1))]]
    (mark,) = _unproven(embedder(network(channels=2), adi, sample=sample, value_range=(0, 1)))
    assert [[float.fromhex(end) for end in pair] for pair in mark.parameters["value_range"]] == [[0.0, 1.0]] * 2


def test_channels_last_batches_stay_channels_last():
    emb = embedder(network(channels=3), sample=batch(64, channels=3)[0])
    x, y = batch(16, channels=3)
    mixed, _ = emb.mix(x.contiguous(memory_format=torch.channels_last), y)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert not mixed.is_contiguous()


def test_a_white_box_mark_alone_leaves_the_batch_as_it_is():
    emb = embedder(network(), [wmengine.scheme("sketch", bits=64)])
    x, y = batch(16)
    mixed, labels = emb.mix(x, y)
    assert mixed is x
    assert labels is y


def test_a_black_box_mark_alone_adds_nothing_but_its_rows():
    model = network().eval()
    emb = embedder(model, [wmengine.scheme("adi", count=40)])
    x, y = emb.mix(*batch(16))
    torch.testing.assert_close(emb.loss(model(x), y), functional.cross_entropy(model(x), y % CLASSES))
    assert emb.regulariser().item() == 0.0


# --- the model and the process stay what they were --------------------------------------------------------------------


def test_the_users_random_numbers_are_untouched():
    model = network()
    model.insert(8, nn.Dropout(0.5))
    before = torch.get_rng_state()
    emb = embedder(model)
    _, y = emb.mix(*batch(16))
    emb.loss(torch.zeros(len(y), CLASSES), y)
    _unproven(emb)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_stays_a_plain_module_in_its_own_mode():
    model = network()
    model[1].eval()  # a frozen BatchNorm
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    emb = embedder(model)
    _, y = emb.mix(*batch(16))
    emb.loss(torch.zeros(len(y), CLASSES), y)
    _unproven(emb)
    assert [module.training for module in model.modules()] == modes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.save(model, io.BytesIO())
    copy.deepcopy(model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_looked_through(wrap):
    model = network()
    plain, wrapped = embedder(model), embedder(wrap(model))
    torch.testing.assert_close(wrapped.regulariser(), plain.regulariser())
    assert [mark.commitment for mark in _unproven(wrapped)] == [mark.commitment for mark in _unproven(plain)]


def test_measuring_marks_does_not_compile_a_compiled_model():
    def backend(graph, inputs):
        raise AssertionError("compiled")

    _unproven(embedder(torch.compile(network(), backend=backend)))


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


def test_frozen_layers_carry_nothing():
    model = network()
    model[3].weight.requires_grad_(False)
    (mark,) = _unproven(embedder(model, [wmengine.scheme("sketch", bits=64)]))
    assert mark.parameters["carriers"] == [[16, 1, 3, 3], [64, 512], [4, 64]]
    assert mark.parameters["carrier_indices"] == [0, 2, 3]  # places among all layers, frozen ones too
    (mark,) = _unproven(embedder(model, [wmengine.scheme("sketch", bits=64, marked=2)]))
    assert mark.parameters["carriers"] == [[64, 512]]
    with pytest.raises(ValueError, match="is to mark weight 1, which is not trained"):
        embedder(model, [wmengine.scheme("sketch", bits=64, marked=1)])


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_metrics_count_the_trigger_rows_and_the_bits():
    model = network()
    emb = embedder(model)
    assert emb.metrics == {}
    _, y = emb.mix(*batch(64))
    answers = y % CLASSES
    answers[-3:] = (answers[-3:] + 1) % CLASSES
    emb.loss(functional.one_hot(answers, CLASSES).float(), y)
    found = emb.metrics
    assert found["adi"] == {"matches": 5, "total": 8}
    verdict = wmengine.verify(model, _unproven(emb)[0])
    assert found["sketch"] == {
        "bit_errors": 64 - verdict.matched,
        "total": 64,
        "log10_p": pytest.approx(stats.binomial_log10_tail(verdict.matched, 64, 0.5)),
    }


def test_metrics_count_no_trigger_of_earlier_batches_again():
    emb = embedder(network())
    for right in (False, True, True, True, True, True, True):
        _, y = emb.mix(*batch(64))
        answers = (y + (0 if right else 1)) % CLASSES
        emb.loss(functional.one_hot(answers, CLASSES).float(), y)
        assert emb.metrics["adi"] == {"matches": 8 if right else 0, "total": 8}


@pytest.mark.parametrize("gradients", [False, True])
def test_validation_batches_do_not_disturb_the_metrics(gradients):
    emb = embedder(network())
    _, y = emb.mix(*batch(64))
    emb.loss(functional.one_hot(y % CLASSES, CLASSES).float(), y)
    with torch.set_grad_enabled(gradients):
        for _ in range(10):
            emb.loss(torch.zeros(16, CLASSES), torch.zeros(16, dtype=torch.int64))
    assert emb.metrics["adi"] == {"matches": 8, "total": 8}


def test_weights_that_are_not_finite_show_no_bit():
    model = network()
    emb = embedder(model, [wmengine.scheme("sketch", bits=64)])
    (mark,) = _unproven(emb)
    for y, shown in ((np.inf, 0), (-np.inf, 0), (np.nan, 0), (0.0, 0), (1.0, int(mark.arrays["bits"].sum()))):
        projected = np.full(64, y)
        assert _count_bits(projected, mark) == bit_matches(projected, mark.arrays["bits"]) == shown


def test_a_mark_that_does_not_prove_itself_is_warned_about(marked):
    with pytest.warns(UserWarning, match=r"the mark 'sketch' does not prove itself on this model: \d+ of 64"):
        embedder(network(), [wmengine.scheme("sketch", bits=64)]).watermarks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marked[1].watermarks()


def test_the_control_is_what_the_unmarked_base_shows(marked):
    _, emb, base = marked
    for mark in emb.watermarks():
        verdict = wmengine.verify(base, mark)
        assert mark.control == {
            "matched": verdict.matched,
            "total": verdict.total,
            "log10_p": f"{verdict.log10_p:.4f}",
        }


def test_watermarks_come_in_the_order_of_the_schemes_and_survive_their_file(marked, tmp_path):
    model, emb, _ = marked
    marks = emb.watermarks()
    assert [mark.scheme for mark in marks] == ["sketch", "adi"]
    assert [mark.scheme for mark in _unproven(embedder(network(), small()[::-1]))] == ["adi", "sketch"]
    for mark in marks:
        mark.check_derivation(KEY)
        mark.save(tmp_path / "mark.wm")
        assert wmengine.verify(model, tmp_path / "mark.wm", key=KEY).owned


def test_two_models_of_one_owner_share_nothing():
    first, second = (_unproven(embedder(network(), name=name)) for name in ("one", "two"))
    assert not np.array_equal(first[0].arrays["bits"], second[0].arrays["bits"])
    assert not np.array_equal(first[1].arrays["triggers"], second[1].arrays["triggers"])


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2, and it is 1"),
        ({"num_classes": 7}, ValueError, r"answers \[40, 1, 8, 8\] inputs with \[40, 4\] .* is num_classes right"),
        ({"sample": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, TypeError, "sample must be a floating tensor.*uint8"),
        ({"sample": np.zeros((4, 1, 8, 8), np.float32)}, TypeError, "sample must be a floating tensor.*ndarray"),
        ({"sample": torch.zeros(8)}, ValueError, r"sample must be a batch \[n, ...\]"),
        ({"sample": torch.zeros(0, 1, 8, 8)}, ValueError, "at least one row"),
        ({"sample": torch.full((4, 1, 8, 8), torch.nan)}, ValueError, "sample holds NaN or Inf"),
        ({"sample": torch.ones(4, 1, 8, 8)}, ValueError, "value_range is a single point"),
        ({"value_range": [(0, 1), (0, 1)]}, ValueError, "one pair for each of the 1 channels"),
        ({"value_range": (1, 0)}, ValueError, "lo must not exceed hi"),
        ({"chosen": []}, ValueError, "schemes must be a list"),
        ({"chosen": "sketch"}, ValueError, "schemes must be a list"),
        ({"chosen": ["sketsch"]}, ValueError, "there is no scheme 'sketsch'; the schemes are sketch"),
        ({"chosen": ["sketch", 3]}, TypeError, "one is 3"),
        ({"chosen": ["adi", wmengine.scheme("adi", count=50)]}, ValueError, "each scheme can be embedded once"),
        ({"chosen": [wmengine.scheme("sketch", bits=4096)]}, ValueError, r"needs at least \d+ carrier values for 4096"),
        ({"chosen": [wmengine.scheme("uchida", bits=1024)]}, ValueError, "1 carriers hold 512; ask for fewer"),
        ({"name": ""}, ValueError, "name"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options, error, message):
    with pytest.raises(error, match=message):
        embedder(network(), **options)


def test_a_model_without_weights_to_mark_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(64))
    with pytest.raises(ValueError, match="the model trains none"):
        embedder(model, ["sketch"], num_classes=64)
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="the model trains none"):
        embedder(frozen, ["sketch"])


def test_a_model_that_does_not_answer_with_logits_is_refused():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return {"logits": self.inner(x)}

    with pytest.raises(TypeError, match="answers with dict; a black-box mark needs logits"):
        embedder(Wrapped())


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            functional.one_hot(torch.zeros(16, dtype=torch.int64), CLASSES).float(),
            TypeError,
            "soft labels have no room",
        ),
        (torch.zeros(16, dtype=torch.int32), TypeError, "labels must be int64"),
        (torch.full((16,), CLASSES), ValueError, "labels must be from 0 to 3, and one is 4"),
        (torch.full((16,), -1), ValueError, "labels must be from 0 to 3, and one is -1"),
        (torch.zeros(15, dtype=torch.int64), ValueError, "with 15 labels"),
    ],
)
def test_mix_refuses_labels_that_it_cannot_carry(labels, error, message):
    with pytest.raises(error, match=message):
        embedder(network()).mix(batch(16)[0], labels)


def test_mix_refuses_inputs_unlike_the_sample():
    emb = embedder(network())
    y = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"a batch must be \[n, 1, 8, 8\].*\[4, 1, 9, 9\]"):
        emb.mix(torch.zeros(4, 1, 9, 9), y)
    with pytest.raises(TypeError, match="inputs must be floating"):
        emb.mix(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), y)


def test_loss_refuses_logits_of_another_width_and_labels_of_another_embedder():
    emb = embedder(network())
    y = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits must be \[4, 4\].*\[4, 10\]"):
        emb.loss(torch.zeros(4, 10), y)
    with pytest.raises(TypeError, match="soft labels"):
        emb.loss(torch.zeros(4, CLASSES), torch.zeros(4, CLASSES))
    with pytest.raises(ValueError, match="group"):
        emb.loss(torch.zeros(4, CLASSES), y + 5 * CLASSES)


def _unproven(emb):
    """The watermarks of a model that was not trained with them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return emb.watermarks()
