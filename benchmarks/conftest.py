"""Options and the one fixture of the benchmarks: `compare(case)` measures a case and keeps its row for the file."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environment, harness

ROWS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
ROOFS = pytest.StashKey[dict[str, list[float]]]()
SECONDS = pytest.StashKey[dict[str, float]]()
FAILED = pytest.StashKey[set[str]]()
DEVICE = pytest.StashKey[str]()
ENVIRONMENT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("wmengine benchmarks")
    group.addoption("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1")
    group.addoption("--threads", type=int, default=2, help="CPU threads for torch and for wmengine alike")
    group.addoption("--quick", action="store_true", help="tiny sizes, three rounds, no torch.compile: a smoke test")
    group.addoption("--out", type=Path, default=None, help="write <device>-<operator>.json files into this directory")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[ROWS], config.stash[ROOFS], config.stash[SECONDS], config.stash[FAILED] = {}, {}, {}, set()
    threads = config.getoption("--threads")
    try:
        device = environment.choose_device(config.getoption("--device"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[DEVICE] = device
    config.stash[ENVIRONMENT] = environment.describe(device, threads)
    environment.use_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`size` runs over the module's SIZES, or its QUICK_SIZES."""
    if "size" in metafunc.fixturenames:
        name = "QUICK_SIZES" if metafunc.config.getoption("--quick") else "SIZES"
        metafunc.parametrize("size", getattr(metafunc.module, name), ids=lambda size: "-".join(map(str, size)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    clock = harness.device_clock(config.stash[DEVICE])
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock, disable_gc=True, group=_operator(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """What an operator's cases cost altogether: preparing, compiling and measuring."""
    started = time.perf_counter()
    done = yield
    seconds = item.config.stash[SECONDS]
    seconds[_operator(item)] = seconds.get(_operator(item), 0.0) + time.perf_counter() - started
    return done


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.config.stash[FAILED].add(_operator(item))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One file per operator; an operator with a failed case keeps the file it had."""
    config = session.config
    out: Path | None = config.getoption("--out")
    if out is None:
        return
    device = config.stash[DEVICE]
    out.mkdir(parents=True, exist_ok=True)
    roofs = {name: harness.spread(values) for name, values in config.stash[ROOFS].items()}
    for operator, rows in config.stash[ROWS].items():
        if rows and operator not in config.stash[FAILED]:
            result = {
                "format": "wmengine-benchmark/1",
                "operator": operator,
                "quick": bool(config.getoption("--quick")),
                "seconds": round(config.stash[SECONDS][operator], 1),
                "environment": {**config.stash[ENVIRONMENT], "roofs": roofs},
                "rows": [{**row, **harness.shares(row, roofs)} for row in rows],
            }
            path = out / f"{environment.device_slug(device)}-{operator}.json"
            path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


@pytest.fixture
def device(pytestconfig: pytest.Config) -> str:
    """Where tensors live: 'cpu' or 'cuda'."""
    return pytestconfig.stash[DEVICE]


@pytest.fixture
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether tiny sizes are wanted."""
    return bool(pytestconfig.getoption("--quick"))


@pytest.fixture
def compare(
    benchmark: harness.Benchmark, device: str, quick: bool, pytestconfig: pytest.Config
) -> Callable[[harness.Case], None]:
    """Measure a case. Aims were set for full sizes on a CPU, so other runs carry none.

    The device's roofs are measured before the first case of every operator: a shared machine's memory drifts too.
    """

    def measure(case: harness.Case) -> None:
        if quick or device != "cpu":
            case = dataclasses.replace(case, aims=())
        rows = pytestconfig.stash[ROWS].setdefault(case.operator, [])
        if case.axis and any((row["what"], row["axis"]) == (case.what, harness.axis_entry(case)) for row in rows):
            raise ValueError(f"{case.what}, {case.size}: its curve has another case at {case.axis}; name them apart")
        effort = harness.QUICK if quick else harness.FULL
        clock = harness.device_clock(device)
        if not rows and not benchmark.disabled:
            roofs = pytestconfig.stash[ROOFS]
            for name, roof in environment.measure_roofs(device, clock, quick).items():
                roofs.setdefault(name, []).append(roof)
        row = harness.compare(case, benchmark, clock, effort, device)
        if row is not None:
            rows.append(row)

    return measure


def _operator(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("bench_")
