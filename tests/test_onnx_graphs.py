"""What reading an ONNX graph as it runs promises: a weight is found in whatever expression of constants hides it."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_onnx_tensors import CLASSES, FEATURES, FLOAT, INPUTS, WEIGHT, graph, save, weight

from wmengine.suspects import graph_limits, open_suspect

node = helper.make_node
MATRIX = np.ascontiguousarray(WEIGHT.T)
HALVES = [np.ascontiguousarray(half) for half in np.split(WEIGHT, 2)]
ONE, HALF, AXIS = weight("one", np.float32(1)), weight("half", np.float32(0.5)), weight("axis", np.array([0]))


def constant(name, values):
    return node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(values)))


def branch(name, nodes, output, initializers=()):
    outputs = [helper.make_tensor_value_info(output, FLOAT, None)]
    return helper.make_graph(nodes, name, [], outputs, initializers)


# name → the nodes that make v, the weight of MatMul(x, v), and the initializers that they take.
EXPRESSIONS = {
    "times one": ([node("Mul", ["w", "one"], ["v"])], [weight(), ONE]),
    "sum of halves": (
        [node("Mul", ["w", "half"], ["a"]), node("Sum", ["a", "a"], ["v"])],
        [weight(), HALF],
    ),
    "negative of its negative": ([node("Neg", ["w"], ["v"])], [weight(values=-WEIGHT)]),
    "joined": ([node("Concat", ["a", "b"], ["v"], axis=0)], [weight("a", HALVES[0]), weight("b", HALVES[1])]),
    "unsqueezed": (
        [node("Unsqueeze", ["w", "axis"], ["a"]), node("Squeeze", ["a", "axis"], ["v"])],
        [weight(), AXIS],
    ),
    "a hundred copies": (
        [node("Identity", [f"i{step}" if step else "w"], [f"i{step + 1}"]) for step in range(100)]
        + [node("Identity", ["i100"], ["v"])],
        [weight()],
    ),
    "of a computed shape": (
        [
            constant("ten", np.zeros((FEATURES, CLASSES), np.int8)),
            node("Shape", ["ten"], ["s"]),
            node("Reshape", ["w", "s"], ["v"]),
        ],
        [weight(values=WEIGHT.reshape(-1))],
    ),
    "list of floats": (
        [node("Constant", [], ["a"], value_floats=WEIGHT.reshape(-1).tolist()), node("Reshape", ["a", "s"], ["v"])],
        [weight("s", np.array(WEIGHT.shape))],
    ),
    "low rank, merged": (
        [node("MatMul", ["b", "a"], ["d"]), node("Add", ["w", "d"], ["v"])],
        [weight(values=WEIGHT - 1), weight("b", np.ones((FEATURES, 1))), weight("a", np.ones((1, CLASSES)))],
    ),
    "norm and direction": (
        [node("ReduceL2", ["w"], ["n"], axes=[0]), node("Div", ["w", "n"], ["u"]), node("Mul", ["u", "g"], ["v"])],
        [weight(values=3 * WEIGHT), weight("g", np.linalg.norm(WEIGHT, axis=0, keepdims=True))],
    ),
    "in a branch that is taken": (
        [
            node(
                "If",
                ["c"],
                ["v"],
                then_branch=branch("t", [node("Mul", ["t", "one"], ["o"])], "o", [weight("t"), ONE]),
                else_branch=branch("e", [constant("o", 0 * WEIGHT)], "o"),
            )
        ],
        [weight("c", np.array(True))],
    ),
}


def model(nodes, initializers):
    initializers = [
        numpy_helper.from_array(numpy_helper.to_array(each).astype(np.float32), each.name)
        if each.data_type == TensorProto.DOUBLE
        else each
        for each in initializers
    ]
    return graph([*nodes, node("MatMul", ["x", "v"], ["y"])], initializers)


def check(made, folder, expected=MATRIX):
    """The file runs as x·W, and its one weight is W; the facts on it."""
    suspect = open_suspect(save(made, folder / "m.onnx"))
    answers = suspect.answer({"x": INPUTS}, CLASSES).values
    np.testing.assert_allclose(answers.reshape(-1, CLASSES), INPUTS @ WEIGHT, rtol=1e-4, atol=1e-4)
    (tensor,) = suspect.tensors()
    assert tensor.shape == expected.shape
    np.testing.assert_allclose(tensor.values, expected, rtol=1e-5, atol=1e-6)
    return [*map(str, suspect.facts)]


def test_what_nothing_needs_counts_for_no_limit(tmp_path, monkeypatch):
    """However much of it a thief adds; what only a branch needs stays."""
    monkeypatch.setattr(graph_limits, "MAXIMUM_NODES", 8)
    nodes = [node("Identity", ["w"], ["inside"]), node("IsNaN", ["x"], ["n"]), node("Cast", ["n"], ["m"], to=FLOAT)]
    nodes += [node("ReduceMax", ["m"], ["most"], keepdims=0), node("Cast", ["most"], ["c"], to=TensorProto.BOOL)]
    product = [node("MatMul", ["x", "inside"], ["o"])]
    nodes += [node("If", ["c"], ["y"], then_branch=branch("t", product, "o"), else_branch=branch("e", product, "o"))]
    unused = [node("Relu", [f"u{number}" if number else "x"], [f"u{number + 1}"]) for number in range(20)]
    path = save(graph([*unused, *nodes[::-1]], [weight()]), tmp_path / "m.onnx")
    suspect = open_suspect(path, isolation="none")
    (tensor,) = suspect.tensors()
    assert np.array_equal(tensor.values, MATRIX)
    np.testing.assert_allclose(suspect.answer({"x": INPUTS}, CLASSES).values, INPUTS @ WEIGHT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_weight_may_be_any_expression_of_constants(tmp_path, expression):
    facts = check(model(*EXPRESSIONS[expression]), tmp_path)
    assert set(facts) <= {"1 of 1 weights are computed in the graph"}


def test_a_matrix_may_lie_in_three_axes(tmp_path):
    made = graph(
        [node("MatMul", ["x", "w"], ["a"]), node("Squeeze", ["a", "axis"], ["y"])], [weight(values=WEIGHT[None]), AXIS]
    )
    assert check(made, tmp_path) == []


@pytest.mark.parametrize("where", ["initializer", "constant"])
@pytest.mark.parametrize("indices", ["flat", "of each axis"])
def test_a_weight_may_be_stored_sparse(tmp_path, where, indices):
    places = np.argwhere(np.ones_like(WEIGHT)) if indices == "of each axis" else np.arange(WEIGHT.size)
    sparse = helper.make_sparse_tensor(
        weight("v", WEIGHT.reshape(-1)), numpy_helper.from_array(places, "places"), WEIGHT.shape
    )
    made = model([node("Constant", [], ["v"], sparse_value=sparse)] if where == "constant" else [], [])
    if where == "initializer":
        made.graph.sparse_initializer.append(sparse)
    assert check(made, tmp_path) == []


@pytest.mark.parametrize("opset", [17, 13])
def test_a_weight_may_be_used_by_a_function(tmp_path, opset):
    """Functions that call functions, of the graph's own version of the operators or of another."""
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    inner = helper.make_function("own", "Twice", ["x"], ["y"], [node("Add", ["x", "x"], ["y"])], imports)
    outer = helper.make_function(
        "own",
        "Dense",
        ["x", "w"],
        ["y"],
        [node("Twice", ["w"], ["v"], domain="own"), node("Gemm", ["x", "v"], ["y"], transB=1)],
        imports,
    )
    made = graph([node("Dense", ["x", "w"], ["y"], domain="own")], [weight(values=MATRIX / 2)])
    made.functions.extend([inner, outer])
    made.opset_import.append(helper.make_opsetid("own", 1))
    assert check(made, tmp_path) == ["1 of 1 weights are computed in the graph"]


