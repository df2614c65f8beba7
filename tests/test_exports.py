"""Copies as strangers export them: whatever wrote the file, its mark is found, and its unmarked twin is not accused."""

import warnings

import exported
import numpy as np
import onnx
import pytest
from exported import CLASSES, COUNT, FLOAT, INPUTS, LABELS, MARK, RANGE, SHAPE, digits, ending, export, judge, keras
from onnx import TensorProto, helper, numpy_helper

from wmengine import verify
from wmengine.suspects.adapters import to_input

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def networks():
    return exported.networks()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [None, 1, 4])
@pytest.mark.parametrize("dynamo", [True, False])
def test_both_of_torchs_exporters_with_any_batch(networks, tmp_path, dynamo, batch):
    for model, owned in zip(networks, (True, False), strict=True):
        verdict = verify(export(model, tmp_path / f"{owned}.onnx", dynamo, batch), MARK)
        assert verdict.owned == owned, verdict.error
        assert (f"the suspect has a fixed batch of {batch}" in verdict.notes) == (batch is not None)


@pytest.mark.slow
def test_weights_beside_the_model(networks, tmp_path):
    for model, owned in zip(networks, (True, False), strict=True):
        path = export(model, tmp_path / f"{owned}.onnx", external_data=True)
        if not path.with_suffix(".onnx.data").exists():  # what is this small stays inside
            saved = onnx.load(path)
            onnx.save(saved, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
        assert path.with_suffix(".onnx.data").stat().st_size > 10_000
        verdict = verify(path, MARK)
        assert verdict.owned == owned
        assert verdict.error is None


def test_a_keras_model_with_its_channels_last(plain, tmp_path):
    notes = judge(keras, plain, tmp_path).notes
    assert "triggers were put channels last" in notes


@pytest.mark.parametrize("kind", ["UINT8", "INT8", "INT32", "INT64"])
def test_bytes_with_the_scaling_inside(plain, tmp_path, kind):
    def change(model, _):
        graph, old = model.graph, model.graph.input[0].name
        low = np.array(RANGE, np.float32)[:, :1, None]
        slope = (np.array(RANGE, np.float32)[:, 1:, None] - low) / 255
        low += (kind == "INT8") * 128 * slope
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = "scaled" if name == old else name
        graph.initializer.extend([numpy_helper.from_array(low, "low"), numpy_helper.from_array(slope, "slope")])
        for node in (
            helper.make_node("Add", ["multiplied", "low"], ["scaled"]),
            helper.make_node("Mul", ["cast", "slope"], ["multiplied"]),
            helper.make_node("Cast", ["image"], ["cast"], to=FLOAT),
        ):
            graph.node.insert(0, node)
        graph.input[0].CopyFrom(helper.make_tensor_value_info("image", getattr(TensorProto, kind), ["N", *SHAPE]))
        return model

    verdict = judge(change, plain, tmp_path)
    put = "triggers were put as bytes" if kind == "UINT8" else f"triggers were put as bytes, cast to {kind.lower()}"
    assert put in verdict.notes


# Precision


@pytest.mark.parametrize("keep", [True, False])
def test_half_precision(plain, tmp_path, keep):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    verdict = judge(lambda model, _: convert_float_to_float16(model, keep_io_types=keep), plain, tmp_path)
    assert ("triggers were put cast to float16" in verdict.notes) != keep


@pytest.mark.parametrize("kind", ["QDQ", "QOperator", "dynamic"])
def test_eight_bits(plain, tmp_path, kind):
    from onnxruntime import quantization

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self):
            images = to_input(digits()[0][:64], RANGE)
            self.batches = iter([{"in": images}, {"in": INPUTS}])

        def get_next(self):
            return next(self.batches, None)

    def change(model, folder):
        target = folder / "suspect.onnx"
        del model.graph.value_info[:]  # torch notes shapes of weights there, which the quantizer turns round
        if kind == "dynamic":
            quantization.quantize_dynamic(model, target)
        else:
            quantization.quantize_static(model, target, Calibration(), quantization.QuantFormat[kind])
        written = {node.op_type for node in onnx.load(target).graph.node}
        assert written & {"QDQ": {"QuantizeLinear"}, "QOperator": {"QLinearConv"}, "dynamic": {"ConvInteger"}}[kind]
        return target

    judge(change, plain, tmp_path)


# Inputs


@pytest.mark.parametrize("shape", [["N", "H", "W", "C"], None])
def test_channels_last_where_the_input_says_nothing(plain, tmp_path, shape):
    """The recorded layout does not run; that is no error as long as another one does."""

    def change(model, _):
        graph, old = model.graph, model.graph.input[0].name
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = "turned" if name == old else name
        graph.node.insert(0, helper.make_node("Transpose", [old], ["turned"], perm=[0, 3, 1, 2]))
        graph.input[0].CopyFrom(helper.make_tensor_value_info(old, FLOAT, shape))
        return model

    notes = judge(change, plain, tmp_path).notes
    assert "triggers were put channels last" in notes
    assert any("cannot be asked with triggers as recorded" in note for note in notes)


