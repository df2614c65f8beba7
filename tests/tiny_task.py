"""The tiny task that tests of the robustness table measure: networks of two clouds of points, trained in no time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.robustness import grid, runner
from benchmarks.robustness.cells import Row
from benchmarks.robustness.grid import Cell, Line, Step
from benchmarks.robustness.problems import DIGITS, Problem
from wmengine.demo import Data

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


def every(problem: Problem, *lines: Line, seeds: tuple[int, ...] = (1, 2)) -> list[Cell]:
    return grid.cells_of(problem, problem.presets, seeds, lines or (UNTOUCHED, WORSE, WORSE_TWICE, STRANGER))


def fill(problem: Problem, out: Path, *lines: Line, **options: Any) -> list[str]:
    return runner.fill(problem, problem.load(None), every(problem, *lines), out, **options)


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
