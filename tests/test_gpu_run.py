"""The one command for a GPU machine, here where there may be none: its steps, their limits, and what it reports."""

import sys

import pytest

pytest.importorskip("pybind11", reason="pybind11 is not installed")

from benchmarks import gpu, results


def step(name, code, limit_s=30, **settings):
    return gpu.Step(name, [sys.executable, "-c", code], limit_s, **settings)


def test_a_failing_step_does_not_stop_the_others(tmp_path):
    stages = [
        [step("first", "print('working'); raise SystemExit(3)"), step("beside", "print('a'); print('b')")],
        [step("absent", "", left_out="no GPU"), gpu.Step("nowhere", ["/no/such/program"], 5)],
        [step("last", "import os; print(os.environ['SETTING'])", environment={"SETTING": "given"})],
    ]
    outcomes = {outcome.name: outcome for outcome in gpu.run(stages, tmp_path, 60)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "first": "failed: exit status 3",
        "beside": "passed",
        "absent": "left out: no GPU",
        "nowhere": "failed: exit status 127",
        "last": "passed",
    }
    assert [outcomes[name].last_line for name in ("first", "beside", "last")] == ["working", "b", "given"]
    assert (tmp_path / "logs" / "beside.log").read_text() == "a\nb\n"
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in summary] == ["first", "beside", "absent", "nowhere", "last"]


def test_a_step_over_its_limit_is_interrupted_may_still_write_and_leaves_nobody_time(tmp_path):
    waits = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('wrote what there was')"
    slow, late = gpu.run([[step("slow", waits)], [step("next", "")]], tmp_path, 2)
    assert (slow.status, slow.last_line) == ("failed: over its time", "wrote what there was")
    assert late.status == "failed: no time was left"


def test_a_dry_run_prints_every_command_and_runs_none(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "card", lambda: "90")
    monkeypatch.setattr(gpu, "tool", lambda name: f"/cuda/bin/{name}")
    assert gpu.main([str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in printed
    for name in gpu.TESTS:
        assert f"tests/{name}.py" in printed
        assert (gpu.ROOT / "tests" / f"{name}.py").is_file()
    assert (gpu.ROOT / "tests" / "test_gpu.py").read_text().count(gpu.LARGE) >= 5
    for name in gpu.SANITIZERS:
        assert f"/cuda/bin/compute-sanitizer --tool {name} " in printed
    assert set(gpu.OPERATORS) < set(results.ORDER)
    for name in gpu.OPERATORS:
        assert (f"--device cuda benchmarks/bench_{name}.py" in printed) == (name != "scan")
        assert f"-m benchmarks --device cuda --out {tmp_path / 'out' / 'results'} {name}" in printed
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "card", lambda: None)
    assert gpu.main([str(tmp_path), "--only", "check", "--only", "measure", "sketch"]) == 2
    printed = capsys.readouterr().out
    assert "there is no GPU here" in printed
    steps = len(gpu.TESTS) + 2 + len(gpu.SANITIZERS) + len(gpu.OPERATORS) - 1 + 1
    assert printed.count("left out: no GPU") == steps


def test_a_failure_shows_in_the_exit_status(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "card", lambda: "90")
    for code, expected in (("raise SystemExit(1)", 1), ("", 0)):
        monkeypatch.setattr(gpu, "check_steps", lambda gpu, code=code: [[step("check", code)]])
        assert gpu.main([str(tmp_path), "--only", "check"]) == expected


def test_an_unknown_operator_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "skech"])
