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
@pytest.mark.slow
def test_no_layer_is_left_out_where_channels_lie_last_in_memory():
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*body, nn.Linear(16, 5)).eval().to(memory_format=torch.channels_last)
    x = torch.rand(6, 3, 8, 8).to(memory_format=torch.channels_last)
    permuted = wm.attacks.run("permute", model, x)
    assert torch.allclose(model(x), permuted(x), atol=1e-5)
    assert not any(torch.equal(model[layer].weight, permuted[layer].weight) for layer in (0, 2, 6))
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)


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
    """An ONNX model from x [n, *shape] to y, of (operator, inputs, outputs, attributes) and arrays by name."""
    made = helper.make_graph(
        [helper.make_node(kind, given.split(), made.split(), **options) for kind, given, made, options in nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in initializers.items()],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=imports, ir_version=10)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


CHANGES = dict(zip(KEEPING, ("permuted", "rescaled", "flipped"), strict=True))
ALL, ORDER, SCALE, NOTHING = {*CHANGES.values()}, {"permuted"}, {"permuted", "rescaled"}, set()
SAME = {"pads": [1, 1, 1, 1]}
CONV, RELU, LAST = ("Conv", "x a", "h", SAME), ("Relu", "h", "i", {}), ("Conv", "i b", "y", {})
INTO, OUT = ("MatMul", "x a", "h", {}), ("MatMul", "i b", "y", {})
A, B = normal(6, 3, 3, 3), normal(4, 6, 3, 3)
CONVS, MATRICES = {"a": A, "b": B}, {"a": normal(4, 6), "b": normal(6, 5)}
NORM = {"s": normal(6), "t": normal(6, seed=1), "m": normal(6, seed=2), "v": 1 + normal(6, seed=3) ** 2}
HALF, ONE, SIX = np.float32([0.5]), np.float32([1.0]), {"one": np.float32([1.5]), "six": np.array([6])}
BRANCH = helper.make_graph(
    [helper.make_node("Neg", ["i"], ["z"])], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
)
# What the graph is: its nodes, the values they hold, and what can be changed of them.
IMAGES = {
    "filters that are rescaled": ([CONV, RELU, LAST], CONVS, SCALE),
    "flattened channels with a bias for each place": (
        [CONV, RELU, ("Flatten", "i", "j", {}), ("Add", "j c", "k", {}), ("Gemm", "k d", "y", {"transB": 1})],
        {"a": A, "c": normal(96), "d": normal(5, 96)},
        SCALE,
    ),
    "a transposed convolution, PReLU and a pool": (
        [
            *(("ConvTranspose", "x a", "h", {"strides": [2, 2]}), ("PRelu", "h s", "k", {})),
            *(("MaxPool", "k", "i", {"kernel_shape": [2, 2]}), LAST),
        ],
        {"a": normal(3, 6, 3, 3), "s": normal(6, 1, 1), "b": B},
        SCALE,
    ),
    "weights that are turned round on their way": (
        [
            *(("Transpose", "a", "u", {"perm": [2, 3, 0, 1]}), ("Transpose", "u", "w", {"perm": [1, 0, 2, 3]})),
            *(("Conv", "x w", "h", SAME), RELU, LAST),
        ],
        {"a": normal(3, 3, 3, 6), "b": B},
        SCALE,
    ),
    "a maximum over space": (
        [CONV, ("ReduceMax", "h axes", "i", {"keepdims": 0}), OUT],
        {"a": A, "b": normal(6, 5), "axes": np.array([2, 3])},
        SCALE,
    ),
    "a bias of zeros as torch traces it": (
        [
            *(CONV, RELU, ("Shape", "b", "p", {"end": 1}), ("CastLike", "zero i", "q", {}), ("Expand", "q p", "r", {})),
            ("Conv", "i b r", "y", {}),
        ],
        CONVS | {"zero": np.float64(0)},
        SCALE,
    ),
    "BatchNormalization": ([CONV, ("BatchNormalization", "h s t m v", "i", {}), LAST], CONVS | NORM, ALL),
    "BatchNormalization with one factor for all": (
        [CONV, ("Expand", "one six", "g", {}), ("BatchNormalization", "h g t m v", "i", {}), LAST],
        CONVS | NORM | SIX,
        SCALE,
    ),
    "BatchNormalization with one mean for all": (
        [CONV, ("Expand", "one six", "g", {}), ("BatchNormalization", "h s t g v", "i", {}), LAST],
        CONVS | NORM | SIX,
        ALL,
    ),
    "BatchNormalization with a computed variance": (
        [CONV, ("Abs", "v", "g", {}), ("BatchNormalization", "h s t m g", "i", {}), LAST],
        CONVS | NORM,
        NOTHING,
    ),
    "InstanceNormalization, factors and a gate": (
        [
            *(CONV, ("InstanceNormalization", "h s t", "k", {}), ("Mul", "k f", "j", {})),
            *(("GlobalAveragePool", "j", "l", {}), ("Conv", "l g", "m", {}), ("Sigmoid", "m", "o", {})),
            *(("Mul", "j o", "i", {}), LAST),
        ],
        CONVS | {"s": normal(6), "t": normal(6), "f": normal(6, 1, 1), "g": normal(6, 6, 1, 1)},
        {"permuted", "flipped"},
    ),
    "a convolution in groups": (
        [CONV, ("Conv", "h c", "k", {"group": 2}), ("Relu", "k", "i", {}), ("Conv", "i d", "y", {})],
        {"a": A, "c": normal(6, 3, 3, 3), "d": normal(4, 6, 1, 1)},
        {"rescaled"},
    ),
    "the answers themselves": ([("Conv", "x a", "y", {})], {"a": A}, NOTHING),
    "a hidden value that is an answer too": ([CONV, RELU, LAST], CONVS, NOTHING, ("y", "i")),
    "an operator that is not known": ([CONV, ("LRN", "h", "i", {"size": 3}), LAST], CONVS, NOTHING),
    "an operator of another domain": ([CONV, ("Gelu", "h", "i", {"domain": "com.microsoft"}), LAST], CONVS, NOTHING),
    "integers": (
        [CONV, ("Cast", "h", "k", {"to": TensorProto.INT64}), ("Cast", "k", "i", {"to": TensorProto.FLOAT}), LAST],
        CONVS,
        NOTHING,
    ),
    "places of maxima": (
        [CONV, ("MaxPool", "h", "i k", {"kernel_shape": [2, 2]}), LAST, ("Cast", "k", "z", {"to": TensorProto.FLOAT})],
        CONVS,
        NOTHING,
        ("y", "z"),
    ),
    "a weight that is used twice": (
        [CONV, RELU, ("Conv", "i c", "j", SAME), ("Conv", "j c", "y", {})],
        {"a": A, "c": normal(6, 6, 3, 3)},
        NOTHING,
    ),
    "channels of two weights side by side": (
        [CONV, ("Conv", "x c", "j", SAME), ("Concat", "h j", "i", {"axis": 1}), LAST],
        {"a": normal(2, 3, 3, 3), "c": normal(4, 3, 3, 3), "b": B},
        NOTHING,
    ),
    "a value that a subgraph takes": (
        [CONV, RELU, ("If", "yes", "k", {"then_branch": BRANCH, "else_branch": BRANCH}), ("Conv", "k b", "y", {})],
        CONVS | {"yes": np.array(True)},
        NOTHING,
    ),
}
ROWS = {
    "Gelu as older exporters write it": (
        [
            *(INTO, ("Add", "h c", "k", {}), ("Div", "k root", "l", {}), ("Erf", "l", "m", {})),
            *(("Add", "m one", "o", {}), ("Mul", "k o", "p", {}), ("Mul", "p half", "i", {}), OUT),
        ],
        MATRICES | {"c": normal(6), "root": np.sqrt(np.float32(2)), "one": ONE, "half": HALF},
        ORDER,
    ),
    "one number added to all": ([INTO, ("Add", "h one", "i", {}), OUT], MATRICES | {"one": ONE}, ORDER),
    "one number times all": ([INTO, ("Mul", "one h", "i", {}), OUT], MATRICES | {"one": HALF}, ALL),
    "numbers over each": ([INTO, ("Div", "c h", "i", {}), OUT], MATRICES | {"c": normal(6)}, ORDER),
    "a bias for each, taken away from": ([INTO, ("Sub", "c h", "i", {}), OUT], MATRICES | {"c": normal(6)}, ALL),
    "the product of two": (
        [INTO, ("MatMul", "x c", "k", {}), ("Mul", "h k", "i", {}), OUT],
        MATRICES | {"c": normal(4, 6, seed=1)},
        ORDER,
    ),
    "LayerNormalization": (
        [INTO, ("LayerNormalization", "h s t", "i", {}), OUT],
        MATRICES | {"s": normal(6), "t": normal(6, seed=1)},
        ALL,
    ),
    "LayerNormalization along another axis": (
        [
            INTO,
            ("Transpose", "h", "k", {"perm": [0, 2, 1]}),
            ("LayerNormalization", "k s", "l", {}),
            ("Transpose", "l", "i", {"perm": [0, 2, 1]}),
            OUT,
        ],
        MATRICES | {"s": normal(3)},
        ORDER,
    ),
    "channels joined with places, and taken apart again": (
        [
            *(("Transpose", "x", "u", {"perm": [0, 2, 1]}), ("Conv", "u a", "h", {}), ("Relu", "h", "k", {})),
            *(("Reshape", "k s", "l", {}), ("Transpose", "l", "i", {"perm": [0, 2, 1]}), OUT),
        ],
        {"a": normal(2, 4, 1), "s": np.array([0, 2, 3]), "b": normal(2, 5)},
        SCALE,
    ),
    "channels cut across": (
        [
            *(("Transpose", "x", "u", {"perm": [0, 2, 1]}), ("Conv", "u a", "h", {}), ("Relu", "h", "k", {})),
            *(("Reshape", "k s", "l", {}), ("MatMul", "l b", "y", {})),
        ],
        {"a": normal(2, 4, 1), "s": np.array([0, 3, 2]), "b": normal(2, 5)},
        NOTHING,
    ),
    "channels that are shared out": (
        [
            *(
                ("Transpose", "x", "u", {"perm": [0, 2, 1]}),
                ("Conv", "u a", "h", {"pads": [0, 3]}),
                ("Relu", "h", "k", {}),
            ),
            *(("Reshape", "k s", "l", {}), ("Transpose", "l", "i", {"perm": [0, 2, 1]}), ("MatMul", "i b", "y", {})),
        ],
        {"a": normal(2, 4, 1), "s": np.array([0, 3, 4]), "b": normal(3, 5)},
        NOTHING,
    ),
    "BatchNormalization along another axis": (
        [INTO, ("BatchNormalization", "h s t m v", "i", {}), OUT],
        {"a": normal(4, 3), "b": normal(3, 5)} | {name: array[:3] for name, array in NORM.items()},
        NOTHING,
    ),
    "a convolution along the channels": (
        [INTO, ("Conv", "h c", "y", {})],
        {"a": normal(4, 3), "c": normal(4, 3, 1)},
        NOTHING,
    ),
    "a pool along the channels": (
        [INTO, ("MaxPool", "h", "i", {"kernel_shape": [3], "pads": [1, 1]}), OUT],
        MATRICES,
        NOTHING,
    ),
    "heads that channels are cut into": (
        [INTO, ("Reshape", "h s", "i", {}), ("MatMul", "i c", "y", {})],
        {"a": normal(4, 6), "s": np.array([0, 0, 2, 3]), "c": normal(3, 3)},
        NOTHING,
    ),
}
VECTORS = {
    "an embedding, with axes moved and dropped": (
        [
            *(("Cast", "x", "u", {"to": TensorProto.INT64}), ("Gather", "e u", "h", {})),
            *(("Transpose", "h", "j", {"perm": [0, 2, 1]}), ("Conv", "j a", "k", {}), ("Tanh", "k", "l", {})),
            *(("ReduceMean", "l axes", "m", {"keepdims": 0}), ("Gemm", "m c d", "y", {})),
        ],
        {"e": normal(3, 6), "a": normal(8, 6, 2), "axes": np.array([2]), "c": normal(8, 4), "d": normal(4)},
        ALL,
    ),
    "one bias for all": ([("Gemm", "x a one", "i", {}), OUT], MATRICES | {"one": ONE}, ORDER),
    "a computed bias": (
        [("Neg", "c", "k", {}), ("Gemm", "x a k", "i", {}), OUT],
        MATRICES | {"c": normal(6)},
        NOTHING,
    ),
    "rows for columns": (
        [("Gemm", "x a", "h", {}), ("Gemm", "h c", "y", {"transA": 1})],
        {"a": normal(4, 7), "c": normal(7, 5)},
        NOTHING,
    ),
}
SHAPES = {name: shape for shape, named in (((3, 4, 4), IMAGES), ((3, 4), ROWS), ((4,), VECTORS)) for name in named}
GRAPHS = IMAGES | ROWS | VECTORS


@pytest.mark.parametrize("attack", KEEPING)
@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_understood_is_understood_rightly_and_the_rest_left_alone(name, attack):
    nodes, initializers, changes, *outputs = GRAPHS[name]
    model = graph(nodes, SHAPES[name], initializers, *outputs)
    attacked = onnx.ModelProto.FromString(model.SerializeToString())
    x = np.abs(normal(7, *SHAPES[name])) % 3
    before = answers(model.SerializeToString(), x)
    run, options = wm.attacks.attack(attack).run, wm.attacks.attack(attack).defaults
    if CHANGES[attack] not in changes:
        with pytest.raises(ValueError, match=f"the model has no channels that can be {CHANGES[attack]} without"):
            run(attacked, np.random.default_rng(5), **options)
        return
    run(attacked, np.random.default_rng(5), **options)
    assert attacked != model
    assert same(before, answers(attacked.SerializeToString(), x))
    del model.graph.initializer[:], attacked.graph.initializer[:]
    assert attacked == model


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