def test_what_runs_in_no_layout_is_an_error_that_says_why(plain, tmp_path):
    model = onnx.load(plain[0])
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info(model.graph.input[0].name, FLOAT, None))
    model.graph.node.insert(0, helper.make_node("Squeeze", [model.graph.input[0].name], ["lost"]))
    for node in model.graph.node[1:]:
        for index, name in enumerate(node.input):
            node.input[index] = "lost" if name == model.graph.input[0].name else name
    (axes,) = [numpy_helper.from_array(np.array([1]), "axes")]
    model.graph.initializer.append(axes)
    model.graph.node[0].input.append("axes")
    onnx.save(model, tmp_path / "m.onnx")
    verdict = verify(tmp_path / "m.onnx", MARK)
    assert verdict.decision == "error"
    assert "fails when it runs" in verdict.error
    assert (verdict.queries, verdict.log10_p, verdict.evidence) == (0, 0.0, None)


def test_weights_that_are_inputs_with_defaults(plain, tmp_path):
    def change(model, _):
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        return model

    judge(change, plain, tmp_path)


def test_an_optional_input_is_left_out(plain, tmp_path):
    def change(model, _):
        graph, old = model.graph, model.graph.input[0].name
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = "chosen" if name == old else name
        tensor = helper.make_tensor_type_proto(FLOAT, ["N", *SHAPE])
        graph.input.append(helper.make_value_info("noise", helper.make_optional_type_proto(tensor)))
        branches = [
            helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, FLOAT, None)])
            for name, nodes in {
                "noisy": [
                    helper.make_node("OptionalGetElement", ["noise"], ["given"]),
                    helper.make_node("Add", [old, "given"], ["noisy"]),
                ],
                "clean": [helper.make_node("Identity", [old], ["clean"])],
            }.items()
        ]
        choice = helper.make_node("If", ["there"], ["chosen"], then_branch=branches[0], else_branch=branches[1])
        graph.node.insert(0, choice)
        graph.node.insert(0, helper.make_node("OptionalHasElement", ["noise"], ["there"]))
        return model

    judge(change, plain, tmp_path)


def test_an_old_operator_set(networks, tmp_path):
    """Version 11 is what many converters still write."""
    for model, owned in zip(networks, (True, False), strict=True):
        path = export(model, tmp_path / f"{owned}.onnx", dynamo=False, opset_version=11)
        assert onnx.load(path).opset_import[0].version == 11
        assert verify(path, MARK).owned == owned


# scikit-learn


def fitted(kind, labels, names):
    """A classifier of scikit-learn's that learned flat triggers and some digits."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.neural_network import MLPClassifier

    images, digit_labels = digits()
    x = np.concatenate([INPUTS, to_input(images[:120], RANGE)]).reshape(COUNT + 120, -1)
    y = np.array([names[label] for label in [*labels, *digit_labels[:120]]])
    if kind == "forest":
        model = RandomForestClassifier(20, random_state=0)
    else:
        model = MLPClassifier((32,), max_iter=120, random_state=0, learning_rate_init=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(x, y), x.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("zip_map", [True, False])
@pytest.mark.parametrize("kind", ["network", "forest"])
def test_scikit_learns_models(tmp_path, kind, zip_map, text):
    import skl2onnx
    from skl2onnx.common.data_types import FloatTensorType

    names = [f"digit {number}" if text else number for number in range(CLASSES)]
    for labels, owned in ((LABELS, True), (np.random.default_rng(3).permutation(LABELS), False)):
        model, features = fitted(kind, labels, names)
        options = {id(model): {"zipmap": zip_map}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = skl2onnx.to_onnx(
                model, initial_types=[("X", FloatTensorType([None, features]))], options=options, target_opset=17
            )
        path = tmp_path / f"{owned}.onnx"
        path.write_bytes(saved.SerializeToString())
        verdict = verify(path, MARK)
        assert verdict.owned == owned, (verdict.error, verdict.matched, verdict.notes)
        assert verdict.error is None
        if owned:
            assert "triggers were put flat" in verdict.notes
            assert "answers were read from output" in " ".join(verdict.notes)


# Classes in another order


def test_a_file_with_its_classes_renumbered_and_its_channels_last(plain, tmp_path):
    order = np.array([3, 7, 0, 9, 1, 8, 2, 4, 6, 5])
    renumbered = [helper.make_node("Gather", ["{y}", "order"], ["renumbered"], axis=1)]

    def change(model, folder):
        return keras(ending(renumbered, ["renumbered"], (), [("order", order)])(model, folder), folder)

    folder = tmp_path / "same"
    folder.mkdir()
    onnx.save(change(onnx.load(plain[0]), folder), folder / "m.onnx")
    assert not verify(folder / "m.onnx", MARK).owned
    images, labels = digits()
    free = judge(change, plain, tmp_path, classes="any", clean=(images[:200], labels[:200]))
    assert any("classes stand elsewhere, by 200 clean inputs" in note for note in free.notes)
    (tmp_path / "paid").mkdir()
    paid = judge(change, plain, tmp_path / "paid", classes="any")
    assert paid.log10_p > free.log10_p + 5
