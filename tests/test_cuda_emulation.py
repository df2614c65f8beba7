"""The CUDA kernels' logic without a GPU: the same sources compiled by g++, a block's threads as fibers.

Every operator against its reference, its threads taken in rising and in falling order: a missing barrier shows as a
wrong answer in one of the two. Launches, streams and the compiler of real code are the business of tests/test_gpu.py.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the fronts take torch tensors")
pytest.importorskip("pybind11", reason="pybind11 is not installed")
if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

from tests.cuda_emulation.build import build, rewrite  # noqa: E402
from wmengine.ops import cuda, reference  # noqa: E402

pytestmark = pytest.mark.slow  # compiles

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


KINDS = {
    "logits": lambda z: z.round(decimals=1),  # ties
    "distributions": lambda z: z.softmax(dim=1),
    "logarithms": lambda z: torch.where(z < -1, -torch.inf, z).log_softmax(dim=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 1), (45, 10), (70, 33), (5, 1001), (3, 5003), (3, 33_001)])
def test_match_counts(dtype, kind, shape):
    rows, classes = shape
    outputs = KINDS[kind](random(rows, classes)).to(dtype)
    outputs[0, classes - 1], outputs[1, 0], outputs[2] = float("nan"), float("inf"), -float("inf")
    answers = outputs.double().numpy()
    rng = np.random.default_rng(classes)
    expected = np.where(rng.random(rows) < 0.5, rng.integers(-1, classes + 1, rows), answers.argmax(axis=1))
    group = rng.integers(0, 3, rows)
    wanted = reference.match_counts(answers, expected, group, 4, levels=True)
    found = cuda.match_counts(outputs, torch.from_numpy(expected), torch.from_numpy(group), 4, True)
    for name in ("predicted", "hits", "invalid"):
        np.testing.assert_array_equal(getattr(found, name).numpy(), getattr(wanted, name), err_msg=name)
    levels = found.levels.numpy().astype(int)
    off = np.abs(levels - wanted.levels)
    assert off.max() <= 1
    assert off.sum() <= 2 + 0.001 * off.size
    counted = [np.bincount(row + 30, minlength=61) for row in levels]
    np.testing.assert_array_equal(found.histogram.numpy(), counted)
    known = (expected >= 0) & (expected < classes)
    np.testing.assert_array_equal(
        found.at.numpy(), np.where(known, levels[np.arange(rows), np.where(known, expected, 0)], 0)
    )
    everything = cuda.match_counts(outputs, torch.from_numpy(expected), None, 2, False)
    assert (everything.hits.tolist(), everything.levels) == ([wanted.hits.sum(), 0], None)
    assert everything.invalid.tolist() == [wanted.invalid.sum(), 0]


def unrounded(scores):
    """float64[N, C]: what `match_counts` rounds, of rows of finite scores or of logarithms with -Inf."""
    there = np.isfinite(scores)
    z = np.where(there, scores, 0.0)
    count = there.sum(axis=1, keepdims=True)
    from_mean = z - z.sum(axis=1, keepdims=True) / count
    deviation = np.sqrt((np.where(there, from_mean, 0.0) ** 2).sum(axis=1, keepdims=True) / count)
    return np.where(there, np.clip(10 * from_mean / deviation, -30, 30), -30.0)


def assert_right(levels, exact, edge):
    """All levels are the nearest integers; within `edge` of an edge of rounding they may be the next."""
    levels = levels.numpy().astype(float)
    np.testing.assert_array_less(np.abs(levels - exact), 0.5 + edge)
    assert (levels == np.rint(exact)).mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [7, 30, 31, 32, 65, 255, 257, 1023, 2050, 4099, 10_001, 16_387, 32_771])
def test_levels_at_any_address_are_those_of_doubles(dtype, classes):
    scores = 5 * random(3, classes, seed=classes) + 100
    scores[1] = (scores[1] / 5 - 20).exp()  # one score is all the deviation
    if classes > 1000:
        scores[2, ::5] = -torch.inf
    for offset in range(8) if classes < 300 else (0, 3):
        outputs = torch.empty(3 * classes + offset, dtype=dtype)[offset:].view(3, classes).copy_(scores)
        outputs[1, classes // 2] = 1e4
        found = cuda.match_counts(outputs, torch.zeros(3, dtype=torch.int64), None, 1, True)
        assert_right(found.levels, unrounded(outputs.double().numpy()), 1e-10)
        assert found.predicted.tolist() == outputs.argmax(dim=1).tolist()
        assert found.at.tolist() == found.levels[:, 0].tolist()


@pytest.mark.parametrize("classes", [10, 100, 1000, 5000])
@pytest.mark.parametrize("spread", [1e-5, 1e-3, 1.0, 20.0])
def test_levels_of_distributions_are_those_of_their_logarithms(classes, spread):
    outputs = (spread * random(6, classes)).softmax(dim=1)  # to subnormal chances and to 0
    outputs[1, :5] = 0
    outputs[1] /= outputs[1].sum()
    outputs[2] = 1.0 / classes
    outputs[3] = 1e-42
    outputs[3, 3] = 1
    outputs[4] = 0
    outputs[4, 1:] = torch.tensor([0.75, 0.25] + [0.0] * (classes - 3))
    found = cuda.match_counts(outputs, torch.zeros(6, dtype=torch.int64), None, 1, True)
    assert not found.levels[2].any()
    kept = [0, 1, 3, 4, 5]
    with np.errstate(divide="ignore"):
        assert_right(found.levels[kept], unrounded(np.log(outputs.double().numpy()[kept])), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [16, 64, 512, 4096, 32_768])
def test_levels_halfway_go_to_the_even_one(dtype, classes):
    half = torch.tensor([39, 39, 11, 5, 3, 1, 1, 1])  # squares add up to 8 * 20^2: levels are halves of these
    scores = torch.cat([half, -half]).repeat(classes // 16)[torch.randperm(classes)].repeat(2, 1)
    outputs = (scores * torch.tensor([[1.0], [2.0**100]])).to(dtype)
    found = cuda.match_counts(outputs, torch.zeros(2, dtype=torch.int64), None, 1, True)
    np.testing.assert_array_equal(found.levels.numpy(), np.rint(scores.numpy() / 2))
    np.testing.assert_array_equal(found.histogram.numpy(), [np.bincount(r + 30, minlength=61) for r in found.levels])


@pytest.mark.parametrize("classes", [10, 1000, 20_000])
def test_levels_of_scores_that_hardly_differ_are_those_of_doubles(classes):
    steps = random(3, classes).mul(3).round()
    steps[1] = steps[1] > 2
    steps[2] = 0
    steps[2, 1] = 1
    outputs = 2.0**23 + steps  # neighbouring numbers
    found = cuda.match_counts(outputs, torch.zeros(3, dtype=torch.int64), None, 1, True)
    assert_right(found.levels[::2], unrounded(outputs.double().numpy()[::2]), 1e-6)


@pytest.mark.parametrize("classes", [1, 2, 10, 300, 5000])
@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -3e38, 3e38, 1e-45])
def test_equal_scores_are_all_at_level_0(classes, value):
    outputs = torch.full((5, classes), value)
    outputs[1:3, 0] = -torch.inf if classes > 1 else value
    outputs[4] = 3e38 * torch.linspace(-1, 1, classes)
    found = cuda.match_counts(outputs, torch.zeros(5, dtype=torch.int64), None, 1, True)
    assert not found.levels[0].any()
    assert not found.levels[1:3, 1:].any()
    assert found.predicted[:4].tolist() == [0, *[1 if classes > 1 else 0] * 2, 0]
    if classes > 2:
        assert_right(found.levels[4:], unrounded(outputs[4:].double().numpy()), 1e-10)
        assert found.at.tolist()[1:3] == [-30] * 2


def test_match_counts_of_nothing_and_of_groups_that_are_none():
    found = cuda.match_counts(random(0, 5), torch.zeros(0, dtype=torch.int64), None, 3, True)
    assert (found.hits.tolist(), found.invalid.tolist(), found.levels.shape) == ([0] * 3, [0] * 3, (0, 5))
    group = torch.tensor([0, -1, 2, 2**40])
    assert cuda.match_counts(torch.eye(4), torch.arange(4), group, 2, False).hits.tolist() == [1, 0]


def test_classes_and_levels_are_found_without_labels(module):
    outputs = random(20, 7)
    found = cuda.match_counts(outputs, torch.zeros(20, dtype=torch.int64), None, 1, True)
    predicted, levels = torch.empty_like(found.predicted), torch.empty_like(found.levels)
    unasked = (0, 0, 0, 0)
    module.match_counts(0, 0, outputs.data_ptr(), 0, 20, 7, 0, 0, 0, predicted.data_ptr(), *unasked, levels.data_ptr())
    assert torch.equal(predicted, found.predicted)
    assert torch.equal(levels, found.levels)
    module.match_counts(0, 0, outputs.data_ptr(), 0, 20, 7, 0, 0, 0, predicted.zero_().data_ptr(), *unasked, 0)
    assert torch.equal(predicted, found.predicted)


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
    if rows > 34 and sets > 1:  # the second 32 of a row may be wider than the first
        expected[1, 32:35] = predicted[1, 32:35] = 1000, 2**31 - 1, -(2**31)
        expected[1, rows - 1] = predicted[1, rows - 1] = 2**31 - 1 if dtype == np.int32 else 2**63 - 1
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


@pytest.mark.parametrize("total", [1, 31, 32, 100, 160, 250, 256, 300, 1000, 4090])
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
    [
        (1, 1, 9, 1),
        (3, 300, 12, 5),
        (9, 700, 64, 256),
        (2, 9000, 8, 3),
        (1, 9000, 128, 300),
        (3, 2500, 20, 1024),
        (13, 5000, 250, 10),
        (1, 20_000, 16, 300),
    ],
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


def test_the_tests_for_a_gpu_are_true_of_a_cpu(module, request):
    if "falling" in request.node.name:
        pytest.skip("threads in rising order will do")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.rehearsal", "-p", "no:cacheprovider", "-m", ""]
    run = subprocess.run(
        [*command, "tests/test_gpu.py", "tests/test_gpu_operators.py", "--tb=short", "--durations=12"],
        cwd=CSRC.parent, env={**os.environ, "EMULATED_CUDA": module.__file__}, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:]
    assert re.search(r"[3-9]\d\d passed", run.stdout), run.stdout[-500:]
