"""What attacks on the structure promise: the same answers from other weights, and whole channels that fall together."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from attacked import run, same, values
from torch import nn

import wmengine as wm
from wmengine import demo

pytestmark = pytest.mark.slow
KEEPING = ("permute", "rescale", "flip")
X = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            *(nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)),
        )
        self.short = nn.Sequential()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x):
        return torch.relu(self.body(x) + self.short(x))


class Residual(nn.Module):
    """With a depthwise convolution, and one in groups that belongs to no residual stream."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 24, 1)
        self.grouped = nn.Conv2d(24, 24, 3, groups=4)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = torch.relu(self.point(nn.functional.leaky_relu(self.depthwise(x))))
        return self.head(torch.relu(self.grouped(x)).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Linear(8, 16), nn.Parameter(torch.randn(1, 8, 16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.embed(x.squeeze(1)) + self.place
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x).mean(1))


def tanh():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10))


NETWORKS = {"cnn": lambda: demo.build_network(1), "residual": Residual, "tanh": tanh, "transformer": Transformer}
# What there is nothing to act on in: no activation of a tanh network is homogeneous; folded ReLU networks are not odd.
WITHOUT = {("tanh", "rescale", False), ("tanh", "rescale", True), ("cnn", "flip", True), ("residual", "flip", True)}


def shaken(model):
    """In eval mode, its normalisations and biases no longer those of a new network."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


@cache
def network(name):
    torch.manual_seed(0)
    return shaken(NETWORKS[name]())


@cache
def attacked_by(attack, name):
    return wm.attacks.run(attack, network(name), X[:1], seed=3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file of a network, as traced or with its BatchNorm folded."""
    folder = tmp_path_factory.mktemp("networks")

    @cache
    def file(name, folded):
        return wm.export_onnx(network(name), X[:1], folder / f"{name}-{folded}.onnx", fold_batchnorm=folded)

    return file


def answers(model):
    if isinstance(model, nn.Module):
        with torch.no_grad():
            return model(X).numpy()
    return run(model, X.numpy())


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("attack", KEEPING)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_answers_the_same_from_other_weights(exported, tmp_path, name, attack, folded):
    path = exported(name, folded)
    if (name, attack, folded) in WITHOUT:
        with pytest.raises(ValueError, match=r"the model has no channels that can be (rescaled|flipped) without"):
            wm.attacks.run(attack, path, out=tmp_path / "attacked.onnx")
        return
    attacked = wm.attacks.run(attack, path, out=tmp_path / "attacked.onnx", seed=3)
    assert same(answers(path), answers(attacked))
    before, after = values(path), values(attacked)
    changed = [each for each in before if before[each].ndim > 1 and not np.array_equal(before[each], after[each])]
    assert len(changed) >= sum(array.ndim > 1 for array in before.values()) // 3


@pytest.mark.parametrize(
    ("name", "attack"), [each for each in product(NETWORKS, KEEPING) if (*each, False) not in WITHOUT]
)
def test_the_module_answers_the_same_from_other_weights(name, attack):
    model, attacked = network(name), attacked_by(attack, name)
    assert same(answers(model), answers(attacked))
    assert any((value != attacked.state_dict()[key]).any() for key, value in model.state_dict().items())


def test_permuting_moves_every_weight_of_a_plain_network_and_loses_none():
    model, attacked = network("cnn"), attacked_by("permute", "cnn")
    for (name, before), after in zip(model.state_dict().items(), attacked.state_dict().values(), strict=True):
        if before.is_floating_point() and name != "14.bias":  # the classes stay where they are
            assert not torch.equal(before, after)
            assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)