def test_what_goes_into_a_weight_inside_a_function_can_be_read(tmp_path):
    imports = [helper.make_opsetid("", 17)]
    body = [node("Relu", ["x"], ["r"]), node("Gemm", ["r", "w"], ["y"], transB=1)]
    layer = helper.make_function("own", "Layer", ["x", "w"], ["y"], body, imports)
    calls = [node("Layer", ["x", "w"], ["h"], domain="own"), node("Layer", ["h", "last"], ["y"], domain="own")]
    made = graph(calls, [weight(values=MATRIX), weight("last", np.eye(CLASSES, dtype=np.float32))])
    made.functions.append(layer)
    made.opset_import.append(helper.make_opsetid("own", 1))
    suspect = open_suspect(save(made, tmp_path / "m.onnx"))
    hidden = np.maximum(np.maximum(INPUTS, 0) @ WEIGHT, 0)
    np.testing.assert_allclose(suspect.activations(1, {"x": INPUTS}), hidden, rtol=1e-4, atol=1e-5)


def test_a_weight_may_be_used_in_the_body_of_a_loop(tmp_path):
    """What the body takes from outside is a weight, what goes around in it is none."""
    square = np.random.default_rng(0).normal(size=(FEATURES, FEATURES)).astype(np.float32)
    states = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("state", FLOAT, None)]
    body = helper.make_graph(
        [node("MatMul", ["state", "w"], ["next"]), node("Identity", ["go"], ["on"])],
        "body",
        [helper.make_tensor_value_info(*each) for each in states],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("next", FLOAT, None)],
    )
    made = graph(
        [node("Loop", ["trips", "", "x"], ["y"], body=body)], [weight(values=square), weight("trips", np.array(2))]
    )
    suspect = open_suspect(save(made, tmp_path / "m.onnx"))
    answers = suspect.answer({"x": INPUTS}, FEATURES).values
    np.testing.assert_allclose(answers, INPUTS @ square @ square, rtol=1e-4, atol=1e-4)
    (tensor,) = suspect.tensors()
    assert np.array_equal(tensor.values, square.T)


