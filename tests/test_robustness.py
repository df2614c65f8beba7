"""The robustness table's promises: rows outlive what ends a run, networks are trained once, tables come from rows."""

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
from PIL import Image

from benchmarks import results
from benchmarks.robustness import cells, command, grid, rules, runner, tables
from benchmarks.robustness.cells import Row
from benchmarks.robustness.grid import LINES, MARKED, TWIN_LINE, Cell, Line, Step
from benchmarks.robustness.problems import DIGITS, PROBLEMS, Problem
from wmengine.attacks import ATTACKS, Attack, catalogue
from wmengine.cli import main
from wmengine.demo import Data, train

UNTOUCHED = Line("untouched")
WORSE, WORSE_TWICE = (
    Line("worse", (Step("worse"),)),
    Line("worse twice", (Step("worse"), Step("worse", {"sigma": 2.0}))),
)
STRANGER = Line("stranger 1", base="stranger 1")


class Counted:
    """The tiny task: two clouds of points on 4 × 4 pixels; how often its networks were trained and attacked."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.rows: list[int] = []
        self.attacked = 0
        self.stop_at: int | None = None

    def problem(self, **changes: Any) -> Problem:
        tiny = dataclasses.replace(
            DIGITS,
            name="tiny",
            recipe="a few steps",
            load=lambda _: self.data(),
            build=self.build,
            other=self.build,
            train=self.train,
            elsewhere=lambda: torch.rand(20, 1, 4, 4),
            presets=("adi",),
            classes=2,
            mark_options={"adi": {"count": 8}},
            planned={},
        )
        return dataclasses.replace(tiny, **changes)

    def data(self) -> Data:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(40) % 2
        inputs = (labels[:, None, None, None] + torch.rand(40, 1, 4, 4, generator=generator)) / 2
        return Data(*((inputs[start : start + 20], labels[start : start + 20]) for start in (0, 20, 10)))

    def build(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def train(
        self, model: Any, rows: Any, seed: int, embedder: Any = None, tuned: int | None = None
    ) -> torch.nn.Module:
        self.trained.append(seed)
        self.rows.append(len(rows[1]))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(tuned or 3):
            inputs, labels = rows if embedder is None else embedder.mix(*rows)
            logits = model(inputs)
            if embedder is None:
                loss = torch.nn.functional.cross_entropy(logits, labels)
            else:
                loss = embedder.loss(logits, labels, inputs=inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()

    def worse(self, model: Any, data: Any, random: np.random.Generator, sigma: float) -> torch.nn.Module:
        self.attacked += 1
        if sigma < 0.0:
            raise ValueError("sigma must be a number from 0")
        if self.attacked == self.stop_at:
            raise KeyboardInterrupt
        with torch.no_grad():
            for weight in model.parameters():
                weight += sigma * torch.from_numpy(random.normal(size=weight.shape)).float()
        return model


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted()
    worse = Attack("worse", "stand-in", found.worse, "module", needs="labels", defaults={"sigma": 1.0})
    monkeypatch.setattr(catalogue, "ATTACKS", {"worse": worse})
    return found


def every(problem: Problem, *lines: Line, seeds: tuple[int, ...] = (1, 2)) -> list[Cell]:
    return grid.cells_of(problem, problem.presets, seeds, lines or (UNTOUCHED, WORSE, WORSE_TWICE, STRANGER))


def fill(problem: Problem, out: Path, *lines: Line, **options: Any) -> list[str]:
    return runner.fill(problem, problem.load(None), every(problem, *lines), out, **options)


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


def a_row(cell: Cell, **changes: Any) -> Row:
    row = Row(
        key=cell.key,
        problem=cell.problem.name,
        recipe=cell.problem.recipe,
        preset=cell.preset,
        seed=cell.seed,
        attack=cell.line.label,
        base=cell.line.base,
        steps=grid.as_json(cell.steps),
        **{"accuracy": 0.98, "accuracy_low": 0.96, "accuracy_high": 0.99, "tested": 600},
        **{"loss": 0.5, "loss_low": -0.2, "loss_high": 1.3, "matched": 60, "total": 100, "chance": 0.1},
        **{"log10_p": -30.0, "log10_p_matches": -30.3, "log10_p_soft": -29.0, "log10_p_labels_soft": -28.0},
        **{"decision": "owned", "seconds": 1.0, "versions": '{"torch": "2.13.0"}', "commit": "abc1234"},
        **{"device": "Some CPU", "threads": 1, "date": "2030-01-01"},
    )
    return dataclasses.replace(row, **changes)


def test_a_mark_is_proven_or_removed_or_the_attack_failed_anyway() -> None:
    cell = Cell(DIGITS, "adi", 1, UNTOUCHED)
    assert rules.outcome(a_row(cell, log10_p=-9.01, loss=40.0)) == "proven"
    assert rules.outcome(a_row(cell, log10_p=-9.0, loss=5.01)) == "failed anyway"
    assert rules.outcome(a_row(cell, log10_p=-9.0, loss=5.0)) == "removed"
    with pytest.raises(ValueError, match="no mark"):
        rules.outcome(a_row(cell, log10_p=None))


def test_soks_rule_fits_a_normal_law_to_models_without_the_mark() -> None:
    cell = Cell(DIGITS, "adi", 1, UNTOUCHED)
    nulls = [a_row(cell, matched=matched) for matched in (8, 10, 12)]
    threshold = rules.sok_threshold(nulls)
    assert threshold == pytest.approx(0.10 + 1.6449 * 0.02, abs=1e-5)
    assert rules.sok_threshold(nulls[:1]) is None
    assert rules.sok_success(a_row(cell, matched=13, loss=4.9), threshold)
    assert not rules.sok_success(a_row(cell, matched=14, loss=4.9), threshold), "the mark is still there"
    assert not rules.sok_success(a_row(cell, matched=13, loss=5.0), threshold), "the copy is worth nothing"
    assert rules.share(a_row(cell, matched=0, total=0)) == 0.0, "nothing to read the mark from"


def a_table(counted: Counted, **changes: Any) -> list[list[str]]:
    problem = counted.problem(presets=("adi", "sketch"))
    found = {}
    for seed, p in zip((1, 2, 3), (-30.0, -7.25, -8.0), strict=True):
        cell = Cell(problem, "adi", seed, WORSE)
        found[cell.key] = a_row(cell, **{"log10_p": p, **changes})
        for line in (STRANGER, Line("stranger 2", base="stranger 2")):
            null = Cell(problem, "adi", seed, line)
            found[null.key] = a_row(null, matched=10 + seed, log10_p=-0.25 * seed)
    missing = Cell(problem, "sketch", 3, WORSE)
    found[missing.key] = a_row(missing, log10_p=0.0)
    lines = (UNTOUCHED, WORSE, STRANGER, Line("stranger 2", base="stranger 2"))
    text = tables.table(problem, problem.presets, found, lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_table_shows_every_seed_the_worst_marked_and_what_is_missing(counted: Counted) -> None:
    head, _, untouched, worse, strangers = a_table(counted)
    assert head == ["attack", "adi", "sketch"]
    assert untouched == ["untouched", "not run", "not run"]
    assert worse[1] == "-30.0 **-7.2** -8.0 ✗<br>loss 0.5, SoK 3/3"
    assert worse[2] == "not run not run **0.0** ✗<br>loss 0.5, SoK not run"
    assert strangers == ["models without the mark", "least of 6: -0.8", "not run"]


def test_the_heading_names_every_commit_and_version_that_its_rows_come_from() -> None:
    rows = [
        a_row(Cell(DIGITS, "adi", 1, LINES[0]), network_commit="older00"),
        a_row(Cell(DIGITS, "adi", 2, LINES[0]), commit="newer00", versions='{"torch": "2.14.0"}', date="2030-02-01"),
    ]
    said = tables.heading(DIGITS, {row.key: row for row in rows})
    assert "torch 2.13.0 and 2.14.0; commit abc1234, newer00, older00." in said


def test_a_step_with_a_mark_is_shown_over_a_plain_one_where_it_was_measured() -> None:
    measured = {"what": results.step_name("adi"), "peers": [{"ratio": {"median": 0.8}}]}
    on_cpu = {"environment": {"slug": "cpu"}, "rows": [{**measured, "what": "another"}, measured]}
    steps = tables.steps_over_plain([on_cpu], ("adi", "sketch"))
    assert steps == {"adi": 1.25}
    assert tables.steps_over_plain([{**on_cpu, "environment": {"slug": "some-gpu"}}], ("adi",)) == {}
    row = a_row(Cell(DIGITS, "adi", 1, LINES[0]))
    shown = {
        line.split("|")[1].strip(): line for line in tables.heading(DIGITS, {row.key: row}, steps).splitlines()[2:]
    }
    assert shown["network"].endswith("| step over plain |")
    assert shown["adi"].endswith("| 1.25 |")
    assert shown["sketch"].endswith("| not run |")
    assert shown["without a mark"].endswith("|  |")
    assert "step over plain" not in tables.heading(DIGITS, {row.key: row})


def test_a_cell_whose_copies_are_worth_nothing_is_set_apart(counted: Counted) -> None:
    assert a_table(counted, loss=5.01)[3][1] == "-30.0 **-7.2** -8.0 †<br>loss 5.0, SoK 3/3"
    assert a_table(counted, loss=4.99)[3][1] == "-30.0 **-7.2** -8.0 ✗<br>loss 5.0, SoK 3/3"


def test_the_table_of_statistics_reads_answers_as_scores_and_as_labels(counted: Counted) -> None:
    problem = counted.problem()
    rows = [a_row(Cell(problem, "adi", seed, UNTOUCHED)) for seed in (1, 2, 3)]
    text = tables.statistics_table({row.key: row for row in rows}, problem, [UNTOUCHED, WORSE])
    lines = text.splitlines()
    assert "| untouched | sketch, weights | not run | not run | not run | not run |" in lines
    scores = "-30.3 -30.3 -30.3 | -29.0 -29.0 -29.0 | -30.0 -30.0 -30.0"
    assert f"| untouched | adi, scores | 60 60 60 of 100 | {scores} |" in lines
    assert f"| untouched | adi, labels | 60 60 60 of 100 | {scores.replace('29', '28')} |" in lines
    assert not any("worse" in line for line in lines)


def test_the_picture_is_1200_pixels_wide_and_holds_what_it_was_drawn_from(counted: Counted, tmp_path: Path) -> None:
    problem = counted.problem()
    row = a_row(Cell(problem, "adi", 1, WORSE), loss=9.0)
    (tmp_path / "picture.png").write_bytes(tables.picture(problem, problem.presets, {row.key: row}, [UNTOUCHED, WORSE]))
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width == 1200
        assert picture.info["Source"] == tables.source_of({row.key: row})


def test_published_pages_and_pictures_are_those_of_the_rows() -> None:
    found = {name: cells.read(tables.OUT, name) for name in PROBLEMS}
    for name, text in tables.published(found).items():
        assert f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->" in tables.PAGES[name].read_text(encoding="utf-8")
    for name, problem in PROBLEMS.items():
        for group in tables.groups_of(problem):
            picture = tables.picture_of(problem, group)
            assert picture.exists() == bool(found[name])
            if found[name]:
                with Image.open(picture) as drawn:
                    assert drawn.info["Source"] == tables.source_of(found[name])


def test_a_preset_has_the_lines_that_are_planned_for_it_and_a_line_that_nobody_has_is_not_shown(
    counted: Counted,
) -> None:
    problem = counted.problem(presets=("adi", "sketch"), planned={"sketch": ("untouched",), "adi": ("unt*", "worse")})
    cells_of_seed = [cell for cell in every(problem, seeds=(1,)) if cell.preset != "none"]
    assert [(cell.preset, cell.line.label) for cell in cells_of_seed] == [
        ("adi", "untouched"),
        ("adi", "worse"),
        ("sketch", "untouched"),
    ]
    rows = tables.table(problem, problem.presets, {}, (UNTOUCHED, WORSE, WORSE_TWICE)).splitlines()[2:]
    assert rows == ["| untouched | not run | not run |", "| worse | not run |  |"]


def test_many_presets_have_a_table_for_each_place_where_a_mark_may_lie(counted: Counted) -> None:
    assert tables.groups_of(counted.problem(presets=("adi", "sketch"))) == {"": ("adi", "sketch")}
    groups = tables.groups_of(DIGITS)
    assert set(groups) == {"white-box", "black-box"}
    assert sorted(preset for presets in groups.values() for preset in presets) == sorted(DIGITS.presets)


def test_every_line_is_of_an_attack_and_of_options_that_there_are() -> None:
    asked = command.wanted()
    assert {step.attack for line in LINES for step in line.steps} <= ATTACKS.keys()
    keys = [cell.key for every in asked.values() for cell in every]
    assert len(set(keys)) == len(keys), "two lines measure the same"
    labels = [line.label for line in (*LINES, TWIN_LINE)]
    assert len(set(labels)) == len(LINES)
    assert not any("," in label for label in labels), "--attacks separates its names by commas"


def test_lines_are_chosen_by_label_or_by_a_pattern() -> None:
    assert [line.label for line in grid.chosen(["ftal", "noise 1*"])] == ["ftal", "noise 1/700", "noise 1"]
    assert grid.chosen(None) == [*LINES, *grid.SERVED_LINES]
    with pytest.raises(ValueError, match=r"'prune\*' is all that begin so"):
        grid.chosen(["prune"])


def test_the_command_lists_cells_and_names_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = a_row(Cell(DIGITS, "adi", 2, LINES[0]))
    cells.write(tmp_path, row)
    arguments = ["bench", "robustness", "--problem", "digits", "--presets", "adi", "--out", str(tmp_path)]
    assert main([*arguments, "--attacks", "untouched", "--list"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["digits:", "6", "cells,", "5", "missing"],
        ["none", "untouched", "(1)", "(2)", "(3)"],
        ["adi", "untouched", "(1)", "2", "(3)"],
    ]
    for wrong, said in {
        ("--problem", "mnist"): "no problem 'mnist'",
        ("--presets", "none"): "no preset 'none'",
        ("--attacks", "magic"): "no line 'magic'",
        ("--seeds", "1,x"): "whole numbers",
        ("--seeds", "1001"): "under 1000",
        ("--problem", "cifar10", "--data", str(tmp_path)): "has none of them",
    }.items():
        assert main(["bench", "robustness", "--out", str(tmp_path), *wrong]) == 2
        assert said in capsys.readouterr().err


KILLED = """
import os, signal, sys, tests.test_robustness as t, wmengine.attacks.catalogue as catalogue
from pathlib import Path
counted = t.Counted()
def worse(model, data, random, sigma):
    counted.attacked += 1
    if counted.attacked == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return model
catalogue.ATTACKS = {"worse": t.Attack("worse", "", worse, "module", needs="labels", defaults={"sigma": 1.0})}
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
