"""What export_onnx promises: one quiet call, any batch size, the same answers and the same mark, no traces of us."""

import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import wmengine
from wmengine import export_onnx, ops, verify
from wmengine.parts.base import Task
from wmengine.suspects.base import InputSpec
from wmengine.suspects.weights import module_tensors

KEY = wmengine.Key("ACME Vision", bytes(range(32)))
SHAPE = (3, 8, 8)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16 * 8 * 8, 10)

    def forward(self, x):
        x = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(self.second_norm(self.second(x)))
        return self.head(self.drop(x.view(x.shape[0], -1)))


def run(path, x):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})[0]


def operators(path):
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.fixture(scope="module")
def marked():
    """A network whose weights hold a white-box mark, whose BatchNorms have something to fold, and the mark."""
    torch.manual_seed(0)
    model = Network()
    for norm in (model.first_norm, model.second_norm):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.01, 10)
        nn.init.uniform_(norm.weight, 0.1, 5)
    found = module_tensors(model, {"input": torch.zeros(1, *SHAPE)})
    weights = [each.weight for each in found]
    task = Task(
        {"input": InputSpec(SHAPE, "float32")},
        weights=lambda: ([list(weight.shape) for weight in weights], [*range(len(weights))]),
    )
    preset = wmengine.scheme("sketch")
    mark = wmengine.Watermark.create(KEY, preset, preset.describe(task, "export"))
    signs = (2.0 * mark.symbols - 1.0).astype(np.float32)
    for weight, key in zip(weights, mark.arrays["carrier_keys"], strict=True):
        direction = torch.from_numpy(ops.sketch_adjoint(signs, int(key), weight.numel())).reshape(weight.shape)
        with torch.no_grad():
            weight += weight.std() * direction / direction.std()
    return model, mark


@pytest.fixture(scope="module")
def folded(marked, tmp_path_factory):
    return export_onnx(marked[0], torch.zeros(1, *SHAPE), tmp_path_factory.mktemp("export") / "folded.onnx")


def test_the_file_takes_any_batch_and_answers_as_the_model_does_in_eval_mode(marked, folded):
    model, _ = marked
    for batch in (1, 2, 7):
        x = torch.randn(batch, *SHAPE)
        with torch.no_grad():
            expected = model.eval()(x).numpy()
        model.train()
        np.testing.assert_allclose(run(folded, x), expected, rtol=1e-3, atol=1e-4)


def test_the_mark_outlives_folding_without_one_bit_error(marked, folded):
    model, mark = marked
    assert "BatchNormalization" not in operators(folded)
    verdict = verify(folded, mark)
    assert (verdict.matched, verdict.total) == (256, 256)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(folded).graph.initializer}
    assert not np.allclose(weights["first.weight"], model.first.weight.detach().numpy(), rtol=0.1)
    assert verify(model, mark).matched == 256


def test_batchnorm_stays_where_it_should(marked, tmp_path):
    model, mark = marked
    path = export_onnx(model, torch.zeros(1, *SHAPE), tmp_path / "traced.onnx", fold_batchnorm=False)
    assert operators(path).count("BatchNormalization") == 2
    assert verify(path, mark).matched == 256
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        np.testing.assert_allclose(run(path, x), model.eval()(x).numpy(), rtol=1e-3, atol=1e-4)
    model.train()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
def test_the_model_comes_back_as_it_was_and_wrappers_do_not_matter(marked, tmp_path):
    model, _ = marked
    model.train()
    model.second_norm.eval()
    training = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    path = export_onnx(torch.compile(nn.DataParallel(model)), torch.zeros(4, *SHAPE), str(tmp_path / "wrapped.onnx"))
    assert [module.training for module in model.modules()] == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert run(path, torch.zeros(3, *SHAPE)).shape == (3, 10)


@pytest.mark.slow
def test_the_first_export_of_a_program_prints_nothing(tmp_path):
    code = f"""
import torch
import wmengine
wmengine.export_onnx(torch.nn.Linear(3, 2), torch.zeros(1, 3), {str(tmp_path / "quiet.onnx")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["quiet.onnx"]


def test_the_file_is_sound_and_holds_no_paths_of_the_machine_it_was_made_on(folded):
    content = folded.read_bytes()
    assert os.path.dirname(torch.__file__).encode() not in content
    assert os.path.dirname(__file__).encode() not in content
    model = onnx.load(folded)
    onnx.checker.check_model(model, full_check=True)
    assert not {entry.name for entry in model.graph.value_info} & {entry.name for entry in model.graph.initializer}


def test_the_file_suits_onnxruntimes_dynamic_quantizer(marked, folded, tmp_path):
    """It turns Gemm into MatMul, and stumbles over a weight's shape where the file lists it twice."""
    from onnxruntime.quantization import quantize_dynamic

    assert "Gemm" in operators(folded)
    quantize_dynamic(folded, tmp_path / "int8.onnx")
    assert "MatMulInteger" in operators(tmp_path / "int8.onnx")
    assert verify(tmp_path / "int8.onnx", marked[1]).matched > 250


def test_several_inputs_share_the_batch(tmp_path):
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    zeros, ones = torch.zeros(1, 4), np.ones((5, 4), np.float32)
    for example, names in (((zeros, zeros), ("input", "input_1")), ({"x": zeros, "y": zeros}, ("x", "y"))):
        path = export_onnx(Two(), example, tmp_path / "two.onnx")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert np.array_equal(session.run(None, dict.fromkeys(names, ones))[0], 2 * ones)


@pytest.mark.parametrize("example", [torch.zeros(0, 3), torch.tensor(1.0), [[1.0]], None, {"input": [1.0]}])
def test_an_example_that_is_no_batch_is_refused(example, tmp_path):
    with pytest.raises(ValueError, match="example must be a batch"):
        export_onnx(nn.Linear(3, 2), example, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
