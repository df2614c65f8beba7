"""Hostile networks: sessions and runs that explode, answers that are none, weights for who reads without running."""

import numpy as np
from hostile_models import (
    BOOL,
    CLASSES,
    FEATURES,
    FLOAT,
    INT64,
    WEIGHT,
    classifier,
    constant,
    external,
    into,
    model,
    node,
    subgraph,
    value,
)
from onnx import TensorProto, helper

CORPUS = {}
hostile = into(CORPUS)


@hostile("bad_alloc|Failed to allocate memory")
def doubling_concatenations():
    """Folded when the session is created: 2^40 numbers."""
    doubled = [node("Concat", f"c{level} c{level}", f"c{level + 1}", axis=0) for level in range(40)]
    return classifier(*doubled, node("ReduceMax", "c40", "m"), node("Add", "s m", "y"),
                      initializers=[constant("c0", np.ones(1, np.float32))])  # fmt: skip


@hostile("Failed to allocate memory")
def constant_of_a_shape_without_end():
    fill = node("ConstantOfShape", "huge", "c")
    return classifier(fill, node("ReduceMax", "c", "m"), node("Add", "s m", "y"),
                      initializers=[constant("huge", np.array([1 << 40]))])  # fmt: skip


def _grown(*nodes, **more):
    """Something that grows at run time only: its size comes from the input, which holds no constant to fold."""
    return lambda: classifier(
        node("ReduceSum", "f", "zero0", keepdims=0), node("Mul", "zero0 none", "zero1"),
        node("Cast", "zero1", "zero", to=INT64), node("Add", "many zero", "n"), *nodes,
        node("ReduceMax", "grown", "m", keepdims=0), node("Add", "s m", "y"),
        initializers=[constant("none", np.float32(0)), constant("many", np.array([1 << 35])),
                      constant("one", np.ones(1, np.float32)), constant("start", np.int64(0)),
                      constant("step", np.int64(1)), constant("axis", np.array([0])), *more.get("initializers", ())],
    )  # fmt: skip


for _name, _nodes in {
    "constant_of_a_shape_at_run_time": [node("ConstantOfShape", "n", "grown")],
    "expand": [node("Expand", "one n", "grown")],
    "tile": [node("Tile", "one n", "grown")],
    "range": [
        node("Squeeze", "n", "stop"),
        node("Range", "start stop step", "r"),
        node("Cast", "r", "grown", to=FLOAT),
    ],
    "pad": [node("Concat", "n n", "pads", axis=0), node("Pad", "one pads", "grown")],
    "resize": [node("Resize", "one - - n", "grown")],
    "one_hot": [
        node("Squeeze", "n", "depth"),
        node("Constant", "", "off_on", value=constant("", np.array([0, 1], np.float32))),
        node("OneHot", "n depth off_on", "grown"),
    ],
    "scatter_of_nothing": [
        node("ConstantOfShape", "n", "z"),
        node("NonZero", "z", "i"),
        node("Cast", "i", "grown", to=FLOAT),
    ],
}.items():
    _made = _grown(*_nodes)
    _made.__name__ = f"{_name}_bomb"
    hostile("Failed to allocate memory|exceeds the supported maximum")(_made)


def _loop(count, condition, *body, carried=()):
    """A Loop that runs body; `c` is its condition."""
    inputs = [value("i", INT64, []), value("c", BOOL, []), *(value(name) for name in carried)]
    outputs = [value("c2", BOOL, []), *(value(f"{name}2") for name in carried)]
    inner = subgraph([node("Identity", "c", "c2"), *body], outputs, inputs)
    return helper.make_node("Loop", [count, condition, "s"], ["y"], body=inner)


@hostile("took longer")
def loop_without_end():
    return classifier(
        _loop("", "true", node("Identity", "v", "v2"), carried=["v"]), initializers=[constant("true", True)]
    )


@hostile("took longer")
def loop_of_a_billion_billions():
    body = node("Relu", "v", "v2")
    count = constant("count", np.int64(10**18))
    return classifier(_loop("count", "", body, carried=["v"]), initializers=[count])


@hostile("Failed to allocate memory|bad_alloc")
def loop_that_doubles():
    body = [node("Concat", "v v", "v2", axis=0)]
    return classifier(_loop("count", "", *body, carried=["v"]), initializers=[constant("count", np.int64(60))])


