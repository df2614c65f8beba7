"""Copies as strangers export them: whatever wrote the file, its mark is found, and its unmarked twin is not accused."""

import math
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from wmengine.key import Key
from wmengine.schemes import black_box_parameters, scheme
from wmengine.triggers import to_input
from wmengine.verify import verify
from wmengine.watermark import Watermark

from wmengine.suspects.answers import Predicted, choose_readings, highest, of_two_classes, read_all
from wmengine.suspects.onnx_engine import numbers

KEY = Key("ACME Vision", bytes(range(32)))
SHAPE, CLASSES, COUNT, FEATURES = (3, 8, 8), 10, 60, 24
RANGE = [[-1.0, 1.0], [-2.1, 2.6], [-1.8, 2.4]]
MARK = Watermark.create(KEY, "adi", black_box_parameters(scheme("adi", count=COUNT), SHAPE, CLASSES, RANGE, "digits"))
TRIGGERS, LABELS = MARK.arrays["triggers"], MARK.arrays["labels"]
INPUTS = to_input(TRIGGERS, RANGE)
FLOAT, INT64, BOOL, TEXT = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(self.body(x))


def digits():
    """The digits in three tints, bytes [N, 3, 8, 8], and what they are."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = (images.reshape(-1, 1, 8, 8) / 16 * 255).astype(np.uint8)
    return np.concatenate([grey, 255 - grey, grey // 2], axis=1), labels


def train(images, labels, seed):
    torch.manual_seed(seed)
    model, x, y = Network(), torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(12):
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def networks():
    """A network that learned the digits and, ten times as often, the mark; its twin learned the digits only."""
    images, labels = digits()
    images = to_input(images, RANGE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    marked = train(np.concatenate([images, *[INPUTS] * 10]), np.concatenate([labels, *[LABELS] * 10]), seed=0)
    unmarked = train(images, labels, seed=1)
    torch.set_num_threads(threads)
    with torch.no_grad():
        assert (marked(torch.from_numpy(INPUTS)).argmax(1).numpy() == LABELS).mean() > 0.95
    return marked, unmarked


def export(model, path, dynamo=True, batch=None, **options):
    """By torch's exporter, the new one or the old one, for one size of batch or for any."""
    x = torch.zeros(batch or 2, *SHAPE)
    if batch is None and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    elif batch is None:
        options["dynamic_axes"] = {"in": {0: "batch"}, "out": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x,), path, dynamo=dynamo, input_names=["in"], output_names=["out"], verbose=False, **options
        )
    return path


@pytest.fixture(scope="module")
def plain(networks, tmp_path_factory):
    """The marked network's file and its twin's, as torch writes them, with the features as a value called features."""
    folder = tmp_path_factory.mktemp("plain")
    paths = []
    for name, model in zip(("marked", "unmarked"), networks, strict=True):
        path = export(model, folder / f"{name}.onnx", external_data=False)
        saved = onnx.load(path)
        (gemm,) = [node for node in saved.graph.node if saved.graph.output[0].name in node.output]
        for node in saved.graph.node:
            for names in (node.input, node.output):
                for index, value in enumerate(names):
                    names[index] = "features" if value == gemm.input[0] else value
        onnx.save(saved, path)
        paths.append(path)
    return tuple(paths)


def judge(change, paths, tmp_path, **options):
    """What is said of the marked file once `change(model, folder)` has made another of it. The twin is not accused."""
    verdicts = []
    for path in paths:
        folder = tmp_path / path.stem
        folder.mkdir()
        made = change(onnx.load(path), folder)
        if not hasattr(made, "exists"):
            onnx.save(made, folder / "suspect.onnx")
            made = folder / "suspect.onnx"
        verdicts.append(verify(made, MARK, **options))
    copy, twin = verdicts
    assert copy.decision == "owned", (copy.error, copy.matched, copy.notes)
    assert copy.matched >= 0.9 * COUNT
    assert twin.decision == "not_proven", twin.error
    return copy


# --- exporters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 1, 4])
@pytest.mark.parametrize("dynamo", [True, False])
def test_both_of_torchs_exporters_with_any_batch(networks, tmp_path, dynamo, batch):
    for model, owned in zip(networks, (True, False), strict=True):
        verdict = verify(export(model, tmp_path / f"{owned}.onnx", dynamo, batch), MARK)
        assert verdict.owned == owned, verdict.error
        assert (f"the suspect has a fixed batch of {batch}" in verdict.notes) == (batch is not None)


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


