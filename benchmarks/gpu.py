"""`python -m benchmarks.gpu OUT`: build, test, sanitize and measure everything that needs a GPU.

For a machine with an NVIDIA GPU, nvcc, CMake, pybind11, torch and Triton; nothing is installed and nothing is fetched.
Both compiled modules are built in place, for this card only. Every step has its own time limit and its own log, a
failing one does not stop the others, and result files are written as benchmarks end, those that matter most first.
Everything is cut off after nine minutes, or the `--seconds` given; the parts may be run one after the other instead.
Exit status 0 where every step passed, 1 where one failed, 2 where there is no GPU (what needs none has run then).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.environment import ROOT

BUILD = ROOT / "build" / "gpu"
PARTS = ("build", "check", "measure")
TESTS = (
    "test_gpu",
    "test_gpu_operators",
    "test_cuda_build",
    "test_triton",
    "test_triton_cross_entropy",
    "test_launches",
    "test_devices",
)
# What is measured, first the operators that have aims; not what a scheme costs on a network as small as the digits'.
OPERATORS = (
    *("cross_entropy", "sketch", "embedding_loss", "match_counts", "label_matches", "bit_matches", "resnet_step"),
    *("scan", "soft_nearest_neighbor", "project", "response", "training_step"),
)
LARGE = "two_to_the_31"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
TOTAL_S = 530.0
NO_GPU = "no GPU"
OVER = 124  # what `timeout` exits with after an interrupt


class Step(NamedTuple):
    """A command with its time limit; `left_out` says why it cannot run here."""

    name: str
    command: Sequence[str]
    limit_s: float
    environment: Mapping[str, str] = MappingProxyType({})
    left_out: str | None = None


class Outcome(NamedTuple):
    """What became of a step: "passed", "failed …" or "left out: …", and the last line it printed."""

    name: str
    status: str
    seconds: float
    last_line: str


def card() -> str | None:
    """The first GPU's compute capability as CMake writes it ('90'); None without a GPU or its driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip().replace(".", "") if lines else None


