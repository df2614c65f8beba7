"""What a result was measured on: device, versions, commit, threads, roofs, and how busy the machine was meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("wmengine", "numpy", "torch", "triton")
PEERS = ("faiss-cpu", "numkong", "liger-kernel", "fast_jl", "sjlt")


def choose_device(wanted: str) -> str:
    """`auto` is the GPU where torch sees one, else the CPU. ValueError where an asked-for GPU is not there."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cpu" and not re.fullmatch(r"cuda(:\d+)?", wanted):
        raise ValueError(f"--device is {wanted!r}: expected auto, cpu, cuda or, for one of several, cuda:1")
    if wanted != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {wanted}: torch {torch.__version__} sees no GPU here; use --device cpu")
    return wanted


def use_threads(count: int) -> None:
    """The same number of threads for torch, our CPU kernels and, where it is installed, faiss with its own pool.

    NumPy's argmax and comparisons use one.
    """
    import torch

    import wmengine

    torch.set_num_threads(count)
    wmengine.set_num_threads(count)
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(count)


@contextlib.contextmanager
def separated_threads() -> Iterator[None]:
    """Keep the calling thread on one processor and all other threads of this process on the others, then undo it.

    Some kernels (seen in virtual machines) wake a worker on the very processor of the thread that wakes it, while
    another one idles; the two then take turns for tens of milliseconds, and a parallel call costs anything between its
    own time and a whole time slice. That is a property of the machine, it hits torch's pool and ours alike, and here it
    is taken out for both. Threads that start inside inherit the caller's processor, so start all of them before.
    """
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        yield
        return
    caller = threading.get_native_id()
    before: dict[int, set[int]] = {}
    mine = min(os.sched_getaffinity(0))
    for thread in [int(entry.name) for entry in Path("/proc/self/task").iterdir()]:
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            before[thread] = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, {mine} if thread == caller else before[thread] - {mine} or before[thread])
    try:
        yield
    finally:
        for thread, processors in before.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, processors)


def device_name(device: str) -> str:
    """The processor as it names itself, such as 'AMD EPYC' or 'NVIDIA H100 80GB HBM3'."""
    if device != "cpu":
        import torch

        return str(torch.cuda.get_device_name(device))
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def device_slug(device: str) -> str:
    """The start of a result's file name: 'cpu', 'cpu-avx2' where it is capped, or the GPU's name with dashes."""
    if device == "cpu":
        return "-".join(["cpu", *instruction_sets()[-1:]]) if is_capped() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def is_capped() -> bool:
    """Whether WMENGINE_INSTRUCTION_SET holds our kernels below what this CPU offers (`make bench-avx2` does)."""
    from wmengine import _cpu

    return _cpu.instruction_set() != _cpu.instruction_sets()[-1]


def instruction_sets() -> list[str]:
    """Which vector extensions this CPU offers, or is capped at, widest last; empty where the kernel does not tell."""
    from wmengine import _cpu

    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    capped = {"x86-64": ("sse2",), "x86-64-v3": ("avx2",)} if is_capped() else {}
    return [name for name in capped.get(_cpu.instruction_set(), ("avx2", "avx512f", "asimd", "sve")) if name in flags]


