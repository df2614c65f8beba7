"""Which cells there are: presets × lines (attacks with their options, one after another) × seeds, for each problem."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.robustness.problems import Problem
from wmengine.attacks import attack

# The network with the mark, the same one trained without, and where a finished one was marked that one trained on
# as long without.
MARKED, TWIN, TUNED = "marked", "twin", "tuned twin"
SERVED = "service"  # the twin, whose scores are marked as they are given out
TURNING_STRENGTH = 0.35
TURNING = f"service of labels at strength {TURNING_STRENGTH}"  # which turns decisions too
UNMARKED = "none"  # in the place of a preset
SEEDS = (1, 2, 3)  # that the tables show
STRANGERS = 5
# From which students trained by the recipe take theirs, and, further on, those that are controls.
STUDENT_SEEDS, CONTROL_SEEDS = 500, 100
FRESH_SEEDS = 300  # from which those take theirs that are marked from the beginning, beside a finished one
AGAIN_SEEDS = 200  # by which those of a student of a student are further on
STRANGER_SEEDS = 1000  # from which strangers take theirs, so that they share none with marked networks

_ALWAYS = ("attack", "options", "student", "elsewhere")  # of a step, in every key


@dataclass(frozen=True)
class Step:
    """One attack. student: another architecture's, for what trains one; elsewhere: queries that are not the task's;
    share: of the thief's rows, all of them for None; recipe: the student is trained as the owner trains his networks,
    and then versions: how many of each query are asked, for the mean or the majority of what they are answered; two: a
    network with another owner's mark is asked too, for the mean of both."""

    attack: str
    options: Mapping[str, Any] = field(default_factory=dict)
    student: bool = False
    elsewhere: bool = False
    share: float | None = None
    recipe: bool = False
    versions: int = 1
    two: bool = False


@dataclass(frozen=True)
class Line:
    """A line of the table: what is done, one step after another, to `base`, a network that the problem's recipe makes:
    MARKED, TWIN, SERVED, TURNING, or "stranger 1" …, trained apart from the marked one."""

    label: str
    steps: tuple[Step, ...] = ()
    base: str = MARKED


@dataclass(frozen=True)
class Cell:
    problem: Problem
    preset: str
    seed: int
    line: Line

    @property
    def steps(self) -> tuple[Step, ...]:
        """The line's, with every option: the attacks' defaults, and what the problem and the preset fill in. Raises
        ValueError for an attack or an option that does not exist."""
        found = []
        for step in self.line.steps:
            own = {"scheme": self.preset} if step.attack == "overwrite" else {}
            options = {**self.problem.attack_options.get(step.attack, {}), **own, **step.options}
            found.append(replace(step, options=attack(step.attack).options(options)))
        return tuple(found)

    @property
    def group(self) -> tuple[str, int]:
        """Cells of one group begin with the same marked network."""
        return self.preset, self.seed

    @property
    def key(self) -> str:
        """What a row is found by again: everything that says what was to be measured."""
        return digest(recipe_of(self.problem, self.preset), self.seed, self.line.base, as_json(self.steps))


def recipe_of(problem: Problem, preset: str) -> list[Any]:
    """How the networks of a problem are made, with this preset or UNMARKED."""
    own = None if preset == UNMARKED else problem.preset(preset)
    said = [problem.name, problem.recipe, preset, own and [own.full_name, own.options]]
    lesson = problem.lessons.get(preset)
    said += [more[preset] for more in (problem.tuned, problem.apart) if preset in more]
    return said if lesson is None else [*said, vars(lesson)]


def digest(*said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]


def as_json(steps: Sequence[Step]) -> str:
    """A list of objects, with every option; of what a step may be beside those of the first tables, what it is."""
    plain = vars(Step(""))
    said = [
        {name: value for name, value in vars(step).items() if name in _ALWAYS or value != plain[name]} for step in steps
    ]
    return json.dumps(said, sort_keys=True, default=str)


def _line(label: str, *steps: Step | str, base: str = MARKED) -> Line:
    return Line(label, tuple(Step(step) if isinstance(step, str) else step for step in steps), base)


_EXTRACT, _COPY = Step("extract"), Step("extract", recipe=True)
_COPY_SCORES, _COPY_WARM = (Step("distil", {"temperature": warmth}, recipe=True) for warmth in (1.0, 3.0))

