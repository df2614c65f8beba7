"""The benchmarks' own promises: ratios survive a drifting machine, results are complete, tables come from files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import harness, tables

ROOT = Path(__file__).resolve().parent.parent


class DriftingMachine:
    """A clock that only work moves, on a machine that gets slower with every call."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0

    def clock(self) -> float:
        return self.now

    def work(self, seconds: float) -> harness.Run:
        def run() -> None:
            self.now += seconds * self.slowness
            self.slowness *= 1.001

        return run


class Rounds:
    """pytest-benchmark's fixture as far as the harness uses it."""

    def __init__(self, clock: harness.Clock, disabled: bool = False) -> None:
        self.clock, self.disabled = clock, disabled
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None

    def pedantic(
        self, target: harness.Run, *, teardown: harness.Run | None = None, rounds: int = 1, iterations: int = 1
    ) -> None:
        seconds = []
        for _ in range(rounds):
            seconds.append(harness.sample(target, iterations, self.clock))
            if teardown is not None:
                teardown()
        if iterations > 1:
            target()
            if teardown is not None:
                teardown()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=seconds))


def a_case(machine: DriftingMachine, **changes: Any) -> harness.Case:
    values: dict[str, Any] = {
        "operator": "sketch",
        "what": "forward",
        "size": "1 M weights",
        "bytes_moved": 4_000_000,
        "ours": machine.work(0.002),
        "floor": harness.Contender("copy", machine.work(0.001)),
        "peers": [harness.Contender("stored matrix", machine.work(0.05), holds=1_000_000_000)],
        "headline": True,
    }
    return harness.Case(**{**values, **changes})


def a_row(**changes: Any) -> dict[str, Any]:
    machine = DriftingMachine()
    row = harness.compare(a_case(machine, **changes), Rounds(machine.clock), machine.clock, harness.FULL)
    assert row is not None
    return row


def a_result(*rows: dict[str, Any], **environment: Any) -> dict[str, Any]:
    described = {
        "device": "Some CPU",
        "kind": "cpu",
        "cores": 2,
        "threads": 2,
        "instruction_sets": ["avx2"],
        "versions": {"wmengine": "0.1.0", "torch": "2.13.0", "triton": None},
        "commit": "abc1234",
        "date": "2030-01-01",
    }
    return {
        "format": "wmengine-benchmark/1",
        "operator": "sketch",
        "quick": False,
        "environment": {**described, **environment},
        "rows": list(rows),
    }


