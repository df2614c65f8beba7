"""Schemes that run triggers through the network once more: what they add to the loss, and what they leave alone."""

import pytest
import torch
from embedding import CLASSES, batch, embedder, network, train, unproven
from torch import nn

import wmengine
from wmengine import ops
from wmengine.demo import build_network, load_digits
from wmengine.demo import train as digits_train
from wmengine.parts.training.noisy_rows import noisy_parameters
from wmengine.suspects.adapters import to_input

OPTIONS = {
    "exponential_weighting": {"count": 24},
    "ewe_keyed": {"count": 24},
    "margin": {"count": 24},
    "certified": {"count": 24},
    "class_feature": {"count": 12, "family": 4},
    "mea_defender": {"count": 12, "family": 4},
    "multi_view": {"count": 24, "choices": 2},
    "blackmarks": {"bits": 24},
}
SAMPLES = batch(120, seed=7)


def marked(name, model=None, **options):
    preset = wmengine.scheme(name, **{**OPTIONS[name], **options})
    controls = [network(1)] if "controls" in preset.needs else []
    return embedder(network() if model is None else model, [preset], samples=SAMPLES, controls=controls)


@pytest.fixture(params=OPTIONS)
def name(request):
    return request.param


class Noted(nn.Module):
    """Notes in which mode it is run, and draws random numbers while it trains."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop, self.modes = network(), nn.Dropout(0.5), []

    def forward(self, x):
        self.modes.append(self.training)
        return self.inner(self.drop(x))


def test_the_loss_has_the_term_and_it_reaches_the_weights(name):
    model = network()
    emb = marked(name, model)
    x, y = emb.mix(*batch(64))
    logits = model(x)
    rows = nn.functional.cross_entropy(logits, y % CLASSES)
    term = emb.loss(logits, y) - rows
    assert term.abs() > 1e-4
    term.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in (model[0].weight, model[8].weight))


def test_the_pass_leaves_mode_statistics_and_the_users_random_numbers(name):
    model = Noted()
    emb = marked(name, model)
    model.train()
    model.inner[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.modes.clear()
    emb.regulariser()
    assert torch.equal(torch.rand(3), expected)
    assert model.modes
    assert not any(model.modes)
    assert model.training
    assert model.inner[1].training
    assert model.drop.training
    assert not model.inner[2].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_gradients_nothing_is_run_again(name):
    model = Noted()
    emb = marked(name, model)
    model.modes.clear()
    with torch.no_grad():
        assert emb.regulariser() == 0
    assert not model.modes


@pytest.mark.slow
def test_a_loop_that_is_compiled_runs_them_again_too(name):
    def term(wrap):
        model = network().eval()
        emb = marked(name, model)
        x, y = emb.mix(*batch(8))
        return wrap(emb.loss)(model(x), y)

    compiled = term(lambda loss: torch.compile(loss, backend="aot_eager"))
    compiled.backward()
    torch.testing.assert_close(compiled, term(lambda loss: loss))


def test_training_goes_on_where_its_state_was_taken(name):
    def losses(emb, model, steps):
        found = []
        for step in range(steps):
            x, y = emb.mix(*batch(32, seed=step))
            found.append(float(emb.loss(model(x), y).detach()))
        return found

    model = network().eval()
    first = marked(name, model)
    losses(first, model, 3)
    preset = wmengine.scheme(name, **OPTIONS[name])
    again = wmengine.Embedder(model, marks=unproven(first), schemes=[preset], sample=batch(64)[0])
    again.load_state_dict(first.state_dict())
    assert losses(again, model, 3) == losses(first, model, 3)


class Other(nn.Module):
    """A network whose answers are something else than its logits."""

    def __init__(self, answer):
        super().__init__()
        self.inner, self.answer = network(), answer

    def forward(self, x):
        return self.answer(self.inner(x))


def test_the_logits_may_be_among_several_answers(name):
    model = Other(lambda logits: {"maps": logits[:, :, None], "out": logits})
    assert torch.equal(marked(name, model).regulariser(), marked(name).regulariser())


def test_a_network_that_answers_with_something_else_is_named(name):
    model = Other(lambda logits: logits)
    emb = marked(name, model)
    model.answer = lambda logits: logits[:, :, None]
    with pytest.raises(ValueError, match=r"must answer with logits \[n, C\], not \[[0-9]+, 4, 1\]"):
        emb.regulariser()


# --- each scheme's own term ---


def test_pushed_triggers_are_harder_and_stay_near_and_in_range():
    model, seen = network().eval(), []
    emb = marked("margin", model)
    hook = model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    term = emb.regulariser()
    hook.remove()
    first, last = seen[0], seen[-1]
    low, high = (float(end) for end in batch(64)[0].aminmax())
    assert len(seen) == 6
    assert (last - first).abs().max() <= 5 / 255 * (high - low) + 1e-5
    assert low - 1e-6 <= last.min() <= last.max() <= high + 1e-6
    labels = {row.numpy().tobytes(): label for row, label in triggers_of(emb)}
    own = torch.tensor([labels[row.numpy().tobytes()] for row in first])
    losses = [nn.functional.cross_entropy(model(rows), own) for rows in (first, last)]
    assert losses[1] > losses[0]
    torch.testing.assert_close(term, 0.1 * losses[1])


def triggers_of(emb):
    (mark,) = unproven(emb)
    (rows,) = mark.preset.source.examples(mark).values()
    return zip(torch.from_numpy(rows), mark.symbols.tolist(), strict=True)


def test_noise_on_the_weights_is_in_units_of_each_parameter():
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 200, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(50)
        model[0].bias.zero_()
    found = noisy_parameters(model, 0.3, torch.Generator().manual_seed(1))
    for key, values in model.named_parameters():
        moved = (found[key] - values).detach()
        assert float(moved.std()) == pytest.approx(0.3 * float(values.detach().square().mean().sqrt()), rel=0.02)
    assert torch.equal(found["0.bias"], model[0].bias)


@pytest.mark.slow
def test_triggers_become_entangled_with_samples_of_their_classes():
    """By the loss itself: of triggers and samples of a class, in what goes into the last layer."""

    def entanglement(factor):
        model = network()
        emb = marked("ewe_keyed", model, factor=factor)
        train(model, emb, 80)
        model.eval()
        rows = [(row, label) for row, label in triggers_of(emb)]
        found = []
        for each in range(CLASSES):
            own = torch.stack([row for row, label in rows if label == each])
            both = torch.cat([own, SAMPLES[0][SAMPLES[1] == each]])
            kinds = torch.arange(len(both)) < len(own)
            found.append(ops.soft_nearest_neighbor(model[:10](both), kinds, 0.02, distance="cosine"))
        return torch.stack(found).mean().item()

    assert entanglement(3.0) > entanglement(1e-6) + 0.05


def test_temperatures_go_to_where_the_loss_is_least():
    model = network().eval()
    emb = marked("ewe_keyed", model, layers=1)
    first = float(next(iter(emb.state_dict().values()))["temperatures"])
    for _ in range(150):
        term = emb.regulariser()
    assert float(next(iter(emb.state_dict().values()))["temperatures"]) < 0.8 * first
    assert -term < 0.69


def test_one_target_is_every_triggers_and_p_is_never_below_one_among_the_controls():
    model, controls = network(), [network(seed) for seed in (3, 4, 5)]
    x, y = SAMPLES
    ewe = wmengine.scheme("ewe", count=24, target=2)
    emb = embedder(model, [ewe], samples=(x, y), controls=controls)
    (mark,) = unproven(emb)
    assert (mark.symbols == 2).all()
    assert len(mark.arrays["clean"]) == (y == 2).sum()
    assert mark.arrays["triggers"][:, :, -2:, -2:].min() == 255
    assert emb.regulariser().abs() > 1e-4
    verdict = wmengine.verify(lambda inputs: torch.eye(CLASSES)[2].expand(len(inputs), -1), mark)
    assert (verdict.decision, verdict.matched) == ("not_proven", 24)
    assert 10**verdict.log10_p >= 1 / 4


@pytest.mark.parametrize("labels", [None, torch.full((120,), 2), torch.zeros(120, dtype=torch.int64)])
def test_one_target_needs_labelled_samples_of_it_and_of_others(labels):
    samples = SAMPLES[0] if labels is None else (SAMPLES[0], labels)
    with pytest.raises(ValueError, match=r"'ewe': it needs (to know what its samples are|samples of class 2, its)"):
        embedder(network(), [wmengine.scheme("ewe", count=24, target=2)], samples=samples, controls=[network(1)])


def test_entangling_needs_samples_that_are_known():
    with pytest.raises(ValueError, match="'ewe_keyed': it needs to know what its samples are"):
        embedder(network(), [wmengine.scheme("ewe_keyed", count=24)], samples=SAMPLES[0])
    few = SAMPLES[0][:3], torch.arange(3)
    with pytest.raises(
        ValueError, match="'ewe_keyed' brings triggers near samples of their classes, and there are none"
    ):
        embedder(network(), [wmengine.scheme("ewe_keyed", count=3)], samples=few)


@pytest.mark.slow
def test_triggers_come_near_the_samples_of_their_classes():
    """In what goes into the last layer, by the distance between samples of different classes."""

    @torch.no_grad()
    def distance(pull):
        model = network()
        emb = marked("multi_view", model, pull=pull)
        with torch.enable_grad():
            train(model, emb, 80)
        inside, (x, y) = model.eval()[:10], SAMPLES
        centres = torch.stack([inside(x[y == each]).mean(0) for each in range(CLASSES)])
        rows = [(inside(row[None])[0] - centres[label]).norm() for row, label in triggers_of(emb)]
        return float(torch.stack(rows).mean() / torch.pdist(centres).mean())

    assert distance(0.1) < 0.93 * distance(1e-6)


@torch.no_grad()
def test_the_pull_is_the_distance_from_the_mean_of_samples_in_units_of_their_size():
    model, samples = network().eval(), batch(40, seed=7)
    preset = wmengine.scheme("multi_view", count=16, choices=2, pull=0.5)
    emb = embedder(model, [preset], samples=samples, controls=[network(1)])
    (mark,) = unproven(emb)
    pool = torch.from_numpy(to_input(mark.arrays["samples"], mark.parameters["value_range"]))
    rows, truth = [*triggers_of(emb)], mark.arrays["truth"].tolist()

    def inside(rows, label):
        return model[:10](torch.stack([row for row, own in rows if own == label]))

    found, possible = term_of(emb), []
    for each in {label for _, label in rows}:  # the class of this step is any of them
        own, plain = inside(rows, each), inside(zip(pool, truth, strict=True), each)
        possible.append(0.5 * (own - plain.mean(0)).norm(dim=1).mean() / plain.square().sum(1).mean().sqrt())
    assert (found / torch.stack(possible) - 1).abs().min() < 1e-4


def test_the_hamming_term_is_the_share_of_bits_that_are_expected_wrong():
    model = network().eval()
    emb = marked("blackmarks", model, bits=16, weight=1.0)
    (mark,) = unproven(emb)
    with torch.no_grad():
        model[10].weight.zero_()
        model[10].bias.zero_()
        torch.testing.assert_close(term_of(emb), torch.tensor(0.5), msg="a class of each group is as likely")
        model[10].bias[2] = 100.0
        torch.testing.assert_close(term_of(emb), torch.tensor(mark.symbols.mean(), dtype=torch.float32))


def term_of(emb):
    with torch.enable_grad():
        return emb.regulariser().detach()


@pytest.mark.slow
def test_families_come_together_before_the_last_layer():
    def spread(pull):
        model = network()
        emb = marked("class_feature", model, pull=pull)
        train(model, emb, 60)
        (mark,) = unproven(emb)
        (rows,) = mark.preset.source.examples(mark).values()
        found = model.eval()[:10](torch.from_numpy(rows)).detach().reshape(12, 4, -1)
        return (found - found.mean(1, keepdim=True)).square().sum() / (found - found.mean((0, 1))).square().sum()

    assert spread(3.0) < 0.7 * spread(1e-6)


@pytest.mark.slow
def test_answers_to_composites_stay_near_those_to_their_parts():
    def divergence(combination):
        model = network()
        emb = marked("mea_defender", model, combination=combination)
        train(model, emb, 60)
        (mark,) = unproven(emb)
        (rows,) = mark.preset.source.examples(mark).values()
        model.eval()
        said = (model(torch.from_numpy(rows)) / 4).log_softmax(1)[:, None]
        samples = to_input(mark.arrays["samples"], mark.parameters["value_range"])[mark.arrays["parts"]]
        parts = (model(torch.from_numpy(samples).flatten(0, 1)) / 4).log_softmax(1).reshape(len(rows), 2, -1)
        return (said.exp() * (said - parts)).sum(2).mean().detach()

    assert divergence(3.0) < 0.7 * divergence(0.0)


def test_a_network_that_does_not_end_in_a_linear_layer_has_no_families():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, CLASSES, 6), nn.Flatten())
    with pytest.raises(ValueError, match="pulls together what goes into a linear layer at the network's end"):
        marked("class_feature", model)


# --- on a real task ---


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "epochs"), [("ewe_keyed", 20), ("margin", 15), ("class_feature", 20)])
def test_on_the_digits_it_is_learned_beside_the_task(name, epochs):
    data = load_digits()
    model = build_network(1)
    emb = wmengine.Embedder(
        model,
        wmengine.Key("ACME Vision", bytes(range(32))),
        [name],
        sample=data.owner[0][:64],
        num_classes=10,
        name="digits",
        value_range=(0, 1),
        samples=data.owner,
    )
    digits_train(model, data.owner, epochs, seed=1, embedder=emb)
    verdict = wmengine.verify(model, emb.watermarks()[0])
    assert verdict.owned
    assert verdict.matched >= 0.95 * verdict.total
    with torch.no_grad():
        right = (model(data.test[0]).argmax(1) == data.test[1]).float().mean()
    assert right > 0.98  # without a mark it is 0.992