def test_no_layer_is_left_out_where_channels_lie_last_in_memory():
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*body, nn.Linear(16, 5)).eval().to(memory_format=torch.channels_last)
    x = torch.rand(6, 3, 8, 8).to(memory_format=torch.channels_last)
    permuted = wm.attacks.run("permute", model, x)
    assert torch.allclose(model(x), permuted(x), atol=1e-5)
    assert not any(torch.equal(model[layer].weight, permuted[layer].weight) for layer in (0, 2, 6))
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_residual_stream_is_permuted_as_one():
    model, attacked = network("residual"), attacked_by("permute", "residual")
    order = [int((model.stem[1].bias == bias).nonzero()) for bias in attacked.stem[1].bias]
    assert sorted(order) == list(range(8)) != order
    assert torch.equal(model.blocks[0].body[4].bias[order], attacked.blocks[0].body[4].bias)


def test_what_convolutions_in_groups_touch_keeps_its_order():
    model, attacked = network("residual"), attacked_by("permute", "residual")
    assert torch.equal(model.grouped.weight, attacked.grouped.weight)
    assert torch.equal(model.point.bias, attacked.point.bias)
    assert not torch.equal(model.depthwise.weight, attacked.depthwise.weight)


def test_flipping_changes_signs_only():
    model, attacked = network("cnn"), attacked_by("flip", "cnn")
    for before, after in zip(model.state_dict().values(), attacked.state_dict().values(), strict=True):
        assert torch.equal(before.abs(), after.abs())
    for index in (0, 3, 7):
        share = (model[index].weight != attacked[index].weight).flatten(1).any(1).float().mean()
        assert 0.2 < float(share) < 0.8


def test_factors_stay_within_their_bounds(exported, tmp_path):
    model = network("cnn")
    attacked = wm.attacks.run("rescale", model, X[:1], low=0.1, high=0.2)
    factors = (attacked[1].weight / model[1].weight).detach().abs()
    assert 0.0999 < float(factors.min()) < float(factors.max()) < 0.2001
    untouched = wm.attacks.run("rescale", model, X[:1], low=1.0, high=1.0)
    for before, after in zip(model.state_dict().values(), untouched.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    for low, high in ((0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="low and high must be factors above 0, the smaller first"):
            wm.attacks.run("rescale", exported("cnn", False), out=tmp_path / "rescaled.onnx", low=low, high=high)


def test_a_mark_in_the_weights_is_read_through_flips_of_filters_with_their_normalisation():
    """What docs/design.md says of (W, gamma, mean) and −(W, gamma, mean)."""
    from wmengine.testing import small_network

    model, images, key = small_network(), X.repeat(4, 1, 1, 1), wm.Key("ACME", bytes(32))
    embedder = wm.Embedder(model, key, ["sketch"], sample=images, num_classes=10, name="n", value_range=(0, 1))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        embedder.loss(model(images), torch.zeros(64, dtype=torch.int64)).backward()
        optimizer.step()
    (mark,) = embedder.watermarks()
    before, after = (wm.verify(each, mark) for each in (model.eval(), wm.attacks.run("flip", model, X[:1])))
    assert before.owned
    assert (after.matched, after.log10_p) == (before.matched, pytest.approx(before.log10_p, abs=1e-3))


# --- pruned channels ---


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_exactly_a_share_of_the_channels_falls_with_all_that_is_theirs(share):
    model = network("cnn")
    pruned = wm.attacks.run("prune_filters", model, X[:1], share=share)
    for filters, norm in ((0, 1), (3, 4), (7, 8)):
        gone = pruned[filters].weight.abs().sum((1, 2, 3)) == 0
        assert int(gone.sum()) == share * len(gone)
        assert torch.equal(gone, pruned[norm].weight == 0)
        assert torch.equal(gone, pruned[norm].bias == 0)
        sizes = model[filters].weight.abs().sum((1, 2, 3))
        assert torch.equal(gone, sizes < sizes.sort().values[int(share * len(gone)) :].min() if share < 1 else gone)
    assert torch.equal(model[14].weight, pruned[14].weight)


def test_channels_of_a_residual_stream_fall_together():
    pruned = wm.attacks.run("prune_filters", network("residual"), X[:1])
    gone = pruned.stem[1].bias == 0
    assert int(gone.sum()) == 4
    assert torch.equal(gone, pruned.blocks[0].body[4].bias == 0)