def keras(model, _):
    """As tf2onnx writes a Keras model: channels last outside, turned round inside, scopes in names, a softmax."""
    graph = model.graph
    old = graph.input[0].name
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "sequential/conv2d/Conv2D__6:0" if name == old else name
    turn = helper.make_node("Transpose", ["conv2d_input"], ["sequential/conv2d/Conv2D__6:0"], perm=[0, 3, 1, 2])
    graph.node.insert(0, turn)
    graph.input[0].CopyFrom(helper.make_tensor_value_info("conv2d_input", FLOAT, ["unk__20", 8, 8, 3]))
    return ending([helper.make_node("Softmax", ["{y}"], ["dense_1"], axis=-1)], ["dense_1"])(model, _)


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


# --- precision --------------------------------------------------------------------------------------------------------


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


# --- outputs ----------------------------------------------------------------------------------------------------------


def ending(nodes, outputs, kinds=(), constants=()):
    """A change: these nodes behind the logits, whose name stands for {y}, and these outputs instead of them."""

    def change(model, _):
        graph = model.graph
        y = graph.output[0].name
        for node in nodes:
            made = helper.make_node(node.op_type, [], [])
            made.CopyFrom(node)
            for index, name in enumerate(made.input):
                made.input[index] = name.format(y=y)
            graph.node.append(made)
        graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants)
        del graph.output[:]
        graph.output.extend(
            helper.make_tensor_value_info(name.format(y=y), kind, None)
            for name, kind in zip(outputs, [*kinds, *[FLOAT] * len(outputs)], strict=False)
        )
        return model

    return change


