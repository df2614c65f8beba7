"""What a result was measured on: device, versions, commit, threads, and how busy the machine was meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "torch", "triton", "faiss-cpu", "numkong", "liger-kernel", "fast_jl", "sjlt")


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
    """The same number of threads for torch, our CPU kernels and faiss's pool. NumPy's comparisons use one."""
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
    return _find("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine()


def instruction_sets() -> tuple[list[str], bool]:
    """Which vector extensions this CPU offers, widest last, or is held to; and whether it is held below its best.

    `make bench-avx2` holds everybody; WMENGINE_INSTRUCTION_SET is what holds our kernels.
    """
    from wmengine import _cpu

    used, held = _cpu.instruction_set(), _cpu.instruction_set() != _cpu.instruction_sets()[-1]
    flags = (_find("/proc/cpuinfo", r"(?:flags|Features)\s*:\s*(.+)") or "").split()
    names = {"x86-64": ["sse2"], "x86-64-v3": ["avx2"]}.get(used, []) if held else ["avx2", "avx512f", "asimd", "sve"]
    return [name for name in names if name in flags], held


def free_memory(device: str) -> int:
    """Bytes that can be allocated on the device now without swapping."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return 1024 * int(_find("/proc/meminfo", r"MemAvailable:\s*(\d+) kB") or 4 << 20)


def _find(path: str, line: str) -> str | None:
    """What the group in the pattern of a line matches in a file of the kernel's; None without the file or the line."""
    try:
        found = re.search(f"^{line}$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found.group(1).strip() if found else None


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
    except (OSError, AttributeError):  # no such file, no permission, or a C library without malloc_trim
        return None
    before = int(_find("/proc/self/status", r"VmRSS:\s*(\d+) kB") or 0)
    run()
    return 1024 * max(0, int(_find("/proc/self/status", r"VmHWM:\s*(\d+) kB") or 0) - before)


def git_commit() -> str:
    """Short hash, with '+' when sources of engine or benchmarks differ from it.

    Outside a checkout what WMENGINE_COMMIT says, or 'unknown'.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "csrc", "wmengine", ":(glob)benchmarks/**/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("WMENGINE_COMMIT", "unknown")


def other_seconds() -> float | None:
    """Processor seconds that processes other than this one and all below it have used; None where nobody tells."""
    family = [os.getpid()]
    try:
        for process in family:  # grows while it is walked
            for thread in Path(f"/proc/{process}/task").iterdir():
                family.extend(map(int, (thread / "children").read_text().split()))
        stats = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15] for process in family]
        machine = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    idle, waiting = machine[3:5]
    own = sum(int(ticks) for stat in stats for ticks in stat)
    return (sum(machine) - idle - waiting - own) / os.sysconf("SC_CLK_TCK")


def describe(device: str, threads: int) -> dict[str, Any]:
    """Everything a reader needs to judge the numbers, JSON-ready. Names no path and no host.

    `slug` starts a result's file name: 'cpu', 'cpu-avx2' where it is held to that, or the GPU's name with dashes.
    """
    import wmengine

    sets, held = instruction_sets()
    name = device_name(device)
    described: dict[str, Any] = {
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "device": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_sets": sets,
        "governor": _find("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "(.+)"),
        "python": platform.python_version(),
        "versions": {
            "wmengine": wmengine.__version__,
            **{
                name: importlib.metadata.version(name)
                for name in PACKAGES
                if any(importlib.metadata.distributions(name=name))
            },
        },
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if device == "cpu":
        return {**described, "slug": "-".join(["cpu", *sets[-1:]]) if held else "cpu"}
    import torch

    return {**described, "cuda": torch.version.cuda}