LINES = (
    _line("untouched"),
    *(_line(name, name) for name in ("ftll", "ftal", "rtll", "rtal")),
    _line("ftal rate 0.01", Step("ftal", {"rate": 0.01})),
    *(
        _line(f"ftal 30 epochs rate {rate:g}", Step("ftal", {"epochs": 30, "rate": rate}))
        for rate in (1e-3, 3e-3, 1e-2, 3e-2)
    ),
    _line("adversarial training", "adversarial"),
    *(_line(f"prune {share:.0%}", Step("prune", {"share": share})) for share in (0.5, 0.8, 0.9, 0.95)),
    *(
        _line(f"prune {share:.0%} of each layer", Step("prune", {"share": share, "per_layer": True}))
        for share in (0.5, 0.9)
    ),
    *(_line(f"prune filters {share:.0%}", Step("prune_filters", {"share": share})) for share in (0.25, 0.5)),
    _line("prune 90% then ftal", Step("prune", {"share": 0.9}), "ftal"),
    *(
        _line(f"noise {name}", Step("noise", {"sigma": sigma}))
        for name, sigma in {"1/700": 1 / 700, "0.2": 0.2, "0.5": 0.5, "1": 1.0}.items()
    ),
    *(_line(name, name) for name in ("permute", "rescale", "flip")),
    _line("permute rescale flip", "permute", "rescale", "flip"),
    *(_line(name, name) for name in ("fp16", "rename")),
    *(_line(f"int8 {kind}", Step("int8", {"kind": kind})) for kind in ("qdq", "qoperator", "dynamic")),
    _line("overwrite", "overwrite"),
    _line("overwrite 3 times", Step("overwrite", {"times": 3})),
    _line("distil", "distil"),
    _line("distil T=1", Step("distil", {"temperature": 1.0})),
    _line("distil other architecture", Step("distil", student=True)),
    _line("distil elsewhere", Step("distil", elsewhere=True)),
    _line("extract", _EXTRACT),
    _line("extract other architecture", Step("extract", student=True)),
    _line("extract elsewhere", Step("extract", elsewhere=True)),
    _line("extract then ftal", _EXTRACT, "ftal"),
    _line("extract then wrk", _EXTRACT, "wrk"),
    _line("copy by scores", _COPY_SCORES),
    _line("copy by scores of five versions", replace(_COPY_SCORES, versions=5)),
    _line("copy by labels", _COPY),
    _line("copy by labels of five versions", replace(_COPY, versions=5)),
    _line("copy by labels of two marked networks", replace(_COPY, two=True)),
    _line("copy by labels to another architecture", replace(_COPY, student=True)),
    _line("copy by labels elsewhere", replace(_COPY, elsewhere=True)),
    _line("copy by labels twice", _COPY, _COPY),
    *(
        _line(
            f"copy by labels then ftal on {share:.0%} of true labels", _COPY, Step("ftal", {"epochs": 50}, share=share)
        )
        for share in (0.01, 0.1)
    ),
    _line("copy by labels then ftal", _COPY, "ftal"),
    _line("copy by labels then wrk", _COPY, "wrk"),
    _line("copy by labels then overwrite", _COPY, "overwrite"),
    *(_line(f"stranger {number}", base=f"stranger {number}") for number in range(1, STRANGERS + 1)),
    _line("stranger 1 then ftal", "ftal", base="stranger 1"),
    _line("stranger 2 then distil", "distil", base="stranger 2"),
)
TWIN_LINE = Line("untouched", base=TWIN)
SERVED_LINES = (  # of presets that are put into finished networks
    _line("service", base=SERVED),
    *(
        _line(f"service copied by scores{said}", step, base=SERVED)
        for copied, how in ((_COPY_SCORES, ""), (_COPY_WARM, " softened at T=3"))
        for step, said in ((copied, how), (replace(copied, student=True), f"{how} to another architecture"))
    ),
    _line(TURNING, base=TURNING),
    _line(f"{TURNING} copied", _COPY, base=TURNING),
    _line(f"{TURNING} copied to another architecture", replace(_COPY, student=True), base=TURNING),
)


def cells_of(problem: Problem, presets: Sequence[str], seeds: Iterable[int], lines: Sequence[Line]) -> list[Cell]:
    """Seed by seed and preset by preset, so that what was begun is whole early; the unmarked twin comes first."""
    found = []
    for seed in seeds:
        found.append(Cell(problem, UNMARKED, seed, TWIN_LINE))
        found += [
            Cell(problem, preset, seed, line)
            for preset in presets
            for line in possible(problem, lines, preset)
            if line not in SERVED_LINES or preset in problem.tuned
        ]
    return found


def possible(problem: Problem, lines: Sequence[Line], preset: str) -> list[Line]:
    """The lines that a preset is measured on."""
    planned = problem.planned.get(preset, ("*",))
    return [line for line in lines if _is_one(line, planned) and not _is_one(line, problem.without)]


def _is_one(line: Line, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(line.label, each) for each in patterns)


def chosen(patterns: Sequence[str] | None) -> list[Line]:
    """The lines whose labels are these, or match them as the names of files do; all for None. ValueError where one
    matches none."""
    every = (*LINES, *SERVED_LINES)
    for pattern in patterns or ():
        if not any(_is_one(line, [pattern]) for line in every):
            raise ValueError(f"there is no line {pattern!r}: --list shows them, and '{pattern}*' is all that begin so")
    return [line for line in every if patterns is None or _is_one(line, patterns)]
