"""Measure the cells that are missing. A network is trained once, kept with its mark, and all attacks begin with it."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.environment import device_name, git_commit
from benchmarks.robustness import cells
from benchmarks.robustness.asking import answered
from benchmarks.robustness.grid import (
    AGAIN_SEEDS,
    CONTROL_SEEDS,
    FRESH_SEEDS,
    MARKED,
    SEEDS,
    SERVED,
    STRANGER_SEEDS,
    STUDENT_SEEDS,
    TUNED,
    TURNING,
    TURNING_STRENGTH,
    TWIN,
    UNMARKED,
    Cell,
    Step,
    as_json,
    digest,
    recipe_of,
)
from benchmarks.robustness.lessons import Learner, Lesson
from benchmarks.robustness.problems import Problem
from benchmarks.robustness.reading import Correct, accuracy, correct, evidence, loss
from wmengine.attacks import attack, run
from wmengine.demo import Data
from wmengine.identity.key import Key
from wmengine.marking.embedder import Embedder
from wmengine.marking.serving import response
from wmengine.marks.watermark import Watermark
from wmengine.suspects import open_suspect

_SERVICES = (SERVED, TURNING)
PACKAGES = ("wmengine", "torch", "numpy", "onnx", "onnxruntime", "scikit-learn")


@dataclass(frozen=True)
class Network:
    """A trained network or its service, its mark if it has one, which test inputs it answers rightly, how long it
    trained, and the commit of the code that trained it."""

    model: Any
    mark: Watermark | None
    correct: Correct
    seconds: float
    commit: str | None


class Bench:
    """What the cells of one problem share: data, device, trained networks, and copies that go on being attacked.

    scratch: a folder for attacked files.
    """

    def __init__(self, problem: Problem, data: Data, out: Path, device: str, scratch: Path) -> None:
        self.problem, self.device = problem, device
        self.data = Data(*((x.to(device), y.to(device)) for x, y in data))
        self._kept = out / problem.name / "networks"
        self._networks: dict[str, Network] = {}
        self._copies: dict[tuple[str, str], tuple[Any, float]] = {}
        self._files = (scratch / f"{number}.onnx" for number in itertools.count())

    def network(self, preset: str, seed: int, base: str) -> Network:
        """Trained now, or before and kept."""
        first, lesson = preset.split()[0], self.problem.lessons.get(preset, Lesson())
        if base == TUNED and self.problem.tuned.get(first) == self.problem.tuned[preset] and not lesson.taught:
            preset = first  # without a mark it is the same network, whatever the mark's options
        name = _name_of(preset, seed, base)
        if name not in self._networks and base in _SERVICES:
            self._networks[name] = self._service(preset, seed, base)
        if name not in self._networks:
            preset = preset if base in (MARKED, TUNED) else UNMARKED
            file = self._kept / f"{name}-{digest(recipe_of(self.problem, preset))[:8]}.pt"
            if not file.exists():
                own = base in (MARKED, TWIN, TUNED)
                seed = seed if own else STRANGER_SEEDS + int(base.split()[1])
                self._train(file, preset, seed, marked=base == MARKED)
            self._networks[name] = self._load(file)
        return self._networks[name]

    def copy(self, cell: Cell) -> tuple[Any, float]:
        """A network after all steps of the cell, a module or a file, and the seconds that they took."""
        model: Any = self.network(cell.preset, cell.seed, cell.line.base).model
        name, seconds = _name_of(cell.preset, cell.seed, cell.line.base), 0.0
        seed = (
            cell.seed if cell.line.base == MARKED or cell.line.base in _SERVICES else 0
        )  # a stranger's copies serve the marks of all seeds
        for count, step in enumerate(cell.steps, start=1):
            place = name, as_json(cell.steps[:count])
            if place not in self._copies:
                asked = [model]
                if step.two:
                    asked.append(self.network(cell.preset, SEEDS[cell.seed % len(SEEDS)], MARKED).model)
                if step.recipe:
                    again = AGAIN_SEEDS * sum(each.recipe for each in cell.steps[: count - 1])
                    made = digest(recipe_of(self.problem, cell.preset), place[1])[:8]
                    self._copies[place] = self._student(
                        f"{name}-copy-{made}", asked, step, self._rows(step)[0], seed + again
                    )
                else:
                    began = time.perf_counter()
                    attacked = self._attacked(model, step, seed)
                    self._copies[place] = attacked, time.perf_counter() - began
            model, spent = self._copies[place]
            seconds += spent
        return model, seconds

    def forget(self, preset: str, seed: int) -> None:
        """Let go of what nothing asks for any more once all cells of a preset and a seed are measured."""
        name = _name_of(preset, seed, MARKED)
        self._networks.pop(name, None)
        for place in [place for place in self._copies if place[0] == name]:
            del self._copies[place]

    def _attacked(self, model: Any, step: Step, seed: int) -> Any:
        kind, options = attack(step.attack).takes, dict(step.options)
        if step.student:
            options["student"] = self.problem.other(seed)
        place = self.device if kind == "module" else "cpu"  # only training gains from another one
        data = tuple(rows if rows is None else rows.to(place) for rows in self._rows(step))
        if isinstance(model, nn.Module):
            model = model.to(place)
        half = self.problem.half and kind == "module"
        # Without a cache: it would keep the weights' first values for as long as the context lasts.
        with torch.autocast(place.partition(":")[0], torch.bfloat16, enabled=half, cache_enabled=False):
            out = next(self._files) if kind == "file" or not isinstance(model, nn.Module) else None
            return run(step.attack, model, data, out=out, seed=seed, **options)

    def _rows(self, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inputs that a thief has for a step, and their labels where they are the task's."""
        inputs, labels = (self.problem.elsewhere(), None) if step.elsewhere else self.data.thief
        count = len(inputs) if step.share is None else max(1, round(step.share * len(inputs)))
        return inputs[:count], None if labels is None else labels[:count]

    def _student(
        self, name: str, asked: Sequence[Any], step: Step, inputs: torch.Tensor, seed: int
    ) -> tuple[nn.Module, float]:
        """A student of what networks answer, trained by the owner's recipe, now or before and kept; and the seconds."""
        file, make = self._kept / f"{name}.pt", self.problem.other if step.student else self.problem.build
        if not file.exists():
            began = time.perf_counter()
            scores, classes = step.attack == "distil", self.problem.classes
            warmth = step.options.get("temperature", 1.0)
            answers = answered(asked, inputs, classes, scores=scores, versions=step.versions, warmth=warmth)
            rows = inputs.to(self.device), answers.to(self.device)
            model = self.problem.train(make(STUDENT_SEEDS + seed).to(self.device), rows, seed=seed)
            _keep(file, {"state": model.cpu().state_dict(), "seconds": time.perf_counter() - began})
        held, student = torch.load(file, weights_only=True), make(0)
        student.load_state_dict(held["state"])
        return student.eval().to(self.device), held["seconds"]

    def controls(self, preset: str, seed: int) -> list[nn.Module]:
        """The unmarked network of this seed, and students of its labels, of its architecture and of another."""
        found, recipe = [self.network(preset, seed, TWIN).model], digest(recipe_of(self.problem, UNMARKED))[:8]
        for other, kind in ((False, "student"), (True, "other")):
            step, name = Step("extract", student=other), f"{UNMARKED}-{seed}-{kind}-{recipe}"
            found.append(self._student(name, found[:1], step, self.data.owner[0], CONTROL_SEEDS + seed)[0])
        return [each.to(self.device) for each in found]

    def _service(self, preset: str, seed: int, base: str) -> Network:
        """The unmarked network of this seed, its scores marked as they are given out, and its decisions where it turns
        some."""
        twin, known = self.network(preset, seed, TWIN), self.controls(preset, seed)
        file = self._kept / f"{_name_of(preset, seed, SERVED)}-{digest(recipe_of(self.problem, preset))[:8]}.wm"
        if not file.exists():
            made = response(
                twin.model,
                key_of(seed),
                num_classes=self.problem.classes,
                sample=self.data.owner[0][:64],
                name=f"{self.problem.name}-service",
                probes=self.data.test[0],
                controls=known[1:],
                value_range=self.problem.value_range,
            )
            made.watermark().save(file)
        kept = Watermark.load(file)
        if base == SERVED:
            return Network(response(twin.model, mark=kept), kept, twin.correct, twin.seconds, git_commit())
        served = response(twin.model, mark=kept, strength=TURNING_STRENGTH, turns=True)
        right = correct(open_suspect(served), self.data.test, self.problem.classes)
        return Network(served, kept, right, twin.seconds, git_commit())

    def _train(self, file: Path, preset: str, seed: int, marked: bool) -> None:
        problem, began, embedder = self.problem, time.perf_counter(), None
        tuned = problem.tuned.get(preset)
        start = FRESH_SEEDS + seed if tuned == 0 else seed
        model = problem.build(start).to(self.device)
        controls = [] if tuned is None else self.controls(preset, seed)
        if tuned:
            model.load_state_dict(controls[0].state_dict())
        (x, y), apart = self.data.owner, problem.apart.get(preset, 0)
        rows, samples = (x[apart:], y[apart:]), (x[:apart], y[:apart]) if apart else self.data.owner
        if marked and preset != UNMARKED:
            own = problem.preset(preset)
            if "controls" in own.needs and not controls:
                other = CONTROL_SEEDS + seed
                controls = [problem.train(problem.build(other).to(self.device), rows, seed=other)]
            embedder = Embedder(
                model,
                key_of(seed),
                [own],
                num_classes=problem.classes,
                sample=self.data.owner[0][:64],
                name=problem.name,
                value_range=problem.value_range,
                samples=samples if tuned is None else self.data.test[0],
                controls=controls,
            )
        learner: Any = embedder
        if preset in problem.lessons:
            lesson, known = problem.lessons[preset], controls[:1]
            if lesson.taught:
                known = [*known, self.network(UNMARKED, SEEDS[seed % len(SEEDS)], TWIN).model.to(self.device)]
            learner = Learner(lesson, embedder, known)
        problem.train(model, rows, seed=start, embedder=learner, tuned=tuned)
        seconds = time.perf_counter() - began
        file.parent.mkdir(parents=True, exist_ok=True)
        if embedder is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the table shows a mark that does not prove itself
                (mark,) = embedder.watermarks()
            mark.save(file.with_suffix(".wm"), overwrite=True)
        right = torch.from_numpy(correct(open_suspect(model), self.data.test, problem.classes))
        state = model.cpu().state_dict()
        _keep(file, {"state": state, "correct": right, "seconds": seconds, "commit": git_commit()})

    def _load(self, file: Path) -> Network:
        held, model, mark = torch.load(file, weights_only=True), self.problem.build(0), file.with_suffix(".wm")
        model.load_state_dict(held["state"])
        watermark = Watermark.load(mark) if mark.exists() else None
        return Network(model.eval(), watermark, held["correct"].numpy(), held["seconds"], held.get("commit"))