def tool(name: str) -> str | None:
    """A program of CUDA's, on the PATH or where CUDA is installed."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def build_steps(architecture: str | None) -> list[list[Step]]:
    """Configure, compile, and put the modules beside the Python files."""
    import pybind11

    # Without a card to ask, what most of them are; the module imports all the same.
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_ARCHITECTURES": f"{architecture or 90}-real",
        "CMAKE_CUDA_COMPILER": os.environ.get("CUDACXX") or tool("nvcc") or "nvcc",
        "Python_EXECUTABLE": sys.executable,
        "WMENGINE_CUDA": "ON",
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    if ninja := shutil.which("ninja"):
        definitions["CMAKE_MAKE_PROGRAM"] = ninja
    generator = ["-G", "Ninja"] if ninja else []
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = [str(BUILD / "lib" / f"{module}{suffix}") for module in ("_cpu", "_cuda")]
    jobs = str(len(os.sched_getaffinity(0)))
    switches = [f"-D{name}={value}" for name, value in definitions.items()]
    return [
        [Step("configure", ["cmake", "-S", str(ROOT), "-B", str(BUILD), *generator, *switches], 60)],
        [Step("compile", ["cmake", "--build", str(BUILD), "--parallel", jobs, "--target", "_cpu", "_cuda"], 240)],
        [Step("put in place", ["cp", "--remove-destination", *built, str(ROOT / "wmengine")], 10)],
    ]


def check_steps(gpu: bool) -> list[list[Step]]:
    """Tests beside each other; then every benchmark without a measurement; then the sanitizers.

    The second shows which ones run at all, and fills the caches of compilers, so that nothing is compiled while one
    measures.
    """
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider", "--durations=5"]
    # Most of the tests' time is Triton's compiler. Those of large sizes run one at a time: each wants much memory.
    several = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    left_out = None if gpu else NO_GPU
    tests = [
        Step(name, [*pytest, *several, f"tests/{name}.py", "-k", f"not {LARGE}"], 240, left_out=left_out)
        for name in TESTS
    ]
    tests.append(Step("large sizes", [*pytest, "tests/test_gpu.py", "-k", LARGE], 240, left_out=left_out))
    watched = [*python, "benchmarks.every_operator"]
    once = Step("every operator", watched, 120, left_out=left_out)  # compiles what the sanitizers run
    sanitizer = tool("compute-sanitizer") or "compute-sanitizer"
    missing = left_out or (None if shutil.which(sanitizer) else "compute-sanitizer is not installed")
    # Without torch's cache each tensor is an allocation of its own, and a step past its end is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizers = [
        Step(which, [sanitizer, "--tool", which, "--error-exitcode", "9", *watched], 200, environment, missing)
        for which in SANITIZERS
    ]
    tried = [
        Step(
            f"try {name}",
            [*pytest, "--benchmark-disable", "--device", "cuda", f"benchmarks/bench_{name}.py"],
            200,
            {"TORCHINDUCTOR_COMPILE_THREADS": "2"},  # a dozen processes compile
            left_out,
        )
        for name in OPERATORS
        if name != "scan"  # whole processes, which leave nothing behind
    ]
    return [[*tests, once], tried, sanitizers]


def measure_steps(gpu: bool, out: Path, operators: Sequence[str]) -> list[list[Step]]:
    """A stage for each operator: nothing else runs meanwhile."""
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--out", str(out / "results")]
    left_out = None if gpu else NO_GPU
    return [[Step(f"measure {name}", [*command, name], 150, left_out=left_out)] for name in operators]


def run_stage(steps: Sequence[Step], logs: Path, end: float) -> list[Outcome]:
    """Runs the steps beside each other, none beyond its limit or `end`.

    `timeout` interrupts one that is over its time, which lets pytest write what it has, and kills it ten seconds later.
    """
    outcomes, running = [], []
    for step in steps:
        left_s = min(step.limit_s, end - time.monotonic())
        if step.left_out is not None or left_s < 1.0:
            status = f"left out: {step.left_out}" if step.left_out is not None else "failed: no time was left"
            outcomes.append(Outcome(step.name, status, 0.0, ""))
            continue
        print(f"{step.name}: {shlex.join(step.command)}", flush=True)
        path = logs / f"{step.name.replace(' ', '-')}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                ["timeout", "--signal=INT", "--kill-after=10", f"{left_s:.0f}", *step.command], cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}, stdout=log, stderr=log,
                preexec_fn=_interruptible,
            )  # fmt: skip
        running.append((step, process, time.monotonic(), path))
    for step, process, started, path in running:
        code = process.wait()
        status = "passed" if code == 0 else "failed: over its time" if code == OVER else f"failed: exit status {code}"
        lines = path.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        outcomes.append(Outcome(step.name, status, time.monotonic() - started, last))
    return outcomes


def _interruptible() -> None:
    """A run in the background inherits that interrupts are ignored; its steps must hear theirs all the same."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes, a line each."""
    name_width, status_width = (max(len(one[place]) for one in outcomes) for place in (0, 1))
    return "\n".join(
        f"{name:{name_width}}  {status:{status_width}}  {seconds:6.1f} s  {last_line[:100]}".rstrip()
        for name, status, seconds, last_line in outcomes
    )


def run(stages: Sequence[Sequence[Step]], out: Path, total_s: float) -> list[Outcome]:
    """The stages one after the other, within `total_s` seconds in all; leaves logs and summary.txt in `out`."""
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + total_s
    outcomes: list[Outcome] = []
    for steps in stages:
        outcomes += run_stage(steps, logs, end)
        (out / "summary.txt").write_text(table(outcomes) + "\n")
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for logs, summary.txt and the result files")
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"measure {', '.join(OPERATORS)} (all)")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part of the run; may be repeated (all)")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help=f"for all of it, at most ({TOTAL_S:.0f})")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    options = parser.parse_intermixed_args(arguments)
    unknown = sorted(set(options.operators) - set(OPERATORS))
    if unknown:
        parser.error(f"unknown operator {unknown[0]!r}: known are {', '.join(OPERATORS)}")
    out = options.out.resolve()
    architecture = card()
    gpu = architecture is not None
    parts = {
        "build": lambda: build_steps(architecture),
        "check": lambda: check_steps(gpu),
        "measure": lambda: measure_steps(gpu, out, options.operators or OPERATORS),
    }
    stages = [steps for part in PARTS if part in (options.only or PARTS) for steps in parts[part]()]
    if options.dry_run:
        for step in (step for steps in stages for step in steps):
            print(f"# {step.name}, at most {step.limit_s:.0f} s" + (f"; {step.left_out}" if step.left_out else ""))
            print(shlex.join(step.command))
        return 0
    outcomes = run(stages, out, options.seconds)
    print(table(outcomes))
    print(f"logs and results in {out}")
    if any(outcome.status.startswith("failed") for outcome in outcomes):
        return 1
    if not gpu:
        print("there is no GPU here (nvidia-smi shows none): nothing was tested on one and nothing was measured")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
