"""The null hypothesis by simulation: over fresh keys, a network made without them is accused as rarely as p says.

The network is fixed and only the key is drawn, as in the theorem: given everything else that scoring reads, the bits
and the labels are independent and uniform. Two things are tested. P(p <= a) <= a at every a that was seen: the count of
keys at or below it is no binomial outlier. And since p is discrete, the randomised P(X > k) + U P(X = k), which is
uniform if and only if the matches are exactly binomial, against the uniform distribution (Kolmogorov and Smirnov).
"""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn
from wmengine.carriers import Tensor
from wmengine.key import Key
from wmengine.schemes import black_box_parameters, scheme, white_box_parameters
from wmengine.stats import binomial_log10_point, binomial_log10_tail
from wmengine.triggers import to_input
from wmengine.verify import verify
from wmengine.watermark import Watermark

from wmengine.suspects import open_suspect
from wmengine.suspects.adapters import AS_RECORDED

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS, SHAPE, CLASSES = 2000, (1, 8, 8), 10
BITS, TRIGGERS = 64, 20


def keys(purpose):
    """Fresh keys, the same ones in every run."""
    return (Key("stranger", hashlib.sha256(f"{purpose} {number}".encode()).digest()) for number in range(KEYS))


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


def check_super_uniform(log10_p):
    """P(p <= a) <= a at every a that was seen, within simulation error."""
    log10_p = np.asarray(log10_p)
    assert log10_p.shape == (KEYS,)
    for value in np.unique(log10_p):
        below = int((log10_p <= value).sum())
        assert binomial_log10_tail(below, KEYS, 10.0**value) > -6, f"{below} of {KEYS} keys have p <= {10.0**value}"


def check_exact(matches, total, p0):
    """Both tests on the matches int[KEYS] of total symbols."""
    check_super_uniform([binomial_log10_tail(int(count), total, p0) for count in matches])
    chance = np.random.default_rng(0).uniform(size=KEYS)
    above = np.array([0.0 if k == total else 10.0 ** binomial_log10_tail(k + 1, total, p0) for k in range(total + 1)])
    point = np.array([10.0 ** binomial_log10_point(k, total, p0) for k in range(total + 1)])
    matches = np.asarray(matches)
    assert kstest(above[matches] + chance * point[matches], "uniform").pvalue > 0.01


class Cached:
    """A suspect whose tensors are read, or whose answers are asked, once for all keys."""

    name, sha256, notes = "cached", None, []

    def __init__(self, tensors=(), answers=None):
        self.read, self.answers = tensors, answers

    def adapters(self, trigger_shape, value_range, every=True):
        return [AS_RECORDED]

    def close(self):
        pass

    def query(self, inputs, num_classes=None):
        return self.answers[: len(inputs)]

    def tensors(self, input_shape=None):
        return self.read


def sketch_verdicts(tensors, carriers):
    parameters = white_box_parameters(scheme("sketch", bits=BITS), carriers, SHAPE, "null")
    return [verify(Cached(tensors), Watermark.create(key, "sketch", parameters)) for key in keys("sketch")]


def test_white_box_matches_of_strangers_are_binomial(stranger):
    tensors = open_suspect(stranger).tensors(SHAPE)
    verdicts = sketch_verdicts(tensors, [tensor.values.shape for tensor in tensors])
    check_exact([verdict.matched for verdict in verdicts], BITS, 0.5)
    assert all(verdict.log10_p == binomial_log10_tail(verdict.matched, BITS, 0.5) for verdict in verdicts)


def test_a_suspect_made_to_look_marked_is_no_exception():
    """Equal filters, and filters of one weight: nothing to average over, many ties, and still a bound."""
    equal = np.ones((8, 8, 3, 3), np.float32)
    single = np.zeros((8, 8, 3, 3), np.float32)
    single[:, 0, 0, 0] = 1
    tensors = [Tensor(equal, "equal"), Tensor(single, "single")]
    verdicts = sketch_verdicts(tensors, [equal.shape, single.shape])
    check_super_uniform([verdict.log10_p for verdict in verdicts])


def test_tries_that_were_chosen_among_are_paid_for(trained):
    """One carrier, two layers of its shape: the better one counts, and p stays a bound."""
    tensors = [tensor for tensor in open_suspect(trained).tensors(SHAPE) if tensor.values.shape == (8, 8, 3, 3)]
    assert len(tensors) == 2
    verdicts = sketch_verdicts(tensors, [(8, 8, 3, 3)])
    check_super_uniform([verdict.log10_p for verdict in verdicts])
    unpaid = [binomial_log10_tail(verdict.matched, BITS, 0.5) for verdict in verdicts]
    with pytest.raises(AssertionError):
        check_super_uniform(unpaid)


def test_black_box_matches_of_strangers_are_binomial(stranger):
    """All keys' triggers go through the network at once, and verify scores each key's share of the answers."""
    parameters = black_box_parameters(scheme("adi", count=TRIGGERS), SHAPE, CLASSES, [[-1.0, 1.0]], "null")
    marks = [Watermark.create(key, "adi", parameters) for key in keys("adi")]
    inputs = to_input(np.concatenate([mark.arrays["triggers"] for mark in marks]), parameters["value_range"])
    with torch.no_grad():
        answers = stranger(torch.from_numpy(inputs)).numpy().reshape(KEYS, TRIGGERS, CLASSES)
    verdicts = [verify(Cached(answers=scores), mark) for scores, mark in zip(answers, marks, strict=True)]
    check_exact([verdict.matched for verdict in verdicts], TRIGGERS, 1 / CLASSES)
    check_super_uniform([verdict.log10_p for verdict in verdicts])


def test_a_stranger_is_owned_at_alpha_one_half_about_as_often_as_allowed(trained):
    """The whole of verify, asked and judged, at a bar that strangers do reach."""
    parameters = black_box_parameters(scheme("adi", count=TRIGGERS), SHAPE, CLASSES, [[-1.0, 1.0]], "null")
    some = [key for key, _ in zip(keys("verify"), range(200), strict=False)]
    owned = sum(verify(trained, Watermark.create(key, "adi", parameters), alpha=0.5).owned for key in some)
    reachable = max(
        tail for k in range(TRIGGERS) if (tail := 10 ** binomial_log10_tail(k, TRIGGERS, 1 / CLASSES)) <= 0.5
    )
    assert abs(owned / len(some) - reachable) < 4 * math.sqrt(reachable * (1 - reachable) / len(some))
