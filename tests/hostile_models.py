"""Hostile ONNX files, made by functions: every way that we know in which a stranger's file could hurt its reader.

`CORPUS` maps a name to a `Hostile`: what writes the file (and what lies beside it), and what must be said of it. All
take inputs float32 [N, 1, 4, 4], as the marks of tests/test_hostile.py put them, unless that is what is wrong.
"""

from __future__ import annotations

import os
import socket
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
FEATURES, CLASSES = 16, 10
WEIGHT = np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)
# What lies outside of a model's directory: none of these bytes may ever be seen in a result.
SECRET = b"canary-7f3a9c51-never-to-be-seen"


@dataclass(frozen=True)
class Hostile:
    """write(folder, path) makes the file; error matches what is said of a mark that asks, weights of one that reads.

    Where error is None the file merely answers badly: it is not proven, and note is among the notes.
    """

    write: Callable[[Path, Path], None]
    error: str | None = None
    note: str | None = None
    weights: str | None = None


CORPUS: dict[str, Hostile] = {}


def hostile(error: str | None = None, note: str | None = None, weights: str | None = None) -> Any:
    """Register a function that returns a model or its bytes, or writes to `path` itself."""

    def register(make: Callable[..., Any]) -> Any:
        def write(folder: Path, path: Path) -> None:
            made = make(folder, path) if make.__code__.co_argcount else make()
            if made is not None:
                path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())

        CORPUS[make.__name__] = Hostile(write, error, note, weights)
        return make

    return register


def value(name: str, kind: int = FLOAT, shape: Any = None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name: str, content: Any) -> Any:
    return numpy_helper.from_array(np.asarray(content), name)


def node(operator: str, takes: str, gives: str, **attributes: Any) -> Any:
    """Names separated by blanks; "-" is an input left out."""
    names = ["" if name == "-" else name for name in takes.split()]
    return helper.make_node(operator, names, gives.split(), **attributes)


def model(
    nodes: Any,
    initializers: Any = (),
    outputs: Any = None,
    inputs: Any = None,
    opset: int = 17,
    ir: int = 9,
    **more: Any,
) -> Any:
    """A model from x [N, 1, 4, 4] to y."""
    graph = helper.make_graph(
        nodes, "g", inputs or [value("x", shape=["N", 1, 4, 4])], outputs or [value("y")], list(initializers)
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir, **more)


def classifier(*nodes: Any, initializers: Any = (), **options: Any) -> Any:
    """A linear classifier from x to s, and the nodes behind it, to y."""
    head = [node("Flatten", "x", "f"), node("MatMul", "f w", "s")]
    if not nodes:
        nodes = (node("Identity", "s", "y"),)
    return model([*head, *nodes], [constant("w", WEIGHT), *initializers], **options)


def external(location: str, name: str = "w", shape: Any = (FEATURES, CLASSES), **entries: Any) -> Any:
    tensor = TensorProto(name=name, data_type=FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, text in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(text))
    return tensor


def with_external(location: str, **options: Any) -> Any:
    return model([node("Flatten", "x", "f"), node("MatMul", "f w", "y")], [external(location, **options)])


def subgraph(nodes: Any, outputs: Any, inputs: Any = (), initializers: Any = ()) -> Any:
    return helper.make_graph(list(nodes), "inner", list(inputs), list(outputs), list(initializers))


def secret_outside(folder: Path) -> Path:
    """A file that a model must not reach: the classifier's very weights, so that reading them would go unnoticed."""
    outside = folder.parent.parent / "outside"
    outside.mkdir(exist_ok=True)
    secret = outside / f"{folder.name}.bin"
    secret.write_bytes((SECRET * 20)[: WEIGHT.nbytes])
    return secret


# --- weights in other files -------------------------------------------------------------------------------------------


@hostile("not inside the model's directory")
def parent_directory(folder, path):
    return with_external(f"../../outside/{secret_outside(folder).name}")


@hostile("not inside the model's directory")
def absolute_path(folder, path):
    return with_external(str(secret_outside(folder)))


@hostile("not inside the model's directory")
def up_again_from_a_subdirectory(folder, path):
    (folder / "down").mkdir()
    return with_external(f"down/../../../outside/{secret_outside(folder).name}")


