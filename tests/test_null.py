"""The null hypothesis by simulation: over fresh symbols, a network made without them is accused as rarely as p says.

The network is fixed and only the symbols are drawn, as in the theorem: given everything else that scoring reads, they
are independent and uniform. By messages one observation of the network serves thousands of draws. P(p <= a) <= a is
checked at every a that was seen: the count of draws at or below it is no binomial outlier. And since the p-value of
matches is discrete, the randomised P(X > k) + U P(X = k), which is uniform if and only if the matches are exactly
binomial, is checked against the uniform distribution (Kolmogorov and Smirnov).
"""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from judged import KEY, Stub, black_box, images, messages, white_box
from scipy.stats import kstest
from torch import nn

from wmengine.identity.key import Key
from wmengine.judging.asking import TESTS, Terms
from wmengine.judging.judge import judge_suspect
from wmengine.judging.verification import verify
from wmengine.marks.catalogue import registered, scheme
from wmengine.parts.statistics.either import Either
from wmengine.parts.statistics.matches import Matches
from wmengine.parts.statistics.soft import Soft
from wmengine.parts.statistics.tails import binomial_log10_point, binomial_log10_tail
from wmengine.suspects import open_suspect
from wmengine.suspects.base import InputSpec, Tensor
from wmengine.testing import null_of

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWS, SHAPE, CLASSES = 2000, (1, 8, 8), 10
BITS, TRIGGERS = 64, 40
STATISTICS = {"matches": Matches(), "soft": Soft(), "either": Either()}


class Network(nn.Module):
    """Two convolutions of equal shape, so that more than one carrier adds up in each bit."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, CLASSES)),
        )

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def trained():
    """A stranger that has learned the digits: confident, and far from uniform over the classes of a noise image."""
    from sklearn.datasets import load_digits

    torch.manual_seed(1)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, *SHAPE) / 8 - 1
    y = torch.tensor(labels)
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(128):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        assert (model(x).argmax(dim=1) == y).float().mean() > 0.95
    return model


@pytest.fixture(params=["untrained", "trained"])
def stranger(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def presets():
    """The black-box and the white-box scheme with each statistic."""
    with ExitStack() as stack:
        found = {}
        for scheme_name, options in {"adi": {"count": TRIGGERS}, "sketch": {"bits": BITS}}.items():
            for name, statistic in STATISTICS.items():
                preset = scheme(scheme_name, **options)
                preset = replace(preset, name=f"{scheme_name} by {name}", version=8, statistic=statistic)
                stack.enter_context(registered(preset))
                found[scheme_name, name] = preset
        yield found


def carriers_of(tensors):
    return [tensor.values.shape for tensor in tensors]


def tensors_of(model):
    return open_suspect(model).tensors({"input": InputSpec(SHAPE, "float32")})


DRAWN = {}  # marks, by the commitment of the one whose symbols were drawn anew and by their number


def draws(suspect, mark, test="fixed", count=DRAWS):
    """One finding for each of so many fresh draws of the mark's symbols."""
    drawn = mark.commitment, count
    if drawn not in DRAWN:
        DRAWN[drawn] = messages(mark, count)
    found = judge_suspect(open_suspect(suspect), DRAWN[drawn], Terms(sequential=test == "sequential", log10_bar=9.0))
    assert not any(each.error for each in found)
    return found


def check_super_uniform(found):
    """P(p <= a) <= a at every a that was seen, within simulation error."""
    log10_p = np.sort([each.log10_p for each in found])
    values, last = np.unique(log10_p, return_index=True)
    below = np.append(last[1:], len(log10_p))
    for value, count in zip(values, below.tolist(), strict=True):
        chance = 10.0**value
        assert binomial_log10_tail(count, len(log10_p), chance) > -6, f"{count} draws have p <= {chance}"


def check_exact(found, total, chance):
    """Matches are binomial: their randomised p-values are uniform."""
    matches = np.array([each.matched for each in found])
    above = [0.0 if k == total else 10.0 ** binomial_log10_tail(k + 1, total, chance) for k in range(total + 1)]
    point = [10.0 ** binomial_log10_point(k, total, chance) for k in range(total + 1)]
    uniform = np.random.default_rng(0).uniform(size=len(matches))
    assert kstest(np.array(above)[matches] + uniform * np.array(point)[matches], "uniform").pvalue > 0.001