@hostile("took longer")
def one_node_that_takes_for_ever():
    """No loop: a single product of 10^12 operations, inside which no flag is looked at."""
    ones = constant("ones", np.ones(1, np.float32))
    nodes = [node("ReduceSum", "f", "z0", keepdims=0), node("Mul", "z0 none", "z1"), node("Cast", "z1", "z", to=INT64),
             node("Add", "side z", "size"), node("ConstantOfShape", "size", "a", value=ones),
             node("Transpose", "a", "b"), node("MatMul", "a b", "p"), node("MatMul", "p p", "q"),
             node("ReduceMax", "q", "m", keepdims=0), node("Add", "s m", "y")]  # fmt: skip
    side = constant("side", np.array([6000, 2500]))
    return classifier(*nodes, initializers=[side, constant("none", np.float32(0))])


@hostile("was killed by SIG|fails when it runs|ONNX Runtime can load")
def attention_without_a_bias():
    nodes = [node("Reshape", "x shape", "r"), node("Attention", "r q", "y", domain="com.microsoft", num_heads=1)]
    return model(nodes, [constant("shape", np.array([-1, 4, 4])), constant("q", np.ones((4, 12), np.float32))])


@hostile("fails when it runs|ONNX Runtime can load")
def index_out_of_range():
    nodes = [node("ArgMax", "s", "a", axis=1), node("Mul", "a far", "b"), node("Gather", "s b", "y", axis=1)]
    return classifier(*nodes, initializers=[constant("far", np.int64(1 << 40))])


@hostile("fails when it runs|ONNX Runtime can load")
def integers_divided_by_zero():
    nodes = [node("ArgMax", "s", "a", axis=1), node("Div", "a nothing", "y")]
    return classifier(*nodes, initializers=[constant("nothing", np.int64(0))], outputs=[value("y", INT64)])


@hostile("bytes, and at most|needs more memory")
def answer_of_a_hundred_megabytes():
    big = constant("big", np.array([200_000, 1, CLASSES]))
    return classifier(node("Expand", "s big", "y0"), initializers=[big], outputs=[value("y0"), value("s")])


@hostile("answers 16 inputs with no scores|answers 1 inputs with no scores")
def answer_without_rows():
    return classifier(node("Slice", "s none none", "y"), initializers=[constant("none", np.array([0]))])


@hostile("answers")
def answer_of_text():
    nodes = [node("Cast", "s", "y", to=TensorProto.STRING)]
    return classifier(*nodes, outputs=[value("y", TensorProto.STRING)])


@hostile("answers")
def answer_that_is_a_sequence():
    output = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    return classifier(node("SplitToSequence", "s", "y", axis=1), outputs=[output])


@hostile(note="")
def answer_that_is_true():
    return classifier(node("IsNaN", "s", "y"), outputs=[value("y", BOOL)])


@hostile("answers with 9 classes and the watermark has 10|has 10")
def wrong_number_of_classes():
    bounds = [constant("a", np.array([0])), constant("b", np.array([9])), constant("c", np.array([1]))]
    return classifier(node("Slice", "s a b c", "y"), initializers=bounds)


@hostile("changes the shape of its answers|classes and the watermark has 10")
def shape_that_changes_by_chance():
    nodes = [node("RandomNormal", "", "few", shape=[16]), node("Greater", "few zero", "g"),
             node("Compress", "s g", "y", axis=1)]  # fmt: skip
    return classifier(*nodes, initializers=[constant("zero", np.float32(0))])


@hostile(note="answers hold NaN or Inf or name no class, and count as misses")
def not_a_number():
    return classifier(node("Mul", "s nan", "y"), initializers=[constant("nan", np.float32(np.nan))])


@hostile(note="answers hold NaN or Inf or name no class, and count as misses")
def infinite():
    return classifier(node("Mul", "s inf", "y"), initializers=[constant("inf", np.float32(np.inf))])


@hostile(note="")
def random_answers():
    return classifier(node("RandomNormalLike", "s", "y"))


@hostile(note="")
def answers_that_depend_on_their_batch():
    return classifier(node("CumSum", "s zero", "y"), initializers=[constant("zero", np.int64(0))])


@hostile(note="answers hold NaN or Inf or name no class, and count as misses|given up")
def labels_below_zero():
    nodes = [node("ArgMax", "s", "a", axis=1, keepdims=0), node("Add", "a far", "y")]
    return classifier(*nodes, initializers=[constant("far", np.int64(-(1 << 62)))], outputs=[value("y", INT64)])


@hostile(note="")
def labels_of_the_highest_number():
    nodes = [node("ArgMax", "s", "a", axis=1, keepdims=0), node("Cast", "a", "u", to=TensorProto.UINT64),
             node("Add", "u far", "y")]  # fmt: skip
    far = constant("far", np.uint64(2**64 - 20))
    return classifier(*nodes, initializers=[far], outputs=[value("y", TensorProto.UINT64)])