@hostile("regular file and no link")
def symbolic_link(folder, path):
    (folder / "w.bin").symlink_to(secret_outside(folder))
    return with_external("w.bin")


@hostile("regular file and no link")
def symbolic_link_to_a_directory(folder, path):
    (folder / "down").symlink_to(secret_outside(folder).parent)
    return with_external(f"down/{secret_outside(folder).name}")


@hostile("also linked from elsewhere")
def hard_link(folder, path):
    (folder / "w.bin").hardlink_to(secret_outside(folder))
    return with_external("w.bin")


@hostile("not a regular file")
def pipe_of_weights(folder, path):
    os.mkfifo(folder / "w.bin")
    return with_external("w.bin")


@hostile("a directory")
def directory_of_weights(folder, path):
    (folder / "w.bin").mkdir()
    return with_external("w.bin")


@hostile("regular file and no link")
def zeros_without_end(folder, path):
    (folder / "w.bin").symlink_to("/dev/zero")
    return with_external("w.bin")


@hostile("missing")
def missing_weights():
    return with_external("w.bin")


@hostile("missing")
def processes_own_memory():
    return with_external("*/_ORT_MEM_ADDR_/*", offset=4096, length=WEIGHT.nbytes)


@hostile("is larger than")
def hole_of_a_terabyte(folder, path):
    with open(folder / "w.bin", "wb") as file:
        file.truncate(1 << 40)
    return with_external("w.bin")


@hostile("ONNX Runtime", weights="cannot be read")
def no_bytes_of_weights(folder, path):
    (folder / "w.bin").touch()
    return with_external("w.bin")


def _with_entries(**entries):
    def make(folder, path):
        (folder / "w.bin").write_bytes(WEIGHT.tobytes())
        return with_external("w.bin", **entries)

    return make


for _name, _entries in {
    "offset_at_the_end_of_the_world": {"offset": 2**63 - 1},
    "offset_and_length_that_overflow": {"offset": 2**63 - 8, "length": 2**63 - 8},
    "offset_beyond_64_bits": {"offset": 10**30},
    "offset_below_zero": {"offset": -4096},
    "length_beyond_the_file": {"length": 1 << 40},
    "offset_that_is_no_number": {"offset": "many"},
}.items():
    _make = _with_entries(**_entries)
    _make.__name__ = _name
    hostile("ONNX Runtime", weights="beyond the end|no number")(_make)


@hostile("says twice")
def two_locations(folder, path):
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    made = with_external("w.bin")
    made.graph.initializer[0].external_data.add(key="location", value="*/_ORT_MEM_ADDR_/*")
    return made


@hostile("not UTF-8")
def location_that_is_no_text():
    return with_external("w.bin").SerializeToString().replace(b"w.bin", b"w\xff\xfein")


@hostile("not inside the model's directory")
def location_with_a_zero_byte():
    return with_external("w.bin\0.txt")


@hostile("in 524288 characters")
def location_of_a_megabyte():
    return with_external("w" * (1 << 19))


@hostile("10001 external files")
def ten_thousand_files(folder, path):
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    return model([node("Identity", "x", "y")], [external(f"{number}.bin", f"w{number}") for number in range(10_001)])


@hostile("not inside the model's directory")
def location_in_a_constant(folder, path):
    held = external(f"../../outside/{secret_outside(folder).name}")
    return model([node("Constant", "", "w", value=held), node("Flatten", "x", "f"), node("MatMul", "f w", "y")])


@hostile("not inside the model's directory")
def location_in_a_sparse_tensor(folder, path):
    made = classifier()
    held = external(str(secret_outside(folder)), "v", [4])
    sparse = onnx.SparseTensorProto(values=held, indices=constant("i", np.arange(4)), dims=[FEATURES, CLASSES])
    made.graph.sparse_initializer.append(sparse)
    return made


@hostile("not inside the model's directory")
def location_in_a_subgraph(folder, path):
    held = external(str(secret_outside(folder)), "v")
    branch = subgraph([node("MatMul", "f v", "o")], [value("o")], initializers=[held])
    nodes = [node("Flatten", "x", "f"), node("If", "c", "y", then_branch=branch, else_branch=branch)]
    return model(nodes, [constant("c", True)])