# --- white-box --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", STATISTICS)
def test_bits_of_strangers_are_as_rare_as_their_p_value_says(presets, stranger, statistic):
    mark = white_box(carriers_of(tensors_of(stranger)), preset=presets["sketch", statistic], shape=SHAPE)
    found = draws(stranger, mark)
    check_super_uniform(found)
    check_exact(found, BITS, 0.5)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_suspect_made_to_look_marked_is_no_exception(presets, statistic):
    """Equal filters, and filters of one weight: nothing to average over, many ties, and still a bound."""
    single = np.zeros((8, 8, 3, 3), np.float32)
    single[:, 0, 0, 0] = 1
    tensors = [Tensor(np.ones((8, 8, 3, 3), np.float32), "equal"), Tensor(single, "single")]
    mark = white_box(carriers_of(tensors), preset=presets["sketch", statistic])
    check_super_uniform(draws(Stub(weights=tensors), mark))


def test_tries_that_were_chosen_among_are_paid_for(presets, trained):
    """One carrier, two layers of its shape: the better one counts, and p stays a bound."""
    tensors = [tensor for tensor in tensors_of(trained) if tensor.values.shape == (8, 8, 3, 3)]
    assert len(tensors) == 2
    found = draws(Stub(weights=tensors), white_box([(8, 8, 3, 3)], preset=presets["sketch", "matches"]))
    check_super_uniform(found)
    unpaid = [replace(each, log10_p=binomial_log10_tail(each.matched, BITS, 0.5)) for each in found]
    with pytest.raises(AssertionError):
        check_super_uniform(unpaid)


def test_over_fresh_keys_too(untrained):
    """The geometry is drawn with the symbols: what is promised to whoever has one mark."""
    tensors = tensors_of(untrained)
    keys = (Key("stranger", number.to_bytes(32, "big")) for number in range(300))
    marks = [white_box(carriers_of(tensors), key=key, bits=BITS, shape=SHAPE) for key in keys]
    found = judge_suspect(Stub(weights=tensors), marks, Terms(sequential=False, log10_bar=9.0))
    check_super_uniform(found)
    check_exact(found, BITS, 0.5)


# --- black-box --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("answers", ["scores", "labels"])
def test_answers_of_strangers_are_as_rare_as_their_p_value_says(presets, stranger, statistic, test, answers):
    def labels(rows):
        with torch.no_grad():
            return stranger(torch.from_numpy(rows)).argmax(dim=1).numpy()

    mark = black_box(SHAPE, CLASSES, preset=presets["adi", statistic])
    found = draws(stranger if answers == "scores" else labels, mark, test, 1000)
    check_super_uniform(found)
    if test == "fixed" and answers == "scores":
        check_exact(found, TRIGGERS, 1 / CLASSES)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("test", TESTS)
def test_scores_that_hold_no_numbers_are_no_exception(presets, statistic, test):
    """NaN, +Inf, −Inf, distributions rounded to 0 and 1, equal scores: rows that say nothing, or something else."""
    generator = np.random.default_rng(3)
    scores = generator.normal(size=(TRIGGERS, CLASSES))
    scores[::7, 2], scores[1::7, 3], scores[2::7, 4:] = np.nan, np.inf, -np.inf
    scores[3::7], scores[4::7] = 0.25, np.eye(CLASSES)[generator.integers(0, CLASSES, len(scores[4::7]))]
    mark = black_box(SHAPE, CLASSES, preset=presets["adi", statistic])
    known = {row.tobytes(): answer for row, answer in zip(images(mark), scores, strict=True)}
    suspect = Stub(lambda rows: np.stack([known[row.tobytes()] for row in rows]))
    check_super_uniform(draws(suspect, mark, test, 1000))


def test_the_check_that_others_are_given_for_their_presets_draws_the_same(presets, trained):
    """`wmengine.testing.null_of` makes whole marks, one for each message."""
    mark = black_box(SHAPE, CLASSES, preset=presets["adi", "either"])
    made = null_of(trained, mark, KEY, 300)
    assert made.keys() == {0.1, 0.01, 0.001}
    assert all(share <= level + 4 * np.sqrt(level / 300) for level, share in made.items())


def test_a_stranger_is_owned_at_alpha_one_half_no_more_often_than_allowed(presets, trained):
    """The whole of verify, asked and judged, at a bar that strangers do reach."""
    mark = black_box(SHAPE, CLASSES, preset=presets["adi", "matches"])
    owned = [verify(trained, each, alpha=0.5).owned for each in messages(mark, 200)]
    tails = [10 ** binomial_log10_tail(k, TRIGGERS, 1 / CLASSES) for k in range(TRIGGERS)]
    reachable = max(tail for tail in tails if tail <= 0.5)
    assert abs(np.mean(owned) - reachable) < 4 * np.sqrt(reachable * (1 - reachable) / len(owned))