def free_memory(device: str) -> int:
    """Bytes that can be allocated on the device now without swapping."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return 1024 * int(found.group(1)) if found else 4 << 30


def leaves() -> list[Any]:
    """Every tensor alive that a gradient could be left on."""
    import torch

    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.is_leaf]


def peak_memory(run: Callable[[], object], device: str, differentiated: Sequence[Any] = ()) -> int | None:
    """Bytes that one call of `run` holds at its peak beyond what was held before; None where the kernel does not tell.

    On a CPU: the high-water mark of resident pages, reset before the call; memory that the allocator keeps is given
    back first, or the call would find it there. A few hundred kB are noise. On a GPU: torch's own count. The gradients
    of the `differentiated` tensors are let go first: the call would free them, and they would hide what it allocates.
    """
    import torch

    for tensor in differentiated:
        tensor.grad = None
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - held
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held = _status_bytes("VmRSS")
        run()
        return max(0, _status_bytes("VmHWM") - held)
    except (OSError, AttributeError):  # no such file, no permission, or a C library without malloc_trim
        return None


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return 1024 * int(found.group(1))


def measure_roofs(device: str, clock: Callable[[], float], quick: bool = False) -> dict[str, float]:
    """What this device reaches at its best in this very run, through torch and with the threads it was given.

    `copy_gb_s` and `cache_gb_s`: bytes read plus bytes written a second by a copy too large for the caches, and by one
    that fits in the second level; `float32_gflop_s` (and `bfloat16_gflop_s` on a GPU): 2n³ a matrix product of n×n over
    its time. The best of the repeats counts: what holds a roof down is never the roof.
    """
    import torch

    on_cpu = device == "cpu"
    products = (torch.float32,) if on_cpu else (torch.float32, torch.bfloat16)
    large, small = (1 << 26, 1 << 17) if on_cpu else (1 << 28, 1 << 21)
    side = (384 if quick else 1536) if on_cpu else 8192
    work: dict[str, tuple[float, Callable[[], object]]] = {}  # billions of bytes or operations, and what does them
    for name, count in (("copy_gb_s", large // (8 if quick else 1)), ("cache_gb_s", small)):
        source, target = torch.ones(count, device=device), torch.ones(count, device=device)
        work[name] = 8e-9 * count, functools.partial(target.copy_, source)
    for kind in products:
        matrix = torch.ones(side, side, device=device, dtype=kind)
        work[f"{str(kind).removeprefix('torch.')}_gflop_s"] = (
            2e-9 * side**3,
            functools.partial(torch.mm, matrix, matrix),
        )
    for _, run in work.values():
        run()  # starts the threads that separated_threads then sends to their processors
    with separated_threads():
        return {
            name: float(f"{billions / _best(run, clock, 0.02 if quick else 0.3):.4g}")
            for name, (billions, run) in work.items()
        }


def _best(run: Callable[[], object], clock: Callable[[], float], seconds: float) -> float:
    """The least seconds of a call, over samples of 1 ms or so that take `seconds` altogether, and five at least."""
    once = float("inf")
    for _ in range(4):
        start = clock()
        run()
        once = min(once, clock() - start)
    calls = max(1, int(1e-3 / max(once, 1e-7)))
    best, taken, until = once, 0, time.perf_counter() + seconds
    while time.perf_counter() < until or taken < 5:
        taken += 1
        start = clock()
        for _ in range(calls):
            run()
        best = min(best, (clock() - start) / calls)
    return best


def git_commit() -> str:
    """Short hash, with '+' when engine sources differ from that commit; 'unknown' outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "csrc", "wmengine") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def other_seconds() -> float | None:
    """Processor seconds that processes other than this and its children have used; None where nobody tells."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        own = own_seconds()
    except (OSError, ValueError, IndexError):
        return None
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK") - own


def own_seconds() -> float:
    """Processor seconds of this process and all below it: those that run, and those that ended and were waited for.

    Raises OSError where the kernel does not tell.
    """
    family = [os.getpid()]
    for process in family:  # grows while it is walked
        for thread in Path(f"/proc/{process}/task").iterdir():
            family.extend(map(int, (thread / "children").read_text().split()))
    ticks = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15] for process in family]
    return sum(int(part) for parts in ticks for part in parts) / os.sysconf("SC_CLK_TCK")


def version(package: str) -> str | None:
    """Installed version of a distribution, None when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: str, threads: int) -> dict[str, Any]:
    """Everything a reader needs to judge the numbers, JSON-ready. Names no path and no host."""
    described: dict[str, Any] = {
        "device": device_name(device),
        "kind": "cpu" if device == "cpu" else "cuda",
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_sets": instruction_sets(),
        "capped": device == "cpu" and is_capped(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES}
        | {package: number for package in PEERS if (number := version(package))},
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if device != "cpu":
        import torch

        described["cuda"] = torch.version.cuda
    return described