@pytest.mark.parametrize("how", ["stored", "computed", "by a function"])
def test_weights_beside_the_model_are_used_in_all_these_ways(tmp_path, how):
    made = {
        "stored": graph([node("MatMul", ["x", "w"], ["y"])], [weight()]),
        "computed": model([node("Neg", ["w"], ["v"])], [weight(values=-WEIGHT)]),
        "by a function": graph([node("Dense", ["x", "w"], ["y"], domain="own")], [weight()]),
    }[how]
    imports = [helper.make_opsetid("", 17)]
    if how == "by a function":
        body = [node("MatMul", ["x", "w"], ["y"])]
        made.functions.append(helper.make_function("own", "Dense", ["x", "w"], ["y"], body, imports))
        made.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="w.data")
    (tensor,) = open_suspect(tmp_path / "m.onnx").tensors()
    assert np.array_equal(tensor.values, MATRIX)


def test_branches_may_be_decided_by_computed_conditions_and_lie_in_branches(tmp_path):
    """The graph's output is that of a branch in a branch."""

    def product(name):
        return branch(name, [node("MatMul", ["x", "w"], [f"o{name}"])], f"o{name}")

    inner = node("If", ["yes"], ["i"], then_branch=product("a"), else_branch=product("b"))
    nodes = [
        node("Not", ["c"], ["no"]),
        node("Not", ["no"], ["yes"]),
        node("If", ["no"], ["y"], then_branch=product("d"), else_branch=branch("e", [inner], "i")),
    ]
    assert check(graph(nodes, [weight(), weight("c", np.array(True))]), tmp_path) == []


def test_the_factor_of_a_product_is_part_of_its_weight(tmp_path):
    """alpha has a sign."""
    made = graph([node("Gemm", ["x", "w"], ["y"], alpha=-0.5, transB=1)], [weight(values=-2 * MATRIX)])
    assert check(made, tmp_path) == []
    made = graph(
        [node("FusedMatMul", ["x", "w"], ["y"], alpha=-0.5, domain="com.microsoft")], [weight(values=-2 * WEIGHT)]
    )
    assert check(made, tmp_path) == []


def test_normalisations_may_be_computed_too(tmp_path):
    kernel = np.random.default_rng(0).normal(size=(3, 2, 1, 1)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "k"], ["a"]),
        node("Neg", ["g"], ["gamma"]),
        node("BatchNormalization", ["a", "gamma", "b", "b", "var"], ["y"], epsilon=0.0),
    ]
    constants = [weight("k", kernel), weight("g", np.float32([-1, 2, 3])), weight("b", np.zeros(3, np.float32))]
    made = graph(
        nodes,
        [*constants, weight("var", np.float32([4, 4, 4]))],
        inputs=[helper.make_tensor_value_info("x", FLOAT, ["N", 2, 4, 4])],
    )
    (tensor,) = open_suspect(save(made, tmp_path / "m.onnx")).tensors()
    np.testing.assert_allclose(tensor.factors, [0.5, -1, -1.5])


def test_what_no_output_needs_is_no_weight(tmp_path):
    """Whoever adds tensors of the right shapes beside a weight must let them work on the answer."""
    decoys = [weight(f"d{number}", WEIGHT) for number in range(5)]
    idle = [node("MatMul", ["x", each.name], [f"y{number}"]) for number, each in enumerate(decoys)]
    never = branch("e", [node("MatMul", ["x", "o1"], ["o"])], "o", [weight("o1")])
    taken = branch("t", [node("MatMul", ["x", "w"], ["o"])], "o")
    nodes = [*idle, node("If", ["c"], ["y"], then_branch=taken, else_branch=never)]
    made = graph(nodes, [weight(), *decoys, weight("c", np.array(True))])
    suspect = open_suspect(save(made, tmp_path / "m.onnx"))
    assert [tensor.source for tensor in suspect.tensors()] == ["w"]


