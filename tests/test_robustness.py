"""The robustness table's promises: rows outlive what ends a run, networks are trained once, a row says all."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_task import STRANGER, UNTOUCHED, WORSE, WORSE_TWICE, Counted, a_row, every, fill

from benchmarks.robustness import cells, grid, rules, runner
from benchmarks.robustness.grid import MARKED, Cell, Line, Step
from benchmarks.robustness.problems import DIGITS, PROBLEMS
from wmengine.attacks import Attack, catalogue
from wmengine.cli import main
from wmengine.demo import Data, train


def test_each_network_is_trained_once_and_what_attacks_share_is_done_once(counted: Counted, tmp_path: Path) -> None:
    problem = counted.problem()
    assert fill(problem, tmp_path) == []
    assert sorted(counted.trained) == [1, 1, 2, 2, 1001], "per seed the marked network and its twin, and one stranger"
    assert counted.attacked == 4, "the first of two steps serves two lines"
    assert fill(problem, tmp_path, again=True) == []
    assert len(counted.trained) == 5, "networks are kept beside the rows"
    assert counted.attacked == 8


def test_a_finished_network_is_tuned_beside_one_without_the_mark_and_copied_by_the_owners_recipe(
    counted: Counted, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(192) % 2
    rows = (labels[:, None, None, None] + torch.rand(192, 1, 4, 4, generator=generator)) / 2
    data = Data(*((rows[start : start + 64], labels[start : start + 64]) for start in (0, 64, 128)))
    problem = counted.problem(
        load=lambda _: data,
        presets=("response",),
        mark_options={"response": {"bits": 256, "probes": 256}},
        tuned={"response": 2},
    )
    copied = Line("copied", (Step("worse", recipe=True),))
    served = Line("service", base=grid.SERVED)
    assert fill(problem, tmp_path, UNTOUCHED, copied, served) == []
    # A twin, its two students, the marked network, the same without a mark, and the copy: for each of two seeds.
    assert len(counted.trained) == 12
    found = {(row.attack, row.preset): row for row in cells.read(tmp_path, "tiny").values() if row.seed == 1}
    assert found["untouched", "response"].log10_p_labels_soft is not None
    assert found["copied", "response"].loss is not None
    assert found["service", "response"].loss == 0.0, "no decision is turned"
    names = sorted(file.name[:16] for file in (tmp_path / "tiny" / "networks").glob("*1*.pt"))
    assert [name.partition(".")[0].rpartition("-")[0] or name for name in names][:2] == ["none-1", "none-1-other"]


def test_samples_that_are_set_apart_are_not_trained_on(counted: Counted, tmp_path: Path) -> None:
    problem = counted.problem(presets=("adi",), apart={"adi": 5})
    assert grid.recipe_of(problem, "adi") != grid.recipe_of(counted.problem(), "adi")
    assert fill(problem, tmp_path, UNTOUCHED) == []
    assert counted.rows == [20, 15, 20, 15]  # the unmarked twin's, the marked network's, of each seed


def test_a_run_that_is_interrupted_goes_on_with_the_cells_that_are_missing(
    counted: Counted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem, counted.stop_at = counted.problem(), 3
    with pytest.raises(KeyboardInterrupt):
        fill(problem, tmp_path)
    before = cells.read(tmp_path, "tiny")
    assert 0 < len(before) < len(every(problem))
    (tmp_path / "tiny" / "0123.parquet.ab.partial").write_bytes(b"half a row")
    capsys.readouterr()
    assert fill(problem, tmp_path) == []
    left = len(every(problem)) - len(before)
    assert f"{left}/{left}, 0 min left: tiny, adi, seed 2, stranger 1" in capsys.readouterr().err
    after = cells.read(tmp_path, "tiny")
    assert set(after) == {cell.key for cell in every(problem)}
    assert {key: after[key] for key in before} == before


def test_a_cell_that_fails_is_said_and_stops_no_other(counted: Counted, tmp_path: Path) -> None:
    problem = counted.problem()
    broken = Line("broken", (Step("worse", {"sigma": -1.0}),))
    (failed,) = runner.fill(problem, problem.load(None), every(problem, broken, UNTOUCHED, seeds=(1,)), tmp_path)
    assert failed.startswith("tiny, adi, seed 1, broken: ")
    assert {row.attack for row in cells.read(tmp_path, "tiny").values()} == {"untouched"}


def test_half_precision_is_for_attacks_and_caches_no_weight_that_is_being_trained(
    counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def trains(model: torch.nn.Module, data: Any, random: Any) -> torch.nn.Module:
        inputs, _ = counted.data().thief
        before = model(inputs)
        with torch.no_grad():
            model[1].weight.mul_(-1.0)
        seen.append((before.dtype, bool((before != model(inputs)).any())))
        return model

    monkeypatch.setattr(catalogue, "ATTACKS", {"trains": Attack("trains", "stand-in", trains, "module")})
    assert fill(counted.problem(half=True), tmp_path, Line("trains", (Step("trains"),))) == []
    assert set(seen) == {(torch.bfloat16, True)}


def test_a_row_says_all_that_was_measured(counted: Counted, tmp_path: Path) -> None:
    problem = counted.problem()
    fill(problem, tmp_path)
    rows = {(row.preset, row.seed, row.attack): row for row in cells.read(tmp_path, "tiny").values()}
    twin, marked, worse = rows["none", 1, "untouched"], rows["adi", 1, "untouched"], rows["adi", 1, "worse twice"]
    assert twin.log10_p is None
    assert twin.loss is None
    assert marked.loss == pytest.approx(100 * (twin.accuracy - marked.accuracy)), "what the mark costs"
    assert worse.loss == pytest.approx(100 * (marked.accuracy - worse.accuracy)), "what the attack costs"
    assert worse.accuracy_low < worse.accuracy < worse.accuracy_high or worse.accuracy in (0.0, 1.0)
    assert worse.loss_low < worse.loss < worse.loss_high
    assert (worse.total, worse.chance, worse.decision, worse.tested) == (8, 0.5, "not_proven", 20)
    assert worse.log10_p == pytest.approx(min(0.0, min(worse.log10_p_matches, worse.log10_p_soft) + np.log10(2)))
    assert worse.log10_p_labels_soft <= 0.0
    assert [step["options"] for step in json.loads(worse.steps)] == [{"sigma": 1.0}, {"sigma": 2.0}]
    assert {"torch", "onnxruntime"} <= json.loads(worse.versions).keys()
    assert worse.network_commit == worse.commit
    assert rows["adi", 1, "stranger 1"].base == "stranger 1"


def test_rows_come_back_as_they_were_written_and_the_newest_of_a_key_counts(tmp_path: Path) -> None:
    row = a_row(Cell(DIGITS, "adi", 1, UNTOUCHED))
    other = dataclasses.replace(row, key="other", log10_p=None, loss=None, decision=None)
    for each in (row, other):
        cells.write(tmp_path, each)
    assert cells.read(tmp_path, "digits") == {row.key: row, "other": other}
    cells.gather(tmp_path, "digits")
    assert not list((tmp_path / "digits").glob("*"))
    newer = dataclasses.replace(row, seconds=9.0)
    cells.write(tmp_path, newer)
    assert cells.read(tmp_path, "digits") == {row.key: newer, "other": other}
    assert sorted(cells.gather(tmp_path, "digits"), key=lambda each: each.key != "other") == [other, newer]


def test_another_recipe_or_option_is_another_cell(counted: Counted) -> None:
    problem = counted.problem()
    cell = Cell(problem, "adi", 1, WORSE)
    assert cell.key == Cell(problem, "adi", 1, Line("other words", (Step("worse", {"sigma": 1.0}),))).key
    others = [
        dataclasses.replace(cell, problem=counted.problem(recipe="more steps")),
        dataclasses.replace(cell, problem=counted.problem(attack_options={"worse": {"sigma": 0.5}})),
        dataclasses.replace(cell, problem=counted.problem(mark_options={"adi": {"count": 9}})),
        *(dataclasses.replace(cell, line=line) for line in (UNTOUCHED, WORSE_TWICE, STRANGER)),
        dataclasses.replace(cell, preset="sketch"),
        dataclasses.replace(cell, seed=2),
    ]
    assert len({each.key for each in (cell, *others)}) == 1 + len(others)


KILLED = """
import os, signal, sys, tests.tiny_task as t
from pathlib import Path
from wmengine.attacks import Attack, catalogue
counted = t.Counted()
def worse(model, data, random, sigma):
    counted.attacked += 1
    if counted.attacked == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return model
