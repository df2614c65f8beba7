"""What attacks on the structure promise: the same answers from other weights, and whole channels that fall together."""

from itertools import product

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import wmengine as wm
from wmengine import demo
from wmengine.attacks.channels import channel_groups

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


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Each network with its file, as traced and with its BatchNorm folded."""
    folder, found = tmp_path_factory.mktemp("networks"), {}
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        found[name] = model = shaken(make())
        for folded in (False, True):
            path = folder / f"{name}-{folded}.onnx"
            found[name, folded] = wm.export_onnx(model, X[:1], path, fold_batchnorm=folded)
    return found


def answers(model, x=None):
    if isinstance(model, nn.Module):
        with torch.no_grad():
            return model(X).numpy()
    session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model))
    (entry, *_) = session.get_inputs()
    return session.run(None, {entry.name: X.numpy() if x is None else x})[0]


def same(one, other):
    return np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def values(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("attack", KEEPING)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_answers_the_same_from_other_weights(networks, tmp_path, name, attack, folded):
    path = networks[name, folded]
    if (name, attack, folded) in WITHOUT:
        with pytest.raises(ValueError, match=r"the model has no channels that can be (rescaled|flipped) without"):
            wm.attacks.run(attack, path, out=tmp_path / "attacked.onnx")
        return
    attacked = wm.attacks.run(attack, path, out=tmp_path / "attacked.onnx", seed=3)
    assert same(answers(path), answers(attacked))
    before, after = values(path), values(attacked)
    changed = [each for each in before if before[each].ndim > 1 and not np.array_equal(before[each], after[each])]
    assert len(changed) >= sum(array.ndim > 1 for array in before.values()) // 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attack"), [each for each in product(NETWORKS, KEEPING) if (*each, False) not in WITHOUT]
)
def test_the_module_answers_the_same_from_other_weights(networks, name, attack):
    model = networks[name]
    attacked = wm.attacks.run(attack, model, X[:1], seed=3)
    assert same(answers(model), answers(attacked))
    assert any((value != attacked.state_dict()[key]).any() for key, value in model.state_dict().items())


@pytest.mark.slow
def test_permuting_moves_every_weight_of_a_plain_network_and_loses_none(networks):
    model = networks["cnn"]
    attacked = wm.attacks.run("permute", model, X[:1])
    for (name, before), after in zip(model.state_dict().items(), attacked.state_dict().values(), strict=True):
        if before.is_floating_point() and name != "14.bias":  # the classes stay where they are
            assert not torch.equal(before, after)
            assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)


@pytest.mark.slow
def test_a_residual_stream_is_permuted_as_one(networks):
    model = networks["residual"]
    attacked = wm.attacks.run("permute", model, X[:1])
    order = [int((model.stem[1].bias == bias).nonzero()) for bias in attacked.stem[1].bias]
    assert sorted(order) == list(range(8)) != order
    assert torch.equal(model.blocks[0].body[4].bias[order], attacked.blocks[0].body[4].bias)


@pytest.mark.slow
def test_what_convolutions_in_groups_touch_keeps_its_order(networks):
    model = networks["residual"]
    attacked = wm.attacks.run("permute", model, X[:1])
    assert torch.equal(model.grouped.weight, attacked.grouped.weight)
    assert torch.equal(model.point.bias, attacked.point.bias)
    assert not torch.equal(model.depthwise.weight, attacked.depthwise.weight)


@pytest.mark.slow
def test_flipping_changes_signs_only(networks):
    model = networks["cnn"]
    attacked = wm.attacks.run("flip", model, X[:1])
    for before, after in zip(model.state_dict().values(), attacked.state_dict().values(), strict=True):
        assert torch.equal(before.abs(), after.abs())
    for index in (0, 3, 7):
        share = (model[index].weight != attacked[index].weight).flatten(1).any(1).float().mean()
        assert 0.2 < float(share) < 0.8


@pytest.mark.slow
def test_factors_stay_within_their_bounds(networks):
    model = networks["cnn"]
    attacked = wm.attacks.run("rescale", model, X[:1], low=0.1, high=0.2)
    factors = (attacked[1].weight / model[1].weight).detach().abs()
    assert 0.0999 < float(factors.min()) < float(factors.max()) < 0.2001
    untouched = wm.attacks.run("rescale", model, X[:1], low=1.0, high=1.0)
    for before, after in zip(model.state_dict().values(), untouched.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    for low, high in ((0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="low and high must be factors above 0, the smaller first"):
            wm.attacks.run("rescale", model, X[:1], low=low, high=high)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_exactly_a_share_of_the_channels_falls_with_all_that_is_theirs(networks, share):
    model = networks["cnn"]
    pruned = wm.attacks.run("prune_filters", model, X[:1], share=share)
    for filters, norm in ((0, 1), (3, 4), (7, 8)):
        gone = pruned[filters].weight.abs().sum((1, 2, 3)) == 0
        assert int(gone.sum()) == share * len(gone)
        assert torch.equal(gone, pruned[norm].weight == 0)
        assert torch.equal(gone, pruned[norm].bias == 0)
        sizes = model[filters].weight.abs().sum((1, 2, 3))
        assert torch.equal(gone, sizes < sizes.sort().values[int(share * len(gone)) :].min() if share < 1 else gone)
    assert torch.equal(model[14].weight, pruned[14].weight)


@pytest.mark.slow
def test_channels_of_a_residual_stream_fall_together(networks):
    pruned = wm.attacks.run("prune_filters", networks["residual"], X[:1])
    gone = pruned.stem[1].bias == 0
    assert int(gone.sum()) == 4
    assert torch.equal(gone, pruned.blocks[0].body[4].bias == 0)


# --- graphs made by hand ---


def graph(nodes, shape, initializers, outputs=("y",)):
    """An ONNX model from x [n, *shape] to y, of (operator, inputs, output, attributes) and arrays by name."""
    made = helper.make_graph(
        [helper.make_node(kind, given.split(), made.split(), **options) for kind, given, made, options in nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in initializers.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


CONV = ("Conv", "x a", "h", {"pads": [1, 1, 1, 1]})
A, B = normal(6, 3, 3, 3), normal(4, 6, 3, 3)
HALF, ONE = np.float32(0.5), np.float32(1.0)
GRAPHS = {
    "Gelu as older exporters write it": (
        [
            *(("MatMul", "x a", "h", {}), ("Add", "h b", "i", {}), ("Div", "i root", "j", {}), ("Erf", "j", "k", {})),
            *(
                ("Add", "k one", "l", {}),
                ("Mul", "i l", "m", {}),
                ("Mul", "m half", "o", {}),
                ("MatMul", "o c", "y", {}),
            ),
        ],
        (5, 8),
        {
            "a": normal(8, 12),
            "b": normal(12),
            "c": normal(12, 4),
            "root": np.sqrt(np.float32(2)),
            "one": ONE,
            "half": HALF,
        },
        {"permuted"},
    ),
    "flattened channels with a bias for each place": (
        [
            *(CONV, ("Relu", "h", "i", {}), ("Flatten", "i", "j", {}), ("Add", "j b", "k", {})),
            ("Gemm", "k c", "y", {"transB": 1}),
        ],
        (3, 4, 4),
        {"a": A, "b": normal(96), "c": normal(5, 96)},
        {"permuted", "rescaled"},
    ),
    "a transposed convolution, PReLU and a pool": (
        [
            *(("ConvTranspose", "x a", "h", {"strides": [2, 2]}), ("PRelu", "h s", "i", {})),
            *(("MaxPool", "i", "j", {"kernel_shape": [2, 2]}), ("Conv", "j b", "y", {})),
        ],
        (3, 4, 4),
        {"a": normal(3, 6, 3, 3), "s": normal(6, 1, 1), "b": B},
        {"permuted", "rescaled"},
    ),
    "InstanceNormalization, factors and a gate": (
        [
            *(CONV, ("InstanceNormalization", "h s t", "i", {}), ("Mul", "i f", "j", {})),
            *(("GlobalAveragePool", "j", "k", {}), ("Conv", "k g", "l", {}), ("Sigmoid", "l", "m", {})),
            *(("Mul", "j m", "n", {}), ("Conv", "n b", "y", {})),
        ],
        (3, 4, 4),
        {"a": A, "s": normal(6), "t": normal(6), "f": normal(6, 1, 1), "g": normal(6, 6, 1, 1), "b": B},
        {"permuted", "flipped"},
    ),
    "an embedding, with axes moved and joined": (
        [
            *(("Cast", "x", "i", {"to": TensorProto.INT64}), ("Gather", "e i", "h", {})),
            *(("Transpose", "h", "j", {"perm": [0, 2, 1]}), ("Conv", "j a", "k", {}), ("Tanh", "k", "l", {})),
            *(("ReduceMean", "l axes", "m", {"keepdims": 0}), ("Gemm", "m c d", "y", {})),
        ],
        (5,),
        {"e": normal(3, 6), "a": normal(8, 6, 2), "axes": np.array([2]), "c": normal(8, 4), "d": normal(4)},
        {"permuted", "rescaled", "flipped"},
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_each_operator_that_is_understood_is_understood_rightly(name):
    nodes, shape, initializers, changes = GRAPHS[name]
    model = graph(nodes, shape, initializers)
    x = np.abs(normal(7, *shape)) % 3
    before = answers(model.SerializeToString(), x)
    for attack, change in zip(KEEPING, ("permuted", "rescaled", "flipped"), strict=True):
        if change not in changes:
            with pytest.raises(ValueError, match="no channels that can be"):
                channel_groups(model, change)
            continue
        attacked = onnx.ModelProto.FromString(model.SerializeToString())
        wm.attacks.attack(attack).run(attacked, np.random.default_rng(5), **wm.attacks.attack(attack).defaults)
        assert attacked.SerializeToString() != model.SerializeToString()
        assert same(before, answers(attacked.SerializeToString(), x)), attack
        del model.graph.initializer[:], attacked.graph.initializer[:]
        assert attacked == model
        model = graph(nodes, shape, initializers)


def test_a_variance_that_cannot_take_a_factor_up_keeps_its_filter():
    variance = np.array([0, 1, 2, 3, 4, 5], np.float32)
    arrays = {"a": A, "s": normal(6), "t": normal(6, seed=1), "m": normal(6, seed=2), "v": variance, "b": B}
    nodes = [CONV, ("BatchNormalization", "h s t m v", "i", {"epsilon": 0.01}), ("Conv", "i b", "y", {})]
    model, x = graph(nodes, (3, 4, 4), arrays), normal(7, 3, 4, 4)
    before = answers(model.SerializeToString(), x)
    wm.attacks.attack("rescale").run(model, np.random.default_rng(0), low=0.1, high=0.5)
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert (after["v"] == variance).tolist() == [True, *[False] * 5]
    assert np.array_equal((after["a"] == A).all(axis=(1, 2, 3)), after["v"] == variance)
    assert (after["v"] >= 0).all()
    assert same(before, answers(model.SerializeToString(), x))


RELU, LAST = ("Relu", "h", "i", {}), ("Conv", "i b", "y", {})
BRANCH = helper.make_graph(
    [helper.make_node("Neg", ["i"], ["z"])], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
)
FIXED = {
    "the answers themselves": ([("Conv", "x a", "y", {})], {"a": A}, ("y",)),
    "a hidden value that is an answer too": ([CONV, RELU, LAST], {"a": A, "b": B}, ("y", "i")),
    "an operator that is not known": (
        [CONV, ("LRN", "h", "i", {"size": 3}), LAST],
        {"a": A, "b": B},
        ("y",),
    ),
    "a weight that is used twice": (
        [CONV, RELU, ("Conv", "i c", "j", {"pads": [1, 1, 1, 1]}), ("Conv", "j c", "y", {})],
        {"a": A, "c": normal(6, 6, 3, 3)},
        ("y",),
    ),
    "channels of two weights side by side": (
        [CONV, ("Conv", "x c", "j", {"pads": [1, 1, 1, 1]}), ("Concat", "h j", "i", {"axis": 1}), LAST],
        {"a": normal(2, 3, 3, 3), "c": normal(4, 3, 3, 3), "b": B},
        ("y",),
    ),
    "a value that a subgraph takes": (
        [CONV, RELU, ("If", "yes", "k", {"then_branch": BRANCH, "else_branch": BRANCH}), ("Conv", "k b", "y", {})],
        {"a": A, "b": B, "yes": np.array(True)},
        ("y",),
    ),
    "channels that a pool runs over": (
        [("MatMul", "x a", "h", {}), ("MaxPool", "h", "i", {"kernel_shape": [1, 2]}), ("MatMul", "i b", "y", {})],
        {"a": normal(4, 6), "b": normal(5, 3)},
        ("y",),
    ),
    "heads that channels are cut into": (
        [("MatMul", "x a", "h", {}), ("Reshape", "h s", "i", {}), ("MatMul", "i b", "y", {})],
        {"a": normal(4, 6), "s": np.array([0, 0, 0, 2, 3]), "b": normal(3, 3)},
        ("y",),
    ),
}


@pytest.mark.parametrize("change", ["permuted", "rescaled", "flipped"])
@pytest.mark.parametrize("name", FIXED)
def test_what_is_not_understood_is_left_as_it_is(name, change):
    nodes, initializers, outputs = FIXED[name]
    model = graph(nodes, (3, 4, 4), initializers, outputs)
    assert np.isfinite(answers(model.SerializeToString(), normal(2, 3, 4, 4))).all()
    with pytest.raises(ValueError, match="the model has no channels that can be"):
        channel_groups(model, change)