def _keep(file: Path, held: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    torch.save(held, partial)
    os.replace(partial, file)


def key_of(seed: int) -> Key:
    """The owner's, one for each seed."""
    return Key("robustness", hashlib.sha256(f"wmengine robustness {seed}".encode()).digest())


def measure(bench: Bench, cell: Cell) -> cells.Row:
    """One cell."""
    own = bench.network(cell.preset, cell.seed, cell.line.base)
    served = cell.line.base in _SERVICES
    holds = cell.line.base if served else MARKED
    marked = None if cell.preset == UNMARKED else bench.network(cell.preset, cell.seed, holds)
    copy, seconds = bench.copy(cell)
    began = time.perf_counter()
    suspect = open_suspect(copy, isolation="none")
    try:
        right = correct(suspect, bench.data.test, bench.problem.classes) if cell.steps or served else own.correct
        found = evidence(suspect, None if marked is None else marked.mark, key_of(cell.seed))
    finally:
        suspect.close()
    seconds += time.perf_counter() - began if cell.steps else own.seconds
    before = marked
    if marked is own and not cell.steps:
        tuned = cell.preset in bench.problem.tuned and not served
        before = bench.network(cell.preset, cell.seed, TUNED if tuned else TWIN)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return cells.Row(
        key=cell.key,
        problem=cell.problem.name,
        recipe=cell.problem.recipe,
        preset=cell.preset,
        seed=cell.seed,
        attack=cell.line.label,
        base=cell.line.base,
        steps=as_json(cell.steps),
        **accuracy(right),
        **loss(None if before is None else before.correct, right),
        **found,
        seconds=seconds,
        versions=json.dumps(versions),
        commit=git_commit(),
        device=device_name(bench.device),
        threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        network_commit=own.commit,
    )


def fill(
    problem: Problem, data: Data, wanted: Sequence[Cell], out: Path, *, device: str = "cpu", again: bool = False
) -> list[str]:
    """Measure those of the wanted cells that OUT does not hold, all of them with `again`, and keep each row at once.

    Returns what failed, a sentence for each; the other cells are measured all the same. Says on stderr how far it is.
    """
    done = set() if again else cells.read(out, problem.name).keys()
    missing = [cell for cell in wanted if cell.key not in done]
    failed: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        bench = Bench(problem, data, out, device, Path(scratch))
        for number, cell in enumerate(missing, start=1):
            name = f"{problem.name}, {cell.preset}, seed {cell.seed}, {cell.line.label}"
            try:
                row = measure(bench, cell)
            except Exception as error:  # whatever an attack's own code raises
                failed.append(f"{name}: {error}")
                said = f"failed: {error}"
            else:
                cells.write(out, row)
                proven = "" if row.log10_p is None else f"log10 p {row.log10_p:.1f}, "
                said = f"{proven}accuracy {row.accuracy:.1%}, {row.seconds:.1f} s"
            left = (time.monotonic() - began) / number * (len(missing) - number) / 60.0
            print(f"{number}/{len(missing)}, {left:.0f} min left: {name}: {said}", file=sys.stderr, flush=True)
            if number == len(missing) or missing[number].group != cell.group:
                bench.forget(*cell.group)
    return failed


def _name_of(preset: str, seed: int, base: str) -> str:
    own = {MARKED: f"{preset}-{seed}", TWIN: f"{UNMARKED}-{seed}", TUNED: f"{preset}-{seed}-plain"}
    own |= {served: f"{preset}-{seed}-{served}" for served in _SERVICES}
    return own.get(base) or base.replace(" ", "-")
