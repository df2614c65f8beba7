"""The benchmarks' own promises: ratios survive a drifting machine, results are complete, tables come from files."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import environment, harness, plots, tables

ROOT = Path(__file__).resolve().parent.parent
ROOFS = {
    name: {"median": value, "p20": value, "p80": value}
    for name, value in {"copy_gb_s": 40.0, "cache_gb_s": 160.0, "float32_gflop_s": 300.0}.items()
}


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
            self.slowness *= 1.003

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
    case = a_case(machine, **changes)
    row = harness.compare(case, Rounds(machine.clock), machine.clock, harness.FULL)
    assert row is not None
    return {**row, **harness.shares(row, ROOFS)}


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
        "roofs": ROOFS,
    }
    return {
        "format": "wmengine-benchmark/1",
        "operator": "sketch",
        "quick": False,
        "seconds": 12.3,
        "environment": {**described, **environment},
        "rows": list(rows),
    }


def a_curve(exponent: float = 1.0, **changes: Any) -> list[dict[str, Any]]:
    """Rows of one curve over four sizes, timed by a power law."""
    rows, measured = [], a_row(**changes)
    for size in (100, 1000, 10_000, 100_000):
        axis = {"name": "weights", "value": size}
        row = {**copy.deepcopy(measured), "size": f"{size} weights", "axis": axis}
        for timed, factor in ((row["ours"], 2e-6), (row["floor"], 1e-6), *((peer, 5e-5) for peer in row["peers"])):
            timed["ms"] = dict.fromkeys(("median", "p20", "p80"), factor * size**exponent)
        rows.append(row)
    return rows


def test_ratios_are_taken_within_a_round_so_that_a_drifting_machine_does_not_move_them() -> None:
    row = a_row()
    assert row["ours"]["ms"]["p80"] > 1.5 * row["ours"]["ms"]["p20"], "the machine of this test must drift"
    assert row["floor"]["ratio"]["median"] == pytest.approx(2.0, rel=0.06)
    assert row["peers"][0]["ratio"]["median"] == pytest.approx(25.0, rel=0.06)
    assert row["rounds"] >= harness.FULL.headline_rounds


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


def test_a_row_says_how_far_below_the_measured_roofs_it_stays() -> None:
    row = a_row(operations=8_000_000, axis=("weights", 1_000_000))
    seconds = row["ours"]["ms"]["median"] / 1e3
    assert row["gb_s"] == pytest.approx(4e-3 / seconds, rel=1e-3)
    assert row["gflop_s"] == pytest.approx(8e-3 / seconds, rel=1e-3)
    assert row["of_copy"] == pytest.approx(row["gb_s"] / 40, rel=1e-3)
    assert row["of_cache_copy"] == pytest.approx(row["gb_s"] / 160, rel=1e-3)
    assert row["of_peak"] == pytest.approx(row["gflop_s"] / 300, rel=1e-3)
    assert (row["operations"], row["axis"]) == (8_000_000, {"name": "weights", "value": 1_000_000})
    nothing_counted = a_row(bytes_moved=0)
    assert not {"gb_s", "gflop_s", "of_copy", "of_cache_copy", "of_peak"} & nothing_counted.keys()


def test_a_long_call_is_not_made_twice_a_sample_and_a_case_keeps_to_its_seconds() -> None:
    machine = DriftingMachine()
    calls = {"long": 0, "short": 0}

    def counted(name: str, seconds: float) -> harness.Run:
        def run() -> None:
            calls[name] += 1
            machine.now += seconds

        return run

    case = a_case(machine, ours=counted("short", 0.02), peers=[harness.Contender("long", counted("long", 0.4))])
    row = harness.compare(case, Rounds(machine.clock), machine.clock, harness.FULL)
    assert row is not None
    rounds = row["rounds"]
    assert calls["long"] == rounds + 3, "once to warm up, once for its memory, once to see how long it takes"
    assert calls["short"] >= 2 * rounds
    assert machine.now < harness.FULL.headline_s + 3


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel keeps its high-water mark")
def test_the_memory_of_a_call_is_what_it_touches_and_not_what_was_there_before() -> None:
    held = torch.ones(1 << 24, requires_grad=True)
    held.grad = torch.ones(1 << 24)

    def two_arrays() -> torch.Tensor:
        return torch.exp(held.detach()) + 1

    def gradient() -> None:
        held.grad = None
        held.sum().backward()

    size = 4 << 24
    # What else the interpreter touches meanwhile is a few hundred kB.
    assert environment.peak_memory(lambda: None, "cpu") < size / 20
    assert environment.peak_memory(two_arrays, "cpu") == pytest.approx(2 * size, rel=0.1)
    assert held in set(environment.leaves())
    assert environment.peak_memory(gradient, "cpu", [held]) == pytest.approx(size, rel=0.1)


def test_roofs_are_measured_on_this_machine() -> None:
    roofs = environment.measure_roofs("cpu", time.perf_counter, quick=True)
    assert roofs.keys() == {"copy_gb_s", "cache_gb_s", "float32_gflop_s"}
    assert all(math.isfinite(roof) and roof > 0.01 for roof in roofs.values())


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'tpu': expected auto, cpu, cuda"):
        environment.choose_device("tpu")


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
    assert f"≤ 1.5 × copy: {row['floor']['ratio']['median']:.2f}, **missed**" in full
    assert "Left out: Liger-Kernel (needs a GPU)." in full
    assert "### `sketch` (12 s to measure)" in full
    assert "Some CPU (AVX2), 2 threads on 2 cores**; wmengine 0.1.0, torch 2.13.0; commit abc1234" in readme
    assert "copy 40 GB/s from memory, 160 GB/s from cache, float32 matrix product 300 GFLOP/s" in readme


def widths(markdown: str) -> set[int]:
    return {line.count("|") for line in markdown.splitlines() if line.startswith("|")}


def test_every_line_of_a_table_has_as_many_cells_as_its_header() -> None:
    peers = [harness.Contender("NumPy", lambda: None), harness.Contender("torch.compile", lambda: None)]
    uneven = [
        a_row(operations=5, peers=peers),
        a_row(bytes_moved=0, peers=peers[:1], left_out={"faiss": "not installed"}),
    ]
    assert len(widths(tables.readme_table([a_result(*uneven)]))) == 1
    assert len(widths(tables.performance_table([a_result(*uneven)]))) == 1


def test_what_a_size_lacks_is_a_dash_and_the_reason_names_the_size() -> None:
    small, large = a_row(size="small"), a_row(size="large", peers=[], left_out={"stored matrix": "would take 17 GB"})
    text = tables.performance_table([a_result(small, large)])
    assert next(line for line in text.splitlines() if line.startswith("| large")).endswith("| – |")
    assert "Left out: stored matrix at large (would take 17 GB)." in text


def test_the_readme_has_few_rows_and_something_of_every_operator() -> None:
    row = a_row()
    many = [{**row, "size": f"size {index}"} for index in range(tables.README_ROWS + 3)]
    only = {**a_result({**row, "what": "the last operator"}), "operator": "training_step"}
    text = tables.readme_table([a_result(*many), only])
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == tables.README_ROWS
    assert "the last operator" in lines[-1]
    assert f"size {tables.README_ROWS - 2} " in text
    assert f"size {tables.README_ROWS - 1} " not in text


def test_many_peers_are_told_by_the_fastest_and_the_slowest() -> None:
    machine = DriftingMachine()
    peers = [harness.Contender(f"peer {index}", machine.work(0.003 * index)) for index in (3, 1, 4, 2)]
    row = harness.compare(a_case(machine, peers=peers), Rounds(machine.clock), machine.clock, harness.FULL)
    assert row is not None
    text = tables.readme_table([a_result(row)])
    assert "× peer 1<br>… 2 between …<br>" in text
    assert "× peer 4 |" in text


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_curve_grows_with_the_exponent_of_its_power_law(exponent: float) -> None:
    (curve,) = tables.curves([a_result(*a_curve(exponent), a_row())])
    assert [point.value for point in curve.points] == [100, 1000, 10_000, 100_000]
    assert tables.growth([p.value for p in curve.points], [p.ours for p in curve.points]) == pytest.approx(exponent)
    line = f"| forward | weights | 100 – 100 k | {exponent:.2f} | {exponent:.2f} | {exponent:.2f} | {exponent:.2f} |"
    assert line in tables.performance_table([a_result(*a_curve(exponent))])


def test_two_points_are_no_curve_and_no_peer_is_a_gap_in_its_line() -> None:
    rows = a_curve()
    assert tables.curves([a_result(*rows[:2])]) == []
    rows[-1]["peers"] = []
    (curve,) = tables.curves([a_result(*rows)])
    assert [point.peer is None for point in curve.points] == [False, False, False, True]


def test_plots_are_a_pure_function_of_results_and_name_every_headline_row() -> None:
    results = [a_result(*a_curve(), *a_curve(what="with operations", operations=10**9))]
    drawn = plots.pictures(results)
    assert {path.name for path in drawn} == {"roofline-cpu.svg", "scaling-cpu.svg"}
    assert drawn == plots.pictures(results), "no date, no random names"
    picture = drawn[ROOT / "docs" / "roofline-cpu.svg"]
    for label in ("forward, 1000 weights", "with operations, 1000 weights", "copy from memory, 40 GB/s"):
        assert f"<!-- {label} -->" in picture, "matplotlib notes each text beside its outlines"
    assert "docs/roofline-cpu.svg" in tables.readme_table(results)
    assert "(scaling-cpu.svg)" in tables.performance_table(results)
    changed = plots.pictures([a_result(*a_curve(1.5))])
    assert changed[ROOT / "docs" / "scaling-cpu.svg"] != drawn[ROOT / "docs" / "scaling-cpu.svg"]


def test_results_without_roofs_or_curves_have_no_plots_and_no_links() -> None:
    without = a_result(a_row(), roofs={})
    assert plots.pictures([without]) == {}
    assert "![" not in tables.readme_table([without]) + tables.performance_table([without])


def test_each_machine_has_its_own_plots() -> None:
    gpu = a_result(
        *a_curve(),
        device="Some GPU (80 GB)",
        kind="cuda",
        cuda="13.0",
        roofs={**ROOFS, "bfloat16_gflop_s": ROOFS["copy_gb_s"]},
    )
    names = {path.name for path in plots.pictures([a_result(*a_curve()), gpu])}
    assert names == {
        f"{plot}-{machine}.svg" for plot in ("roofline", "scaling") for machine in ("cpu", "some-gpu-80-gb")
    }


@given(st.lists(st.floats(-1, 5), min_size=1, max_size=20).map(sorted))
def test_labels_keep_their_order_and_their_distance(wanted: Sequence[float]) -> None:
    places = plots.apart(wanted, 0.2, 0.0, 4.0)
    assert all(second - first > 0.199 for first, second in itertools.pairwise(places))
    assert places[0] > -1e-9  # 20 labels take 3.8 of the 4 that there are
    assert places[-1] <= 4.0


def test_roofs_that_drifted_within_the_run_say_so() -> None:
    drifted = {**ROOFS, "copy_gb_s": {"median": 40.0, "p20": 34.0, "p80": 51.0}}
    assert "drifted" not in tables.readme_table([a_result(a_row())])
    assert "They drifted by up to 50 %." in tables.readme_table([a_result(a_row(), roofs=drifted)])


def test_each_machine_has_its_own_table_and_the_cpu_comes_first(tmp_path: Path) -> None:
    gpu = a_result(a_row(), device="Some GPU", kind="cuda", cuda="13.0")
    (tmp_path / "a-gpu-sketch.json").write_text(json.dumps(gpu))
    (tmp_path / "cpu-sketch.json").write_text(json.dumps(a_result(a_row())))
    text = tables.readme_table(tables.load(tmp_path))
    assert text.index("**CPU: Some CPU") < text.index("**GPU: Some GPU, CUDA 13.0**")


def test_rows_measured_beside_other_work_are_marked() -> None:
    quiet, disturbed = {**a_row(), "others_cores": 0.02}, {**a_row(size="disturbed"), "others_cores": 0.8}
    for table in (tables.readme_table, tables.performance_table):
        assert "†" not in table([a_result(quiet)])
        text = table([a_result(quiet, disturbed)])
        assert "† Other processes used up to 0.8 cores" in text
        assert text.count("| disturbed † |") == 1
        assert text.count("†") == 2


def test_what_children_and_their_children_use_is_our_own() -> None:
    spin = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\nsys.stdin.read()"
    before = environment.own_seconds()
    shell = ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", spin]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert environment.own_seconds() - before >= 0.45  # they run
        child.communicate(b"")
    assert environment.own_seconds() - before >= 0.45  # they have ended


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


def test_the_published_plots_are_those_of_the_result_files() -> None:
    expected = plots.pictures(tables.load())
    published = [path for name in ("roofline", "scaling") for path in (ROOT / "docs").glob(f"{name}-*.svg")]
    assert set(published) == set(expected), "run `python -m benchmarks --readme`"
    for path, text in expected.items():
        assert path.read_text() == text, f"{path.name}: run `python -m benchmarks --readme`"


def command(*arguments: str, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=kept, text=True, timeout=120, check=False, **options
    )


@pytest.fixture(scope="module")
def quick_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    ran = command("-m", "benchmarks", "--quick", "--device", "cpu", "--threads", "1", "--out", str(out))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr == "", "progress is for terminals"
    assert ran.stdout.startswith("cross_entropy on ") or "\ncross_entropy on " in ran.stdout
    return out


def test_a_quick_run_writes_one_complete_result_file_per_operator(quick_results: Path) -> None:
    assert {path.name for path in quick_results.iterdir()} == {f"cpu-{name}.json" for name in tables.ORDER}
    for operator in tables.ORDER:
        result = json.loads((quick_results / f"cpu-{operator}.json").read_text())
        assert result["operator"] == operator
        assert result["environment"]["threads"] == 1
        assert all(roof["median"] > 0 for roof in result["environment"]["roofs"].values())
        assert result["seconds"] > 0
        assert {"wmengine", "numpy", "torch"} <= result["environment"]["versions"].keys()
        assert result["rows"]
        for row in result["rows"]:
            assert row["bytes"] > 0 or operator in ("training_step", "scan")
            assert row["rounds"] >= 3
            for timed in (row["ours"], row["floor"], *row["peers"]):
                assert 0 < timed["ms"]["p20"] <= timed["ms"]["median"] <= timed["ms"]["p80"]
            assert row["floor"]["ratio"]["median"] > 0
            scores = row["what"].startswith("scores beside inference")  # bounded in milliseconds: nobody else has them
            assert row["peers"] or scores, "a row without an opponent proves nothing"


def test_a_quick_run_is_kept_out_of_the_tables(quick_results: Path) -> None:
    with pytest.raises(ValueError, match="quick run"):
        tables.load(quick_results)


def test_bench_prints_one_json_object_and_tells_a_terminal_how_far_it_is(tmp_path: Path) -> None:
    near, far = pty.openpty()
    ran = command(
        "-m", "wmengine", "bench", "match_counts", "--quick", "--device=cpu", "--threads=1", "--json", stderr=far
    )
    os.close(far)
    shown = os.read(near, 1 << 16).decode()
    os.close(near)
    assert ran.returncode == 0, shown
    report = json.loads(ran.stdout)
    (result,) = report["results"]
    assert (result["operator"], result["quick"], result["environment"]["threads"]) == ("match_counts", True, 1)
    assert [path.name for path in Path(report["out"]).iterdir()] == ["cpu-match_counts.json"]
    shutil.rmtree(report["out"])
    assert f"/{len(result['rows'])}  match_counts: match_counts[32-10]" in shown
    assert shown.endswith("\r\x1b[K"), "the line is gone when everything is done"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("no_such_operator",), "unknown operator 'no_such_operator': known are sketch, "),
        (("--threads", "0"), "threads is 0: expected 1 or more"),
        (("--device", "tpu"), "--device is 'tpu'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_for_both_commands(arguments: Sequence[str], named: str) -> None:
    ran = command("-m", "wmengine", "bench", *arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"wmengine: {named}")
    assert ran.stderr.count("\n") == 1
    ran = command("-m", "benchmarks", *arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert named in ran.stderr


def test_without_a_checkout_bench_says_where_the_benchmarks_are(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "wmengine", tmp_path / "wmengine", ignore=shutil.ignore_patterns("__pycache__"))
    ran = command("-m", "wmengine", "bench", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("wmengine: the benchmarks are not part of the installed package: clone ")


def test_a_failing_benchmark_is_told_on_stderr_and_writes_no_result(tmp_path: Path) -> None:
    """In a copy whose benchmark of match_counts compares with a wrong answer."""
    for folder in ("wmengine", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    bench = tmp_path / "benchmarks" / "bench_match_counts.py"
    bench.write_text(bench.read_text().replace("outputs.argmax(axis=1)", "outputs.argmin(axis=1)"))
    ran = command("-m", "wmengine", "bench", "match_counts", "--quick", "--out", "out", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "np.array_equal(found[3], hits)" in ran.stderr
    assert ran.stderr.endswith("wmengine: a benchmark failed, as told above; its operator's results were not written\n")
    assert list((tmp_path / "out").iterdir()) == []
