"""The benchmarks' own promises: ratios survive a drifting machine, what is missing is said, tables come from files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import environment, harness, plots, publish, results
from benchmarks.harness import Aim, Contender
from wmengine.cli import main

ROOT = Path(__file__).resolve().parent.parent


class DriftingMachine:
    """A clock that only work moves, on a machine that gets slower with every call; and pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.now, self.slowness, self.disabled = 0.0, 1.0, False
        self.stats: Any = None

    def clock(self) -> float:
        return self.now

    def work(self, seconds: float) -> harness.Run:
        def run() -> None:
            self.now += seconds * self.slowness
            self.slowness *= 1.003

        return run

    def pedantic(self, target: harness.Run, teardown: harness.Run, rounds: int, iterations: int) -> None:
        seconds = []
        for _ in range(rounds):
            seconds.append(harness.sample(target, iterations, self.clock))
            teardown()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=seconds))


def a_row(**changes: Any) -> results.Row:
    machine = DriftingMachine()
    peers = [Contender("stored matrix", machine.work(0.05), holds=1_000_000_000)]
    floor = Contender("copy", machine.work(0.001))
    case = harness.Case(
        "sketch", "forward", "1 M weights", 4_000_000, machine.work(0.002), floor, headline=True, peers=peers
    )
    row = harness.compare(dataclasses.replace(case, **changes), machine, machine.clock, quick=False)
    assert row is not None
    return {**row, "others_cores": 0.0}


def a_result(*rows: results.Row, **described: Any) -> results.Result:
    versions = {"wmengine": "0.1.0", "torch": "2.13.0"}
    environment = {"slug": "cpu", "device": "Some CPU", "cores": 2, "threads": 2, "instruction_sets": ["avx2"]}
    environment = {**environment, "versions": versions, "commit": "abc1234", "date": "2030-01-01", **described}
    roofs = {"copy_gb_s": 40.0, "cache_gb_s": 160.0, "float32_gflop_s": 300.0}
    return {"operator": "sketch", "quick": False, "environment": environment, "roofs": roofs, "rows": list(rows)}


def test_ratios_are_taken_within_a_round_so_that_a_drifting_machine_does_not_move_them() -> None:
    row = a_row()
    assert row["ours"]["ms"]["p80"] > 1.5 * row["ours"]["ms"]["p20"], "the machine of this test must drift"
    assert row["floor"]["ratio"]["median"] == pytest.approx(2.0, rel=0.06)
    assert row["peers"][0]["ratio"]["median"] == pytest.approx(25.0, rel=0.06)


def test_aims_are_judged_by_the_measured_ratio() -> None:
    floor, peer, missing = a_row(aims=[Aim("copy", 3.0), Aim("stored matrix", 100.0), Aim("faiss", 1.0)])["aims"]
    assert (floor["aim"], floor["met"]) == ("≤ 3 × copy", True)
    assert (peer["aim"], peer["met"]) == ("≥ 100 × stored matrix", False)
    assert peer["reached"] == pytest.approx(25.0, rel=0.06)
    assert (missing["reached"], missing["met"]) == (None, False)


def test_on_a_gpu_large_cases_and_whole_steps_are_bound_and_no_compiler_is_to_be_faster() -> None:
    peers = [Contender(name, lambda: None) for name in ("stored matrix, torch.compile", "Liger-Kernel", "NumPy")]

    def aims(count: int, bound: float | None) -> list[Aim]:
        floor = Contender("copy", lambda: None)
        return harness.aims_on_a_gpu(
            harness.Case("sketch", "sketch", "1 M weights", count, lambda: None, floor, peers, gpu_bound=bound)
        )

    rivals = [Aim("stored matrix, torch.compile", 1.0), Aim("Liger-Kernel", 1.0)]
    assert aims(64_000_000, 1.25) == [Aim("copy", 1.25), *rivals]
    assert aims(64_000_000, None) == rivals
    assert aims(63_999_999, 1.25) == []  # launches and caches are what is measured there
    assert aims(0, 1.03) == [Aim("copy", 1.03)]


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md", "docs/design.md"])
def test_what_no_gpu_has_measured_is_said_until_one_has(document: str) -> None:
    measured = any("cuda" in result["environment"] for result in results.load())
    assert ("not yet measured" in (ROOT / document).read_text()) != measured


