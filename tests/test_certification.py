"""`wmengine.certify`: symbols by vote over noisy copies, an exact p-value, and a radius in which the votes hold."""

import math
from statistics import NormalDist

import pytest
import torch
from embedding import batch, embedder, network, train, unproven

import wmengine


@pytest.fixture(scope="module")
def trained():
    model = network()
    emb = embedder(model, [wmengine.scheme("certified", count=40)])
    train(model, emb, 60)
    return model, unproven(emb)[0]


def test_a_marked_network_holds_its_mark_under_noise_and_the_radius_is_cohens(trained):
    found = wmengine.certify(*trained, draws=60, noise=0.1)
    assert (found.matched, found.total) == (40, 40)
    assert found.log10_p == pytest.approx(40 * math.log10(1 / 4))
    # All 60 draws agree, with a chance of at least p where p^60 = 0.01 / 40.
    least = (0.01 / 40) ** (1 / 60)
    assert found.radius == pytest.approx(0.1 * NormalDist().inv_cdf(least), rel=1e-6)


def test_a_change_within_the_radius_leaves_the_votes(trained):
    model, mark = trained
    found = wmengine.certify(model, mark, draws=60, noise=0.1)
    changed, random = network(), torch.Generator().manual_seed(3)
    changed.load_state_dict(model.state_dict())
    moves = {name: torch.randn(values.shape, generator=random) for name, values in changed.named_parameters()}
    length = math.sqrt(sum(float(move.square().sum()) for move in moves.values()))
    with torch.no_grad():
        for name, values in changed.named_parameters():
            values += 0.99 * found.radius / length * values.square().mean().sqrt() * moves[name]
    assert wmengine.certify(changed, mark, draws=60, noise=0.1).log10_p <= -9


def test_the_model_is_left_as_it_was_and_the_result_is_the_same_again(trained):
    model, mark = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    assert wmengine.certify(model, mark, draws=5) == wmengine.certify(model, mark, draws=5)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_a_stranger_is_certified_nothing(trained):
    found = wmengine.certify(network(5), trained[1], draws=20)
    assert found.log10_p > -4
    assert found.radius == 0


def test_too_much_noise_leaves_votes_but_no_radius(trained):
    assert wmengine.certify(*trained, draws=40, noise=3.0).radius == 0


def test_families_vote_as_they_are_read():
    samples = batch(60, seed=7)
    mark = unproven(embedder(network(), [wmengine.scheme("class_feature", count=8, family=3)], samples=samples))[0]
    assert wmengine.certify(network(), mark, draws=3).total == 8


def test_the_vote_of_a_key_drawn_afresh_is_binomial(trained):
    """So that P(p <= a) <= a: other messages, one network, the same votes."""
    model, mark = trained
    key = wmengine.Key("ACME Vision", bytes(range(32)))
    p = [wmengine.certify(model, mark.with_message(key, f"copy {n}"), draws=3).log10_p for n in range(60)]
    assert sum(each <= -1 for each in p) <= 14


@pytest.mark.parametrize(
    "wrong", [{"draws": 0}, {"noise": 0.0}, {"noise": math.nan}, {"confidence": 1.0}, {"alpha": 0.0}]
)
def test_numbers_out_of_range_are_refused(trained, wrong):
    with pytest.raises(ValueError, match="draws and noise must be above 0, confidence between 1/2 and 1"):
        wmengine.certify(*trained, **wrong)


def test_only_marks_that_are_asked_for_are_certified():
    mark = unproven(embedder(network(), [wmengine.scheme("sketch", bits=16)]))[0]
    with pytest.raises(ValueError, match="a certificate is of a mark of triggers that proves, and 'sketch' is none"):
        wmengine.certify(network(), mark)
