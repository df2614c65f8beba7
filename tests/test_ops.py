"""NumPy operators: each against its float64 reference, and the properties that every backend must share."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmengine import _cpu, ops
from wmengine.ops import reference

KEYS = st.integers(0, 2**64 - 1)
# Around lanes (32), Gaussian groups (128), blocks (4096) and chunks (131072).
COUNTS = [1, 31, 32, 33, 127, 129, 4095, 4096, 4097, 10_000, 131_072 + 4097]
# One symbol, padded counts, a run shorter than a block, as long as one, longer than one.
TOTALS = [1, 20, 32, 64, 100, 256, 4096, 5000, 8192]


def assert_close(actual, expected, tolerance=2e-6):
    """Within `tolerance` of the largest value: float32 sums against float64."""
    scale = np.abs(expected).max(initial=0.0)
    assert np.abs(np.asarray(actual, dtype=np.float64) - expected).max(initial=0.0) <= tolerance * scale


@pytest.mark.parametrize("count", COUNTS)
def test_sketch_and_its_adjoint_equal_the_reference(count):
    for total in TOTALS:
        rng = np.random.default_rng(count * total)
        w, g = rng.normal(size=count).astype(np.float32), rng.normal(size=total).astype(np.float32)
        key = int(rng.integers(0, 2**63))
        assert_close(ops.sketch(w, key, total), reference.sketch(w.astype(np.float64), key, total), 1e-5)
        assert_close(ops.sketch_adjoint(g, key, count), reference.sketch_adjoint(g.astype(np.float64), key, count))


@pytest.mark.parametrize("count", [c for c in COUNTS if c <= 10_000])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("total", [1, 33, 70])
def test_dense_projection_and_its_adjoint_equal_the_reference(count, kind, total):
    rng = np.random.default_rng(count + total)
    w, g = rng.normal(size=count).astype(np.float32), rng.normal(size=total).astype(np.float32)
    assert_close(ops.project(w, 7, total, kind), reference.project(w.astype(np.float64), 7, total, kind), 1e-5)
    expected = reference.project_adjoint(g.astype(np.float64), 7, count, kind)
    assert_close(ops.project_adjoint(g, 7, count, kind), expected, 1e-5)


@pytest.mark.parametrize("carrier", reference.CARRIERS)
@pytest.mark.parametrize("projection", reference.PROJECTIONS)
@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (300, 40), (1, 9000), (64,), (3, 0), (9000, 1)])
def test_carrier_projection_equals_the_reference(carrier, projection, shape):
    weight = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    weight[0] = 0.0  # a dead filter
    expected = reference.carrier_projection(weight, 3, 48, carrier, projection)
    assert_close(ops.carrier_projection(weight, 3, 48, carrier, projection), expected, 2e-5)


def test_unit_filters_neither_overflow_nor_vanish_at_the_ends_of_float32():
    rows = np.random.default_rng(2).normal(size=(6, 50)).astype(np.float32)
    scaled = rows * np.array([1e-30, 1e-20, 1.0, 1e15, 1e30, 1e37], dtype=np.float32)[:, None]
    plain = ops.carrier_projection(rows, 5, 64, "unit_filters", "sketch")
    assert_close(ops.carrier_projection(scaled, 5, 64, "unit_filters", "sketch"), plain.astype(np.float64), 1e-5)


@settings(max_examples=40, deadline=None)
@given(key=KEYS, count=st.integers(1, 9000), total=st.integers(1, 600), seed=st.integers(0, 2**32 - 1))
def test_adjoint_identity_of_the_sketch(key, count, total, seed):
    rng = np.random.default_rng(seed)
    w, g = rng.normal(size=count).astype(np.float32), rng.normal(size=total).astype(np.float32)
    left = float(ops.sketch(w, key, total).astype(np.float64) @ g)
    right = float(w.astype(np.float64) @ ops.sketch_adjoint(g, key, count))
    assert left == pytest.approx(right, rel=1e-4, abs=1e-4 * np.linalg.norm(w) * np.linalg.norm(g) / np.sqrt(count))


@settings(max_examples=20, deadline=None)
@given(key=KEYS, count=st.integers(1, 5000), kind=st.sampled_from(["rademacher", "gaussian"]))
def test_adjoint_identity_of_the_dense_projection(key, count, kind):
    rng = np.random.default_rng(count)
    w, g = rng.normal(size=count).astype(np.float32), rng.normal(size=17).astype(np.float32)
    left = float(ops.project(w, key, 17, kind).astype(np.float64) @ g)
    right = float(w.astype(np.float64) @ ops.project_adjoint(g, key, count, kind))
    assert left == pytest.approx(right, rel=1e-4, abs=1e-4 * np.linalg.norm(w) * np.linalg.norm(g) / np.sqrt(count))


def test_sketch_keeps_the_mean_square_on_average():
    w = np.random.default_rng(3).normal(size=4096).astype(np.float32)
    mean_squares = [float((ops.sketch(w, key, 64) ** 2).mean()) for key in range(300)]
    assert np.mean(mean_squares) == pytest.approx(float((w**2).mean()), rel=0.05)


def test_a_filter_too_small_to_normalise_counts_as_zero():
    rows = np.random.default_rng(2).normal(size=(6, 50)).astype(np.float32)
    tiny, zero = rows.copy(), rows.copy()
    tiny[3], zero[3] = 1e-42, 0.0
    for carrier in ("unit_filters", "unit_filter_mean"):
        y = ops.carrier_projection(tiny, 5, 64, carrier, "sketch")
        np.testing.assert_array_equal(y, ops.carrier_projection(zero, 5, 64, carrier, "sketch"))
        assert_close(y, reference.carrier_projection(tiny, 5, 64, carrier, "sketch"), 1e-5)


def test_running_out_of_memory_in_a_worker_raises_and_the_pool_lives_on():
    code = (
        "import resource, numpy as np\n"
        "from wmengine import _cpu, ops\n"
        "ops.set_num_threads(2)\n"
        "w = np.ones((2, 8 << 20), dtype=np.float32)\n"
        "g, norms = np.ones_like(w), np.ones(2, dtype=np.float32)\n"
        "r = np.ones(64, dtype=np.float32)\n"
        "ops.sketch(r, 1, 64)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limits = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (20 << 20), limits[1]))\n"
        "layer = [(w.ctypes.data, g.ctypes.data, 2, 8 << 20, 1, 1)]\n"
        "try:\n"
        "    _cpu.embedding_backward(layer, 1, 0, 64, 1.0, norms.ctypes.data, r.ctypes.data)\n"
        "except MemoryError:\n"
        "    resource.setrlimit(resource.RLIMIT_AS, limits)\n"
        "    _cpu.embedding_backward(layer, 1, 0, 64, 1.0, norms.ctypes.data, r.ctypes.data)\n"
        "    raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 7


def test_adjoint_adds_to_out_when_it_is_given():
    g = np.random.default_rng(4).normal(size=64).astype(np.float32)
    for projection in reference.PROJECTIONS:
        out = np.ones(9000, dtype=np.float32)
        assert ops.cpu.project_adjoint(g, 5, 9000, projection, out=out) is out
        np.testing.assert_array_equal(out, np.float32(1.0) + ops.cpu.project_adjoint(g, 5, 9000, projection))


def test_same_bits_over_repeats_and_thread_counts():
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(700, 450)).astype(np.float32)
    g = rng.normal(size=256).astype(np.float32)
    threads = ops.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5, 2, 1):
            ops.set_num_threads(count)
            assert ops.get_num_threads() == count
            parts = [
                ops.carrier_projection(weight, 1, 256, carrier, projection)
                for carrier in reference.CARRIERS
                for projection in reference.PROJECTIONS[:2]
            ]
            parts.append(ops.sketch_adjoint(g, 1, weight.size))
            results.append(b"".join(part.tobytes() for part in parts))
    finally:
        ops.set_num_threads(threads)
    assert len(set(results)) == 1


def test_every_instruction_set_gives_the_same_bits():
    rng = np.random.default_rng(15)
    weight = rng.normal(size=(130, 111)).astype(np.float32)
    g = rng.normal(size=100).astype(np.float32)
    logits, labels = rng.normal(size=(90, 12)).astype(np.float32), rng.integers(0, 12, size=90)
    before = _cpu.instruction_set()
    results = []
    try:
        for name in _cpu.instruction_sets():
            _cpu.set_instruction_set(name)
            assert _cpu.instruction_set() == name
            parts = [
                ops.carrier_projection(weight, 1, 100, carrier, projection)
                for carrier in reference.CARRIERS
                for projection in reference.PROJECTIONS[:2]
            ]
            parts += [ops.sketch_adjoint(g, 1, 9999), ops.project_adjoint(g, 1, 9999)]
            for scores in (logits, logits**2 / (logits**2).sum(axis=1, keepdims=True)):
                parts += ops.match_counts(scores, labels, levels=True)
            results.append(b"".join(part.tobytes() for part in parts))
    finally:
        _cpu.set_instruction_set(before)
    assert len(set(results)) == 1


def test_the_instruction_set_can_be_capped_from_the_environment():
    code = "from wmengine import _cpu; print(_cpu.instruction_set())"
    plainest = _cpu.instruction_sets()[0]
    for name, works in ((plainest, True), ("z80", False)):
        run = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"WMENGINE_INSTRUCTION_SET": name}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert (run.returncode == 0) is works
        assert plainest in (run.stdout if works else run.stderr)


def test_operators_work_in_a_forked_child():
    code = (
        "import os, numpy as np\n"
        "from wmengine import ops\n"
        "ops.set_num_threads(2)\n"
        "w = np.ones(1 << 20, dtype=np.float32)\n"
        "before = ops.sketch(w, 1, 64)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if np.array_equal(ops.sketch(w, 1, 64), before) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_a_thread_bound_to_one_processor_binds_neither_the_pool_nor_its_size():
    code = (
        "import os, threading, time, numpy as np\n"
        "from wmengine import ops\n"
        "allowed, made = os.sched_getaffinity(0), []\n"
        "def bound():\n"
        "    os.sched_setaffinity(0, {min(allowed)})\n"
        "    before = set(os.listdir('/proc/self/task'))\n"
        "    ops.sketch(np.ones(1 << 20, dtype=np.float32), 1, 64)\n"
        "    made.extend(set(os.listdir('/proc/self/task')) - before)\n"
        "caller = threading.Thread(target=bound)\n"
        "caller.start(); caller.join()\n"
        "assert ops.get_num_threads() == len(allowed) == len(made) + 1, (allowed, made)\n"
        "def bound_still():\n"
        "    return [thread for thread in made if os.sched_getaffinity(int(thread)) == {min(allowed)}]\n"
        "until = time.monotonic() + 30\n"
        "while bound_still() and time.monotonic() < until:\n"
        "    time.sleep(0.01)\n"  # until it has run for the first time
        "assert not bound_still()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_float64_goes_to_the_reference_and_float16_is_widened():
    w = np.random.default_rng(6).normal(size=500)
    np.testing.assert_array_equal(ops.sketch(w, 9, 64), reference.sketch(w, 9, 64))
    assert ops.sketch(w, 9, 64).dtype == np.float64
    half = w.astype(np.float16)
    np.testing.assert_array_equal(ops.sketch(half, 9, 64), ops.sketch(half.astype(np.float32), 9, 64))


def test_non_contiguous_weights_give_what_their_copies_give():
    w = np.random.default_rng(7).normal(size=(60, 50)).astype(np.float32)
    strided = w.T[::2]
    np.testing.assert_array_equal(
        ops.carrier_projection(strided, 1, 64, "unit_filters", "sketch"),
        ops.carrier_projection(strided.copy(), 1, 64, "unit_filters", "sketch"),
    )
    np.testing.assert_array_equal(ops.sketch(w[:, 3], 1, 64), ops.sketch(w[:, 3].copy(), 1, 64))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("carrier", reference.CARRIERS)
def test_nan_and_inf_weights_reach_the_caller(bad, carrier):
    weight = np.ones((4, 64), dtype=np.float32)
    weight[1, 5] = bad
    assert not np.isfinite(ops.carrier_projection(weight, 1, 32, carrier, "sketch")).all()


def test_empty_input_projects_to_zero():
    assert not ops.sketch(np.empty(0, dtype=np.float32), 1, 40).any()
    assert ops.sketch_adjoint(np.ones(40, dtype=np.float32), 1, 0).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.sketch(np.ones((2, 2), dtype=np.float32), 1, 32), ValueError, "values must have one dimension"),
        (lambda: ops.sketch(np.ones(4, dtype=np.int32), 1, 32), TypeError, "values must be float32"),
        (lambda: ops.sketch(np.ones(4, dtype=np.float32), -1, 32), ValueError, "key must be"),
        (lambda: ops.sketch(np.ones(4, dtype=np.float32), 1 << 64, 32), ValueError, "key must be"),
        (lambda: ops.sketch(np.ones(4, dtype=np.float32), "k", 32), TypeError, "key must be an int"),
        (lambda: ops.sketch(np.ones(4, dtype=np.float32), 1, 0), ValueError, "total must be at least 1"),
        (lambda: ops.project(np.ones(4, dtype=np.float32), 1, 3, "sparse"), ValueError, "kind must be one of"),
        (lambda: ops.sketch_adjoint(np.ones(4, dtype=np.float32), 1, -1), ValueError, "count must be"),
        (
            lambda: ops.cpu.project_adjoint(
                np.ones(4, dtype=np.float32), 1, 9, "sketch", out=np.ones(8, dtype=np.float32)
            ),
            ValueError,
            "out must be",
        ),
        (
            lambda: ops.carrier_projection(np.float32(1), 1, 3, "flat", "sketch"),
            ValueError,
            "filters on its first axis",
        ),
        (
            lambda: ops.carrier_projection(np.ones((2, 2)), 1, 3, "round", "sketch"),
            ValueError,
            "carrier must be one of",
        ),
        (lambda: ops.set_num_threads(0), ValueError, "count must be at least 1"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
