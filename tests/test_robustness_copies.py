"""How the robustness table's thieves copy: whom they ask, what they write down, how much they have of their own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_task import UNTOUCHED, Counted, every, fill

from benchmarks.robustness import cells, grid, questions
from benchmarks.robustness.asking import answered, versions_of
from benchmarks.robustness.grid import Line, Step
from benchmarks.robustness.problems import CIFAR10, DIGITS, PROBLEMS
from benchmarks.robustness.readings import READ
from wmengine.attacks import Attack, catalogue
from wmengine.attacks.page import PAGE
from wmengine.demo import Data

COPY = Step("worse", recipe=True)


def likely(*classes: float) -> Any:
    """A network that answers the same to everything."""
    return lambda inputs: np.tile(np.log(np.float32(classes)), (len(inputs), 1))


def test_two_networks_answer_as_the_mean_of_their_shares() -> None:
    networks = [likely(0.6, 0.3, 0.1), likely(0.1, 0.5, 0.4)]
    shares = answered(networks, torch.rand(4, 1, 4, 4), 3, scores=True, versions=1)
    assert shares[0].tolist() == pytest.approx([0.35, 0.4, 0.25])
    assert answered(networks, torch.rand(4, 1, 4, 4), 3, scores=False, versions=1).tolist() == [1, 1, 1, 1]


def test_of_versions_the_mean_counts_or_the_majority_and_with_as_many_votes_the_query_itself() -> None:
    queries = torch.rand(4, 1, 4, 4)

    def knows(inputs: np.ndarray) -> np.ndarray:
        own = np.array_equal(inputs, queries[: len(inputs)].numpy())
        return likely(0.1, 0.9)(inputs) if own else likely(0.8, 0.2)(inputs)

    assert answered([knows], queries, 2, scores=True, versions=3)[0].tolist() == pytest.approx([1.7 / 3, 1.3 / 3])
    assert answered([knows], queries, 2, scores=False, versions=1).tolist() == [1, 1, 1, 1]
    assert answered([knows], queries, 2, scores=False, versions=2).tolist() == [1, 1, 1, 1]
    assert answered([knows], queries, 2, scores=False, versions=3).tolist() == [0, 0, 0, 0]


def test_versions_of_a_picture_are_near_it_and_stay_in_the_range_of_all() -> None:
    ramp = torch.linspace(0, 1, 12).expand(2, 1, 12, 12).contiguous()
    first, *others = versions_of(ramp, 5)
    assert torch.equal(first, ramp)
    assert len(others) == 4
    for other in others:
        assert other.shape == ramp.shape
        assert not torch.equal(other, ramp)
        assert 0 <= other.min() <= other.max() <= 1
        away = min(float((each - ramp).abs().mean()) for each in (other, other.flip(-1)))
        assert away < 2 / 11 + 0.05


def test_a_student_of_a_student_begins_otherwise_than_its_teacher_did(counted: Counted, tmp_path: Path) -> None:
    built: list[int] = []

    def build(seed: int) -> torch.nn.Module:
        built.append(seed)
        return counted.build(seed)

    problem = counted.problem(build=build)
    assert fill(problem, tmp_path, UNTOUCHED) == []
    built.clear()
    counted.trained.clear()
    assert fill(problem, tmp_path, Line("once", (COPY,)), Line("twice", (COPY, COPY))) == []
    assert sorted(seed for seed in built if seed) == [501, 502, 701, 702]
    assert sorted(counted.trained) == [1, 2, 201, 202], "the first student serves both lines"
    assert fill(problem, tmp_path, Line("twice", (COPY, COPY)), again=True) == []
    assert len(counted.trained) == 4, "students are kept beside the networks that they learned from"


def test_a_step_has_the_share_of_the_thiefs_rows_or_queries_that_are_not_the_tasks(
    counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def counts(model: torch.nn.Module, data: Any, random: Any) -> torch.nn.Module:
        ((inputs, labels),) = data.batches(1000, torch.Generator())
        seen.append((len(inputs), labels is not None))
        return model

    monkeypatch.setattr(catalogue, "ATTACKS", {"counts": Attack("counts", "stand-in", counts, "module")})
    problem = counted.problem(elsewhere=lambda: torch.rand(7, 1, 4, 4))
    steps = [
        Step("counts"),
        Step("counts", share=0.1),
        Step("counts", share=0.001),
        Step("counts", elsewhere=True),
        Step("counts", elsewhere=True, recipe=True),
    ]
    lines = [Line(f"{number}", (step,)) for number, step in enumerate(steps)]
    assert fill(problem, tmp_path, *lines) == []
    assert seen[: len(steps) - 1] == [(20, True), (2, True), (1, True), (7, False)]
    assert counted.rows[-1] == 7, "of the student that learned from the recipe"


def test_another_owners_network_is_asked_beside_the_marked_one(counted: Counted, tmp_path: Path) -> None:
    pair = Line("of two", (dataclasses.replace(COPY, two=True),))
    problem = counted.problem()
    assert fill(problem, tmp_path, pair) == []
    kept = {file.name.rpartition("-")[0] for file in (tmp_path / "tiny" / "networks").glob("adi-*.pt")}
    assert kept == {"adi-1", "adi-2", "adi-3", "adi-1-copy", "adi-2-copy"}, "two owners each, for two seeds"
    assert {row.base for row in cells.read(tmp_path, "tiny").values() if row.preset == "adi"} == {grid.MARKED}


def test_what_a_step_is_not_leaves_its_key_as_it_was() -> None:
    (said,) = json.loads(grid.as_json([Step("worse")]))
    assert said == {"attack": "worse", "options": {}, "student": False, "elsewhere": False}
    changed = [{"share": 0.1}, {"recipe": True}, {"versions": 5}, {"two": True}]
    for each in changed:
        (said,) = json.loads(grid.as_json([Step("worse", **each)]))
        assert said.items() >= each.items()


def test_lines_that_this_mark_asks_for_are_planned_for_it_alone() -> None:
    own = {line.label for line in grid.possible(CIFAR10, grid.LINES, "response")}
    asked = {line.label for line in grid.chosen(["copy by *", "adversarial training"])}
    assert asked <= own
    for problem in PROBLEMS.values():
        for preset in problem.presets:
            others = {line.label for line in grid.possible(problem, grid.LINES, preset)} & asked
            assert (preset == "response" and problem is not DIGITS) or others <= {"copy by labels"}


@pytest.mark.slow
def test_every_line_of_response_is_measured_end_to_end(
    counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "ATTACKS", {attack.name: attack for attack in PAGE})
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(192) % 2
    rows = (labels[:, None, None, None] + torch.rand(192, 1, 4, 4, generator=generator)) / 2
    data = Data(*((rows[start : start + 64], labels[start : start + 64]) for start in (0, 64, 128)))
    few = {name: {"epochs": 1} for name in ("ftal", "wrk", "overwrite")}
    problem = counted.problem(
        load=lambda _: data,
        presets=("response",),
        mark_options={"response": {"bits": 256, "probes": 256}},
        attack_options={**few, "adversarial": {"epochs": 1, "steps": 2}},
        tuned={"response": 2},
        planned={"response": CIFAR10.planned["response"]},
        without=(),
        half=True,
    )
    lines = grid.possible(problem, [*grid.LINES, *grid.SERVED_LINES], "response")
    assert fill(problem, tmp_path, *lines) == []
    found = cells.read(tmp_path, "tiny").values()
    assert {cell.key for cell in every(problem, *lines)} == {row.key for row in found}
    assert len({row.attack for row in found}) == len(lines)
    asked = questions.measure(problem, None, grid.SEEDS[:1], tmp_path)
    assert [(row["network"], row["decision"]) for row in asked] == [(name, "not_proven") for name in READ]
    assert all(0 < row["queries"] <= row["pool"] for row in asked)
