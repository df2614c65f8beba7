"""Every scheme on a device that is not the CPU: nothing is mixed, and no step of the loop waits for the device.

tests/test_other_devices.py runs these in a process of their own: a device that torch has once been told of stays.
"""

import copy

import pytest
import torch

import wmengine
from tests.pretended_device import NAME, pretended
from tests.test_check_preset import OTHERWISE, POOL, SMALL, prepared, text
from wmengine import ops
from wmengine.marks.catalogue import SCHEMES, scheme
from wmengine.ops import torch_cross_entropy
from wmengine.parts.training.untouched import Untouched
from wmengine.parts.triggers.samples import SampleTriggers
from wmengine.testing import small_network

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]


def moved(value):
    if isinstance(value, torch.Tensor | torch.nn.Module):
        return value.to(NAME)
    if isinstance(value, dict):
        return {name: moved(each) for name, each in value.items()}
    return type(value)(moved(each) for each in value) if isinstance(value, tuple | list) else value


@pytest.fixture
def device(monkeypatch):
    with pretended(monkeypatch) as found:
        yield found


def test_devices_are_not_mixed_and_waiting_is_counted(device):
    x = torch.ones(3, device=NAME)
    assert (x.device.type, (x + 1).device.type, x.cpu().device.type) == (NAME, NAME, "cpu")
    with pytest.raises(RuntimeError, match="on pretended and of"):
        x + torch.ones(3)
    device.waits.clear()
    x.to("cpu", non_blocking=True)
    assert (x[torch.tensor([1, 2])] + torch.ones(())).shape == (2,)
    assert not device.waits
    assert float(x.sum()) == 3.0
    assert list(device.waits.values()) == [1]


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "emmark"])
def test_every_scheme_is_trained_where_the_model_is(device, name):
    given = {"adi_tokens": text(), "deepipr_v1": {"model": prepared}, **OTHERWISE}.get(name, {}).copy()
    if isinstance(scheme(name).source, SampleTriggers):
        given |= {"samples": POOL, "controls": [small_network(seed) for seed in (7, 8, 9)]}
    build, loss_of = given.pop("model", small_network), given.pop("loss", None)
    sample = moved(given.pop("sample", POOL[0][:16]))
    model = build(0).to(NAME)
    options = {"num_classes": 10, "value_range": (0.0, 1.0)} | {key: moved(value) for key, value in given.items()}
    emb = wmengine.Embedder(
        model, wmengine.Key("K", bytes(32)), [scheme(name, **SMALL[name])], sample=sample, name="m", **options
    )
    rows = next(iter(sample.values())) if isinstance(sample, dict) else sample
    labels = (torch.arange(len(rows)) % 10).to(NAME)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    waits = {}
    for step in range(0 if isinstance(scheme(name).training, Untouched) else 4):
        if step == 2:
            device.waits.clear()  # the first steps may bring things there
        inputs, targets = emb.mix(sample, labels)
        answers = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        if loss_of is None:
            loss = emb.loss(answers, targets, inputs=inputs)
        else:
            loss = loss_of(answers, targets) + emb.regulariser()
        optimizer.zero_grad()
        loss.backward()
        waits = dict(device.waits)
        optimizer.step()
    assert not waits
    (mark,) = emb.watermarks()
    model.eval()
    found, told = wmengine.verify(model, mark), wmengine.verify(copy.deepcopy(model).cpu(), mark)
    assert found.error is None, found.error
    assert (found.matched, found.log10_p) == (told.matched, told.log10_p)


def a_model(seed=0):
    return small_network(seed).to(NAME).eval()


def embedder(model, *schemes, sample=POOL[0][:16], **given):
    options = {"num_classes": 10, "name": "m", "value_range": (0, 1)} | given
    return wmengine.Embedder(model, wmengine.Key("K", bytes(32)), list(schemes), sample=sample, **options)