def test_ratios_are_taken_within_a_round_so_that_a_drifting_machine_does_not_move_them() -> None:
    row = a_row()
    assert row["ours"]["ms"]["p80"] > 1.5 * row["ours"]["ms"]["p20"], "the machine of this test must drift"
    assert row["floor"]["ratio"]["median"] == pytest.approx(2.0, rel=0.06)
    assert row["peers"][0]["ratio"]["median"] == pytest.approx(25.0, rel=0.06)
    assert row["rounds"] >= harness.FULL.least_rounds


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_percentiles_agree_with_numpy(share: float, count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    assert harness.percentile(values.tolist(), share) == pytest.approx(np.quantile(values, share))


def test_aims_are_judged_by_the_measured_ratio() -> None:
    aims = [harness.Aim("copy", 3.0), harness.Aim("stored matrix", 100.0)]
    floor, peer = a_row(aims=aims)["aims"]
    assert floor["met"]
    assert floor["at_most"] == 3.0
    assert not peer["met"]
    assert peer["reached"] == pytest.approx(25.0, rel=0.06)
    with pytest.raises(ValueError, match="no such peer"):
        a_row(aims=[harness.Aim("no such peer", 2.0)])


def test_a_compiler_that_fails_is_left_out_with_its_reason_and_any_other_failure_is_raised() -> None:
    def broken() -> None:
        raise RuntimeError("no C++ compiler\nlong story")

    row = a_row(peers=[harness.Contender("torch.compile", broken, may_fail=True)])
    assert row["peers"] == []
    assert row["left_out"] == {"torch.compile": "failed: RuntimeError: no C++ compiler"}
    with pytest.raises(RuntimeError, match="no C"):
        a_row(peers=[harness.Contender("NumPy", broken)])


def test_a_disabled_benchmark_runs_everything_once_and_reports_nothing() -> None:
    machine = DriftingMachine()
    assert harness.compare(a_case(machine), Rounds(machine.clock, disabled=True), machine.clock, harness.FULL) is None
    assert machine.now == pytest.approx(0.053, rel=0.03)


def test_tables_are_a_pure_function_of_result_files(tmp_path: Path) -> None:
    row = a_row(aims=[harness.Aim("copy", 1.5)], left_out={"Liger-Kernel": "needs a GPU"})
    hidden = {**row, "size": "a size for the full table only", "headline": False}
    (tmp_path / "cpu-sketch.json").write_text(json.dumps(a_result(row, hidden)))
    readme = tables.readme_table(tables.load(tmp_path))
    full = tables.performance_table(tables.load(tmp_path))
    assert readme == tables.readme_table(tables.load(tmp_path))
    assert f"{row['floor']['ratio']['median']:.2f} × copy |" in readme
    assert "× stored matrix (1.00 GB)" in readme
    assert "full table only" not in readme
    assert "full table only" in full
    assert "≤ 1.5 **missed**" in full
    assert "needs a GPU" in full
    assert "Some CPU (AVX2), 2 threads on 2 cores**; wmengine 0.1.0, torch 2.13.0; commit abc1234" in readme
    widths = {line.count("|") for line in full.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "every line of the table has as many cells as its header"


def test_each_machine_has_its_own_table_and_the_cpu_comes_first(tmp_path: Path) -> None:
    gpu = a_result(a_row(), device="Some GPU", kind="cuda", cuda="13.0")
    (tmp_path / "a-gpu-sketch.json").write_text(json.dumps(gpu))
    (tmp_path / "cpu-sketch.json").write_text(json.dumps(a_result(a_row())))
    text = tables.readme_table(tables.load(tmp_path))
    assert text.index("**CPU: Some CPU") < text.index("**GPU: Some GPU, CUDA 13.0**")


def test_a_table_measured_beside_other_work_says_so() -> None:
    quiet, disturbed = {**a_row(), "others_cores": 0.02}, {**a_row(), "others_cores": 0.8}
    assert "Other processes" not in tables.readme_table([a_result(quiet)])
    assert "up to 0.8 cores during 1 of 2 cases" in tables.readme_table([a_result(quiet, disturbed)])


def test_only_the_text_between_the_markers_is_replaced() -> None:
    text = f"# Title\n\n{tables.BEGIN}\nold numbers\n{tables.END}\n\nafter\n"
    new = tables.replace_between_markers(text, "| new |")
    assert new == f"# Title\n\n{tables.BEGIN}\n| new |\n{tables.END}\n\nafter\n"
    assert tables.replace_between_markers(new, "| new |") == new
    with pytest.raises(ValueError, match="benchmarks:begin"):
        tables.replace_between_markers("# Title", "| new |")


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md"])
def test_the_published_numbers_are_those_of_the_result_files(document: str) -> None:
    expected = tables.documents(tables.load())[ROOT / document]
    assert (ROOT / document).read_text() == expected, "run `python -m benchmarks --readme`"


@pytest.fixture(scope="module")
def quick_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--threads", "1", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return out


def test_a_quick_run_writes_one_complete_result_file_per_operator(quick_results: Path) -> None:
    assert {path.name for path in quick_results.iterdir()} == {f"cpu-{name}.json" for name in tables.ORDER}
    for operator in tables.ORDER:
        result = json.loads((quick_results / f"cpu-{operator}.json").read_text())
        assert result["operator"] == operator
        assert result["environment"]["threads"] == 1
        assert {"wmengine", "numpy", "torch"} <= result["environment"]["versions"].keys()
        assert result["rows"]
        for row in result["rows"]:
            assert row["bytes"] > 0 or operator == "training_step"
            assert row["rounds"] >= 3
            for timed in (row["ours"], row["floor"], *row["peers"]):
                assert 0 < timed["ms"]["p20"] <= timed["ms"]["median"] <= timed["ms"]["p80"]
            assert row["floor"]["ratio"]["median"] > 0
            assert row["peers"], "a row without an opponent proves nothing"


def test_a_quick_run_is_kept_out_of_the_tables(quick_results: Path) -> None:
    with pytest.raises(ValueError, match="quick run"):
        tables.load(quick_results)
