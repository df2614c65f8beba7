"""What every projection promises whatever it is asked: linear, one adjoint, the same bits everywhere, any size."""

import mmap
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmengine import _cpu, ops
from wmengine.ops import reference

KEYS = st.integers(0, 2**64 - 1)
MAP_NORESERVE = 0x4000  # Linux; the mmap module does not name it yet


def sums(values, key, total, projection):
    """P(key)·values, unscaled."""
    return ops.carrier_projection(values.reshape(1, -1), key, total, "flat", projection)


@settings(max_examples=30, deadline=None)
@given(
    key=KEYS,
    count=st.integers(1, 9000),
    total=st.integers(1, 300),
    projection=st.sampled_from(["sketch", "rademacher"]),
    factor=st.integers(-4, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_signed_projections_are_exactly_linear_on_small_integers(key, count, total, projection, factor, seed):
    u, v = np.random.default_rng(seed).integers(-8, 9, size=(2, count)).astype(np.float32)
    together = sums(factor * u + v, key, total, projection)
    np.testing.assert_array_equal(together, factor * sums(u, key, total, projection) + sums(v, key, total, projection))


@settings(max_examples=10, deadline=None)
@given(key=KEYS, count=st.integers(1, 3000), total=st.integers(1, 40))
def test_the_gaussian_projection_is_linear(key, count, total):
    u, v = np.random.default_rng(count).normal(size=(2, count)).astype(np.float32)
    together = sums(3 * u + v, key, total, "gaussian")
    apart = 3 * sums(u, key, total, "gaussian") + sums(v, key, total, "gaussian")
    np.testing.assert_allclose(together, apart, atol=1e-5 * 4 * np.sqrt(count))


@pytest.mark.parametrize(
    ("projection", "count", "total"),
    [("sketch", 3_000_001, 256), ("sketch", 3_000_001, 8192), ("rademacher", 1_000_003, 77), ("gaussian", 200_003, 19)],
)
def test_adjoint_identity_at_large_counts(projection, count, total):
    rng = np.random.default_rng(11)
    w, g = rng.normal(size=count).astype(np.float32), rng.normal(size=total).astype(np.float32)
    front = ops.sketch if projection == "sketch" else lambda *a: ops.project(*a, projection)
    back = ops.sketch_adjoint if projection == "sketch" else lambda *a: ops.project_adjoint(*a, projection)
    left = float(front(w, 21, total).astype(np.float64) @ g)
    right = float(w.astype(np.float64) @ back(g, 21, count))
    assert left == pytest.approx(right, abs=1e-5 * np.linalg.norm(w) * np.linalg.norm(g) / np.sqrt(count))


# Rows around the vectors of 8 and 16, the quads and sixteens of the adjoint, and the batches of 256.
@pytest.mark.parametrize("total", [1, 3, 4, 5, 15, 16, 17, 33, 255, 257, 300])
@pytest.mark.parametrize("count", [1, 100, 127, 4096, 9000])
def test_rademacher_rows_of_any_number_equal_the_reference_exactly(total, count):
    rng = np.random.default_rng(total)
    w, g = (rng.integers(-8, 9, size=n).astype(np.float32) for n in (count, total))
    np.testing.assert_array_equal(sums(w, 5, total, "rademacher"), reference.projection_sums(w, 5, total, "rademacher"))
    adjoint = np.empty(count, dtype=np.float32)
    _cpu.projection_adjoint(g.ctypes.data, total, count, 5, 1, 1.0, False, adjoint.ctypes.data)
    np.testing.assert_array_equal(adjoint, reference.projection_adjoint(g, 5, count, "rademacher"))


@pytest.mark.parametrize("projection", reference.PROJECTIONS)
def test_same_bits_for_every_instruction_set_and_number_of_threads(projection):
    rng = np.random.default_rng(13)
    before, threads = _cpu.instruction_set(), ops.get_num_threads()
    cases = [(1, 1), (100, 17), (4097, 3), (9000, 70)] + ([] if projection == "gaussian" else [(140_001, 40)])
    data = [tuple(rng.normal(size=n).astype(np.float32) for n in case) for case in cases]
    results = []
    try:
        for name in _cpu.instruction_sets():
            _cpu.set_instruction_set(name)
            for count in (1, 2, 3):
                ops.set_num_threads(count)
                parts = []
                for w, g in data:
                    parts.append(sums(w, 3, g.size, projection))
                    parts.append(ops.carrier_projection(w[None], 3, g.size, "unit_filters", projection))
                    back = ops.cpu.project_adjoint(g, 3, w.size, projection, w.copy())
                    parts.append(back)
                results.append(b"".join(part.tobytes() for part in parts))
    finally:
        _cpu.set_instruction_set(before)
        ops.set_num_threads(threads)
    assert len(set(results)) == 1


def test_a_sketch_of_more_than_two_to_the_31_weights():
    """Pages that are only read are all the same page of zeros; a few values lie on both sides of 2^31."""
    count, key, total = 2**31 + 3 * 4096 + 77, 99, 256
    memory = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    weights = np.frombuffer(memory, dtype=np.float32)
    expected = np.zeros(total)
    for place, value in ((5, 1.0), (2**31 - 1, 2.0), (2**31, 4.0), (2**31 + 4096, -8.0), (count - 1, 16.0)):
        weights[place] = value
        bucket = reference.buckets(key, 1, total, place)[0]
        expected[bucket] += value * reference.signs(key, 1, 0, reference.DOMAIN_SKETCH, place)[0]
    np.testing.assert_array_equal(sums(weights, key, total, "sketch"), expected)


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_the_pool_sleeps_between_calls():
    python(
        "import time, numpy as np\n"
        "from wmengine import ops\n"
        "ops.set_num_threads(4)\n"
        "time.sleep(0.5)  # NumPy's own pool spins for a while after it is imported\n"
        "ops.sketch(np.ones(1 << 20, dtype=np.float32), 1, 64)\n"
        "before = time.process_time()\n"
        "time.sleep(0.5)\n"
        "assert time.process_time() - before < 0.02, time.process_time() - before\n"
    )


def test_callers_at_once_share_one_pool_and_get_the_same_bits():
    python(
        "import os, threading, numpy as np\n"
        "from wmengine import ops\n"
        "ops.set_num_threads(3)\n"
        "w = np.random.default_rng(1).normal(size=1 << 20).astype(np.float32)\n"
        "others = len(os.listdir('/proc/self/task'))\n"
        "wanted = ops.sketch(w, 1, 64).tobytes()\n"
        "wrong, counts = [], []\n"
        "def call():\n"
        "    for _ in range(30):\n"
        "        wrong.append(ops.sketch(w, 1, 64).tobytes() != wanted)\n"
        "        counts.append(len(os.listdir('/proc/self/task')))\n"
        "callers = [threading.Thread(target=call) for _ in range(4)]\n"
        "[caller.start() for caller in callers]\n"
        "[caller.join() for caller in callers]\n"
        "assert len(wrong) == 120 and not any(wrong)\n"
        "assert max(counts) <= others + 4 + (3 - 1), (max(counts), others)\n"
    )