def test_a_compiler_that_fails_is_left_out_with_its_reason_and_any_other_failure_is_raised() -> None:
    def broken() -> None:
        raise RuntimeError("no C++ compiler\nlong story")

    row = a_row(peers=[Contender("torch.compile", broken, may_fail=True)])
    assert (row["peers"], row["left_out"]) == ([], {"torch.compile": "failed: RuntimeError: no C++ compiler"})
    with pytest.raises(RuntimeError, match="no C"):
        a_row(peers=[Contender("NumPy", broken)])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel keeps its high-water mark")
def test_the_memory_of_a_call_is_what_it_touches_and_not_what_was_there_before() -> None:
    held = torch.ones(1 << 24, requires_grad=True)
    held.grad = torch.ones(1 << 24)
    size = 4 << 24
    # What else the interpreter touches meanwhile is a few hundred kB.
    assert environment.peak_memory(lambda: None, "cpu") < size / 20
    assert environment.peak_memory(lambda: torch.exp(held.detach()) + 1, "cpu") == pytest.approx(2 * size, rel=0.1)
    assert held in set(environment.leaves())
    gradient = environment.peak_memory(lambda: harness.differentiate([held], held.sum()), "cpu", [held])
    assert gradient == pytest.approx(size, rel=0.1)


def test_tables_are_a_pure_function_of_result_files(tmp_path: Path) -> None:
    row = a_row(aims=[Aim("copy", 1.5)], operations=8_000_000, left_out={"Liger-Kernel": "needs a GPU"})
    other = {**row, "size": "another size", "headline": False, "peers": [], "left_out": {"stored matrix": "17 GB"}}
    given = a_result(row, other)
    results.write(tmp_path, "sketch", False, given["environment"], given["roofs"], given["rows"])
    loaded = results.load(tmp_path)
    readme, full = publish.readme(loaded), publish.performance(loaded)
    ratio = f"{row['floor']['ratio']['median']:.2f}"
    assert f"| {ratio} × copy |" in readme
    assert "× stored matrix (1.00 GB) |" in readme
    assert "another size" not in readme
    assert "**CPU: Some CPU (AVX2), 2 threads on 2 cores**; wmengine 0.1.0, torch 2.13.0." in readme
    assert "40 GB/s copied from memory, 160 from cache, 300 GFLOP/s in a float32 matrix product" in full
    milliseconds = row["ours"]["ms"]["median"]
    gigabytes, operations = 4 / milliseconds, 8 / milliseconds
    assert f"| {gigabytes:.2f} ({gigabytes / 0.4:.2f} %) | {operations:.2f} ({operations / 3:.2f} %) |" in full
    assert f"Aims: 1 M weights: ≤ 1.5 × copy ({ratio}, **missed**)" in full
    assert "Left out: Liger-Kernel at 1 M weights (needs a GPU); stored matrix at another size (17 GB)." in full
    assert next(line for line in full.splitlines() if "another size" in line).endswith("| – |")
    for text in (readme, full):
        assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_each_machine_has_its_own_tables_and_the_readme_none_of_one_that_was_held_back() -> None:
    gpu = a_result(a_row(), slug="some-gpu", device="Some GPU", cuda="13.0")
    every = [a_result(a_row()), a_result(a_row(), slug="cpu-avx2"), gpu]
    machines = [line.split("**")[1] for line in publish.performance(every).splitlines() if line.startswith("**")]
    threads = "2 threads on 2 cores"
    first, held, last = (
        f"CPU: Some CPU (AVX2), {threads}",
        f"CPU: Some CPU (held to AVX2), {threads}",
        "GPU: Some GPU, CUDA 13.0",
    )
    assert machines == [first, held, last]
    readme = publish.readme(every)
    assert [name in readme for name in machines] == [True, False, True]


