"""What attacks on channels understand of a graph, operator by operator, on graphs made by hand."""

import numpy as np
import onnx
import pytest
from attacked import normal, run, same
from onnx import TensorProto, helper, numpy_helper

import wmengine as wm

KEEPING = ("permute", "rescale", "flip")


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
    before = run(model.SerializeToString(), x)
    change, options = wm.attacks.attack(attack).run, wm.attacks.attack(attack).defaults
    if CHANGES[attack] not in changes:
        with pytest.raises(ValueError, match=f"the model has no channels that can be {CHANGES[attack]} without"):
            change(attacked, np.random.default_rng(5), **options)
        return
    change(attacked, np.random.default_rng(5), **options)
    assert attacked != model
    assert same(before, run(attacked.SerializeToString(), x))
    del model.graph.initializer[:], attacked.graph.initializer[:]
    assert attacked == model


def test_a_variance_that_cannot_take_a_factor_up_keeps_its_filter():
    variance = np.array([0, 1, 2, 3, 4, 5], np.float32)
    arrays = {"a": A, "s": normal(6), "t": normal(6, seed=1), "m": normal(6, seed=2), "v": variance, "b": B}
    nodes = [CONV, ("BatchNormalization", "h s t m v", "i", {"epsilon": 0.01}), ("Conv", "i b", "y", {})]
    model, x = graph(nodes, (3, 4, 4), arrays), normal(7, 3, 4, 4)
    before = run(model.SerializeToString(), x)
    wm.attacks.attack("rescale").run(model, np.random.default_rng(0), low=0.1, high=0.5)
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert (after["v"] == variance).tolist() == [True, *[False] * 5]
    assert np.array_equal((after["a"] == A).all(axis=(1, 2, 3)), after["v"] == variance)
    assert (after["v"] >= 0).all()
    assert same(before, run(model.SerializeToString(), x))