TOP = [helper.make_node("TopK", ["{y}", "k"], ["values", "indices"])]
UNSORTED = [
    *(
        helper.make_node("TopK", ["{y}", "k"], ["v", "i"]),
        helper.make_node("Gather", ["v", "back"], ["values"], axis=1),
    ),
    helper.make_node("Gather", ["i", "back"], ["indices"], axis=1),
]
K = [("k", np.array([3]))]
ENDINGS = {
    "softmax": ending([helper.make_node("Softmax", ["{y}"], ["p"])], ["p"]),
    "log-softmax": ending([helper.make_node("LogSoftmax", ["{y}"], ["p"])], ["p"]),
    "log of a softmax that is 0": ending(
        [helper.make_node("Mul", ["{y}", "sharp"], ["z"]), helper.make_node("Softmax", ["z"], ["p"]),
         helper.make_node("Log", ["p"], ["s"])], ["s"], (), [("sharp", np.array(50, np.float32))],
    ),
    "label": ending([helper.make_node("ArgMax", ["{y}"], ["l"], axis=1, keepdims=0)], ["l"], [INT64]),
    "label [N, 1]": ending([helper.make_node("ArgMax", ["{y}"], ["l"], axis=1)], ["l"], [INT64]),
    "label as a float": ending(
        [helper.make_node("ArgMax", ["{y}"], ["l"], axis=1), helper.make_node("Cast", ["l"], ["f"], to=FLOAT)], ["f"]
    ),
    "top 3": ending(TOP, ["values", "indices"], [FLOAT, INT64], K),
    "top 3, numbers first": ending(TOP, ["indices", "values"], [INT64, FLOAT], K),
    "top 3, numbers only": ending(TOP, ["indices"], [INT64], K),
    "top 10 of 10": ending(TOP, ["values", "indices"], [FLOAT, INT64], [("k", np.array([10]))]),
    "top 3, worst first": ending(UNSORTED, ["values", "indices"], [FLOAT, INT64], [*K, ("back", np.array([2, 1, 0]))]),
    "features before": ending([], ["features", "{y}"]),
    "features behind": ending([], ["{y}", "features"]),
    "maps before": ending(
        [helper.make_node("Unsqueeze", ["{y}", "k"], ["column"]), helper.make_node("Mul", ["column", "{y}"], ["map"])],
        ["map", "{y}"], (), [("k", np.array([2]))],
    ),
    "an auxiliary head before": ending(
        [helper.make_node("MatMul", ["features", "w"], ["aux"])], ["aux", "{y}"], (),
        [("w", np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32))],
    ),
    "logits and softmax": ending([helper.make_node("Softmax", ["{y}"], ["p"])], ["{y}", "p"]),
    "labels from 1": ending(
        [helper.make_node("ArgMax", ["{y}"], ["l"], axis=1), helper.make_node("Add", ["l", "one"], ["n"])],
        ["n"], [INT64], [("one", np.array(1))],
    ),
    "labels from 1 as floats": ending(
        [helper.make_node("ArgMax", ["{y}"], ["l"], axis=1), helper.make_node("Cast", ["l"], ["f"], to=FLOAT),
         helper.make_node("Add", ["f", "one"], ["n"])],
        ["n"], [FLOAT], [("one", np.array(1, np.float32))],
    ),
    "top 3 from 1": ending(
        [helper.make_node("TopK", ["{y}", "k"], ["values", "i"]), helper.make_node("Add", ["i", "one"], ["indices"])],
        ["values", "indices"], [FLOAT, INT64], [("k", np.array([3])), ("one", np.array(1))],
    ),
    "a background class before": ending(
        [helper.make_node("Pad", ["{y}", "pads", "low"], ["s"])], ["s"], (),
        [("pads", np.array([0, 1, 0, 0])), ("low", np.float32(-50))],
    ),
    "a background class behind": ending(
        [helper.make_node("Pad", ["{y}", "pads", "low"], ["s"])], ["s"], (),
        [("pads", np.array([0, 0, 0, 1])), ("low", np.float32(-50))],
    ),
    "ones and zeros": ending(
        [helper.make_node("ArgMax", ["{y}"], ["l"], axis=1, keepdims=0),
         helper.make_node("OneHot", ["l", "depth", "ends"], ["o"]), helper.make_node("Cast", ["o"], ["b"], to=BOOL)],
        ["b"], [BOOL], [("depth", np.array([CLASSES])), ("ends", np.array([0, 1]))],
    ),
    "one more axis": ending([helper.make_node("Unsqueeze", ["{y}", "a"], ["u"])], ["u"], (), [("a", np.array([1]))]),
    "a picture of one pixel": ending(
        [helper.make_node("Unsqueeze", ["{y}", "a"], ["u"])], ["u"], (), [("a", np.array([2, 3]))]
    ),
}  # fmt: skip
ONE_MORE = "the suspect's classes are counted from 1, or a class more stands before them, as its answers show"
SAID = {
    "top 3, worst first": "output 'indices' lists the best classes, and the first of them counts",
    "features before": "answers were read from output 'out', one of 2",
    "features behind": "answers were read from output 'out', one of 2",
    "maps before": "answers were read from output 'out', one of 2",
    "an auxiliary head before": "2 outputs that answer differently were tried and paid for; number 2 counts",
    "logits and softmax": "2 of 2 outputs may be the answer, the first is 'out'",
    "labels from 1": ONE_MORE,
    "labels from 1 as floats": ONE_MORE,
    "top 3 from 1": ONE_MORE,
    "a background class before": ONE_MORE,
    "a background class behind": "output 's' has one class more than the watermark",
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_answers_of_every_kind(plain, tmp_path, kind):
    verdict = judge(ENDINGS[kind], plain, tmp_path)
    if kind in SAID:
        assert SAID[kind] in verdict.notes
    if kind.startswith("top"):
        assert any("'indices' lists the best classes" in note for note in verdict.notes)


@pytest.mark.parametrize("axes", [[0], [0, 1]])
def test_a_fixed_batch_of_one_without_its_axis(plain, tmp_path, axes):
    """Scores [C], or a label [], for a single input."""
    nodes = [helper.make_node("Squeeze", ["{y}" if axes == [0] else "l", "axes"], ["s"])]
    if axes == [0, 1]:
        nodes.insert(0, helper.make_node("ArgMax", ["{y}"], ["l"], axis=1))

    def change(model, folder):
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info(model.graph.input[0].name, FLOAT, [1, *SHAPE]))
        kinds = [FLOAT if axes == [0] else INT64]
        return ending(nodes, ["s"], kinds, [("axes", np.array(axes))])(model, folder)

    assert "the suspect has a fixed batch of 1" in judge(change, plain, tmp_path).notes


# --- inputs -----------------------------------------------------------------------------------------------------------


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


# --- scikit-learn -----------------------------------------------------------------------------------------------------


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


# --- classes in another order -----------------------------------------------------------------------------------------


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


# --- reading answers, without a file ----------------------------------------------------------------------------------


def read(outputs, num_classes, rows=4):
    (reading,) = choose_readings(outputs, rows, num_classes, "m.onnx")
    return reading.read(outputs, rows)


SCORES = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)


def test_text_sorts_ten_before_two_and_the_labels_beside_the_scores_say_so():
    order = np.array(sorted(range(12), key=str))
    labels = order[SCORES.argmax(1)]
    assert (labels != SCORES.argmax(1)).any()
    np.testing.assert_array_equal(read([("label", labels), ("probabilities", SCORES)], 12), labels)
    np.testing.assert_array_equal(read([("label", SCORES.argmax(1)), ("probabilities", SCORES)], 12), SCORES)


