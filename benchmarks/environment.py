"""What a result was measured on: device, versions, commit, threads, and how busy the machine was meanwhile."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("wmengine", "numpy", "torch", "triton")


def choose_device(wanted: str) -> str:
    """`auto` is the GPU where torch sees one, else the CPU. RuntimeError where an asked-for GPU is not there."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(f"--device {wanted}: torch {torch.__version__} sees no GPU here; use --device cpu")
    return wanted


def use_threads(count: int) -> None:
    """The same number of threads for torch and for our CPU kernels; NumPy's argmax and comparisons use one."""
    import torch

    import wmengine

    torch.set_num_threads(count)
    wmengine.set_num_threads(count)


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
    """The start of a result's file name: 'cpu', or the GPU's name in lower case with dashes."""
    return "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def instruction_sets() -> list[str]:
    """Which vector extensions this CPU offers, widest last; empty where the kernel does not tell."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in ("avx2", "avx512f", "asimd", "sve") if name in flags]


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
    """Processor seconds that other processes have used since the machine started; None where nobody tells."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    idle, waiting = ticks[3:5]
    ours = os.times()
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK") - (ours.user + ours.system)


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
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if device != "cpu":
        import torch

        described["cuda"] = torch.version.cuda
    return described
