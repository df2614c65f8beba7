"""Canonical carriers: a filter is read as it stands after folding the normalisation behind it, from module or file."""

import copy

import numpy as np
import pytest
import torch
from embedding import KEY, unproven
from torch import nn

import wmengine
from wmengine.parts.sources.weights import folded
from wmengine.suspects import open_suspect
from wmengine.suspects.base import InputSpec

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 4
SCHEMES = [
    wmengine.scheme("sketch", bits=32, margin=2.0, strength=1.0),
    wmengine.scheme("uchida", bits=16, marked=0, strength=1.0),
]


class Skip(nn.Module):
    """A filter's output that goes into a normalisation and past it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


class Twice(nn.Module):
    """A layer that runs twice, a normalisation behind its second run only."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 5, padding=2, bias=False), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(torch.relu(self.conv(x))))


PICTURE, SERIES, VECTOR = (3, 6, 6), (3, 20), (24,)
# The layers before a mean over space and a linear layer, the input's shape, and what their output has.
BODIES = {
    "BatchNorm2d": (lambda: [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)], PICTURE, 16),
    "a bias": (lambda: [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)], PICTURE, 16),
    "BatchNorm1d of series": (lambda: [nn.Conv1d(3, 16, 9), nn.BatchNorm1d(16)], SERIES, 16),
    "BatchNorm1d of vectors": (lambda: [nn.Linear(24, 16), nn.BatchNorm1d(16)], VECTOR, 16),
    "transposed": (lambda: [nn.ConvTranspose2d(3, 16, 3, stride=2), nn.BatchNorm2d(16)], PICTURE, 16),
    "transposed groups": (
        lambda: [nn.ConvTranspose2d(3, 12, 5, stride=2, groups=3), nn.BatchNorm2d(12)],
        *(PICTURE, 12),
    ),
    "groups": (lambda: [nn.Conv2d(3, 12, 5, groups=3), nn.BatchNorm2d(12)], PICTURE, 12),
    "InstanceNorm2d": (lambda: [nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16, affine=True)], PICTURE, 16),
    "no affine": (lambda: [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, affine=False)], PICTURE, 16),
    "dropout between": (lambda: [nn.Conv2d(3, 16, 3), nn.Dropout(0.5), nn.BatchNorm2d(16)], PICTURE, 16),
    "ReLU between": (lambda: [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.BatchNorm2d(16)], PICTURE, 16),
    "ReLU in place between": (lambda: [nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(16)], PICTURE, 16),
    "normalisation first": (lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 16, 3), nn.ReLU()], PICTURE, 16),
    "skip": (lambda: [Skip()], PICTURE, 16),
    "twice": (lambda: [Twice()], PICTURE, 3),
}
# Of these no twin with flipped filters is made: it would be another network, or (of groups) need another hand.
UNFOLDED = {"transposed groups", "no affine", "ReLU between", "ReLU in place between", "normalisation first"}
UNFOLDED |= {"skip", "twice"}


class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2) if x.ndim > 2 else x


def network(body):
    layers, _, width = BODIES[body]
    torch.manual_seed(1)
    model = nn.Sequential(*layers(), Mean(), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase):
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.3, 3.0)
                with torch.no_grad():
                    norm.weight[::2] *= -1.0
                nn.init.normal_(norm.bias)
            if norm.track_running_stats:
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.2, 4.0)
    return model.eval()


