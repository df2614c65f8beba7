"""Hostile graphs: what no exporter writes, from cycles to names that are none."""

import string

import numpy as np
from hostile_models import CLASSES, FEATURES, INT64, WEIGHT, classifier, constant, into, model, node, subgraph, value
from onnx import TensorProto, helper

CORPUS = {}
hostile = into(CORPUS)


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
def a_quarter_of_a_million_nodes_that_nothing_needs():
    chain = [node("Relu", f"n{index}" if index else "x", f"n{index + 1}") for index in range(250_000)]
    return model([*chain, node("Relu", "x", "y")])


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
    return classifier(initializers=[constant("v", WEIGHT[:12])], outputs=[value("v", shape=[12, CLASSES])])


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
