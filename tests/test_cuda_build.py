"""The compiled CUDA module without a GPU: it imports, sizes its workspaces, and refuses what makes no sense."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

_cuda = pytest.importorskip("wmengine._cuda", reason="wmengine._cuda was not built (it needs nvcc)")

NOWHERE = (0, 0)  # device and stream: every call below must fail before it looks at them


def test_it_counts_devices_without_a_driver_too():
    assert _cuda.device_count() >= 0


@pytest.mark.parametrize(
    ("dtype", "rows", "classes", "groups", "named"),
    [
        (0, 1, 0, 1, r"outputs is \[1, 0\]"),
        (0, -1, 2, 1, r"outputs is \[-1, 2\]"),
        (0, 1, 2**31, 1, "classes from 1 to 2"),
        (1, 1, 2, -1, "there are -1 groups"),
        (3, 1, 2, 1, "dtype is 3"),
    ],
)
def test_match_counts_names_the_size_it_refuses(dtype, rows, classes, groups, named):
    with pytest.raises(ValueError, match=named):
        _cuda.match_counts(*NOWHERE, 0, dtype, rows, classes, 0, 0, groups, *[0] * 6)


@pytest.mark.parametrize(
    ("dtype", "suspects", "rows", "sets", "named"),
    [
        (0, -1, 3, 1, r"predicted is \[-1, 3\]"),
        (1, 1, 2**31, 1, "fewer than 2"),
        (0, 1, 1, -1, "expected has -1"),
        (2, 1, 1, 1, "dtype is 2"),
    ],
)
def test_label_matches_names_the_size_it_refuses(dtype, suspects, rows, sets, named):
    with pytest.raises(ValueError, match=named):
        _cuda.label_matches(*NOWHERE, 0, dtype, suspects, rows, 0, sets, 0)


@pytest.mark.parametrize(
    ("suspects", "registered", "total", "best", "named"),
    [
        (-1, 1, 8, 1, "there are -1 messages"),
        (1, 2**40, 8, 1, "registry below 2"),
        (1, 9, 0, 1, "total is 0"),
        (1, 9, 2**23, 1, "total is 8388608"),
        (1, 9, 8, 0, "best is 0"),
        (1, 9, 8, 10, "between 1 and 9"),
        (1, 5000, 8, 1025, "between 1 and 1024"),
    ],
)
def test_bit_matches_name_the_size_they_refuse(suspects, registered, total, best, named):
    if not named.startswith(("best", "between")):
        with pytest.raises(ValueError, match=named):
            _cuda.bit_matches(*NOWHERE, 0, suspects, 0, registered, total, 0)
    with pytest.raises(ValueError, match=named):
        _cuda.best_bit_matches(*NOWHERE, 0, suspects, 0, registered, total, best, 0, 0, 0)


@pytest.mark.parametrize("best", [1, 256, 1024])
def test_the_best_need_few_lists_of_so_many(best):
    assert _cuda.best_bit_matches_workspace(0, 2000, best) == 0
    assert _cuda.best_bit_matches_workspace(3, 2000, best) == 3 * best
    one, many = (_cuda.best_bit_matches_workspace(suspects, 2**39, best) for suspects in (1, 10_000))
    assert best < one <= 1000 * best
    assert many == 10_000 * best  # so many messages fill a card without cutting the registry


@pytest.mark.skipif(_cuda.device_count() > 0, reason="this machine has a GPU; tests/test_gpu.py runs the kernels")
def test_without_a_gpu_a_call_says_what_failed():
    with pytest.raises(RuntimeError, match="match_counts failed on the GPU: "):
        _cuda.match_counts(*NOWHERE, 0, 0, 1, 2, 0, 0, 1, *[0] * 6)
    with pytest.raises(RuntimeError, match="label_matches failed on the GPU: "):
        _cuda.label_matches(*NOWHERE, 0, 0, 1, 1, 0, 1, 0)
    with pytest.raises(RuntimeError, match=r"bit_matches failed on the GPU: "):
        _cuda.bit_matches(*NOWHERE, 0, 1, 0, 1, 8, 0)
    with pytest.raises(RuntimeError, match="best_bit_matches failed on the GPU: "):
        _cuda.best_bit_matches(*NOWHERE, 0, 1, 0, 1, 8, 1, 0, 0, 0)


def test_the_fronts_refuse_tensors_that_are_not_on_a_gpu():
    torch = pytest.importorskip("torch", reason="the fronts take torch tensors")
    from wmengine.ops import cuda

    for call in (
        lambda: cuda.match_counts(torch.ones(3, 4), torch.ones(3, dtype=torch.int64), None, 1, False),
        lambda: cuda.label_matches(torch.ones(2, 3, dtype=torch.int32), torch.ones(1, 3, dtype=torch.int64)),
        lambda: cuda.bit_matches(*(torch.ones(2, 3, dtype=torch.uint8) for _ in range(2)), 20),
        lambda: cuda.best_bit_matches(*(torch.ones(2, 3, dtype=torch.uint8) for _ in range(2)), 20, 1),
    ):
        with pytest.raises(TypeError, match="not on cpu"):
            call()


def test_the_fronts_name_the_argument_they_refuse():
    torch = pytest.importorskip("torch", reason="the fronts take torch tensors")
    from wmengine.ops import cuda

    labels, bits = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.uint8)
    matching = labels[:, 0], None, 1, False
    for error, named, call in (
        (TypeError, "outputs must be float32, .* not torch.int64", (cuda.match_counts, labels, *matching)),
        (ValueError, r"outputs must be \[N, C\]", (cuda.match_counts, bits[0].float(), *matching)),
        (TypeError, "predicted must hold integers, not torch.float32", (cuda.label_matches, labels.float(), labels)),
        (ValueError, r"predicted must be \[S, N\]", (cuda.label_matches, labels[0], labels)),
        (TypeError, "data must be a uint8 array or tensor, not torch.int64", (cuda.bit_matches, labels, bits, 20)),
        (ValueError, r"data must be \[rows, 3\] for 20 bits, not \(2, 2\)", (cuda.bit_matches, bits, bits[:, :2], 20)),
        (ValueError, r"data must be \[rows, 2\] for 16 bits, not \(2, 3\)", (cuda.bit_matches, bits, bits, 16)),
    ):
        with pytest.raises(error, match=named):
            call[0](*call[1:])


ARCHITECTURES, KERNELS = (80, 90, 100), ("label_matches", "bit_matches", "match_counts")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """By kernels and architecture, what nvcc says of them; two are compiled at a time."""
    nvcc, folder = os.environ.get("CUDACXX") or shutil.which("nvcc"), tmp_path_factory.mktemp("cubins")
    if nvcc is None:
        pytest.skip("needs nvcc")

    def compile_one(kernels, architecture):
        csrc, out = Path(__file__).parents[1] / "csrc", folder / f"{kernels}-{architecture}.cubin"
        command = [nvcc, "-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{architecture}", "-Xptxas=-v", f"-I{csrc}"]
        command += ["-cubin", "-o", str(out), str(csrc / "cuda" / f"{kernels}.cu")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    every = list(product(KERNELS, ARCHITECTURES))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(every, pool.map(compile_one, *zip(*every, strict=True)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_keep_their_registers(compiled, kernels, architecture):
    run = compiled[kernels, architecture]
    if "Unsupported gpu architecture" in run.stderr:
        pytest.skip(f"this nvcc knows no sm_{architecture}")
    assert run.returncode == 0, run.stderr
    usage = [line.strip() for line in run.stderr.splitlines() if "spill stores" in line]
    assert usage
    assert set(usage) == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}, run.stderr