def test_values_of_one_name_in_two_branches_are_not_confused(tmp_path):
    """Each branch computes a weight v of its own."""

    def product(name, values):
        return branch(
            name,
            [node("Neg", [f"s{name}"], ["v"]), node("MatMul", ["x", "v"], ["o"])],
            "o",
            [weight(f"s{name}", values)],
        )

    nodes = [
        node("IsNaN", ["x"], ["n"]),
        node("Cast", ["n"], ["m"], to=TensorProto.INT32),
        node("ReduceMax", ["m"], ["most"], keepdims=0),
        node("Cast", ["most"], ["c"], to=TensorProto.BOOL),
        node("If", ["c"], ["y"], then_branch=product("t", -WEIGHT), else_branch=product("e", WEIGHT)),
    ]
    suspect = open_suspect(save(graph(nodes, []), tmp_path / "m.onnx"))
    assert suspect.answer({"x": INPUTS}, CLASSES).values.shape == (5, CLASSES)
    first, second = sorted((tensor.values for tensor in suspect.tensors()), key=lambda values: values[0, 0])
    np.testing.assert_array_equal(sorted([first[0, 0], second[0, 0]]), sorted([MATRIX[0, 0], -MATRIX[0, 0]]))
    np.testing.assert_array_equal(first, -second)


def endless():
    """A loop that makes a weight, and that ONNX Runtime too enters only when it must."""
    states = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("state", FLOAT, None)]
    body = helper.make_graph(
        [node("Neg", ["state"], ["next"]), node("Identity", ["go"], ["on"])],
        "body",
        [helper.make_tensor_value_info(*each) for each in states],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("next", FLOAT, None)],
    )
    return [constant("w0", WEIGHT), constant("yes", True), node("Loop", ["", "yes", "w0"], ["v"], body=body)]


@pytest.mark.parametrize(
    "made",
    [
        [node("Expand", ["zero", "s"], ["v"]), node("Shape", ["x"], ["n"]), node("Add", ["n", "one"], ["s"])],
        [node("RandomNormal", [], ["v"], shape=[FEATURES, CLASSES])],
        endless(),
    ],
    ids=["depends on the input", "random", "endless"],
)
def test_weights_that_cannot_be_read_are_counted(tmp_path, made):
    constants = [
        weight("zero", np.float32(0)),
        weight("one", np.array(1)),
        weight(values=np.eye(CLASSES, dtype=np.float32)),
    ]
    products = [node("Gemm", ["x", "v"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    suspect = open_suspect(save(graph([*made, *products], constants), tmp_path / "m.onnx"))
    assert [tensor.source for tensor in suspect.tensors()] == ["w"]
    assert "1 operators have a weight that could not be read" in str(suspect.facts[0])


def test_one_expression_that_fails_does_not_take_the_others_with_it(tmp_path):
    """The branch with it is never taken, and nobody knows that before the graph runs."""
    bad = branch("t", [node("Reshape", ["w", "no"], ["v1"]), node("MatMul", ["x", "v1"], ["o"])], "o")
    good = branch("e", [node("Neg", ["w"], ["v2"]), node("MatMul", ["x", "v2"], ["o"])], "o")
    nodes = [
        node("IsNaN", ["x"], ["n"]),
        node("Cast", ["n"], ["m"], to=TensorProto.INT32),
        node("ReduceMax", ["m"], ["most"], keepdims=0),
        node("Cast", ["most"], ["c"], to=TensorProto.BOOL),
        node("Add", ["five", "two"], ["no"]),
        node("If", ["c"], ["y"], then_branch=bad, else_branch=good),
    ]
    constants = [weight(values=-WEIGHT), weight("five", np.array([5])), weight("two", np.array([2]))]
    suspect = open_suspect(save(graph(nodes, constants), tmp_path / "m.onnx"))
    (tensor,) = suspect.tensors()
    np.testing.assert_array_equal(tensor.values, MATRIX)
    assert "1 operators have a weight" in " ".join(map(str, suspect.facts))


def test_an_optimised_copy_of_any_of_these_shows_the_same_weight(tmp_path):
    """What ONNX Runtime itself makes of them, saved by it."""
    for number, (nodes, initializers) in enumerate(EXPRESSIONS.values()):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / f"{number}.onnx")
        onnxruntime.InferenceSession(
            model(nodes, initializers).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (tensor,) = open_suspect(tmp_path / f"{number}.onnx").tensors()
        np.testing.assert_allclose(tensor.values, MATRIX, rtol=1e-5, atol=1e-6)
        onnx.load(tmp_path / f"{number}.onnx")