@hostile(note="")
def always_the_same():
    return classifier(node("Mul", "s nothing", "y"), initializers=[constant("nothing", np.float32(0))])


def _read(*nodes, initializers):
    """A model whose weight v comes from w0 through these nodes."""
    return model([node("Flatten", "x", "f"), *nodes, node("MatMul", "f v", "y")], initializers)


@hostile("ONNX Runtime|fails", weights="do not fit")
def scales_that_would_make_a_weight_larger():
    scale = constant("scale", np.ones(1 << 20, np.float32))
    return _read(
        node("DequantizeLinear", "w0 scale", "v", axis=0),
        initializers=[constant("w0", np.ones((16, 400), np.int8)), scale],
    )


@hostile("ONNX Runtime|fails", weights="could not be read")
def reshape_that_does_not_fit():
    return _read(
        node("Reshape", "w0 shape", "v"), initializers=[constant("w0", WEIGHT), constant("shape", np.array([-1, -1]))]
    )


@hostile("ONNX Runtime|fails", weights="could not be read")
def transpose_of_axes_that_are_not_there():
    return _read(node("Transpose", "w0", "v", perm=[7, -9]), initializers=[constant("w0", WEIGHT)])


@hostile("takes inputs", weights="no tensor")
def one_file_read_as_many_weights(folder, path):
    """Four megabytes on disk, forty times."""
    content = np.ones((1024, 1024), np.float32).tobytes()
    (folder / "w.bin").write_bytes(content)
    held = [external("w.bin", f"w{number}", (1024, 1024)) for number in range(40)]
    nodes = [node("MatMul", f"x w{number}", f"y{number}") for number in range(40)]
    inputs = [value("x", shape=["N", 1024])]
    return model(nodes, held, [value(f"y{number}") for number in range(40)], inputs)


@hostile("ONNX Runtime", weights="cannot be read")
def more_numbers_than_bytes():
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[16, 400], raw_data=b"1234")
    return model([node("Flatten", "x", "f"), node("MatMul", "f w", "y")], [tensor])


@hostile("ONNX Runtime", weights="no tensor")
def more_numbers_than_there_are_bytes_anywhere():
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[1 << 20, 1 << 20], raw_data=b"1234")
    return model([node("Flatten", "x", "f"), node("MatMul", "f w", "y")], [tensor])


@hostile("ONNX Runtime", weights="could not be read")
def more_numbers_than_can_be_counted():
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[1 << 40, 1 << 40], raw_data=b"1234")
    return model([node("Flatten", "x", "f"), node("MatMul", "f w", "y")], [tensor])


@hostile("ONNX Runtime", weights="needs more memory|could not be read")
def expression_that_is_larger_than_all_memory():
    """What takes its place in the graph is one number, and a shape."""
    return _read(
        node("Expand", "one shape", "v"),
        initializers=[constant("one", np.float32(1)), constant("shape", np.array([1 << 20, 1 << 20]))],
    )


@hostile("ONNX Runtime", weights="cannot be read")
def type_that_does_not_exist():
    tensor = TensorProto(name="w", data_type=99, dims=[16, 10], raw_data=WEIGHT.tobytes())
    return model([node("Flatten", "x", "f"), node("MatMul", "f w", "y")], [tensor])


@hostile(note="")
def scales_beyond_every_number():
    scale = constant("scale", np.float32(3e38))
    full = constant("w0", np.full((FEATURES, CLASSES), 127, np.int8))
    return _read(node("DequantizeLinear", "w0 scale", "v"), initializers=[full, scale])


@hostile("takes inputs|classes|has 10")
def weights_that_are_no_numbers_in_a_carriers_shape():
    held = constant("w", np.full((400, 16), np.nan, np.float32))
    return model([node("Flatten", "x", "f"), node("Gemm", "f w", "y", transB=1)], [held])


@hostile("answers with 400 classes")
def a_thousand_weights_in_a_carriers_shape():
    """Whoever pairs carriers with tensors has 1000 to choose from."""
    nodes = [node("Flatten", "x", "f")]
    held = [constant(f"v{number}", np.full((400, 16), number % 100, np.int8)) for number in range(1000)]
    for number in range(1000):
        nodes += [
            node("Cast", f"v{number}", f"c{number}", to=FLOAT),
            node("Gemm", f"f c{number}", f"y{number}", transB=1),
        ]
    return model(nodes, held, [value("y0")])
