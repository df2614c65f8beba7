"""The CUDA kernels' logic without a GPU: the same sources compiled by g++, a block's threads as fibers.

Every operator against its reference, its threads taken in rising and in falling order: a missing barrier shows as a
wrong answer in one of the two. Launches, streams and the compiler of real code are the business of tests/test_gpu.py.
"""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the fronts take torch tensors")
pytest.importorskip("pybind11", reason="pybind11 is not installed")
if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

from tests.cuda_emulation.build import build, rewrite  # noqa: E402
from wmengine.ops import cuda, reference  # noqa: E402

CSRC = Path(__file__).parents[1] / "csrc"


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = build(CSRC, tmp_path_factory.mktemp("emulation"))
    spec = importlib.util.spec_from_file_location("_cuda", path)
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    return emulated


@pytest.fixture(autouse=True, params=["rising", "falling"])
def fronts(request, module, monkeypatch):
    """The fronts of wmengine.ops.cuda on the emulated module and on CPU tensors."""
    monkeypatch.setattr(cuda, "_compiled", lambda: module)
    monkeypatch.setattr(cuda, "_place", lambda tensor: (0, 0))
    if request.param == "falling":
        monkeypatch.setenv("CUDA_EMULATION_BACKWARDS", "1")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_launches_are_rewritten():
    assert rewrite("f<A, g(2) * b>\n <<<h(x, 1), k, 0, s>>>(p, q(1));") == (
        "emulation::launch(h(x, 1),  k, [=] { f<A, g(2) * b>(p, q(1)); });"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(3, 7, 1, 2), (9, 5, 10, 8), (2, 9, 33, 2), (2, 3, 1001, 4), (1, 2, 16_385, 1), (1, 4100, 3, 1)]
)
def test_match_counts(dtype, shape):
    suspects, rows, classes, sets = shape
    outputs = random(suspects, rows, classes).round(decimals=1).to(dtype)  # ties
    outputs[0, 0, classes - 1] = float("nan")
    outputs[-1, 1, 0] = float("inf")
    answers = outputs.float().numpy()
    rng = np.random.default_rng(classes)
    expected = np.where(rng.random((sets, rows)) < 0.5, rng.integers(-1, classes, (sets, rows)), answers.argmax(-1)[0])
    counts, invalid = cuda.match_counts(outputs, torch.from_numpy(expected))
    for actual, wanted in zip((counts, invalid), reference.match_counts(answers, expected), strict=True):
        np.testing.assert_array_equal(actual.numpy(), wanted)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 2), (2, 4100, 3), (8, 33, 9), (65, 40, 66), (70, 0, 9), (9, 1100, 8), (5, 3, 0)]
)
def test_label_matches(dtype, shape):
    suspects, rows, sets = shape
    rng = np.random.default_rng(rows)
    predicted = rng.integers(-2, 4, (suspects, rows)).astype(dtype)
    expected = rng.integers(-2, 4, (sets, rows))
    if rows > 2 and sets:
        expected[0, :3] = [2**32 + 1, 2**40, -(2**32) + 1]  # none of them is the int32 that its low bits spell
        predicted[0, :3] = [1, 0, 1] if dtype == np.int32 else [2**32 + 1, 0, -(2**32) + 1]
    wanted = ((predicted[:, None] == expected[None]) & (predicted[:, None] >= 0)).sum(axis=-1)
    counts = cuda.label_matches(torch.from_numpy(predicted), torch.from_numpy(expected))
    assert counts.dtype == torch.int32
    np.testing.assert_array_equal(counts.numpy(), wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_labels_may_be_narrow_integers(dtype):
    predicted, expected = torch.tensor([[3, 1, 2]], dtype=dtype), torch.tensor([[3, 0, 2], [259, 1, 2]])
    assert cuda.label_matches(predicted, expected.to(torch.int16)).tolist() == [[2, 2]]


def packed(rng, rows, total):
    """Bits and their bytes; what the last byte holds past `total` is noise."""
    bits = rng.integers(0, 2, (rows, -(-total // 8) * 8), dtype=np.uint8)
    return bits[:, :total], torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))


@pytest.mark.parametrize("total", [1, 31, 32, 100, 160, 256, 300])
@pytest.mark.parametrize(("suspects", "registered"), [(1, 1), (9, 300), (3, 0), (0, 3)])
def test_bit_matches(total, suspects, registered):
    rng = np.random.default_rng(total)
    messages, packed_messages = packed(rng, suspects, total)
    registry, packed_registry = packed(rng, registered, total)
    wanted = (messages[:, None] == registry[None]).sum(axis=-1)
    counts = cuda.bit_matches(packed_messages, packed_registry, total)
    assert counts.dtype == torch.int32
    np.testing.assert_array_equal(counts.numpy(), wanted)


@pytest.mark.parametrize(
    ("suspects", "registered", "total", "best"),
    [(1, 1, 9, 1), (3, 300, 12, 5), (9, 700, 64, 256), (2, 9000, 8, 3), (1, 9000, 128, 300), (3, 2500, 20, 1024)],
)
def test_best_bit_matches(suspects, registered, total, best):
    rng = np.random.default_rng(best)
    messages, packed_messages = packed(rng, suspects, total)
    registry, packed_registry = packed(rng, registered, total)
    wanted = (messages[:, None] == registry[None]).sum(axis=-1)
    order = np.argsort(-wanted, axis=1, kind="stable")[:, :best]  # many ties: the lower index first
    counts, indices = cuda.best_bit_matches(packed_messages, packed_registry, total, best)
    assert (counts.dtype, indices.dtype) == (torch.int32, torch.int64)
    np.testing.assert_array_equal(indices.numpy(), order)
    np.testing.assert_array_equal(counts.numpy(), np.take_along_axis(wanted, order, axis=1))


def test_best_bit_matches_of_a_registry_in_the_worst_order():
    registered, total = 6000, 6000  # each message is better than all before it: every one becomes a candidate
    registry = np.packbits(np.tri(registered, total, dtype=np.uint8), axis=1, bitorder="little")
    message = np.packbits(np.ones((1, total), np.uint8), axis=1, bitorder="little")
    counts, indices = cuda.best_bit_matches(torch.from_numpy(message), torch.from_numpy(registry), total, 10)
    assert counts.tolist() == [list(range(6000, 5990, -1))]
    assert indices.tolist() == [list(range(5999, 5989, -1))]