@hostile("not inside the model's directory")
def location_in_a_function(folder, path):
    held = external(str(secret_outside(folder)), "v")
    body = [node("Constant", "", "v", value=held), node("MatMul", "a v", "b")]
    function = helper.make_function("f", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    return model([node("Flatten", "x", "f"), node("F", "f", "y", domain="f")], functions=[function])


# --- files ------------------------------------------------------------------------------------------------------------


@hostile("is empty")
def empty_file():
    return b""


@hostile("not an ONNX model")
def garbage():
    return np.random.default_rng(0).bytes(4096)


@hostile("not an ONNX model")
def truncated():
    return classifier().SerializeToString()[:-40]


@hostile("it has no graph")
def no_graph():
    return onnx.ModelProto(ir_version=9)


@hostile("not an ONNX model")
def text_that_names_a_location():
    return b"location " * 1000


@hostile("not a regular file")
def pipe(folder, path):
    os.mkfifo(path)


@hostile("cannot be read")
def unix_socket(folder, path):
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket has room for a hundred characters
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


@hostile("not a regular file")
def device(folder, path):
    path.symlink_to("/dev/zero")


@hostile("cannot be read")
def link_to_itself(folder, path):
    path.symlink_to(path)


@hostile("does not exist")
def link_to_nothing(folder, path):
    path.symlink_to(folder / "gone")


@hostile("is larger than")
def model_of_a_terabyte(folder, path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


@hostile("answers with 16 classes")
def onnx_runtimes_own_format_in_disguise():
    """A model for protobuf, and bytes that ONNX Runtime would take for its flat format, which nobody has checked."""
    head = bytes([0x7A, 0x40, 0, 0]) + b"ORTM" + bytes(0x3A)  # an unknown field of 64 bytes
    return head + model([node("Flatten", "x", "y")]).SerializeToString()


@hostile("not an ONNX model")
def protobuf_nested_ten_thousand_deep():
    """graph.node.attribute.g.node.attribute.g …: each level wraps the one below in four length-delimited fields."""
    content = b""
    for _ in range(10_000):
        for field in (0x32, 0x2A, 0x0A):  # AttributeProto.g is 6, NodeProto.attribute 5, GraphProto.node 1
            content = bytes([field]) + _varint(len(content)) + content
            if len(content) > 1 << 20:
                return bytes([0x3A]) + _varint(len(content)) + content
    return bytes([0x3A]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    out = b""
    while number >= 128:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


# --- graphs -----------------------------------------------------------------------------------------------------------


@hostile("ONNX Runtime")
def opset_99():
    return classifier(opset=99)


@hostile("ONNX Runtime")
def ir_99():
    return classifier(ir=99)


@hostile("operator 'Run' of domain 'evil'")
def unknown_domain():
    return classifier(node("Run", "s", "y", domain="evil"))


@hostile("ONNX Runtime")
def unknown_operator():
    return classifier(node("Explode", "s", "y"))


@hostile("which is none that trained networks")
def operator_that_calls_python():
    return classifier(node("PyOp", "s", "y", domain="com.microsoft"))


@hostile("ONNX Runtime", weights="cycle")
def cycle():
    return classifier(node("Add", "s b", "a"), node("Relu", "a", "b"), node("Identity", "b", "y"))


def _function(name, body, **options):
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    return helper.make_function(options.pop("domain", "f"), name, ["a"], ["b"], body, opsets, **options)


def _calls_twice(other, **attributes):
    return [node(other, "a", "m", **attributes), node(other, "m", "b", **attributes)]


@hostile("calls itself")
def function_that_calls_itself():
    return classifier(node("F", "s", "y", domain="f"), functions=[_function("F", _calls_twice("F", domain="f"))])


@hostile("more than 200000 nodes")
def functions_that_double_thirty_times():
    functions = [_function("F0", [node("Relu", "a", "b")])]
    functions += [_function(f"F{n}", _calls_twice(f"F{n - 1}", domain="f")) for n in range(1, 31)]
    return classifier(node("F30", "s", "y", domain="f"), functions=functions)


@hostile("more than 200000 nodes")
def functions_that_hide_behind_overloads():
    """Each level has a cheap overload, listed last, and the one that is called."""
    functions = [_function("F0", [node("Relu", "a", "b")], overload="dear")]
    for level in range(1, 31):
        functions.append(
            _function(f"F{level}", _calls_twice(f"F{level - 1}", domain="f", overload="dear"), overload="dear")
        )
    functions += [_function(f"F{level}", [node("Relu", "a", "b")], overload="cheap") for level in range(31)]
    return classifier(node("F30", "s", "y", domain="f", overload="dear"), functions=functions, ir=10)


@hostile("more than 200000 nodes")
def functions_in_the_standard_domains_other_name():
    functions = [_function("F0", [node("Relu", "a", "b")], domain="")]
    functions += [
        _function(f"F{level}", _calls_twice(f"F{level - 1}", domain="ai.onnx"), domain="") for level in range(1, 31)
    ]
    return classifier(node("F30", "s", "y", domain="ai.onnx"), functions=functions)


@hostile("defines the function 'F' twice")
def function_defined_twice():
    functions = [_function("F", [node("Relu", "a", "b")]) for _ in range(2)]
    return classifier(node("F", "s", "y", domain="f"), functions=functions)


@hostile("nests functions more than")
def functions_a_hundred_deep():
    functions = [_function("F0", [node("Relu", "a", "b")])]
    functions += [_function(f"F{level}", [node(f"F{level - 1}", "a", "b", domain="f")]) for level in range(1, 100)]
    return classifier(node("F99", "s", "y", domain="f"), functions=functions)


def _nested_ifs(depth):
    inner = subgraph([node("Relu", "s", "o")], [value("o")])
    for _ in range(depth):
        inner = subgraph([node("If", "c", "o", then_branch=inner, else_branch=inner)], [value("o")])
    return node("If", "c", "y", then_branch=inner, else_branch=inner)


@hostile("nests graphs more than")
def ifs_ten_deep():
    return classifier(_nested_ifs(10), initializers=[constant("c", True)])


@hostile("more than 200000 nodes")
def a_quarter_of_a_million_nodes():
    chain = [node("Relu", f"n{index}", f"n{index + 1}") for index in range(250_000)]
    return classifier(*chain, initializers=[], outputs=[value("n250000")])


@hostile("answers 16 inputs with no scores")
def nodes_in_one_long_chain():
    """As many as are let through: what walks them by recursion must not run out of stack."""
    chain = [node("Relu", f"n{index}" if index else "x", f"n{index + 1}") for index in range(20_000)]
    return model(chain, outputs=[value("n20000")])


@hostile("ONNX Runtime")
def dimensions_below_zero():
    made = classifier()
    made.graph.initializer[0].dims[:] = [-FEATURES, -CLASSES]
    return made


@hostile("ONNX Runtime")
def dimensions_of_2_to_the_62():
    made = classifier()
    made.graph.initializer[0].dims[:] = [1 << 62, 1 << 62]
    return made


@hostile("ONNX Runtime")
def dimensions_whose_product_wraps_to_the_right_size():
    made = classifier()
    made.graph.initializer[0].dims[:] = [FEATURES * CLASSES, (1 << 63) - 1, 1 << 32]
    return made


@hostile("ONNX Runtime|fixed batch")
def input_of_2_to_the_60():
    return classifier(inputs=[value("x", shape=[1 << 60, 1, 4, 4])])


@hostile("fixed batch of 4096000")
def batch_of_millions():
    return classifier(inputs=[value("x", shape=[4_096_000, 1, 4, 4])])


@hostile("takes inputs")
def input_without_axes():
    return model([node("Identity", "x", "y")], inputs=[value("x", shape=[1 << 20])])


@hostile("ONNX Runtime|takes tensor")
def input_of_text():
    return model([node("Identity", "x", "y")], inputs=[value("x", TensorProto.STRING, ["N"])])


@hostile("needs 500 inputs")
def five_hundred_inputs():
    inputs = [value(f"{string.printable[number % 100]}\x1b[2J{number}", shape=["N"]) for number in range(500)]
    return model([helper.make_node("Identity", [inputs[0].name], ["y"])], inputs=inputs)


@hostile("needs 0 inputs")
def no_inputs():
    made = model([node("Identity", "w", "y")], [constant("w", WEIGHT)])
    del made.graph.input[:]
    return made


@hostile("fails when it runs")
def no_outputs():
    made = classifier()
    del made.graph.output[:]
    return made


@hostile(note="16 of 501 outputs may be the answer")
def five_hundred_outputs():
    names = [f"out\x1b]0;{index}\x07\n" for index in range(500)]
    nodes = [helper.make_node("Relu", ["s"], [name]) for name in names]
    return classifier(*nodes, node("Identity", "s", "y"), outputs=[*map(value, names), value("y")])


@hostile("1001 outputs, and at most 1000", weights="1001 outputs, and at most 1000")
def a_thousand_and_one_outputs():
    """Class numbers all of them: whoever looks which ones belong together compares each with every other."""
    names = [f"y{index}" for index in range(1001)]
    nodes = [node("TopK", "s ten", "v i", axis=1), *[node("Identity", "i", name) for name in names]]
    outputs = [value(name, INT64) for name in names]
    return classifier(*nodes, initializers=[constant("ten", np.array([CLASSES]))], outputs=outputs)


@hostile("of names, and at most")
def outputs_with_megabytes_of_names():
    names = [f"{index}" * (1 << 17) for index in range(10)]
    return classifier(*[helper.make_node("Relu", ["s"], [name]) for name in names], outputs=list(map(value, names)))


@hostile(note="one of 2")
def names_that_are_no_names():
    """Quotes, braces, a line break, and a terminal's title, in every name; the answer is the second output."""
    bad = '"}]\n\r\x1b]0;owned\x07{"decision": "owned"'
    nodes = [node("Flatten", "x", "f"), helper.make_node("MatMul", ["f", bad + "w"], [bad])]
    nodes.append(helper.make_node("ReduceMax", [bad], [bad + "max"], keepdims=0))
    return model(nodes, [constant(bad + "w", WEIGHT)], [value(bad + "max"), value(bad)])


@hostile("ONNX Runtime|cannot be judged")
def names_that_are_no_text():
    return classifier(outputs=[value("yyyy")]).SerializeToString().replace(b"yyyy", b"\xff\xfe\xed\xa0")


@hostile("answers|10 classes")
def weights_as_the_answer():
    return classifier(outputs=[value("w", shape=list(WEIGHT.shape))])


@hostile("ONNX Runtime")
def two_nodes_of_one_name_for_their_output():
    return classifier(node("Relu", "s", "y"), node("Sigmoid", "s", "y"))


@hostile("ONNX Runtime")
def output_that_nobody_makes():
    return classifier(outputs=[value("nowhere")])


@hostile(note="carriers|given up|^$")
def forty_megabytes_of_metadata():
    made = classifier(doc_string="d" * (20 << 20))
    made.metadata_props.add(key="\x1b[2J" * 1000, value="v" * (20 << 20))
    return made


# --- sessions and runs that explode -----------------------------------------------------------------------------------


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


# --- answers that are none --------------------------------------------------------------------------------------------


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


# --- weights for whoever reads them without running -------------------------------------------------------------------


def _read(*nodes, initializers):
    """A model whose weight v comes from w0 through these nodes."""
    return model([node("Flatten", "x", "f"), *nodes, node("MatMul", "f v", "y")], initializers)


@hostile("ONNX Runtime|fails", weights="do not fit")
def scales_that_would_make_a_weight_larger():
    scale = constant("scale", np.ones(1 << 20, np.float32))
    return _read(
        node("DequantizeLinear", "w0 scale", "v", axis=0),
        initializers=[constant("w0", np.ones((1, 10), np.int8)), scale],
    )


@hostile("ONNX Runtime|fails", weights="cannot be read")
def reshape_that_does_not_fit():
    return _read(
        node("Reshape", "w0 shape", "v"), initializers=[constant("w0", WEIGHT), constant("shape", np.array([-1, -1]))]
    )


@hostile("ONNX Runtime|fails", weights="cannot be read")
def transpose_of_axes_that_are_not_there():
    return _read(node("Transpose", "w0", "v", perm=[7, -9]), initializers=[constant("w0", WEIGHT)])


@hostile("takes inputs", weights="bytes, and at most|needs more memory")
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
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[1 << 20, 1 << 20], raw_data=b"1234")
    return model([node("Flatten", "x", "f"), node("MatMul", "f w", "y")], [tensor])


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