catalogue.ATTACKS = {"worse": Attack("worse", "", worse, "module", needs="labels", defaults={"sigma": 1.0})}
t.fill(counted.problem(), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_kill_9_loses_no_row_that_was_measured(counted: Counted, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == -signal.SIGKILL
    before = cells.read(tmp_path, "tiny")
    assert len(before) == 7
    problem = counted.problem()
    assert fill(problem, tmp_path) == []
    assert cells.read(tmp_path, "tiny").items() >= before.items()
    assert counted.trained == [], "what was trained before the kill was kept"


@pytest.mark.slow
def test_attacks_of_the_page_are_measured_on_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few_epochs(model: Any, rows: Any, seed: int, embedder: Any = None, tuned: int | None = None) -> torch.nn.Module:
        return train(model, rows, 12, seed, embedder)

    monkeypatch.setitem(PROBLEMS, "digits", dataclasses.replace(DIGITS, recipe="12 epochs", train=few_epochs))
    asked = ["--problem", "digits", "--presets", "adi", "--seeds", "1", "--out", str(tmp_path)]
    lines = [
        "untouched",
        "ftal",
        "prune 50%",
        "fp16",
        "rename",
        "extract",
        "extract then wrk",
        "stranger 1",
        "stranger 2",
    ]
    assert main(["bench", "robustness", *asked, "--attacks", ",".join(lines)]) == 0
    rows = {row.attack: row for row in cells.read(tmp_path, "digits").values() if row.preset == "adi"}
    assert rows.keys() == set(lines)
    for attack in ("untouched", "ftal", "prune 50%", "fp16", "rename"):
        assert rules.outcome(rows[attack]) == "proven"
    for attack in ("extract", "extract then wrk", "stranger 1", "stranger 2"):
        assert rows[attack].log10_p > rules.PROVEN
    threshold = rules.sok_threshold(row for row in rows.values() if row.base != MARKED)
    assert rules.sok_success(rows["extract"], threshold)
    assert rows["extract then wrk"].seconds > rows["extract"].seconds
