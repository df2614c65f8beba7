"""Options and the one fixture of the benchmarks: `compare(case)` measures a case and keeps its row for the file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, harness, results

DEVICE = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("wmengine benchmarks")
    group.addoption("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1")
    group.addoption("--threads", type=int, default=2, help="CPU threads for torch and for wmengine alike")
    group.addoption("--quick", action="store_true", help="tiny sizes, three rounds, no torch.compile: a smoke test")
    group.addoption("--out", type=Path, default=None, help="write <device>-<operator>.json files into this directory")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    try:
        config.stash[DEVICE] = environment.choose_device(config.getoption("--device"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    environment.use_threads(config.getoption("--threads"))
    config.pluginmanager.register(Measurements(config), "measurements")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`size` runs over the module's SIZES, on a GPU its GPU_SIZES too; or over its QUICK_SIZES."""
    if "size" in metafunc.fixturenames:
        name = "QUICK_SIZES" if metafunc.config.getoption("--quick") else "SIZES"
        sizes = list(getattr(metafunc.module, name))
        if name == "SIZES" and metafunc.config.stash[DEVICE] != "cpu":
            sizes = [*getattr(metafunc.module, "GPU_SIZES", []), *sizes]
        metafunc.parametrize("size", sizes, ids=lambda size: "-".join(map(str, size)))


class Measurements:
    """The rows of the operator that is being measured; its file is written when its last case has ended well."""

    def __init__(self, config: pytest.Config) -> None:
        self.device, self.quick = config.stash[DEVICE], bool(config.getoption("--quick"))
        self.out: Path | None = config.getoption("--out")
        self.environment = environment.describe(self.device, config.getoption("--threads"))
        self.clock = harness.device_clock(self.device)
        self.roofs: dict[str, float] = {}
        self.rows: list[results.Row] = []
        self.failed_before = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=self.clock, disable_gc=True, group=item.path.stem))

    def measure(self, benchmark: Any, case: harness.Case) -> None:
        """A quick run's sizes carry no aims; a GPU has its own, and what fills it is a headline.

        The device's roofs are measured before the first case of every operator: a shared machine's memory drifts too.
        """
        if self.device != "cpu":
            filled = case.bytes_moved >= harness.STREAMED
            case = dataclasses.replace(case, aims=harness.aims_on_a_gpu(case), headline=case.headline or filled)
        if self.quick:
            case = dataclasses.replace(case, aims=())
        torch._dynamo.reset()  # type: ignore[no-untyped-call]  # which compiles no function for more than eight sizes
        if not self.rows and not benchmark.disabled:
            self.roofs = harness.measure_roofs(self.device, self.clock, self.quick)
        row = harness.compare(case, benchmark, self.clock, self.quick, self.device)
        if row is not None:
            self.rows.append(row)
            if self.device != "cpu":  # a GPU is dear: what was measured is kept, whatever comes after
                self.write(case.operator)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, bool, bool]:
        done = yield
        if nextitem is None or nextitem.path != item.path:
            failed = item.session.testsfailed
            if self.rows and failed == self.failed_before:
                self.write(item.path.stem.removeprefix("bench_"))
            self.rows, self.failed_before = [], failed
        return done

    def write(self, operator: str) -> None:
        if self.out is not None:
            results.write(self.out, operator, self.quick, self.environment, self.roofs, self.rows)


@pytest.fixture
def device(pytestconfig: pytest.Config) -> str:
    """Where tensors live: 'cpu' or 'cuda'."""
    return pytestconfig.stash[DEVICE]


@pytest.fixture
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether tiny sizes are wanted."""
    return bool(pytestconfig.getoption("--quick"))


@pytest.fixture
def compare(benchmark: Any, pytestconfig: pytest.Config) -> Callable[[harness.Case], None]:
    """Measure a case beside its floor and its peers, and keep its row."""
    return functools.partial(pytestconfig.pluginmanager.get_plugin("measurements").measure, benchmark)