def test_a_model_that_moves_takes_its_marks_along(device):
    model = small_network()
    emb = embedder(model, "adi", "sketch", scheme("riga", bits=64, width=256), "deepsigns")
    model.to(NAME)
    for _ in range(10):
        inputs, labels = emb.mix(*moved(POOL))
        emb.loss(model(inputs), labels).backward()
    assert emb.metrics["adi"]["total"] == 100
    other = wmengine.Embedder(model, marks=emb.watermarks(), sample=POOL[0][:16], num_classes=10, value_range=(0, 1))
    other.load_state_dict(emb.state_dict())
    inputs, labels = other.mix(*moved(POOL))
    other.loss(model(inputs), labels).backward()


def test_fit_takes_batches_from_the_cpu(device):
    model = a_model()
    emb = embedder(model, "adi")
    (mark,) = emb.fit([(POOL[0][part], POOL[1][part]) for part in torch.arange(90).split(30)], epochs=30)
    assert wmengine.verify(model, mark).owned


@pytest.mark.parametrize("where", ["cpu", NAME])
def test_what_is_made_of_a_model_there_takes_inputs_from_anywhere(device, where):
    key, (inputs, labels) = wmengine.Key("K", bytes(32)), (each.to(where) for each in POOL)
    served = wmengine.response(
        a_model(), key, num_classes=10, sample=inputs[:8], name="m", probes=inputs,
        scheme=scheme("response", probes=256, views=1),
    )  # fmt: skip
    assert served(inputs[:4]).device.type == where
    assert wmengine.verify(served, served.watermark()).owned
    controls = [a_model(seed) for seed in (1, 2)]
    found = wmengine.fingerprint(
        a_model(), key, "ipguard", samples=(inputs, labels), controls=controls, num_classes=10, name="m",
        value_range=(0, 1),
    )  # fmt: skip
    assert wmengine.verify(a_model(), found).matched > wmengine.verify(controls[0], found).matched
    prepared_one = wmengine.passport(a_model(), inputs[:2])
    (mark,) = embedder(prepared_one, scheme("deepipr_v1", bits=64), sample=inputs[:16]).watermarks()
    assert 0.0 <= wmengine.passport_accuracy(prepared_one, mark, inputs, labels) <= 1.0
    (triggers,) = embedder(a_model(), scheme("adi", count=20), sample=inputs[:16]).watermarks()
    assert wmengine.certify(a_model(), triggers, draws=3).total == 20


@pytest.mark.parametrize("where", ["cpu", NAME])
@pytest.mark.parametrize("name", [name for name, attack in wmengine.attacks.ATTACKS.items() if attack.takes != "file"])
def test_every_attack_leaves_a_model_there(device, name, where):
    known = wmengine.attacks.ATTACKS[name].defaults
    few = {"epochs": 1, "steps": 3, "iterations": 3, "rounds": 1, "queries": 64, "count": 16, "restarts": 1}
    model = a_model()
    options = {option: value for option, value in few.items() if option in known}
    attacked = wmengine.attacks.run(name, model, [each[:64].to(where) for each in POOL], seed=1, **options)
    for each in (model, attacked):
        assert {parameter.device.type for parameter in each.parameters()} == {NAME}


def test_a_kept_gradient_is_scaled_in_place_and_stays_what_it_was_for_another_backward(monkeypatch):
    """As in an eager step on a GPU; `device` above makes the operator go as in a graph."""
    scaled = []

    def scale(gradient, outer):
        scaled.append(float(outer))
        gradient.mul_(outer)

    logits, labels, weight = torch.randn(6, 5), torch.tensor([0, 1, -100, 3, 4, 2]), torch.rand(6)
    writes_gradient = torch_cross_entropy._writes_gradient
    with pretended(monkeypatch):
        monkeypatch.setattr(torch_cross_entropy, "_writes_gradient", writes_gradient)
        monkeypatch.setattr(torch_cross_entropy, "_scale_on_cuda", scale)
        leaf = logits.to(NAME).requires_grad_()
        loss = 3.0 * ops.marked_cross_entropy(leaf, labels.to(NAME), weight.to(NAME)).loss
        first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0].cpu() for _ in range(2))
        last = torch.autograd.grad(loss, leaf)[0].cpu()
    assert scaled == [3.0] * 3
    logits.requires_grad_()
    expected = torch.autograd.grad(3.0 * ops.marked_cross_entropy(logits, labels, weight).loss, logits)[0]
    for gradient in (first, second, last):
        torch.testing.assert_close(gradient, expected)
