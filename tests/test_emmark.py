"""A mark in the integers of a quantised file (emmark): some move one step, and are read against the owner's own."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from embedding import KEY, batch, embedder, network
from onnx import TensorProto, helper, numpy_helper

import wmengine
from wmengine.cli import main
from wmengine.testing import check_mark

BITS = 64
RANGES = {"INT8": (-127, 127), "UINT8": (0, 255), "INT4": (-7, 7), "UINT4": (0, 15)}


def quantised(path, kind="INT8", seed=0):
    """A convolution, a Gemm (filters first) and a MatMul (filters last), their weights stored as integers."""
    generator = np.random.default_rng(seed)
    low, high = RANGES[kind]
    shapes = {"conv": (16, 1, 3, 3), "gemm": (32, 1024), "matmul": (32, 10)}
    held = []
    for name, shape in shapes.items():
        axis = 1 if name == "matmul" else 0
        whole = generator.normal((low + high) / 2, (high - low) / 5, shape).round().clip(low, high)
        scales = generator.uniform(0.01, 0.02, shape[axis]).astype(np.float32)
        zeros = np.full(shape[axis], (low + high + 1) // 2)
        element = getattr(TensorProto, kind)
        for part, values in (("", whole), ("_zero", zeros)):
            stored = values.astype(helper.tensor_dtype_to_np_dtype(element))
            held.append(numpy_helper.from_array(stored, name + part))
        held.append(numpy_helper.from_array(scales, name + "_scale"))
    dequantised = [
        helper.make_node(
            "DequantizeLinear", [name, f"{name}_scale", f"{name}_zero"], [f"{name}_float"], axis=int(name == "matmul")
        )
        for name in shapes
    ]
    nodes = [
        *dequantised,
        helper.make_node("Conv", ["input", "conv_float"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "gemm_float"], ["d"], transB=1),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("MatMul", ["e", "matmul_float"], ["logits"]),
    ]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])
    answer = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])
    model = helper.make_model(
        helper.make_graph(nodes, "quantised", [given], [answer], held),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.save(model, path)
    return path


def marked(folder, kind="INT8", **options):
    reference = quantised(folder / "reference.onnx", kind)
    out = folder / "marked.onnx"
    return reference, out, wmengine.emmark(reference, KEY, name="reader", out=out, bits=BITS, **options)


def integers(path):
    held = onnx.load(path).graph.initializer
    return {each.name: numpy_helper.to_array(each).astype(np.int64) for each in held if "_" not in each.name}


def dequantised(path, out):
    """What a thief makes of it who wants to train: floats instead of integers, in half precision on the way."""
    model = onnx.load(path)
    held = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "DequantizeLinear"]:
        whole, scale, zero = (held[name].astype(np.float32) for name in node.input)
        shape = [-1, *[1] * (whole.ndim - 1)] if node.output[0] != "matmul_float" else [1, -1]
        values = ((whole - zero.reshape(shape)) * scale.reshape(shape)).astype(np.float16).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("kind", RANGES)
def test_as_many_integers_as_bits_move_one_step_each_and_none_of_an_end(tmp_path, kind):
    reference, out, mark = marked(tmp_path, kind)
    before, after = integers(reference), integers(out)
    change = np.concatenate([(after[name] - before[name]).ravel() for name in before])
    assert sorted(np.unique(change)) == [-1, 0, 1]
    assert np.count_nonzero(change) == BITS
    assert (change == 1).sum() == mark.symbols.sum()
    moved = np.concatenate([values.ravel() for values in before.values()])[change != 0]
    low, high = RANGES[kind]
    assert low < moved.min() <= moved.max() < high
    assert wmengine.verify(out, mark, key=KEY).matched == BITS


def test_what_moves_is_among_its_layers_large_integers(tmp_path):
    reference, out, _ = marked(tmp_path)
    before, after = integers(reference), integers(out)
    for name, values in before.items():
        moved = np.abs(values[values != after[name]])
        assert (moved > np.quantile(np.abs(values), 0.5)).all()


def test_the_marked_file_is_owned_and_the_owners_own_shows_nothing(tmp_path):
    reference, out, mark = marked(tmp_path)
    verdict = wmengine.verify(out, mark, key=KEY)
    assert (verdict.decision, verdict.matched, verdict.queries) == ("owned", BITS, 0)
    verdict = wmengine.verify(reference, mark, key=KEY)
    assert (verdict.decision, verdict.matched) == ("not_proven", 0)


def test_a_copy_that_was_dequantised_is_read_as_well(tmp_path):
    _, out, mark = marked(tmp_path)
    verdict = wmengine.verify(dequantised(out, tmp_path / "floats.onnx"), mark, key=KEY)
    assert (verdict.decision, verdict.matched) == ("owned", BITS)


def test_it_keeps_what_every_mark_promises(tmp_path):
    _, out, mark = marked(tmp_path)
    floats = dequantised(out, tmp_path / "floats.onnx")
    report = check_mark(mark, KEY, out, floats, quantised(tmp_path / "stranger.onnx", seed=1))
    assert report.log10_p < -18.0
    assert report.stranger_log10_p > -4.0


def test_customers_share_the_places_and_another_reference_has_other_bits(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    first, second = (marked(folder, message=message)[2] for folder, message in zip(folders, ("x", "y"), strict=False))
    assert first.geometry == second.geometry
    assert not np.array_equal(first.symbols, second.symbols)
    other = quantised(folders[2] / "other.onnx", seed=3)
    third = wmengine.emmark(other, KEY, name="reader", out=folders[2] / "o.onnx", bits=BITS, message="x")
    assert not np.array_equal(first.symbols, third.symbols)
    assert not np.array_equal(first.arrays["chosen"], third.arrays["chosen"])


@pytest.mark.slow
def test_what_onnx_runtime_s_quantizer_writes_is_marked(tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"input": batch(16)[0].numpy()}])

        def get_next(self):
            return next(self.batches, None)

    plain = wmengine.export_onnx(network().eval(), batch(1)[0], tmp_path / "plain.onnx")
    quant_pre_process(plain, plain, skip_symbolic_shape=True)
    for per_channel in (False, True):
        path, out = tmp_path / f"{per_channel}.onnx", tmp_path / f"{per_channel}-marked.onnx"
        quantize_static(plain, path, Calibration(), quant_format=QuantFormat.QDQ, per_channel=per_channel)
        mark = wmengine.emmark(path, KEY, name="reader", out=out)
        assert wmengine.verify(out, mark, key=KEY).matched == 256
        assert wmengine.verify(path, mark).matched == 0


def test_what_cannot_be_marked_is_said(tmp_path):
    reference, out, _ = marked(tmp_path)
    with pytest.raises(ValueError, match=r"marked\.onnx exists already: give another path"):
        wmengine.emmark(reference, KEY, name="reader", out=out)
    with pytest.raises(ValueError, match=r"f\.onnx holds no weights that are integers: quantise it first, as QDQ"):
        wmengine.emmark(dequantised(out, tmp_path / "f.onnx"), KEY, name="reader", out=tmp_path / "never.onnx")
    with pytest.raises(ValueError, match="weights can be moved a step, too few for 60000 bits"):
        wmengine.emmark(reference, KEY, name="reader", out=tmp_path / "never.onnx", bits=60000)
    with pytest.raises(ValueError, match=r"marks a finished file whose weights are integers: use wmengine\.emmark"):
        embedder(network(), ["emmark"], num_classes=None)
    assert not (tmp_path / "never.onnx").exists()


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """`wmengine emmark reference.onnx` in a folder that holds it and the key: (status, printed, complained)."""
    monkeypatch.chdir(tmp_path)
    KEY.save("acme.key")
    quantised(Path("reference.onnx"))

    def call(*more, model="reference.onnx", key="acme.key", out="marked.onnx", mark="reader.wm"):
        status = main(["emmark", model, "--key", key, "--name", "reader", "--out", out, "--watermark-out", mark, *more])
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return call


def test_the_command_writes_the_marked_file_and_its_watermark(run):
    status, printed, complained = run("--bits", "64", "--message", "for acme", "--json")
    assert (status, complained) == (0, "")
    mark = wmengine.Watermark.load("reader.wm")
    assert json.loads(printed) == {
        **{"out": "marked.onnx", "watermark": "reader.wm"},
        **{"bits": BITS, "commitment": mark.commitment},
    }
    assert mark.message == "for acme"
    assert wmengine.verify("marked.onnx", mark, key=KEY).matched == BITS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "nowhere.onnx"}, "nowhere.onnx: No such file"),
        ({"model": "acme.key"}, "acme.key cannot be read as an ONNX file"),
        ({"key": "reference.onnx"}, "reference.onnx"),
        ({"out": "reference.onnx"}, "reference.onnx exists already"),
        ({"out": "no/folder.onnx"}, "no/folder.onnx: No such file"),
        ({"mark": "acme.key"}, "acme.key exists already"),
        ({"mark": "no/reader.wm"}, "No such file"),
        ({"mark": "marked.onnx"}, "marked.onnx exists already"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong_and_leaves_nothing_behind(run, given, said):
    before = sorted(Path().iterdir())
    status, printed, complained = run(**given)
    assert (status, printed, complained.count("\n")) == (2, "", 1)
    assert said in complained
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("places", "00", "places must hold numbers of 4 bytes in hex digits"),
        ("places", "ffffffff" * 600, "must be as many|must increase and be below"),
        ("values", "0000c07f" * 2000, "values and steps must be as many"),
        ("steps", "", "steps must hold numbers of 4 bytes"),
        ("carrier_indices", [0, 0, 1], "carrier_indices must increase"),
    ],
)
def test_parameters_that_are_not_whole_are_refused(tmp_path, field, value, said):
    mark = marked(tmp_path)[2]
    with pytest.raises(ValueError, match=said):
        mark.preset.check({**mark.parameters, field: value})