def test_a_machine_without_a_headline_has_tables_and_no_pictures() -> None:
    single = [a_result(a_row(headline=False), threads=1)]
    text = publish.performance(single)
    assert "**CPU: Some CPU (AVX2), 1 thread on 2 cores**" in text
    assert "![" not in text
    assert publish.readme(single) == publish.NOTHING


def test_rows_measured_beside_other_work_are_marked() -> None:
    for table in (publish.readme, publish.performance):
        assert "†" not in table([a_result(a_row())])
        text = table([a_result({**a_row(size="disturbed"), "others_cores": 0.8})])
        assert "| disturbed † |" in text
        assert "† Other processes used up to 0.8 cores" in text


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md"])
def test_the_published_numbers_are_those_of_the_result_files(document: str) -> None:
    expected = publish.documents(results.load())[ROOT / document]
    assert (ROOT / document).read_text() == expected, "run `python -m benchmarks.publish`"


def test_the_published_pictures_are_of_the_result_files_and_small() -> None:
    every = results.load()
    for slug in {result["environment"]["slug"] for result in every}:
        measured = [result for result in every if result["environment"]["slug"] == slug]
        for path in (ROOT / "docs" / name for name in plots.drawn(measured)):
            assert Image.open(path).info["Source"] == plots.digest(measured), "run `python -m benchmarks.publish`"
            assert path.stat().st_size < 80_000


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=kept, text=True, timeout=120, check=False, capture_output=True
    )


@pytest.mark.slow
def test_a_quick_run_measures_every_operator_and_is_kept_out_of_the_tables(tmp_path: Path) -> None:
    ran = command("-m", "benchmarks", "--quick", "--device=cpu", "--threads=1", "--json", f"--out={tmp_path}")
    assert (ran.returncode, ran.stderr) == (0, ""), "progress is for terminals"
    assert {path.name for path in tmp_path.iterdir()} == {f"cpu-{name}.json" for name in results.ORDER}
    for result in json.loads(ran.stdout)["results"]:
        assert result["environment"]["threads"] == 1
        assert {"wmengine", "numpy", "torch"} <= result["environment"]["versions"].keys()
        assert result["rows"]
        for row in result["rows"]:
            assert row["peers"], "a row without an opponent proves nothing"
            for timed in (row["ours"], row["floor"], *row["peers"]):
                assert 0 < timed["ms"]["p20"] <= timed["ms"]["median"] <= timed["ms"]["p80"]
    with pytest.raises(ValueError, match="quick run"):
        results.load(tmp_path)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("no_such_operator", "unknown operator 'no_such_operator': known are sketch, "),
        ("--device=tpu", "--device is 'tpu'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argument: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", argument]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith(f"wmengine: {named}")


def test_without_a_checkout_bench_says_where_the_benchmarks_are(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "wmengine", tmp_path / "wmengine", ignore=shutil.ignore_patterns("__pycache__"))
    ran = command("-m", "wmengine", "bench", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("wmengine: the benchmarks are not part of the installed package: clone ")


@pytest.mark.slow
def test_an_operator_with_a_failed_case_gets_no_result_and_those_before_it_keep_theirs(tmp_path: Path) -> None:
    for folder in ("wmengine", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    with (tmp_path / "benchmarks" / "bench_match_counts.py").open("a") as bench:
        bench.write("\n\ndef test_wrong(compare):\n    assert 1 == 2, 'a wrong answer'\n")
    ran = command("-m", "wmengine", "bench", "sketch", "match_counts", "--quick", "--out", "out", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "a wrong answer" in ran.stderr
    assert ran.stderr.endswith("wmengine: a benchmark failed, as told above; its operator's results were not written\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cpu-sketch.json"]