def flipped(model):
    """The same network, half of its filters and their normalisation with the other sign."""
    twin = copy.deepcopy(model)
    layer, norm = twin[0], next(each for each in twin if isinstance(each, nn.modules.batchnorm._NormBase))
    with torch.no_grad():
        channels = layer.weight.shape[0] if not isinstance(layer, nn.ConvTranspose2d) else layer.weight.shape[1]
        half = torch.randperm(channels, generator=torch.Generator().manual_seed(5))[: channels // 2]
        for values in (layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight,
                       layer.bias, norm.weight, norm.running_mean):  # fmt: skip
            if values is not None:
                values[half] *= -1.0
    return twin


@pytest.fixture(scope="module")
def marked():
    """By body: the network with both marks in it, and the marks. Made once for each."""
    made = {}

    def get(body):
        if body not in made:
            model, sample = network(body), torch.randn(4, *BODIES[body][1])
            emb = wmengine.Embedder(model, KEY, SCHEMES, sample=sample, name=body)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
            for _ in range(150):
                optimizer.zero_grad()
                emb.regulariser().backward()
                optimizer.step()
            made[body] = model, unproven(emb)
        return made[body]

    return get


def copies_of(model, body, folder):
    """The network, its two exports, and where that is the same network the same with half of its filters flipped."""
    x = torch.randn(2, *BODIES[body][1], generator=torch.Generator().manual_seed(0))
    networks = {"as trained": model} if body in UNFOLDED else {"as trained": model, "flipped": flipped(model)}
    with torch.no_grad():
        answers = [each(x) for each in networks.values()]
    assert all(torch.allclose(answers[0], each, atol=1e-4) for each in answers)
    copies = dict(networks)
    for name, each in networks.items():
        for fold in (True, False) if each is model else (True,):
            path = folder / f"{name}, {fold}.onnx"
            copies[path.stem] = wmengine.export_onnx(each, x, path, fold_batchnorm=fold)
    return copies


def filters(suspect, body, carrier):
    """The filters [O, ...] of every weight as a scheme of this carrier reads them."""
    found = open_suspect(suspect, isolation="none").tensors({"input": InputSpec(BODIES[body][1], "float32")})
    read = [folded(each.values, each.factors, carrier).reshape(len(each.values), -1) for each in found]
    unit = carrier == "unit_filters"
    return [rows / np.linalg.norm(rows, axis=1, keepdims=True) if unit else rows for rows in read]


def check(copy_, body, model, marks, name=""):
    """Both marks have all their bits there, and what is read is what is read of the module."""
    for mark in marks:
        verdict = wmengine.verify(copy_, mark, isolation="none")
        assert (verdict.matched, verdict.total) == (mark.total, mark.total), (name, mark.scheme, verdict.error)
        carrier = mark.parameters["carrier"]
        for ours, theirs in zip(filters(copy_, body, carrier), filters(model, body, carrier), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_every_copy_holds_all_bits(marked, tmp_path, body):
    """Folded by the exporter or not, and with any (weight, gamma, mean) of the other sign."""
    model, marks = marked(body)
    for name, each in copies_of(model, body, tmp_path).items():
        check(each, body, model, marks, name)


def test_flipping_filters_with_their_normalisation_flips_no_bit(marked):
    """Without the normalisation the filters of negative gammas, and those that were flipped, would read otherwise."""
    model, marks = marked("BatchNorm2d")
    twin = flipped(model)
    check(twin, "BatchNorm2d", model, marks)
    for each in (model, twin):
        bare = copy.deepcopy(each)
        bare[1] = nn.Identity()
        assert wmengine.verify(bare, marks[1]).matched < marks[1].total


@pytest.mark.parametrize("body", ["ReLU between", "ReLU in place between", "normalisation first", "twice"])
def test_what_does_not_follow_at_once_is_no_normalisation_of_a_filter(body):
    found = open_suspect(network(body)).tensors({"input": InputSpec(BODIES[body][1], "float32")})
    assert [each.factors for each in found] == [None] * 3


def test_factors_are_those_of_folding():
    model = network("BatchNorm2d")
    (first, *_) = open_suspect(model).tensors({"input": InputSpec(PICTURE, "float32")})
    norm = model[1]
    expected = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
    np.testing.assert_allclose(first.factors, expected, rtol=1e-6)
    model[1] = nn.BatchNorm2d(16, affine=False)
    (first, *_) = open_suspect(model).tensors({"input": InputSpec(PICTURE, "float32")})
    np.testing.assert_allclose(first.factors, np.full(16, 1 / np.sqrt(1 + 1e-5)), rtol=1e-6)


def test_a_module_is_read_in_inference_mode_too():
    model = network("BatchNorm2d")
    expected = filters(model, "BatchNorm2d", "filter_mean")
    with torch.inference_mode():
        found = filters(model, "BatchNorm2d", "filter_mean")
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
