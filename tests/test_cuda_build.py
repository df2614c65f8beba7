"""The compiled CUDA module without a GPU: it imports, sizes its workspaces, and refuses what makes no sense."""

import pytest

_cuda = pytest.importorskip("wmengine._cuda", reason="wmengine._cuda was not built (it needs nvcc)")

NOWHERE = (0, 0)  # device and stream: every call below must fail before it looks at them
WEIGHTS = 2**24


def test_it_counts_devices_without_a_driver_too():
    assert _cuda.device_count() >= 0


@pytest.mark.parametrize("buckets", [32, 256, 4096, 2**20])
def test_a_sketch_needs_whole_rows_of_partial_sums_few_beside_the_weights(buckets):
    assert _cuda.sketch_workspace(0, buckets) == buckets
    assert _cuda.sketch_workspace(1, buckets) == buckets
    floats = _cuda.sketch_workspace(WEIGHTS, buckets)
    assert floats % buckets == 0
    assert buckets <= floats <= WEIGHTS // 16
    # it stops growing, and no size past 2^31 wraps around
    assert _cuda.sketch_workspace(2**40, buckets) == _cuda.sketch_workspace(2**41, buckets) >= floats


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("total", [1, 256, 100_000])
def test_a_dense_projection_needs_whole_rows_of_partial_sums(kind, total):
    floats = _cuda.project_workspace(WEIGHTS, total, kind)
    assert floats % total == 0
    assert floats >= total
    assert _cuda.project_workspace(2**40, total, kind) == _cuda.project_workspace(2**41, total, kind) >= floats


@pytest.mark.parametrize(
    ("count", "buckets", "total", "named"),
    [
        (-1, 32, 32, "count is -1"),
        (10, 33, 32, "buckets is 33"),
        (10, 16, 16, "buckets is 16"),
        (10, 32, 0, "total is 0"),
        (10, 32, 33, "total is 33"),
    ],
)
def test_sketch_names_the_size_it_refuses(count, buckets, total, named):
    with pytest.raises(ValueError, match=named):
        _cuda.sketch(*NOWHERE, 0, count, 1, buckets, total, 1.0, 0, 0)
    with pytest.raises(ValueError, match=named):
        _cuda.sketch_adjoint(*NOWHERE, 0, total, 1, buckets, 1.0, False, count, 0)


@pytest.mark.parametrize(
    ("count", "total", "kind", "named"), [(-1, 5, 0, "count is -1"), (5, 0, 1, "total is 0"), (5, 5, 2, "kind is 2")]
)
def test_project_names_the_size_it_refuses(count, total, kind, named):
    with pytest.raises(ValueError, match=named):
        _cuda.project(*NOWHERE, 0, count, 1, total, kind, 1.0, 0, 0)
    with pytest.raises(ValueError, match=named):
        _cuda.project_adjoint(*NOWHERE, 0, total, 1, kind, 1.0, False, count, 0)


@pytest.mark.parametrize(
    ("dtype", "suspects", "rows", "classes", "sets", "named"),
    [
        (0, 1, 1, 0, 1, r"outputs is \[1, 1, 0\]"),
        (0, -1, 1, 2, 1, r"outputs is \[-1, 1, 2\]"),
        (1, 1, 1, 2, -1, "expected has -1"),
        (3, 1, 1, 2, 1, "dtype is 3"),
    ],
)
def test_match_counts_names_the_size_it_refuses(dtype, suspects, rows, classes, sets, named):
    with pytest.raises(ValueError, match=named):
        _cuda.match_counts(*NOWHERE, 0, dtype, suspects, rows, classes, 0, sets, 0, 0, 0)


@pytest.mark.parametrize("key", [-1, 2**64])
def test_a_key_is_64_bits(key):
    with pytest.raises(TypeError):
        _cuda.sketch(*NOWHERE, 0, 10, key, 32, 32, 1.0, 0, 0)


@pytest.mark.skipif(_cuda.device_count() > 0, reason="this machine has a GPU; tests/test_gpu.py runs the kernels")
def test_without_a_gpu_a_call_says_what_failed():
    with pytest.raises(RuntimeError, match="sketch failed on the GPU: "):
        _cuda.sketch(*NOWHERE, 0, 10, 1, 32, 32, 1.0, 0, 0)
    with pytest.raises(RuntimeError, match="match_counts failed on the GPU: "):
        _cuda.match_counts(*NOWHERE, 0, 0, 1, 1, 2, 0, 1, 0, 0, 0)


def test_the_fronts_refuse_tensors_that_are_not_on_a_gpu():
    torch = pytest.importorskip("torch", reason="the fronts take torch tensors")
    from wmengine.ops import cuda

    for call in (
        lambda: cuda.project(torch.ones(5), 1, 32, "sketch", 1.0),
        lambda: cuda.project_adjoint(torch.ones(32), 1, 5, "gaussian", 1.0),
        lambda: cuda.match_counts(torch.ones(2, 3, 4), torch.ones(1, 3, dtype=torch.int64)),
    ):
        with pytest.raises(TypeError, match="not on cpu"):
            call()