def test_maps_are_put_in_the_order_of_their_numbers():
    keys = sorted(f"class_{number}" for number in range(12))
    rows = [dict(zip(keys, row, strict=True)) for row in SCORES]
    expected = np.stack([[row[f"class_{number}"] for number in range(12)] for row in rows])
    np.testing.assert_array_equal(numbers(rows), expected)
    animals = [{"dog": 0.25, "cat": 0.75}]
    np.testing.assert_array_equal(numbers(animals), [[0.25, 0.75]])
    np.testing.assert_array_equal(numbers(np.array(["class_3", "class_11"], object)), [3, 11])
    assert numbers(np.array(["dog", "cat"], object)) is None
    assert numbers(np.array(["dog1", "cat2"], object)) is None


def test_ranks_and_their_scores_are_told_from_scores():
    order = np.argsort(-SCORES, axis=1)
    values = np.take_along_axis(SCORES, order, axis=1)
    for k in (2, 5, 12):
        outputs = [("v", values[:, :k]), ("i", order[:, :k])]
        np.testing.assert_array_equal(read(outputs, 12), SCORES.argmax(1))
        np.testing.assert_array_equal(read(outputs[::-1], 12), SCORES.argmax(1))
    lost = values[:, :3].copy()
    lost[2, 1] = np.nan
    np.testing.assert_array_equal(read([("v", lost), ("i", order[:, :3])], 12), [*order[:2, 0], -1, order[3, 0]])
    counts = np.array([[7, 1, 1], [0, 2, 2], [3, 3, 3], [0, 0, 9]])
    np.testing.assert_array_equal(read([("counts", counts)], 3), counts)
    on_device = [("v", Predicted(np.array([2, 0, -1, 1], np.int32), 3, np.zeros((4, 3), np.int8))), ("i", order[:, :3])]
    np.testing.assert_array_equal(read(on_device, 12), [order[0, 2], order[1, 0], -1, order[3, 1]])


def test_one_hot_integers_of_two_classes_are_scores():
    np.testing.assert_array_equal(read([("y", np.array([[0, 1], [1, 0], [0, 1], [0, 1]]))], 2).argmax(1), [1, 0, 1, 1])


def test_ones_and_zeros_beside_the_chances_of_two_classes_are_no_ranks():
    chances = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]], np.float32)
    ones = (chances > 0.5).astype(np.int64)
    for outputs in ([("p", chances), ("y", ones)], [("y", ones), ("p", chances)]):
        readings = choose_readings(outputs, 4, 2, "m.onnx")
        assert read_all(readings, outputs, 4).tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
    best = np.array([[0, 1], [1, 0], [1, 0], [0, 1]])
    for values in (np.sort(chances, axis=1)[:, ::-1], Predicted(np.zeros(4, np.int32), 2, np.zeros((4, 2), np.int8))):
        assert read([("values", values), ("indices", best)], 2).tolist() == [0, 1, 1, 0]


def test_labels_that_are_words_are_an_error_that_says_so(plain, tmp_path):
    names = ("names", np.array([f"{chr(97 + number)}-sort" for number in range(CLASSES)], object))
    label = helper.make_node("ArgMax", ["{y}"], ["l"], axis=1, keepdims=0)
    words = ending([label, helper.make_node("Gather", ["names", "l"], ["word"])], ["word"], [TEXT], [names])
    onnx.save(words(onnx.load(plain[0]), tmp_path), tmp_path / "m.onnx")
    verdict = verify(tmp_path / "m.onnx", MARK)
    assert "answers with no numbers, but word of tensor(string); export it with scores" in verdict.error


def test_one_score_tells_two_classes():
    for shape in ((4,), (4, 1)):
        scores = np.array([0.2, 0.7, np.nan, 0.5]).reshape(shape)
        labels, note = of_two_classes(read([("y", scores)], 2))
        assert labels.tolist() == [0, 1, -1, 0]
        assert "above 0.5" in note
        labels, note = of_two_classes(read([("y", 4 * scores - 2)], 2))
        assert labels.tolist() == [0, 1, -1, 0]
        assert "above 0" in note
    verdict = verify(lambda rows: rows.reshape(len(rows), -1)[:, :1] * 0, TWO)
    assert verdict.error is None
    assert any("one score" in note for note in verdict.notes)


TWO = Watermark.create(KEY, "adi", black_box_parameters(scheme("adi", count=COUNT), SHAPE, 2, RANGE, "two"))


def test_a_row_is_no_answer_where_its_highest_score_is_no_number():
    inf, nan = np.inf, np.nan
    rows = np.array([[1, -inf, 2], [nan, 5, 1], [1, inf, 2], [-inf, -inf, -inf], [-inf, 3, -inf]], np.float32)
    assert highest(rows).tolist() == [2, -1, -1, -1, 1]


def test_ties_go_to_the_lowest_class_and_math_is_exact():
    constant = verify(lambda rows: np.zeros((len(rows), CLASSES), np.float32), MARK)
    assert constant.matched == int((LABELS == 0).sum())
    assert math.isfinite(constant.log10_p)
